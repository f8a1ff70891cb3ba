"""Names for the byte strings that name things, and the one way to read each from text.

Law: an identity is its raw bytes; text is lowercase hex of exactly that many bytes, so one thing has one spelling.
"""

from __future__ import annotations

import hashlib
import re
from typing import NewType

from medshard_protocol.errors import Malformed

FileId = NewType("FileId", bytes)  # 32 random bytes
NodeId = NewType("NodeId", bytes)  # first 16 bytes of the SHA-256 of the node's first TLS public key
Key = NewType("Key", bytes)  # 32 bytes, a raw Ed25519 public key
Sha256 = NewType("Sha256", bytes)  # 32 bytes
Tag = NewType("Tag", bytes)  # 32 bytes, HMAC-SHA256 of a plaintext hash under a vault's lookup key

file_id_size = 32
node_id_size = 16
key_size = 32
sha256_size = 32
tag_size = 32

_lower_hex = re.compile(r"[0-9a-f]*\Z")


def file_id_from_hex(text: str) -> FileId:
    """Read a file id. Raises Malformed."""
    return FileId(_from_hex(text, file_id_size, "file id"))


def node_id_from_hex(text: str) -> NodeId:
    """Read a node id. Raises Malformed."""
    return NodeId(_from_hex(text, node_id_size, "node id"))


def key_from_hex(text: str) -> Key:
    """Read a public key. Raises Malformed."""
    return Key(_from_hex(text, key_size, "key"))


def sha256_from_hex(text: str) -> Sha256:
    """Read a SHA-256. Raises Malformed."""
    return Sha256(_from_hex(text, sha256_size, "SHA-256"))


def tag_from_hex(text: str) -> Tag:
    """Read a lookup tag. Raises Malformed."""
    return Tag(_from_hex(text, tag_size, "tag"))


def node_id_of(tls_key: Key) -> NodeId:
    """Name the node whose first TLS public key is ``tls_key``."""
    return NodeId(hashlib.sha256(tls_key).digest()[:node_id_size])


def _from_hex(text: str, size: int, what: str) -> bytes:
    if len(text) != 2 * size or not _lower_hex.match(text):
        raise Malformed(f"{what}: expected {2 * size} lowercase hex digits")
    return bytes.fromhex(text)
