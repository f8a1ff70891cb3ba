"""Plaintext on its way out: into a temporary file beside its destination, under its name only once its SHA-256 is right."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from medshard.durable import fsync_folder
from medshard.model import Header
from medshard.sealing import FileSeal
from medshard_protocol.errors import Damaged
from medshard_protocol.manifest import Manifest
from medshard_protocol.proofs import Inclusion
from medshard_protocol.shards import Layout


@dataclass(frozen=True, slots=True)
class Target:
    """One plaintext to be had: ``size`` bytes from ``offset`` of the object that ``manifest`` describes."""

    sha256: bytes
    manifest: Manifest
    seal: FileSeal
    header: Header
    inclusion: Inclusion
    name: bytes
    offset: int
    size: int


class Restore:
    """Collects one target's bytes in order. ``finish`` checks and publishes them; ``abandon`` leaves nothing behind."""

    def __init__(self, target: Target, destination: Path | None, out: BinaryIO | None = None) -> None:
        self.target = target
        self.destination = destination
        self.written = 0
        self._hash = sha256()
        self._temporary: Path | None = None
        if out is not None:
            self._file = out
        elif destination is not None:
            descriptor, name = tempfile.mkstemp(prefix=f".{destination.name[:100]}.", suffix=".part", dir=destination.parent)
            self._temporary = Path(name)
            self._file = os.fdopen(descriptor, "wb", buffering=0)
        else:
            raise ValueError("a destination or an open file is needed")

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes. Blocking."""
        self._hash.update(data)
        view = memoryview(data)
        self.written += len(view)
        while view:
            view = view[self._file.write(view) :]

    def finish(self) -> None:
        """Check the whole, then give it its name; ``publish`` makes the name durable. Blocking. Raises Damaged."""
        if self.written != self.target.size or self._hash.digest() != self.target.sha256:
            self.abandon()
            raise Damaged(
                "the restored bytes do not have the SHA-256 that was asked for", hint="nothing was written; run `medshard verify`"
            )
        if self._temporary is None or self.destination is None:
            self._file.flush()
            return
        os.fchmod(self._file.fileno(), 0o666 & ~_umask())
        os.fsync(self._file.fileno())  # or a power cut could leave an empty file under the final name
        self._file.close()
        os.replace(self._temporary, self.destination)
        self._temporary = None

    def abandon(self) -> None:
        """Leave nothing behind. Safe after ``finish``."""
        if self._temporary is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._temporary = None


def publish(restores: Sequence[Restore]) -> None:
    """Finish all, then make their names durable. Blocking. Raises Damaged; what was finished before stays."""
    for restore in restores:
        restore.finish()
    for folder in {restore.destination.parent for restore in restores if restore.destination is not None}:
        fsync_folder(folder)


def pour(layout: Layout, number: int, plain: memoryview, restores: Sequence[Restore]) -> int:
    """Give each restore its part of one opened stripe; how many bytes. CPU and disk: call it from a thread.

    ``restores`` are sorted by offset.
    """
    start = number * layout.segment_plain
    end, poured = start + len(plain), 0
    for restore in restores:
        target = restore.target
        if target.offset >= end:
            break
        low, high = max(target.offset, start), min(target.offset + target.size, end)
        if low < high:
            restore.write(plain[low - start : high - start])
            poured += high - low
    return poured


def stripes_needed(layout: Layout, targets: Sequence[Target]) -> list[range]:
    """The fewest contiguous runs of stripes that hold all ``targets``."""
    runs: list[range] = []
    for run in sorted((layout.stripes_of(t.offset, t.size) for t in targets if t.size), key=lambda run: (run.start, run.stop)):
        if runs and run.start <= runs[-1].stop:
            runs[-1] = range(runs[-1].start, max(runs[-1].stop, run.stop))
        else:
            runs.append(run)
    return runs


def _umask() -> int:
    # os.umask can only be read by setting it; another thread creating a file in between would get mode 0600, never more.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


class Nowhere(BytesIO):
    """An open file that forgets what is written to it: for reads that only compare the hash."""

    def write(self, data: Any) -> int:
        """Take it and forget it."""
        return len(data)
