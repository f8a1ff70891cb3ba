"""Where a request's caller is kept, for every handler. The guard in ``app`` sets it; None is somebody without a certificate."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from medshard_protocol.errors import Refused
from storenode.identity import Peer

peer_key: Final = web.RequestKey("peer", Peer)


def caller(request: web.Request) -> Peer:
    """Who asks. Raises Refused for nobody in particular."""
    return somebody(request.get(peer_key))


def somebody(peer: Peer | None) -> Peer:
    """The same. Raises Refused for None."""
    if peer is None:
        raise Refused("a client certificate of one of the institutions is needed", hint="join with an invitation code")
    return peer
