"""Reads in an emergency: signed requests that this node has served, kept until the ledger has them.

    DATA/emergency/ENTRYID.entry      served, and not yet in the ledger
    DATA/emergency/ENTRYID.refused    the ledger does not take it: for the operator and the auditors to look at

Law: a request is on disk before the first byte leaves, and leaves this folder only when it is published. Who may is ``gate``'s to say.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from medshard_protocol.entries import Entry, entry_bytes_max
from medshard_protocol.errors import Conflict, Full, Malformed, MedshardError, Refused
from storenode import durable
from storenode.ledger.engine import name_of

folder_name: Final = "emergency"
kept_max: Final = 65_536
retry_s: Final = 2.0

log = logging.getLogger(__name__)


class Emergencies:
    """One node's folder. ``run`` appends what is in it, for as long as the node runs."""

    def __init__(
        self,
        data: Path,
        append: Callable[[Entry], Awaitable[object]],
        is_appended: Callable[[bytes], Awaitable[bool]],
        retry_s: float = retry_s,
        on_change: Callable[[int], None] = lambda waiting: None,
    ) -> None:
        self._folder = data / folder_name
        self._append = append
        self._is_appended = is_appended
        self._retry_s = retry_s
        self._on_change = on_change
        self._seen: dict[bytes, float] = {}  # when each was kept, by the monotonic clock
        self._waiting = asyncio.Event()
        self._keeping = asyncio.Lock()
        for path in self._folder.glob("*.entry"):
            self._seen[bytes.fromhex(path.stem)] = time.monotonic()
        if self._seen:
            self._waiting.set()
        on_change(self.waiting)

    @property
    def waiting(self) -> int:
        """How many are not yet in the ledger."""
        return len(self._seen)

    async def keep(self, entry: Entry, valid_s: float) -> bool:
        """Keep a request durably. False for one that is older than that, or in the ledger already. Raises Full."""
        async with self._keeping:
            kept_at = self._seen.get(entry.id)
            if kept_at is not None:
                return time.monotonic() - kept_at < valid_s
            if await self._is_appended(name_of(entry.to_bytes())):
                return False
            if len(self._seen) >= kept_max:
                raise Full("more emergency reads wait to be written down than this node keeps")
            await asyncio.to_thread(self._write, entry)
            self._seen[entry.id] = time.monotonic()
            self._on_change(self.waiting)
            self._waiting.set()
        log.warning("emergency read", extra={"entry": entry.id.hex(), "reader": entry.author.hex()})
        return True

    async def run(self) -> None:
        """Append what is kept, as soon as the ledger takes it."""
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            while left := sorted(self._folder.glob("*.entry")):
                if not await self._append_all(left):
                    await asyncio.sleep(self._retry_s)

    async def _append_all(self, paths: list[Path]) -> bool:
        for path in paths:
            try:
                entry = Entry.from_bytes(path.read_bytes()[: entry_bytes_max + 1])
                await self._append(entry)
            except (Refused, Conflict, Malformed) as error:
                log.error("an emergency read cannot be written down", extra={"entry": path.stem, "why": str(error)})
                path.rename(path.with_suffix(".refused"))
            except MedshardError as error:
                log.info("an emergency read waits", extra={"entry": path.stem, "why": str(error)})
                return False
            else:
                log.warning("emergency read written down", extra={"entry": path.stem})
                path.unlink(missing_ok=True)
            self._seen.pop(bytes.fromhex(path.stem), None)
            self._on_change(self.waiting)
        return True

    def _write(self, entry: Entry) -> None:
        if not self._folder.exists():
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            durable.sync_folder(self._folder.parent)
        durable.replace(self._folder / f"{entry.id.hex()}.entry", entry.to_bytes())
