"""Reading parts of stored files, again and again: a file is looked up once, and a stripe that was opened is kept for a while.

What asks may be a file object that reads a few kilobytes at a time, or a viewer that asks for three hundred frames at once. Whole
stripes are fetched, because only a whole stripe can be checked; what two readers want is fetched once; who reads on from where it
ended is read ahead of. Each read is announced as any other (access.py), under a ticket that lasts ten minutes: a session with a file
is one entry.

Law: the bytes given were checked cell by cell and opened under their segment's tag. The SHA-256 of the whole is not computed here:
who wants that reads the whole, with ``Vault.get``.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from medshard.access import Reader
from medshard.download import Arrived, Download
from medshard.encoding import Decoder
from medshard.lookup import Lookup, Opened
from medshard.transport import Net
from medshard_protocol.entries import Purpose
from medshard_protocol.errors import Damaged, Unavailable
from medshard_protocol.ids import FileId
from medshard_protocol.shards import Layout

kept_bytes_max: Final = 64 * 1024 * 1024  # opened stripes in memory: a CT series of 130 slices
run_bytes_max: Final = 16 * 1024 * 1024  # fetched under one request to each holder, and at the most read ahead
long_read_bytes: Final = 2 * 1024 * 1024  # who goes on with reads of so much will read all of it


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one object's plaintext: a file, a member of a pack, or the whole object."""

    object: Opened
    offset: int
    size: int

    @property
    def file_id(self) -> FileId:
        """Of the object it lies in."""
        return self.object.manifest.file_id

    @property
    def layout(self) -> Layout:
        """How the object is cut into stripes."""
        return self.object.manifest.layout


class Blocks(Protocol):
    """Where opened stripes are kept. May forget any of them at any time."""

    def has(self, file_id: FileId, number: int) -> bool:
        """Whether a stripe is kept, as far as can be told without looking at it."""

    async def get(self, file_id: FileId, number: int) -> bytes | None:
        """A kept stripe's plaintext."""

    async def put(self, file_id: FileId, number: int, plain: bytes) -> None:
        """Keep it."""


class MemoryBlocks:
    """In memory, the least recently used go first."""

    def __init__(self, bytes_max: int = kept_bytes_max) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._kept: OrderedDict[tuple[FileId, int], bytes] = OrderedDict()

    def has(self, file_id: FileId, number: int) -> bool:
        """Whether a stripe is kept."""
        return (file_id, number) in self._kept

    async def get(self, file_id: FileId, number: int) -> bytes | None:
        """A kept stripe's plaintext."""
        if (found := self._kept.get((file_id, number))) is not None:
            self._kept.move_to_end((file_id, number))
        return found

    async def put(self, file_id: FileId, number: int, plain: bytes) -> None:
        """Keep it, and forget what is too much then."""
        self._bytes += len(plain) - len(self._kept.get((file_id, number), b""))
        self._kept[file_id, number] = plain
        self._kept.move_to_end((file_id, number))
        while self._bytes > self._bytes_max:
            _, gone = self._kept.popitem(last=False)
            self._bytes -= len(gone)

    def clear(self) -> None:
        """Keep nothing any more."""
        self._kept.clear()
        self._bytes = 0


@dataclass(slots=True)
class _Course:
    """How one object was read so far: where the last read ended, and how much to fetch when the next begins there."""

    end: int = -1
    ahead: int = 0


_Coming = dict[int, asyncio.Future[bytes]]  # stripes being fetched, and who waits for them


class Ranges:
    """Of one open vault. ``reason`` is asked for where a read must do without the ledger; see ``Vault.get``."""

    def __init__(self, lookup: Lookup, reader: Reader, reason: Callable[[], str | None], blocks: Blocks | None = None) -> None:
        self._lookup = lookup
        self._reader = reader
        self._reason = reason
        self.blocks = blocks or MemoryBlocks()
        self._coming: dict[tuple[FileId, int], _Coming] = {}
        self._announcing: dict[tuple[tuple[FileId, ...], int], asyncio.Task[None]] = {}
        self._courses: OrderedDict[FileId, _Course] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    async def find(self, sha256: bytes) -> Span:
        """The file with this SHA-256. Raises Absent, or Unavailable when nobody could be asked."""
        (target,) = await self._lookup.targets([sha256])
        opened = Opened(target.manifest, target.seal, target.header, target.inclusion)
        return Span(opened, target.offset, target.size)

    async def whole(self, file_id: FileId) -> Span:
        """A whole object of this vault, with all members if it is a pack. Raises Absent."""
        opened = await self._lookup.file(file_id)
        return Span(opened, 0, opened.header.size)

    async def read(self, span: Span, start: int, stop: int, *, purpose: int = Purpose.UNSPECIFIED) -> bytes:
        """Bytes ``start`` to ``stop`` of a span; fewer where it ends. Raises what ``Vault.get`` does."""
        if start < 0:
            raise ValueError("start must not be negative")
        stop = min(stop, span.size)
        if start >= stop:
            return b""
        low, high = span.offset + start, span.offset + stop
        wanted = span.layout.stripes_of(low, high - low)
        found = await self._stripes(span.object, wanted, self._ahead(span, wanted), purpose)
        skip = low - wanted.start * span.layout.segment_plain
        if len(found) == 1:
            return found[0][skip : skip + high - low]
        found[0] = found[0][skip:] if skip else found[0]
        found[-1] = found[-1][: high - (wanted.stop - 1) * span.layout.segment_plain]
        return b"".join(found)

    async def announce(self, file_ids: Sequence[FileId], purpose: int) -> None:
        """Have it on the ledger that these files are read, unless it is, in as few entries as can be. What is kept here needs it too."""
        key = tuple(file_id for file_id in dict.fromkeys(file_ids) if not self._reader.tickets.holds(file_id, purpose))
        if not key:
            return
        if (task := self._announcing.get((key, purpose))) is None:
            task = self._announcing[key, purpose] = asyncio.create_task(self._announce(key, purpose))
            task.add_done_callback(lambda done: self._announcing.pop((key, purpose), None))
        await asyncio.shield(task)

    async def _announce(self, file_ids: Sequence[FileId], purpose: int) -> None:
        async def nothing(net: Net, file_ids: frozenset[FileId]) -> None:
            pass

        await self._reader.read(file_ids, purpose, self._reason(), nothing)

    async def close(self) -> None:
        """End what is still being read ahead."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ahead(self, span: Span, wanted: range) -> int:
        """How many stripes beyond those wanted to fetch as well: twice as many each time that a reader goes on where it ended."""
        course = self._courses.setdefault(span.file_id, _Course())
        self._courses.move_to_end(span.file_id)
        if len(self._courses) > 256:
            self._courses.popitem(last=False)
        goes_on = wanted.start in (course.end - 1, course.end)
        most = max(1, run_bytes_max // span.layout.segment_plain)
        if wanted.stop > course.end or not goes_on:
            is_long = len(wanted) * span.layout.segment_plain >= long_read_bytes
            course.ahead = (most if is_long else min(most, max(1, 2 * course.ahead))) if goes_on else 0
        course.end = wanted.stop
        return course.ahead

    async def _stripes(self, opened: Opened, wanted: range, ahead: int, purpose: int) -> list[bytes]:
        file_id = opened.manifest.file_id
        await self.announce([file_id], purpose)
        kept = {number: await self.blocks.get(file_id, number) for number in wanted}
        # From here to the last task made nothing waits, so that no two readers fetch one stripe.
        coming = self._coming.setdefault((file_id, purpose), {})
        later = range(wanted.stop, min(wanted.stop + ahead, opened.manifest.layout.stripes))
        missing = [number for number in wanted if kept[number] is None and number not in coming]
        beyond = [number for number in later if number not in coming and not self.blocks.has(file_id, number)]
        if missing or (beyond and beyond[0] < wanted.stop + ahead // 2):  # else most of what comes next is here
            missing += beyond
        for run in _runs(missing, max(1, run_bytes_max // opened.manifest.layout.segment_plain)):
            coming.update({number: asyncio.get_running_loop().create_future() for number in run})
            task = asyncio.create_task(self._fetch(opened, run, coming, purpose))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        waited = {number: coming[number] for number in wanted if kept[number] is None}
        return [known if (known := kept[number]) is not None else await asyncio.shield(waited[number]) for number in wanted]

    async def _fetch(self, opened: Opened, run: range, coming: _Coming, purpose: int) -> None:
        """Fetch a run of stripes, and give each to those who wait as soon as it is there."""
        loop = asyncio.get_running_loop()
        file_id = opened.manifest.file_id
        keeping: list[asyncio.Task[None]] = []

        def arrived(number: int, plain: bytes) -> None:
            if (waited := coming.get(number)) is not None and not waited.done():
                waited.set_result(plain)
                keeping.append(asyncio.create_task(self.blocks.put(file_id, number, plain)))

        async def work(net: Net, file_ids: frozenset[FileId]) -> None:
            decoder = Decoder(opened.seal, opened.manifest.layout)

            def take(stripe: Arrived) -> None:
                plain = bytes(decoder.open_in_place(stripe.number, stripe.stripe, stripe.cells))
                loop.call_soon_threadsafe(arrived, stripe.number, plain)

            await Download(net, opened.manifest).run(run, take)

        try:
            await self._reader.read([file_id], purpose, self._reason(), work)
            await asyncio.sleep(0)  # what the thread gave last
            await asyncio.gather(*keeping)
            self._fail(coming, run, Damaged("a stripe did not come"))
        except Exception as error:  # whoever waits for a stripe hears of it
            self._fail(coming, run, error)
        finally:
            self._fail(coming, run, Unavailable("the vault was closed meanwhile"))
            for number in run:
                coming.pop(number, None)

    def _fail(self, coming: _Coming, run: range, error: Exception) -> None:
        for number in run:
            if not (waited := coming[number]).done():
                waited.set_exception(error)
                waited.exception()  # nobody may be waiting for what was read ahead


def _runs(numbers: list[int], most: int) -> list[range]:
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number and len(runs[-1]) < most:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs
