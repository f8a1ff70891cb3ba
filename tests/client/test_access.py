"""Announcing reads: as few entries as can be, each shown as long as it holds, and holders' objections met or passed on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import pytest

from medshard import access, hpke, quorum
from medshard.access import Admitted, Reader, Tickets
from medshard.keys import VaultKeys
from medshard.ledger import Answered, LedgerClient
from medshard.transport import Net
from medshard_protocol.entries import Access, Entry, Purpose, entry_bytes_max
from medshard_protocol.errors import MedshardError, Refused, Unavailable
from medshard_protocol.ids import FileId, Key
from medshard_protocol.proofs import Inclusion
from medshard_protocol.rights import Reason, Refusal
from medshard_protocol.sharing import (
    access_header,
    checkpoint_header,
    emergency_header,
    pack_seen,
    unpack_checkpoint,
    unpack_emergency,
    unpack_shown,
    unpack_tickets,
)
from medshard_protocol.vouchers import unpack_vouchers, vouchers_header

keys = VaultKeys.from_root(b"r" * 32)
auditors = hpke.PrivateKey(b"a" * 32)


def files(count: int) -> list[FileId]:
    return [FileId(number.to_bytes(32, "big")) for number in range(1, count + 1)]


class World:
    """A ledger and holders that answer as a test says. No node is there, and no time passes but what is waited for."""

    def __init__(self, roster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries: list[Entry] = []
        self.down: Unavailable | None = None
        self.forged: Refused | None = None  # what is found when an answer is verified
        self.shown: list[str] = []
        self.note = b"note"
        self.net = Net(roster, {})
        self.ledger = LedgerClient(self.net, keys)

        async def append_signed(entries: Sequence[Entry], answered: Answered | None = None) -> list[Inclusion]:
            if self.down is not None:
                raise self.down
            places = []
            for entry in entries:
                if entry not in self.entries:
                    self.entries.append(entry)
                places.append(Inclusion(self.entries.index(entry), entry.to_bytes(), (), self.note))
            if answered is not None:
                answered(places, {})
            if self.forged is not None:
                raise self.forged
            return places

        async def waiting(net: Net, answer: Coroutine[Any, Any, Any]) -> Any:
            return await answer

        async def call(node: Any, method: str, path: str, body: bytes = b"", **_: Any) -> bytes:
            assert (method, path) == ("POST", "/v1/access")
            self.shown.append(node.name)
            return pack_seen(unpack_shown(body).index)

        monkeypatch.setattr(self.ledger, "append_signed", append_signed)
        monkeypatch.setattr(access, "waiting_for_the_ledger", waiting)
        monkeypatch.setattr(self.net, "call", call)

    def announced(self) -> list[tuple[FileId, ...]]:
        return [entry.body.file_ids for entry in self.entries if isinstance(entry.body, Access)]


@pytest.fixture
def world(consortium: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> World:
    from dataclasses import replace

    roster = replace(consortium(4).roster, emergency=(keys.public,), auditors=auditors.public)
    return World(roster, monkeypatch)


def said(reason: Reason) -> Refused:
    return Refused(f"hospital: {Refusal(reason, 'entry 7').error()}")


async def test_one_entry_speaks_for_48_files_and_is_not_made_again(world: World) -> None:
    tickets = Tickets(world.net, world.ledger)
    (shown,) = await tickets.announce(files(100), Purpose.TREATMENT)
    assert [len(group) for group in world.announced()] == [48, 48, 4]
    assert unpack_tickets(shown.headers()[access_header]) == (0, 1, 2)
    (again,) = await tickets.announce(files(50), Purpose.TREATMENT)
    assert unpack_tickets(again.headers()[access_header]) == (0, 1)
    assert len(world.entries) == 3


async def test_another_purpose_is_another_entry(world: World) -> None:
    tickets = Tickets(world.net, world.ledger)
    for purpose in (Purpose.OPERATIONS, Purpose.TREATMENT, Purpose.OPERATIONS):
        await tickets.announce(files(1), purpose)
    assert [entry.body.purpose for entry in world.entries if isinstance(entry.body, Access)] == [Purpose.OPERATIONS, Purpose.TREATMENT]


async def test_a_ticket_is_not_used_beyond_its_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    tickets = Tickets(world.net, world.ledger)
    await tickets.announce(files(1), 0)
    now[0] += access.ticket_s - 1
    await tickets.announce(files(1), 0)
    assert len(world.entries) == 1
    now[0] += 2
    await tickets.announce(files(1), 0)
    assert len(world.entries) == 2


async def test_many_single_reads_before_a_large_one_do_not_overflow_its_header(world: World) -> None:
    tickets = Tickets(world.net, world.ledger)
    for file_id in files(65):
        await tickets.announce([file_id], 0)
    (shown,) = await tickets.announce(files(65), 0)
    assert len(unpack_tickets(shown.headers()[access_header])) == 2


async def test_more_files_than_one_header_holds_are_read_in_parts(world: World) -> None:
    passes = await Tickets(world.net, world.ledger).announce(files(access.pass_files_max + 1), 0)
    assert [len(each.file_ids) for each in passes] == [access.pass_files_max, 1]
    assert all(len(unpack_tickets(each.headers()[access_header])) <= 64 for each in passes)


async def test_an_entry_that_may_be_on_its_way_is_tried_again_and_not_made_anew(world: World) -> None:
    tickets = Tickets(world.net, world.ledger)
    world.down = Unavailable("no answer")
    with pytest.raises(Unavailable):
        await tickets.announce(files(1), 0)
    unsent = dict(tickets._unsent)
    world.down = None
    await tickets.announce(files(1), 0)
    assert world.entries == list(unsent.values())


async def test_a_holder_that_has_not_heard_is_shown_the_proof_once(world: World) -> None:
    (shown,) = await Tickets(world.net, world.ledger).announce(files(60), 0)
    node = world.net.roster.nodes[1]
    helped = await asyncio.gather(*(shown.helped(node, said(reason), 1) for reason in (Reason.NOT_IN_MIRROR, Reason.NOT_PUBLISHED)))
    assert helped == [True, True]
    assert world.shown == [node.name]
    assert not await shown.helped(node, said(Reason.NOT_IN_MIRROR), 3)  # the same request for the third time


async def test_a_ticket_that_is_too_old_is_replaced_once_for_all_holders(world: World) -> None:
    (shown,) = await Tickets(world.net, world.ledger).announce(files(1), 0)
    assert all(await asyncio.gather(*(shown.helped(node, said(Reason.EXPIRED), 1) for node in world.net.roster.nodes)))
    assert len(world.entries) == 2
    assert unpack_tickets(shown.headers()[access_header]) == (1,)


@pytest.mark.parametrize("reason", [Reason.REVOKED, Reason.ENDED, Reason.NEVER_GRANTED, Reason.ERASED, Reason.OTHER_READER])
async def test_a_refusal_that_nothing_changes_is_told_in_the_holders_words(world: World, reason: Reason) -> None:
    (shown,) = await Tickets(world.net, world.ledger).announce(files(1), 0)
    first, second = world.net.roster.nodes[:2]
    short = Unavailable("2 of 4 shards are needed and only 0 can be had")
    assert not await shown.helped(first, said(reason), 1)
    assert shown.explained(short) is short  # one institution's word is not enough
    assert not await shown.helped(second, said(reason), 1)
    told = shown.explained(short)
    assert isinstance(told, Refused)
    assert str(Refusal(reason).error()) in str(told)
    assert world.shown == []


async def test_a_ticket_of_an_earlier_read_that_is_refused_is_replaced_once_for_a_right_that_is_new(world: World) -> None:
    tickets = Tickets(world.net, world.ledger)
    await tickets.announce(files(1), 0)
    (shown,) = await tickets.announce(files(1), 0)
    assert all(await asyncio.gather(*(shown.helped(node, said(Reason.NEVER_GRANTED), 1) for node in world.net.roster.nodes)))
    assert len(world.entries) == 2
    assert unpack_tickets(shown.headers()[access_header]) == (1,)
    assert not await shown.helped(world.net.roster.nodes[0], said(Reason.NEVER_GRANTED), 2)
    assert len(world.entries) == 2


async def test_only_requests_of_an_admitted_read_carry_a_ticket(world: World) -> None:
    (shown,) = await Tickets(world.net, world.ledger).announce(files(1), 0)
    assert dict(world.net.shard_headers()) == {}
    admitted = Admitted(world.net, shown)
    assert admitted.shard_headers() == shown.headers()
    assert admitted.health is world.net.health
    assert admitted.roster is world.net.roster


async def test_a_new_ticket_is_shown_with_the_checkpoint_until_everybody_has_heard(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    (shown,) = await Tickets(world.net, world.ledger).announce(files(1), 0)
    assert unpack_checkpoint(shown.headers()[checkpoint_header]) == b"note"
    now[0] += access.fresh_s + 0.1
    assert set(shown.headers()) == {access_header}


async def test_each_holder_is_shown_what_the_cosigners_vouch_for_to_it_with_a_new_checkpoint(
    world: World, consortium: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, sent = [1000.0], list[Mapping[str, str]]()

    async def post(net: Net, node: Any, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> None:
        sent.append(headers)

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(Net, "_post", post)
    made, nodes = consortium(4), world.net.roster.nodes
    world.note = made.note(made.checkpoint([b"entry"]), (0, 2, 3)).to_bytes()
    rows = {nodes[number].id: bytes(range(16 * number, 16 * number + 64)) for number in (0, 2, 3)}
    world.ledger._vouchers = world.note, rows
    (shown,) = await Tickets(world.net, world.ledger).announce(files(1), 0)
    admitted = Admitted(world.net, shown)
    await admitted._post(nodes[1], "/v1/read", b"", {"More": "1"}, 1.0)
    assert sent[0].keys() == {"More", access_header, checkpoint_header, vouchers_header}
    assert unpack_vouchers(sent[0][vouchers_header]) == [row[16:32] for row in rows.values()]
    now[0] += access.fresh_s + 0.1
    await admitted._post(nodes[1], "/v1/read", b"", {}, 1.0)
    assert sent[1].keys() == {access_header}


async def test_holders_that_cosigned_are_informed_at_once_and_the_others_a_little_later(
    world: World, consortium: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    made = consortium(4)
    world.note = made.note(made.checkpoint([b"entry"]), (0, 2, 3)).to_bytes()
    (shown,) = await Tickets(world.net, world.ledger).announce(files(1), 0)
    admitted = Admitted(world.net, shown)
    assert [admitted.is_informed(node.id) for node in world.net.roster.nodes] == [True, False, True, True]
    now[0] += access.fresh_s + 0.1
    assert all(admitted.is_informed(node.id) for node in world.net.roster.nodes)
    assert all(world.net.is_informed(node.id) for node in world.net.roster.nodes)


# Before the proof is verified


class Begun:
    """Reading that begins early."""

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []
        self.ended = 0

    def begin(self, net: Net) -> None:
        self.headers.append(dict(net.shard_headers()))

    async def end(self) -> None:
        self.ended += 1


async def test_holders_may_be_asked_as_soon_as_the_ledger_answers_and_nothing_is_done_before_its_proof_holds(world: World) -> None:
    reader, early, worked = Reader(world.net, world.ledger, (), world.entries.append), Begun(), list[dict[str, str]]()

    async def work(net: Net, file_ids: frozenset[FileId]) -> None:
        assert early.ended == 0
        worked.append(dict(net.shard_headers()))

    world.forged = Refused("inclusion: entry 0 is not in the ledger that the checkpoint describes")
    with pytest.raises(Refused, match="not in the ledger"):
        await reader.read(files(2), 0, None, work, early)
    assert (len(early.headers), early.ended, worked) == (1, 1, [])
    world.forged = None
    early = Begun()
    await reader.read(files(2), 0, None, work, early)
    assert (early.headers, early.ended) == (worked, 1)


async def test_a_read_of_which_a_part_was_announced_before_does_not_begin_early(world: World) -> None:
    reader, early = Reader(world.net, world.ledger, (), world.entries.append), Begun()

    async def work(net: Net, file_ids: frozenset[FileId]) -> None: ...

    await reader.read(files(1), 0, None, work, early)
    for count in (1, 2, 60):
        await reader.read(files(count), 0, None, work, early)
    assert len(early.headers) == 1


# Emergencies


class Holders:
    """What a read does over holders who say one thing after the other; each is a reason, or None for serving."""

    def __init__(self, *answers: Reason | None) -> None:
        self.answers = list(answers)
        self.headers: list[dict[str, str]] = []

    async def __call__(self, net: Net, file_ids: frozenset[FileId]) -> None:
        self.headers.append(dict(net.shard_headers()))
        answer = self.answers.pop(0)
        if answer is None:
            return
        for node in net.roster.nodes:
            await net.helped(node, said(answer), 1)
        raise Unavailable("too few shards")


def reader(world: World, kept: list[Entry]) -> Reader:
    return Reader(world.net, world.ledger, [keys.public], kept.append)


async def test_after_a_read_that_was_refused_the_next_one_is_announced_anew(world: World) -> None:
    holders, reads = Holders(Reason.NEVER_GRANTED, None), reader(world, [])
    with pytest.raises(Refused):
        await reads.read(files(1), 0, None, holders)
    await reads.read(files(1), 0, None, holders)
    assert [unpack_tickets(header[access_header]) for header in holders.headers] == [(0,), (1,)]


@pytest.mark.parametrize("former", [[], [b"\x00" * 32], [b"\xff" * 32]])
async def test_without_a_quorum_a_marked_identity_reads_by_a_signed_reason_that_is_kept_first(world: World, former: list[bytes]) -> None:
    """Also one that is marked by a key that it had before, and one that was marked since."""
    kept: list[Entry] = []
    holders = Holders(Reason.WITHIN_REACH, None)
    world.down = Unavailable("no quorum")
    reads = Reader(world.net, world.ledger, [keys.public, *map(Key, former)], kept.append)
    assert not await reads.read(files(2), 0, "fire", holders)
    assert [header.keys() for header in holders.headers] == [{emergency_header}] * 2
    entry = unpack_emergency(holders.headers[1][emergency_header])
    assert set(kept) == {entry}  # one entry, however often it was shown
    assert isinstance(entry.body, Access)
    assert (entry.author, entry.body.file_ids, entry.body.purpose) == (keys.public, tuple(files(2)), Purpose.EMERGENCY)
    entry.verify(world.net.roster.origin)


async def test_a_ledger_that_comes_back_meanwhile_is_used(world: World) -> None:
    class Back(Holders):
        async def __call__(self, net: Net, file_ids: frozenset[FileId]) -> None:
            world.down = None
            await super().__call__(net, file_ids)

    holders = Back(Reason.WITHIN_REACH, None)
    world.down = Unavailable("no quorum")
    assert await reader(world, []).read(files(1), Purpose.TREATMENT, "fire", holders)
    assert [list(header) for header in holders.headers] == [[emergency_header], [access_header, checkpoint_header]]


async def test_without_a_reason_there_is_no_emergency_and_the_way_is_named(world: World) -> None:
    world.down = Unavailable("the ledger has no quorum", hint="Down are a, b: start them.")
    with pytest.raises(Unavailable, match="no quorum") as caught:
        await reader(world, []).read(files(1), 0, None, Holders())
    assert "--break-glass" in caught.value.hint
    assert "Down are a, b" in caught.value.hint


async def test_an_identity_that_is_not_marked_is_not_sent_there(world: World) -> None:
    from dataclasses import replace

    world.net.roster = replace(world.net.roster, emergency=())
    world.down = Unavailable("the ledger has no quorum")
    with pytest.raises(Unavailable) as caught:
        await reader(world, []).read(files(1), 0, "fire", Holders())
    assert "not marked for emergencies" in caught.value.hint
    assert "--break-glass" not in caught.value.hint


@pytest.mark.parametrize("reason", ["x", "€" * 133])
async def test_an_emergency_with_many_files_is_as_many_entries_as_it_needs(world: World, reason: str) -> None:
    kept: list[Entry] = []
    world.down = Unavailable("no quorum")
    holders = Holders(*[None] * 20)
    await reader(world, kept).read(files(100), 0, reason, holders)
    assert all(len(entry.to_bytes()) <= entry_bytes_max for entry in kept)
    listed = [file_id for entry in kept if isinstance(entry.body, Access) for file_id in entry.body.file_ids]
    assert listed == files(100)
    assert len(kept) == len(holders.headers)


# The quorum


async def test_who_is_down_is_said_as_soon_as_there_is_no_hope(consortium: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(consortium(4).roster, {})
    monkeypatch.setattr(quorum, "look_after_s", 0.01)

    async def call(node: Any, method: str, path: str, **_: Any) -> bytes:
        if node.name in ("node2", "node3"):
            raise Unavailable(f"{node.name}: cannot connect")
        return b""

    monkeypatch.setattr(net, "call", call)
    with pytest.raises(Unavailable, match="2 of 4 institutions answer, 3 are needed") as caught:
        await quorum.waiting_for_the_ledger(net, asyncio.sleep(60, result=None))
    assert "Down are node2, node3" in caught.value.hint


async def test_a_slow_ledger_with_a_quorum_is_waited_for(consortium: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(consortium(4).roster, {})
    monkeypatch.setattr(quorum, "look_after_s", 0.01)

    async def call(node: Any, method: str, path: str, **_: Any) -> bytes:
        return b""

    monkeypatch.setattr(net, "call", call)
    assert await quorum.waiting_for_the_ledger(net, asyncio.sleep(0.1, result="there")) == "there"


async def test_what_the_ledger_refuses_is_not_taken_for_an_outage(consortium: Callable[..., Any]) -> None:
    async def refuse() -> None:
        raise Refused("the grant was revoked")

    with pytest.raises(MedshardError, match="revoked"):
        await quorum.waiting_for_the_ledger(Net(consortium(4).roster, {}), refuse())
