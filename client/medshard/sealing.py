"""Sealing a file: padding, segments, header, key wrap. Bytes in, bytes out; no disk, no network.

AES-256-GCM does not commit to its key: one ciphertext can be crafted to open under two keys. So each manifest carries a
32-byte commitment derived beside the keys, and it is compared before anything is decrypted. Segment nonces are the segment's
number and a last-segment flag, so a segment that is missing, repeated, swapped or cut off fails to open.
"""

from __future__ import annotations

import hmac
import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medshard_protocol import evidence
from medshard_protocol.errors import Damaged
from medshard_protocol.ids import FileId
from medshard_protocol.manifest import Manifest
from medshard_protocol.shards import tag_bytes

padded_least: Final = 1024  # below this, sizes of letters and thumbnails would tell them apart
_file_info: Final = b"medshard/file/v1"
_wrap_info: Final = b"medshard/wrap/v1"
_header_aad: Final = b"medshard/header/v1"
_nonce_bytes: Final = 12


def padme(size: int) -> int:
    """The padded length for ``size`` bytes: Padmé (Nikitin et al., PETS 2019), at most 12 % more, at least ``padded_least``."""
    if size <= padded_least:
        return padded_least
    exponent = size.bit_length() - 1
    drop = exponent - exponent.bit_length()
    mask = (1 << drop) - 1
    return (size + mask) & ~mask


def hkdf(key: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    return HKDF(hashes.SHA256(), length, salt, info).derive(key)


def segment_nonce(number: int, last: bool) -> bytes:
    """11 bytes of big-endian segment number, then 1 on the last segment and 0 before it."""
    return number.to_bytes(11, "big") + (b"\x01" if last else b"\x00")


class FileSeal:
    """The keys of one file. Never reuse one (file key, file id) pair for other plaintext: GCM would leak both."""

    def __init__(self, file_key: bytes, file_id: FileId) -> None:
        if len(file_key) != 32 or len(file_id) != 32:
            raise ValueError("a file key and a file id have 32 bytes each")
        derived = hkdf(file_key, file_id, _file_info, 96)
        self.file_key = file_key
        self.file_id = file_id
        self.commitment = derived[64:]
        self._content = AESGCM(derived[:32])
        self.evidence_key = hkdf(file_key, file_id, evidence.key_info)
        self._header = AESGCM(derived[32:64])

    @classmethod
    def fresh(cls) -> FileSeal:
        """New random key and id."""
        return cls(os.urandom(32), FileId(os.urandom(32)))

    @classmethod
    def of(cls, manifest: Manifest, file_key: bytes) -> FileSeal:
        """The seal of a stored file. Raises Damaged unless the manifest commits to this very key."""
        seal = cls(file_key, manifest.file_id)
        if not hmac.compare_digest(seal.commitment, manifest.commitment):
            raise Damaged("the manifest commits to another key than this one")
        return seal

    def seal_into(self, number: int, last: bool, plain: bytes | bytearray | memoryview, out: memoryview) -> None:
        """Write ciphertext and tag of one segment to ``out``, which has ``tag_bytes`` more than ``plain``."""
        if len(out) != len(plain) + tag_bytes:
            raise ValueError("out must have room for the segment and its tag, no more")
        self._content.encrypt_into(segment_nonce(number, last), plain, None, out)

    def open_segment(self, number: int, last: bool, sealed: bytes | bytearray | memoryview) -> bytes:
        """The plaintext of one segment. Raises Damaged when it is not segment ``number`` of this file, whole."""
        try:
            return self._content.decrypt(segment_nonce(number, last), sealed, None)
        except InvalidTag:
            raise Damaged(f"segment {number} does not open: its bytes were changed, moved or cut") from None

    def open_segment_into(self, number: int, last: bool, sealed: memoryview, out: memoryview) -> None:
        """Write the plaintext of one segment to ``out``, ``tag_bytes`` shorter than ``sealed``. Raises as ``open_segment``."""
        if len(out) != len(sealed) - tag_bytes:
            raise ValueError("out must have room for the segment without its tag, no more")
        try:
            self._content.decrypt_into(segment_nonce(number, last), sealed, None, out)
        except InvalidTag:
            raise Damaged(f"segment {number} does not open: its bytes were changed, moved or cut") from None

    def seal_header(self, header: bytes) -> bytes:
        """Random nonce, ciphertext, tag."""
        nonce = os.urandom(_nonce_bytes)
        return nonce + self._header.encrypt(nonce, header, _header_aad)

    def open_header(self, sealed: bytes) -> bytes:
        """The header's bytes. Raises Damaged."""
        try:
            return self._header.decrypt(sealed[:_nonce_bytes], sealed[_nonce_bytes:], _header_aad)
        except (InvalidTag, ValueError):
            raise Damaged("the sealed header does not open") from None


def wrap(vault_key: bytes, seal: FileSeal) -> bytes:
    """The owner's wrap of the file key. Its key is used for this file id alone, so a fixed nonce is safe."""
    return AESGCM(hkdf(vault_key, seal.file_id, _wrap_info)).encrypt(bytes(_nonce_bytes), seal.file_key, None)


def unwrap(vault_key: bytes, manifest: Manifest) -> FileSeal:
    """The seal of a file that this vault owns. Raises Damaged when the wrap was made by another vault."""
    key = AESGCM(hkdf(vault_key, manifest.file_id, _wrap_info))
    try:
        file_key = key.decrypt(bytes(_nonce_bytes), manifest.wrap, None)
    except InvalidTag:
        raise Damaged("this vault's key does not open the file's key", hint="is it another vault's file?") from None
    return FileSeal.of(manifest, file_key)
