"""What nodes ask each other about the log. A route parses, awaits one call, returns.

Who may: nodes of the roster and nobody else; what follows from it is decided in ``mirror`` and ``sequencer``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from medshard_protocol.errors import Absent, Malformed, Refused
from medshard_protocol.ids import NodeId
from medshard_protocol.messages import body_type
from medshard_protocol.proofs import append_bytes_max
from medshard_protocol.tiles import pack_bundle
from storenode.callers import caller
from storenode.identity import Peer
from storenode.ledger import wire
from storenode.ledger.fullhead import cosign_path, text_bytes_max
from storenode.ledger.mirror import Fenced
from storenode.ledger.routes import read_body

if TYPE_CHECKING:
    from storenode.ledger import Ledger


class PeerRoutes:
    """The handlers of one ledger for other nodes."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def table(self) -> list[web.RouteDef]:
        """All routes of this file."""
        return [
            web.post(wire.path, self.mirror),
            web.get(wire.ask_path, self.ask, allow_head=False),
            web.post(wire.promise_path, self.promise),
            web.post(wire.forward_path, self.forward),
            web.post(wire.hurry_path, self.hurry),
            web.post(cosign_path, self.cosign),
            web.get(wire.entries_path, self.entries, allow_head=False),
        ]

    async def mirror(self, request: web.Request) -> web.Response:
        """Take a sequencer's push and answer with this node's cosignature."""
        status, answer = await self._ledger.take(await read_body(request, wire.push_bytes_max), _node(request))
        return web.Response(status=status, body=answer, content_type=body_type)

    async def ask(self, request: web.Request) -> web.Response:
        """Say how this node stands to the log."""
        _node(request)
        return web.Response(body=self._ledger.report(signed=False).to_bytes(), content_type=body_type)

    async def promise(self, request: web.Request) -> web.Response:
        """Follow the node that asks, from now on."""
        node = _node(request)
        epoch, signature = wire.unpack_promise(await read_body(request, 256))
        try:
            await self._ledger.mirror.promise(epoch, node, signature)
        except Fenced as fenced:
            return web.Response(status=wire.fenced, body=wire.pack_fence(fenced.epoch, fenced.leader), content_type=body_type)
        return web.Response(body=self._ledger.report(signed=True).to_bytes(), content_type=body_type)

    async def forward(self, request: web.Request) -> web.Response:
        """Take entries that another node was handed, if this node orders them."""
        _node(request)
        status, answer = await self._ledger.append_here(await read_body(request, append_bytes_max))
        return web.Response(status=status, body=answer, content_type=body_type)

    async def hurry(self, request: web.Request) -> web.Response:
        """Push the newest entries to the node that asks now, not a moment later. Nothing, where this node orders none."""
        self._ledger.push_now(_node(request))
        return web.Response(status=204)

    async def cosign(self, request: web.Request) -> web.Response:
        """Give both kinds of cosignature for a checkpoint that this node cosigned a moment ago."""
        _node(request)
        text = (await read_body(request, text_bytes_max)).decode("utf-8", "replace")
        return web.Response(body=self._ledger.full.lines(text).to_bytes(), content_type=body_type)

    async def entries(self, request: web.Request) -> web.Response:
        """Give out stored entries, published or not, as a bundle."""
        _node(request)
        start, end = int(request.match_info["start"][:20]), int(request.match_info["end"][:20])
        if not start < end <= start + wire.fetch_entries_max:
            raise Malformed(f"entries: at most {wire.fetch_entries_max} at a time")
        if end > self._ledger.journal.head.size:
            raise Absent("this node has fewer entries")
        return web.Response(body=pack_bundle(self._ledger.journal.entries(start, end)), content_type="application/octet-stream")


def node_of(peer: Peer) -> NodeId:
    """Which node asks. Raises Refused for others."""
    if peer.node is None:
        raise Refused("only nodes of the roster ask this")
    return peer.node


def _node(request: web.Request) -> NodeId:
    return node_of(caller(request))
