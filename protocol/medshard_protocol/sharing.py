"""What client and node say to each other about rights: tickets, keys to seal to, sealed grants, histories. Pure, and nothing is believed.

Law: a ticket is the index of an ACCESS entry, and says nothing by itself: the node looks into its own mirror. What a node answers is to be
proved: entries by their paths under a checkpoint with a quorum, a key to seal to by its owner's signature, a sealed grant by opening it.
Every parser raises Malformed only. What an answer means is decided in ``state``.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medshard_protocol.canonical import Fields, Value, decode, encode
from medshard_protocol.checkpoint import note_bytes_max
from medshard_protocol.entries import Entry, entry_bytes_max, signature_size, size_max
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.ids import FileId, Key, Sha256, file_id_size, key_size, sha256_size
from medshard_protocol.manifest import manifest_bytes_max
from medshard_protocol.merkle import hash_size, path_hashes_max
from medshard_protocol.messages import bundle_bytes_max
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import name_chars_max

version: Final = 1
access_header: Final = "Medshard-Access"
emergency_header: Final = "Medshard-Emergency"
checkpoint_header: Final = "Medshard-Checkpoint"
tickets_max: Final = 64  # 64 entries of 48 files: more than fit into one request for small shards
tickets_chars_max: Final = tickets_max * 20
checkpoint_chars_max: Final = 8000  # some 40 cosignatures; HTTP servers stop at 8190
emergency_chars_max: Final = (entry_bytes_max + 2) // 3 * 4
hpke_public_size: Final = 1216  # MLKEM768-X25519
hpke_label: Final = b"medshard/hpke-key/v1"
sealed_bytes_max: Final = 4096  # 1136 bytes of HPKE and a file key of 32, with room for a later suite
shared_files_max: Final = 64  # in one answer; a grant's files are never split between two
history_entries_max: Final = 256
small_bytes_max: Final = 8192
places_max: Final = 4096  # asked for their times at once
places_bytes_max: Final = places_max * 9 + 64
shared_bytes_max: Final = 2 * bundle_bytes_max + note_bytes_max
history_bytes_max: Final = note_bytes_max + history_entries_max * (entry_bytes_max + path_hashes_max * (hash_size + 2) + 32) + 64
inclusion_bytes_max: Final = note_bytes_max + entry_bytes_max + path_hashes_max * (hash_size + 2) + 64

_decimal = re.compile(r"(0|[1-9][0-9]{0,18})\Z", re.ASCII)
_base64url = re.compile(r"[A-Za-z0-9_-]+\Z")


# -- where


def key_path(key: Key) -> str:
    """Where a node keeps what may be sealed to this key's owner."""
    return f"/v1/keys/{key.hex()}"


def grants_path(file_id: FileId) -> str:
    """Where the author of a grant puts its sealed key."""
    return f"/v1/grants/{file_id.hex()}"


def grant_path(file_id: FileId, grant: Sha256) -> str:
    """Where one sealed key of a grant lies."""
    return f"/v1/grants/{file_id.hex()}/{grant.hex()}"


def history_path(file_id: FileId, after: int | None = None) -> str:
    """Where everything that the log says of a file is told, after a place in the log."""
    return f"/v1/ledger/history/{file_id.hex()}" + ("" if after is None else f"?after={after}")


def proposals_path(after: int | None = None) -> str:
    """Where open proposals of holds and releases are told, as a history is, after a place in the log."""
    return "/v1/ledger/proposals" + ("" if after is None else f"?after={after}")


def ended_path(after: int | None = None) -> str:
    """Where a caller learns which of its files have ended, after a place in the log."""
    return "/v1/ledger/ended" + ("" if after is None else f"?after={after}")


def shared_path(after: int | None = None) -> str:
    """Where a caller learns what was granted to it, after a place in the log."""
    return "/v1/grants" + ("" if after is None else f"?after={after}")


def passings_path(key: Key) -> str:
    """Where a node says whose the files of a key are now, and by which entries."""
    return f"/v1/ledger/passings/{key.hex()}"


def identity_path(key: Key) -> str:
    """Where a node says who vouches for a key."""
    return f"/v1/ledger/identities/{key.hex()}"


# -- headers of a read


def pack_tickets(indices: Iterable[int]) -> str:
    """Value of ``access_header``: places of ACCESS entries in the log. Raises ValueError for none or too many."""
    numbers = sorted(set(indices))
    if not 1 <= len(numbers) <= tickets_max or numbers[0] < 0 or numbers[-1] > size_max:
        raise ValueError(f"a read shows 1 to {tickets_max} entries")
    return ",".join(map(str, numbers))


def unpack_tickets(text: str) -> tuple[int, ...]:
    """Parse the value of ``access_header``: decimal places, ascending, with commas between and nothing else. Raises Malformed."""
    parts = text.split(",") if len(text) <= tickets_chars_max else []
    if not 1 <= len(parts) <= tickets_max or not all(_decimal.match(part) for part in parts):
        raise Malformed(f"{access_header}: expected 1 to {tickets_max} places in the log")
    places = tuple(map(int, parts))
    if list(places) != sorted(set(places)) or places[-1] > size_max:
        raise Malformed(f"{access_header}: places stand in ascending order, each once")
    return places


def pack_checkpoint(note: bytes) -> str:
    """Value of ``checkpoint_header``: a published checkpoint, as base64url without padding. Empty for one that is too long to be shown."""
    text = base64.urlsafe_b64encode(note).decode().rstrip("=")
    return text if len(text) <= checkpoint_chars_max else ""


def unpack_checkpoint(text: str) -> bytes:
    """Parse the value of ``checkpoint_header``; what it says is unchecked. Raises Malformed."""
    if len(text) > checkpoint_chars_max:
        raise Malformed(f"{checkpoint_header}: more than {checkpoint_chars_max} characters")
    return _from_base64url(text, f"{checkpoint_header}: expected a note in base64url")


def pack_emergency(entry: Entry) -> str:
    """Value of ``emergency_header``: the ACCESS entry that will be appended when the ledger is back, as base64url without padding."""
    return base64.urlsafe_b64encode(entry.to_bytes()).decode().rstrip("=")


def unpack_emergency(text: str) -> Entry:
    """Parse the value of ``emergency_header``. Raises Malformed."""
    if len(text) > emergency_chars_max:
        raise Malformed(f"{emergency_header}: more than {emergency_chars_max} characters")
    return Entry.from_bytes(_from_base64url(text, f"{emergency_header}: expected an entry in base64url"))


def _from_base64url(text: str, expected: str) -> bytes:
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)) if _base64url.match(text) else b""
    except (binascii.Error, ValueError):
        raise Malformed(expected) from None
    if not data or base64.urlsafe_b64encode(data).decode().rstrip("=") != text:
        raise Malformed(expected)
    return data


# -- showing that an entry is published


def pack_shown(inclusion: Inclusion) -> bytes:
    """Body of POST /v1/access."""
    return encode([version, inclusion.to_value()])


def unpack_shown(data: bytes) -> Inclusion:
    """Parse the body of POST /v1/access. Raises Malformed; the inclusion is still to be verified."""
    return Inclusion.from_value(_open(data, 2, "access", inclusion_bytes_max).list(most=4))


def pack_seen(index: int) -> bytes:
    """Answer to POST /v1/access: the entry at this place is known here, and published."""
    return encode([version, index])


def unpack_seen(data: bytes) -> int:
    """Parse the answer to POST /v1/access. Raises Malformed."""
    return _open(data, 2, "seen", small_bytes_max).uint(most=size_max)


# -- keys to seal to


@dataclass(frozen=True, slots=True)
class SealingKey:
    """What others seal grants to, in its owner's word. Unchecked until ``verify``."""

    owner: Key
    hpke_public: bytes
    signature: bytes

    def to_bytes(self) -> bytes:
        """Body of PUT /v1/keys, and answer to GET /v1/keys/{key}."""
        return encode([version, self.owner, self.hpke_public, self.signature])

    @classmethod
    def from_bytes(cls, data: bytes) -> SealingKey:
        """Parse. Raises Malformed."""
        f = _open(data, 4, "key", small_bytes_max)
        return cls(Key(f.bytes(exactly=key_size)), f.bytes(exactly=hpke_public_size), f.bytes(exactly=signature_size))

    def verify(self) -> None:
        """Check that the owner signed. Raises Refused."""
        try:
            Ed25519PublicKey.from_public_bytes(self.owner).verify(self.signature, sealing_key_signed(self.hpke_public))
        except (InvalidSignature, ValueError):
            raise Refused("key: not signed by its owner") from None


def sealing_key_signed(hpke_public: bytes) -> bytes:
    """What the owner of a sealing key signs."""
    return hpke_label + hpke_public


# -- grants


@dataclass(frozen=True, slots=True)
class SealedGrant:
    """The key of one file for one reader, as it lies beside the manifest."""

    grant: Sha256  # ``Entry.id`` of the GRANT entry
    sealed: bytes

    def to_bytes(self) -> bytes:
        """Body of PUT /v1/grants/{file}."""
        return encode([version, self.grant, self.sealed])

    @classmethod
    def from_bytes(cls, data: bytes) -> SealedGrant:
        """Parse. Raises Malformed."""
        f = _open(data, 3, "grant", small_bytes_max)
        return cls(Sha256(f.bytes(exactly=sha256_size)), f.bytes(most=sealed_bytes_max))


@dataclass(frozen=True, slots=True)
class SharedFile:
    """One file that was granted to the caller, with what proves it; both inclusions are under one checkpoint, and unchecked."""

    file_id: FileId
    grant: Inclusion
    registration: Inclusion
    manifest: bytes  # empty if it found no room in the answer: GET /v1/manifests/{file} gives it
    sealed: bytes


@dataclass(frozen=True, slots=True)
class Shared:
    """A part of what was granted to the caller, ascending by the grants' places. ``more``: ask again after the last of them."""

    checkpoint: bytes  # the note; empty if the node knows none, and then there are no files
    files: tuple[SharedFile, ...]
    more: bool

    def to_bytes(self) -> bytes:
        """Answer to GET /v1/grants."""
        items: list[Value] = [[f.file_id, _placed(f.grant), _placed(f.registration), f.manifest, f.sealed] for f in self.files]
        return encode([version, self.checkpoint, items, int(self.more)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Shared:
        """Parse. Raises Malformed; inclusions and manifests are still to be checked."""
        f = _open(data, 4, "shared", shared_bytes_max)
        note = f.bytes(most=note_bytes_max)
        files = tuple(_shared(item, note) for item in f.list(most=shared_files_max))
        return cls(note, files, bool(f.uint(most=1)))


# -- histories


@dataclass(frozen=True, slots=True)
class Told:
    """One entry of a file's history: where it stands, its path under the answer's checkpoint, and whether it had an effect."""

    index: int
    entry: bytes
    path: tuple[bytes, ...]
    effective: bool  # in this node's word: whoever must be sure folds the log


@dataclass(frozen=True, slots=True)
class History:
    """A part of what the published log says of one file, ascending."""

    checkpoint: bytes  # the note; empty if the node knows none
    entries: tuple[Told, ...]
    more: bool

    def to_bytes(self) -> bytes:
        """Answer to GET /v1/ledger/history/{file}."""
        items: list[Value] = [[e.index, e.entry, list(e.path), int(e.effective)] for e in self.entries]
        return encode([version, self.checkpoint, items, int(self.more)])

    @classmethod
    def from_bytes(cls, data: bytes) -> History:
        """Parse. Raises Malformed; ``inclusions`` are still to be verified."""
        f = _open(data, 4, "history", history_bytes_max)
        note = f.bytes(most=note_bytes_max)
        entries = tuple(_told(item) for item in f.list(most=history_entries_max))
        if any(one.index >= other.index for one, other in pairwise(entries)):
            raise Malformed("history: places stand in ascending order")
        return cls(note, entries, bool(f.uint(most=1)))

    def inclusions(self) -> list[Inclusion]:
        """What proves each entry."""
        return [Inclusion(each.index, each.entry, each.path, self.checkpoint) for each in self.entries]


@dataclass(frozen=True, slots=True)
class EndedFiles:
    """A part of the effective RETIRE and ERASE entries about files of the caller, ascending; unchecked."""

    checkpoint: bytes  # the note; empty if the node knows none, and then there are no entries
    entries: tuple[Inclusion, ...]  # under that checkpoint
    next: int  # the first place in the log that was not looked at for this answer
    more: bool  # ask again from there

    def to_bytes(self) -> bytes:
        """Answer to GET /v1/ledger/ended."""
        return encode([version, self.checkpoint, [_placed(each) for each in self.entries], self.next, int(self.more)])

    @classmethod
    def from_bytes(cls, data: bytes) -> EndedFiles:
        """Parse. Raises Malformed; the inclusions are still to be verified."""
        f = _open(data, 5, "ended", history_bytes_max)
        note = f.bytes(most=note_bytes_max)
        entries = tuple(_inclusion(item, note) for item in f.list(most=history_entries_max))
        next_, more = f.uint(most=size_max), bool(f.uint(most=1))
        places = [*(each.index for each in entries), next_]
        if any(one >= other for one, other in pairwise(places)):
            raise Malformed("ended: places stand in ascending order")
        return cls(note, entries, next_, more)


@dataclass(frozen=True, slots=True)
class Vouched:
    """Who vouches for a key, in a node's word."""

    institution: str  # its name; empty for a key that nobody enrolled
    roles: int
    index: int  # of the ROSTER entry that enrolled it last; 0 if none did
    withdrawn: bool

    def to_bytes(self) -> bytes:
        """Answer to GET /v1/ledger/identities/{key}."""
        return encode([version, self.institution, self.roles, self.index, int(self.withdrawn)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Vouched:
        """Parse. Raises Malformed."""
        f = _open(data, 5, "identity", small_bytes_max)
        return cls(f.text(most=name_chars_max), f.uint(most=2**32 - 1), f.uint(most=size_max), bool(f.uint(most=1)))


# -- when


def pack_places(places: Sequence[int]) -> bytes:
    """Body of POST /v1/ledger/times. Raises ValueError for too many."""
    if len(places) > places_max:
        raise ValueError(f"at most {places_max} places are asked for at once")
    return encode([version, list(places)])


def unpack_places(data: bytes) -> list[int]:
    """Parse the body of POST /v1/ledger/times. Raises Malformed."""
    return _numbers(data, "places")


def pack_times(times: Sequence[int]) -> bytes:
    """Answer to POST /v1/ledger/times: when each entry was published at the latest, in Unix seconds; 0 where nothing is known."""
    return encode([version, list(times)])


def unpack_times(data: bytes) -> list[int]:
    """Parse the answer to POST /v1/ledger/times. Raises Malformed."""
    return _numbers(data, "times")


def _numbers(data: bytes, what: str) -> list[int]:
    numbers = _open(data, 2, what, places_bytes_max).list(most=places_max)
    if not all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= size_max for number in numbers):
        raise Malformed(f"{what}: expected numbers")
    return numbers


# -- parts


def _open(data: bytes, count: int, what: str, bytes_max: int) -> Fields:
    f = Fields(decode(data, bytes_max=bytes_max, what=what), count=count, what=what)
    f.uint(least=version, most=version)
    return f


def _placed(inclusion: Inclusion) -> Value:
    return [inclusion.index, inclusion.entry, list(inclusion.path)]


def _shared(item: object, note: bytes) -> SharedFile:
    f = Fields(item, count=5, what="shared")
    file_id = FileId(f.bytes(exactly=file_id_size))
    grant, registration = _inclusion(f.list(most=3), note), _inclusion(f.list(most=3), note)
    return SharedFile(file_id, grant, registration, f.bytes(most=manifest_bytes_max), f.bytes(most=sealed_bytes_max))


def _inclusion(item: object, note: bytes) -> Inclusion:
    f = Fields(item, count=3, what="shared")
    return Inclusion(f.uint(most=size_max), f.bytes(most=entry_bytes_max), _path(f.list(most=path_hashes_max)), note)


def _told(item: object) -> Told:
    f = Fields(item, count=4, what="history")
    index, entry, path = f.uint(most=size_max), f.bytes(most=entry_bytes_max), _path(f.list(most=path_hashes_max))
    return Told(index, entry, path, bool(f.uint(most=1)))


def _path(value: Sequence[object]) -> tuple[bytes, ...]:
    path = tuple(item for item in value if isinstance(item, bytes) and len(item) == hash_size)
    if len(path) != len(value):
        raise Malformed("a path consists of 32-byte hashes")
    return path
