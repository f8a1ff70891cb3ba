"""The bulk multiplication over GF(2^8) where the C kernel could not be built: numpy table look-ups.

Law: the arguments, checks, errors and results of ``_gf256.matmul``, only slower. galois.py chooses between the two; importing this
file imports numpy, so nothing else imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

count_max = 255  # rows or columns: a code over GF(2^8) has at most 255 cells
block_bytes = 32 * 1024  # of each buffer at a time, so that a look-up's result is still in cache when it is added


def paths() -> tuple[str, ...]:
    """Names of the kernels this machine can run, best first."""
    return ("numpy",)


def matmul(
    matrix: bytes,
    inputs: Sequence[ReadableBuffer],
    outputs: Sequence[WriteableBuffer],
    path: int = -1,
    accumulate: bool = False,
) -> None:
    """``outputs[r] = XOR over c of matrix[r * len(inputs) + c] * inputs[c]``; with ``accumulate``, XORed into what they hold.

    Raises ValueError for lengths that differ, counts that do not match the matrix, a read-only output or one that overlaps anything.
    """
    if not -1 <= path < 1:
        raise ValueError(f"path {path}: this machine has 0 to 0, or -1 for the best")
    if not isinstance(matrix, bytes):
        raise TypeError(f"matmul() argument 1 must be bytes, not {type(matrix).__name__}")
    views = _views(inputs, "input", 1)
    cols = len(views)
    views += _views(outputs, "output", 0)
    if len(matrix) != cols * (len(views) - cols):
        raise ValueError(f"matrix has {len(matrix)} bytes, expected {len(views) - cols} x {cols}")
    arrays = _checked(views, cols)
    for r, out in enumerate(arrays[cols:]):
        row = matrix[r * cols : (r + 1) * cols]
        if not accumulate:
            out[:] = 0
        for at in range(0, len(out), block_bytes):
            part = slice(at, at + block_bytes)
            for factor, source in zip(row, arrays[:cols], strict=True):
                if factor:
                    out[part] ^= source[part] if factor == 1 else _products()[factor].take(source[part])


@cache
def _products() -> NDArray[np.uint8]:
    """256 x 256: the product of every two elements. Twice a row, plus the elements themselves where the factor is odd."""
    elements = np.arange(256, dtype=np.uint8)
    table = np.zeros((256, 256), dtype=np.uint8)
    for factor in range(1, 256):
        half = table[factor >> 1]
        table[factor] = half << 1 ^ (half >> 7) * 0x1D ^ elements * (factor & 1)
    return table


def _views(items: Sequence[Any], what: str, least: int) -> list[memoryview]:
    if not least <= len(items) <= count_max:
        raise ValueError(f"{len(items)} {what}s: expected {least} to {count_max}")
    views = [memoryview(item) for item in items]
    for i, view in enumerate(views):
        if not view.c_contiguous:
            raise ValueError(f"{what} {i} is not one contiguous buffer")
    return views


def _checked(views: list[memoryview], cols: int) -> list[NDArray[np.uint8]]:
    """The views as arrays: all as long as the first; every output writable and apart from all inputs and other outputs."""
    length = views[0].nbytes
    for i, view in enumerate(views):
        if view.nbytes != length:
            raise ValueError(f"{_name(i, cols)} has {view.nbytes} bytes, input 0 has {length}")
        if i >= cols and view.readonly:
            raise ValueError(f"{_name(i, cols)} is read-only")
    if length == 0:
        return []
    arrays = [np.frombuffer(view, dtype=np.uint8) for view in views]
    starts = [int(array.__array_interface__["data"][0]) for array in arrays]
    for i in range(cols, len(views)):
        for j in range(i):
            if abs(starts[i] - starts[j]) < length:
                raise ValueError(f"{_name(i, cols)} overlaps {_name(j, cols)}")
    return arrays


def _name(i: int, cols: int) -> str:
    return f"input {i}" if i < cols else f"output {i - cols}"
