"""Reading instances for those who ask for many at once: a study's list is looked up once, and its bytes come in long runs.

Law: what is given is what is stored, from the spool or from the store. Everything of a study is announced on the ledger together,
before the first byte of any of it, so that a viewer's three hundred requests are one entry.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from medshard.gateway.archive import Archive, Stored
from medshard.gateway.model import Instance
from medshard_protocol.errors import Absent

run_bytes: Final = 4 * 1024 * 1024  # read at once, and one more while it is sent
studies_max: Final = 64


@dataclass(frozen=True, slots=True)
class Study:
    """The instances of a study that are served, by series and number, as they are in the catalog at one time."""

    uid: str
    version: tuple[int, int]
    instances: tuple[Instance, ...]
    by_uid: dict[str, Instance] = field(repr=False)

    def chosen(self, series: str | None = None, uid: str | None = None) -> tuple[Instance, ...]:
        """All, those of one series, or one. Raises Absent for none."""
        if uid is not None:
            one = self.by_uid.get(uid)
            found: tuple[Instance, ...] = (one,) if one is not None and series in (None, one.series) else ()
        else:
            found = self.instances if series is None else tuple(each for each in self.instances if each.series == series)
        if not found:
            raise Absent("there is no such study, series or instance here")
        return found


class Shelf:
    """Studies that are being looked at."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self._studies: OrderedDict[str, Study] = OrderedDict()

    async def study(self, uid: str) -> Study:
        """The instances of a study. Raises Absent."""
        catalog = self.archive.catalog
        known = self._studies.get(uid)
        if known is None or known.version != catalog.version(uid):
            version = catalog.version(uid)  # before the look: what changes meanwhile is looked at again
            found = await asyncio.to_thread(self.archive.instances, uid)
            instances = tuple(sorted(found, key=lambda each: each.series))  # within a series by number: as they lie in their objects
            known = self._studies[uid] = Study(uid, version, instances, {each.uid: each for each in instances})
            while len(self._studies) > studies_max:
                self._studies.popitem(last=False)
        self._studies.move_to_end(uid)
        if not known.instances:
            del self._studies[uid]
            raise Absent("there is no such study here")
        return known

    async def announce(self, study: Study) -> None:
        """Have it on the ledger that this study is read. Raises Refused or Unavailable."""
        if files := {each.place.file_id for each in study.instances if each.place is not None}:
            await self.archive.objects.announce(sorted(files))

    async def check(self, instances: Sequence[Instance]) -> None:
        """Raise Unavailable where one of these waits in another gateway's spool, while there is still a status to say it with."""
        for each in instances:
            if not self.archive.is_safe(each):
                await self.archive.place_of(each)

    async def read(self, instance: Instance, start: int, stop: int) -> bytes:
        """Bytes of an instance whose study is announced."""
        return await Stored(instance, self.archive).read(start, stop)

    async def stream(self, instances: Sequence[Instance]) -> AsyncIterator[tuple[Instance, memoryview, bool]]:
        """The bytes of many instances in their order: (instance, some of its bytes, whether they are its last)."""
        runs = [run async for run in self._runs(instances)]
        coming: asyncio.Task[bytes] | None = None
        try:
            for number, run in enumerate(runs):
                coming = coming or asyncio.create_task(self._read(run))
                data = memoryview(await coming)
                coming = asyncio.create_task(self._read(runs[number + 1])) if number + 1 < len(runs) else None
                at = 0
                for piece in run:
                    size = piece.stop - piece.start
                    yield piece.instance, data[at : at + size], piece.stop == piece.instance.size
                    at += size
        finally:
            if coming is not None:
                coming.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await coming

    async def _runs(self, instances: Sequence[Instance]) -> AsyncIterator[list[_Piece]]:
        """What is read together: pieces that lie one behind the other in one object."""
        run: list[_Piece] = []
        size = 0
        for instance in instances:
            place = None if self.archive.entry(instance) else await self.archive.place_of(instance)
            offset = 0 if place is None else (await self.archive.objects.span(place.file_id, place.member))[0]
            for start in range(0, instance.size, run_bytes):
                stop = min(start + run_bytes, instance.size)
                piece = _Piece(instance, start, stop, b"" if place is None else place.file_id, offset)
                if run and (size + stop - start > run_bytes or not piece.follows(run[-1])):
                    yield run
                    run, size = [], 0
                run.append(piece)
                size += stop - start
        if run:
            yield run

    async def _read(self, run: Sequence[_Piece]) -> bytes:
        first, last = run[0], run[-1]
        if first.file_id and len(run) > 1:
            return await self.archive.objects.read(first.file_id, first.offset + first.start, last.offset + last.stop)
        return await self.read(first.instance, first.start, first.stop)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of one instance, and where that instance begins in which object; no object for one in the spool."""

    instance: Instance
    start: int
    stop: int
    file_id: bytes
    offset: int

    def follows(self, other: _Piece) -> bool:
        """Whether this one's bytes begin where the other's end."""
        return self.file_id == other.file_id != b"" and self.offset + self.start == other.offset + other.stop
