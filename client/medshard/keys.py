"""The vault's keys: one random root, everything else derived from it, the root kept under a passphrase.

The key file is all that a restore needs besides living nodes. Whoever has it and the passphrase is the vault.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from medshard.durable import write_durably
from medshard.hpke import PrivateKey
from medshard.sealing import hkdf
from medshard_protocol import canonical
from medshard_protocol.errors import Absent, Malformed, Refused
from medshard_protocol.ids import Key, Tag

magic: Final = "medshard/keyfile/v1"
key_file_bytes_max: Final = 4096
# scrypt at 32 MiB and three lanes costs a guesser as much as OWASP's 128 MiB in one, and fits the client's memory promise.
scrypt_log2_n: Final = 15
scrypt_r: Final = 8
scrypt_p: Final = 3
scrypt_fast_log2_n: Final = 12  # for passphrases that a machine drew at random: stretching adds nothing to 128 bits


@dataclass(frozen=True, slots=True)
class VaultKeys:
    """What one root key gives. ``public`` is the vault's identity everywhere."""

    root: bytes
    signing: Ed25519PrivateKey
    public: Key
    vault: bytes
    lookup: bytes
    index: bytes
    hpke_seed: bytes

    @classmethod
    def from_root(cls, root: bytes) -> VaultKeys:
        """Derive everything from the 32-byte root key."""
        if len(root) != 32:
            raise ValueError("a root key has 32 bytes")

        def derive(purpose: str) -> bytes:
            return hkdf(root, b"", f"medshard/vault/v1/{purpose}".encode())

        signing = Ed25519PrivateKey.from_private_bytes(derive("signing"))
        public = Key(signing.public_key().public_bytes_raw())
        return cls(root, signing, public, derive("vault"), derive("lookup"), derive("index"), derive("hpke"))

    @property
    def hpke(self) -> PrivateKey:
        """What others seal file keys to, for this vault alone."""
        return PrivateKey(self.hpke_seed)

    def tag(self, plaintext_sha256: bytes) -> Tag:
        """The lookup tag of a plaintext: HMAC-SHA256 under the lookup key, so that nodes learn no plaintext hash."""
        return Tag(hmac.digest(self.lookup, plaintext_sha256, sha256))


def create_key_file(path: Path, passphrase: str, *, root: bytes | None = None, fast: bool = False) -> VaultKeys:
    """Draw a root key (or take ``root``) and keep it at ``path`` under ``passphrase``. Raises Refused if the file exists."""
    if path.exists():
        raise Refused(f"{path} exists already", hint="a key file is never overwritten; choose another --home")
    keys = VaultKeys.from_root(root or os.urandom(32))
    write_durably(path, seal_root(keys, passphrase, fast=fast), mode=0o600)
    return keys


def seal_root(keys: VaultKeys, passphrase: str, *, fast: bool = False) -> bytes:
    """The key file's bytes."""
    return seal(magic, keys.root, keys.public, passphrase, fast=fast)


def seal(kind: str, secret: bytes, public: bytes, passphrase: str, *, fast: bool) -> bytes:
    """A file that holds 32 secret bytes under a passphrase; ``kind`` is its magic, ``public`` 32 bytes that name the key."""
    salt, nonce = os.urandom(16), os.urandom(12)
    log2_n = scrypt_fast_log2_n if fast else scrypt_log2_n
    head: list[canonical.Value] = [kind, "scrypt", salt, log2_n, scrypt_r, scrypt_p, public]
    stretched = _stretch(passphrase, salt, log2_n, scrypt_r, scrypt_p)
    return canonical.encode([*head, nonce, AESGCM(stretched).encrypt(nonce, secret, canonical.encode(head))])


def open_key_file(path: Path, passphrase: str) -> VaultKeys:
    """Open the key file. Raises Absent, Malformed (not a key file) or Refused (wrong passphrase)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Absent(f"no vault at {path.parent}", hint="run `medshard join CODE`, or name the vault with --home") from None
    return open_root(data, passphrase)


def open_root(data: bytes, passphrase: str) -> VaultKeys:
    """The keys in a key file's bytes. Raises Malformed or Refused."""
    root, public = open_sealed(magic, data, passphrase)
    keys = VaultKeys.from_root(root)
    if keys.public != public:  # GCM commits to no key: only this comparison rules out a second root under a second passphrase
        raise Malformed("key file: its public key is not the one its root gives")
    return keys


def open_sealed(kind: str, data: bytes, passphrase: str) -> tuple[bytes, bytes]:
    """(secret, public) of a file made by ``seal``; that they belong together is for the caller to check. Raises Malformed or Refused."""
    f = canonical.Fields(canonical.decode(data, bytes_max=key_file_bytes_max, what="key file"), count=9, what="key file")
    if (f.text(most=32), f.text(most=16)) != (kind, "scrypt"):
        raise Malformed("key file: a version this program does not know")
    salt, log2_n = f.bytes(exactly=16), f.uint(least=10, most=20)  # 2^20 blocks are 1 GiB: nothing of ours asks for more
    r, p, public = f.uint(least=1, most=8), f.uint(least=1, most=16), f.bytes(exactly=32)
    nonce, sealed = f.bytes(exactly=12), f.bytes(exactly=48)
    aad = canonical.encode([kind, "scrypt", salt, log2_n, r, p, public])
    try:
        return AESGCM(_stretch(passphrase, salt, log2_n, r, p)).decrypt(nonce, sealed, aad), public
    except (MemoryError, ValueError):  # RFC 7914 allows N only below 2^(16 r)
        raise Malformed("key file: scrypt parameters that cannot be computed here") from None
    except InvalidTag:
        raise Refused("the passphrase does not open this vault", hint="check MEDSHARD_PASSPHRASE, or type it again") from None


def _stretch(passphrase: str, salt: bytes, log2_n: int, r: int, p: int) -> bytes:
    return Scrypt(salt, 32, 1 << log2_n, r, p).derive(passphrase.encode("utf-8", "surrogateescape"))
