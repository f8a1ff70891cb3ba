"""Every study, open, in memory: what patient and study queries search.

Law: it lives in memory alone and is made from the catalog, which tells it every change. SQLite sorts out most studies here; whether one
really matches is for matching.py to say. The caller holds a lock.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from medshard.gateway import tags
from medshard.gateway.matching import bounds, folded, glob, is_universal, name_pattern, ordered, vr_of
from medshard.gateway.tags import Level

_shown: Final = tuple(tag for tag, each in tags.known.items() if each.level <= Level.STUDY)
_counts: Final = (tags.STUDY_SERIES, tags.STUDY_INSTANCES, tags.MODALITIES_IN_STUDY, tags.SOP_CLASSES_IN_STUDY)
_columns: Final = (*_shown, *_counts)
_names: Final = tuple(tag for tag in _shown if tags.known[tag].vr == "PN")
_single: Final = (tags.PATIENT_ID, 0x00100021, 0x00100040, 0x00080050, 0x00080080, 0x00081030, 0x00200010)  # of one value each
_ids_max: Final = 500  # SQLite takes 32,766 parameters


def _column(tag: int) -> str:
    return f"t{tag:08x}"


def _key(tag: int) -> str:
    return f"k{tag:08x}"


class Mirror:
    """Studies by the row numbers of the catalog."""

    def __init__(self) -> None:
        self._db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        columns = ", ".join(["id INTEGER PRIMARY KEY", *map(_column, _columns), *map(_key, _names)])
        self._db.execute(f"CREATE TABLE s ({columns})")
        for tag in (tags.STUDY_UID, tags.PATIENT_ID, 0x00080050, 0x00080020):
            self._db.execute(f"CREATE INDEX i{tag:08x} ON s ({_column(tag)})")
        self._insert = f"INSERT OR REPLACE INTO s VALUES ({', '.join('?' * (1 + len(_columns) + len(_names)))})"  # noqa: S608

    def close(self) -> None:
        """Forget everything."""
        self._db.close()

    def fill(self, studies: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Take in many studies."""
        self._db.execute("BEGIN")
        self._db.executemany(self._insert, (self._line(number, said) for number, said in studies if sum(said.get("counts", ()))))
        self._db.execute("COMMIT")

    def put(self, number: int, said: Mapping[str, Any]) -> None:
        """Take in one study, or drop one that has nothing left."""
        if sum(said["counts"]):
            self._db.execute(self._insert, self._line(number, said))
        else:
            self._db.execute("DELETE FROM s WHERE id = ?", (number,))

    def studies(self, keys: Mapping[int, str], numbers: Sequence[int] | None, below: int, most: int) -> list[int]:
        """At most ``most`` row numbers ``below`` one, of studies that may match, newest first; of ``numbers`` alone where given."""
        where, values = self._where(keys)
        if numbers is not None:
            where = f"{where} AND id IN ({', '.join(map(str, numbers))})"
        sql = f"SELECT id FROM s WHERE {where} AND id < ? ORDER BY id DESC LIMIT ?"  # noqa: S608
        return [number for (number,) in self._db.execute(sql, [*values, below, most])]

    def rows(self, numbers: Sequence[int]) -> list[tuple[int, dict[int, str]]]:
        """These studies with all their attributes, in this order."""
        found: dict[int, dict[int, str]] = {}
        marks = ", ".join("?" * len(numbers))
        columns = ", ".join(map(_column, _columns))
        for number, *values in self._db.execute(f"SELECT id, {columns} FROM s WHERE id IN ({marks})", list(numbers)):  # noqa: S608
            found[number] = {tag: str(value) for tag, value in zip(_columns, values, strict=True) if value not in (None, "")}
        return [(number, found[number]) for number in numbers if number in found]

    def patient(self, study: Mapping[int, str]) -> dict[int, str]:
        """The patient of a study, with counts over all of his or her studies."""
        count = f"SELECT count(*), sum({_column(_counts[0])}), sum({_column(_counts[1])}) FROM s WHERE {_column(tags.PATIENT_ID)} IS ?"  # noqa: S608
        counts = self._db.execute(count, (study.get(tags.PATIENT_ID),)).fetchone()
        shown = {tag: text for tag, text in study.items() if tags.level_of(tag) is Level.PATIENT}
        names = (tags.PATIENT_STUDIES, tags.PATIENT_SERIES, tags.PATIENT_INSTANCES)
        return shown | {tag: str(number or 0) for tag, number in zip(names, counts, strict=True)}

    def _line(self, number: int, said: Mapping[str, Any]) -> list[object]:
        attributes = said["attributes"]
        values: list[object] = [number, *(attributes.get(tags.known[tag].name) for tag in _shown)]
        values += [*said["counts"], "\\".join(said["modalities"]), "\\".join(said["classes"])]
        return [*values, *(folded(attributes.get(tags.known[tag].name, "")) for tag in _names)]

    def _where(self, keys: Mapping[int, str]) -> tuple[str, list[str]]:
        """Conditions that let through at least every match."""
        parts, values = ["1"], []
        for tag, value in keys.items():
            if is_universal(value):
                continue
            if tag == tags.MODALITIES_IN_STUDY and not set("*?\\[") & set(value):
                parts.append(f"'\\' || {_column(tag)} || '\\' GLOB ?")
                values.append(f"*\\{value.strip()}\\*")
            if tag not in _shown:
                continue
            vr, column = vr_of(tag), _column(tag)
            if vr == "PN":
                parts.append(f"{_key(tag)} GLOB ?")
                values.append(name_pattern(value))
            elif vr == "DA" and (limits := bounds(vr, value)):
                parts.append(f"+{column} BETWEEN ? AND ?")  # the plus keeps SQLite from an index that it would have to sort by again
                values += limits
            elif vr == "DA" and len(ordered(vr, value)) == 8:
                parts.append(f"{column} = ?")
                values.append(ordered(vr, value))
            elif vr == "UI":
                wanted = value.split("\\")[:_ids_max]
                parts.append(f"{column} IN ({', '.join('?' * len(wanted))})")
                values += [each.strip(" \0") for each in wanted]
            elif tag in _single and "\\" not in value:
                parts.append(f"{column} GLOB ?" if "*" in value or "?" in value else f"{column} = ?")
                values.append(glob(value) if "*" in value or "?" in value else value.strip(" "))
        return " AND ".join(parts), values
