"""What the process does once from which all seeds are forked.

Law: a seed that follows finds nothing of this one but what does not depend on it: modules, compiled patterns, tables, keys by name.
"""

from __future__ import annotations

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

_warm: list[Run] = []  # kept: what is left of it must not be collected


def warm(folder: Path) -> None:
    """Run a seed in which nothing goes wrong, in the process that all others are forked from: what is imported, compiled and cached by it
    is there for each of them. What it exchanged in the product is put back."""
    modules = (storenode.app, helping, entries, checkpoint, sharing, repairorder, hpke, medshard.putting, medshard.getting)
    before = [(owner, dict(vars(owner))) for owner in (Mirror, FileSeal, ShardStore, *modules)]
    calm = Run(0, folder, calm=True)
    _warm.append(calm)
    calm.go()
    for owner, values in before:
        for name, value in values.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)
    worlds.world = None
    clusters.roster_of.cache_clear()  # it remembers a quorum, which a mutant may count otherwise
