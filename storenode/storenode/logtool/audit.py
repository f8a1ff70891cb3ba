"""Checking a whole log from its files: every entry, every hash at every level, every signature, and what it all means.

Law: nothing in the folder is believed; the genesis file is the caller's. Leaf hashes come from the entries, every tile of every level is
computed from those and compared, and the root that comes out must be the one that a quorum cosigned: a quorum of the roster that
the entries themselves lead to. A tile that differs anywhere is found, not only on the right edge.

Other processes check hashes and authors' signatures (``hashing``); this one folds the entries in order.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Final

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, cosigners, open_published
from medshard_protocol.entries import Entry
from medshard_protocol.errors import Damaged, Malformed, Refused
from medshard_protocol.ids import Sha256
from medshard_protocol.merkle import sha256
from medshard_protocol.roster import Roster
from medshard_protocol.state import State
from medshard_protocol.tiles import TileName, tile_height, tile_width, unpack_bundle
from storenode.logtool.hashing import Origins, Run, check_run, compare
from storenode.logtool.source import Folder
from storenode.logtool.tables import AuditTables

run_bundles: Final = 8  # 2,048 entries: some 400 KB on the way between processes
ahead_runs: Final = 3  # for each process

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """What a log that was found whole says."""

    origin: str
    size: int
    root: bytes
    genesis_sha256: Sha256
    counts: Mapping[str, int]  # of entries with effect, by type
    void: int
    unsigned: int  # of those, malformed or not signed by their authors
    void_named: tuple[tuple[int, bool], ...]  # (index, signed) of the first
    rosters: tuple[tuple[int, int], ...]  # (index of the deciding entry, number) of each change
    cosigned: Mapping[str, int]  # node name: when, with Ed25519 keys
    cosigned_pq: Mapping[str, int]
    pq_quorum: bool  # a quorum cosigned with ML-DSA keys too
    frozen: tuple[int, Sha256] | None


def audit(
    folder: Path,
    genesis: Roster,
    documents: Mapping[Sha256, Roster],
    line: Sequence[Roster] = (),
    *,
    processes: int | None = None,
    progress: OnProgress = lambda done, of: None,
) -> Report:
    """Check everything. ``line`` are the genesis files of the logs that this one goes on from, oldest first.

    Raises Damaged for a file that is not what the entries give, Refused for a checkpoint without its quorum, Malformed
    for one that is none, Absent for a missing file or roster."""
    source = Folder(folder)
    note = source.read("checkpoint")
    claimed = Checkpoint.from_text(Note.from_bytes(note).text)
    if claimed.origin != genesis.origin:
        raise Refused(f"the log calls itself {claimed.origin!r}, and the genesis file is of {genesis.origin!r}")
    with tempfile.TemporaryDirectory(prefix="medshard-audit-") as scratch:
        tables = AuditTables(Path(scratch))
        state = State(genesis, tables, documents.get, line)
        upper = _Upper(source, [each.size for each in genesis.before])
        origins = (*((each.size, each.origin) for each in genesis.before), (claimed.size, genesis.origin))
        for run in _runs(folder, origins, claimed.size, processes or os.cpu_count() or 1):
            upper.take(run)
            _fold(state, run)
            progress(state.size, claimed.size)
        for ended in genesis.before:
            if upper.passed.get(ended.size) != ended.root:
                raise Damaged(f"its first {ended.size} entries are not those of {ended.origin}, from which it goes on")
        if upper.finish(claimed.size) != claimed.root:
            raise Damaged("the entries do not give the root that the checkpoint states")
        report = _report(note, claimed, state, tables)
        tables.close()
    return report


def _runs(folder: Path, origins: Origins, size: int, processes: int) -> Iterator[Run]:
    """The checked runs in order, a few of them ahead."""
    bundles = -(-size // tile_width)
    starts = range(0, bundles, run_bundles)
    jobs = ((folder, origins, size, start, min(start + run_bundles, bundles)) for start in starts)
    if processes == 1 or len(starts) < 2:
        for job in jobs:
            yield check_run(*job)
        return
    waiting: deque[Future[Run]] = deque()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver")) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(check_run, *job))
                if len(waiting) >= ahead_runs * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class _Upper:
    """The tiles above the leaves, as they become complete."""

    def __init__(self, source: Folder, stops: Sequence[int]) -> None:
        self.passed: dict[int, bytes] = {}  # the root at each of the sizes ``stops``
        self._stops = stops
        self._source = source
        self._rows: list[list[bytes]] = []  # the tile in the making, at level 1 and above
        self._full: list[int] = []  # how many tiles are complete
        self._tree = merkle.Frontier(sha256)  # over the roots of full tiles of leaves
        self._edge: tuple[bytes, ...] = ()

    def take(self, run: Run) -> None:
        """Go on by one run."""
        for bundle, root in zip_longest(run.bundles, run.tile_roots):
            for size in self._stops:
                if size >> tile_height == self._tree.size:
                    self._stop(size, unpack_bundle(bundle, len(run.edge) if root is None else tile_width))
            if root is not None:
                self._tree.append(root)
                self._add(0, root)
        self._edge = run.edge

    def _stop(self, size: int, entries: Sequence[bytes]) -> None:
        edge = merkle.Frontier(sha256)
        for entry in entries[: size % tile_width]:
            edge.append(merkle.leaf_hash(entry, sha256))
        self.passed[size] = merkle.fold([*self._tree.peaks, *edge.peaks], sha256)

    def finish(self, size: int) -> bytes:
        """Compare what is left, and give the root of the whole tree."""
        for level, row in enumerate(self._rows, 1):
            if row:
                compare(self._source, TileName(level, self._full[level - 1], len(row)), row)
        edge = merkle.Frontier(sha256)
        for leaf in self._edge:
            edge.append(leaf)
        if (self._tree.size << tile_height) + edge.size != size:
            raise Damaged(f"there are not {size} entries")
        return merkle.fold([*self._tree.peaks, *edge.peaks], sha256)

    def _add(self, at: int, item: bytes) -> None:
        if at == len(self._rows):
            self._rows.append([])
            self._full.append(0)
        row = self._rows[at]
        row.append(item)
        if len(row) == tile_width:
            compare(self._source, TileName(at + 1, self._full[at], tile_width), row)
            self._rows[at], self._full[at] = [], self._full[at] + 1
            self._add(at + 1, merkle.root(row, sha256))


def _fold(state: State, run: Run) -> None:
    widths = [*(tile_width for _ in run.tile_roots), len(run.edge)]
    place = run.start
    for data, width in zip(run.bundles, widths, strict=False):
        for entry in unpack_bundle(data, width):
            state.apply(None if place in run.unsigned else _parsed(entry))
            place += 1


def _parsed(data: bytes) -> Entry | None:
    try:
        return Entry.from_bytes(data)
    except Malformed:
        return None


def _publisher(note: bytes, state: State) -> Roster:
    """Whose quorum published the head. One that a change of the roster ends with, and no entry follows yet, the next quorum publishes
    once more. Raises Malformed or Refused."""
    due = state.roster_at(state.size - 1)
    try:
        open_published(note, due)
    except Refused:
        if state.roster == due:
            raise
        open_published(note, state.roster)
        return state.roster
    return due


def _report(note: bytes, claimed: Checkpoint, state: State, tables: AuditTables) -> Report:
    roster = _publisher(note, state)
    try:
        open_published(note, roster, pq=True)
        pq_quorum = True
    except Refused:
        pq_quorum = False
    parsed, counts = Note.from_bytes(note), dict(state.counts)
    times = [{roster.node(node).name: at for node, at in cosigners(parsed, roster, pq=pq).items()} for pq in (False, True)]
    changes = [(index, roster.number) for index, roster in state.decided]
    return Report(
        origin=claimed.origin,
        size=claimed.size,
        root=claimed.root,
        genesis_sha256=state.genesis.sha256,
        void=counts.pop("void", 0),
        counts=counts,
        unsigned=tables.unsigned,
        void_named=tuple(tables.void_named),
        rosters=tuple(changes),
        cosigned=times[0],
        cosigned_pq=times[1],
        pq_quorum=pq_quorum,
        frozen=state.frozen,
    )
