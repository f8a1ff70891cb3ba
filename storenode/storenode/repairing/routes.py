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

from medshard_protocol.errors import Absent, Damaged, Malformed, Refused
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
    unpack_keys,
    unpack_seed,
    unpack_wish,
)
from storenode.callers import caller
from storenode.metrics import Metrics
from storenode.peers import Peers
from storenode.repairing import ground
from storenode.repairing.helping import Helper
from storenode.repairing.repairer import Repairer
from storenode.routes import Node, node_key, read_body, shard_id


@dataclass(frozen=True, slots=True)
class Repairs:
    """Both sides of repair in one node."""

    helper: Helper
    repairer: Repairer


def equip(app: web.Application, node: Node, key: Ed25519PrivateKey, peers: Peers, metrics: Metrics) -> Repairer:
    """Give a node's application these routes. ``key`` is the node's TLS key."""
    repairs = app[repairs_key] = Repairs(Helper(node, key, peers, metrics), Repairer(node, key, peers, metrics))
    app.router.add_routes(
        [
            web.post("/v1/repair/{file}/{index}/seed", post_seed),
            web.post("/v1/repair/{file}/{index}/keys", post_keys),
            web.post("/v1/repair/{file}/{index}/sum", post_sum),
            web.post("/v1/repair/{file}", post_repair),
            web.get("/v1/repair/{file}", get_repair, allow_head=False),
            web.get("/v1/moves/{file}", get_moves, allow_head=False),
        ]
    )

    async def running(app: web.Application) -> AsyncIterator[None]:
        yield
        await repairs.repairer.close()

    app.cleanup_ctx.append(running)
    return repairs.repairer


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
    """Begin a repair here, or say what one would do."""
    file_id, repairer = _own(request), request.app[repairs_key].repairer
    wish = unpack_wish(await read_body(request, 64))
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


async def get_moves(request: web.Request) -> web.Response:
    """Which shards of a file have moved, and to whom."""
    node, file_id = request.app[node_key], file_id_from_hex(request.match_info["file"])
    moves: dict[int, Moved] = {}
    if given := ground.given(node.ledger, file_id):
        with suppress(Absent, Damaged):  # without the manifest nobody can say which of them count; others have it
            moves = counted(Manifest.from_bytes(node.store.manifest(file_id)), given, ground.institutions(node.ledger.state))
    return web.Response(body=pack_moves(moves), content_type=body_type)


def _own(request: web.Request) -> FileId:
    if caller(request).node != request.app[node_key].id:
        raise Refused("a repair is begun by the node's own operator", hint="run `storenode repair` where the node runs")
    return file_id_from_hex(request.match_info["file"])


def _json(told: dict[str, object]) -> web.Response:
    return web.Response(text=json.dumps(told), content_type="application/json")


repairs_key: Final = web.AppKey("repairs", Repairs)
