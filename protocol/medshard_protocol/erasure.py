"""The erasure code: n cells of equal length, the first k of them the data, any k of them enough for all n.

Law: systematic Reed-Solomon, exactly ``reedsolo.RSCodec(n - k, nsize=n)`` down each byte column. The parity matrix is read off
reedsolo and nothing here says what is in it, so stock reedsolo decodes whatever this file encoded (docs/formats/erasure-code.md).
Cells arrive checked: a wrong cell gives wrong bytes, not an error. Who has which cell, and where it lies, is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from medshard_protocol.galois import invert, matmul

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

n_max = 255  # the non-zero elements of GF(2^8); reedsolo has no longer code in this field


@dataclass(frozen=True)
class Code:
    """A code of ``n`` cells, of which any ``k`` rebuild the others. Raises ValueError unless 1 <= k <= n <= 255.

    Every method takes and fills buffers of one length, any length; wrong counts, lengths or overlaps raise ValueError before a byte
    is written. Take one from ``code``, which keeps it and its matrices.
    """

    k: int
    n: int

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.n <= n_max:
            raise ValueError(f"code {self.k}/{self.n}: expected 1 <= k <= n <= {n_max}")

    @cached_property
    def parity_matrix(self) -> bytes:
        """The (n - k) x k matrix, row by row, that makes the parity cells from the data cells."""
        if self.k == self.n:
            return b""
        from reedsolo import RSCodec  # here, so that who only reads a manifest does not wait for its import

        codec = RSCodec(self.n - self.k, nsize=self.n)
        columns = [bytes(codec.encode(_unit(i, self.k)))[self.k :] for i in range(self.k)]
        return bytes(column[r] for r in range(self.n - self.k) for column in columns)

    def encode(self, data: Sequence[ReadableBuffer], parity: Sequence[WriteableBuffer]) -> None:
        """Fill the n - k ``parity`` cells from the k ``data`` cells."""
        if len(data) != self.k or len(parity) != self.n - self.k:
            raise ValueError(f"code {self.k}/{self.n}: {len(data)} data and {len(parity)} parity cells")
        matmul(self.parity_matrix, data, parity)

    def rebuild(
        self,
        have: Sequence[int],
        cells: Sequence[ReadableBuffer],
        want: Sequence[int],
        out: Sequence[WriteableBuffer],
    ) -> None:
        """Fill ``out`` with the cells of indices ``want`` from ``cells``, whose indices are the k different ones in ``have``."""
        if len(cells) != len(have) or len(out) != len(want):
            raise ValueError(f"{len(cells)} cells for {len(have)} indices, {len(out)} outputs for {len(want)} indices")
        matmul(_coefficients(self, tuple(have), tuple(want)), cells, out)

    def row(self, have: Sequence[int], want: int) -> bytes:
        """The k coefficients, in the order of ``have``, whose products with those cells add up (XOR) to cell ``want``.

        Chain repair: each helper multiplies its own cell by its own coefficient, and nobody sees more than a sum.
        """
        return _coefficients(self, tuple(have), (want,))


@lru_cache(maxsize=64)  # a program meets a handful of codes; each keeps at most 16 KiB
def code(k: int, n: int) -> Code:
    """The code of ``n`` cells, any ``k`` of which are enough. Raises ValueError unless 1 <= k <= n <= 255."""
    return Code(k, n)


def _unit(i: int, length: int) -> bytes:
    return bytes(i) + b"\1" + bytes(length - i - 1)


def _generator_row(code: Code, index: int) -> bytes:
    """The coefficients that make cell ``index`` from the data cells."""
    if index < code.k:
        return _unit(index, code.k)
    return code.parity_matrix[(index - code.k) * code.k : (index - code.k + 1) * code.k]


@lru_cache(maxsize=64)  # one for each set of nodes that answer at the moment; the largest has 64 KiB
def _inverse(code: Code, have: tuple[int, ...]) -> bytes:
    """The k x k matrix that makes the data cells from the cells ``have``."""
    if len(have) != code.k or len(set(have)) != code.k:
        raise ValueError(f"code {code.k}/{code.n}: {len(set(have))} different cells in {have}, expected exactly {code.k}")
    _check_indices(code, have)
    return invert(b"".join(_generator_row(code, i) for i in have), code.k)


@lru_cache(maxsize=256)  # the largest has 64 KiB, the usual one 160 bytes
def _coefficients(code: Code, have: tuple[int, ...], want: tuple[int, ...]) -> bytes:
    """The len(want) x k matrix that makes the cells ``want`` from the cells ``have``."""
    _check_indices(code, want)
    inverse = _inverse(code, have)
    columns = [inverse[r * code.k : (r + 1) * code.k] for r in range(code.k)]
    rows = [bytearray(code.k) for _ in want]
    matmul(b"".join(_generator_row(code, i) for i in want), columns, rows)
    return b"".join(rows)


def _check_indices(code: Code, indices: tuple[int, ...]) -> None:
    for i in indices:
        if not 0 <= i < code.n:
            raise ValueError(f"code {code.k}/{code.n}: there is no cell {i}")
