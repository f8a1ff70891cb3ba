"""The other end of ``python -m storenode.nursery``: starts nodes of a trial by forking a program that is loaded once.

Law: what it cannot do it says by ``Absent``, and the caller starts a process of its own. What it starts never outlives this process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from medshard_protocol.errors import Absent

tether = Path(__file__).with_name("tether.py")
# PR_SET_PDEATHSIG follows the thread that started the child, so every child is started by one thread that lives as long as we do.
starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="medshard-nodes")

_nursery: Nursery | None = None  # used in that thread alone
_poll_s = 0.01
# What acts when a program starts and cannot be set for one that is loaded.
_at_start = ("LD_", "DYLD_", "PYTHON", "MALLOC_", "OPENSSL_", "SSL_")


class Process(Protocol):
    """What a consortium needs of a node's process; ``subprocess.Popen`` has it."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """The same, once it has ended. Raises subprocess.TimeoutExpired."""

    def send_signal(self, sig: int) -> None:
        """Nothing where it has ended."""

    def terminate(self) -> None:
        """SIGTERM."""

    def kill(self) -> None:
        """SIGKILL."""


class Nursery:
    """The program, loaded. Its process is started by the thread that makes this, and dies with it."""

    def __init__(self) -> None:
        self._environ = _acting_at_start(os.environ)
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(tether), str(os.getpid()), sys.executable, "-m", "storenode.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.close)

    def close(self) -> None:
        """End it, and with it what it started."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()

    def fits(self, environ: Mapping[str, str] = os.environ) -> bool:
        """Whether it runs, and was started under the settings that a process started now would have."""
        return self._process.poll() is None and self._environ == _acting_at_start(environ)

    def start(self, arguments: Sequence[str], out: Path, err: Path | None = None, environ: Mapping[str, str] = os.environ) -> Child:
        """Run ``python ARGUMENTS``, a module or a script, in a process of its own, its output appended to files. Raises Absent."""
        streams = {"out": str(out.absolute()), "err": str((err or out).absolute())}
        pid = self.ask({"start": list(arguments), "folder": os.getcwd(), "environ": dict(environ)} | streams)
        if pid is None:
            raise Absent("the program that starts nodes answers nothing")
        return Child(self, pid)

    def ask(self, question: object) -> int | None:
        """One question, one answer. Raises Absent once the program has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            try:
                self._process.stdin.write(json.dumps(question) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except (BrokenPipeError, ValueError):
                line = ""
        if not line:
            raise Absent("the program that starts nodes has ended")
        answer: int | None = json.loads(line)
        return answer


class Child:
    """A node's process, as a ``subprocess.Popen`` of it would be."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            try:
                self.returncode = self._nursery.ask({"poll": self.pid})
            except Absent:
                self.returncode = -signal.SIGKILL  # it died with the program that started it
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("storenode", timeout or 0.0)
            time.sleep(_poll_s)
        return code

    def send_signal(self, sig: int) -> None:
        """Nothing where it has ended; until its end was asked for, its number is nobody else's."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def loaded(environ: Mapping[str, str] = os.environ) -> Nursery | None:
    """The one of this process, started with the first question for it; None where its children would not be what a new process is."""
    return starter.submit(_loaded, environ).result()


def run(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` to its end with nothing to read, from the loaded program where that fits."""
    if nursery := loaded(environ):
        with contextlib.suppress(Absent), tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            code = nursery.start(arguments, out, err, environ).wait()
            return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=dict(environ))


def _loaded(environ: Mapping[str, str]) -> Nursery | None:
    global _nursery
    if _nursery is None:
        _nursery = Nursery()
    return _nursery if _nursery.fits(environ) else None


def _acting_at_start(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(_at_start)}
