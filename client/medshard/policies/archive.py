"""Policies and claims in a vault: put with their terms, kept as long as they must be, found again, handed over as a whole.

    policies = Policies(vault)
    await policies.put([Path("policy.pdf")], Terms("VN-7", holder="Jane Doe", retain_until="2036-12-31"))
    for version in policies.history("VN-7"): ...
    await policies.put_claim("C-17", "VN-7", [Path("scan.dcm"), Path("letter.pdf")])

Law: the retention stands on the ledger before a put is reported as done. A claim is one object with one entry: its documents, and a record
that lists them with their hashes and the versions of the policy that were in force, so whoever is granted it can check all of it.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from medshard.describe import describe
from medshard.grants import Shared
from medshard.model import Description, OnProgress, Problem, PutReport, Row
from medshard.packs import Plan, Unit
from medshard.policies.model import Terms, Version, end_of, versions
from medshard.query import Query
from medshard.restoring import Nowhere
from medshard.source import Part, hash_file
from medshard.text import fold
from medshard.vault import Vault
from medshard_protocol.entries import Purpose
from medshard_protocol.errors import Absent, Conflict, Damaged, Refused
from medshard_protocol.ids import Key

record_name: Final = b"claim.json"
in_force_kinds: Final = ("policy", "endorsement")
record_bytes_max: Final = 16 * 1024 * 1024


class Policies:
    """Of one open vault."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    # -- policies

    async def put(self, paths: Sequence[Path], terms: Terms, *, progress: OnProgress | None = None) -> PutReport:
        """Store documents of one policy, each an object of its own, and retain them. Raises Malformed for terms that make no sense."""
        terms = terms.checked()
        units, problems = [], []
        for path in paths:
            part, problem = _part(path, os.fsencode(path.name), terms.attributes, pdf_only=True)
            if part is not None:
                units.append(Unit(part.name, (part,), is_pack=False))
            if problem is not None:
                problems.append(problem)
        report = await self._vault.store(Plan(tuple(units), tuple(problems)), progress)
        await self.retain([stored.sha256 for stored in report.stored], terms.retain_until)
        return report

    async def retain(self, hashes: Sequence[bytes], until: str) -> None:
        """Keep documents to the end of a day; none for an empty one, or one that has passed."""
        if hashes and until and end_of(until) > time.time():
            await self._vault.custody.retain(hashes, end_of(until))

    def history(self, number: str) -> list[Version]:
        """The documents of one policy, own or shared, in order. Raises Absent where there is none."""
        found = [row for row in self._vault.find(Query(policy_number=number)) if row.attributes.get("policy-number") == number]
        if not found:
            raise Absent(f"no document of policy {number} is known", hint="`medshard policy find` searches by holder, product and day.")
        return versions(found)

    def find(
        self,
        *,
        number: str | None = None,
        holder: str | None = None,
        product: str | None = None,
        in_force: date | None = None,
        claim: str | None = None,
    ) -> Iterator[Row]:
        """The documents that meet every condition. Words of a holder or a product may come in any order; case and accents do not matter."""
        for row in self._vault.find(Query(policy_number=number)):
            terms = Terms.of(row.attributes)
            if not terms.number and not terms.claim:
                continue
            if not (_has_words(terms.holder, holder) and _has_words(terms.product, product)):
                continue
            if (in_force is not None and not terms.in_force(in_force)) or (claim is not None and fold(terms.claim) != fold(claim)):
                continue
            yield row

    # -- claims

    async def put_claim(
        self,
        claim: str,
        number: str,
        paths: Sequence[Path],
        *,
        retain_until: str = "",
        on: date | None = None,
        elsewhere: bool = False,
        progress: OnProgress | None = None,
    ) -> PutReport:
        """Store what belongs to a claim as one object, with its record of the versions that were in force ``on`` a day, or today.

        ``elsewhere`` says that the policy is another's and need not be known here. Raises Conflict for a claim that this vault has, OSError
        for a file that cannot be read, Malformed, or Absent for a policy that is not known.
        """
        terms = Terms(number, kind="claim", claim=claim, retain_until=retain_until).checked()
        if any(not row.owner for row in self.find(claim=terms.claim)):
            raise Conflict(f"claim {terms.claim} is stored already", hint="Give what came later a number of its own, such as C-17/2.")
        on = on or datetime.now(UTC).date()
        covered = [each for each in self._known(number, elsewhere) if each.terms.kind in in_force_kinds and each.terms.in_force(on)]
        parts, problems = [], []
        for place, path in enumerate(paths, 1):
            part, problem = _part(path, f"{place:03}-".encode() + os.fsencode(path.name), terms.attributes)
            if part is None:
                assert problem is not None, "else there is a part"
                why = f"{problem.message}; the claim is stored whole or not at all"
                raise OSError(errno.EINVAL, why, os.fspath(path))
            parts.append(part)
            problems += [problem] if problem else []
        record = _record(terms, on, parts, covered)
        parts.insert(0, Part.holding(record, record_name, Description("application/json", terms.attributes)))
        unit = Unit(terms.claim.encode().replace(b"/", b"-"), tuple(parts), is_pack=True)
        report = await self._vault.store(Plan((unit,), tuple(problems)), progress)
        await self.retain([stored.sha256 for stored in report.stored], terms.retain_until)
        return report

    def _known(self, number: str, elsewhere: bool) -> list[Version]:
        try:
            return self.history(number)
        except Absent as error:
            if elsewhere:
                return []
            hint = "Is the number right? Where the insurer has the policy and this vault has not, say --policy-elsewhere."
            raise Absent(str(error), hint=hint) from None

    def claim(self, claim: str, owner: Key | None = None) -> list[Row]:
        """The documents of a claim, its record first: this vault's own, or else the one that was shared with it, by ``owner`` if given.

        Raises Absent, or Conflict where several owners have shared one of that number.
        """
        known = [row for row in self.find(claim=claim) if owner in (None, row.owner or self._vault.keys.public)]
        if not known:
            raise Absent(f"no claim {claim} is known", hint="`medshard shared` learns what others have shared with this vault.")
        found = [row for row in known if not row.owner] or known
        if len(owners := dict.fromkeys(row.owner for row in found)) > 1:
            names = self._vault.contacts.names()
            said = ", ".join(names.get(Key(each), f"{each.hex()[:16]}…") for each in owners)
            raise Conflict(f"several have shared a claim {claim}: {said}", hint="Say whose with --from.")
        found.sort(key=lambda row: (row.ledger_index, row.member or 0))
        return [row for row in found if row.file_id == found[0].file_id]

    async def learn(self, claim: str) -> None:
        """Look for what others have shared of late, where no such claim is known."""
        if not any(self.find(claim=claim)):
            await self._vault.shares.sync()

    async def share_claim(self, claim: str, reader: Key, *, until: int = 0, purpose: int = Purpose.INSURANCE) -> list[Shared]:
        """Let another vault read exactly the documents of one claim of this vault. Raises Refused for another's, and as ``share``."""
        rows = self.claim(claim)
        if rows[0].owner:
            raise Refused(f"claim {claim} was shared with this vault: only its owner shares it further")
        return await self._vault.shares.share_objects([rows[0].file_id], reader, until=until, purpose=purpose)

    async def check_claim(self, claim: str, owner: Key | None = None) -> dict[str, Any]:
        """Read a claim's record and every document of it, and compare; the record, with what the ledger proves.

        Whoever was granted the claim needs nobody else for this. Each read stands in the ledger, where its owner sees it. Raises Damaged.
        """
        await self.learn(claim)
        rows = self.claim(claim, owner)
        by_hash = {row.sha256: row for row in rows}
        record_row = next((row for row in rows if row.name == record_name), None)
        if record_row is None or record_row.size > record_bytes_max:
            raise Damaged(f"claim {claim} has no record that says what belongs to it")
        said, home = BytesIO(), record_row.file_id  # read from the claim itself, also where a document is known from elsewhere
        await self._vault.get(record_row.sha256, out=said, purpose=Purpose.INSURANCE, home=home)
        record: dict[str, Any] = json.loads(said.getvalue())
        for each in record["documents"]:
            digest = bytes.fromhex(each["sha256"])
            row = by_hash.get(digest)
            if row is None or row.size != each["size"]:
                raise Damaged(f"{each['name']} is in the record of claim {claim} and not among its documents")
            await self._vault.get(digest, out=Nowhere(), purpose=Purpose.INSURANCE, home=home)
        info = await self._vault.info(record_row.sha256)
        return record | {"ledger_index": info.ledger_index, "cosigners": list(info.cosigners), "checked": len(record["documents"])}


def _record(terms: Terms, on: date, parts: Sequence[Part], covered: Sequence[Version]) -> bytes:
    """What belongs to a claim, in writing."""
    documents = [{"name": os.fsdecode(part.name), "sha256": hash_file(part.path).hex(), "size": part.size} for part in parts]
    policies = [
        {"version": each.version, "kind": each.terms.kind, "sha256": each.row.sha256.hex(), "ledger_index": each.row.ledger_index}
        for each in covered
    ]
    told = {
        "medshard": "claim 1",
        "claim": terms.claim,
        "policy": terms.number,
        "day": str(on),
        "documents": documents,
        "in_force": policies,
    }
    return json.dumps(told, indent=1, ensure_ascii=False).encode()


def _part(path: Path, name: bytes, attributes: dict[str, str], *, pdf_only: bool = False) -> tuple[Part | None, Problem | None]:
    """A file with its description, or why it is not stored. A remark on one that is stored comes with it."""
    try:
        if not path.is_file():
            return None, Problem(path, "is not a regular file" if path.exists() else "there is no such file", stored=False)
        with open(path, "rb") as file:
            described = describe(file, name)
        if pdf_only and described.description.media_type != "application/pdf":
            return None, Problem(path, "is not a PDF; `medshard put --policy-number` stores any file", stored=False)
        about = replace(described.description, attributes={**described.description.attributes, **attributes})
        problem = Problem(path, described.problem, stored=True) if described.problem else None
        return Part.at(path, name, about), problem
    except OSError as error:
        return None, Problem(path, f"cannot be read: {error.strerror or error}", stored=False)


def _has_words(text: str, wanted: str | None) -> bool:
    if wanted is None:
        return True
    folded = fold(text)
    return all(word in folded for word in fold(wanted).split())
