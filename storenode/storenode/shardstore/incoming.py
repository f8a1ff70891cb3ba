"""One shard on its way in: hashed cell by cell as it comes, written to a temporary file or kept in memory while small.

It holds room for what has come and a little ahead, never for all that was announced: whoever announces much and sends nothing keeps
nobody else out.

Nothing here is visible to a reader. ``finish`` makes the bytes durable and gives the digests; ``abandon`` leaves no trace.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from medshard_protocol.errors import Malformed

ahead_bytes = 1 << 20  # asking for room costs a system call


class Incoming:
    """Takes exactly ``size`` bytes. With ``temporary`` None they stay in memory (the caller stores them in the catalog).

    ``more`` is asked, from whatever thread writes, for room for so many bytes more, and raises Full where there is none.
    """

    def __init__(self, size: int, cell_size: int, temporary: Path | None, more: Callable[[Incoming, int], None]) -> None:
        self.size = size
        self.held = 0  # room that counts as taken; changed by ``more``
        self._more = more
        self.cell_size = cell_size
        self.digests: list[bytes] = []
        self.received = 0
        self.temporary = temporary
        self._memory = bytearray()
        self._file: BinaryIO | None = open(temporary, "xb", buffering=0) if temporary else None  # noqa: SIM115 - closed below
        self._hasher = blake3()
        self._in_cell = 0

    def write(self, chunks: Sequence[bytes | memoryview]) -> None:
        """Take more bytes. Blocking: call it from a thread. Raises Malformed when more come than announced, Full when there is no room."""
        for chunk in chunks:
            if self.received + len(chunk) > self.size:
                raise Malformed("more bytes came than were announced")
            if self.received + len(chunk) > self.held:
                self._more(self, min(self.received + len(chunk) + ahead_bytes, self.size) - self.held)
            self.received += len(chunk)
            self._hash(memoryview(chunk))
            if self._file is None:
                self._memory += chunk
            else:
                _write_all(self._file, chunk)

    def finish(self) -> bytes | None:
        """Make the bytes durable; the bytes themselves if they were kept in memory. Raises Malformed when some are missing."""
        if self.received != self.size:
            raise Malformed(f"{self.received} bytes came of the {self.size} announced")
        if self._in_cell:
            self._end_cell()
        if self._file is None:
            return bytes(self._memory)
        os.fsync(self._file.fileno())  # before the rename: a name must never point at bytes that a power cut can take
        self._file.close()
        return None

    def abandon(self) -> None:
        """Leave nothing behind. Safe to call at any time, more than once."""
        if self._file is not None and self.temporary is not None:
            self._file.close()
            self.temporary.unlink(missing_ok=True)

    def _hash(self, view: memoryview) -> None:
        while view:
            take = min(self.cell_size - self._in_cell, len(view))
            self._hasher.update(view[:take])
            self._in_cell += take
            view = view[take:]
            if self._in_cell == self.cell_size:
                self._end_cell()

    def _end_cell(self) -> None:
        self.digests.append(self._hasher.digest())
        self._hasher = blake3()
        self._in_cell = 0


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
