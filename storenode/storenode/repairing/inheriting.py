"""The sealed keys of a file's grants, which lie beside its shards: whoever takes a shard over asks other holders for them.

Law: only keys of grants that stand, by this node's own mirror, are kept, so what was revoked or erased does not come back. They are sealed
to their readers: nodes learn nothing from them, and a forged one is refused by its reader.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from medshard_protocol.errors import MedshardError, Refused
from medshard_protocol.ids import FileId, NodeId, Sha256
from medshard_protocol.manifest import Manifest
from medshard_protocol.repairorder import grants_kept_max, pack_grants, unpack_grants
from storenode.ledger import Ledger
from storenode.repairing import ground
from storenode.repairing.rebuilding import Means
from storenode.repairing.surveying import Case
from storenode.shardstore import Sealed

ask_s: Final = 5.0
asked_of: Final = 3  # holders that are asked: one may have missed a grant

log = logging.getLogger(__name__)


def path(file_id: FileId) -> str:
    """Where a holder gives the sealed keys of a file's grants to another."""
    return f"/v1/sealed/{file_id.hex()}"


async def inherit(means: Means, case: Case, holders: Sequence[NodeId]) -> None:
    """Ask some of these holders for the sealed keys of a file's grants, and keep those that are not here. No answer is no error."""
    file_id, sealed = case.manifest.file_id, Sealed(means.node.store.catalog)
    answered = 0
    for node in [node for node in holders if node != means.node.id][: 2 * asked_of]:
        if answered == asked_of:
            return
        try:
            status, answer = await means.peers(node, "GET", path(file_id), b"", ask_s)
            found = unpack_grants(answer) if status == 200 else {}
        except MedshardError as error:
            log.info("a holder does not give the keys of grants", extra={"file": file_id.hex()[:16], "why": str(error)})
            continue
        answered += status == 200
        for grant, data in found.items():
            if _stands(means.node.ledger, file_id, grant) and sealed.grant(file_id, grant) is None:
                await sealed.put_grant(file_id, grant, data)


async def give(means: Means, file_id: FileId, to: NodeId | None) -> bytes:
    """The sealed keys of a file's grants, for a node that was given a shard of it. Raises Refused, or Absent without the manifest."""
    try:
        known = ground.standing(means.node.ledger, file_id)
    except ground.Denied as denied:
        raise denied.objection.error() from None
    case = means.surveyor.case(Manifest.from_bytes(means.node.store.manifest(file_id)), known)
    if to is None or to not in {node for _, node in case.ever}:
        raise Refused("only a holder gets the sealed keys of a file's grants")
    rows = means.node.store.catalog.all(
        "SELECT grant_id, sealed FROM sealed_grants WHERE file_id = ? ORDER BY grant_id LIMIT ?", file_id, grants_kept_max
    )
    return pack_grants({Sha256(grant): data for grant, data in rows})


def _stands(ledger: Ledger, file_id: FileId, grant: Sha256) -> bool:
    granted, known = ledger.state.grant(grant), ledger.state.registration(file_id)
    is_there = known is not None and not ground.has_ended(ledger, known)  # it may have ended since the others were asked
    return is_there and granted is not None and granted.revoked is None and file_id in granted.file_ids
