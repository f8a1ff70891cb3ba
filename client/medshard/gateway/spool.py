"""What has been promised and is not yet in the store: instances on the gateway's own disk, encrypted, fsynced before anybody hears yes.

Law: an instance that ``finish`` returned is there after a crash at any later moment, until ``done`` is called for it; one that it did not
return is not there. Nothing is ever appended to a segment that an earlier process wrote, so no nonce is used twice. Nobody but
this class touches the folder. The bytes are in docs/formats/spool.md.

Blocking, and safe to call from many threads: each arrival has a segment of its own while it lasts.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medshard.durable import fsync_folder
from medshard.sealing import hkdf
from medshard_protocol import canonical
from medshard_protocol.errors import Absent, Conflict, Damaged, Full, Malformed

magic: Final = b"medshard/spool/v1\n"
salt_size: Final = 32
chunk_plain: Final = 256 * 1024  # sealed and on its way to the disk while the rest of a slice still comes
chunk_head: Final = 5  # length and kind
tag_size: Final = 16
chunk_whole: Final = chunk_head + chunk_plain + tag_size
end_bytes_max: Final = 256 * 1024
segment_bytes: Final = 256 * 1024 * 1024  # then a new one is begun, so that what is stored can be deleted
ahead_bytes: Final = 16 * 1024 * 1024  # allocated beforehand: a sync then writes no metadata, and a full disk is noticed early
sync_bytes: Final = 32 * 1024 * 1024  # of one instance, so that its last sync is a short one
DATA, END, DROP = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Entry:
    """One instance in the spool."""

    segment: int
    offset: int  # of its first chunk in the segment's file
    counter: int  # of its first chunk
    size: int
    sha256: bytes
    received: int  # Unix milliseconds
    attributes: Mapping[str, str] = field(compare=False, hash=False)


class Segment:
    """One file of the spool and its key."""

    def __init__(self, path: Path, number: int, descriptor: int, key: bytes) -> None:
        self.path = path
        self.number = number
        self.descriptor = descriptor
        self.cipher = AESGCM(key)
        self.position = len(magic) + salt_size
        self.counter = 0
        self.live = 0
        self.allocated = self.position
        self.writing = False
        self.closed = False  # nothing is appended any more
        self.readers = 0
        self.deleted = False

    def append(self, kind: int, plain: bytes | bytearray | memoryview) -> None:
        """Write one chunk. Raises OSError."""
        sealed = self.cipher.encrypt(self.counter.to_bytes(12), plain, bytes([kind]))
        self.counter += 1  # before the write: a counter whose chunk may be on the disk is never used again
        head = (len(sealed)).to_bytes(4) + bytes([kind])
        view, began = memoryview(head + sealed), self.position
        while self.allocated < self.position + len(view) and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.descriptor, self.allocated, ahead_bytes)
            self.allocated += ahead_bytes
        while view:
            written = os.pwrite(self.descriptor, view, self.position)
            self.position += written
            view = view[written:]
        _begin_writing(self.descriptor, began, self.position - began)

    def chunk(self, offset: int, counter: int, size: int, kind: int = DATA) -> bytes:
        """The plaintext of a chunk of ``size`` plain bytes. Raises Damaged."""
        sealed = os.pread(self.descriptor, size + tag_size, offset + chunk_head)
        try:
            return self.cipher.decrypt(counter.to_bytes(12), sealed, bytes([kind]))
        except (InvalidTag, ValueError):
            raise Damaged(
                f"{self.path}: bytes at {offset} were altered on this disk", hint="ask the sender to send the study again"
            ) from None


class Spool:
    """The folder of segments. Raises Conflict where another process has it open."""

    def __init__(self, folder: Path, key: bytes, *, bytes_max: int) -> None:
        self.folder = folder
        self.bytes_max = bytes_max
        self._key = key
        self._lock = threading.Lock()
        self._segments: dict[int, Segment] = {}
        self._idle: list[Segment] = []
        self._reserved = 0
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._held = _hold(folder / "lock")
        self._next = 1 + max((int(path.stem, 16) for path in folder.glob("*.spool")), default=0)

    def close(self) -> None:
        """Let go of the folder. What is in it stays."""
        for segment in self._segments.values():
            if not segment.closed:
                os.ftruncate(segment.descriptor, segment.position)
            os.close(segment.descriptor)
        self._segments.clear()
        os.close(self._held)

    @property
    def used_bytes(self) -> int:
        """What the segments take on the disk."""
        return sum(segment.position for segment in list(self._segments.values()))

    def recover(self) -> list[Entry]:
        """What earlier processes left, oldest first. Call once, before anything else."""
        entries: list[Entry] = []
        for path in sorted(self.folder.glob("*.spool")):
            segment = self._reopen(path)
            found = list(_scan(segment)) if segment is not None else []
            if segment is None or not found:
                path.unlink()
                continue
            segment.live, segment.closed = len(found), True
            self._segments[segment.number] = segment
            entries += found
        return entries

    def begin(self) -> Arrival:
        """Take in one instance. Raises Full."""
        with self._lock:
            if self.used_bytes >= self.bytes_max:
                raise self._full()
            segment = self._idle.pop() if self._idle else None
        return Arrival(self, segment or self._fresh())

    def read(self, entry: Entry, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of an instance. Raises Damaged; Absent once its segment is deleted."""
        with self._lock:
            segment = self._segments.get(entry.segment)
            if segment is None:
                raise Absent("it has left the spool for the store")
            segment.readers += 1
        try:
            return b"".join(_read(segment, entry.offset, entry.counter, entry.size, start, min(stop, entry.size)))
        finally:
            with self._lock:
                segment.readers -= 1
                if segment.deleted and not segment.readers:
                    os.close(segment.descriptor)

    def done(self, entries: Iterable[Entry]) -> None:
        """These are safe elsewhere."""
        with self._lock:
            for entry in entries:
                segment = self._segments[entry.segment]
                segment.live -= 1
                if not segment.live and not segment.writing:
                    self._delete(segment)

    # -- what an arrival needs

    def room(self, size: int) -> None:
        """Raise Full where ``size`` more bytes are more than the spool may have."""
        if self.used_bytes + size > self.bytes_max:
            raise self._full()

    def give_back(self, segment: Segment, *, broken: bool) -> None:
        """An arrival has ended."""
        with self._lock:
            segment.writing = False
            if not segment.live:
                self._delete(segment)
            elif broken or segment.position >= segment_bytes:
                segment.closed = True
                with contextlib.suppress(OSError):
                    os.ftruncate(segment.descriptor, segment.position)
            else:
                self._idle.append(segment)

    def _full(self) -> Full:
        return Full(
            f"the spool {self.folder} holds {self.bytes_max:,} bytes that are not yet in the store",
            hint="the nodes take them more slowly than they come, or not at all: see `medshard doctor`",
        )

    def _fresh(self) -> Segment:
        with self._lock:
            number, self._next = self._next, self._next + 1
        path, salt = self.folder / f"{number:012x}.spool", os.urandom(salt_size)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.write(descriptor, magic + salt)
            fsync_folder(self.folder)  # or a power cut could take the file's name, and all that it holds
        except OSError as error:
            raise _no_room(error, path) from error
        segment = Segment(path, number, descriptor, segment_key(self._key, salt))
        segment.writing = True
        with self._lock:
            self._segments[number] = segment
        return segment

    def _reopen(self, path: Path) -> Segment | None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        head = os.pread(descriptor, len(magic) + salt_size, 0)
        if len(head) < len(magic) + salt_size:
            os.close(descriptor)
            return None  # its process died before it had said anything
        if not head.startswith(magic):
            os.close(descriptor)
            raise Malformed(f"{path} is not a spool file that this program knows", hint="move it away; nothing of it is read")
        return Segment(path, int(path.stem, 16), descriptor, segment_key(self._key, head[len(magic) :]))

    def _delete(self, segment: Segment) -> None:
        segment.closed = True
        if segment in self._idle:
            self._idle.remove(segment)
        self._segments.pop(segment.number, None)
        segment.path.unlink(missing_ok=True)
        segment.deleted = True
        if not segment.readers:
            os.close(segment.descriptor)


class Arrival:
    """One instance while it comes. End it with ``finish`` or ``drop``."""

    def __init__(self, spool: Spool, segment: Segment) -> None:
        self.size = 0
        self._spool = spool
        self._segment = segment
        segment.writing = True
        self._offset, self._counter = segment.position, segment.counter
        self._hash = sha256()
        self._buffer = bytearray()
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
                with memoryview(self._buffer) as view:
                    self._segment.append(DATA, view[:chunk_plain])
                del self._buffer[:chunk_plain]
                if self._segment.position - self._offset - self._synced >= sync_bytes:
                    os.fdatasync(self._segment.descriptor)
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
        parts = list(_read(self._segment, self._offset, self._counter, flushed, start, min(stop, flushed))) if start < flushed else []
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
            os.fdatasync(self._segment.descriptor)
        except OSError as error:
            self._broken = True  # whether its bytes are there nobody can say: this segment takes no more
            self.drop()
            raise _no_room(error, self._segment.path) from error
        except Full:
            self.drop()
            raise
        entry = Entry(self._segment.number, self._offset, self._counter, self.size, self.digest(), received, dict(attributes))
        self._segment.live += 1
        self._end()
        return entry

    def drop(self) -> None:
        """Forget it. Idempotent, and nothing after ``finish``."""
        if self._ended:
            return
        if not self._broken and self._segment.counter > self._counter:
            try:
                self._segment.append(DROP, b"")
            except OSError:
                self._broken = True
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._buffer.clear()
        self._spool.give_back(self._segment, broken=self._broken)


def _begin_writing(descriptor: int, offset: int, size: int) -> None:
    """Have the disk begin, so that the sync that follows takes half as long. Where it cannot be said, nothing is lost."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, offset, size, 2)  # SYNC_FILE_RANGE_WRITE


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        found = ctypes.CDLL(None).sync_file_range  # Linux alone has it
    except (OSError, AttributeError, TypeError):
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    found.restype = ctypes.c_int
    return cast("Callable[[int, int, int, int], int]", found)


_sync_file_range: Final = _find_sync_file_range()


def segment_key(key: bytes, salt: bytes) -> bytes:
    """The key of one segment."""
    return hkdf(key, salt, b"medshard/spool/v1/segment")


def _read(segment: Segment, offset: int, counter: int, size: int, start: int, stop: int) -> Iterator[bytes]:
    for number in range(start // chunk_plain, -(-stop // chunk_plain)):
        base = number * chunk_plain
        plain = segment.chunk(offset + number * chunk_whole, counter + number, min(chunk_plain, size - base))
        yield plain[max(0, start - base) : stop - base]


def _scan(segment: Segment) -> Iterator[Entry]:
    """The instances that were finished. Data is skipped: whoever reads it checks it."""
    size = os.fstat(segment.descriptor).st_size
    position, counter = segment.position, 0
    offset, first = position, 0
    while position + chunk_head <= size:
        head = os.pread(segment.descriptor, chunk_head, position)
        length, kind = int.from_bytes(head[:4]), head[4]
        if length < tag_size or length > max(chunk_plain, end_bytes_max) + tag_size or position + chunk_head + length > size:
            break
        after = position + chunk_head + length
        if kind in (END, DROP):
            try:
                plain = segment.chunk(position, counter, length - tag_size, kind)
            except Damaged:
                break  # torn: it was never answered
            if kind == END:
                yield _entry(segment.number, offset, first, plain)
            offset, first = after, counter + 1
        elif kind != DATA:
            break
        position, counter = after, counter + 1
    segment.position = position


def _entry(segment: int, offset: int, counter: int, plain: bytes) -> Entry:
    f = canonical.Fields(canonical.decode(plain, bytes_max=end_bytes_max, what="spool entry"), count=4, what="spool entry")
    size, digest, received = f.uint(), f.bytes(exactly=32), f.uint()
    attributes: dict[str, str] = {}
    for pair in f.list(most=256):
        of_pair = canonical.Fields(pair, count=2, what="spool attribute")
        key, value = of_pair.text(most=128), of_pair.text(most=end_bytes_max)
        attributes[key] = value
    return Entry(segment, offset, counter, size, digest, received, attributes)


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
