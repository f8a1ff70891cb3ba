"""Writing instances into the catalog's tables: many at once, in as few statements as can be.

Law: to be called inside one change of the tables, whose first statement moves the clock; every study that is touched gets the clock's time,
so that other processes find what is new. Of one SOP Instance UID the newest bytes are served. A place in the store is never given up for
one in a spool: two gateways may get the same instance at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from medshard.gateway.model import Instance
from medshard.gateway.records import Records, of_level
from medshard.gateway.tables import Rows, Tables
from medshard.gateway.tags import Level
from medshard_protocol.errors import Unavailable

at_once: Final = 500  # values in one list: SQLite takes 32,766 parameters
Said = dict[str, Any]


class Filing:
    """One change."""

    def __init__(self, tables: Tables, records: Records) -> None:
        self._tables = tables
        self._records = records
        clock = tables.rows("UPDATE clock SET now = now + 1 RETURNING now")  # nobody else changes anything until we have ended
        if not clock:
            raise Unavailable("the DICOM index was made anew this moment", hint="try again")
        self.now = int(clock[0][0])
        self.studies: dict[int, Said] = {}  # what the rows of touched studies say now

    def put(self, instances: Sequence[Instance], gateway: bytes) -> None:
        """Add instances, or replace what is known of them. Those without a place wait in the spool of ``gateway``."""
        series_of = self._series(instances)
        lines = {}
        known = self._known(self._records.token("instance", each.uid) for each in instances)
        for each in instances:
            token, content = self._records.token("instance", each.uid), self._records.content(each)
            before = known.get(token, {}).get(content)
            if each.place is None and before is not None and before.place is not None:
                each = replace(each, place=before.place)
            known.setdefault(token, {})[content] = each
            series = series_of[each.study, each.series]
            file = each.place.file_id if each.place else None
            lines[token, content] = (series, token, content, file, None if file else gateway, self._records.sealed_instance(each))
        self._tables.many(_put_instance, lines.values())
        files = {each.place.file_id for each in instances if each.place}
        self._tables.many(put_file, [(file,) for file in files])
        self._choose({token: known[token] for token, _ in lines if len(known[token]) > 1})
        self._count({series for series, *_ in lines.values()})

    def forget(self, where: str, values: Sequence[object]) -> None:
        """Drop the instances of which a condition is true."""
        touched = {int(series) for (series,) in self._tables.rows(f"SELECT DISTINCT series FROM instances WHERE {where}", *values)}  # noqa: S608
        tokens = [token for (token,) in self._tables.rows(f"SELECT DISTINCT token FROM instances WHERE {where}", *values)]  # noqa: S608
        self._tables.rows(f"DELETE FROM instances WHERE {where}", *values)  # noqa: S608
        self._choose(self._known(tokens))
        self._tables.many("DELETE FROM summaries WHERE series = ?", [(series,) for series in touched])
        self._count(touched)

    # -- inside

    def _series(self, instances: Sequence[Instance]) -> dict[tuple[str, str], int]:
        """The row numbers of the series of these instances, after what is new of studies and series was written."""
        studies: dict[str, dict[str, str]] = {}
        series: dict[tuple[str, str], dict[str, str]] = {}
        for each in instances:
            studies.setdefault(each.study, {}).update(of_level(each.attributes, Level.PATIENT, Level.STUDY))
            series.setdefault((each.study, each.series), {}).update(of_level(each.attributes, Level.SERIES))
        token = self._records.token
        numbers: dict[str, int] = {}
        tokens = {uid: token("study", uid) for uid in studies}
        found = {bytes(line[1]): line for line in self._in("SELECT id, token, sealed FROM studies WHERE token IN", tokens.values())}
        for uid, attributes in studies.items():
            numbers[uid] = self._merged("study", tokens[uid], found.get(tokens[uid]), attributes, (tokens[uid], self.now))
        of_token = {(study, uid): (numbers[study], token("series", uid)) for study, uid in series}
        lines = self._in("SELECT id, study, token, sealed FROM series WHERE token IN", {each for _, each in of_token.values()})
        known = {(int(study), bytes(each)): (number, each, sealed) for number, study, each, sealed in lines}
        rows: dict[tuple[str, str], int] = {}
        for names, attributes in series.items():
            place = of_token[names]
            bound = tokens[names[0]] + place[1]
            rows[names] = self._merged("series", bound, known.get(place), attributes, place)
        return rows

    def _merged(self, kind: str, bound: bytes, found: Sequence[Any] | None, attributes: dict[str, str], place: tuple[object, ...]) -> int:
        """Write a study or series that is new, or of which something new is said; its row number."""
        if found is None:
            sealed = self._records.seal(kind, bound, {"attributes": attributes, "classes": []})
            sql = _add_study if kind == "study" else _add_series
            return int(self._tables.rows(sql, *place, sealed)[0][0])
        number, _, sealed = found
        said = self._records.open(kind, bound, sealed)
        merged = {**said["attributes"], **attributes}
        if merged != said["attributes"]:
            sealed = self._records.seal(kind, bound, {**said, "attributes": merged})
            self._tables.rows(f"UPDATE {'studies' if kind == 'study' else 'series'} SET sealed = ? WHERE id = ?", sealed, number)  # noqa: S608
        return int(number)

    def _known(self, tokens: Iterable[bytes]) -> dict[bytes, dict[bytes, Instance]]:
        """What is kept under these SOP Instance UIDs, by content."""
        found: dict[bytes, dict[bytes, Instance]] = {}
        for token, content, sealed, served in self._in(_known_instances, set(tokens)):
            found.setdefault(bytes(token), {})[bytes(content)] = self._records.opened_instance(token, content, sealed, served)
        return found

    def _choose(self, twins: dict[bytes, dict[bytes, Instance]]) -> None:
        """Say which of several bytes under one UID are served: 2: served and flagged; 0: kept, not served; 1: there is no other."""
        lines: list[tuple[int, bytes, bytes]] = []
        for token, of_token in twins.items():
            newest = max(of_token, key=lambda content: age(of_token[content]))
            for content in of_token:
                lines.append((0 if content != newest else 2 if len(of_token) > 1 else 1, token, content))
        self._tables.many("UPDATE instances SET served = ? WHERE token = ? AND content = ?", lines)

    def _count(self, touched: set[int]) -> None:
        """Count again what these series hold, and bring the rows of their studies up to date."""
        self._tables.many(_count_series, [(number, number) for number in touched])
        studies = {int(study) for (study,) in self._in("SELECT DISTINCT study FROM series WHERE id IN", touched)}
        for study in studies:
            ((token, sealed),) = self._tables.rows("SELECT token, sealed FROM studies WHERE id = ?", study)
            said = self._records.open("study", token, sealed)
            modalities, classes, counts = set(), set(), [0, 0]
            for number, of_series, instances, line in self._tables.rows(_series_of_study, study):
                series = self._records.open("series", bytes(token) + bytes(of_series), line)
                if number in touched:
                    series = self._with_classes(int(number), series, bytes(token) + bytes(of_series))
                if instances:
                    modalities.add(series["attributes"].get("modality", ""))
                    classes.update(series["classes"])
                    counts = [counts[0] + 1, counts[1] + int(instances)]
            said |= {"counts": counts, "modalities": sorted(modalities - {""}), "classes": sorted(classes - {""})}
            sealed = self._records.seal("study", token, said)
            self._tables.rows("UPDATE studies SET sealed = ?, changed = ? WHERE id = ?", sealed, self.now, study)
            self.studies[study] = said

    def _with_classes(self, number: int, said: Said, bound: bytes) -> Said:
        lines = self._tables.rows("SELECT token, content, sealed, served FROM instances WHERE series = ? AND served > 0", number)
        classes = sorted({self._records.opened_instance(*line).sop_class for line in lines})
        if classes != said["classes"]:
            said = {**said, "classes": classes}
            self._tables.rows("UPDATE series SET sealed = ? WHERE id = ?", self._records.seal("series", bound, said), number)
        return said

    def _in(self, sql: str, values: Iterable[object]) -> Rows:
        """``sql`` for lists of values of any length."""
        wanted = list(values)
        found: list[Sequence[Any]] = []
        for at in range(0, len(wanted), at_once):
            part = wanted[at : at + at_once]
            found += self._tables.rows(f"{sql} ({', '.join('?' * len(part))})", *part)
        return found


def age(instance: Instance) -> tuple[int, int, bytes]:
    """What is newer is greater."""
    return instance.received, instance.place.ledger_index if instance.place else 1 << 62, instance.sha256


_known_instances: Final = "SELECT token, content, sealed, served FROM instances WHERE token IN"
_put_instance: Final = """
INSERT INTO instances (series, token, content, file, gateway, served, sealed) VALUES (?, ?, ?, ?, ?, 1, ?)
ON CONFLICT (token, content) DO UPDATE
SET series = excluded.series, file = excluded.file, gateway = excluded.gateway, sealed = excluded.sealed"""
put_file: Final = "INSERT INTO files (file) VALUES (?) ON CONFLICT DO NOTHING"
_add_study: Final = "INSERT INTO studies (token, changed, sealed) VALUES (?, ?, ?) RETURNING id"
_add_series: Final = "INSERT INTO series (study, token, instances, sealed) VALUES (?, ?, 0, ?) RETURNING id"
_count_series: Final = """
UPDATE series SET instances = (SELECT count(*) FROM instances WHERE series = ? AND served > 0) WHERE id = ?"""
_series_of_study: Final = "SELECT id, token, instances, sealed FROM series WHERE study = ?"
