"""What the bench can ask of a system under test. A side knows how to run itself; it neither times nor compares anything.

Every side runs 16 storage nodes and one client on 127.0.0.1 and stores 10-of-16. The client is a process of its own that stays up
between requests, so that its memory can be read and nobody pays for a start in the measured time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from bench.machine import MIB, Processes

NODES = 16
NEEDED = 10
ACKNOWLEDGED = 13
BENCH = Path(__file__).resolve().parent
ENVIRONMENTS = BENCH / "work"


class SideError(Exception):
    """A side did not do what it was asked; the text says what it did instead."""


class Side(Protocol):
    """One system under test. `put` answers what `get` and `read` need to find the file again."""

    name: str
    client: str  # the client's name among `processes`
    processes: Processes
    notes: list[str]

    def start(self) -> None: ...
    def put(self, path: Path) -> str: ...
    def get(self, cap: str, target: Path) -> None: ...
    def read(self, cap: str, offset: int, length: int) -> bytes: ...
    def put_many(self, paths: Sequence[Path], parallel: int) -> list[str]: ...
    def get_many(self, caps: Sequence[str], targets: Sequence[Path], parallel: int) -> None: ...
    def stored_bytes(self) -> int: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    def stop(self) -> None: ...


def put_each(side: Side, paths: Sequence[Path], parallel: int) -> list[str]:
    if parallel == 1:
        return [side.put(path) for path in paths]
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(side.put, paths))


def get_each(side: Side, caps: Sequence[str], targets: Sequence[Path], parallel: int) -> None:
    if parallel == 1:
        for cap, target in zip(caps, targets, strict=True):
            side.get(cap, target)
        return
    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(side.get, caps, targets))


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_file(path: Path, size: int) -> str:
    """Write random bytes (sides that recognise a file they hold would skip the work) and answer their SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for begin in range(0, size, 8 * MIB):
            block = os.urandom(min(8 * MIB, size - begin))
            file.write(block)
            digest.update(block)
    return digest.hexdigest()
