"""RFC 6962 Merkle trees over any 32-byte digest: SHA-256 for the ledger, BLAKE3-256 for the cells of a shard.

Law: a proof is never believed because its pieces look right; it is recomputed to the root, with exactly as many hashes as the size
and the index demand. Trees of a given size are split at the largest power of two below it (RFC 6962, section 2.1).

Functions on whole trees take every leaf hash. Who keeps a tree elsewhere (tiles, a database) asks ``inclusion_ranges``,
``consistency_ranges`` and ``perfect_nodes`` which hashes to fetch. Arguments that no valid tree has raise ValueError; a path that
came from outside and does not fit raises Malformed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import blake3

from medshard_protocol.errors import Malformed

Digest: TypeAlias = Callable[[bytes], bytes]
Range: TypeAlias = tuple[int, int]  # leaves [start, end)

hash_size = 32
path_hashes_max = 64  # a tree of 2**63 leaves has paths of 63; anything longer is noise

_leaf = b"\x00"
_node = b"\x01"


def sha256(data: bytes) -> bytes:
    """The digest of the ledger."""
    return hashlib.sha256(data).digest()


def blake3_256(data: bytes) -> bytes:
    """The default digest of shards."""
    return blake3.blake3(data).digest()


def leaf_hash(data: bytes, digest: Digest) -> bytes:
    """Hash one leaf's content."""
    return digest(_leaf + data)


def node_hash(left: bytes, right: bytes, digest: Digest) -> bytes:
    """Hash two children into their parent."""
    return digest(_node + left + right)


def root(leaf_hashes: Iterable[bytes], digest: Digest) -> bytes:
    """Hash a whole tree, level by level: an odd last node rises unhashed, which is the RFC's split at a power of two."""
    level = list(leaf_hashes)
    if not level:
        return digest(b"")
    while len(level) > 1:
        level = _parents(level, digest)
    return level[0]


def inclusion_path(leaf_hashes: Sequence[bytes], index: int, digest: Digest) -> list[bytes]:
    """Give the hashes that lead from leaf ``index`` to the root, sibling of the leaf first."""
    return inclusion_paths(leaf_hashes, [index], digest)[0]


def inclusion_paths(leaf_hashes: Sequence[bytes], indices: Sequence[int], digest: Digest) -> list[list[bytes]]:
    """The path of each of several leaves; the tree is hashed once for all of them."""
    for index in indices:
        if not 0 <= index < len(leaf_hashes):
            raise ValueError(f"no leaf {index} in a tree of {len(leaf_hashes)}")
    paths: list[list[bytes]] = [[] for _ in indices]
    level, height = list(leaf_hashes), 0
    while len(level) > 1:
        for path, index in zip(paths, indices, strict=True):
            sibling = index >> height ^ 1
            if sibling < len(level):
                path.append(level[sibling])
        level, height = _parents(level, digest), height + 1
    return paths


def root_from_path(leaf: bytes, index: int, size: int, path: Sequence[bytes], digest: Digest) -> bytes:
    """Recompute the root of a tree of ``size`` leaves from one leaf hash and its path.

    The caller compares the result with the root it trusts. Raises Malformed unless ``path`` has exactly the length that
    ``index`` and ``size`` demand and every hash is 32 bytes.
    """
    if not 0 <= index < size:
        raise Malformed(f"inclusion proof: no leaf {index} in a tree of {size}")
    inner = (index ^ (size - 1)).bit_length()
    if len(path) != inner + (index >> inner).bit_count():
        raise Malformed(f"inclusion proof: {len(path)} hashes do not fit leaf {index} of {size}")
    _check_hashes(path, "inclusion proof")
    at = leaf
    for level, sibling in enumerate(path):
        left = level >= inner or index >> level & 1
        at = node_hash(sibling, at, digest) if left else node_hash(at, sibling, digest)
    return at


def consistency_path(leaf_hashes: Sequence[bytes], old_size: int, digest: Digest) -> list[bytes]:
    """Prove that the first ``old_size`` leaves are a prefix of all of them (RFC 6962, section 2.1.2)."""
    return [root(leaf_hashes[start:end], digest) for start, end in consistency_ranges(old_size, len(leaf_hashes))]


def verify_consistency(old_size: int, old_root: bytes, new_size: int, new_root: bytes, path: Sequence[bytes], digest: Digest) -> None:
    """Check a consistency proof by recomputing both roots from it. Raises Malformed unless it proves the two trees consistent."""
    what = f"consistency proof from {old_size} to {new_size}"
    if not 0 <= old_size <= new_size:
        raise Malformed(f"{what}: a log never shrinks")
    _check_hashes(path, what)
    if old_size in (0, new_size):
        whole = old_root == (digest(b"") if old_size == 0 else new_root)
        if path or not whole:
            raise Malformed(f"{what}: does not hold")
        return
    shift = (old_size & -old_size).bit_length() - 1  # the complete subtree at the old right edge
    hashes = list(path) if old_size != 1 << shift else [old_root, *path]
    index, last = (old_size - 1) >> shift, (new_size - 1) >> shift
    inner = (index ^ last).bit_length()
    if len(hashes) != 1 + inner + (index >> inner).bit_count():
        raise Malformed(f"{what}: {len(path)} hashes do not fit")
    old = new = hashes[0]
    for level, sibling in enumerate(hashes[1:]):
        if level >= inner or index >> level & 1:
            old, new = node_hash(sibling, old, digest), node_hash(sibling, new, digest)
        else:
            new = node_hash(new, sibling, digest)
    if old != old_root or new != new_root:
        raise Malformed(f"{what}: does not hold")


def inclusion_ranges(index: int, size: int) -> list[Range]:
    """Name the subtrees whose roots make up the inclusion path of ``index``, in path order."""
    if not 0 <= index < size:
        raise ValueError(f"no leaf {index} in a tree of {size}")
    ranges, level, at = [], 0, index
    while 1 << level < size:
        start = (at ^ 1) << level
        if start < size:
            ranges.append((start, min(start + (1 << level), size)))
        level, at = level + 1, at >> 1
    return ranges


def consistency_ranges(old_size: int, size: int) -> list[Range]:
    """Name the subtrees whose roots make up the consistency proof, in proof order."""
    if not 0 <= old_size <= size:
        raise ValueError(f"no consistency from {old_size} to {size}")
    if old_size in (0, size):
        return []
    start, end, whole, ranges = 0, size, True, []
    while end != old_size:
        split = start + (1 << (end - start - 1).bit_length() - 1)
        if old_size <= split:
            ranges.append((split, end))
            end = split
        else:
            ranges.append((start, split))
            start, whole = split, False
    if not whole:
        ranges.append((start, end))
    return ranges[::-1]


def perfect_nodes(start: int, end: int) -> list[tuple[int, int]]:
    """Cut one subtree into complete ones, as (level, index at that level), left to right. ``fold`` puts their hashes together."""
    nodes = []
    while start < end:
        level = (end - start).bit_length() - 1
        if start & (1 << level) - 1:
            raise ValueError("the range is no subtree of an RFC 6962 tree")
        nodes.append((level, start >> level))
        start += 1 << level
    return nodes


def fold(hashes: Sequence[bytes], digest: Digest) -> bytes:
    """Hash ever smaller complete subtrees, given left to right, into one root."""
    if not hashes:
        return digest(b"")
    at = hashes[-1]
    for left in hashes[-2::-1]:
        at = node_hash(left, at, digest)
    return at


class Frontier:
    """The right edge of a growing tree: log2(size) hashes, enough to append and to tell the root."""

    def __init__(self, digest: Digest, size: int = 0, peaks: Iterable[bytes] = ()) -> None:
        self.digest = digest
        self.size = size
        self.peaks = list(peaks)  # roots of the complete subtrees, largest first: one for each set bit of the size
        if len(self.peaks) != size.bit_count():
            raise ValueError(f"a tree of {size} has {size.bit_count()} peaks, got {len(self.peaks)}")

    def append(self, leaf: bytes) -> None:
        """Add one leaf hash."""
        at, carry = leaf, self.size
        while carry & 1:
            at = node_hash(self.peaks.pop(), at, self.digest)
            carry >>= 1
        self.peaks.append(at)
        self.size += 1

    def root(self) -> bytes:
        """Hash the tree as it stands."""
        return fold(self.peaks, self.digest)

    def copy(self) -> Frontier:
        """Give a frontier that grows on its own."""
        return Frontier(self.digest, self.size, self.peaks)


def _parents(level: list[bytes], digest: Digest) -> list[bytes]:
    joined = b"".join(level)
    pairs = len(level) // 2
    parents = [digest(_node + joined[at : at + 2 * hash_size]) for at in range(0, pairs * 2 * hash_size, 2 * hash_size)]
    return parents if len(level) == 2 * pairs else [*parents, level[-1]]


def _check_hashes(path: Sequence[bytes], what: str) -> None:
    if len(path) > path_hashes_max or any(len(item) != hash_size for item in path):
        raise Malformed(f"{what}: expected at most {path_hashes_max} hashes of {hash_size} bytes")
