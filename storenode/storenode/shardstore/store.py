"""The node's store: one shard of a file at most, its manifest beside it. It owns its folder.

    store.sqlite        the catalog, and shards of `small_bytes_max` bytes and less
    shards/ab/ID-ROOT   larger shards, one file each; the name holds the root, so two uploads of one file id never share a name
    tmp/                shards on their way in; emptied at start

A shard is acknowledged after: its bytes fsynced, its name fsynced in its folder, its catalog row committed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Self

from medshard_protocol.errors import Absent, Conflict, Damaged, Full, Malformed, TooLarge
from medshard_protocol.ids import FileId, Key, Tag
from medshard_protocol.manifest import Manifest
from medshard_protocol.shards import digests, shard_root, split
from storenode.shardstore.catalog import Catalog
from storenode.shardstore.incoming import Incoming, ahead_bytes

quick_read_s = 0.0005  # what this quick is not worth a hop to a thread, which costs 100 microseconds of processor
quick_reads = 4  # the quickest of so many tells: the others may have waited for the interpreter or a processor, not for the disk
inline_bytes_max = 256 * 1024
reserve_bytes = 64 * 1024 * 1024  # the catalog and the ledger must be able to write when shards have filled the disk


@dataclass(frozen=True, slots=True)
class Shard:
    """A stored shard. ``data`` is set for a small one."""

    file_id: FileId
    index: int
    size: int
    cell_size: int
    root: bytes
    digests: tuple[bytes, ...]
    owner: Key
    data: bytes | None

    @property
    def cells(self) -> int:
        """How many cells it has."""
        return len(self.digests)


@dataclass(frozen=True, slots=True)
class Put:
    """The answer to a put: the root that was computed here, and whether anything new was stored."""

    root: bytes
    created: bool


class StoredFile:
    """A shard's file, open. Any thread may read. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
        except FileNotFoundError:
            raise Damaged("the shard's file is gone from this node's disk") from None

    def read_into(self, offset: int, room: memoryview) -> None:
        """Fill ``room`` with what lies at ``offset``, as it lies on disk. Blocking. Raises Damaged when there is less."""
        while room:
            got = os.preadv(self._file.fileno(), [room], offset)
            if not got:
                raise Damaged("the shard's file on this node's disk is too short")
            room, offset = room[got:], offset + got

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class ShardStore:
    """Open on ``folder``. Async methods return when the change is durable; the plain ones are quick reads."""

    def __init__(
        self,
        folder: Path,
        *,
        capacity: int,
        small_bytes_max: int = 65536,
        clock: Callable[[], float] = time.time,
        on_fsync: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._folder = folder
        self._shards = folder / "shards"
        self._tmp = folder / "tmp"
        self._capacity = capacity
        self._small_max = small_bytes_max
        self._clock = clock
        self._on_fsync = on_fsync
        self._shards.mkdir(parents=True, exist_ok=True)
        for prefix in range(256):  # all of them now: of two uploads that need a new one, the second could not know that it is durable yet
            (self._shards / f"{prefix:02x}").mkdir(exist_ok=True)
        _fsync_folder(self._shards)
        shutil.rmtree(self._tmp, ignore_errors=True)  # uploads that a crash cut off: nobody was told they were stored
        self._tmp.mkdir()
        self.catalog = Catalog(folder / "store.sqlite")
        self.used = int((self.catalog.one("SELECT coalesce(sum(size), 0) FROM shards") or (0,))[0])
        self._coming: set[Incoming] = set()
        self._room = threading.Lock()  # uploads are written in threads
        self._tells_cached = hasattr(os, "RWF_NOWAIT")  # until a file system says that it cannot
        self._read_s = deque([1.0], quick_reads)  # how long the last ones took; until measured, a disk is slow

    # -- in

    def begin(self, size: int, cell_size: int) -> Incoming:
        """Begin a shard of ``size`` bytes. Raises Full if there is no room for all of it now; what is announced and has not come counts for
        nobody else, so writing may raise it too. Pair with ``commit`` or ``abandon``."""
        with self._room:
            self._check_room(size)
            incoming = Incoming(size, cell_size, None if size <= self._small_max else self._tmp / uuid.uuid4().hex, self._hold)
            incoming.held = min(size, ahead_bytes)
            self._coming.add(incoming)
        return incoming

    def check_room(self, size: int) -> None:
        """Raise Full if a shard of ``size`` bytes could not be taken now."""
        with self._room:
            self._check_room(size)

    def abandon(self, incoming: Incoming) -> None:
        """Forget an upload, whether it was finished or not. Safe to call more than once."""
        with self._room:
            self._coming.discard(incoming)
        incoming.abandon()

    def _hold(self, incoming: Incoming, more: int) -> None:
        with self._room:
            if incoming not in self._coming:
                raise Malformed("this upload was given up")  # a thread may write on for a moment after it
            self._check_room(more)
            incoming.held += more

    def _check_room(self, size: int) -> None:
        if self.used + sum(each.held for each in self._coming) + size > self._capacity:
            raise Full("this node's quota is used up", hint="the operator can raise capacity_bytes, or add a node")
        if self.free_bytes() < size + sum(each.held - each.received for each in self._coming) + reserve_bytes:
            raise Full("this node's disk is full", hint="the operator must free space or add a disk")

    async def commit(self, incoming: Incoming, file_id: FileId, index: int, owner: Key) -> Put:
        """Give a finished upload its name. Same bytes again: nothing new. Raises Conflict for other bytes or another index."""
        data = await asyncio.to_thread(self._settle, incoming, file_id)
        return await self._enter(incoming, data, file_id, index, owner, None)

    async def commit_described(self, incoming: Incoming, manifest: Manifest, index: int) -> Put:
        """Give a shard that was made anew its name, with its manifest. Raises Damaged when it is not the one the manifest names."""
        data = await asyncio.to_thread(self._settle, incoming, manifest.file_id, manifest.shards[index].root)
        return await self._enter(incoming, data, manifest.file_id, index, manifest.owner, manifest)

    async def commit_small(self, shard: bytes, manifest: Manifest, index: int) -> Put:
        """Store a small shard and its manifest in one transaction. Raises Damaged when it is not the one the manifest names."""
        incoming = self.begin(len(shard), manifest.layout.cell_size)
        try:
            if incoming.temporary is None:
                incoming.write([shard])
                data = incoming.finish()
            else:
                await asyncio.to_thread(incoming.write, [shard])
                data = await asyncio.to_thread(self._settle, incoming, manifest.file_id)
            return await self._enter(incoming, data, manifest.file_id, index, manifest.owner, manifest)
        finally:
            self.abandon(incoming)

    async def _enter(
        self, incoming: Incoming, data: bytes | None, file_id: FileId, index: int, owner: Key, manifest: Manifest | None
    ) -> Put:
        root = shard_root(incoming.digests, digests["blake3"])
        if manifest is not None and manifest.shards[index].root != root:
            raise Damaged("the shard is not the one that its manifest names")

        def change(connection: Connection) -> Put:
            put = self._insert(connection, incoming, root, data, file_id, index, owner)
            if manifest is not None:
                self._insert_manifest(connection, manifest)
            return put

        try:
            put = await self.catalog.write(change)
        except Conflict:
            stored = self.shard(file_id)
            if stored is not None and stored.root != root:
                self._path(file_id, root).unlink(missing_ok=True)
            raise
        if put.created:
            self.used += incoming.size
        return put

    def _settle(self, incoming: Incoming, file_id: FileId, expected: bytes | None = None) -> bytes | None:
        started = time.monotonic()
        data = incoming.finish()
        self._on_fsync(time.monotonic() - started)
        if expected is not None and shard_root(incoming.digests, digests["blake3"]) != expected:
            raise Damaged("the shard is not the one that its manifest names")
        if incoming.temporary is not None:
            final = self._path(file_id, shard_root(incoming.digests, digests["blake3"]))
            os.replace(incoming.temporary, final)
            _fsync_folder(final.parent)  # the name must survive a power cut before anyone is told
        return data

    def _insert(
        self, connection: Connection, incoming: Incoming, root: bytes, data: bytes | None, file_id: FileId, index: int, owner: Key
    ) -> Put:
        row = connection.execute("SELECT idx, root, owner, digests, data FROM shards WHERE file_id = ?", (file_id,)).fetchone()
        if row is not None:
            if row[:3] != (index, root, owner):
                raise Conflict("another shard of this file is stored here already")
            if row[3:] != (b"".join(incoming.digests), data):  # damaged since: what is acknowledged now must be whole
                values = (incoming.size, incoming.cell_size, b"".join(incoming.digests), data, file_id)
                connection.execute("UPDATE shards SET size = ?, cell_size = ?, digests = ?, data = ? WHERE file_id = ?", values)
            return Put(root, created=False)
        connection.execute(
            "INSERT INTO shards(file_id, idx, size, cell_size, root, digest, digests, owner, stored_at, data) VALUES (?,?,?,?,?,?,?,?,?,?)",
            (
                file_id,
                index,
                incoming.size,
                incoming.cell_size,
                root,
                "blake3",
                b"".join(incoming.digests),
                owner,
                int(self._clock()),
                data,
            ),
        )
        return Put(root, created=True)

    # -- manifests

    async def put_manifest(self, manifest: Manifest) -> bool:
        """Keep a manifest and its lookup tags; whether it is new. Raises Conflict for another one of the same file."""
        created = await self.catalog.write(lambda connection: self._insert_manifest(connection, manifest))
        return bool(created)

    def _insert_manifest(self, connection: Connection, manifest: Manifest) -> bool:
        row = connection.execute("SELECT bytes FROM manifests WHERE file_id = ?", (manifest.file_id,)).fetchone()
        if row is not None:
            if row[0] == manifest.to_bytes():
                return False
            self._make_room(connection, manifest.file_id)
        connection.execute(
            "INSERT INTO manifests VALUES (?, ?, ?, ?, ?)",
            (manifest.file_id, manifest.sha256, manifest.owner, int(self._clock()), manifest.to_bytes()),
        )
        connection.executemany("INSERT OR IGNORE INTO tags VALUES (?, ?)", ((tag, manifest.file_id) for tag in manifest.tags))
        return True

    def _make_room(self, connection: Connection, file_id: FileId) -> None:
        """Take away a damaged manifest. Raises Conflict for one that is whole."""
        data, expected = connection.execute("SELECT bytes, sha256 FROM manifests WHERE file_id = ?", (file_id,)).fetchone()
        if _is_manifest(data, expected):
            raise Conflict("another manifest of this file is stored here already")
        connection.execute("DELETE FROM manifests WHERE file_id = ?", (file_id,))

    def manifest(self, file_id: FileId) -> bytes:
        """The manifest's bytes. Raises Absent, or Damaged when they are not those that were stored."""
        row = self.catalog.one("SELECT bytes, sha256 FROM manifests WHERE file_id = ?", file_id)
        if row is None:
            raise Absent("no manifest of this file here")
        if not _is_manifest(*row):
            raise Damaged("the manifest is damaged on this node's disk")
        return bytes(row[0])

    def files_of(self, tag: Tag) -> list[FileId]:
        """The files with this lookup tag, newest first."""
        rows = self.catalog.all(
            "SELECT t.file_id FROM tags t JOIN manifests m USING(file_id) WHERE tag = ? ORDER BY stored_at DESC LIMIT 16", tag
        )
        return [FileId(row[0]) for row in rows if isinstance(row[0], bytes)]

    # -- out

    def shard(self, file_id: FileId) -> Shard | None:
        """The shard of this file that is stored here, if any. Raises Damaged when its row makes no sense."""
        row = self.catalog.one("SELECT idx, size, cell_size, root, digests, owner, data FROM shards WHERE file_id = ?", file_id)
        if row is None:
            return None
        shard = _shard_of(file_id, row)
        if shard is None:
            raise Damaged("what the catalog says about this shard is damaged on this node's disk")
        return shard

    def shard_at(self, file_id: FileId, index: int) -> Shard:
        """Shard ``index`` of this file. Raises Absent."""
        shard = self.shard(file_id)
        if shard is None or shard.index != index:
            raise Absent("this shard is not here")
        return shard

    def read(self, shard: Shard, offset: int, length: int) -> bytes:
        """Bytes of a shard, as they lie on disk (the reader checks them). Blocking. Raises Damaged when the file is gone or short."""
        if shard.data is not None:
            return shard.data[offset : offset + length]
        try:
            with open(self._path(shard.file_id, shard.root), "rb", buffering=0) as file:
                data = os.pread(file.fileno(), length, offset)
        except FileNotFoundError:
            raise Damaged("the shard's file is gone from this node's disk") from None
        if len(data) != min(length, shard.size - offset):
            raise Damaged("the shard's file on this node's disk is too short")
        return data

    async def fetch(self, shard: Shard, offset: int, length: int) -> bytes:
        """As ``read``, in a thread unless that would cost more than it spares: little is read, and it is in memory, or the disk was quick
        of late where the system does not say what is."""
        if shard.data is not None:
            return self.read(shard, offset, length)
        length = max(0, min(length, shard.size - offset))

        def timed() -> bytes:
            began = time.perf_counter()
            try:
                return self.read(shard, offset, length)
            finally:
                self._read_s.append(time.perf_counter() - began)

        if length <= inline_bytes_max:
            if (data := self._cached(shard, offset, length)) is not None:
                return data
            if not self._tells_cached and min(self._read_s) < quick_read_s:
                return timed()
        return await asyncio.to_thread(timed)

    def _cached(self, shard: Shard, offset: int, length: int) -> bytes | None:
        """What the system has in memory of a shard's file; None if that is not all, or the file system does not say."""
        if not self._tells_cached:
            return None
        data = bytearray(length)
        try:
            with open(self._path(shard.file_id, shard.root), "rb", buffering=0) as file:
                got = os.preadv(file.fileno(), [data], offset, os.RWF_NOWAIT)
        except OSError as error:
            self._tells_cached = error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS)
            return None
        return bytes(data) if got == length else None

    def open(self, shard: Shard) -> StoredFile:
        """The file of a shard that is not small. Raises Damaged when it is gone."""
        return StoredFile(self._path(shard.file_id, shard.root))

    def is_there(self, shard: Shard) -> bool:
        """Whether a shard's file has its name and size; what is in it is another question. Blocking."""
        try:
            return shard.data is not None or self._path(shard.file_id, shard.root).stat().st_size == shard.size
        except OSError:
            return False

    def bad_cells(self, shard: Shard) -> list[int]:
        """Re-read the whole shard and re-hash it: the numbers of the cells that do not match. Blocking."""
        block = max(1, 1024 * 1024 // shard.cell_size) * shard.cell_size
        digest = digests["blake3"]
        bad: list[int] = []
        for offset in range(0, shard.size, block):
            first = offset // shard.cell_size
            try:
                cells: Iterable[memoryview] = split(self.read(shard, offset, block), shard.cell_size)
            except Damaged:
                return bad + list(range(first, shard.cells))
            bad += [first + i for i, cell in enumerate(cells) if digest(cell) != shard.digests[first + i]]
        return bad

    # -- upkeep

    async def sweep(self, registered: Callable[[FileId], bool], older_than_s: float, known_until: float) -> int:
        """Delete shards that were never registered in time; how many. A registered one is marked and never looked at again.

        ``registered`` speaks for the ledger up to ``known_until`` (Unix seconds): a shard's time runs out only as far as that.
        """
        cutoff = int(min(self._clock(), known_until) - older_than_s)
        rows = self.catalog.all("SELECT file_id, size, root FROM shards WHERE registered = 0 AND stored_at <= ? LIMIT 10000", cutoff)
        known = [FileId(row[0]) for row in rows if registered(FileId(row[0]))]
        stale = [(FileId(row[0]), int(row[1]), bytes(row[2])) for row in rows if not registered(FileId(row[0]))]
        if known:
            await self.catalog.write(
                lambda c: c.executemany("UPDATE shards SET registered = 1 WHERE file_id = ?", [(file_id,) for file_id in known])
            )
        for file_id, size, root in stale:
            await self._delete(file_id, root)
            self.used -= size
        return len(stale)

    async def remove(self, shard: Shard) -> None:
        """Delete a shard that another node has now, with all that lies beside it: its manifest and the sealed keys of grants."""
        await self._delete(shard.file_id, shard.root)
        self.used -= shard.size

    async def _delete(self, file_id: FileId, root: bytes) -> None:
        def change(connection: Connection) -> None:
            connection.execute("DELETE FROM shards WHERE file_id = ?", (file_id,))
            connection.execute("DELETE FROM tags WHERE file_id = ?", (file_id,))
            connection.execute("DELETE FROM manifests WHERE file_id = ?", (file_id,))
            connection.execute("DELETE FROM sealed_grants WHERE file_id = ?", (file_id,))  # who leaves may not hear when they are revoked

        # Row first: a file without a row is only lost space, a row without a file would be a shard that cannot be read.
        await self.catalog.write(change)
        self._path(file_id, root).unlink(missing_ok=True)

    def unlink(self, file_id: FileId, root: bytes) -> None:
        """Delete the file of a shard that the catalog does not list any more, durably. Blocking."""
        path = self._path(file_id, root)
        path.unlink(missing_ok=True)
        _fsync_folder(path.parent)

    def sweep_orphans(self, older_than_s: float) -> int:
        """Delete shard files that no row names (a crash between rename and commit). Blocking."""
        cutoff, count = self._clock() - older_than_s, 0
        for path in self._shards.glob("??/*"):
            name, _, root = path.name.partition("-")
            row = self.catalog.one("SELECT hex(substr(root, 1, 8)) FROM shards WHERE file_id = ?", bytes.fromhex(name))
            if (row is None or str(row[0]).lower() != root) and path.stat().st_mtime <= cutoff:
                path.unlink(missing_ok=True)
                count += 1
        return count

    def counts(self) -> tuple[int, int]:
        """(shards, manifests) held."""
        shards = self.catalog.one("SELECT count(*) FROM shards") or (0,)
        manifests = self.catalog.one("SELECT count(*) FROM manifests") or (0,)
        return int(shards[0]), int(manifests[0])

    def free_bytes(self) -> int:
        """Free bytes on the disk below the folder."""
        stat = os.statvfs(self._folder)
        return stat.f_bavail * stat.f_frsize

    def close(self) -> None:
        """Finish queued writes and close."""
        self.catalog.close()

    def _path(self, file_id: FileId, root: bytes) -> Path:
        name = file_id.hex()
        return self._shards / name[:2] / f"{name}-{root[:8].hex()}"


def _shard_of(file_id: FileId, row: tuple[Any, ...]) -> Shard | None:
    """A row as a shard; None where a disk has changed it so that it cannot be one. What it says is not checked here."""
    index, size, cell_size, root, joined, owner, data = row
    if not (isinstance(index, int) and isinstance(size, int) and isinstance(cell_size, int) and size > 0 < cell_size):
        return None
    if not all(isinstance(each, bytes) and len(each) == 32 for each in (root, owner)) or not isinstance(joined, bytes):
        return None
    if len(joined) != -(-size // cell_size) * 32 or not (data is None or (isinstance(data, bytes) and len(data) == size)):
        return None
    cells = tuple(joined[at : at + 32] for at in range(0, len(joined), 32))
    return Shard(file_id, index, size, cell_size, root, cells, Key(owner), data)


def _is_manifest(data: object, expected: object) -> bool:
    """Whether a disk gave back the manifest that it was given."""
    try:
        return isinstance(data, bytes) and Manifest.from_bytes(data).sha256 == expected
    except Malformed:
        return False


def check_size(size: int, allowed: int, what: str) -> None:
    """Raise TooLarge when ``size`` is over ``allowed``."""
    if size > allowed:
        raise TooLarge(f"{what} of {size} bytes, more than the {allowed} that this node takes")


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
