"""What has been promised and is not yet in the store: instances on the gateway's own disk, encrypted, fsynced before anybody hears yes.

Law: an instance that ``finish`` returned is there after a crash at any later moment, until ``done`` is called for it; after that, and
whatever else happens to it, nobody opens it, whoever its neighbours are. One that it did not return is not there either. Nothing is ever
appended to a segment that an earlier process wrote. Nobody but this class and its spares touches the folder. The bytes are in
docs/formats/spool.md.

Blocking, and safe to call from many threads: each arrival has a segment of its own while it lasts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

from medshard.durable import fsync_folder
from medshard.gateway import segments
from medshard.gateway.segments import DATA, END, Entry, Segment, chunk_plain
from medshard.gateway.spares import Spares
from medshard_protocol import canonical
from medshard_protocol.errors import Absent, Conflict, Full

segment_bytes: Final = 64 * 1024 * 1024  # then another one is begun, so that what is stored can be deleted
spares_max: Final = 4  # segments that are kept to be used again: a CT series of 300 slices fits into three
sync_bytes: Final = 32 * 1024 * 1024  # of one instance, so that its last sync is a short one


class Spool:
    """The folder of segments. Raises Conflict where another process has it open."""

    def __init__(self, folder: Path, key: bytes, *, bytes_max: int) -> None:
        self.folder = folder
        self.bytes_max = bytes_max
        self.cut_off = 0  # instances that ``recover`` found with an end and without all of their data
        self._key = key
        self._lock = threading.Lock()
        self._segments: dict[int, Segment] = {}  # that instances lie in, or come into
        self._idle: list[Segment] = []  # of these, the ones that nothing comes into just now
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._held = _hold(folder / "lock")
        self._next = 1 + max((int(path.stem, 16) for path in folder.glob("*.spool")), default=0)
        self._spares = Spares(key, min(spares_max, bytes_max // (16 * segment_bytes)), segment_bytes, self._name)

    def close(self) -> None:
        """Let go of the folder. What is in it stays."""
        self._spares.close()
        for segment in self._segments.values():
            if segment.allocated < segment_bytes:
                os.ftruncate(segment.descriptor, segment.position)
            os.close(segment.descriptor)
        self._segments.clear()
        self._idle.clear()
        os.close(self._held)

    @property
    def used_bytes(self) -> int:
        """What the segments with instances take on the disk."""
        return sum(segment.position for segment in list(self._segments.values()) if segment.live or segment.writing)

    def recover(self) -> list[Entry]:
        """What earlier processes left, oldest first. Call once, before anything else."""
        entries: list[Entry] = []
        for path in sorted(self.folder.glob("*.spool")):
            segment = segments.reopened(path, self._key)
            if segment is None:  # its process died before it had said anything
                path.unlink()
                continue
            found = segments.scan(segment)
            self.cut_off += found.cut_off
            if found.entries:
                self._end(segment, found.partial)
                segment.live, segment.closed = len(found.entries), True
                self._segments[segment.number] = segment
                entries += found.entries
            else:
                self._spares.renew(segment)
        return entries

    def provide(self) -> None:
        """Have segments ready to begin with. Blocking, for a second or two at the first start."""
        self._spares.provide()

    def begin(self) -> Arrival:
        """Take in one instance. Raises Full."""
        with self._lock:
            if self.used_bytes >= self.bytes_max:
                raise self._full()
            if self._idle:
                segment = self._idle.pop()
                segment.writing = True  # before the lock is given back: ``done`` may empty it
                return Arrival(self, segment)
        segment = self._spares.take() or self._fresh()
        segment.writing = True
        with self._lock:
            self._segments[segment.number] = segment
        return Arrival(self, segment)

    def read(self, entry: Entry, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of an instance. Raises Damaged; Absent once it is done."""
        with self._lock:
            segment = self._segments.get(entry.segment)
            if segment is None:
                raise Absent("it has left the spool for the store")
            segment.readers += 1
        try:
            return b"".join(segment.read(entry.offset, entry.size, start, min(stop, entry.size)))
        finally:
            self._let_go(segment)

    def done(self, entries: Iterable[Entry]) -> None:
        """These are safe elsewhere: nobody opens them on this disk any more, from the return on."""
        empty: list[Segment] = []
        shared: defaultdict[Segment, list[int]] = defaultdict(list)  # with others that stay
        with self._lock:
            for entry in entries:
                segment = self._segments[entry.segment]
                segment.live -= 1
                shared[segment].append(entry.offset)
            for segment in list(shared):
                if not segment.live and not segment.writing:
                    empty.append(self._take_out(segment))
                    del shared[segment]
                else:
                    segment.readers += 1
        for segment, offsets in shared.items():
            self._end(segment, offsets)
            self._let_go(segment)
        for segment in empty:
            self._put_away(segment)

    # -- what an arrival needs

    def room(self, size: int) -> None:
        """Raise Full where ``size`` more bytes are more than the spool may have."""
        if self.used_bytes + size > self.bytes_max:
            raise self._full()

    def give_back(self, segment: Segment, *, kept: bool, broken: bool) -> None:
        """An arrival has ended; ``kept``: with an instance that counts."""
        with self._lock:
            segment.writing = False
            segment.live += kept
            segment.closed = segment.closed or broken or segment.position >= segment_bytes
            if not segment.closed:
                self._idle.append(segment)
                return
            with contextlib.suppress(OSError):
                os.ftruncate(segment.descriptor, segment.position)
            if segment.live:
                return
            self._take_out(segment)
        self._put_away(segment)

    def broken_off(self, segment: Segment, offset: int) -> None:
        """What came of an instance that begins there means nothing."""
        self._end(segment, [offset])

    # -- segments

    def _end(self, segment: Segment, offsets: Iterable[int]) -> None:
        with contextlib.suppress(OSError):  # the disk fails, and nothing can be done to it
            segment.end(offsets)

    def _let_go(self, segment: Segment) -> None:
        with self._lock:
            segment.readers -= 1
            if segment.deleted and not segment.readers:
                os.close(segment.descriptor)

    def _name(self) -> tuple[int, Path]:
        with self._lock:
            number, self._next = self._next, self._next + 1
        return number, self.folder / f"{number:012x}.spool"

    def _fresh(self) -> Segment:
        number, path = self._name()
        try:
            segment = segments.made(path, number, self._key)
            fsync_folder(self.folder)  # or a power cut could take the file's name, and all that it holds
        except OSError as error:
            raise _no_room(error, path) from error
        return segment

    def _take_out(self, segment: Segment) -> Segment:
        if segment in self._idle:
            self._idle.remove(segment)
        del self._segments[segment.number]
        return segment

    def _put_away(self, segment: Segment) -> None:
        """Nothing lies in it and nobody finds it any more."""
        with self._lock:
            if segment.readers:  # the last of them closes it
                segments.shredded(segment)
                segment.path.unlink(missing_ok=True)
                segment.deleted = True
                return
        self._spares.renew(segment)

    def _full(self) -> Full:
        return Full(
            f"the spool {self.folder} holds {self.bytes_max:,} bytes that are not yet in the store",
            hint="the nodes take them more slowly than they come, or not at all: see `medshard doctor`",
        )


class Arrival:
    """One instance while it comes. End it with ``finish`` or ``drop``."""

    def __init__(self, spool: Spool, segment: Segment) -> None:
        self.size = 0
        self._spool = spool
        self._segment = segment
        self._offset = segment.begin()
        self._hash = sha256()
        self._buffer = bytearray()
        self._head = b""  # the first chunk in clear: what an instance says of itself stands in it
        self._synced = 0
        self._broken = self._ended = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes. Raises Full, and is dropped then."""
        self._hash.update(data)
        self.size += len(data)
        self._buffer += data
        try:
            while len(self._buffer) >= chunk_plain:
                self._spool.room(chunk_plain)
                with memoryview(self._buffer)[:chunk_plain] as chunk:
                    self._head = self._head or bytes(chunk)
                    self._segment.append(DATA, chunk)
                del self._buffer[:chunk_plain]
                if self._segment.position - self._offset - self._synced >= sync_bytes:
                    self._segment.sync()
                    self._synced = self._segment.position - self._offset
        except OSError as error:
            self._broken = True
            self.drop()
            raise _no_room(error, self._segment.path) from error
        except Full:
            self.drop()
            raise

    def read(self, start: int, stop: int) -> bytes:
        """Bytes of what has come so far."""
        flushed = self.size - len(self._buffer)
        if stop <= len(self._head):
            return self._head[start:stop]
        parts: list[bytes] = []
        if start < flushed:
            parts += self._segment.read(self._offset, flushed, start, min(stop, flushed))
        if stop > flushed:
            parts.append(bytes(memoryview(self._buffer)[max(0, start - flushed) : stop - flushed]))
        return b"".join(parts)

    def digest(self) -> bytes:
        """SHA-256 of what has come so far."""
        return self._hash.digest()

    def finish(self, attributes: Mapping[str, str]) -> Entry:
        """Make it durable. Raises Full."""
        received = time.time_ns() // 1_000_000
        pairs: list[canonical.Value] = [[key, attributes[key]] for key in sorted(attributes)]
        end = canonical.encode([self.size, self.digest(), received, pairs])
        try:
            self._spool.room(len(self._buffer) + len(end))
            if self._buffer:
                self._segment.append(DATA, self._buffer)
            self._segment.append(END, end)
            self._segment.sync()
        except OSError as error:
            self._broken = True  # whether its bytes are there nobody can say: this segment takes no more
            self.drop()
            raise _no_room(error, self._segment.path) from error
        except Full:
            self.drop()
            raise
        entry = Entry(self._segment.number, self._offset, self.size, self.digest(), received, dict(attributes))
        self._end(kept=True)
        return entry

    def drop(self) -> None:
        """Forget it. Idempotent, and nothing after ``finish``."""
        if self._ended:
            return
        if self._segment.begun:
            self._spool.broken_off(self._segment, self._offset)
        self._end(kept=False)

    def _end(self, *, kept: bool) -> None:
        self._ended = True
        self._buffer.clear()
        self._head = b""
        self._spool.give_back(self._segment, kept=kept, broken=self._broken)


def _hold(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Conflict(f"another gateway works in {path.parent}", hint="stop it first, or give this one another --dir") from None
    return descriptor


def _no_room(error: OSError, path: Path) -> Full:
    why = "no room on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"the disk fails ({error.strerror})"
    return Full(f"{why} for {path}", hint="free some space, or give --dir another disk; the sender will try again")
