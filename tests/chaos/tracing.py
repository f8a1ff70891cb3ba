"""Faults in system calls of a running node, by ``strace -e inject``, and the list of calls that one upload makes.

Law: a call is named by its kind, by the file it goes to (a path, or "" for any), and by its number in the thread that makes it, since that
is how strace counts. Files with random names are therefore named by kind and number alone, which is exact: only shards are written with
write, fsync, rename and mkdir; the databases use pwrite64 and fdatasync.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

kinds = ("write", "pwrite64", "fsync", "fdatasync", "rename", "mkdir")
attach_wait_s = 20


@dataclass(frozen=True, order=True)
class Call:
    """The ``number``-th call of this kind (from 1) to ``path`` in a thread, or with ``onward`` that and all later ones."""

    kind: str
    path: str
    number: int
    onward: bool = False


@contextmanager
def traced(pid: int, arguments: list[str], log: Path) -> Iterator[None]:
    """Run strace on all threads of a process for as long as the block lasts. Skips, saying why, where that is not possible."""
    if shutil.which("strace") is None:
        pytest.skip("faults in system calls need strace (Debian: strace)")
    command = ["strace", "-f", "-p", str(pid), "-o", str(log), *arguments]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        if "attached" not in said:
            pytest.skip(f"strace cannot attach: {said.strip()}")
        yield
    finally:
        tracer.terminate()
        try:
            tracer.communicate(timeout=attach_wait_s)
        except subprocess.TimeoutExpired:  # it waits for a process that is dead, and would keep it from being buried
            tracer.kill()
            tracer.communicate()


@contextmanager
def injected(pid: int, call: Call, fault: str, log: Path) -> Iterator[None]:
    """Let one call of a process meet ``fault``, such as "error=EIO" or "signal=KILL"."""
    only = ["-P", call.path] if call.path else []
    when = f"{call.number}{'+' if call.onward else ''}"
    with traced(pid, [*only, "-e", f"trace={call.kind}", "-e", f"inject={call.kind}:{fault}:when={when}"], log):
        yield


def calls_in(log: Path, data: Path) -> list[Call]:
    """Every call that changes something under ``data``, out of a log that ``traced`` wrote with -y."""
    counts: Counter[tuple[str, str, str]] = Counter()
    found: set[Call] = set()
    for line in log.read_text(errors="replace").splitlines():
        match = re.match(rf"(\d+) +({'|'.join(kinds)})\((?:\d+<([^>]*)>|\"([^\"]*)\")", line)
        if match is None:
            continue
        thread, kind, path = match[1], match[2], match[3] or match[4]
        if not path.startswith(str(data)):
            continue
        named = path if kind in ("pwrite64", "fdatasync") else ""
        counts[thread, kind, named] += 1
        found.add(Call(kind, named, counts[thread, kind, named]))
    return sorted(found)
