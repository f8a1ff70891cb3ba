"""The plaintext of one object on its way in: one file, or the members of a pack back to back, each hashed as it is read.

A file that changes while it is read is found (size and modification time before and after) and refused: a backup of half an
old and half a new file is worse than an error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from medshard.model import Description
from medshard_protocol.errors import MedshardError


class Changed(MedshardError):
    """A file changed while it was read."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file to be stored: where it is, the name it gets in the sealed header, what was seen of it beforehand."""

    path: Path
    name: bytes
    size: int
    mtime_ns: int
    description: Description
    opener: Callable[[], BinaryIO] | None = None  # where the bytes are no file of their own; ``path`` is then only its lasting name

    @classmethod
    def at(cls, path: Path, name: bytes, description: Description) -> Part:
        """Look at ``path`` once. Raises OSError."""
        stat = os.stat(path)
        return cls(path, name, stat.st_size, stat.st_mtime_ns, description)

    @classmethod
    def holding(cls, data: bytes, name: bytes, description: Description, path: Path | None = None) -> Part:
        """Bytes that never lie on this disk in the clear, as if they were a file at ``path``."""
        return cls(path or Path(os.fsdecode(name)), name, len(data), time.time_ns(), description, opener=lambda: BytesIO(data))

    def open(self) -> BinaryIO:
        """Its bytes from the first one on. Raises OSError."""
        return open(self.path, "rb", buffering=0) if self.opener is None else self.opener()

    def digest(self) -> bytes:
        """SHA-256 of its bytes. Raises OSError."""
        if self.opener is None:
            return hash_file(self.path)
        hasher, buffer = sha256(), bytearray(1024 * 1024)
        with self.open() as file:
            while got := file.readinto(buffer):  # type: ignore[attr-defined]
                hasher.update(memoryview(buffer)[:got])
        return hasher.digest()


class Source:
    """Read ``parts`` in order. ``hashes`` holds the SHA-256 of each part that was read to its end."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.size = sum(part.size for part in parts)
        self.hashes: list[bytes] = []
        self._current = 0
        self._file: BinaryIO | None = None
        self._left = 0
        self._hash = sha256()

    def read_into(self, view: memoryview) -> int:
        """Fill ``view`` from where the last call stopped; how many bytes, fewer only at the end. Raises Changed or OSError."""
        filled = 0
        while filled < len(view):
            if self._file is None:
                if self._current == len(self.parts):
                    break
                self._begin()
            assert self._file is not None
            wanted = view[filled : filled + min(self._left, len(view) - filled)]
            got = self._file.readinto(wanted) if wanted else 0  # type: ignore[attr-defined]
            if got == 0 and self._left:
                raise self._changed()
            self._hash.update(wanted[:got])
            filled += got
            self._left -= got
            if self._left == 0:
                self._end()
        self._finish_empty()
        return filled

    def close(self) -> None:
        """Close the file in hand, if any."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        part = self.parts[self._current]
        self._file = part.open()
        self._left = part.size
        self._hash = sha256()
        self._check()

    def _end(self) -> None:
        assert self._file is not None
        if self._file.read(1):
            raise self._changed()
        self._check()
        self.close()
        self.hashes.append(self._hash.digest())
        self._current += 1

    def _finish_empty(self) -> None:
        # Empty files at the very end need no bytes of the view, yet are parts with a hash.
        while self._file is None and self._current < len(self.parts) and self.parts[self._current].size == 0:
            self._begin()
            self._end()

    def _check(self) -> None:
        assert self._file is not None
        part = self.parts[self._current]
        if part.opener is not None:
            return
        stat = os.fstat(self._file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != (part.size, part.mtime_ns):
            raise self._changed()

    def _changed(self) -> Changed:
        path = self.parts[self._current].path
        return Changed(f"{path} changed while it was read", hint="nothing of it was stored; put it again when it is at rest")


def hash_file(path: Path) -> bytes:
    """SHA-256 of a file's bytes. Raises OSError."""
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def fingerprint(parts: Sequence[Part]) -> bytes:
    """A quick hint that the same object may have been put before: names, sizes, times. Never proof; hashes decide."""
    hasher = sha256()
    for part in parts:
        for field in (os.fsencode(part.path.absolute()), part.name, str(part.size).encode(), str(part.mtime_ns).encode()):
            hasher.update(len(field).to_bytes(4, "big") + field)
    return hasher.digest()
