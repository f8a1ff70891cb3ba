"""Entries of the ledger: what may be written down, and who signed it.

Law: an entry is canonical bytes of at most 2 KiB; its author signs the log's origin, the type and the body, so an entry of one log means
nothing in another. Every body ends in a nonce: an author's nonce stands in a log once, so an entry handed in twice is one entry. Only
opaque identifiers go in: no names, patient ids, UIDs or plaintext hashes. Whether an author had the right to say it is not decided here but
in ``state``; that the author said it is checked by ``Entry.verify``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from cryptography.exceptions import InvalidSignature

from medshard_protocol import ed25519
from medshard_protocol.bodies import (
    Access,
    Approve,
    Body,
    Change,
    Enrol,
    Erase,
    Freeze,
    Genesis,
    Grant,
    Hold,
    Move,
    Propose,
    Purpose,
    Register,
    Release,
    Retain,
    Retire,
    Revoke,
    Rotate,
    Sender,
    Timestamp,
    Type,
    Withdraw,
    access_files_max,
    nonce_size,
    parse_body,
    reason_bytes_max,
    signature_size,
    size_max,
    time_max,
    token_bytes_max,
)
from medshard_protocol.canonical import Fields, decode, encode
from medshard_protocol.errors import Refused
from medshard_protocol.ids import Key, Sha256, key_size
from medshard_protocol.merkle import leaf_hash, sha256

__all__ = [
    "Access",
    "Approve",
    "Body",
    "Change",
    "Enrol",
    "Entry",
    "Erase",
    "Freeze",
    "Genesis",
    "Grant",
    "Hold",
    "Move",
    "Propose",
    "Purpose",
    "Register",
    "Release",
    "Retain",
    "Retire",
    "Revoke",
    "Rotate",
    "Sender",
    "Timestamp",
    "Type",
    "Withdraw",
    "access_files_max",
    "entry_bytes_max",
    "entry_version",
    "label",
    "nonce_size",
    "reason_bytes_max",
    "rotation_label",
    "rotation_signed",
    "sign_entry",
    "signature_size",
    "signed_bytes",
    "size_max",
    "time_max",
    "token_bytes_max",
]

entry_version = 1
entry_bytes_max = 2048  # fits the uint16 length of a C2SP entry bundle with room, and keeps the log cheap to mirror for ever
label = b"medshard/entry/v1"
rotation_label = b"medshard/rotation/v1"


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
        return _parsed(data)

    @property
    def id(self) -> Sha256:
        """What other entries call this one by: its leaf hash in the log (RFC 6962)."""
        return Sha256(leaf_hash(self.to_bytes(), sha256))

    def verify(self, origin: str) -> None:
        """Check that the author signed this entry for this log, and whoever else its body says has signed. Raises Refused."""
        body = self.body
        try:
            _verify(self.author, self.signature, signed_bytes(origin, body))
            if isinstance(body, Rotate):
                signed = rotation_signed(origin, body.old, body.key)
                ed25519.verify(body.old, body.old_signature, signed)
                ed25519.verify(body.key, body.key_signature, signed)
        except InvalidSignature:
            raise Refused("entry: the author's signature does not hold") from None


@lru_cache(maxsize=64)  # a new entry is looked at by several parts of a node, one after the other
def _parsed(data: bytes) -> Entry:
    fields = Fields(decode(data, bytes_max=entry_bytes_max, what="entry"), count=5, what="entry")
    fields.uint(least=entry_version, most=entry_version)
    number = fields.uint(most=255)
    body = parse_body(number, fields.list(most=6))
    return Entry(body, Key(fields.bytes(exactly=key_size)), fields.bytes(exactly=signature_size))


@lru_cache(maxsize=256)
def _verify(author: Key, signature: bytes, message: bytes) -> None:
    """Raise InvalidSignature unless this author signed this. What held is remembered for a while, as for checkpoints."""
    ed25519.verify(author, signature, message)


def signed_bytes(origin: str, body: Body) -> bytes:
    """What an author signs: label, length and bytes of the origin, type, canonical body."""
    name = origin.encode()
    return label + len(name).to_bytes(2, "big") + name + bytes([body.type]) + encode(body.to_value())


def rotation_signed(origin: str, old: Key, key: Key) -> bytes:
    """What the old and the new key of a vault sign: label, length and bytes of the origin, both keys."""
    name = origin.encode()
    return rotation_label + len(name).to_bytes(2, "big") + name + old + key


def sign_entry(origin: str, body: Body, author: Key, sign: Callable[[bytes], bytes]) -> Entry:
    """Make an entry. ``sign`` makes Ed25519 signatures with the private key of ``author``; keys stay where they are kept."""
    return Entry(body, author, sign(signed_bytes(origin, body)))
