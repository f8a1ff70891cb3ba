"""A shard straight from a node that has it and gives it up: it sends its own shard, and the receiver checks the root.

Law: the giver sends to the node that it offered the shard to, and only while that node's MOVE entry is the latest that counts in the
giver's own mirror: the receiver gets one shard, as by a chain. The receiver believes the root alone.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Final

import aiohttp
from aiohttp import web

from medshard_protocol.errors import Conflict, Damaged, Refused, Unavailable
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.manifest import Manifest
from medshard_protocol.repair import frame_bytes
from storenode.repairing import ground
from storenode.repairing.line import head_s, pieces, stall_s
from storenode.repairing.rebuilding import Job, Means

offers_max: Final = 64

log = logging.getLogger(__name__)


def path(file_id: FileId, shard: int) -> str:
    """Where a shard is offered to a node, and where that node fetches it."""
    return f"/v1/handover/{file_id.hex()}/{shard}"


async def fetch(means: Means, manifest: Manifest, job: Job, giver: NodeId, still_ours: Callable[[], bool]) -> None:
    """Fetch a shard that this node has taken over, and store it. Raises MedshardError."""
    assert job.shard is not None, "chosen before"
    layout = manifest.layout
    incoming = means.node.store.begin(layout.shard_size, layout.cell_size)
    try:
        async with means.peers.open(giver, "GET", path(manifest.file_id, job.shard), b"", ground.wait_s + head_s) as answer:
            if answer.status != 200:
                raise Unavailable(f"{means.surveyor.name(giver)} does not hand the shard over (answered {answer.status})")
            for size in pieces(layout.shard_size):
                await means.bucket.take(size)
                async with asyncio.timeout(stall_s):
                    data = await answer.content.readexactly(size)
                await asyncio.to_thread(incoming.write, [data])
                job.done = incoming.received
                means.metrics.repaired_bytes(size)
        if not still_ours():
            raise Conflict("another node has taken this shard over in the meantime")
        await means.node.store.commit_described(incoming, manifest, job.shard)
    except (TimeoutError, asyncio.IncompleteReadError, aiohttp.ClientError, OSError, ssl.SSLError) as error:
        raise Unavailable(f"{means.surveyor.name(giver)} broke off handing the shard over ({type(error).__name__})") from None
    finally:
        means.node.store.abandon(incoming)


class Giver:
    """What one node has offered, to whom, and how it goes out."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._offers: dict[tuple[FileId, int], NodeId] = {}

    async def offer(self, file_id: FileId, shard: int, node: NodeId, timeout_s: float) -> tuple[int, bytes]:
        """Offer a shard to a node; its answer. Raises Unavailable."""
        while len(self._offers) >= offers_max:
            del self._offers[next(iter(self._offers))]
        self._offers[file_id, shard] = node
        return await self._means.peers(node, "POST", path(file_id, shard), b"", timeout_s)

    def withdraw(self, file_id: FileId, shard: int) -> None:
        """Offer it no more."""
        self._offers.pop((file_id, shard), None)

    async def give(self, file_id: FileId, shard: int, to: NodeId | None, request: web.Request) -> web.StreamResponse:
        """Send a shard to the node that it was offered to. Raises Refused or Absent."""
        store = self._means.node.store
        own = store.shard_at(file_id, shard)
        if to is None or self._offers.get((file_id, shard)) != to:
            raise Refused("this shard was not offered to this node")
        await self._wait_for_move(file_id, shard, to)
        response = web.StreamResponse(headers={"Content-Length": str(own.size), "Content-Type": "application/octet-stream"})
        await response.prepare(request)
        try:
            for offset in range(0, own.size, frame_bytes):
                length = min(frame_bytes, own.size - offset)
                await self._means.bucket.take(length)
                await response.write(await asyncio.to_thread(store.read, own, offset, length))
            await response.write_eof()
        except (Damaged, ConnectionError) as error:  # an answer that has begun can only be broken off
            log.warning("a shard was not handed over to its end", extra={"file": file_id.hex()[:16], "why": str(error)})
            response.force_close()
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _wait_for_move(self, file_id: FileId, shard: int, to: NodeId) -> None:
        """Wait a little until the MOVE entry that gives the shard to that node is published here. Raises Refused."""
        ledger, surveyor = self._means.node.ledger, self._means.surveyor
        manifest = Manifest.from_bytes(self._means.node.store.manifest(file_id))
        try:
            async with asyncio.timeout(ground.wait_s):
                while True:
                    case = surveyor.case(manifest, ground.standing(ledger, file_id))
                    moved = case.moves.get(shard)
                    if moved is not None and moved.node == to and ground.is_described(manifest, case.known):
                        return None if await ground.published(ledger, moved.index) else _refuse()
                    await ledger.journal.news.wait()
        except (TimeoutError, ground.Denied):
            return _refuse()


def _refuse() -> None:
    raise Refused("no MOVE entry that counts gives this shard to this node")
