"""What entries of the ledger say: a body for each type, and how it is read.

Law: a body is a frozen value that encodes canonically; every one ends in a nonce. Parsing raises Malformed and nothing else, and decides
nothing about rights. Who says it, and that they said it, is in ``entries``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, TypeAlias, TypeVar

from medshard_protocol.canonical import Fields, Value
from medshard_protocol.errors import Malformed
from medshard_protocol.ids import FileId, Key, NodeId, Sha256, file_id_size, key_size, node_id_size, sha256_size

access_files_max = 48  # the most file ids that fit into one entry
reason_bytes_max = 1600  # a sealed reason: 1136 bytes of HPKE with MLKEM768-X25519, and the text
token_bytes_max = 1700  # an RFC 3161 token without certificates; one of an RSA key of 4096 bits has about 1100
time_max = 2**40  # seconds since 1970: the year 36812
size_max = 2**63 - 1
nonce_size = 16
signature_size = 64


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
    ROTATE = 4
    SENDER = 5


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
class Rotate:
    """ROSTER 4: the authoring institution vouches for ``key`` in the place of ``old``, which ends; both keys have signed for that."""

    old: Key
    key: Key
    old_signature: bytes  # over ``rotation_signed``
    key_signature: bytes  # likewise
    nonce: bytes

    type = Type.ROSTER

    @property
    def passes(self) -> tuple[Key, Key]:
        """Whose files come to whom."""
        return self.old, self.key

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [int(Change.ROTATE), self.old, self.key, self.old_signature, self.key_signature, self.nonce]


@dataclass(frozen=True, slots=True)
class Sender:
    """ROSTER 5: the authoring institution vouches for a key that only sends: what it registers is the vault's, and it reads nothing."""

    key: Key
    vault: Key
    nonce: bytes

    type = Type.ROSTER

    @property
    def passes(self) -> tuple[Key, Key]:
        """Whose files come to whom."""
        return self.key, self.vault

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [int(Change.SENDER), self.key, self.vault, self.nonce]


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
    Genesis | Enrol | Approve | Withdraw | Rotate | Sender | Register | Grant | Revoke | Access | Move | Retain | Hold | Release
    | Retire | Erase | Timestamp | Freeze | Propose
)  # fmt: skip


_Dated = TypeVar("_Dated", Retain, Retire, Erase)


def parse_body(type_: int, value: list[Any]) -> Body:
    """Read the body of an entry of this type. Raises Malformed, also for types that this version does not know."""
    parse = _bodies.get(type_)
    if parse is None:
        raise Malformed(f"entry: type {type_} means nothing in this version")
    return parse(value)


_roster_counts = {Change.ENROL: 4, Change.ROTATE: 6, Change.SENDER: 4}


def _roster_body(value: list[Any]) -> Genesis | Enrol | Approve | Withdraw | Rotate | Sender:
    change = value[0] if value and isinstance(value[0], int) and not isinstance(value[0], bool) else None
    if change not in tuple(Change):
        raise Malformed("ROSTER entry: a change that this version does not know")
    fields = Fields(value, count=_roster_counts.get(Change(change), 3), what="ROSTER entry")
    fields.uint()
    if change == Change.GENESIS:
        return Genesis(_sha256(fields), _nonce(fields))
    if change == Change.APPROVE:
        return Approve(_sha256(fields), _nonce(fields))
    key = _key(fields)
    match change:
        case Change.ENROL:
            return Enrol(key, fields.uint(most=2**32 - 1), _nonce(fields))
        case Change.ROTATE:
            new, signatures = _key(fields), (fields.bytes(exactly=signature_size), fields.bytes(exactly=signature_size))
            return Rotate(key, new, *signatures, _nonce(fields))
        case Change.SENDER:
            return Sender(key, _key(fields), _nonce(fields))
    return Withdraw(key, _nonce(fields))


def _register_body(value: list[Any]) -> Register:
    fields = Fields(value, count=3, what="REGISTER entry")
    return Register(_file_id(fields), _sha256(fields), _nonce(fields))


def _grant_body(value: list[Any]) -> Grant:
    fields = Fields(value, count=5, what="GRANT entry")
    file_ids, reader = _file_ids(fields, "GRANT entry"), _key(fields)
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


def _key(fields: Fields) -> Key:
    return Key(fields.bytes(exactly=key_size))


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
