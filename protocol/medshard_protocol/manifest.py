"""The public part of a stored file. It is kept with every shard, so that any one holder can describe the file.

It names no person, no file name, no plaintext hash: those are in the sealed header, which only a holder of the file key opens. Its
``evidence`` commits to the plaintext hashes under salts, so that its owner can prove to a third party what was registered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

from medshard_protocol import canonical
from medshard_protocol.errors import Malformed
from medshard_protocol.evidence import evidence_size, registered_hash
from medshard_protocol.ids import FileId, Key, NodeId, Sha256, Tag
from medshard_protocol.shards import Layout, cell_bytes_max, code_n_max, digests, sealed_bytes_max

version: Final = 2
manifest_bytes_max: Final = 16 * 1024 * 1024  # a pack of `members_max` with long names fits; more would stall a small holder
header_bytes_max: Final = 12 * 1024 * 1024
tags_max: Final = 65_536
wrap_bytes: Final = 48  # a 32-byte file key and its GCM tag


@dataclass(frozen=True, slots=True)
class ShardRef:
    """Which node should hold a shard, and the root its cells must hash to."""

    node: NodeId
    root: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that a node may know of a file. ``shards[i]`` describes shard i; ``tags`` are sorted and distinct."""

    file_id: FileId
    layout: Layout
    digest: str
    commitment: bytes
    shards: tuple[ShardRef, ...]
    owner: Key
    header: bytes
    wrap: bytes
    tags: tuple[Tag, ...]
    evidence: bytes
    _bytes: list[bytes] = field(default_factory=list, init=False, compare=False, repr=False)

    def to_bytes(self) -> bytes:
        """The canonical form, made once."""
        if not self._bytes:
            shape = self.layout
            self._bytes.append(
                canonical.encode(
                    [
                        version,
                        self.file_id,
                        shape.k,
                        shape.n,
                        shape.cell_size,
                        shape.sealed_size,
                        self.digest,
                        self.commitment,
                        [[ref.node, ref.root] for ref in self.shards],
                        self.owner,
                        self.header,
                        self.wrap,
                        list(self.tags),
                        self.evidence,
                    ]
                )
            )
        return self._bytes[0]

    @property
    def sha256(self) -> Sha256:
        """The hash that goes on the ledger; see ``evidence.registered_hash``."""
        return registered_hash(self.evidence, self.content_sha256)

    @property
    def content_sha256(self) -> Sha256:
        """The hash of the bytes themselves."""
        return Sha256(sha256(self.to_bytes()).digest())

    def index_on(self, node: NodeId) -> int | None:
        """Which shard ``node`` should hold, if any."""
        return next((i for i, ref in enumerate(self.shards) if ref.node == node), None)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parse. Raises Malformed and nothing else."""
        value = canonical.decode(data, bytes_max=manifest_bytes_max, what="manifest")
        f = canonical.Fields(value, count=14, what="manifest")
        if f.uint() != version:
            raise Malformed("manifest: a version this program does not know")
        file_id = FileId(f.bytes(exactly=32))
        k, n = f.uint(least=1, most=code_n_max), f.uint(least=1, most=code_n_max)
        layout = Layout(k, n, f.uint(least=1, most=cell_bytes_max), f.uint(least=1, most=sealed_bytes_max))
        digest = f.text(most=16)
        if digest not in digests:
            raise Malformed("manifest: a digest this program does not know")
        commitment = f.bytes(exactly=32)
        shards = _shards(f.list(most=code_n_max), layout.n)
        owner, header, wrap = Key(f.bytes(exactly=32)), f.bytes(most=header_bytes_max), f.bytes(exactly=wrap_bytes)
        tags = _tags(f.list(most=tags_max))
        evidence = f.bytes(exactly=evidence_size)
        manifest = cls(file_id, layout, digest, commitment, shards, owner, header, wrap, tags, evidence)
        manifest._bytes.append(bytes(data))
        return manifest


def _shards(items: list[object], n: int) -> tuple[ShardRef, ...]:
    if len(items) != n:
        raise Malformed("manifest: the number of shards is not n")
    refs = []
    for item in items:
        f = canonical.Fields(item, count=2, what="manifest shard")
        refs.append(ShardRef(NodeId(f.bytes(exactly=16)), f.bytes(exactly=32)))
    if len({ref.node for ref in refs}) != n:
        raise Malformed("manifest: one node is to hold two shards")
    return tuple(refs)


def _tags(items: list[object]) -> tuple[Tag, ...]:
    for item in items:
        if not isinstance(item, bytes) or len(item) != 32:
            raise Malformed("manifest: a lookup tag is 32 bytes")
    tags = tuple(Tag(item) for item in items if isinstance(item, bytes))
    if list(tags) != sorted(set(tags)):
        raise Malformed("manifest: lookup tags must be sorted and distinct")
    return tags
