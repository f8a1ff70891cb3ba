"""A commitment to what was stored, one leaf for each document, that its owner can open for one document alone.

Law: a leaf binds owner, file id, size and SHA-256 of one document under a salt that only holders of the file key can compute. The root
goes into the manifest, and by the manifest's hash onto the ledger. Whoever is shown a salt learns that this owner registered this
document, and nothing about its neighbours; whoever is not cannot try guesses. Because a leaf names owner and file id, nobody
can carry a root over into a registration of their own.

The commitment says what the owner had in hand when storing. That the shards hold the same bytes is not its business.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from typing import Final

from medshard_protocol import merkle
from medshard_protocol.ids import FileId, Key, Sha256
from medshard_protocol.merkle import sha256

evidence_size: Final = 32
salt_size: Final = 32
document_bytes_max: Final = 2**63 - 1
key_info: Final = b"medshard/evidence/v1"  # HKDF-SHA256(file key, salt = file id, info = this) is the evidence key

_leaf_label: Final = b"medshard/evidence/leaf/v1"
_manifest_label: Final = b"medshard/manifest/v2"


def salt(evidence_key: bytes, number: int) -> bytes:
    """The salt of one document of an object, counted from 0."""
    return hmac.digest(evidence_key, number.to_bytes(8, "big"), "sha256")


def leaf(owner: Key, file_id: FileId, salt: bytes, size: int, digest: bytes) -> bytes:
    """The leaf hash for a document of ``size`` bytes with this SHA-256."""
    return merkle.leaf_hash(_leaf_label + owner + file_id + salt + size.to_bytes(8, "big") + digest, sha256)


def leaves(owner: Key, file_id: FileId, evidence_key: bytes, documents: Iterable[tuple[int, bytes]]) -> list[bytes]:
    """The leaf hashes of an object's documents, given as (size, SHA-256) in the order of the header's members."""
    return [leaf(owner, file_id, salt(evidence_key, at), size, digest) for at, (size, digest) in enumerate(documents)]


def root(leaf_hashes: Sequence[bytes]) -> bytes:
    """What stands in the manifest."""
    return merkle.root(leaf_hashes, sha256)


def registered_hash(evidence: bytes, content: bytes) -> Sha256:
    """What the ledger names a manifest by: the evidence apart, so that a proof need not show the rest.

    ``content`` is the SHA-256 of the manifest's bytes.
    """
    return Sha256(hashlib.sha256(_manifest_label + evidence + content).digest())
