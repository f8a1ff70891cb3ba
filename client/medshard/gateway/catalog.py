"""The index of the archive: which studies, series and instances there are, and where each instance lies.

Law: whoever keeps the tables, a disk here or a database that several gateways share, gets nothing of a patient in clear (records.py says
how). Studies are searched in a copy in memory, which is made when the catalog is opened and follows what other processes write. Nothing
here is the only copy of anything: what is in the store is taken from the vault's index again (``medshard reindex``), and what is not yet
there is in a spool. Blocking; safe to call from many threads.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

from medshard.gateway import mirror, tags
from medshard.gateway.filing import Filing, age, put_file
from medshard.gateway.matching import Test, test_for
from medshard.gateway.model import Instance, Query, Row
from medshard.gateway.records import Records
from medshard.gateway.tables import SqliteTables, Tables
from medshard.gateway.tags import Level
from medshard.keys import VaultKeys
from medshard.sealing import hkdf
from medshard_protocol.errors import Unavailable

queue_max: Final = 512  # instances that wait in memory for one transaction
summary_bytes_max: Final = 8 * 1024 * 1024
_batch: Final = 200
_files_at_once: Final = 100
T = TypeVar("T")


def catalog_path(home: Path) -> Path:
    """The DICOM index of the vault at ``home``, where it is in no database."""
    return home / "dicom.sqlite"


def catalog_key(keys: VaultKeys) -> bytes:
    """What the DICOM index in the vault's home is sealed with."""
    return _sealed_with(keys.at_home.root)


def catalog_keys(keys: VaultKeys) -> list[bytes]:
    """What an index that several homes of a vault share may be sealed with: whichever made it, before a rotation or after."""
    return list(dict.fromkeys(map(_sealed_with, (keys.at_home.root, *(each.root for each in keys.line)))))


def _sealed_with(root: bytes) -> bytes:
    return hkdf(root, b"", b"medshard/vault/v1/dicom-index")


class Catalog:
    """Open, or make, the catalog in these tables or this file. Raises Damaged for one that ``key`` (32 bytes) does not open.

    ``gateway`` says in whose spool an instance waits that has no place in the store yet.
    """

    def __init__(self, tables: Tables | Path, key: bytes, gateway: bytes = b"") -> None:
        self._tables = SqliteTables(tables) if isinstance(tables, Path) else tables
        self._records = Records(key, self._tables.where)
        self._gateway = gateway
        self._lock = threading.RLock()
        self._versions: defaultdict[str, int] = defaultdict(int)
        self._elsewhere = 0  # changes that others made
        self._queue: dict[str, dict[bytes, Instance]] = {}
        self._queued = 0
        try:
            self._now, self.made = self._begun()
            self._mirror = self._mirrored()
        except BaseException:
            self._tables.close()
            raise

    @property
    def shared(self) -> bool:
        """Whether other gateways may work with it."""
        return self._tables.shared

    def close(self) -> None:
        """Write down what waits and close."""
        with self._lock:
            try:
                with contextlib.suppress(Unavailable):  # what waits is in a spool, or in the vault's index
                    self.flush()
            finally:
                self._tables.close()
                self._mirror.close()

    def refresh(self) -> bool:
        """Whether another process has written here since the last call. What it wrote is seen then. ``made`` is another after a reset."""
        with self._lock:
            ((now, made),) = self._tables.rows("SELECT now, made FROM clock") or ((0, b""),)
            if (now, bytes(made)) == (self._now, self.made):
                return False
            if bytes(made) != self.made:
                self._now, self.made = self._begun()
                self._mirror.close()
                self._mirror = self._mirrored()
            else:
                for number, token, sealed in self._tables.rows("SELECT id, token, sealed FROM studies WHERE changed > ?", self._now):
                    self._mirror.put(number, self._records.open("study", token, sealed))
                self._now = int(now)
            self._elsewhere += 1
            return True

    # -- change

    def put(self, instances: Iterable[Instance]) -> None:
        """Add instances, or replace what is known of them (the same UID and bytes). They are seen at once, and written down soon."""
        with self._lock:
            for instance in instances:
                self._queue.setdefault(instance.uid, {})[instance.sha256] = instance
                self._versions[instance.study] += 1
                self._queued += 1
            if self._queued >= queue_max:
                with contextlib.suppress(Unavailable):  # they stay in the queue, and those that wait in the spool as well
                    self.flush()

    def flush(self) -> None:
        """Write down what waits: durable on return."""
        with self._lock:
            if self._queue:
                waiting = [each for per_uid in self._queue.values() for each in per_uid.values()]
                self._change(lambda filing: filing.put(waiting, self._gateway))
                self._queue, self._queued = {}, 0

    def forget(self, files: Iterable[bytes]) -> None:
        """Drop the instances of files that are no longer in the vault."""
        gone = list(files)
        self._elsewhere += 1
        self.flush()
        for at in range(0, len(gone), _files_at_once):
            part = gone[at : at + _files_at_once]
            marks = ", ".join("?" * len(part))

            def drop(filing: Filing, part: list[bytes] = part, marks: str = marks) -> None:
                filing.forget(f"file IN ({marks})", part)
                if not self.shared:  # another gateway may still hear of it, and must not take it for new
                    self._tables.rows(f"DELETE FROM files WHERE file IN ({marks})", *part)  # noqa: S608

            self._change(drop)

    def forget_waiting(self, kept: Iterable[tuple[str, bytes]]) -> None:
        """Drop what would wait in this gateway's spool, but for what is there (SOP Instance UID, SHA-256): a spool may have been lost."""
        self.flush()
        there = {(self._records.token("instance", uid), self._records.token("content", sha256.hex())) for uid, sha256 in kept}
        with self._lock:
            lines = self._tables.rows("SELECT token, content FROM instances WHERE file IS NULL AND gateway = ?", self._gateway)
            lost = [(token, content) for token, content in lines if (bytes(token), bytes(content)) not in there]
            for each in lost:
                self._change(lambda filing, each=each: filing.forget("token = ? AND content = ? AND file IS NULL", each))  # type: ignore[misc]

    def note_files(self, files: Iterable[bytes]) -> None:
        """Remember files of the vault that were looked at, whether there was DICOM in them or not."""
        if noted := [(file,) for file in files]:
            with self._lock:
                self._tables.change(lambda: self._tables.many(put_file, noted))

    def files(self) -> set[bytes]:
        """The files of the vault that were looked at."""
        with self._lock:
            return {bytes(file) for (file,) in self._tables.rows("SELECT file FROM files")}

    def stored_files(self) -> set[bytes]:
        """The files that instances lie in, whoever stored them."""
        with self._lock:
            return {bytes(file) for (file,) in self._tables.rows("SELECT DISTINCT file FROM instances WHERE file IS NOT NULL")}

    def keep_summary(self, study: str, series: str, summary: bytes) -> None:
        """Keep something small that was made of a series, until an instance of it is forgotten. Too much of it is not kept."""
        token = self._records.token("study", study) + self._records.token("series", series)
        if len(summary) > summary_bytes_max:
            return
        sealed = self._records.seal("summary", token, summary)
        self.flush()
        with self._lock:
            if lines := self._tables.rows(_series_by_tokens, token[:16], token[16:]):
                self._tables.change(lambda: self._tables.rows(_put_summary, lines[0][0], sealed))

    def summary(self, study: str, series: str) -> bytes | None:
        """What was kept of a series."""
        token = self._records.token("study", study) + self._records.token("series", series)
        with self._lock:
            lines = self._tables.rows(_summary, token[:16], token[16:])
        found: bytes | None = self._records.open("summary", token, lines[0][0]) if lines else None
        return found

    # -- look

    def instances(self, uid: str) -> list[Instance]:
        """All that is kept under one SOP Instance UID, the one that is served first."""
        with self._lock:
            token = self._records.token("instance", uid)
            found = {each.sha256: each for each in self._load("i.token = ?", token)} | self._queue.get(uid, {})
        several = len(found) > 1
        kept = [_with_flag(each, several) for each in found.values()]
        return sorted(kept, key=age, reverse=True)

    def served(self, study: str, series: str | None = None, uids: Iterable[str] | None = None) -> list[Instance]:
        """The instances of a study or a series that are served, in the order of their instance numbers; or those of them with ``uids``."""
        self.flush()
        where, values = "s.study = (SELECT id FROM studies WHERE token = ?) AND i.served > 0", [self._records.token("study", study)]
        if series is not None:
            where, values = where + " AND s.token = ?", [*values, self._records.token("series", series)]
        with self._lock:
            found = list(self._load(where, *values))
        self._records.check_home(fits=all(each.study == study and series in (None, each.series) for each in found))
        wanted = None if uids is None else set(uids)
        return sorted((each for each in found if wanted is None or each.uid in wanted), key=_by_number)

    def version(self, study: str) -> tuple[int, int]:
        """Another one whenever something may have changed in a study."""
        return self._versions.get(study, 0), self._elsewhere

    def files_of(self, study: str) -> set[bytes]:
        """The files that hold what is served of a study, as far as it is written down."""
        with self._lock:
            return {bytes(file) for (file,) in self._tables.rows(_files_of_study, self._records.token("study", study))}

    def find(self, query: Query) -> Iterator[Row]:
        """Every match at the level of ``query``, newest study first; ``offset`` and ``limit`` count matches."""
        self.flush()
        if self.shared:
            self.refresh()
        rows = self._find(query)
        return islice(rows, query.offset, None if query.limit is None else query.offset + query.limit)

    def counts(self) -> tuple[int, int, int]:
        """How many studies, series and instances there are."""
        self.flush()
        with self._lock:
            ((studies, series, instances),) = self._tables.rows(
                "SELECT (SELECT count(*) FROM studies), count(*), coalesce(sum(instances), 0) FROM series"
            )
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
                tokens = [self._records.token(kind, uid) for uid in value.split("\\")]
                with self._lock:
                    return [int(number) for token in tokens for (number,) in self._tables.rows(sql, token)]
        return None

    def _below(self, query: Query, tests: Mapping[int, Test], number: int, study: Mapping[int, str]) -> Iterator[Row]:
        if query.level is Level.STUDY:
            yield Row(Level.STUDY, study)
            return
        of_series = {tag: test for tag, test in tests.items() if tags.level_of(tag) is Level.SERIES}
        of_instance = {tag: test for tag, test in tests.items() if tags.level_of(tag) is Level.INSTANCE}
        bound = self._records.token("study", study.get(tags.STUDY_UID, ""))
        with self._lock:
            lines = self._tables.rows(_series_of_study, number)
        for series, token, count, sealed in lines:
            said = self._records.open("series", bound + bytes(token), sealed)
            attributes = {**study, **_tagged(said["attributes"]), tags.SERIES_INSTANCES: str(count)}
            if not _meets(attributes, of_series):
                continue
            if query.level is Level.SERIES:
                yield Row(Level.SERIES, attributes)
                continue
            with self._lock:
                found = sorted(self._load("i.series = ? AND i.served > 0", series), key=_by_number)
            self._records.check_home(fits=all(self._records.token("series", each.series) == token for each in found))
            for instance in found:
                whole = {**attributes, **_tagged(instance.attributes)}
                if _meets(whole, of_instance):
                    yield Row(Level.INSTANCE, whole)

    def _load(self, where: str, *values: object) -> Iterator[Instance]:
        for token, content, sealed, served in self._tables.rows(_instances + where, *values):
            each = self._records.opened_instance(token, content, sealed, served)
            yield self._queue.get(each.uid, {}).get(each.sha256, each)

    # -- inside: changing

    def _change(self, act: Callable[[Filing], None]) -> None:
        with self._lock:

            def change() -> Filing:
                filing = Filing(self._tables, self._records)
                act(filing)
                return filing

            filing = self._tables.change(change)
            for study, said in filing.studies.items():
                self._mirror.put(study, said)
            if filing.now == self._now + 1:  # else others have written in between, and ``refresh`` sees to it
                self._now = filing.now

    def _begun(self) -> tuple[int, bytes]:
        """The clock; started where the tables are new. Raises Damaged for tables of another key."""
        if not (lines := self._tables.rows(_clock)):
            made = os.urandom(16)
            begin = made, self._records.seal("check", made, "medshard")
            self._tables.change(lambda: self._tables.rows(_start, *begin))
            lines = self._tables.rows(_clock)
        now, made, sealed = lines[0]
        self._records.open("check", bytes(made), sealed)
        return int(now), bytes(made)

    def _mirrored(self) -> mirror.Mirror:
        made = mirror.Mirror()
        lines = self._tables.rows("SELECT id, token, sealed FROM studies")
        made.fill((number, self._records.open("study", token, sealed)) for number, token, sealed in lines)
        return made


_clock: Final = "SELECT now, made, checked FROM clock"
_start: Final = "INSERT INTO clock (one, now, made, checked) VALUES (1, 0, ?, ?) ON CONFLICT DO NOTHING"
_instances: Final = """
SELECT i.token, i.content, i.sealed, i.served FROM instances i JOIN series s ON s.id = i.series WHERE """
_series_of_study: Final = "SELECT id, token, instances, sealed FROM series WHERE study = ? AND instances > 0"
_series_by_tokens: Final = "SELECT s.id FROM series s JOIN studies t ON t.id = s.study WHERE t.token = ? AND s.token = ?"
_summary: Final = """
SELECT m.sealed FROM summaries m JOIN series s ON s.id = m.series JOIN studies t ON t.id = s.study WHERE t.token = ? AND s.token = ?"""
_put_summary: Final = "INSERT INTO summaries (series, sealed) VALUES (?, ?) ON CONFLICT (series) DO UPDATE SET sealed = excluded.sealed"
_files_of_study: Final = """
SELECT DISTINCT i.file FROM studies t JOIN series s ON s.study = t.id JOIN instances i ON i.series = s.id
WHERE t.token = ? AND i.served > 0 AND i.file IS NOT NULL"""


def _meets(attributes: Mapping[int, str], tests: Mapping[int, Test]) -> bool:
    return all(test(attributes.get(tag, "")) for tag, test in tests.items())


def _tagged(attributes: Mapping[str, str]) -> dict[int, str]:
    return {known.tag: text for name, text in attributes.items() if (known := tags.by_name.get(name))}


def _by_number(instance: Instance) -> tuple[int, str]:
    text = instance.attributes.get("instance-number", "")
    return int(text) if text.lstrip("-").isdecimal() else 0, instance.uid


def _with_flag(instance: Instance, flagged: bool) -> Instance:
    return instance if instance.flagged == flagged else replace(instance, flagged=flagged)
