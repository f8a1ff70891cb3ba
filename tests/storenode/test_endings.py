"""One real node behind real TLS: what goes when a file is retired or erased, what is kept against its owner's will, and the receipt."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.storenode.test_sharing import Running, granted, node  # noqa: F401 - the fixture

from medshard_protocol.ending import Receipt, endings_path, sign_receipt
from medshard_protocol.entries import Erase, Grant, Hold, Release, Retain, Retire, Type
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.facts import Ended
from medshard_protocol.ids import FileId, Tag
from medshard_protocol.messages import pack_lookup, shard_path, unpack_found
from medshard_protocol.rights import Reason
from storenode.app import _sweep
from storenode.repairing import ground
from storenode.routes import node_key
from storenode.shardstore import Sealed
from storenode.shardstore.endings import Endings
from storenode.shardstore.store import ShardStore
from storenode.sharing import endings_key, obey_once, sealed_key

large = 9000  # a shard with a file of its own


async def receipt(running: Running, file_id: FileId) -> Receipt:
    """What the node says, once it says something."""
    async with asyncio.timeout(60):
        while True:
            status, body = await running.ask("other", "GET", endings_path(file_id))
            if status == 200:
                told = Receipt.from_bytes(body)
                told.verify(running.roster)
                return told
            assert status == 404
            await asyncio.sleep(0.02)


def shard_files(running: Running, file_id: FileId) -> list[Path]:
    return list(running.folder.glob(f"home/**/shards/*/{file_id.hex()}-*"))


async def entry_of(running: Running, file_id: FileId) -> int:
    known = running.ledger.state.registration(file_id)
    assert known is not None
    return known.retired if known.erased is None and known.retired is not None else known.erased or -1


async def test_an_erasure_destroys_keys_and_shard_and_is_receipted(node: Running) -> None:  # noqa: F811
    file_id, other = await node.put(size=large), await node.put(size=large)
    grant = await granted(node, file_id)
    assert len(shard_files(node, file_id)) == 1
    used = node.store.used
    for each in (file_id, other):
        await node.store.catalog.write(lambda db, each=each: db.execute("INSERT INTO audit_tags VALUES (?, 'x', 0, 1)", (each,)))
    await node.say("owner", Erase(file_id, int(time.time()), b""))
    told = await receipt(node, file_id)
    assert (told.file_id, told.type, told.node, told.shard, told.keys) == (file_id, Type.ERASE, node.node.id, 0, 2)
    assert told.entry == await entry_of(node, file_id)
    assert abs(told.at - time.time()) < 60
    assert [bytes(row[0]) for row in node.store.catalog.all("SELECT file_id FROM audit_tags")] == [other]
    assert node.app[sealed_key].grant(file_id, grant) is None
    assert shard_files(node, file_id) == []
    assert node.store.used == used - large
    for path in (shard_path(file_id, 0), f"/v1/manifests/{file_id.hex()}"):
        assert (await node.ask("owner", "HEAD" if "shards" in path else "GET", path))[0] == 404
    _, body = await node.ask("owner", "POST", "/v1/lookup", pack_lookup([Tag(file_id)]))
    assert unpack_found(body, 1) == [[]]
    assert (await node.ask("owner", "HEAD", shard_path(other, 0)))[0] == 204
    # Once there is a receipt: the catalog's log has nothing of it any more, either.
    wrapped = [path for path in (node.folder / "home").rglob("store.sqlite*") if b"key of " + file_id in path.read_bytes()]
    assert wrapped == []


async def test_no_receipt_is_given_while_a_long_read_keeps_the_keys_in_the_log(node: Running) -> None:  # noqa: F811
    file_id = await node.put(size=large)
    reader = node.store.catalog.another_reader()
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM manifests").fetchone()
    await node.say("owner", Erase(file_id, int(time.time()), b""))
    async with asyncio.timeout(60):
        while node.store.shard(file_id) is not None:
            await asyncio.sleep(0.02)
    assert await node.app[endings_key].destroy_due(int(time.time())) == 0
    assert (await node.ask("owner", "GET", endings_path(file_id)))[0] == 404
    reader.close()
    assert (await receipt(node, file_id)).keys == 1


async def test_a_retired_file_gives_its_room_back_and_keeps_its_manifest(node: Running) -> None:  # noqa: F811
    file_id = await node.put()
    await node.say("owner", Retire(file_id, int(time.time()), b""))
    told = await receipt(node, file_id)
    assert (told.type, told.shard, told.keys) == (Type.RETIRE, 0, 0)
    assert (await node.ask("owner", "HEAD", shard_path(file_id, 0)))[0] == 404
    assert (await node.ask("owner", "GET", f"/v1/manifests/{file_id.hex()}"))[0] == 200
    await node.say("owner", Erase(file_id, int(time.time()), b""))
    async with asyncio.timeout(60):
        while (told := await receipt(node, file_id)).type is not Type.ERASE:
            await asyncio.sleep(0.02)
    assert (told.shard, told.keys) == (0, 1)
    assert (await node.ask("owner", "GET", f"/v1/manifests/{file_id.hex()}"))[0] == 404


async def test_what_is_retained_or_on_hold_stays_even_against_its_owner(node: Running) -> None:  # noqa: F811
    kept, held = await node.put(), await node.put()
    now = int(time.time())
    await node.say("owner", Retain(kept, now + 3600, b""))
    await node.say("owner", Hold(held, b""))
    for file_id in (kept, held):
        for body in (Erase(file_id, now, b""), Retire(file_id, now, b"")):
            with pytest.raises(Refused):
                await node.say("owner", body)
    with pytest.raises(Refused):
        await node.say("other", Erase(held, now, b""))
    (hold,) = node.ledger.state.holds(held)
    await node.say("owner", Release(hold, b""))
    await node.say("owner", Erase(held, now, b""))
    await receipt(node, held)
    assert (await node.ask("owner", "GET", endings_path(kept)))[0] == 404
    assert (await node.ask("owner", "HEAD", shard_path(kept, 0)))[0] == 204


async def test_an_erasure_that_is_dated_ahead_waits_for_its_date(node: Running) -> None:  # noqa: F811
    """A retention must not be got around by a date: neither bytes nor readers are lost before the cosigners' clocks have reached it."""
    file_id = await node.put(size=large)
    ahead = int(time.time()) + 3600
    await node.say("owner", Retain(file_id, ahead, b""))
    await node.say("owner", Grant((file_id,), node.key("reader"), 0, 1, b""))
    await node.say("owner", Erase(file_id, ahead, b""))
    place = await node.access("reader", file_id)
    assert (await node.read("reader", file_id, place))[0] == 200
    assert len(shard_files(node, file_id)) == 1
    assert (await node.ask("owner", "GET", endings_path(file_id)))[0] == 404
    async with asyncio.timeout(60):
        while node.app[endings_key].counts() != (0, 1):
            await asyncio.sleep(0.02)
    assert await node.app[endings_key].destroy_due(ahead) == 1
    assert (await receipt(node, file_id)).at == ahead
    assert shard_files(node, file_id) == []


async def test_until_an_end_has_its_date_a_file_is_not_swept_and_is_repaired_and_audited(
    node: Running,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor must a retention be got around by nobody's care for the file until then."""
    ahead, now = int(time.time()) + 3600, int(time.time())
    retained, ended, plain = [await node.put(size=large) for _ in range(3)]
    await node.say("owner", Retain(retained, ahead, b""))
    await node.say("owner", Erase(retained, ahead, b""))
    await node.say("owner", Erase(ended, now, b""))
    await receipt(node, ended)
    incoming = node.store.begin(5, 1000)  # of a client that was slow
    incoming.write([bytes(5)])
    await node.store.commit(incoming, ended, 0, node.key("owner"))
    await node.store.catalog.write(lambda db: db.execute("UPDATE shards SET stored_at = 0"))
    assert ground.standing(node.ledger, retained).registration.erased is not None
    with pytest.raises(ground.Denied):
        ground.standing(node.ledger, ended)
    parts: Any = SimpleNamespace(node=node.app[node_key], metrics=node.metrics)
    monkeypatch.setattr("storenode.app.sweep_every_s", 0.02)
    sweeping = asyncio.create_task(_sweep(parts))
    async with asyncio.timeout(60):
        while node.store.shard(ended) is not None:
            await asyncio.sleep(0.02)
    sweeping.cancel()
    assert [node.store.shard(file_id) is not None for file_id in (retained, plain)] == [True, True]


async def test_an_erasure_goes_on_after_a_crash_between_its_steps(node: Running, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    file_id = await node.put(size=large)

    def dies(*_: object) -> None:
        raise OSError(5, "the disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr(ShardStore, "unlink", dies)
        await node.say("owner", Erase(file_id, int(time.time()), b""))
        async with asyncio.timeout(60):
            while node.store.shard(file_id) is not None:
                await asyncio.sleep(0.02)
        gone = Endings(node.store).of(file_id)
        assert gone is not None
        assert gone.at is None
        assert (await node.ask("owner", "GET", endings_path(file_id)))[0] == 404
    await obey_once(node.ledger, node.app[sealed_key], node.app[endings_key])
    assert (await receipt(node, file_id)).shard == 0
    assert shard_files(node, file_id) == []


async def test_nothing_is_destroyed_for_an_entry_that_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror has entries before a quorum has cosigned them, and drops them again if it never does."""
    store, first, second = ShardStore(tmp_path, capacity=10_000_000), FileId(b"1" * 32), FileId(b"2" * 32)
    said = [Ended(3, Type.ERASE, first), Ended(7, Type.ERASE, second)]
    facts = SimpleNamespace(
        size=10,
        ended=lambda start, end: [each for each in said if start <= each.index < end],
        registration=lambda file_id: SimpleNamespace(ended_at=0),
    )
    journal = SimpleNamespace(checked=SimpleNamespace(checkpoint=SimpleNamespace(size=5), note=None), folding=SimpleNamespace(state=facts))
    ledger: Any = SimpleNamespace(journal=journal, roster=None)
    monkeypatch.setattr("storenode.sharing.cosigned_at", lambda *_: 1_700_000_000)
    sealed, endings = Sealed(store.catalog), Endings(store)
    try:
        assert await obey_once(ledger, sealed, endings)
        assert [endings.of(file_id) is not None for file_id in (first, second)] == [True, False]
        assert sealed.obeyed() == 5
        journal.checked.checkpoint.size = 10
        assert await obey_once(ledger, sealed, endings)
        assert endings.of(second) is not None
    finally:
        store.close()


async def test_a_node_that_held_nothing_says_so(node: Running) -> None:  # noqa: F811
    file_id = await node.put()
    await node.store._delete(file_id, node.store.shard_at(file_id, 0).root)
    await node.say("owner", Erase(file_id, int(time.time()), b""))
    told = await receipt(node, file_id)
    assert (told.shard, told.keys) == (None, 0)
    assert (await node.ask("owner", "GET", endings_path(FileId(bytes(32)))))[0] == 404


async def test_a_file_that_has_ended_is_granted_to_nobody_and_swept_if_it_comes_late(node: Running) -> None:  # noqa: F811
    file_id = await node.put()
    await node.say("owner", Erase(file_id, int(time.time()), b""))
    await receipt(node, file_id)
    with pytest.raises(Refused):
        await node.say("owner", Grant((file_id,), node.key("reader"), 0, 1, b""))
    await node.refused(Reason.ERASED, "owner", file_id, await node.access("owner", file_id))


async def test_a_receipt_is_its_nodes_and_of_one_consortium(node: Running) -> None:  # noqa: F811
    file_id = await node.put()
    await node.say("owner", Erase(file_id, int(time.time()), b""))
    data = (await receipt(node, file_id)).to_bytes()
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises((Malformed, Refused)):
            Receipt.from_bytes(changed).verify(node.roster)
    unsigned = Receipt.from_bytes(data)
    elsewhere = sign_receipt("another.example/log", unsigned, node.keys["owner"].sign)
    with pytest.raises(Refused):
        elsewhere.verify(node.roster)
