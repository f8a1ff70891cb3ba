"""De-identified copies of a stored study: made, stored under keys of their own, linked to the originals, and shared.

The copies of each series are one object. What they were made of is written into a file of the vault's own that is shared with nobody: the
link. It is stored before the copies are shared, so that none is out without a way back for its owner.

Law: of the originals nothing is written to disk; of the copies nothing that ``deidentify`` did not return.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from medshard.dicom.deidentify import Clean, Profile, Unclean, deidentify
from medshard.grants import Shared
from medshard.model import OnProgress, Progress, Row
from medshard.query import Query
from medshard.sealing import hkdf
from medshard_protocol.entries import Purpose
from medshard_protocol.errors import Absent, Refused, Unavailable
from medshard_protocol.ids import Key

if TYPE_CHECKING:
    from medshard.vault import Vault

copy_tag: Final = "deidentified"  # of each copy: the profile
link_tag: Final = "deidentified-copy"  # of the link: the copy's Study Instance UID


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An instance of which no copy was made, and why."""

    sop_uid: str
    why: str


@dataclass(frozen=True, slots=True)
class Copied:
    """What came of it. ``warnings`` say how many instances each is of."""

    study: str
    link: bytes  # SHA-256 of the link, which this vault alone can open
    shared: tuple[Shared, ...]
    left_out: tuple[LeftOut, ...]
    warnings: tuple[tuple[str, int], ...]


class Copier:
    """Copies of studies for one receiver."""

    def __init__(self, vault: Vault, reader: Key, profile: Profile) -> None:
        self._vault = vault
        self._reader = reader
        self._profile = profile
        # Bound to the receiver: two of them cannot tell that they have copies of one patient.
        self._secret = hkdf(vault.keys.line[-1].root, reader, b"medshard/vault/v1/pseudonyms")

    async def copy(
        self,
        study: str,
        *,
        only: Collection[bytes] | None = None,
        until: int = 0,
        purpose: int = Purpose.UNSPECIFIED,
        progress: OnProgress | None = None,
    ) -> Copied:
        """Of ``only`` those of its instances that have these hashes, if some are given.

        Raises Absent for a study that is not this vault's, Refused where none of it can be made clean, and what put and share do.
        """
        rows = [row for row in self._rows(study) if only is None or row.sha256 in only]
        if not rows:
            raise Absent(f"none of these files is an instance of study {study}")
        with tempfile.TemporaryDirectory(prefix=".copies-", dir=self._vault.home.folder) as place:
            folder = Path(place, copy_tag)
            folder.mkdir()
            clean, left_out = await self._clean(rows, folder, progress)
            if not clean:
                raise Refused(
                    f"none of the {len(rows)} instances could be de-identified: {left_out[0].why}", hint="Nothing was stored or shared."
                )
            tags = {copy_tag: self._profile.value}
            report = await self._vault.put([folder], tags=tags, progress=progress)
            if failed := [problem for problem in report.problems if not problem.stored]:
                raise Unavailable(f"a copy could not be stored: {failed[0].message}", hint="Nothing was shared. Run the command again.")
            hashes = {stored.path.stem: stored.sha256 for stored in report.stored}
            link = await self._link(study, rows, clean, hashes, Path(place))
        shared = await self._vault.shares.share(list(hashes.values()), self._reader, until=until, purpose=purpose, progress=progress)
        warnings: dict[str, int] = {}
        for each in clean.values():
            for warning in each.warnings:
                warnings[warning] = warnings.get(warning, 0) + 1
        return Copied(next(iter(clean.values())).study, link, tuple(shared), tuple(left_out), tuple(warnings.items()))

    def _rows(self, study: str) -> list[Row]:
        """The instances of a study, of each the one stored last."""
        rows = {
            row.attributes.get("sop-uid", ""): row
            for row in self._vault.find(Query(media_type="application/dicom"), shared=False)
            if row.attributes.get("study-uid") == study
        }
        if not rows:
            raise Absent(f"this vault holds no study {study}", hint="`medshard find --json` shows the study-uid of each file.")
        return list(rows.values())

    async def _clean(self, rows: Sequence[Row], folder: Path, progress: OnProgress | None) -> tuple[dict[str, Clean], list[LeftOut]]:
        """Write the copies, named by their UIDs; what was made of each original, by the original's UID."""
        clean: dict[str, Clean] = {}
        left_out: list[LeftOut] = []
        total, done = sum(row.size for row in rows), 0
        for row in sorted(rows, key=lambda row: (row.file_id, row.member or 0)):
            uid = row.attributes.get("sop-uid", "")
            try:
                made = await asyncio.to_thread(deidentify, await self._vault.read(row.sha256, 0, row.size), self._profile, self._secret)
                await asyncio.to_thread((folder / f"{made.uid}.dcm").write_bytes, made.data)
                clean[uid] = Clean(b"", made.study, made.series, made.uid, made.warnings)
            except Unclean as error:
                left_out.append(LeftOut(uid, str(error)))
            done += row.size
            if progress:
                progress(Progress(done, total, "de-identifying"))
        return clean, left_out

    async def _link(self, study: str, rows: Sequence[Row], clean: dict[str, Clean], hashes: dict[str, bytes], place: Path) -> bytes:
        originals = {row.attributes.get("sop-uid", ""): row for row in rows}
        copied = next(iter(clean.values())).study
        instances = [
            {"original": {"uid": uid, "sha256": originals[uid].sha256.hex()}, "copy": {"uid": each.uid, "sha256": hashes[each.uid].hex()}}
            for uid, each in sorted(clean.items())
        ]
        about = {"original": study, "copy": copied, "profile": self._profile.value, "receiver": self._reader.hex()}
        path = place / f"deidentified-{copied}.json"
        path.write_text(json.dumps({"version": 1, **about, "instances": instances}, indent=1) + "\n")
        (stored,) = (await self._vault.put([path], tags={link_tag: copied})).stored
        return stored.sha256
