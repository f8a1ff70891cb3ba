"""What goes through a node for its users just now, and how its own rounds give way to it.

Sixteen nodes that look at each other's heads and health spend a tenth of a core on it. Beside a transfer that is time which somebody waits
for, and a few seconds later it is not. Nothing is left out: a round waits for a lull, and not long.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final

give_way_s: Final = 2.0  # at most: a node that is never idle goes its rounds too

Lull = Callable[[], Awaitable[None]]


class Count:
    """Of things under way, and when there are none. Lives in one event loop."""

    def __init__(self) -> None:
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """While one more is under way."""
        self._under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def idle(self, limit_s: float) -> None:
        """Wait until none is, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._idle.wait()


class Traffic:
    """Counts long bodies on their way in and out."""

    def __init__(self) -> None:
        self._bodies = Count()

    def body(self) -> AbstractContextManager[None]:
        """While a long body is on its way."""
        return self._bodies.one()

    async def lull(self) -> None:
        """Wait until no long body is on its way, at most ``give_way_s``."""
        await self._bodies.idle(give_way_s)
