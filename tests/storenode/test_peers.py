"""How a node calls another one when the line between them is bad."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from medshard_protocol.errors import Unavailable
from storenode.peers import Peers


async def test_a_line_that_breaks_right_after_the_handshake_is_no_more_than_unavailable(consortium: Any) -> None:
    """Anything else would end the task that pushes to a mirror, and nothing more would be pushed to it until a restart."""

    async def agrees(request: web.Request) -> web.WebSocketResponse:
        answer = web.WebSocketResponse()
        await answer.prepare(request)
        await answer.receive()
        return answer

    async def breaks(session: Any, context: SimpleNamespace, told: aiohttp.TraceRequestEndParams) -> None:
        assert told.response.status == 101
        told.response.connection.transport.abort()  # type: ignore[union-attr]
        await asyncio.sleep(0.01)

    app = web.Application()
    app.router.add_get("/channel", agrees)
    runner = web.AppRunner(app)
    await runner.setup()
    listening = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listening).start()
    roster = consortium(4).roster
    node = replace(roster.nodes[1], url=f"http://127.0.0.1:{listening.getsockname()[1]}")
    peers = Peers(replace(roster, nodes=(roster.nodes[0], node, *roster.nodes[2:])), dict.fromkeys(range(4), False))  # type: ignore[arg-type]
    try:
        await (await peers.connect(node.id, "/channel", 5.0, 1 << 16)).close()
        watched = aiohttp.TraceConfig()
        watched.on_request_end.append(breaks)
        watched.freeze()
        peers._session._trace_configs.append(watched)
        with pytest.raises(Unavailable, match="the connection was closed"):
            await peers.connect(node.id, "/channel", 5.0, 1 << 16)
    finally:
        await peers.close()
        await runner.cleanup()
