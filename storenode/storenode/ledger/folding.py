"""Folding the entries on disk into the state: who signed what is checked here, once for each entry.

Law: the state is made of the journal's entries and nothing else, and is never ahead of them. Tables that remember another history than the
journal's are cleared and made anew. Where an entry hangs on a proposed roster that this node does not have, the fold stands still until it
has: ``missing`` says which, and asking for the state tries again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from medshard_protocol.entries import Approve, Entry
from medshard_protocol.errors import Absent, MedshardError, Unavailable
from medshard_protocol.facts import Documents
from medshard_protocol.ids import Sha256
from medshard_protocol.roster import Roster
from medshard_protocol.state import State
from storenode.ledger.engine import Memory
from storenode.ledger.tables import SqliteTables, save_rows_max

replay_entries_max = 512  # folded in one go at the start: some 20 ms
tables_name = "state.sqlite"

_log = logging.getLogger(__name__)


class Folding:
    """One journal's state. Lives in the journal's event loop."""

    def __init__(
        self,
        folder: Path,
        genesis: Roster,
        entries: Callable[[int, int], Sequence[bytes]],
        root: Callable[[int], bytes],
        line: Sequence[Roster] = (),
    ) -> None:
        self.documents: Documents = lambda sha256: None
        self.tables = SqliteTables(folder / tables_name)
        self._line = line
        self.state = State(genesis, self.tables, lambda sha256: self.documents(sha256), line)
        self.unsigned: set[int] = set()  # found since the start
        self.missing: Sha256 | None = None  # the proposed roster without which the fold cannot go on
        self._origin_at = genesis.origin_at
        self._entries = entries
        self._root = root
        self._checked = 0  # entries below were checked before the start
        self._known_unsigned: frozenset[int] = frozenset()
        self._parsed: dict[int, Entry] = {}  # entries that somebody else has checked already, by place
        self._saving: asyncio.Future[None] | None = None
        self.verifying: asyncio.Future[None] | None = None  # the tables, since the start

    def begin(self, memory: Memory, size: int, published: int) -> None:
        """Go on from the tables if they are of this history of ``size`` entries, ``published`` of which stay; else begin anew."""
        saved, saved_root = self.tables.root()
        if self.state.size != saved or saved > size or (saved and self._root(saved) != saved_root):
            if self.state.size:
                _log.warning("the state's tables are of another history and are made anew")
            self.tables.clear()
            self.state = State(self.state.genesis, self.tables, lambda sha256: self.documents(sha256), self._line)
        self.state.settle(published)
        self._checked, self._known_unsigned = memory.checked, memory.unsigned
        self.unsigned = set(self.state.unsigned(memory.checked))  # found after the journal remembered last
        if self.state.size:
            self.verifying = asyncio.ensure_future(self._verify())

    async def _verify(self) -> None:
        """Read all of the tables beside everything else: a node with millions of rows must not wait for it to start."""
        try:
            await asyncio.to_thread(self.tables.verify)
        except MedshardError as error:
            _log.error("%s; %s", error, error.hint)

    def believe(self, place: int, parsed: Sequence[Entry]) -> None:
        """Take these entries' signatures as checked."""
        self._parsed.update(enumerate(parsed, place))

    def fold(self, count: int) -> None:
        """Fold that many entries more, or fewer if the fold must stand still."""
        if self.missing is not None and self.documents(self.missing) is None:
            return
        start = self.state.size
        for place, data in enumerate(self._entries(start, start + count) if count > 0 else (), start):
            entry = self._checked_entry(place, data)
            try:
                self.state.apply(entry)
            except Absent as error:
                if self.missing is None:
                    _log.warning("the ledger's entry %d waits: %s", place, error)
                body = entry.body if entry is not None else None
                self.missing = body.roster_sha256 if isinstance(body, Approve) else None
                if entry is not None:
                    self._parsed[place] = entry
                return
            self.missing = None

    async def replay(self, size: int) -> None:
        """Fold up to ``size`` entries, or as far as it goes, letting others have turns and saving on the way."""
        while self.state.size < size:
            before = self.state.size
            self.fold(min(replay_entries_max, size - before))
            if self.state.size == before:
                return
            if self.tables.unsaved > save_rows_max:
                await self.save()
            await asyncio.sleep(0)

    def rewind(self, size: int) -> None:
        """Forget every entry from ``size`` on, because the journal has dropped them. What is left may be less still."""
        self.state.rewind(size)
        self.unsigned = {place for place in self.unsigned if place < size}
        self._known_unsigned = frozenset(place for place in self._known_unsigned if place < size)
        self._checked = min(self._checked, size)
        self._parsed.clear()
        self.missing = None

    async def save(self) -> None:
        """Save the tables as they are now. A failure is logged: they are a cache."""
        if self._saving is not None:
            await asyncio.wait([self._saving])
            return
        size = self.state.size
        root = self._root(size)
        self.tables.begin_save()
        self._saving = asyncio.ensure_future(asyncio.to_thread(self.tables.write, size, root))
        written = False
        try:
            await asyncio.shield(self._saving)
            written = True
        except Unavailable as error:
            _log.warning("%s", error)
        except asyncio.CancelledError:
            await asyncio.wait([self._saving])
            written = self._saving.exception() is None
            raise
        finally:
            self._saving = None
            self.tables.end_save(written=written)

    async def close(self) -> None:
        """Save and close."""
        if self.verifying is not None:
            await asyncio.wait([self.verifying])
        try:
            await self.save()
            await self.save()  # the first may have waited for an earlier one
        finally:
            self.tables.close()

    def _checked_entry(self, place: int, data: bytes) -> Entry | None:
        entry = self._parsed.pop(place, None)
        if entry is not None:
            return entry
        if place < self._checked:
            return None if place in self._known_unsigned or place in self.unsigned else _parse(data)
        entry = _parse(data)
        try:
            if entry is not None:
                entry.verify(self._origin_at(place))
        except MedshardError:
            entry = None
        if entry is None:
            self.unsigned.add(place)
            _log.warning("ledger entry %d is malformed or not signed by its author; it has no effect", place)
        return entry


def _parse(data: bytes) -> Entry | None:
    try:
        return Entry.from_bytes(data)
    except MedshardError:
        return None
