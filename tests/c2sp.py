"""A second reader of our logs, written from the C2SP specifications alone: signed-note, tlog-checkpoint, tlog-cosignature, tlog-tiles,
tlog-policy and tlog-proof. No medshard code, and other libraries than medshard's. It knows nothing of what entries mean.
"""

from __future__ import annotations

import base64
import hashlib
import sys
from pathlib import Path

from Crypto.PublicKey import MLDSA
from Crypto.Signature import eddsa, mldsa


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


# -- tlog-policy and vkeys


class Policy:
    """``log``, ``witness``, ``group`` and ``quorum`` lines."""

    def __init__(self, text: str) -> None:
        self.logs: list[tuple[str, bytes, int, bytes]] = []
        self.witnesses: dict[str, tuple[str, bytes, int, bytes]] = {}
        self.groups: dict[str, tuple[int, list[str]]] = {}
        self.quorum = ""
        for line in text.splitlines():
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if words[0] == "log":
                self.logs.append(vkey(words[1]))
            elif words[0] == "witness":
                assert words[1] not in self.witnesses
                self.witnesses[words[1]] = vkey(words[2])
            elif words[0] == "group":
                members = words[3:]
                assert all(each in self.witnesses or each in self.groups for each in members)
                threshold = {"any": 1, "all": len(members)}.get(words[2]) or int(words[2])
                assert 1 <= threshold <= len(members)
                self.groups[words[1]] = (threshold, members)
            else:
                assert words[0] == "quorum", line
                self.quorum = words[1]
        keys = [key for *_, key in [*self.logs, *self.witnesses.values()]]
        assert len(set(keys)) == len(keys), "duplicate keys"

    def satisfied(self, witnesses: set[str]) -> bool:
        def holds(name: str) -> bool:
            if name not in self.groups:
                return name in witnesses
            threshold, members = self.groups[name]
            return sum(map(holds, members)) >= threshold

        return holds(self.quorum)


def vkey(text: str) -> tuple[str, bytes, int, bytes]:
    name, key_id, rest = text.split("+", 2)
    blob = base64.b64decode(rest, validate=True)
    assert sha256(name.encode() + b"\n" + blob)[:4].hex() == key_id
    return name, bytes.fromhex(key_id), blob[0], blob[1:]


# -- signed-note, tlog-checkpoint, tlog-cosignature


def open_checkpoint(note: str, policy: Policy) -> tuple[int, bytes]:
    """Size and root of a checkpoint that satisfies the policy; AssertionError otherwise."""
    head, _, tail = note.rpartition("\n\n")
    text = head + "\n"
    origin, size, root = text.split("\n")[:3]
    assert text == f"{origin}\n{int(size)}\n{root}\n"
    lines = []
    for line in tail.splitlines():
        dash, name, blob = line.split(" ")
        assert dash == "\u2014"
        data = base64.b64decode(blob, validate=True)
        lines.append((name, data[:4], data[4:]))
    by_log = [key for key in policy.logs for line in lines if line[:2] == key[:2] and key[0] == origin and check(key, line[2], text)]
    assert by_log, "no log key"
    witnesses = {who for who, key in policy.witnesses.items() for line in lines if line[:2] == key[:2] and check(key, line[2], text)}
    assert policy.satisfied(witnesses), "the quorum does not hold"
    return int(size), base64.b64decode(root)


def check(key: tuple[str, bytes, int, bytes], signature: bytes, text: str) -> bool:
    name, _, kind, public = key
    origin, size, root = text.split("\n")[:3]
    if kind == 1:
        eddsa.new(eddsa.import_public_key(public), "rfc8032").verify(text.encode(), signature)
        return True
    time, signature = int.from_bytes(signature[:8], "big"), signature[8:]
    if kind == 4:
        eddsa.new(eddsa.import_public_key(public), "rfc8032").verify(f"cosignature/v1\ntime {time}\n{text}".encode(), signature)
        return True
    assert kind == 6, "an unknown kind of signature"
    message = b"subtree/v1\n\0" + bytes([len(name)]) + name.encode() + time.to_bytes(8, "big")
    message += bytes([len(origin)]) + origin.encode() + bytes(8) + int(size).to_bytes(8, "big") + base64.b64decode(root)
    mldsa.new(MLDSA.construct(param_set=MLDSA.ML_DSA_44, pk=public)).verify(message, signature)
    return True


# -- tlog-tiles


def tile_path(level: int | str, number: int, width: int = 256) -> str:
    parts = [f"{number % 1000:03d}"]
    while number >= 1000:
        number //= 1000
        parts.insert(0, f"x{number % 1000:03d}")
    return f"tile/{level}/{'/'.join(parts)}" + ("" if width == 256 else f".p/{width}")


def mth(hashes: list[bytes]) -> bytes:
    """The Merkle Tree Hash of RFC 6962 over leaf hashes, as it is defined there."""
    if not hashes:
        return sha256(b"")
    if len(hashes) == 1:
        return hashes[0]
    split = 1 << (len(hashes) - 1).bit_length() - 1
    return sha256(b"\x01" + mth(hashes[:split]) + mth(hashes[split:]))


def check_log(folder: Path, policy: Policy) -> int:
    """Read a whole log in static files; every tile of every level is compared with what the entries give. How many entries it has."""
    size, root = open_checkpoint((folder / "checkpoint").read_text(encoding="utf-8"), policy)
    leaves: list[bytes] = []
    for number in range(-(-size // 256)):
        width = min(256, size - number * 256)
        data = (folder / tile_path("entries", number, width)).read_bytes()
        for _ in range(width):
            length = int.from_bytes(data[:2], "big")
            assert len(data) >= 2 + length
            leaves.append(sha256(b"\x00" + data[2 : 2 + length]))
            data = data[2 + length :]
        assert not data
    level, row = 0, leaves
    while row:
        for number in range(-(-len(row) // 256)):
            hashes = row[number * 256 : number * 256 + 256]
            assert (folder / tile_path(level, number, len(hashes))).read_bytes() == b"".join(hashes)
        row = [mth(row[at : at + 256]) for at in range(0, len(row) - len(row) % 256, 256)]
        level += 1
    assert mth(leaves) == root
    return size


# -- tlog-proof


def check_proof(proof: str, leaf: bytes, policy: Policy) -> tuple[int, bytes]:
    """Index and extra data of a proof that this leaf hash is in a log that satisfies the policy."""
    head, _, note = proof.partition("\n\n")
    lines = head.split("\n")
    assert lines.pop(0) == "c2sp.org/tlog-proof@v1"
    extra = base64.b64decode(lines.pop(0).removeprefix("extra "), validate=True) if lines[0].startswith("extra ") else b""
    word, decimal = lines.pop(0).split(" ")
    assert word == "index"
    index = int(decimal)
    size, root = open_checkpoint(note, policy)
    fn, sn, at = index, size - 1, leaf  # RFC 9162, section 2.1.3.2
    assert fn <= sn
    for sibling in (base64.b64decode(line, validate=True) for line in lines):
        assert sn > 0
        if fn & 1 or fn == sn:
            at = sha256(b"\x01" + sibling + at)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            at = sha256(b"\x01" + at + sibling)
        fn, sn = fn >> 1, sn >> 1
    assert sn == 0
    assert at == root, "the path does not lead to the root"
    return index, extra


if __name__ == "__main__":
    where = Path(sys.argv[1])
    print(check_log(where, Policy((where / "policy").read_text())), "entries, whole")
