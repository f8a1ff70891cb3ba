"""Ways in which a disk gives back other bytes than it was given, each undone after use."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

block_bytes = (16, 512, 4096)  # what is swapped: a few words, a sector, a page


@dataclass(frozen=True)
class Target:
    """A file, and the part of it that is damaged: all of it, or where something that matters lies."""

    what: str
    path: Path
    start: int = 0
    length: int | None = None


def places_of(what: str, path: Path, needles: list[bytes]) -> list[Target]:
    """Where these bytes begin to lie in a file (SQLite scatters long ones over pages: the first of them counts)."""
    data = path.read_bytes()
    found = [(data.find(needle[:64]), needle) for needle in needles]
    return [Target(what, path, at, min(len(needle), 512)) for at, needle in found if at >= 0]


@contextmanager
def damaged(draw: random.Random, target: Target) -> Iterator[str]:
    """Flip a bit of the target, cut its file off, or swap two parts; undo it at the end. Says what was done."""
    before = target.path.read_bytes()
    length = len(before) - target.start if target.length is None else target.length
    data = bytearray(before)
    how = draw.choice(("flip", "flip", "flip", "swap", "cut"))
    at = target.start + draw.randrange(length)
    if how == "flip":
        bit = draw.randrange(8)
        data[at] ^= 1 << bit
        told = f"bit {bit} of byte {at} flipped"
    elif how == "swap":
        size = min(draw.choice(block_bytes), len(data) // 2)
        a, b = min(at, len(data) - size), draw.randrange(len(data) - size + 1)
        if abs(a - b) < size:  # parts that overlap cannot change places
            a, b = 0, len(data) - size
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
        told = f"{size} bytes at {a} and {b} swapped"
    else:
        del data[at:]
        told = f"cut to {at} bytes"
    write(target.path, bytes(data))
    try:
        yield f"{target.what}: {told} ({target.path.name}, {len(before)} bytes)"
    finally:
        write(target.path, before)


def write(path: Path, data: bytes) -> None:
    """Write a file anew, as another inode: who has the old one open keeps it."""
    mode = path.stat().st_mode if path.exists() else 0o600
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.chmod(part, mode)
    os.replace(part, path)
