"""Opened stripes of objects: the latest in memory, more of them in the cache on disk."""

from __future__ import annotations

import asyncio
from typing import Final

from medshard.gateway.cache import BlockCache
from medshard.ranges import MemoryBlocks
from medshard_protocol.ids import FileId

memory_bytes: Final = 96 * 1024 * 1024


class CachedBlocks:
    """What ``Vault.ranges`` keeps stripes in, where a gateway runs."""

    def __init__(self, cache: BlockCache, *, bytes_max: int = memory_bytes) -> None:
        self._memory = MemoryBlocks(bytes_max)
        self._cache = cache

    def has(self, file_id: FileId, number: int) -> bool:
        """Whether a stripe is kept."""
        return self._memory.has(file_id, number) or self._cache.has(self._name(file_id, number))

    async def get(self, file_id: FileId, number: int) -> bytes | None:
        """A kept stripe's plaintext."""
        if (found := await self._memory.get(file_id, number)) is not None:
            return found
        name = self._name(file_id, number)
        if not self._cache.has(name):
            return None
        found = await asyncio.to_thread(self._cache.get, name)
        if found is not None:
            await self._memory.put(file_id, number, found)
        return found

    async def put(self, file_id: FileId, number: int, plain: bytes) -> None:
        """Keep it."""
        await self._memory.put(file_id, number, plain)
        await asyncio.to_thread(self._cache.put, self._name(file_id, number), plain)

    async def clear(self) -> None:
        """Keep nothing any more, nor whatever else lies in the cache on disk."""
        self._memory.clear()
        await asyncio.to_thread(self._cache.clear)

    def _name(self, file_id: FileId, number: int) -> bytes:
        return self._cache.name(b"stripe", file_id, number.to_bytes(8))
