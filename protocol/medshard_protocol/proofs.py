"""Proof that an entry stands in the ledger, and the messages in which a client asks for it.

Law: nothing in a proof is believed. The checkpoint must carry the log's signature and those of a quorum of institutions, the path must
lead from the entry's own bytes to that checkpoint's root, and the author's signature must hold. What the proof does not say: that the
author had the right (``state`` does), or that no earlier entry said otherwise; a client compares the author with the owner it expects.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from medshard_protocol import merkle
from medshard_protocol.canonical import Fields, Value, decode, encode
from medshard_protocol.checkpoint import Checkpoint, note_bytes_max, open_published, size_max
from medshard_protocol.entries import Entry, entry_bytes_max
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.ids import NodeId, node_id_size
from medshard_protocol.merkle import hash_size, path_hashes_max, sha256
from medshard_protocol.roster import Roster, institutions_max
from medshard_protocol.vouchers import row_bytes_max

message_version = 1
append_entries_max = 256  # signatures of one request are checked in about 25 ms
append_bytes_max = append_entries_max * (entry_bytes_max + 3) + 16
rosters_max = 4096
places_bytes_max = rosters_max * (institutions_max * 9 + 3) + 64
vouchers_bytes_max = institutions_max * (row_bytes_max + node_id_size + 8)
appended_bytes_max = note_bytes_max + append_entries_max * (path_hashes_max * (hash_size + 2) + 16) + vouchers_bytes_max + 16


@dataclass(frozen=True, slots=True)
class Inclusion:
    """An entry, where it stands, and what proves it. Unchecked until ``verify``."""

    index: int
    entry: bytes
    path: tuple[bytes, ...]
    checkpoint: bytes  # the note, cosigned by a quorum

    def to_value(self) -> Value:
        """The form to put into a canonical message."""
        return [self.index, self.entry, list(self.path), self.checkpoint]

    @classmethod
    def from_value(cls, value: object) -> Inclusion:
        """Parse. Raises Malformed."""
        fields = Fields(value, count=4, what="inclusion")
        index, entry = fields.uint(most=size_max), fields.bytes(most=entry_bytes_max)
        return cls(index, entry, _path(fields.list(most=path_hashes_max)), fields.bytes(most=note_bytes_max))

    def verify(self, roster: Roster, seen: MutableMapping[bytes, Checkpoint] | None = None) -> tuple[Checkpoint, Entry]:
        """Check everything that a roster allows to check. Raises Malformed or Refused.

        ``seen`` remembers notes that were found good under this roster, for a caller with many inclusions under one checkpoint.
        """
        checkpoint = None if seen is None else seen.get(self.checkpoint)
        if checkpoint is None:
            checkpoint = open_published(self.checkpoint, roster)
            if seen is not None:
                seen[self.checkpoint] = checkpoint
        leaf = merkle.leaf_hash(self.entry, sha256)
        if merkle.root_from_path(leaf, self.index, checkpoint.size, self.path, sha256) != checkpoint.root:
            raise Refused(f"inclusion: entry {self.index} is not in the ledger that the checkpoint describes")
        entry = Entry.from_bytes(self.entry)
        entry.verify(roster.origin_at(self.index))
        return checkpoint, entry


def pack_append(entries: Sequence[bytes]) -> bytes:
    """Body of POST /v1/ledger/append. Raises ValueError for more entries than one request takes."""
    if not 1 <= len(entries) <= append_entries_max:
        raise ValueError(f"append takes 1 to {append_entries_max} entries")
    return encode([message_version, list(entries)])


def unpack_append(data: bytes) -> list[bytes]:
    """Parse the body of POST /v1/ledger/append. Raises Malformed."""
    fields = Fields(decode(data, bytes_max=append_bytes_max, what="append"), count=2, what="append")
    fields.uint(least=message_version, most=message_version)
    entries = fields.list(most=append_entries_max)
    if not entries or not all(isinstance(entry, bytes) and len(entry) <= entry_bytes_max for entry in entries):
        raise Malformed(f"append: expected 1 to {append_entries_max} entries of at most {entry_bytes_max} bytes")
    return entries


class Appended(NamedTuple):
    """Where entries stand, and under which checkpoint."""

    inclusions: tuple[Inclusion, ...]
    vouchers: Mapping[NodeId, bytes] = {}  # what its cosigners gave for the nodes that will be shown it (``vouchers``), if anything


def pack_appended(appended: Appended) -> bytes:
    """Answer to POST /v1/ledger/append: one checkpoint, where under it each entry stands, and vouchers for it."""
    places: list[Value] = [[item.index, list(item.path)] for item in appended.inclusions]
    rows: list[Value] = [[node, row] for node, row in sorted(appended.vouchers.items())]
    return encode([message_version, appended.inclusions[0].checkpoint, places, rows])


def unpack_appended(data: bytes, entries: Sequence[bytes]) -> Appended:
    """Parse the answer for the entries that were sent. Raises Malformed; the inclusions are still to be verified."""
    fields = Fields(decode(data, bytes_max=appended_bytes_max, what="appended"), count=4, what="appended")
    fields.uint(least=message_version, most=message_version)
    note, places = fields.bytes(most=note_bytes_max), fields.list(most=append_entries_max)
    rows = [Fields(item, count=2, what="appended") for item in fields.list(most=institutions_max)]
    vouchers = [(NodeId(row.bytes(exactly=node_id_size)), row.bytes(most=row_bytes_max)) for row in rows]
    if [node for node, _ in vouchers] != sorted({node for node, _ in vouchers}):
        raise Malformed("appended: vouchers stand in the order of their nodes, one row for each")
    if len(places) != len(entries):
        raise Malformed("appended: not as many places as entries")
    inclusions = []
    for entry, item in zip(entries, places, strict=True):
        place = Fields(item, count=2, what="appended")
        inclusions.append(Inclusion(place.uint(most=size_max), entry, _path(place.list(most=path_hashes_max)), note))
    return Appended(tuple(inclusions), dict(vouchers))


def pack_registration(inclusion: Inclusion) -> bytes:
    """Answer to GET /v1/ledger/registrations/{file}."""
    return encode([message_version, inclusion.to_value()])


def unpack_registration(data: bytes) -> Inclusion:
    """Parse the answer to GET /v1/ledger/registrations/{file}. Raises Malformed."""
    fields = Fields(decode(data, bytes_max=appended_bytes_max, what="registration"), count=2, what="registration")
    fields.uint(least=message_version, most=message_version)
    return Inclusion.from_value(fields.list(most=4))


@dataclass(frozen=True, slots=True)
class Places:
    """Where in the log stands what a proof for outsiders needs, in a node's word: all of it is proved from there."""

    enrolled: int  # the first ENROL entry of the key that registered the file
    timestamps: tuple[int, ...]  # the first TIMESTAMP entry over a log with the registration, if there is one
    approvals: tuple[tuple[int, ...], ...]  # for each change of the roster, those that decided it

    def to_bytes(self) -> bytes:
        """Answer to GET /v1/ledger/places/{file}."""
        return encode([message_version, self.enrolled, list(self.timestamps), [list(each) for each in self.approvals]])

    @classmethod
    def from_bytes(cls, data: bytes) -> Places:
        """Parse. Raises Malformed."""
        fields = Fields(decode(data, bytes_max=places_bytes_max, what="places"), count=4, what="places")
        fields.uint(least=message_version, most=message_version)
        enrolled, timestamps = fields.uint(most=size_max), _indices(fields.list(most=1))
        approvals = tuple(_indices(item) for item in fields.list(most=rosters_max))
        return cls(enrolled, timestamps, approvals)


def _indices(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > institutions_max:
        raise Malformed("places: expected places in the log")
    fields = Fields(value, count=len(value), what="places")
    return tuple(fields.uint(most=size_max) for _ in value)


def _path(value: Sequence[object]) -> tuple[bytes, ...]:
    path = tuple(item for item in value if isinstance(item, bytes) and len(item) == hash_size)
    if len(path) != len(value):
        raise Malformed("inclusion: a path consists of 32-byte hashes")
    return path
