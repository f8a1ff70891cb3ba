"""The index of the archive: which studies, series and instances there are, and where each instance lies.

Law: on the disk nothing of a patient is in clear. A row is found by HMACs of its UIDs; what it says is sealed with a key that the caller
brings, and bound to its row. Studies are searched in a copy in memory, which is made when the catalog is opened. Nothing here is the only
copy of anything: what is in the store is taken from the vault's index again (``medshard reindex``), and what is not yet there is in the
spool. Blocking; safe to call from many threads.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medshard.gateway import mirror, tags
from medshard.gateway.matching import Test, test_for
from medshard.gateway.model import Instance, Place, Query, Row
from medshard.gateway.tags import Level
from medshard.keys import VaultKeys
from medshard.sealing import hkdf
from medshard_protocol.errors import Damaged

queue_max: Final = 512  # instances that wait in memory for one transaction
_batch: Final = 200
_version: Final = 1
_schema: Final = """
CREATE TABLE studies (id INTEGER PRIMARY KEY, token BLOB NOT NULL UNIQUE, sealed BLOB NOT NULL);
CREATE TABLE series (
    id INTEGER PRIMARY KEY, study INTEGER NOT NULL, token BLOB NOT NULL, instances INTEGER NOT NULL, sealed BLOB NOT NULL,
    UNIQUE (study, token)
);
CREATE INDEX series_by_token ON series (token);
CREATE TABLE instances (
    id INTEGER PRIMARY KEY, series INTEGER NOT NULL, token BLOB NOT NULL, content BLOB NOT NULL,
    file BLOB, member INTEGER, ledger INTEGER, served INTEGER NOT NULL, sealed BLOB NOT NULL,
    UNIQUE (token, content)
);
CREATE INDEX instances_by_series ON instances (series, served);
CREATE INDEX instances_by_file ON instances (file);
CREATE TABLE files (file BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""


def catalog_path(home: Path) -> Path:
    """The DICOM index of the vault at ``home``."""
    return home / "dicom.sqlite"


def catalog_key(keys: VaultKeys) -> bytes:
    """What the DICOM index is sealed with."""
    return hkdf(keys.root, b"", b"medshard/vault/v1/dicom-index")


class Catalog:
    """Open, or make, the catalog at ``path``. Raises Damaged for one that ``key`` (32 bytes) does not open."""

    def __init__(self, path: Path, key: bytes) -> None:
        self._path = path
        self._cipher = AESGCM(hmac.digest(key, b"medshard/dicom-index/v1/seal", hashlib.sha256))
        self._tokens = hmac.digest(key, b"medshard/dicom-index/v1/token", hashlib.sha256)
        self._lock = threading.RLock()
        self._versions: defaultdict[str, int] = defaultdict(int)
        self._forgotten = 0
        self._queue: dict[str, dict[bytes, Instance]] = {}
        self._queued = 0
        self._db = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
        try:
            os.chmod(path, 0o600)
            self._prepare()
            self._mirror = self._mirrored()
            self._data_version = int(self._db.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error as error:
            self._db.close()
            raise self._damaged(str(error)) from error
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Write down what waits and close."""
        with self._lock:
            self.flush()
            self._db.close()
            self._mirror.close()

    def refresh(self) -> bool:
        """Whether another process has written here since the last call. What it wrote is seen then."""
        with self._lock:
            (version,) = self._db.execute("PRAGMA data_version").fetchone()
            before, self._data_version = self._data_version, version
            if version == before:
                return False
            self._mirror.close()
            self._mirror = self._mirrored()
            return True

    def _mirrored(self) -> mirror.Mirror:
        made = mirror.Mirror()
        made.fill((number, self._open("study", token, sealed)) for number, token, sealed in self._db.execute(_all_studies))
        return made

    # -- change

    def put(self, instances: Iterable[Instance]) -> None:
        """Add instances, or replace what is known of them (the same UID and bytes). They are seen at once, and written down soon."""
        with self._lock:
            for instance in instances:
                self._queue.setdefault(instance.uid, {})[instance.sha256] = instance
                self._versions[instance.study] += 1
                self._queued += 1
            if self._queued >= queue_max:
                self.flush()

    def flush(self) -> None:
        """Write down what waits: durable on return."""
        with self._lock:
            if not self._queue:
                return
            queue = self._queue
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                touched: dict[int, set[int]] = {}
                memory: dict[str, Any] = {}
                for per_uid in queue.values():
                    for instance in per_uid.values():
                        study, series = self._write(instance, memory)
                        touched.setdefault(study, set()).add(series)
                for study, of_it in touched.items():
                    self._count(study, of_it)
            self._queue, self._queued = {}, 0

    def forget(self, files: Iterable[bytes]) -> None:
        """Drop the instances of files that are no longer in the vault."""
        self._forgotten += 1
        self.flush()
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for file in files:
                rows = self._db.execute("SELECT DISTINCT series FROM instances WHERE file = ?", (file,)).fetchall()
                self._db.execute("DELETE FROM instances WHERE file = ?", (file,))
                self._db.execute("DELETE FROM files WHERE file = ?", (file,))
                for (series,) in rows:
                    (study,) = self._db.execute("SELECT study FROM series WHERE id = ?", (series,)).fetchone()
                    self._count(study, {series})

    def note_files(self, files: Iterable[bytes]) -> None:
        """Remember files of the vault that were looked at, whether there was DICOM in them or not."""
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR IGNORE INTO files VALUES (?)", ((file,) for file in files))

    def files(self) -> set[bytes]:
        """The files of the vault that were looked at."""
        with self._lock:
            return {file for (file,) in self._db.execute("SELECT file FROM files")}

    # -- look

    def instances(self, uid: str) -> list[Instance]:
        """All that is kept under one SOP Instance UID, the one that is served first."""
        with self._lock:
            token = self._token("instance", uid)
            found = {each.sha256: each for each in self._load("i.token = ?", (token,))} | self._queue.get(uid, {})
        several = len(found) > 1
        kept = [_with_flag(each, several) for each in found.values()]
        return sorted(kept, key=_age, reverse=True)

    def served(self, study: str, series: str | None = None, uids: Iterable[str] | None = None) -> list[Instance]:
        """The instances of a study or a series that are served, in the order of their instance numbers; or those of them with ``uids``."""
        self.flush()
        where, values = "s.study = (SELECT id FROM studies WHERE token = ?) AND i.served > 0", [self._token("study", study)]
        if series is not None:
            where, values = where + " AND s.token = ?", [*values, self._token("series", series)]
        with self._lock:
            found = list(self._load(where, values))
        wanted = None if uids is None else set(uids)
        return sorted((each for each in found if wanted is None or each.uid in wanted), key=_by_number)

    def version(self, study: str) -> tuple[int, int]:
        """Another one whenever something may have changed in a study."""
        return self._versions.get(study, 0), self._forgotten

    def files_of(self, study: str) -> set[bytes]:
        """The files that hold what is served of a study, as far as it is written down."""
        with self._lock:
            return {file for (file,) in self._db.execute(_files_of_study, (self._token("study", study),))}

    def find(self, query: Query) -> Iterator[Row]:
        """Every match at the level of ``query``, newest study first; ``offset`` and ``limit`` count matches."""
        self.flush()
        rows = self._find(query)
        return islice(rows, query.offset, None if query.limit is None else query.offset + query.limit)

    def counts(self) -> tuple[int, int, int]:
        """How many studies, series and instances there are."""
        self.flush()
        with self._lock:
            studies, series, instances = self._db.execute(
                "SELECT (SELECT count(*) FROM studies), count(*), coalesce(sum(instances), 0) FROM series"
            ).fetchone()
        return int(studies), int(series), int(instances)

    # -- inside: finding

    def _find(self, query: Query) -> Iterator[Row]:
        tests = {tag: test for tag, value in query.keys.items() if (test := test_for(tag, value)) and tags.level_of(tag) is not None}
        own = {tag: test for tag, test in tests.items() if (tags.level_of(tag) or Level.PATIENT) <= Level.STUDY}
        patients: set[tuple[str | None, str | None]] = set()
        numbers = self._studies_by_uid(query) if query.level > Level.PATIENT else None
        for number, study in self._candidates(query.keys, numbers):
            if not _meets(study, own):
                continue
            if query.level > Level.PATIENT:
                yield from self._below(query, tests, number, study)
            elif (who := (study.get(tags.PATIENT_ID), study.get(0x00100021))) not in patients:
                patients.add(who)
                with self._lock:
                    patient = self._mirror.patient(study)
                yield Row(Level.PATIENT, patient)

    def _candidates(self, keys: Mapping[int, str], numbers: list[int] | None) -> Iterator[tuple[int, dict[int, str]]]:
        """Studies that may match, newest first, in growing portions, so that a first page is there at once."""
        below, most = 1 << 62, _batch
        while True:
            with self._lock:
                found = self._mirror.studies(keys, numbers, below, most)
                studies = self._mirror.rows(found)
            yield from studies
            if len(found) < most:
                return
            below, most = found[-1], min(2 * most, 10_000)

    def _studies_by_uid(self, query: Query) -> list[int] | None:
        """The studies of the series or instances that are named by UID, where no study is; None where none is named."""
        if query.keys.get(tags.STUDY_UID):
            return None
        for tag, kind, sql in (
            (tags.SOP_UID, "instance", "SELECT s.study FROM instances i JOIN series s ON s.id = i.series WHERE i.token = ?"),
            (tags.SERIES_UID, "series", "SELECT study FROM series WHERE token = ?"),
        ):
            if value := query.keys.get(tag, "").strip(" \0*"):
                with self._lock:
                    return [number for uid in value.split("\\") for (number,) in self._db.execute(sql, (self._token(kind, uid),))]
        return None

    def _below(self, query: Query, tests: Mapping[int, Test], number: int, study: Mapping[int, str]) -> Iterator[Row]:
        if query.level is Level.STUDY:
            yield Row(Level.STUDY, study)
            return
        of_series = {tag: test for tag, test in tests.items() if tags.level_of(tag) is Level.SERIES}
        of_instance = {tag: test for tag, test in tests.items() if tags.level_of(tag) is Level.INSTANCE}
        with self._lock:
            lines = self._db.execute(_series_of_study, (number,)).fetchall()
        for series, token, count, sealed in lines:
            attributes = {**study, **_tagged(self._open("series", token, sealed)["attributes"]), tags.SERIES_INSTANCES: str(count)}
            if not _meets(attributes, of_series):
                continue
            if query.level is Level.SERIES:
                yield Row(Level.SERIES, attributes)
                continue
            with self._lock:
                found = sorted(self._load("i.series = ? AND i.served > 0", (series,)), key=_by_number)
            for instance in found:
                whole = {**attributes, **_tagged(instance.attributes)}
                if _meets(whole, of_instance):
                    yield Row(Level.INSTANCE, whole)

    def _load(self, where: str, values: Sequence[object]) -> Iterator[Instance]:
        sql = _instances + where
        for token, sealed, file, member, ledger, served in self._db.execute(sql, values).fetchall():
            said = self._open("instance", token, sealed)
            place = None if file is None else Place(file, None if member < 0 else member, ledger)
            known = self._queue.get(said["uid"], {}).get(said["sha256"])
            yield known or Instance(
                said["study"], said["series"], said["uid"], said["size"], said["sha256"], said["received"], said["attributes"],
                place, served > 1,
            )  # fmt: skip

    # -- inside: writing

    def _write(self, instance: Instance, memory: dict[str, Any]) -> tuple[int, int]:
        """Write one instance and what it says of its study and series; their row numbers."""
        parts: dict[Level, dict[str, str]] = {level: {} for level in Level}
        for name, text in instance.attributes.items():
            known = tags.by_name.get(name)
            parts[known.level if known else Level.INSTANCE][name] = text
        study = self._upsert("study", instance.study, {**parts[Level.PATIENT], **parts[Level.STUDY]}, None, memory)
        series = self._upsert("series", instance.series, parts[Level.SERIES], study, memory)
        token, content = self._token("instance", instance.uid), self._token("content", instance.sha256.hex())
        sealed = self._seal("instance", token, {
            "study": instance.study, "series": instance.series, "uid": instance.uid, "size": instance.size, "sha256": instance.sha256,
            "received": instance.received, "attributes": parts[Level.INSTANCE],
        })  # fmt: skip
        place = instance.place
        where = (place.file_id, -1 if place.member is None else place.member, place.ledger_index) if place else (None, None, None)
        self._db.execute(
            _add_instance,
            (series, token, content, *where, sealed),
        )
        if place:
            self._db.execute("INSERT OR IGNORE INTO files VALUES (?)", (place.file_id,))
        twins = [(number, self._open("instance", token, blob)) for number, blob in self._db.execute(_twins, (token,))]
        if len(twins) > 1:  # 2: served and flagged; 0: kept, not served
            newest = max(twins, key=lambda twin: (twin[1]["received"], twin[0]))[0]
            self._db.executemany("UPDATE instances SET served = ? WHERE id = ?", ((2 * (number == newest), number) for number, _ in twins))
        return study, series

    def _upsert(self, kind: str, uid: str, attributes: dict[str, str], study: int | None, memory: dict[str, Any]) -> int:
        """The row number of a study or series, after what is new of it was written. ``memory`` spares looking at each for every slice."""
        key = f"{study}/{uid}"
        if known := memory.get(key):
            number, before = known
            if all(before.get(name) == text for name, text in attributes.items()):
                return int(number)
        token = self._token(kind, uid)
        found = self._db.execute(*_find_study(token) if study is None else _find_series(study, token)).fetchone()
        said = self._open(kind, token, found[1]) if found else {"attributes": {}, "classes": []}
        merged = {**said["attributes"], **attributes}
        if found is None:
            sealed = self._seal(kind, token, {**said, "attributes": merged})
            if study is None:
                cursor = self._db.execute("INSERT INTO studies (token, sealed) VALUES (?, ?)", (token, sealed))
            else:
                cursor = self._db.execute(_add_series, (study, token, sealed))
            number = cursor.lastrowid
        else:
            number = found[0]
            if merged != said["attributes"]:
                sealed = self._seal(kind, token, {**said, "attributes": merged})
                self._db.execute(f"UPDATE {'studies' if study is None else 'series'} SET sealed = ? WHERE id = ?", (sealed, number))  # noqa: S608
        memory[key] = (number, merged)
        return int(number)

    def _count(self, study: int, touched: set[int]) -> None:
        """Count again what these series hold, and bring the study's row up to date, on the disk and in memory."""
        for series in touched:
            self._db.execute(
                "UPDATE series SET instances = (SELECT count(*) FROM instances WHERE series = ?1 AND served > 0) WHERE id = ?1", (series,)
            )
        lines = self._db.execute("SELECT id, token, instances, sealed FROM series WHERE study = ?", (study,)).fetchall()
        modalities, classes, instances = set(), set(), 0
        for number, token, count, sealed in lines:
            said = self._open("series", token, sealed)
            if number in touched:
                fresh = {each.sop_class for each in self._load("i.series = ? AND i.served > 0", (number,))}
                if sorted(fresh) != said["classes"]:
                    said["classes"] = sorted(fresh)
                    self._db.execute("UPDATE series SET sealed = ? WHERE id = ?", (self._seal("series", token, said), number))
            if count:
                modalities.add(said["attributes"].get("modality", ""))
                classes.update(said["classes"])
                instances += count
        token, sealed = self._db.execute("SELECT token, sealed FROM studies WHERE id = ?", (study,)).fetchone()
        said = self._open("study", token, sealed)
        said["counts"] = [sum(1 for line in lines if line[2]), instances]
        said["modalities"], said["classes"] = sorted(modalities - {""}), sorted(classes - {""})
        self._db.execute("UPDATE studies SET sealed = ? WHERE id = ?", (self._seal("study", token, said), study))
        self._mirror.put(study, said)

    # -- inside: the file

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # an instance leaves the spool once its row is here
        self._db.execute("PRAGMA temp_store = MEMORY")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                for statement in _schema.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO meta VALUES ('check', ?)", (self._seal("check", b"", {"is": "medshard"}),))
                self._db.execute(f"PRAGMA user_version = {_version}")
        elif version != _version:
            raise self._damaged(f"it has version {version}, and this medshard knows version {_version}")
        (sealed,) = self._db.execute("SELECT value FROM meta WHERE name = 'check'").fetchone() or (b"",)
        self._open("check", b"", sealed)

    def _token(self, kind: str, uid: str) -> bytes:
        return hmac.digest(self._tokens, f"{kind}/{uid}".encode(), hashlib.sha256)[:16]

    def _seal(self, kind: str, token: bytes, value: object) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._cipher.encrypt(nonce, msgpack.packb(value), kind.encode() + token)

    def _open(self, kind: str, token: bytes, sealed: bytes) -> Any:
        try:
            return msgpack.unpackb(self._cipher.decrypt(sealed[:12], sealed[12:], kind.encode() + token))
        except (InvalidTag, ValueError):
            raise self._damaged("an entry was altered, or belongs to another vault") from None

    def _damaged(self, why: str) -> Damaged:
        return Damaged(f"the DICOM index {self._path} is damaged: {why}", hint="run `medshard reindex`: it makes it again from the store")


_all_studies: Final = "SELECT id, token, sealed FROM studies"
_instances: Final = """
SELECT i.token, i.sealed, i.file, i.member, i.ledger, i.served FROM instances i JOIN series s ON s.id = i.series WHERE """
_add_instance: Final = """
INSERT OR REPLACE INTO instances (series, token, content, file, member, ledger, served, sealed) VALUES (?, ?, ?, ?, ?, ?, 1, ?)"""
_series_of_study: Final = "SELECT id, token, instances, sealed FROM series WHERE study = ? AND instances > 0"
_add_series: Final = "INSERT INTO series (study, token, instances, sealed) VALUES (?, ?, 0, ?)"
_files_of_study: Final = """
SELECT DISTINCT i.file FROM studies t JOIN series s ON s.study = t.id JOIN instances i ON i.series = s.id
WHERE t.token = ? AND i.served > 0 AND i.file IS NOT NULL"""
_twins: Final = "SELECT id, sealed FROM instances WHERE token = ?"


def _find_study(token: bytes) -> tuple[str, tuple[object, ...]]:
    return "SELECT id, sealed FROM studies WHERE token = ?", (token,)


def _find_series(study: int, token: bytes) -> tuple[str, tuple[object, ...]]:
    return "SELECT id, sealed FROM series WHERE study = ? AND token = ?", (study, token)


def _meets(attributes: Mapping[int, str], tests: Mapping[int, Test]) -> bool:
    return all(test(attributes.get(tag, "")) for tag, test in tests.items())


def _tagged(attributes: Mapping[str, str]) -> dict[int, str]:
    return {known.tag: text for name, text in attributes.items() if (known := tags.by_name.get(name))}


def _age(instance: Instance) -> tuple[int, int]:
    return instance.received, instance.place.ledger_index if instance.place else 1 << 62


def _by_number(instance: Instance) -> tuple[int, str]:
    text = instance.attributes.get("instance-number", "")
    return int(text) if text.lstrip("-").isdecimal() else 0, instance.uid


def _with_flag(instance: Instance, flagged: bool) -> Instance:
    return instance if instance.flagged == flagged else replace(instance, flagged=flagged)
