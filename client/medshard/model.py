"""The client's values: what a file is, what its sealed header says, and what the vault's operations report.

Law: frozen values and the header's bytes, nothing else. No disk, no network, no keys; whoever seals, stores or prints a value
does so elsewhere. ``Header.from_bytes`` raises ``Malformed`` only, so a hostile header never names a path outside its folder
and never points outside its file. The bytes are specified in docs/formats/header.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from medshard_protocol import canonical, manifest
from medshard_protocol.canonical import Fields
from medshard_protocol.errors import Malformed, TooLarge

header_bytes_max = manifest.header_bytes_max - 28  # sealed, it gains a nonce and a tag, and must fit into the manifest
members_max = 10_000  # a long CT series has some 5,000 slices
name_bytes_max = 4_096  # PATH_MAX of Linux
attributes_max = 64  # we know 19 names; the rest are the user's tags
attribute_key_max = 68  # "tag:" and 64 more
attribute_value_max = 1_024
media_type_max = 127  # RFC 6838 section 4.2: 127 characters
message_types = "application/x-medshard-"  # what they begin with

_key_form = re.compile(r"[a-z][a-z0-9-]{0,63}|tag:[^\x00-\x1f\x7f=]{1,64}")
_kinds: tuple[Kind, ...] = ("file", "pack")

Kind: TypeAlias = Literal["file", "pack"]


def is_message(media_type: str) -> bool:
    """Whether a stored file is nobody's document: shares of a root key, requests, answers, what a vault notes for itself."""
    return media_type.startswith(message_types)


def check_name(name: bytes) -> None:
    """Refuse a name that is not a plain relative path. Raises Malformed."""
    if not name or len(name) > name_bytes_max:
        raise Malformed(f"header: a name has {len(name)} bytes; expected 1 to {name_bytes_max}")
    if b"\0" in name or any(part in (b"", b".", b"..") for part in name.split(b"/")):
        raise Malformed("header: a name is not a plain relative path")


def check_attributes(attributes: Mapping[str, str]) -> None:
    """Refuse attributes that a header cannot hold. Raises Malformed."""
    if len(attributes) > attributes_max:
        raise Malformed(f"header: {len(attributes)} attributes, more than the {attributes_max} allowed")
    for key, value in attributes.items():
        if not _key_form.fullmatch(key):
            raise Malformed(f"header: {key[:80]!r} is not an attribute name")
        if len(value) > attribute_value_max:
            raise Malformed(f"header: attribute {key} has {len(value)} characters, more than the {attribute_value_max} allowed")
        try:
            (key + value).encode()
        except UnicodeEncodeError:
            raise Malformed(f"header: attribute {key!a} is not Unicode text") from None


@dataclass(frozen=True)
class Description:
    """What a file says about itself. Attribute names are fixed and lowercase; a user's own are ``tag:NAME``."""

    media_type: str
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """One file of a pack. ``attributes`` are complete: those of the pack and its own."""

    name: bytes
    offset: int
    size: int
    sha256: bytes
    media_type: str
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """What the owner seals beside a file's content. A pack's attributes are those that every member has, written once."""

    kind: Kind
    name: bytes
    size: int
    sha256: bytes
    media_type: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    members: tuple[Member, ...] = ()
    put_time: int = 0  # Unix seconds by the clock of whoever put it; 0 where unknown

    @classmethod
    def pack(cls, name: bytes, size: int, sha256: bytes, members: Iterable[Member], *, put_time: int = 0) -> Header:
        """Describe a pack by what its members have in common."""
        members = tuple(members)
        if not members:
            raise ValueError("a pack has at least one member")
        shared = set(members[0].attributes.items())
        for member in members:
            shared &= set(member.attributes.items())
        media_types = {member.media_type for member in members}
        media_type = media_types.pop() if len(media_types) == 1 else ""
        return cls("pack", name, size, sha256, media_type, dict(sorted(shared)), members, put_time)

    @property
    def documents(self) -> list[tuple[int, bytes]]:
        """Size and SHA-256 of the file, or of each member of a pack."""
        return [(member.size, member.sha256) for member in self.members] or [(self.size, self.sha256)]

    def to_bytes(self) -> bytes:
        """Encode. Raises Malformed for values that no header may hold, TooLarge over ``header_bytes_max``."""
        _check(self)
        members: list[canonical.Value] = [
            [
                member.name,
                member.offset,
                member.size,
                member.sha256,
                "" if member.media_type == self.media_type else member.media_type,
                _pairs({k: v for k, v in member.attributes.items() if k not in self.attributes}),
            ]
            for member in self.members
        ]
        data = canonical.encode(
            [
                1,
                _kinds.index(self.kind),
                self.name,
                self.size,
                self.sha256,
                self.put_time,
                self.media_type,
                _pairs(self.attributes),
                members,
            ]
        )
        if len(data) > header_bytes_max:
            raise TooLarge(f"header: {len(data)} bytes, more than the {header_bytes_max} allowed", hint="Put fewer files in one pack.")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Header:
        """Decode and check. Raises Malformed only."""
        fields = Fields(canonical.decode(data, bytes_max=header_bytes_max, what="header"), count=9, what="header")
        fields.uint(least=1, most=1)
        kind = _kinds[fields.uint(most=1)]
        name, size, sha256, put_time = fields.bytes(most=name_bytes_max), fields.uint(), fields.bytes(exactly=32), fields.uint()
        media_type, attributes = fields.text(most=media_type_max), _mapping(fields.list(most=attributes_max))
        members = tuple(_member(item, media_type, attributes) for item in fields.list(most=members_max))
        header = cls(kind, name, size, sha256, media_type, attributes, members, put_time)
        _check(header)
        return header


def _pairs(attributes: Mapping[str, str]) -> list[canonical.Value]:
    return [[key, attributes[key]] for key in sorted(attributes)]


def _mapping(pairs: list[object]) -> dict[str, str]:
    attributes: dict[str, str] = {}
    last = ""
    for pair in pairs:
        fields = Fields(pair, count=2, what="header attribute")
        key, value = fields.text(most=attribute_key_max), fields.text(most=attribute_value_max)
        if key <= last:
            raise Malformed("header: attributes are not in ascending order")
        attributes[key] = value
        last = key
    return attributes


def _member(item: object, media_type: str, shared: Mapping[str, str]) -> Member:
    fields = Fields(item, count=6, what="header member")
    name, offset, size, sha256 = fields.bytes(most=name_bytes_max), fields.uint(), fields.uint(), fields.bytes(exactly=32)
    own_media_type, own = fields.text(most=media_type_max), _mapping(fields.list(most=attributes_max))
    if own_media_type == media_type != "" or not own.keys().isdisjoint(shared):
        raise Malformed("header: a member repeats what its pack says")
    return Member(name, offset, size, sha256, own_media_type or media_type, {**shared, **own})


def _check(header: Header) -> None:
    check_name(header.name)
    check_attributes(header.attributes)
    if (header.kind == "pack") != bool(header.members) or len(header.members) > members_max:
        raise Malformed(f"header: a {header.kind} with {len(header.members)} members")
    if len(header.sha256) != 32 or len(header.media_type) > media_type_max or not (header.media_type or header.members):
        raise Malformed("header: expected a SHA-256 and a media type")
    end = 0
    for member in header.members:
        check_name(member.name)
        check_attributes(member.attributes)
        if member.offset < end or member.size < 0 or member.offset + member.size > header.size:
            raise Malformed("header: members overlap, or reach outside their pack")
        if len(member.sha256) != 32 or not 0 < len(member.media_type) <= media_type_max:
            raise Malformed("header: expected a SHA-256 and a media type for each member")
        if not header.attributes.items() <= member.attributes.items():
            raise Malformed("header: a member lacks an attribute of its pack")
        end = member.offset + member.size


@dataclass(frozen=True)
class Row:
    """One file, or one member of a pack, as the local index knows it."""

    sha256: bytes
    size: int
    name: bytes
    media_type: str
    attributes: Mapping[str, str]
    file_id: bytes
    member: int | None  # position in the pack; None for a file of its own
    put_time: int  # Unix seconds; 0 where unknown
    ledger_index: int
    owner: bytes = b""  # the key of the vault that shared it with this one; empty for this vault's own


@dataclass(frozen=True)
class Progress:
    """How far a long operation has come. ``phase`` is one word for people, such as ``sending``; ``path`` is what is in hand."""

    done_bytes: int
    total_bytes: int
    phase: str
    path: str = ""


OnProgress: TypeAlias = Callable[[Progress], None]


@dataclass(frozen=True)
class StoredFile:
    """A file that is safe: w shards fsynced and its entry in a quorum-cosigned checkpoint."""

    path: Path
    sha256: bytes
    size: int
    file_id: bytes
    ledger_index: int
    already: bool  # an earlier put had stored the same bytes


@dataclass(frozen=True)
class Problem:
    """What a put has to say about one path. ``stored`` tells a remark from a failure."""

    path: Path
    message: str
    stored: bool


@dataclass(frozen=True)
class PutReport:
    stored: tuple[StoredFile, ...]
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class GetReport:
    """``bad_cells`` names (node name, shard, cell) of each cell that came damaged and was made good from others."""

    path: Path | None
    size: int
    sha256: bytes
    bad_cells: tuple[tuple[str, int, int], ...] = ()
    recorded: bool = True  # False: read in an emergency; the signed entry is kept here and by the nodes, and appended later


HolderState: TypeAlias = Literal["proven", "unproven", "damaged", "missing", "unreachable", "slow"]


@dataclass(frozen=True)
class HolderReport:
    """What one node answered when asked to prove its shard."""

    node: str
    institution: str
    shard: int
    state: HolderState
    cells_checked: int = 0
    bad_cells: tuple[int, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class Audited:
    """What one holder's audit found of another's shard, as it signed it. Times are Unix seconds."""

    auditor: str
    shard: int
    node: str
    verdict: str
    since: int  # the first of this run of good, or of bad, results
    checked: int
    times: int

    @property
    def is_bad(self) -> bool:
        """Whether the shard was not known to be there."""
        from medshard_protocol.audit import Verdict  # late: --help needs no cryptography

        return Verdict(self.verdict).is_bad


@dataclass(frozen=True)
class VerifyReport:
    """``margin`` is how many more shards may be lost before the file is: proven shards minus k."""

    sha256: bytes
    holders: tuple[HolderReport, ...]
    ok: bool  # every holder proved its shard, and the ledger proof holds
    margin: int
    audits: tuple[Audited, ...] = ()  # what the holders' own audits found lately


@dataclass(frozen=True)
class NodeInfo:
    """A holder of one file, seen without proof: ``state`` is ``up`` or ``down``."""

    node: str
    institution: str
    shard: int
    url: str
    state: Literal["up", "down"]
    detail: str = ""


@dataclass(frozen=True)
class Info:
    """All there is to say about one stored file."""

    row: Row
    k: int
    n: int
    cell_size: int
    sealed_size: int  # bytes after padding and sealing, before coding
    stored_bytes: int  # over all n shards
    manifest_sha256: bytes
    nodes: tuple[NodeInfo, ...]
    ledger_index: int
    tree_size: int  # entries under the checkpoint
    checkpoint: str  # the signed note as text
    cosigners: tuple[str, ...]
    pack_size: int | None = None  # bytes of the pack that this member lies in
    pack_members: int | None = None


@dataclass(frozen=True)
class Finding:
    """One line of ``medshard doctor``."""

    level: Literal["ok", "warn", "bad"]
    what: str
    why: str = ""
    fix: str = ""
