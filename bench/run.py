"""medshard beside Tahoe-LAFS and Swift, doing the same work in turn: `python -m bench.run`.

A side starts with empty stores, does all steps, and ends before the next one starts; then the next run begins, so each run has
every side under much the same conditions. Writes bench/results/: bench.json (everything), bench.md (the tables), bench.png.
Ends with 1 if a promise that was measured is not kept.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from bench import floor, kernel, machine, report
from bench.medshard_side import Medshard
from bench.peers.swift import Swift
from bench.peers.tahoe import Tahoe
from bench.side import ACKNOWLEDGED, BENCH, NEEDED, NODES, Side, SideError
from bench.steps import GROUPS, Result, Session, make_data

SIDES = (report.OURS, *report.PEERS)


@dataclass(frozen=True)
class _Primitives:
    """What the machine does without any system around it. `kernel` is what bench/kernel.py measured."""

    floor: floor.Floor
    kernel: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupted)
    alone = _alone()
    folder = Path(tempfile.mkdtemp(prefix="medshard-bench-", dir=options.data))
    began = time.time()
    try:
        runs, notes = _all_runs(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    alone.close()
    primitives = _Primitives(floor.measure(), kernel.measure()) if not options.no_floor else None
    return _publish(options, runs, notes, primitives, began)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="medshard beside its peers, the same work in turn")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE", help=f"of: {' '.join(SIDES)}")
    parser.add_argument("--steps", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="STEP", help=f"of: {' '.join(GROUPS)}")
    parser.add_argument("--runs", type=int, default=3, help="how often everything is done; medians are reported (default 3)")
    parser.add_argument("--quick", action="store_true", help="one run, without the 1 GiB file, waiting less for a quiet machine")
    parser.add_argument("--quiet-s", type=float, default=20.0, help="at most so long a wait for a quiet machine before a step (default 20)")
    parser.add_argument("--peers-1gib", action="store_true", help="peers store the 1 GiB file in every run, not only in the first")
    parser.add_argument("--no-floor", action="store_true", help="do not measure the kernel and what the primitives cost by themselves")
    parser.add_argument("--data", type=Path, default=_tmpfs(), help="folder for all data (default: the tmpfs, if there is one)")
    parser.add_argument("--out", type=Path, default=BENCH / "results", help="folder for the results (default bench/results)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.runs, options.quiet_s = 1, min(options.quiet_s, 4.0)
        options.steps = [step for step in options.steps if step != "1GiB"]
    return options


def _alone() -> IO[bytes]:
    """Hold the bench's lock while the file is open: two benches at once would measure each other, and want the same ports."""
    work = BENCH / "work"
    work.mkdir(exist_ok=True)
    lock = open(work / "lock", "ab")  # noqa: SIM115 - held until the end
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit("another bench is running here; wait until it has finished") from None
    return lock


def _tmpfs() -> Path:
    shared = Path("/dev/shm")  # memory; the folder in it is made by mkdtemp
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _make(name: str, folder: Path) -> Side:
    if name == report.OURS:
        return Medshard(folder)
    if name == "tahoe-http":
        return Tahoe(folder, "http")
    if name == "tahoe-foolscap":
        return Tahoe(folder, "foolscap")
    return Swift(folder)


def _all_runs(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, dict[str, Result]]], list[str]]:
    sides = [_make(name, folder) for name in options.sides]
    runs: list[dict[str, dict[str, Result]]] = []
    for number in range(options.runs):
        print(f"run {number + 1} of {options.runs}", file=sys.stderr, flush=True)
        data = make_data(folder / "plain", huge="1GiB" in options.steps)
        runs.append({})
        for side in sides:
            once = side.name != report.OURS and number > 0 and not options.peers_1gib
            groups = [group for group in options.steps if not (once and group == "1GiB")]
            runs[-1][side.name] = _one_side(side, Session(side, data, folder / "scratch", options.quiet_s), groups)
    return runs, [note for side in sides for note in side.notes]


def _one_side(side: Side, session: Session, groups: Collection[str]) -> dict[str, Result]:
    try:
        side.start()
        session.run(groups)
    except SideError as failure:
        print(f"{side.name}: {failure}", file=sys.stderr, flush=True)
        if side.name == report.OURS:
            raise
    finally:
        side.stop()
        shutil.rmtree(session.scratch, ignore_errors=True)
    return session.results


def _publish(
    options: argparse.Namespace,
    runs: list[dict[str, dict[str, Result]]],
    notes: list[str],
    primitives: _Primitives | None,
    began: float,
) -> int:
    figures = report.medians(runs)
    found = report.verdicts(figures) + (report.kernel_verdicts(primitives.kernel) if primitives else [])
    text = _markdown(figures, found, primitives, [*notes, report.noise(runs)])
    record = {
        "machine": machine.describe(),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "took_s": round(time.time() - began),
        "nodes": NODES,
        "needed": NEEDED,
        "acknowledged": ACKNOWLEDGED,
        "steps": options.steps,
        "notes": notes,
        "runs": [_plain(run) for run in runs],
        "median": _plain(figures),
        "promises": [asdict(verdict) for verdict in found],
        "primitives": asdict(primitives) if primitives else None,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "bench.md").write_text(text)
    report.plot(figures, options.out / "bench.png")
    print(text)
    return 1 if any(verdict.met is False for verdict in found) else 0


def _plain(figures: report.Medians) -> dict[str, dict[str, object]]:
    return {side: {step: asdict(result) for step, result in steps.items()} for side, steps in figures.items()}


def _markdown(figures: report.Medians, found: list[report.Verdict], primitives: _Primitives | None, notes: list[str]) -> str:
    about = machine.describe()
    cpu = f"{about['cores']} cores of {about['cpu']} ({about['extensions']})"
    parts = [
        f"{cpu}, Linux {about['linux']}, Python {about['python']}. Seconds, median.\n",
        report.table(figures),
        "CPU seconds of the client + of all nodes, and the client's peak memory:\n",
        report.resources(figures),
        report.promises_table(found),
    ]
    if primitives:
        parts.append(floor.table(primitives.floor, figures))
    parts += [f"- {note}" for note in dict.fromkeys(notes)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
