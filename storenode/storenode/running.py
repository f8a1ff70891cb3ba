"""HOME/pid: which process is this node, and that there is only one.

Law: the file's lock, not its content, says that the node runs. The system drops a lock when its process ends, however it ends, so a pid
left behind by a power cut or a SIGKILL misleads nobody.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from medshard_protocol.errors import Conflict

pid_name: Final = "pid"


@contextmanager
def hold(home: Path) -> Iterator[None]:
    """Be the one process of this node: write HOME/pid, and remove it at the end. Raises Conflict if another process is."""
    path = home / pid_name
    fd = _lock(path)
    try:
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def running(home: Path) -> int | None:
    """Give the process id of the running node; None if none runs."""
    try:
        fd = os.open(home / pid_name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.read(fd, 32).strip()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(fd)
    return None


def _lock(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BlockingIOError:
            pid = os.read(fd, 32).decode(errors="replace").strip()
            os.close(fd)
            raise Conflict(f"this node runs already, as process {pid}", hint="stop it first (SIGTERM), or leave it running") from None
        os.close(fd)  # the one before us removed the file between our open and our lock
