#!/usr/bin/env python3
"""Make tests/vectors/escrow.json and rotation.json. No medshard code: a second implementation of escrow, new keys and senders.

Its values are drawn from SHAKE-256 of their labels, so that the files are the same every time.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgpack
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF
from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa

folder = Path(__file__).parent.parent / "tests" / "vectors"
origin = "consortium.example/log"


def drawn(label: str, size: int) -> bytes:
    """Bytes that only look random."""
    return hashlib.shake_256(b"medshard key vectors: " + label.encode()).digest(size)


def pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def derived(root: bytes, purpose: str) -> bytes:
    key = HKDF(root, 32, b"", SHA256, context=f"medshard/vault/v1/{purpose}".encode())
    assert isinstance(key, bytes)
    return key


def public(seed: bytes) -> bytes:
    return bytes(ECC.construct(curve="Ed25519", seed=seed).public_key().export_key(format="raw"))


def sign(seed: bytes, message: bytes) -> bytes:
    return bytes(eddsa.new(ECC.construct(curve="Ed25519", seed=seed), "rfc8032").sign(message))


# -- escrow.json


def multiplied(a: int, b: int) -> int:
    """In GF(2^128) with 1 + x + x^2 + x^7 + x^128."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a <<= 1
        if a >> 128:
            a ^= (1 << 128) | 0x87
        b >>= 1
    return product


def value_at(coefficients: list[int], x: int) -> bytes:
    """The polynomial at x, its constant term first."""
    total = 0
    for coefficient in reversed(coefficients):
        total = multiplied(total, x) ^ coefficient
    return total.to_bytes(16, "big")


def escrow(threshold: int, count: int) -> dict[str, Any]:
    what = f"{threshold} of {count}"
    root, id_ = drawn(f"{what}: root", 32), drawn(f"{what}: id", 16)
    vault = public(derived(root, "signing"))
    halves = []
    for number, half in enumerate((root[:16], root[16:])):
        more = [int.from_bytes(drawn(f"{what}: half {number}, coefficient {n}", 16), "big") for n in range(1, threshold)]
        halves.append([int.from_bytes(half, "big"), *more])
    shares = [b"".join(value_at(half, number) for half in halves) for number in range(1, count + 1)]
    label = b"medshard/escrow-commitment/v1"
    commitments = [hashlib.sha256(label + vault + id_ + bytes([number]) + share).digest() for number, share in enumerate(shares, 1)]
    asker = public(drawn(f"{what}: asker", 32))
    return {
        "threshold": threshold,
        "root": root.hex(),
        "vault": vault.hex(),
        "shares": [pack([1, vault, id_, threshold, number, share, commitments]).hex() for number, share in enumerate(shares, 1)],
        "request": pack([1, vault, asker, "Dr. Weber, call 4711", 1_700_000_000, drawn(f"{what}: nonce", 16)]).hex(),
        "asker": asker.hex(),
    }


# -- rotation.json


def former_keys() -> dict[str, Any]:
    root, before = drawn("present root", 32), [drawn(f"root before {n}", 32) for n in (1, 2)]
    owner, nonce = public(derived(root, "signing")), drawn("former keys: nonce", 12)
    head = ["medshard/formerkeys/v1", owner]
    cipher = AES.new(derived(root, "former"), AES.MODE_GCM, nonce=nonce)
    cipher.update(pack(head))
    sealed, tag = cipher.encrypt_and_digest(pack([before[1], before]))
    return {
        "root": root.hex(),
        "home": before[1].hex(),
        "before": [each.hex() for each in before],
        "file": pack([*head, nonce, sealed + tag]).hex(),
        "stored": pack([1, before]).hex(),
    }


def rotation() -> dict[str, Any]:
    old, new = (derived(drawn(name, 32), "signing") for name in ("root before 1", "present root"))
    name = origin.encode()
    signed = b"medshard/rotation/v1" + len(name).to_bytes(2, "big") + name + public(old) + public(new)
    secret, csr = drawn("secret", 16), b"a certificate request"
    return {
        "origin": origin,
        "old": public(old).hex(),
        "new": public(new).hex(),
        "signed": signed.hex(),
        "body": pack([1, secret, csr, public(old), sign(old, signed), sign(new, signed)]).hex(),
    }


def sender() -> dict[str, Any]:
    seed, vault, hpke_public = drawn("sender: seed", 32), public(drawn("sender: vault", 32)), drawn("sender: HPKE key", 1216)
    return {
        "seed": seed.hex(),
        "public": public(seed).hex(),
        "vault": vault.hex(),
        "hpke_public": hpke_public.hex(),
        "file": pack(["medshard/sender/v1", seed, vault, hpke_public]).hex(),
        "body": pack([1, drawn("secret", 16), b"a certificate request", vault]).hex(),
    }


def page(about: str, content: dict[str, Any]) -> str:
    head = {"about": f"{about} Bytes are hex. Made by tools/make_key_vectors.py with msgpack and pycryptodome, not with medshard."}
    return json.dumps({**head, **content}, indent=1, ensure_ascii=False) + "\n"


def pages() -> dict[str, str]:
    """What belongs into each file, by its name."""
    return {
        "escrow": page(
            "Shares of root keys, and requests for them, see docs/formats/escrow.md.", {"escrows": [escrow(2, 3), escrow(3, 5)]}
        ),
        "rotation": page(
            "Former keys, requests for new ones, and senders, see docs/formats/key-file.md, invite.md and sender.md.",
            {"former": former_keys(), "rotation": rotation(), "sender": sender()},
        ),
    }


if __name__ == "__main__":
    for name, text in pages().items():
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
