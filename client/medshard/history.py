"""Who did what with a file, when, and under whose grant: entries of the ledger, made readable.

Law: it explains proved entries and asks nobody. A read is shown under the grant that gave the right at its place in the log; one without
any is shown too, because the attempt stands there. Names come from whoever reads the log, never from the log.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from medshard import hpke
from medshard.envelopes import open_reason
from medshard.grants import Happened, purpose_name
from medshard_protocol.entries import (
    Access,
    Enrol,
    Entry,
    Erase,
    Grant,
    Hold,
    Move,
    Propose,
    Register,
    Release,
    Retain,
    Retire,
    Revoke,
    Rotate,
    Sender,
)
from medshard_protocol.errors import MedshardError
from medshard_protocol.ids import FileId, Key, Sha256
from medshard_protocol.roster import Roster

_plain: Final = {
    Register: "registered",
    Move: "shard moved",
    Retain: "retained",
    Hold: "held",
    Release: "released",
    Retire: "retired",
    Erase: "erased",
}


@dataclass(slots=True)
class _Standing:
    id: Sha256
    index: int
    grant: Grant
    author: Key
    revoked: int | None = None


@dataclass(slots=True)
class Names:
    """What keys are called: by the vault's contacts, and by institutions."""

    contacts: Mapping[Key, str] = field(default_factory=dict)
    institutions: dict[Key, str] = field(default_factory=dict)
    own: Collection[Key] = ()

    def of(self, key: Key) -> str:
        """A contact's name, or nothing."""
        return "this vault" if key in self.own else self.contacts.get(key, "")


class Teller:
    """Fold entries in the log's order; each that concerns a file comes out as something that happened."""

    def __init__(self, roster: Roster, names: Names, auditors: hpke.PrivateKey | None = None) -> None:
        self._roster = roster
        self._names = names
        self._auditors = auditors
        self._institutions = {institution.key: institution.name for institution in roster.institutions}
        self.begin()

    def begin(self) -> None:
        """Start at the beginning of a log."""
        self._owners: dict[FileId, Key] = {}
        self._keys: dict[Key, Key] = {}  # one object for each author, however many files are theirs
        self._grants: dict[Sha256, _Standing] = {}
        self._holds: dict[Sha256, FileId] = {}
        self._by_reader: dict[tuple[FileId, Key], list[Sha256]] = {}
        self._heirs: dict[Key, tuple[Key, int]] = {}  # whose the files of a key are, and from which entry on
        self._before: dict[Key, Key] = {}  # the key that a key succeeded

    def own(self, file_id: FileId, owner: Key) -> None:
        """Say whose file this is, where that is known for sure before its REGISTER entry comes."""
        self._owners[file_id] = owner

    def tell(self, index: int, entry: Entry, *, sha256: bytes = b"", file_id: FileId | None = None, time: int = 0) -> Happened | None:
        """What this entry means, or None for one that is about no file. ``file_id`` is the file of interest, if there is one."""
        body, author = entry.body, entry.author
        kind = _plain.get(type(body), "")
        more: dict[str, Any] = {}
        file_ids: tuple[FileId, ...]
        match body:
            case Enrol(key=key):
                if author in self._institutions:
                    self._names.institutions.setdefault(key, self._institutions[author])
                return None
            case Rotate() | Sender():
                self.passed(index, entry)
                return None
            case Register():
                self._owners.setdefault(body.file_id, self._keys.setdefault(author, author))
                file_ids = (body.file_id,)
            case Hold():
                self._holds[entry.id] = body.file_id
                file_ids = (body.file_id,)
            case Release():
                held = self._holds.get(body.hold)
                if held is None:
                    return None
                file_ids = (held,)
            case Propose():
                file_ids = (body.file_id,)
                kind = f"{body.what.name.lower()} proposed" if body.stands else f"proposed {body.what.name.lower()} refused"
            case Move() | Retain() | Retire() | Erase():
                file_ids = (body.file_id,)
            case Grant():
                file_ids = body.file_ids
                kind, more = self._granted(index, entry, body)
            case Revoke():
                standing = self._grants.get(body.grant)
                if standing is None:
                    return None
                file_ids = standing.grant.file_ids
                kind, more = self._revoked(index, entry, body, standing)
            case Access():
                file_ids = body.file_ids
                kind, more = self._read(index, author, body, file_id)
            case _:
                return None
        return Happened(
            index, entry.id, kind, author, self._names.of(author), self._institution(author), file_ids, sha256, time=time, **more
        )

    def passed(self, index: int, entry: Entry) -> None:
        """Take in an entry by which the files of a key come to another."""
        body = entry.body
        if isinstance(body, Rotate | Sender) and entry.author in self._institutions:
            self._names.institutions.setdefault(body.key, self._institutions[entry.author])
            if isinstance(body, Rotate):
                self._before[body.key] = body.old
            old, heir = body.passes
            self._heirs.setdefault(old, (heir, index))

    def _heir(self, key: Key, index: int) -> Key:
        while (passed := self._heirs.get(key)) is not None and passed[1] < index:
            key = passed[0]
        return key

    def _line(self, key: Key) -> list[Key]:
        keys = [key]
        while (before := self._before.get(keys[-1])) is not None:
            keys.append(before)
        return keys

    def _granted(self, index: int, entry: Entry, body: Grant) -> tuple[str, dict[str, Any]]:
        owners = [self._owners[file_id] for file_id in body.file_ids if file_id in self._owners]
        valid = all(entry.author in (owner, self._heir(owner, index)) for owner in owners)
        if valid:
            self._grants[entry.id] = _Standing(entry.id, index, body, entry.author)
            for file_id in body.file_ids:
                self._by_reader.setdefault((file_id, body.reader), []).append(entry.id)
        told = {"reader": body.reader, "reader_name": self._names.of(body.reader), "until": body.until}
        return "granted" if valid else "void grant", {
            **told,
            "purpose": purpose_name(body.purpose),
            "grant": entry.id,
            "grant_index": index,
        }

    def _revoked(self, index: int, entry: Entry, body: Revoke, standing: _Standing) -> tuple[str, dict[str, Any]]:
        parties = {self._heir(key, index) for key in (standing.author, standing.grant.reader)}
        may = entry.author in parties or entry.author in self._institutions
        if may and standing.revoked is None:
            standing.revoked = index
        reader = standing.grant.reader
        told = {"reader": reader, "reader_name": self._names.of(reader), "grant": body.grant, "grant_index": standing.index}
        return "revoked" if may else "void revocation", told

    def _read(self, index: int, author: Key, body: Access, file_id: FileId | None) -> tuple[str, dict[str, Any]]:
        told: dict[str, Any] = {"purpose": purpose_name(body.purpose)}
        if body.reason:
            told |= self._reason(index, body.reason)
        wanted = body.file_ids if file_id is None else (file_id,)
        rights = [self._right(index, author, each) for each in wanted]
        standing = next((right for right in rights if isinstance(right, _Standing)), None)
        if standing is not None:
            told |= {"grant": standing.id, "grant_index": standing.index}
        kind = "read in an emergency" if body.reason else "read"
        return kind if all(right is not None for right in rights) else "tried to read without a right", told

    def _right(self, index: int, reader: Key, file_id: FileId) -> _Standing | Key | None:
        """The owner's key, the grant that gave the right at ``index``, or None."""
        if (owner := self._owners.get(file_id)) is not None and self._heir(owner, index) == reader:
            return reader
        candidates = [self._grants[grant] for key in self._line(reader) for grant in self._by_reader.get((file_id, key), ())]
        standing = [each for each in candidates if each.revoked is None or each.revoked > index]
        return max(standing, key=lambda each: each.grant.until or 2**63, default=None)

    def _reason(self, index: int, sealed: bytes) -> dict[str, Any]:
        if self._auditors is None:
            return {"sealed_reason": True}
        for origin in (self._roster.origin_at(index), *(each.origin for each in self._roster.before)):  # read before the end, written after
            try:
                return {"reason": open_reason(self._auditors, origin, sealed)}
            except MedshardError:
                continue
        return {"sealed_reason": True}

    def _institution(self, key: Key) -> str:
        return self._institutions.get(key) or self._names.institutions.get(key, "")
