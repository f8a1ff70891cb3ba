"""What the erasure kernel does on one core: GB/s of data for each path this machine has, code 10/16.

Law: it measures and prints, and asserts nothing. *hot* codes the same stripe again, whose cells are in cache as they are after
sealing; *cold* goes through stripes that no cache holds. Other programs disturb a run in one direction only, so the best round says
what the kernel can do and the median what it did here.

    python bench/kernel.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medshard_protocol import galois, galois_numpy
from medshard_protocol.erasure import code

k, n = 10, 16
cell_sizes = (32 * 1024, 128 * 1024)
round_bytes = 4 * 1024 * 1024  # of data in one timed round: long against the clock, short against the scheduler
rounds = 30
cold_bytes = 48 * 1024 * 1024  # of data; with its parity more than the last-level cache of most machines


class Stripe(NamedTuple):
    inputs: list[bytes]
    outputs: list[bytearray]


def measure() -> dict[str, Any]:
    """Every path at every cell size: encode hot and cold, decode with n - k data cells lost, and the row of one repair."""
    have = tuple(range(n - k, n))
    lost = b"".join(code(k, n).row(have, i) for i in range(n - k))
    one = code(k, n).row(have, 0)
    results = []
    for name, matmul, path in _kernels():
        for cell_bytes in cell_sizes:
            hot = [_stripe(cell_bytes)]
            cold = [_stripe(cell_bytes) for _ in range(cold_bytes // (k * cell_bytes))]
            results.append(
                {
                    "path": name,
                    "cell_bytes": cell_bytes,
                    "encode": _rates(matmul, path, code(k, n).parity_matrix, hot),
                    "encode_cold": _rates(matmul, path, code(k, n).parity_matrix, cold),
                    "decode": _rates(matmul, path, lost, hot),
                    "repair": _rates(matmul, path, one, [Stripe(hot[0].inputs, hot[0].outputs[:1])]),
                }
            )
    return {"code": [k, n], "unit": "GB/s of data (10^9 input bytes a second), one core", "results": results}


def _kernels() -> list[tuple[str, Any, int]]:
    found: list[tuple[str, Any, int]] = [(name, galois.matmul, i) for i, name in enumerate(galois.paths())]
    return found if found[-1][0] == "numpy" else [*found, ("numpy", galois_numpy.matmul, 0)]


def _stripe(cell_bytes: int) -> Stripe:
    return Stripe([os.urandom(cell_bytes) for _ in range(k)], [bytearray(cell_bytes) for _ in range(n - k)])


def _rates(matmul: Any, path: int, matrix: bytes, stripes: Sequence[Stripe]) -> dict[str, float]:
    stripe_bytes = k * len(stripes[0].inputs[0])
    deadline = time.perf_counter() + 1  # the slow paths get fewer rounds
    seconds: list[float] = []
    at = 0
    while len(seconds) < rounds and (len(seconds) < 3 or time.perf_counter() < deadline):
        start, done = time.perf_counter(), 0
        while done < round_bytes:
            inputs, outputs = stripes[at % len(stripes)]
            matmul(matrix, inputs, outputs, path)
            at, done = at + 1, done + stripe_bytes
        seconds.append((time.perf_counter() - start) / done)
    return {"best": round(1e-9 / min(seconds), 2), "median": round(1e-9 / statistics.median(seconds), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the erasure kernel on one core.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    wanted = parser.parse_args()
    measured = measure()
    if wanted.json:
        wanted.json.write_text(json.dumps(measured, indent=1) + "\n")
    works = ("encode", "encode_cold", "decode", "repair")
    print(f"code {k}/{n}, {measured['unit']}: best (median)")
    print(f"{'path':<14}{'cell':>8}" + "".join(f"{work.replace('_', ', '):>18}" for work in works))
    for row in measured["results"]:
        figures = "".join(f"{row[work]['best']:>9.2f} ({row[work]['median']:.2f})".rjust(18) for work in works)
        print(f"{row['path']:<14}{row['cell_bytes'] // 1024:>4} KiB{figures}")


if __name__ == "__main__":
    main()
