"""The vault's local index: what it has put, to list and to search, and what an interrupted put left behind.

Law: SQLite keeps in clear only what nodes and ledger know anyway: lookup tag, file id, member number, ledger index, put time.
Names, sizes, hashes and attributes are sealed with a key that the caller brings, bound to their row, so a stolen disk tells no patient
and rows cannot be exchanged. Nothing here is the only copy of anything but the journal, whose loss costs a second upload:
``medshard reindex`` rebuilds the rest. Several processes may use one index at a time.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Self

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medshard.grants import KnownGrant
from medshard.model import Row
from medshard.query import Query
from medshard_protocol import canonical
from medshard_protocol.canonical import Fields
from medshard_protocol.errors import Absent, Damaged, Full, Malformed, MedshardError, Unavailable

journal_bytes_max = 64 * 2**20  # what an interrupted put notes about itself
busy_wait_s = 30.0  # another process may be adding 10,000 rows
_batch = 1_000

_schema = """
CREATE TABLE files (
    tag BLOB NOT NULL, file BLOB NOT NULL, member INTEGER NOT NULL, ledger INTEGER NOT NULL, put INTEGER NOT NULL, sealed BLOB NOT NULL,
    PRIMARY KEY (file, member)
) WITHOUT ROWID;
CREATE INDEX files_by_tag ON files (tag);
CREATE INDEX files_by_put ON files (put, ledger, file, member);
CREATE TABLE manifests (file BLOB PRIMARY KEY, manifest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE journal (slot BLOB PRIMARY KEY, sealed BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""
_schema_2 = """
CREATE TABLE received (
    tag BLOB NOT NULL, file BLOB NOT NULL, member INTEGER NOT NULL, ledger INTEGER NOT NULL, put INTEGER NOT NULL, sealed BLOB NOT NULL,
    PRIMARY KEY (file, member)
) WITHOUT ROWID;
CREATE INDEX received_by_tag ON received (tag);
CREATE INDEX received_by_put ON received (put, ledger, file, member);
CREATE TABLE grants (
    number INTEGER NOT NULL, file BLOB NOT NULL, given INTEGER NOT NULL, sealed BLOB NOT NULL,
    PRIMARY KEY (number, file)
) WITHOUT ROWID;
CREATE INDEX grants_by_file ON grants (file);
CREATE TABLE cursors (node BLOB PRIMARY KEY, at INTEGER NOT NULL) WITHOUT ROWID;
"""
_schema_3 = """
CREATE TABLE custody (kind INTEGER NOT NULL, file BLOB NOT NULL, sealed BLOB NOT NULL, PRIMARY KEY (kind, file)) WITHOUT ROWID;
"""
_version = 3
_reindex = "Run `medshard reindex`: it rebuilds the index from the nodes and the ledger. No stored file is touched."


class Index:
    """Open, or make, the index at ``path``. Raises Damaged for one that is not readable with ``key`` (32 bytes)."""

    def __init__(self, path: Path, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError("an index key has 32 bytes")
        self._path = path
        self._cipher = AESGCM(hmac.digest(key, b"medshard/index/v1/seal", hashlib.sha256))
        self._slot_key = hmac.digest(key, b"medshard/index/v1/slot", hashlib.sha256)
        self._lock = threading.RLock()
        self._data_version = -1
        self._removed = False
        with self._speaking():
            self._db = sqlite3.connect(path, timeout=busy_wait_s, isolation_level=None, check_same_thread=False)
            try:
                os.chmod(path, 0o600)
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        """Close the database; all of it is on disk then. Idempotent."""
        with self._lock:
            with suppress(sqlite3.Error):  # another process reads, and will do it; or closed before
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def discard(path: Path) -> None:
        """Delete the index at ``path``, readable or not, with SQLite's files beside it."""
        for end in ("", "-wal", "-shm", "-journal"):
            Path(f"{path}{end}").unlink(missing_ok=True)

    # Files

    def add(self, tag: bytes, row: Row) -> None:
        """Add one file, or replace what stood under its file id and member number."""
        self.add_many([(tag, row)])

    def add_many(self, items: Iterable[tuple[bytes, Row]]) -> None:
        """Add many files in one transaction, for instance the members of a pack. A row with an owner is one that was shared with us."""
        with self._speaking(), self._transaction():
            for received, group in groupby(items, key=lambda item: bool(item[1].owner)):
                self._db.executemany(_add.format(_table(received)), (self._sealed(tag, row) for tag, row in group))

    def by_tag(self, tag: bytes, *, received: bool = False) -> list[Row]:
        """The files under a lookup tag, the earliest on the ledger first: our own, or those ``received`` from others."""
        with self._speaking():
            found = self._db.execute(_by_tag.format(_table(received)), (tag,)).fetchall()
        return [self._open_row(*line) for line in found]

    def by_file(self, file_id: bytes, *, received: bool = False) -> list[Row]:
        """The rows of one object: a file, or the members of a pack in order."""
        with self._speaking():
            found = self._db.execute(_by_file.format(_table(received)), (file_id,)).fetchall()
        return [self._open_row(*line) for line in found]

    def rows(self, *, received: bool = False) -> Iterator[Row]:
        """Every file, the oldest put first. Rows that others add meanwhile may or may not appear."""
        after: tuple[int, int, bytes, int] = (-1, -1, b"", -1)
        while True:
            with self._speaking():
                lines = self._db.execute(_after.format(_table(received)), (*after, _batch)).fetchall()
            for line in lines:
                yield self._open_row(*line)
            if len(lines) < _batch:
                return
            _, file, member, ledger, put, _ = lines[-1]
            after = (put, ledger, file, member)

    def find(self, query: Query, *, received: bool = False) -> Iterator[Row]:
        """The files that meet ``query``, the oldest put first."""
        return (row for row in self.rows(received=received) if query.meets(row))

    def remove(self, file_id: bytes) -> None:
        """Forget a file: its rows and its manifest. What SQLite's log of changes has of it, ``cut`` takes away."""
        with self._speaking(), self._transaction():
            for table in ("files", "received", "manifests"):
                self._db.execute(_forget.format(table) + " WHERE file = ?", (file_id,))
            self._removed = True

    def cut(self) -> None:
        """Empty SQLite's log of changes, which lives on while another process has the index open. While one reads, it goes next time."""
        with self._speaking(), suppress(sqlite3.OperationalError):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def clear(self) -> None:
        """Forget all files, grants and manifests. The journal stays, and what is known of files that were kept or ended."""
        with self._speaking(), self._transaction():
            for table in ("files", "received", "manifests", "grants", "cursors"):
                self._db.execute(_forget.format(table))

    def count(self) -> int:
        """How many files, or members of packs, the index knows."""
        with self._speaking():
            return int(self._db.execute("SELECT count(*) FROM files").fetchone()[0])

    def changed(self) -> bool:
        """Whether another process has written here, or this one removed a file, since this was last asked; yes the first time."""
        with self._speaking():
            (version,) = self._db.execute("PRAGMA data_version").fetchone()
            before, self._data_version = self._data_version, version
            removed, self._removed = self._removed, False
            return bool(version != before) or removed

    def file_ids(self) -> set[bytes]:
        """Every object of this vault's own."""
        with self._speaking():
            return {file for (file,) in self._db.execute("SELECT DISTINCT file FROM files")}

    # Grants: what this vault gave, and what it was given

    def put_grant(self, known: KnownGrant) -> None:
        """Keep a grant of one file, or replace what is known of it."""
        sealed = self._seal(known.to_bytes(), _grant_identity(known.index, known.file_id, given=known.given))
        with self._speaking(), self._transaction():
            self._db.execute("INSERT OR REPLACE INTO grants VALUES (?, ?, ?, ?)", (known.index, known.file_id, known.given, sealed))

    def grants(self, file_id: bytes | None = None) -> list[KnownGrant]:
        """The grants of one file, or all of them, in the order of the ledger."""
        where, values = ("", ()) if file_id is None else ("WHERE file = ?", (file_id,))
        with self._speaking():
            found = self._db.execute(_grants.format(where), values).fetchall()
        return [self._open_grant(*line) for line in found]

    def cursor(self, node: bytes) -> int:
        """Up to which place in the log everything that this node tells of grants is known here; -1 at first."""
        with self._speaking():
            found = self._db.execute("SELECT at FROM cursors WHERE node = ?", (node,)).fetchone()
        return -1 if found is None else int(found[0])

    def put_cursor(self, node: bytes, at: int) -> None:
        """Remember it."""
        with self._speaking(), self._transaction():
            self._db.execute("INSERT OR REPLACE INTO cursors VALUES (?, ?)", (node, at))

    # Custody: what keeps files, and what is left of those that ended. Sealed: an ended file's hash is a secret like any other

    def put_custody(self, kind: int, file_id: bytes, note: bytes) -> None:
        """Keep a note of this kind about a file, in place of the one before."""
        sealed = self._seal(note, _custody_identity(kind, file_id))
        with self._speaking(), self._transaction():
            self._db.execute("INSERT OR REPLACE INTO custody VALUES (?, ?, ?)", (kind, file_id, sealed))

    def custody_of(self, kind: int, file_id: bytes) -> bytes | None:
        """The note of this kind about a file, or None."""
        with self._speaking():
            found = self._db.execute("SELECT sealed FROM custody WHERE kind = ? AND file = ?", (kind, file_id)).fetchone()
        return None if found is None else self._open(found[0], _custody_identity(kind, file_id))

    def custody(self, kind: int) -> list[tuple[bytes, bytes]]:
        """Every note of this kind: (file id, note)."""
        with self._speaking():
            found = self._db.execute("SELECT file, sealed FROM custody WHERE kind = ? ORDER BY file", (kind,)).fetchall()
        return [(file_id, self._open(sealed, _custody_identity(kind, file_id))) for file_id, sealed in found]

    def drop_custody(self, kind: int, file_id: bytes) -> None:
        """Forget a note, if there is one."""
        with self._speaking(), self._transaction():
            self._db.execute("DELETE FROM custody WHERE kind = ? AND file = ?", (kind, file_id))

    # Manifests: public, kept to spare a question to the nodes

    def put_manifest(self, file_id: bytes, manifest: bytes) -> None:
        """Keep a manifest's bytes. Whoever takes them out checks them as if a node had sent them."""
        with self._speaking(), self._transaction():
            self._db.execute("INSERT OR REPLACE INTO manifests VALUES (?, ?)", (file_id, manifest))

    def manifest(self, file_id: bytes) -> bytes | None:
        """The kept manifest, or None."""
        with self._speaking():
            found = self._db.execute("SELECT manifest FROM manifests WHERE file = ?", (file_id,)).fetchone()
        return None if found is None else bytes(found[0])

    # Journal of interrupted puts: key and value are sealed, so neither paths nor file keys lie open

    def journal_put(self, key: bytes, value: bytes) -> None:
        """Note ``value`` under ``key``. Raises ValueError over ``journal_bytes_max``."""
        if len(value) > journal_bytes_max:
            raise ValueError("too much for one journal note")
        slot = self._slot(key)
        with self._speaking(), self._transaction():
            self._db.execute("INSERT OR REPLACE INTO journal VALUES (?, ?)", (slot, self._seal(canonical.encode([key, value]), slot)))

    def journal_get(self, key: bytes) -> bytes | None:
        """The note under ``key``, or None."""
        slot = self._slot(key)
        with self._speaking():
            found = self._db.execute("SELECT sealed FROM journal WHERE slot = ?", (slot,)).fetchone()
        return None if found is None else self._open_note(slot, found[0])[1]

    def journal_delete(self, key: bytes) -> None:
        """Forget the note under ``key``, if there is one."""
        with self._speaking(), self._transaction():
            self._db.execute("DELETE FROM journal WHERE slot = ?", (self._slot(key),))

    def journal(self) -> list[tuple[bytes, bytes]]:
        """Every note: (key, value)."""
        with self._speaking():
            return [self._open_note(slot, sealed) for slot, sealed in self._db.execute("SELECT slot, sealed FROM journal").fetchall()]

    # Inside

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA secure_delete = ON")  # what was erased must not stay readable in a free page
        self._db.execute("PRAGMA synchronous = NORMAL")  # a power cut may take the last seconds, which reindex brings back; close() syncs
        with self._transaction():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _schema.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO meta VALUES ('check', ?)", (self._seal(b"medshard", b"check"),))
            if version < _version:
                for statement in (("" if version == 2 else _schema_2) + _schema_3).split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_version}")
                version = _version
        if version != _version:
            raise Damaged(f"the index {self._path} has version {version}; this medshard knows version {_version}", hint=_reindex)
        found = self._db.execute("SELECT value FROM meta WHERE name = 'check'").fetchone()
        if found is None or self._open(found[0], b"check") != b"medshard":
            raise self._damaged("its check row is gone")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make all changes inside one transaction: one wait for the disk instead of one each."""
        with self._speaking(), self._transaction():
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        nested = self._db.in_transaction  # inside ``together``
        if not nested:
            self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            if not nested:
                self._db.execute("COMMIT")
        except BaseException:
            if not nested and self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Hold the connection, and turn SQLite's errors into ours."""
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise self._translated(error) from error

    def _translated(self, error: sqlite3.Error) -> MedshardError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Unavailable(f"the index {self._path} is in use by another medshard", hint="Try again when the other one has finished.")
        if code == sqlite3.SQLITE_FULL:
            return Full(f"no room on the disk for the index {self._path}", hint="Free some space and run the command again.")
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            return Absent(f"the index {self._path} cannot be opened for writing", hint="Check that the folder exists and belongs to you.")
        return self._damaged(str(error))

    def _damaged(self, why: str) -> Damaged:
        return Damaged(f"the index {self._path} is damaged: {why}", hint=_reindex)

    def _slot(self, key: bytes) -> bytes:
        return hmac.digest(self._slot_key, key, hashlib.sha256)

    def _seal(self, plain: bytes, bound: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._cipher.encrypt(nonce, plain, bound)

    def _open(self, sealed: bytes, bound: bytes) -> bytes:
        try:
            return self._cipher.decrypt(sealed[:12], sealed[12:], bound)
        except (InvalidTag, ValueError):
            raise self._damaged("an entry was altered, or belongs to another vault") from None

    def _open_note(self, slot: bytes, sealed: bytes) -> tuple[bytes, bytes]:
        note = canonical.decode(self._open(sealed, slot), bytes_max=journal_bytes_max + 2**16, what="journal note")
        fields = Fields(note, count=2, what="journal note")
        return fields.bytes(), fields.bytes()

    def _sealed(self, tag: bytes, row: Row) -> tuple[bytes, bytes, int, int, int, bytes]:
        member = -1 if row.member is None else row.member
        about: list[canonical.Value] = [row.sha256, row.size, row.name, row.media_type, [[k, v] for k, v in sorted(row.attributes.items())]]
        plain = canonical.encode([*about, row.owner] if row.owner else about)
        sealed = self._seal(plain, _identity(tag, row.file_id, member, row.ledger_index, row.put_time))
        return tag, row.file_id, member, row.ledger_index, row.put_time, sealed

    def _open_row(self, tag: bytes, file: bytes, member: int, ledger: int, put: int, sealed: bytes) -> Row:
        # Sealed by ourselves and bound to its row, so it is well-formed: decode without the canonical check, which takes 5 times as long.
        try:
            sha256, size, name, media_type, pairs, *owner = msgpack.unpackb(self._open(sealed, _identity(tag, file, member, ledger, put)))
        except (ValueError, TypeError) as error:
            raise self._damaged(str(error)) from None
        return Row(sha256, size, name, media_type, dict(pairs), file, None if member < 0 else member, put, ledger, *owner)

    def _open_grant(self, number: int, file: bytes, given: int, sealed: bytes) -> KnownGrant:
        try:
            return KnownGrant.from_bytes(
                self._open(sealed, _grant_identity(number, file, given=bool(given))), number, file, given=bool(given)
            )
        except Malformed as error:
            raise self._damaged(str(error)) from None


_add = "INSERT OR REPLACE INTO {} VALUES (?, ?, ?, ?, ?, ?)"
_forget = "DELETE FROM {}"
_grants = "SELECT number, file, given, sealed FROM grants {} ORDER BY number, file"
_by_tag = "SELECT tag, file, member, ledger, put, sealed FROM {} WHERE tag = ? ORDER BY ledger, file, member"
_by_file = "SELECT tag, file, member, ledger, put, sealed FROM {} WHERE file = ? ORDER BY member"
_after = """
SELECT tag, file, member, ledger, put, sealed FROM {} WHERE (put, ledger, file, member) > (?, ?, ?, ?)
ORDER BY put, ledger, file, member LIMIT ?
"""


def _table(received: object) -> str:
    return "received" if received else "files"


def _grant_identity(number: int, file: bytes, *, given: bool) -> bytes:
    return b"grant" + number.to_bytes(9) + bytes([given]) + file


def _custody_identity(kind: int, file: bytes) -> bytes:
    return b"custody" + bytes([kind]) + file


def _identity(tag: bytes, file: bytes, member: int, ledger: int, put: int) -> bytes:
    return (
        b"row"
        + b"".join(len(part).to_bytes(2) + part for part in (tag, file))
        + b"".join(n.to_bytes(9, signed=True) for n in (member, ledger, put))
    )
