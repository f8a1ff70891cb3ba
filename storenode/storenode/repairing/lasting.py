"""Work that never ends, begun again after a fault."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

pause_s: Final = 5.0

log = logging.getLogger(__name__)


async def lasting(work: Callable[[], Awaitable[None]], what: str) -> None:
    """Do it until it is cancelled. A fault of one moment, a full disk or a bug, must not end a node's care for its files unseen."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("%s failed, and begins again", what)
        await asyncio.sleep(pause_s)
