"""Audits among nodes in one process: what each fault comes to, and what a holder gives away."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import key_named
from tests.storenode.auditing import World, now, owner

from medshard_protocol.audit import Answer, Challenge, Claim, Verdict, sign_answer
from medshard_protocol.crosscheck import allowance, tag
from medshard_protocol.errors import Refused, Unavailable
from medshard_protocol.facts import Moved
from medshard_protocol.ids import Sha256
from medshard_protocol.manifest import Manifest
from medshard_protocol.shards import Layout
from storenode.auditing import answering
from storenode.auditing import challenger as challenger_module
from storenode.auditing.answering import Answerer, held_here
from storenode.evidence import Exhibit
from storenode.identity import Peer
from storenode.repairing import ground
from storenode.watching.verdict import judge

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
    world.registered[file_id] = replace(world.registered[file_id], manifest_sha256=Sha256(bytes(32)))
    assert (await world.answer(1, 0, file_id, 1, Challenge(0, bytes(32), tagged=True))).claim is Claim.DAMAGED  # by another manifest
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
