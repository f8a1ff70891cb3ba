"""The ledger over HTTP. A route parses, awaits one call, returns; errors of the one tree are translated by the node's middleware.

Who may: anybody with a certificate of the roster reads and hands in entries, which speak for themselves; only the sequencer's node pushes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web

from medshard_protocol.errors import Absent, Refused, TooLarge, Unavailable
from medshard_protocol.ids import file_id_from_hex
from medshard_protocol.messages import body_type
from medshard_protocol.proofs import append_bytes_max, pack_registration
from medshard_protocol.tiles import TileName, pack_bundle, tile_width
from storenode.callers import caller
from storenode.ledger import wire

if TYPE_CHECKING:
    from storenode.ledger import Ledger

body_wait_s = 30.0
immutable = {"Cache-Control": "public, max-age=31536000, immutable"}
fleeting = {"Cache-Control": "no-cache"}


class Routes:
    """The handlers of one ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def table(self) -> list[web.RouteDef]:
        """All routes of this file."""
        return [
            web.post("/v1/ledger/append", self.append),
            web.get(wire.path, self.mirror, allow_head=False),
            web.get("/v1/ledger/registrations/{file}", self.registration),
            web.get("/log/checkpoint", self.checkpoint),
            web.get("/log/tile/{name:.+}", self.tile),
        ]

    async def append(self, request: web.Request) -> web.Response:
        """Put entries into the log, here or at the sequencer, and wait until they are published."""
        status, answer = await self._ledger.append_packed(await _body(request, append_bytes_max))
        return web.Response(status=status, body=answer, content_type=body_type)

    async def mirror(self, request: web.Request) -> web.WebSocketResponse:
        """Take the sequencer's pushes and answer each with this node's cosignature."""
        if caller(request).node != self._ledger.roster.sequencer:
            raise Refused("only the sequencer pushes to its mirrors")
        return await self._ledger.channels.serve(request)

    async def registration(self, request: web.Request) -> web.Response:
        """Prove that a file is registered."""
        inclusion = await self._ledger.inclusion(file_id_from_hex(request.match_info["file"]))
        if inclusion is None:
            raise Absent("no published entry registers this file")
        return web.Response(body=pack_registration(inclusion), content_type=body_type)

    async def checkpoint(self, request: web.Request) -> web.Response:
        """The newest published checkpoint, as C2SP tlog-tiles has it."""
        published = self._ledger.published
        if published is None:
            raise Absent("no checkpoint has been published yet")
        return web.Response(body=published.note, content_type="text/plain", charset="utf-8", headers=fleeting)

    async def tile(self, request: web.Request) -> web.Response:
        """A hash tile or an entry bundle of the published log, as C2SP tlog-tiles has them."""
        name, published = TileName.from_path(request.match_info["name"]), self._ledger.published
        if published is None or not name.within(published.checkpoint.size):
            raise Absent("the published log has no such tile")
        journal, start = self._ledger.journal, name.index * tile_width
        data = journal.tree.tile(name) if name.level is not None else pack_bundle(journal.entries(start, start + name.width))
        return web.Response(body=data, content_type="application/octet-stream", headers=immutable)


async def _body(request: web.Request, bytes_max: int) -> bytes:
    """Read a whole small body, counted as it comes."""
    chunks: list[bytes] = []
    total = 0
    try:
        async with asyncio.timeout(body_wait_s):
            async for chunk in request.content.iter_any():
                total += len(chunk)
                if total > bytes_max:
                    raise TooLarge(f"a body of more than {bytes_max} bytes")
                chunks.append(chunk)
    except TimeoutError:
        raise Unavailable(f"the body did not arrive within {body_wait_s:.0f} s") from None
    return b"".join(chunks)
