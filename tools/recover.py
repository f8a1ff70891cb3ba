#!/usr/bin/env python3
"""Restore files from a medshard store, without medshard.

To restore a file you need
  - the key file of the vault that stored it (`vault.key`) and its passphrase,
  - the file's manifest, and any k of its n shards. Nodes keep both: a node's data folder holds store.sqlite and shards/.
and Python with three packages: msgpack, reedsolo, pycryptodome. With the package blake3 too, damaged shards are recognised before
they are used; without it they are found all the same, by decryption failing, only slower.

How a file was stored, in the order in which this program undoes it (docs/formats/ has every byte):
  1. plaintext, padded with zeros, cut into segments; each segment sealed with AES-256-GCM              -> open_stripe
  2. each sealed segment, cut into k cells; n - k parity cells added by a Reed-Solomon code: a stripe   -> data_of_stripe
  3. shard i: cell i of every stripe, one after the other; n shards on n nodes                          -> Shard, find_shards
  4. the manifest: sizes, shard roots, the sealed header (names, hashes), the wrapped file key          -> Manifest, StoredObject
  5. the key file: the vault's root key under a passphrase                                              -> open_key_file
All structures are msgpack arrays. Nothing here talks to a network, and nothing that is stored is changed.
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import hmac
import os
import re
import sqlite3
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, islice
from pathlib import Path
from typing import Any

try:
    import msgpack
    from Crypto.Cipher import AES
    from Crypto.Hash import SHA256
    from Crypto.Protocol.KDF import HKDF, scrypt
    from Crypto.PublicKey import ECC
    from reedsolo import RSCodec
except ImportError as missing:
    sys.exit(f"recover: {missing}. Install the packages: pip install msgpack reedsolo pycryptodome")
try:
    from blake3 import blake3
except ImportError:
    blake3 = None  # type: ignore[assignment,misc]

ABSENT, REFUSED, TOO_FEW, DAMAGED, LOCAL, PARTIAL = 3, 4, 5, 6, 7, 8  # exit codes; 2 is a wrong command line
TAG = 16  # bytes of a GCM tag, at the end of everything sealed
ATTEMPTS_MAX = 10_000  # choices of k shards to try for one stripe before it counts as lost

Keys = namedtuple("Keys", "vault lookup")  # one opens the wraps of file keys, one makes the tags by which nodes find a file
Target = namedtuple("Target", "name offset size sha256")  # a file that can be restored: an object of its own, or a pack's member


class Trouble(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code  # the exit code


def say(text: str) -> None:
    print(f"recover: {text}", file=sys.stderr)


def unpack(data: bytes, count: int, what: str) -> list[Any]:
    try:
        items = msgpack.unpackb(data, raw=False)
    except Exception as error:  # msgpack raises many kinds, all of which mean the same
        raise Trouble(DAMAGED, f"this is no {what}: {error}") from None
    if not isinstance(items, list) or len(items) != count:
        raise Trouble(DAMAGED, f"this is no {what}: expected an array of {count}")
    return items


def gcm_open(key: bytes, nonce: bytes, sealed: bytes, aad: bytes = b"") -> bytes | None:
    """AES-256-GCM: the plaintext, or None when key or bytes are wrong. The tag is the last 16 bytes."""
    cipher = AES.new(key, AES.MODE_GCM, nonce=nonce)
    cipher.update(aad)
    try:
        return cipher.decrypt_and_verify(sealed[:-TAG], sealed[-TAG:])
    except ValueError:
        return None


def hkdf(key: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    return HKDF(key, length, salt, SHA256, context=info)


# -- the key file: docs/formats/key-file.md


def open_key_file(data: bytes, passphrase: bytes) -> Keys:
    """[magic, "scrypt", salt, log2 N, r, p, public key, nonce, root key sealed with what scrypt makes of the passphrase]."""
    magic, kdf, salt, log2_n, r, p, public, nonce, sealed = unpack(data, 9, "key file")
    if (magic, kdf) != ("medshard/keyfile/v1", "scrypt"):
        raise Trouble(DAMAGED, f"this is no key file of the only kind known here, but of {magic!r}, {kdf!r}")
    try:
        stretched = scrypt(passphrase, salt, 32, 1 << log2_n, r, p)
    except (TypeError, ValueError) as error:
        raise Trouble(DAMAGED, f"this is no key file: {error}") from None
    root = gcm_open(stretched, nonce, sealed, aad=msgpack.packb([magic, kdf, salt, log2_n, r, p, public]))
    if root is None:
        raise Trouble(REFUSED, "the passphrase does not open the key file (or the key file is damaged)")

    def derive(purpose: str) -> bytes:
        return hkdf(root, b"", f"medshard/vault/v1/{purpose}".encode())

    signing = ECC.construct(curve="Ed25519", seed=derive("signing"))
    if signing.public_key().export_key(format="raw") != public:
        raise Trouble(DAMAGED, "the key file's public key is not the one that its root key gives")
    return Keys(derive("vault"), derive("lookup"))


# -- the manifest and the sealed header: docs/formats/manifest.md, header.md


class Manifest:
    """What nodes keep beside a shard. Anybody can read it; names and hashes are in the sealed header."""

    def __init__(self, data: bytes) -> None:
        items = unpack(data, 14, "manifest")
        version, self.file_id, self.k, self.n, self.cell_size, self.sealed_size = items[:6]
        self.digest, self.commitment, shards, self.owner, self.header, self.wrap, self.tags = items[6:13]  # the 14th is for proofs
        if version != 2:
            raise Trouble(DAMAGED, f"this is no manifest of version 2, the only one known here, but of {version!r}")
        try:
            self.roots = [bytes(root) for _node, root in shards]
            sound = 1 <= self.k <= self.n == len(self.roots) <= 255 and self.k * self.cell_size > TAG < self.sealed_size
        except (TypeError, ValueError):
            sound = False
        if not sound:
            raise Trouble(DAMAGED, "this is no manifest: its numbers do not fit together")
        self.stripe_size = self.k * self.cell_size
        self.stripes = -(-self.sealed_size // self.stripe_size)  # -(-a // b) is a / b rounded up
        self.shard_size = (self.stripes - 1) * self.cell_size + self.cell_length(self.stripes - 1)

    def segment_length(self, stripe: int) -> int:
        """Bytes of ciphertext and tag in one stripe; the last stripe has fewer than the others."""
        return int(min(self.stripe_size, self.sealed_size - stripe * self.stripe_size))

    def cell_length(self, stripe: int) -> int:
        return int(-(-self.segment_length(stripe) // self.k))

    def root_of(self, shard: Shard) -> bytes | None:
        """The tree head over the digests of a shard's cells; None when the digest cannot be computed here."""
        hasher: Any = {"blake3": blake3, "sha256": hashlib.sha256}.get(self.digest)
        if hasher is None:
            return None
        cells = (shard.cell(self, stripe) or b"" for stripe in range(self.stripes))
        return tree_root([hasher(cell).digest() for cell in cells], lambda data: hasher(data).digest())


class StoredObject:
    """A manifest opened with the vault's key. Raises Trouble when the key is not the right one."""

    def __init__(self, manifest: Manifest, keys: Keys) -> None:
        self.manifest = manifest
        file_id = manifest.file_id
        file_key = gcm_open(hkdf(keys.vault, file_id, b"medshard/wrap/v1"), bytes(12), manifest.wrap)
        if file_key is None:
            raise Trouble(REFUSED, f"file {file_id.hex()[:16]} belongs to another vault: this key does not open it")
        derived = hkdf(file_key, file_id, b"medshard/file/v1", 96)
        self.content_key, header_key, commitment = derived[:32], derived[32:64], derived[64:]
        # GCM alone would let a clever sealer make one ciphertext that opens under two keys. The commitment rules that out.
        if not hmac.compare_digest(commitment, manifest.commitment):
            raise Trouble(DAMAGED, f"file {file_id.hex()[:16]}: the manifest commits to another key")
        header = gcm_open(header_key, manifest.header[:12], manifest.header[12:], aad=b"medshard/header/v1")
        if header is None:
            raise Trouble(DAMAGED, f"file {file_id.hex()[:16]}: the sealed header does not open")
        _version, kind, name, size, sha256, _time, _type, _attributes, members = unpack(header, 9, "header")
        self.targets = [Target(*member[:4]) for member in members] if kind == 1 else [Target(name, 0, size, sha256)]
        self.last: tuple[int, bytes] = (-1, b"")  # the stripe opened last: small members of a pack share stripes


# -- shards: docs/formats/shard.md


@dataclass
class Shard:
    """One shard that was found. ``blame`` is more than 0 when it is damaged somewhere; it is then used where others do not suffice."""

    index: int
    path: Path
    data: bytes | None = None  # of a small shard, which a node keeps inside store.sqlite
    blame: int = 0

    def cell(self, manifest: Manifest, stripe: int) -> bytes | None:
        """Cell ``stripe``, unchecked; None when it cannot be read."""
        offset, length = stripe * manifest.cell_size, manifest.cell_length(stripe)
        cell = (self.data or b"")[offset : offset + length]
        if self.data is None:
            with suppress(OSError), open(self.path, "rb") as file:
                file.seek(offset)
                cell = file.read(length)
        return cell if len(cell) == length else None


def tree_root(digests: Sequence[bytes], digest: Callable[[bytes], bytes]) -> bytes:
    """RFC 6962: leaves hash with 00 in front, pairs with 01; a last one without a pair moves up as it is."""
    level = [digest(b"\x00" + item) for item in digests] or [digest(b"")]
    while len(level) > 1:
        pairs = [digest(b"\x01" + level[i] + level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(level) - len(level) % 2 :]
    return level[0]


def index_of(path: Path, manifest: Manifest) -> int | None:
    """Which shard of this file a file on disk is: by the name that nodes give it, by its root, or by the number its name ends in."""
    named = re.fullmatch(r"([0-9a-f]{64})-([0-9a-f]{16})", path.name)
    if named:  # shards/ab/<file id>-<first 8 bytes of the root>
        roots = [root.hex()[:16] for root in manifest.roots]
        return roots.index(named[2]) if named[1] == manifest.file_id.hex() and named[2] in roots else None
    if path.stat().st_size == manifest.shard_size and (root := manifest.root_of(Shard(0, path))) in manifest.roots:
        return manifest.roots.index(root)
    number = re.search(r"(\d{1,3})$", path.stem)
    return int(number[1]) if number and int(number[1]) < manifest.n else None


def find_shards(manifest: Manifest, folders: Sequence[Path], stores: Sequence[Store]) -> list[Shard]:
    """Every shard of this file at hand, one for each index at most; of two, the undamaged one."""
    candidates = [shard for store in stores for shard in store.shards_of(manifest)]
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    candidates += [Shard(index, path) for path in paths if (index := index_of(path, manifest)) is not None]
    found: dict[int, Shard] = {}
    for shard in candidates:
        root = manifest.root_of(shard)
        if root not in (None, manifest.roots[shard.index]):
            shard.blame = 1
            say(f"shard {shard.index} is damaged: {shard.path}")
        if shard.index not in found or shard.blame < found[shard.index].blame:
            found[shard.index] = shard
    if blake3 is None and manifest.digest == "blake3":
        say("shards are not checked beforehand (install the package blake3 for that); decryption finds what is damaged")
    return list(found.values())


class Store:
    """A node's data folder, read only: store.sqlite knows manifests, tags and shards; large shards are files beside it."""

    def __init__(self, catalog: Path) -> None:
        self.folder, self.uri, self.readable = catalog.parent, catalog.resolve().as_uri(), True

    def rows(self, query: str, *values: bytes) -> list[tuple[Any, ...]]:
        for mode in ("mode=ro", "immutable=1") if self.readable else ():  # the second for a medium that cannot be written
            try:
                with closing(sqlite3.connect(f"{self.uri}?{mode}", uri=True)) as db:
                    return db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                problem = error
        if self.readable:
            say(f"{self.folder}/store.sqlite cannot be read: {problem}. Its large shards can still be used: --shards {self.folder}/shards")
        self.readable = False
        return []

    def manifests(self, tag: bytes | None) -> list[bytes]:
        if tag is None:
            return [row[0] for row in self.rows("SELECT bytes FROM manifests")]
        return [row[0] for row in self.rows("SELECT bytes FROM manifests JOIN tags USING(file_id) WHERE tag = ?", tag)]

    def shards_of(self, manifest: Manifest) -> Iterator[Shard]:
        name = manifest.file_id.hex()
        for index, root, data in self.rows("SELECT idx, root, data FROM shards WHERE file_id = ?", manifest.file_id):
            if root in manifest.roots[index : index + 1]:
                yield Shard(index, self.folder / "shards" / name[:2] / f"{name}-{root.hex()[:16]}", data)


# -- the erasure code: docs/formats/erasure-code.md


@lru_cache(maxsize=256)
def times(factor: int) -> bytes:
    """The products of ``factor`` and 0 to 255 in GF(2^8) modulo x^8 + x^4 + x^3 + x^2 + 1, as a table for bytes.translate."""
    table = bytearray(256)
    for x in range(256):
        a, b = factor, x
        while b:
            table[x] ^= a if b & 1 else 0
            a = a << 1 ^ (0x11D if a & 0x80 else 0)
            b >>= 1
    return bytes(table)


@lru_cache(maxsize=4096)
def recipe(k: int, n: int, have: tuple[int, ...]) -> list[bytes]:
    """For each data cell, the factors by which the k cells ``have`` add up (XOR) to it.

    The code is linear, so it is enough to ask reedsolo for the data when one of these cells holds a 1 and the others 0.
    """
    codec, lost = RSCodec(n - k, nsize=n), [i for i in range(n) if i not in have]
    answers = [codec.decode(bytes(i == one for i in range(n)), erase_pos=lost)[0] for one in have]
    return [bytes(answer[i] for answer in answers) for i in range(k)]


def data_of_stripe(k: int, n: int, cells: dict[int, bytes]) -> bytes:
    """The k data cells, joined, from any k cells. All bytes of a cell are handled at once, as one table look-up and one XOR."""
    have, parts = tuple(sorted(cells)), []
    for i in range(k):
        if i in cells:
            parts.append(cells[i])
            continue
        total = 0
        for factor, index in zip(recipe(k, n, have)[i], have):  # noqa: B905
            total ^= int.from_bytes(cells[index].translate(times(factor)), "little")
        parts.append(total.to_bytes(len(cells[have[0]]), "little"))
    return b"".join(parts)


def data_of_stripe_slowly(k: int, n: int, cells: dict[int, bytes]) -> bytes:
    """The same by stock reedsolo alone, one byte column after another: the definition of the code. Some 20 KB/s."""
    if k == n:
        return b"".join(cells[i] for i in range(k))
    codec, lost = RSCodec(n - k, nsize=n), [i for i in range(n) if i not in cells]
    length = len(next(iter(cells.values())))
    columns = [bytes(cells[i][j] if i in cells else 0 for i in range(n)) for j in range(length)]
    decoded = [codec.decode(column, erase_pos=lost)[0] for column in columns]
    return b"".join(bytes(column[i] for column in decoded) for i in range(k))


# -- segments: docs/formats/sealing.md


def choices(order: Sequence[int], k: int) -> Iterator[tuple[int, ...]]:
    """All choices of k shards, those first that reach least far down the list."""
    for end in range(k, len(order) + 1):
        for rest in combinations(order[: end - 1], k - 1):
            yield (*rest, order[end - 1])


def open_stripe(stored: StoredObject, shards: Sequence[Shard], stripe: int, slow: bool) -> bytes:
    """The plaintext of one segment. A wrong cell makes decryption fail; then other choices of k shards are tried."""
    if stored.last[0] == stripe:
        return stored.last[1]
    shape = stored.manifest
    cells = {s.index: cell for s in shards if (cell := s.cell(shape, stripe)) is not None}
    by_index = {s.index: s for s in shards}
    order = sorted(cells, key=lambda i: (by_index[i].blame, i))
    if len(order) < shape.k:
        raise Trouble(TOO_FEW, f"{shape.k} of {shape.n} shards are needed, and only {len(order)} are here: {sorted(order)}")
    nonce = stripe.to_bytes(11, "big") + bytes([stripe == shape.stripes - 1])  # the last byte says: nothing comes after this one
    for chosen in islice(choices(order, shape.k), ATTEMPTS_MAX):
        data = (data_of_stripe_slowly if slow else data_of_stripe)(shape.k, shape.n, {i: cells[i] for i in chosen})
        plain = gcm_open(stored.content_key, nonce, data[: shape.segment_length(stripe)])
        if plain is not None:
            for i in set(order[: shape.k]) - set(chosen):
                by_index[i].blame += 1
                say(f"stripe {stripe} opens only without shard {i}: it is damaged")
            stored.last = (stripe, plain)
            return plain
    raise Trouble(TOO_FEW, f"stripe {stripe} does not open with any {shape.k} of the {len(order)} shards here: too many are damaged")


def plaintext(stored: StoredObject, shards: Sequence[Shard], target: Target, slow: bool) -> Iterator[bytes]:
    """The target's bytes in order, from the stripes that it lies in."""
    per_segment = stored.manifest.stripe_size - TAG
    at, end = target.offset, target.offset + target.size
    while at < end:
        stripe, skip = divmod(at, per_segment)
        part = open_stripe(stored, shards, stripe, slow)[skip : skip + end - at]
        if not part:
            raise Trouble(DAMAGED, "the header says that the file is longer than it is")
        yield part
        at += len(part)


# -- the command


def save(path: Path, parts: Iterator[bytes], sha256: bytes) -> None:
    """Write to a temporary file, check the SHA-256, and only then give the file its name. Never replaces a file."""
    if path.exists():
        raise Trouble(LOCAL, f"{path} exists already; name another place with -o")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.part")
    hasher = hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                hasher.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if hasher.digest() != sha256:
            raise Trouble(DAMAGED, f"the restored bytes have SHA-256 {hasher.hexdigest()} instead of {sha256.hex()}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def place(folder: Path, target: Target) -> Path:
    """Where a file goes inside ``folder``: its own name, unless that would lead outside or is taken."""
    parts = os.fsdecode(target.name).split("/")
    if not target.name or b"\0" in target.name or any(part in ("", ".", "..") for part in parts):
        parts = [target.sha256.hex()]
    path = folder.joinpath(*parts)
    return path.with_name(f"{target.sha256.hex()[:16]}-{path.name}"[:255]) if path.exists() else path


def open_objects(args: argparse.Namespace, keys: Keys, stores: Sequence[Store], wanted: bytes | None) -> list[StoredObject]:
    if args.manifest:
        return [StoredObject(Manifest(path.read_bytes()), keys) for path in args.manifest]
    # Nodes know a plaintext only by its lookup tag: HMAC-SHA256 of its SHA-256 under the vault's lookup key.
    tag = None if wanted is None else hmac.new(keys.lookup, wanted, "sha256").digest()
    objects: dict[bytes, StoredObject] = {}
    for data in (data for store in stores for data in store.manifests(tag)):
        try:
            stored = StoredObject(Manifest(data), keys)
            objects.setdefault(stored.manifest.file_id, stored)
        except Trouble as trouble:
            if trouble.code != REFUSED:  # other vaults' files are none of our business
                say(str(trouble))
    return list(objects.values())


def restore(args: argparse.Namespace, keys: Keys) -> int:
    stores = [Store(path) for folder in args.node_data for path in sorted(folder.rglob("store.sqlite"))]
    wanted = None if args.sha256 is None else bytes.fromhex(args.sha256)
    objects = open_objects(args, keys, stores, wanted)
    chosen = [(o, t) for o in objects for t in o.targets if wanted in (None, t.sha256)]
    if args.list:
        for _, target in chosen:
            print(f"{target.sha256.hex()}  {target.size:>12}  {os.fsdecode(target.name)!a}")
        return 0
    if not chosen:
        raise Trouble(ABSENT, "nothing of this vault with that hash is here" if wanted else "nothing of this vault is here")
    if len(chosen) > 1 and not args.all:
        if wanted is None:
            raise Trouble(2, f"{len(chosen)} files are here: name one with --sha256 (see --list), or take them with --all")
        del chosen[1:]  # the same bytes stored twice
    failed, shards_of = [], lru_cache(maxsize=1)(lambda stored: find_shards(stored.manifest, args.shards, stores))
    for stored, target in chosen:
        path = place(args.output, target) if args.all or args.output.is_dir() else args.output
        try:
            save(path, plaintext(stored, shards_of(stored) if target.size else [], target, args.slow), target.sha256)
            say(f"restored {path}: {target.size} bytes, SHA-256 {target.sha256.hex()}")
        except (Trouble, OSError) as trouble:
            if not args.all:
                raise
            say(f"{os.fsdecode(target.name)!a}: {trouble}")
            failed.append(trouble)
    return PARTIAL if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="recover.py", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES)
    parser.description = "Restore files from medshard's shards without medshard."
    folder: Any = {"type": Path, "nargs": "+", "default": [], "metavar": "DIR"}
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="the vault's key file, vault.key")
    parser.add_argument("--passphrase-file", type=Path, metavar="FILE", help="its first line; default: $MEDSHARD_PASSPHRASE, or ask")
    parser.add_argument("--manifest", type=Path, nargs="+", metavar="FILE", help="manifests; default: look in --node-data")
    parser.add_argument("--shards", **folder, help="folders of shards: named by a node, or by a number (0, shard-3.bin)")
    parser.add_argument("--node-data", **folder, help="nodes' folders, at any depth above store.sqlite")
    parser.add_argument("--sha256", metavar="HEX", help="which file: what sha256sum printed before it was stored")
    parser.add_argument("--all", action="store_true", help="restore every file, by its own name, into the folder -o")
    parser.add_argument("--list", action="store_true", help="only print hash, size and name of every file that could be tried")
    parser.add_argument("--slow", action="store_true", help="decode with reedsolo alone, byte column by byte column")
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="where to write; nothing is ever overwritten")
    args = parser.parse_args()
    if args.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", args.sha256):
        parser.error("--sha256 takes 64 hex digits")
    if not (args.manifest or args.node_data):
        parser.error("give --manifest, or --node-data to look for manifests in")
    if not (args.output or args.list):
        parser.error("say where to write, with -o")
    try:
        if args.passphrase_file:
            passphrase = args.passphrase_file.read_bytes().split(b"\n")[0].rstrip(b"\r")
        else:
            text = os.environ.get("MEDSHARD_PASSPHRASE")
            passphrase = os.fsencode(getpass.getpass("Passphrase of the vault: ") if text is None else text)
        return restore(args, open_key_file(args.key.read_bytes(), passphrase))
    except Trouble as trouble:
        say(str(trouble))
        return trouble.code
    except OSError as error:
        say(f"{error.filename}: {error.strerror}")
        return LOCAL


EXAMPLES = """examples:
  what could be restored from the disks of four nodes:
    recover.py --key vault.key --node-data node1/ node2/ node3/ node4/ --list
  one file, or one slice of a series, by the hash that `medshard put` or sha256sum printed:
    recover.py --key vault.key --node-data node*/ --sha256 9f86d0… -o scan.dcm
  the same from a folder of shards, named 0, 1, 2 … or as nodes name them:
    recover.py --key vault.key --manifest scan.manifest --shards shards/ -o scan.dcm
  everything this vault ever stored:
    recover.py --key vault.key --node-data node*/ --all -o restored/

exit codes: 0 restored and its SHA-256 is right, 2 command line, 3 not here, 4 wrong passphrase or key, 5 too few good shards,
            6 damaged key file, manifest or header, 7 a local file cannot be read or written, 8 --all: some failed
"""

if __name__ == "__main__":
    sys.exit(main())
