"""Receipts: the vectors made without medshard, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol import canonical
from medshard_protocol.ending import Receipt, sign_receipt
from medshard_protocol.entries import Type
from medshard_protocol.errors import Malformed, Refused

vectors = json.loads((Path(__file__).parents[1] / "vectors" / "ending.json").read_text())["receipts"]


@pytest.mark.parametrize("vector", vectors, ids=[each["what"] for each in vectors])
def test_receipts_of_the_vectors_are_made_again(vector):
    data = bytes.fromhex(vector["receipt"])
    receipt, key = Receipt.from_bytes(data), Ed25519PrivateKey.from_private_bytes(bytes.fromhex(vector["tls_key"]))
    assert receipt.to_bytes() == data
    assert sign_receipt(vector["origin"], receipt, key.sign) == receipt


def test_a_receipt_of_a_stranger_is_refused(consortium):
    receipt = Receipt.from_bytes(bytes.fromhex(vectors[0]["receipt"]))
    with pytest.raises(Refused, match="not in the roster"):
        receipt.verify(consortium(4).roster)


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, 2), (1, bytes(31)), (2, -1), (3, 4), (4, bytes(15)), (5, [255]), (5, [1, 2]), (6, -1), (7, 2**60), (8, bytes(63))],
)
def test_what_is_no_receipt_is_malformed(at, value):
    items = canonical.decode(bytes.fromhex(vectors[0]["receipt"]), bytes_max=1000, what="receipt")
    assert Type(items[3]) is Type.ERASE
    items[at] = value
    with pytest.raises(Malformed):
        Receipt.from_bytes(canonical.encode(items))
