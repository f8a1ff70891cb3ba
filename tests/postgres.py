"""A PostgreSQL server for tests: in a folder of its own, killed and started at will. Tests are skipped where there is none to start."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Server:
    """A PostgreSQL server in a folder, on a Unix socket, with fsync on."""

    folder: Path
    port: int = 5432
    process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def dsn(self, database: str) -> str:
        return f"postgresql://medshard@/{database}?host={self.folder}&port={self.port}"

    def start(self, *options: str) -> None:
        for _ in range(1200):
            if self.process is None or self.process.poll() is not None:  # at first, or what was killed has not yet gone altogether
                self._spawn(options)
            if self._is_ready():
                return
            time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text())

    def _is_ready(self) -> bool:
        """As it says itself in the last line of its lock file; after a kill that is the file of the one before."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        assert self.process is not None
        return lines[:1] == [str(self.process.pid)] and lines[-1].strip() in ("ready", "standby")

    def _spawn(self, options: tuple[str, ...]) -> None:
        settings = ["-c", "listen_addresses=", "-k", str(self.folder), "-p", str(self.port), *options]
        with (self.folder / "log").open("ab") as log:
            self.process = as_postgres(subprocess.Popen, [tool("postgres"), "-D", str(self.data), *settings], stdout=log, stderr=log)

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.process is not None
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        self.process.kill()
        for child in map(int, children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def sql(self, statement: str, database: str = "postgres") -> str:
        command = [tool("psql"), "-qAt", "-h", str(self.folder), "-p", str(self.port), "-U", "medshard", database, "-c", statement]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def remove(self) -> None:
        if self.process is not None:
            self.kill()
        shutil.rmtree(self.folder)


def tool(name: str) -> str:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    if not found:
        pytest.skip("PostgreSQL's server programs are not installed (Debian: postgresql)")
    return str(found[-1])


def as_postgres(run: Callable[..., object], command: list[str], **more: object) -> object:
    """PostgreSQL refuses to run as root, whatever for."""
    if os.geteuid() == 0:
        more |= {"user": "postgres", "group": "postgres", "extra_groups": []}
    return run(command, **more)


def new_server() -> Server:
    """A folder for a server, empty and owned by whoever runs it."""
    folder = Path(tempfile.mkdtemp(prefix="medshard-pg-"))
    if os.geteuid() == 0:
        try:
            shutil.chown(folder, "postgres", "postgres")
        except LookupError:
            pytest.skip("no user postgres to run the server as")
    return Server(folder)


@contextmanager
def running_server() -> Iterator[Server]:
    """A server that runs, with nothing in it."""
    pytest.importorskip("asyncpg")
    made = new_server()
    try:
        command = [tool("initdb"), "-D", str(made.data), "-U", "medshard", "-A", "trust", "-N"]
        as_postgres(subprocess.run, command, check=True, capture_output=True)
        made.start()
        yield made
    finally:
        made.remove()
