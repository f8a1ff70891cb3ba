#!/usr/bin/env python3
"""Make tests/vectors/ledger.json. No medshard code: a second implementation of entries, roster, checkpoints, tiles and proofs.

Written from docs/formats/ and the C2SP documents, with msgpack and pycryptodome (Ed25519 and ML-DSA-44); certificates are made with
`cryptography`. Every key follows from its name, every signature is deterministic. Run it after a change of a format, and read the
difference.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack
from blake3 import blake3
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF
from Crypto.PublicKey import ECC, MLDSA
from Crypto.Signature import eddsa, mldsa
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

folder = Path(__file__).parent.parent / "tests" / "vectors"
origin = "consortium.example/log"
cosigned_at = 1_700_000_000
nodes = range(4)
p25519 = 2**255 - 19


def pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def drawn(label: str, size: int) -> bytes:
    """Bytes that look random and are the same every time."""
    return hashlib.shake_256(f"medshard vectors ledger {label}".encode()).digest(size)


# -- keys


def seed(name: str) -> bytes:
    return sha256(name.encode())


def public(name: str) -> bytes:
    return bytes(ECC.construct(curve="Ed25519", seed=seed(name)).public_key().export_key(format="raw"))


def sign(name: str, message: bytes) -> bytes:
    return bytes(eddsa.new(ECC.construct(curve="Ed25519", seed=seed(name)), "rfc8032").sign(message))


def pq_public(name: str) -> bytes:
    return bytes(MLDSA.construct(param_set=MLDSA.ML_DSA_44, seed=seed(name)).pk)


def pq_sign(name: str, message: bytes) -> bytes:
    return bytes(mldsa.new(MLDSA.construct(param_set=MLDSA.ML_DSA_44, seed=seed(name)), deterministic=True).sign(message))


# -- the tree: RFC 6962, section 2.1, as written there


def tree_head(leaves: Sequence[bytes]) -> bytes:
    """MTH over leaf hashes."""
    if not leaves:
        return sha256(b"")
    if len(leaves) == 1:
        return leaves[0]
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return sha256(b"\x01" + tree_head(leaves[:split]) + tree_head(leaves[split:]))


def audit_path(at: int, leaves: Sequence[bytes]) -> list[bytes]:
    """PATH(m, D[n]), section 2.1.1."""
    if len(leaves) == 1:
        return []
    split = 1 << (len(leaves) - 1).bit_length() - 1
    if at < split:
        return [*audit_path(at, leaves[:split]), tree_head(leaves[split:])]
    return [*audit_path(at - split, leaves[split:]), tree_head(leaves[:split])]


def consistency(old: int, leaves: Sequence[bytes], whole: bool = True) -> list[bytes]:
    """SUBPROOF(m, D[n], b), section 2.1.2."""
    if old == len(leaves):
        return [] if whole else [tree_head(leaves)]
    split = 1 << (len(leaves) - 1).bit_length() - 1
    if old <= split:
        return [*consistency(old, leaves[:split], whole), tree_head(leaves[split:])]
    return [*consistency(old - split, leaves[split:], False), tree_head(leaves[:split])]


def leaf(entry: bytes) -> bytes:
    return sha256(b"\x00" + entry)


# -- the roster


def certificate(name: str, organization: str) -> bytes:
    """As docs/formats/identity.md has a CA."""
    key = Ed25519PrivateKey.from_private_bytes(seed(name))
    common = f"medshard CA {public(name).hex()[:16]}"
    subject = x509.Name(
        [x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, organization), x509.NameAttribute(x509.NameOID.COMMON_NAME, common)]
    )
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), int.from_bytes(drawn(name, 15), "big"))
    builder = builder.not_valid_before(datetime(2025, 1, 1, tzinfo=UTC)).not_valid_after(datetime(2055, 1, 1, tzinfo=UTC))
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = builder.add_extension(own, critical=False)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(True, 0), critical=True)
    builder = builder.add_extension(x509.KeyUsage(False, False, False, False, False, True, False, False, False), critical=True)
    builder = builder.add_extension(x509.NameConstraints([x509.DNSName("node.medshard")], None), critical=True)
    return builder.sign(key, None).public_bytes(Encoding.DER)


def log_name(number: int) -> str:
    return f"log {number}" if number else "log"


def node_id(number: int) -> bytes:
    return sha256(public(f"tls {number}"))[:16]


def roster() -> bytes:
    institutions = [[f"Institution {n}", certificate(f"ca {n}", f"Institution {n}"), public(f"ca {n}"), []] for n in nodes]
    institutions[3][3] = [certificate("former ca 3", "Institution 3")]
    members = []
    for n in nodes:
        head = [node_id(n), f"node{n}", n, f"https://127.0.0.1:{9700 + n}", 10**12]
        members.append([*head, public(f"tls {n}"), public(f"cosigner {n}"), public(log_name(n)) if n < 2 else b"", pq_public(f"pq {n}")])
    emergency, auditors = [public("vault")], drawn("auditors", 1216)
    return pack([2, origin, 0, bytes(32), node_id(0), institutions, members, [2, 4, 4], emergency, auditors])


def with_keepers(genesis: bytes) -> bytes:
    """The next roster, in which Institution 1 has keepers."""
    _, origin_, _, _, sequencer, institutions, *rest = msgpack.unpackb(genesis)
    institutions[1] += [sorted([public("vault"), public("reader")])]
    return pack([2, origin_, 1, sha256(genesis), sequencer, institutions, *rest])


def successor(genesis: bytes, note: str, leaves: Sequence[bytes]) -> dict[str, str]:
    """The same consortium under another origin, as if its log had ended with these entries; signed by three of four."""
    _, _, *rest = msgpack.unpackb(genesis)
    before = [[origin, sha256(genesis), len(leaves), tree_head(leaves)]]
    new = pack([3, "consortium.example/log-2", *rest, before])
    signed = b"medshard/successor/v1" + sha256(genesis) + sha256(new)
    signatures = sorted([public(f"ca {n}"), sign(f"ca {n}", signed)] for n in (0, 1, 2))
    document = pack([1, genesis, [], note.encode(), new, signatures])
    return {"roster": new.hex(), "signed": signed.hex(), "document": document.hex()}


# -- entries


def entry(author: str, type_: int, body: list[Any]) -> dict[str, str]:
    names = [
        "",
        "ROSTER",
        "REGISTER",
        "GRANT",
        "REVOKE",
        "ACCESS",
        "MOVE",
        "RETAIN",
        "HOLD",
        "RELEASE",
        "RETIRE",
        "ERASE",
        "TIMESTAMP",
        "FREEZE",
        "PROPOSE",
    ]
    signed = b"medshard/entry/v1" + len(origin).to_bytes(2, "big") + origin.encode() + bytes([type_]) + pack(body)
    whole = pack([1, type_, body, public(author), sign(author, signed)])
    return {"author": author, "type": names[type_], "signed": signed.hex(), "entry": whole.hex(), "leaf": leaf(whole).hex()}


def nonce(number: int) -> bytes:
    return bytes([number]) * 16


def registered() -> dict[str, bytes]:
    """What is registered under one file id: two documents in a pack."""
    file_id, file_key, owner = drawn("file id", 32), drawn("file key", 32), public("vault")
    evidence_key = HKDF(file_key, 32, file_id, SHA256, context=b"medshard/evidence/v1")
    assert isinstance(evidence_key, bytes)
    documents = [b"Versicherungsschein Nr. 7\n", b"Nachtrag 1\n"]
    salts = [hmac.new(evidence_key, at.to_bytes(8, "big"), "sha256").digest() for at in range(2)]
    label = b"\x00medshard/evidence/leaf/v1"
    leaves = [
        sha256(label + owner + file_id + salt + len(document).to_bytes(8, "big") + sha256(document))
        for salt, document in zip(salts, documents, strict=True)
    ]
    content, evidence = drawn("manifest's SHA-256", 32), tree_head(leaves)
    return {
        "document": documents[1],
        "file_id": file_id,
        "salt": salts[1],
        "neighbour": leaves[0],
        "content": content,
        "manifest_hash": sha256(b"medshard/manifest/v2" + evidence + content),
    }


def in_the_log(genesis: bytes, made: dict[str, bytes]) -> list[dict[str, str]]:
    return [
        entry("log", 1, [0, sha256(genesis), bytes(16)]),
        entry("ca 0", 1, [1, public("vault"), 0, nonce(1)]),
        entry("vault", 2, [made["file_id"], made["manifest_hash"], nonce(2)]),
        entry("vault", 5, [[made["file_id"]], 2, b"", nonce(3)]),
        entry("tls 1", 12, [3, b"r" * 32, b"a token", nonce(4)]),
    ]


def other_forms(made: dict[str, bytes]) -> list[dict[str, str]]:
    """The types that are not in the log of these vectors, one entry each."""
    file_id, other = made["file_id"], drawn("another file", 32)
    return [
        entry("ca 1", 1, [2, b"n" * 32, nonce(5)]),
        entry("ca 0", 1, [3, public("vault"), nonce(6)]),
        entry("vault", 3, [[file_id, other], public("reader"), 1_800_000_000, 2, nonce(7)]),
        entry("vault", 4, [b"g" * 32, nonce(8)]),
        entry("vault", 5, [[file_id], 7, b"a sealed reason", nonce(9)]),
        entry("tls 2", 6, [file_id, 3, node_id(2), nonce(10)]),
        entry("vault", 7, [file_id, 2**40, nonce(11)]),
        entry("vault", 8, [file_id, nonce(12)]),
        entry("vault", 9, [b"h" * 32, nonce(13)]),
        entry("vault", 10, [file_id, 1_800_000_000, nonce(14)]),
        entry("vault", 11, [file_id, 1_800_000_000, nonce(15)]),
        entry("ca 3", 13, [bytes(32), nonce(16)]),
        entry("vault", 14, [9, file_id, 1, nonce(17)]),
        entry("ca 0", 1, [4, public("vault"), public("reader"), *(sign(name, rotation()) for name in ("vault", "reader")), nonce(18)]),
        entry("ca 0", 1, [5, public("reader"), public("vault"), nonce(19)]),
    ]


def rotation() -> bytes:
    """What both keys sign when one comes in the place of the other."""
    return b"medshard/rotation/v1" + len(origin).to_bytes(2, "big") + origin.encode() + public("vault") + public("reader")


# -- checkpoints


def key_id(name: str, kind: int, key: bytes) -> bytes:
    return sha256(name.encode() + b"\n" + bytes([kind]) + key)[:4]


def vkey(name: str, kind: int, key: bytes) -> str:
    return f"{name}+{key_id(name, kind, key).hex()}+{b64(bytes([kind]) + key)}"


def line(name: str, kind: int, key: bytes, signature: bytes) -> str:
    return f"\u2014 {name} {b64(key_id(name, kind, key) + signature)}\n"


def ed25519_line(number: int, text: str) -> str:
    name, key = f"{origin}/node{number}", f"cosigner {number}"
    signature = sign(key, f"cosignature/v1\ntime {cosigned_at}\n{text}".encode())
    return line(name, 4, public(key), cosigned_at.to_bytes(8, "big") + signature)


def ml_dsa_line(number: int, text: str) -> str:
    name, key = f"{origin}/node{number}", f"pq {number}"
    _, size, root, _ = text.split("\n")
    message = b"subtree/v1\n\x00" + bytes([len(name)]) + name.encode() + cosigned_at.to_bytes(8, "big")
    message += bytes([len(origin)]) + origin.encode() + bytes(8) + int(size).to_bytes(8, "big") + base64.b64decode(root)
    return line(name, 6, pq_public(key), cosigned_at.to_bytes(8, "big") + pq_sign(key, message))


def voucher(cosigner: int, reader: int, text: str) -> bytes:
    """What one node tells another of its cosignature; nothing to itself."""
    if cosigner == reader:
        return bytes(16)
    mine, other = public(f"cosigner {cosigner}"), public(f"cosigner {reader}")
    y = int.from_bytes(other, "little") & (1 << 255) - 1
    u = (1 + y) * pow(1 - y, -1, p25519) % p25519  # the same point on Curve25519
    scalar = X25519PrivateKey.from_private_bytes(hashlib.sha512(seed(f"cosigner {cosigner}")).digest()[:32])
    secret = scalar.exchange(X25519PublicKey.from_public_bytes(u.to_bytes(32, "little")))
    key = blake3(secret, derive_key_context="medshard 2026 voucher between two cosigners v1").digest()
    signed = cosigned_at.to_bytes(8, "big") + sign(f"cosigner {cosigner}", f"cosignature/v1\ntime {cosigned_at}\n{text}".encode())
    return bytes(blake3(mine + other + signed + text.encode(), key=key).digest(16))


def vouchers(cosigner: int, text: str) -> bytes:
    return b"".join(voucher(cosigner, reader, text) for reader in range(4))


def checkpoint(leaves: Sequence[bytes], *, full: bool) -> str:
    text = f"{origin}\n{len(leaves)}\n{b64(tree_head(leaves))}\n"
    signed = line(origin, 1, public("log"), sign("log", text.encode()))
    lines = [signed, *(ed25519_line(n, text) for n in range(3)), *(ml_dsa_line(n, text) for n in range(1, 4) if full)]
    return text + "\n" + "".join(lines)


# -- the proof for outsiders


def proof(made: dict[str, bytes], entries: Sequence[bytes], notes: tuple[str, str]) -> str:
    leaves = [leaf(each) for each in entries]
    first, full = notes
    opening = [made["content"], made["salt"], len(made["document"]), sha256(made["document"]), 1, 2, made["neighbour"]]
    enrolment = [1, entries[1], b"".join(audit_path(1, leaves))]
    earlier = [[first.encode(), b"".join(audit_path(2, leaves))]]
    extra = pack([1, entries[2], opening, enrolment, [], earlier, []])
    path = "".join(b64(item) + "\n" for item in audit_path(2, leaves))
    return f"c2sp.org/tlog-proof@v1\nextra {b64(extra)}\nindex 2\n{path}\n{full}"


# -- messages


def messages(entries: Sequence[bytes], note: str) -> dict[str, str]:
    leaves, signed = [leaf(each) for each in entries], note.encode()
    inclusion = [2, entries[2], audit_path(2, leaves), signed]
    promised = b"medshard/takeover/v1" + pack([origin, 7, node_id(1)])
    text = note.partition("\n\n")[0] + "\n"
    both = "".join(ed25519_line(0, text))
    bodies: dict[str, Any] = {
        "append": [1, [entries[2], entries[4]]],
        "appended": [1, signed, [[n, audit_path(n, leaves)] for n in (2, 4)], sorted([node_id(n), vouchers(n, text)] for n in range(3))],
        "registration": [1, inclusion],
        "places": [1, 1, [4], [[5, 6, 7]]],
        "push": [2, 7, 3, 3, list(entries[3:]), signed, signed, consistency(3, leaves), b""],
        "cosignature": [2, both.encode(), vouchers(0, text)],
        "cosignatures": [1, both.encode(), ml_dsa_line(0, text).encode()],
        "size": [2, 3, 2],
        "fence": [2, 7, node_id(1)],
        "report": [2, 7, node_id(1), 1, 7, 5, signed, signed],
        "promise": [2, 7, sign(log_name(1), promised)],
    }
    return {name: pack(body).hex() for name, body in bodies.items()} | {"promise_signed": promised.hex()}


def pages() -> dict[str, str]:
    """What belongs into each file, by its name."""
    genesis, made = roster(), registered()
    log, others = in_the_log(genesis, made), other_forms(made)
    entries = [bytes.fromhex(item["entry"]) for item in log]
    leaves = [leaf(each) for each in entries]
    notes = checkpoint(leaves, full=False), checkpoint(leaves, full=True)
    roles = [f"{role} {n}" for n in nodes for role in ("ca", "tls", "cosigner")]
    names = ["log", "log 1", "vault", "reader", *roles]
    vkeys = {"log": vkey(origin, 1, public("log"))}
    vkeys |= {f"cosigner {n}": vkey(f"{origin}/node{n}", 4, public(f"cosigner {n}")) for n in nodes}
    vkeys |= {f"pq {n}": vkey(f"{origin}/node{n}", 6, pq_public(f"pq {n}")) for n in nodes}
    content = {
        "about": "Entries, roster, checkpoints, tiles and proofs, see docs/formats/ledger.md, roster.md, checkpoint.md, proof.md. Bytes "
        "are hex. The seed of each key is the SHA-256 of its name. Made by tools/make_ledger_vectors.py, not with medshard.",
        "keys": {name: {"seed": seed(name).hex(), "public": public(name).hex()} for name in names},
        "pq_keys": {f"pq {n}": {"seed": seed(f"pq {n}").hex(), "public": pq_public(f"pq {n}").hex()} for n in nodes},
        "roster": {"bytes": genesis.hex(), "sha256": sha256(genesis).hex()},
        "roster_with_keepers": with_keepers(genesis).hex(),
        "entries": log,
        "forms": others,
        "roots": [tree_head(leaves[:size]).hex() for size in range(6)],
        "consistency_3_to_5": [item.hex() for item in consistency(3, leaves)],
        "vkeys": vkeys,
        "checkpoint": notes[0],
        "full_checkpoint": notes[1],
        "inclusion_of_2": pack([2, entries[2], audit_path(2, leaves), notes[0].encode()]).hex(),
        "successor": successor(genesis, notes[0], leaves),
        "messages": messages(entries, notes[0]),
        "tile_0_000.p_5": b"".join(leaves).hex(),
        "bundle_000.p_5": b"".join(len(each).to_bytes(2, "big") + each for each in entries).hex(),
        "proof": {"document": made["document"].hex(), "text": proof(made, entries, notes)},
    }
    return {"ledger": json.dumps(content, indent=1, ensure_ascii=False) + "\n"}


if __name__ == "__main__":
    for name, text in pages().items():
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
