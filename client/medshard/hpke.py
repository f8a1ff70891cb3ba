"""Sealing to a public key: HPKE (RFC 9180) with MLKEM768-X25519, HKDF-SHA256 and AES-256-GCM.

Law: one message for each sealing, base mode, no associated data; what a message is bound to is said in ``info``. A scan must stay secret
for decades, so the KEM holds while either of ML-KEM-768 and X25519 does. Keys and messages are laid out as in docs/formats/sharing.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import shake_256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey, Suite

from medshard_protocol.errors import Damaged, Malformed
from medshard_protocol.roster import auditors_key_size

seed_size: Final = 32
public_size: Final = auditors_key_size  # 1184 bytes of ML-KEM-768, then 32 of X25519
overhead_bytes: Final = 1136  # 1120 of the encapsulated key, 16 of the tag

_mlkem_public_size: Final = 1184
_suite: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


@dataclass(frozen=True)
class PrivateKey:
    """The private half, as the 32-byte seed that the specification calls the decapsulation key."""

    seed: bytes

    def __post_init__(self) -> None:
        if len(self.seed) != seed_size:
            raise ValueError(f"a seed has {seed_size} bytes")

    @cached_property
    def public(self) -> bytes:
        """The public half: 1216 bytes."""
        mlkem, x25519 = self._halves
        return mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """The plaintext of a message sealed to this key. Raises Damaged for another key's, another ``info``'s or a changed one."""
        try:
            return bytes(_suite.decrypt(sealed, MLKEM768X25519PrivateKey(*self._halves), info))
        except (InvalidTag, ValueError):
            raise Damaged("a sealed message does not open: it is another key's, belongs elsewhere, or was changed") from None

    @cached_property
    def _halves(self) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
        drawn = shake_256(self.seed).digest(96)
        return MLKEM768PrivateKey.from_seed_bytes(drawn[:64]), X25519PrivateKey.from_private_bytes(drawn[64:])


def seal(public: bytes, plain: bytes, info: bytes) -> bytes:
    """Encapsulated key, ciphertext and tag: ``overhead_bytes`` more than ``plain``. Raises Malformed for bytes that are no public key."""
    key = _public(public)
    try:
        return bytes(_suite.encrypt(plain, key, info))
    except ValueError:  # an X25519 point of small order
        raise Malformed("an HPKE public key that is none") from None


@lru_cache(maxsize=16)
def _public(public: bytes) -> MLKEM768X25519PublicKey:
    if len(public) != public_size:
        raise Malformed(f"an HPKE public key has {public_size} bytes, not {len(public)}")
    try:
        mlkem = MLKEM768PublicKey.from_public_bytes(public[:_mlkem_public_size])
        return MLKEM768X25519PublicKey(mlkem, X25519PublicKey.from_public_bytes(public[_mlkem_public_size:]))
    except ValueError:
        raise Malformed("an HPKE public key that is none") from None
