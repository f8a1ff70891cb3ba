"""Small files that must be whole or not there, after a power cut too: keys, certificates, configuration, invitations. And what a killed
process wrote and did not sync."""

from __future__ import annotations

import os
from pathlib import Path

from medshard_protocol.errors import Conflict


def create(path: Path, data: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Write a new file. Raises Conflict where one exists: keys are never overwritten."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise Conflict(f"{path} exists already", hint="choose another folder, or move the file away first") from None
    with open(fd, "wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(fd)
    if durable:
        sync_folder(path.parent)


def replace(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file over another, so that a reader or a power cut finds the old one or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)  # the bytes before the name
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_log(database: Path) -> None:
    """Make durable what a process that was killed left in an SQLite database's write-ahead log: it may have died between the write and
    the sync, and who opens the database next sees what it wrote."""
    try:
        fd = os.open(f"{database}-wal", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
