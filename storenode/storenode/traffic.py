"""What goes through a node for its users just now, and how its own rounds give way to it.

Sixteen nodes that look at each other's heads and health spend a tenth of a core on it. Beside a transfer that is time which somebody waits
for, and a few seconds later it is not. Nothing is left out: a round waits for a lull, and not long.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

give_way_s: Final = 2.0  # at most: a node that is never idle goes its rounds too

Lull = Callable[[], Awaitable[None]]


class Traffic:
    """Counts long bodies on their way in and out. Lives in one event loop."""

    def __init__(self) -> None:
        self._bodies = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    @contextlib.contextmanager
    def body(self) -> Iterator[None]:
        """While a long body is on its way."""
        self._bodies += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._bodies -= 1
            if not self._bodies:
                self._quiet.set()

    async def lull(self) -> None:
        """Wait until no long body is on its way, at most ``give_way_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(give_way_s):
                await self._quiet.wait()
