"""Who makes which missing shard of a file again, and who says so. Everybody computes the same from the same knowledge; nothing here acts.

Law: a shard goes to whoever should hold it, if that node is there to make it again, else to the next in the order of placement that may
take it and is there. Of several missing shards of one file each goes to another node. A shard that nobody may take goes to nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from medshard_protocol.ids import NodeId
from medshard_protocol.repairorder import Institutions, objection_to_replacement
from storenode.repairing.surveying import Case


def margin(case: Case, missing: Collection[int]) -> int:
    """How many shards may still be lost; below 0 the file cannot be read."""
    return case.manifest.layout.n - len(missing) - case.manifest.layout.k


def assign(
    case: Case, missing: Collection[int], ranked: Sequence[NodeId], institution: Institutions, usable: Callable[[int, NodeId], bool]
) -> dict[int, NodeId]:
    """For each missing shard that somebody may take: who is to make it again. ``ranked`` are all nodes in the order of placement."""
    assigned: dict[int, NodeId] = {}
    given = list(case.known.ever)
    for shard in sorted(missing):
        for node in (case.present[shard], *ranked):
            if node in assigned.values() or not usable(shard, node):
                continue
            if objection_to_replacement(case.manifest, shard, node, given, institution) is None:
                assigned[shard] = node
                given.append((shard, node))
                break
    return assigned


def place_among_holders(case: Case, me: NodeId, ranked: Sequence[NodeId], answers: Callable[[NodeId], bool]) -> int | None:
    """Which of the holders that answer this node is, from 0 in the order of placement; None if it is none. The first two speak up first."""
    there = [node for node in ranked if node in case.present and (node == me or answers(node))]
    return there.index(me) if me in there else None


def spares(case: Case, shard: int, ranked: Sequence[NodeId], institution: Institutions) -> list[NodeId]:
    """Nodes that never had a shard of the file and may take this one. Each is good for one shard of it, once."""
    had = {node for _, node in case.ever}
    return [
        node
        for node in ranked
        if node not in had and objection_to_replacement(case.manifest, shard, node, case.known.ever, institution) is None
    ]
