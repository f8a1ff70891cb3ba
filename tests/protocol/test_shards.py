"""Layout arithmetic: every byte of a sealed file lies in exactly one place, for every size and code."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from medshard_protocol.errors import Malformed
from medshard_protocol.shards import (
    Layout,
    cell_bytes_default,
    cell_bytes_least,
    cell_bytes_max,
    cells_in,
    cells_max,
    digests,
    sealed_bytes_max,
    shard_root,
    split,
    tag_bytes,
)

objects = json.loads((Path(__file__).parents[1] / "vectors" / "sealing.json").read_text())["objects"]
codes = st.integers(1, 20).flatmap(lambda k: st.tuples(st.just(k), st.integers(k, 40)))


def check(layout: Layout, plain_size: int) -> None:
    """All that holds for every layout."""
    stripes = range(layout.stripes)
    lengths = [layout.segment_length(stripe) for stripe in stripes]
    assert sum(lengths) == layout.sealed_size
    assert sum(length - tag_bytes for length in lengths) == plain_size == layout.plain_size
    assert all(length == layout.stripe_bytes for length in lengths[:-1])
    assert tag_bytes < lengths[-1] <= layout.stripe_bytes
    cells = [layout.cell_length(stripe) for stripe in stripes]
    assert all(cell == layout.cell_size for cell in cells[:-1])
    assert 1 <= cells[-1] <= layout.cell_size
    assert all(0 <= layout.k * cell - length < layout.k for cell, length in zip(cells, lengths, strict=True))
    assert sum(cells) == layout.shard_size
    assert cells_in(layout.shard_size, layout.cell_size) == layout.stripes
    assert [len(cell) for cell in split(bytes(layout.shard_size), layout.cell_size)] == cells


@pytest.mark.parametrize(("k", "n", "cell_size"), [(1, 1, 256), (2, 4, 256), (3, 6, 300), (10, 16, 257), (255, 255, 256)])
def test_every_size_up_to_some_stripes_has_a_layout(k: int, n: int, cell_size: int) -> None:
    step = 1 if k < 10 else 37
    for size in range(1, 3 * (k * cell_size - tag_bytes) + 3, step):
        layout = Layout.for_plain(size, k, n, cell_size)
        check(layout, size)
        assert layout.stripes == -(-size // (k * cell_size - tag_bytes))
        assert layout.cell_size == (cell_size if layout.stripes > 1 else max(layout.cell_length(0), 2, tag_bytes // k + 1))


@given(st.integers(1, 10**8), codes, st.integers(17_000, cell_bytes_max))
def test_any_code_and_cell_size_gives_a_layout(size: int, code: tuple[int, int], cell_size: int) -> None:
    check(Layout.for_plain(size, *code, cell_size), size)


@given(st.integers(1, 2**40), codes)
def test_large_files_are_laid_out_without_rounding(size: int, code: tuple[int, int]) -> None:
    k, n = code
    layout = Layout.for_plain(size, k, n) if size < k * cells_max * 2**16 else Layout.for_plain(size % 2**30 + 1, k, n)
    last = layout.stripes - 1
    assert last * layout.stripe_bytes + layout.segment_length(last) == layout.sealed_size
    assert last * layout.cell_size + layout.cell_length(last) == layout.shard_size
    assert layout.shard_size * n * k < (layout.sealed_size + k * (1 + tag_bytes)) * n + k * k * n  # a code's expansion, and a byte a cell


@given(st.integers(1, 5000), st.integers(0, 6000), st.integers(-1, 6000))
def test_a_range_of_plaintext_lies_in_the_stripes_named(size: int, offset: int, length: int) -> None:
    layout = Layout.for_plain(size, 3, 5, 256)
    expected = sorted({byte // layout.segment_plain for byte in range(offset, offset + length)})
    assert list(layout.stripes_of(offset, length)) == expected


def test_a_small_file_has_one_stripe_of_cells_no_larger_than_needed() -> None:
    layout = Layout.for_plain(1024, 3, 6)
    assert (layout.stripes, layout.cell_size, layout.shard_size, layout.sealed_size) == (1, 347, 347, 1040)
    assert Layout.for_plain(1, 255, 255).shard_size == 1


def test_the_reference_file_costs_what_the_code_says() -> None:
    layout = Layout.for_plain(100 * 2**20, 10, 16)
    assert layout.cell_size == cell_bytes_default
    assert layout.shard_size * 16 / (100 * 2**20) < 1.6002


@pytest.mark.parametrize("size", [0, -1])
def test_no_plaintext_at_all_is_a_callers_mistake(size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Layout.for_plain(size, 2, 4)


@pytest.mark.parametrize(
    ("k", "n", "cell_size", "sealed_size"),
    [
        (0, 4, 1000, 500),
        (5, 4, 1000, 500),
        (2, 256, 1000, 500),
        (2, 4, 0, 500),
        (2, 4, 1, 500),
        (2, 4, 8, 17),  # no room beside the tag
        (2, 4, cell_bytes_max + 1, 500),
        (2, 4, 1000, 0),
        (2, 4, 1000, 16),
        (2, 4, 1000, 2016),  # a last segment of nothing but a tag
        (2, 4, 1000, 2001),
        (2, 4, cell_bytes_least - 1, 1000),
        (255, 255, cell_bytes_max, sealed_bytes_max + 1),
        (1, 1, cell_bytes_least, (cells_max + 1) * cell_bytes_least),
        (2, 4, 1000, -5),
    ],
)
def test_a_shape_that_no_file_has_is_malformed(k: int, n: int, cell_size: int, sealed_size: int) -> None:
    with pytest.raises(Malformed):
        Layout(k, n, cell_size, sealed_size)


def test_the_longest_shard_is_allowed_and_one_cell_more_is_not() -> None:
    longest = Layout(10, 16, cell_bytes_default, cells_max * 10 * cell_bytes_default)
    assert cells_in(longest.shard_size, longest.cell_size) == cells_max
    with pytest.raises(Malformed, match="cells in a shard"):
        Layout(10, 16, cell_bytes_default, longest.sealed_size + 100)


@pytest.mark.parametrize("vector", objects, ids=lambda vector: vector["what"])
def test_a_vectors_shards_have_their_digests_and_roots(vector: dict[str, Any]) -> None:
    digest = digests[vector["digest"]]
    layout = Layout(vector["k"], vector["n"], vector["cell_size"], vector["sealed_size"])
    for shard, leaves, root in zip(vector["shards"], vector["cell_digests"], vector["roots"], strict=True):
        found = [digest(cell) for cell in split(bytes.fromhex(shard), layout.cell_size)]
        assert [item.hex() for item in found] == leaves
        assert shard_root(found, digest).hex() == root


def test_digests_are_what_their_names_say() -> None:
    for data in (b"", b"abc", bytes(5000)):
        assert digests["blake3"](memoryview(data)) == blake3(data).digest()
        assert digests["sha256"](bytearray(data)) == sha256(data).digest()


def test_moving_dropping_or_changing_a_cell_changes_the_root() -> None:
    digest = digests["blake3"]
    leaves = [digest(bytes([i])) for i in range(5)]
    changed = [leaves[::-1], leaves[:-1], [*leaves, leaves[-1]], [leaves[1], leaves[0], *leaves[2:]], [*leaves[:4], digest(b"x")]]
    roots = {shard_root(some, digest) for some in [leaves, *changed]}
    assert len(roots) == 6
