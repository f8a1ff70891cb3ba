"""The bulk multiplication: every kernel this machine can run, numpy among them, does the same and refuses the same."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pytest

from medshard_protocol import galois_numpy
from medshard_protocol.galois import invert, mul, reciprocal, times

try:
    from medshard_protocol import _gf256
except ImportError:  # no compiler where this was installed: numpy serves, and is tested alone
    _gf256 = None  # type: ignore[assignment]


class Matmul(Protocol):
    def __call__(self, matrix: bytes, inputs: Sequence[Any], outputs: Sequence[Any], path: int = -1, accumulate: bool = False) -> None: ...


modules = [pytest.param(galois_numpy.matmul, id="numpy")]
kernels = [pytest.param(galois_numpy.matmul, 0, id="numpy")]
if _gf256 is not None:
    modules.append(pytest.param(_gf256.matmul, id="c"))
    kernels += [pytest.param(_gf256.matmul, i, id=name) for i, name in enumerate(_gf256.paths())]

edge_lengths = [
    0,
    1,
    2,
    3,
    7,
    8,
    *range(15, 18),
    *range(31, 34),
    *range(47, 50),
    *range(63, 66),
    95,
    127,
    128,
    129,
    191,
    192,
    193,
    255,
    511,
    513,
]


def expected(matrix: bytes, inputs: list[bytes], start: list[bytes]) -> list[bytes]:
    """The definition, with big integers: no kernel, no table of ours but ``times``."""
    results = []
    for r, first in enumerate(start):
        total = int.from_bytes(first)
        for c, cell in enumerate(inputs):
            total ^= int.from_bytes(cell.translate(times(matrix[r * len(inputs) + c])))
        results.append(total.to_bytes(len(first)))
    return results


def in_a_larger_buffer(content: bytes, offset: int) -> tuple[bytearray, memoryview]:
    """A buffer that starts at an odd address, with bytes around it that must stay as they are."""
    whole = bytearray(b"\xa5" * offset + content + b"\xa5" * 70)
    return whole, memoryview(whole)[offset : offset + len(content)]


def check_one(matmul: Matmul, path: int, rows: int, cols: int, length: int, *, offset: int = 0, accumulate: bool = False) -> None:
    rng = random.Random(f"{rows} {cols} {length} {offset}")
    matrix = rng.randbytes(rows * cols)
    inputs = [rng.randbytes(length) for _ in range(cols)]
    before = [rng.randbytes(length) for _ in range(rows)]
    ins = [in_a_larger_buffer(cell, (offset + 3 * i) % 64) for i, cell in enumerate(inputs)]
    outs = [in_a_larger_buffer(cell, (offset + 5 * i) % 64) for i, cell in enumerate(before)]
    matmul(matrix, [view for _, view in ins], [view for _, view in outs], path, accumulate)
    want = expected(matrix, inputs, before if accumulate else [bytes(length)] * rows)
    for i, (whole, _) in enumerate(outs):
        skip = (offset + 5 * i) % 64
        assert whole == b"\xa5" * skip + want[i] + b"\xa5" * 70, f"output {i} of {rows} x {cols}, {length} bytes"


@pytest.mark.parametrize(("matmul", "path"), kernels)
@pytest.mark.parametrize("accumulate", [False, True], ids=["fresh", "accumulate"])
def test_every_length_around_a_vector_and_its_multiples_comes_out_right(matmul: Matmul, path: int, accumulate: bool) -> None:
    for length in edge_lengths:
        check_one(matmul, path, 3, 4, length, accumulate=accumulate)


@pytest.mark.parametrize(("matmul", "path"), kernels)
def test_buffers_at_odd_addresses_come_out_right_and_their_neighbours_stay(matmul: Matmul, path: int) -> None:
    for offset in (1, 2, 7, 13, 31, 33, 63):
        for length in (1, 31, 64, 200):
            check_one(matmul, path, 2, 3, length, offset=offset)


@pytest.mark.parametrize(("matmul", "path"), kernels)
def test_every_count_of_rows_comes_out_right(matmul: Matmul, path: int) -> None:
    for rows in range(21):
        check_one(matmul, path, rows, 5, 149, accumulate=rows % 2 == 1)


@pytest.mark.parametrize(("matmul", "path"), kernels)
@pytest.mark.parametrize(("rows", "cols", "length"), [(20, 30, 5003), (255, 255, 70), (255, 1, 600), (1, 255, 3001), (6, 10, 70_001)])
def test_work_of_many_blocks_comes_out_right(matmul: Matmul, path: int, rows: int, cols: int, length: int) -> None:
    check_one(matmul, path, rows, cols, length)
    check_one(matmul, path, rows, cols, length, offset=9, accumulate=True)


@pytest.mark.parametrize(("matmul", "path"), kernels)
def test_every_product_of_two_elements_is_right(matmul: Matmul, path: int) -> None:
    elements = bytes(range(256))
    products = [bytearray(256) for _ in range(255)]
    matmul(bytes(range(255)), [elements], products, path)
    last = bytearray(256)
    matmul(b"\xff", [elements], [last], path)
    assert [bytes(row) for row in [*products, last]] == [bytes(mul(a, b) for b in range(256)) for a in range(256)]


@pytest.mark.skipif(_gf256 is None, reason="the C kernel was not built here")
def test_every_kernel_agrees_with_the_portable_one_on_random_work() -> None:
    rng = random.Random(1)
    names = _gf256.paths()
    for _ in range(60):
        rows, cols, length = rng.randint(1, 18), rng.randint(1, 40), rng.randint(0, 3000)
        matrix, inputs = rng.randbytes(rows * cols), [rng.randbytes(length) for _ in range(cols)]
        results = []
        for path in range(len(names)):
            outputs = [bytearray(length) for _ in range(rows)]
            _gf256.matmul(matrix, inputs, outputs, path)
            results.append(outputs)
        outputs = [bytearray(length) for _ in range(rows)]
        galois_numpy.matmul(matrix, inputs, outputs)
        assert all(result == results[names.index("portable")] for result in [*results, outputs])


@pytest.mark.skipif(_gf256 is None, reason="the C kernel was not built here")
def test_portable_c_is_always_there_and_comes_last() -> None:
    assert _gf256.paths()[-1] == "portable"


@pytest.mark.parametrize("matmul", modules)
def test_any_writable_buffer_serves(matmul: Matmul) -> None:
    array = np.zeros((2, 8), dtype=np.uint32)
    matmul(b"\1\2", (np.arange(32, dtype=np.uint8),), [array[0], memoryview(array[1])])
    assert array.tobytes() == bytes(range(32)) + bytes(mul(2, x) for x in range(32))


def refused(matmul: Matmul, message: str, *args: Any, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        matmul(*args)


@pytest.mark.parametrize("matmul", modules)
def test_counts_that_do_not_match_the_matrix_are_refused(matmul: Matmul) -> None:
    cell, out = b"ab", [bytearray(2), bytearray(2)]
    refused(matmul, "matrix has 3 bytes, expected 2 x 2", b"abc", [cell, cell], out)
    refused(matmul, "matrix has 1 bytes, expected 0 x 1", b"a", [cell], [])
    refused(matmul, "0 inputs: expected 1 to 255", b"", [], out)
    refused(matmul, "256 inputs: expected 1 to 255", bytes(256), [cell] * 256, out[:1])
    refused(matmul, "256 outputs: expected 0 to 255", bytes(256), [cell], [bytearray(2) for _ in range(256)])


@pytest.mark.parametrize("matmul", modules)
def test_buffers_of_another_length_are_refused(matmul: Matmul) -> None:
    refused(matmul, "input 1 has 1 bytes, input 0 has 2", b"ab", [b"ab", b"c"], [bytearray(2)])
    refused(matmul, "output 0 has 1 bytes, input 0 has 2", b"a", [b"ab"], [bytearray(1)])
    refused(matmul, "output 1 has 3 bytes, input 0 has 2", b"ab", [b"ab"], [bytearray(2), bytearray(3)])


@pytest.mark.parametrize("matmul", modules)
def test_a_read_only_output_is_refused(matmul: Matmul) -> None:
    refused(matmul, "output 0 is read-only", b"a", [b"ab"], [b"cd"])
    refused(matmul, "output 0 is read-only", b"a", [b"ab"], [memoryview(bytearray(2)).toreadonly()])


@pytest.mark.parametrize("matmul", modules)
@pytest.mark.parametrize("distance", [0, 1, 99, -1, -99])
def test_an_output_that_overlaps_anything_is_refused_before_a_byte_is_written(matmul: Matmul, distance: int) -> None:
    whole = memoryview(bytearray(range(250)) + bytearray(50))
    one, two = whole[100:200], whole[100 + distance : 200 + distance]
    refused(matmul, "output 0 overlaps input 1", b"ab", [bytes(100), one], [two])
    refused(matmul, "output 1 overlaps output 0", b"ab", [bytes(100)], [one, two])
    assert whole == bytes(range(250)) + bytes(50)


@pytest.mark.parametrize("matmul", modules)
def test_outputs_beside_inputs_and_inputs_over_each_other_are_allowed(matmul: Matmul) -> None:
    whole = memoryview(bytearray(range(1, 65)) + bytearray(32))
    matmul(b"\1\1", [whole[:32], whole[:32]], [whole[32:64]])
    assert whole == bytes(range(1, 33)) + bytes(64)


@pytest.mark.parametrize("matmul", modules)
def test_empty_buffers_overlap_nothing(matmul: Matmul) -> None:
    empty = bytearray()
    matmul(b"ab", [empty], [empty, empty])


@pytest.mark.parametrize("matmul", modules)
def test_what_is_not_one_block_of_bytes_is_refused(matmul: Matmul) -> None:
    every_second = memoryview(bytearray(8))[::2]
    refused(matmul, "input 0 is not one contiguous buffer", b"a", [every_second], [bytearray(4)])
    refused(matmul, "output 0 is not one contiguous buffer", b"a", [bytes(4)], [every_second])
    refused(matmul, "bytes-like object", b"a", [7], [bytearray(4)], error=TypeError)
    refused(matmul, "bytes-like object", b"a", b"a", [bytearray(4)], error=TypeError)
    refused(matmul, "must be bytes, not str", "a", [b"a"], [bytearray(1)], error=TypeError)


@pytest.mark.parametrize(("matmul", "path"), kernels)
def test_a_kernel_that_is_not_there_is_refused(matmul: Matmul, path: int) -> None:
    refused(matmul, "path 9: this machine has 0 to", b"a", [b"a"], [bytearray(1)], 9)
    refused(matmul, "path -2: this machine has 0 to", b"a", [b"a"], [bytearray(1)], -2)
    matmul(b"\1", [b"a"], [bytearray(1)], path)


@pytest.mark.skipif(_gf256 is None, reason="the C kernel was not built here")
def test_buffers_are_let_go_after_the_call_and_after_a_refusal() -> None:
    cell, out = bytearray(8), bytearray(8)
    _gf256.matmul(b"\1", [cell], [out])
    refused(_gf256.matmul, "overlaps", b"\1", [cell], [cell])
    refused(_gf256.matmul, "bytes-like object", b"\1\1", [cell, 7], [out], error=TypeError)
    cell.append(1)  # BufferError if a view were left
    out.append(1)


@pytest.mark.skipif(_gf256 is None, reason="the C kernel was not built here")
def test_another_thread_runs_while_the_kernel_works() -> None:
    """With a switch interval this long nobody is made to hand over the lock: the count moves only if the kernel lets go of it."""
    cells, outs, matrix = [bytes(1 << 17)] * 20, [bytearray(1 << 17) for _ in range(20)], bytes(range(20)) * 20
    portable = len(_gf256.paths()) - 1
    count, seen, done = 0, 0, threading.Event()

    def work() -> None:
        nonlocal seen
        for _ in range(200):
            before = count
            _gf256.matmul(matrix, cells, outs, portable)
            seen += count != before
            if seen == 3:
                break
        done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        while not done.is_set():
            count += 1
            time.sleep(0)  # gives the lock back by itself
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen == 3


def test_without_the_c_kernel_numpy_serves_with_one_warning() -> None:
    script = """
import sys, warnings
sys.modules["medshard_protocol._gf256"] = None  # as if it had never been built
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    from medshard_protocol import erasure, galois
    from medshard_protocol.erasure import code
    for _ in range(3):
        cells = [b"abc", b"def", *(bytearray(3) for _ in range(2))]
        code(2, 4).encode(cells[:2], cells[2:])
        again = bytearray(3)
        code(2, 4).rebuild((2, 3), cells[2:], (0,), [again])
print(bytes(again), galois.paths(), [str(w.message)[:45] for w in caught])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "b'abc' ('numpy',) ['medshard was installed without its C kernel, ']\n"


@pytest.mark.skipif(_gf256 is None, reason="the C kernel was not built here")
def test_importing_the_code_imports_neither_numpy_nor_reedsolo() -> None:
    script = "import sys, medshard_protocol.erasure; print([m for m in ('numpy', 'reedsolo') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_element_but_zero_has_a_reciprocal() -> None:
    assert all(mul(a, reciprocal(a)) == 1 for a in range(1, 256))
    with pytest.raises(ZeroDivisionError):
        reciprocal(0)


def test_a_matrix_times_its_inverse_is_the_identity() -> None:
    rng = random.Random(2)
    for size in (1, 2, 3, 7, 20):
        matrix = rng.randbytes(size * size)
        inverse = invert(matrix, size)
        rows = [bytearray(size) for _ in range(size)]
        galois_numpy.matmul(matrix, [inverse[i * size : (i + 1) * size] for i in range(size)], rows)
        assert rows == [bytes(int(i == j) for j in range(size)) for i in range(size)]


def test_a_singular_matrix_and_one_that_is_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="singular"):
        invert(b"\1\2\2\4", 2)
    with pytest.raises(ValueError, match="expected 2 x 2"):
        invert(b"\1\2\2", 2)
