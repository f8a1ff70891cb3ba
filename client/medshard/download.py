"""Getting one object's stripes back from any k holders, every cell checked, without waiting for the slowest.

k streams run at once, data shards first (they need no decoding). A stream that fails, lies or stands still is replaced by a
spare from the stripe in hand on. Memory is O(window), never O(file).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from medshard.transport import Net, without_name
from medshard_protocol import merkle
from medshard_protocol.errors import Damaged, Malformed, MedshardError, Unavailable
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import SpanHead, shard_path, span_head_bytes_max
from medshard_protocol.roster import Node
from medshard_protocol.shards import digests, shard_root

window_stripes: Final = 6
hedge_s: Final = 0.4  # a stream that stands still this long while others went on gets a spare beside it
patience_s: Final = 30.0  # with no spare left, how long to wait for a slow one
tries_max: Final = 3  # how often one holder is tried for one object
paths_cells_max: Final = 8  # up to here Merkle paths are shorter than all digests of a long shard

BadCell = tuple[str, int, int]  # node name, shard, cell
Expected = Callable[[int, bytes], bool]


@dataclass(eq=False, slots=True)
class _Stream:
    index: int
    node: Node
    at: int
    moved_at: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None


class Download:
    """Iterate ``stripes(range)`` once: (number, {shard index: checked cell}) in order, k cells each."""

    def __init__(self, net: Net, manifest: Manifest, found_bad: Callable[[BadCell], None] = lambda cell: None) -> None:
        self._net = net
        self._manifest = manifest
        self._shape = manifest.layout
        self._digest = digests[manifest.digest]
        self._found_bad = found_bad
        self._cells: dict[int, dict[int, memoryview]] = {}
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._now = 0
        self._end = 0
        self._tries: dict[int, int] = {}
        self._streams: dict[int, _Stream] = {}
        self._failures: dict[str, str] = {}
        self._expected: dict[int, Expected] = {}  # by shard: does this cell have this digest?

    async def stripes(self, wanted: range) -> AsyncGenerator[tuple[int, dict[int, memoryview]], None]:
        """Yield every stripe in ``wanted``. Raises Unavailable when fewer than k holders give good cells."""
        self._now, self._end = wanted.start, wanted.stop
        try:
            for _ in range(self._shape.k):
                self._start_spare()
            for number in wanted:
                self._now = number
                self._room.set()
                yield number, await self._stripe(number)
                self._cells.pop(number, None)
        finally:
            tasks = [stream.task for stream in self._streams.values() if stream.task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stripe(self, number: int) -> dict[int, memoryview]:
        good: dict[int, memoryview] = {}
        while len(good) < self._shape.k:
            arrived = self._cells.setdefault(number, {})
            if len(good) + len(arrived) >= self._shape.k:
                self._cells[number] = {}
                bad = await asyncio.to_thread(self._bad_cells, number, arrived)
                good.update((index, cell) for index, cell in arrived.items() if index not in bad)
                for index in bad:
                    self._give_up_on(index, number)
                continue
            self._changed.clear()
            try:
                async with asyncio.timeout(hedge_s / 4):
                    await self._changed.wait()
            except TimeoutError:
                self._hedge(number)
            self._replace_failed(number, set(good))
        return good

    def _bad_cells(self, number: int, cells: Mapping[int, memoryview]) -> list[int]:
        """Which shards gave a cell that is not the one that was stored. CPU work: in a thread."""
        return [index for index, cell in cells.items() if not self._expected[index](number, self._digest(cell))]

    def _give_up_on(self, index: int, number: int) -> None:
        """This holder's bytes are wrong: use nothing more of it."""
        name = self._net.roster.node(self._manifest.shards[index].node).name
        self._found_bad((name, index, number))
        self._failures[name] = f"cell {number} of shard {index} has other bytes than were stored"
        self._tries[index] = tries_max
        stream = self._streams.pop(index, None)
        if stream is not None and stream.task:
            stream.task.cancel()
        for cells in self._cells.values():
            cells.pop(index, None)
        self._start_spare()

    def _hedge(self, number: int) -> None:
        """Start a spare for each stream that stands still and has not given this stripe."""
        now = time.monotonic()
        for stream in list(self._streams.values()):
            allowed = hedge_s / 4 if self._net.health.is_suspect(stream.node.id) else hedge_s
            waiting = now - stream.moved_at
            if stream.at > number or waiting < allowed:
                continue
            # The slow one is cut only when another can take its place: alone it is better than none.
            if self._start_spare() or waiting > patience_s:
                self._failures[stream.node.name] = f"stalled for {waiting:.1f} s"
                self._net.health.suspect(stream.node.id)
                if stream.task:
                    stream.task.cancel()
                self._streams.pop(stream.index, None)

    def _replace_failed(self, number: int, good: set[int]) -> None:
        for stream in [s for s in self._streams.values() if s.task and s.task.done()]:
            error = None if stream.task is None or stream.task.cancelled() else stream.task.exception()
            if error is None and stream.at >= self._end:
                continue
            del self._streams[stream.index]
            if error is not None and not isinstance(error, MedshardError):
                raise error
            self._failures[stream.node.name] = without_name(stream.node, error or Unavailable("cut off"))
        gone = self._shape.k - sum(1 for s in self._streams.values())
        for _ in range(gone):
            if not self._start_spare():
                break
        if not self._can_go_on(number, good):
            raise self._too_few()

    def _can_go_on(self, number: int, good: set[int]) -> bool:
        have = good | set(self._cells.get(number, {}))
        return len(have | set(self._streams)) >= self._shape.k

    def _start_spare(self) -> bool:
        choice = self._next_holder()
        if choice is None:
            return False
        self._tries[choice] = self._tries.get(choice, 0) + 1
        stream = _Stream(choice, self._net.roster.node(self._manifest.shards[choice].node), self._now)
        stream.task = asyncio.create_task(self._run(stream))
        self._streams[choice] = stream
        return True

    def _next_holder(self) -> int | None:
        nodes = {node.id for node in self._net.roster.nodes}
        free = [
            i
            for i, ref in enumerate(self._manifest.shards)
            if ref.node in nodes and i not in self._streams and self._tries.get(i, 0) < tries_max
        ]
        suspect = self._net.health.is_suspect
        # Fewest tries first, then nodes that answered lately, then data shards.
        return min(free, key=lambda i: (self._tries.get(i, 0), suspect(self._manifest.shards[i].node), i), default=None)

    async def _run(self, stream: _Stream) -> None:
        try:
            first, last = stream.at, self._end - 1
            proof = "paths" if last - first < paths_cells_max < self._shape.stripes else "digests"
            path = f"{shard_path(self._manifest.file_id, stream.index)}?cells={first}-{last}&proof={proof}"
            async with self._net.receive(stream.node, path) as body:
                size = int.from_bytes(await body.readexactly(4), "big")
                if size > min(span_head_bytes_max, 40 * self._shape.stripes + 40 * 64 * (last - first + 1) + 4096):
                    raise Malformed(f"{stream.node.name}: a longer proof than there can be")
                head = SpanHead.from_bytes(await body.readexactly(size))
                self._expected[stream.index] = self._check_head(stream, head, first, last)
                for number in range(first, last + 1):
                    cell = bytearray(self._shape.cell_length(number))
                    at = 0
                    while at < len(cell):
                        chunk = await body.read(len(cell) - at)
                        if not chunk:
                            raise Unavailable(f"{stream.node.name}: the connection broke off")
                        cell[at : at + len(chunk)] = chunk
                        at += len(chunk)
                        stream.moved_at = time.monotonic()
                    await self._deliver(stream, number, memoryview(cell))
        except asyncio.IncompleteReadError:
            raise Unavailable(f"{stream.node.name}: the connection broke off") from None
        finally:
            self._changed.set()

    def _check_head(self, stream: _Stream, head: SpanHead, first: int, last: int) -> Expected:
        """A test for each cell's digest. Raises Damaged unless the digests belong to the shard's root."""
        root, count = self._manifest.shards[stream.index].root, self._shape.stripes
        if (head.first, head.count) != (first, last - first + 1):
            raise Malformed(f"{stream.node.name}: other cells than were asked for")
        if head.paths:
            if len(head.paths) != head.count:
                raise Malformed(f"{stream.node.name}: not one path for each cell")
            return lambda number, digest: self._leads_to_root(number, digest, head.paths[number - first], root)
        known = [head.digests[at : at + 32] for at in range(0, len(head.digests), 32)]
        if len(known) != count or shard_root(known, self._digest) != root:
            self._found_bad((stream.node.name, stream.index, first))
            raise Damaged(f"{stream.node.name}: its digests are not those of shard {stream.index}")
        return lambda number, digest: known[number] == digest

    def _leads_to_root(self, number: int, cell_digest: bytes, path: tuple[bytes, ...], root: bytes) -> bool:
        leaf = merkle.leaf_hash(cell_digest, self._digest)
        try:
            return merkle.root_from_path(leaf, number, self._shape.stripes, path, self._digest) == root
        except Malformed:
            return False

    async def _deliver(self, stream: _Stream, number: int, cell: memoryview) -> None:
        if number >= self._now:
            self._cells.setdefault(number, {})[stream.index] = cell
        stream.at = number + 1
        self._changed.set()
        while stream.at >= self._now + window_stripes and stream.at < self._end:
            self._room.clear()
            await self._room.wait()
            stream.moved_at = time.monotonic()

    def _too_few(self) -> Unavailable:
        listed = "; ".join(f"{name}: {why}" for name, why in sorted(self._failures.items()))
        k, n = self._shape.k, self._shape.n
        good = len(self._streams)
        return Unavailable(
            f"{k} of {n} shards are needed and only {good} can be had ({listed})",
            hint="nothing is lost while the nodes come back: start them, then run the same command again",
        )
