"""A node's care for its files and its leaving, one step at a time: whom it tells, what it waits for, and before what it deletes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.storenode.test_repairing import case, institution, nodes
from tests.storenode.test_shardstore import manifest_for

from medshard_protocol.errors import Absent, Conflict, Full, Refused, Unavailable
from medshard_protocol.facts import Moved, Registration
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import pack_error
from medshard_protocol.repairorder import Link, Reason
from storenode.config import RepairSection
from storenode.metrics import Metrics
from storenode.repairing import ground
from storenode.repairing.fetching import Giver, fetch
from storenode.repairing.helping import Helper
from storenode.repairing.leaving import Leaving
from storenode.repairing.rate import Bucket
from storenode.repairing.rebuilding import Job, Rebuilding
from storenode.repairing.repairer import Repairer
from storenode.repairing.surveying import Case, Surveyor
from storenode.repairing.tending import Sick, Tending
from storenode.shardstore import ShardStore

file_id = FileId(bytes(32))


class Care:
    """Node 1, a holder of the file of ``case``, and what it does about shards that are gone, or found wrong by its audits."""

    def __init__(self, of: Case, section: RepairSection, *, gone: tuple[int, ...] = (), wrong: tuple[int, ...] = ()) -> None:
        self.told: list[tuple[int, bytes]] = []
        self.objection: Exception | None = None
        self.room: Exception | None = None

        async def peers(node: NodeId, method: str, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
            self.told.append((node[0], body))
            return 202, b""

        async def look_at(*_: object) -> tuple[float, bool]:
            return 0.0, True

        async def find(file_id: FileId) -> Case:
            return of

        async def known(sick: Sick) -> Case:
            return of

        def check_room(size: int) -> None:
            if self.room:
                raise self.room

        surveyor = SimpleNamespace(
            institution=institution,
            ranked=lambda file_id: nodes,
            name=lambda node: node.hex(),
            look_at=look_at,
            find=find,
            found_missing=lambda case: set(wrong),
        )
        ledger = SimpleNamespace(roster=SimpleNamespace(nodes=[SimpleNamespace(id=node) for node in nodes]))
        node = SimpleNamespace(id=nodes[1], store=SimpleNamespace(check_room=check_room), ledger=ledger)
        means: Any = SimpleNamespace(node=node, surveyor=surveyor, peers=peers, metrics=Metrics(), bucket=Bucket(0))
        repairer: Any = SimpleNamespace(objection=lambda case, shard: self.objection, running=[], free=2)
        pulse: Any = SimpleNamespace(is_gone=lambda node: node[0] in gone, answers=lambda node: node[0] not in gone)
        self.tending = Tending(means, repairer, pulse, section, lambda: True)
        self.tending._known = known  # type: ignore[method-assign]

    async def see_to(self, sick: Sick) -> list[int]:
        """Whom it lets know."""
        await self.tending._see_to(sick)
        return [node for node, _ in self.told]


def sick(**more: Any) -> Sick:
    return Sick(file_id, 0.0, 0.0, **more)


async def test_a_row_that_makes_no_sense_keeps_no_other_file_from_being_looked_at(tmp_path: Path) -> None:
    care, looked, store = Care(case(), RepairSection()), asyncio.Event(), ShardStore(tmp_path, capacity=10_000_000, small_bytes_max=100)
    tending: Any = care.tending
    tending._means.node.store, tending._means.node.ledger.state = store, SimpleNamespace(registration=lambda file_id: None)

    async def held() -> AsyncIterator[Case]:
        yield case()

    async def look_into(case: Case) -> None:
        looked.set()

    tending.held, tending._look_into, tending._unit_s, tending._young = held, look_into, 0.01, [file_id]
    data = bytes(90)
    manifest = manifest_for(data, file_id)
    try:
        incoming = store.begin(len(data), manifest.layout.cell_size)
        incoming.write([data])
        await store.commit_described(incoming, manifest, 0)
        await store.catalog.write(lambda db: db.execute("DELETE FROM manifests"))
        await store.catalog.write(lambda db: db.execute("UPDATE shards SET digests = x'00'"))
        looking, wait = asyncio.create_task(tending._keep_looking()), asyncio.create_task(looked.wait())
        await asyncio.wait({looking, wait}, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        assert looked.is_set()
        assert file_id in tending._young  # its upload may still end well
        looking.cancel()
    finally:
        store.close()


@pytest.mark.parametrize(("margin", "told"), [(254, [4]), (1, [4]), (0, [])])
async def test_a_file_is_repaired_from_the_margin_on_that_is_configured(margin: int, told: list[int]) -> None:
    assert await Care(case(), RepairSection(margin=margin), gone=(0,)).see_to(sick()) == told  # 2 of 4: one more may be lost


async def test_who_took_a_shard_and_does_not_make_it_is_passed_over_after_a_while() -> None:
    care, now = Care(case(), RepairSection(patience_s=100.0), gone=(0,)), asyncio.get_running_loop().time()
    assert await care.see_to(sick(asked={(0, nodes[4]): now - 90.0})) == [4]
    assert await care.see_to(sick(asked={(0, nodes[4]): now - 110.0})) == [4, 5]


async def test_a_shard_that_an_audit_found_wrong_is_missing_whatever_its_holder_says() -> None:
    one = sick(suspected={2})
    await Care(case(), RepairSection(), wrong=(2,)).see_to(one)
    assert one.missing == (2,)


async def test_a_hint_is_taken_only_for_a_shard_that_this_node_may_take_and_has_room_for() -> None:
    care = Care(case(), RepairSection())
    for care.objection, care.room in ((Refused("it may not"), None), (None, Full("no room"))):
        with pytest.raises((Refused, Full)):
            await care.tending.hint(nodes[0], file_id, 0)
        assert not care.tending.is_sick(file_id)
    care.room = None
    await care.tending.hint(nodes[0], file_id, 0)
    assert care.tending.is_sick(file_id)


# -- leaving


class Giving:
    """Node 3, which gives shard 3 to node 5: what node 5 answers, who has the shard by this node's mirror, and what it deletes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, answers: list[int], holder: Callable[[int], int]) -> None:
        self.asked, self.removed = 0, 0

        async def offer(*_: object) -> tuple[int, bytes]:
            self.asked += 1
            status = answers[self.asked - 1]
            return status, pack_error(Refused("no"))[1] if status == 403 else b""

        async def remove(own: object) -> None:
            self.removed += 1

        looked = 0

        def seen(*_: object) -> Any:
            nonlocal looked
            looked += 1
            return SimpleNamespace(present=(*nodes[:3], nodes[holder(looked)]))

        store = SimpleNamespace(shard_at=lambda *_: SimpleNamespace(size=1), remove=remove)
        node = SimpleNamespace(id=nodes[3], config=SimpleNamespace(data=folder), store=store, ledger=None)
        surveyor = SimpleNamespace(name=lambda node: "", case=seen)
        giver: Any = SimpleNamespace(offer=offer, withdraw=lambda *_: None)
        monkeypatch.setattr("storenode.repairing.leaving.again_s", 0.0)
        monkeypatch.setattr("storenode.repairing.leaving.ground.standing", lambda *_: None)
        means: Any = SimpleNamespace(node=node, surveyor=surveyor)
        nobody: Any = None
        self.leaving = Leaving(means, giver, nobody, RepairSection(), nobody, lambda file_id: False)


@pytest.mark.parametrize(
    ("answers", "holder", "removed"),
    [
        ([202, 202, 204], lambda looked: 5, 3),  # asked until the other one has it
        ([204], lambda looked: 5 if looked > 3 else 3, 1),  # the entry was on its way here
        ([204], lambda looked: 3, 0),  # the other one's word is not enough
        ([403], lambda looked: 5, 0),
    ],
)
async def test_a_shard_is_deleted_when_the_other_node_has_it_and_the_ledger_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: list[int], holder: Callable[[int], int], removed: int
) -> None:
    giving = Giving(monkeypatch, tmp_path, answers, holder)
    assert await giving.leaving._give(case(), 3, nodes[5]) == bool(removed)
    assert (giving.asked, giving.removed) == (len(answers), min(removed, 1))


@pytest.mark.parametrize(("moved", "is_published"), [(None, True), (4, True), (5, False)])
async def test_a_shard_goes_out_only_under_a_published_entry_that_gives_it_to_who_asks(
    monkeypatch: pytest.MonkeyPatch, moved: int | None, is_published: bool
) -> None:
    of = case() if moved is None else case(given=((3, moved),))
    store = SimpleNamespace(shard_at=lambda *_: SimpleNamespace(size=1), manifest=lambda file_id: b"")
    ledger = SimpleNamespace(journal=SimpleNamespace(news=asyncio.Event()))
    means: Any = SimpleNamespace(node=SimpleNamespace(store=store, ledger=ledger), surveyor=SimpleNamespace(case=lambda *_: of))

    async def published(*_: object) -> bool:
        return is_published

    async def offered(*_: object) -> tuple[int, bytes]:
        return 202, b""

    for name, value in (("standing", lambda *_: None), ("is_described", lambda *_: True), ("published", published), ("wait_s", 0.02)):
        monkeypatch.setattr(f"storenode.repairing.fetching.ground.{name}", value)
    monkeypatch.setattr("storenode.repairing.fetching.Manifest", SimpleNamespace(from_bytes=lambda data: of.manifest))
    means.peers, request = offered, SimpleNamespace()  # a request that is looked at would fail
    giver = Giver(means)
    await giver.offer(file_id, 3, nodes[5], 1.0)
    with pytest.raises(Refused, match="no MOVE entry"):
        await giver.give(file_id, 3, nodes[5], request)  # type: ignore[arg-type]


# -- taking


@pytest.mark.parametrize("is_ours", [True, False])
async def test_a_shard_that_is_fetched_is_kept_if_it_is_still_this_nodes(tmp_path: Path, is_ours: bool) -> None:
    data = bytes(9000)
    manifest, store, bucket = manifest_for(data, file_id), ShardStore(tmp_path, capacity=10_000_000, small_bytes_max=100), Bucket(0)
    body = asyncio.StreamReader()
    body.feed_data(data)

    @asynccontextmanager
    async def opened(*_: object) -> AsyncIterator[Any]:
        yield SimpleNamespace(status=200, content=body)

    node = SimpleNamespace(store=store)
    surveyor = SimpleNamespace(name=lambda node: "")
    means: Any = SimpleNamespace(node=node, peers=SimpleNamespace(open=opened), surveyor=surveyor, metrics=Metrics(), bucket=bucket)
    try:
        if is_ours:
            await fetch(means, manifest, Job(file_id, shard=0), nodes[1], lambda: is_ours)
            assert store.bad_cells(store.shard_at(file_id, 0)) == []
            assert bucket.recent > 0  # what is taken over is taken out of the bucket
        else:
            with pytest.raises(Conflict, match="meantime"):
                await fetch(means, manifest, Job(file_id, shard=0), nodes[1], lambda: is_ours)
            with pytest.raises(Absent):
                store.shard_at(file_id, 0)
            assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == len(data)]
    finally:
        store.close()


@pytest.mark.parametrize(("took", "has"), [(0.1, True), (None, False)])
async def test_a_shard_that_a_third_node_has_or_may_have_is_not_received(took: float | None, has: bool) -> None:
    of = case(given=((3, 6),))

    async def find(file_id: FileId) -> Case:
        return of

    async def look_at(*_: object) -> tuple[float | None, bool]:
        return took, has

    surveyor = SimpleNamespace(find=find, look_at=look_at, has=lambda *_: False, name=lambda node: "")
    means: Any = SimpleNamespace(node=SimpleNamespace(id=nodes[5]), surveyor=surveyor, metrics=Metrics())
    with pytest.raises(Conflict, match="has taken this shard over"):
        await Repairer(means).receive(file_id, 3, nodes[3])


async def test_a_node_that_finds_a_later_entry_than_its_own_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    of = case()
    of.moves[1] = Moved(nodes[5], 7)

    async def published(*_: object) -> bool:
        return True

    monkeypatch.setattr("storenode.repairing.repairer.ground.published", published)
    monkeypatch.setattr("storenode.repairing.repairer.ground.standing", lambda *_: SimpleNamespace(given=()))
    monkeypatch.setattr("storenode.repairing.repairer.counted", lambda *_: {1: Moved(nodes[6], 9)})
    surveyor = SimpleNamespace(institution=institution)
    means: Any = SimpleNamespace(node=SimpleNamespace(id=nodes[5], ledger=None), surveyor=surveyor)
    with pytest.raises(Conflict, match="meantime"):
        await Repairer(means)._take(of, 1)


async def test_a_helpers_sums_are_taken_out_of_its_bucket() -> None:
    bucket, sent = Bucket(0), []

    async def write(data: bytes) -> None:
        sent.append(len(data))

    nothing: Any = None
    response: Any = SimpleNamespace(write=write)
    await Helper(nothing, nothing, nothing, Metrics(), bucket)._write(response, bytes(300_000))
    assert sum(sent) == 300_001
    assert bucket.recent * 5 == pytest.approx(300_000)


async def test_what_a_replacement_sums_is_taken_out_of_its_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, bucket, key = bytes(9000), Bucket(0), Ed25519PrivateKey.generate()
    manifest, store = manifest_for(data, file_id), ShardStore(tmp_path, capacity=10_000_000)
    ledger = SimpleNamespace(roster=SimpleNamespace(origin="log.example"))
    surveyor = SimpleNamespace(institution=institution)
    node = SimpleNamespace(id=nodes[1], store=store, ledger=ledger)
    means: Any = SimpleNamespace(node=node, key=key, peers=None, metrics=Metrics(), surveyor=surveyor, bucket=bucket)
    survey: Any = SimpleNamespace(manifest=manifest, there=(1,), links=lambda shards: [Link(nodes[2], 1)])

    @asynccontextmanager
    async def last(*_: object) -> AsyncIterator[Any]:
        yield SimpleNamespace(read=lambda length: asyncio.sleep(0, bytes(length)))

    async def nothing(*_: object) -> list[Any]:
        return []

    monkeypatch.setattr("storenode.repairing.rebuilding.sums", last)
    one = Rebuilding(means, survey, Job(file_id, shard=0, move=1), lambda: True)
    monkeypatch.setattr(one, "_of_each", nothing)
    incoming = store.begin(9000, manifest.layout.cell_size)
    try:
        await one._follow((Link(nodes[2], 1),), 0, incoming)
        assert incoming.received == 9000
        assert bucket.recent * 5 == pytest.approx(9000)
    finally:
        store.abandon(incoming)
        store.close()


async def test_an_order_under_an_entry_that_no_quorum_has_published_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storenode.repairing.ground.wait_s", 0.02)
    head, state = SimpleNamespace(checkpoint=SimpleNamespace(size=7)), SimpleNamespace(size=9)
    ledger: Any = SimpleNamespace(published=head, state=state, journal=SimpleNamespace(news=asyncio.Event()))
    assert [await ground.published(ledger, place) for place in (6, 7, 8)] == [True, False, False]
    state.size = 6  # the fold is behind
    assert not await ground.published(ledger, 6)
    nothing: Any = None
    helper = Helper(SimpleNamespace(id=nodes[1], ledger=ledger), nothing, nothing, Metrics(), Bucket(0))  # type: ignore[arg-type]
    order: Any = SimpleNamespace(id=b"an order", move=7)
    with pytest.raises(ground.Denied) as denied:
        await helper._judge(order, b"", nothing)
    assert denied.value.objection.reason is Reason.NO_MOVE


async def test_a_helper_or_a_holder_has_a_shard_only_as_it_was_registered(tmp_path: Path) -> None:
    data, store = bytes(range(250)) * 36, ShardStore(tmp_path, capacity=10_000_000, small_bytes_max=100)
    manifest, other = manifest_for(data, file_id), manifest_for(data, file_id, wrap=bytes(47) + b"x")
    nothing: Any = None
    node: Any = SimpleNamespace(id=nodes[1], store=store)
    helper, surveyor = Helper(node, nothing, nothing, Metrics(), Bucket(0)), Surveyor(node, nothing)
    order: Any = SimpleNamespace(file_id=file_id)

    def known(of: Manifest) -> ground.Standing:
        return ground.Standing(Registration(0, of.sha256, of.owner), ())

    try:
        with pytest.raises(ground.Denied):
            helper._own(order, known(manifest))
        incoming = store.begin(len(data), manifest.layout.cell_size)
        incoming.write([data])
        await store.commit_described(incoming, manifest, 0)
        assert helper._own(order, known(manifest))[0].index == 0
        assert surveyor.has(manifest, 0)
        with pytest.raises(ground.Denied):
            helper._own(order, known(other))
        (path,) = (tmp_path / "shards").glob("??/*")
        path.write_bytes(b"\1" + data[1:])
        assert not surveyor.has(manifest, 0)  # its disk changed it
        await store.catalog.write(lambda db: db.execute("UPDATE shards SET root = zeroblob(32)"))
        with pytest.raises(ground.Denied):
            helper._own(order, known(manifest))
    finally:
        store.close()


async def test_a_giver_that_does_not_hand_over_is_named() -> None:
    @asynccontextmanager
    async def refuses(*_: object) -> AsyncIterator[Any]:
        yield SimpleNamespace(status=403)

    store = SimpleNamespace(begin=lambda *_: None, abandon=lambda incoming: None)
    surveyor = SimpleNamespace(name=lambda node: "insurer-02")
    means: Any = SimpleNamespace(node=SimpleNamespace(store=store), peers=SimpleNamespace(open=refuses), surveyor=surveyor)
    with pytest.raises(Unavailable, match="insurer-02 does not hand the shard over"):
        await fetch(means, manifest_for(bytes(90), file_id), Job(file_id, shard=0), nodes[1], lambda: True)
