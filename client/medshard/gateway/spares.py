"""Segments of the spool that are empty and were written before: to begin with, and again and again.

What is written over blocks that a file already has needs no journal of the file system, so a sync takes half the time, and a fifth on a
machine where the journal's thread has to wait for a processor. Allocating alone does not do: blocks that were never written are marked
as such in the journal.

Law: a spare has no instance in it and no chunk that opens. Blocking; safe to call from many threads.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from medshard.durable import fsync_folder
from medshard.gateway import segments
from medshard.gateway.segments import Segment

blank_step: Final = 1024 * 1024
sync_step: Final = 16 * 1024 * 1024  # so that whoever receives meanwhile waits for no long sync
room_factor: Final = 4  # of free disk for what spares take, else there are none


class Spares:
    """At most ``most`` of them, of ``size`` bytes each; ``name`` gives the next segment's number and path."""

    def __init__(self, key: bytes, most: int, size: int, name: Callable[[], tuple[int, Path]]) -> None:
        self._key = key
        self._most = most
        self._size = size
        self._name = name
        self._lock = threading.Lock()
        self._ready: list[Segment] = []
        self._count = 0  # those that are being made included
        self._closed = False

    def close(self) -> None:
        """Leave them on the disk for the next process."""
        with self._lock:
            self._closed = True
            for segment in self._ready:
                os.close(segment.descriptor)
            self._ready.clear()

    def take(self) -> Segment | None:
        """One that is ready; its name is durable."""
        with self._lock:
            if not self._ready:
                return None
            self._count -= 1
            return self._ready.pop()

    def renew(self, old: Segment) -> None:
        """Keep a segment that nothing lies in and that nobody reads, or delete it."""
        if not self._one_more():
            _delete(old)
            return
        number, path = self._name()
        try:
            segment = segments.renewed(old, path, number, self._key, self._size)
            fsync_folder(path.parent)
        except OSError:
            _delete(old)
            path.unlink(missing_ok=True)
            self._one_less()
        else:
            self._add(segment)

    def provide(self) -> None:
        """Make those that are missing, of zeros. Takes a second or two at the first start."""
        while self._one_more():
            number, path = self._name()
            try:
                room = os.statvfs(path.parent)
                segment = self._blank(number, path) if room.f_bavail * room.f_frsize > room_factor * self._most * self._size else None
            except OSError:
                segment = None
            if segment is None:
                self._one_less()
                return
            self._add(segment)

    def _one_more(self) -> bool:
        with self._lock:
            if self._closed or self._count >= self._most:
                return False
            self._count += 1
            return True

    def _one_less(self) -> None:
        with self._lock:
            self._count -= 1

    def _add(self, segment: Segment) -> None:
        with self._lock:
            if self._closed:
                os.close(segment.descriptor)
            else:
                self._ready.append(segment)

    def _blank(self, number: int, path: Path) -> Segment | None:
        """One whose every block is written and durable; None where the gateway ends meanwhile."""
        segment = segments.made(path, number, self._key)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(segment.descriptor, 0, self._size)  # in one piece, if the disk has one
            for at in range(segment.position, self._size, blank_step):
                if self._closed:
                    break
                os.pwrite(segment.descriptor, bytes(min(blank_step, self._size - at)), at)
                if at % sync_step < blank_step:
                    os.fdatasync(segment.descriptor)
            os.fsync(segment.descriptor)
            fsync_folder(path.parent)
        except OSError:
            _delete(segment)
            raise
        if self._closed:
            _delete(segment)
            return None
        segment.allocated = self._size
        return segment


def _delete(segment: Segment) -> None:
    segments.shredded(segment)
    with contextlib.suppress(OSError):
        segment.path.unlink(missing_ok=True)
    os.close(segment.descriptor)
