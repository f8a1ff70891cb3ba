"""From a log that has ended to the one that goes on: what must be shown, and who must have signed for it.

Law: a successor is believed by whoever trusts the genesis file of the log before, and by nobody else's word. The document carries the chain
of rosters up to the last one, the checkpoint with which that roster's quorum closed the log, and signatures by CA keys of as many of
its institutions for exactly this new genesis file, which names size and root of what it goes on from. An institution signs one successor.

The new log begins with the entries of the old one, at the same places and under the same tree: whatever was registered, granted, held or
withdrawn stays so, and is proved under the new log's own checkpoints. Knows no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medshard_protocol.canonical import Fields, Value, decode, encode
from medshard_protocol.checkpoint import Checkpoint, note_bytes_max, open_published
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.ids import Key, Sha256, key_size
from medshard_protocol.roster import Predecessor, Roster, institutions_max, roster_bytes_max
from medshard_protocol.rosters import Link, check_approvals, check_successor, takeover_complaint

label = b"medshard/successor/v1"
document_version = 1
signature_size = 64
links_max = 1 << 16
document_bytes_max = 64 << 20  # four thousand changes among a hundred institutions; most have a few
successor_path = "/v1/successor"


class Change(NamedTuple):
    """From which log to which."""

    rosters: tuple[Roster, ...]  # of the log that ended, its genesis file first
    checkpoint: Checkpoint  # its last
    genesis: Roster  # of the log that goes on

    @property
    def last(self) -> Roster:
        """The roster with which the old log ended."""
        return self.rosters[-1]


@dataclass(frozen=True, slots=True)
class Successor:
    """A log's end and what comes after it. Unchecked until ``check``."""

    before: bytes  # genesis file of the log that ended
    links: tuple[Link, ...]  # the changes of its roster
    note: bytes  # the last checkpoint that was published there
    genesis: bytes  # genesis file of the log that goes on
    signatures: tuple[tuple[Key, bytes], ...] = ()  # CA key, signature; sorted by key

    def to_bytes(self) -> bytes:
        """Encode canonically."""
        signatures: list[Value] = [[key, signature] for key, signature in sorted(self.signatures)]
        return encode([document_version, self.before, [link.to_value() for link in self.links], self.note, self.genesis, signatures])

    @classmethod
    def from_bytes(cls, data: bytes) -> Successor:
        """Parse. Raises Malformed."""
        fields = Fields(decode(data, bytes_max=document_bytes_max, what="successor"), count=6, what="successor")
        fields.uint(least=document_version, most=document_version)
        before, links = fields.bytes(most=roster_bytes_max), tuple(Link.from_value(item) for item in fields.list(most=links_max))
        note, genesis = fields.bytes(most=note_bytes_max), fields.bytes(most=roster_bytes_max)
        signatures = tuple(_signature(item) for item in fields.list(most=institutions_max))
        if [key for key, _ in signatures] != sorted({key for key, _ in signatures}):
            raise Malformed("successor: signatures are sorted by key, one for each")
        return cls(before, links, note, genesis, signatures)

    def look(self) -> Change:
        """Check everything but that enough institutions signed. Raises Malformed or Refused."""
        rosters = [Roster.from_bytes(self.before)]
        if rosters[0].number:
            raise Malformed("successor: it begins with a genesis file")
        for link in self.links:
            new = Roster.from_bytes(link.roster)
            check_successor(rosters[-1], new)
            check_approvals(rosters[-1], new, link.approvals)
            rosters.append(new)
        checkpoint, genesis = open_published(self.note, rosters[-1]), Roster.from_bytes(self.genesis)
        if complaint := _complaint(rosters[0], rosters[-1], checkpoint, genesis):
            raise Refused(f"the log {genesis.origin} cannot go on from {rosters[0].origin}: {complaint}")
        return Change(tuple(rosters), checkpoint, genesis)

    def check(self) -> Change:
        """Check everything but that the old genesis file is the one that is trusted. Raises Malformed or Refused."""
        change = self.look()
        message = signed_bytes(change)
        voices = set()
        for key, signature in self.signatures:
            institution = change.last.institution_of(key)
            if institution is None:
                raise Refused("successor: signed by somebody whom the last roster does not list")
            try:
                Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
            except (InvalidSignature, ValueError):
                raise Refused(f"successor: the signature of {institution.name} does not hold") from None
            voices.add(institution.name)
        if len(voices) < change.last.quorum.q:
            raise Refused(f"successor: signed by {len(voices)} institutions, and {change.last.quorum.q} are needed")
        return change

    def signed(self, key: Key, sign: Callable[[bytes], bytes]) -> Successor:
        """The same with one more signature. The signer has looked at it."""
        others = tuple(each for each in self.signatures if each[0] != key)
        return replace(self, signatures=tuple(sorted((*others, (key, sign(signed_bytes(self.look())))))))


def signed_bytes(change: Change) -> bytes:
    """What an institution signs: label, SHA-256 of the old and of the new genesis file. The latter names origin, size and root."""
    return label + change.rosters[0].sha256 + change.genesis.sha256


def line_after(genesis: Roster, checkpoint: Checkpoint) -> tuple[Predecessor, ...]:
    """The logs before one that goes on from this log at this checkpoint."""
    return (*genesis.before, Predecessor(genesis.origin, genesis.sha256, checkpoint.size, Sha256(checkpoint.root)))


def _complaint(genesis: Roster, last: Roster, checkpoint: Checkpoint, new: Roster) -> str | None:
    if new.number:
        return "it does not begin with a genesis file"
    if new.before != line_after(genesis, checkpoint):
        return "it names another log, or another end of it"
    return takeover_complaint(last, new)


def _signature(value: object) -> tuple[Key, bytes]:
    fields = Fields(value, count=2, what="successor signature")
    return Key(fields.bytes(exactly=key_size)), fields.bytes(exactly=signature_size)
