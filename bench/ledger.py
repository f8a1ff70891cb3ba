"""What the ledger can do: `python -m bench.ledger`. Appends on both engines, a full audit, a start from a snapshot, bytes.

Everything runs as users run it: seven node processes on loopback over TLS, the command `storenode log verify`, `storenode run`. The two
engines take turns, so that both meet the same machine. Writes bench/results/ledger.json and ledger.md; ends with 1 if a promise that was
measured is not kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.ledger_load import Latency, Submitter
from bench.ledger_log import measure, year_bytes
from bench.ledger_proof import proof_bytes
from bench.postgres import Postgres, program
from bench.side import BENCH
from medshard.consortium import LocalConsortium

mirrors = 7
steady_rate = 100.0
steps_all = ("load", "log", "proof")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    folder = Path(tempfile.mkdtemp(prefix="medshard-ledger-", dir=options.data))
    figures: dict[str, Any] = {"began": time.time(), "mirrors": mirrors}
    try:
        if "load" in options.steps:
            figures["load"] = _loads(folder, options)
        if "log" in options.steps:
            figures["log"] = measure(folder / "log", options.entries)
            figures["year"] = year_bytes(figures["log"])
        if "proof" in options.steps:
            figures["proof"] = proof_bytes(mirrors)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    promises = _promises(figures)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ledger.json").write_text(json.dumps(figures | {"promises": promises}, indent=1) + "\n")
    table = _table(promises)
    (options.out / "ledger.md").write_text(table)
    print(table, end="")
    return 0 if all(met for _, _, met in promises) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description="what the ledger can do")
    parser.add_argument("--steps", nargs="+", choices=steps_all, default=list(steps_all), metavar="STEP", help=f"of: {' '.join(steps_all)}")
    parser.add_argument("--runs", type=int, default=3, help="how often each engine gets its turn; medians are reported (default 3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load (default 10)")
    parser.add_argument("--entries", type=int, default=1_000_000, help="in the log that is audited and started from (default a million)")
    shared = Path("/dev/shm")  # memory; the folder in it is made by mkdtemp
    parser.add_argument("--data", type=Path, default=shared if shared.is_dir() else Path(tempfile.gettempdir()), help="folder for all data")
    parser.add_argument("--out", type=Path, default=BENCH / "results", help="folder for the results (default bench/results)")
    return parser.parse_args(arguments)


def _loads(folder: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    engines = ["sqlite", *(["postgresql"] if program("postgres") else [])]
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for number in range(options.runs):
        for engine in engines:
            print(f"load: run {number + 1} of {options.runs}, {engine}", file=sys.stderr, flush=True)
            if engine == "sqlite":
                found[engine].append(_load(folder / "consortium", "", options.seconds))
            else:
                with Postgres(options.data) as server:
                    found[engine].append(_load(folder / "consortium", server.database("ledger"), options.seconds))
    return found


def _load(folder: Path, dsn: str, seconds: float) -> dict[str, Any]:
    """Both loads on a new consortium whose sequencer keeps its ledger at ``dsn``, or in SQLite."""
    consortium = LocalConsortium(folder, institutions=mirrors)
    try:
        consortium.make()
        if dsn:
            config = consortium.home(consortium.names[0]) / "config.toml"
            text = config.read_text()
            config.write_text(text.replace('# engine = "sqlite"', f'engine = "{dsn}"', 1))
        with consortium:
            roster = consortium.roster
            assert roster is not None, "set by start"
            submitter = Submitter(consortium.vault_home, consortium.passphrase, roster, roster.node(roster.sequencer))
            steady: Latency = asyncio.run(submitter.steady(steady_rate, seconds))
            full: Latency = asyncio.run(submitter.full(seconds))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"steady": asdict(steady), "full": asdict(full)}


def _promises(figures: dict[str, Any]) -> list[tuple[str, str, bool]]:
    promises: list[tuple[str, str, bool]] = []
    if load := figures.get("load"):
        median = {
            engine: {
                "p50": statistics.median(run["steady"]["p50_ms"] for run in runs),
                "p99": statistics.median(run["steady"]["p99_ms"] for run in runs),
                "rate": statistics.median(run["full"]["rate"] for run in runs),
            }
            for engine, runs in load.items()
        }
        ours = median["sqlite"]
        promises.append(("append at 100 entries/s to quorum-cosigned, p50 at most 150 ms", f"{ours['p50']:.1f} ms", ours["p50"] <= 150))
        promises.append(("the same, p99 at most 400 ms", f"{ours['p99']:.1f} ms", ours["p99"] <= 400))
        promises.append(("at least 1,000 entries/s sustained", f"{ours['rate']:,.0f} entries/s", ours["rate"] >= 1000))
        if other := median.get("postgresql"):
            text = f"{other['p50']:.1f} ms, p99 {other['p99']:.1f} ms, {other['rate']:,.0f} entries/s"
            ratios = (other["p50"] / ours["p50"], ours["rate"] / other["rate"])
            promises.append(
                ("PostgreSQL within 1.5 times of SQLite (p50; rate)", f"{text}: {ratios[0]:.2f}; {ratios[1]:.2f}", max(ratios) <= 1.5)
            )
    if log := figures.get("log"):
        of, audit, start = f"{log['entries']:,} entries", log["audit"], log["start"]
        promises.append((f"full audit of {of} under 60 s", f"{audit['seconds']:.1f} s", audit["seconds"] < 60))
        promises.append(("its memory under 256 MiB, all processes", f"{audit['peak_mib']:.0f} MiB", audit["peak_mib"] < 256))
        took, anew = f"{start['answers_seconds']:.2f} s, all served after {start['seconds']:.2f} s", log["first_start"]
        promises.append((f"a node process with {of} answers in under 5 s", f"{took}, {start['memory_mib']:.0f} MiB", start["seconds"] < 5))
        took = f"{anew['peak_mib']:.0f} MiB, {anew['seconds']:.0f} s"
        promises.append(("the same without a snapshot, its memory under 256 MiB", took, anew["peak_mib"] < 256))
    if proof := figures.get("proof"):
        size = f"{proof['tlog_proof_bytes']:,} bytes (the whole file of `medshard prove`: {proof['whole_bytes']:,})"
        what = "proof for 10^8 entries, both kinds of cosignature, under 20 KB"
        promises.append((what, size, proof["tlog_proof_bytes"] < 20_000))
    return promises


def _table(promises: Sequence[tuple[str, str, bool]]) -> str:
    lines = ["| promise | measured | kept |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {measured} | {'yes' if met else '**no**'} |" for what, measured, met in promises)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
