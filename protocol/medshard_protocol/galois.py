"""GF(2^8) with polynomial 0x11d and generator 2: scalars, the inverse of a small matrix, and the way to the bulk kernel.

Law: the field is the one reedsolo uses by default. ``matmul`` is the C kernel where it was built; where it was not, numpy serves with
the same arguments, checks and results, and importing this module warns once. It knows no code, no k and no n: see erasure.py.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

try:
    from medshard_protocol._gf256 import matmul, paths
except ImportError:
    from medshard_protocol.galois_numpy import matmul, paths

    warnings.warn(
        "medshard was installed without its C kernel, so numpy does the erasure coding, at less than a tenth of the speed; "
        "to build the kernel, install a C compiler and Python's headers, then install medshard again",
        RuntimeWarning,
        stacklevel=2,
    )

__all__ = ["invert", "matmul", "mul", "paths", "polynomial", "reciprocal", "times"]

polynomial = 0x11D


def _powers() -> bytes:
    """2^0 to 2^254, twice over, so that the sum of two logarithms is an index."""
    powers, x = bytearray(), 1
    for _ in range(255):
        powers.append(x)
        x = x << 1 ^ (polynomial if x & 0x80 else 0)
    return bytes(powers) * 2


_exp = _powers()
_log = bytes(1 if x == 0 else _exp.index(x) for x in range(256))  # zero has no logarithm: mul and reciprocal look before they use it


def mul(a: int, b: int) -> int:
    """The product of two field elements, each 0 to 255."""
    return _exp[_log[a] + _log[b]] if a and b else 0


def reciprocal(a: int) -> int:
    """The element whose product with ``a`` is 1. Raises ZeroDivisionError for 0."""
    if a == 0:
        raise ZeroDivisionError("0 has no reciprocal in GF(2^8)")
    return _exp[255 - _log[a]]


@lru_cache(maxsize=256)
def times(a: int) -> bytes:
    """The 256 products of ``a``, for ``bytes.translate``."""
    return bytes(mul(a, x) for x in range(256))


def invert(matrix: bytes, size: int) -> bytes:
    """The inverse of a ``size`` x ``size`` matrix, both row by row. Raises ValueError where there is none.

    Gauss-Jordan on whole rows: ``translate`` scales one, an integer XOR adds two.
    """
    if len(matrix) != size * size:
        raise ValueError(f"matrix has {len(matrix)} bytes, expected {size} x {size}")
    rows = [matrix[r * size : (r + 1) * size] + bytes(int(c == r) for c in range(size)) for r in range(size)]
    for column in range(size):
        pivot = next((r for r in range(column, size) if rows[r][column]), None)
        if pivot is None:
            raise ValueError("matrix is singular")
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = rows[column].translate(times(reciprocal(rows[column][column])))
        for r in range(size):
            if r != column and rows[r][column]:
                rows[r] = _add(rows[r], rows[column].translate(times(rows[r][column])))
    return b"".join(row[size:] for row in rows)


def _add(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a) ^ int.from_bytes(b)).to_bytes(len(a))
