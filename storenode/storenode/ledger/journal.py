"""What this node holds of the log: entries on disk, their Merkle tree, what they mean, and the newest published checkpoint it knows.

Law: the journal only grows, and grows on disk before anybody hears of it. It folds entries into the state a moment after they are stored,
or at once when somebody asks, because checking authors' signatures must not delay a cosignature. A note that claims to be published
is checked when it is first needed, against the quorum and against this node's own tree.

Decides nothing about who may append: ``mirror`` and ``sequencer`` do.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, open_published
from medshard_protocol.entries import Entry
from medshard_protocol.errors import Damaged, MedshardError, Unavailable
from medshard_protocol.ids import FileId
from medshard_protocol.merkle import sha256
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import Roster
from medshard_protocol.state import State
from medshard_protocol.tiles import Tree, tile_width
from storenode.ledger.store import Head, Store

fold_after_s = 0.02  # other processes on the machine are still busy with the same checkpoint
remember_after_s = 1.0  # after a crash at most this much is checked again
fold_entries_max = 64  # checked in one go without letting requests wait: about 8 ms
unfolded_entries_max = 4096  # a mirror that catches up lets its state fall no further behind: who asks for it waits half a second
replay_entries_max = 512
quick_commit_s = 0.0005  # a disk this fast is not worth a hop to a thread, which costs 60 microseconds of processor
recent_entries_max = 2048  # kept in memory for mirrors that are almost up to date

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Published(NamedTuple):
    """A checkpoint that a quorum cosigned, and the note that shows it."""

    checkpoint: Checkpoint
    note: bytes


class Journal:
    """One node's copy of the log. Lives in one event loop; ``start`` and ``close`` it there."""

    def __init__(self, folder: Path, roster: Roster) -> None:
        self.roster = roster
        self.store = Store(folder, roster.origin, sha256(b""))
        self._disk = asyncio.Lock()  # one write at a time
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._typical_commit_s = 1.0  # until measured, a disk is slow
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._state = State(roster)
        self._unsigned: set[int] = set()  # found since the start
        self._parsed: dict[int, Entry] = {}  # entries that somebody else has checked already, by place
        self._published: Published | None = None
        self._heard = b""  # says to be published; unchecked
        self._remembering: asyncio.Future[None] | None = None
        self._closed = False
        self._load()

    def _load(self) -> None:
        self.head = self.store.head()
        last = self.store.entries(self.head.size - self.head.size % tile_width, self.head.size)
        self._tree = Tree.load(self.head.size, [merkle.leaf_hash(entry, sha256) for entry in last], self.store.tile)
        self._recent_start, self._recent = self.head.size - len(last), last
        if self._tree.root(self.head.size) != self.head.root:
            raise Damaged("the ledger's entries do not match the root that was stored with them", hint="let this node mirror the log anew")

    async def start(self) -> None:
        """Fold the entries that are on disk. What was checked before the last stop is not checked again."""
        memory = self.store.memory()
        for start in range(0, self.head.size, replay_entries_max):
            end = min(start + replay_entries_max, self.head.size)
            for place, data in enumerate(self.store.entries(start, end), start):
                if place >= memory.checked:
                    self._fold_one(place, data)
                else:
                    self._state.apply(None if place in memory.unsigned else _parse(data))
            await asyncio.sleep(0)
        self._heard = memory.published

    async def close(self) -> None:
        """Finish the write that is under way and close the files."""
        for timer in self._timers.values():
            timer.cancel()
        async with self._disk:
            self._closed = True
            try:
                self.store.remember(*self._memory())
            finally:
                self._thread.shutdown()
                self.store.close()

    # -- growing

    def frontier(self) -> merkle.Frontier:
        """The right edge of the tree, to try out what appending would give. Not to be asked for during a write."""
        if self._tree.size != self.head.size:
            raise Unavailable("the ledger could not be read back after a failed write", hint="restart the node")
        return self._tree.frontier()

    async def extend(self, entries: Sequence[bytes], leaves: Sequence[bytes], head: Head, *, parsed: Sequence[Entry] = ()) -> None:
        """Append durably. ``parsed`` are the same entries where their authors' signatures were checked; such entries can be found again.

        The caller holds whatever lock makes its decision and this call one step. Raises Full, Unavailable, or Conflict, and then
        nothing has changed.
        """
        old_size = self.head.size
        tiles = [tile for leaf in leaves for tile in self._tree.append(leaf)]
        try:
            async with self._disk:
                await self._write(self.store.extend, old_size, entries, tiles, head, leaves if parsed else ())
        except BaseException:
            self._load()  # the tree ran ahead of the disk
            raise
        self.head = head
        self._recent += entries
        if len(self._recent) > 2 * recent_entries_max:
            self._recent_start += len(self._recent) - recent_entries_max
            self._recent = self._recent[-recent_entries_max:]
        self._parsed.update(enumerate(parsed, old_size))
        self._later("fold", fold_after_s, self._fold_some)

    async def keep_up(self) -> None:
        """Fold until not too much is left, letting others have turns. For a caller that adds much."""
        while self.head.size - self._state.size > unfolded_entries_max:
            self._fold(fold_entries_max)
            await asyncio.sleep(0)

    async def index(self) -> None:
        """Make all entries findable by their leaf hash, which a sequencer needs to recognise what it has."""
        for start in range(self.store.indexed(), self.head.size, replay_entries_max):
            entries = self.store.entries(start, min(start + replay_entries_max, self.head.size))
            self.store.index(start, [merkle.leaf_hash(entry, sha256) for entry in entries])
            await asyncio.sleep(0)

    # -- reading

    def entries(self, start: int, end: int) -> list[bytes]:
        """Entries from ``start`` up to but not including ``end``."""
        if start >= self._recent_start:
            return self._recent[start - self._recent_start : end - self._recent_start]
        return self.store.entries(start, end)

    @property
    def tree(self) -> Tree:
        """The Merkle tree; to read. During a write it is ahead of ``head``."""
        return self._tree

    @property
    def state(self) -> State:
        """What all stored entries mean."""
        self._fold(self.head.size - self._state.size)
        return self._state

    @property
    def published(self) -> Published | None:
        """The newest checkpoint with a quorum that this node knows, and has all entries of."""
        if self._heard:
            self._check_heard()
        return self._published

    def inclusion(self, place: int, published: Published) -> Inclusion:
        """Prove the entry at ``place`` under ``published``."""
        path = self._tree.inclusion_path(place, published.checkpoint.size)
        return Inclusion(place, self.entries(place, place + 1)[0], tuple(path), published.note)

    def inclusion_of(self, file_id: FileId) -> Inclusion | None:
        """Prove the registration of a file; None if there is none under the newest published checkpoint that is known here."""
        registration, published = self.state.registrations.get(file_id), self.published
        if registration is None or published is None or registration.index >= published.checkpoint.size:
            return None
        return self.inclusion(registration.index, published)

    def publish(self, published: Published) -> None:
        """Take note of a checkpoint that was just found to have its quorum."""
        self._published, self._heard = published, b""
        self._later("remember", remember_after_s, self._remember_soon)

    def hear(self, note: bytes) -> None:
        """Take note of a checkpoint that somebody says has its quorum. It is checked when it is needed."""
        if self._published is None or note != self._published.note:
            self._heard = note
            self._later("remember", remember_after_s, self._remember_soon)

    # -- inside

    def _check_heard(self) -> None:
        try:
            claimed = Checkpoint.from_text(Note.from_bytes(self._heard).text)
            if claimed.size > self.head.size:
                return  # cosigned by others before this node has the entries; kept until they come
            note, self._heard = self._heard, b""
            checkpoint = open_published(note, self.roster)
            if self._tree.root(checkpoint.size) != checkpoint.root:
                raise Damaged(f"a quorum cosigned another history of {checkpoint.size} entries than this node has")
        except MedshardError as error:
            self._heard = b""
            _log.error("a checkpoint that was announced as published is not believed: %s", error)
            return
        if self._published is None or checkpoint.size >= self._published.checkpoint.size:
            self._published = Published(checkpoint, note)

    def _fold_some(self) -> None:
        self._fold(min(fold_entries_max, self.head.size - self._state.size))
        if self._state.size < self.head.size:
            self._later("fold", 0, self._fold_some)
        else:
            self._later("remember", remember_after_s, self._remember_soon)

    def _fold(self, count: int) -> None:
        if count > 0:
            start = self._state.size
            for place, data in enumerate(self.entries(start, start + count), start):
                self._fold_one(place, data)

    def _fold_one(self, place: int, data: bytes) -> None:
        entry = self._parsed.pop(place, None)
        if entry is None:
            entry = _parse(data)
            try:
                if entry is not None:
                    entry.verify(self.roster.origin)
            except MedshardError:
                entry = None
            if entry is None:
                self._unsigned.add(place)
                _log.warning("ledger entry %d is malformed or not signed by its author; it has no effect", place)
        self._state.apply(entry)

    def _remember_soon(self) -> None:
        self._remembering = asyncio.ensure_future(self._remember())

    async def _remember(self) -> None:
        async with self._disk:
            if not self._closed:
                await self._write(self.store.remember, *self._memory())

    def _memory(self) -> tuple[int, set[int], bytes]:
        return self._state.size, self._unsigned, self._heard or (self._published.note if self._published else b"")

    async def _write(self, write: Callable[..., _T], *values: object) -> _T:
        def timed() -> _T:
            began = time.perf_counter()
            try:
                return write(*values)
            finally:
                self._typical_commit_s += (time.perf_counter() - began - self._typical_commit_s) / 4

        if self._typical_commit_s < quick_commit_s:
            return timed()
        writing = asyncio.get_running_loop().run_in_executor(self._thread, timed)
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait([writing])  # nobody else may write, nor read what was written, before this is over
            raise

    def _later(self, what: str, delay_s: float, act: Callable[[], object]) -> None:
        """Do something once, soon, however often it is asked for meanwhile."""
        if what in self._timers:
            return

        def fire() -> None:
            del self._timers[what]
            act()

        self._timers[what] = asyncio.get_running_loop().call_later(delay_s, fire)


def _parse(data: bytes) -> Entry | None:
    try:
        return Entry.from_bytes(data)
    except MedshardError:
        return None
