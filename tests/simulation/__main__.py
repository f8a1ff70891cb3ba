"""python -m tests.simulation: run seeds, each in a process of its own that is forked from one that has everything ready."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.simulation import disk as _second  # noqa: F401
from tests.simulation import mutants, warming
from tests.simulation import run as runs
from tests.simulation import world as _first

hangs_after_s = 60
unfit = 9


def one(seed: int, mutant: str, scratch: Path) -> Callable[[], dict[str, Any]]:
    """Begin a seed in a child; to be called for what it found and what it cost."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        gc.disable()
        signal.signal(signal.SIGALRM, _hangs)
        signal.alarm(hangs_after_s)
        folder = scratch / str(seed)
        folder.mkdir()
        if mutant:
            try:
                mutants.switch_on(mutant)
            except LookupError as error:
                print(f"{mutant}: {error}", file=sys.stderr, flush=True)
                os._exit(unfit)
        try:
            told = asdict(runs.run(seed, folder))
        except BaseException:
            told = {"seed": seed, "broken": "the simulation failed: " + traceback.format_exc()[-900:], "trace": 0}
        with os.fdopen(writing, "w") as pipe:
            json.dump(told, pipe, default=str)
        os._exit(0)
    os.close(writing)

    def ended() -> dict[str, Any]:
        with os.fdopen(reading) as pipe:
            data = pipe.read()
        _, status, usage = os.wait4(child, 0)
        subprocess.run(["rm", "-rf", scratch / str(seed)], check=False)  # half the processor time of shutil's
        if os.waitstatus_to_exitcode(status) == unfit:
            raise SystemExit(f"the mutant {mutant} does not fit the code any more")
        told = json.loads(data) if data else {"seed": seed, "broken": f"the process died ({status})", "trace": 0}
        return told | {"cpu": usage.ru_utime + usage.ru_stime}

    return ended


def _hangs(number: int, frame: Any) -> None:
    traceback.print_stack(frame)
    os._exit(3)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", default="0-199", help="FIRST-LAST, or one")
    parser.add_argument("--mutant", default="", help="planted bugs, or all: each until a seed finds it; NAME@SEED begins with that seed")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell of seeds that hold as well")
    parser.add_argument("--log", action="store_true", help="what the nodes and vaults log, with the world's time")
    arguments = parser.parse_args()
    if arguments.log:
        logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s", stream=sys.stderr)
        logging.getLogger().handlers[0].addFilter(_stamped)
    else:
        logging.disable(logging.CRITICAL)
    first, _, last = arguments.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    scratch = Path(tempfile.mkdtemp(prefix="simulation-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        gc.disable()
        (scratch / "warm").mkdir()
        warming.warm(scratch / "warm")
        gc.freeze()
        if arguments.mutant:
            names = list(mutants.mutants) if arguments.mutant == "all" else arguments.mutant.split(",")
            caught = [_caught(*_named(name, seeds), scratch, arguments.jobs) for name in names]
            return 0 if all(caught) else 1
        return _all(seeds, scratch, arguments.jobs, verbose=arguments.verbose)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _all(seeds: range, scratch: Path, jobs: int, *, verbose: bool) -> int:
    """Run all seeds; tell of those that break a promise, and the sum."""
    found: list[int] = []
    seconds, standing, acknowledged = 0.0, 0, 0
    for told in _each(seeds, "", scratch, jobs):
        seconds += told["cpu"]
        standing += bool(told.get("stands_still"))
        acknowledged += told.get("acknowledged", 0)
        if told["broken"]:
            found.append(told["seed"])
        if told["broken"] or verbose:
            print(json.dumps(told), flush=True)
    total = {"seeds": len(seeds), "broken": found, "acknowledged": acknowledged, "stood_still": standing}
    print(json.dumps(total | {"processor_s": round(seconds, 1)}))
    return min(len(found), 1)


def _named(name: str, seeds: range) -> tuple[str, list[int]]:
    """A mutant, and the seeds in the order in which they are tried."""
    name, _, known = name.partition("@")
    first = [int(known)] if known else []
    return name, [*first, *(seed for seed in seeds if seed not in first)]


def _caught(name: str, seeds: Sequence[int], scratch: Path, jobs: int) -> bool:
    """Run seeds with a planted bug until one finds it."""
    scratch = scratch / name
    scratch.mkdir()
    running = _each(seeds, name, scratch, jobs)
    told = next((told for told in running if told["broken"]), {"seed": None, "broken": ""})
    for _ in zip(range(jobs - 1), running, strict=False):  # those that run already
        pass
    print(json.dumps({"mutant": name, "seed": told["seed"], "broken": told["broken"][-300:]}), flush=True)
    return told["seed"] is not None


def _each(seeds: Sequence[int], mutant: str, scratch: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Each seed's outcome, in the order of the seeds."""
    coming: deque[Callable[[], dict[str, Any]]] = deque()
    for seed in seeds:
        coming.append(one(seed, mutant, scratch))
        if len(coming) >= jobs:
            yield coming.popleft()()
    while coming:
        yield coming.popleft()()


def _stamped(record: logging.LogRecord) -> bool:
    world, machine = _first.world, _first.here.get()
    record.name = f"{world.loop.time() if world else 0:9.4f} {machine.host.name if machine else '-':8}"
    return True


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # nothing should depend on it, and nothing is to
        os.execve(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]], os.environ | {"PYTHONHASHSEED": "0"})
    sys.exit(main())
