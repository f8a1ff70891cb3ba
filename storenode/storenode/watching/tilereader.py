"""Reading the tiles of one head, wherever they come from, and believing none of them before it was folded to that head's root.

Law: the tiles of the right edge are folded to the root first, all their hashes with them; each full tile is then folded to the one hash
that its parent has for it, and each bundle's entries are hashed to their level-0 tile. What does not fit is ``WrongTile``, and carries
what it takes to show that to somebody else. A reader that checked the right edge alone would accept forged hashes to the left of it.

What a source says that it does not give out is ``Withheld``; one that does not answer raises Unavailable as it is. Nothing here knows
who the source is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from medshard_protocol import merkle
from medshard_protocol.errors import Absent, Damaged, MedshardError, Refused
from medshard_protocol.merkle import hash_size, sha256
from medshard_protocol.tiles import TileName, tile_height, tile_width, unpack_bundle

Fetch = Callable[[TileName], Awaitable[bytes]]


class WrongTile(Damaged):
    """A tile or bundle that does not belong to the head. ``tiles`` shows it: the wrong one and those above it, by their paths."""

    def __init__(self, message: str, tiles: Mapping[str, bytes]) -> None:
        super().__init__(message)
        self.tiles = dict(tiles)


class Withheld(Absent):
    """A tile or bundle that the source did not give out."""


class HeadTiles:
    """The tree under one head, read as needed."""

    def __init__(self, size: int, root: bytes, fetch: Fetch) -> None:
        self.size = size
        self.root = root
        self._fetch = fetch
        self._rows: dict[tuple[int, int], list[list[bytes]]] = {}  # of tiles that were checked: hashes, their parents, and so on
        self._raw: dict[str, bytes] = {}  # what checked them
        self._edge_ready = False

    async def check_edge(self) -> None:
        """Fold the right edge to the root. Raises WrongTile or Withheld."""
        if self._edge_ready:
            return
        names = self._edge()
        tiles = {name.path(): await self._get(name) for name in names}
        for name in names:
            data = tiles[name.path()]
            if len(data) != name.width * hash_size:
                raise WrongTile(f"tile {name.path()} has {len(data)} bytes, not {name.width * hash_size}", tiles)
            self._rows[name.level or 0, name.index] = _rows_of(data)
        peaks = [self._known(*node) for node in merkle.perfect_nodes(0, self.size)]
        if merkle.fold(peaks, sha256) != self.root:
            self._rows.clear()
            raise WrongTile(f"the tiles of the right edge do not give the root of {self.size} entries", tiles)
        self._raw |= tiles
        self._edge_ready = True

    async def root_at(self, size: int) -> bytes:
        """What the root was when this very tree had ``size`` leaves."""
        return await self._range(0, size)

    async def consistency_path(self, old_size: int) -> list[bytes]:
        """Prove that the tree of ``root_at(old_size)`` is a prefix of this one."""
        return [await self._range(*leaves) for leaves in merkle.consistency_ranges(old_size, self.size)]

    async def inclusion_path(self, index: int) -> list[bytes]:
        """Prove leaf ``index``."""
        return [await self._range(*leaves) for leaves in merkle.inclusion_ranges(index, self.size)]

    async def check_tile(self, level: int, index: int) -> None:
        """Fetch and check one hash tile."""
        await self._tile(level, index)

    async def bundle(self, index: int) -> list[bytes]:
        """The entries of bundle ``index``, checked against their hashes."""
        width = min(tile_width, self.size - index * tile_width)
        name = TileName(None, index, width)
        hashes = (await self._tile(0, index))[0]
        data = await self._get(name)
        try:
            entries = unpack_bundle(data, width)
        except MedshardError as error:
            raise WrongTile(f"bundle {name.path()}: {error}", {**self._above(0, index), name.path(): data}) from None
        for number, (entry, leaf) in enumerate(zip(entries, hashes, strict=True)):
            if merkle.leaf_hash(entry, sha256) != leaf:
                message = f"entry {index * tile_width + number} is another one than the log has hashed"
                raise WrongTile(message, {**self._above(0, index), name.path(): data})
        return entries

    def _edge(self) -> list[TileName]:
        """The partial tiles, lowest level first."""
        names, level = [], 0
        while (hashes := self.size >> tile_height * level) > 0:
            if width := hashes % tile_width:
                names.append(TileName(level, hashes // tile_width, width))
            level += 1
        return names

    async def _range(self, start: int, end: int) -> bytes:
        return merkle.fold([await self._node(*node) for node in merkle.perfect_nodes(start, end)], sha256)

    async def _node(self, level: int, index: int) -> bytes:
        tile_level, row = divmod(level, tile_height)
        in_tile = tile_height - row
        return (await self._tile(tile_level, index >> in_tile))[row][index & (1 << in_tile) - 1]

    def _known(self, level: int, index: int) -> bytes:
        tile_level, row = divmod(level, tile_height)
        in_tile = tile_height - row
        return self._rows[tile_level, index >> in_tile][row][index & (1 << in_tile) - 1]

    async def _tile(self, level: int, index: int) -> list[list[bytes]]:
        """The rows of a checked tile."""
        await self.check_edge()
        rows = self._rows.get((level, index))
        if rows is not None:
            return rows
        expected = (await self._tile(level + 1, index // tile_width))[0][index % tile_width]
        name = TileName(level, index)
        data = await self._get(name)
        rows = _rows_of(data) if len(data) == tile_width * hash_size else []
        if not rows or rows[tile_height][0] != expected:
            raise WrongTile(f"tile {name.path()} does not give the hash that the tile above has for it", self._above(level, index, data))
        self._raw[name.path()] = data
        self._rows[level, index] = rows
        return rows

    def _above(self, level: int, index: int, data: bytes | None = None) -> dict[str, bytes]:
        """What it takes to check one tile: itself, the tiles above it, and the right edge."""
        shown = {name.path(): self._raw[name.path()] for name in self._edge()}
        if data is not None:
            shown[TileName(level, index).path()] = data
        while index < self.size >> tile_height * (level + 1):
            path = TileName(level, index).path()
            if path in self._raw:
                shown[path] = self._raw[path]
            level, index = level + 1, index // tile_width
        return shown

    async def _get(self, name: TileName) -> bytes:
        try:
            return await self._fetch(name)
        except (Absent, Refused) as error:
            raise Withheld(f"{name.path()}: {error}") from None


def _rows_of(data: bytes) -> list[list[bytes]]:
    """The hashes of a tile and all complete nodes above them within it; row 8 has the one hash of a full tile."""
    rows = [[data[at : at + hash_size] for at in range(0, len(data), hash_size)]]
    for _ in range(tile_height):
        below = rows[-1]
        rows.append([merkle.node_hash(below[at], below[at + 1], sha256) for at in range(0, len(below) - 1, 2)])
    return rows
