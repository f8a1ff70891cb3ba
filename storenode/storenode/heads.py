"""Old published heads, one every ten minutes: so that when something was written down can be proved later, and not only told.

    heads    beside the log: records, ascending by size: size, 8 bytes; length, 4 bytes; then the note of that length

Law: what is kept was published, and whoever is shown it checks that again: a node can keep an old head back, and cannot make one up.
Nothing is fsynced: what a power cut takes makes a few times later than they were.
"""

from __future__ import annotations

import os
import struct
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

from aiohttp import web

from medshard_protocol.errors import Absent
from medshard_protocol.messages import body_type
from storenode.ledger import Ledger, Published

heads_name: Final = "heads"
keep_every_s: Final = 600.0  # with seven institutions 60 MB in a year that never rests
_record: Final = struct.Struct(">QI")


class Heads:
    """The records in the file at ``path``, which ``open`` makes where it is not there yet."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._file = -1
        self._sizes: list[int] = []
        self._offsets = [0]
        self._kept_at = -keep_every_s

    def open(self) -> None:
        """Take up the file; a record that a power cut left half-written goes."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        end, at = os.fstat(self._file).st_size, 0
        while at + _record.size <= end:
            size, length = _record.unpack(os.pread(self._file, _record.size, at))
            at += _record.size + length
            if at > end or (self._sizes and size <= self._sizes[-1]):
                break
            self._sizes.append(size)
            self._offsets.append(at)
        os.ftruncate(self._file, self._offsets[-1])

    def note(self, published: Published) -> None:
        """Take in a published head, if the last one that was kept is old enough and smaller."""
        size, now = published.checkpoint.size, self._clock()
        if now - self._kept_at < keep_every_s or (self._sizes and size <= self._sizes[-1]):
            return
        record = _record.pack(size, len(published.note)) + published.note
        os.pwrite(self._file, record, self._offsets[-1])
        self._kept_at = now
        self._sizes.append(size)
        self._offsets.append(self._offsets[-1] + len(record))

    def over(self, index: int) -> bytes:
        """The oldest head that is kept and has the entry at this index. Raises Absent."""
        number = bisect_right(self._sizes, index)
        if number == len(self._sizes):
            raise Absent("no old head with that entry is kept here")
        start = self._offsets[number] + _record.size
        return os.pread(self._file, self._offsets[number + 1] - start, start)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


def equip(app: web.Application, ledger: Ledger) -> None:
    """Let a node keep heads while it runs, and show them at GET /v1/ledger/heads/INDEX."""
    heads = app[heads_key] = Heads(ledger.journal.folder / heads_name)

    async def running(app: web.Application) -> AsyncIterator[None]:
        heads.open()

        def note(published: Published, heard_at: float) -> None:
            heads.note(published)

        if (published := ledger.published) is not None:
            heads.note(published)
        ledger.journal.on_published.append(note)
        yield
        ledger.journal.on_published.remove(note)
        heads.close()

    app.cleanup_ctx.append(running)
    app.router.add_get("/v1/ledger/heads/{index:[0-9]{1,15}}", get_head, allow_head=False)


async def get_head(request: web.Request) -> web.Response:
    """The oldest head that is kept and has this entry."""
    return web.Response(body=request.app[heads_key].over(int(request.match_info["index"])), content_type=body_type)


heads_key: Final = web.AppKey("heads", Heads)
