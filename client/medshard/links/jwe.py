"""What is sent under a link: JWE in compact form, key used directly, AES-256-GCM (RFC 7516, RFC 7518 sections 4.5 and 5.3).

One algorithm and no choice: whatever else a header asks for is Malformed.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medshard_protocol.errors import Damaged, Malformed

header_bytes_max: Final = 8192


def seal(key: bytes, plain: bytes, content_type: str) -> bytes:
    """Encrypt."""
    told = {"alg": "dir", "enc": "A256GCM", "cty": content_type}
    protected = _base64(json.dumps(told, separators=(",", ":")).encode())
    nonce = os.urandom(12)
    sealed = AESGCM(key).encrypt(nonce, plain, protected)
    return b".".join((protected, b"", _base64(nonce), _base64(sealed[:-16]), _base64(sealed[-16:])))


def open_(key: bytes, data: bytes) -> tuple[bytes, str]:
    """(plaintext, content type). Raises Malformed, or Damaged for another key's or a changed one."""
    parts = data.strip().split(b".")
    if len(parts) != 5 or len(parts[0]) > header_bytes_max:
        raise Malformed("not a JWE")
    header: Any
    try:
        header = json.loads(_unbase64(parts[0]))
        algorithms = (header.get("alg"), header.get("enc"), header.get("zip"))
    except (ValueError, AttributeError, RecursionError):
        raise Malformed("not a JWE") from None
    if algorithms != ("dir", "A256GCM", None) or parts[1]:
        raise Malformed(f"a JWE that asks for {algorithms}, which is not taken")
    nonce, tag = _unbase64(parts[2]), _unbase64(parts[4])
    if len(nonce) != 12 or len(tag) != 16:
        raise Malformed("not a JWE")
    try:
        return AESGCM(key).decrypt(nonce, _unbase64(parts[3]) + tag, parts[0]), str(header.get("cty", ""))
    except InvalidTag:
        raise Damaged("what was sent does not open: it was changed, or the link is another's") from None


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _unbase64(text: bytes) -> bytes:
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise Malformed("not a JWE") from None
