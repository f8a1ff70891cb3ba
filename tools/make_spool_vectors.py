#!/usr/bin/env python3
"""Make tests/vectors/spool.json without medshard: docs/formats/spool.md, written with pycryptodome and msgpack."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgpack
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF

path = Path(__file__).parent.parent / "tests" / "vectors" / "spool.json"
DATA, END, DROP = 1, 2, 3


def drawn(label: str, size: int) -> bytes:
    """Bytes that look random and are the same every time."""
    return hashlib.shake_256(f"medshard vectors {label}".encode()).digest(size)


def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    derived = HKDF(key, 32, salt, SHA256, context=info)
    assert isinstance(derived, bytes)
    return derived


def chunk(key: bytes, number: int, kind: int, plain: bytes) -> bytes:
    cipher = AES.new(key, AES.MODE_GCM, nonce=number.to_bytes(12, "big"))
    cipher.update(bytes([kind]))
    sealed = b"".join(cipher.encrypt_and_digest(plain))
    return len(sealed).to_bytes(4, "big") + bytes([kind]) + sealed


def end(file: bytes, received: int, attributes: dict[str, str]) -> bytes:
    pairs = [[name, attributes[name]] for name in sorted(attributes)]
    packed: bytes = msgpack.packb([len(file), hashlib.sha256(file).digest(), received, pairs], use_bin_type=True)
    return packed


def owed(root: bytes) -> dict[str, object]:
    """A commitment request that is not yet reported about."""
    magic, nonce = b"medshard/commitment/v1\n", drawn("owed nonce", 12)
    references = [["1.2.3.4", "1.2.840.10008.5.1.4.1.1.2"], ["1.2.3.5", "1.2.840.10008.5.1.4.1.1.4"]]
    plain = msgpack.packb(["CT01", "1.2.3", 1_700_000_000_003, references], use_bin_type=True)
    cipher = AES.new(hkdf(root, b"", b"medshard/vault/v1/commitments"), AES.MODE_GCM, nonce=nonce)
    cipher.update(magic)
    data = magic + nonce + b"".join(cipher.encrypt_and_digest(plain))
    return {"data": data.hex(), "peer": "CT01", "transaction": "1.2.3", "since": 1_700_000_000_003, "references": references}


def main() -> None:
    root, salt = drawn("spool root", 32), drawn("spool salt", 32)
    spool_key = hkdf(root, b"", b"medshard/vault/v1/spool")
    key = hkdf(spool_key, salt, b"medshard/spool/v1/segment")
    files = [drawn("spool first", 300), b"", drawn("spool third", 70)]
    about = [{"sop-uid": f"1.2.{number}", "patient-name": "Müller^Änne=山田^太郎"} for number in range(3)]
    chunks = [
        chunk(key, 0, DATA, files[0]),
        chunk(key, 1, END, end(files[0], 1_700_000_000_000, about[0])),
        chunk(key, 2, DATA, drawn("broken off", 40)),
        chunk(key, 3, DROP, b""),
        chunk(key, 4, END, end(files[1], 1_700_000_000_001, about[1])),
        chunk(key, 5, DATA, files[2]),
        chunk(key, 6, END, end(files[2], 1_700_000_000_002, about[2])),
    ]
    segment = b"medshard/spool/v1\n" + salt + b"".join(chunks) + bytes(64)
    found = {
        "about": "docs/formats/spool.md: a segment, and a commitment request. Hex. Made by tools/make_spool_vectors.py, not with medshard.",
        "root": root.hex(),
        "spool_key": spool_key.hex(),
        "segment_key": key.hex(),
        "segment": segment.hex(),
        "instances": [
            {"file": file.hex(), "received": 1_700_000_000_000 + number, "attributes": about[number]} for number, file in enumerate(files)
        ],
        "owed": owed(root),
    }
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
