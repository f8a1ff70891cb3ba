"""Where every byte of a sealed file lies: segments, stripes, cells, shards. Arithmetic only.

A sealed file is cut into stripes; stripe s holds segment s (ciphertext and tag), zero-filled to k equal cells, and n-k parity
cells. Shard i is cell i of every stripe, in order. Every stripe but the last has cells of ``cell_size`` bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from blake3 import blake3

from medshard_protocol import merkle
from medshard_protocol.errors import Malformed

tag_bytes: Final = 16  # AES-GCM's tag, at the end of each segment
cell_bytes_default: Final = 128 * 1024
cell_bytes_max: Final = 1024 * 1024  # bounds what a holder or reader buffers for one cell
cell_bytes_least: Final = 64  # in a shard of several cells: a digest for each must cost the sender more than the node that keeps it
cells_max: Final = 1 << 21  # of one shard; their digests are 64 MiB, and k x 256 GiB of file at the default cell size
cell_bytes_min: Final = 2  # with 1 <= k <= 255 the smallest padded file still leaves room for a tag
code_n_max: Final = 255  # GF(2^8) has no more evaluation points
sealed_bytes_max: Final = 1 << 44  # 16 TiB: far above any study, far below where 64-bit sums could overflow

Digest = Callable[[bytes | memoryview | bytearray], bytes]


def _blake3(data: bytes | memoryview | bytearray) -> bytes:
    return blake3(data).digest()


def _sha256(data: bytes | memoryview | bytearray) -> bytes:
    return sha256(data).digest()


digests: Final[dict[str, Digest]] = {"blake3": _blake3, "sha256": _sha256}


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of one sealed file: ``k`` of ``n``, cells of ``cell_size`` bytes, ``sealed_size`` bytes of ciphertext and tags."""

    k: int
    n: int
    cell_size: int
    sealed_size: int

    def __post_init__(self) -> None:
        if not (1 <= self.k <= self.n <= code_n_max):
            raise Malformed(f"no {self.k}-of-{self.n} code")
        if not (cell_bytes_min <= self.cell_size <= cell_bytes_max and self.k * self.cell_size > tag_bytes):
            raise Malformed(f"cells of {self.cell_size} bytes are not allowed")
        if self.sealed_size > self.stripe_bytes:
            check_cells(self.stripes, self.cell_size)
        if not (tag_bytes < self.sealed_size <= sealed_bytes_max):
            raise Malformed(f"a sealed size of {self.sealed_size} bytes is not allowed")
        if self.segment_length(self.stripes - 1) <= tag_bytes:
            raise Malformed("the last segment holds no data")

    @classmethod
    def for_plain(cls, plain_size: int, k: int, n: int, cell_size: int = cell_bytes_default) -> Layout:
        """The layout of ``plain_size`` (already padded, at least 1) bytes. One stripe that is not full gets smaller cells."""
        if plain_size < 1:
            raise ValueError("plain_size must be at least 1")
        per_segment = k * cell_size - tag_bytes
        segments = -(-plain_size // per_segment)
        sealed = plain_size + segments * tag_bytes
        if segments == 1:
            cell_size = max(-(-sealed // k), cell_bytes_min, tag_bytes // k + 1)
        return cls(k, n, cell_size, sealed)

    @property
    def stripe_bytes(self) -> int:
        """Sealed bytes in a full stripe."""
        return self.k * self.cell_size

    @property
    def stripes(self) -> int:
        """How many stripes (equally: segments, cells in a shard) there are."""
        return -(-self.sealed_size // self.stripe_bytes)

    @property
    def plain_size(self) -> int:
        """Bytes of padded plaintext."""
        return self.sealed_size - tag_bytes * self.stripes

    @property
    def segment_plain(self) -> int:
        """Bytes of plaintext in a full segment."""
        return self.stripe_bytes - tag_bytes

    def segment_length(self, stripe: int) -> int:
        """Sealed bytes (ciphertext and tag) of one segment."""
        return min(self.stripe_bytes, self.sealed_size - stripe * self.stripe_bytes)

    def cell_length(self, stripe: int) -> int:
        """Bytes of every cell of one stripe."""
        return -(-self.segment_length(stripe) // self.k)

    @property
    def shard_size(self) -> int:
        """Bytes of one shard."""
        return (self.stripes - 1) * self.cell_size + self.cell_length(self.stripes - 1)

    def stripes_of(self, offset: int, length: int) -> range:
        """The stripes that hold plaintext bytes ``offset`` to ``offset + length``; empty for no bytes."""
        if length <= 0:
            return range(0)
        return range(offset // self.segment_plain, (offset + length - 1) // self.segment_plain + 1)


def cells_in(shard_size: int, cell_size: int) -> int:
    """How many cells a shard of ``shard_size`` bytes has: all but the last are full, and the last is not empty."""
    return -(-shard_size // cell_size)


def check_cells(count: int, cell_size: int) -> None:
    """Raise Malformed for a shard of more, or smaller, cells than anyone has to keep digests of."""
    if count > cells_max:
        raise Malformed(f"{count} cells in a shard, more than the {cells_max} allowed")
    if count > 1 and cell_size < cell_bytes_least:
        raise Malformed(f"cells of {cell_size} bytes: a shard of several has cells of at least {cell_bytes_least}")


def shard_root(cell_digests: Sequence[bytes], digest: Digest) -> bytes:
    """The RFC 6962 tree head over the digests of a shard's cells, in the same hash."""
    return merkle.root([merkle.leaf_hash(cell, digest) for cell in cell_digests], digest)


def split(data: bytes | bytearray | memoryview, cell_size: int) -> Iterable[memoryview]:
    """The cells of a whole shard in memory, in order."""
    view = memoryview(data)
    return (view[at : at + cell_size] for at in range(0, len(view), cell_size))
