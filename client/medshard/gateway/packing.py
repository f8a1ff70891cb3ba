"""From what waits of a series to sealed objects, and from the vault's rows back to instances.

Law: decides and does nothing. A series is one object, cut only where a header would become too large; what comes later is a further object.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final, cast

from medshard.gateway import frames, tags
from medshard.gateway.model import Instance, Place
from medshard.gateway.segments import Entry, chunk_plain
from medshard.gateway.spool import Spool
from medshard.model import Description, PutReport, Row
from medshard.packs import Plan, Unit
from medshard.shares import copy_mark, copy_shared
from medshard.source import Part
from medshard.vault import Vault
from medshard_protocol.errors import MedshardError

members_max: Final = 4_000  # a header of 1 KiB for each still fits into a manifest
media_type: Final = "application/dicom"
deidentified: Final = "tag:deidentified"  # as medshard.dicom.copies marks what it makes


def plan_of(series: tuple[str, str], entries: Sequence[Entry], spool: Spool) -> Plan:
    """The objects to make of these entries of one series, in their order."""
    parts = [_part(entry, spool) for entry in entries]
    chunks = [parts[at : at + members_max] for at in range(0, len(parts), members_max)]
    name = f"{series[0]}/{series[1]}".encode()
    return Plan(tuple(Unit(name if len(chunk) > 1 else chunk[0].name, tuple(chunk), len(chunk) > 1) for chunk in chunks), ())


def framed(entries: Sequence[Entry], spool: Spool) -> list[Entry]:
    """The same, with where the frames of compressed multi-frame instances lie: found while they are here anyway. Blocking."""
    found = []
    for entry in entries:

        def read(start: int, stop: int, entry: Entry = entry) -> bytes:
            return spool.read(entry, start, stop)

        found.append(replace(entry, attributes={**entry.attributes, **frames_of(instance_of(entry), read)}))
    return found


def frames_of(instance: Instance, read: Callable[[int, int], bytes]) -> dict[str, str]:
    """What the sealed header says of an instance's frames. Blocking."""

    async def at_once(start: int, stop: int) -> bytes:
        return read(start, stop)

    with contextlib.suppress(MedshardError):  # broken: whoever asks for a frame hears of it
        if frames.is_said(instance):
            return asyncio.run(frames.said(instance, at_once))
    return {}


def instance_of(entry: Entry) -> Instance:
    """What the archive knows of an instance that is in the spool."""
    said = entry.attributes
    return Instance(said["study-uid"], said["series-uid"], said["sop-uid"], entry.size, entry.sha256, entry.received, said)


def name_of(attributes: Mapping[str, str]) -> bytes:
    """The name that an instance gets in a sealed header."""
    return f"{attributes['study-uid']}/{attributes['series-uid']}/{attributes['sop-uid']}.dcm".encode()


def places(vault: Vault, report: PutReport) -> dict[Path, tuple[bytes, Place]]:
    """Where each stored part lies: SHA-256 and place by its path. Blocking."""
    files = {stored.file_id for stored in report.stored}
    members = {(row.file_id, row.sha256): row.member for file in files for row in vault.rows_of(file)}
    return {
        stored.path: (stored.sha256, Place(stored.file_id, members[stored.file_id, stored.sha256], stored.ledger_index))
        for stored in report.stored
    }


def instances_of(rows: Iterable[Row]) -> list[Instance]:
    """The DICOM instances among the rows of one object. Copies that were made to be given away are not the archive's.

    A de-identified one may have kept the UIDs of its original, and must not be served in its place.
    """
    found = []
    for row in rows:
        said = row.attributes
        if said.get(copy_mark) == copy_shared or deidentified in said:
            continue
        if row.media_type == media_type and all(said.get(tags.known[tag].name) for tag in (tags.STUDY_UID, tags.SERIES_UID, tags.SOP_UID)):
            place = Place(row.file_id, row.member, row.ledger_index)
            uids = said["study-uid"], said["series-uid"], said["sop-uid"]
            found.append(Instance(*uids, row.size, row.sha256, row.put_time * 1000, said, place))
    return found


class _Reading(io.RawIOBase):
    """An instance in the spool as a file that is read from its beginning to its end."""

    def __init__(self, spool: Spool, entry: Entry) -> None:
        self._spool = spool
        self._entry = entry
        self._at = 0
        self._chunk = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._chunk:
            self._chunk = memoryview(self._spool.read(self._entry, self._at, self._at + chunk_plain))
            self._at += len(self._chunk)
        size = min(len(buffer), len(self._chunk))
        buffer[:size] = self._chunk[:size]
        self._chunk = self._chunk[size:]
        return size


def _part(entry: Entry, spool: Spool) -> Part:
    said, name = entry.attributes, name_of(entry.attributes)
    lasting = Path(f"spool/{entry.segment:012x}/{entry.offset}")
    return Part(lasting, name, entry.size, entry.received, Description(media_type, said), lambda: cast(BinaryIO, _Reading(spool, entry)))
