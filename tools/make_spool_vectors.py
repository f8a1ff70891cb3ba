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
SALT, DATA, END = 1, 2, 3


def drawn(label: str, size: int) -> bytes:
    """Bytes that look random and are the same every time."""
    return hashlib.shake_256(f"medshard vectors {label}".encode()).digest(size)


def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    derived = HKDF(key, 32, salt, SHA256, context=info)
    assert isinstance(derived, bytes)
    return derived


def framed(kind: int, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + bytes([kind]) + data


def chunk(key: bytes, number: int, kind: int, plain: bytes) -> bytes:
    cipher = AES.new(key, AES.MODE_GCM, nonce=number.to_bytes(12, "big"))
    cipher.update(bytes([kind]))
    return framed(kind, b"".join(cipher.encrypt_and_digest(plain)))


def instance(segment: bytes, label: str, *plain: tuple[int, bytes], ended: bool = False) -> bytes:
    """The chunks of one instance, under its own key; ``ended``: the salt of which is overwritten."""
    salt = drawn(f"spool salt {label}", 32)
    key = hkdf(segment, salt, b"medshard/spool/v2/instance")
    chunks = b"".join(chunk(key, number, kind, data) for number, (kind, data) in enumerate(plain))
    return framed(SALT, bytes(32) if ended else salt) + chunks


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
    key = hkdf(spool_key, salt, b"medshard/spool/v2/segment")
    files = [drawn("spool first", 300), b"", drawn("spool third", 70)]
    about = [{"sop-uid": f"1.2.{number}", "patient-name": "Müller^Änne=山田^太郎"} for number in range(3)]
    ends = [(END, end(file, 1_700_000_000_000 + number, about[number])) for number, file in enumerate(files)]
    stored = drawn("stored", 90)
    instances = [
        instance(key, "first", (DATA, files[0]), ends[0]),
        instance(key, "broken off", (DATA, drawn("broken off", 40)), ended=True),
        instance(key, "empty", ends[1]),
        instance(key, "stored", (DATA, stored), (END, end(stored, 1_700_000_000_009, about[0])), ended=True),
        instance(key, "third", (DATA, files[2]), ends[2]),
        instance(key, "cut off", (DATA, drawn("cut off", 50))),
    ]
    segment = b"medshard/spool/v2\n" + salt + b"".join(instances) + bytes(64)
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
