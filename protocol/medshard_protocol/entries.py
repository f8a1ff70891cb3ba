"""Entries of the ledger: what may be written down, and who signed it.

Law: an entry is canonical bytes of at most 2 KiB; its author signs the log's origin, the type and the body, so an entry of one log means
nothing in another. Only opaque identifiers go in: no names, patient ids, UIDs or plaintext hashes. Whether an author had the right
to say it is not decided here but in ``state``; that the author said it is checked by ``Entry.verify``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medshard_protocol.canonical import Fields, Value, decode, encode
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.ids import FileId, Key, Sha256, file_id_size, key_size, sha256_size

entry_version = 1
entry_bytes_max = 2048  # fits the uint16 length of a C2SP entry bundle with room, and keeps the log cheap to mirror for ever
access_files_max = 48  # the most file ids that fit into one entry
nonce_size = 16
signature_size = 64

label = b"medshard/entry/v1"


class Type(IntEnum):
    """What an entry says. All numbers are taken now; REGISTER, ACCESS and ROSTER have meaning in this version."""

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
class Access:
    """The author is about to read these files."""

    file_ids: tuple[FileId, ...]
    purpose: int
    nonce: bytes

    type = Type.ACCESS

    def to_value(self) -> list[Value]:
        """The body to encode."""
        return [list(self.file_ids), self.purpose, self.nonce]


Body: TypeAlias = Genesis | Enrol | Register | Access


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
        """Parse an entry. Raises Malformed, also for types that this version gives no meaning."""
        fields = Fields(decode(data, bytes_max=entry_bytes_max, what="entry"), count=5, what="entry")
        fields.uint(least=entry_version, most=entry_version)
        number = fields.uint(most=255)
        parse = _bodies.get(number)
        if parse is None:
            raise Malformed(f"entry: type {number} means nothing in this version")
        body = parse(fields.list(most=4))
        return cls(body, Key(fields.bytes(exactly=key_size)), fields.bytes(exactly=signature_size))

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


def _roster_body(value: list[Any]) -> Genesis | Enrol:
    if value and value[0] == Change.GENESIS and value[0] is not False:
        fields = Fields(value, count=3, what="ROSTER entry")
        fields.uint(most=Change.GENESIS)
        return Genesis(Sha256(fields.bytes(exactly=sha256_size)), fields.bytes(exactly=nonce_size))
    fields = Fields(value, count=4, what="ROSTER entry")
    fields.uint(least=Change.ENROL, most=Change.ENROL)
    return Enrol(Key(fields.bytes(exactly=key_size)), fields.uint(most=2**32 - 1), fields.bytes(exactly=nonce_size))


def _register_body(value: list[Any]) -> Register:
    fields = Fields(value, count=3, what="REGISTER entry")
    file_id = FileId(fields.bytes(exactly=file_id_size))
    return Register(file_id, Sha256(fields.bytes(exactly=sha256_size)), fields.bytes(exactly=nonce_size))


def _access_body(value: list[Any]) -> Access:
    fields = Fields(value, count=3, what="ACCESS entry")
    file_ids = tuple(fields.list(most=access_files_max))
    if not file_ids or not all(isinstance(item, bytes) and len(item) == file_id_size for item in file_ids):
        raise Malformed(f"ACCESS entry: expected 1 to {access_files_max} file ids")
    if len(set(file_ids)) != len(file_ids):
        raise Malformed("ACCESS entry: a file id is listed twice")
    return Access(tuple(FileId(item) for item in file_ids), fields.uint(most=255), fields.bytes(exactly=nonce_size))


_bodies: dict[int, Callable[[list[Any]], Body]] = {
    Type.ROSTER: _roster_body,
    Type.REGISTER: _register_body,
    Type.ACCESS: _access_body,
}
