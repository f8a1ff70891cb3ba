"""The vault's keys: one random root, everything else derived from it, the root kept under a passphrase.

The key file is all that a restore needs besides living nodes. Whoever has it and the passphrase is the vault. A vault whose key was
rotated has the roots before as well, in a file beside the key file and in one of its stored files, both sealed under the present root.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from medshard_protocol.errors import Absent, Damaged, Malformed, Refused
from medshard_protocol.ids import Key, Tag

magic: Final = "medshard/keyfile/v1"
former_magic: Final = "medshard/formerkeys/v1"
former_max: Final = 64
former_bytes_max: Final = 4096
key_file_bytes_max: Final = 4096
# scrypt at 32 MiB and three lanes costs a guesser as much as OWASP's 128 MiB in one, and fits the client's memory promise.
scrypt_log2_n: Final = 15
scrypt_r: Final = 8
scrypt_p: Final = 3
scrypt_fast_log2_n: Final = 12  # for passphrases that a machine drew at random: stretching adds nothing to 128 bits


@dataclass(frozen=True, slots=True)
class VaultKeys:
    """What one root key gives. ``public`` is the vault's identity everywhere, and all that is shown of it."""

    root: bytes = field(repr=False)
    signing: Ed25519PrivateKey = field(repr=False)
    public: Key
    vault: bytes = field(repr=False)
    lookup: bytes = field(repr=False)
    index: bytes = field(repr=False)
    hpke_seed: bytes = field(repr=False)
    former: list[VaultKeys] = field(default_factory=list, compare=False, repr=False)  # newest first; more may be found on the nodes
    home: VaultKeys | None = field(default=None, compare=False, repr=False)  # of them, what lies on this disk is sealed under; None: these

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

    @property
    def line(self) -> tuple[VaultKeys, ...]:
        """The present keys and those before, the newest first."""
        return (self, *self.former)

    @property
    def at_home(self) -> VaultKeys:
        """What lies on this machine's disk is sealed under these: the keys that the home was made with."""
        return self.home or self

    def of(self, owner: bytes) -> VaultKeys | None:
        """The keys of this vault with this identity, present or former; None for another's."""
        return next((keys for keys in self.line if keys.public == owner), None)

    def tag(self, plaintext_sha256: bytes) -> Tag:
        """The lookup tag of a plaintext: HMAC-SHA256 under the lookup key, so that nodes learn no plaintext hash."""
        return Tag(hmac.digest(self.lookup, plaintext_sha256, sha256))

    def row_tag(self, plaintext_sha256: bytes) -> Tag:
        """What a plaintext goes by in the local index, whichever key it was stored under."""
        return self.at_home.tag(plaintext_sha256)

    def tags(self, plaintext_sha256: bytes) -> list[Tag]:
        """The lookup tags under which nodes may know a plaintext of this vault."""
        return [keys.tag(plaintext_sha256) for keys in self.line]

    def remember(self, roots: Sequence[bytes], home: bytes | None = None) -> VaultKeys:
        """These keys with those of the roots before, the newest first."""
        return replace(self, former=[VaultKeys.from_root(root) for root in roots], home=VaultKeys.from_root(home) if home else None)


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
    keys = open_root(data, passphrase)
    beside = former_path(path.parent, keys.public)
    return open_former(keys, beside.read_bytes()) if beside.exists() else keys


def former_path(folder: Path, public: Key) -> Path:
    """Where the roots before lie that belong to the key file with this public key."""
    return folder / f"former-{public[:8].hex()}.sealed"


def seal_former(keys: VaultKeys) -> bytes:
    """The bytes of the file beside the key file."""
    head: list[canonical.Value] = [former_magic, keys.public]
    plain = canonical.encode([keys.at_home.root, [each.root for each in keys.former]])
    nonce = os.urandom(12)
    return canonical.encode([*head, nonce, _former_cipher(keys).encrypt(nonce, plain, canonical.encode(head))])


def open_former(keys: VaultKeys, data: bytes) -> VaultKeys:
    """These keys with those of the roots before, out of such a file. Raises Malformed, or Damaged for one that another root seals."""
    f = canonical.Fields(canonical.decode(data, bytes_max=former_bytes_max, what="former keys"), count=4, what="former keys")
    if f.text(most=32) != former_magic:
        raise Malformed("former keys: a version this program does not know")
    public, nonce, sealed = f.bytes(exactly=32), f.bytes(exactly=12), f.bytes(most=former_bytes_max)
    try:
        plain = _former_cipher(keys).decrypt(nonce, sealed, canonical.encode([former_magic, public]))
    except InvalidTag:
        hint = "Move it away and run `medshard reindex`: the nodes have what is in it, but for what lies on this disk."
        raise Damaged("former keys: they are another vault's, or were changed", hint=hint) from None
    inner = canonical.Fields(canonical.decode(plain, bytes_max=former_bytes_max, what="former keys"), count=2, what="former keys")
    home = inner.bytes(exactly=32)
    return keys.remember(roots_of(inner.list(most=former_max)), home)


def roots_of(items: Sequence[object]) -> list[bytes]:
    """Root keys out of a list that was parsed. Raises Malformed."""
    roots = [item for item in items if isinstance(item, bytes) and len(item) == 32]
    if len(roots) != len(items):
        raise Malformed("former keys: a root key has 32 bytes")
    return roots


def _former_cipher(keys: VaultKeys) -> AESGCM:
    return AESGCM(hkdf(keys.root, b"", b"medshard/vault/v1/former"))


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
