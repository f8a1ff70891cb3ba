"""Where a file's shards are now: nodes that took one over say so, and the ledger behind them.

Law: what nodes answer is a hint, for a reader who does not find enough shards where the manifest says. Cells are checked against the
manifest wherever they come from, so a wrong hint costs a request.
"""

from __future__ import annotations

import asyncio
from typing import Final

from medshard.transport import Net
from medshard_protocol.errors import MedshardError
from medshard_protocol.facts import Moved
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.repairorder import moves_path, unpack_moves
from medshard_protocol.roster import Node

timeout_s: Final = 1.5
asked_max: Final = 32  # nodes, those that answered lately first


async def moved(net: Net, file_id: FileId) -> dict[int, NodeId]:
    """For each shard that has moved, as far as nodes that answer know: who took it over last. Never raises for lack of an answer."""
    nodes = sorted(net.roster.nodes, key=lambda node: (net.health.is_suspect(node.id), node.id))[:asked_max]

    async def ask(node: Node) -> dict[int, Moved]:
        try:
            return unpack_moves(await net.call(node, "GET", moves_path(file_id), timeout_s=timeout_s))
        except MedshardError:
            return {}

    newest: dict[int, Moved] = {}
    for answer in await asyncio.gather(*map(ask, nodes)):
        for shard, each in answer.items():
            if shard not in newest or each.index > newest[shard].index:
                newest[shard] = each
    return {shard: each.node for shard, each in newest.items()}
