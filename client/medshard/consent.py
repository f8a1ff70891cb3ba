"""Consent, between vaults: somebody asks to read, the owner grants or refuses, and everybody can see later what came of it.

    request = await Consents(doctor).ask(patient_key, Wish(patient="Doe Jane", modality="CT", purpose=Purpose.TREATMENT))
    for asked in await Consents(patient).requests(): ...
    await Consents(patient).approve(asked.sha256, until=...)      # grants exactly what meets the wish, or what is named
    usage = await Consents(patient).usage()                       # who read how much of it, for settlement

Law: a request and an answer are stored files, each granted to the one whom it is for; consent itself is a GRANT entry and nothing else, so
what is in force is what the ledger says. A request gives nobody a right. Nothing is granted that the owner has not seen listed or named.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from medshard.grants import Shared, purpose_name
from medshard.model import Description, OnProgress, Row
from medshard.packs import Plan, Unit
from medshard.query import Query
from medshard.source import Part
from medshard_protocol import canonical
from medshard_protocol.canonical import Fields
from medshard_protocol.entries import Purpose
from medshard_protocol.errors import Absent, Conflict, Damaged, Malformed, Refused, Unavailable
from medshard_protocol.ids import Key, key_size, sha256_size

if TYPE_CHECKING:
    from medshard.vault import Vault

request_type: Final = "application/x-medshard-access-request"
answer_type: Final = "application/x-medshard-access-answer"
own_types: Final = frozenset({request_type, answer_type})
message_bytes_max: Final = 8192
text_chars_max: Final = 500
hashes_max: Final = 10_000
request_s: Final = 90 * 86_400  # a wish of long ago is asked again, not granted by mistake
_copy_tag: Final = "deidentified"  # as medshard.dicom.copies writes it, which is imported late: most vaults have no DICOM library


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody wants to read. Empty parts say nothing; all that are given must hold."""

    patient: str = ""
    study_date: str = ""
    modality: str = ""
    policy_number: str = ""
    purpose: int = Purpose.UNSPECIFIED
    until: int = 0  # Unix seconds; 0 for good
    message: str = ""
    deidentified: bool = False  # copies without names, dates and identifiers are wanted, and nothing else is given

    @property
    def query(self) -> Query:
        """The conditions. Raises ValueError for a date that is none."""
        parts = {"patient": self.patient, "study_date": self.study_date, "modality": self.modality, "policy_number": self.policy_number}
        return Query(**{name: value for name, value in parts.items() if value})  # type: ignore[arg-type]

    def to_value(self) -> list[canonical.Value]:
        """The array to encode."""
        plain: list[canonical.Value] = [self.patient, self.study_date, self.modality, self.policy_number, int(self.purpose), self.until]
        return [*plain, self.message, *([1] if self.deidentified else [])]

    @classmethod
    def from_value(cls, value: object) -> Wish:
        """Parse. Raises Malformed."""
        clean = isinstance(value, list) and len(value) == 8
        f = Fields(value, count=8 if clean else 7, what="access request")
        patient, day, modality, number = (f.text(most=text_chars_max) for _ in range(4))
        wish = cls(patient, day, modality, number, f.uint(most=255), f.uint(most=2**53), f.text(most=text_chars_max), clean)
        if clean:
            f.uint(least=1, most=1)
        try:
            _ = wish.query
        except ValueError as error:
            raise Malformed(f"access request: {error}") from None
        return wish


@dataclass(frozen=True, slots=True)
class Request:
    """A wish that was sent."""

    sha256: bytes
    asker: Key
    wish: Wish
    at: int  # Unix seconds, as the asker says
    answer: str = ""  # approved, refused, or empty while there is none
    why: str = ""
    files: int = 0  # that were granted


@dataclass(frozen=True, slots=True)
class Read:
    """One ACCESS entry of somebody else about files of this vault: what an account is made of, and can be checked against the ledger."""

    entry: int
    time: int  # Unix seconds, as the nodes remember it
    reader: bytes
    reader_name: str
    institution: str
    purpose: str
    grant: int  # the entry of the grant under which it was read; -1 where there was none
    file_ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Used:
    """How often one reader read under one purpose in one month."""

    month: str
    reader: bytes
    reader_name: str
    institution: str
    purpose: str
    reads: int
    files: int
    first: int  # entry that is counted
    last: int


class Consents:
    """Of one open vault, as owner and as asker."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    # -- asking

    async def ask(self, owner: Key, wish: Wish) -> bytes:
        """Ask an owner; the SHA-256 by which the request is known. Raises Malformed, or Absent for an owner without a key to seal to."""
        wish = Wish.from_value(wish.to_value())
        now = int(time.time())
        data = canonical.encode([1, self._vault.keys.public, wish.to_value(), now, os.urandom(16)])
        return await self._send(data, b"requests/%d" % now, request_type, {}, owner)

    async def requests(self) -> list[Request]:
        """What others have asked of this vault and what it has asked of others, with answers; the oldest first."""
        await self._vault.shares.sync()
        answers, found = await self._answers(), []
        for row in [*self._rows(request_type, received=True), *self._rows(request_type, received=False)]:
            try:
                request = self._parse(row.sha256, await self._read(row))
            except (Malformed, Damaged):
                continue
            own = self._vault.keys.of(request.asker) is not None  # under its present key or one before
            if own if not row.owner else request.asker == row.owner:
                # Who was asked answers, and nobody else: this vault where others ask, and where it asks, whom it let read the request.
                answerers = await self._asked(row) if own else [self._vault.keys.public]
                answer, why, files = next((answers[row.sha256, each] for each in answerers if (row.sha256, each) in answers), ("", "", 0))
                found.append(Request(request.sha256, request.asker, request.wish, request.at, answer, why, files))
        return sorted(found, key=lambda request: (request.at, request.sha256))

    # -- answering

    def meeting(self, request: Request) -> list[Row]:
        """This vault's files that a request is about, each once, wherever else it lies."""
        met = self._vault.find(request.wish.query, shared=False)
        found = list({row.sha256: row for row in met if row.media_type not in own_types}.values())
        return [row for row in found if _may_be_cleaned(row)] if request.wish.deidentified else found

    async def approve(
        self, sha256: bytes, hashes: Sequence[bytes] | None = None, *, until: int | None = None, progress: OnProgress | None = None
    ) -> list[Shared]:
        """Grant what a request is about, or only the files that are named, and answer it. The request's own end holds if none is given.

        Where de-identified data is asked for, copies are made of the chosen instances and granted, and the originals are not. Raises
        Absent for a request that was not made of this vault, or where nothing meets it; Conflict for one that was answered or is too old.
        """
        request = await self._open_request(sha256)
        if not -86_400 < time.time() - request.at < request_s:
            made, days = time.strftime("%Y-%m-%d", time.gmtime(request.at)), request_s // 86_400
            hint = "Let them ask again; `medshard share` gives without a request."
            raise Conflict(f"this request is of {made}, and a request can be approved for {days} days", hint=hint)
        chosen = [row.sha256 for row in self.meeting(request)] if hashes is None else list(hashes)
        if not chosen:
            raise Absent("no file of this vault meets the request", hint="Name files, or refuse it: `medshard requests refuse`.")
        if len(chosen) > hashes_max:
            raise Malformed(f"{len(chosen)} files meet the request, more than {hashes_max} at a time", hint="Name those that you mean.")
        end = request.wish.until if until is None else until
        if request.wish.deidentified:
            shared = await self._share_copies(chosen, request, end, progress)
        else:
            shared = await self._vault.shares.share(chosen, request.asker, until=end, purpose=request.wish.purpose, progress=progress)
        await self._answer(request, approved=True, why="", files=len(shared))
        return shared

    async def refuse(self, sha256: bytes, why: str = "") -> Request:
        """Say no. Raises as ``approve``."""
        request = await self._open_request(sha256)
        await self._answer(request, approved=False, why=why, files=0)
        return request

    # -- what came of it

    async def standing(self) -> list[Shared]:
        """Every consent that is in force: what others may read of this vault's files now."""
        now = time.time()
        shared = await self._vault.shares.all()
        return [each for each in shared if each.given and not each.ended and not 0 < each.until < now and not self._is_message(each)]

    async def of(self, patient: str | None) -> list[Shared]:
        """Those in force about one patient, by the names and ids that files were stored with; all for None."""
        query, found = Query(patient=patient), await self.standing()
        if patient is None:
            return found
        return [each for each in found if (row := self._vault.row(each.sha256)) is not None and query.meets(row)]

    async def end(self, consents: Sequence[Shared]) -> list[Shared]:
        """Take consents back, reader by reader; all that the readers lose. Raises Absent where there is none, and as ``revoke``."""
        if not consents:
            raise Absent("no such consent is in force", hint="`medshard consents ls` lists those that are.")
        readers: dict[Key, list[bytes]] = defaultdict(list)
        for each in consents:
            readers[Key(each.peer)].append(each.sha256)
        return [each for reader, hashes in readers.items() for each in await self._vault.shares.revoke(hashes, reader)]

    async def reads(self, purpose: int | None = None) -> list[Read]:
        """Each read of this vault's files by others, one for each ACCESS entry. From the whole ledger, so no node can leave any out."""
        own = self._vault.file_ids()
        own -= {row.file_id for kind in own_types for row in self._rows(kind, received=False)}
        found = []
        for each in await self._vault.shares.audit(None):
            mine = own.intersection(each.file_ids)
            if each.what != "read" or self._vault.keys.of(each.author) or not mine:
                continue
            if purpose is None or each.purpose == purpose_name(purpose):
                who = (each.author, each.author_name, each.institution)
                found.append(Read(each.index, each.time, *who, each.purpose, each.grant_index, tuple(sorted(mine))))
        return found

    async def usage(self, purpose: int | None = None) -> list[Used]:
        """The same, counted by month, reader and purpose."""
        return counted(await self.reads(purpose))

    # -- parts

    async def _asked(self, row: Row) -> list[Key]:
        """Whom this vault let read its request, and the keys that have succeeded theirs since."""
        readers = self._vault.shares.readers(row.file_id)
        return [key for reader in readers for key in (reader, *await self._vault.shares.successors(reader))]

    async def _open_request(self, sha256: bytes) -> Request:
        request = next((each for each in await self.requests() if each.sha256 == sha256), None)
        if request is None or self._vault.keys.of(request.asker) is not None:
            raise Absent("nobody has made such a request of this vault", hint="`medshard requests ls` lists them.")
        if request.answer:
            raise Conflict(f"this request was {request.answer} already")
        return request

    async def _share_copies(self, chosen: Sequence[bytes], request: Request, until: int, progress: OnProgress | None) -> list[Shared]:
        """Copies of these instances, study by study. Raises Refused where an instance is no DICOM original or none can be made clean."""
        from medshard.dicom.copies import Copier
        from medshard.dicom.deidentify import Profile

        studies: dict[str, set[bytes]] = defaultdict(set)
        for sha256 in chosen:
            row = self._vault.row(sha256)
            if row is None or not _may_be_cleaned(row):
                raise Refused(f"{sha256.hex()[:16]}… is no DICOM original, and de-identified data was asked for", hint="Leave it out.")
            studies[row.attributes["study-uid"]].add(sha256)
        copier, shared = Copier(self._vault, request.asker, Profile.BASIC), list[Shared]()
        for study, only in sorted(studies.items()):
            copied = await copier.copy(study, only=only, until=until, purpose=request.wish.purpose, progress=progress)
            shared += copied.shared
        return shared

    async def _answer(self, request: Request, *, approved: bool, why: str, files: int) -> None:
        data = canonical.encode([1, request.sha256, int(approved), why[:text_chars_max], files])
        await self._send(data, b"answers/" + request.sha256.hex()[:16].encode(), answer_type, {}, request.asker)

    async def _answers(self) -> dict[tuple[bytes, Key], tuple[str, str, int]]:
        """By request and who answers: what, why, and how many files were granted. For people: an answer gives no right, the grant does."""
        found: dict[tuple[bytes, Key], tuple[str, str, int]] = {}
        for row in [*self._rows(answer_type, received=True), *self._rows(answer_type, received=False)]:
            try:
                f = Fields(canonical.decode(await self._read(row), bytes_max=message_bytes_max, what="answer"), count=5, what="answer")
                f.uint(least=1, most=1)
                request, approved = f.bytes(exactly=sha256_size), f.uint(most=1)
                answerer, word = Key(row.owner) if row.owner else self._vault.keys.public, "approved" if approved else "refused"
                found[request, answerer] = (word, f.text(most=text_chars_max), f.uint(most=2**32))
            except (Malformed, Damaged):
                continue
        return found

    def _is_message(self, each: Shared) -> bool:
        row = self._vault.row(each.sha256)
        return row is not None and row.media_type in own_types

    def _rows(self, media_type: str, *, received: bool) -> Iterator[Row]:
        return (row for row in self._vault.ls(shared=received) if row.media_type == media_type)

    async def _read(self, row: Row) -> bytes:
        return await self._vault.read(row.sha256, 0, min(row.size, message_bytes_max + 1))

    @staticmethod
    def _parse(sha256: bytes, data: bytes) -> Request:
        f = Fields(canonical.decode(data, bytes_max=message_bytes_max, what="access request"), count=5, what="access request")
        f.uint(least=1, most=1)
        asker, wish = Key(f.bytes(exactly=key_size)), Wish.from_value(f.list(most=8))
        return Request(sha256, asker, wish, f.uint(most=2**53))

    async def _send(self, data: bytes, name: bytes, media_type: str, attributes: dict[str, str], reader: Key) -> bytes:
        part = Part.holding(data, name, Description(media_type, attributes))
        report = await self._vault.store(Plan((Unit(name, (part,), is_pack=False),), ()))
        if not report.stored:
            raise Unavailable("; ".join(problem.message for problem in report.problems) or "it could not be stored")
        await self._vault.shares.share([report.stored[0].sha256], reader, purpose=Purpose.OPERATIONS)
        return report.stored[0].sha256


def _may_be_cleaned(row: Row) -> bool:
    """A DICOM instance that is not itself a copy."""
    return row.media_type == "application/dicom" and bool(row.attributes.get("study-uid")) and f"tag:{_copy_tag}" not in row.attributes


def counted(reads: Sequence[Read]) -> list[Used]:
    """How often each reader read in each month under each purpose."""
    groups: dict[tuple[str, bytes, str], list[Read]] = defaultdict(list)
    for each in reads:
        groups[time.strftime("%Y-%m", time.gmtime(each.time)), each.reader, each.purpose].append(each)
    used = []
    for (month, reader, purpose), told in sorted(groups.items()):
        files, places = {id_ for each in told for id_ in each.file_ids}, [each.entry for each in told]
        who = (reader, told[0].reader_name, told[0].institution)
        used.append(Used(month, *who, purpose, len(told), len(files), min(places), max(places)))
    return used
