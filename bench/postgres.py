"""A PostgreSQL server of our own for a bench: its folder, its socket, its end. As its own user, since it refuses to run as root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

wait_s = 30.0


def program(name: str) -> str | None:
    """Debian keeps the server's programs off the PATH; None where they are not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


class Postgres:
    """Durable as by default (fsync and synchronous_commit on); reachable by a socket in its folder alone."""

    def __init__(self, root: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="medshard-bench-pg-", dir=root))
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        data = self.folder / "data"
        self._run("initdb", "-D", str(data), "-U", "medshard", "-A", "trust", "--no-sync")
        command = [str(program("postgres")), "-D", str(data), "-c", "listen_addresses=", "-k", str(self.folder)]
        with (self.folder / "log").open("ab") as log:
            self._process = _unprivileged(subprocess.Popen, command, stdout=log, stderr=log)
        deadline = time.monotonic() + wait_s
        while subprocess.run([str(program("pg_isready")), "-q", "-h", str(self.folder)], check=False).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError((self.folder / "log").read_text()[-2000:])
            time.sleep(0.05)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def database(self, name: str) -> str:
        """Make a database; its DSN."""
        self._run("createdb", "-h", str(self.folder), "-U", "medshard", name)
        return f"postgresql://medshard@/{name}?host={self.folder}"

    def _run(self, name: str, *arguments: str) -> None:
        _unprivileged(subprocess.run, [str(program(name)), *arguments], check=True, capture_output=True)


def _unprivileged(run: Callable[..., Any], command: list[str], **more: object) -> Any:
    if os.geteuid() == 0:
        more |= {"user": "postgres", "group": "postgres", "extra_groups": []}
    return run(command, **more)
