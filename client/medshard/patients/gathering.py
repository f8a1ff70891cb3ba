"""What a vault knows of one patient, and what the ledger says of it.

Law: whose documents they are is decided by the names, numbers and holders that they were stored with, and by nothing else: those of the
patient, and what belongs to the same policy or claim unless it names somebody else. Whoever hands an export over looks at the list first.
What is said of reads, grants, retention and holds is asked of the ledger now.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from medshard.consent import Consents, Request, own_types
from medshard.custody import Kept
from medshard.grants import Happened, Shared
from medshard.links.model import Note
from medshard.model import OnProgress, Progress, Row
from medshard.query import Query
from medshard.text import fold, quoted
from medshard_protocol.errors import Absent
from medshard_protocol.ids import FileId

if TYPE_CHECKING:
    from medshard.vault import Vault

link_tag: Final = "deidentified-copy"  # as medshard.dicom.copies writes it
record_bytes_max: Final = 64 * 1024 * 1024
at_once: Final = 8  # objects whose histories are asked for side by side

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class Gathered:
    """All that concerns one patient, as of ``made``."""

    patient: str  # what was asked for
    made: int  # Unix seconds
    rows: tuple[Row, ...]  # this vault's own documents, each once, the oldest first
    kept: Mapping[bytes, Kept]  # by document
    happened: tuple[Happened, ...]  # to any of them, in the ledger's order
    grants: tuple[Shared, ...]  # that this vault has given of them, ended ones too
    requests: tuple[Request, ...]  # of others that they meet
    links: tuple[Note, ...]  # to any of them
    copies: tuple[Row, ...]  # the vault's own records of de-identified copies that were made of them
    received: tuple[Row, ...]  # documents of others that were shared with this vault


async def gather(vault: Vault, patient: str, progress: OnProgress | None = None) -> Gathered:
    """Look for everything. Raises Absent where this vault holds nothing of such a patient, Unavailable as the ledger does."""
    found = documents(list(vault.find(Query(), shared=False)), patient)
    rows = tuple(sorted(found.values(), key=lambda row: (row.put_time, row.file_id, row.member or 0)))
    if not rows:
        hint = "See `medshard find --patient` for names and ids of patients, and `medshard policy find --holder`."
        raise Absent(f"this vault holds nothing of a patient {quoted(patient)}", hint=hint)
    hashes = list(found)
    kept = {sha256: each for each in await vault.custody.standing(hashes) for sha256 in each.hashes if sha256 in found}
    objects = {FileId(row.file_id): row.sha256 for row in (*rows, *vault.shares.objects_of(hashes))}
    counted = _Counted(len(objects), "asking the ledger", progress)
    told = await _side_by_side(list(objects.items()), lambda each: counted(vault.shares.told(*each)))
    happened = {each.index: each for one in told for each in one}
    grants = [each for each in await vault.shares.all() if each.given and (each.sha256 in found or FileId(each.file_id) in objects)]
    consents = Consents(vault)
    requests = [each for each in await consents.requests() if each.asker != vault.keys.public]
    return Gathered(
        patient,
        int(time.time()),
        rows,
        kept,
        tuple(happened[index] for index in sorted(happened)),
        tuple(grants),
        tuple(each for each in requests if any(row.sha256 in found for row in consents.meeting(each))),
        tuple(note for note in vault.links.all() if found.keys() & set(note.documents)),
        tuple(await _copies(vault, found)),
        tuple(documents(list(vault.find(Query(), own=False)), patient).values()),
    )


def documents(rows: Sequence[Row], patient: str) -> dict[bytes, Row]:
    """Those of these documents that concern a patient, by their hashes."""
    if not fold(patient).split():
        return {}
    found = [row for row in rows if _concerns(row, patient)]
    # A policy is its holder's with all that belongs to it; a claim is about one case, whoever's scan it was found by.
    policies = {row.attributes.get("policy-number") for row in found if _is_holder(row, patient)}
    claims = {
        (row.owner, row.attributes["claim-number"], row.attributes.get("policy-number"))
        for row in found
        if "claim-number" in row.attributes
    }
    for row in rows:
        number, claim = row.attributes.get("policy-number"), row.attributes.get("claim-number")
        if (number in policies or (row.owner, claim, number) in claims) and number and not _names_another(row, patient):
            found.append(row)
    return {row.sha256: row for row in found}


def _concerns(row: Row, patient: str) -> bool:
    """Whether a document was stored with this patient's name or id, or with this policy holder's name."""
    if row.media_type in own_types:
        return False
    return Query(patient=patient).meets(row) or _is_holder(row, patient)


def _is_holder(row: Row, patient: str) -> bool:
    holder = fold(row.attributes.get("policy-holder", ""))
    return bool(holder) and all(word in holder for word in fold(patient).split())


def _names_another(row: Row, patient: str) -> bool:
    """Whether a document says that it is somebody else's."""
    of_patient = any(name in row.attributes for name in ("patient-name", "patient-id"))
    return (of_patient and not Query(patient=patient).meets(row)) or ("policy-holder" in row.attributes and not _is_holder(row, patient))


async def _copies(vault: Vault, found: Mapping[bytes, Row]) -> list[Row]:
    """Records of de-identified copies that name one of these originals."""
    records = []
    for row in vault.find(Query(media_type="json"), shared=False):
        if f"tag:{link_tag}" in row.attributes and row.size <= record_bytes_max:
            text = (await vault.read(row.sha256, 0, row.size)).decode("utf-8", "replace")
            if any(sha256.hex() in text for sha256 in found):
                records.append(row)
    return records


class _Counted:
    """Tells how many of a number of steps are done."""

    def __init__(self, total: int, phase: str, progress: OnProgress | None) -> None:
        self._done, self._total, self._phase, self._progress = 0, total, phase, progress

    async def __call__(self, step: Awaitable[_Out]) -> _Out:
        result = await step
        self._done += 1
        if self._progress:
            self._progress(Progress(self._done, self._total, self._phase))
        return result


async def _side_by_side(items: Sequence[_In], act: Callable[[_In], Awaitable[_Out]]) -> list[_Out]:
    slots = asyncio.Semaphore(at_once)

    async def one(item: _In) -> _Out:
        async with slots:
            return await act(item)

    return await asyncio.gather(*map(one, items))
