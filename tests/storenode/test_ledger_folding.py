"""A node's state over its life: restarts, crashes, a lost or foreign file, entries that are dropped, a roster that is not at hand."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace

import pytest

from medshard_protocol import merkle
from medshard_protocol.entries import Approve, Enrol, Entry, Genesis, Register
from medshard_protocol.identity import public_key
from medshard_protocol.merkle import sha256
from medshard_protocol.state import State
from storenode.ledger.engine import Head
from storenode.ledger.folding import tables_name
from storenode.ledger.journal import Journal
from storenode.ledger.store import Store

nonce = bytes(16)


class Mirror:
    """A journal that is fed by hand, and can be stopped and started."""

    def __init__(self, c, folder):
        self.c, self.folder, self.journal = c, folder, Journal(folder, c.roster)

    async def start(self):
        await self.journal.start()
        return self

    async def store(self, *entries, at=None):
        datas = [entry if isinstance(entry, bytes) else entry.to_bytes() for entry in entries]
        frontier = self.journal.frontier() if at is None else self.journal.frontier_at(at)
        leaves = [merkle.leaf_hash(data, sha256) for data in datas]
        for leaf in leaves:
            frontier.append(leaf)
        head = Head(frontier.size, frontier.root(), b"note")
        if at is None:
            await self.journal.extend(datas, leaves, head)
        else:
            await self.journal.replace(at, datas, leaves, head)

    async def restart(self, *, crash=False):
        if crash:
            self.journal.store.remember = lambda *_: None
        await self.journal.close()
        self.journal = Journal(self.folder, self.c.roster)
        await self.journal.start()

    def register(self, number, author="vault"):
        return self.c.entry(author, Register(bytes([number]) * 32, b"m" * 32, bytes([number]) * 16))

    def fresh(self):
        """The same entries, folded from zero by themselves."""
        state = State(self.c.roster, None, self.journal.folding.documents)
        for data in self.journal.entries(0, self.journal.head.size):
            try:
                entry = Entry.from_bytes(data)
                entry.verify(self.c.roster.origin)
            except Exception:
                entry = None
            state.apply(entry)
        return state


@pytest.fixture
async def mirror(consortium, tmp_path):
    c = consortium(4)
    made = await Mirror(c, tmp_path / "data").start()
    await made.store(c.entry("log", Genesis(c.roster.sha256, nonce)), c.entry("ca 1", Enrol(public_key(c.key("vault")), 0, nonce)))
    await made.store(*(made.register(number) for number in range(1, 9)))
    assert made.journal.state.size == 10
    yield made
    await made.journal.close()


def counting(monkeypatch, of, name):
    calls, real = [], getattr(of, name)
    monkeypatch.setattr(of, name, lambda self, *rest: (calls.append(rest), real(self, *rest))[1])
    return calls


async def test_after_a_restart_nothing_is_folded_again(mirror, monkeypatch):
    state = mirror.journal.state
    before = state.rows()
    folded = counting(monkeypatch, State, "apply")
    await mirror.restart()
    assert mirror.journal.state.rows() == before
    assert folded == []
    await mirror.store(mirror.register(20))
    assert mirror.journal.state == mirror.fresh()


async def test_without_its_file_the_state_is_made_anew_and_no_signature_checked_again(mirror, monkeypatch):
    before = mirror.journal.state.rows()
    await mirror.journal.close()
    (mirror.folder / tables_name).unlink()
    checked = counting(monkeypatch, Entry, "verify")
    mirror.journal = Journal(mirror.folder, mirror.c.roster)
    await mirror.journal.start()
    assert mirror.journal.state.rows() == before
    assert checked == []


async def test_a_start_folds_piece_by_piece_whoever_asks_what_is_published(mirror, monkeypatch):
    """To check a checkpoint takes its roster, and with it all entries before: a million of them at once were a gigabyte."""
    await mirror.journal.close()
    (mirror.folder / tables_name).unlink()
    monkeypatch.setattr("storenode.ledger.folding.replay_entries_max", 3)
    store = Store(mirror.folder, mirror.c.roster.origin, bytes(32))
    note = mirror.c.note(mirror.c.checkpoint(store.entries(0, 10)), (0, 1, 2)).to_bytes()
    store.remember(10, (), note)
    store.close()
    mirror.journal = Journal(mirror.folder, mirror.c.roster)
    starting = asyncio.create_task(mirror.journal.start())
    seen = set()
    while not starting.done():
        assert mirror.journal.published is None
        seen.add(mirror.journal.folded.size)
        await asyncio.sleep(0)
    await starting
    assert {3, 6, 9} <= seen
    assert mirror.journal.published.checkpoint.size == 10


async def test_a_state_that_is_ahead_of_a_restored_ledger_is_made_anew(mirror):
    await mirror.journal.close()
    backup = mirror.folder.with_name("backup")
    shutil.copytree(mirror.folder, backup)
    mirror.journal = Journal(mirror.folder, mirror.c.roster)
    await mirror.journal.start()
    await mirror.store(mirror.register(20), mirror.register(21))
    assert mirror.journal.state.size == 12
    await mirror.journal.close()
    for path in backup.glob("ledger.sqlite*"):
        shutil.copy(path, mirror.folder / path.name)
    mirror.journal = Journal(mirror.folder, mirror.c.roster)
    await mirror.journal.start()
    assert mirror.journal.state.size == 10
    assert mirror.journal.state == mirror.fresh()


async def test_a_state_of_another_history_of_the_same_size_is_made_anew(mirror, tmp_path, consortium):
    other = await Mirror(consortium(4), tmp_path / "other").start()
    c = other.c
    await other.store(c.entry("log", Genesis(c.roster.sha256, nonce)), c.entry("ca 2", Enrol(public_key(c.key("vault")), 0, nonce)))
    await other.store(*(other.register(number) for number in range(31, 39)))
    assert other.journal.state.size == 10
    await other.journal.close()
    await mirror.journal.close()
    for path in other.folder.glob(tables_name + "*"):
        shutil.copy(path, mirror.folder / path.name)
    mirror.journal = Journal(mirror.folder, mirror.c.roster)
    await mirror.journal.start()
    assert mirror.journal.state == mirror.fresh()


async def test_what_nobody_signed_stays_so_after_a_crash_and_without_the_file(mirror):
    """The file knows it before the ledger's own note of it is written; neither order may turn a forgery into an entry."""
    forged = replace(mirror.register(40), signature=bytes(64))
    await mirror.store(forged, b"nonsense", mirror.register(41))
    assert mirror.journal.state.registration(b"\x28" * 32) is None
    await mirror.restart(crash=True)
    await mirror.store(mirror.register(42))
    assert mirror.journal.state.size == 14
    await mirror.restart()
    await mirror.journal.close()
    (mirror.folder / tables_name).unlink()
    mirror.journal = Journal(mirror.folder, mirror.c.roster)
    await mirror.journal.start()
    state = mirror.journal.state
    assert state.unsigned(0) == [10, 11]
    assert state.registration(b"\x28" * 32) is None
    assert state == mirror.fresh()


async def test_entries_that_are_dropped_are_forgotten_whether_or_not_they_were_saved(mirror):
    for saved in (False, True):
        await mirror.store(mirror.register(50), replace(mirror.register(51), signature=bytes(64)), mirror.register(52))
        assert mirror.journal.state.size == 13
        if saved:
            await mirror.restart()
        await mirror.store(mirror.register(60), mirror.register(61), at=10)
        assert mirror.journal.state.registration(b"\x32" * 32) is None
        assert mirror.journal.state.registration(b"\x3d" * 32).index == 11
        assert mirror.journal.state.unsigned(0) == []
        assert mirror.journal.state == mirror.fresh()
        await mirror.store(at=10)
    await mirror.restart()
    assert mirror.journal.state == mirror.fresh()


async def test_what_is_published_is_saved_without_a_way_back_and_the_rest_with_one(mirror, monkeypatch):
    mirror.journal.folding.state.settle(10)
    await mirror.store(mirror.register(50), mirror.register(51))
    assert mirror.journal.state.size == 12
    folded = counting(monkeypatch, State, "apply")
    await mirror.store(mirror.register(60), at=11)
    assert mirror.journal.state == mirror.fresh()
    assert len(folded) == 1 + 12  # one entry here, and all of them in the comparison


async def test_the_fold_waits_for_a_roster_and_goes_on_when_it_comes(mirror):
    c, documents = mirror.c, {}
    new = replace(c.roster, number=1, previous=c.roster.sha256, emergency=(public_key(c.key("vault")),))
    mirror.journal.folding.documents = documents.get
    await mirror.store(*(c.entry(f"ca {number}", Approve(new.sha256, nonce)) for number in (0, 1, 2)), mirror.register(70))
    assert mirror.journal.state.size == 12
    assert mirror.journal.folding.missing == new.sha256
    await mirror.journal.keep_up()
    await mirror.restart()
    mirror.journal.folding.documents = documents.get
    assert mirror.journal.state.size == 12
    documents[new.sha256] = new
    assert mirror.journal.state.size == 14
    assert mirror.journal.folding.missing is None
    assert mirror.journal.state.roster == new
    assert mirror.journal.state == mirror.fresh()
    await mirror.restart()  # what was decided needs no document any more
    assert mirror.journal.state.roster == new
