"""Taking over: who may order entries, what is dropped and what never is, in one process with real HTTP between the nodes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from medshard_protocol.checkpoint import Note, cosigners
from medshard_protocol.entries import Freeze, Register
from medshard_protocol.errors import Conflict, Refused, Unavailable
from medshard_protocol.merkle import leaf_hash, sha256
from medshard_protocol.proofs import pack_append
from storenode.evidence import Evidence
from storenode.ledger import forwarding, sequencer, standby, wire
from storenode.ledger.engine import Head
from storenode.ledger.standby import may_order, stands_by
from storenode.ledger.wire import Report

pytestmark = pytest.mark.filterwarnings("ignore::aiohttp.web.NotAppKeyWarning")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The same, in a fifth of the time."""
    for name, seconds in (("look_every_s", 0.06), ("alive_s", 0.1), ("ask_wait_s", 0.2), ("turn_s", 0.12), ("disturbed_most_s", 0.3)):
        monkeypatch.setattr(standby, name, seconds)


def leaders(net):
    return [number for number, ledger in net.ledgers.items() if ledger.leads]


async def store_unpublished(net, number, entries, accepted=None):
    """Let a node's database have entries that no other node ever saw, as a kill between commit and push leaves them."""
    ledger = net.open(number)
    await ledger.journal.start()
    leaves = [leaf_hash(entry, sha256) for entry in entries]
    frontier = ledger.journal.frontier()
    for leaf in leaves:
        frontier.append(leaf)
    head = Head(frontier.size, frontier.root(), b"", accepted or ledger.journal.head.accepted)
    await ledger.journal.extend(entries, leaves, head)
    await ledger.journal.close()


async def test_a_standby_takes_over_and_the_old_sequencer_follows_it(net):
    net.standbys = {1, 2}
    await net.start(0, 1, 2, 3)
    await net.enrol()
    entries = [net.register() for _ in range(4)]
    first = await net.ledgers[3].append(entries[:2])
    await net.stop(0)
    then = await net.ledgers[3].append(entries[2:])
    assert [item.index for item in (*first, *then)] == [2, 3, 4, 5]
    (leader,) = leaders(net)
    assert leader in (1, 2)
    await net.start(0)
    await net.until(lambda: net.published(0) == 6)
    await net.until(lambda: len(leaders(net)) == 1)
    await net.until(lambda: net.ledgers[0].status()["leader"] == net.roster.nodes[leaders(net)[0]].name)
    assert net.ledgers[0].mirror.epoch >= 2
    (again,) = await net.ledgers[0].append([entries[0]])
    assert again.index == 2


async def test_of_two_sequencers_the_older_is_fenced_and_its_client_is_served_by_the_newer(net):
    net.standbys = {1}
    await net.start(0, 1, 2, 3)
    await net.enrol()
    old = net.ledgers[0]._sequencer
    net.ledgers[1].suspect("a test")
    await net.until(lambda: leaders(net) == [1])
    inclusions = await asyncio.gather(*(net.ledgers[number].append([net.register()]) for number in range(4)))
    assert sorted(item.index for (item,) in inclusions) == [2, 3, 4, 5]
    assert leaders(net) == [1]
    with pytest.raises(Unavailable):
        await old.append([net.register().to_bytes()])


async def test_a_mirror_refuses_an_epoch_before_the_one_it_promised(net):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    key = net.consortium.key("log 2")
    node = net.roster.nodes[2].id
    body = wire.pack_promise(9, key.sign(wire.promise_text(net.roster.origin, 9, node)))
    status, answer = await net.request(3, "POST", wire.promise_path, body, as_node=2)
    report = Report.from_bytes(answer)
    assert (status, report.epoch, report.leader, report.size, report.accepted) == (200, 9, node, 2, 1)
    assert (await net.request(3, "POST", wire.promise_path, body, as_node=2))[0] == wire.fenced
    for epoch, signed, caller, expected in ((10, 9, 2, 403), (9, 9, 1, 403), (10, 10, None, 403)):
        forged = wire.pack_promise(epoch, key.sign(wire.promise_text(net.roster.origin, signed, node)))
        assert (await net.request(3, "POST", wire.promise_path, forged, as_node=caller))[0] == expected
    await net.ledgers[0].append([net.register()])  # the other three are a quorum
    assert net.ledgers[3].journal.head.size == 2


async def test_an_unpublished_suffix_is_dropped_for_a_published_one_and_lies_in_a_file(net):
    net.standbys = {1}
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.stop(0)
    mine = net.register()
    await store_unpublished(net, 0, [mine.to_bytes(), net.register().to_bytes()])
    others = [net.register() for _ in range(3)]
    await net.ledgers[1].append(others)
    await net.start(0)
    await net.ledgers[2].append([net.register()])
    await net.until(lambda: net.ledgers[0].journal.head.root == net.ledgers[1].journal.head.root)
    assert net.ledgers[0].journal.entries(2, 5) == [entry.to_bytes() for entry in others]
    assert net.ledgers[0].state.rows() == net.ledgers[1].state.rows()
    assert net.ledgers[0].inclusion_of(mine.body.file_id) is None
    (kept,) = Evidence(net.folder / "node0" / "evidence").files("abandoned")
    assert mine.to_bytes() in kept.read_bytes()
    (again,) = await net.ledgers[0].append([mine])
    assert again.verify(net.roster)[1] == mine


async def test_what_nothing_published_rules_out_is_never_dropped(net):
    """Two of four institutions have other entries: without a quorum for one of the histories, each keeps its own."""
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.until(lambda: all(net.ledgers[number].journal.head.size == 2 for number in range(4)))  # a quorum is three of them
    await net.stop(0, 1, 2, 3)
    one, two = net.register().to_bytes(), net.register().to_bytes()
    for number, entry in ((0, one), (1, one), (2, two), (3, two)):
        await store_unpublished(net, number, [entry])
    await net.start(0, 1, 2, 3)
    await asyncio.sleep(1.0)
    assert [net.ledgers[number].journal.entries(2, 3) for number in range(4)] == [[one], [one], [two], [two]]
    assert max(net.published(number) for number in range(4)) <= 2


@pytest.mark.parametrize("standby", [1, 2])
async def test_nobody_leads_with_entries_that_no_quorum_can_cosign(net, standby):
    """One of four has an end of its own and two have another: what the fourth takes decides whether there ever is a quorum."""
    net.standbys = {standby}
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.until(lambda: all(net.ledgers[number].journal.head.size == 2 for number in range(4)))
    await net.stop(0, 1, 2, 3)
    one, two = net.register().to_bytes(), net.register().to_bytes()
    await store_unpublished(net, 0, [one], accepted=5)
    for number in (1, 3):
        await store_unpublished(net, number, [two])
    await net.start(0, 1, 3)  # a quorum that promises, and none for either end
    await net.until(lambda: net.ledgers[0].mirror.epoch >= 2)
    await net.start(2)
    await net.until(lambda: all(net.published(number) == 3 for number in range(4)))
    assert [net.ledgers[number].journal.entries(2, 3) for number in range(4)] == [[two]] * 4


async def test_entries_that_one_mirror_alone_has_are_taken_over_with_it(net):
    net.standbys = {1}
    await net.start(0, 1, 2, 3)
    await net.enrol()
    for number in (1, 2):
        await net.stop(number)
    appending = asyncio.create_task(net.ledgers[0].append([net.register()]))
    await net.until(lambda: net.ledgers[3].journal.head.size == 3)  # it reaches node 3, and no quorum
    appending.cancel()
    await asyncio.gather(appending, return_exceptions=True)
    entry = net.ledgers[3].journal.entries(2, 3)
    await net.stop(0)
    await net.start(1, 2)
    await net.until(lambda: net.published(1) == 3)
    assert net.ledgers[1].journal.entries(2, 3) == entry


async def test_a_sequencer_whose_database_is_older_than_its_cosignatures_mirrors_and_does_not_cosign(net, caplog):
    net.standbys = {1}
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.stop(3)
    kept = {file: file.read_bytes() for file in (net.folder / "node3").glob("ledger.sqlite*")}
    await net.start(3)
    await net.stop(2)  # so that node 3's voice is needed, and stands under what is published
    await net.ledgers[0].append([net.register() for _ in range(3)])
    await net.stop(3)
    for file in (net.folder / "node3").glob("*.sqlite*"):
        file.unlink()
    for file, data in kept.items():
        file.write_bytes(data)
    await net.start(2, 3)
    await net.until(lambda: net.ledgers[3].mirror.lost)
    await net.ledgers[0].append([net.register()])
    await net.until(lambda: net.published(3) == 6)
    assert net.roster.nodes[3].id not in cosigners(Note.from_bytes(net.ledgers[0].published.note), net.roster)
    assert "has lost part of its ledger" in caplog.text
    body = wire.pack_promise(9, net.consortium.key("log 1").sign(wire.promise_text(net.roster.origin, 9, net.roster.nodes[1].id)))
    assert (await net.request(3, "POST", wire.promise_path, body, as_node=1))[0] == 403


async def test_an_emptied_node_knows_by_the_mark_beside_its_key(net, tmp_path):
    marks = {number: tmp_path / f"mark{number}" for number in range(4)}
    real = net.open
    net.open = lambda number, **more: real(number, marker=marks[number], **more)
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.stop(3)
    for file in (net.folder / "node3").glob("*.sqlite*"):
        file.unlink()
    await net.start(3)
    assert net.ledgers[3].mirror.lost
    await net.until(lambda: net.published(3) == 2)
    assert not net.ledgers[1].mirror.lost


async def test_the_same_nonce_with_another_body_is_a_conflict(net):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    one, two = (net.consortium.entry("vault", Register(file_id * 32, b"m" * 32, b"n" * 16)) for file_id in (b"1", b"2"))
    for number in (0, 2):
        with pytest.raises(Conflict, match="nonce"):
            await net.ledgers[number].append([one, two])
    await net.ledgers[0].append([one])
    for number in (0, 2):
        with pytest.raises(Conflict, match="nonce"):
            await net.ledgers[number].append([two])
    assert (await net.ledgers[2].append([one]))[0].index == 2


async def test_an_entry_that_the_sequencer_leaves_out_is_evidence_and_another_node_takes_over(net, monkeypatch):
    net.standbys = {1}
    monkeypatch.setattr(forwarding, "left_out_after_s", 0.5)
    monkeypatch.setattr(forwarding, "watch_every_s", 0.1)
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.until(lambda: net.published(1) == 2)  # or it could not say that anything came later
    unwanted = net.register()
    take = net.ledgers[0]._sequencer.append

    async def censor(entries):
        if unwanted.to_bytes() in entries:
            await asyncio.sleep(60)
        return await take(entries)

    monkeypatch.setattr(net.ledgers[0]._sequencer, "append", censor)
    handed_in = asyncio.create_task(net.ledgers[1].append([unwanted]))
    await asyncio.sleep(0.05)
    await net.ledgers[0].append([net.register()])
    (inclusion,) = await asyncio.wait_for(handed_in, 60)
    assert inclusion.verify(net.roster)[1] == unwanted
    assert net.ledgers[1].leads
    (kept,) = Evidence(net.folder / "node1" / "evidence").files("left-out")
    assert unwanted.to_bytes() in kept.read_bytes()
    await net.until(lambda: net.ledgers[1].status()["left_out"] == 0)


async def test_a_sequencer_that_takes_nothing_and_keeps_the_logs_time_is_replaced(net, monkeypatch):
    """No other entry shows that it leaves one out; its heads do, which grow newer and no longer."""
    net.standbys = {1}
    monkeypatch.setattr(forwarding, "left_out_after_s", 0.5)
    monkeypatch.setattr(forwarding, "watch_every_s", 0.1)
    monkeypatch.setattr(sequencer, "fresh_after_s", 0.2)
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.until(lambda: net.published(1) == 2)
    unwanted = net.register()

    async def idle(_entries):
        await asyncio.sleep(60)

    monkeypatch.setattr(net.ledgers[0]._sequencer, "append", idle)
    (inclusion,) = await asyncio.wait_for(net.ledgers[1].append([unwanted]), 60)
    assert inclusion.verify(net.roster)[1] == unwanted
    assert net.ledgers[1].leads
    assert Evidence(net.folder / "node1" / "evidence").files("left-out")


async def test_a_frozen_log_takes_no_more_and_names_its_successor(net):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    freezes = [net.consortium.entry(f"ca {number}", Freeze(b"s" * 32, bytes([100 + number]) * 16)) for number in range(3)]
    await net.ledgers[1].append(freezes)
    assert net.ledgers[0].journal.head.size == 5
    for number in (0, 3):
        with pytest.raises(Refused, match=(b"s" * 32).hex()):
            await net.ledgers[number].append([net.register()])
    await net.until(lambda: net.published(3) == 5)
    head = net.ledgers[3].journal.head
    entry = net.register().to_bytes()
    frontier = net.ledgers[3].journal.frontier()
    frontier.append(leaf_hash(entry, sha256))
    checkpoint = replace(net.ledgers[3].published.checkpoint, size=head.size + 1, root=frontier.root())
    push = wire.Push(1, 0, head.size, (entry,), net.consortium.note(checkpoint, []).to_bytes(), b"")
    with pytest.raises(Refused, match="ended"):
        await net.ledgers[3].mirror.take(push, net.roster.nodes[0].id)


async def test_without_a_quorum_of_promises_nobody_leads(net, monkeypatch):
    monkeypatch.setattr(sequencer, "append_wait_s", 0.5)
    net.standbys = {1}
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.stop(0, 2)
    await asyncio.sleep(1.0)
    assert leaders(net) == []
    monkeypatch.setattr(forwarding, "leaderless_wait_s", 0.2)
    status, _ = await net.request(3, "POST", "/v1/ledger/append", pack_append([net.register().to_bytes()]))
    assert status == 503
    await net.start(2)
    await net.until(lambda: leaders(net) == [1])


def test_the_first_nodes_of_three_institutions_stand_by_where_nobody_says_otherwise(consortium) -> None:
    roster = consortium(5, nodes_each=2).roster
    nodes = [node.id for node in roster.nodes]
    assert may_order(roster) == nodes[:5]
    assert [stands_by(roster, node, None) for node in nodes] == [True] * 3 + [False] * 7
    assert [stands_by(roster, nodes[0], False), stands_by(roster, nodes[9], True)] == [False, True]
    moved = replace(roster, sequencer=nodes[8])
    assert [number for number, node in enumerate(nodes) if stands_by(moved, node, None)] == [0, 1, 8]
    mute = replace(roster, nodes=(roster.nodes[0], *(replace(node, log_key=b"") for node in roster.nodes[1:])))
    assert may_order(mute) == nodes[:1]
