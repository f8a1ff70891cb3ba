"""Signed notes, checkpoints and cosignatures (C2SP signed-note, tlog-checkpoint, tlog-cosignature), read strictly.

Law: a checkpoint counts for nothing until a key of the log and a quorum of institutions have signed exactly its bytes. Signature lines
of keys that the roster does not know are passed over, so that later key types travel along; a line that claims a known key and
does not verify spoils the whole note.

Cosignatures are of two kinds, Ed25519 and ML-DSA-44. The first is small and carries daily work; a proof that must hold for decades has a
quorum of each (``open_published`` with ``pq``), so that whoever breaks one kind alone has forged nothing.

Our logs write no extension lines (ML-DSA cosignatures do not cover them), and a checkpoint that has some is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PublicKey

from medshard_protocol import ed25519
from medshard_protocol.errors import Absent, Malformed, Refused
from medshard_protocol.ids import NodeId
from medshard_protocol.merkle import hash_size
from medshard_protocol.roster import Roster

Sign: TypeAlias = Callable[[bytes], bytes]  # makes a signature with a key that stays where it is kept

note_bytes_max = 2 << 20  # 256 institutions with an Ed25519 and an ML-DSA-44 cosignature each take 1 MiB
signatures_max = 600
remembered_max = 64  # signatures of this process
remembered_bytes_max = 64 * 1024  # of a note that was parsed a moment ago
size_max = 2**63 - 1
time_max = 2**63 - 1  # seconds since 1970
signature_bytes_max = 8192  # the largest standard post-quantum signature of tlog-cosignature has 2420

log_signature = 0x01
cosignature_v1 = 0x04
cosignature_pq = 0x06  # ML-DSA-44 over a subtree, which for a checkpoint begins at 0
key_sizes = {log_signature: 32, cosignature_v1: 32, cosignature_pq: 1312}

_dash = "\u2014 "
_name = re.compile(r"[^\s+]+\Z")
_line = re.compile(_dash + r"([^\s+]+) ([^ \n]*)\n\Z")
_control = re.compile(r"[\x00-\x09\x0b-\x1f]")
_decimal = re.compile(r"(0|[1-9][0-9]*)\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature line: who says to have signed, and what follows the key id."""

    name: str
    key_id: bytes  # 4 bytes
    value: bytes

    def line(self) -> str:
        """The line as it stands in a note, newline included."""
        return f"{_dash}{self.name} {binascii.b2a_base64(self.key_id + self.value, newline=False).decode()}\n"

    @property
    def time(self) -> int:
        """When a cosignature of either kind was made, as it says."""
        return int.from_bytes(self.value[:8], "big")

    @classmethod
    def from_line(cls, line: str) -> Signature:
        """Parse a line, newline included. Raises Malformed."""
        found = _line.match(line)
        if found is None:
            raise Malformed("note: not a signature line")
        name, encoded = found.groups()
        blob = _base64(encoded)
        if not 4 < len(blob) <= 4 + signature_bytes_max:
            raise Malformed("note: a signature of a wrong length")
        return cls(name, blob[:4], blob[4:])


@dataclass(frozen=True, slots=True)
class Note:
    """A text and the signatures under it, none of them checked."""

    text: str  # ends in a newline
    signatures: tuple[Signature, ...]

    def to_bytes(self) -> bytes:
        """The note as it is stored and sent."""
        return (self.text + "\n" + "".join(signature.line() for signature in self.signatures)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Note:
        """Parse a note. Raises Malformed."""
        return _parsed(data) if len(data) <= remembered_bytes_max else _parse(data)

    @staticmethod
    def text_of(data: bytes) -> str:
        """The text alone, its signature lines unread. Raises Malformed."""
        return _halves(data)[0]

    def signed_by(self, more: Iterable[Signature]) -> Note:
        """The same text with more signatures after those it has."""
        return Note(self.text, (*self.signatures, *more))


def _parse(data: bytes) -> Note:
    text, tail = _halves(data)
    lines = tail[:-1].split("\n")
    if len(lines) > signatures_max:
        raise Malformed(f"note: more than the {signatures_max} signatures allowed")
    return Note(text, tuple(Signature.from_line(line + "\n") for line in lines))


_parsed = lru_cache(maxsize=16)(_parse)  # the same head is looked at by several parts of a program, one after the other


def _halves(data: bytes) -> tuple[str, str]:
    if len(data) > note_bytes_max:
        raise Malformed(f"note: {len(data)} bytes, more than the {note_bytes_max} allowed")
    try:
        whole = data.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("note: not UTF-8") from None
    head, blank, tail = whole.rpartition("\n\n")
    if _control.search(whole) or not blank or not tail.endswith("\n"):
        raise Malformed("note: expected text, an empty line, and signature lines")
    return head + "\n", tail


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A log's claim: at this size, the Merkle tree over all entries has this root."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """The text to sign."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @classmethod
    def from_text(cls, text: str) -> Checkpoint:
        """Parse the text of a note. Raises Malformed, and Refused for extension lines."""
        lines = text.split("\n")
        if len(lines) < 4 or lines[-1] or not all(lines[:-1]):
            raise Malformed("checkpoint: expected origin, size and root on a line each")
        origin, decimal, root = lines[0], lines[1], _base64(lines[2])
        if not _decimal.match(decimal) or len(decimal) > 19 or int(decimal) > size_max:
            raise Malformed("checkpoint: the size is no decimal number in range")
        if len(root) != hash_size:
            raise Malformed(f"checkpoint: a root has {hash_size} bytes")
        if len(lines) > 4:
            raise Refused("checkpoint: has extension lines, which no cosigner vouches for")
        return cls(origin, int(decimal), root)


@dataclass(frozen=True, slots=True)
class Verifier:
    """A named public key with one signature type: what a signature line is checked against."""

    name: str
    type: int
    key: bytes

    @property
    def key_id(self) -> bytes:
        """First four bytes of SHA-256(name, newline, type, key)."""
        return _key_id(self.name, self.type, self.key)

    def vkey(self) -> str:
        """The key as other C2SP tools take it."""
        return f"{self.name}+{self.key_id.hex()}+{base64.b64encode(bytes([self.type]) + self.key).decode()}"

    @classmethod
    def from_vkey(cls, text: str) -> Verifier:
        """Parse a verifier key of a type that we verify. Raises Malformed."""
        name, _, rest = text.partition("+")
        key_id, _, encoded = rest.partition("+")
        blob = _base64(encoded)
        if not _name.match(name) or len(blob) - 1 != key_sizes.get(next(iter(blob), 0)):
            raise Malformed("verifier key: expected a key of a known signature type")
        verifier = cls(name, blob[0], blob[1:])
        if verifier.key_id.hex() != key_id:
            raise Malformed("verifier key: the key id belongs to another key")
        return verifier

    def sign(self, text: str, sign: Sign, time: int = 0) -> Signature:
        """Sign a note's text; a cosignature also states the ``time`` in seconds since 1970."""
        if self.type == log_signature:
            return Signature(self.name, self.key_id, sign(text.encode()))
        return Signature(self.name, self.key_id, time.to_bytes(8, "big") + sign(self._cosigned(text, time)))

    def verify(self, text: str, signature: Signature) -> int:
        """Check a signature and give its time (0 where the type has none). Raises Malformed or Refused."""
        time, value, message = self._taken_apart(text, signature)
        try:
            if time > time_max:
                raise ValueError
            _verify(self.type, self.key, value, message)
        except (InvalidSignature, ValueError):
            raise Refused(f"the signature of {self.name} does not hold") from None
        return time

    def remember(self, text: str, signature: Signature) -> None:
        """Take a signature as verified that the caller has just made, with this very key."""
        _, value, message = self._taken_apart(text, signature)
        _own[self.key, value] = message
        if len(_own) > remembered_max:
            del _own[next(iter(_own))]

    def _taken_apart(self, text: str, signature: Signature) -> tuple[int, bytes, bytes]:
        if self.type == log_signature:
            return 0, signature.value, text.encode()
        return signature.time, signature.value[8:], self._cosigned(text, signature.time)

    def made(self, signature: Signature) -> bool:
        """Say whether a line claims to be by this key."""
        return signature.name == self.name and signature.key_id == self.key_id

    def _cosigned(self, text: str, time: int) -> bytes:
        if self.type == cosignature_v1:
            return f"cosignature/v1\ntime {time}\n{text}".encode()
        checkpoint = Checkpoint.from_text(text)
        name, origin, start = self.name.encode(), checkpoint.origin.encode(), 0
        if time > time_max or not 0 < len(name) < 256 or not 0 < len(origin) < 256:
            raise Refused("checkpoint: a time or a name that no ML-DSA cosignature can cover")
        parts = (bytes([len(name)]), name, time.to_bytes(8, "big"), bytes([len(origin)]), origin)
        return b"".join((b"subtree/v1\n\0", *parts, start.to_bytes(8, "big"), checkpoint.size.to_bytes(8, "big"), checkpoint.root))


@lru_cache(maxsize=64)
def log_verifiers(roster: Roster) -> tuple[Verifier, ...]:
    """The keys that may sign a log's checkpoints, one for each node that may be sequencer; all bear the origin's name."""
    return tuple(Verifier(roster.origin, log_signature, node.log_key) for node in roster.nodes if node.log_key)


@lru_cache(maxsize=64)
def _log_keys(roster: Roster) -> dict[tuple[str, bytes], Verifier]:
    return {(verifier.name, verifier.key_id): verifier for verifier in log_verifiers(roster)}


@lru_cache(maxsize=1024)
def log_verifier(roster: Roster, node: NodeId | None = None) -> Verifier:
    """The key that one node signs checkpoints with while it is sequencer; without a node, that of the roster's first choice.

    Raises Absent for a node that the roster lacks, or that never is sequencer.
    """
    member = roster.node(roster.sequencer if node is None else node)
    if not member.log_key:
        raise Absent(f"{member.name} has no key to sign checkpoints with")
    return Verifier(roster.origin, log_signature, member.log_key)


@lru_cache(maxsize=1024)
def cosigner_verifier(roster: Roster, node: NodeId) -> Verifier:
    """The key that a node cosigns with. Raises Absent for a node that the roster lacks."""
    member = roster.node(node)
    return Verifier(roster.cosigner_name(member), cosignature_v1, member.cosigner_key)


@lru_cache(maxsize=1024)
def pq_verifier(roster: Roster, node: NodeId) -> Verifier:
    """The ML-DSA-44 key that a node cosigns with. Raises Absent for a node that the roster lacks, or that has none."""
    member = roster.node(node)
    if not member.pq_key:
        raise Absent(f"{member.name} has no ML-DSA key to cosign with")
    return Verifier(roster.cosigner_name(member), cosignature_pq, member.pq_key)


def open_signed(note: Note, roster: Roster) -> Checkpoint:
    """Read a checkpoint that the log itself signed; nobody else needs to have seen it. Raises Malformed or Refused."""
    checkpoint = Checkpoint.from_text(note.text)
    if checkpoint.origin != roster.origin:
        raise Refused(f"checkpoint: of the log {checkpoint.origin!r}, not of {roster.origin!r}")
    known = _log_keys(roster)
    lines = [(verifier, line) for line in note.signatures if (verifier := known.get((line.name, line.key_id))) is not None]
    if not lines:
        raise Refused("checkpoint: not signed by the log")
    for verifier, line in lines:
        verifier.verify(note.text, line)
    return checkpoint


def cosigners(note: Note, roster: Roster, *, pq: bool = False) -> dict[NodeId, int]:
    """Check every line of a roster's cosigner, of one kind; say which nodes cosigned, and when. Raises Refused if one does not hold."""
    known = _cosigners(roster, pq)
    times = {}
    for signature in note.signatures:
        found = known.get((signature.name, signature.key_id))
        if found is not None:
            node, verifier = found
            times[node] = verifier.verify(note.text, signature)
    return times


def cosigner_lines(note: Note, roster: Roster) -> list[tuple[NodeId, Verifier, Signature]]:
    """The Ed25519 lines by keys of a roster's nodes, in the note's order, none of them checked."""
    known = _cosigners(roster, pq=False)
    found = ((known.get((line.name, line.key_id)), line) for line in note.signatures)
    return [(*who, line) for who, line in found if who is not None]


def cosigned_by(note: Note, roster: Roster) -> list[NodeId]:
    """Whose these lines say to be."""
    return [node for node, _, _ in cosigner_lines(note, roster)]


def cosigned_times(note: Note, roster: Roster) -> dict[NodeId, int]:
    """When a roster's nodes cosigned a note that was checked before, as its Ed25519 lines say."""
    return {node: line.time for node, _, line in cosigner_lines(note, roster)}


def open_published(data: bytes, roster: Roster, *, pq: bool = False) -> Checkpoint:
    """Read a checkpoint that the log and a quorum of institutions signed; with ``pq``, a quorum with each kind of key.

    Raises Malformed or Refused.
    """
    note = Note.from_bytes(data)
    checkpoint = open_signed(note, roster)
    if not roster.has_quorum(cosigners(note, roster)):
        raise Refused(f"checkpoint: cosigned by fewer than {roster.quorum.q} institutions")
    if pq and not roster.has_quorum(cosigners(note, roster, pq=True)):
        raise Refused(f"checkpoint: cosigned with ML-DSA keys by fewer than {roster.quorum.q} institutions")
    return checkpoint


@lru_cache(maxsize=64)
def _cosigners(roster: Roster, pq: bool) -> dict[tuple[str, bytes], tuple[NodeId, Verifier]]:
    verifiers = ((node.id, (pq_verifier if pq else cosigner_verifier)(roster, node.id)) for node in roster.nodes if node.pq_key or not pq)
    return {(verifier.name, verifier.key_id): (node, verifier) for node, verifier in verifiers}


_own: dict[tuple[bytes, bytes], bytes] = {}  # what this process signed lately: message by key and signature


@lru_cache(maxsize=256)
def _verify(kind: int, key: bytes, signature: bytes, message: bytes) -> None:
    """Raise InvalidSignature unless this key signed this. What held is remembered for a while: one head goes through many hands here."""
    if _own.get((key, signature)) == message:
        return
    if kind == cosignature_pq:
        _pq_public(key).verify(signature, message)
        return
    ed25519.verify(key, signature, message)


@lru_cache(maxsize=1024)
def _key_id(name: str, kind: int, key: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + key).digest()[:4]


@lru_cache(maxsize=1024)
def _pq_public(key: bytes) -> MLDSA44PublicKey:
    return MLDSA44PublicKey.from_public_bytes(key)


def _base64(text: str) -> bytes:
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError):
        raise Malformed("note: not base64") from None
    if binascii.b2a_base64(data, newline=False).decode("ascii") != text:
        raise Malformed("note: not canonical base64")
    return data
