"""One shard made again: lines begun until one is whole, and shards summed until one has the root.

Law: nothing is stored that is not the registered shard, nor when another node has taken the shard over meanwhile. Helpers that fail are
left out and the line begins anew with the cell in hand; when the root is wrong, helpers are exchanged one at a time until it is right. Who
was exchanged then is for this node's log: nobody can check it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol.errors import Conflict, Damaged, MedshardError, Unavailable
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.messages import unpack_error
from medshard_protocol.repair import Mask, frames, helper_sets, seed_size, spread_sets
from medshard_protocol.repairorder import (
    Link,
    Order,
    line_up,
    nonce_size,
    pack_keys,
    pack_seed,
    sign_order,
    unpack_offer,
)
from storenode.metrics import Metrics
from storenode.peers import Peers
from storenode.repairing.line import Broken, sums
from storenode.repairing.rate import Bucket
from storenode.repairing.surveying import Survey, Surveyor
from storenode.routes import Node
from storenode.shardstore import Incoming

seed_s: Final = 5.0  # for a helper to judge an order; it may wait two seconds for the ledger

_T = TypeVar("_T")

log = logging.getLogger(__name__)


@dataclass
class Job:
    """How one repair goes."""

    file_id: FileId
    state: str = "looking"  # then moving, summing or fetching, done, failed, nothing
    shard: int | None = None
    move: int | None = None
    done: int = 0
    total: int = 0
    lines: int = 0  # that were begun
    broken: list[str] = field(default_factory=list)  # helpers that failed, and how
    suspects: list[str] = field(default_factory=list)  # with whom the root was wrong, and right without
    error: str = ""
    seconds: float = 0.0
    took: dict[str, float] = field(default_factory=dict)  # seconds in each state
    entered: float = 0.0  # when the present one began, by the event loop

    def enter(self, state: str, now: float) -> None:
        """Go on to the next state."""
        if self.entered:
            self.took[self.state] = round(self.took.get(self.state, 0.0) + now - self.entered, 3)
        self.state, self.entered = state, now

    def to_json(self) -> dict[str, Any]:
        """For people and programs."""
        return {name: value for name, value in vars(self).items() if name not in ("file_id", "entered")} | {"file": self.file_id.hex()}


@dataclass(frozen=True, slots=True)
class Means:
    """What a repair works with."""

    node: Node
    key: Ed25519PrivateKey  # the node's TLS key
    peers: Peers
    metrics: Metrics
    surveyor: Surveyor
    bucket: Bucket


class Rebuilding:
    """The replacement's part for one shard. ``still_ours`` says whether the MOVE entry is still the latest that counts."""

    def __init__(self, means: Means, survey: Survey, job: Job, still_ours: Callable[[], bool]) -> None:
        assert job.shard is not None, "chosen before"
        self._means, self._survey, self._job, self._still_ours = means, survey, job, still_ours
        self._node, self._manifest, self._target = means.node, survey.manifest, job.shard
        self._institution = means.surveyor.institution
        self._ranked = ranked(means, survey, job.shard)
        self._out: dict[NodeId, NodeId] = {}  # who failed, by whom we know it
        self._forgave = False
        self._wrong: list[frozenset[NodeId]] = []  # helpers of each shard that had a wrong root

    async def run(self) -> None:
        """Make the shard and store it. Raises Unavailable when there is no other set of helpers to try."""
        layout = self._manifest.layout
        for _ in range(1 + layout.k + spread_sets):
            incoming = self._node.store.begin(layout.shard_size, layout.cell_size)
            try:
                used = await self._fill(incoming)
                if not self._still_ours():
                    raise Conflict("another node has taken this shard over in the meantime")
                await self._node.store.commit_described(incoming, self._manifest, self._target)
            except Damaged:
                self._wrong.append(used)
                log.warning("a repaired shard has a wrong root: exchanging a helper", extra={"file": self._job.file_id.hex()})
            else:
                self._name_suspects(used)
                return
            finally:
                self._node.store.abandon(incoming)
        raise Unavailable(f"the shard came out wrong with {len(self._wrong)} sets of helpers", hint="more than one helper sends wrong sums")

    async def _fill(self, incoming: Incoming) -> frozenset[NodeId]:
        """Sum up the whole shard, along as many lines as it takes; all helpers that were in one."""
        layout, used = self._manifest.layout, set[NodeId]()
        self._job.done = 0
        while incoming.received < layout.shard_size:
            chain = self._line()
            first = incoming.received // layout.cell_size
            before = incoming.received
            self._job.lines += 1
            try:
                await self._follow(chain, first, incoming)
            except _Failed as failed:
                for broken in failed.each:
                    self._leave_out(broken, {link.node for link in chain}, chain[-1].node)
            if incoming.received > before:
                used |= {link.node for link in chain}
        return frozenset(used)

    def _line(self) -> tuple[Link, ...]:
        """The next set of helpers that has not been found wrong. Raises Unavailable."""
        layout = self._manifest.layout
        left = [link for link in self._ranked if link.node not in self._out]
        for chosen in helper_sets(left, layout.k):
            if not any(frozenset(link.node for link in chosen) >= wrong for wrong in self._wrong):
                return line_up(chosen, self._node.id, self._institution)
        if self._out and not self._forgave:
            # A helper may have accused an honest one: try once without those who accused, and with those who were.
            self._forgave = True
            accused = {who for who, by in self._out.items() if by not in (who, self._node.id)}
            accusers = {by for who, by in self._out.items() if who in accused}
            self._out = {who: by for who, by in self._out.items() if who not in accused} | dict.fromkeys(accusers, self._node.id)
            return self._line()
        listed = "; ".join(self._job.broken[-6:])
        raise Unavailable(
            f"no set of {layout.k} helpers is left ({listed})", hint="start nodes that hold shards of this file, then try again"
        )

    async def _follow(self, chain: tuple[Link, ...], first: int, incoming: Incoming) -> None:
        """One line from cell ``first`` on. Raises _Failed."""
        job, layout = self._job, self._manifest.layout
        assert job.move is not None, "taken over before"
        order = sign_order(
            self._node.ledger.roster.origin,
            job.file_id,
            self._target,
            job.move,
            chain,
            first,
            os.urandom(nonce_size),
            self._means.key.sign,
        )
        seeds = [os.urandom(seed_size) for _ in chain]
        offers = await self._of_each("seed", order, [pack_seed(order, seed) for seed in seeds], unpack_offer)
        keys = pack_keys(order.id, offers)
        await self._of_each("keys", order, [keys] * len(chain), lambda body: None)
        masks = Mask(*seeds)
        try:
            async with sums(self._means.peers, self._node.id, order, len(chain) - 1) as last:
                for frame in frames(layout, first):
                    await self._means.bucket.take(frame.length)
                    total = await last.read(frame.length)
                    await asyncio.to_thread(lambda total=total: incoming.write([masks.add(total)]))  # type: ignore[misc]
                    job.done = incoming.received
                    self._means.metrics.repaired_bytes(frame.length)
        except Broken as broken:
            raise _Failed([broken]) from None

    async def _of_each(self, what: str, order: Order, bodies: Sequence[bytes], parse: Callable[[bytes], _T]) -> list[_T]:
        """What each helper answers. Raises _Failed with those that do not."""
        path = f"/v1/repair/{order.file_id.hex()}/{order.shard}/{what}"

        async def one(link: Link, body: bytes) -> _T | Broken:
            try:
                status, answer = await self._means.peers(link.node, "POST", path, body, seed_s)
                if status not in (200, 204):
                    raise unpack_error(status, answer, "it")
                return parse(answer)
            except MedshardError as error:
                return Broken(link.node, self._node.id, str(error))

        answers = await asyncio.gather(*(one(link, body) for link, body in zip(order.chain, bodies, strict=True)))
        if failed := [each for each in answers if isinstance(each, Broken)]:
            raise _Failed(failed)
        return [each for each in answers if not isinstance(each, Broken)]

    def _leave_out(self, broken: Broken, line: set[NodeId], last: NodeId) -> None:
        """Go on without who failed. If what is told of it cannot be, go on without the one that told it to us."""
        sane = broken.who in line and broken.accuser in (*line, self._node.id)
        who, accuser = (broken.who, broken.accuser) if sane else (last, self._node.id)
        self._out[who] = accuser
        self._job.broken.append(f"{self._means.surveyor.name(who)}: {broken.why}")
        self._means.metrics.helper_exchanged("broken")
        log.warning("a repair's helper failed", extra={"node_failed": self._means.surveyor.name(who), "why": broken.why})

    def _name_suspects(self, good: frozenset[NodeId]) -> None:
        """With whom the shard came out wrong, and right without. This node's own finding: others would have to believe it."""
        if not self._wrong:
            return
        common = frozenset.intersection(*self._wrong) - good
        for node in sorted(common or frozenset.union(*self._wrong) - good):
            self._job.suspects.append(self._means.surveyor.name(node))
            self._means.metrics.helper_exchanged("wrong")
        log.warning("helpers gave wrong sums", extra={"file": self._job.file_id.hex(), "suspects": self._job.suspects})


class _Failed(Exception):
    def __init__(self, each: Sequence[Broken]) -> None:
        super().__init__(str(each))
        self.each = each


def ranked(means: Means, survey: Survey, target: int) -> list[Link]:
    """Helpers for one shard, best first: those of other institutions, then the quick ones."""
    institution = means.surveyor.institution
    own = institution(means.node.id)
    links = survey.links([shard for shard in survey.there if shard != target])
    return sorted(links, key=lambda link: institution(link.node) == own)
