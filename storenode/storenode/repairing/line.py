"""Sums as they come from the node before: frame by frame, with patience for a slow one and a name for a broken one.

Law: at most one frame is held, and patience is for the next piece of it. Whoever finds the line broken says which node it was that
failed, and who says so: the replacement sees both, and believes neither more than it must.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import aiohttp

from medshard_protocol.errors import MedshardError
from medshard_protocol.ids import NodeId, node_id_size
from medshard_protocol.repair import broken_frame, frame_bytes, sum_frame
from medshard_protocol.repairorder import Order, pack_ask
from storenode.peers import Peers

stall_s: Final = 8.0  # the first helper's successor waits this long for a frame
link_s: Final = 0.5  # and each one further on this much longer, so that the break is told by whoever is next to it
head_s: Final = 5.0


class Broken(Exception):
    """A line that gives no more. ``who`` failed, says ``accuser``."""

    def __init__(self, who: NodeId, accuser: NodeId, why: str = "") -> None:
        super().__init__(why)
        self.who, self.accuser, self.why = who, accuser, why

    def to_frame(self) -> bytes:
        """What is sent on in place of a sum."""
        return broken_frame + self.who + self.accuser


class Sums:
    """The frames of one line, from its helper at ``place``."""

    def __init__(self, me: NodeId, source: NodeId, place: int, body: aiohttp.StreamReader) -> None:
        self._me, self._source, self._body = me, source, body
        self._patience_s = stall_s + link_s * place

    async def read(self, length: int) -> bytes:
        """The next sum. Raises Broken."""
        try:
            kind = await self._exactly(1)
            if kind == sum_frame:
                return b"".join([await self._exactly(size) for size in pieces(length)])
            if kind != broken_frame:
                raise Broken(self._source, self._me, "sends what is no sum")
            told = await self._exactly(2 * node_id_size)
        except TimeoutError:
            raise Broken(self._source, self._me, f"sent nothing for {self._patience_s:g} s") from None
        except (asyncio.IncompleteReadError, aiohttp.ClientError, OSError, ssl.SSLError) as error:
            raise Broken(self._source, self._me, f"hung up ({type(error).__name__})") from None
        raise Broken(NodeId(told[:node_id_size]), NodeId(told[node_id_size:]), "as a helper says")

    async def _exactly(self, size: int) -> bytes:
        async with asyncio.timeout(self._patience_s):
            return await self._body.readexactly(size)


def pieces(length: int) -> list[int]:
    """How a frame of so many bytes is sent: a file's cells may be larger than what comes in one go at a limited rate."""
    return [min(frame_bytes, length - at) for at in range(0, length, frame_bytes)]


@asynccontextmanager
async def sums(peers: Peers, me: NodeId, order: Order, place: int) -> AsyncIterator[Sums]:
    """Ask the helper at ``place`` for its sums. Raises Broken."""
    source = order.chain[place].node
    path = f"/v1/repair/{order.file_id.hex()}/{order.shard}/sum"
    async with AsyncExitStack() as stack:
        try:
            response = await stack.enter_async_context(peers.open(source, "POST", path, pack_ask(order.id), head_s))
        except MedshardError as error:
            raise Broken(source, me, str(error)) from None
        stack.callback(response.close)  # not given back: a line that broke off has sums in it that nobody reads
        if response.status != 200:
            raise Broken(source, me, f"answered {response.status}")
        yield Sums(me, source, place, response.content)
