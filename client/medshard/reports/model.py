"""What a report consists of, whatever it is about and however it is written: facts, tables, charts.

Law: values only. A report says when and over what it was made, and never that something was certified.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a heading. Cells are text. The first rows, ``urgent`` of them, want somebody's attention."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    urgent: int = 0


@dataclass(frozen=True, slots=True)
class Bars:
    """Counts by name, for a chart."""

    title: str
    values: tuple[tuple[str, float], ...]
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """One report. The first table is the one that a CSV holds."""

    kind: str
    title: str
    made: int  # Unix seconds
    period: str
    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    charts: tuple[Bars, ...] = ()
    holds: bool = True  # False where something needs somebody's attention

    def as_json(self) -> str:
        """All of it."""
        return json.dumps({"medshard": "report 1", **asdict(self)}, ensure_ascii=False, indent=1) + "\n"

    def as_csv(self) -> str:
        """The first table. Cells that a spreadsheet would compute are made text."""
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(self.tables[0].columns)
        writer.writerows([_text(cell) for cell in row] for row in self.tables[0].rows)
        return out.getvalue()


def moment(seconds: float) -> str:
    """A time for people, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else ""


def _text(cell: str) -> str:
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell
