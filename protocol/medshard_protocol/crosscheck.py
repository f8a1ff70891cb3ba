"""Checking cells that one has not got, against each other: tags that fit the erasure code, and how many of them may be given to whom.

Law: a tag is a few bytes that depend on every byte of a cell, by coefficients that nobody knows before the challenge and that are the same
for all cells of a stripe. It is linear over the code's own field, so the tags of a stripe are a word of the same code: whoever has k + 1 of
them sees whether they belong together, and has not seen a cell (after HAIL by Bowers, Juels and Oprea, CCS 2009, where a verifier
with a key does this). What a tag gives away, and how often, is bounded by ``allowance``: with all tags that an institution ever gets and
all shards that it may ever hold, it has less than k cells of every stripe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import Final, NamedTuple

from blake3 import blake3

from medshard_protocol.erasure import Code
from medshard_protocol.galois import matmul, mul
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.manifest import Manifest
from medshard_protocol.repairorder import Institutions, objection_to_replacement
from medshard_protocol.shards import Layout

label: Final = b"medshard/audit-tag/v1"
tag_size_max: Final = 4  # a wrong cell passes once in 2^28
tags_max: Final = 32  # of one cell, to one institution, ever
spread: Final = 512  # bytes in a block
blocks_max: Final = 255  # rows that one multiplication takes
certain_bytes: Final = 2  # of tags that fit by more than chance, before those that do not are called wrong
guesses_max: Final = 500  # sets of k tags that are taken for true ones, one after the other: enough where a quarter of 16 is wrong


class Allowance(NamedTuple):
    """What one institution may be told of one cell by one holder: tags of ``size`` bytes, so many of them."""

    size: int
    times: int


def allowance(layout: Layout, stripe: int, moved: int) -> Allowance:
    """What a holder may tell an institution of its cell of a stripe. ``moved``: how many nodes had the shard before it did.

    All holders together that a shard ever had tell at most 2 x size x times bytes of a cell, and there are at most n - k + 1 cells to ask
    for beside the k - 1 that an institution may hold: half a cell in all, where one more is needed.
    """
    length, others = layout.cell_length(stripe), layout.n - layout.k + 1
    size = max(1, min(tag_size_max, length // (4 * tags_max * others)))
    return Allowance(size, min(tags_max, length // (4 * size * others)) >> moved)


def tag(file_id: FileId, cell_number: int, nonce: bytes, cell: bytes | memoryview, size: int) -> bytes:
    """The tag of a cell for a challenge. Cells of one stripe are equally long, and so are their tags' coefficients."""
    length = max(spread, -(-len(cell) // blocks_max))
    blocks = -(-len(cell) // length)
    padded = bytes(cell) + bytes(blocks * length - len(cell))
    seed = label + file_id + cell_number.to_bytes(4, "big") + size.to_bytes(1, "big") + nonce
    coefficients = blake3(seed).digest(length=size * (blocks + length))
    rows = [bytearray(length) for _ in range(size)]
    matmul(coefficients[: size * blocks], [memoryview(padded)[at : at + length] for at in range(0, len(padded), length)], rows)
    return bytes(_contract(row, coefficients[size * blocks + r * length :]) for r, row in enumerate(rows))


def _contract(row: bytearray, coefficients: bytes) -> int:
    total = 0
    for factor, byte in zip(coefficients, row, strict=False):
        total ^= mul(factor, byte)
    return total


class Agreement(NamedTuple):
    """Shards whose tags belong together, and those whose tags do not belong to them."""

    fit: frozenset[int]
    wrong: frozenset[int]


def compare(code: Code, tags: Mapping[int, bytes], trusted: int | None = None) -> Agreement | None:
    """Say which tags of a stripe, by shard, belong together; None where that cannot be told.

    ``trusted`` is a shard whose tag is known to be right: the own one.
    """
    if len(tags) <= code.k:
        return None
    best: set[frozenset[int]] = set()
    most = 0
    for have in _guesses(code, list(tags), trusted):
        fit = _fitting(code, tags, have)
        if len(fit) > most:
            best, most = {fit}, len(fit)
        elif len(fit) == most:
            best.add(fit)
        if 2 * most >= len(tags) + code.k:  # two words of a code agree in fewer than k places: none fits better
            break
    fit = best.pop()
    size = len(next(iter(tags.values())))
    wrong = frozenset(tags) - fit
    if best or len(fit) <= code.k or (wrong and (len(fit) - code.k) * size < certain_bytes):
        return None
    return Agreement(fit, wrong)


def _guesses(code: Code, shards: list[int], trusted: int | None) -> Iterator[tuple[int, ...]]:
    """Sets of k shards, all of them where there are few, with the trusted one in each."""
    sure = tuple(shard for shard in shards if shard == trusted)
    others, count = [shard for shard in shards if shard != trusted], code.k - len(sure)
    if comb(len(others), count) <= guesses_max:
        yield from (sure + chosen for chosen in combinations(others, count))
        return
    for number in range(guesses_max):  # as good as by chance, and the same everywhere
        drawn = sorted(others, key=lambda shard: blake3(bytes([shard, number >> 8, number & 255])).digest())
        yield sure + tuple(drawn[:count])


def _fitting(code: Code, tags: Mapping[int, bytes], have: Sequence[int]) -> frozenset[int]:
    others = [shard for shard in tags if shard not in have]
    out = [bytearray(len(tags[shard])) for shard in others]
    code.rebuild(have, [tags[shard] for shard in have], others, out)
    return frozenset(have) | {shard for shard, expected in zip(others, out, strict=True) if tags[shard] == expected}


# -- who may ask, and since when a holder has its shard


def ever(manifest: Manifest, given: Sequence[tuple[int, NodeId]], institution: Institutions) -> list[tuple[int, NodeId]]:
    """All (shard, node) that the manifest and the MOVE entries that counted ever gave, in order. ``given`` are those with effect."""
    counted: list[tuple[int, NodeId]] = []
    for shard, node in given:
        if shard < manifest.layout.n and objection_to_replacement(manifest, shard, node, counted, institution) is None:
            counted.append((shard, node))
    return [*((shard, ref.node) for shard, ref in enumerate(manifest.shards)), *counted]


def times_moved(held: Sequence[tuple[int, NodeId]], shard: int) -> int:
    """How many had a shard before its present holder."""
    return sum(1 for each, _ in held if each == shard) - 1
