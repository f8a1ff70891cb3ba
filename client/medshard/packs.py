"""From paths to objects: what is sealed together. Looks at names, sizes and descriptions; reads no content beyond those.

A folder becomes one object for each DICOM series, one for each batch of other small files, and one for each large file. A
path that was named itself is an object of its own.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from medshard.describe import describe
from medshard.model import Description, Problem, check_attributes
from medshard.source import Part

small_bytes: Final = 1024 * 1024  # below this, a file of its own costs more in requests than in bytes
pack_bytes_max: Final = 64 * 1024 * 1024
pack_members_max: Final = 4_000
series_members_max: Final = 10_000


@dataclass(frozen=True, slots=True)
class Unit:
    """What becomes one sealed object: a single file, or a pack."""

    name: bytes
    parts: tuple[Part, ...]
    is_pack: bool

    @property
    def size(self) -> int:
        """Plaintext bytes."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a put will do: objects to store, and what could not be looked at."""

    units: tuple[Unit, ...]
    problems: tuple[Problem, ...]


def plan(paths: Sequence[Path], attributes: Mapping[str, str], *, only: Collection[Path] | None = None) -> Plan:
    """Decide what is sealed together. ``attributes`` are added to every file's own; of what lies in folders, ``only`` these are taken.

    Never raises for a bad path: it is a Problem.
    """
    units: list[Unit] = []
    problems: list[Problem] = []
    for path in paths:
        if path.is_dir():
            found = (each for each in _walk(path, problems) if only is None or each[0] in only)
            parts = list(_look(found, attributes, problems))
            units += _group(_own_name(path), parts)
        else:
            named = _look([(path, _own_name(path))], attributes, problems)
            units += [Unit(part.name, (part,), is_pack=False) for part in named]
    return Plan(tuple(units), tuple(problems))


def _own_name(path: Path) -> bytes:
    return os.fsencode(path.name if path.name not in ("", "..") else path.resolve().name or "root")


def _walk(folder: Path, problems: list[Problem]) -> Iterator[tuple[Path, bytes]]:
    base = _own_name(folder)

    def unreadable(error: OSError) -> None:
        problems.append(Problem(Path(error.filename or folder), f"cannot be read: {error.strerror}", stored=False))

    for root, folders, files in os.walk(folder, onerror=unreadable):
        folders.sort()
        inner = os.path.relpath(root, folder)
        prefix = base if inner == "." else base + b"/" + os.fsencode(inner)
        for name in sorted(files):
            yield Path(root, name), prefix + b"/" + os.fsencode(name)


def _look(found: Iterable[tuple[Path, bytes]], attributes: Mapping[str, str], problems: list[Problem]) -> Iterator[Part]:
    for path, name in found:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                problems.append(Problem(path, "is not a regular file", stored=False))
                continue
            with open(path, "rb") as file:  # an unreadable file is found before anything is sent
                described = describe(file, name)
        except OSError as error:
            problems.append(Problem(path, f"cannot be read: {error.strerror or error}", stored=False))
            continue
        if described.problem:
            problems.append(Problem(path, described.problem, stored=True))
        own = described.description
        merged = {**own.attributes, **attributes}
        check_attributes(merged)
        yield Part.at(path, name, Description(own.media_type, merged))


def _group(folder: bytes, parts: Sequence[Part]) -> list[Unit]:
    series: dict[str, list[Part]] = defaultdict(list)
    small: list[Part] = []
    units: list[Unit] = []
    for part in parts:
        uid = part.description.attributes.get("series-uid", "")
        if part.description.media_type == "application/dicom" and uid:
            series[uid].append(part)
        elif part.size < small_bytes:
            small.append(part)
        else:
            units.append(Unit(part.name, (part,), is_pack=False))
    for members in series.values():
        for chunk in _chunks(members, series_members_max, None):
            units.append(_unit(folder, chunk))
    units += [_unit(folder, chunk) for chunk in _chunks(small, pack_members_max, pack_bytes_max)]
    return units


def _unit(folder: bytes, members: Sequence[Part]) -> Unit:
    if len(members) == 1:
        return Unit(members[0].name, tuple(members), is_pack=False)
    common = os.path.commonpath([os.path.dirname(part.name) for part in members])
    return Unit(common or folder, tuple(members), is_pack=True)


def _chunks(parts: Sequence[Part], count_max: int, bytes_max: int | None) -> Iterator[list[Part]]:
    chunk: list[Part] = []
    size = 0
    for part in parts:
        if chunk and (len(chunk) == count_max or (bytes_max is not None and size + part.size > bytes_max)):
            yield chunk
            chunk, size = [], 0
        chunk.append(part)
        size += part.size
    if chunk:
        yield chunk
