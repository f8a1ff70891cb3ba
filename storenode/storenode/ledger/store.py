"""The ledger on one SQLite database: entries, full hash tiles, the head, and what this node need not check twice.

Law: what ``engine`` says; durable means WAL with synchronous=FULL. The row of ``memory`` only saves work and may be old.

Two connections: one for writes, which a thread may hold for as long as a disk takes, one for reads, which never wait for it. A lock file
keeps a second process out, since two writers with one cosigner key could sign two histories.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from medshard_protocol.errors import Absent, Conflict, Damaged, Full, MedshardError, Unavailable
from medshard_protocol.tiles import FullTile
from storenode import durable
from storenode.ledger.engine import Head, Memory, Standing, first_tile_after, format_version, levels_max

database_name = "ledger.sqlite"
busy_timeout_s = 5.0  # another process may read the database: a backup, an operator

_schema = """
CREATE TABLE head(id INTEGER PRIMARY KEY CHECK (id = 0), format INTEGER NOT NULL, origin TEXT NOT NULL, epoch INTEGER NOT NULL,
                  leader BLOB NOT NULL, lost BLOB NOT NULL, size INTEGER NOT NULL, root BLOB NOT NULL, note BLOB NOT NULL,
                  accepted INTEGER NOT NULL);
CREATE TABLE entry(place INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE tile(key INTEGER PRIMARY KEY, hashes BLOB NOT NULL);
CREATE TABLE name(name BLOB PRIMARY KEY, place INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE memory(id INTEGER PRIMARY KEY CHECK (id = 0), checked INTEGER NOT NULL, published BLOB NOT NULL);
CREATE TABLE unsigned(place INTEGER PRIMARY KEY);
INSERT INTO memory VALUES (0, 0, x'');
"""


class StoreReader:
    """The reads of one log, also beside the process that owns it. Raises Absent where there is none."""

    def __init__(self, folder: Path) -> None:
        path = folder / database_name
        if not path.exists():
            raise Absent(f"{path} does not exist", hint="the node makes it when it first runs")
        try:
            self._reader = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=busy_timeout_s, check_same_thread=False)
        except sqlite3.Error as error:
            raise _translated(error) from error

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def head(self) -> Head:
        """Read how far the log goes."""
        return Head(*self._row("SELECT size, root, note, accepted FROM head", "ibbi"))

    def standing(self) -> Standing:
        """Read whom this node follows."""
        return Standing(*self._row("SELECT epoch, leader, lost FROM head", "ibb"))

    def entries(self, start: int, end: int) -> list[bytes]:
        """Read entries from ``start`` up to but not including ``end``. Raises Damaged if one is missing."""
        rows = self._read("SELECT data FROM entry WHERE place >= ? AND place < ? ORDER BY place", (start, end))
        if len(rows) != end - start or not all(isinstance(row[0], bytes) for row in rows):
            raise Damaged(f"the ledger lacks entries between {start} and {end}")
        return [row[0] for row in rows]

    def tile(self, level: int, number: int) -> bytes:
        """Read a full tile. Raises Damaged if it is missing."""
        rows = self._read("SELECT hashes FROM tile WHERE key = ?", (_tile_key(level, number),))
        if not rows or not isinstance(rows[0][0], bytes):
            raise Damaged(f"the ledger lacks tile {number} of level {level}")
        return rows[0][0]

    def find(self, names: Sequence[bytes]) -> dict[bytes, int]:
        """Find where entries stand, by their names."""
        found = ((name, self._read("SELECT place FROM name WHERE name = ?", (name,))) for name in names)
        return {name: rows[0][0] for name, rows in found if rows}

    def memory(self) -> Memory:
        """Read what was remembered."""
        checked, published = self._row("SELECT checked, published FROM memory", "ib")
        return Memory(checked, frozenset(row[0] for row in self._read("SELECT place FROM unsigned", ())), published)

    def _read(self, query: str, values: tuple[object, ...]) -> list[Any]:
        try:
            return self._reader.execute(query, values).fetchall()
        except (sqlite3.Error, UnicodeError) as error:  # SQLite quotes what is damaged, which Python cannot always decode
            raise _translated(error) from error

    def _row(self, query: str, kinds: str) -> Any:
        """The one row of a table; ``kinds`` are those of its columns, i(nteger) or b(ytes), which a disk may have changed."""
        rows = self._read(query, ())
        if not rows or not all(isinstance(value, {"i": int, "b": bytes}[kind]) for value, kind in zip(rows[0], kinds, strict=True)):
            raise Damaged("the ledger's database is damaged", hint="restore the node's folder, or let it mirror the log anew")
        return rows[0]


class Store(StoreReader):
    """One log in one SQLite file: an ``Engine``."""

    remote = None

    def __init__(self, folder: Path, origin: str, empty_root: bytes) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        durable.sync_log(folder / database_name)  # the head that is found here is cosigned, promises are kept
        self._lock = os.open(folder / "ledger.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._writer = _connect(folder / database_name)
            self._create(origin, empty_root)
            self._reader = _connect(folder / database_name)
        except BlockingIOError:
            os.close(self._lock)
            raise Unavailable(f"another process uses the ledger in {folder}", hint="stop the node that runs from this folder") from None
        except (sqlite3.Error, UnicodeError, MedshardError) as error:
            os.close(self._lock)
            raise _translated(error) from error

    def close(self) -> None:
        """Close files and let go of the lock."""
        self._reader.close()
        self._writer.close()
        os.close(self._lock)

    def promise(self, epoch: int, leader: bytes) -> None:
        """Follow this sequencer from now on. Raises Conflict if a later epoch was promised, or this one to another node."""
        with _Transaction(self._writer) as write:
            changed = write.execute("UPDATE head SET epoch=?1, leader=?2 WHERE epoch < ?1 OR epoch = ?1 AND leader = ?2", (epoch, leader))
            if changed.rowcount != 1:
                raise Conflict(f"an epoch after {epoch} was promised, or this one to another node")

    def lose(self, key: bytes) -> None:
        """Note that this key must not sign."""
        with _Transaction(self._writer) as write:
            write.execute("UPDATE head SET lost=?", (key,))

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
        with _Transaction(self._writer) as write:
            _move(write, epoch, old_size, head)
            _insert(write, old_size, entries, tiles, names, own=own)

    def rewind(
        self, epoch: int, old_size: int, start: int, entries: Sequence[bytes], tiles: Iterable[FullTile], head: Head, names: Sequence[bytes]
    ) -> None:
        """Drop everything from ``start`` on and append, in one transaction: see ``Engine``."""
        with _Transaction(self._writer) as write:
            _move(write, epoch, old_size, head)
            for table in ("entry", "name", "unsigned"):
                write.execute(f"DELETE FROM {table} WHERE place >= ?", (start,))  # noqa: S608 - a name from the line above
            for level in range(levels_max):
                keys = (_tile_key(level, first_tile_after(level, start)), _tile_key(level + 1, 0))
                write.execute("DELETE FROM tile WHERE key >= ? AND key < ?", keys)
            write.execute("UPDATE memory SET checked = min(checked, ?)", (start,))
            _insert(write, start, entries, tiles, names, own=False)

    def remember(self, checked: int, unsigned: Iterable[int], published: bytes) -> None:
        """Note which entries need no second check, and the newest published checkpoint."""
        with _Transaction(self._writer) as write:
            write.executemany("INSERT OR IGNORE INTO unsigned VALUES (?)", ((place,) for place in unsigned))
            write.execute("UPDATE memory SET checked=?, published=?", (checked, published))

    def _create(self, origin: str, empty_root: bytes) -> None:
        if not self._writer.execute("SELECT 1 FROM sqlite_master WHERE name = 'head'").fetchone():
            self._writer.executescript(f"BEGIN IMMEDIATE;{_schema}COMMIT;")
        with _Transaction(self._writer) as write:
            if not write.execute("SELECT 1 FROM head").fetchone():
                write.execute("INSERT INTO head VALUES (0, ?, ?, 0, x'', x'', 0, ?, x'', 0)", (format_version, origin, empty_root))
            found = write.execute("SELECT format, origin FROM head").fetchone()
        if found != (format_version, origin):
            raise Damaged(f"this ledger is of the log {found[1]!r}, format {found[0]}; expected {origin!r}, format {format_version}")


class _Transaction:
    """One transaction: committed at the end of the block, rolled back by any exception, our errors out."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> sqlite3.Connection:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except (sqlite3.Error, UnicodeError) as error:  # SQLite quotes what is damaged, which Python cannot always decode
            raise _translated(error) from error
        return self._connection

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._connection.execute("COMMIT")
        except sqlite3.Error as failed:
            error = failed
        if error is None:
            return
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            raise _translated(error) from error
        raise error


def _move(write: sqlite3.Connection, epoch: int, old_size: int, head: Head) -> None:
    values = (head.size, head.root, head.note, head.accepted, epoch, old_size)
    if write.execute("UPDATE head SET size=?, root=?, note=?, accepted=? WHERE epoch=? AND size=?", values).rowcount != 1:
        raise Conflict(f"the ledger on disk does not have {old_size} entries in epoch {epoch}")


def _insert(
    write: sqlite3.Connection, start: int, entries: Sequence[bytes], tiles: Iterable[FullTile], names: Sequence[bytes], *, own: bool
) -> None:
    places = range(start, start + len(entries))
    write.executemany("INSERT INTO entry VALUES (?, ?)", zip(places, entries, strict=True))
    named = ((name, place) for name, place in zip(names, places, strict=True) if name)
    write.executemany(f"INSERT {'' if own else 'OR IGNORE'} INTO name VALUES (?, ?)", named)  # noqa: S608 - two words of ours
    write.executemany("INSERT INTO tile VALUES (?, ?)", ((_tile_key(t.level, t.number), t.hashes) for t in tiles))


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def _tile_key(level: int, number: int) -> int:
    return level << 56 | number


def _translated(error: Exception) -> MedshardError:
    if isinstance(error, MedshardError):
        return error
    code = getattr(error, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_FULL:
        return Full("no room on the disk for the ledger", hint="free some space; nothing has been lost")
    if code in (sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_UNIQUE):
        return Conflict("the log has an entry of this author with this nonce already")
    if isinstance(error, sqlite3.OperationalError):
        return Unavailable(f"the ledger's database cannot be used ({error})")
    return Damaged(f"the ledger's database is damaged ({error})", hint="restore the node's folder, or let it mirror the log anew")
