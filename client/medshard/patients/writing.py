"""Writing an export: documents, proofs, a manifest of it all and pages to read, into a folder or a ZIP.

    documents/0001-scan.dcm   proofs/0001.tlog-proof   manifest.json   history.csv   report.html   genesis.medshard   SHA256SUMS

Law: the manifest is written last, when every document beside it has been read again and has its hash; so an export with one is whole. One
that was cut off goes on where it was: what is there and has its hash is not fetched again. Nothing is written over another's files.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medshard.durable import fsync_folder, write_durably
from medshard.export import as_csv
from medshard.model import OnProgress, Progress, Row
from medshard.patients.gathering import Gathered, gather
from medshard.patients.page import page
from medshard.reports.model import moment
from medshard.text import shown
from medshard_protocol.entries import Purpose
from medshard_protocol.errors import Conflict, Damaged

if TYPE_CHECKING:
    from medshard.vault import Vault

title: Final = "patient export 1"
begun_name: Final = "export-begun.json"  # whose folder this is, until the manifest says so
manifest_name: Final = "manifest.json"
at_once: Final = 64  # documents that are fetched together, so that little is lost when it is cut off
name_chars_max: Final = 80


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    target: Path
    documents: int
    bytes: int
    fetched: int  # the others were there already
    proofs: int
    entries: int  # of the ledger, about these documents


async def export(vault: Vault, patient: str, target: Path, *, proofs: bool = True, progress: OnProgress | None = None) -> Exported:
    """Write all that concerns a patient to a folder, or to a file that ends in .zip.

    Raises Absent where there is nothing of such a patient, Conflict where something else is at ``target``, Damaged for a document that
    does not read back, and what ``get`` and ``prove`` raise.
    """
    packed = target.suffix.lower() == ".zip"
    folder = target.with_name(f"{target.name}.unfinished") if packed else target
    if packed and target.exists():
        raise Conflict(f"{target} is there already", hint="Name another file, or take it away.")
    await asyncio.to_thread(_begin, folder, {"patient": patient, "vault": vault.keys.public.hex()})
    gathered = await gather(vault, patient, progress)
    paths = {row.sha256: _path(number, row) for number, row in enumerate(gathered.rows, 1)}
    fetched = await _documents(vault, gathered, folder, paths, progress)
    proved = await _proofs(vault, gathered, folder, paths, progress) if proofs else {}
    told = _told(vault, gathered, paths, proved)
    await asyncio.to_thread(_finish, folder, gathered, paths, told, vault.home.genesis.read_bytes(), progress)
    if packed:
        await asyncio.to_thread(_pack, folder, target)
    size = sum(row.size for row in gathered.rows)
    return Exported(target, len(gathered.rows), size, fetched, len(proved), len(gathered.happened))


def _begin(folder: Path, whose: Mapping[str, str]) -> None:
    """Make the folder, or go on in one that an earlier run for this patient made. Raises Conflict."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in (begun_name, manifest_name):
        if (folder / name).exists():
            before = json.loads((folder / name).read_text(encoding="utf-8"))
            if {key: before.get(key) for key in whose} != dict(whose):
                raise Conflict(f"{folder} holds the export of another patient or vault", hint="Name another folder.")
            break
    else:
        if any(folder.iterdir()):
            raise Conflict(f"{folder} is not empty, and holds no export", hint="Name a new folder.")
    (folder / manifest_name).unlink(missing_ok=True)  # until it is whole again
    write_durably(folder / begun_name, json.dumps(dict(whose)).encode())
    for name in ("documents", "proofs"):
        (folder / name).mkdir(exist_ok=True)


def _path(number: int, row: Row) -> str:
    """Where a document goes. Its own name comes from outside, so only harmless letters of it stay."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", shown(os.path.basename(row.name))).strip("._")[-name_chars_max:]
    return f"documents/{number:04}-{name or 'document'}"


async def _documents(vault: Vault, gathered: Gathered, folder: Path, paths: Mapping[bytes, str], progress: OnProgress | None) -> int:
    """Fetch what is not there yet; how many that were."""
    there = await asyncio.to_thread(lambda: {sha256 for sha256, path in paths.items() if _digest(folder / path) == sha256})
    missing = [row for row in gathered.rows if row.sha256 not in there]
    total, done = sum(row.size for row in missing), 0
    for at in range(0, len(missing), at_once):
        some = missing[at : at + at_once]
        await vault.get_to([(row.sha256, folder / paths[row.sha256]) for row in some], purpose=Purpose.PATIENT_REQUEST)
        done += sum(row.size for row in some)
        if progress:
            progress(Progress(done, total, "restoring", shown(some[-1].name)))
    return len(missing)


async def _proofs(
    vault: Vault, gathered: Gathered, folder: Path, paths: Mapping[bytes, str], progress: OnProgress | None
) -> dict[bytes, str]:
    """A proof of registration beside each document; those of an earlier run are still good."""
    made = {}
    for done, row in enumerate(gathered.rows, 1):
        made[row.sha256] = f"proofs/{paths[row.sha256].partition('/')[2][:4]}-{row.sha256.hex()[:16]}.tlog-proof"
        place = folder / made[row.sha256]
        if not place.exists():
            proof, _ = await vault.prove(row.sha256)
            await asyncio.to_thread(write_durably, place, proof.to_bytes())
        if progress:
            progress(Progress(done, len(gathered.rows), "proving", shown(row.name)))
    return made


def _told(vault: Vault, gathered: Gathered, paths: Mapping[bytes, str], proofs: Mapping[bytes, str]) -> dict[str, Any]:
    """The manifest."""

    def document(row: Row) -> dict[str, Any]:
        kept = gathered.kept.get(row.sha256)
        return {
            "path": paths[row.sha256],
            "sha256": row.sha256.hex(),
            "size": row.size,
            "name": shown(row.name),
            "media_type": row.media_type,
            "attributes": dict(row.attributes),
            "stored": moment(row.put_time),
            "file": row.file_id.hex(),
            "registered_by_entry": row.ledger_index,
            "retained_until": moment(kept.until) if kept else "",
            "holds": list(kept.holds) if kept else [],
            "proof": proofs.get(row.sha256, ""),
        }

    return {
        "medshard": title,
        "patient": gathered.patient,
        "vault": vault.keys.public.hex(),
        "made": moment(gathered.made),
        "log": vault.roster.origin,
        "genesis_sha256": vault.home.genesis_sha256().hex(),
        "documents": [document(row) for row in gathered.rows],
        "history": [_plain(each) for each in gathered.happened],
        "grants": [_plain(each) for each in gathered.grants],
        "requests": [_plain(each) for each in gathered.requests],
        "links": [
            {
                "link": note.name,
                "made": moment(note.made),
                "until": moment(note.until),
                "state": vault.links.state(note),
                "uses": note.uses,
                "documents": [sha256.hex() for sha256 in note.documents if sha256 in paths],
            }
            for note in gathered.links
        ],
        "deidentified_copies": [{"record": row.sha256.hex(), "name": shown(row.name)} for row in gathered.copies],
        "shared_with_this_vault": [
            {"sha256": row.sha256.hex(), "name": shown(row.name), "size": row.size, "owner": row.owner.hex()} for row in gathered.received
        ],
    }


def _finish(
    folder: Path, gathered: Gathered, paths: Mapping[bytes, str], told: dict[str, Any], genesis: bytes, progress: OnProgress | None
) -> None:
    """Read every document again, and write what describes them; the manifest last. Raises Damaged."""
    for done, row in enumerate(gathered.rows, 1):
        if _digest(folder / paths[row.sha256]) != row.sha256:
            raise Damaged(f"{paths[row.sha256]} does not read back as it was written", hint="See whether the disk is full or failing.")
        if progress:
            progress(Progress(done, len(gathered.rows), "checking", paths[row.sha256]))
    for path in (folder / "documents").iterdir():
        if f"documents/{path.name}" not in paths.values():
            path.unlink()  # of an earlier run; it was destroyed or renamed since
    write_durably(folder / "genesis.medshard", genesis)
    write_durably(folder / "history.csv", "".join(as_csv(gathered.happened)).encode())
    write_durably(folder / "SHA256SUMS", "".join(f"{sha256.hex()}  {path}\n" for sha256, path in paths.items()).encode())
    write_durably(folder / "report.html", page(told, gathered).encode())
    write_durably(folder / manifest_name, json.dumps(told, ensure_ascii=False, indent=1).encode() + b"\n")
    (folder / begun_name).unlink()
    fsync_folder(folder)


def _pack(folder: Path, target: Path) -> None:
    """Put the folder into one ZIP, whole or not at all, check what is in it, and take the folder away. Raises Damaged."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        temporary.touch(mode=0o600)
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                archive.write(path, str(path.relative_to(folder)))
        with zipfile.ZipFile(temporary) as archive:
            if bad := archive.testzip():
                raise Damaged(f"{bad} does not read back from the ZIP", hint="See whether the disk is full or failing.")
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.rename(temporary, target)
        fsync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
    shutil.rmtree(folder)


def _digest(path: Path) -> bytes:
    """The SHA-256 of a file; nothing where there is none."""
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _plain(value: Any) -> Any:
    """A value of ours as JSON can hold it: bytes in hex, times as they are."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        return {each.name: shown(value.name) if each.name == "name" else _plain(getattr(value, each.name)) for each in fields(value)}
    return value
