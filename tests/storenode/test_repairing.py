"""Deciding about repairs from values: who makes what, what goes first, how fast, and what moves for balance alone."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medshard_protocol.errors import Conflict, Damaged, Malformed, Refused, Unavailable
from medshard_protocol.facts import Granted, Moved, Registration
from medshard_protocol.ids import FileId, Key, NodeId, Sha256
from medshard_protocol.repairorder import pack_drain, pack_grants, unpack_drain, unpack_grants
from storenode.config import Config, RepairSection
from storenode.metrics import Metrics
from storenode.repairing import triage
from storenode.repairing.inheriting import inherit
from storenode.repairing.lasting import lasting
from storenode.repairing.leaving import Leaving
from storenode.repairing.pulse import Pulse
from storenode.repairing.rate import Bucket
from storenode.repairing.repairer import Repairer
from storenode.repairing.surveying import Case, Survey, Surveyor
from storenode.repairing.tending import Sick, _urgency
from storenode.shardstore import Sealed, ShardStore
from storenode.traffic import Traffic

k, n = 2, 4
nodes = [NodeId(bytes([i]) * 16) for i in range(8)]


def institution(node: NodeId) -> str | None:
    return f"institution {node[0]}"


def case(*, given: tuple[tuple[int, int], ...] = (), size: int = 100) -> Case:
    """A file of which nodes 0 to 3 have shards 0 to 3, but for what was moved since: (shard, node)."""
    refs = tuple(SimpleNamespace(node=nodes[i], root=bytes(32)) for i in range(n))
    manifest: Any = SimpleNamespace(shards=refs, layout=SimpleNamespace(k=k, n=n, shard_size=size), file_id=FileId(bytes(32)))
    moves = {shard: Moved(nodes[node], place) for place, (shard, node) in enumerate(given)}
    known: Any = SimpleNamespace(ever=[(shard, nodes[node]) for shard, node in given])
    return Case(manifest, known, moves, tuple(moves[i].node if i in moves else nodes[i] for i in range(n)))


def assigned(of: Case, missing: list[int], down: set[int]) -> dict[int, int]:
    chosen = triage.assign(of, missing, nodes, institution, lambda shard, node: node[0] not in down)
    return {shard: node[0] for shard, node in chosen.items()}


def test_a_lost_shard_goes_to_its_holder_if_that_is_there_and_else_to_the_next_without_one() -> None:
    assert assigned(case(), [1], set()) == {1: 1}
    assert assigned(case(), [1], {1}) == {1: 4}
    assert assigned(case(), [1], {1, 4}) == {1: 5}


def test_two_lost_shards_of_a_file_go_to_two_nodes_and_one_that_nobody_may_take_to_nobody() -> None:
    assert assigned(case(), [1, 2], {1, 2}) == {1: 4, 2: 5}
    assert assigned(case(), [1, 2], {1, 2, 5, 6, 7}) == {1: 4}


def test_a_node_that_ever_had_another_shard_is_passed_over_for_good() -> None:
    moved = case(given=((1, 4), (1, 5)))  # node 4 took shard 1 over, and then node 5 did
    assert assigned(moved, [2], {2}) == {2: 6}
    assert assigned(moved, [1], {5}) == {1: 1}  # who had this very shard may have it again


def test_the_margin_is_what_may_still_be_lost() -> None:
    assert triage.margin(case(), []) == 2
    assert triage.margin(case(), [0, 1, 2]) == -1


def test_the_first_holders_that_answer_speak_up_first() -> None:
    assert triage.place_among_holders(case(), nodes[2], nodes, lambda node: node != nodes[0]) == 1
    assert triage.place_among_holders(case(), nodes[6], nodes, lambda node: True) is None


def test_the_lowest_margin_comes_first_and_a_file_that_is_lost_last() -> None:
    margins = [2, None, 0, -1, 1]
    queue = [Sick(FileId(bytes(32)), since=float(i), next_at=0.0, margin=margin) for i, margin in enumerate(margins)]
    assert [sick.margin for sick in sorted(queue, key=_urgency)] == [None, 0, 1, 2, -1]


async def test_a_row_that_makes_no_sense_is_not_in_the_way_of_its_own_repair(tmp_path: Path) -> None:
    store, of = ShardStore(tmp_path, capacity=10_000_000), case()
    node: Any = SimpleNamespace(store=store, id=nodes[1])
    surveyor = SimpleNamespace(institution=institution, successors=lambda case, shard: [], name=lambda node: node.hex())
    means: Any = SimpleNamespace(node=node, surveyor=surveyor)
    repairer, file_id = Repairer(means), of.manifest.file_id

    async def made() -> None:
        incoming = store.begin(100, 100)
        incoming.write([bytes(100)])
        await store.commit(incoming, file_id, 1, Key(bytes(32)))
        store.abandon(incoming)

    try:
        await made()
        assert isinstance(repairer.objection(of, 2), Refused | Conflict), "a node with one shard takes no other"
        with sqlite3.connect(tmp_path / "store.sqlite") as database:
            database.execute("UPDATE shards SET digests = x'00'")
        database.close()
        with pytest.raises(Damaged):
            store.shard(file_id)
        assert repairer.objection(of, 1) is None
        await made()
        assert store.bad_cells(store.shard_at(file_id, 1)) == []
    finally:
        store.close()


async def test_what_audits_found_wrong_is_missing_whatever_its_holder_says_but_not_where_it_went_since() -> None:
    of = case()
    file_id, me = of.manifest.file_id, nodes[0]
    surveyor = Surveyor(SimpleNamespace(id=me), None)  # type: ignore[arg-type]
    surveyor.found = lambda of_file: [(0, me, 1.0), (1, of.present[1], 1.0), (2, of.present[1], 1.0)] if of_file == file_id else []

    async def find(file_id: FileId) -> Case:
        return of

    async def says_yes(*_: object) -> tuple[float, bool]:
        return 0.0, True

    surveyor.find, surveyor.look_at = find, says_yes  # type: ignore[method-assign,assignment]
    survey = await surveyor.survey(file_id)
    assert survey.there == tuple(shard for shard in range(len(of.present)) if shard != 1)
    assert survey.answering == frozenset(of.present)


async def test_what_audits_found_is_forgotten_when_the_shard_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    of, told = case(), []
    survey = Survey(of.manifest, of.known, of.moves, of.present, (0, 2, 3), frozenset(of.present))

    async def anyway(*_: Any) -> Any:
        return survey

    means: Any = SimpleNamespace(node=SimpleNamespace(id=nodes[1]), surveyor=SimpleNamespace(survey=anyway), metrics=Metrics())
    repairer = Repairer(means)
    monkeypatch.setattr(repairer, "objection", lambda *_: None)
    monkeypatch.setattr(repairer, "_take", anyway)
    monkeypatch.setattr("storenode.repairing.repairer.Rebuilding", lambda *_: SimpleNamespace(run=anyway))
    monkeypatch.setattr("storenode.repairing.repairer.inherit", anyway)
    repairer.made = lambda file_id, shard: told.append((file_id, shard))
    assert (await repairer.begin(of.manifest.file_id)).state == "done"
    assert told == [(of.manifest.file_id, 1)]


@pytest.mark.parametrize(
    ("revoked", "of_it", "erased", "kept"),
    [(None, True, None, True), (5, True, None, False), (None, False, None, False), (None, True, 5, False)],
)
async def test_sealed_keys_are_inherited_of_grants_that_stand_when_they_come(
    tmp_path: Path, revoked: int | None, of_it: bool, erased: int | None, kept: bool
) -> None:
    of, grant = case(), Sha256(b"g" * 32)
    file_id = of.manifest.file_id
    known = Registration(0, Sha256(bytes(32)), Key(bytes(32)))
    granted = Granted(1, Key(bytes(32)), Key(bytes(32)), 0, 1, (file_id,) if of_it else (FileId(b"x" * 32),))
    facts = SimpleNamespace(grant=lambda id_: granted if id_ == grant else None, registration=lambda id_: None)

    async def peers(*_: object) -> tuple[int, bytes]:  # what is heard while the answer is on its way counts
        facts.grant, facts.registration = lambda id_: replace(granted, revoked=revoked), lambda id_: replace(known, erased=erased)
        return 200, pack_grants({grant: b"sealed"})

    store = ShardStore(tmp_path, capacity=10_000_000)
    try:
        node = SimpleNamespace(store=store, id=nodes[7], ledger=SimpleNamespace(state=facts, published_at=lambda: 1e9))
        await inherit(SimpleNamespace(node=node, peers=peers), of, of.present)  # type: ignore[arg-type]
        assert (Sealed(store.catalog).grant(file_id, grant) is not None) == kept
    finally:
        store.close()


async def test_a_bucket_lets_through_what_it_should_and_no_more() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    bucket = Bucket(1_000_000)
    await asyncio.gather(*(bucket.take(100_000) for _ in range(8)))
    assert loop.time() - began >= 0.5  # 800 kB, of which a quarter of a second's worth is free
    free = Bucket(0)
    began = loop.time()
    for _ in range(1000):
        await free.take(1_000_000)
    assert free.recent > 0


class Answering:
    """Peers of which some answer."""

    def __init__(self, *up: int) -> None:
        self.up = {nodes[i] for i in up}

    async def __call__(self, node: NodeId, *_: object) -> tuple[int, bytes]:
        if node not in self.up:
            raise Unavailable("no answer")
        return 200, b"ok"


@pytest.mark.parametrize(("count", "grace_s", "every_s"), [(4, 3600.0, 15.0), (6, 3600.0, 15.0), (16, 3600.0, 40.0), (16, 20.0, 5.0)])
async def test_where_there_are_many_each_is_asked_less_often_but_four_times_within_its_grace(
    count: int, grace_s: float, every_s: float
) -> None:
    roster: Any = SimpleNamespace(nodes=[SimpleNamespace(id=bytes([number] * 16)) for number in range(count)])
    assert Pulse(nodes[0], Answering(), lambda: roster, grace_s, Traffic().lull).every_s == every_s  # type: ignore[arg-type]


async def test_a_node_is_gone_after_the_time_of_grace_and_not_where_most_are_silent() -> None:
    roster: Any = SimpleNamespace(nodes=[SimpleNamespace(id=node) for node in nodes[:5]])
    peers: Any = Answering(1, 2, 3)
    pulse = Pulse(nodes[0], peers, lambda: roster, 0.05, Traffic().lull)
    await pulse.beat()
    assert not pulse.gone
    assert not pulse.answers(nodes[4])
    await asyncio.sleep(0.06)
    await pulse.beat()
    assert pulse.gone == {nodes[4]}
    assert pulse.is_gone(nodes[5])  # not in the roster
    peers.up = {nodes[1]}
    await asyncio.sleep(0.06)
    await pulse.beat()
    assert pulse.gone == {nodes[4]}  # this node is cut off: it knows no more than before
    peers.up = set(nodes)
    await pulse.beat()
    assert not pulse.gone


async def test_time_in_which_this_node_was_cut_off_or_stood_still_is_nobodys_silence() -> None:
    now = 1000.0
    roster: Any = SimpleNamespace(nodes=[SimpleNamespace(id=node) for node in nodes[:6]])
    peers: Any = Answering(1, 2, 3, 4, 5)
    pulse = Pulse(nodes[0], peers, lambda: roster, 3600.0, Traffic().lull, lambda: now)

    async def beats(minutes: float, *up: int) -> None:
        nonlocal now
        peers.up = {nodes[i] for i in up}
        for _ in range(int(minutes * 4)):
            now += 15.0
            await pulse.beat()

    await beats(1, 1, 2, 3, 4, 5)
    await beats(90)  # this node's line is cut
    await beats(1, 1, 2, 3)  # and not everybody is heard at once when it is mended
    assert not pulse.gone
    now += 7200.0  # the machine was suspended
    await beats(1, 1, 2, 3)
    assert not pulse.gone
    await beats(57, 1, 2, 3)
    assert not pulse.gone
    await beats(3, 1, 2, 3)
    assert pulse.gone == {nodes[4], nodes[5]}


async def test_work_that_fails_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storenode.repairing.lasting.pause_s", 0.0)
    times = 0

    async def work() -> None:
        nonlocal times
        times += 1
        if times == 3:
            await asyncio.Event().wait()
        raise OSError("no space left on device")

    task = asyncio.create_task(lasting(work, "work"))
    while times < 3:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# -- balance


def leaving(
    monkeypatch: pytest.MonkeyPatch, folder: Path, used: dict[int, float], wanted: list[int], up: int = 8
) -> tuple[Leaving, list[int]]:
    """A node 3 that has shard 3, in a consortium where placement names these nodes; and to whom it gives it."""
    config: Any = SimpleNamespace(data=folder, capacity_bytes=1)
    store: Any = SimpleNamespace(shard=lambda file_id: SimpleNamespace(index=3))
    surveyor: Any = SimpleNamespace(ranked=lambda file_id: nodes[:up], institution=institution)
    node: Any = SimpleNamespace(id=nodes[3], config=config, store=store, ledger=SimpleNamespace(roster=None))
    means: Any = SimpleNamespace(node=node, surveyor=surveyor)
    pulse: Any = SimpleNamespace(answers=lambda node: True)
    giver: Any = None
    held: Any = None
    one = Leaving(means, giver, pulse, RepairSection(rebalance_over=0.05), held, lambda file_id: False)
    given: list[int] = []

    async def give(case: Case, shard: int, to: NodeId) -> bool:
        given.append(to[0])
        return True

    async def fill(of: NodeId) -> float:
        return used.get(of[0], 0.0)

    monkeypatch.setattr("storenode.repairing.leaving.place", lambda *_: tuple(nodes[i] for i in wanted))
    monkeypatch.setattr(one, "_give", give)
    monkeypatch.setattr(one, "_used", fill)
    return one, given


@pytest.mark.parametrize(
    ("used", "wanted", "up", "to"),
    [
        ({3: 0.5}, [0, 1, 2, 7], 8, [7]),
        ({3: 0.5, 7: 0.46}, [0, 1, 2, 7], 8, []),  # about as full
        ({3: 0.5}, [0, 1, 2, 3], 8, []),  # it belongs here
        ({3: 0.5}, [0, 1, 2, 5], 6, []),  # too few nodes would be left for repairs
        ({3: 0.5}, [0, 1, 2, 6], 7, [6]),
    ],
)
async def test_a_shard_moves_for_balance_if_that_makes_things_more_even_and_leaves_nodes_for_repairs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, used: dict[int, float], wanted: list[int], up: int, to: list[int]
) -> None:
    one, given = leaving(monkeypatch, tmp_path, used, wanted, up)
    await one._balance(case())
    assert given == to


async def test_that_a_node_is_to_leave_is_known_after_a_restart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one, _ = leaving(monkeypatch, tmp_path, {}, [])
    assert not one.drains
    one.drain(on=True)
    again, _ = leaving(monkeypatch, tmp_path, {}, [])
    assert again.drains
    again.drain(on=False)
    assert not leaving(monkeypatch, tmp_path, {}, [])[0].drains


# -- formats and settings


def test_bodies_come_back_as_they_were_and_nothing_else_is_taken() -> None:
    assert [unpack_drain(pack_drain(on)) for on in (True, False)] == [True, False]
    grants: Any = {bytes([2]) * 32: b"two", bytes([1]) * 32: b"one"}
    assert unpack_grants(pack_grants(grants)) == grants
    for bad in (b"", b"\x92\x01\x02", pack_drain(True) + b"\x00"):
        with pytest.raises(Malformed):
            unpack_drain(bad)
    with pytest.raises(Malformed):
        unpack_grants(pack_grants(grants).replace(bytes([2]) * 32, bytes([1]) * 32))


@pytest.mark.parametrize("line", ["rate_bytes_per_s = 1000", "margin = 255", "grace_s = 0", "at_once = 0", "rebalance_over = 2"])
def test_settings_that_would_do_harm_are_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(Malformed, match=line.split()[0]):
        Config.parse(tmp_path, f'url = "https://node.example:9700"\n[repair]\n{line}\n')
