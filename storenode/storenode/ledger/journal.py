"""What this node holds of the log: entries on disk, their Merkle tree, what they mean, and the newest published checkpoint it knows.

Law: the journal grows on disk before anybody hears of it, and only ``replace`` ever drops something. It folds entries into the state a
moment after they are stored, or at once when somebody asks, because checking authors' signatures must not delay a cosignature. A note
that claims to be published is checked when it is first needed, against the quorum and against this node's own tree.

Decides nothing about who may append: ``mirror`` and ``sequencer`` do.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, open_published
from medshard_protocol.entries import Entry, Type, entry_version
from medshard_protocol.errors import Damaged, MedshardError, Refused
from medshard_protocol.ids import FileId
from medshard_protocol.merkle import sha256
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import Roster
from medshard_protocol.state import State
from medshard_protocol.tiles import TileName, Tree, tile_width
from storenode.ledger.engine import Engine, Head, name_of
from storenode.ledger.folding import Folding
from storenode.ledger.store import Store

fold_after_s = 0.2  # whoever needs what an entry means asks, and it is folded then; many at once cost less
remember_after_s = 1.0  # after a crash at most this much is checked again
fold_entries_max = 64  # checked in one go without letting requests wait: about 8 ms
unfolded_entries_max = 4096  # a mirror that catches up lets its state fall no further behind: who asks for it waits half a second
check_after_s = 1.0  # a published checkpoint is checked so soon even if nobody asks: the age of access entries is told by them
fold_again_s = 0.5  # for a fold that waits for a roster
quick_commit_s = 0.0005  # a disk this fast is not worth a hop to a thread, which costs 60 microseconds of processor
freeze_prefix = bytes([0x95, entry_version, Type.FREEZE])  # how an entry of this type begins: an array of five, version, type
recent_entries_max = 2048  # kept in memory for mirrors that are almost up to date

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Published(NamedTuple):
    """A checkpoint that a quorum cosigned, and the note that shows it."""

    checkpoint: Checkpoint
    note: bytes


class Journal:
    """One node's copy of the log. Lives in one event loop; ``start`` and ``close`` it there."""

    def __init__(
        self, folder: Path, roster: Roster, engine: Engine | None = None, *, line: Sequence[Roster] = (), evidence: Path | None = None
    ) -> None:
        self.roster = roster
        self.folder = folder
        self.evidence = evidence or folder
        self.store: Engine = engine or Store(folder, roster.origin, sha256(b""))
        self._disk = asyncio.Lock()  # one write at a time
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._typical_commit_s = 1.0  # until measured, a disk is slow
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.folding = Folding(folder, roster, self._known, lambda size: self._tree.root(size), line)
        self._published: Published | None = None
        self._heard = b""  # says to be published; unchecked
        self._heard_at = 0.0  # by the monotonic clock
        self.news = News()  # of entries and published checkpoints
        self.on_published: list[Callable[[Published, float], None]] = []  # told of each, and when it was heard by the monotonic clock
        self._remembering: asyncio.Future[None] | None = None
        self._replaying = False
        self._closed = False
        self._freezing = False  # a FREEZE entry was stored and perhaps not yet folded
        self._stale = True  # a write failed, and what it left has not been read back
        self._load()

    def _load(self) -> None:
        self.head, self.standing = self.store.head(), self.store.standing()
        self._tree, last = self._tree_of(self.head.size)
        self._recent_start, self._recent = self.head.size - len(last), last
        if self._tree.root(self.head.size) != self.head.root:
            raise Damaged("the ledger's entries do not match the root that was stored with them", hint="let this node mirror the log anew")
        self._stale = False

    def _tree_of(self, size: int) -> tuple[Tree, list[bytes]]:
        """The tree of the first ``size`` entries on disk, and those after its last full tile."""
        last = self.store.entries(size - size % tile_width, size)
        return Tree.load(size, [merkle.leaf_hash(entry, sha256) for entry in last], self.store.tile), last

    async def start(self) -> None:
        """Fold the entries that are on disk. What was checked before the last stop is not checked again."""
        memory = self.store.memory()
        self._heard, self._heard_at = memory.published, time.monotonic()
        self.folding.begin(memory, self.head.size, _size_or_none(memory.published))
        self._replaying = True  # to check what is published takes its roster, and so everything before it at once
        await self.folding.replay(self.head.size)
        self._replaying = False

    async def close(self) -> None:
        """Finish the write that is under way and close the files."""
        for timer in self._timers.values():
            timer.cancel()
        async with self._disk:
            self._closed = True
            try:
                self.store.remember(*self._memory())
                await self.folding.close()
            finally:
                self._thread.shutdown()
                self.store.close()

    # -- growing

    def frontier(self) -> merkle.Frontier:
        """The right edge of the tree, to try out what appending would give. Not to be asked for during a write."""
        if self._stale:
            self._load()
        return self._tree.frontier()

    def frontier_at(self, size: int) -> merkle.Frontier:
        """The right edge of an earlier tree."""
        return self._tree_of(size)[0].frontier()

    async def extend(
        self, entries: Sequence[bytes], leaves: Sequence[bytes], head: Head, *, parsed: Sequence[Entry] = (), epoch: int | None = None
    ) -> None:
        """Append durably, in the epoch that this node promised or another. ``parsed`` are the same entries where this node orders them
        and has checked their authors' signatures.

        The caller holds whatever lock makes its decision and this call one step. Raises Full, Unavailable, or Conflict, and then
        nothing has changed.
        """
        old_size = self.head.size
        epoch, names = self.standing.epoch if epoch is None else epoch, [name_of(entry) for entry in entries]
        tiles = [tile for leaf in leaves for tile in self._tree.append(leaf)]
        try:
            async with self._disk:
                what = (epoch, old_size, entries, tiles, head, names)
                if (remote := self.store.remote) is not None:
                    await _whole(asyncio.ensure_future(remote.extend(*what, own=bool(parsed))))
                else:
                    await self._write(partial(self.store.extend, own=bool(parsed)), *what)
        except BaseException:
            self._reload()  # the tree ran ahead of the disk
            raise
        self.head = head
        self._recent += entries
        if len(self._recent) > 2 * recent_entries_max:
            self._recent_start += len(self._recent) - recent_entries_max
            self._recent = self._recent[-recent_entries_max:]
        self.folding.believe(old_size, parsed)
        self._freezing |= any(entry.startswith(freeze_prefix) for entry in entries)
        self._later("fold", fold_after_s, self._fold_some)
        self.news.tell()

    async def replace(self, start: int, entries: Sequence[bytes], leaves: Sequence[bytes], head: Head) -> None:
        """Drop everything from ``start`` on and append, durably and in one transaction. Raises as ``extend`` does.

        For suffixes that were never published, which is the caller's to know.
        """
        tree, _ = self._tree_of(start)
        tiles = [tile for leaf in leaves for tile in tree.append(leaf)]
        names = [name_of(entry) for entry in entries]
        try:
            async with self._disk:
                await self._write(self.store.rewind, self.standing.epoch, self.head.size, start, entries, tiles, head, names)
        finally:
            self._reload()
        self.folding.rewind(start)
        self._freezing = True
        await self.folding.replay(self.head.size)

    async def promise(self, epoch: int, leader: bytes) -> None:
        """Follow a sequencer from now on, durably. Raises Conflict if a later epoch was promised, or this one to another node."""
        async with self._disk:
            await self._write(self.store.promise, epoch, leader)
        self.standing = self.standing._replace(epoch=epoch, leader=leader)

    async def lose(self, key: bytes) -> None:
        """Note durably that this key must not sign."""
        async with self._disk:
            await self._write(self.store.lose, key)
        self.standing = self.standing._replace(lost=key)

    async def find(self, names: Sequence[bytes]) -> dict[bytes, int]:
        """Find where entries stand, by the names that ``name_of`` gives."""
        remote = self.store.remote
        return self.store.find(names) if remote is None else await remote.find(names)

    def _reload(self) -> None:
        self._stale = True
        try:
            self._load()
        except MedshardError as error:
            _log.error("the ledger could not be read back after a failed write: %s", error)

    async def keep_up(self) -> None:
        """Fold until not too much is left, letting others have turns. For a caller that adds much."""
        if self.head.size - self.folding.state.size > unfolded_entries_max:
            await self.folding.replay(self.head.size - unfolded_entries_max)

    # -- reading

    def entries(self, start: int, end: int) -> list[bytes]:
        """Entries from ``start`` up to but not including ``end``."""
        if start >= self._recent_start:
            return self._recent[start - self._recent_start : end - self._recent_start]
        return self.store.entries(start, end)

    def _known(self, start: int, end: int) -> list[bytes]:
        """Entries for the fold. Those from the disk must be the ones in the tree: nobody checks their authors' signatures again.

        Raises Damaged.
        """
        entries = self.entries(start, end)
        if start >= self._recent_start:
            return entries
        leaves = [leaf for tile in range(start // tile_width, -(-end // tile_width)) for leaf in self._leaves(tile)]
        for place, entry in enumerate(entries, start):
            if merkle.leaf_hash(entry, sha256) != leaves[place - start // tile_width * tile_width]:
                raise Damaged(f"the ledger's entry {place} is damaged on this node's disk", hint="let this node mirror the log anew")
        return entries

    def _leaves(self, tile: int) -> list[bytes]:
        width = min(tile_width, self.head.size - tile * tile_width)
        data = self._tree.tile(TileName(0, tile, width))
        return [data[at : at + 32] for at in range(0, len(data), 32)]

    @property
    def tree(self) -> Tree:
        """The Merkle tree; to read. During a write it is ahead of ``head``."""
        return self._tree

    @property
    def state(self) -> State:
        """What all stored entries mean; fewer of them while ``folding.missing`` names a roster that is not here."""
        self.folding.fold(self.head.size - self.folding.state.size)
        return self.folding.state

    @property
    def frozen(self) -> tuple[int, bytes] | None:
        """After which entry the log has ended, and the SHA-256 of its successor's genesis file. Folds only if an entry may say so."""
        if self._freezing:
            self.folding.fold(self.head.size - self.folding.state.size)
            self._freezing = self.folding.state.size < self.head.size
        return self.folding.state.frozen

    @property
    def folded(self) -> State:
        """What the entries mean that have been folded so far; for whoever can wait for the rest."""
        return self.folding.state

    @property
    def published(self) -> Published | None:
        """The newest checkpoint with a quorum that this node knows, and has all entries of. None while a start folds them."""
        if self._heard and not self._replaying:
            self._check_heard()
        return self._published

    @property
    def checked(self) -> Published | None:
        """The newest of which that was found already; for whoever must not have it found."""
        return self._published

    def inclusion(self, place: int, published: Published) -> Inclusion:
        """Prove the entry at ``place`` under ``published``."""
        path = self._tree.inclusion_path(place, published.checkpoint.size)
        return Inclusion(place, self.entries(place, place + 1)[0], tuple(path), published.note)

    def inclusion_of(self, file_id: FileId) -> Inclusion | None:
        """Prove the registration of a file; None if there is none under the newest published checkpoint that is known here."""
        registration, published = self.state.registration(file_id), self.published
        if registration is None or published is None or registration.index >= published.checkpoint.size:
            return None
        return self.inclusion(registration.index, published)

    def publish(self, published: Published) -> None:
        """Take note of a checkpoint that was just found to have its quorum."""
        self._heard, self._heard_at = b"", time.monotonic()
        self._set_published(published)
        self._later("remember", remember_after_s, self._remember_soon)

    def believe(self, note: bytes) -> None:
        """Take note of a published checkpoint that a stranger shows: checked at once, so that nothing forged takes the place of what was
        heard from a sequencer. Raises Malformed or Refused."""
        size = _claimed_size(note)
        if self._heard and _claimed_size(self._heard) >= size:
            self._check_heard()
        if self._published is not None and self._published.checkpoint.size >= size:
            return
        checkpoint = self.open_published(note)
        if size > self.head.size or self._replaying or (self._published is None and self._heard):
            self.hear(note)
            return
        if self._heard and _claimed_size(self._heard) <= size:
            self._heard = b""
        self._heard_at = time.monotonic()
        self._take_published(checkpoint, note)
        self._later("remember", remember_after_s, self._remember_soon)

    def hear(self, note: bytes) -> None:
        """Take note of a checkpoint that somebody says has its quorum. It is checked when it is needed."""
        if self._published is None or note != self._published.note:
            if self._published is None and self._heard and not self._replaying:
                self._check_heard()  # the first one is not forgotten for a newer one: by it the age of what comes next is told
            self._heard, self._heard_at = note, time.monotonic()
            self._later("check", check_after_s, self._check_soon)
            self._later("remember", remember_after_s, self._remember_soon)
            self.news.tell()

    # -- inside

    def _check_heard(self) -> None:
        try:
            if _claimed_size(self._heard) > self.head.size:
                return  # cosigned by others before this node has the entries; kept until they come
            note, self._heard = self._heard, b""
            checkpoint = self.open_published(note)
        except MedshardError as error:
            self._heard = b""
            _log.error("a checkpoint that was announced as published is not believed: %s", error)
            return
        self._take_published(checkpoint, note)

    def _take_published(self, checkpoint: Checkpoint, note: bytes) -> None:
        """Believe a checkpoint that a quorum cosigned, if it is of this log."""
        if self._tree.root(checkpoint.size) != checkpoint.root:
            _log.error("a quorum cosigned another history of %d entries than this node has: not believed", checkpoint.size)
        elif self._published is None or checkpoint.size >= self._published.checkpoint.size:
            self._set_published(Published(checkpoint, note))

    def open_published(self, note: bytes) -> Checkpoint:
        """Read a checkpoint that a quorum published: of the roster that its size belongs to, or of a later one. Raises Malformed or
        Refused. A head that was published before a change is published once more by the next quorum, while no entry follows."""
        due = self.roster_of(_claimed_size(note))
        try:
            return open_published(note, due)
        except Refused:
            if self.roster.number <= due.number:
                raise
            return open_published(note, self.roster)

    def roster_of(self, size: int) -> Roster:
        """Whose quorum publishes a checkpoint of this size: the roster in effect after all entries but the last."""
        self.folding.fold(size - 1 - self.folding.state.size)
        state = self.folding.state
        return state.roster_at(size - 1) if 0 < size <= state.size + 1 else self.roster

    def _set_published(self, published: Published) -> None:
        self._published = published
        self.news.tell()
        for listener in self.on_published:
            listener(published, self._heard_at)

    def _check_soon(self) -> None:
        if self._heard and not self._closed:
            self._check_heard()

    def _fold_some(self) -> None:
        self.folding.fold(min(fold_entries_max, self.head.size - self.folding.state.size))
        if self.folding.state.size < self.head.size:
            self._later("fold", 0 if self.folding.missing is None else fold_again_s, self._fold_some)
        else:
            self._later("remember", remember_after_s, self._remember_soon)

    def _remember_soon(self) -> None:
        self._remembering = asyncio.ensure_future(self._remember())

    async def _remember(self) -> None:
        async with self._disk:
            if not self._closed:
                if self._published is not None:
                    self.folding.state.settle(self._published.checkpoint.size)  # once for many, and the tables forget it with the same save
                await self._write(self.store.remember, *self._memory())
                await self.folding.save()

    def _memory(self) -> tuple[int, set[int], bytes]:
        return self.folding.state.size, self.folding.unsigned, self._heard or (self._published.note if self._published else b"")

    async def _write(self, write: Callable[..., _T], *values: object) -> _T:
        def timed() -> _T:
            began = time.perf_counter()
            try:
                return write(*values)
            finally:
                self._typical_commit_s += (time.perf_counter() - began - self._typical_commit_s) / 4

        if self._typical_commit_s < quick_commit_s and self.store.remote is None:
            return timed()
        return await _whole(asyncio.get_running_loop().run_in_executor(self._thread, timed))

    def _later(self, what: str, delay_s: float, act: Callable[[], object]) -> None:
        """Do something once, soon, however often it is asked for meanwhile."""
        if what in self._timers:
            return

        def fire() -> None:
            del self._timers[what]
            act()

        self._timers[what] = asyncio.get_running_loop().call_later(delay_s, fire)


async def _whole(writing: asyncio.Future[_T]) -> _T:
    """Wait for a write, even if nobody wants its answer any more."""
    try:
        return await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing])  # nobody else may write, nor read what was written, before this is over
        raise


def _claimed_size(note: bytes) -> int:
    """What a note's text says, whoever signed it. Raises Malformed or Refused."""
    return Checkpoint.from_text(Note.text_of(note)).size


def _size_or_none(note: bytes) -> int:
    try:
        return _claimed_size(note)
    except MedshardError:
        return 0


class News:
    """Wakes everybody who waits for something to be different from before."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None

    def tell(self) -> None:
        """Wake them."""
        if self._next is not None:
            self._next.set_result(None)
            self._next = None

    async def wait(self) -> None:
        """Sleep until the next news."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._next)
