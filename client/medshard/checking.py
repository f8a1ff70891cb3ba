"""Asking without reading: does every holder still have its shard, whole? And what is known of a file?

A holder proves its shard twice: it re-hashes the whole of it and says what is bad (its word), and it sends a few cells that we
choose at random with their Merkle paths (proof). The shard itself is not downloaded.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

from medshard.audits import audits_of
from medshard.model import HolderReport, HolderState, Info, NodeInfo, Row, VerifyReport
from medshard.moves import moved
from medshard.restoring import Target
from medshard.transport import Net
from medshard_protocol import merkle
from medshard_protocol.checkpoint import Note, cosigners, open_published
from medshard_protocol.errors import Absent, Damaged, Malformed, MedshardError, Unavailable
from medshard_protocol.ids import NodeId
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import SpanHead, shard_path, unpack_check
from medshard_protocol.roster import Node
from medshard_protocol.shards import digests

sample_cells: Final = 3
check_timeout_s: Final = 120.0  # a node re-reads its whole shard
cell_timeout_s: Final = 10.0
ping_timeout_s: Final = 3.0


async def verify_target(net: Net, target: Target, *, cells: bool = True) -> VerifyReport:
    """Ask every holder to prove its shard. Cells are served to announced reads only: without ``cells`` there is the holders' word alone."""
    manifest = target.manifest
    asked = {index: ref.node for index, ref in enumerate(manifest.shards)}
    reports = await asyncio.gather(*(_verify_holder(net, manifest, index, node, cells=cells) for index, node in asked.items()))
    holders = dict(enumerate(reports))
    if any(holder.state not in ("proven", "unproven") for holder in reports):
        told = await moved(net, manifest.file_id)
        again = {index: node for index, node in told.items() if index in asked and node != asked[index]}
        fresh = await asyncio.gather(*(_verify_holder(net, manifest, index, node, cells=cells) for index, node in again.items()))
        holders |= dict(zip(again, fresh, strict=True))
        asked |= again
    proven = sum(1 for holder in holders.values() if holder.state == "proven")
    margin = proven - manifest.layout.k
    audits = await audits_of(net, manifest, asked.values())
    return VerifyReport(target.sha256, tuple(holders.values()), proven == manifest.layout.n, margin, audits)


async def describe_target(net: Net, target: Target, row: Row) -> Info:
    """What there is to say about one stored file. Nodes are only asked whether they are up."""
    manifest, roster = target.manifest, net.roster
    layout = manifest.layout
    checkpoint = open_published(target.inclusion.checkpoint, roster)
    signers = cosigners(Note.from_bytes(target.inclusion.checkpoint), roster)
    told = await moved(net, manifest.file_id)
    nodes = await asyncio.gather(*(_ping(net, manifest, index, told.get(index)) for index in range(layout.n)))
    is_pack = target.header.kind == "pack"
    return Info(
        row=row,
        k=layout.k,
        n=layout.n,
        cell_size=layout.cell_size,
        sealed_size=layout.sealed_size,
        stored_bytes=layout.shard_size * layout.n,
        manifest_sha256=manifest.sha256,
        nodes=tuple(nodes),
        ledger_index=target.inclusion.index,
        tree_size=checkpoint.size,
        checkpoint=target.inclusion.checkpoint.decode(),
        cosigners=tuple(sorted(roster.cosigner_name(roster.node(node)) for node in signers)),
        pack_size=target.header.size if is_pack else None,
        pack_members=len(target.header.members) if is_pack else None,
    )


async def _verify_holder(net: Net, manifest: Manifest, index: int, holder: NodeId, *, cells: bool) -> HolderReport:
    node = net.holder(holder)
    checked = 0
    bad: list[int] = []
    state: HolderState
    try:
        bad = unpack_check(await net.call(node, "POST", shard_path(manifest.file_id, index) + "/check", timeout_s=check_timeout_s))
        chosen = random.SystemRandom().sample(range(manifest.layout.stripes), min(sample_cells, manifest.layout.stripes))
        for cell in chosen if cells else ():
            await _prove_cell(net, node, manifest, index, cell)
            checked += 1
        sound: tuple[HolderState, str] = ("proven", "") if cells else ("unproven", "says that it is whole; the ledger has no quorum")
        state, detail = ("damaged", f"{len(bad)} bad cells") if bad else sound
    except Absent as error:
        state, detail = "missing", str(error)
    except Unavailable as error:
        state, detail = ("slow" if "no answer within" in str(error) else "unreachable"), str(error)
    except MedshardError as error:
        state, detail = "damaged", str(error)
    institution = net.institution_of(node)
    return HolderReport(node.name, institution, index, state, checked, tuple(bad), detail)


async def _prove_cell(net: Net, node: Node, manifest: Manifest, index: int, cell: int) -> None:
    """Fetch one cell with its Merkle path. Raises Damaged or Malformed unless it is the cell that was stored."""
    path = f"{shard_path(manifest.file_id, index)}?cells={cell}-{cell}&proof=paths"
    answer = await net.call(node, "GET", path, timeout_s=cell_timeout_s)
    size = int.from_bytes(answer[:4], "big")
    head, data = SpanHead.from_bytes(answer[4 : 4 + size]), answer[4 + size :]
    if (head.first, head.count, len(head.paths)) != (cell, 1, 1) or len(data) != manifest.layout.cell_length(cell):
        raise Malformed(f"{node.name}: not the cell that was asked for")
    digest = digests[manifest.digest]
    leaf = merkle.leaf_hash(digest(data), digest)
    if merkle.root_from_path(leaf, cell, manifest.layout.stripes, head.paths[0], digest) != manifest.shards[index].root:
        raise Damaged(f"{node.name}: cell {cell} of shard {index} has other bytes than were stored")


async def _ping(net: Net, manifest: Manifest, index: int, taken_by: NodeId | None) -> NodeInfo:
    first = manifest.shards[index].node
    node = net.holder(taken_by or first)
    institution = net.institution_of(node)
    taken = f"taken over from {net.holder(first).name}" if taken_by not in (None, first) else ""
    try:
        await net.call(node, "GET", "/healthz", timeout_s=ping_timeout_s)
    except MedshardError as error:
        return NodeInfo(node.name, institution, index, node.url, "down", str(error))
    return NodeInfo(node.name, institution, index, node.url, "up", taken)
