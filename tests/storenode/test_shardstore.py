"""The node's store alone: what it keeps, refuses, forgets, and what a crash may leave behind."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from medshard_protocol.errors import Absent, Conflict, Damaged, Full, Malformed
from medshard_protocol.ids import FileId, Key, NodeId, Sha256, Tag
from medshard_protocol.manifest import Manifest, ShardRef
from medshard_protocol.shards import Layout, digests, shard_root, split
from storenode.shardstore import Sealed, Shard, ShardStore
from storenode.shardstore.store import quick_reads, reserve_bytes

owner = Key(b"o" * 32)
cell = 1000


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ShardStore]:
    opened = ShardStore(tmp_path, capacity=10_000_000, small_bytes_max=4096)
    yield opened
    opened.close()


def root_of(data: bytes) -> bytes:
    blake3 = digests["blake3"]
    return shard_root([blake3(part) for part in split(data, cell)], blake3)


async def put(store: ShardStore, data: bytes, file_id: FileId, index: int = 0, by: Key = owner) -> bool:
    incoming = store.begin(len(data), cell)
    try:
        for at in range(0, len(data), 777):
            incoming.write([data[at : at + 777]])
        put = await store.commit(incoming, file_id, index, by)
    finally:
        store.abandon(incoming)
    assert put.root == root_of(data)
    return put.created


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 4096, 4097, 25_000])
async def test_a_shard_comes_back_as_it_was_put(store: ShardStore, size: int) -> None:
    data, file_id = os.urandom(size), FileId(os.urandom(32))
    assert await put(store, data, file_id, 3)
    shard = store.shard_at(file_id, 3)
    assert store.read(shard, 0, size) == data
    assert store.read(shard, size // 2, size) == data[size // 2 :]
    assert (shard.data is not None) == (size <= 4096)
    assert store.bad_cells(shard) == []


async def test_after_a_failed_fsync_nothing_is_acknowledged(store: ShardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def failing(after: int) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) > after:
                raise OSError(5, "the disk lost it")

        return fsync

    for after in (0, 1):  # the file's, and that of its name in the folder
        file_id = FileId(bytes([after]) * 32)
        calls.clear()
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", failing(after))
            with pytest.raises(OSError, match="lost it"):
                await put(store, os.urandom(9000), file_id)
        assert len(calls) == after + 1
        assert store.shard(file_id) is None


@pytest.mark.parametrize("size", [500, 9000])
async def test_the_same_shard_again_is_stored_once(store: ShardStore, size: int) -> None:
    data, file_id = os.urandom(size), FileId(os.urandom(32))
    assert await put(store, data, file_id)
    assert not await put(store, data, file_id)
    assert store.used == size


@pytest.mark.parametrize("size", [500, 9000])
async def test_other_bytes_under_the_same_id_are_refused_and_leave_the_first_whole(store: ShardStore, tmp_path: Path, size: int) -> None:
    data, file_id = os.urandom(size), FileId(os.urandom(32))
    await put(store, data, file_id)
    with pytest.raises(Conflict):
        await put(store, os.urandom(size), file_id)
    with pytest.raises(Conflict):
        await put(store, data, file_id, index=1)
    with pytest.raises(Conflict):
        await put(store, data, file_id, by=Key(b"x" * 32))
    assert store.bad_cells(store.shard_at(file_id, 0)) == []
    assert len(list((tmp_path / "shards").glob("??/*"))) == (1 if size > 4096 else 0)


async def test_a_flipped_bit_is_found_on_read_back(store: ShardStore, tmp_path: Path) -> None:
    file_id = FileId(os.urandom(32))
    await put(store, os.urandom(25_500), file_id)
    (path,) = (tmp_path / "shards").glob("??/*")
    with path.open("r+b") as file:
        file.seek(7_321)
        byte = file.read(1)[0]
        file.seek(7_321)
        file.write(bytes([byte ^ 1]))
    assert store.bad_cells(store.shard_at(file_id, 0)) == [7]


async def test_a_file_that_is_gone_or_short_is_damage_and_no_crash(store: ShardStore, tmp_path: Path) -> None:
    file_id = FileId(os.urandom(32))
    await put(store, os.urandom(5_500), file_id)
    (path,) = (tmp_path / "shards").glob("??/*")
    os.truncate(path, 4_000)
    shard = store.shard_at(file_id, 0)
    assert store.bad_cells(shard) == [0, 1, 2, 3, 4, 5]
    path.unlink()
    with pytest.raises(Damaged):
        store.read(shard, 0, 10)


async def test_more_or_fewer_bytes_than_announced_are_refused_and_nothing_stays(store: ShardStore, tmp_path: Path) -> None:
    incoming = store.begin(5000, cell)
    with pytest.raises(Malformed):
        incoming.write([bytes(5001)])
    store.abandon(incoming)
    incoming = store.begin(5000, cell)
    incoming.write([bytes(4999)])
    with pytest.raises(Malformed):
        await store.commit(incoming, FileId(bytes(32)), 0, owner)
    store.abandon(incoming)
    assert store.used == 0
    assert list((tmp_path / "tmp").iterdir()) == []
    with pytest.raises(Absent):
        store.shard_at(FileId(bytes(32)), 0)


async def test_over_quota_nothing_is_begun_and_what_has_come_counts(store: ShardStore) -> None:
    with pytest.raises(Full):
        store.begin(10_000_001, cell)
    first = store.begin(9_000_000, cell)
    first.write([bytes(9_000_000)])
    with pytest.raises(Full):
        store.begin(2_000_000, cell)
    store.abandon(first)
    store.abandon(store.begin(2_000_000, cell))
    assert store.used == 0


async def test_what_is_announced_and_does_not_come_keeps_nobody_out(store: ShardStore, tmp_path: Path) -> None:
    stalling = [store.begin(6_000_000, cell) for _ in range(4)]
    assert await put(store, os.urandom(3_000_000), FileId(b"a" * 32))
    with pytest.raises(Full):
        stalling[0].write([bytes(5_000_000)])  # it comes too late
    for each in stalling:
        store.abandon(each)
    assert list((tmp_path / "tmp").iterdir()) == []
    whole = store.begin(6_000_000, cell)
    for _ in range(6):  # the bytes that have come are not counted twice
        whole.write([bytes(1_000_000)])
    store.abandon(whole)


async def test_a_disk_that_fills_up_meanwhile_ends_an_upload_before_the_ledger_has_no_room(
    store: ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    coming = store.begin(9_000_000, cell)
    coming.write([bytes(1_000_000)])
    monkeypatch.setattr(store, "free_bytes", lambda: reserve_bytes + 100_000)
    with pytest.raises(Full, match="disk"):
        coming.write([bytes(1_000_000)])
    store.abandon(coming)


async def test_an_unregistered_shard_is_swept_and_a_registered_one_stays(tmp_path: Path) -> None:
    now = 1000.0
    store = ShardStore(tmp_path, capacity=10_000_000, small_bytes_max=4096, clock=lambda: now)
    kept, swept, young = (FileId(bytes([i]) * 32) for i in range(3))
    for file_id in (kept, swept):
        await put(store, os.urandom(9000), file_id)
    now = 5000.0
    await put(store, os.urandom(9000), young)
    assert await store.sweep(lambda file_id: file_id == kept, 3600, now) == 1
    assert store.shard(swept) is None
    assert store.shard(young) is not None
    assert len(list((tmp_path / "shards").glob("??/*"))) == 2
    assert store.used == 18_000
    now = 90_000.0
    assert await store.sweep(lambda file_id: False, 3600, now) == 1  # the kept one is marked and not asked about again
    assert store.shard(kept) is not None
    store.close()


async def test_a_node_whose_ledger_is_days_old_sweeps_nothing_that_came_since(tmp_path: Path) -> None:
    now = 1_000_000.0
    store = ShardStore(tmp_path, capacity=10_000_000, small_bytes_max=4096, clock=lambda: now)
    file_id = FileId(os.urandom(32))
    await put(store, os.urandom(9000), file_id)
    known_until, now = now + 60, now + 10 * 86_400  # its mirror heard nothing for ten days: the file may be registered by now
    assert await store.sweep(lambda file_id: False, 86_400, known_until) == 0
    assert store.shard(file_id) is not None
    assert await store.sweep(lambda file_id: False, 86_400, now) == 1
    store.close()


async def test_what_a_crash_left_is_cleared_at_start(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, capacity=10_000_000, small_bytes_max=10)
    file_id = FileId(os.urandom(32))
    data = os.urandom(5000)
    await put(store, data, file_id)
    (tmp_path / "tmp" / "half").write_bytes(b"half an upload")
    folder = tmp_path / "shards" / "ab"
    folder.mkdir(exist_ok=True)
    (folder / ("ab" * 32 + "-" + "00" * 8)).write_bytes(b"renamed, never committed")
    store.close()
    again = ShardStore(tmp_path, capacity=10_000_000, small_bytes_max=10)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert again.sweep_orphans(-1) == 1
    assert again.used == 5000
    assert again.read(again.shard_at(file_id, 0), 0, 5000) == data
    again.close()


def manifest_for(shard: bytes, file_id: FileId, tags: tuple[Tag, ...] = (), wrap: bytes = bytes(48)) -> Manifest:
    layout = Layout(1, 2, cell, len(shard))
    refs = (ShardRef(NodeId(b"n" * 16), root_of(shard)), ShardRef(NodeId(b"m" * 16), bytes(32)))
    return Manifest(file_id, layout, "blake3", bytes(32), refs, owner, b"", wrap, tags, bytes(32))


async def test_a_small_shard_and_its_manifest_are_one_transaction(store: ShardStore) -> None:
    shard, file_id, tag = os.urandom(900), FileId(os.urandom(32)), Tag(b"t" * 32)
    manifest = manifest_for(shard, file_id, (tag,))
    assert (await store.commit_small(shard, manifest, 0)).created
    assert store.files_of(tag) == [file_id]
    assert store.manifest(file_id) == manifest.to_bytes()
    assert not (await store.commit_small(shard, manifest, 0)).created
    with pytest.raises(Conflict):
        await store.commit_small(shard, manifest_for(shard, file_id, (tag,), b"w" * 48), 0)


async def test_a_shard_that_its_manifest_does_not_name_is_refused(store: ShardStore) -> None:
    file_id = FileId(os.urandom(32))
    with pytest.raises(Damaged):
        await store.commit_small(os.urandom(900), manifest_for(os.urandom(900), file_id), 0)
    assert store.shard(file_id) is None


async def test_a_shard_that_is_handed_on_leaves_no_key_behind(store: ShardStore, tmp_path: Path) -> None:
    data, sealed = os.urandom(100), Sealed(store.catalog)
    for number in (1, 2):
        file_id = FileId(bytes([number]) * 32)
        await store.commit_small(data, manifest_for(data, file_id, wrap=b"the owner's wrapped key, 48 bytes of it" + file_id[:9]), 0)
        await sealed.put_grant(file_id, Sha256(bytes([number]) * 32), b"a sealed key of " + file_id)
    await store.remove(store.shard_at(file_id, 0))
    assert store.counts() == (1, 1)
    assert store.used == len(data)
    assert store.catalog.all("SELECT hex(grant_id) FROM sealed_grants") == [("01" * 32,)]
    store.catalog.all("PRAGMA wal_checkpoint(TRUNCATE)")
    left = b"".join(path.read_bytes() for path in tmp_path.glob("store.sqlite*"))
    assert b"a sealed key of \1" in left
    assert b"a sealed key of \2" not in left
    assert b"bytes of it\2" not in left


async def test_one_failing_write_does_not_undo_its_neighbours(store: ShardStore) -> None:
    import asyncio

    def bad(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO tags VALUES (?, ?)", (b"x", b"y"))
        raise Conflict("no")

    good = [store.catalog.write(lambda c, i=i: c.execute("INSERT INTO tags VALUES (?, ?)", (bytes([i]), b"f"))) for i in range(5)]
    results = await asyncio.gather(*good[:2], store.catalog.write(bad), *good[2:], return_exceptions=True)
    assert sum(isinstance(result, Conflict) for result in results) == 1
    assert store.catalog.all("SELECT count(*) FROM tags") == [(5,)]


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each read of a shard from now on was in the test's own thread."""
    found, read = list[bool](), ShardStore.read

    def noted(self: ShardStore, shard: Shard, offset: int, length: int) -> bytes:
        found.append(threading.current_thread() is threading.main_thread())
        return read(self, shard, offset, length)

    monkeypatch.setattr(ShardStore, "read", noted)
    return found


async def test_what_the_system_has_in_memory_is_read_without_a_thread_and_a_disk_keeps_nobody_waiting(
    store: ShardStore, readers: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, file_id, answers = os.urandom(9000), FileId(os.urandom(32)), [1990, 500, errno.EAGAIN]
    assert await put(store, data, file_id)
    shard = store.shard_at(file_id, 0)

    def preadv(descriptor: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        if (answer := answers.pop(0)) == errno.EAGAIN:
            raise BlockingIOError(answer, "not in memory")
        buffers[0][:answer] = os.pread(descriptor, answer, offset)
        return answer

    monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    monkeypatch.setattr(os, "preadv", preadv)
    store._tells_cached = True
    assert await store.fetch(shard, 10, 1990) == data[10:2000]
    assert not readers
    assert await store.fetch(shard, 10, 1990) == data[10:2000]
    assert await store.fetch(shard, 8900, 1990) == data[8900:]
    assert readers == [False, False]
    assert not answers


async def test_where_nobody_tells_what_is_in_memory_a_disk_that_was_quick_of_late_is_read_without_a_thread(
    store: ShardStore, readers: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, file_id = os.urandom(9000), FileId(os.urandom(32))
    assert await put(store, data, file_id)
    shard = store.shard_at(file_id, 0)

    def preadv(descriptor: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        raise OSError(errno.EOPNOTSUPP, "this file system does not say")

    monkeypatch.setattr(os, "preadv", preadv)
    assert await store.fetch(shard, 10, 8000) == data[10:8010]
    store._read_s.append(0.0)
    assert await store.fetch(shard, 0, 9000) == data
    store._read_s.extend([0.1] * quick_reads)
    assert await store.fetch(shard, 0, 9000) == data
    assert readers == [False, True, False]
