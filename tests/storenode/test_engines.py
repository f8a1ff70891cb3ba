"""What every engine of the ledger does: one suite, on SQLite and on a real PostgreSQL server that the tests start."""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.postgres import Server, as_postgres, new_server, running_server, tool

from medshard_protocol.errors import Conflict, Damaged, MedshardError, Unavailable
from medshard_protocol.tiles import FullTile
from storenode.ledger.engine import Engine, Head, Standing, name_of, open_engine

pytestmark = pytest.mark.filterwarnings("ignore::aiohttp.web.NotAppKeyWarning")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as made:
        yield made


@pytest.fixture(autouse=True)
def server_up(request: pytest.FixtureRequest) -> None:
    """A test that failed may have left the server dead."""
    if "server" in request.fixturenames and (server := request.getfixturevalue("server")).process is None:
        server.start()


@pytest.fixture(params=["sqlite", "postgresql", "postgresql, awaited"])
def dsn(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return "sqlite"
    server = request.getfixturevalue("server")
    database = f"db{time.monotonic_ns()}"
    server.sql(f"CREATE DATABASE {database}")
    return str(server.dsn(database))


@pytest.fixture
def opened(request: pytest.FixtureRequest, dsn: str, tmp_path: Path) -> Iterator[Callable[[], Engine]]:
    """Open the engine, and again; all are closed at the end."""
    engines: list[Engine] = []
    awaited = "awaited" in request.node.callspec.id

    def make(origin: str = "origin") -> Engine:
        engine = open_engine(dsn, tmp_path, origin, bytes(32))
        engines.append(Awaited(engine) if awaited else engine)
        return engines[-1]

    yield make
    for engine in engines:
        try:
            engine.close()
        except Exception as error:  # a test closed it already
            assert "closed" in str(error).lower() or isinstance(error, OSError), error  # noqa: PT017


@pytest.fixture
def engine(opened: Callable[[], Engine]) -> Engine:
    return opened()


def head(size: int, accepted: int = 0) -> Head:
    return Head(size, bytes([size % 256]) * 32, b"note", accepted)


def name(of: bytes) -> bytes:
    return of * 48


class Awaited:
    """A remote engine by way of an event loop, as far as that goes."""

    def __init__(self, engine: Engine) -> None:
        assert engine.remote is not None
        self._engine = engine
        self._awaited = engine.remote
        self._runner = asyncio.Runner()
        self._turn = threading.Lock()

    def extend(self, *what: object, own: bool) -> None:
        with self._turn:
            self._runner.run(self._awaited.extend(*what, own=own))

    def find(self, names: list[bytes]) -> dict[bytes, int]:
        with self._turn:
            return self._runner.run(self._awaited.find(names))

    def close(self) -> None:
        async def close() -> None:
            self._engine.close()

        self._runner.run(close())
        self._runner.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)


# -- the suite


def test_a_new_ledger_is_empty(engine: Engine) -> None:
    assert engine.head() == Head(0, bytes(32), b"", 0)
    assert engine.standing() == Standing(0, b"", b"")
    assert engine.entries(0, 0) == []
    assert (engine.memory().checked, engine.memory().unsigned, engine.memory().published) == (0, frozenset(), b"")


def test_what_is_appended_is_read_again_after_a_restart(opened: Callable[[], Engine], dsn: str) -> None:
    engine = opened()
    tile = FullTile(0, 0, bytes(8192))
    engine.extend(0, 0, [b"a", b"b"], [tile], head(2, 7), [name(b"A"), name(b"B")], own=True)
    engine.remember(2, [1], b"published")
    engine.close()
    again = opened()
    assert again.head() == head(2, 7)
    assert (again.entries(0, 2), again.entries(1, 2), again.tile(0, 0)) == ([b"a", b"b"], [b"b"], bytes(8192))
    assert again.find([name(b"B"), name(b"C")]) == {name(b"B"): 1}
    assert (again.memory().checked, again.memory().unsigned, again.memory().published) == (2, frozenset({1}), b"published")


@pytest.mark.parametrize(("epoch", "old_size"), [(0, 0), (0, 1), (0, 3), (1, 2)])
def test_an_append_of_another_epoch_or_size_changes_nothing(engine: Engine, epoch: int, old_size: int) -> None:
    engine.extend(0, 0, [b"a", b"b"], [], head(2), [name(b"A"), name(b"B")], own=True)
    with pytest.raises(Conflict):
        engine.extend(epoch, old_size, [b"c"], [], head(old_size + 1), [name(b"C")], own=True)
    assert (engine.head(), engine.entries(0, 2), engine.find([name(b"C")])) == (head(2), [b"a", b"b"], {})


def test_an_own_entry_whose_author_used_the_nonce_before_is_a_conflict_and_nothing_of_the_batch_stays(engine: Engine) -> None:
    engine.extend(0, 0, [b"a"], [], head(1), [name(b"A")], own=True)
    for batch in ([b"b", b"a"], [b"c", b"c"]):
        with pytest.raises(Conflict, match="nonce"):
            engine.extend(0, 1, batch, [], head(3), [name(item.upper()) for item in batch], own=True)
    assert (engine.head(), engine.find([name(b"B")])) == (head(1), {})


def test_of_foreign_entries_with_one_name_the_first_is_found(engine: Engine) -> None:
    engine.extend(0, 0, [b"a", b"b", b"a", b""], [], head(4), [name(b"A"), name(b"B"), name(b"A"), b""], own=False)
    engine.extend(0, 4, [b"b"], [], head(5), [name(b"B")], own=False)
    assert engine.find([name(b"A"), name(b"B")]) == {name(b"A"): 0, name(b"B"): 1}
    assert engine.entries(0, 5) == [b"a", b"b", b"a", b"", b"b"]


def test_several_threads_look_for_entries_at_once(engine: Engine) -> None:
    engine.extend(0, 0, [b"a", b"b"], [], head(2), [name(b"A"), name(b"B")], own=True)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: engine.find([name(b"B")]), range(200)))
    assert found == [{name(b"B"): 1}] * 200


def test_a_promise_goes_only_forward_and_to_one_node(opened: Callable[[], Engine], dsn: str) -> None:
    engine = opened()
    engine.promise(3, b"x" * 16)
    engine.promise(3, b"x" * 16)
    for epoch, leader in ((2, b"x"), (3, b"y"), (0, b"x")):
        with pytest.raises(Conflict):
            engine.promise(epoch, leader * 16)
    engine.lose(b"k" * 32)
    engine.close()
    assert opened().standing() == Standing(3, b"x" * 16, b"k" * 32)


def test_a_promise_fences_the_epoch_before(engine: Engine) -> None:
    engine.promise(1, b"x" * 16)
    engine.extend(1, 0, [b"a"], [], head(1), [name(b"A")], own=True)
    engine.promise(2, b"y" * 16)
    with pytest.raises(Conflict):
        engine.extend(1, 1, [b"b"], [], head(2), [name(b"B")], own=True)
    engine.extend(2, 1, [b"b"], [], head(2), [name(b"B")], own=True)


def test_a_rewind_drops_entries_tiles_and_names_and_appends_in_one_step(engine: Engine) -> None:
    entries = [b"%d" % number for number in range(600)]
    names = [name_of(b"") or entry.rjust(48) for entry in entries]
    tiles = [FullTile(0, 0, b"0" * 8192), FullTile(0, 1, b"1" * 8192)]
    engine.extend(0, 0, entries, tiles, head(600), names, own=True)
    engine.remember(600, [3, 599], b"p")
    for epoch, old_size in ((1, 600), (0, 599)):
        with pytest.raises(Conflict):
            engine.rewind(epoch, old_size, 300, [b"x"], [], head(301), [b"x" * 48])
    assert engine.head() == head(600)
    engine.rewind(0, 600, 300, [b"x"] * 220, [FullTile(0, 1, b"2" * 8192)], head(520), [b"x" * 48] + [b""] * 219)
    assert (engine.head(), engine.entries(299, 302)) == (head(520), [b"299", b"x", b"x"])
    assert (engine.tile(0, 0), engine.tile(0, 1)) == (b"0" * 8192, b"2" * 8192)
    assert engine.find([names[299], names[300], b"x" * 48]) == {names[299]: 299, b"x" * 48: 300}
    assert (engine.memory().checked, engine.memory().unsigned) == (300, frozenset({3}))
    with pytest.raises(Damaged):
        engine.entries(519, 521)


def test_what_is_missing_is_damage(engine: Engine) -> None:
    engine.extend(0, 0, [b"a"], [], head(1), [b""], own=True)
    with pytest.raises(Damaged):
        engine.entries(0, 2)
    with pytest.raises(Damaged):
        engine.tile(0, 0)


def test_a_ledger_of_another_log_is_not_opened(opened: Callable[..., Engine]) -> None:
    opened().close()
    with pytest.raises(Damaged, match="other"):
        opened("other")


def test_only_one_process_writes(opened: Callable[[], Engine], dsn: str) -> None:
    """On one machine the second is turned away; in a database that two machines reach, the last to come is the one that is alive."""
    first = opened()
    if dsn == "sqlite":
        with pytest.raises(Unavailable, match="another process"):
            opened()
        return
    second = opened()
    with pytest.raises(Conflict):
        first.extend(0, 0, [b"a"], [], head(1), [name(b"A")], own=True)
    with pytest.raises(Conflict):
        first.promise(1, b"x" * 16)
    first.lose(b"k")
    assert second.standing().lost == b""
    second.extend(0, 0, [b"b"], [], head(1), [name(b"B")], own=True)


# -- PostgreSQL's own


def test_a_server_that_is_killed_has_what_was_acknowledged_and_the_engine_goes_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storenode.ledger.postgres.outage_s", 60.0)  # recovery on a busy machine
    server.sql("CREATE DATABASE crash")
    engine = open_engine(server.dsn("crash"), Path(), "origin", bytes(32))
    with ThreadPoolExecutor(1) as aside:
        for round_ in range(3):
            aside.submit(lambda: (time.sleep(0.05), server.kill(), server.start()))
            for number in range(round_ * 100, round_ * 100 + 100):
                engine.extend(0, number, [b"%d" % number], [], head(number + 1), [b"%048d" % number], own=True)
    assert engine.head() == head(300)
    assert engine.entries(0, 300) == [b"%d" % number for number in range(300)]
    engine.close()


def test_a_server_that_is_away_is_said_so_within_seconds(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storenode.ledger.postgres.outage_s", 0.3)
    server.sql("CREATE DATABASE away")
    engine = open_engine(server.dsn("away"), Path(), "origin", bytes(32))
    server.kill()
    for act in (engine.head, lambda: engine.entries(0, 1), lambda: engine.extend(0, 0, [b"a"], [], head(1), [b""], own=True)):
        began = time.monotonic()
        with pytest.raises(Unavailable):
            act()
        assert time.monotonic() - began < 10
    server.start()
    engine.extend(0, 0, [b"a"], [], head(1), [b""], own=True)
    engine.close()


def test_a_promoted_standby_has_every_acknowledged_entry(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Synchronous replication: the primary is killed during appends, the standby promoted, and the engine finds it by itself."""
    monkeypatch.setattr("storenode.ledger.postgres.outage_s", 60.0)
    server.sql("CREATE DATABASE replicated")
    standby = new_server()
    standby.port = server.port + 1
    try:
        copy = [tool("pg_basebackup"), "-h", str(server.folder), "-p", str(server.port), "-U", "medshard", "-D", str(standby.data), "-R"]
        as_postgres(subprocess.run, [*copy, "-X", "stream", "-c", "fast", "--no-sync"], check=True, capture_output=True)
        auto = standby.data / "postgresql.auto.conf"
        auto.write_text(auto.read_text().replace("primary_conninfo = '", "primary_conninfo = 'application_name=second "))
        standby.start()
        server.sql("ALTER SYSTEM SET synchronous_standby_names = 'second'")
        server.sql("SELECT pg_reload_conf()")
        hosts = f"host={server.folder},{standby.folder}&port={server.port},{standby.port}"
        engine = open_engine(f"postgresql://medshard@/replicated?{hosts}", Path(), "origin", bytes(32))
        with ThreadPoolExecutor(1) as aside:
            aside.submit(lambda: (time.sleep(0.1), server.kill(), standby.sql("SELECT pg_promote()")))
            for number in range(300):
                engine.extend(0, number, [b"%d" % number], [], head(number + 1), [b"%048d" % number], own=True)
        assert server.process is None
        assert engine.entries(0, 300) == [b"%d" % number for number in range(300)]
        assert standby.sql("SELECT count(*) FROM medshard_entry", "replicated") == "300"
        engine.close()
    finally:
        standby.remove()
        server.start("-c", "synchronous_standby_names=")


async def test_a_node_keeps_its_ledger_in_postgresql(net, server: Server) -> None:
    for number in range(4):
        server.sql(f"CREATE DATABASE node{number}")
    net.engines = {number: server.dsn(f"node{number}") for number in range(4)}
    await net.start(0, 1, 2, 3)
    await net.enrol()
    entries = [net.register() for _ in range(300)]
    await net.ledgers[0].append(entries[:250])
    await asyncio.gather(*(net.ledgers[number % 4].append([entry]) for number, entry in enumerate(entries[250:])))
    await net.until(lambda: all(net.published(number) == 302 for number in range(4)))
    root = net.ledgers[0].journal.head.root
    await net.stop(0, 1, 2, 3)
    await net.start(0, 1, 2, 3)
    (again,) = await net.ledgers[2].append([entries[7]])
    assert again.index == 9
    assert [net.ledgers[number].journal.head.root for number in range(4)] == [root] * 4


def test_an_engine_that_does_not_exist_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(MedshardError, match="sqlite or a DSN"):
        open_engine("mysql://", tmp_path, "origin", bytes(32))
