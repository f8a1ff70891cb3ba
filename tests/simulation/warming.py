"""What the process does once from which all seeds are forked.

Law: a seed that follows finds nothing of this one but what does not depend on it: modules, compiled patterns, tables, keys by name.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tests.simulation import cluster as clusters
from tests.simulation import world as worlds
from tests.simulation.run import Run

import medshard.getting
import medshard.putting
import storenode.app
from medshard import hpke
from medshard.sealing import FileSeal
from medshard_protocol import checkpoint, entries, repairorder, sharing
from storenode.ledger.mirror import Mirror
from storenode.repairing import helping
from storenode.shardstore import ShardStore

_modules = (storenode.app, helping, entries, checkpoint, sharing, repairorder, hpke, medshard.putting, medshard.getting)
_product = [(owner, dict(vars(owner))) for owner in (Mirror, FileSeal, ShardStore, *_modules)]
_warm: list[Run] = []  # kept: what is left of it must not be collected


def warm(folder: Path) -> None:
    """Run a seed in which nothing goes wrong, in the process that all others are forked from: what is imported, compiled and cached by it
    is there for each of them."""
    with contextlib.chdir(folder):
        calm = Run(4, calm=True)
        _warm.append(calm)
        told = calm.go(0)
    if told.broken or not told.acknowledged:
        raise SystemExit(f"where nothing goes wrong, something does: {told}")
    put_back()


def begin(folder: Path) -> Run:
    """A consortium of four as most seeds find it: they go on with it in a fork of this process and in a copy of the folder."""
    with contextlib.chdir(folder):
        begun = Run(4)
        begun.begin()
    worlds.world = None
    return begun


def put_back() -> None:
    """Let the product be as it was, whatever a run exchanged in it."""
    for owner, values in _product:
        for name, value in values.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)
    worlds.world = None
    clusters.roster_of.cache_clear()  # it remembers a quorum, which a mutant may count otherwise


def copy(folder: Path, to: Path) -> None:
    """Copy all files. Several times as quick as shutil, for few and small ones."""
    to.mkdir()
    for entry in os.scandir(folder):
        if entry.is_dir():
            copy(Path(entry.path), to / entry.name)
        else:
            (to / entry.name).write_bytes(Path(entry.path).read_bytes())
