"""What a node does by itself between audits: the scrub, inventories, what is looked at again, and how often."""

from __future__ import annotations

import asyncio
import itertools
import os
from dataclasses import replace
from typing import Any

import pytest
from tests.storenode.auditing import World, now, root_of

from medshard_protocol.audit import Verdict, unpack_held
from medshard_protocol.errors import Unavailable
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.shards import digests
from storenode.auditing import auditor as auditor_module
from storenode.auditing.answering import held_here
from storenode.auditing.auditor import Auditor
from storenode.auditing.scrub import Scrubber
from storenode.config import AuditSection
from storenode.metrics import Metrics

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
    small, other = [await world.put(1, cell=100) for _ in range(2)]  # in the catalog
    undescribed = await world.put(1)
    rotten, cut, gone, bare, digest, moved = files[:6]
    whole = world.path(1, rotten).read_bytes()
    world.flip(1, rotten, every=10**9)
    os.truncate(world.path(1, cut), 100)
    world.path(1, gone).unlink()
    await world.drop(1, bare)
    catalog = world.nodes[1].store.catalog
    await catalog.write(lambda c: c.execute("UPDATE shards SET data = ? WHERE file_id = ?", (bytes(100), small)))
    await catalog.write(lambda c: c.execute("UPDATE shards SET digests = zeroblob(32) WHERE file_id = ?", (digest,)))
    another = bytes(100)
    row = (another, digests["blake3"](another), root_of(another, 100), other)
    await catalog.write(lambda c: c.execute("UPDATE shards SET data = ?, digests = ?, root = ? WHERE file_id = ?", row))
    await catalog.write(lambda c: c.execute("UPDATE manifests SET bytes = zeroblob(9) WHERE file_id = ?", (undescribed,)))
    world.registered.pop(moved)  # nobody's business
    world.flip(1, moved)
    await scrubber(world, 1).once()
    found = {each.file_id: each.verdict for each in world.findings[1].missing()}
    assert found == dict.fromkeys((rotten, cut, gone, small, other, digest, undescribed), Verdict.DAMAGED) | {bare: Verdict.ABSENT}
    world.path(1, rotten).write_bytes(whole)
    await scrubber(world, 1).once()
    assert rotten not in {each.file_id for each in world.findings[1].missing()}


async def test_the_scrub_keeps_to_its_rate_and_goes_on_where_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(70):
        await world.put(2)
    slept, sleep, mine = 0.0, asyncio.sleep, asyncio.current_task()

    async def counting(seconds: float) -> None:
        nonlocal slept
        if asyncio.current_task() is not mine:  # what else a node does
            await sleep(seconds)
            return
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
    mine, really = asyncio.current_task(), asyncio.sleep

    async def sleep(seconds: float) -> None:
        if asyncio.current_task() is not mine:  # what else a node does
            await really(seconds)
            return
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
