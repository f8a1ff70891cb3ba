"""What tests of the client share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.client.servers import Four, n, serving


@pytest.fixture
async def four(consortium: Callable[..., Any], tmp_path: Path) -> AsyncIterator[Four]:
    """Four honest nodes, to be told otherwise."""
    async with serving(consortium(n), tmp_path) as each:
        yield each
