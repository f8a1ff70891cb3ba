"""What the ledger means: a pure fold over its entries, in order.

Law: an entry that its author had no right to make has no effect, and neither has one that cannot be parsed; everyone who folds the same
entries holds the same state. The fold believes that signatures were checked: whoever feeds it says so with each entry, because a node
checks each signature once and then remembers.

Rights in this version: the log key writes the genesis entry at index 0; an institution's CA key enrols keys; an enrolled key registers
files that nobody registered before, and announces that it will read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from medshard_protocol.entries import Access, Body, Enrol, Entry, Genesis, Register
from medshard_protocol.errors import Conflict, MedshardError, Refused
from medshard_protocol.ids import FileId, Key, Sha256
from medshard_protocol.roster import Roster


@dataclass(frozen=True, slots=True)
class Registration:
    """A file that the ledger knows."""

    index: int  # of the REGISTER entry that counts
    manifest_sha256: Sha256
    owner: Key


@dataclass(frozen=True, slots=True)
class Identity:
    """A key that an institution vouches for."""

    institution: int  # index into Roster.institutions
    roles: int


@dataclass(slots=True)
class State:
    """The fold's result after ``size`` entries. Grows in place by ``apply`` and by nothing else."""

    roster: Roster
    size: int = 0
    registrations: dict[FileId, Registration] = field(default_factory=dict)
    identities: dict[Key, Identity] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)  # entries with effect by type name, and "void" for those without

    def apply(self, entry: Entry | None) -> bool:
        """Fold the next entry in; None stands for one that is malformed or not signed by its author. Say whether it had an effect."""
        effective = entry is not None and self.objection(entry) is None
        if entry is not None and effective:
            self._take(entry.body, entry.author)
            self.counts[entry.body.type.name] += 1
        else:
            self.counts["void"] += 1
        self.size += 1
        return effective

    def objection(self, entry: Entry) -> MedshardError | None:
        """Say why this entry, were it the next, would have no effect. A repeated REGISTER of the same manifest is no objection."""
        body = entry.body
        if isinstance(body, Genesis):
            return self._genesis_objection(body, entry.author)
        if isinstance(body, Enrol):
            return self._enrol_objection(body, entry.author)
        if entry.author not in self.identities:
            return Refused("no institution has enrolled this key", hint="join an institution first")
        if isinstance(body, Register):
            return self._register_objection(body, entry.author)
        return None if isinstance(body, Access) else Refused("this version gives such an entry no effect")

    def _genesis_objection(self, body: Genesis, author: Key) -> MedshardError | None:
        if self.size != 0:
            return Refused("the genesis entry is entry 0 and no other")
        if author != self.roster.log_key or body.genesis_sha256 != self.roster.sha256:
            return Refused("this log follows another genesis file")
        return None

    def _enrol_objection(self, body: Enrol, author: Key) -> MedshardError | None:
        institution = self._institution(author)
        if institution is None:
            return Refused("only an institution enrols keys")
        known = self.identities.get(body.key)
        if known is not None and known.institution != institution:
            return Conflict("another institution has enrolled this key")
        return None

    def _register_objection(self, body: Register, author: Key) -> MedshardError | None:
        known = self.registrations.get(body.file_id)
        if known is not None and (known.manifest_sha256, known.owner) != (body.manifest_sha256, author):
            return Conflict("this file id is registered already, by another key or with another manifest")
        return None

    def _take(self, body: Body, author: Key) -> None:
        match body:
            case Register():
                self.registrations.setdefault(body.file_id, Registration(self.size, body.manifest_sha256, author))
            case Enrol():
                institution = self._institution(author)
                assert institution is not None, "checked by the objection"
                self.identities[body.key] = Identity(institution, body.roles)
            case Genesis() | Access():
                pass

    def _institution(self, key: Key) -> int | None:
        return next((number for number, item in enumerate(self.roster.institutions) if item.key == key), None)
