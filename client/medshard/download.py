"""Getting one object's stripes back from any k holders, every cell checked, without waiting for the slowest.

k streams run at once, data shards first (they need no decoding). A stream that fails, lies or stands still is replaced by a
spare from the stripe in hand on. Memory is O(window), never O(file).

All streams of a download live in one thread, which polls their sockets; each is a generator that is resumed when its socket has
something. Cells are decrypted into the place where they are needed, and checked there while they are in the processor's cache. A second
thread takes whole stripes, so that opening and hashing them goes on beside. The event loop only waits for both.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from medshard.line import Line, Steps
from medshard.moves import moved
from medshard.polling import Course, Failure, Poller
from medshard.transport import Net, connect_timeout_s, explain, without_name
from medshard_protocol import merkle
from medshard_protocol.errors import Damaged, Malformed, MedshardError, Unavailable
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import SpanHead, error_bytes_max, shard_path, span_head_bytes_max, unpack_error
from medshard_protocol.shards import digests, shard_root

window_stripes: Final = 8  # being received and being opened, together: at 10/16 and 128 KiB cells 10 MiB
hedge_s: Final = 0.4  # at most: a stream that stands still this long while others went on is replaced by a spare
first_bytes: Final = 8  # times as long as the others needed for their first bytes, if that is shorter
look_s: Final = 0.05
blame_s: Final = 0.2  # nor is one worth waiting for that all others have waited for so long, and half of its time
rest_s: Final = 0.2  # before a holder that failed is tried again; twice as long the next time
patience_s: Final = 30.0  # with no spare left, how long to wait for a slow one
tries_max: Final = 3  # how often one holder is tried for one object
paths_cells_max: Final = 8  # up to here Merkle paths are shorter than all digests of a long shard

BadCell = tuple[str, int, int]  # node name, shard, cell
Expected = Callable[[int, bytes], bool]


@dataclass(slots=True)
class Arrived:
    """One stripe: k checked cells by shard. ``stripe`` has room for all k data cells, and those that came lie in their place in it."""

    number: int
    stripe: memoryview
    cells: dict[int, memoryview]


@dataclass(eq=False, slots=True, kw_only=True)
class _Stream(Course):
    index: int
    at: int
    moved_at: float = field(default_factory=time.monotonic)
    cell: memoryview = field(default_factory=lambda: memoryview(b""))
    waits_for_room: bool = False
    began: float = field(default_factory=time.monotonic)
    first_s: float | None = None  # what its first bytes took
    blamed_s: float = 0.0  # how long all others have waited for it


class Download:
    """``run`` once: every stripe of a range, in order, k cells each."""

    def __init__(self, net: Net, manifest: Manifest, found_bad: Callable[[BadCell], None] = lambda cell: None) -> None:
        self._net = net
        self._manifest = manifest
        self._shape = manifest.layout
        self._digest = digests[manifest.digest]
        self._found_bad = found_bad
        self._now = 0
        self._end = 0
        self._open: dict[int, Arrived] = {}
        self._tries: dict[int, int] = {}
        self._rests_until: dict[int, float] = {}
        self._holders = {index: ref.node for index, ref in enumerate(manifest.shards)}
        self._asked_for_moves = False
        self._streams: dict[int, _Stream] = {}
        self._failures: dict[str, str] = {}
        self._expected: dict[int, Expected] = {}  # by shard: does this cell have this digest?
        self._loop: asyncio.AbstractEventLoop
        self._poller: Poller
        # Between the threads: whole stripes one way, their buffers back.
        self._whole: queue.SimpleQueue[Arrived | None] = queue.SimpleQueue()
        self._free: deque[memoryview] = deque()
        self._made = 0
        self._hungry = False
        self._stopping = False

    async def run(self, wanted: range, take: Callable[[Arrived], None]) -> None:
        """Call ``take`` for every stripe in ``wanted``, in a thread, one after the other; its buffers are its own only so long.

        Raises Unavailable when fewer than k holders give good cells, and what ``take`` raises. No thread is left when it returns.
        """
        self._now, self._end = wanted.start, wanted.stop
        self._loop = loop = asyncio.get_running_loop()
        self._poller = Poller(self._net, self._ended)
        pool = ThreadPoolExecutor(2, thread_name_prefix="medshard-get")
        taking = loop.run_in_executor(pool, self._hand_on, take)
        receiving = loop.run_in_executor(pool, self._receive)
        try:
            await asyncio.wait([taking, receiving])
        finally:
            self._stopping = True
            self._poller.ring()
            while not (taking.done() and receiving.done()):
                with contextlib.suppress(asyncio.CancelledError):  # a second Ctrl-C: the threads end by themselves, at once
                    await asyncio.wait([taking, receiving])
            pool.shutdown()  # both have ended: this only joins them
            self._poller.close()
        for part in (taking, receiving):
            part.result()

    # -- the thread that takes whole stripes

    def _hand_on(self, take: Callable[[Arrived], None]) -> None:
        try:
            while (arrived := self._whole.get()) is not None and not self._stopping:
                take(arrived)
                arrived.cells.clear()
                self._free.append(arrived.stripe)
                if self._hungry:
                    self._poller.ring()
        finally:
            self._stopping = True
            self._poller.ring()

    # -- the thread that receives

    def _receive(self) -> None:
        try:
            for _ in range(self._shape.k):
                self._start_spare()
            looked = time.monotonic()
            while self._now < self._end and not self._stopping:
                if self._poller.turn(look_s):
                    self._hungry = False
                    for stream in [stream for stream in self._streams.values() if stream.waits_for_bell]:
                        self._poller.resume(stream)
                if (now := time.monotonic()) - looked > look_s:
                    self._hedge(now, now - looked)
                    looked = now
                self._top_up()
        finally:
            for stream in self._streams.values():
                self._poller.drop(stream)
            self._whole.put(None)

    def _ended(self, stream: _Stream, error: Failure | None) -> None:
        """A stream gave all that was wanted, or failed."""
        if isinstance(error, MedshardError):
            self._give_up(stream, without_name(stream.node, error))
        elif error is not None:
            self._net.health.suspect(stream.node.id)
            self._give_up(stream, explain(error))

    def _give_up(self, stream: _Stream, why: str) -> None:
        self._failures[stream.node.name] = why
        self._streams.pop(stream.index, None)
        self._poller.drop(stream)
        self._rests_until[stream.index] = time.monotonic() + rest_s * 2 ** (self._tries[stream.index] - 1)

    def _top_up(self) -> None:
        """Replace what failed. Raises Unavailable when too few are left."""
        while len(self._streams) < self._shape.k and self._start_spare():
            pass
        if len(self._streams) < self._shape.k and self._now < self._end:
            here = self._open[self._now].cells if self._now in self._open else {}
            if len(set(here) | set(self._streams)) < self._shape.k and not self._free_holders():
                if not self._has_moved():
                    raise self._too_few()
                self._top_up()

    def _has_moved(self) -> bool:
        """Ask, once, whether other nodes have taken shards over. Waits for the answer: without it there is nothing to go on with."""
        if self._asked_for_moves:
            return False
        self._asked_for_moves = True
        told = asyncio.run_coroutine_threadsafe(moved(self._net, self._manifest.file_id), self._loop).result()
        new = {index: node for index, node in told.items() if index in self._holders and self._holders[index] != node}
        self._holders |= new
        for index in new:
            self._tries.pop(index, None)
            self._rests_until.pop(index, None)
        return bool(new)

    def _hedge(self, now: float, passed: float) -> None:
        """Start a spare for each stream that stands still, or holds all others up, and has not given the stripe in hand."""
        for stream in list(self._streams.values()):
            if self._is_waited_for(stream):
                stream.blamed_s += passed
            waiting = now - stream.moved_at
            if stream.at > self._now or stream.waits_for_room:
                continue
            still, dragging = waiting > self._allowed(stream), stream.blamed_s > max(blame_s, (now - stream.began) / 2)
            # A slow one is cut only when another can take its place: alone it is better than none.
            replaced = (still and self._start_spare()) or (dragging and self._has_fresh() and self._start_spare())
            if replaced or waiting > (patience_s if stream.line and stream.line.touched else connect_timeout_s):
                self._net.health.slow(stream.node.id)
                if waiting > blame_s / 2:
                    self._net.health.suspect(stream.node.id)
                self._give_up(stream, f"stalled for {max(waiting, stream.blamed_s):.1f} s")

    def _allowed(self, stream: _Stream) -> float:
        """How long this one may stand still: by what most others needed for their first bytes."""
        if self._net.health.is_slow(stream.node.id):
            return hedge_s / 4
        others = sorted(other.first_s for other in self._streams.values() if other.first_s is not None and other is not stream)
        if 2 * len(others) <= self._shape.k:
            return hedge_s
        return min(hedge_s, max(hedge_s / 4, first_bytes * others[len(others) // 2]))

    def _is_waited_for(self, stream: _Stream) -> bool:
        """Whether all others are as far ahead of this one as they may be."""
        if stream.waits_for_room or stream.steps is None:
            return False
        return all(other.waits_for_room or other.steps is None for other in self._streams.values() if other is not stream)

    def _start_spare(self) -> bool:
        choice = min(self._free_holders(time.monotonic()), key=self._rank, default=None)
        if choice is None:
            return False
        self._tries[choice] = self._tries.get(choice, 0) + 1
        stream = _Stream(self._net.roster.node(self._holders[choice]), index=choice, at=self._now)
        stream.steps = self._run(stream)
        self._streams[choice] = stream
        self._poller.resume(stream)
        return True

    def _free_holders(self, now: float = math.inf) -> list[int]:
        """Shards that could be asked for, those left out whose holders rest until after ``now``."""
        nodes = {node.id for node in self._net.roster.nodes}
        free = [i for i, node in self._holders.items() if node in nodes and i not in self._streams and self._tries.get(i, 0) < tries_max]
        return [i for i in free if self._rests_until.get(i, 0.0) <= now]

    def _rank(self, index: int) -> tuple[int, bool, int]:
        """Fewest tries first, then nodes that were quick lately, then data shards."""
        return self._tries.get(index, 0), self._net.health.is_slow(self._holders[index]), index

    def _has_fresh(self) -> bool:
        """Whether somebody could be asked who was not asked yet, and of whom nothing bad is known."""
        return any(self._rank(i)[:2] == (0, False) for i in self._free_holders())

    # -- one stream

    def _run(self, stream: _Stream) -> Steps[None]:
        first, last = stream.at, self._end - 1
        proof = "paths" if last - first < paths_cells_max < self._shape.stripes else "digests"
        line = yield from self._asked(stream, f"{shard_path(self._manifest.file_id, stream.index)}?cells={first}-{last}&proof={proof}")
        size = int.from_bytes((yield from line.read(4)), "big")
        if size > min(span_head_bytes_max, 40 * self._shape.stripes + 40 * 64 * (last - first + 1) + 4096):
            raise Malformed(f"{stream.node.name}: a longer proof than there can be")
        head = SpanHead.from_bytes((yield from line.read(size)))
        if line.left != sum(self._shape.cell_length(number) for number in (*[first] * (last - first), last)):
            raise Malformed(f"{stream.node.name}: not as many bytes as the cells have")
        expected = self._expected[stream.index] = self._check_head(stream, head, first, last)
        stream.first_s = time.monotonic() - stream.began
        self._net.health.well(stream.node.id)
        for number in range(first, last + 1):
            while not self._has_room(number):
                stream.waits_for_room = True
                yield 0
                stream.waits_for_room, stream.moved_at = False, time.monotonic()
            stream.cell, at = self._place(stream.index, number), 0
            while at < len(stream.cell):
                if got := line.read_some(stream.cell[at:]):
                    at += got
                else:
                    yield from line.fill()
                    stream.moved_at = time.monotonic()
            if number >= self._now and not expected(number, self._digest(stream.cell)):
                raise self._lied(stream, number)
            stream.at = number + 1
            self._deliver(stream, number)

    def _asked(self, stream: _Stream, path: str) -> Steps[Line]:
        """A line on which the answer's body comes next."""
        tries = 0
        while True:
            line = yield from self._poller.asked(stream, "GET", path, self._net.shard_headers())
            head = yield from line.answer()
            if head.status == 200:
                return line
            if head.length > error_bytes_max:
                raise Unavailable(f"answered {head.status}")
            error = unpack_error(head.status, (yield from line.read(head.length)), stream.node.name)
            self._net.health.well(stream.node.id)
            self._poller.release(stream)
            tries += 1
            if not (yield from self._poller.waited(self._net.helped(stream.node, error, tries))):
                raise error
            stream.moved_at = time.monotonic()

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

    def _lied(self, stream: _Stream, number: int) -> Damaged:
        """This holder's bytes are wrong: use nothing more of it. What it gave before was good."""
        self._found_bad((stream.node.name, stream.index, number))
        self._tries[stream.index] = tries_max
        return Damaged(f"cell {number} of shard {stream.index} has other bytes than were stored")

    # -- stripes

    def _has_room(self, number: int) -> bool:
        if number < self._now or number in self._open:
            return True
        if not self._free and self._made >= window_stripes:
            self._hungry = True  # said before the second look: the other thread may free one in between, and then rings
            if not self._free:
                return False
        if self._free:
            stripe = self._free.popleft()
        else:
            self._made += 1
            stripe = memoryview(bytearray(self._shape.stripe_bytes))
        self._open[number] = Arrived(number, stripe, {})
        return True

    def _place(self, index: int, number: int) -> memoryview:
        """Where a cell goes: a data cell where it lies in its stripe, another one beside."""
        length = self._shape.cell_length(number)
        if number < self._now or index >= self._shape.k or index in self._open[number].cells:
            return memoryview(bytearray(length))
        return self._open[number].stripe[index * length : (index + 1) * length]

    def _deliver(self, stream: _Stream, number: int) -> None:
        if number >= self._now:
            self._open[number].cells.setdefault(stream.index, stream.cell)  # a holder that was tried again sends some anew
        while (arrived := self._open.get(self._now)) and len(arrived.cells) >= self._shape.k:
            del self._open[self._now]
            for late in self._streams.values():
                if late.at == self._now and late.index not in arrived.cells:
                    late.cell = memoryview(bytearray(len(late.cell)))  # what it still sends of this stripe goes nowhere
            self._now += 1
            self._whole.put(arrived)

    def _too_few(self) -> Unavailable:
        listed = "; ".join(f"{name}: {why}" for name, why in sorted(self._failures.items()))
        k, n = self._shape.k, self._shape.n
        good = len(self._streams)
        return Unavailable(
            f"{k} of {n} shards are needed and only {good} can be had ({listed})",
            hint="nothing is lost while the nodes come back: start them, then run the same command again",
        )
