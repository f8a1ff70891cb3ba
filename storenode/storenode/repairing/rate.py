"""How fast a node repairs: one bucket for everything that its repairs move, whether it takes a shard over, helps or hands one on.

Law: whoever moves bytes takes them out of the bucket first and waits until it may. Waiting is in turn, so that many share evenly.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

burst_s: Final = 0.25  # what may be moved at once after a pause
window_s: Final = 5.0  # over which ``recent`` is counted


def _now() -> float:
    return asyncio.get_running_loop().time()


class Bucket:
    """``rate`` bytes a second; 0 is as fast as it goes. Lives in one event loop."""

    def __init__(self, rate: float, clock: Callable[[], float] = _now) -> None:
        self._rate, self._clock = rate, clock
        self._free_at = 0.0  # when all that was taken so far has been paid for
        self._moved: deque[tuple[float, int]] = deque()

    async def take(self, size: int) -> None:
        """Wait until so many bytes may be moved."""
        now = self._clock()
        self._moved.append((now, size))
        if self._rate <= 0:
            return
        self._free_at = max(self._free_at, now - burst_s) + size / self._rate
        if (wait := self._free_at - now) > 0:
            await asyncio.sleep(wait)

    @property
    def recent(self) -> float:
        """Bytes a second, over the last seconds."""
        now = self._clock()
        while self._moved and self._moved[0][0] < now - window_s:
            self._moved.popleft()
        return sum(size for _, size in self._moved) / window_s

    @property
    def rate(self) -> float:
        """The limit in bytes a second; 0 for none."""
        return self._rate
