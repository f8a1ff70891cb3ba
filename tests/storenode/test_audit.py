"""Audits among nodes in one process: what each fault comes to, what a holder gives away, what is looked at again, and the scrub."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.conftest import consortium_of, key_named

from medshard_protocol.audit import Answer, Challenge, Claim, Verdict, sign_answer, unpack_held
from medshard_protocol.crosscheck import allowance, tag
from medshard_protocol.erasure import code
from medshard_protocol.errors import MedshardError, Refused, Unavailable
from medshard_protocol.evidence import evidence_size
from medshard_protocol.facts import Moved, Registration
from medshard_protocol.ids import FileId, Key, NodeId, file_id_from_hex
from medshard_protocol.manifest import Manifest, ShardRef
from medshard_protocol.messages import pack_error
from medshard_protocol.shards import Layout, digests, shard_root, split
from storenode.auditing import answering
from storenode.auditing import auditor as auditor_module
from storenode.auditing import challenger as challenger_module
from storenode.auditing.answering import Answerer, held_here
from storenode.auditing.auditor import Auditor
from storenode.auditing.challenger import Challenger
from storenode.auditing.findings import Findings
from storenode.auditing.scrub import Scrubber
from storenode.config import AuditSection
from storenode.evidence import Evidence, Exhibit
from storenode.identity import Peer
from storenode.metrics import Metrics
from storenode.repairing import ground
from storenode.routes import Node
from storenode.shardstore import ShardStore
from storenode.watching.verdict import judge

owner = Key(b"o" * 32)
now = 1_800_000_000.0


class World:
    """Nodes with real stores, a ledger that says what it is told, and calls that arrive at once."""

    def __init__(self, folder: Path, nodes: int, code_: tuple[int, int], institutions: int | None = None) -> None:
        institutions = institutions or nodes
        self.roster = consortium_of(institutions, nodes // institutions).roster
        self.k, self.n = code_
        self.time = now
        self.registered: dict[FileId, Registration] = {}
        self.moved: list[tuple[int, Moved]] = []
        self.silent: set[int] = set()
        self.slow: dict[int, float] = {}
        self.bent: dict[int, Callable[[Answer], Answer]] = {}
        state: Any = SimpleNamespace(
            registration=self.registered.get, moves=lambda file_id: {}, roster=self.roster, decided=[], genesis=self.roster
        )
        self.ledger: Any = SimpleNamespace(roster=self.roster, state=state)
        self.nodes, self.findings, self.answerers = list[Node](), list[Findings](), list[Answerer]()
        self.evidence = Evidence(folder / "evidence")
        for number, each in enumerate(self.roster.nodes):
            store = ShardStore(folder / str(number), capacity=10**9, small_bytes_max=1000)
            config: Any = SimpleNamespace(data=folder / str(number))
            self.nodes.append(Node(config, each.id, store, self.ledger))
            self.findings.append(Findings(folder / str(number), me=each.id, silence_s=43_200))
            self.answerers.append(
                Answerer(self.nodes[number], key_named(f"tls {number}"), self.findings[number], Metrics(), clock=lambda: self.time)
            )

    def challenger(self, number: int) -> Challenger:
        return Challenger(
            self.nodes[number],
            key_named(f"tls {number}"),
            self.caller(number),
            self.findings[number],
            self.evidence,
            Metrics(),
            answer_s=5.0,
            clock=lambda: self.time,
        )

    def peer(self, number: int) -> Peer:
        node = self.roster.nodes[number]
        return Peer(node.tls_key, node.institution, node.id)

    def caller(self, number: int) -> Any:
        async def call(node: NodeId, method: str, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
            other = next(i for i, each in enumerate(self.roster.nodes) if each.id == node)
            if other in self.silent:
                raise Unavailable("no answer")
            await asyncio.sleep(self.slow.get(other, 0.0))
            try:
                file, shard = path.split("/")[3:]
                answer = await self.answer(other, number, file_id_from_hex(file), int(shard), Challenge.from_bytes(body))
            except MedshardError as error:
                return pack_error(error)
            return 200, answer.to_bytes()

        return call

    async def answer(self, of: int, by: int, file_id: FileId, shard: int, challenge: Challenge) -> Answer:
        answer = await self.answerers[of].answer(file_id, shard, challenge, self.peer(by))
        return self.bent[of](answer) if of in self.bent else answer

    async def put(self, stripes: int = 3, holders: list[int] | None = None, cell: int = 2048) -> FileId:
        file_id = FileId(os.urandom(32))
        layout = Layout(self.k, self.n, cell, self.k * cell * stripes)
        data = [os.urandom(layout.shard_size) for _ in range(self.k)]
        parity = [bytearray(layout.shard_size) for _ in range(self.n - self.k)]
        code(self.k, self.n).encode(data, parity)
        shards = [*data, *map(bytes, parity)]
        holders = holders or list(range(self.n))
        refs = tuple(ShardRef(self.roster.nodes[at].id, root_of(shard, cell)) for at, shard in zip(holders, shards, strict=True))
        manifest = Manifest(file_id, layout, "blake3", b"c" * 32, refs, owner, b"", bytes(48), (), bytes(evidence_size))
        self.registered[file_id] = Registration(0, manifest.sha256, owner)
        for index, (at, shard) in enumerate(zip(holders, shards, strict=True)):
            await self.store(at, manifest, index, shard)
        return file_id

    async def store(self, at: int, manifest: Manifest, index: int, shard: bytes) -> None:
        store = self.nodes[at].store
        incoming = store.begin(len(shard), manifest.layout.cell_size)
        try:
            incoming.write([shard])
            await store.commit_described(incoming, manifest, index)
        finally:
            store.abandon(incoming)

    async def verdicts(self, by: int, file_id: FileId, **wishes: bool) -> dict[int, Verdict]:
        round_ = await self.challenger(by).audit(file_id, **{"patient": False, "tagged": True, **wishes})
        return {shard: heard.verdict for shard, (_, heard) in round_.verdicts.items()}

    def path(self, at: int, file_id: FileId) -> Path:
        store = self.nodes[at].store
        shard = store.shard(file_id)
        assert shard is not None
        return store._path(file_id, shard.root)

    def flip(self, at: int, file_id: FileId, every: int = 2048) -> None:
        data = bytearray(self.path(at, file_id).read_bytes())
        for place in range(0, len(data), every):
            data[place] ^= 1
        self.path(at, file_id).write_bytes(data)

    async def drop(self, at: int, file_id: FileId) -> None:
        await self.nodes[at].store.catalog.write(lambda c: c.execute("DELETE FROM shards WHERE file_id = ?", (file_id,)))

    def close(self) -> None:
        for node, findings in zip(self.nodes, self.findings, strict=True):
            node.store.close()
            findings.close()


def root_of(data: bytes, cell: int) -> bytes:
    blake3 = digests["blake3"]
    return shard_root([blake3(part) for part in split(data, cell)], blake3)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    made = World(tmp_path, 7, (2, 6))
    monkeypatch.setattr(ground, "given", lambda ledger, file_id: tuple(made.moved))
    monkeypatch.setattr(challenger_module, "pauses_s", (0.0, 0.0))
    monkeypatch.setattr(challenger_module, "slow_s", 0.2)
    yield made
    made.close()


# -- verdicts


async def test_holders_that_have_their_cells_are_good(world: World) -> None:
    file_id = await world.put()
    assert await world.verdicts(0, file_id) == dict.fromkeys(range(1, 6), Verdict.GOOD)
    assert {each.verdict for each in world.findings[0].of_file(file_id)} == {Verdict.GOOD}
    (answer, *_) = world.findings[0].of_file(file_id)
    Answer.from_bytes(answer.answer).verify(world.roster.origin, world.roster.node(answer.node).tls_key)  # results are kept signed


async def test_each_fault_has_its_own_verdict(world: World) -> None:
    file_id = await world.put()
    world.silent.add(1)
    await world.drop(2, file_id)
    world.flip(3, file_id)
    world.slow[4] = 0.6
    assert await world.verdicts(0, file_id) == {
        1: Verdict.LATE,
        2: Verdict.ABSENT,
        3: Verdict.DAMAGED,
        4: Verdict.SLOW,
        5: Verdict.GOOD,
    }
    assert {each.shard for each in world.findings[0].bad()} == {1, 2, 3}
    assert [each.verdict for each in world.findings[3].missing()] == [Verdict.DAMAGED]  # who looked noted it as its own


async def test_a_shard_whose_file_is_gone_is_damaged(world: World) -> None:
    file_id = await world.put()
    world.path(2, file_id).unlink()
    assert (await world.verdicts(0, file_id))[2] is Verdict.DAMAGED
    assert held_here(world.nodes[2], [(file_id, 2), (file_id, 3)]) == [False, False]
    assert held_here(world.nodes[3], [(file_id, 3)]) == [True]


async def test_who_answers_only_the_second_time_is_not_late(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = await world.put()
    world.silent.add(1)
    asyncio.get_running_loop().call_later(0.05, world.silent.discard, 1)
    monkeypatch.setattr(challenger_module, "pauses_s", (0.5,))
    assert (await world.verdicts(0, file_id, patient=True))[1] is Verdict.GOOD


async def test_a_node_that_made_its_tag_up_is_wrong_and_convicted_before_others(world: World) -> None:
    file_id, liar = await world.put(), key_named("tls 3")

    def lie(answer: Answer) -> Answer:
        made_up = tag(file_id, answer.cell, answer.nonce, bytes(2048), len(answer.tag))
        return sign_answer(world.roster.origin, replace(answer, tag=made_up), liar.sign)

    world.bent[3] = lie
    told = await world.verdicts(0, file_id)
    assert told == {1: Verdict.GOOD, 2: Verdict.GOOD, 3: Verdict.WRONG, 4: Verdict.GOOD, 5: Verdict.GOOD}
    assert [(each.shard, each.verdict) for each in world.findings[0].missing()] == [(3, Verdict.WRONG)]  # at once
    (kept,) = world.evidence.files("false-tag")
    exhibit = Exhibit.read(kept)
    verdict = await judge(exhibit, world.roster)
    assert verdict.proven
    assert any("The tag of node3 does not belong to them" in line for line in verdict.lines)
    documents = exhibit.documents
    few = replace(exhibit, documents={name: documents[name] for name in ("answer", "manifest", "rosters", "witness 0", "witness 5")})
    assert not (await judge(few, world.roster)).proven  # two others and the liar: any of them could be it
    honest = replace(exhibit, documents={**documents, "answer": documents["witness 4"], "witness 4": documents["answer"]})
    assert not (await judge(honest, world.roster)).proven


async def test_hashes_that_do_not_lead_to_the_root_convict_by_themselves(world: World) -> None:
    file_id = await world.put()
    key = key_named("tls 3")
    world.bent[3] = lambda answer: sign_answer(world.roster.origin, replace(answer, digest=bytes(32)), key.sign)
    assert (await world.verdicts(0, file_id))[3] is Verdict.WRONG
    (kept,) = world.evidence.files("false-cell")
    assert (await judge(Exhibit.read(kept), world.roster)).proven
    exhibit = Exhibit.read(kept)
    good = await world.answer(2, 0, file_id, 2, Challenge(0, bytes(32), tagged=False))
    assert not (await judge(replace(exhibit, documents={**exhibit.documents, "answer": good.to_bytes()}), world.roster)).proven


async def test_an_answer_that_another_node_signed_or_to_another_question_is_none(world: World) -> None:
    file_id = await world.put()
    world.bent[1] = lambda answer: replace(answer, signature=bytes(64))
    world.bent[2] = lambda answer: sign_answer(world.roster.origin, replace(answer, nonce=bytes(32)), key_named("tls 2").sign)
    world.bent[3] = lambda answer: sign_answer(world.roster.origin, answer, key_named("tls 4").sign)
    told = await world.verdicts(0, file_id)
    assert [told[shard] for shard in (1, 2, 3)] == [Verdict.REFUSED] * 3
    assert not list(world.findings[0].missing())


async def test_who_gives_no_tag_that_is_due_refuses(world: World) -> None:
    file_id = await world.put(1)
    size, times = allowance(Layout(2, 6, 2048, 4096), 0, 0)

    def shortened(number: int, to: bytes) -> Callable[[Answer], Answer]:
        return lambda answer: sign_answer(world.roster.origin, replace(answer, tag=to), key_named(f"tls {number}").sign)

    world.bent |= {3: shortened(3, b""), 4: shortened(4, bytes(size + 1))}
    told = await world.verdicts(0, file_id)
    assert told == {1: Verdict.GOOD, 2: Verdict.GOOD, 3: Verdict.REFUSED, 4: Verdict.REFUSED, 5: Verdict.GOOD}
    world.bent.clear()
    for _ in range(times - 1):
        told = await world.verdicts(0, file_id)
        assert set(told.values()) == {Verdict.GOOD}
    assert set((await world.verdicts(0, file_id)).values()) == {Verdict.SAID}  # used up, on both sides alike


async def test_tags_of_a_cell_are_asked_for_once_a_month(world: World) -> None:
    file_id = await world.put(1)
    quiet = {"tagged": False}
    assert set((await world.verdicts(0, file_id, **quiet)).values()) == {Verdict.GOOD}
    assert set((await world.verdicts(0, file_id, **quiet)).values()) == {Verdict.SAID}
    world.time += 31 * 86_400
    assert set((await world.verdicts(0, file_id, **quiet)).values()) == {Verdict.GOOD}


async def test_who_was_caught_lying_is_not_believed_until_a_tag_fits(world: World) -> None:
    file_id = await world.put()
    world.findings[0].report(file_id, 3, world.roster.nodes[3].id, Verdict.WRONG, now)
    await world.verdicts(0, file_id)
    assert not world.findings[0].bad()  # its tag fits now
    world.findings[0].report(file_id, 3, world.roster.nodes[3].id, Verdict.WRONG, now)
    world.findings[0].report(file_id, 3, world.roster.nodes[3].id, Verdict.SAID, now)
    assert [each.verdict for each in world.findings[0].bad()] == [Verdict.WRONG]


async def test_with_too_few_tags_it_is_the_holders_word(world: World) -> None:
    file_id = await world.put()
    world.silent |= {2, 3, 4, 5}
    assert (await world.verdicts(0, file_id))[1] is Verdict.SAID


async def test_the_present_holder_of_a_moved_shard_is_asked(world: World) -> None:
    file_id = await world.put()
    store = world.nodes[2].store
    shard = store.shard_at(file_id, 2)
    manifest = Manifest.from_bytes(store.manifest(file_id))
    await world.store(6, manifest, 2, store.read(shard, 0, shard.size))
    world.moved.append((2, Moved(world.roster.nodes[6].id, 9)))
    await world.drop(2, file_id)
    assert await world.verdicts(0, file_id) == dict.fromkeys(range(1, 6), Verdict.GOOD)
    assert {each.node for each in world.findings[0].of_file(file_id) if each.shard == 2} == {world.roster.nodes[6].id}


async def test_own_damage_that_an_audit_meets_is_noted_and_costs_nobody_else(world: World) -> None:
    file_id = await world.put()
    world.flip(0, file_id)
    assert await world.verdicts(0, file_id) == dict.fromkeys(range(1, 6), Verdict.GOOD)  # without the own tag
    assert [(each.node, each.verdict) for each in world.findings[0].missing()] == [(world.roster.nodes[0].id, Verdict.DAMAGED)]


# -- what a holder gives


async def test_tags_of_a_cell_are_counted_for_each_institution_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, 6, (2, 6), institutions=3)
    monkeypatch.setattr(ground, "given", lambda ledger, file_id: ())
    file_id = await world.put(cell=300)
    size, times = allowance(Layout(2, 6, 300, 1800), 0, 0)
    assert 4 < times < 32

    async def tag(of: int, by: int, cell: int = 0) -> bytes:
        return (await world.answer(of, by, file_id, of, Challenge(cell, os.urandom(32), tagged=True))).tag

    given = [await tag(1, by) for by in (0, 3) for _ in range(times)]  # nodes 0 and 3 are of one institution
    assert [len(each) for each in given] == [size] * times + [0] * times
    for node in world.nodes:
        node.store.close()
    again = World(tmp_path, 6, (2, 6), institutions=3)
    again.registered |= world.registered
    world.answer = again.answer  # type: ignore[method-assign]
    assert await tag(1, 0) == b""  # after a restart too
    assert len(await tag(1, 0, cell=1)) == size
    assert len(await tag(1, 2)) == size
    answer = await again.answer(1, 0, file_id, 1, Challenge(0, bytes(32), tagged=True))
    assert answer.claim is Claim.HELD  # it still says so
    for findings in world.findings:
        findings.close()
    again.close()


async def test_a_dishonest_institution_that_asks_everybody_for_everything_never_has_k_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random codes and placements, and shards that move to further nodes, which are asked again."""
    for seed in range(3):
        draw = random.Random(seed)
        k = draw.randint(2, 4)
        n = draw.randint(k + 1, 6)
        world = World(tmp_path / str(seed), 8, (k, n), institutions=4)
        holders = draw.sample(range(8), n)
        of = {node: node % 4 for node in range(8)}
        while max(Counter(of[node] for node in holders).values()) >= max(k, 2):
            holders = draw.sample(range(8), n)
        length = draw.choice([40, 90, 200])
        file_id = await world.put(1, holders, cell=length)
        monkeypatch.setattr(ground, "given", lambda ledger, file_id, moved=world.moved: tuple(moved))
        spoiler = of[draw.choice(holders)]
        by = next(node for node in range(8) if of[node] == spoiler)
        known = Counter[int]()  # bytes' worth of knowledge, by shard
        present = dict(enumerate(holders))
        for step in range(3):
            for shard, at in present.items():
                for number in range(40):
                    challenge = Challenge(0, number.to_bytes(32, "big"), tagged=True)
                    known[shard] += len((await world.answer(at, by, file_id, shard, challenge)).tag)
            shard, target = draw.choice(list(present)), draw.choice([node for node in range(8) if node not in present.values()] or [None])
            if target is None or of[target] == spoiler:
                continue
            store = world.nodes[present[shard]].store
            manifest = Manifest.from_bytes(store.manifest(file_id))
            stored = store.shard_at(file_id, shard)
            world.moved.append((shard, Moved(world.roster.nodes[target].id, step)))
            if ground.standing(world.ledger, file_id).ever[-1][1] in {ref.node for ref in manifest.shards}:
                world.moved.pop()
                continue
            await world.store(target, manifest, shard, store.read(stored, 0, stored.size))
            present[shard] = target
        own = {shard for shard, at in enumerate(holders) if of[at] == spoiler}
        worth = [length if shard in own else min(length, known[shard]) for shard in range(n)]
        most = sum(sorted((worth[shard] for shard in range(n) if shard not in own), reverse=True)) + length * (k - 1)
        assert most < k * length, (seed, k, n)  # even if repair gives it all that repair may
        world.close()


async def test_nobody_is_told_of_a_file_of_which_its_institution_has_no_shard(world: World) -> None:
    file_id = await world.put()
    with pytest.raises(Refused, match="institutions that hold a shard"):
        await world.answer(1, 6, file_id, 1, Challenge(0, bytes(32), tagged=True))
    with pytest.raises(Refused, match="only nodes"):
        await world.answerers[1].answer(file_id, 1, Challenge(0, bytes(32), tagged=True), Peer(owner, 0, None))
    world.registered[file_id] = replace(world.registered[file_id], erased=5)
    with pytest.raises(Refused, match="gone"):
        await world.answer(1, 0, file_id, 1, Challenge(0, bytes(32), tagged=True))


async def test_a_holder_answers_so_many_at_a_time_and_no_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id, hold = await world.put(), asyncio.Event()

    async def waiting(*values: Any) -> Answer:
        await hold.wait()
        return values[1]  # type: ignore[no-any-return]

    monkeypatch.setattr(Answerer, "_look", waiting)
    challenge = Challenge(0, bytes(32), tagged=True)
    tasks = [asyncio.create_task(world.answer(1, 0, file_id, 1, challenge)) for _ in range(answering.at_once_max)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await world.answer(1, 0, file_id, 1, challenge)
    hold.set()
    await asyncio.gather(*tasks)


# -- the scrub


def scrubber(world: World, number: int, **changed: float) -> Scrubber:
    from storenode.auditing.routes import _concerns

    rates = {"bytes_per_s": 1e9, "cells_per_s": 1e9, "every_s": 1e6} | changed
    node = world.nodes[number]
    return Scrubber(
        node.store, world.findings[number], node.id, Metrics(), lambda each: _concerns(node, each), clock=lambda: world.time, **rates
    )


async def test_the_scrub_finds_rot_cut_and_lost_files_and_lost_rows_and_takes_it_back_when_they_are_whole(world: World) -> None:
    files = [await world.put(1) for _ in range(66)]  # more than a page
    small = await world.put(1, cell=100)  # in the catalog
    rotten, cut, gone, bare, digest, moved = files[:6]
    whole = world.path(1, rotten).read_bytes()
    world.flip(1, rotten, every=10**9)
    os.truncate(world.path(1, cut), 100)
    world.path(1, gone).unlink()
    await world.drop(1, bare)
    catalog = world.nodes[1].store.catalog
    await catalog.write(lambda c: c.execute("UPDATE shards SET data = ? WHERE file_id = ?", (bytes(100), small)))
    await catalog.write(lambda c: c.execute("UPDATE shards SET digests = zeroblob(32) WHERE file_id = ?", (digest,)))
    world.registered.pop(moved)  # nobody's business
    world.flip(1, moved)
    await scrubber(world, 1).once()
    found = {each.file_id: each.verdict for each in world.findings[1].missing()}
    assert found == dict.fromkeys((rotten, cut, gone, small, digest), Verdict.DAMAGED) | {bare: Verdict.ABSENT}
    world.path(1, rotten).write_bytes(whole)
    await scrubber(world, 1).once()
    assert rotten not in {each.file_id for each in world.findings[1].missing()}


async def test_the_scrub_keeps_to_its_rate_and_goes_on_where_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(70):
        await world.put(2)
    slept, sleep = 0.0, asyncio.sleep

    async def counting(seconds: float) -> None:
        nonlocal slept
        slept += seconds
        await sleep(0)

    with monkeypatch.context() as timed:
        timed.setattr(asyncio, "sleep", counting)
        await scrubber(world, 1, bytes_per_s=1000.0).once()
        by_bytes, slept = slept, 0.0
        await scrubber(world, 1, cells_per_s=10.0).once()
    assert 0.9 * 70 * 2 * 2048 / 1000 < by_bytes <= 70 * 2 * 2048 / 1000
    assert 0.8 * 70 * 2 / 10 < slept <= 70 * 2 / 10
    looked: list[FileId] = []
    first, look = scrubber(world, 1), Scrubber.look

    async def dying(this: Scrubber, file_id: FileId) -> None:
        if len(looked) == 66:
            raise OSError("stopped")
        looked.append(file_id)
        await look(this, file_id)

    monkeypatch.setattr(Scrubber, "look", dying)
    with pytest.raises(OSError, match="stopped"):
        await first.once()
    before = len(looked)
    looked.append(FileId(b""))
    await scrubber(world, 1).once()  # the page that was begun is read again, those before are not
    assert len(looked) - before - 1 == 70 - 64


# -- inventories and what is looked at again


def auditor(world: World, number: int, **changed: Any) -> Auditor:
    made = Auditor(
        world.nodes[number],
        world.caller(number),
        world.findings[number],
        world.challenger(number),
        scrubber(world, number),
        AuditSection(**changed),
        clock=lambda: world.time,
    )

    async def call(node: NodeId, method: str, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        from medshard_protocol.audit import pack_held, unpack_inventory

        other = next(i for i, each in enumerate(world.roster.nodes) if each.id == node)
        if other in world.silent:
            raise Unavailable("no answer")
        return 200, pack_held(held_here(world.nodes[other], unpack_inventory(body)))

    made._peers = call  # type: ignore[assignment]
    return made


async def test_an_inventory_finds_every_lost_shard_and_what_it_finds_is_asked_again_before_it_counts(world: World) -> None:
    files = [await world.put() for _ in range(20)]
    for file_id in files[:7]:
        await world.drop(3, file_id)
    world.silent.add(4)
    made = auditor(world, 0)
    await made._ask_about(files)
    bad = world.findings[0].bad()
    assert {each.file_id for each in bad} == set(files[:7])
    assert {(each.node, each.verdict) for each in bad} == {(world.roster.nodes[3].id, Verdict.ABSENT)}
    assert not list(world.findings[0].missing())
    world.silent.clear()
    assert made._due() == []
    for _ in range(2):
        world.time += 70
        assert len(made._due()) == auditor_module.again_at_once
        for each in made._due():
            await made._audit(each.file_id, patient=False)
    assert {each.file_id for each in world.findings[0].missing()} == set(files[:7])
    assert unpack_held(b"\x92\x01\xc4\x01\x01", 1) == [True]


async def test_of_a_silent_node_one_shard_is_asked_again_and_not_all(world: World) -> None:
    for file_id in [await world.put() for _ in range(5)]:
        world.findings[0].report(file_id, 3, world.roster.nodes[3].id, Verdict.LATE, now)
        world.findings[0].report(file_id, 2, world.roster.nodes[2].id, Verdict.GOOD, now)
    world.time += 4000
    assert len(auditor(world, 0)._due()) == 1


async def test_a_file_that_ended_is_forgotten(world: World) -> None:
    file_id = await world.put()
    world.findings[0].report(file_id, 3, world.roster.nodes[3].id, Verdict.ABSENT, now)
    world.registered[file_id] = replace(world.registered[file_id], retired=5)
    assert await auditor(world, 0)._audit(file_id, patient=False) is None
    assert not world.findings[0].bad()


# -- how often


async def test_a_node_with_which_no_file_is_shared_is_asked_once_an_hour_whether_it_is_there(world: World) -> None:
    made = auditor(world, 0)
    assert len(made._unheard()) == auditor_module.again_at_once
    world.silent.add(3)
    for node in world.roster.nodes[1:]:
        await made._knock(node.id)
    assert made._unheard() == []
    standing = {each.node: each.silent_since for each in world.findings[0].nodes()}
    assert standing == {node.id: now if number == 3 else None for number, node in enumerate(world.roster.nodes) if number}
    world.time += 3600
    assert made._unheard()


async def test_draws_keep_their_rate_through_restarts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.put()
    times: list[float] = []

    async def sleep(seconds: float) -> None:
        world.time += seconds
        if len(times) % 10 == 9 and times[-1] != 0.0:
            times.append(0.0)
            raise OSError("a restart")

    async def audited(this: Auditor, *, patient: bool) -> None:
        times.append(world.time)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(Auditor, "_one", audited)
    while len(times) < 400:
        with pytest.raises(OSError, match="restart"):
            await auditor(world, 0)._drawing()
    drawn = [each for each in times if each]
    rate = len(drawn) / (drawn[-1] - drawn[0]) * 86_400
    assert 0.85 * AuditSection().per_day < rate < 1.15 * AuditSection().per_day
    assert len({round(b - a) for a, b in itertools.pairwise(drawn)}) > 50  # not all nodes at once
