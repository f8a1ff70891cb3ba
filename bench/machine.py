"""What the machine did meanwhile: CPU, memory and other people's load, read from /proc. Linux only, and it measures, never judges.

A process counts with all its living descendants, since a server may fork its workers.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

MIB = 1 << 20
CORES = os.cpu_count() or 1
_TICKS = os.sysconf("SC_CLK_TCK")
_stop_wait_s = 15.0
_quiet_window_s = 2.0
_quiet_share = 0.15


def family(pid: int) -> list[int]:
    """The process and its living descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue
        for child in children:
            found += family(int(child))
    return found


def _own_cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def cpu_s(pid: int) -> float:
    """User and system seconds of a process and its descendants so far; 0 once it is gone."""
    return sum(_own_cpu_s(each) for each in family(pid))


def machine_cpu_s() -> float:
    """Seconds of CPU that everybody on the machine has used since boot: all but idle and waiting for a disk."""
    with open("/proc/stat") as stat:
        ticks = [int(value) for value in stat.readline().split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / _TICKS


def peak_rss_mib(pid: int) -> float:
    """The most memory (VmHWM) since the start or the last `reset_peak`, summed over a process and its descendants."""
    total = 0
    for each in family(pid):
        try:
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return total / 1024


def reset_peak(pid: int) -> None:
    for each in family(pid):
        try:
            Path(f"/proc/{each}/clear_refs").write_text("5")
        except OSError:
            continue


def describe() -> dict[str, str | int | float]:
    """What somebody needs to know of this machine to judge the figures; nothing that names it."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), platform.machine())
    flags = next((set(line.split()) for line in cpuinfo.splitlines() if line.startswith("flags")), set())
    return {
        "cpu": model,
        "cores": CORES,
        "extensions": " ".join(flag for flag in ("aes", "sha_ni", "avx2", "avx512bw", "gfni") if flag in flags),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "linux": ".".join(platform.release().split(".")[:2]),
        "python": platform.python_version(),
    }


class Processes:
    """The processes of one side by name. Starts, freezes and ends only what it started, and ends all of it."""

    def __init__(self, log_folder: Path) -> None:
        self._log_folder = log_folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._log_folder.mkdir(parents=True, exist_ok=True)
        with open(self._log_folder / f"{name}.log", "ab") as log:
            self._running[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)

    def adopt(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Account for, and in the end stop, a process that was started with pipes of its own."""
        self._running[name] = process

    def forget(self, name: str) -> None:
        """It was ended on purpose, or another process goes on in its name."""
        self._running.pop(name, None)

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def cpu_s(self) -> dict[str, float]:
        return {name: cpu_s(process.pid) for name, process in self._running.items()}

    def dead(self) -> list[str]:
        return [name for name, process in self._running.items() if process.poll() is not None]

    def log_tail(self, name: str, characters: int = 2000) -> str:
        try:
            return (self._log_folder / f"{name}.log").read_text(errors="replace")[-characters:]
        except OSError:
            return ""

    def freeze(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGCONT)

    def stop(self) -> None:
        families = {name: family(process.pid) for name, process in self._running.items()}
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for name, process in self._running.items():
            try:
                process.wait(_stop_wait_s)
            except subprocess.TimeoutExpired:
                _kill(families[name])
                process.wait()
            _kill(families[name][1:])
        self._running.clear()


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for_quiet(own: Processes, limit_s: float) -> float:
    """Wait, at most `limit_s`, until other jobs use less than 15 % of the machine; answer the share they used last."""
    deadline = time.monotonic() + limit_s
    while True:
        everybody, ours, began = machine_cpu_s(), sum(own.cpu_s().values()), time.monotonic()
        time.sleep(min(_quiet_window_s, max(0.2, deadline - began)))
        spent = machine_cpu_s() - everybody - (sum(own.cpu_s().values()) - ours)
        share = max(0.0, spent / (time.monotonic() - began) / CORES)
        if share < _quiet_share or time.monotonic() >= deadline:
            return round(share, 3)


@dataclass(frozen=True)
class Cost:
    """What one step took. CPU in seconds, `others_share` the part of the machine that other jobs used while it ran."""

    wall_s: float
    client_cpu_s: float
    servers_cpu_s: float
    harness_cpu_s: float
    others_share: float
    client_peak_rss_mib: float


class Meter:
    """Measures what happens inside `with`: `cost` stands once the block has ended."""

    cost: Cost

    def __init__(self, processes: Processes, client: str) -> None:
        self._processes = processes
        self._client = client

    def __enter__(self) -> Self:
        reset_peak(self._processes.pid(self._client))
        self._before = self._processes.cpu_s()
        self._everybody, self._harness = machine_cpu_s(), time.process_time()
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        wall = time.perf_counter() - self._began
        harness = time.process_time() - self._harness
        spent = {name: seconds - self._before.get(name, 0.0) for name, seconds in self._processes.cpu_s().items()}
        others = machine_cpu_s() - self._everybody - sum(spent.values()) - harness
        client = spent.pop(self._client, 0.0)
        self.cost = Cost(
            wall_s=wall,
            client_cpu_s=round(client, 3),
            servers_cpu_s=round(sum(spent.values()), 3),
            harness_cpu_s=round(harness, 3),
            others_share=round(max(0.0, others / wall / CORES), 3),
            client_peak_rss_mib=round(peak_rss_mib(self._processes.pid(self._client)), 1),
        )


def warm_memory(wanted: int) -> None:
    """Make the kernel own ``wanted`` bytes of free memory that its host has backed already.

    A virtual machine gives freed pages back to its host after seconds; taking them again costs some 12 microseconds a page (340 MB/s
    measured), which would be most of the time of whoever writes first into a tmpfs. Every side gets the same before each step.
    """
    available = _available_bytes()
    size = min(wanted, available // 2) // MIB * MIB
    program = f"import mmap; m = mmap.mmap(-1, {size}); b = bytes({MIB}); [m.write(b) for _ in range({size // MIB})]"
    if size:
        subprocess.run([sys.executable, "-c", program], check=True)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
