"""The log as static files (C2SP tlog-tiles): hash tiles of height 8, entry bundles, and a tree that grows out of them.

Law: a tile is a claim until its hashes have been folded to a root that a quorum signed; whoever reads tiles of others recomputes that
root from them. ``Tree`` holds only the right edge in memory and asks its owner for full tiles, which never change.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from medshard_protocol import merkle
from medshard_protocol.errors import Damaged, Malformed
from medshard_protocol.merkle import hash_size, sha256

tile_height = 8
tile_width = 1 << tile_height
tile_bytes = tile_width * hash_size
level_max = 63
index_digits_max = 18  # more tiles than a log of 2**63 entries has
tiles_cached = 32  # full tiles with their inner nodes, 33 KiB each

_path = re.compile(r"(entries|[0-9]|[1-5][0-9]|6[0-3])/((?:x[0-9]{3}/)*[0-9]{3})(?:\.p/([1-9][0-9]{0,2}))?\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class TileName:
    """Which tile or bundle. ``level`` is None for a bundle of entries; ``width`` below 256 names a partial one."""

    level: int | None
    index: int
    width: int = tile_width

    def path(self) -> str:
        """The path below ``<prefix>/tile/``."""
        groups = f"{self.index:03d}"
        groups = groups.zfill(-(-len(groups) // 3) * 3)
        parts = [groups[at : at + 3] for at in range(0, len(groups), 3)]
        index = "/".join([*("x" + part for part in parts[:-1]), parts[-1]])
        partial = "" if self.width == tile_width else f".p/{self.width}"
        return f"{'entries' if self.level is None else self.level}/{index}{partial}"

    @classmethod
    def from_path(cls, path: str) -> TileName:
        """Parse a path below ``<prefix>/tile/``. Raises Malformed; each tile has one spelling."""
        match = _path.match(path)
        if match is None or len(match[2]) > index_digits_max * 2:
            raise Malformed("not the path of a tile")
        level = None if match[1] == "entries" else int(match[1])
        name = cls(level, int(match[2].replace("x", "").replace("/", "")), int(match[3] or tile_width))
        if name.path() != path:
            raise Malformed("not the path of a tile")
        return name

    def within(self, size: int) -> bool:
        """Say whether a log of ``size`` entries has this tile, at this width."""
        return self.index * tile_width + self.width <= size >> tile_height * (self.level or 0)


def tile_names(size: int) -> list[TileName]:
    """Every tile and bundle, full or partial, that a log of ``size`` entries consists of."""
    names = _names_of_level(None, size)
    for level in range(level_max + 1):
        if not size >> tile_height * level:
            break
        names += _names_of_level(level, size >> tile_height * level)
    return names


def _names_of_level(level: int | None, hashes: int) -> list[TileName]:
    full, width = divmod(hashes, tile_width)
    names = [TileName(level, index) for index in range(full)]
    return [*names, TileName(level, full, width)] if width else names


def pack_bundle(entries: Iterable[bytes]) -> bytes:
    """Join entries into a bundle: each after its length in two bytes."""
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def unpack_bundle(data: bytes, width: int) -> list[bytes]:
    """Split a bundle of ``width`` entries. Raises Malformed."""
    entries, at = [], 0
    for _ in range(width):
        size = int.from_bytes(data[at : at + 2], "big")
        entry = data[at + 2 : at + 2 + size]
        if at + 2 > len(data) or len(entry) != size:
            raise Malformed("entry bundle: cut short")
        entries.append(entry)
        at += 2 + size
    if at != len(data):
        raise Malformed("entry bundle: more than its entries")
    return entries


class FullTile(NamedTuple):
    """A tile that has become complete: to be stored before the tree is relied on again."""

    level: int
    number: int
    hashes: bytes


class _Pyramid:
    """The hashes of one tile and every complete node above them: ``rows[8]`` is the tile's root once it is full."""

    def __init__(self, hashes: Iterable[bytes] = ()) -> None:
        self.rows: list[list[bytes]] = [[] for _ in range(tile_height + 1)]
        for item in hashes:
            self.append(item)

    def append(self, item: bytes) -> None:
        for row in self.rows:
            row.append(item)
            if len(row) & 1:
                return
            item = merkle.node_hash(row[-2], row[-1], sha256)


class Tree:
    """An RFC 6962 SHA-256 tree that grows, gives proofs for any size it has had, and keeps its full tiles elsewhere.

    ``read_tile(level, index)`` gives the 8192 bytes of a full tile that ``append`` handed out; the last few it still has itself, so
    that a batch may be stored after it was appended. Proofs cost a few dozen hashes. Not thread-safe.
    """

    def __init__(self, read_tile: Callable[[int, int], bytes]) -> None:
        self.size = 0
        self._edge: list[_Pyramid] = [_Pyramid()]
        self._read_tile = read_tile
        self._full: OrderedDict[tuple[int, int], _Pyramid] = OrderedDict()  # the last used; those just completed among them

    @classmethod
    def load(cls, size: int, last_leaves: Sequence[bytes], read_tile: Callable[[int, int], bytes]) -> Tree:
        """Rebuild the tree of a log from its full tiles and the hashes of the leaves after the last full one."""
        tree = cls(read_tile)
        if len(last_leaves) != size % tile_width:
            raise ValueError(f"a log of {size} entries has {size % tile_width} after its last full tile")
        tree.size = size
        tree._edge = [_Pyramid(last_leaves)]
        level = 1
        while (hashes := size >> tile_height * level) > 0:
            below = range(hashes - hashes % tile_width, hashes)
            tree._edge.append(_Pyramid(tree._pyramid(level - 1, index).rows[tile_height][0] for index in below))
            level += 1
        return tree

    def append(self, leaf: bytes) -> list[FullTile]:
        """Add a leaf hash; give the tiles that this completed."""
        full: list[FullTile] = []
        self.size += 1
        item, level = leaf, 0
        while True:
            if level == len(self._edge):
                self._edge.append(_Pyramid())
            edge = self._edge[level]
            edge.append(item)
            if not edge.rows[tile_height]:
                return full
            number = (self.size >> tile_height * (level + 1)) - 1
            full.append(FullTile(level, number, b"".join(edge.rows[0])))
            self._keep(level, number, edge)
            item = edge.rows[tile_height][0]
            self._edge[level] = _Pyramid()
            level += 1

    def frontier(self) -> merkle.Frontier:
        """The right edge, to try out what appending would give."""
        return merkle.Frontier(sha256, self.size, [self._node(*node) for node in merkle.perfect_nodes(0, self.size)])

    def root(self, size: int) -> bytes:
        """The root at any size up to the present one."""
        return self._range((0, self._had(size)))

    def inclusion_path(self, index: int, size: int) -> list[bytes]:
        """Prove leaf ``index`` to be in the tree of ``size`` leaves."""
        return [self._range(item) for item in merkle.inclusion_ranges(index, self._had(size))]

    def consistency_path(self, old_size: int, size: int) -> list[bytes]:
        """Prove the tree of ``old_size`` leaves to be a prefix of that of ``size``."""
        return [self._range(item) for item in merkle.consistency_ranges(old_size, self._had(size))]

    def tile(self, name: TileName) -> bytes:
        """The bytes of a hash tile that lies ``within`` the present size."""
        if name.level is None or not name.within(self.size):
            raise ValueError("no such tile")
        return b"".join(self._pyramid(name.level, name.index).rows[0][: name.width])

    def _had(self, size: int) -> int:
        if not 0 <= size <= self.size:
            raise ValueError(f"the tree has {self.size} leaves, not {size}")
        return size

    def _range(self, leaves: merkle.Range) -> bytes:
        return merkle.fold([self._node(*node) for node in merkle.perfect_nodes(*leaves)], sha256)

    def _node(self, level: int, index: int) -> bytes:
        """The hash of a complete subtree of 2**level leaves."""
        tile_level, row = divmod(level, tile_height)
        in_tile = tile_height - row
        return self._pyramid(tile_level, index >> in_tile).rows[row][index & (1 << in_tile) - 1]

    def _pyramid(self, level: int, index: int) -> _Pyramid:
        if index == self.size >> tile_height * (level + 1):
            return self._edge[level]
        pyramid = self._full.get((level, index))
        if pyramid is None:
            pyramid = _Pyramid(split_tile(self._read_tile(level, index)))
        self._keep(level, index, pyramid)
        return pyramid

    def _keep(self, level: int, index: int, pyramid: _Pyramid) -> None:
        self._full[level, index] = pyramid
        self._full.move_to_end((level, index))
        if len(self._full) > tiles_cached:
            self._full.popitem(last=False)


def split_tile(data: bytes) -> list[bytes]:
    """Split a full tile into its hashes. Raises Damaged."""
    if len(data) != tile_bytes:
        raise Damaged(f"a full tile has {tile_bytes} bytes, this one {len(data)}")
    return [data[at : at + hash_size] for at in range(0, tile_bytes, hash_size)]
