"""The part of an audit that other processes do: one run of bundles at a time, its hashes, and its authors' signatures.

Law: every leaf hash is made from the entry's own bytes and compared with the tile that claims it; older partial tiles and bundles that lie
beside a newer one must be its beginning. Nothing is taken from a tile but to be compared. Pure in what it returns: the same files give
the same result in any process.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medshard_protocol import merkle
from medshard_protocol.entries import Entry, Type, label
from medshard_protocol.errors import Damaged, Malformed, Refused
from medshard_protocol.merkle import sha256
from medshard_protocol.tiles import TileName, pack_bundle, tile_width, unpack_bundle
from storenode.logtool.source import Folder

authors_max: Final = 4096
Origins: TypeAlias = tuple[tuple[int, str], ...]

_body = slice(3, -100)  # of an entry: array, version and type are a byte each; author and signature have two bytes before them
_roster = bytes([Type.ROSTER])
_author = slice(-98, -66)
_signature = slice(-64, None)
_partial = re.compile(r"[1-9][0-9]{0,2}\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Run:
    """What became of some bundles in a row."""

    start: int  # index of the first entry
    bundles: tuple[bytes, ...]
    tile_roots: tuple[bytes, ...]  # of the full tiles
    edge: tuple[bytes, ...]  # leaf hashes after the last full tile
    unsigned: frozenset[int]  # places of entries that are malformed or not signed by their authors


def check_run(folder: Path, origins: Origins, size: int, first: int, end: int) -> Run:
    """Hash the bundles from ``first`` up to but not including ``end`` of a log of ``size`` entries. Raises Damaged or Absent.

    ``origins`` are the logs for which its entries were signed, each with the place where it ended; the last is this one.
    """
    source = Folder(folder)
    bundles: list[bytes] = []
    roots: list[bytes] = []
    edge: tuple[bytes, ...] = ()
    unsigned: set[int] = set()
    for number in range(first, end):
        width = min(tile_width, size - number * tile_width)
        name = TileName(None, number, width)
        data = source.read(f"tile/{name.path()}")
        try:
            entries = unpack_bundle(data, width)
        except Malformed as error:
            raise Damaged(f"tile/{name.path()}: {error}") from None
        leaves = [hashlib.sha256(b"\x00" + entry).digest() for entry in entries]
        compare(source, TileName(0, number, width), leaves)
        _compare_older(source, name, entries)
        unsigned.update(_unsigned(entries, number * tile_width, origins))
        bundles.append(data)
        if width == tile_width:
            roots.append(merkle.root(leaves, sha256))
        else:
            edge = tuple(leaves)
    return Run(first * tile_width, tuple(bundles), tuple(roots), edge, frozenset(unsigned))


def compare(source: Folder, name: TileName, hashes: list[bytes]) -> None:
    """Compare a tile, and older partial ones beside it, with the hashes that were computed. Raises Damaged or Absent."""
    computed = b"".join(hashes)
    if source.read(f"tile/{name.path()}") != computed:
        raise Damaged(f"tile/{name.path()} has other hashes than the entries give")
    for width in _older(source, name):
        path = TileName(name.level, name.index, width).path()
        if source.read(f"tile/{path}") != computed[: width * merkle.hash_size]:
            raise Damaged(f"tile/{path} has other hashes than the entries give")


def _compare_older(source: Folder, name: TileName, entries: list[bytes]) -> None:
    for width in _older(source, name):
        path = TileName(None, name.index, width).path()
        if source.read(f"tile/{path}") != pack_bundle(entries[:width]):
            raise Damaged(f"tile/{path} has other entries than the newer bundle")


def _older(source: Folder, name: TileName) -> Iterable[int]:
    """Widths of partial tiles of this tile that were left in the folder. Wider ones than ``name`` belong to a later checkpoint."""
    path = source.folder / "tile" / (TileName(name.level, name.index).path() + ".p")
    if not path.is_dir():
        return []
    return sorted(int(each.name) for each in path.iterdir() if _partial.match(each.name) and int(each.name) < name.width)


def _unsigned(entries: list[bytes], start: int, origins: Origins) -> Iterable[int]:
    """Places of entries whose author's signature does not hold.

    The signed body and the signature are cut out where a canonical entry has them, which saves half the time of parsing; that the
    entry is canonical is found out where it is folded. An entry about the roster may be signed by more than its author.
    """
    befores = [(end, origin, label + len(origin.encode()).to_bytes(2, "big") + origin.encode()) for end, origin in origins]
    for place, data in enumerate(entries, start):
        origin, before = next((origin, before) for end, origin, before in befores if place < end)
        try:
            if data[2:3] == _roster:
                _verify_whole(data, origin)
                continue
            _public(data[_author]).verify(data[_signature], before + data[2:3] + data[_body])
        except (InvalidSignature, ValueError):
            yield place


def _verify_whole(data: bytes, origin: str) -> None:
    try:
        entry = Entry.from_bytes(data)
    except Malformed:
        return  # found out where it is folded
    try:
        entry.verify(origin)
    except Refused:
        raise ValueError("not signed by all who should have") from None


@lru_cache(authors_max)
def _public(author: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(author)
