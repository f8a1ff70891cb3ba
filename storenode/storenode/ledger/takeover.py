"""Becoming sequencer: a quorum of institutions promises to follow, then this node takes over whatever any of them has.

Law: first the promises, so that nobody takes anything more of an earlier epoch; then the refill, so that what was published, which lies
on a quorum of institutions, is here; only then does this node sign. Of several histories the one counts that extends what a quorum
published, then that of the latest epoch, then the longest; but of an end that, as things are told, no quorum can cosign nothing is taken,
and nobody leads with one. Entries of others are believed as far as a log key has signed them and the root follows from them.
Docs: docs/decisions/0021-failover.md.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, open_signed
from medshard_protocol.errors import Damaged, Malformed, MedshardError, Refused, Unavailable
from medshard_protocol.ids import NodeId
from medshard_protocol.merkle import sha256
from medshard_protocol.messages import unpack_error
from medshard_protocol.roster import Roster
from medshard_protocol.tiles import unpack_bundle
from storenode.ledger import wire
from storenode.ledger.channel import PeerCaller
from storenode.ledger.journal import Journal, Published
from storenode.ledger.mirror import Fenced, Mirror
from storenode.ledger.wire import Report

promise_wait_s = 1.0
linger_s = 0.15  # for those beyond the quorum: one of them may have what nobody else has
fetch_wait_s = 10.0
tail_wait_s = 2.0  # for the few entries that are not published yet
doubts_max = 3  # attempts that give way to a history which this node cannot take

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Offer:
    """A history that a node has."""

    node: NodeId
    accepted: int
    checkpoint: Checkpoint
    signed: bytes


@dataclass(frozen=True, slots=True)
class _Tails:
    """The entries that nodes have from ``start`` on; None where they could not be had."""

    start: int
    entries: dict[NodeId, list[bytes] | None]

    def of(self, node: NodeId) -> list[bytes] | None:
        """Those of a node; none of one that has not said anything else."""
        return self.entries.get(node, [])


class Takeover:
    """One node's way to lead. ``attempt`` once for each try."""

    def __init__(self, journal: Journal, mirror: Mirror, roster: Roster, node: NodeId, key: Ed25519PrivateKey, call: PeerCaller) -> None:
        self._journal = journal
        self._mirror = mirror
        self._roster = roster
        self._node = node
        self._key = key
        self._call = call
        self._doubts: Counter[bytes] = Counter()  # by root: histories that could not be taken
        self._seen = 0  # the latest epoch that anybody told of
        self._linger_s = linger_s

    def adopt(self, roster: Roster) -> None:
        """Go by this roster from now on."""
        self._roster = roster

    async def attempt(self) -> int:
        """Take over, and give the epoch. Raises Unavailable where no quorum promises, or another MedshardError."""
        epoch = max(self._mirror.epoch, self._seen) + 1
        if epoch > wire.epoch_max:
            raise Unavailable("somebody has used up the epochs: this log needs a successor")
        signature = self._key.sign(wire.promise_text(self._roster.origin, epoch, self._node))
        new = self._journal.head.size <= self._roster.begins
        if new and self._node != self._roster.sequencer and not await self._somebody_has_entries():
            raise Unavailable("the log is new, and its first sequencer has not begun it")
        try:
            await self._mirror.promise(epoch, self._node, signature)
        except Fenced as fenced:
            raise Unavailable(f"this node promised epoch {fenced.epoch} meanwhile") from None
        reports = await self._promises(epoch, wire.pack_promise(epoch, signature))
        published = self._newest(report.published for report in reports.values())
        await self._refill(reports, published)
        if self._mirror.epoch != epoch:
            raise Unavailable("another node has taken over meanwhile")
        if published is not None:
            self._journal.hear(published.note)
        return epoch

    def heard_of(self, epoch: int) -> None:
        """Take note of an epoch that somebody has promised."""
        self._seen = max(self._seen, epoch)

    async def _somebody_has_entries(self) -> bool:
        others = [node.id for node in self._roster.nodes if node.id != self._node]
        answers = await asyncio.gather(*(ask(self._call, node, promise_wait_s) for node in others), return_exceptions=True)
        return any(isinstance(answer, Report) and answer.size > self._roster.begins for answer in answers)

    async def _promises(self, epoch: int, body: bytes) -> dict[NodeId, Report]:
        """Ask everybody; give the answers once a quorum of institutions, this one among them, has promised."""

        async def one(node: NodeId) -> Report:
            status, answer = await self._call(node, "POST", wire.promise_path, body, promise_wait_s)
            if status == wire.fenced:
                self._seen = max(self._seen, wire.unpack_fence(answer)[0])
                raise Unavailable(f"it promised epoch {self._seen} to another node")
            if status != 200:
                raise unpack_error(status, answer, self._roster.node(node).name)
            return Report.from_bytes(answer)

        tasks = {asyncio.create_task(one(node.id)): node.id for node in self._roster.nodes if node.id != self._node}
        reports: dict[NodeId, Report] = {}
        waiting, enough = set(tasks), False
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=self._linger_s if enough else None, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if task.exception() is None:
                        reports[tasks[task]] = task.result()
                    elif not isinstance(task.exception(), MedshardError):
                        raise task.exception() or AssertionError
                if enough and not done:
                    break
                enough = self._roster.has_quorum([self._node, *reports])
        finally:
            for task in waiting:
                task.cancel()
        if not enough and not self._roster.has_quorum([self._node, *reports]):
            there = sorted(self._roster.node(node).name for node in reports)
            raise Unavailable(f"fewer than {self._roster.quorum.q} institutions promised epoch {epoch} ({', '.join(there) or 'none'})")
        return reports

    def _newest(self, notes: Iterable[bytes]) -> Published | None:
        """The newest of these that really is published."""
        newest = self._journal.published
        for note in dict.fromkeys(notes):
            try:
                size = Checkpoint.from_text(Note.from_bytes(note).text).size if note else 0
                if not size or (newest and size <= newest.checkpoint.size):
                    continue
                newest = Published(self._journal.open_published(note), note)
            except MedshardError as error:
                _log.warning("a checkpoint that a node shows as published is not believed: %s", error)
        return newest

    # -- refilling

    async def _refill(self, reports: dict[NodeId, Report], published: Published | None) -> None:
        """Take over the history that counts. Raises Unavailable where it cannot be had, or where no quorum could follow it."""
        offers = [offer for node, report in reports.items() if (offer := self._offer(node, report)) is not None]
        offers.sort(key=lambda offer: (offer.accepted, offer.checkpoint.size), reverse=True)
        if published is not None and self._lacks(published):
            await self._catch_up(offers, published)
        tails = await self._tails(offers, published)
        may_lead = [offer for offer in offers if self._may_lead(offer, reports, tails)]
        own = self._journal.head
        for offer in may_lead:
            if (offer.accepted, offer.checkpoint.size) <= (own.accepted, own.size):
                break  # what is here counts as much
            try:
                await self._take_from(offer, published)
            except Damaged as error:
                self._doubts[offer.checkpoint.root] += 1
                _log.warning("the entries that %s has are not taken: %s", self._roster.node(offer.node).name, error)
                if self._doubts[offer.checkpoint.root] < doubts_max:
                    raise Unavailable("a node has another history of a later epoch: let one that has it take over") from None
                continue  # nobody did: it may be made up
            break
        await self._lengthen(may_lead)
        self._linger_s = linger_s
        if not self._finds_quorum(self._journal.entries(tails.start, self._journal.head.size), reports, tails):
            self._linger_s = promise_wait_s  # the next time everybody is heard
            raise Unavailable("others have other entries, and those that have not are no quorum: let one that has them take over")

    async def _catch_up(self, offers: Sequence[_Offer], published: Published) -> None:
        """Get what is published. Raises Unavailable."""
        for offer in offers:
            if offer.checkpoint.size >= published.checkpoint.size and self._lacks(published):
                try:
                    await self._take_from(replace(offer, checkpoint=published.checkpoint, signed=published.note), published)
                except MedshardError as error:
                    _log.warning("what is published is not had from %s: %s", self._roster.node(offer.node).name, error)
        if self._lacks(published):
            raise Unavailable("what is published could not be fetched from any node that promised")

    async def _tails(self, offers: Sequence[_Offer], published: Published | None) -> _Tails:
        """What nodes have after what is published, where that is more than nothing and could be had."""
        start, head, tails = published.checkpoint.size if published else 0, self._journal.head, dict[NodeId, list[bytes] | None]()

        async def look(offer: _Offer) -> None:
            size, root = offer.checkpoint.size, offer.checkpoint.root
            try:
                async with asyncio.timeout(tail_wait_s):
                    more = await self._fetch(offer.node, head.size, size) if size > head.size else []
                    if self._root_after(min(size, head.size), more) == root:
                        tails[offer.node] = self._journal.entries(start, min(size, head.size)) + more
                        return
                    entries = await self._fetch(offer.node, start, size)
            except (MedshardError, TimeoutError):
                tails[offer.node] = None
            else:  # one that goes on from other entries than were published is dropped as soon as those are shown
                tails[offer.node] = entries if self._root_after(start, entries) == root else []

        await asyncio.gather(*(look(offer) for offer in offers if offer.checkpoint.size > start))
        return _Tails(start, tails)

    def _may_lead(self, offer: _Offer, reports: Iterable[NodeId], tails: _Tails) -> bool:
        """Whether a history is a part of the one here, or one that goes on from what is published and finds a quorum."""
        size, tail = offer.checkpoint.size, tails.of(offer.node)
        if size <= self._journal.head.size and self._journal.tree.root(size) == offer.checkpoint.root:
            return True
        return bool(tail) and self._finds_quorum(tail or [], reports, tails)

    def _finds_quorum(self, end: list[bytes], reports: Iterable[NodeId], tails: _Tails) -> bool:
        """Whether enough institutions have nothing that is not in this end of the log. Whoever led with another one would bring to it those
        alone that have neither, and the log would stand still for good although nobody lies any more."""
        own = self._journal.entries(tails.start, self._journal.head.size)
        there = [(self._node, own), *((node, tails.of(node)) for node in reports)]
        return self._roster.has_quorum([node for node, tail in there if tail is not None and end[: len(tail)] == tail])

    def _lacks(self, published: Published) -> bool:
        """Whether this node has not got what is published."""
        size = published.checkpoint.size
        return self._journal.head.size < size or self._journal.tree.root(size) != published.checkpoint.root

    async def _lengthen(self, offers: Sequence[_Offer]) -> None:
        """Take up entries that somebody has beyond this history: they were handed in, and whoever has them need not drop them."""
        for offer in sorted(offers, key=lambda offer: offer.checkpoint.size, reverse=True):
            if offer.checkpoint.size > self._journal.head.size:
                try:
                    await self._take_from(offer, None)
                except MedshardError as error:
                    _log.info("%s has other entries after entry %d: %s", self._roster.node(offer.node).name, self._journal.head.size, error)

    def _offer(self, node: NodeId, report: Report) -> _Offer | None:
        if report.size == 0:
            return None
        try:
            note = Note.from_bytes(report.signed)
            try:
                checkpoint = open_signed(note, self._roster)
            except Refused:  # the last sequencer may have left with the roster that listed its key
                checkpoint = open_signed(note, self._journal.roster_of(report.size))
        except MedshardError as error:
            _log.warning("%s has entries that no log key signed: %s", self._roster.node(node).name, error)
            return None
        return _Offer(node, report.accepted, checkpoint, report.signed) if checkpoint.size == report.size else None

    async def _take_from(self, offer: _Offer, published: Published | None) -> None:
        """Bring this node's log to where the offer is. Raises Damaged where that is another history than the one here, or not whole."""
        size, root, have = offer.checkpoint.size, offer.checkpoint.root, self._journal.head.size
        if size <= have:
            if self._journal.tree.root(size) == root:
                return  # what is here goes on from there
            entries = []
        else:
            entries = await self._fetch(offer.node, have, size)
        if size > have and self._root_after(have, entries) == root:
            for at in range(0, len(entries), wire.push_entries_max):
                piece = entries[at : at + wire.push_entries_max]
                end = have + at + len(piece)
                await self._mirror.fill(have + at, piece, offer.signed if end == size else b"", published)
            return
        start = self._mirror.agreed
        if published is None or published.checkpoint.size > size:
            raise Damaged("its log is not a continuation of this one, and nothing published rules this one out")
        entries = await self._fetch(offer.node, start, size)
        if self._root_after(start, entries) != root:
            raise Damaged("its entries do not lead to the root that was signed")
        await self._mirror.fill(start, entries, offer.signed, published)

    def _root_after(self, start: int, entries: Sequence[bytes]) -> bytes:
        frontier = self._journal.frontier_at(start)
        for entry in entries:
            frontier.append(merkle.leaf_hash(entry, sha256))
        return frontier.root()

    async def _fetch(self, node: NodeId, start: int, end: int) -> list[bytes]:
        entries: list[bytes] = []
        for at in range(start, end, wire.fetch_entries_max):
            until = min(end, at + wire.fetch_entries_max)
            path = f"/v1/ledger/entries/{at}-{until}"
            status, answer = await self._call(node, "GET", path, b"", fetch_wait_s)
            if status != 200:
                raise unpack_error(status, answer, self._roster.node(node).name)
            try:
                entries += unpack_bundle(answer, until - at)
            except Malformed as error:
                raise Damaged(f"it gives out no entries: {error}") from None
        return entries


async def ask(call: PeerCaller, node: NodeId, timeout_s: float) -> Report:
    """Ask a node how it stands to the log. Raises MedshardError."""
    status, answer = await call(node, "GET", wire.ask_path, b"", timeout_s)
    if status != 200:
        raise unpack_error(status, answer, "node")
    return Report.from_bytes(answer)
