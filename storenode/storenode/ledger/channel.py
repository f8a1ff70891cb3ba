"""One WebSocket from the sequencer to each mirror, over which pushes go and cosignatures come back.

Law: a channel carries the body of a push and brings ``[status, body]``, one at a time; it is opened when it is needed and dropped at the
first sign of trouble. With sixteen nodes on one machine this takes a quarter off the processor time of an append by POST.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import aiohttp
from aiohttp import web

from medshard_protocol.canonical import Fields, decode, encode
from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.ids import NodeId
from medshard_protocol.messages import pack_error
from storenode.ledger import wire

answer_bytes_max: Final = wire.cosignature_bytes_max + 64
close_wait_s: Final = 0.5
silence_s: Final = 60.0  # a sequencer has something to say every 5 s; one that is silent has gone without a goodbye


class PeerCaller(Protocol):
    """How a node reaches another over mutual TLS."""

    async def __call__(self, node: NodeId, method: str, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Send one request; give the status and the body of the answer. Raises Unavailable when there is none in time."""

    async def connect(self, node: NodeId, path: str, timeout_s: float, message_bytes_max: int) -> aiohttp.ClientWebSocketResponse:
        """Open a WebSocket. Raises Unavailable where that does not work in time."""


class Channel:
    """The sequencer's end."""

    def __init__(self, node: NodeId, peers: PeerCaller) -> None:
        self._node = node
        self._peers = peers
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._closing: asyncio.Future[bool] | None = None

    async def ask(self, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Send a push and wait for its answer. Raises Unavailable, or Malformed for an answer that is none."""
        if self._socket is None or self._socket.closed:
            self._socket = await self._peers.connect(self._node, wire.path, timeout_s, answer_bytes_max)
        try:
            async with asyncio.timeout(timeout_s):
                await self._socket.send_bytes(body)
                message = await self._socket.receive()
            if message.type is not aiohttp.WSMsgType.BINARY:
                raise Unavailable("the connection was closed")
            fields = Fields(decode(message.data, bytes_max=answer_bytes_max, what="answer"), count=2, what="answer")
            return fields.uint(least=200, most=599), fields.bytes(most=answer_bytes_max)
        except TimeoutError:
            self.drop()
            raise Unavailable(f"no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            self.drop()
            raise Unavailable(f"no answer ({error or type(error).__name__})") from None
        except BaseException:
            self.drop()  # an answer may still come, and would be taken for that to the next push
            raise

    async def close(self) -> None:
        """Say goodbye, and wait a moment for the answer."""
        self.drop()
        if self._closing is not None:
            await asyncio.wait([self._closing], timeout=close_wait_s)
            self._closing.cancel()

    def drop(self) -> None:
        """Give the connection up; the other end may be frozen, so nobody waits for its goodbye."""
        if self._socket is not None:
            self._closing = asyncio.ensure_future(self._socket.close())
            self._socket = None


class Channels:
    """The mirror's end: answers what comes, on as many connections as are opened, until told to hang up."""

    def __init__(self, answer: Callable[[bytes, NodeId], Awaitable[tuple[int, bytes]]]) -> None:
        self._answer = answer
        self._open: set[web.WebSocketResponse] = set()
        self._ended = False

    async def serve(self, request: web.Request, node: NodeId) -> web.WebSocketResponse:
        """Handle one connection, from this node, to its end."""
        if self._ended:
            raise Unavailable("this node stops")
        socket = web.WebSocketResponse(compress=False, max_msg_size=wire.push_bytes_max, timeout=close_wait_s, receive_timeout=silence_s)
        await socket.prepare(request)
        self._open.add(socket)
        try:
            async for message in socket:  # ends at the latest after ``silence_s``
                if message.type is not aiohttp.WSMsgType.BINARY:
                    break
                try:
                    status, body = await self._answer(message.data, node)
                except MedshardError as error:
                    status, body = pack_error(error)
                await socket.send_bytes(encode([status, body]))
        except (TimeoutError, ConnectionError):
            await socket.close()
        finally:
            self._open.discard(socket)
        return socket

    async def hang_up(self) -> None:
        """Close all connections and take no new ones."""
        self._ended = True
        await asyncio.gather(*(socket.close() for socket in tuple(self._open)))
