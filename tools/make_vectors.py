#!/usr/bin/env python3
"""Make tests/vectors/{encoding,sealing,manifest,keyfile,sharing,wire,repair,audit,ending}.json without medshard: a second implementation.

The program seals with `cryptography` and its own C kernel; this seals with pycryptodome and reedsolo. Equal bytes therefore say that
the documents in docs/formats/ are what both do. Run it after a change of a format, and read the difference.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack
from blake3 import blake3
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Protocol import DH, HPKE
from Crypto.Protocol.KDF import HKDF, scrypt
from Crypto.PublicKey import ECC, Hybrid
from Crypto.Signature import eddsa
from reedsolo import RSCodec, gf_inverse, gf_mul

folder = Path(__file__).parent.parent / "tests" / "vectors"
hashers: dict[str, Callable[[bytes], bytes]] = {
    "blake3": lambda data: blake3(data).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
}


def drawn(label: str, size: int) -> bytes:
    """Bytes that look random and are the same every time."""
    return hashlib.shake_256(f"medshard vectors {label}".encode()).digest(size)


def pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def hkdf(key: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    derived = HKDF(key, length, salt, SHA256, context=info)
    assert isinstance(derived, bytes)
    return derived


def gcm(key: bytes, nonce: bytes, plain: bytes, aad: bytes = b"") -> bytes:
    cipher = AES.new(key, AES.MODE_GCM, nonce=nonce)
    cipher.update(aad)
    return b"".join(cipher.encrypt_and_digest(plain))


def tree_head(leaves: Sequence[bytes], digest: Callable[[bytes], bytes]) -> bytes:
    """RFC 6962, section 2.1, as written there."""
    if len(leaves) == 1:
        return digest(b"\x00" + leaves[0])
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return digest(b"\x01" + tree_head(leaves[:split], digest) + tree_head(leaves[split:], digest))


def parity(cells: Sequence[bytes], k: int, n: int) -> list[bytes]:
    if k == n:
        return []
    columns = [bytes(RSCodec(n - k, nsize=n).encode(bytes(column))) for column in zip(*cells, strict=True)]
    return [bytes(column[i] for column in columns) for i in range(k, n)]


# -- one object: sealing.json and manifest.json


def seal_object(what: str, plain: bytes, k: int, n: int, cell_size: int, digest: str, header: list[Any]) -> dict[str, Any]:
    """Everything that becomes of ``plain``."""
    file_key, file_id, vault_key = (drawn(f"{what}: {name}", 32) for name in ("file key", "file id", "vault key"))
    derived = hkdf(file_key, file_id, b"medshard/file/v1", 96)
    content_key, header_key, commitment = derived[:32], derived[32:64], derived[64:]
    data = plain + bytes(padded(len(plain)) - len(plain))
    per_segment = k * cell_size - 16
    pieces = [data[at : at + per_segment] for at in range(0, len(data), per_segment)]
    shards: list[list[bytes]] = [[] for _ in range(n)]
    for number, piece in enumerate(pieces):
        nonce = number.to_bytes(11, "big") + (b"\x01" if number == len(pieces) - 1 else b"\x00")
        segment = gcm(content_key, nonce, piece)
        length = -(-len(segment) // k)
        segment += bytes(k * length - len(segment))
        cells = [segment[i * length : (i + 1) * length] for i in range(k)]
        for shard, cell in zip(shards, cells + parity(cells, k, n), strict=True):
            shard.append(cell)
    hasher = hashers[digest]
    digests = [[hasher(cell) for cell in shard] for shard in shards]
    roots = [tree_head(leaves, hasher) for leaves in digests]
    header_nonce = drawn(f"{what}: header nonce", 12)
    sealed_header = header_nonce + gcm(header_key, header_nonce, pack(header), b"medshard/header/v1")
    wrap = gcm(hkdf(vault_key, file_id, b"medshard/wrap/v1"), bytes(12), file_key)
    sealed_size = len(data) + 16 * len(pieces)
    nodes = [drawn(f"{what}: node {i}", 16) for i in range(n)]
    owner = drawn(f"{what}: owner", 32)
    tags = sorted(drawn(f"{what}: tag {i}", 32) for i in range(max(1, len(header[8]))))
    places = [[node, root] for node, root in zip(nodes, roots, strict=True)]
    documents = [(member[2], member[3]) for member in header[8]] or [(header[3], header[4])]
    evidence_key = hkdf(file_key, file_id, b"medshard/evidence/v1")
    salts = [hmac.new(evidence_key, at.to_bytes(8, "big"), "sha256").digest() for at in range(len(documents))]
    opened = [
        b"medshard/evidence/leaf/v1" + owner + file_id + salt + size.to_bytes(8, "big") + sha256
        for salt, (size, sha256) in zip(salts, documents, strict=True)
    ]
    evidence = tree_head(opened, hashers["sha256"])
    manifest = pack([2, file_id, k, n, cell_size, sealed_size, digest, commitment, places, owner, sealed_header, wrap, tags, evidence])
    registered = hashlib.sha256(b"medshard/manifest/v2" + evidence + hashlib.sha256(manifest).digest())
    return {
        "what": what,
        "plain": plain.hex(),
        "padded_size": len(data),
        "k": k,
        "n": n,
        "cell_size": cell_size,
        "sealed_size": sealed_size,
        "digest": digest,
        "file_key": file_key.hex(),
        "file_id": file_id.hex(),
        "content_key": content_key.hex(),
        "header_key": header_key.hex(),
        "commitment": commitment.hex(),
        "shards": [b"".join(shard).hex() for shard in shards],
        "cell_digests": [[item.hex() for item in leaves] for leaves in digests],
        "roots": [root.hex() for root in roots],
        "header": pack(header).hex(),
        "sealed_header": sealed_header.hex(),
        "vault_key": vault_key.hex(),
        "wrap": wrap.hex(),
        "nodes": [node.hex() for node in nodes],
        "owner": owner.hex(),
        "tags": [tag.hex() for tag in tags],
        "manifest": manifest.hex(),
        "salts": [salt.hex() for salt in salts],
        "evidence": evidence.hex(),
        "manifest_sha256": registered.hexdigest(),
    }


def objects() -> list[dict[str, Any]]:
    text = b"Versicherungsschein Nr. 7. " * 80
    slices = [drawn("slice 0", 1700), b"", drawn("slice 2", 325)]
    sums = [hashlib.sha256(item).digest() for item in slices]

    def header(name: bytes, plain: bytes) -> list[Any]:
        return [1, 0, name, len(plain), hashlib.sha256(plain).digest(), 1_700_000_000, "text/plain", [], []]

    at = [0, 1700, 1700]
    members = [[b"ct/IM%d" % i, at[i], len(slices[i]), sums[i], "", []] for i in range(3)]
    whole = hashlib.sha256(b"".join(sums)).digest()
    pack_header = [1, 1, b"ct", 2025, whole, 0, "application/dicom", [["modality", "CT"]], members]
    return [
        seal_object("the empty file, 3 of 6", b"", 3, 6, 347, "blake3", header(b"empty", b"")),
        seal_object("five stripes, the last with smaller cells, 2 of 4", text, 2, 4, 256, "blake3", header(b"a.txt", text)),
        seal_object("a pack of three, 4 of 5", b"".join(slices), 4, 5, 256, "blake3", pack_header),
        seal_object("SHA-256 cells, 2 of 2", text[:10], 2, 2, 400, "sha256", header(b"b", text[:10])),
    ]


def refused_manifests(good: bytes) -> list[dict[str, str]]:
    """One rule broken each."""

    def changed(what: str, at: int, value: Any) -> dict[str, str]:
        items = msgpack.unpackb(good)
        items[at] = value
        return {"what": what, "bytes": pack(items).hex()}

    items = msgpack.unpackb(good)
    places, tags = items[8], items[12]
    return [
        {"what": "cut off", "bytes": good[:-1].hex()},
        {"what": "a byte too many", "bytes": (good + b"\x00").hex()},
        {"what": "version in two bytes instead of one", "bytes": (good[:1] + b"\xcc" + good[1:]).hex()},
        {"what": "an item too many", "bytes": pack([*items, 0]).hex()},
        changed("version 1", 0, 1),
        changed("a file id of 31 bytes", 1, items[1][:31]),
        changed("k of 0", 2, 0),
        changed("k over n", 2, items[3] + 1),
        changed("n of 256", 3, 256),
        changed("n other than the number of shards", 3, items[3] + 1),
        changed("a cell size of 1", 4, 1),
        changed("a cell size over 1 MiB", 4, 2**20 + 1),
        changed("several cells of fewer than 64 bytes", 4, 63),
        changed("a last segment without data", 5, items[2] * items[4] + 16),
        changed("an unknown digest", 6, "md5"),
        changed("a commitment of 16 bytes", 7, items[7][:16]),
        changed("one node twice", 8, [places[0], [places[0][0], places[1][1]], *places[2:]]),
        changed("a root of 31 bytes", 8, [[places[0][0], places[0][1][:31]], *places[1:]]),
        changed("a wrap of 47 bytes", 11, items[11][:47]),
        changed("tags in falling order", 12, sorted([*tags, drawn("another tag", 32)], reverse=True)),
        changed("one tag twice", 12, [tags[0], tags[0]]),
        changed("evidence of 31 bytes", 13, items[13][:31]),
    ]


# -- keyfile.json


def key_file(what: str, passphrase: str, log2_n: int, r: int, p: int) -> dict[str, Any]:
    root, salt, nonce = drawn(f"{what}: root", 32), drawn(f"{what}: salt", 16), drawn(f"{what}: nonce", 12)
    purposes = ("signing", "vault", "lookup", "index", "hpke")
    keys = {purpose: hkdf(root, b"", f"medshard/vault/v1/{purpose}".encode()) for purpose in purposes}
    public = ECC.construct(curve="Ed25519", seed=keys["signing"]).public_key().export_key(format="raw")
    head = ["medshard/keyfile/v1", "scrypt", salt, log2_n, r, p, public]
    stretched = scrypt(passphrase.encode(), salt, 32, 1 << log2_n, r, p)
    plain_sha256 = hashlib.sha256(b"abc").digest()
    return {
        "what": what,
        "passphrase": passphrase,
        "root": root.hex(),
        "salt": salt.hex(),
        "log2_n": log2_n,
        "r": r,
        "p": p,
        "nonce": nonce.hex(),
        "bytes": pack([*head, nonce, gcm(stretched, nonce, root, pack(head))]).hex(),
        "public": bytes(public).hex(),
        "keys": {purpose: key.hex() for purpose, key in keys.items()},
        "hpke_public": hybrid(keys["hpke"])._pk.hex(),
        "plain_sha256": plain_sha256.hex(),
        "tag": hmac.new(keys["lookup"], plain_sha256, "sha256").hexdigest(),
    }


# -- sharing.json


def hybrid(seed: bytes) -> Hybrid.HybridKey:
    """The MLKEM768-X25519 key of a 32-byte seed."""
    return Hybrid.HybridKey(param_set=Hybrid.MLKEM768_X25519, seed=seed)


def hpke_seal(what: str, receiver_seed: bytes, plain: bytes, info: bytes) -> bytes:
    """HPKE in base mode; the randomness of the encapsulation is drawn, so that the bytes are the same every time."""
    setattr(Hybrid, "get_random_bytes", lambda size: drawn(f"{what}: randomness", size))  # noqa: B010 - the library exports no other way
    sender = HPKE.new(receiver_key=hybrid(receiver_seed).public_key(), aead_id=HPKE.AEAD.AES256_GCM, info=info)
    return bytes(sender.enc + sender.seal(plain))


def signed(seed: bytes, message: bytes) -> bytes:
    return bytes(eddsa.new(ECC.construct(curve="Ed25519", seed=seed), "rfc8032").sign(message))


def raw_public(seed: bytes) -> bytes:
    return bytes(ECC.construct(curve="Ed25519", seed=seed).public_key().export_key(format="raw"))


def entry(seed: bytes, origin: str, kind: int, body: list[Any]) -> bytes:
    """One entry of the ledger, as docs/formats/ledger.md has it."""
    name = origin.encode()
    message = b"medshard/entry/v1" + len(name).to_bytes(2, "big") + name + bytes([kind]) + pack(body)
    return pack([1, kind, body, raw_public(seed), signed(seed, message)])


def sealing_keys() -> list[dict[str, Any]]:
    made = []
    for what in ("a reader", "another reader"):
        root = drawn(f"{what}: root", 32)
        signing, seed = (hkdf(root, b"", f"medshard/vault/v1/{purpose}".encode()) for purpose in ("signing", "hpke"))
        public = hybrid(seed)._pk
        signature = signed(signing, b"medshard/hpke-key/v1" + public)
        made.append(
            {
                "what": what,
                "root": root.hex(),
                "owner": raw_public(signing).hex(),
                "hpke_seed": seed.hex(),
                "hpke_public": public.hex(),
                "signature": signature.hex(),
                "bytes": pack([1, raw_public(signing), public, signature]).hex(),
            }
        )
    return made


def grants(keys: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    origin, owner = "consortium.example/log", drawn("grants: owner", 32)
    made = []
    for what, reader, until, purpose, count in (
        ("one file, for good", keys[0], 0, 1, 1),
        ("three files, to a day", keys[1], 2_000_000_000, 2, 3),
    ):
        file_ids = [drawn(f"{what}: file {i}", 32) for i in range(count)]
        body = [file_ids, bytes.fromhex(reader["owner"]), until, purpose, drawn(f"{what}: nonce", 16)]
        granted = entry(owner, origin, 3, body)
        grant = hashlib.sha256(b"\x00" + granted).digest()
        sealed = []
        for file_id in file_ids:
            file_key, info = drawn(f"{what}: key of {file_id.hex()}", 32), b"medshard/grant/v1" + file_id + grant
            blob = hpke_seal(f"{what}: {file_id.hex()}", bytes.fromhex(reader["hpke_seed"]), file_key, info)
            one = {"file_id": file_id.hex(), "file_key": file_key.hex(), "info": info.hex(), "sealed": blob.hex()}
            sealed.append({**one, "bytes": pack([1, grant, blob]).hex()})
        made.append(
            {"what": what, "origin": origin, "reader": reader["what"], "entry": granted.hex(), "grant": grant.hex(), "files": sealed}
        )
    return made


def reasons() -> list[dict[str, Any]]:
    origin, seed = "consortium.example/log", drawn("reasons: auditors", 32)
    made = []
    for text in ("Patient bewusstlos, Notaufnahme 3", "x", "€" * 133 + "."):
        sealed = hpke_seal(f"reason {text}", seed, text.encode(), b"medshard/reason/v1" + origin.encode())
        made.append({"origin": origin, "text": text, "sealed": sealed.hex()})
    return [{"auditors_seed": seed.hex(), "auditors_public": hybrid(seed)._pk.hex(), "sealed": made}]


# -- encoding.json


def as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    return [as_json(item) for item in value] if isinstance(value, list) else value


def encodings() -> dict[str, Any]:
    integers = [0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1, -1, -32, -33, -128, -129, -(2**15), -(2**31), -(2**63)]
    others = [
        None,
        False,
        True,
        "",
        "é",
        "x" * 31,
        "x" * 32,
        "x" * 256,
        b"",
        b"\x00",
        b"y" * 255,
        b"y" * 256,
        [],
        [0] * 15,
        [0] * 16,
        [[b"z"], "z"],
    ]
    refused = {
        "nothing": "",
        "1 in two bytes": "cc01",
        "1 in nine bytes": "cf0000000000000001",
        "-1 in two bytes": "d0ff",
        "text of one byte with a length byte": "d90161",
        "bytes with a length of two bytes": "c5000161",
        "an array of one with a length of two bytes": "dc000100",
        "a byte after the value": "0000",
        "an array cut off": "9200",
        "a map": "8100c0",
        "an empty map": "80",
        "a float": "cb3ff0000000000000",
        "an extension": "d40100",
        "a timestamp": "d6ff00000000",
        "text that is not UTF-8": "a1ff",
        "a surrogate in UTF-8": "a3eda080",
        "the byte that msgpack never uses": "c1",
        "an array of four thousand million items": "ddffffffff",
        "seventeen brackets": "91" * 17 + "00",
    }
    return {
        "values": [{"value": as_json(value), "bytes": pack(value).hex()} for value in [*integers, *others]],
        "refused": [{"what": what, "bytes": data} for what, data in refused.items()],
    }


# -- wire.json


def messages() -> list[dict[str, Any]]:
    file_id, root, tag = drawn("wire: file", 32), drawn("wire: root", 32), drawn("wire: tag", 32)
    path = [drawn("wire: hash 0", 32), drawn("wire: hash 1", 32)]
    conflict = [1, "conflict", "another shard of this file is stored here already", ""]
    inclusion = [7, b"entry", [path[0]], b"note"]
    bodies: dict[str, Any] = {
        "error": conflict,
        "small puts": [1, [[b"manifest", 2, b"shard"]]],
        "outcomes": [1, [b"", pack(conflict)]],
        "small reads": [1, [[file_id, 2]]],
        "shards": [1, [b"shard", None]],
        "lookup": [1, [tag]],
        "found": [1, [[b"manifest", inclusion], [b"another", None]], [[0, 1], [], [1]]],
        "span with digests": [1, 0, 2, b"".join(path), []],
        "span with paths": [1, 1, 1, b"", [path]],
        "stored": [1, root, 1],
        "check": [1, [3, 5]],
        "access shown": [1, inclusion],
        "seen": [1, 7],
        "grant": [1, root, b"sealed"],
        "shared": [1, b"note", [[file_id, inclusion[:3], [3, b"entry", path], b"manifest", b"sealed"]], 1],
        "history": [1, b"note", [[3, b"entry", path, 1], [7, b"entry", [path[0]], 0]], 0],
        "identity": [1, "Klinikum Süd", 0, 7, 1],
    }
    return [{"what": what, "value": as_json(value), "bytes": pack(value).hex()} for what, value in bodies.items()]


# -- repair.json


def repairs() -> list[dict[str, Any]]:
    """A parity shard from the data shards, and a data shard from a parity shard and the rest."""
    made = []
    for what, k, n, target, chain in (("a parity shard", 3, 6, 4, (2, 0, 1)), ("a data shard", 2, 4, 0, (3, 1))):
        cells = [drawn(f"repair {what}: cell {i}", 40) for i in range(k)]
        cells += parity(cells, k, n)
        units = [bytes(int(i == j) for j in range(k)) for i in range(k)]
        rows = units + [bytes(row) for row in zip(*(RSCodec(n - k, nsize=n).encode(unit)[k:] for unit in units), strict=True)]
        if target >= k:
            factors = [rows[target][shard] for shard in chain]
        else:  # p = a·x0 + b·x1, so x0 = p/a + (b/a)·x1
            a, b = rows[chain[0]]
            factors = [gf_inverse(a), gf_mul(gf_inverse(a), b)]
        seeds, order = [drawn(f"repair {what}: seed {i}", 32) for i in range(k)], drawn(f"repair {what}: order", 32)
        private = [drawn(f"repair {what}: key {i}", 32) for i in range(k)]
        total, sums = bytes(40), []
        for place, (shard, factor) in enumerate(zip(chain, factors, strict=True)):
            total = added(total, bytes(gf_mul(factor, byte) for byte in cells[shard]))
            shared = [pair_secret(private, place, other, order) for other in range(k) if other != place]
            for secret in (seeds[place], *shared):
                total = added(total, AES.new(secret, AES.MODE_CTR, nonce=b"", initial_value=0).encrypt(bytes(40)))
            sums.append(total)
        for seed in seeds:
            total = added(total, AES.new(seed, AES.MODE_CTR, nonce=b"", initial_value=0).encrypt(bytes(40)))
        assert total == cells[target], what
        made.append({"what": what, "k": k, "n": n, "shard": target, "chain": list(chain), "cells": [c.hex() for c in cells]}
                    | {"coefficients": factors, "order_sha256": order.hex(), "seeds": [seed.hex() for seed in seeds]}
                    | {"private_keys": [each.hex() for each in private], "sums": [s.hex() for s in sums]})  # fmt: skip
    return made


def pair_secret(private: Sequence[bytes], place: int, other: int, order: bytes) -> bytes:
    """What two helpers share, by X25519 and HKDF."""
    mine, theirs = (DH.import_x25519_private_key(private[each]) for each in (place, other))
    shared: bytes = DH.key_agreement(static_priv=mine, static_pub=theirs.public_key(), kdf=bytes)
    return hkdf(shared, b"", b"medshard/repair-mask/v1" + order + bytes(sorted((place, other))))


def repair_orders() -> dict[str, Any]:
    origin, seed, file_id = "consortium.example/log", drawn("repair: tls key", 32), drawn("repair: file", 32)
    chain = [[drawn(f"repair: node {i}", 16), i] for i in (0, 2, 5)]
    body = [1, file_id, 3, 77, chain, 12, drawn("repair: nonce", 16)]
    name = origin.encode()
    order = pack([*body, signed(seed, b"medshard/repair-order/v1" + len(name).to_bytes(2, "big") + name + pack(body))])
    order_id, offered = hashlib.sha256(order).digest(), drawn("repair: offered", 32)
    bodies: dict[str, Any] = {
        "seed": [1, order, drawn("repair: seed", 32)],
        "offer": [1, offered, signed(seed, b"medshard/repair-key/v1" + len(name).to_bytes(2, "big") + name + order_id + offered)],
        "keys": [1, order_id, [[offered, drawn("repair: signature", 64)]]],
        "ask": [1, hashlib.sha256(order).digest()],
        "moves": [1, [[0, chain[0][0], 77], [4, chain[1][0], 90]]],
        "wish": [1, [3], 0, 1],
    }
    messages = [{"what": what, "value": as_json(value), "bytes": pack(value).hex()} for what, value in bodies.items()]
    told = {"origin": origin, "tls_key": raw_public(seed).hex(), "value": as_json(body), "order": order.hex()}
    return {"order": told, "messages": messages}


# -- audit.json


def audit_tags() -> list[dict[str, Any]]:
    """All cells of a stripe, and their tags: one of many blocks whose last is not full, and a small one."""
    made = []
    for what, k, n, length, size in (("two blocks", 2, 4, 700, 4), ("a small cell", 3, 5, 17, 1)):
        cells = [drawn(f"audit {what}: cell {i}", length) for i in range(k)]
        cells += parity(cells, k, n)
        file_id, nonce, number = drawn(f"audit {what}: file", 32), drawn(f"audit {what}: nonce", 32), 12
        tags = [audit_tag(file_id, number, nonce, cell, size) for cell in cells]
        made.append({"what": what, "k": k, "n": n, "length": length, "size": size, "file_id": file_id.hex(), "cell": number}
                    | {"nonce": nonce.hex(), "cells": [c.hex() for c in cells], "tags": [tag.hex() for tag in tags]})  # fmt: skip
    return made


def audit_tag(file_id: bytes, number: int, nonce: bytes, cell: bytes, size: int) -> bytes:
    """Byte by byte: each has the product of its block's and its column's coefficient."""
    width = max(512, -(-len(cell) // 255))
    blocks = -(-len(cell) // width)
    seed = b"medshard/audit-tag/v1" + file_id + number.to_bytes(4, "big") + bytes([size]) + nonce
    drawn_ = blake3(seed).digest(length=size * (blocks + width))
    made = bytearray(size)
    for r in range(size):
        for at, byte in enumerate(cell):
            made[r] ^= gf_mul(gf_mul(drawn_[r * blocks + at // width], drawn_[size * blocks + r * width + at % width]), byte)
    return bytes(made)


def audit_messages() -> dict[str, Any]:
    origin, seed = "consortium.example/log", drawn("audit: tls key", 32)
    file_id, nonce, auditor = drawn("audit: file", 32), drawn("audit: nonce", 32), drawn("audit: auditor", 16)
    name = origin.encode()

    def signed_body(label: bytes, body: list[Any]) -> list[Any]:
        return [*body, signed(seed, label + len(name).to_bytes(2, "big") + name + pack(body))]

    path = [drawn(f"audit: hash {i}", 32) for i in range(3)]
    held = [1, file_id, 4, 2, nonce, auditor, 0, 1_800_000_000, drawn("audit: digest", 32), path, b"tag!"]
    rows = [
        [0, auditor, "good", 1_800_000_000, 1_800_000_600, 2],
        [4, drawn("audit: other", 16), "absent", 1_800_000_000, 1_800_000_060, 3],
    ]
    bodies: dict[str, Any] = {
        "challenge": [1, 2, nonce, 1],
        "answer": signed_body(b"medshard/audit-answer/v1", held),
        "answer of one that has it not": signed_body(b"medshard/audit-answer/v1", [*held[:6], 1, held[7], b"", [], b""]),
        "report": signed_body(b"medshard/audit-report/v1", [1, file_id, auditor, 1_800_000_700, rows]),
        "inventory": [1, [[file_id, 4], [nonce, 0]]],
        "held": [1, b"\1\0"],
    }
    messages = [{"what": what, "value": as_json(value), "bytes": pack(value).hex()} for what, value in bodies.items()]
    return {"origin": origin, "tls_key": raw_public(seed).hex(), "messages": messages}


def receipts() -> list[dict[str, Any]]:
    """A node that held a shard of an erased file, and one that held none of a retired one."""
    origin, made = "consortium.example/log", []
    for what, type_, shard, keys in (("an erasure", 11, [4], 2), ("a retirement, nothing held", 10, [], 0)):
        seed = drawn(f"receipt of {what}: tls key", 32)
        body = [1, drawn(f"receipt of {what}: file", 32), 1234, type_, drawn(f"receipt of {what}: node", 16), shard, keys, 1_800_000_000]
        name = origin.encode()
        signature = signed(seed, b"medshard/ending-receipt/v1" + len(name).to_bytes(2, "big") + name + pack(body))
        made.append({"what": what, "origin": origin, "tls_key": seed.hex(), "receipt": pack([*body, signature]).hex()})
    return made


def added(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def page(about: str, content: dict[str, Any]) -> str:
    head = {
        "about": f"{about} Bytes are hex. Made by tools/make_vectors.py with msgpack, pycryptodome, reedsolo and blake3, not with medshard."
    }
    return json.dumps({**head, **content}, indent=1, ensure_ascii=False) + "\n"


def pages() -> dict[str, str]:
    """What belongs into each file, by its name."""
    sizes = [
        0,
        1,
        1024,
        1025,
        1056,
        1057,
        4096,
        4097,
        65536,
        65537,
        1_000_000,
        2**20 + 1,
        100 * 2**20,
        100 * 2**20 + 1,
        2**30 + 1,
        2**40 + 1,
    ]
    stored = objects()
    public = {"nodes", "owner", "tags", "evidence", "manifest", "manifest_sha256"}
    secret = {"plain", "padded_size", "file_key", "content_key", "header_key", "header", "vault_key", "shards", "cell_digests", "salts"}
    sealing = [{key: value for key, value in item.items() if key not in public} for item in stored]
    manifests = [{key: value for key, value in item.items() if key not in secret} for item in stored]
    refused = refused_manifests(bytes.fromhex(stored[1]["manifest"]))
    files = [key_file("a passphrase that a person chose", "drei Häuser, kein Dach", 15, 8, 3), key_file("a drawn one", "x7!", 12, 8, 3)]
    return {
        "encoding": page("Canonical msgpack, see docs/formats/encoding.md.", encodings()),
        "sealing": page(
            "Sealed files and their shards, see docs/formats/sealing.md and shard.md.",
            {"padme": [[size, padded(size)] for size in sizes], "objects": sealing},
        ),
        "manifest": page(
            "Manifests of the objects in sealing.json, see docs/formats/manifest.md.", {"manifests": manifests, "refused": refused}
        ),
        "keyfile": page("Key files, see docs/formats/key-file.md.", {"files": files}),
        "sharing": page(
            "Keys to seal to, sealed grants and sealed reasons, see docs/formats/sharing.md.",
            {"keys": sealing_keys(), "grants": grants(sealing_keys()), "reasons": reasons()},
        ),
        "repair": page(
            "Sums of a chain, its order, and the bodies of a repair, see docs/formats/repair.md.", {"chains": repairs(), **repair_orders()}
        ),
        "audit": page("Tags of cells, and the bodies of audits, see docs/formats/audit.md.", {"tags": audit_tags(), **audit_messages()}),
        "ending": page("Receipts of nodes for what they destroyed, see docs/formats/ending.md.", {"receipts": receipts()}),
        "wire": page("Bodies between client and node, see docs/formats/wire.md.", {"messages": messages()}),
    }


def padded(size: int) -> int:
    """Padmé (Nikitin et al., PETS 2019, algorithm 1), and 1 KiB at least: keep as many bits as the length of the length's length."""
    if size <= 1024:
        return 1024
    e = size.bit_length() - 1  # floor(log2 L)
    s = e.bit_length()  # floor(log2 E) + 1
    low = e - s
    return -(-size >> low) << low


if __name__ == "__main__":
    for name, text in pages().items():
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
