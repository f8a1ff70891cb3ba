"""The tables that a catalog lies in, whoever keeps them: SQLite here, PostgreSQL in postgres.py.

Law: an engine runs SQL and knows nothing of DICOM, keys or patients: all that it is given is sealed, but for tokens, row numbers, counts
and the files that instances lie in. Statements are written once, in what both engines understand, with ``?`` for values. One change at a
time, whatever the number of processes: its first statement moves the clock, and the row of the clock is locked until it ends. Blocking;
the caller holds a lock.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from medshard_protocol.errors import Damaged, Full, MedshardError, Unavailable

version: Final = 2  # an index of an older version is made anew: what is in it is in the store or in the spool
hint: Final = "run `medshard reindex`: it makes it again from the store"
busy_s: Final = 30.0
# {bytes}: what an engine calls bytes; {id}: a row number of its own making
schema: Final = """
CREATE TABLE studies (id {id}, token {bytes} NOT NULL UNIQUE, changed BIGINT NOT NULL, sealed {bytes} NOT NULL);
CREATE INDEX studies_by_change ON studies (changed);
CREATE TABLE series (
    id {id}, study BIGINT NOT NULL, token {bytes} NOT NULL, instances BIGINT NOT NULL, sealed {bytes} NOT NULL, UNIQUE (study, token)
);
CREATE INDEX series_by_token ON series (token);
CREATE TABLE instances (
    id {id}, series BIGINT NOT NULL, token {bytes} NOT NULL, content {bytes} NOT NULL,
    file {bytes}, gateway {bytes}, served INTEGER NOT NULL, sealed {bytes} NOT NULL, UNIQUE (token, content)
);
CREATE INDEX instances_by_series ON instances (series, served);
CREATE INDEX instances_by_file ON instances (file);
CREATE INDEX instances_that_wait ON instances (gateway) WHERE file IS NULL;
CREATE TABLE summaries (series BIGINT PRIMARY KEY, sealed {bytes} NOT NULL);
CREATE TABLE files (file {bytes} PRIMARY KEY);
CREATE TABLE clock (one INTEGER PRIMARY KEY CHECK (one = 1), now BIGINT NOT NULL, made {bytes} NOT NULL, checked {bytes} NOT NULL);
"""

T = TypeVar("T")
Rows = Sequence[Sequence[Any]]


class Tables(Protocol):
    """An engine. Raises Unavailable, Full and Damaged."""

    where: str  # for people, without a password
    shared: bool  # whether others than programs of this vault's home work with it

    def rows(self, sql: str, *values: object) -> Rows:
        """The rows of a query, or of a change inside ``change``."""

    def many(self, sql: str, values: Iterable[Sequence[object]]) -> None:
        """One change for each of ``values``, inside ``change``."""

    def change(self, act: Callable[[], T]) -> T:
        """One transaction, durable on return. ``act`` may run twice where a connection was lost: only its last run counts."""

    def reset(self) -> None:
        """Drop everything, what cannot be opened too, and begin with empty tables."""

    def close(self) -> None:
        """Let go."""


class SqliteTables:
    """A file of this machine."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self.shared = False
        self._path = path
        self._db = self._opened()

    def rows(self, sql: str, *values: object) -> Rows:
        """See ``Tables``."""
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def many(self, sql: str, values: Iterable[Sequence[object]]) -> None:
        """See ``Tables``."""
        try:
            self._db.executemany(sql, values)
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def change(self, act: Callable[[], T]) -> T:
        """See ``Tables``."""
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                return act()
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def reset(self) -> None:
        """See ``Tables``."""
        self._db.close()
        remove(self._path)
        self._db = self._opened()

    def close(self) -> None:
        """See ``Tables``."""
        self._db.close()

    def _opened(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=busy_s, isolation_level=None, check_same_thread=False)
        try:
            os.chmod(self._path, 0o600)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")  # an instance leaves the spool once its row is here
            db.execute("PRAGMA temp_store = MEMORY")
            db.execute("PRAGMA secure_delete = ON")  # of what was erased not even sealed bytes stay in a free page
            with db:
                db.execute("BEGIN IMMEDIATE")
                _prepare(db)
        except sqlite3.Error as error:
            db.close()
            raise self._translated(error) from error
        except BaseException:
            db.close()
            raise
        return db

    def _translated(self, error: sqlite3.Error) -> MedshardError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Unavailable(f"the DICOM index {self.where} is in use by another medshard", hint="try again when it has finished")
        if code == sqlite3.SQLITE_FULL:
            return Full(f"no room on the disk for the DICOM index {self.where}", hint="free some space; nothing has been lost")
        return damaged(self.where, str(error))


def damaged(where: str, why: str) -> Damaged:
    """What is to be said of an index that cannot be read."""
    return Damaged(f"the DICOM index {where} is damaged: {why}", hint=hint)


def statements(**words: str) -> list[str]:
    """The schema in the words of an engine."""
    return [each.strip() for each in schema.format(**words).split(";") if each.strip()]


def remove(path: Path) -> None:
    """Delete the file of an index and what belongs to it."""
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


def _prepare(db: sqlite3.Connection) -> None:
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found == version:
        return
    if found > version:
        raise Unavailable(f"the DICOM index has version {found}, and this medshard knows version {version}", hint="use the newer medshard")
    for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        db.execute(f'DROP TABLE "{name}"')
    for statement in statements(bytes="BLOB", id="INTEGER PRIMARY KEY"):
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {version}")
