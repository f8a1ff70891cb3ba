"""The work that every side does, in order, and what it cost. Restored bytes are compared by SHA-256 after the clock has stopped.

Nothing here knows which side it drives, except that one which takes whole folders is also asked to.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from bench.machine import MIB, Cost, Meter, wait_for_quiet, warm_memory
from bench.side import Side, SideError, make_file, sha256_of

GROUPS = ("1MiB", "100MiB", "range", "1GiB", "200", "folder", "frozen", "faults")
SERIES_FILES = 200
SERIES_BYTES = 512 * 1024
RANGE_BYTES = 64 * 1024
PARALLEL = 8
T = TypeVar("T")
_samples = 5  # a single short operation says little: the median of five is the step's figure


@runtime_checkable
class TakesFolders(Protocol):
    """A side that stores a folder as one thing and restores all of it, by the names that `put_folder` answers."""

    def put_folder(self, folder: Path) -> list[str]: ...
    def get_folder(self, caps: Sequence[str], targets: Sequence[Path]) -> None: ...


@runtime_checkable
class TakesHarm(Protocol):
    """A side that can be told to lose a node, hang another and slow a third, for good."""

    def harm(self) -> None: ...


@dataclass(frozen=True)
class Plain:
    path: Path
    sha256: str
    size: int


@dataclass(frozen=True)
class Data:
    """The files of one run. Every run has its own random bytes; all sides of a run get the same."""

    small: list[Plain]
    big: Plain
    serial: list[Plain]
    parallel: list[Plain]
    folder: list[Plain]
    huge: Plain | None
    frozen: Plain


def _file(path: Path, size: int) -> Plain:
    return Plain(path, make_file(path, size), size)


def make_data(folder: Path, huge: bool) -> Data:
    shutil.rmtree(folder, ignore_errors=True)

    def series(name: str) -> list[Plain]:
        return [_file(folder / name / f"{index:03d}.bin", SERIES_BYTES) for index in range(SERIES_FILES)]

    return Data(
        small=[_file(folder / f"1MiB-{index}.bin", MIB) for index in range(_samples)],
        big=_file(folder / "100MiB.bin", 100 * MIB),
        serial=series("serial"),
        parallel=series("parallel"),
        folder=series("folder"),
        huge=_file(folder / "1GiB.bin", 1024 * MIB) if huge else None,
        frozen=_file(folder / "frozen.bin", 100 * MIB),
    )


@dataclass(frozen=True)
class Result:
    """One step of one side in one run. `cost` is for the whole step, or the median of its samples."""

    cost: Cost
    plain_bytes: int
    busy_before: float
    stored_ratio: float | None = None
    error: str | None = None


@dataclass
class Session:
    """One side going through the steps of one run, in a scratch folder of its own."""

    side: Side
    data: Data
    scratch: Path
    quiet_s: float
    results: dict[str, Result] = field(default_factory=dict)

    def run(self, groups: Collection[str]) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        self._warm_up()
        if "1MiB" in groups:
            self._small()
        big = self._whole("100 MiB", self.data.big) if {"100MiB", "range", "frozen"} & set(groups) else None
        if "range" in groups and big:
            self._range(big)
        if "1GiB" in groups and self.data.huge:
            self._whole("1 GiB", self.data.huge)
        if "200" in groups:
            self._series("serial", self.data.serial, 1)
            self._series("parallel", self.data.parallel, PARALLEL)
        if "folder" in groups and isinstance(self.side, TakesFolders):
            self._folder(self.side)
        if "frozen" in groups and big:
            self._frozen(big)
        if "faults" in groups and isinstance(self.side, TakesHarm):
            self._faults(self.side)

    def _step(self, name: str, plain_bytes: int, *samples: Callable[[], T]) -> list[T]:
        """Time each sample; the answers, or nothing where the side failed, which is a result as well."""
        if dead := self.side.processes.dead():
            raise SideError(f"{self.side.name}: {dead[0]} ended: {self.side.processes.log_tail(dead[0])}")
        busy = wait_for_quiet(self.side.processes, self.quiet_s)
        warm_memory(3 * plain_bytes * len(samples) + 256 * MIB)
        answers: list[T] = []
        walls: list[float] = []
        error = None
        with Meter(self.side.processes, self.side.client) as meter:
            for sample in samples:
                began = time.perf_counter()
                try:
                    answers.append(sample())
                except (SideError, OSError) as failure:
                    error = f"{type(failure).__name__}: {failure}"[:400]
                walls.append(time.perf_counter() - began)
        cost = _per_sample(meter.cost, walls)
        self.results[name] = Result(cost, plain_bytes, busy, error=error)
        _say(self.side.name, name, self.results[name])
        return [] if error else answers

    def _restored(self, name: str, plains: Sequence[Plain], get: Callable[[list[Path]], None], samples: int = 1) -> None:
        """Time `get` into new files and compare them with what was put."""
        targets = [self.scratch / f"{name}-{index}" for index in range(len(plains))]
        size = sum(plain.size for plain in plains) // samples
        if samples == 1:
            done = self._step(name, size, lambda: get(targets))
        else:
            done = self._step(name, size, *[partial(get, [target]) for target in targets])
        if done:
            for plain, target in zip(plains, targets, strict=True):
                if sha256_of(target) != plain.sha256:
                    raise SideError(f"{self.side.name}: {name} gave wrong bytes")
        for target in targets:
            target.unlink(missing_ok=True)

    def _warm_up(self) -> None:
        """Connections, keys and code are loaded before anything is timed, as in a client that has been up for a while."""
        plain = _file(self.scratch / "warm.bin", 64 * 1024)
        target = self.scratch / "warm-back.bin"
        for _ in range(2):
            self.side.get(self.side.put(plain.path), target)

    def _small(self) -> None:
        plains = self.data.small
        caps = self._step("put 1 MiB", MIB, *[partial(self.side.put, plain.path) for plain in plains])
        if caps:
            pending = iter(caps)
            self._restored("get 1 MiB", plains, lambda targets: self.side.get(next(pending), targets[0]), samples=len(plains))

    def _whole(self, label: str, plain: Plain) -> str | None:
        name = f"put {label}"
        before = self.side.stored_bytes()
        caps = self._step(name, plain.size, lambda: self.side.put(plain.path))
        if not caps:
            return None
        stored = (self.side.stored_bytes() - before) / plain.size
        self.results[name] = replace(self.results[name], stored_ratio=round(stored, 4))
        self._restored(f"get {label}", [plain], lambda targets: self.side.get(caps[0], targets[0]))
        return caps[0]

    def _range(self, cap: str) -> None:
        plain = self.data.big
        offsets = [plain.size // 2 + step * 3 * MIB for step in range(_samples)]
        parts = self._step("read 64 KiB of 100 MiB", RANGE_BYTES, *[partial(self.side.read, cap, at, RANGE_BYTES) for at in offsets])
        with open(plain.path, "rb") as file:
            for offset, part in zip(offsets, parts, strict=False):
                file.seek(offset)
                if part != file.read(RANGE_BYTES):
                    raise SideError(f"{self.side.name}: a range gave wrong bytes")

    def _series(self, how: str, plains: list[Plain], parallel: int) -> None:
        total = SERIES_FILES * SERIES_BYTES
        paths = [plain.path for plain in plains]
        done = self._step(f"put 200 x 512 KiB, {how}", total, lambda: self.side.put_many(paths, parallel))
        if done:
            self._restored(f"get 200 x 512 KiB, {how}", plains, lambda targets: self.side.get_many(done[0], targets, parallel))

    def _folder(self, side: TakesFolders) -> None:
        plains = self.data.folder
        total = SERIES_FILES * SERIES_BYTES
        done = self._step("put 200 x 512 KiB, folder", total, lambda: side.put_folder(plains[0].path.parent))
        if done:
            self._restored("get 200 x 512 KiB, folder", plains, lambda targets: side.get_folder(done[0], targets))

    def _frozen(self, cap: str) -> None:
        """One storage node stops answering without closing its connections (SIGSTOP), the worst kind of absence. It wakes in between,
        so that each step meets it anew."""
        path, size = self.data.frozen.path, self.data.frozen.size
        self._while_frozen(
            lambda: self._restored("get 100 MiB, one node frozen", [self.data.big], lambda targets: self.side.get(cap, targets[0]))
        )
        self._while_frozen(lambda: self._step("put 100 MiB, one node frozen", size, lambda: self.side.put(path)))

    def _faults(self, side: TakesHarm) -> None:
        """One node dead, one frozen, one slow: the median of five puts and five gets, beside five of each before."""
        folder = self.scratch / "faults"
        caps = self._five("well", folder)
        if caps:
            side.harm()
            self._five("faults", folder, caps)
        shutil.rmtree(folder, ignore_errors=True)

    def _five(self, name: str, folder: Path, stored: list[str] | None = None) -> list[str]:
        """Put five new files and get five: those, or those that were ``stored`` before the harm was done."""
        plains = [_file(folder / f"{name}-{number}.bin", 100 * MIB) for number in range(_samples)]
        caps = self._step(f"put 100 MiB, {name}", 100 * MIB, *[partial(self.side.put, plain.path) for plain in plains])
        if caps:
            wanted = iter(stored or caps)
            if stored:
                plains = [replace(plain, sha256=cap) for plain, cap in zip(plains, stored, strict=True)]
            self._restored(f"get 100 MiB, {name}", plains, lambda targets: self.side.get(next(wanted), targets[0]), samples=_samples)
        return caps

    def _while_frozen(self, work: Callable[[], object]) -> None:
        self.side.freeze()
        try:
            work()
        finally:
            self.side.thaw()


def _per_sample(cost: Cost, walls: Sequence[float]) -> Cost:
    count = len(walls)
    return replace(
        cost,
        wall_s=round(statistics.median(walls), 4),
        client_cpu_s=round(cost.client_cpu_s / count, 4),
        servers_cpu_s=round(cost.servers_cpu_s / count, 4),
        harness_cpu_s=round(cost.harness_cpu_s / count, 4),
    )


def _say(side: str, step: str, result: Result) -> None:
    cost = result.cost
    line = (
        f"{side:15} {step:32} {cost.wall_s:9.3f} s   cpu {cost.client_cpu_s:6.2f} + {cost.servers_cpu_s:6.2f}"
        f"   {cost.client_peak_rss_mib:6.1f} MiB   others {cost.others_share:4.0%}"
    )
    print(line + (f"   FAILED {result.error}" if result.error else ""), file=sys.stderr, flush=True)
