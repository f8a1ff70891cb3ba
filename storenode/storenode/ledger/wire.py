"""What nodes say to each other about the log: pushes to a mirror, and a few questions.

Law: only nodes of the roster say these things, and each says them over TLS as itself. What is signed here is signed so that it can be
shown to others: a promise that was asked for names the log, the epoch and the node, and means nothing elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from medshard_protocol.canonical import Fields, Value, decode, encode
from medshard_protocol.checkpoint import note_bytes_max, size_max
from medshard_protocol.entries import entry_bytes_max, signature_size
from medshard_protocol.errors import Malformed
from medshard_protocol.ids import NodeId, node_id_size
from medshard_protocol.merkle import hash_size
from medshard_protocol.vouchers import row_bytes_max

version = 2
push_entries_max = 2048
proof_hashes_max = 128  # a consistency proof between two sizes below 2**63
push_bytes_max = push_entries_max * (entry_bytes_max + 3) + 3 * note_bytes_max + proof_hashes_max * (hash_size + 2) + 128
line_bytes_max = 16 * 1024  # one cosignature; ML-DSA-44 takes 3.3 KiB
cosignature_bytes_max = line_bytes_max + row_bytes_max
fetch_entries_max = 1024  # 2 MiB at the most in an answer
epoch_max = 2**62

path = "/v1/ledger/mirror"
ask_path = "/v1/ledger/ask"
promise_path = "/v1/ledger/promise"
forward_path = "/v1/ledger/forward"
hurry_path = "/v1/ledger/hurry"
entries_path = "/v1/ledger/entries/{start:[0-9]+}-{end:[0-9]+}"

not_leading = 421  # an entry was forwarded to a node that orders none
fenced = 423  # a later epoch was promised


@dataclass(frozen=True, slots=True)
class Push:
    """Entries from ``old_size`` on, up to a checkpoint that the sequencer signed, and the newest published checkpoint.

    Without a signed checkpoint it carries no entries and only tells what is published. A ``proof`` leads from the signed checkpoint to the
    published one: with it a mirror may drop what stands against it.
    """

    epoch: int
    base: int  # how long the log was when this epoch began
    old_size: int
    entries: tuple[bytes, ...]
    signed: bytes  # note, or empty
    published: bytes  # note, or empty
    proof: tuple[bytes, ...] = ()
    yours: bytes = b""  # a checkpoint with the mirror's own cosignature, for one that seems to have lost it; or empty

    def to_bytes(self) -> bytes:
        """The canonical form."""
        head: list[Value] = [version, self.epoch, self.base, self.old_size, self.entries]
        return encode([*head, self.signed, self.published, self.proof, self.yours])

    @classmethod
    def from_bytes(cls, data: bytes) -> Push:
        """Parse. Raises Malformed."""
        fields = Fields(decode(data, bytes_max=push_bytes_max, what="push"), count=9, what="push")
        fields.uint(least=version, most=version)
        epoch, base, old_size = fields.uint(most=epoch_max), fields.uint(most=size_max), fields.uint(most=size_max)
        entries = fields.list(most=push_entries_max)
        if not all(isinstance(entry, bytes) and len(entry) <= entry_bytes_max for entry in entries):
            raise Malformed(f"push: an entry has at most {entry_bytes_max} bytes")
        signed, published = fields.bytes(most=note_bytes_max), fields.bytes(most=note_bytes_max)
        proof, yours = fields.list(most=proof_hashes_max), fields.bytes(most=note_bytes_max)
        if entries and not signed:
            raise Malformed("push: entries without a checkpoint")
        if not all(isinstance(item, bytes) and len(item) == hash_size for item in proof):
            raise Malformed("push: a proof consists of 32-byte hashes")
        return cls(epoch, base, old_size, tuple(entries), signed, published, tuple(proof), yours)


class Cosigned(NamedTuple):
    """A mirror's answer to a push."""

    line: str  # its signature, or nothing where it was only told something
    vouchers: bytes = b""  # what vouches for that to each node (``vouchers``), where entries came with the push


def pack_cosignature(cosigned: Cosigned) -> bytes:
    """Answer 200."""
    return encode([version, cosigned.line.encode(), cosigned.vouchers])


def unpack_cosignature(data: bytes) -> Cosigned:
    """Parse answer 200. Raises Malformed."""
    fields = Fields(decode(data, bytes_max=cosignature_bytes_max, what="cosignature"), count=3, what="cosignature")
    fields.uint(least=version, most=version)
    try:
        return Cosigned(fields.bytes(most=line_bytes_max).decode(), fields.bytes(most=row_bytes_max))
    except UnicodeDecodeError:
        raise Malformed("cosignature: not UTF-8") from None


def pack_size(size: int, agreed: int) -> bytes:
    """Answer 409: how many entries the mirror has, and how many of them are published as far as it knows."""
    return encode([version, size, agreed])


def unpack_size(data: bytes) -> tuple[int, int]:
    """Parse answer 409. Raises Malformed."""
    fields = Fields(decode(data, bytes_max=64, what="size"), count=3, what="size")
    fields.uint(least=version, most=version)
    size = fields.uint(most=size_max)
    return size, fields.uint(most=size)


def pack_fence(epoch: int, leader: bytes) -> bytes:
    """Answers 421 and 423: which epoch was promised, and to whom (empty: to nobody yet)."""
    return encode([version, epoch, leader])


def unpack_fence(data: bytes) -> tuple[int, NodeId | None]:
    """Parse answers 421 and 423. Raises Malformed."""
    fields = Fields(decode(data, bytes_max=64, what="fence"), count=3, what="fence")
    fields.uint(least=version, most=version)
    return fields.uint(most=epoch_max), _node(fields.bytes(most=node_id_size))


@dataclass(frozen=True, slots=True)
class Report:
    """How a node stands to the log: the answer to a question, and to a promise that was asked for."""

    epoch: int  # promised
    leader: NodeId | None
    leads: bool  # it is the one that orders entries
    stalled: bool  # it leads, and has got nothing published for some time
    accepted: int
    size: int
    signed: bytes  # a sequencer's checkpoint of that size; empty in an answer to ``ask``
    published: bytes  # note, or empty

    def to_bytes(self) -> bytes:
        """The canonical form."""
        flags = int(self.leads) | int(self.stalled) << 1
        return encode([version, self.epoch, self.leader or b"", flags, self.accepted, self.size, self.signed, self.published])

    @classmethod
    def from_bytes(cls, data: bytes) -> Report:
        """Parse. Raises Malformed."""
        fields = Fields(decode(data, bytes_max=2 * note_bytes_max + 128, what="report"), count=8, what="report")
        fields.uint(least=version, most=version)
        epoch, leader, flags = fields.uint(most=epoch_max), _node(fields.bytes(most=node_id_size)), fields.uint(most=3)
        accepted, size = fields.uint(most=epoch_max), fields.uint(most=size_max)
        signed, published = fields.bytes(most=note_bytes_max), fields.bytes(most=note_bytes_max)
        return cls(epoch, leader, bool(flags & 1), bool(flags & 2), accepted, size, signed, published)


def promise_text(origin: str, epoch: int, node: NodeId) -> bytes:
    """What the log key of a node that wants to take over signs."""
    return b"medshard/takeover/v1" + encode([origin, epoch, node])


def pack_promise(epoch: int, signature: bytes) -> bytes:
    """Body of POST /v1/ledger/promise."""
    return encode([version, epoch, signature])


def unpack_promise(data: bytes) -> tuple[int, bytes]:
    """Parse the body of POST /v1/ledger/promise. Raises Malformed."""
    fields = Fields(decode(data, bytes_max=256, what="promise"), count=3, what="promise")
    fields.uint(least=version, most=version)
    return fields.uint(least=1, most=epoch_max), fields.bytes(exactly=signature_size)


def _node(data: bytes) -> NodeId | None:
    if len(data) not in (0, node_id_size):
        raise Malformed(f"a node id has {node_id_size} bytes")
    return NodeId(data) if data else None
