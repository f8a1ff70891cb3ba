"""When the log had which size, by its cosigners' clocks: so that people can be told when something was written down.

    DATA/clock    records of 16 bytes, ascending: size of a published checkpoint, and the median of its cosigners' times in Unix seconds

Law: it is this node's word, for people. What was before what is decided by places in the log and by nothing else. At most one record a
second; nothing is fsynced, because what is lost in a power cut only makes a few times later than they were.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

from aiohttp import web

from medshard_protocol.messages import body_type
from medshard_protocol.sharing import pack_times, places_bytes_max, unpack_places
from storenode.gate import cosigned_at
from storenode.ledger import Ledger, Published
from storenode.routes import read_body

clock_name: Final = "clock"
_record: Final = struct.Struct(">QQ")


class Clock:
    """The records in the file at ``path``, which ``open`` makes where it is not there yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._count = 0
        self._last = (0, 0)

    def open(self) -> None:
        """Take up the file."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._count = os.fstat(self._file).st_size // _record.size
        os.ftruncate(self._file, self._count * _record.size)  # a record that a power cut left half-written
        self._last = self._at(self._count - 1) if self._count else (0, 0)

    def note(self, size: int, time: int) -> None:
        """Take in a published checkpoint."""
        last_size, last_time = self._last
        if size <= last_size or time < last_time:
            return
        self._count += time > last_time  # of those in one second, the last is kept
        os.pwrite(self._file, _record.pack(size, time), (self._count - 1) * _record.size)
        self._last = size, time

    def times(self, places: Sequence[int]) -> list[int]:
        """When each of these places was published at the latest; 0 where nothing is known."""
        return [self._time(place) for place in places]

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def _time(self, place: int) -> int:
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._at(middle)[0] > place else (middle + 1, high)
        return self._at(low)[1] if low < self._count else 0

    def _at(self, number: int) -> tuple[int, int]:
        size, time = _record.unpack(os.pread(self._file, _record.size, number * _record.size))
        return size, time


def equip(app: web.Application, data: Path, ledger: Ledger) -> None:
    """Let a node keep the clock while it runs, and answer for it at POST /v1/ledger/times."""
    clock = app[clock_key] = Clock(data / clock_name)

    async def running(app: web.Application) -> AsyncIterator[None]:
        clock.open()

        def note(published: Published, heard_at: float) -> None:
            clock.note(published.checkpoint.size, int(cosigned_at(published.note, ledger.roster)))

        if (published := ledger.published) is not None:
            note(published, 0.0)
        ledger.journal.on_published.append(note)
        yield
        ledger.journal.on_published.remove(note)
        clock.close()

    app.cleanup_ctx.append(running)
    app.router.add_post("/v1/ledger/times", post_times)


async def post_times(request: web.Request) -> web.Response:
    """When entries were published."""
    places = unpack_places(await read_body(request, places_bytes_max))
    return web.Response(body=pack_times(request.app[clock_key].times(places)), content_type=body_type)


clock_key: Final = web.AppKey("clock", Clock)
