"""Whom a sequencer asks first for a cosignature, who gets an entry a moment later, and what happens when one of the first stands still."""

from __future__ import annotations

import asyncio
import os

import pytest
from tests.storenode.conftest import Net

from medshard_protocol.checkpoint import Note, cosigned_times
from medshard_protocol.entries import Access, Enrol
from medshard_protocol.identity import public_key
from storenode.ledger import pushing, wire

pytestmark = pytest.mark.filterwarnings("ignore::aiohttp.web.NotAppKeyWarning")


@pytest.fixture
async def net(consortium, tmp_path):
    """Seven institutions: a quorum is five, so that four mirrors and one to spare are asked first, and one is left."""
    made = Net(consortium(7), tmp_path)
    try:
        await made.start(*range(7))
        await made.enrol()
        await made.until(lambda: all(made.published(number) == 2 for number in range(7)))
        yield made
    finally:
        await made.close()


def be_patient(monkeypatch):
    """A busy machine is no reason to push to everybody."""
    monkeypatch.setattr(pushing, "patience_s", 60.0)
    monkeypatch.setattr(pushing, "patience_most_s", 60.0)


def asked(net, since):
    """Who was pushed entries, in order."""
    return [number for number, push in net.pushes[since:] if push.entries]


async def append(net, entry=None):
    """Append one entry, an ACCESS by default; who cosigned it."""
    body = Access((bytes(32),), 1, b"", os.urandom(16))
    (inclusion,) = await net.ledgers[0].append([entry or net.consortium.entry("vault", body)])
    names = cosigned_times(Note.from_bytes(inclusion.checkpoint), net.roster)
    return {net.number(node) for node in names}


async def test_an_entry_goes_to_a_quorum_and_one_to_spare_and_to_the_others_a_moment_later(net, monkeypatch):
    be_patient(monkeypatch)
    monkeypatch.setattr(pushing, "tell_after_s", 0.5)
    since = len(net.pushes)
    assert len(await append(net)) == 5
    assert len(asked(net, since)) == 5
    await net.until(lambda: all(net.ledgers[number].journal.head.size == 3 for number in range(7)))
    assert sorted(asked(net, since)) == [1, 2, 3, 4, 5, 6]
    await net.until(lambda: all(net.published(number) == 3 for number in range(7)))


async def test_a_registered_file_is_everywhere_as_soon_as_it_is_published(net, monkeypatch):
    be_patient(monkeypatch)
    monkeypatch.setattr(pushing, "tell_after_s", 60.0)
    await append(net, net.register())
    await net.until(lambda: all(net.ledgers[number].journal.head.size == 3 for number in range(7)))


async def test_any_other_entry_goes_to_everybody_at_once_and_so_does_the_news(net, monkeypatch):
    be_patient(monkeypatch)
    monkeypatch.setattr(pushing, "tell_after_s", 60.0)
    enrol = Enrol(public_key(net.consortium.key("other")), 0, b"\x01" * 16)
    await append(net, net.consortium.entry("ca 0", enrol))
    await net.until(lambda: all(net.published(number) == 3 for number in range(7)))


async def test_the_mirrors_take_turns_to_be_left_out(net, monkeypatch):
    be_patient(monkeypatch)
    monkeypatch.setattr(pushing, "quick_s", 60.0)
    left_out = []
    for _ in range(8):
        since, size = len(net.pushes), net.ledgers[0].journal.head.size
        await append(net)
        left_out += {1, 2, 3, 4, 5, 6} - set(asked(net, since)[:5])
        await net.until(lambda size=size: all(net.ledgers[number].journal.head.size > size for number in range(7)))
    assert set(left_out) == {1, 2, 3, 4, 5, 6}


async def test_one_that_stands_still_costs_no_time_and_two_cost_the_sequencers_patience(net, monkeypatch):
    monkeypatch.setattr(pushing, "tell_after_s", 60.0)
    monkeypatch.setattr(pushing, "push_timeout_s", 100.0)
    async with asyncio.timeout(50):  # nobody waits for a time-out
        net.frozen.add(1)
        for _ in range(6):
            assert 1 not in await append(net)
        net.frozen.add(2)
        for _ in range(6):
            assert not {1, 2} & await append(net)


async def test_where_one_of_the_first_refuses_the_others_are_asked_at_once(net, monkeypatch):
    be_patient(monkeypatch)
    monkeypatch.setattr(pushing, "tell_after_s", 60.0)
    for number in (1, 2):
        net.ledgers[number].mirror.withhold = lambda: "not today"
    async with asyncio.timeout(60):
        for _ in range(4):
            assert not {1, 2} & await append(net)


async def test_a_mirror_that_says_so_gets_the_newest_entries_at_once(net, monkeypatch):
    be_patient(monkeypatch)
    monkeypatch.setattr(pushing, "tell_after_s", 60.0)
    await append(net)
    await net.until(lambda: sum(net.ledgers[number].journal.head.size == 3 for number in range(7)) == 6)
    (late,) = (number for number in range(1, 7) if net.ledgers[number].journal.head.size == 2)
    net.ledgers[late].hurry()
    net.ledgers[late].hurry()  # on its way: not asked twice
    await net.until(lambda: net.ledgers[late].journal.head.size == 3)
    assert (await net.request(0, "POST", wire.hurry_path, as_node=late))[0] == 204
    assert (await net.request(3, "POST", wire.hurry_path, as_node=late))[0] == 204  # orders none, and does nothing
    assert (await net.request(0, "POST", wire.hurry_path))[0] == 403


async def test_what_is_stored_without_a_quorum_goes_to_everybody_in_the_end(net, monkeypatch):
    monkeypatch.setattr(pushing, "tell_after_s", 60.0)
    for number in (1, 2, 3):
        net.frozen.add(number)
    appending = asyncio.create_task(append(net))
    await net.until(lambda: all(net.ledgers[number].journal.head.size == 3 for number in (0, 4, 5, 6)))
    assert not appending.done()
    net.thaw()
    assert len(await appending) == 5
