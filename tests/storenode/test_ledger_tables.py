"""The fold's tables in SQLite do what tables in memory do, over restarts, failed saves and going back."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from medshard_protocol.entries import Access, Enrol, Erase, Genesis, Grant, Hold, Register, Release, Revoke, Withdraw
from medshard_protocol.errors import Damaged, Unavailable
from medshard_protocol.identity import public_key
from medshard_protocol.state import State
from medshard_protocol.tables import MemoryTables, Table
from storenode.ledger import tables as module
from storenode.ledger.tables import SqliteTables

nonce = bytes(16)


def save(tables, size=0, root=b""):
    tables.begin_save()
    tables.write(size, root)
    tables.end_save(written=True)


keys = st.binary(min_size=1, max_size=3)
rows = st.none() | st.tuples(st.integers(0, 9) | st.binary(max_size=3) | st.none() | st.tuples(st.binary(max_size=2)))
some = st.sampled_from([Table.META, Table.FILES, Table.UNDO])


class Same(RuleBasedStateMachine):
    """Whatever is put, saved, lost and cleared: the same as in memory."""

    def __init__(self):
        super().__init__()
        import tempfile
        from pathlib import Path

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "state.sqlite"
        self.tables, self.memory, self.saved = SqliteTables(self.path), MemoryTables(), MemoryTables()
        self.saving = None

    def copy(self):
        made = MemoryTables()
        for table in Table:
            for key, row in self.memory.scan(table, b"", b"\xff" * 9):
                made.put(table, key, row)
        return made

    @rule(table=some, key=keys, row=rows)
    def put(self, table, key, row):
        self.tables.put(table, key, row)
        self.memory.put(table, key, row)

    @rule()
    def clear(self):
        self.tables.clear()
        self.memory.clear()

    @rule()
    def begin(self):
        if self.saving is None:
            self.saving = self.copy()
            self.tables.begin_save()

    @rule(worked=st.booleans())
    def end(self, worked):
        if self.saving is not None:
            if worked:
                self.tables.write(1, b"")
                self.saved = self.saving
            self.tables.end_save(written=worked)
            self.saving = None

    @rule()
    def restart(self):
        self.tables.close()
        self.tables, self.saving = SqliteTables(self.path), None
        self.memory = self.saved
        self.saved = self.copy()

    @rule(table=some, key=keys, end=keys, most=st.integers(1, 5))
    def look(self, table, key, end, most):
        assert self.tables.get(table, key) == self.memory.get(table, key)
        assert self.tables.scan(table, key, end, most) == self.memory.scan(table, key, end, most)

    @invariant()
    def same(self):
        for table in (Table.META, Table.FILES, Table.UNDO):
            assert self.tables.scan(table, b"", b"\xff" * 9) == self.memory.scan(table, b"", b"\xff" * 9)

    def teardown(self):
        self.tables.close()
        self.folder.cleanup()


TestSame = Same.TestCase
TestSame.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def random_log(c, seed, count):
    """A log of every kind of entry, most with effect."""
    draw, log = random.Random(seed), [c.entry("log", Genesis(c.roster.sha256, nonce))]
    vaults, files, grants, holds = ["a", "b", "c"], [], [], []
    log += [c.entry(f"ca {n}", Enrol(public_key(c.key(who)), 0, nonce)) for n, who in enumerate(vaults)]
    for number in range(count):
        n = number.to_bytes(16, "big")
        who, file_id = draw.choice(vaults), draw.choice(files) if files else bytes(32)
        body = draw.choice(
            [
                Register(draw.randbytes(32), draw.randbytes(32), n),
                Register(draw.randbytes(32), draw.randbytes(32), n),
                Access((file_id,), 1, b"", n),
                Grant((file_id,), public_key(c.key(draw.choice(vaults))), 0, 1, n),
                Revoke(draw.choice(grants), n) if grants else Access((file_id,), 1, b"", n),
                Hold(file_id, n),
                Release(draw.choice(holds), n) if holds else Access((file_id,), 1, b"", n),
                Erase(file_id, 5, n),
                Withdraw(draw.randbytes(32), n),
            ]
        )
        entry = c.entry(who, body)
        log.append(None if draw.random() < 0.02 else entry)
        if isinstance(body, Register):
            files.append(body.file_id)
        if isinstance(body, Grant):
            grants.append(entry.id)
        if isinstance(body, Hold):
            holds.append(entry.id)
    return log


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_folding_in_memory_and_in_sqlite_with_restarts_and_from_zero_gives_the_same_state(consortium, tmp_path_factory, seed):
    c, draw = consortium(4), random.Random(seed)
    log, path = random_log(c, seed, 120), tmp_path_factory.mktemp("state") / "state.sqlite"
    memory = State(c.roster)
    for entry in log:
        memory.apply(entry)
    tables = SqliteTables(path)
    state = State(c.roster, tables)
    state.settle(0)
    while state.size < len(log):
        for entry in log[state.size : state.size + draw.randrange(30)]:
            state.apply(entry)
        if draw.random() < 0.5:
            save(tables)
        if draw.random() < 0.3:
            state.rewind(draw.randrange(state.size + 1))
        if draw.random() < 0.3:  # a crash: what was not saved is gone
            tables.close()
            tables = SqliteTables(path)
            state = State(c.roster, tables)
            state.settle(0)
    assert state == memory
    save(tables)
    tables.close()
    path.unlink()
    tables = SqliteTables(path)
    again = State(c.roster, tables)
    for entry in log:
        again.apply(entry)
    assert again == memory
    tables.close()


@pytest.mark.parametrize("data", [b"not a database at all" * 100, b""])
def test_a_file_that_is_no_database_is_made_anew(tmp_path, data):
    path = tmp_path / "state.sqlite"
    path.write_bytes(data)
    tables = SqliteTables(path)
    tables.put(Table.META, b"k", (1,))
    save(tables)
    tables.close()
    tables = SqliteTables(path)
    assert tables.get(Table.META, b"k") == (1,)
    tables.close()


def test_a_file_of_another_format_is_made_anew(tmp_path, monkeypatch):
    path = tmp_path / "state.sqlite"
    tables = SqliteTables(path)
    tables.put(Table.META, b"k", (1,))
    save(tables, 7, b"root")
    assert tables.root() == (7, b"root")
    tables.close()
    monkeypatch.setattr(module, "format_version", 999)
    tables = SqliteTables(path)
    assert tables.get(Table.META, b"k") is None
    assert tables.root() == (0, b"")
    tables.close()


def test_a_flipped_bit_is_found_and_the_next_start_makes_the_tables_anew(tmp_path):
    path = tmp_path / "state.sqlite"
    tables = SqliteTables(path)
    tables.put(Table.META, b"key", (b"a value to be found in the file",))
    save(tables)
    tables.close()
    data = path.read_bytes()
    at = data.index(b"a value to be found")
    path.write_bytes(data[:at] + b"A" + data[at + 1 :])
    for ask in (lambda t: t.get(Table.META, b"key"), lambda t: t.scan(Table.META, b"", b"\xff")):
        path.write_bytes(data[:at] + b"A" + data[at + 1 :])
        tables = SqliteTables(path)
        with pytest.raises(Damaged):
            ask(tables)
        tables.close()
        tables = SqliteTables(path)
        assert tables.get(Table.META, b"key") is None
        tables.close()


def test_a_save_that_fails_loses_nothing(tmp_path):
    tables = SqliteTables(tmp_path / "state.sqlite")
    tables.put(Table.META, b"k", (1,))
    tables._writer.execute("PRAGMA query_only = 1")
    tables.begin_save()
    tables.put(Table.META, b"l", (2,))
    with pytest.raises(Unavailable):
        tables.write(1, b"")
    tables.end_save(written=False)
    tables._writer.execute("PRAGMA query_only = 0")
    assert (tables.get(Table.META, b"k"), tables.get(Table.META, b"l")) == ((1,), (2,))
    save(tables)
    tables.close()
