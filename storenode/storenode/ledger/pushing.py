"""Bringing the log to the mirrors: one task for each, so that none waits for another.

Law: a task always sends from where its mirror stands to the newest checkpoint. It decides nothing; a cosignature that comes back is handed
on unread. A mirror that is dead, frozen or wrong costs a time-out in its own task and is asked again after a growing pause.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from medshard_protocol.checkpoint import Checkpoint, Note, Signature
from medshard_protocol.errors import Damaged, MedshardError, Refused, Unavailable
from medshard_protocol.ids import NodeId
from medshard_protocol.messages import unpack_error
from medshard_protocol.roster import Node, Roster
from storenode.ledger import wire
from storenode.ledger.channel import Channel, PeerCaller
from storenode.ledger.journal import Journal
from storenode.ledger.wire import Push

push_timeout_s = 3.0
catch_up_timeout_s = 20.0  # a full push of 4 MiB to a slow disk over a slow line
pause_first_s = 0.1
pause_most_s = 1.0  # what a mirror that comes back may have to wait; a dead one costs a connection attempt a second
tell_after_s = 0.1  # under load the next checkpoint carries the news along, and nothing is sent for it alone

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Round:
    """One signed checkpoint on its way to a quorum."""

    checkpoint: Checkpoint
    note: Note  # signed by the log
    began: float
    cosigned: dict[NodeId, Signature] = field(default_factory=dict)
    done: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False, slots=True)
class _Peer:
    node: Node
    channel: Channel
    size: int  # how many entries it has; a guess until it has answered
    round: Round | None = None  # the newest it has cosigned
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
        first: Round,
        cosigned: Callable[[Round, NodeId, Signature], None],
        sign_at: Callable[[int], Note],
    ) -> None:
        self._journal = journal
        self._round = first
        self._cosigned = cosigned
        self._sign_at = sign_at
        self._peers = [_Peer(node, Channel(node.id, call), journal.head.size) for node in roster.nodes if node.id != own]
        self._tasks: list[asyncio.Task[None]] = []
        self._telling: asyncio.TimerHandle | None = None
        self._edition = 0  # of the published note, counted up
        self._news = 0  # the edition that mirrors should hear of even without a new checkpoint
        self._packed: dict[tuple[int, int, bool, bytes], bytes] = {}  # most mirrors stand at one place and get the same bytes

    def start(self) -> None:
        """Begin to push."""
        self._tasks = [asyncio.create_task(self._serve(peer)) for peer in self._peers]
        for task in self._tasks:
            task.add_done_callback(report_end)

    async def close(self) -> None:
        """Stop in the middle of whatever is under way; mirrors keep what they have stored."""
        if self._telling is not None:
            self._telling.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(peer.channel.close() for peer in self._peers))

    def push(self, round_: Round) -> None:
        """Bring this checkpoint to every mirror, in place of any earlier one."""
        self._round = round_
        self._packed.clear()  # holds a handful of bodies for one round, and those of mirrors that catch up
        for peer in self._peers:
            peer.wake.set()

    def tell(self, *, soon: bool) -> None:
        """Let the mirrors know what has been published: with the next push, or ``soon``."""
        self._edition += 1
        if soon and self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(tell_after_s, self._tell, self._edition)

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

    async def _serve(self, peer: _Peer) -> None:
        while True:
            await peer.wake.wait()
            peer.wake.clear()
            while peer.round is not self._round or peer.told < self._news:
                if await self._try(peer):
                    peer.failures, peer.error = 0, ""
                else:
                    pause = min(pause_most_s, pause_first_s * 2 ** min(peer.failures, 10))
                    peer.failures += 1
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))

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
        start, edition, published = peer.size, self._edition, self._journal.published
        end = start if round_ is None else min(round_.checkpoint.size, start + wire.push_entries_max)
        body = self._pack(start, end, round_, published.note if published else b"")
        timeout_s = push_timeout_s if end - start < wire.push_entries_max // 4 else catch_up_timeout_s
        status, answer = await peer.channel.ask(body, timeout_s)
        if status == 409:
            self._move(peer, wire.unpack_size(answer))
            return
        if status != 200:
            raise unpack_error(status, answer, peer.node.name)
        peer.told = edition
        if round_ is not None:
            peer.size = end
            if end == round_.checkpoint.size:
                self._cosigned(round_, peer.node.id, Signature.from_line(wire.unpack_cosignature(answer)))
                peer.round = round_

    def _pack(self, start: int, end: int, round_: Round | None, published: bytes) -> bytes:
        key = (start, end, round_ is None, published)
        body = self._packed.get(key)
        if body is None:
            note = None if round_ is None else round_.note if end == round_.checkpoint.size else self._sign_at(end)
            entries = tuple(self._journal.entries(start, end))
            body = Push(start, entries, note.to_bytes() if note else b"", published).to_bytes()
            self._packed[key] = body
        return body

    def _move(self, peer: _Peer, size: int) -> None:
        """The mirror says it stands elsewhere than was thought."""
        if size > self._journal.head.size:
            raise Unavailable(
                f"it has {size} entries, more than the sequencer's own {self._journal.head.size}",
                hint="the sequencer's database is older than its mirrors: do not use it; restore it from a mirror",
            )
        if size == peer.size:
            raise Refused("it refuses entries at the very size it says it has")
        peer.size = size


def report_end(task: asyncio.Task[None]) -> None:
    """Log why a task ended that never should. Its work stays undone until a restart, so it must not end unseen."""
    if not task.cancelled() and task.exception() is not None:
        _log.critical("a part of the ledger has stopped: restart this node", exc_info=task.exception())
