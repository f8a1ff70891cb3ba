"""The fold's tables in one SQLite file, so that a node with millions of entries starts at once and needs little memory.

Law: the file is a cache of the log. What was written stands in memory until a save puts it all into one transaction, so that the file
always holds the state after some whole number of entries; after a crash it is a little old and the fold goes on from there. It may be
deleted while the node stands still. A file that cannot be read, or is of another format, is thrown away; a row that a disk has changed is
found by its checksum, one that it has lost by ``verify``, and either costs the file and a restart.

Two connections: reads never wait for a save, which may run in a thread. Everything else belongs to one event loop.
"""

from __future__ import annotations

import logging
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgpack

from medshard_protocol.errors import Damaged, Unavailable
from medshard_protocol.tables import Row, Table

format_version = 1
checksum_size = 4
cached_rows_max = 8192  # identities and the like, asked for with every entry; some 200 bytes each
save_rows_max = 50_000  # more than this unsaved is some 20 MB of memory

_log = logging.getLogger(__name__)


class _Layer:
    """Rows that hide those below: None for one that was taken away. ``alone``: nothing below counts."""

    def __init__(self, *, alone: bool = False) -> None:
        self.rows: dict[Table, dict[bytes, Row | None]] = {table: {} for table in Table}
        self.alone = alone

    def over(self, below: _Layer) -> _Layer:
        """Put this layer and the one below together."""
        if self.alone:
            return self
        both = _Layer(alone=below.alone)
        both.rows = {table: below.rows[table] | self.rows[table] for table in Table}
        return both


class SqliteTables:
    """Tables in a file. ``save`` and ``close`` are not for two threads at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unsaved, self._saving = _Layer(), _Layer()
        self._cache: dict[tuple[Table, bytes], Row | None] = {}  # of the file
        self._broken = False
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._open()
        except (sqlite3.DatabaseError, UnicodeError) as error:  # SQLite quotes the damaged schema, which Python cannot decode
            _log.warning("the state's tables are made anew: %s", error)
            self._discard()
            self._open()

    # -- as ``Tables``

    def get(self, table: Table, key: bytes) -> Row | None:
        """Give the row under this key."""
        for layer in (self._unsaved, self._saving):
            rows = layer.rows[table]
            if key in rows:
                return rows[key]
            if layer.alone:
                return None
        name = (table, key)
        if name not in self._cache:
            if len(self._cache) >= cached_rows_max:
                self._cache.clear()
            self._cache[name] = self._read(table, key)
        return self._cache[name]

    def put(self, table: Table, key: bytes, row: Row | None) -> None:
        """Set the row under this key; None takes it away."""
        self._unsaved.rows[table][key] = row
        self._cache.pop((table, key), None)

    def scan(self, table: Table, first: bytes, end: bytes, most: int = 2**31) -> list[tuple[bytes, Row]]:
        """Give keys from ``first`` up to but not including ``end``, ascending, and their rows; ``most`` of them."""
        layers = [self._unsaved] if self._unsaved.alone else [self._saving, self._unsaved]
        pending = {key: row for layer in layers for key, row in layer.rows[table].items() if first <= key < end}
        gone = sum(row is None for row in pending.values())
        found: dict[bytes, Row | None] = {}
        if not layers[0].alone:
            query = f"SELECT key, data FROM t{int(table)} WHERE key >= ? AND key < ? ORDER BY key LIMIT ?"  # noqa: S608 - a number
            found = {key: self._row(key, data) for key, data in self._execute(query, (first, end, most + gone))}
        found |= pending
        return [(key, row) for key, row in sorted(found.items()) if row is not None][:most]

    def clear(self) -> None:
        """Take everything away."""
        self._unsaved = _Layer(alone=True)
        self._cache.clear()

    # -- the file

    @property
    def unsaved(self) -> int:
        """How many rows wait to be saved."""
        return sum(map(len, self._unsaved.rows.values()))

    def root(self) -> tuple[int, bytes]:
        """What ``save`` was told last: how many entries, and the log's root over them."""
        size, root = self._reader.execute("SELECT size, root FROM head").fetchone()
        return int(size), bytes(root)

    def verify(self) -> None:
        """Read the whole file, in any thread: every row against its checksum, and the order in which they are found. Raises Damaged.

        A row that is gone is like one that never was, and nobody notices who asks for it alone.
        """
        try:
            with closing(sqlite3.connect(f"file:{quote(str(self._path))}?mode=ro", uri=True, timeout=10)) as reader:
                whole = reader.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
                for table in Table if whole else ():
                    rows = reader.execute(f"SELECT key, data FROM t{int(table)}")  # noqa: S608 - a number
                    whole = whole and all(_is_whole(key, data) for key, data in rows)
        except sqlite3.OperationalError as error:
            raise Unavailable(f"the state's tables cannot be read ({error})") from error
        except (sqlite3.DatabaseError, UnicodeError):
            whole = False
        if not whole:
            raise self._damaged()

    def begin_save(self) -> None:
        """Set aside what is to be saved. To be called between entries; then ``write``, in any thread; then ``end_save``."""
        self._saving, self._unsaved = self._unsaved, _Layer()

    def write(self, size: int, root: bytes) -> None:
        """Put what was set aside into the file, in one transaction. Raises Unavailable, and then nothing has changed."""
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                self._write_rows()
                self._writer.execute("UPDATE head SET size = ?, root = ?", (size, root))
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise Unavailable(f"the state's tables cannot be written ({error})") from error

    def end_save(self, *, written: bool) -> None:
        """Forget what was set aside once it is written; else take it back."""
        if not written:
            self._unsaved = self._unsaved.over(self._saving)
        self._saving = _Layer()

    def close(self) -> None:
        """Close the file. What was not saved is lost, and folded again after the next start."""
        self._reader.close()
        self._writer.close()

    # -- inside

    def _open(self) -> None:
        self._writer = _connect(self._path)
        found = self._writer.execute("SELECT name FROM sqlite_master WHERE name = 'head'").fetchone()
        if found and self._writer.execute("SELECT format FROM head").fetchone() != (format_version,):
            self._writer.close()
            raise sqlite3.DatabaseError("of another format")
        if not found:
            tables = "".join(f"CREATE TABLE t{int(table)}(key BLOB PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;" for table in Table)
            head = "CREATE TABLE head(format INTEGER NOT NULL, size INTEGER NOT NULL, root BLOB NOT NULL);"
            self._writer.executescript(f"BEGIN;{tables}{head}COMMIT;")
            self._writer.execute("INSERT INTO head VALUES (?, 0, x'')", (format_version,))
        self._reader = _connect(self._path)

    def _discard(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def _read(self, table: Table, key: bytes) -> Row | None:
        found = self._execute(f"SELECT data FROM t{int(table)} WHERE key = ?", (key,))  # noqa: S608 - a number
        return self._row(key, found[0][0]) if found else None

    def _execute(self, query: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        if self._broken:
            raise self._damaged()
        try:
            return self._reader.execute(query, values).fetchall()
        except sqlite3.OperationalError as error:
            raise Unavailable(f"the state's tables cannot be read ({error})") from error
        except (sqlite3.DatabaseError, UnicodeError) as error:
            raise self._damaged() from error

    def _row(self, key: bytes, data: bytes) -> Row:
        if not _is_whole(key, data):
            raise self._damaged()
        row: Row = msgpack.unpackb(data[checksum_size:], use_list=False)
        return row

    def _damaged(self) -> Damaged:
        self._broken = True
        self._discard()  # the open connections go on; the next start finds nothing
        return Damaged("the state's tables are damaged on this node's disk", hint="restart this node: it makes them anew from the ledger")

    def _write_rows(self) -> None:
        saving = self._saving
        for table, rows in saving.rows.items():
            if saving.alone:
                self._writer.execute(f"DELETE FROM t{int(table)}")  # noqa: S608 - a number
            packed = ((key, msgpack.packb(row)) for key, row in rows.items() if row is not None)
            kept = sorted((key, _checksum(key, data) + data) for key, data in packed)
            gone = [(key,) for key, row in rows.items() if row is None]
            self._writer.executemany(f"INSERT OR REPLACE INTO t{int(table)} VALUES (?, ?)", kept)  # noqa: S608 - a number
            self._writer.executemany(f"DELETE FROM t{int(table)} WHERE key = ?", gone)  # noqa: S608 - a number


def _is_whole(key: object, data: object) -> bool:
    if not isinstance(key, bytes) or not isinstance(data, bytes):
        return False
    return data[:checksum_size] == _checksum(key, data[checksum_size:])


def _checksum(key: bytes, data: bytes) -> bytes:
    return zlib.crc32(data, zlib.crc32(key)).to_bytes(checksum_size, "big")


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        # After a power cut the file is whole and a little old, which is all that is asked of it.
        connection.execute("PRAGMA synchronous=NORMAL")
    except (sqlite3.DatabaseError, UnicodeError):
        connection.close()
        raise
    return connection
