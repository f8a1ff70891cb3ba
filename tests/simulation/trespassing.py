"""Those who try to get what is not theirs: a stranger who asks for shards, and a node that asks helpers for more than its own.

Law: who is served or helped has broken a promise, and that is raised at once.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from tests.conftest import key_named
from tests.simulation import checks
from tests.simulation.checks import Broken
from tests.simulation.cluster import Cluster, Host, vault_keys

from medshard.vault import Vault
from medshard_protocol.entries import Access, Move
from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.ids import FileId
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import pack_small_reads
from medshard_protocol.repair import seed_size
from medshard_protocol.repairorder import Link, nonce_size, pack_seed, sign_order
from medshard_protocol.sharing import access_header, pack_tickets


async def stranger_reads(cluster: Cluster, stranger: Host, file_ids: list[FileId], byzantine: set[Host]) -> None:
    """Somebody who is enrolled and was granted nothing asks every node for every shard, with every ticket there is."""
    author = vault_keys(stranger.name).public
    async with cluster.vault(stranger) as vault:
        for file_id in file_ids:
            with contextlib.suppress(MedshardError):
                await vault._ledger.announce([file_id])
            places = [
                place
                for place, entry in enumerate(checks.entries(max(cluster.nodes, key=checks.published)))
                if isinstance(entry.body, Access) and file_id in entry.body.file_ids
            ]
            tickets = [{}, *({access_header: pack_tickets([place])} for place in {*places[:1], *places[-1:]})]
            for index, node in enumerate(cluster.roster.nodes):
                if cluster.nodes[index] in byzantine:
                    continue
                for headers in tickets:
                    if await _is_served(vault, node, file_id, index, headers):
                        raise Broken(f"read without a right: {node.name} served {author.hex()[:8]}")


async def _is_served(vault: Vault, node: Any, file_id: FileId, shard: int, headers: dict[str, str]) -> bool:
    body = pack_small_reads([(file_id, shard)])
    try:
        async with vault._net._open(node, "POST", "/v1/read", body, headers, 5.0) as answer:
            await answer.read()
            return answer.status == 200
    except MedshardError:
        return False


async def node_grabs(cluster: Cluster, host: Host, file_ids: list[FileId]) -> None:
    """A node asks all helpers for shards that it must not have: without a MOVE entry, by another's, and although it holds one."""
    node = host.node.id
    other = cluster.nodes[(cluster.nodes.index(host) + 1) % len(cluster.nodes)]
    for file_id in file_ids:
        manifest = checks.manifest_of(cluster, file_id)
        own, strange = manifest.index_on(node), manifest.index_on(other.node.id)
        if own is None or strange is None:
            continue
        bodies = [(f"tls {host.number}", Move(file_id, strange, node, os.urandom(16)))]
        bodies += [(f"tls {other.number}", Move(file_id, strange, other.node.id, os.urandom(16)))]
        await _no_helper_helps(cluster, host, manifest, own, 1)
        for author, body in bodies:
            with contextlib.suppress(MedshardError):  # the ledger itself refuses what is plainly wrong
                (proof,) = await cluster.append(host, author, body)
                await _no_helper_helps(cluster, host, manifest, strange, proof.index)
                await _no_helper_helps(cluster, host, manifest, own, proof.index)


async def _no_helper_helps(cluster: Cluster, host: Host, manifest: Manifest, shard: int, place: int) -> None:
    node, key = host.node.id, key_named(f"tls {host.number}")
    links = [Link(ref.node, number) for number, ref in enumerate(manifest.shards) if number != shard and ref.node != node]
    chain = links[: manifest.layout.k]
    order = sign_order(cluster.roster.origin, manifest.file_id, shard, place, chain, 0, os.urandom(nonce_size), key.sign)
    path = f"/v1/repair/{manifest.file_id.hex()}/{shard}/seed"
    for link in chain:
        with contextlib.suppress(Unavailable):
            status, _ = await host.parts.peers(link.node, "POST", path, pack_seed(order, os.urandom(seed_size)), 5.0)
            if status == 200:
                raise Broken("a helper follows an order that it must refuse")
