"""The code is stock reedsolo's, byte column by byte column, and any k cells are enough."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reedsolo import RSCodec

from medshard_protocol.erasure import Code, code
from medshard_protocol.galois import matmul

repository = Path(__file__).parent.parent.parent
vectors = json.loads((repository / "tests" / "vectors" / "erasure.json").read_text())


def encoded(k: int, n: int, length: int, seed: object = 0) -> list[bytes]:
    """All n cells of random data."""
    rng = random.Random(f"{k} {n} {length} {seed}")
    data = [rng.randbytes(length) for _ in range(k)]
    parity = [bytearray(length) for _ in range(n - k)]
    code(k, n).encode(data, parity)
    return [*data, *map(bytes, parity)]


def check_rebuild(cells: list[bytes], k: int, have: tuple[int, ...], want: tuple[int, ...]) -> None:
    out = [bytearray(len(cells[0])) for _ in want]
    code(k, len(cells)).rebuild(have, [cells[i] for i in have], want, out)
    assert out == [cells[i] for i in want], (have, want)


codes = st.integers(1, 255).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n)))


@given(codes, st.integers(1, 3), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_every_byte_column_is_what_stock_reedsolo_encodes(shape: tuple[int, int], length: int, seed: int) -> None:
    k, n = shape
    cells = encoded(k, n, length, seed)
    for column in zip(*cells, strict=True):
        stock = RSCodec(n - k, nsize=n).encode(bytes(column[:k])) if n > k else bytes(column[:k])
        assert bytes(column) == bytes(stock)


@pytest.mark.parametrize(("k", "n"), [(1, 2), (2, 4), (3, 6), (4, 9), (8, 16), (10, 16), (15, 30)])
@pytest.mark.parametrize("length", [1, 15, 16, 33, 64, 300])
def test_the_codes_of_the_profiles_are_stock_reedsolo_at_many_lengths(k: int, n: int, length: int) -> None:
    codec = RSCodec(n - k, nsize=n)
    for column in zip(*encoded(k, n, length), strict=True):
        assert bytes(column) == bytes(codec.encode(bytes(column[:k])))


@pytest.mark.parametrize(("k", "n"), [(2, 4), (10, 16), (128, 255)])
def test_stock_reedsolo_decodes_what_is_left_of_our_cells(k: int, n: int) -> None:
    cells = encoded(k, n, 3)
    lost = random.Random(3).sample(range(n), n - k)
    for column in zip(*cells, strict=True):
        damaged = bytes(0 if i in lost else b for i, b in enumerate(column))
        data = RSCodec(n - k, nsize=n).decode(damaged, erase_pos=lost)[0]
        assert bytes(data) == bytes(column[:k])


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 4), (2, 4), (3, 3), (3, 6), (4, 7), (5, 8)])
def test_any_k_cells_of_a_small_code_rebuild_all_n(k: int, n: int) -> None:
    cells = encoded(k, n, 21)
    for have in combinations(range(n), k):
        check_rebuild(cells, k, have, tuple(range(n)))
        check_rebuild(cells, k, have[::-1], tuple(i for i in range(n) if i not in have))


def test_any_ten_of_sixteen_cells_rebuild_the_data() -> None:
    cells = encoded(10, 16, 2)
    for have in combinations(range(16), 10):
        check_rebuild(cells, 10, have, tuple(i for i in range(10) if i not in have))


@given(codes, st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_random_k_cells_of_a_large_code_rebuild_random_others(shape: tuple[int, int], rng: random.Random) -> None:
    k, n = shape
    cells = encoded(k, n, 40)
    check_rebuild(cells, k, tuple(rng.sample(range(n), k)), tuple(rng.sample(range(n), rng.randint(0, n))))


@pytest.mark.parametrize(("k", "n"), [(127, 255), (128, 255), (1, 255), (254, 255), (255, 255)])
def test_codes_of_the_largest_size_rebuild_from_their_last_cells(k: int, n: int) -> None:
    cells = encoded(k, n, 70)
    check_rebuild(cells, k, tuple(range(n - k, n)), tuple(range(n)))


@pytest.mark.parametrize("want", [0, 9, 10, 15])
def test_helpers_in_a_line_add_up_the_lost_cell(want: int) -> None:
    cells = encoded(10, 16, 1000)
    helpers = [i for i in range(16) if i != want][3:13]
    passing = bytearray(1000)
    for helper, factor in zip(helpers, code(10, 16).row(helpers, want), strict=True):
        matmul(bytes([factor]), [cells[helper]], [passing], accumulate=True)
    assert passing == cells[want]


def test_a_code_without_parity_encodes_to_nothing() -> None:
    code(3, 3).encode([b"a", b"b", b"c"], [])
    assert code(3, 3).parity_matrix == b""


def test_the_same_code_is_made_once() -> None:
    assert code(10, 16) is code(10, 16)
    assert code(10, 16) == Code(10, 16)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (-1, 3), (5, 4), (1, 256), (0, 0)])
def test_a_code_that_cannot_be_is_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=rf"code {k}/{n}: expected 1 <= k <= n <= 255"):
        code(k, n)


def test_wrong_counts_of_cells_are_refused() -> None:
    a, out = b"ab", [bytearray(2), bytearray(2)]
    with pytest.raises(ValueError, match="1 data and 2 parity"):
        code(2, 4).encode([a], out)
    with pytest.raises(ValueError, match="2 data and 1 parity"):
        code(2, 4).encode([a, a], out[:1])
    with pytest.raises(ValueError, match="1 cells for 2 indices"):
        code(2, 4).rebuild((0, 1), [a], (2,), out[:1])
    with pytest.raises(ValueError, match="2 outputs for 1 indices"):
        code(2, 4).rebuild((0, 1), [a, a], (2,), out)


@pytest.mark.parametrize("have", [(0,), (0, 1, 2), (0, 0), ()])
def test_anything_but_k_different_cells_is_refused(have: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected exactly 2"):
        code(2, 4).rebuild(have, [b"ab"] * len(have), (3,), [bytearray(2)])
    with pytest.raises(ValueError, match="expected exactly 2"):
        code(2, 4).row(have, 3)


@pytest.mark.parametrize("index", [-1, 4])
def test_a_cell_outside_the_code_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"there is no cell {index}"):
        code(2, 4).row((0, 1), index)
    with pytest.raises(ValueError, match=f"there is no cell {index}"):
        code(2, 4).row((0, index), 3)


def test_overlapping_and_read_only_cells_are_refused() -> None:
    cell = bytearray(4)
    with pytest.raises(ValueError, match="overlaps"):
        code(2, 3).encode([cell, b"abcd"], [cell])
    with pytest.raises(ValueError, match="read-only"):
        code(2, 3).rebuild((0, 1), [cell, b"abcd"], (2,), [bytes(4)])


def named(vector: dict[str, Any]) -> str:
    return f"{vector['k']}of{vector['n']}"


@pytest.mark.parametrize("vector", vectors["encode"], ids=named)
def test_cells_match_the_vectors(vector: dict[str, Any]) -> None:
    k, n, cells = vector["k"], vector["n"], [bytes.fromhex(cell) for cell in vector["cells"]]
    parity = [bytearray(len(cells[0])) for _ in range(n - k)]
    code(k, n).encode(cells[:k], parity)
    assert parity == cells[k:]


@pytest.mark.parametrize("vector", vectors["parity_matrix"], ids=named)
def test_parity_matrices_match_the_vectors(vector: dict[str, Any]) -> None:
    assert code(vector["k"], vector["n"]).parity_matrix.hex() == "".join(vector["rows"])


def test_the_example_in_the_format_runs_on_reedsolo_alone(capsys: pytest.CaptureFixture[str]) -> None:
    page = (repository / "docs" / "formats" / "erasure-code.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out == "b'any k of n cells'\n"


@pytest.mark.parametrize("vector", vectors["repair"], ids=named)
def test_repair_coefficients_match_the_vectors(vector: dict[str, Any]) -> None:
    assert code(vector["k"], vector["n"]).row(vector["have"], vector["want"]).hex() == vector["coefficients"]
