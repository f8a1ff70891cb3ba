"""A bounded cache on the gateway's disk: today's studies open at once. Encrypted, and never the only copy of anything.

Records lie in segments, one behind the other; a segment has a key of its own, derived from the cache's key and a salt, and each record's
nonce is its number in it. Nothing is appended to a segment of an earlier process. The oldest segment goes when there is too much; what
was asked for lately is written again at the end before that, so that what goes is what nobody wants.

Law: bytes come back as they were put, or not at all: a record that was torn by a crash or altered on the disk does not open, and is
forgotten. Nothing is synced. Names of records are HMACs, so that the disk does not tell which files were read. Blocking; any thread may
call. docs/formats/cache.md has the bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medshard.sealing import hkdf
from medshard_protocol.errors import Conflict

magic: Final = b"medshard/cache/v1\n"
salt_size: Final = 32
name_size: Final = 16
head_size: Final = 4 + name_size  # length of the sealed bytes, name
tag_size: Final = 16
record_bytes_max: Final = 64 * 1024 * 1024
segments_least: Final = 8  # the cache is cut into so many, so that a full one loses little at a time
segment_bytes_max: Final = 256 * 1024 * 1024


@dataclass(slots=True)
class _Segment:
    number: int
    descriptor: int
    cipher: AESGCM
    size: int
    records: int = 0
    names: set[bytes] = field(default_factory=set)
    readers: int = 0
    gone: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    segment: _Segment
    offset: int  # of the sealed bytes
    length: int
    number: int


class BlockCache:
    """Open, or make, the cache in ``folder``. ``key`` has 32 bytes. Raises Conflict where another process has it open."""

    def __init__(self, folder: Path, key: bytes, *, bytes_max: int) -> None:
        if len(key) != 32:
            raise ValueError("a cache key has 32 bytes")
        self._folder = folder
        self._key = key
        self._names = hmac.digest(key, b"medshard/cache/v1/name", hashlib.sha256)
        self._bytes_max = bytes_max
        self._segment_bytes = max(1, min(segment_bytes_max, bytes_max // segments_least))
        self._lock = threading.Lock()
        self._segments: OrderedDict[int, _Segment] = OrderedDict()
        self._places: dict[bytes, _Place] = {}
        self._open: _Segment | None = None
        self._closed = False
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._held = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._held)
            raise Conflict(f"another gateway works in {folder}", hint="stop it first, or give this one another --dir") from None
        self._recover()

    def clear(self) -> None:
        """Delete every record, from the disk too."""
        with self._lock:
            while self._segments:
                _, segment = self._segments.popitem()
                self._delete(segment)
            self._open = None

    def close(self) -> None:
        """Let go of the folder. What is in it is found again."""
        with self._lock:
            self._closed = True
            for segment in self._segments.values():
                segment.gone = True
                if not segment.readers:
                    os.close(segment.descriptor)
            self._segments.clear()
            self._places.clear()
            self._open = None
            os.close(self._held)

    @property
    def used_bytes(self) -> int:
        """What the segments take on the disk."""
        return sum(segment.size for segment in list(self._segments.values()))

    def name(self, *parts: bytes) -> bytes:
        """The name of a record: nobody without the key can tell what it is of."""
        joined = b"".join(len(part).to_bytes(4) + part for part in parts)
        return hmac.digest(self._names, joined, hashlib.sha256)[:name_size]

    def has(self, name: bytes) -> bool:
        """Whether there is a record, which may yet turn out not to open."""
        return name in self._places

    def get(self, name: bytes) -> bytes | None:
        """A record's bytes, or None."""
        with self._lock:
            place = self._places.get(name)
            if place is None:
                return None
            segment = place.segment
            segment.readers += 1
            is_old = len(self._segments) > 2 and segment.number in list(self._segments)[: len(self._segments) // 3]
        try:
            sealed = os.pread(segment.descriptor, place.length, place.offset)
            plain = segment.cipher.decrypt(place.number.to_bytes(12), sealed, name)
        except (InvalidTag, ValueError, OSError):
            self._forget(name, place)
            return None
        finally:
            self._release(segment)
        if is_old:
            self.put(name, plain, again=True)
        return plain

    def put(self, name: bytes, plain: bytes, *, again: bool = False) -> None:
        """Keep a record. A disk that is full or fails keeps nothing, and that is all."""
        if len(plain) > min(record_bytes_max, self._segment_bytes):
            return
        with self._lock:
            if self._closed or (name in self._places and not again):
                return
            try:
                segment = self._room(head_size + len(plain) + tag_size)
                number, segment.records = segment.records, segment.records + 1
                sealed = segment.cipher.encrypt(number.to_bytes(12), plain, name)
                offset = segment.size
                segment.size += head_size + len(sealed)  # before the write, so that what a failed one left is not written over by halves
                os.pwritev(segment.descriptor, [len(sealed).to_bytes(4) + name, sealed], offset)
            except OSError:
                self._open = None
                return
            if (before := self._places.get(name)) is not None:
                before.segment.names.discard(name)
            self._places[name] = _Place(segment, offset + head_size, len(sealed), number)
            segment.names.add(name)

    def _room(self, size: int) -> _Segment:
        """The segment that the next record goes to, after the oldest were deleted if need be."""
        if self._open is None or self._open.size + size > self._segment_bytes + head_size + tag_size:
            self._open = self._fresh()
        while self.used_bytes + size > self._bytes_max and len(self._segments) > 1:
            _, oldest = self._segments.popitem(last=False)
            self._delete(oldest)
        return self._open

    def _fresh(self) -> _Segment:
        number = 1 + max(self._segments, default=0)
        salt = os.urandom(salt_size)
        descriptor = os.open(self._path(number), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.pwrite(descriptor, magic + salt, 0)
        segment = self._segments[number] = _Segment(number, descriptor, self._cipher(salt), len(magic) + salt_size)
        return segment

    def _delete(self, segment: _Segment) -> None:
        for name in segment.names:
            self._places.pop(name, None)
        with contextlib.suppress(OSError):
            self._path(segment.number).unlink(missing_ok=True)
        segment.gone = True
        if not segment.readers:
            os.close(segment.descriptor)

    def _release(self, segment: _Segment) -> None:
        with self._lock:
            segment.readers -= 1
            if segment.gone and not segment.readers:
                os.close(segment.descriptor)

    def _forget(self, name: bytes, place: _Place) -> None:
        with self._lock:
            if self._places.get(name) is place:
                del self._places[name]
                place.segment.names.discard(name)

    def _recover(self) -> None:
        """Find the records of earlier processes by their heads."""
        for path in sorted(self._folder.glob("*.cache")):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            head = os.pread(descriptor, len(magic) + salt_size, 0)
            if len(head) < len(magic) + salt_size or not head.startswith(magic):
                os.close(descriptor)
                path.unlink()
                continue
            number = int(path.stem, 16)
            segment = self._segments[number] = _Segment(number, descriptor, self._cipher(head[len(magic) :]), len(head))
            self._scan(segment, os.fstat(descriptor).st_size)

    def _scan(self, segment: _Segment, end: int) -> None:
        while segment.size + head_size <= end:
            head = os.pread(segment.descriptor, head_size, segment.size)
            length, name = int.from_bytes(head[:4]), head[4:]
            if length < tag_size or segment.size + head_size + length > end:
                break
            if (before := self._places.get(name)) is not None:
                before.segment.names.discard(name)
            self._places[name] = _Place(segment, segment.size + head_size, length, segment.records)
            segment.names.add(name)
            segment.records += 1
            segment.size += head_size + length
        segment.size = max(segment.size, end)  # nothing is written there again, but it takes its room

    def _cipher(self, salt: bytes) -> AESGCM:
        return AESGCM(hkdf(self._key, salt, b"medshard/cache/v1/segment"))

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:012x}.cache"
