"""A helper's part in a repair: is the order one to follow, and then its own cells into the sum.

Law: an order is judged by this node's own mirror, manifest and shard, and refused with the reason, which is counted. It is served once, to
the one that comes next in the line. A cell goes into the sum only if it still has its digest, and every sum leaves under fresh masks: one
that the replacement knows, and one for each other helper that it does not.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Final

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from medshard_protocol import erasure
from medshard_protocol.errors import Damaged, MedshardError, Refused
from medshard_protocol.ids import NodeId, Sha256
from medshard_protocol.manifest import Manifest
from medshard_protocol.repair import Frame, Mask, add, coefficients, frames, sum_frame
from medshard_protocol.repairorder import (
    Objection,
    Offer,
    Order,
    Reason,
    counted,
    objection_to_chain,
    objection_to_replacement,
    pair_secrets,
    sign_offer,
)
from medshard_protocol.shards import digests, split
from storenode.identity import Peer
from storenode.metrics import Metrics
from storenode.peers import Peers
from storenode.repairing import ground
from storenode.repairing.ground import Denied
from storenode.repairing.line import Broken, Sums, pieces, sums
from storenode.repairing.rate import Bucket
from storenode.routes import Node
from storenode.shardstore import Shard

kept_s: Final = 60.0  # for an order that was accepted to be asked for
kept_max: Final = 64
running_max: Final = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Accepted:
    """An order that waits to be asked for, and what this node needs for it."""

    order: Order
    seed: bytes
    private: X25519PrivateKey
    place: int
    shard: Shard
    manifest: Manifest
    replacement: NodeId
    until: float  # by the monotonic clock
    secrets: tuple[bytes, ...] | None = None  # shared with each other helper; None before their keys have come

    @property
    def next(self) -> NodeId:
        """Who may ask."""
        return self.order.chain[self.place + 1].node if self.place + 1 < len(self.order.chain) else self.replacement


class Helper:
    """One node's part in others' repairs. Lives in one event loop."""

    def __init__(self, node: Node, key: Ed25519PrivateKey, peers: Peers, metrics: Metrics, bucket: Bucket) -> None:
        self._node, self._key, self._peers, self._metrics, self._bucket = node, key, peers, metrics, bucket
        self._accepted: dict[Sha256, Accepted] = {}
        self._running = 0

    async def accept(self, order: Order, seed: bytes, peer: Peer) -> Offer:
        """Take an order and a seed from the replacement; a fresh key for the other helpers. Raises Refused with the reason."""
        try:
            accepted = await self._judge(order, seed, peer)
        except Denied as denied:
            self._metrics.repair_refused(denied.objection.reason)
            raise denied.objection.error() from None
        for id_, each in list(self._accepted.items()):  # a replacement follows one line at a time
            if (each.order.file_id, each.order.shard) == (order.file_id, order.shard):
                del self._accepted[id_]
        self._accepted[order.id] = accepted
        return sign_offer(self._node.ledger.roster.origin, order.id, accepted.private.public_key().public_bytes_raw(), self._key.sign)

    def agree(self, id_: Sha256, offers: Sequence[Offer], peer: Peer) -> None:
        """Take the keys of all helpers of an order from the replacement. Raises Refused."""
        accepted, roster = self._accepted.get(id_), self._node.ledger.roster
        reason: Reason | None = None
        if accepted is None or accepted.secrets is not None or accepted.until < time.monotonic():
            reason = Reason.UNKNOWN_ORDER
        elif peer.node != accepted.replacement:
            reason = Reason.OTHER_CALLER
        elif len(offers) != len(accepted.order.chain) or not all(
            offer.is_of(roster.origin, id_, roster.node(link.node).tls_key)
            for link, offer in zip(accepted.order.chain, offers, strict=True)
        ):
            reason = Reason.KEYS
        if accepted is None or reason is not None:
            self._metrics.repair_refused(reason or Reason.UNKNOWN_ORDER)
            raise Objection(reason or Reason.UNKNOWN_ORDER).error()
        secrets = pair_secrets(accepted.private, accepted.place, id_, [offer.public for offer in offers])
        self._accepted[id_] = replace(accepted, secrets=tuple(secrets))

    async def give(self, id_: Sha256, peer: Peer, request: web.Request) -> web.StreamResponse:
        """Serve an order's sums to the next in the line, once. Raises Refused."""
        accepted = self._accepted.get(id_)
        reason = self._reason_not_to_give(accepted, peer)
        if accepted is None or reason is not None:
            reason = reason or Reason.UNKNOWN_ORDER
            self._metrics.repair_refused(reason)
            raise Objection(reason).error()
        del self._accepted[id_]
        self._running += 1
        try:
            return await self._stream(accepted, request)
        finally:
            self._running -= 1

    # -- judging

    async def _judge(self, order: Order, seed: bytes, peer: Peer) -> Accepted:
        ledger, me = self._node.ledger, self._node.id
        self._forget_old()
        if order.id in self._accepted or len(self._accepted) >= kept_max:
            raise Denied(Objection(Reason.BUSY))
        if not await ground.published(ledger, order.move):
            raise Denied(Objection(Reason.NO_MOVE, f"entry {order.move} is not published here"))
        known = ground.standing(ledger, order.file_id)
        institution = ground.institutions(ledger.state)
        shard, manifest = self._own(order, known)
        moves = counted(manifest, known.given, institution)
        moved = next((each for number, each in known.given if (number, each.index) == (order.shard, order.move)), None)
        if moved is None:
            raise Denied(Objection(Reason.NO_MOVE, f"entry {order.move}"))
        if peer.node != moved.node or peer.node == me:
            raise Denied(Objection(Reason.OTHER_CALLER))
        try:
            order.verify(ledger.roster.origin, peer.key)
        except Refused:
            raise Denied(Objection(Reason.FORGED)) from None
        against = objection_to_replacement(manifest, order.shard, moved.node, known.ever, institution)
        if against is None and moves.get(order.shard) != moved:
            against = Objection(Reason.NO_MOVE, f"entry {order.move} is not the latest")
        against = against or objection_to_chain(order, manifest, moved.node, moves, institution)
        place = order.place_of(me)
        if against is not None or place is None or order.chain[place].shard != shard.index:
            raise Denied(against or Objection(Reason.NOT_HERE))
        private = X25519PrivateKey.from_private_bytes(os.urandom(32))
        return Accepted(order, seed, private, place, shard, manifest, moved.node, time.monotonic() + kept_s)

    def _own(self, order: Order, known: ground.Standing) -> tuple[Shard, Manifest]:
        """This node's shard of the file and its manifest, as they were registered."""
        try:
            manifest = Manifest.from_bytes(self._node.store.manifest(order.file_id))
            shard = self._node.store.shard(order.file_id)
        except MedshardError as error:
            raise Denied(Objection(Reason.NOT_HERE, str(error))) from None
        if shard is None or not ground.is_described(manifest, known) or manifest.shards[shard.index].root != shard.root:
            raise Denied(Objection(Reason.NOT_HERE))
        return shard, manifest

    def _forget_old(self) -> None:
        now = time.monotonic()
        for id_ in [id_ for id_, each in self._accepted.items() if each.until < now]:
            del self._accepted[id_]

    def _reason_not_to_give(self, accepted: Accepted | None, peer: Peer) -> Reason | None:
        if accepted is None or accepted.secrets is None or accepted.until < time.monotonic():
            return Reason.UNKNOWN_ORDER
        if peer.node != accepted.next:
            return Reason.OTHER_CALLER
        return Reason.BUSY if self._running >= running_max else None

    # -- summing

    async def _stream(self, accepted: Accepted, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await response.prepare(request)
        try:
            try:
                await self._send(accepted, response)
            except Broken as broken:
                log.warning("a repair's line broke", extra={"node_failed": broken.who.hex(), "why": broken.why})
                await response.write(broken.to_frame())
            await response.write_eof()
        except ConnectionError:  # whoever asked is gone: that is theirs to tell
            log.info("a repair was not fetched to its end", extra={"file": accepted.order.file_id.hex()[:16]})
        return response

    async def _send(self, accepted: Accepted, response: web.StreamResponse) -> None:
        order, layout = accepted.order, accepted.manifest.layout
        have = [link.shard for link in order.chain]
        factor = coefficients(erasure.code(layout.k, layout.n), have, order.shard)[accepted.place]
        assert accepted.secrets is not None, "agreed on before"
        mask = Mask(accepted.seed, *accepted.secrets)
        async with AsyncExitStack() as stack:
            before: Sums | None = None
            if accepted.place > 0:
                before = await stack.enter_async_context(sums(self._peers, self._node.id, order, accepted.place - 1))
            for frame in frames(layout, order.first):
                partial = await before.read(frame.length) if before else None
                try:
                    total = await asyncio.to_thread(self._add, accepted, frame, partial, factor, mask)
                except Damaged as error:
                    raise Broken(self._node.id, self._node.id, str(error)) from None
                await self._write(response, total)

    async def _write(self, response: web.StreamResponse, total: bytes) -> None:
        """Send one frame, no faster than this node repairs."""
        head, offset = sum_frame, 0
        for size in pieces(len(total)):
            await self._bucket.take(size)
            await response.write(head + total[offset : offset + size])
            head, offset = b"", offset + size
        self._metrics.summed(len(total))

    def _add(self, accepted: Accepted, frame: Frame, before: bytes | None, factor: int, mask: Mask) -> bytes:
        """This node's step for one frame. Blocking. Raises Damaged for cells that are not what they were."""
        own = self._node.store.read(accepted.shard, frame.offset, frame.length)
        digest = digests[accepted.manifest.digest]
        for number, cell in zip(frame.cells, split(own, accepted.shard.cell_size), strict=True):
            if digest(cell) != accepted.shard.digests[number]:
                raise Damaged(f"cell {number} is damaged on this node's disk")
        return add(before, factor, own, mask)
