"""Importing DICOM files that are here already: folders, ZIP archives, media with a DICOMDIR, a folder that is watched.

Law: files are kept bit for bit, so each comes back with the SHA-256 that it has here. What is refused is named, with a reason, and the rest
goes on. Nothing is remembered of a run: what the archive has is found by its SOP Instance UID and SHA-256, so an import that broke off is
simply run again. ``Importer`` needs no gateway; one that runs sees what was imported within seconds.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Final, cast

from pydicom import dcmread

from medshard.gateway.catalog import Catalog
from medshard.gateway.describing import Described, describe
from medshard.gateway.model import Instance, Outcome
from medshard.gateway.packing import frames_of, media_type, members_max, name_of, places
from medshard.model import Description
from medshard.packs import Plan, Unit
from medshard.source import Part
from medshard.vault import Vault
from medshard_protocol.errors import MedshardError, TooLarge, Unavailable

batch_files: Final = 4_000
batch_bytes: Final = 2 * 2**30
zip_members_max: Final = 1_000_000
zip_ratio_max: Final = 200  # a member that grows more than this is no image
directory_name: Final = "DICOMDIR"
retry_s: Final = 10.0  # a watched folder's, when nodes are out of reach
settle_s: Final = 2.0  # a file in a watched folder that has not changed for so long is whole


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may be a DICOM instance."""

    path: Path  # for a member of a ZIP archive: the archive's, and the member's name
    size: int
    open: Callable[[], BinaryIO]
    part: Callable[[bytes, Description], Part]


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of one file."""

    path: Path
    outcome: Outcome
    sop_uid: str = ""
    sha256: bytes = b""
    reason: str = ""


@dataclass(slots=True)
class _Batch:
    candidates: list[tuple[Candidate, Described, bytes]] = field(default_factory=list)
    size: int = 0

    @property
    def full(self) -> bool:
        return len(self.candidates) >= batch_files or self.size >= batch_bytes


class Importer:
    """Imports of one vault."""

    def __init__(self, vault: Vault, catalog: Catalog, *, keep_both: bool = True) -> None:
        self._vault = vault
        self._catalog = catalog
        self._keep_both = keep_both

    async def run(self, paths: Sequence[Path], tell: Callable[[Imported], None]) -> None:
        """Import files, folders and archives; ``tell`` hears of each file as soon as it is decided. Raises Unavailable."""
        found = scan(paths, tell)
        while batch := await asyncio.to_thread(self._gather, found, tell):
            await self._store(batch, tell)

    def _gather(self, found: Iterator[Candidate], tell: Callable[[Imported], None]) -> list[tuple[Candidate, Described, bytes]]:
        batch, seen = _Batch(), set[tuple[str, bytes]]()
        for candidate in found:
            try:
                said = describe(_reader(candidate), candidate.size)
                digest = _digest(candidate)
                if candidate.path.is_file():  # a member of an archive would be inflated again for each frame
                    about = Instance(said.study, said.series, said.uid, candidate.size, digest, 0, said.attributes)
                    said = replace(said, attributes={**said.attributes, **frames_of(about, _reader(candidate))})
            except (MedshardError, OSError, zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: an encrypted member
                tell(Imported(candidate.path, Outcome.REFUSED, reason=str(error)))
                continue
            known = {each.sha256 for each in self._catalog.instances(said.uid)}
            if digest in known or (said.uid, digest) in seen:
                tell(Imported(candidate.path, Outcome.ALREADY, said.uid, digest))
            elif known and not self._keep_both:
                why = "other bytes are stored under this SOP Instance UID"
                tell(Imported(candidate.path, Outcome.REFUSED, said.uid, digest, why))
            else:
                seen.add((said.uid, digest))
                batch.candidates.append((candidate, said, digest))
                batch.size += candidate.size
                if batch.full:
                    break
        return batch.candidates

    async def _store(self, batch: Sequence[tuple[Candidate, Described, bytes]], tell: Callable[[Imported], None]) -> None:
        series: dict[tuple[str, str], list[Part]] = {}
        for candidate, said, _ in batch:
            part = candidate.part(name_of(said.attributes), Description(media_type, said.attributes))
            series.setdefault((said.study, said.series), []).append(part)
        units = [
            Unit(f"{study}/{of}".encode() if len(chunk) > 1 else chunk[0].name, tuple(chunk), len(chunk) > 1)
            for (study, of), parts in series.items()
            for chunk in (parts[at : at + members_max] for at in range(0, len(parts), members_max))
        ]
        report = await self._vault.store(Plan(tuple(units), ()))
        placed = await asyncio.to_thread(places, self._vault, report)
        why = {problem.path: problem.message for problem in report.problems}
        for candidate, said, digest in batch:
            found = placed.get(candidate.path)
            if found is None or found[0] != digest:
                tell(Imported(candidate.path, Outcome.REFUSED, said.uid, digest, why.get(candidate.path, "it changed while it was read")))
                continue
            beside = bool(self._catalog.instances(said.uid))
            now = time.time_ns() // 1_000_000
            self._catalog.put([Instance(said.study, said.series, said.uid, candidate.size, digest, now, said.attributes, found[1])])
            tell(Imported(candidate.path, Outcome.KEPT_BESIDE if beside else Outcome.STORED, said.uid, digest))
        await asyncio.to_thread(self._catalog.flush)

    async def watch(self, folder: Path, tell: Callable[[Imported], None], *, delete: bool) -> None:
        """Import what is put into a folder, for ever; with ``delete``, files go once they are in the store."""
        before: dict[Path, tuple[int, int]] = {}
        done: dict[Path, tuple[int, int]] = {}
        while True:
            now = await asyncio.to_thread(_look, folder)
            whole = [path for path, seen in now.items() if before.get(path) == seen and done.get(path) != seen]
            outcomes: list[Imported] = []
            try:
                if whole:
                    await self.run(whole, outcomes.append)
            except Unavailable as error:  # a folder is watched for years, and nodes are out of reach now and then
                tell(Imported(folder, Outcome.REFUSED, reason=f"not yet stored, tried again in {retry_s:.0f} s: {error}"))
                await asyncio.sleep(retry_s)
                continue
            failed = {outcome.path for outcome in outcomes if outcome.outcome is Outcome.REFUSED}
            for outcome in outcomes:
                tell(outcome)
            for path in whole:
                done[path] = now[path]
                if delete and not any(path == each or path in each.parents for each in failed):
                    path.unlink(missing_ok=True)
            done = {path: seen for path, seen in done.items() if path in now}
            before = now
            await asyncio.sleep(settle_s)


def scan(paths: Iterable[Path], tell: Callable[[Imported], None]) -> Iterator[Candidate]:
    """Every file below ``paths`` that may be an instance. What cannot be looked at is told."""
    for path in paths:
        try:
            if path.is_dir():
                for root, folders, names in os.walk(path):
                    folders.sort()
                    yield from (each for name in sorted(names) if name != directory_name for each in _file(Path(root, name), tell))
            elif path.name == directory_name:
                yield from _directory(path, tell)
            else:
                yield from _file(path, tell)
        except (MedshardError, OSError) as error:
            tell(Imported(path, Outcome.REFUSED, reason=str(error)))


def _file(path: Path, tell: Callable[[Imported], None]) -> Iterator[Candidate]:
    try:
        if path.is_symlink() or not path.is_file():
            return
        if zipfile.is_zipfile(path) and not _begins_as_dicom(path):
            yield from _archive(path, tell)
            return
        yield Candidate(path, path.stat().st_size, lambda: path.open("rb"), lambda name, about: Part.at(path, name, about))
    except (MedshardError, OSError, zipfile.BadZipFile) as error:
        tell(Imported(path, Outcome.REFUSED, reason=str(error)))


def _archive(path: Path, tell: Callable[[Imported], None]) -> Iterator[Candidate]:
    archive = zipfile.ZipFile(path)
    members = archive.infolist()
    if len(members) > zip_members_max:
        raise TooLarge(f"{path} has {len(members):,} members, more than {zip_members_max:,}")
    changed = path.stat().st_mtime_ns
    for member in members:
        if member.is_dir() or Path(member.filename).name == directory_name:
            continue
        where = path / member.filename.lstrip("/")  # a name that begins at the root is no path of this machine
        if member.file_size > zip_ratio_max * max(1, member.compress_size):
            tell(Imported(where, Outcome.REFUSED, reason=f"it grows to {member.file_size:,} bytes; this is no image"))
            continue

        def opened(member: zipfile.ZipInfo = member) -> BinaryIO:
            return cast(BinaryIO, archive.open(member))

        def part(name: bytes, about: Description, member: zipfile.ZipInfo = member, where: Path = where) -> Part:
            return Part(where, name, member.file_size, changed, about, lambda: cast(BinaryIO, archive.open(member)))

        yield Candidate(where, member.file_size, opened, part)


def _directory(path: Path, tell: Callable[[Imported], None]) -> Iterator[Candidate]:
    """The files that a DICOMDIR names (PS3.3 annex F)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            records = dcmread(path).DirectoryRecordSequence
            named = [record.ReferencedFileID for record in records if record.get("ReferencedFileID")]
    except Exception as error:  # pydicom raises whatever it meets
        tell(Imported(path, Outcome.REFUSED, reason=f"no DICOMDIR that can be read ({type(error).__name__})"))
        return
    for words in named:
        parts = [words] if isinstance(words, str) else list(words)
        where = path.parent.joinpath(*parts)
        if ".." in parts or where.resolve() == path.resolve() or path.parent.resolve() not in where.resolve().parents:
            tell(Imported(where, Outcome.REFUSED, reason="the DICOMDIR names a file outside its folder"))
        elif not where.is_file():
            tell(Imported(where, Outcome.REFUSED, reason="the DICOMDIR names it, and it is not there"))
        else:
            yield from _file(where, tell)


def _begins_as_dicom(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _reader(candidate: Candidate) -> Callable[[int, int], bytes]:
    def read(start: int, stop: int) -> bytes:
        with candidate.open() as file:
            file.seek(start)
            return file.read(stop - start)

    return read


def _digest(candidate: Candidate) -> bytes:
    with candidate.open() as file:
        hasher = hashlib.sha256()
        while data := file.read(1024 * 1024):
            hasher.update(data)
        return hasher.digest()


def _look(folder: Path) -> dict[Path, tuple[int, int]]:
    found: dict[Path, tuple[int, int]] = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                stat = path.stat()
                found[path] = stat.st_size, stat.st_mtime_ns
    return found
