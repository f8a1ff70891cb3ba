"""Who takes part changes in a run: a node joins while all else goes wrong, and when all is well another hands its shards on and leaves.

Law: what operators do is done here, by the parts of running nodes: a document is kept and spread, institutions approve it by entries, and
whoever joins has the chain of rosters. Whether and when a change counts is the ledger's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
from dataclasses import replace
from random import Random

from tests.simulation.checks import Broken
from tests.simulation.cluster import Cluster, Host, roster_of

from medshard_protocol.entries import Approve
from medshard_protocol.errors import MedshardError
from medshard_protocol.roster import Roster
from storenode.repairing.routes import repairs_key

share, rest = 10, 7  # seeds in which this happens: one of so many
try_s = 15.0
drain_s = 120.0


async def joins(cluster: Cluster, rng: Random) -> None:
    """One more institution joins with its node, whenever the ledger takes that."""
    await asyncio.sleep(rng.uniform(0.0, 2.0))
    old, grown = cluster.roster, roster_of(len(cluster.nodes) + 1)
    new = replace(old, number=old.number + 1, previous=old.sha256, institutions=grown.institutions, nodes=grown.nodes)
    await _decide(cluster, new, rng, [])
    cluster.join().start()


async def leaves(cluster: Cluster, rng: Random) -> Host | None:
    """A node hands all its shards on, then its institution leaves; None where some shard has nobody left who may take it."""
    host = rng.choice(cluster.nodes[1:])  # the first is the sequencer by the genesis file
    leaving, loop = host.app[repairs_key].leaving, cluster.world.loop
    await host.run(_drain(host))
    deadline = loop.time() + drain_s
    while (told := leaving.status())["left"]:
        if told["stuck"] == told["left"]:
            return None
        if loop.time() > deadline:
            raise Broken(f"{host} does not get rid of {told['left']} shards: {told}")
        await asyncio.sleep(0.5)
    old, gone = cluster.roster, host.node.institution
    institutions = tuple(each for number, each in enumerate(old.institutions) if number != gone)
    nodes = tuple(replace(node, institution=node.institution - (node.institution > gone)) for node in old.nodes if node.institution != gone)
    await _decide(cluster, replace(old, number=old.number + 1, previous=old.sha256, institutions=institutions, nodes=nodes), rng, [host])
    host.cut(silent=False)
    cluster.nodes.remove(host)
    return host


async def _drain(host: Host) -> None:
    host.app[repairs_key].leaving.drain(on=True)


async def _decide(cluster: Cluster, new: Roster, rng: Random, without: list[Host]) -> None:
    """Let institutions approve a roster until some node goes by it."""
    voters = [host for host in cluster.nodes if host not in without]
    while True:
        for voter in voters:
            up = [host for host in cluster.nodes if host.machine is not None and host.parts is not None]
            if up:
                host = rng.choice(up)
                await asyncio.wait([host.run(_approve(cluster, host, voter, new))], timeout=try_s)
            for host in up:
                if host.parts is not None and host.parts.membership.roster == new:
                    cluster.roster, cluster.links = new, list(host.parts.membership.links(0))
                    return
        await asyncio.sleep(rng.uniform(0.2, 1.0))


async def _approve(cluster: Cluster, host: Host, voter: Host, new: Roster) -> None:
    """By way of one node, which lets the others have the document."""
    with contextlib.suppress(MedshardError, OSError, sqlite3.Error):  # it knows the document, or goes by it
        host.parts.membership.keep(new.to_bytes())
        host.parts.following.spread(new, new.to_bytes())
    with contextlib.suppress(MedshardError, OSError, sqlite3.Error):
        await cluster.append(host, f"ca {voter.number}", Approve(new.sha256, hashlib.sha256(new.sha256).digest()[:16]))
