"""One file of the spool: sealed instances, one after the other, each under a key of its own. The bytes are in docs/formats/spool.md.

Law: an instance's key is made of the file's salt and of its own. Whoever overwrites its own ends it alone, whoever overwrites the file's
ends all that lie in it; nothing else is needed, and nothing brings it back. A file that is used again gets another salt first: what an
earlier use left in it, behind what was written since, opens under no key that is still known, so ``scan`` ends where this use ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medshard.sealing import hkdf
from medshard_protocol import canonical
from medshard_protocol.errors import Absent, Damaged, Malformed

magic: Final = b"medshard/spool/v2\n"
salt_size: Final = 32
chunk_plain: Final = 256 * 1024  # sealed and on its way to the disk while the rest of a slice still comes
chunk_head: Final = 5  # length and kind
tag_size: Final = 16
chunk_whole: Final = chunk_head + chunk_plain + tag_size
salt_whole: Final = chunk_head + salt_size  # of the chunk that an instance begins with
end_bytes_max: Final = 256 * 1024
ahead_bytes: Final = 16 * 1024 * 1024  # allocated beforehand where the file has no blocks yet: a full disk is noticed early
SALT, DATA, END = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Entry:
    """One instance in the spool."""

    segment: int
    offset: int  # of its salt's chunk in the segment's file
    size: int
    sha256: bytes
    received: int  # Unix milliseconds
    attributes: Mapping[str, str] = field(compare=False, hash=False)


@dataclass(frozen=True, slots=True)
class Found:
    """What is in a segment of an earlier process."""

    entries: list[Entry]  # that were finished, and have not ended
    partial: list[int]  # where others begin: one that came in part, one that the disk has not all of
    cut_off: bool  # whether there is one of the latter kind


class Segment:
    """A file and its key. ``allocated`` is how much room it has."""

    def __init__(self, path: Path, number: int, descriptor: int, salt: bytes, key: bytes, allocated: int) -> None:
        self.path = path
        self.number = number
        self.descriptor = descriptor
        self._key = segment_key(key, salt)
        self._cipher = AESGCM(self._key)  # until the first ``begin``; nothing is sealed with it
        self._unwritten = b""  # the salt of an instance of which nothing is on the disk yet
        self._chunks = 0  # of the instance that is written now
        self.position = len(magic) + salt_size
        self.live = 0
        self.allocated = allocated
        self.writing = False
        self.closed = False  # nothing is appended any more
        self.readers = 0
        self.deleted = False

    def begin(self) -> int:
        """What is appended from now on is another instance; where it begins."""
        salt = os.urandom(salt_size)
        self._cipher, self._chunks = AESGCM(instance_key(self._key, salt)), 0
        self._unwritten = salt_size.to_bytes(4) + bytes([SALT]) + salt
        return self.position

    def append(self, kind: int, plain: bytes | bytearray | memoryview) -> None:
        """Write one chunk. Raises OSError."""
        sealed = self._cipher.encrypt(self._chunks.to_bytes(12), plain, bytes([kind]))
        self._chunks += 1  # before the write: a number whose chunk may be on the disk is never used again
        head, began = self._unwritten + len(sealed).to_bytes(4) + bytes([kind]), self.position
        self._unwritten = b""
        while self.allocated < began + len(head) + len(sealed) and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.descriptor, self.allocated, ahead_bytes)
            self.allocated += ahead_bytes
        self.position += os.pwritev(self.descriptor, [head, sealed], began)
        while (left := began + len(head) + len(sealed) - self.position) > 0:  # a disk that is nearly full takes less than it was given
            self.position += os.pwrite(self.descriptor, (head + sealed)[-left:], self.position)
        _begin_writing(self.descriptor, began, self.position - began)

    @property
    def begun(self) -> bool:
        """Whether something of the present instance may be on the disk."""
        return not self._unwritten

    def end(self, offsets: Iterable[int]) -> None:
        """Overwrite the salts of instances that begin there: they open no more, the others do. Durable on return. Raises OSError."""
        for offset in offsets:
            os.pwrite(self.descriptor, bytes(salt_size), offset + chunk_head)
        os.fdatasync(self.descriptor)

    def sync(self) -> None:
        """Return when the disk has what was appended. Raises OSError."""
        os.fdatasync(self.descriptor)

    def cipher(self, offset: int) -> AESGCM | None:
        """What opens the chunks of the instance that begins there; None once it has ended."""
        salt = os.pread(self.descriptor, salt_size, offset + chunk_head)
        return AESGCM(instance_key(self._key, salt)) if any(salt) else None

    def chunk(self, cipher: AESGCM, offset: int, number: int, size: int, kind: int = DATA) -> bytes:
        """The plaintext of a chunk of ``size`` plain bytes. Raises Damaged."""
        sealed = os.pread(self.descriptor, size + tag_size, offset + chunk_head)
        try:
            return cipher.decrypt(number.to_bytes(12), sealed, bytes([kind]))
        except (InvalidTag, ValueError):
            raise Damaged(
                f"{self.path}: bytes at {offset} were altered on this disk", hint="ask the sender to send the study again"
            ) from None

    def read(self, offset: int, size: int, start: int, stop: int) -> Iterator[bytes]:
        """Bytes ``start`` to ``stop`` of an instance of ``size`` bytes that begins there. Raises Damaged; Absent once it has ended."""
        if (cipher := self.cipher(offset)) is None:
            raise Absent("it has left the spool for the store")
        for number in range(start // chunk_plain, -(-stop // chunk_plain)):
            base = number * chunk_plain
            plain = self.chunk(cipher, offset + salt_whole + number * chunk_whole, number, min(chunk_plain, size - base))
            yield plain[max(0, start - base) : stop - base]


def segment_key(key: bytes, salt: bytes) -> bytes:
    """The key of one segment."""
    return hkdf(key, salt, b"medshard/spool/v2/segment")


def instance_key(key: bytes, salt: bytes) -> bytes:
    """The key of one instance in the segment of this key."""
    return hkdf(key, salt, b"medshard/spool/v2/instance")


def made(path: Path, number: int, key: bytes) -> Segment:
    """A new file. Its name is not durable yet. Raises OSError."""
    salt = os.urandom(salt_size)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.write(descriptor, magic + salt)
    return Segment(path, number, descriptor, salt, key, len(magic) + salt_size)


def renewed(old: Segment, path: Path, number: int, key: bytes, size: int) -> Segment:
    """An old file for new chunks, under another key and name; at most ``size`` bytes of it. Its name is not durable yet. Raises OSError."""
    salt, allocated = os.urandom(salt_size), min(size, os.fstat(old.descriptor).st_size)
    os.ftruncate(old.descriptor, allocated)
    os.pwrite(old.descriptor, magic + salt, 0)
    os.fdatasync(old.descriptor)  # or a power cut could give the old chunks their key back
    os.rename(old.path, path)
    return Segment(path, number, old.descriptor, salt, key, allocated)


def shredded(segment: Segment) -> None:
    """Overwrite what its key is made of: what lies in it opens no more, whoever finds its blocks. Best done before it is unlinked."""
    with contextlib.suppress(OSError):  # the disk fails, and nothing can be done to it
        os.pwrite(segment.descriptor, bytes(salt_size), len(magic))
        os.fdatasync(segment.descriptor)


def reopened(path: Path, key: bytes) -> Segment | None:
    """A file of an earlier process; None for one that had not yet a whole head. Raises Malformed for a stranger's."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    head = os.pread(descriptor, len(magic) + salt_size, 0)
    if len(head) < len(magic) + salt_size:
        os.close(descriptor)
        return None
    if not head.startswith(magic):
        os.close(descriptor)
        raise Malformed(f"{path} is not a spool file that this program knows", hint="move it away; nothing of it is read")
    return Segment(path, int(path.stem, 16), descriptor, head[len(magic) :], key, os.fstat(descriptor).st_size)


def scan(segment: Segment) -> Found:
    """Look through a segment.

    Nothing tells in which order a disk writes what it was not yet told to sync, so the last one is looked at; the others were synced before
    it began. Whoever reads them checks them.
    """
    found: list[Entry] = []
    unfinished = 0
    for offset, after, end in _records(segment):
        unfinished = 0 if after else offset
        if end is not None:
            found.append(_entry(segment.number, offset, end))
            segment.position = after
    partial = [unfinished] if unfinished else []
    cut_off = bool(found) and not _is_whole(segment, found[-1])
    if cut_off:
        segment.position = found[-1].offset
        partial.append(found.pop().offset)
    return Found(found, partial, cut_off)


def _records(segment: Segment) -> Iterator[tuple[int, int, bytes | None]]:
    """Where each instance begins and ends, and its last chunk. The end is 0 if it has none, the chunk None if it does not open.

    That is so of one that has ended, of one whose salt was half overwritten when the power went, and of all of an earlier use.
    """
    size = os.fstat(segment.descriptor).st_size
    position, offset, number = segment.position, 0, 0
    while position + chunk_head <= size:
        head = os.pread(segment.descriptor, chunk_head, position)
        length, kind = int.from_bytes(head[:4]), head[4]
        after = position + chunk_head + length
        if length < tag_size or length > max(chunk_plain, end_bytes_max) + tag_size or after > size:
            break
        if kind == SALT and length == salt_size:
            offset, number = position, 0
        elif kind == DATA and offset:
            number += 1
        elif kind == END and offset:
            yield offset, after, _opened(segment, offset, position, number, length - tag_size)
            offset = 0
        else:
            break
        position = after
    if offset:
        yield offset, 0, None


def _opened(segment: Segment, offset: int, position: int, number: int, size: int) -> bytes | None:
    if (cipher := segment.cipher(offset)) is not None:
        with contextlib.suppress(Damaged):
            return segment.chunk(cipher, position, number, size, END)
    return None


def _is_whole(segment: Segment, entry: Entry) -> bool:
    try:
        for _ in segment.read(entry.offset, entry.size, 0, entry.size):
            pass
    except Damaged:
        return False
    return True


def _entry(segment: int, offset: int, plain: bytes) -> Entry:
    f = canonical.Fields(canonical.decode(plain, bytes_max=end_bytes_max, what="spool entry"), count=4, what="spool entry")
    size, digest, received = f.uint(), f.bytes(exactly=32), f.uint()
    attributes: dict[str, str] = {}
    for pair in f.list(most=256):
        of_pair = canonical.Fields(pair, count=2, what="spool attribute")
        key, value = of_pair.text(most=128), of_pair.text(most=end_bytes_max)
        attributes[key] = value
    return Entry(segment, offset, size, digest, received, attributes)


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
