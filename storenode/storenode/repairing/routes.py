"""The ways in: for a replacement and the next in a line, for the operator of this node, and for readers who look for a moved shard.

Who may: orders and sums are judged in ``helping``; a repair is begun by this node's own certificate alone, which its operator has; where
shards have gone is told to anybody with a certificate, as the ledger tells it anyway.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol.errors import Absent, Damaged, Malformed, Refused, Unavailable
from medshard_protocol.facts import Moved
from medshard_protocol.ids import FileId, file_id_from_hex
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import body_type
from medshard_protocol.repairorder import (
    counted,
    keys_bytes_max,
    order_bytes_max,
    pack_moves,
    pack_offer,
    unpack_ask,
    unpack_drain,
    unpack_keys,
    unpack_seed,
    unpack_wish,
)
from storenode.callers import caller
from storenode.metrics import Metrics
from storenode.peers import Peers
from storenode.repairing import ground, inheriting
from storenode.repairing.fetching import Giver
from storenode.repairing.helping import Helper
from storenode.repairing.leaving import Leaving
from storenode.repairing.pulse import Pulse
from storenode.repairing.rate import Bucket
from storenode.repairing.rebuilding import Means
from storenode.repairing.repairer import Repairer
from storenode.repairing.surveying import Surveyor
from storenode.repairing.tending import Missing, Tending
from storenode.routes import Node, node_key, read_body, shard_id

handover_wait_s: Final = 2.0  # for a small shard to be here before the answer


@dataclass(frozen=True, slots=True)
class Repairs:
    """All sides of repair in one node."""

    means: Means
    helper: Helper
    repairer: Repairer
    giver: Giver
    pulse: Pulse
    tending: Tending
    leaving: Leaving

    def start(self) -> None:
        """Begin what a node does by itself, once its ledger runs."""
        self.pulse.start()
        if self.tending.is_on:
            self.tending.start()
        self.leaving.start()

    async def close(self) -> None:
        """End everything."""
        await self.pulse.close()
        await self.tending.close()
        await self.leaving.close()
        await self.repairer.close()

    def status(self) -> dict[str, object]:
        """For people and programs."""
        return self.tending.status() | {"drain": self.leaving.status()}


def equip(app: web.Application, node: Node, key: Ed25519PrivateKey, peers: Peers, metrics: Metrics, missing: Missing = list) -> Repairs:
    """Give a node's application these routes. ``key`` is the node's TLS key, ``missing`` says what audits found."""
    section = node.config.repair
    means = Means(node, key, peers, metrics, Surveyor(node, peers), Bucket(section.rate_bytes_per_s))
    repairer, giver = Repairer(means, section.at_once), Giver(means)
    pulse = Pulse(node.id, peers, lambda: node.ledger.roster, section.grace_s, node.traffic.lull)
    tending = Tending(means, repairer, pulse, section, lambda: not leaving.drains, missing)
    leaving = Leaving(means, giver, pulse, section, tending.held, tending.is_sick)
    repairs = app[repairs_key] = Repairs(means, Helper(node, key, peers, metrics, means.bucket), repairer, giver, pulse, tending, leaving)
    app.router.add_routes(
        [
            web.post("/v1/repair/{file}/{index}/seed", post_seed),
            web.post("/v1/repair/{file}/{index}/keys", post_keys),
            web.post("/v1/repair/{file}/{index}/sum", post_sum),
            web.post("/v1/repair/{file}", post_repair),
            web.get("/v1/repair/{file}", get_repair, allow_head=False),
            web.delete("/v1/repair/{file}", delete_repair),
            web.get("/v1/repair", get_repairs, allow_head=False),
            web.post("/v1/handover/{file}/{index}", post_handover),
            web.get("/v1/handover/{file}/{index}", get_handover, allow_head=False),
            web.get("/v1/sealed/{file}", get_sealed, allow_head=False),
            web.get("/v1/drain", get_drain, allow_head=False),
            web.post("/v1/drain", post_drain),
            web.get("/v1/moves/{file}", get_moves, allow_head=False),
        ]
    )

    async def running(app: web.Application) -> AsyncIterator[None]:
        yield
        await repairs.close()

    app.cleanup_ctx.append(running)
    return repairs


async def post_seed(request: web.Request) -> web.Response:
    """Take an order and a seed from the replacement; answer with a key for the other helpers."""
    order, seed = unpack_seed(await read_body(request, order_bytes_max + 64))
    if (order.file_id, order.shard) != shard_id(request):
        raise Malformed("the order is for another shard")
    offer = await request.app[repairs_key].helper.accept(order, seed, caller(request))
    return web.Response(body=pack_offer(offer), content_type=body_type)


async def post_keys(request: web.Request) -> web.Response:
    """Take the keys of all helpers of an order, from the replacement."""
    id_, offers = unpack_keys(await read_body(request, keys_bytes_max))
    request.app[repairs_key].helper.agree(id_, offers, caller(request))
    return web.Response(status=204)


async def post_sum(request: web.Request) -> web.StreamResponse:
    """Send the sums of an order, frame by frame, to the next in the line."""
    id_ = unpack_ask(await read_body(request, 64))
    return await request.app[repairs_key].helper.give(id_, caller(request), request)


async def post_repair(request: web.Request) -> web.Response:
    """Begin a repair here, or say what one would do; from another node, a hint that a shard is missing."""
    wish = unpack_wish(await read_body(request, 64))
    if caller(request).node != request.app[node_key].id:
        if wish.shard is None or wish.dry_run or wish.take_over:
            raise Refused("a repair is begun by the node's own operator", hint="run `storenode repair` where the node runs")
        await request.app[repairs_key].tending.hint(caller(request).node, file_id_from_hex(request.match_info["file"]), wish.shard)
        return web.Response(status=202)
    file_id, repairer = _own(request), request.app[repairs_key].repairer
    await ground.registered(request.app[node_key].ledger, file_id)
    if wish.dry_run:
        return _json(await repairer.look(file_id, wish.shard))
    task = repairer.begin(file_id, wish.shard, take_over=wish.take_over)
    await asyncio.wait({task}, timeout=0.5)  # what cannot begin is said at once
    if task.done() and not task.cancelled():
        task.result()
    return _json(repairer.job(file_id).to_json())


async def get_repair(request: web.Request) -> web.Response:
    """How the latest repair of a file goes."""
    return _json(request.app[repairs_key].repairer.job(_own(request)).to_json())


async def delete_repair(request: web.Request) -> web.Response:
    """Give up the repair of a file that runs."""
    request.app[repairs_key].repairer.cancel(_own(request))
    return web.Response(status=204)


async def get_repairs(request: web.Request) -> web.Response:
    """What is to be repaired, what is being repaired, and how fast."""
    _check_own(request)
    return _json(request.app[repairs_key].status())


async def post_handover(request: web.Request) -> web.Response:
    """Take a shard over from the node that asks: 204 when it is here, 202 while it is on its way."""
    repairs, (file_id, shard), giver = request.app[repairs_key], shard_id(request), caller(request).node
    if giver is None or repairs.leaving.drains:
        raise Refused("this node takes no shards over")
    if not repairs.repairer.free and not repairs.repairer.is_running(file_id):
        raise Unavailable("this node makes or fetches as many shards as it may", hint="try again later")
    task = repairs.repairer.receive(file_id, shard, giver)
    await asyncio.wait({task}, timeout=handover_wait_s)
    if task.done() and not task.cancelled():
        job = task.result()
        return web.Response(status=204 if job.shard == shard else 202)
    return web.Response(status=202)


async def get_handover(request: web.Request) -> web.StreamResponse:
    """Send a shard to the node that it was offered to, and that took it over."""
    return await request.app[repairs_key].giver.give(*shard_id(request), caller(request).node, request)


async def get_sealed(request: web.Request) -> web.Response:
    """The sealed keys of a file's grants, for a node that took a shard of it over."""
    means, file_id = request.app[repairs_key].means, file_id_from_hex(request.match_info["file"])
    return web.Response(body=await inheriting.give(means, file_id, caller(request).node), content_type=body_type)


async def get_drain(request: web.Request) -> web.Response:
    """How far this node is with handing everything over."""
    _check_own(request)
    return _json(request.app[repairs_key].leaving.status())


async def post_drain(request: web.Request) -> web.Response:
    """Begin to hand everything over, or stop."""
    _check_own(request)
    repairs = request.app[repairs_key]
    repairs.leaving.drain(on=unpack_drain(await read_body(request, 64)))
    return _json(repairs.leaving.status())


async def get_moves(request: web.Request) -> web.Response:
    """Which shards of a file have moved, and to whom."""
    node, file_id = request.app[node_key], file_id_from_hex(request.match_info["file"])
    moves: dict[int, Moved] = {}
    if given := ground.given(node.ledger, file_id):
        with suppress(Absent, Damaged):  # without the manifest nobody can say which of them count; others have it
            moves = counted(Manifest.from_bytes(node.store.manifest(file_id)), given, ground.institutions(node.ledger.state))
    return web.Response(body=pack_moves(moves), content_type=body_type)


def _own(request: web.Request) -> FileId:
    _check_own(request)
    return file_id_from_hex(request.match_info["file"])


def _check_own(request: web.Request) -> None:
    if caller(request).node != request.app[node_key].id:
        raise Refused("a repair is begun by the node's own operator", hint="run `storenode repair` where the node runs")


def _json(told: dict[str, object]) -> web.Response:
    return web.Response(text=json.dumps(told), content_type="application/json")


repairs_key: Final = web.AppKey("repairs", Repairs)
