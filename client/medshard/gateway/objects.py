"""Reading sealed objects of the store by range, under one ACCESS entry for each study.

Law: every byte from the store goes through ``Objects``, so that a cache can stand in front of it and no read goes unannounced. The
announcement of a study covers all its objects and is made once while it lasts.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, Protocol

from medshard.lookup import Opened
from medshard.vault import Vault
from medshard_protocol.entries import Purpose

opened_max: Final = 128  # headers kept open: a pack of 1,000 slices has 300 KiB of it


class Objects(Protocol):
    """Where instances are read from once they are stored."""

    async def announce(self, file_ids: Sequence[bytes]) -> None:
        """Say in the ledger that these objects of one study will be read. Raises Refused or Unavailable."""

    async def span(self, file_id: bytes, member: int | None) -> tuple[int, int]:
        """Offset and size of a member (None: of the whole file) in its object's plaintext. Raises Absent."""

    async def read(self, file_id: bytes, start: int, stop: int) -> bytes:
        """Bytes of an object's plaintext. Raises Absent, Refused, Unavailable, Damaged."""


class StoreObjects:
    """The nodes themselves."""

    def __init__(self, vault: Vault, purpose: int = Purpose.TREATMENT) -> None:
        self._vault = vault
        self._purpose = purpose
        self._opened: OrderedDict[bytes, Opened] = OrderedDict()
        self._turn = asyncio.Lock()

    async def announce(self, file_ids: Sequence[bytes]) -> None:
        """One entry for up to 48 objects; none where they are announced already."""
        async with self._turn:  # or two readers of one study would both write an entry
            await self._vault.announce(file_ids, self._purpose)

    async def span(self, file_id: bytes, member: int | None) -> tuple[int, int]:
        """By the object's sealed header."""
        header = (await self._open(file_id)).header
        return (0, header.size) if member is None else (header.members[member].offset, header.members[member].size)

    async def read(self, file_id: bytes, start: int, stop: int) -> bytes:
        """From the k fastest holders, each cell checked."""
        return await self._vault.read_object(await self._open(file_id), start, stop - start, self._purpose)

    async def _open(self, file_id: bytes) -> Opened:
        if file_id not in self._opened:
            self._opened[file_id] = await self._vault.object(file_id)
            while len(self._opened) > opened_max:
                self._opened.popitem(last=False)
        self._opened.move_to_end(file_id)
        return self._opened[file_id]
