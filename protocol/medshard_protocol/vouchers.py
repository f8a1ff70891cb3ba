"""Vouchers: what one cosigner tells one other node of a cosignature, so that it need not check the signature itself.

A voucher is a MAC under a key that only the two nodes can compute, from the Ed25519 keys that the roster lists for both. It says that the
cosigner has made this very signature over this text. A node that is shown a quorum's vouchers knows what a quorum's signatures would tell
it, for a fiftieth of their cost; it can convince nobody else with them, so nothing that is kept or passed on rests on vouchers
(docs/decisions/0061-vouchers.md).

Law: vouchers only ever save work. Whoever gets none, or such as do not hold, checks the signatures.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Final

from blake3 import blake3
from nacl.bindings import (
    crypto_scalarmult,
    crypto_sign_ed25519_pk_to_curve25519,
    crypto_sign_ed25519_sk_to_curve25519,
)
from nacl.exceptions import CryptoError

from medshard_protocol.checkpoint import Note, Signature, cosigner_lines
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.ids import NodeId
from medshard_protocol.roster import Roster

vouchers_header: Final = "Medshard-Vouchers"
voucher_size: Final = 16
nothing: Final = bytes(voucher_size)  # in the place of a voucher that there is not
nodes_max: Final = 40  # in a larger consortium a reader can show no checkpoint either (``sharing.checkpoint_chars_max``)
row_bytes_max: Final = nodes_max * voucher_size
header_chars_max: Final = (row_bytes_max * 4 + 2) // 3
_context: Final = "medshard 2026 voucher between two cosigners v1"


class Voucher:
    """Makes and checks the vouchers of the node that has this cosigner key. ``seed`` is the Ed25519 private key's 32 bytes."""

    def __init__(self, seed: bytes, public: bytes) -> None:
        self.public = public
        self._scalar = crypto_sign_ed25519_sk_to_curve25519(seed + public)
        self._keys: dict[bytes, bytes] = {}

    def row(self, roster: Roster, text: str, signature: Signature) -> bytes:
        """For each node in the roster's order, what vouches to it for the signature that this node has just made over ``text``.

        Nothing where the roster has too many.
        """
        if len(roster.nodes) > nodes_max:
            return b""
        signed = signature.value + text.encode()
        return b"".join([self._mac(node.cosigner_key, self.public, node.cosigner_key, signed) for node in roster.nodes])

    def who(self, roster: Roster, note: Note, vouchers: Sequence[bytes]) -> dict[NodeId, int]:
        """Which of a roster's nodes vouch to this one for their lines in ``note``, and when they cosigned, as those say; one voucher is
        for each line, in order.

        This node's own signature is checked as such.
        """
        found, text = dict[NodeId, int](), note.text.encode()
        for (node, verifier, line), voucher in zip(cosigner_lines(note, roster), vouchers, strict=False):
            if verifier.key == self.public:
                with contextlib.suppress(Refused):
                    found[node] = verifier.verify(note.text, line)
                continue
            expected = self._mac(verifier.key, verifier.key, self.public, line.value + text)
            if expected != nothing and hmac.compare_digest(expected, voucher):
                found[node] = line.time
        return found

    def _mac(self, other: bytes, cosigner: bytes, reader: bytes, signed: bytes) -> bytes:
        key = self._keys.get(other)
        if key is None:
            key = self._keys[other] = self._shared(other)
        if not key:
            return nothing
        return blake3(cosigner + reader + signed, key=key).digest(voucher_size)

    def _shared(self, other: bytes) -> bytes:
        """The key of this node and that one; empty for this node itself, and for a key that is no point of the curve's large group."""
        if other == self.public:
            return b""
        try:
            secret = crypto_scalarmult(self._scalar, crypto_sign_ed25519_pk_to_curve25519(other))
        except (CryptoError, ValueError, TypeError):
            return b""
        return blake3(secret, derive_key_context=_context).digest()


def for_reader(rows: Mapping[NodeId, bytes], cosigners: Sequence[NodeId], roster: Roster, reader: NodeId) -> list[bytes]:
    """Of all that the ``cosigners`` of a note gave, in the order of its lines, what is for one node: a voucher for each; empty for none."""
    place = next((number for number, node in enumerate(roster.nodes) if node.id == reader), None)
    size = len(roster.nodes) * voucher_size
    if place is None or not any(len(row) == size for row in rows.values()):
        return []
    at = place * voucher_size
    given = [rows.get(node, b"") for node in cosigners]
    return [row[at : at + voucher_size] if len(row) == size else nothing for row in given]


def pack_vouchers(vouchers: Sequence[bytes]) -> str:
    """Value of ``vouchers_header``: one after the other, in base64url without padding. Empty for more than may be shown."""
    text = base64.urlsafe_b64encode(b"".join(vouchers)).decode().rstrip("=")
    return text if len(text) <= header_chars_max else ""


def unpack_vouchers(text: str) -> list[bytes]:
    """Parse the value of ``vouchers_header``; what it says is unchecked. Raises Malformed."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)) if 0 < len(text) <= header_chars_max else b""
    except ValueError:
        data = b""
    if not data or len(data) % voucher_size or base64.urlsafe_b64encode(data).decode().rstrip("=") != text:
        raise Malformed(f"{vouchers_header}: expected vouchers of {voucher_size} bytes in base64url")
    return [data[at : at + voucher_size] for at in range(0, len(data), voucher_size)]
