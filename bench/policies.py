"""How fast an insurer's archive takes policies in, and gives one back: a consortium of 6 on this machine, policies of 100 KB.

    python -m bench.policies [--count 10000] [--runs 1] [--data DIR]

Prints the rate of `medshard policy import`, retention included, and the time of getting single policies back by their hash.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard.policies.importing import import_csv

size = 100_000


def make(folder: Path, count: int) -> Path:
    """The PDFs and the CSV that lists them."""
    folder.mkdir()
    with open(folder.with_suffix(".csv"), "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "number", "holder", "valid_from", "valid_to", "retain"])
        for number in range(count):
            (folder / f"{number}.pdf").write_bytes(b"%PDF-1.7\n" + os.urandom(size - 9))
            end = 2028 + number % 10
            table.writerow([f"{number}.pdf", f"VN-{number}", f"Holder {number}", "2024-01-01", f"{end}-{1 + number % 12:02}-28", "10y"])
    return folder.with_suffix(".csv")


async def run(count: int, data: Path) -> dict[str, float]:
    """One run: seconds and rates."""
    source = make(data / "policies", count)
    with LocalConsortium(data / "trial") as trial:
        async with Vault.open(trial.vault_home, trial.passphrase) as vault:
            started = time.monotonic()
            done = await import_csv(vault, source, data / "policies", data / "report.csv")
            took = time.monotonic() - started
            assert done.stored == count, done
            waits = []
            for number in random.sample(range(count), min(20, count)):
                whole = (data / "policies" / f"{number}.pdf").read_bytes()
                started = time.monotonic()
                await vault.get(sha256(whole).digest(), data / "back.pdf")
                waits.append(time.monotonic() - started)
                assert (data / "back.pdf").read_bytes() == whole
    return {"import_s": took, "policies_per_s": count / took, "restore_median_s": statistics.median(waits), "restore_worst_s": max(waits)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--data", type=Path, help="folder for all data (default: the tmpfs, if there is one)")
    chosen = parser.parse_args()
    parent = chosen.data or next((Path(name) for name in ("/dev/shm",) if os.access(name, os.W_OK)), None)
    runs = []
    for _ in range(chosen.runs):
        folder = Path(tempfile.mkdtemp(prefix="medshard-policies-", dir=parent))
        try:
            runs.append(asyncio.run(run(chosen.count, folder)))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({name: statistics.median(each[name] for each in runs) for name in runs[0]}, indent=1))


if __name__ == "__main__":
    main()
