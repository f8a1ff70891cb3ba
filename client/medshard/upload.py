"""Sending one object's shards to their holders, in step, without waiting for the slowest.

Each stripe's cells go to n senders. A sender that falls a whole window behind and lets the others wait is left behind, as long as w
institutions go on; its shard is for repair. Memory is O(window), never O(file).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from medshard.encoding import Stripe
from medshard.sending import Outgoing, Sending
from medshard.transport import Net, without_name
from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.ids import FileId
from medshard_protocol.messages import cell_size_header, shard_path, unpack_stored
from medshard_protocol.roster import Node
from medshard_protocol.shards import Layout

window_stripes: Final = 4  # behind the newest burst of four: at 10/16 and 128 KiB cells, up to 16 MiB of cells in flight
stall_s: Final = 0.5  # how long, in all, a node may let w others wait; or half of the time so far, if that is longer
stall_slow_s: Final = 0.05  # a node that was left behind lately gets little credit
silent_s: Final = 0.2  # a node that took nothing for so long before it was left behind may not answer anything
linger_s = (0.2, 1.0)  # for a slow rest, once w have theirs: a quarter of the time so far, between these two
look_s: Final = 0.025
patience_s: Final = 30.0  # with fewer than w others, a slow node is better than none


@dataclass(eq=False, slots=True)
class _Sender:
    index: int
    node: Node
    outgoing: Outgoing
    failure: str = ""
    blamed_s: float = 0.0  # how long w others have waited for it

    @property
    def is_going(self) -> bool:
        return not self.failure and not self.outgoing.answer.done()


class Upload:
    """The shards of one object on their way. ``feed`` every stripe, then ``finish``; ``close`` in any case."""

    def __init__(
        self, net: Net, file_id: FileId, layout: Layout, holders: Sequence[Node], w: int, skip: frozenset[int] = frozenset()
    ) -> None:
        self._net = net
        self._file_id = file_id
        self._layout = layout
        self._w = w
        self._holders = holders
        self._done: set[int] = set(skip)  # shards that are stored already
        self._produced = 0
        self._fed: deque[Stripe] = deque()  # the newest of those, of which cells are still to be sent
        self._moved = asyncio.Event()
        self._started = time.monotonic()
        self._sending = Sending(net, self._moved.set)
        self._senders = [_Sender(i, node, self._begin(node, i)) for i, node in enumerate(holders) if i not in skip]

    async def feed(self, burst: Sequence[Stripe]) -> list[Stripe]:
        """Hand every sender its cells; waits while the window is full. Stripes, of earlier ones too, of which all cells are sent.

        Raises Unavailable when fewer than w can go on.
        """
        for sender in self._live():
            for stripe in burst:
                sender.outgoing.parts.append(stripe.cells[sender.index])
        self._fed.extend(burst)
        self._sending.ring()
        self._produced += len(burst)
        while behind := [sender for sender in self._live() if self._produced - sender.outgoing.taken > window_stripes]:
            waited = await self._wait()
            still = [sender for sender in behind if sender.is_going and self._produced - sender.outgoing.taken > window_stripes]
            self._blame(still, waited)
        self._require()
        sent = min((sender.outgoing.taken for sender in self._live()), default=0) - (self._produced - len(self._fed))
        return [self._fed.popleft() for _ in range(sent)]

    async def finish(self, roots: Sequence[bytes]) -> set[int]:
        """The shards that are durable on their nodes, at least w. A slow rest is waited for a little, then left behind."""
        while self._live() and not self._enough():
            # Nobody is dropped for a slow fsync before w have theirs; only one that is silent for `patience_s` is.
            await self._wait()
            for sender in self._live():
                if self._still_s(sender) > patience_s:
                    self._leave_behind(sender)
            self._harvest(roots)
            self._require()
        least, most = linger_s
        grace = max(least, min(most, (time.monotonic() - self._started) / 4))
        last = [sender.outgoing.answer for sender in self._live() if not self._net.health.is_slow(sender.node.id)]
        if last:
            await asyncio.wait(last, timeout=grace)
        self._harvest(roots)
        for sender in self._live():
            self._leave_behind(sender, "slower than the others")
        self._require()
        return self._done

    async def close(self) -> None:
        """Stop whatever is still going."""
        for sender in self._senders:
            if not sender.outgoing.answer.cancel() and not sender.outgoing.answer.cancelled():
                sender.outgoing.answer.exception()  # looked at, or asyncio would complain
        await self._sending.close()

    def failures(self) -> dict[str, str]:
        """Node name to what went wrong, for those that do not have their shard."""
        return {sender.node.name: sender.failure for sender in self._senders if sender.failure}

    def _begin(self, node: Node, index: int) -> Outgoing:
        path, headers = shard_path(self._file_id, index), {cell_size_header: str(self._layout.cell_size)}
        outgoing = self._sending.begin(node, path, self._layout.shard_size, headers)
        outgoing.answer.add_done_callback(lambda _: self._moved.set())
        return outgoing

    async def _wait(self) -> float:
        """Wait until something moves, not long; how long it was."""
        began = time.monotonic()
        self._moved.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(look_s):
                await self._moved.wait()
        self._notice_failures()
        return time.monotonic() - began

    def _blame(self, behind: Sequence[_Sender], waited_s: float) -> None:
        """Those for whom w institutions wait, or would if they were not waiting too, are left behind in the end."""
        enough = len(self._reachable() - {sender.node.institution for sender in behind}) >= self._w
        for sender in behind:
            if enough:
                sender.blamed_s += waited_s
                if sender.blamed_s > self._credit_s(sender):
                    self._leave_behind(sender)
            elif self._still_s(sender) > patience_s:
                self._leave_behind(sender)

    def _credit_s(self, sender: _Sender) -> float:
        if self._net.health.is_slow(sender.node.id):
            return stall_slow_s
        return max(stall_s, (time.monotonic() - self._started) / 2)

    def _still_s(self, sender: _Sender) -> float:
        return time.monotonic() - sender.outgoing.moved_at

    def _leave_behind(self, sender: _Sender, why: str = "") -> None:
        sender.failure = why or f"stalled for {max(sender.blamed_s, self._still_s(sender)):.1f} s"
        self._net.health.slow(sender.node.id)
        if self._still_s(sender) > silent_s:
            self._net.health.suspect(sender.node.id)
        sender.outgoing.answer.cancel()

    def _notice_failures(self) -> None:
        for sender in self._senders:
            answer = sender.outgoing.answer
            if answer.done() and not sender.failure and not answer.cancelled():
                error = answer.exception()
                if isinstance(error, MedshardError):
                    sender.failure = without_name(sender.node, error)
                elif error is not None:
                    raise error

    def _harvest(self, roots: Sequence[bytes]) -> None:
        self._notice_failures()
        for sender in self._senders:
            if sender.index in self._done or sender.failure or not sender.outgoing.answer.done():
                continue
            try:
                stored = unpack_stored(sender.outgoing.answer.result())
            except MedshardError as error:
                sender.failure = without_name(sender.node, error)
                continue
            if stored == roots[sender.index]:
                self._done.add(sender.index)
                self._net.health.kept_up(sender.node.id)
            else:
                sender.failure = "stored other bytes than were sent"

    def _live(self) -> list[_Sender]:
        return [sender for sender in self._senders if sender.is_going]

    def _reachable(self) -> set[int]:
        stored = {self._holders[i].institution for i in self._done}
        ended = {s.node.institution for s in self._senders if not s.failure}
        return stored | ended

    def _enough(self) -> bool:
        return len({self._holders[i].institution for i in self._done}) >= self._w

    def _require(self) -> None:
        self._notice_failures()
        if len(self._reachable()) < self._w:
            self._net.check_inside()
            raise too_few(len(self._reachable()), self._w, self.failures())


def too_few(good: int, w: int, failures: dict[str, str]) -> Unavailable:
    """The error of a put that cannot reach w institutions."""
    listed = "; ".join(f"{name}: {why}" for name, why in sorted(failures.items()))
    return Unavailable(
        f"only {good} institutions can take a shard, and {w} must before anything is acknowledged ({listed})",
        hint="nothing was acknowledged; run the same command again when the nodes are back",
    )
