"""Whether an Ed25519 signature holds, for everything that nodes must judge alike: entries of the ledger, checkpoints, cosignatures.

By libsodium, in half the time that OpenSSL takes; a read waits for a dozen of these (docs/decisions/0036). It refuses keys and
points of small order as well, which nobody has who drew a key; where libraries differ, all nodes must go by one.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from nacl.bindings import crypto_sign_open
from nacl.exceptions import CryptoError

key_size = 32
signature_size = 64


def verify(key: bytes, signature: bytes, message: bytes) -> None:
    """Raise InvalidSignature unless this key signed this."""
    if len(signature) != signature_size or len(key) != key_size:
        raise InvalidSignature
    try:
        crypto_sign_open(signature + message, key)
    except CryptoError:
        raise InvalidSignature from None
