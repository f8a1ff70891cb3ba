"""What an outsider needs to see that one document was registered, by whom, and who vouches for that: a tlog-proof with extra data.

Law: it is checked with a genesis file and nothing else; nothing in it is believed. The chain of reasons, each step recomputed:

    document -> evidence of its object (one salted leaf, ``evidence``) -> hash of the manifest -> REGISTER entry, signed by its owner
    REGISTER entry -> root of the log -> a quorum of institutions, with each kind of key
    owner's key -> ROSTER entry by which an institution vouches for it, earlier in the same log
    the quorum -> rosters after genesis, each decided by a quorum of the one before

It shows one document: no neighbour in its pack, no name, no other file. What it does not show: that the shards hold the document, or
that the key was not withdrawn later. When it happened is known from cosigners' clocks (``first``: the checkpoint of the day) or from a
timestamp of an outside authority, whose token somebody else checks (``Proven.stamp``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from medshard_protocol import evidence, merkle
from medshard_protocol.canonical import Fields, Value, decode, encode
from medshard_protocol.checkpoint import Checkpoint, Note, cosigners, note_bytes_max, open_published, size_max
from medshard_protocol.entries import Enrol, Entry, Register, Rotate, Sender, Timestamp, entry_bytes_max
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.ids import FileId, Key, NodeId, Sha256
from medshard_protocol.merkle import hash_size, path_hashes_max, sha256
from medshard_protocol.roster import Roster, institutions_max
from medshard_protocol.rosters import Link, check_approvals, check_successor
from medshard_protocol.tlogproof import TlogProof, extra_bytes_max

extra_version = 1
links_max = 64
members_max = 2**31

Path = tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """An entry and its audit path, under a checkpoint that stands elsewhere."""

    index: int
    entry: bytes
    path: Path

    def to_value(self) -> list[Value]:
        """The form to encode."""
        return [self.index, self.entry, b"".join(self.path)]

    @classmethod
    def from_value(cls, value: object) -> Place:
        """Parse. Raises Malformed."""
        fields = Fields(value, count=3, what="proof entry")
        return cls(fields.uint(most=size_max), fields.bytes(most=entry_bytes_max), _path(fields))

    def check(self, checkpoint: Checkpoint, roster: Roster) -> Entry:
        """The entry, if it is in the log that the checkpoint describes and signed by its author. Raises Malformed or Refused."""
        leaf = merkle.leaf_hash(self.entry, sha256)
        if merkle.root_from_path(leaf, self.index, checkpoint.size, self.path, sha256) != checkpoint.root:
            raise Refused(f"proof: entry {self.index} is not in the log that the checkpoint describes")
        entry = Entry.from_bytes(self.entry)
        entry.verify(roster.origin_at(self.index))
        return entry


@dataclass(frozen=True, slots=True)
class Opening:
    """One leaf of an object's evidence, opened."""

    content: bytes  # SHA-256 of the manifest's bytes
    salt: bytes
    size: int
    digest: bytes  # SHA-256 of the document
    member: int
    members: int
    path: Path

    def to_value(self) -> list[Value]:
        """The form to encode."""
        return [self.content, self.salt, self.size, self.digest, self.member, self.members, b"".join(self.path)]

    @classmethod
    def from_value(cls, value: object) -> Opening:
        """Parse. Raises Malformed."""
        fields = Fields(value, count=7, what="proof opening")
        content, salt = fields.bytes(exactly=hash_size), fields.bytes(exactly=evidence.salt_size)
        size, digest = fields.uint(most=evidence.document_bytes_max), fields.bytes(exactly=hash_size)
        return cls(content, salt, size, digest, fields.uint(most=members_max), fields.uint(most=members_max), _path(fields))

    def manifest_hash(self, owner: Key, file_id: FileId) -> Sha256:
        """What the ledger would name this object by, if this owner registered it under this file id. Raises Malformed."""
        leaf = evidence.leaf(owner, file_id, self.salt, self.size, self.digest)
        root = merkle.root_from_path(leaf, self.member, self.members, self.path, sha256)
        return evidence.registered_hash(root, self.content)


@dataclass(frozen=True, slots=True)
class Seal:
    """A head after a change of the roster, cosigned by the roster before with both kinds of key, and the approvals in it."""

    note: bytes  # empty where the proof's own checkpoint is such a head
    approvals: tuple[tuple[int, Path], ...]

    def to_value(self) -> list[Value]:
        """The form to encode."""
        return [self.note, [[index, b"".join(path)] for index, path in self.approvals]]

    @classmethod
    def from_value(cls, value: object) -> Seal:
        """Parse. Raises Malformed."""
        fields = Fields(value, count=2, what="proof seal")
        note, approvals = fields.bytes(most=note_bytes_max), []
        for item in fields.list(most=institutions_max):
            each = Fields(item, count=2, what="proof seal")
            approvals.append((each.uint(most=size_max), _path(each)))
        return cls(note, tuple(approvals))


@dataclass(frozen=True, slots=True)
class Step:
    """One change of the roster."""

    link: Link
    seal: Seal

    def check(self, old: Roster, note: bytes) -> Roster:
        """The roster that follows; ``note`` is the proof's checkpoint. Raises Malformed or Refused."""
        new = Roster.from_bytes(self.link.roster)
        check_successor(old, new)
        check_approvals(old, new, self.link.approvals)
        if len(self.seal.approvals) != len(self.link.approvals):
            raise Malformed(f"proof: not every approval of roster {new.number} is shown to be in the log")
        checkpoint = open_published(self.seal.note or note, old, pq=True)
        for entry, (index, path) in zip(self.link.approvals, self.seal.approvals, strict=True):
            Place(index, entry, path).check(checkpoint, old)
        return new


@dataclass(frozen=True, slots=True)
class Stamp:
    """The first TIMESTAMP entry after the registration, and how the head it speaks of leads to the proof's."""

    place: Place
    consistency: Path

    def to_value(self) -> list[Value]:
        """The form to encode."""
        return [self.place.to_value(), b"".join(self.consistency)]

    @classmethod
    def from_value(cls, value: object) -> Stamp:
        """Parse. Raises Malformed."""
        fields = Fields(value, count=2, what="proof timestamp")
        place = Place.from_value(fields.list(most=3))
        return cls(place, _path(fields, most=2 * path_hashes_max))


@dataclass(frozen=True, slots=True)
class First:
    """The registration under an earlier checkpoint, which tells the time better."""

    note: bytes
    path: Path

    def to_value(self) -> list[Value]:
        """The form to encode."""
        return [self.note, b"".join(self.path)]

    @classmethod
    def from_value(cls, value: object) -> First:
        """Parse. Raises Malformed."""
        fields = Fields(value, count=2, what="proof first")
        return cls(fields.bytes(most=note_bytes_max), _path(fields))


class Cosigned(NamedTuple):
    """One cosigner's word."""

    institution: str
    node: str
    time: int  # Unix seconds by its clock


class Stamped(NamedTuple):
    """What an outside authority is said to have signed: to be checked with its certificates."""

    text: bytes  # of the checkpoint, which the token is over
    token: bytes


@dataclass(frozen=True)
class Proven:
    """What holds, if the genesis file does."""

    origin: str
    genesis_sha256: Sha256
    sha256: bytes  # of the document
    size: int  # bytes of the document
    file_id: FileId
    index: int  # of the REGISTER entry
    owner: Key
    institution: str  # that vouches for the owner's key
    enrolled_at: int  # index of its ENROL entry
    log_size: int
    root: bytes
    cosigned: tuple[Cosigned, ...]
    cosigned_pq: tuple[Cosigned, ...]
    roster_number: int
    known_by: int  # Unix seconds: at least one honest institution saw the entry no later than then
    stamp: Stamped | None


@dataclass(frozen=True, slots=True)
class DocumentProof:
    """The whole proof, unchecked until ``verify``."""

    register: Place
    note: bytes
    opening: Opening
    enrolment: Place
    steps: tuple[Step, ...] = ()
    first: First | None = None
    stamp: Stamp | None = None

    def to_bytes(self) -> bytes:
        """The text: a C2SP tlog-proof of the REGISTER entry, everything else in its extra data."""
        steps: list[Value] = [[step.link.to_value(), step.seal.to_value()] for step in self.steps]
        more: list[Value] = [[] if each is None else [each.to_value()] for each in (self.first, self.stamp)]
        extra = encode([extra_version, self.register.entry, self.opening.to_value(), self.enrolment.to_value(), steps, *more])
        return TlogProof(self.register.index, self.register.path, self.note, extra).to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> DocumentProof:
        """Parse. Raises Malformed."""
        text = TlogProof.from_bytes(data)
        if not text.extra:
            raise Malformed("proof: a tlog-proof, but not one of a document")
        fields = Fields(decode(text.extra, bytes_max=extra_bytes_max, what="proof"), count=7, what="proof")
        fields.uint(least=extra_version, most=extra_version)
        register = Place(text.index, fields.bytes(most=entry_bytes_max), text.path)
        opening, enrolment = Opening.from_value(fields.list(most=7)), Place.from_value(fields.list(most=3))
        steps = tuple(_step(item) for item in fields.list(most=links_max))
        first = next((First.from_value(item) for item in fields.list(most=1)), None)
        stamp = next((Stamp.from_value(item) for item in fields.list(most=1)), None)
        return cls(register, text.checkpoint, opening, enrolment, steps, first, stamp)

    def verify(self, genesis: Roster) -> Proven:
        """Check everything against a genesis file. Raises Malformed or Refused."""
        rosters = [genesis]
        for step in self.steps:
            rosters.append(step.check(rosters[-1], self.note))
        roster = rosters[-1]
        checkpoint = open_published(self.note, roster, pq=True)
        entry = self.register.check(checkpoint, roster)
        body = entry.body
        if not isinstance(body, Register):
            raise Refused("proof: the entry registers nothing")
        if self.opening.manifest_hash(entry.author, body.file_id) != body.manifest_sha256:
            raise Refused("proof: what was registered is not this document")
        institution = self._institution(checkpoint, entry.author, rosters)
        cosigned = [_words(self.note, roster, pq=pq) for pq in (False, True)]
        return Proven(
            origin=genesis.origin,
            genesis_sha256=genesis.sha256,
            sha256=self.opening.digest,
            size=self.opening.size,
            file_id=body.file_id,
            index=self.register.index,
            owner=entry.author,
            institution=institution,
            enrolled_at=self.enrolment.index,
            log_size=checkpoint.size,
            root=checkpoint.root,
            cosigned=cosigned[0],
            cosigned_pq=cosigned[1],
            roster_number=roster.number,
            known_by=min(self._times(roster, rosters)),
            stamp=None if self.stamp is None else self._stamped(checkpoint, roster),
        )

    def _institution(self, checkpoint: Checkpoint, owner: Key, rosters: Sequence[Roster]) -> str:
        """Who vouched for the owner's key before the registration."""
        entry = self.enrolment.check(checkpoint, rosters[-1])
        if not isinstance(entry.body, Enrol | Rotate | Sender) or entry.body.key != owner or self.enrolment.index >= self.register.index:
            raise Refused("proof: no institution had vouched for the key that registered")
        named = [each.name for roster in rosters if (each := roster.institution_of(entry.author)) is not None]
        if not named:
            raise Refused("proof: the key that registered was vouched for by nobody of this consortium")
        return named[-1]

    def _times(self, roster: Roster, rosters: Sequence[Roster]) -> list[int]:
        times = [_known_by(self.note, roster)]
        if self.first is not None:
            times.append(self._first_time(self.first, rosters))
        return times

    def _first_time(self, first: First, rosters: Sequence[Roster]) -> int:
        refusal: Refused | None = None
        for roster in rosters:
            try:
                checkpoint = open_published(first.note, roster)
            except Refused as error:
                refusal = error
                continue
            Place(self.register.index, self.register.entry, first.path).check(checkpoint, roster)
            return _known_by(first.note, roster)
        assert refusal is not None, "there is a genesis roster at least"
        raise refusal

    def _stamped(self, checkpoint: Checkpoint, roster: Roster) -> Stamped:
        assert self.stamp is not None, "asked only then"
        body = self.stamp.place.check(checkpoint, roster).body
        if not isinstance(body, Timestamp):
            raise Refused("proof: the entry is no timestamp")
        if body.size <= self.register.index or body.size > checkpoint.size:
            raise Refused("proof: the timestamp is of a log without the registration")
        merkle.verify_consistency(body.size, body.root, checkpoint.size, checkpoint.root, self.stamp.consistency, sha256)
        return Stamped(Checkpoint(roster.origin_at(body.size - 1), body.size, body.root).text().encode(), body.token)


def _known_by(note: bytes, roster: Roster) -> int:
    """A time by which an honest institution had cosigned: f may lie, so the earliest f of them tell nothing."""
    earliest: dict[int, int] = {}
    for node, time in cosigners(Note.from_bytes(note), roster).items():
        institution = roster.node(node).institution
        earliest[institution] = min(time, earliest.get(institution, time))
    return sorted(earliest.values())[roster.quorum.f]


def _words(note: bytes, roster: Roster, *, pq: bool) -> tuple[Cosigned, ...]:
    times: Mapping[NodeId, int] = cosigners(Note.from_bytes(note), roster, pq=pq)
    nodes = [(roster.node(node), time) for node, time in times.items()]
    return tuple(Cosigned(roster.institutions[node.institution].name, node.name, time) for node, time in nodes)


def _step(value: object) -> Step:
    fields = Fields(value, count=2, what="proof roster")
    return Step(Link.from_value(fields.list(most=2)), Seal.from_value(fields.list(most=2)))


def _path(fields: Fields, most: int = path_hashes_max) -> Path:
    joined = fields.bytes(most=most * hash_size)
    if len(joined) % hash_size:
        raise Malformed(f"proof: a path consists of hashes of {hash_size} bytes")
    return tuple(joined[at : at + hash_size] for at in range(0, len(joined), hash_size))
