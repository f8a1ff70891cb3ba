"""Bringing the log to the mirrors: one task for each, so that none waits for another.

Law: a task always sends from where its mirror stands to the newest checkpoint. It decides nothing; a cosignature that comes back is
handed on unread, and so is the news that a mirror follows a later epoch. A mirror whose last entries stand against this log is shown, as
soon as there is one, a published checkpoint that rules them out. A mirror that is dead, frozen or wrong costs a time-out in its own task
and is asked again after a growing pause.

An entry waits for a quorum and for nobody else, so it may go to as many mirrors as make one first, and one to spare, who take turns. The
others get it later, as ``Spread`` says; or at once where the first ones take longer than they use to, where one of them fails, or where a
mirror says that it needs it now (docs/decisions/0036-first-a-quorum.md).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from medshard_protocol.checkpoint import Checkpoint, Note, Signature
from medshard_protocol.errors import Damaged, MedshardError, Refused, Unavailable
from medshard_protocol.ids import NodeId
from medshard_protocol.messages import unpack_error
from medshard_protocol.roster import Node, Roster
from storenode.ledger import wire
from storenode.ledger.channel import Channel, PeerCaller
from storenode.ledger.journal import Journal, Published
from storenode.ledger.wire import Push

push_timeout_s = 3.0
catch_up_timeout_s = 20.0  # a full push of 4 MiB to a slow disk over a slow line
pause_first_s = 0.1
pause_most_s = 1.0  # what a mirror that comes back may have to wait; a dead one costs a connection attempt a second
tell_after_s = 0.2  # the next checkpoint carries the news along, and what the others have not got yet: little is sent for that alone
spare_voices = 1  # beyond a quorum: one that stands still costs no time
patience_s = 0.02  # with the first ones; more where quorums use to take longer
patience_rounds = 3.0
patience_most_s = 0.5
quick_s = 0.04  # mirrors that answer within this are equally good; then within four times as much, and so on

_log = logging.getLogger(__name__)


class Spread(IntEnum):
    """When a checkpoint and the news of its publication go to whom."""

    LATER = 0  # to a quorum at once; to the others a moment after it is published, with the news
    NEXT = 1  # to a quorum at once, to the others as soon as it is published; the news a moment later
    AT_ONCE = 2  # to everybody at once, and the news as soon as it is published


@dataclass(eq=False, slots=True)
class Round:
    """One signed checkpoint on its way to a quorum."""

    checkpoint: Checkpoint
    note: Note  # signed by the log
    began: float
    number: int = 0  # counted by those who push
    cosigned: dict[NodeId, Signature] = field(default_factory=dict)
    vouchers: dict[NodeId, bytes] = field(default_factory=dict)  # what the cosigners gave for readers; nobody here can check it
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Acts(NamedTuple):
    """What a sequencer does for those who push."""

    cosigned: Callable[[Round, NodeId, Signature], None]
    sign_at: Callable[[int], Note]
    fenced: Callable[[NodeId, int], None]


@dataclass(eq=False, slots=True)
class _Peer:
    node: Node
    channel: Channel
    size: int  # how many entries it has; a guess until it has answered
    agreed: int | None = None  # where to begin to show what was published, because the mirror's last entries stand against this log
    own: tuple[int, bytes] = (0, b"")  # the longest checkpoint that it has cosigned, with that signature
    shown: bool = False  # it has less than it has cosigned, and is to be told
    round: Round | None = None  # the newest it has cosigned
    wanted: int = 0  # the round that it is to be brought now, or a later one
    turn: int = 0  # the last round in which it was among the first
    took_s: float = 0.0  # to answer, of late
    asked: bool = False  # and has not answered
    told: int = 0  # the newest edition of the published note that it has been told
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    failures: int = 0  # since the last success
    error: str = ""


class Pushers:
    """All mirrors but the sequencer's own."""

    def __init__(
        self,
        journal: Journal,
        roster: Roster,
        own: NodeId,
        call: PeerCaller,
        epoch: int,
        first: Round,
        act: Acts,
    ) -> None:
        self._journal = journal
        self._roster = roster
        self._own = own
        self._call = call
        self._epoch = epoch
        self._base = first.checkpoint.size
        self._round = first
        self._act = act
        self._peers: list[_Peer] = []
        self._tasks: dict[NodeId, asyncio.Task[None]] = {}
        self._nodes = [node for node in roster.nodes if node.id != own]
        self._telling: asyncio.TimerHandle | None = None
        self._losing_patience: asyncio.TimerHandle | None = None
        self._spread = Spread.AT_ONCE  # of the round
        self._next = 0  # where at the table the next round begins
        self._typical_s = 0.0  # how long a quorum takes, of late
        self._edition = 0  # of the published note, counted up
        self._news = 0  # the edition that mirrors should hear of even without a new checkpoint
        self._packed: dict[tuple[int, int, bool, bytes], bytes] = {}  # most mirrors stand at one place and get the same bytes

    def start(self) -> None:
        """Begin to push."""
        for node in self._nodes:
            self._add(node)

    def _add(self, node: Node) -> None:
        peer = _Peer(node, Channel(node.id, self._call), self._journal.head.size, wanted=self._round.number)
        self._peers.append(peer)
        task = self._tasks[node.id] = asyncio.create_task(self._serve(peer))
        task.add_done_callback(report_end)
        peer.wake.set()

    def adopt(self, roster: Roster) -> None:
        """Push to the nodes of this roster from now on. Those that are in it no longer get nothing more."""
        self._roster = roster
        nodes = {node.id: node for node in roster.nodes if node.id != self._own}
        for peer in [peer for peer in self._peers if peer.node.id not in nodes]:
            self._peers.remove(peer)
            self._tasks.pop(peer.node.id).cancel()
            peer.channel.drop()
        for peer in self._peers:
            peer.node = nodes.pop(peer.node.id)
        for node in nodes.values():
            self._add(node)

    async def close(self) -> None:
        """Stop in the middle of whatever is under way; mirrors keep what they have stored."""
        for timer in (self._telling, self._losing_patience):
            if timer is not None:
                timer.cancel()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for peer in self._peers:
            peer.channel.drop()

    def push(self, round_: Round, spread: Spread) -> None:
        """Bring this checkpoint to the mirrors, in place of any earlier one."""
        round_.number = self._round.number + 1
        self._round, self._spread = round_, spread
        self._packed.clear()  # holds a handful of bodies for one round, and those of mirrors that catch up
        self._stop_timer()
        for peer in self._peers if spread is Spread.AT_ONCE else self._first():
            self._want(peer)
        if spread is not Spread.AT_ONCE:
            wait_s = min(patience_most_s, max(patience_s, patience_rounds * self._typical_s))
            self._losing_patience = asyncio.get_running_loop().call_later(wait_s, self._hurry_all)

    def tell(self, *, soon: bool) -> None:
        """Let the mirrors know what has been published: with the next push, or ``soon``, as its spread says."""
        self._stop_timer()
        self._typical_s += (time.monotonic() - self._round.began - self._typical_s) / 4
        self._edition += 1
        if soon and self._spread is Spread.AT_ONCE:
            if self._telling is not None:
                self._telling.cancel()
            self._tell(self._edition)
            return
        if soon and self._spread is Spread.NEXT:
            self._hurry_all()
        if soon and self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(tell_after_s, self._tell, self._edition)

    def hurry(self, node: NodeId) -> None:
        """A mirror needs the newest entries now."""
        for peer in self._peers:
            if peer.node.id == node:
                self._want(peer)

    def status(self) -> list[dict[str, object]]:
        """What an operator wants to know of each mirror."""
        return [{"node": peer.node.name, "size": peer.size, "failures": peer.failures, "error": peer.error} for peer in self._peers]

    def _tell(self, edition: int) -> None:
        self._telling, self._news = None, edition
        for peer in self._peers:
            if peer.told < edition:
                peer.wake.set()
        if self._edition > edition:
            self._telling = asyncio.get_running_loop().call_later(tell_after_s, self._tell, self._edition)

    def _first(self) -> list[_Peer]:
        """Whose cosignatures to ask for first: of those that answer quickest, the next ones around the table."""
        voices, count = self._roster.voices, len(self._peers)
        wanted = self._roster.quorum.q - (self._own in voices) + spare_voices
        places = {
            number: (_slowness(peer.took_s), (number - self._next) % count)
            for number, peer in enumerate(self._peers)
            if peer.node.id in voices and not (peer.failures or peer.asked or peer.agreed is not None)
        }
        if len(places) < wanted:
            return self._peers
        self._next += wanted
        first = [self._peers[number] for number in sorted(places, key=places.__getitem__)[:wanted]]
        for peer in first:
            peer.turn = self._round.number
        return first

    def _want(self, peer: _Peer) -> None:
        peer.wanted = self._round.number
        peer.wake.set()

    def _hurry_all(self) -> None:
        self._stop_timer()
        for peer in self._peers:
            self._want(peer)

    def _stop_timer(self) -> None:
        if self._losing_patience is not None:
            self._losing_patience.cancel()
            self._losing_patience = None

    async def _serve(self, peer: _Peer) -> None:
        while True:
            await peer.wake.wait()
            peer.wake.clear()
            while peer.round is None or peer.round.number < peer.wanted or peer.told < self._news:
                if await self._try(peer):
                    peer.failures, peer.error = 0, ""
                else:
                    self._replace(peer)
                    pause = min(pause_most_s, pause_first_s * 2 ** min(peer.failures, 10))
                    peer.failures += 1
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    def _replace(self, failed: _Peer) -> None:
        """One of the first gave no cosignature: the others are not to wait for those who are left."""
        if failed.turn == self._round.number and not self._round.done.is_set():
            self._hurry_all()

    async def _try(self, peer: _Peer) -> bool:
        try:
            await self._push(peer, None if peer.round is self._round else self._round)
        except MedshardError as error:
            if not peer.failures or isinstance(error, Damaged):
                _log.warning("mirror %s does not cosign: %s", peer.node.name, error or type(error).__name__)
            peer.error = str(error) or type(error).__name__
            return False
        return True

    async def _push(self, peer: _Peer, round_: Round | None) -> None:
        """Send one push and take in the answer. Without a round, only tell what is published."""
        edition, published = self._edition, self._journal.published
        if round_ is not None and peer.agreed is not None:
            await self._show_published(peer, published)
            return
        start = peer.size
        end = start if round_ is None else min(round_.checkpoint.size, start + wire.push_entries_max)
        body = self._pack(start, end, round_, published.note if published else b"", peer.own[1] if peer.shown else b"")
        timeout_s = push_timeout_s if end - start < wire.push_entries_max // 4 else catch_up_timeout_s
        answer = await self._ask(peer, body, timeout_s)
        if answer is None:
            return
        peer.told, peer.shown = edition, False
        if round_ is not None:
            peer.size = end
            if end == round_.checkpoint.size:
                cosigned = wire.unpack_cosignature(answer)
                signatures = [Signature.from_line(line) for line in cosigned.line.splitlines(keepends=True)]
                round_.vouchers[peer.node.id] = cosigned.vouchers
                for signature in signatures:
                    self._act.cosigned(round_, peer.node.id, signature)
                if signatures:
                    peer.own = (end, round_.note.signed_by(signatures).to_bytes())
                peer.round = round_

    async def _show_published(self, peer: _Peer, published: Published | None) -> None:
        """Send what stands in place of the mirror's last entries, with the proof that a quorum published it."""
        assert peer.agreed is not None, "the caller has seen to that"
        start = peer.agreed
        if published is None or published.checkpoint.size <= start:
            raise Unavailable("its last entries are others than the sequencer's, and nothing published rules them out yet")
        size = published.checkpoint.size
        end = min(size, start + wire.push_entries_max)
        proof = self._journal.tree.consistency_path(end, size) if end < size else []
        entries, signed = tuple(self._journal.entries(start, end)), self._act.sign_at(end).to_bytes()
        push = Push(self._epoch, self._base, start, entries, signed, published.note, tuple(proof))
        if await self._ask(peer, push.to_bytes(), catch_up_timeout_s) is not None:
            peer.size, peer.agreed = end, None

    async def _ask(self, peer: _Peer, body: bytes, timeout_s: float) -> bytes | None:
        """Send and give the answer; None where the mirror said where it stands instead."""
        began, peer.asked = time.monotonic(), True
        try:
            status, answer = await peer.channel.ask(body, timeout_s)
        finally:
            peer.asked = False
            peer.took_s += (time.monotonic() - began - peer.took_s) / 4
        if status == wire.fenced:
            self._act.fenced(peer.node.id, wire.unpack_fence(answer)[0])
            raise Unavailable("it follows a later epoch")
        if status == 409:
            self._move(peer, *wire.unpack_size(answer))
            return None
        if status == 422 and peer.agreed is None:
            peer.agreed = 0  # it answers with what it knows to be published
        if status != 200:
            raise unpack_error(status, answer, peer.node.name)
        return answer

    def _pack(self, start: int, end: int, round_: Round | None, published: bytes, yours: bytes) -> bytes:
        key = (start, end, round_ is None, published)
        body = None if yours else self._packed.get(key)
        if body is None:
            note = None if round_ is None else round_.note if end == round_.checkpoint.size else self._act.sign_at(end)
            entries, signed = tuple(self._journal.entries(start, end)), note.to_bytes() if note else b""
            body = Push(self._epoch, self._base, start, entries, signed, published, (), yours).to_bytes()
            if not yours:
                self._packed[key] = body
        return body

    def _move(self, peer: _Peer, size: int, agreed: int) -> None:
        """The mirror says it stands elsewhere than was thought."""
        if peer.agreed is not None:
            if peer.agreed < agreed < size:
                peer.agreed = agreed
                return
            if size > max(peer.agreed, agreed):
                raise Refused("it refuses what was published at the very size it says it has")
            peer.agreed = None  # what it has is the beginning of this log
        elif size > self._journal.head.size:
            peer.agreed = agreed
        elif size == peer.size:
            raise Refused("it refuses entries at the very size it says it has")
        peer.shown = size < peer.own[0]
        peer.size = min(size, self._journal.head.size)


def _slowness(took_s: float) -> int:
    return 0 if took_s <= quick_s else 1 + int(math.log(took_s / quick_s, 4))


def report_end(task: asyncio.Task[None]) -> None:
    """Log why a task ended that never should. Its work stays undone until a restart, so it must not end unseen."""
    if not task.cancelled() and task.exception() is not None:
        _log.critical("a part of the ledger has stopped: restart this node", exc_info=task.exception())
