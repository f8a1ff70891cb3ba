"""What the sequencer says to a mirror and what the mirror answers, on the channel at /v1/ledger/mirror."""

from __future__ import annotations

from dataclasses import dataclass

from medshard_protocol.canonical import Fields, decode, encode
from medshard_protocol.checkpoint import note_bytes_max, size_max
from medshard_protocol.entries import entry_bytes_max
from medshard_protocol.errors import Malformed

version = 1
push_entries_max = 2048
push_bytes_max = push_entries_max * (entry_bytes_max + 3) + 2 * note_bytes_max + 64
line_bytes_max = 16 * 1024  # one cosignature; ML-DSA-44 takes 3.3 KiB

path = "/v1/ledger/mirror"


@dataclass(frozen=True, slots=True)
class Push:
    """Entries from ``old_size`` on, up to a checkpoint that the log signed, and the newest published checkpoint.

    Without a signed checkpoint it carries no entries and only tells what is published.
    """

    old_size: int
    entries: tuple[bytes, ...]
    signed: bytes  # note, or empty
    published: bytes  # note, or empty

    def to_bytes(self) -> bytes:
        """The canonical form."""
        return encode([version, self.old_size, self.entries, self.signed, self.published])

    @classmethod
    def from_bytes(cls, data: bytes) -> Push:
        """Parse. Raises Malformed."""
        fields = Fields(decode(data, bytes_max=push_bytes_max, what="push"), count=5, what="push")
        fields.uint(least=version, most=version)
        old_size, entries = fields.uint(most=size_max), fields.list(most=push_entries_max)
        if not all(isinstance(entry, bytes) and len(entry) <= entry_bytes_max for entry in entries):
            raise Malformed(f"push: an entry has at most {entry_bytes_max} bytes")
        signed, published = fields.bytes(most=note_bytes_max), fields.bytes(most=note_bytes_max)
        if entries and not signed:
            raise Malformed("push: entries without a checkpoint")
        return cls(old_size, tuple(entries), signed, published)


def pack_cosignature(line: str) -> bytes:
    """Answer 200: the mirror's signature line, or nothing where it was only told something."""
    return encode([version, line.encode()])


def unpack_cosignature(data: bytes) -> str:
    """Parse answer 200. Raises Malformed."""
    fields = Fields(decode(data, bytes_max=line_bytes_max, what="cosignature"), count=2, what="cosignature")
    fields.uint(least=version, most=version)
    try:
        return fields.bytes(most=line_bytes_max).decode()
    except UnicodeDecodeError:
        raise Malformed("cosignature: not UTF-8") from None


def pack_size(size: int) -> bytes:
    """Answer 409: how many entries the mirror has."""
    return encode([version, size])


def unpack_size(data: bytes) -> int:
    """Parse answer 409. Raises Malformed."""
    fields = Fields(decode(data, bytes_max=64, what="size"), count=2, what="size")
    fields.uint(least=version, most=version)
    return fields.uint(most=size_max)
