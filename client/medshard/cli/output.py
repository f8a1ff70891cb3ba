"""Everything the commands write. Results go to standard output, the rest to standard error, nothing to a terminal that it could
obey.

File names are bytes: in a pipe they leave as they came, escaped only as ``sha256sum`` does it; on a terminal and in JSON, bytes
that are not text appear as \\xNN.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from medshard.model import OnProgress, Progress, Row
from medshard.text import shown


def line(text: str) -> None:
    """Write one line of text to standard output."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Write one line to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def problem(message: str, hint: str = "") -> None:
    """Tell people of an error, and what to do about it."""
    note(f"medshard: {message}" + (f"\nhint: {hint}" if hint else ""))


def document(value: Mapping[str, Any]) -> None:
    """Write the one JSON document of a command."""
    line(json.dumps(plain(value), ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def documents(name: str, values: Iterable[Any]) -> None:
    """Write one JSON document with an array of any length, without holding it in memory."""
    sys.stdout.write(f'{{"{name}": [')
    for number, value in enumerate(values):
        sys.stdout.write((",\n" if number else "\n") + json.dumps(plain(value), ensure_ascii=False))
    sys.stdout.write("\n]}\n")


def plain(value: Any) -> Any:
    """Turn our values into JSON's: bytes to hexadecimal, names and paths to text, dataclasses to objects."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _field(f.name, getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Path):
        return shown(os.fsencode(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value
    return [plain(item) for item in value]


def _field(name: str, value: Any) -> Any:
    return shown(value) if name == "name" and isinstance(value, bytes) else plain(value)


def hashed(sha256: bytes, name: bytes, *columns: str) -> None:
    """Write a line as ``sha256sum`` does: a leading backslash says that backslash, newline and return in the name are escaped."""
    between = b"".join(column.encode() + b"  " for column in columns)
    if sys.stdout.isatty():
        escaped, mark = shown(name).encode(), b""
    else:
        escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
        mark = b"\\" if escaped != name else b""
    sys.stdout.flush()
    sys.stdout.buffer.write(mark + sha256.hex().encode() + b"  " + between + escaped + b"\n")


def row(row: Row, *, attributes: bool = False) -> None:
    """Write one file of the vault."""
    hashed(row.sha256, row.name, f"{size(row.size):>9}", day(row.put_time))
    if attributes:
        for key, value in sorted(row.attributes.items()):
            line(f"    {key}: {value}")


def files(count: int) -> str:
    """A number of files for people."""
    return counted(count, "file")


def counted(count: int, thing: str) -> str:
    """A number of things for people."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def holder(node: str, institution: str) -> str:
    """A node for people: with its institution, unless they are namesakes."""
    return node if node == institution else f"{node} ({institution})"


def day(seconds: int) -> str:
    """A date for people, local time."""
    return time.strftime("%Y-%m-%d", time.localtime(seconds)) if seconds else "----------"


def size(count: int) -> str:
    """Bytes for people: four digits at the most."""
    if count < 1024:
        return f"{count} B"
    units = iter(("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))
    amount, unit = count / 1024, next(units)
    while amount >= 999.5 and unit != "EiB":
        amount, unit = amount / 1024, next(units)
    return f"{amount:.1f} {unit}" if amount < 9.95 else f"{amount:.0f} {unit}"


@contextmanager
def meter(*, wanted: bool) -> Iterator[OnProgress | None]:
    """Show progress with rate and time left on a terminal's standard error; nothing in a pipe."""
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    name = TextColumn(
        "{task.description} {task.fields[path]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
    )
    counts = TextColumn("{task.fields[counts]}", table_column=Column(no_wrap=True, justify="right"))
    console = Console(stderr=True)
    in_bytes = Bars(name, BarColumn(16), counts, TimeRemainingColumn(compact=True), console=console, transient=True, expand=True)
    in_files = Bars(
        name, BarColumn(16), MofNCompleteColumn(), TimeRemainingColumn(compact=True), console=console, transient=True, expand=True
    )
    started: dict[str, Any] = {}

    def show(progress: Progress) -> None:
        bars = in_files if progress.phase == "files" else in_bytes
        if not started:
            bars.start()
            started["bars"], started["task"] = bars, bars.add_task("", total=None, path="", counts="")
        bars, task = started["bars"], started["task"]
        rate = f", {size(int(bars.tasks[0].speed))}/s" if bars.tasks[0].speed else ""
        bars.update(
            task,
            completed=progress.done_bytes,
            total=progress.total_bytes or None,
            description=progress.phase,
            path=shown(os.fsencode(os.path.basename(progress.path))),
            counts=f"{size(progress.done_bytes)} of {size(progress.total_bytes)}{rate}",
        )

    try:
        yield show
    finally:
        if started:
            started["bars"].stop()
