"""python -m tests.simulation: run seeds, each in a process of its own that is forked from one that has everything ready."""

from __future__ import annotations

import argparse
import contextlib
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
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.simulation import disk as _second  # noqa: F401
from tests.simulation import mutants, warming
from tests.simulation import run as runs
from tests.simulation import world as _first

hangs_after_s = 60  # of processor
stands_after_s = 1800  # of time
unfit = 9
_spent: list[Path] = []  # folders to be removed


@dataclass(frozen=True)
class Bench:
    """Where seeds run, how many at once, and what has begun for those of four institutions."""

    scratch: Path
    jobs: int
    begun: runs.Run
    folder: Path  # of what has begun


def one(seed: int, mutant: str, bench: Bench) -> Callable[[], dict[str, Any]]:
    """Begin a seed in a child; to be called for what it found and what it cost."""
    folder = bench.scratch / str(seed)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        gc.disable()
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, _hangs(seed, writing))
        signal.setitimer(signal.ITIMER_PROF, hangs_after_s)  # and not of time, of which a busy machine takes any amount
        signal.alarm(stands_after_s)
        begun = bench.begun if not mutant and runs.size_of(seed) == bench.begun.size else None  # a bug may be one of the beginning
        if begun is not None:
            warming.copy(bench.folder, folder)
        else:
            warming.put_back()
            folder.mkdir()
        os.chdir(folder)
        if mutant:
            try:
                mutants.switch_on(mutant)
            except LookupError as error:
                print(f"{mutant}: {error}", file=sys.stderr, flush=True)
                os._exit(unfit)
        try:
            told = asdict(runs.run(seed, begun))
        except BaseException:
            told = {"seed": seed, "broken": "the simulation failed: " + traceback.format_exc()[-900:], "trace": 0}
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w") as pipe:  # nobody may want to know any more
            json.dump(told, pipe, default=str)
        os._exit(0)
    os.close(writing)

    def ended() -> dict[str, Any]:
        with os.fdopen(reading) as pipe:
            data = pipe.read()
        _, status, usage = os.wait4(child, 0)
        _spent.append(folder)
        if len(_spent) > 15:
            subprocess.run(["rm", "-rf", *_spent], check=False)  # half the processor time of shutil's
            _spent.clear()
        if os.waitstatus_to_exitcode(status) == unfit:
            raise SystemExit(f"the mutant {mutant} does not fit the code any more")
        told = json.loads(data) if data else {"seed": seed, "broken": f"the process died ({status})", "trace": 0}
        return told | {"cpu": usage.ru_utime + usage.ru_stime}

    return ended


def _hangs(seed: int, writing: int) -> Callable[[int, Any], None]:
    """Tell where a seed goes round for ever, and end it; what was thrown into it might be caught."""

    def tell(number: int, frame: Any) -> None:
        told = {"seed": seed, "broken": "".join(traceback.format_stack(frame))[-700:] + "goes round for ever", "trace": 0}
        os.write(writing, json.dumps(told).encode())
        os._exit(0)

    return tell


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
        for name in ("warm", "begun"):
            (scratch / name).mkdir()
        warming.warm(scratch / "warm")
        bench = Bench(scratch, arguments.jobs, warming.begin(scratch / "begun"), scratch / "begun")
        gc.freeze()
        if arguments.mutant:
            names = list(mutants.mutants) if arguments.mutant == "all" else arguments.mutant.split(",")
            caught = [_caught(*_named(name, seeds), bench) for name in names]
            return 0 if all(caught) else 1
        return _all(seeds, bench, verbose=arguments.verbose)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _all(seeds: range, bench: Bench, *, verbose: bool) -> int:
    """Run all seeds; tell of those that break a promise, and the sum."""
    found: list[int] = []
    seconds, standing, for_good, acknowledged, rosters, audited = 0.0, 0, 0, 0, 0, Counter[str]()
    for told in _each(seeds, "", bench):
        seconds += told["cpu"]
        standing += bool(told.get("stands_still"))
        for_good += bool(told.get("for_good"))
        acknowledged += told.get("acknowledged", 0)
        rosters += told.get("rosters", 0)
        audited += Counter(told.get("audited", {}))
        if told["broken"]:
            found.append(told["seed"])
        if told["broken"] or verbose:
            print(json.dumps(told), flush=True)
    total: dict[str, Any] = {"seeds": len(seeds), "broken": found, "acknowledged": acknowledged, "stood_still": standing}
    total |= {"for_good": for_good, "rosters": rosters, "audited": dict(audited)}
    print(json.dumps(total | {"processor_s": round(seconds, 1)}))
    return min(len(found), 1)


def _named(name: str, seeds: range) -> tuple[str, list[int]]:
    """A mutant, and the seeds in the order in which they are tried."""
    name, _, known = name.partition("@")
    first = [int(known)] if known else []
    return name, [*first, *(seed for seed in seeds if seed not in first)]


def _caught(name: str, seeds: Sequence[int], bench: Bench) -> bool:
    """Run seeds with a planted bug until one finds it."""
    (bench.scratch / name).mkdir()
    running = _each(seeds, name, replace(bench, scratch=bench.scratch / name))
    told = next((told for told in running if told["broken"]), {"seed": None, "broken": ""})
    for _ in zip(range(bench.jobs - 1), running, strict=False):  # those that run already
        pass
    print(json.dumps({"mutant": name, "seed": told["seed"], "broken": told["broken"][-300:]}), flush=True)
    return told["seed"] is not None


def _each(seeds: Sequence[int], mutant: str, bench: Bench) -> Iterator[dict[str, Any]]:
    """Each seed's outcome, in the order of the seeds."""
    coming: deque[Callable[[], dict[str, Any]]] = deque()
    for seed in seeds:
        coming.append(one(seed, mutant, bench))
        if len(coming) >= bench.jobs:
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
