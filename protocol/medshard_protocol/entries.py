"""Entries of the ledger: what may be written down, and who signed it.

Law: an entry is canonical bytes of at most 2 KiB; its author signs the log's origin, the type and the body, so an entry of one log means
nothing in another. Every body ends in a nonce: an author's nonce stands in a log once, so an entry handed in twice is one entry. Only
opaque identifiers go in: no names, patient ids, UIDs or plaintext hashes. Whether an author had the right is decided in ``state``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, TypeAlias, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medshard_protocol.canonical import Fields, Value, decode, encode
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.ids import FileId, Key, NodeId, Sha256, file_id_size, key_size, node_id_size, sha256_size
from medshard_protocol.merkle import leaf_hash, sha256

entry_version = 1
entry_bytes_max = 2048  # fits the uint16 length of a C2SP entry bundle with room, and keeps the log cheap to mirror for ever
access_files_max = 48  # the most file ids that fit into one entry
reason_bytes_max = 1600  # a sealed reason: 1136 bytes of HPKE with MLKEM768-X25519, and the text
token_bytes_max = 1700  # an RFC 3161 token without certificates; one of an RSA key of 4096 bits has about 1100
time_max = 2**40  # seconds since 1970: the year 36812
size_max = 2**63 - 1
nonce_size = 16
signature_size = 64

label = b"medshard/entry/v1"


class Type(IntEnum):
    """What an entry says."""

    ROSTER = 1
    REGISTER = 2
    GRANT = 3
    REVOKE = 4
    ACCESS = 5
    MOVE = 6
    RETAIN = 7
    HOLD = 8
    RELEASE = 9
    RETIRE = 10
    ERASE = 11
    TIMESTAMP = 12
    FREEZE = 13
    PROPOSE = 14


class Purpose(IntEnum):
    """Why a file is read. Numbers not listed are kept as they are."""

    UNSPECIFIED = 0
    TREATMENT = 1
    INSURANCE = 2
    OPERATIONS = 3
    RESEARCH = 4
    PATIENT_REQUEST = 5
    LEGAL = 6
    EMERGENCY = 7


class Change(IntEnum):
    """What a ROSTER entry does."""

    GENESIS = 0
    ENROL = 1
    APPROVE = 2
    WITHDRAW = 3


@dataclass(frozen=True, slots=True)
class Genesis:
    """ROSTER 0: this log follows that genesis file. Always entry 0, signed by the log key."""

    genesis_sha256: Sha256
    nonce: bytes

    type = Type.ROSTER

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [int(Change.GENESIS), self.genesis_sha256, self.nonce]


@dataclass(frozen=True, slots=True)
class Enrol:
    """ROSTER 1: the authoring institution vouches for a key."""

    key: Key
    roles: int  # a bit set; all bits are reserved in this version, and kept
    nonce: bytes

    type = Type.ROSTER

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [int(Change.ENROL), self.key, self.roles, self.nonce]


@dataclass(frozen=True, slots=True)
class Approve:
    """ROSTER 2: the authoring institution wants this document to be the next roster. Proposing one is approving it first."""

    roster_sha256: Sha256
    nonce: bytes

    type = Type.ROSTER

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [int(Change.APPROVE), self.roster_sha256, self.nonce]


@dataclass(frozen=True, slots=True)
class Withdraw:
    """ROSTER 3: the authoring institution vouches no longer for a key: it was stolen, or its owner has left."""

    key: Key
    nonce: bytes

    type = Type.ROSTER

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [int(Change.WITHDRAW), self.key, self.nonce]


@dataclass(frozen=True, slots=True)
class Register:
    """This file exists, and this is the SHA-256 of its manifest."""

    file_id: FileId
    manifest_sha256: Sha256
    nonce: bytes

    type = Type.REGISTER

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [self.file_id, self.manifest_sha256, self.nonce]


@dataclass(frozen=True, slots=True)
class Grant:
    """The author, their owner, lets ``reader`` read these files. The key itself travels beside the manifest, never here."""

    file_ids: tuple[FileId, ...]
    reader: Key
    until: int  # seconds since 1970, by the cosigners' clocks; 0 for no end
    purpose: int
    nonce: bytes

    type = Type.GRANT

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [list(self.file_ids), self.reader, self.until, self.purpose, self.nonce]


@dataclass(frozen=True, slots=True)
class Revoke:
    """The grant with this id ends here. Who has read before keeps what was read."""

    grant: Sha256  # ``Entry.id`` of the GRANT entry
    nonce: bytes

    type = Type.REVOKE

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [self.grant, self.nonce]


@dataclass(frozen=True, slots=True)
class Access:
    """The author is about to read these files; with a ``reason``, the author has read them in an emergency."""

    file_ids: tuple[FileId, ...]
    purpose: int
    reason: bytes  # sealed to the auditors' key; empty save for break-glass
    nonce: bytes

    type = Type.ACCESS

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [list(self.file_ids), self.purpose, self.reason, self.nonce]


@dataclass(frozen=True, slots=True)
class Move:
    """The author, a node, takes over a shard that its holder has lost."""

    file_id: FileId
    shard: int
    node: NodeId  # the new holder
    nonce: bytes

    type = Type.MOVE

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [self.file_id, self.shard, self.node, self.nonce]


@dataclass(frozen=True, slots=True)
class Retain:
    """This file must be kept at least until then. A later date replaces an earlier one, never the other way."""

    file_id: FileId
    until: int  # seconds since 1970
    nonce: bytes

    type = Type.RETAIN

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [self.file_id, self.until, self.nonce]


@dataclass(frozen=True, slots=True)
class Hold:
    """This file must be kept until this very hold is released."""

    file_id: FileId
    nonce: bytes

    type = Type.HOLD

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [self.file_id, self.nonce]


@dataclass(frozen=True, slots=True)
class Release:
    """The hold with this id ends."""

    hold: Sha256  # ``Entry.id`` of the HOLD entry
    nonce: bytes

    type = Type.RELEASE

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [self.hold, self.nonce]


@dataclass(frozen=True, slots=True)
class Retire:
    """The owner needs this file no longer: it is not repaired any more, and its shards may go."""

    file_id: FileId
    at: int  # seconds since 1970, as the author says; must not be before a retention ends
    nonce: bytes

    type = Type.RETIRE

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [self.file_id, self.at, self.nonce]


@dataclass(frozen=True, slots=True)
class Erase:
    """This file is to be destroyed: key wraps first, then shards. Nobody reads it any more."""

    file_id: FileId
    at: int  # as in ``Retire``
    nonce: bytes

    type = Type.ERASE

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [self.file_id, self.at, self.nonce]


@dataclass(frozen=True, slots=True)
class Timestamp:
    """An authority outside says when the log had this head (RFC 3161)."""

    size: int
    root: Sha256
    token: bytes  # a DER TimeStampToken over the checkpoint's text, without certificates
    nonce: bytes

    type = Type.TIMESTAMP

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [self.size, self.root, self.token, self.nonce]


@dataclass(frozen=True, slots=True)
class Freeze:
    """The authoring institution wants this log to end here, and its successor to have this genesis file."""

    successor: Sha256  # SHA-256 of a genesis file; zeros for none
    nonce: bytes

    type = Type.FREEZE

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [self.successor, self.nonce]


@dataclass(frozen=True, slots=True)
class Propose:
    """One of two persons wants a hold, or all holds released; with ``stands`` False, one of them does not."""

    what: Type  # HOLD or RELEASE
    file_id: FileId
    stands: bool
    nonce: bytes
    type = Type.PROPOSE

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [int(self.what), self.file_id, int(self.stands), self.nonce]


Body: TypeAlias = (
    Genesis | Enrol | Approve | Withdraw | Register | Grant | Revoke | Access | Move | Retain | Hold | Release | Retire | Erase
    | Timestamp | Freeze | Propose
)  # fmt: skip
_Dated = TypeVar("_Dated", Retain, Retire, Erase)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry, with its author's signature, which ``from_bytes`` does not check."""

    body: Body
    author: Key
    signature: bytes

    def to_bytes(self) -> bytes:
        """The bytes that the log holds and hashes. Raises ValueError if they would be too many."""
        data = encode([entry_version, int(self.body.type), self.body.to_value(), self.author, self.signature])
        if len(data) > entry_bytes_max:
            raise ValueError(f"an entry has at most {entry_bytes_max} bytes")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Entry:
        """Parse an entry. Raises Malformed, also for types that this version does not know."""
        fields = Fields(decode(data, bytes_max=entry_bytes_max, what="entry"), count=5, what="entry")
        fields.uint(least=entry_version, most=entry_version)
        number = fields.uint(most=255)
        parse = _bodies.get(number)
        if parse is None:
            raise Malformed(f"entry: type {number} means nothing in this version")
        body = parse(fields.list(most=5))
        return cls(body, Key(fields.bytes(exactly=key_size)), fields.bytes(exactly=signature_size))

    @property
    def id(self) -> Sha256:
        """What other entries call this one by: its leaf hash in the log (RFC 6962)."""
        return Sha256(leaf_hash(self.to_bytes(), sha256))

    def verify(self, origin: str) -> None:
        """Check that the author signed this entry for this log. Raises Refused."""
        try:
            Ed25519PublicKey.from_public_bytes(self.author).verify(self.signature, signed_bytes(origin, self.body))
        except (InvalidSignature, ValueError):
            raise Refused("entry: the author's signature does not hold") from None


def signed_bytes(origin: str, body: Body) -> bytes:
    """What an author signs: label, length and bytes of the origin, type, canonical body."""
    name = origin.encode()
    return label + len(name).to_bytes(2, "big") + name + bytes([body.type]) + encode(body.to_value())


def sign_entry(origin: str, body: Body, author: Key, sign: Callable[[bytes], bytes]) -> Entry:
    """Make an entry. ``sign`` makes Ed25519 signatures with the private key of ``author``; keys stay where they are kept."""
    return Entry(body, author, sign(signed_bytes(origin, body)))


def _roster_body(value: list[Any]) -> Genesis | Enrol | Approve | Withdraw:
    change = value[0] if value and isinstance(value[0], int) and not isinstance(value[0], bool) else None
    fields = Fields(value, count=4 if change == Change.ENROL else 3, what="ROSTER entry")
    if change not in tuple(Change):
        raise Malformed("ROSTER entry: a change that this version does not know")
    fields.uint()
    if change == Change.GENESIS:
        return Genesis(_sha256(fields), _nonce(fields))
    if change == Change.APPROVE:
        return Approve(_sha256(fields), _nonce(fields))
    key = Key(fields.bytes(exactly=key_size))
    if change == Change.ENROL:
        return Enrol(key, fields.uint(most=2**32 - 1), _nonce(fields))
    return Withdraw(key, _nonce(fields))


def _register_body(value: list[Any]) -> Register:
    fields = Fields(value, count=3, what="REGISTER entry")
    return Register(_file_id(fields), _sha256(fields), _nonce(fields))


def _grant_body(value: list[Any]) -> Grant:
    fields = Fields(value, count=5, what="GRANT entry")
    file_ids, reader = _file_ids(fields, "GRANT entry"), Key(fields.bytes(exactly=key_size))
    return Grant(file_ids, reader, fields.uint(most=time_max), fields.uint(most=255), _nonce(fields))


def _revoke_body(value: list[Any]) -> Revoke:
    fields = Fields(value, count=2, what="REVOKE entry")
    return Revoke(_sha256(fields), _nonce(fields))


def _access_body(value: list[Any]) -> Access:
    fields = Fields(value, count=4, what="ACCESS entry")
    return Access(_file_ids(fields, "ACCESS entry"), fields.uint(most=255), fields.bytes(most=reason_bytes_max), _nonce(fields))


def _move_body(value: list[Any]) -> Move:
    fields = Fields(value, count=4, what="MOVE entry")
    file_id, shard = _file_id(fields), fields.uint(most=254)
    return Move(file_id, shard, NodeId(fields.bytes(exactly=node_id_size)), _nonce(fields))


def _hold_body(value: list[Any]) -> Hold:
    fields = Fields(value, count=2, what="HOLD entry")
    return Hold(_file_id(fields), _nonce(fields))


def _release_body(value: list[Any]) -> Release:
    fields = Fields(value, count=2, what="RELEASE entry")
    return Release(_sha256(fields), _nonce(fields))


def _dated_body(of: type[_Dated], value: list[Any]) -> _Dated:
    fields = Fields(value, count=3, what=f"{of.type.name} entry")
    return of(_file_id(fields), fields.uint(most=time_max), _nonce(fields))


def _timestamp_body(value: list[Any]) -> Timestamp:
    fields = Fields(value, count=4, what="TIMESTAMP entry")
    size, root = fields.uint(most=size_max), _sha256(fields)
    return Timestamp(size, root, fields.bytes(most=token_bytes_max), _nonce(fields))


def _freeze_body(value: list[Any]) -> Freeze:
    fields = Fields(value, count=2, what="FREEZE entry")
    return Freeze(_sha256(fields), _nonce(fields))


def _propose_body(value: list[Any]) -> Propose:
    fields = Fields(value, count=4, what="PROPOSE entry")
    what, file_id = Type(fields.uint(least=Type.HOLD, most=Type.RELEASE)), _file_id(fields)
    return Propose(what, file_id, bool(fields.uint(most=1)), _nonce(fields))


def _file_ids(fields: Fields, what: str) -> tuple[FileId, ...]:
    file_ids = tuple(fields.list(most=access_files_max))
    if not file_ids or not all(isinstance(item, bytes) and len(item) == file_id_size for item in file_ids):
        raise Malformed(f"{what}: expected 1 to {access_files_max} file ids")
    if len(set(file_ids)) != len(file_ids):
        raise Malformed(f"{what}: a file id is listed twice")
    return tuple(FileId(item) for item in file_ids)


def _file_id(fields: Fields) -> FileId:
    return FileId(fields.bytes(exactly=file_id_size))


def _sha256(fields: Fields) -> Sha256:
    return Sha256(fields.bytes(exactly=sha256_size))


def _nonce(fields: Fields) -> bytes:
    return fields.bytes(exactly=nonce_size)


_bodies: dict[int, Callable[[list[Any]], Body]] = {
    Type.ROSTER: _roster_body,
    Type.REGISTER: _register_body,
    Type.GRANT: _grant_body,
    Type.REVOKE: _revoke_body,
    Type.ACCESS: _access_body,
    Type.MOVE: _move_body,
    Type.RETAIN: partial(_dated_body, Retain),
    Type.HOLD: _hold_body,
    Type.RELEASE: _release_body,
    Type.RETIRE: partial(_dated_body, Retire),
    Type.ERASE: partial(_dated_body, Erase),
    Type.TIMESTAMP: _timestamp_body,
    Type.FREEZE: _freeze_body,
    Type.PROPOSE: _propose_body,
}
