"""Many policies at once: a CSV that says what each is, a folder with the PDFs, and a report that says what became of each row.

Law: a row is reported as stored when its document is, with its retention on the ledger; a run that was cut off goes on from its report. A
broken row stops no other. Documents whose retention ends in the same quarter lie in one pack, which is kept until the last of them may go.
The PDFs are not opened, beyond a look whether they are any: what they are is what the CSV says.
"""

from __future__ import annotations

import asyncio
import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from hashlib import sha256
from pathlib import Path
from typing import Final, TextIO

from medshard.model import Description, OnProgress, Progress
from medshard.packs import Plan, Unit
from medshard.policies.archive import Policies
from medshard.policies.model import Terms, retained
from medshard.source import Part
from medshard.vault import Vault
from medshard_protocol.errors import Absent, Malformed, MedshardError

columns: Final = ("file", "number", "holder", "product", "valid_from", "valid_to", "retain", "kind")
needed: Final = ("file", "number")
report_columns: Final = ("row", "number", "file", "status", "sha256", "ledger_index", "message", "fingerprint")
pack_bytes_max: Final = 32 * 1024 * 1024
pack_members_max: Final = 1_000  # a report is written for each pack: so much is done again after a cut, at most
csv_bytes_max: Final = 256 * 1024 * 1024
head_bytes: Final = 1024


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the CSV."""

    row: int  # from 2, as spreadsheets count under a heading
    number: str
    file: str
    terms: Terms
    path: Path
    fingerprint: str  # of what the row says and of the file's size and time


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a row."""

    row: int
    number: str
    file: str
    status: str  # stored, known (before this run), refused
    sha256: str = ""
    ledger_index: str = ""
    message: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of all rows."""

    stored: int
    known: int
    refused: int
    report: Path


async def import_csv(
    vault: Vault, source: Path, folder: Path, report: Path, *, retain: str = "", progress: OnProgress | None = None
) -> Summary:
    """Store every row's document and write the report. ``retain`` is for rows that say nothing themselves.

    Raises Malformed for a CSV without the columns that are needed, Absent without a folder, Unavailable where the nodes do not answer: then
    the report says how far it came, and the same call goes on.
    """
    if not folder.is_dir():
        raise Absent(f"{folder} is not a folder", hint="Name the folder with the PDFs with --folder.")
    done, told = await asyncio.to_thread(_done, report)
    lines, refused, known = await asyncio.to_thread(_read, source, folder, retain, done)
    with _Report(report) as written:
        written.add([each for each in refused if (str(each.row), each.message) not in told])
        stored = await _store(vault, lines, written, progress)
    return Summary(len(stored), known, len(refused) + len(lines) - len(stored), report)


async def _store(vault: Vault, lines: Sequence[Line], written: _Report, progress: OnProgress | None) -> list[Outcome]:
    policies, total, before = Policies(vault), sum(line.path.stat().st_size for line in lines), 0
    stored: list[Outcome] = []
    for group in _packs(lines):
        parts = [Part.at(line.path, _name(line), Description("application/pdf", line.terms.attributes)) for line in group]
        unit = Unit(_pack_name(group), tuple(parts), is_pack=len(parts) > 1)
        base = before
        report = await vault.store(Plan((unit,), ()), progress and (lambda p, base=base: progress(_shifted(p, base, total))))  # type: ignore[misc]
        before += unit.size
        if report.stored:
            await policies.retain([each.sha256 for each in report.stored], max(line.terms.retain_until for line in group))
        at = {each.path: each for each in report.stored}
        problems = {problem.path: problem.message for problem in report.problems}
        outcomes = []
        for line in group:
            if (each := at.get(line.path)) is not None:
                told = (each.sha256.hex(), str(each.ledger_index), "stored before" if each.already else "", line.fingerprint)
                outcomes.append(Outcome(line.row, line.number, line.file, "stored", *told))
            else:
                outcomes.append(Outcome(line.row, line.number, line.file, "refused", message=problems.get(line.path, "was not stored")))
        await asyncio.to_thread(written.add, outcomes)
        stored += [outcome for outcome in outcomes if outcome.status == "stored"]
    return stored


# -- reading


def _read(source: Path, folder: Path, retain: str, done: set[str]) -> tuple[list[Line], list[Outcome], int]:
    """(rows to store, rows that are refused, how many were stored before)."""
    if source.stat().st_size > csv_bytes_max:
        raise Malformed(f"{source}: larger than {csv_bytes_max} bytes", hint="Split it: each part has a report of its own.")
    try:
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Malformed(f"{source}: not UTF-8 ({error.reason} at byte {error.start})", hint="Export it as CSV UTF-8.") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), dialect=_dialect(text))
    names = {name: name.strip().lower().replace("-", "_").replace(" ", "_") for name in reader.fieldnames or () if name}
    if missing := set(needed) - set(names.values()):
        raise Malformed(f"{source}: no column {', '.join(sorted(missing))}", hint=f"The columns are {', '.join(columns)}.")
    lines, refused, known, seen = list[Line](), list[Outcome](), 0, dict[Path, int]()
    today, inside = datetime.now(UTC).date(), folder.resolve()
    try:
        for number, raw in enumerate(reader, 2):
            row = {names[key]: (value or "").strip() for key, value in raw.items() if key in names and isinstance(value, str | None)}
            try:
                if None in raw:
                    raise Malformed("more cells than columns")
                line = _line(number, row, inside, retain, today)
                if (twice := seen.setdefault(line.path, number)) != number:
                    raise Malformed(f"the same file as row {twice}")
            except (MedshardError, OSError) as error:
                refused.append(Outcome(number, row.get("number", ""), row.get("file", ""), "refused", message=str(error)))
                continue
            if line.fingerprint in done:
                known += 1
            else:
                lines.append(line)
    except csv.Error as error:
        raise Malformed(f"{source}: broken near line {reader.line_num} ({error})") from None
    return lines, refused, known


def _line(number: int, row: dict[str, str], folder: Path, retain: str, today: date) -> Line:
    """One row, checked. Raises Malformed, or OSError for a file that cannot be read."""
    if not row.get("file"):
        raise Malformed("no file is named")
    path = (folder / row["file"]).resolve()
    if not path.is_relative_to(folder):
        raise Malformed("the file lies outside the folder")
    keep = row.get("retain", "") or row.get("retain_until", "") or retain
    terms = Terms(
        row.get("number", ""),
        row.get("holder", ""),
        row.get("product", ""),
        row.get("valid_from", ""),
        row.get("valid_to", ""),
        retained(keep, row.get("valid_to", ""), today) if keep else "",
        row.get("kind", "") or "policy",
    ).checked()
    if not path.is_file():
        raise Malformed("there is no such file in the folder")
    with open(path, "rb") as file:
        if b"%PDF-" not in file.read(head_bytes):
            raise Malformed("is not a PDF")
        stat = os.fstat(file.fileno())
    said = repr((sorted(terms.attributes.items()), row["file"], stat.st_size, stat.st_mtime_ns))
    return Line(number, terms.number, row["file"], terms, path, sha256(said.encode()).hexdigest()[:32])


def _dialect(text: str) -> type[csv.Dialect]:
    """Comma, semicolon or tab, whichever the heading has most of: spreadsheets differ by country."""
    heading = text[: text.find("\n")] if "\n" in text else text

    class Dialect(csv.excel):
        delimiter = max(",;\t", key=heading.count)
        strict = True

    return Dialect


# -- packs


def _packs(lines: Sequence[Line]) -> Iterator[list[Line]]:
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        groups[_quarter(line.terms.retain_until)].append(line)
    for _, group in sorted(groups.items()):
        pack, size = list[Line](), 0
        for line in group:
            length = line.path.stat().st_size
            if pack and (len(pack) == pack_members_max or size + length > pack_bytes_max):
                yield pack
                pack, size = [], 0
            pack.append(line)
            size += length
        if pack:
            yield pack


def _quarter(day: str) -> str:
    return f"{day[:4]}-{(int(day[5:7]) - 1) // 3 + 1}" if day else ""


def _name(line: Line) -> bytes:
    return b"policies/" + os.fsencode(line.file.replace(os.sep, "/").lstrip("/"))


def _pack_name(group: Sequence[Line]) -> bytes:
    return _name(group[0]) if len(group) == 1 else f"policies {_quarter(group[0].terms.retain_until)}".strip().encode()


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    return Progress(before + progress.done_bytes, total, progress.phase, progress.path)


# -- the report


def _done(report: Path) -> tuple[set[str], set[tuple[str, str]]]:
    """What an earlier run has told: fingerprints of rows that it stored, and of those it refused which and why.

    A line that was cut off counts for nothing.
    """
    try:
        text = report.read_text(encoding="utf-8")
    except FileNotFoundError:
        return set(), set()
    except UnicodeDecodeError:
        raise Malformed(f"{report} is not a report of an import", hint="Name another file with --report.") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if tuple(reader.fieldnames or ()) != report_columns:
        raise Malformed(f"{report} is not a report of an import", hint="Name another file with --report.")
    rows = list(reader)
    stored = {row["fingerprint"] for row in rows if row["status"] == "stored" and len(row["fingerprint"] or "") == 32}
    return stored, {(row["row"], row["message"]) for row in rows if row["status"] == "refused"}


class _Report:
    """Lines are added durably: what it says is stored is, whatever happens next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO

    def __enter__(self) -> _Report:
        fresh = not self._path.exists() or not self._path.stat().st_size
        if not fresh and not self._path.read_bytes().endswith(b"\n"):
            with open(self._path, "ab") as file:
                file.write(b"\r\n")  # a line that a cut has left half-written
        self._file = open(self._path, "a", encoding="utf-8", newline="")
        os.chmod(self._path, 0o600)  # names of holders may stand in file names
        if fresh:
            csv.writer(self._file).writerow(report_columns)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Write them down. Blocking."""
        writer = csv.writer(self._file)
        writer.writerows([getattr(outcome, name) for name in report_columns] for outcome in outcomes)
        self._file.flush()
        os.fsync(self._file.fileno())
