"""What one ledger entry costs: `python -m bench.entry`. Processor time over all nodes, an append's latency, and that of a first read.

Sixteen nodes of sixteen institutions on this machine, as in bench/run.py. A read announces itself (a fresh ACCESS entry each time), so it
shows the entry and what holders do with it; `between` seconds apart, so that what nodes put off is in the figures too. Idle processor
time is measured before and taken off. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from bench.machine import MIB, cpu_s
from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard_protocol.entries import Access, Purpose, nonce_size
from medshard_protocol.ids import FileId

idle_s = 3.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.entry", description="what one ledger entry costs")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--count", type=int, default=40, help="entries, and reads (default 40)")
    parser.add_argument("--between", type=float, default=0.15, help="seconds from one to the next (default 0.15)")
    parser.add_argument("--size", type=int, default=MIB, help="bytes of the file that is read (default 1 MiB)")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="medshard-entry-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        code = (options.nodes * 5 // 8, options.nodes)
        with LocalConsortium(folder / "consortium", institutions=options.nodes, code=code) as trial:
            print(json.dumps(asyncio.run(_measure(trial, folder, options)), indent=1))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _measure(trial: LocalConsortium, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    pids = {name: process.pid for name, process in trial.running.items()}
    source, target = folder / "file", folder / "back"
    source.write_bytes(os.urandom(options.size))
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        stored = (await vault.put([source])).stored[0]

        async def entry() -> None:
            await vault._ledger.append([Access((FileId(bytes(32)),), Purpose.UNSPECIFIED, b"", os.urandom(nonce_size))])

        async def held() -> None:
            await vault.get(stored.sha256, target)

        async def read() -> None:
            vault.forget_tickets()
            await held()

        for warm_up in (entry, read, entry, read):
            await warm_up()
        await asyncio.sleep(1.5)
        before = _spent(pids)
        await asyncio.sleep(idle_s)
        idle = {name: (spent - before[name]) / idle_s for name, spent in _spent(pids).items()}
        return {
            "entry": await _repeat(entry, pids, idle, options.count, options.between),
            "read": await _repeat(read, pids, idle, options.count, options.between),
            "read, announced before": await _repeat(held, pids, idle, options.count, options.between),
            "reads in a row": await _repeat(read, pids, idle, options.count, 0.0),
            "reads in a row, announced before": await _repeat(held, pids, idle, options.count, 0.0),
        }


async def _repeat(
    work: Callable[[], Awaitable[None]], pids: dict[str, int], idle: dict[str, float], count: int, between_s: float
) -> dict[str, float]:
    walls, before, own, began = [], _spent(pids), time.process_time(), time.perf_counter()
    for _ in range(count):
        start = time.perf_counter()
        await work()
        walls.append((time.perf_counter() - start) * 1000)
        await asyncio.sleep(between_s)
    own = time.process_time() - own
    if between_s:
        await asyncio.sleep(1.5)  # what was put off
    took = time.perf_counter() - began
    spent = [(after - before[name] - idle[name] * took) * 1000 / count for name, after in _spent(pids).items()]
    return {
        "p50_ms": round(statistics.median(walls), 1),
        "p90_ms": round(sorted(walls)[count * 9 // 10], 1),
        "nodes_cpu_ms": round(sum(spent), 1),
        "busiest_node_cpu_ms": round(max(spent), 1),
        "client_cpu_ms": round(own * 1000 / count, 1),
    }


def _spent(pids: dict[str, int]) -> dict[str, float]:
    return {name: cpu_s(pid) for name, pid in pids.items()}


if __name__ == "__main__":
    main()
