"""Invitations: the one line of text that brings a vault into a consortium, and the two messages that use it up.

Law: whoever holds an unused code can join once, so it travels like a password. It pins the genesis file by its SHA-256, hence a vault
needs to trust nothing but the code: not the address, not the network, not a CA of its operating system. The bytes are specified in
docs/formats/invite.md.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass, field
from typing import Final

from medshard_protocol import canonical
from medshard_protocol.bodies import signature_size
from medshard_protocol.canonical import Fields
from medshard_protocol.errors import Malformed
from medshard_protocol.identity import certificate_bytes_max, csr_bytes_max
from medshard_protocol.ids import Key, Sha256, key_size, sha256_size
from medshard_protocol.roster import institutions_max, is_node_url, url_chars_max

version: Final = 1
prefix: Final = "MEDSHARD1"
secret_size: Final = 16  # 128 bits: a guess costs a request, so nothing shorter would do worse, and nothing longer better
checksum_size: Final = 4
code_chars_max: Final = 1024
join_bytes_max: Final = csr_bytes_max + 64
rotate_bytes_max: Final = csr_bytes_max + 512
joined_bytes_max: Final = certificate_bytes_max + 64


@dataclass(frozen=True, slots=True)
class Invite:
    """Where to join, what to trust there, and the right to."""

    url: str
    genesis_sha256: Sha256
    secret: bytes = field(repr=False)
    institution: int  # index into the roster's institutions: who will vouch

    def to_code(self) -> str:
        """Write it as one word of capital letters and digits, which selects with a double click and makes a small QR code."""
        body = canonical.encode([version, self.url, self.genesis_sha256, self.secret, self.institution])
        return prefix + base64.b32encode(body + _checksum(body)).decode().rstrip("=")

    @classmethod
    def from_code(cls, code: str) -> Invite:
        """Read a code; spaces, line breaks, dashes and small letters do no harm. Raises Malformed."""
        text = "".join(code[: 2 * code_chars_max].split()).replace("-", "").upper()
        if not text.startswith(prefix):
            raise Malformed(f"not an invitation: it should start with {prefix}", hint="copy the whole line that `storenode invite` printed")
        if len(text) > code_chars_max:
            raise Malformed("not an invitation: too long", hint="copy only the line that `storenode invite` printed")
        text = text.removeprefix(prefix)
        try:
            data = base64.b32decode(text + "=" * (-len(text) % 8))
        except (binascii.Error, ValueError):
            data = b""
        body, checksum = data[:-checksum_size], data[-checksum_size:]
        if not body or _checksum(body) != checksum:
            raise Malformed("the invitation is damaged: its checksum does not fit", hint="copy it again; a letter is wrong or missing")
        fields = Fields(canonical.decode(body, bytes_max=code_chars_max, what="invitation"), count=5, what="invitation")
        fields.uint(least=version, most=version)
        url, genesis, secret = fields.text(most=url_chars_max), fields.bytes(exactly=sha256_size), fields.bytes(exactly=secret_size)
        invite = cls(url, Sha256(genesis), secret, fields.uint(most=institutions_max - 1))
        if not is_node_url(url):
            raise Malformed("invitation: expected a url like https://host:port")
        if invite.to_code() != prefix + text:
            raise Malformed("invitation: not in canonical form")  # stray bits at the end of base32
        return invite


def pack_join(secret: bytes, csr: bytes) -> bytes:
    """Body of POST /v1/join."""
    return canonical.encode([version, secret, csr])


def unpack_join(body: bytes) -> tuple[bytes, bytes]:
    """Parse the body of POST /v1/join into secret and certificate request (DER). Raises Malformed."""
    fields = Fields(canonical.decode(body, bytes_max=join_bytes_max, what="join"), count=3, what="join")
    fields.uint(least=version, most=version)
    return fields.bytes(exactly=secret_size), fields.bytes(most=csr_bytes_max)


@dataclass(frozen=True, slots=True)
class Rotation:
    """A vault asks its institution to vouch for a new key in the place of its old one."""

    secret: bytes = field(repr=False)
    csr: bytes  # of the new key
    old: Key
    old_signature: bytes  # of ``entries.rotation_signed``
    key_signature: bytes

    def to_bytes(self) -> bytes:
        """Body of POST /v1/rotate."""
        return canonical.encode([version, self.secret, self.csr, self.old, self.old_signature, self.key_signature])

    @classmethod
    def from_bytes(cls, body: bytes) -> Rotation:
        """Parse. Raises Malformed; neither request nor signatures are checked."""
        f = Fields(canonical.decode(body, bytes_max=rotate_bytes_max, what="rotation"), count=6, what="rotation")
        f.uint(least=version, most=version)
        secret, csr, old = f.bytes(exactly=secret_size), f.bytes(most=csr_bytes_max), Key(f.bytes(exactly=key_size))
        return cls(secret, csr, old, f.bytes(exactly=signature_size), f.bytes(exactly=signature_size))


def pack_sender(secret: bytes, csr: bytes, vault: Key) -> bytes:
    """Body of POST /v1/senders: a key that will only send asks to be enrolled, for this vault."""
    return canonical.encode([version, secret, csr, vault])


def unpack_sender(body: bytes) -> tuple[bytes, bytes, Key]:
    """Parse the body of POST /v1/senders into secret, certificate request (DER) and vault. Raises Malformed."""
    fields = Fields(canonical.decode(body, bytes_max=rotate_bytes_max, what="sender"), count=4, what="sender")
    fields.uint(least=version, most=version)
    return fields.bytes(exactly=secret_size), fields.bytes(most=csr_bytes_max), Key(fields.bytes(exactly=key_size))


def pack_readmission(csr: bytes) -> bytes:
    """Body of POST /v1/certificate: a key that is enrolled asks for a certificate again, with a request that proves possession."""
    return canonical.encode([version, csr])


def unpack_readmission(body: bytes) -> bytes:
    """Parse the body of POST /v1/certificate into a certificate request (DER). Raises Malformed."""
    fields = Fields(canonical.decode(body, bytes_max=join_bytes_max, what="certificate"), count=2, what="certificate")
    fields.uint(least=version, most=version)
    return fields.bytes(most=csr_bytes_max)


def pack_joined(certificate: bytes) -> bytes:
    """Answer to POST /v1/join, /v1/rotate, /v1/senders and /v1/certificate."""
    return canonical.encode([version, certificate])


def unpack_joined(body: bytes) -> bytes:
    """Parse the answer to POST /v1/join into a certificate (DER), unchecked. Raises Malformed."""
    fields = Fields(canonical.decode(body, bytes_max=joined_bytes_max, what="joined"), count=2, what="joined")
    fields.uint(least=version, most=version)
    return fields.bytes(most=certificate_bytes_max)


def _checksum(body: bytes) -> bytes:
    """Find typing mistakes; it proves nothing."""
    return hashlib.sha256(b"medshard/invite/v1" + body).digest()[:checksum_size]
