"""Deciding what to repair and by whom, and the arithmetic of a chain. The node that asks does the fetching; nothing here sends or keeps.

Law: the replacement makes shard t from k helpers in a line. Each adds (XOR) its coefficient times its own cell to the sum that came from
the one before it, adds masks, and sends it on: one that only it and the replacement know, and one for each other helper that only those
two know. The latter cancel in the last sum; the replacement takes the others off and has shard t. Helpers learn nothing, alone or
together, and helpers that collude with the replacement learn nothing but the shard: docs/decisions/0030-repair.md has the argument.

Cells that go into a sum are checked by their holder, the finished shard by its root; a wrong sum gives wrong bytes, not an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, combinations
from typing import Final, TypeVar

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from medshard_protocol import erasure
from medshard_protocol.erasure import Code
from medshard_protocol.facts import Moved
from medshard_protocol.galois import matmul
from medshard_protocol.ids import NodeId
from medshard_protocol.manifest import Manifest
from medshard_protocol.shards import Layout

_T = TypeVar("_T")

seed_size: Final = 32  # an AES-256 key
frame_bytes: Final = 128 * 1024  # sums travel in frames of about this many bytes: a line of k helpers is busy all along after k of them
frame_head: Final = 1  # bytes before a frame's cells: what it is
sum_frame: Final = b"\x00"  # cells follow
spread_sets: Final = 64  # of 15 helpers with two who spoil sums, each 10 find one of these without them
broken_frame: Final = b"\x01"  # the line broke: two node ids follow, and nothing after them


# -- deciding


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Shards that can be made again, and k that they are made from."""

    helpers: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """Shards that cannot be made again, because fewer than k others are there."""

    missing: tuple[int, ...]


def plan(alive: Collection[int], code: Code) -> Rebuild | Lost | None:
    """Say what one file needs, given which of its shards are there, the best first; None for nothing."""
    missing = tuple(i for i in range(code.n) if i not in alive)
    if not missing:
        return None
    if len(alive) < code.k:
        return Lost(missing)
    return Rebuild(helpers=tuple(alive)[: code.k], targets=missing)


def holders(manifest: Manifest, moves: Mapping[int, Moved]) -> tuple[NodeId, ...]:
    """Who should hold each shard now: whom the manifest names, or who took it over last."""
    return tuple(moves[i].node if i in moves else ref.node for i, ref in enumerate(manifest.shards))


def helper_sets(ranked: Sequence[_T], k: int) -> Iterator[tuple[_T, ...]]:
    """Sets of k helpers to try in turn: the first k, then those with one of them exchanged for the next, then others from everywhere, and
    at last all that are left.

    If one helper spoils the sum, the first good set after a bad one says who it was. If several do, a set without them is as likely to be
    among the next as among any; in their natural order the first hundreds would have the same helpers in front.
    """
    if len(ranked) < k:
        return
    first = tuple(range(k))
    exchanged = (first[:at] + first[at + 1 :] + (k,) for at in range(k if len(ranked) > k else 0))
    spread = (_spread(len(ranked), k, number) for number in range(spread_sets))
    tried = set[tuple[int, ...]]()
    for chosen in chain((first,), exchanged, spread, combinations(range(len(ranked)), k)):
        if chosen not in tried:
            tried.add(chosen)
            yield tuple(ranked[at] for at in chosen)


def _spread(n: int, k: int, number: int) -> tuple[int, ...]:
    """k of n places in order, chosen without regard to anything, and always the same."""
    return tuple(sorted(sorted(range(n), key=lambda at: sha256(number.to_bytes(4) + at.to_bytes(4)).digest())[:k]))


# -- sums


class Mask:
    """What is added to all sums of one chain: key streams of AES-256 in counter mode from zero, under secrets that are used once."""

    def __init__(self, *secrets: bytes) -> None:
        self._streams = [Cipher(AES256(secret), CTR(bytes(16))).encryptor() for secret in secrets]

    def add(self, data: bytes | bytearray | memoryview) -> bytes:
        """Add (equally: take off) the next ``len(data)`` bytes of each stream."""
        for stream in self._streams:
            data = stream.update(data)
        return bytes(data)


def coefficients(code: Code, have: Sequence[int], want: int) -> bytes:
    """For each shard in ``have``, in order, the element that its cells are multiplied by to make shard ``want``."""
    return erasure.code(code.k, code.n).row(have, want)


def add(before: bytes | bytearray | None, coefficient: int, own: bytes, mask: Mask) -> bytes:
    """One helper's step: the sum that it sends on, from the one that it got (None for the first helper) and cells of its own."""
    total = bytearray(len(own))
    if before is None:
        matmul(bytes([coefficient]), [own], [total])
    else:
        matmul(bytes([1, coefficient]), [before, own], [total])
    return mask.add(total)


# -- frames


@dataclass(frozen=True, slots=True)
class Frame:
    """Some cells of a shard that travel together: they begin at byte ``offset`` of it."""

    cells: range
    offset: int
    length: int


def frames(layout: Layout, first: int) -> Iterator[Frame]:
    """The frames of a chain that begins with cell ``first`` and goes to the shard's end. Everyone in it counts them alike."""
    step = max(1, frame_bytes // layout.cell_size)
    for start in range(first, layout.stripes, step):
        cells = range(start, min(start + step, layout.stripes))
        offset = start * layout.cell_size
        yield Frame(cells, offset, min(cells.stop * layout.cell_size, layout.shard_size) - offset)
