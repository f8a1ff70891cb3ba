"""The ways in: for other nodes that audit, for whoever wants to know how a file does, and for the operator of this node.

Who may: challenges are judged in ``answering``; whether shards are here is told to nodes; reports go to anybody with a certificate, as
shards' absence could be asked for anyway; an audit is begun by this node's own certificate alone.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol import canonical
from medshard_protocol.audit import (
    Challenge,
    Report,
    Result,
    challenge_bytes_max,
    inventory_bytes_max,
    pack_held,
    sign_report,
    unpack_inventory,
)
from medshard_protocol.canonical import Fields
from medshard_protocol.errors import MedshardError, Refused
from medshard_protocol.ids import FileId, NodeId, file_id_from_hex, file_id_size
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import body_type
from medshard_protocol.repair import holders
from medshard_protocol.repairorder import counted
from storenode.auditing.answering import Answerer, held_here
from storenode.auditing.auditor import Auditor
from storenode.auditing.challenger import Challenger, Round
from storenode.auditing.findings import Findings
from storenode.auditing.scrub import Scrubber
from storenode.callers import caller
from storenode.evidence import evidence_in
from storenode.ledger.channel import PeerCaller
from storenode.metrics import Metrics
from storenode.repairing import ground
from storenode.routes import Node, node_key, read_body, shard_id

wish_bytes_max: Final = 64
count_max: Final = 1000


@dataclass(frozen=True, slots=True)
class Audits:
    """Both sides of audits in one node."""

    answerer: Answerer
    auditor: Auditor
    key: Ed25519PrivateKey


audits_key: Final = web.AppKey("audits", Audits)


def equip(
    app: web.Application, node: Node, key: Ed25519PrivateKey, peers: PeerCaller, metrics: Metrics, chain: Callable[[], bytes]
) -> Auditor:
    """Give a node's application these routes, and its background work.

    ``key`` is the node's TLS key, ``chain`` gives the rosters that evidence is checked under.
    """
    config = node.config.audit
    findings = Findings(node.config.data, me=node.id, silence_s=config.silence_s, confirm_s=config.confirm_s)
    evidence = evidence_in(node.config.data)
    challenger = Challenger(node, key, peers, findings, evidence, metrics, chain=chain, answer_s=config.answer_s)
    scrubber = Scrubber(
        node.store,
        findings,
        node.id,
        metrics,
        lambda file_id: _concerns(node, file_id),
        bytes_per_s=config.scrub_bytes_per_s,
        cells_per_s=config.scrub_cells_per_s,
        every_s=config.scrub_every_s,
    )
    auditor = Auditor(node, peers, findings, challenger, scrubber, config)
    app[audits_key] = Audits(Answerer(node, key, findings, metrics), auditor, key)
    app.router.add_routes(
        [
            web.post("/v1/audit/{file}/{index}", post_challenge),
            web.post("/v1/inventory", post_inventory),
            web.get("/v1/audit/{file}", get_report, allow_head=False),
            web.post("/v1/audit", post_audit),
            web.get("/v1/audit", get_audits, allow_head=False),
        ]
    )

    async def running(app: web.Application) -> AsyncIterator[None]:
        yield
        await auditor.close()

    app.cleanup_ctx.append(running)
    return auditor


def _concerns(node: Node, file_id: FileId) -> int | None:
    """Which shard of a file this node is to hold; None for one that is not registered, or has ended. Blocking."""
    try:
        known = ground.standing(node.ledger, file_id)
    except ground.Denied:
        return None
    moves = {shard: moved for shard, moved in known.given if moved.node == node.id}
    try:
        manifest = Manifest.from_bytes(node.store.manifest(file_id))
        present = holders(manifest, counted(manifest, known.given, ground.institutions(node.ledger.state)))
        return present.index(node.id) if node.id in present else None
    except MedshardError:  # the manifest is gone or damaged: what was stored is all there is to go by
        try:
            shard = node.store.shard(file_id)
        except MedshardError:
            shard = None
        return shard.index if shard is not None else next(iter(moves), None)


async def post_challenge(request: web.Request) -> web.Response:
    """Answer another node's challenge."""
    challenge = Challenge.from_bytes(await read_body(request, challenge_bytes_max))
    answer = await request.app[audits_key].answerer.answer(*shard_id(request), challenge, caller(request))
    return web.Response(body=answer.to_bytes(), content_type=body_type)


async def post_inventory(request: web.Request) -> web.Response:
    """Say which of some shards are here."""
    if caller(request).node is None:
        raise Refused("only nodes ask each other for their inventories")
    items = unpack_inventory(await read_body(request, inventory_bytes_max))
    return web.Response(body=pack_held(await asyncio.to_thread(held_here, request.app[node_key], items)), content_type=body_type)


async def get_report(request: web.Request) -> web.Response:
    """What this node's audits last found of a file, signed."""
    node, audits, file_id = request.app[node_key], request.app[audits_key], file_id_from_hex(request.match_info["file"])
    found = audits.auditor.findings.of_file(file_id)
    results = tuple(Result(each.shard, each.node, each.verdict, int(each.since), int(each.checked), each.times) for each in found)
    report = sign_report(node.ledger.roster.origin, Report(file_id, node.id, int(time.time()), results), audits.key.sign)
    return web.Response(body=report.to_bytes(), content_type=body_type)


async def post_audit(request: web.Request) -> web.Response:
    """Audit at once, for the operator: some files of chance, or one."""
    auditor = _own(request)
    f = Fields(canonical.decode(await read_body(request, wish_bytes_max), bytes_max=wish_bytes_max, what="audit"), count=3, what="audit")
    f.uint(least=1, most=1)
    count, files = f.uint(least=1, most=count_max), f.list(most=1)
    file_id = FileId(Fields(files, count=1, what="audit").bytes(exactly=file_id_size)) if files else None
    rounds = await auditor.now(count, file_id)
    roster = request.app[node_key].ledger.roster
    names = {each.id: each.name for each in roster.nodes}
    return _json({"rounds": [_told(each, names) for each in rounds], **auditor.status()})


async def get_audits(request: web.Request) -> web.Response:
    """How the audits go, for the operator."""
    return _json(_own(request).status())


def _own(request: web.Request) -> Auditor:
    if caller(request).node != request.app[node_key].id:
        raise Refused("audits are begun by the node's own operator", hint="run `storenode audit` where the node runs")
    return request.app[audits_key].auditor


def _told(each: Round, names: dict[NodeId, str]) -> dict[str, Any]:
    results = [
        {
            "shard": shard,
            "node": names.get(node, node.hex()),
            "verdict": heard.verdict.value,
            "seconds": round(heard.seconds, 4),
            "why": heard.why,
        }
        for shard, (node, heard) in sorted(each.verdicts.items())
    ]
    return {"file": each.file_id.hex(), "cell": each.cell, "compared": each.compared, "results": results}


def _json(told: dict[str, Any]) -> web.Response:
    return web.Response(text=json.dumps(told), content_type="application/json")
