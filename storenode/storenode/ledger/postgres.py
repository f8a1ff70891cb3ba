"""The ledger on PostgreSQL, for when one machine is outgrown: every statement that writes is one round trip and one transaction.

Law: what ``engine`` says; durable is what the server's commit means (fsync on; with ``synchronous_standby_names``, on a second machine).
The last one to open a log owns it: opening counts ``owner`` up, every write names its own number, so a process that was thought dead can
write nothing more. Safety rests on the cosignatures all the same, not on the database. The first log's tables lie where the database's
search path leads; those of its successors in the schemas medshard_log_1, medshard_log_2, …

What an append waits for is awaited in the caller's loop: a thread between would wait for Python's lock, up to 5 ms each time. Everything
else is done in a thread with a loop of its own, so that the interface stays that of SQLite. After a lost connection a write finds out by
reading the head whether it was committed, and is done again if not: a fail-over to a promoted standby costs time and nothing else.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from medshard_protocol.errors import Absent, Conflict, Damaged, Full, MedshardError, Unavailable
from medshard_protocol.tiles import FullTile
from storenode.ledger.engine import Head, Memory, Standing, first_tile_after, format_version, levels_max

connect_timeout_s = 2.0
open_timeout_s = 10.0  # a new log's tables, or behind another that opens it
read_timeout_s = 2.0
write_timeout_s = 5.0
outage_s = 8.0  # how long a write keeps trying: a promotion takes some seconds
retry_s = 0.1

_T = TypeVar("_T")
_lost = (  # asyncpg says many things where a connection breaks in the middle of a query
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.CannotConnectNowError,
    asyncpg.OperatorInterventionError,
)

_tables = """
CREATE TABLE IF NOT EXISTS medshard_head(id int PRIMARY KEY CHECK (id = 0), format int NOT NULL, origin text NOT NULL,
    owner bigint NOT NULL, epoch bigint NOT NULL, leader bytea NOT NULL, lost bytea NOT NULL, size bigint NOT NULL, root bytea NOT NULL,
    note bytea NOT NULL, accepted bigint NOT NULL);
CREATE TABLE IF NOT EXISTS medshard_entry(place bigint PRIMARY KEY, data bytea NOT NULL);
CREATE TABLE IF NOT EXISTS medshard_tile(level int, number bigint, hashes bytea NOT NULL, PRIMARY KEY (level, number));
CREATE TABLE IF NOT EXISTS medshard_name(name bytea PRIMARY KEY, place bigint NOT NULL);
CREATE TABLE IF NOT EXISTS medshard_memory(id int PRIMARY KEY CHECK (id = 0), checked bigint NOT NULL, published bytea NOT NULL);
CREATE TABLE IF NOT EXISTS medshard_unsigned(place bigint PRIMARY KEY);
INSERT INTO medshard_memory VALUES (0, 0, '') ON CONFLICT DO NOTHING;
"""
_move = """UPDATE medshard_head SET size=$1, root=$2, note=$3, accepted=$4 WHERE owner=$5 AND epoch=$6 AND size=$7 RETURNING 1"""
_insert = """
WITH moved AS ({move}),
  entries AS (INSERT INTO medshard_entry SELECT $8 + n - 1, data FROM unnest($9::bytea[]) WITH ORDINALITY AS e(data, n)
              WHERE EXISTS (SELECT 1 FROM moved)),
  tiles AS (INSERT INTO medshard_tile SELECT * FROM unnest($10::int[], $11::bigint[], $12::bytea[]) WHERE EXISTS (SELECT 1 FROM moved)),
  names AS (INSERT INTO medshard_name SELECT name, $8 + n - 1 FROM unnest($13::bytea[]) WITH ORDINALITY AS e(name, n)
            WHERE length(name) > 0 AND EXISTS (SELECT 1 FROM moved) {first})
SELECT count(*) FROM moved
"""
_insertion = {own: _insert.format(move=_move, first="" if own else "ON CONFLICT DO NOTHING") for own in (True, False)}


class PostgresReader:
    """The reads of one log, also beside the process that owns it. ``number`` counts the logs before this one."""

    def __init__(self, dsn: str, number: int = 0, *, writes: bool = False) -> None:
        self._lines = _Lines(dsn, number, writes=writes)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="postgres", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the connections and end the thread."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._lines.close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def head(self) -> Head:
        """Read how far the log goes."""
        return Head(*self._read("SELECT size, root, note, accepted FROM medshard_head")[0])

    def standing(self) -> Standing:
        """Read whom this node follows."""
        return Standing(*self._read("SELECT epoch, leader, lost FROM medshard_head")[0])

    def entries(self, start: int, end: int) -> list[bytes]:
        """Read entries from ``start`` up to but not including ``end``. Raises Damaged if one is missing."""
        if start == end:
            return []
        rows = self._read("SELECT data FROM medshard_entry WHERE place >= $1 AND place < $2 ORDER BY place", start, end)
        if len(rows) != end - start:
            raise Damaged(f"the ledger lacks entries between {start} and {end}")
        return [row[0] for row in rows]

    def tile(self, level: int, number: int) -> bytes:
        """Read a full tile. Raises Damaged if it is missing."""
        rows = self._read("SELECT hashes FROM medshard_tile WHERE level = $1 AND number = $2", level, number)
        if not rows:
            raise Damaged(f"the ledger lacks tile {number} of level {level}")
        return bytes(rows[0][0])

    def find(self, names: Sequence[bytes]) -> dict[bytes, int]:
        """Find where entries stand, by their names."""
        return self._run(_find(self._lines, names))

    def memory(self) -> Memory:
        """Read what was remembered."""
        checked, published = self._read("SELECT checked, published FROM medshard_memory")[0]
        return Memory(checked, frozenset(row[0] for row in self._read("SELECT place FROM medshard_unsigned")), published)

    def _read(self, query: str, *values: object) -> list[Any]:
        return self._run(self._lines.read(query, *values))

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class PostgresStore(PostgresReader):
    """One log in one PostgreSQL database: an ``Engine``."""

    def __init__(self, dsn: str, origin: str, empty_root: bytes, number: int = 0) -> None:
        super().__init__(dsn, number, writes=True)
        try:
            self._owner = self._run(self._open(origin, empty_root, number))
        except BaseException:
            super().close()
            raise
        self.remote = _Remote(_Lines(dsn, number), self._owner)

    def close(self) -> None:
        """Close the connections and end the thread. To be called in the loop that used ``remote``, if any did."""
        super().close()
        self.remote.close()

    def promise(self, epoch: int, leader: bytes) -> None:
        """Follow this sequencer from now on. Raises Conflict if a later epoch was promised, or this one to another node."""
        query = """UPDATE medshard_head SET epoch=$1, leader=$2 WHERE owner=$3 AND (epoch < $1 OR epoch = $1 AND leader = $2) RETURNING 1"""
        if not self._write(lambda to: to.fetchval(query, epoch, leader, self._owner)):
            raise Conflict(f"an epoch after {epoch} was promised, or this one to another node")

    def lose(self, key: bytes) -> None:
        """Note that this key must not sign."""
        self._write(lambda to: to.execute("UPDATE medshard_head SET lost=$1 WHERE owner=$2", key, self._owner))

    def extend(
        self,
        epoch: int,
        old_size: int,
        entries: Sequence[bytes],
        tiles: Iterable[FullTile],
        head: Head,
        names: Sequence[bytes],
        *,
        own: bool,
    ) -> None:
        """Append durably: see ``Engine``."""
        self._run(_extend(self._lines, self._owner, epoch, old_size, entries, tiles, head, names, own=own))

    def rewind(
        self, epoch: int, old_size: int, start: int, entries: Sequence[bytes], tiles: Iterable[FullTile], head: Head, names: Sequence[bytes]
    ) -> None:
        """Drop everything from ``start`` on and append, in one transaction: see ``Engine``."""
        tiles = list(tiles)

        async def replace(to: asyncpg.Connection[Any]) -> bool:
            async with to.transaction():
                if not await to.fetchval(_move, *head, self._owner, epoch, old_size):
                    return False
                for table in ("entry", "name", "unsigned"):
                    await to.execute(f"DELETE FROM medshard_{table} WHERE place >= $1", start)  # noqa: S608 - a name from above
                for level in range(levels_max):
                    first = first_tile_after(level, start)
                    await to.execute("DELETE FROM medshard_tile WHERE level = $1 AND number >= $2", level, first)
                await to.execute("UPDATE medshard_memory SET checked = least(checked, $1)", start)
                values = (*head, self._owner, epoch, head.size, start, entries, *_columns(tiles), names)
                return bool(await to.fetchval(_insertion[False], *values))

        if not self._run(self._lines.write(replace, done=lambda: _has(self._lines, self._owner, head, epoch))):
            raise _elsewhere(old_size, epoch)

    def remember(self, checked: int, unsigned: Iterable[int], published: bytes) -> None:
        """Note which entries need no second check, and the newest published checkpoint."""
        query = """WITH here AS (UPDATE medshard_memory SET checked=$1, published=$2 WHERE EXISTS
                     (SELECT 1 FROM medshard_head WHERE owner=$4) RETURNING 1)
                   INSERT INTO medshard_unsigned SELECT place FROM unnest($3::bigint[]) AS u(place), here ON CONFLICT DO NOTHING"""
        self._write(lambda to: to.execute(query, checked, published, list(unsigned), self._owner))

    # -- inside

    async def _open(self, origin: str, empty_root: bytes, number: int) -> int:
        async def opened(to: asyncpg.Connection[Any]) -> int:
            async with to.transaction():
                await to.execute("SELECT pg_advisory_xact_lock(hashtext('medshard ledger'))")  # two that open a new log at once
                if number:
                    await to.execute(f"CREATE SCHEMA IF NOT EXISTS {_schema_of(number)}")
                await to.execute(_tables)
                query = "INSERT INTO medshard_head VALUES (0, $1, $2, 0, 0, '', '', 0, $3, '', 0) ON CONFLICT DO NOTHING"
                await to.execute(query, format_version, origin, empty_root)
                found = tuple(await to.fetchrow("SELECT format, origin FROM medshard_head") or ())
                if found != (format_version, origin):
                    raise Damaged(
                        f"this ledger is of the log {found[1]!r}, format {found[0]}; expected {origin!r}, format {format_version}"
                    )
                return int(await to.fetchval("UPDATE medshard_head SET owner = owner + 1 RETURNING owner"))

        return await self._lines.once("write", opened, open_timeout_s)

    def _write(self, act: Callable[[asyncpg.Connection[Any]], Awaitable[_T]]) -> _T | bool:
        return self._run(self._lines.write(act))


class _Remote:
    """The same log for one event loop: ``engine.Remote``."""

    def __init__(self, lines: _Lines, owner: int) -> None:
        self._lines = lines
        self._owner = owner

    async def extend(
        self,
        epoch: int,
        old_size: int,
        entries: Sequence[bytes],
        tiles: Iterable[FullTile],
        head: Head,
        names: Sequence[bytes],
        *,
        own: bool,
    ) -> None:
        """Append durably: see ``Engine``."""
        await _extend(self._lines, self._owner, epoch, old_size, entries, tiles, head, names, own=own)

    async def find(self, names: Sequence[bytes]) -> dict[bytes, int]:
        """Find where entries stand, by their names."""
        return await _find(self._lines, names)

    def close(self) -> None:
        """Let go of the connections; nothing is under way on them."""
        self._lines.drop()


class _Lines:
    """Connections of one event loop: one for reads, one for writes, and each carries one query at a time. Raises what ``Engine`` does."""

    def __init__(self, dsn: str, number: int, *, writes: bool = True) -> None:
        self._dsn = dsn
        self._number = number
        self._kind: SessionAttribute = SessionAttribute.read_write if writes else SessionAttribute.any
        self._connections: dict[str, asyncpg.Connection[Any]] = {}
        self._turns: dict[str, asyncio.Lock] = {}

    async def read(self, query: str, *values: object) -> list[Any]:
        """Give the rows of a query."""
        return await self.once("read", lambda to: to.fetch(query, *values), read_timeout_s)

    async def write(
        self, act: Callable[[asyncpg.Connection[Any]], Awaitable[_T]], *, done: Callable[[], Awaitable[bool]] | None = None
    ) -> _T | bool:
        """Do one transaction, and again after a lost connection unless ``done`` says that it was committed after all."""
        until, again = time.monotonic() + outage_s, False
        while True:
            try:
                written = await self.once("write", act, write_timeout_s)
                # a try that was given up may have been committed after it was looked for
                return written or (again and done is not None and await done())
            except Unavailable:
                if time.monotonic() > until:
                    raise
            again = True
            await asyncio.sleep(retry_s)
            try:
                if done is not None and await done():
                    return True
            except Unavailable:
                continue

    async def once(self, name: str, act: Callable[[asyncpg.Connection[Any]], Awaitable[_T]], timeout_s: float) -> _T:
        """Do something on the connection of this name, which is made if need be."""
        try:
            async with self._turns.setdefault(name, asyncio.Lock()):
                try:
                    async with asyncio.timeout(timeout_s):
                        return await act(await self._connection(name))
                except (OSError, TimeoutError, *_lost):
                    if (connection := self._connections.pop(name, None)) is not None:
                        connection.terminate()  # an answer may still come, and would be taken for that to the next query
                    raise
        except (OSError, TimeoutError, asyncpg.PostgresError, *_lost) as error:
            raise _translated(error) from error

    async def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            try:
                await connection.close(timeout=1.0)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                connection.terminate()

    def drop(self) -> None:
        """Close the connections without a word to the server, which need not be there any more."""
        for connection in self._connections.values():
            connection.terminate()

    async def _connection(self, name: str) -> asyncpg.Connection[Any]:
        connection = self._connections.get(name)
        if connection is None or connection.is_closed():
            connection = await asyncpg.connect(self._dsn, timeout=connect_timeout_s, target_session_attrs=self._kind)
            self._connections[name] = connection
            if self._number:
                await connection.execute(f"SET search_path TO {_schema_of(self._number)}")
        return connection


async def _extend(
    lines: _Lines,
    owner: int,
    epoch: int,
    old_size: int,
    entries: Sequence[bytes],
    tiles: Iterable[FullTile],
    head: Head,
    names: Sequence[bytes],
    *,
    own: bool,
) -> None:
    values = (*head, owner, epoch, old_size, old_size, entries, *_columns(tiles), names)
    if not await lines.write(lambda to: to.fetchval(_insertion[own], *values), done=lambda: _has(lines, owner, head, epoch)):
        raise _elsewhere(old_size, epoch)


async def _find(lines: _Lines, names: Sequence[bytes]) -> dict[bytes, int]:
    return dict(await lines.read("SELECT name, place FROM medshard_name WHERE name = ANY($1::bytea[])", list(names)))


async def _has(lines: _Lines, owner: int, head: Head, epoch: int) -> bool:
    query = "SELECT size, root, note, accepted FROM medshard_head WHERE owner = $1 AND epoch = $2"
    return [tuple(row) for row in await lines.read(query, owner, epoch)] == [tuple(head)]


def _schema_of(number: int) -> str:
    return f"medshard_log_{number}"


def _elsewhere(old_size: int, epoch: int) -> Conflict:
    return Conflict(f"the ledger in the database does not have {old_size} entries in epoch {epoch}, or another process took it over")


def _columns(tiles: Iterable[FullTile]) -> tuple[list[int], list[int], list[bytes]]:
    rows = list(tiles)
    return [tile.level for tile in rows], [tile.number for tile in rows], [tile.hashes for tile in rows]


def _translated(error: Exception) -> MedshardError:
    text = str(error) or type(error).__name__
    if isinstance(error, asyncpg.UniqueViolationError):
        return Conflict("the log has an entry of this author with this nonce already")
    if isinstance(error, asyncpg.DiskFullError):
        return Full("no room on the database's disk for the ledger", hint="free some space; nothing has been lost")
    if isinstance(error, asyncpg.DataCorruptedError | asyncpg.IndexCorruptedError):
        return Damaged(f"the ledger's database is damaged ({text})", hint="restore it, or let this node mirror the log anew")
    if isinstance(error, asyncpg.UndefinedTableError):
        return Absent(f"the database has no such ledger ({text})", hint="the node makes it when it first runs")
    return Unavailable(f"the ledger's database cannot be used ({text})")
