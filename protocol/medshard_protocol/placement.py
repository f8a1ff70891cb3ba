"""Which nodes hold a file's shards: weighted rendezvous hashing over the roster.

Everyone computes the same order from the file id, nobody keeps a table, and a node that leaves moves only its own shards. An
institution gets fewer than k shards of a file, so that it alone can rebuild nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from hashlib import sha256

from medshard_protocol.errors import Unavailable
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.roster import Node, Roster


def order(file_id: FileId, roster: Roster) -> list[Node]:
    """All nodes, best first, for this file. Weighted by capacity (Mosharaf's logarithmic method: -w / ln u)."""
    return sorted(roster.nodes, key=lambda node: (-_score(file_id, node), node.id))


def place(file_id: FileId, roster: Roster, k: int, n: int) -> tuple[NodeId, ...]:
    """The holders of shards 0 to n-1. Raises Unavailable when the roster has too few nodes or institutions for k of n."""
    held: Counter[int] = Counter()
    chosen: list[NodeId] = []
    ranked = order(file_id, roster)
    # Institutions first get one shard each: w acknowledgements must come from distinct ones.
    for limit in range(1, max(k, 2)):
        for node in ranked:
            if len(chosen) < n and node.id not in chosen and held[node.institution] < limit:
                chosen.append(node.id)
                held[node.institution] += 1
    if len(chosen) < n:
        raise Unavailable(
            f"the consortium has room for {len(chosen)} of the {n} shards that the {k}/{n} code needs",
            hint=f"a node holds one shard of a file and an institution fewer than {k}; choose a smaller code or add nodes",
        )
    return tuple(chosen)


def _score(file_id: FileId, node: Node) -> float:
    draw = int.from_bytes(sha256(b"medshard/place/v1" + file_id + node.id).digest()[:8], "big")
    uniform = (draw + 1) / (2**64 + 1)  # in (0, 1): its logarithm is finite and not zero
    return max(node.capacity, 1) / -math.log(uniform)
