"""What a gateway has kept for speed of objects that were destroyed since: nothing of them stays in memory or on its disk.

Law: records of the cache do not tell what they are of, so after an erasure all of them go; it is a cache, and fills again. How many
objects had ended when it was last swept stands beside it, so that what was erased while no gateway ran is seen at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from medshard.durable import write_durably
from medshard.gateway.blocks import CachedBlocks

if TYPE_CHECKING:
    from medshard.custody import Custody


class Sweeper:
    """Of one gateway. ``note`` is a file of its own."""

    def __init__(self, custody: Custody, blocks: CachedBlocks, note: Path) -> None:
        self._custody = custody
        self._blocks = blocks
        self._note = note

    async def sweep(self) -> None:
        """Empty the caches if an object has ended since they were last swept."""
        ended = await asyncio.to_thread(lambda: str(len(self._custody.all_ended())))
        if ended != await asyncio.to_thread(self._noted):
            await self._blocks.clear()
            with contextlib.suppress(OSError):  # a full disk: it is swept once more, then
                await asyncio.to_thread(write_durably, self._note, ended.encode())

    def _noted(self) -> str:
        try:
            return self._note.read_text()
        except FileNotFoundError:
            return "0"
