"""When this node takes over: its sequencer is gone, frozen, without progress, or leaves out what was handed in.

Law: a takeover that was not needed costs a moment and nothing else, since the older sequencer is fenced; so this errs on the quick side,
and backs off where it was wrong. Nodes try in the roster's order, each after those before it have had their time.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable

from medshard_protocol.errors import MedshardError
from medshard_protocol.ids import NodeId
from medshard_protocol.roster import Roster
from storenode.ledger.channel import PeerCaller
from storenode.ledger.mirror import Mirror
from storenode.ledger.takeover import Takeover, ask
from storenode.ledger.wire import Report

look_every_s = 0.3
alive_s = 0.5  # a sequencer that pushed so lately is not asked
ask_wait_s = 0.8  # without an answer for so long a sequencer counts as frozen
refusals_max = 2  # a connection that is refused so often in a row is a process that is gone
idle_answers_max = 5  # it answers, and does not lead: it is about to start or has been fenced
turn_s = 0.6  # what each node before this one in the roster gets
turns_max = 3
back_off_first_s = 0.3
back_off_most_s = 2.0
disturbed_most_s = 20.0
standbys = 3  # by default: one may be away and one may follow it
steady_s = 30.0  # who led for so long is not the one who disturbs

_log = logging.getLogger(__name__)


def may_order(roster: Roster) -> list[NodeId]:
    """The first node with a log key of each institution, in the roster's order after the sequencer's."""
    first: dict[int, NodeId] = {}
    for node in sorted(roster.nodes, key=lambda node: node.id != roster.sequencer):
        if node.log_key:
            first.setdefault(node.institution, node.id)
    return list(first.values())


def stands_by(roster: Roster, node: NodeId, wanted: bool | None) -> bool:
    """Whether a node is to order entries when the sequencer is gone; where its operator says nothing, the first few do."""
    return node in may_order(roster)[:standbys] if wanted is None else wanted


class Standby:
    """One node's wait for its turn, and its turns."""

    def __init__(
        self,
        mirror: Mirror,
        roster: Roster,
        node: NodeId,
        call: PeerCaller,
        takeover: Takeover,
        lead: Callable[[int], Awaitable[None]],
    ) -> None:
        self._mirror = mirror
        self._roster = roster
        self._node = node
        self._call = call
        self._takeover = takeover
        self._lead = lead
        self._failures = 0
        self._disturbed = 0  # how often this node lost the lead soon after it had it
        self._starting = True
        self._suspected = asyncio.Event()
        self.role = "standby"

    def suspect(self, why: str) -> None:
        """Take over from a sequencer that does its work badly."""
        _log.warning("this node tries to take over: %s", why)
        self._suspected.set()

    def adopt(self, roster: Roster) -> None:
        """Go by this roster from now on."""
        self._roster = roster

    async def run(self) -> None:
        """Wait, take over, lead, and begin again. Ends by being cancelled."""
        while True:
            self.role = "standby"
            if not self._listed(self._node):  # out of the roster, and for others to replace
                await self._pause(look_every_s)
                continue
            await self._until_needed()
            if not self._suspected.is_set() and await self._somebody_leads():
                await self._pause(look_every_s)
                continue
            self._suspected.clear()
            self.role = "candidate"
            try:
                epoch = await self._takeover.attempt()
            except MedshardError as error:
                (_log.info if self._failures else _log.warning)("this node cannot take over yet: %s", error)
                self._failures += 1
                await self._pause(min(back_off_most_s, back_off_first_s * 2 ** min(self._failures, 8)) * random.uniform(0.5, 1.0))
                continue
            self.role, began = "sequencer", time.monotonic()
            await self._lead(epoch)
            self._failures = 0
            self._disturbed = 0 if time.monotonic() - began > steady_s else self._disturbed + 1
            if self._mirror.leader != self._node:  # somebody was quicker, or thinks this node gone: do not take turns all the time
                await self._pause(min(disturbed_most_s, back_off_first_s * 2 ** min(self._disturbed, 8)) * random.uniform(0.5, 1.0))

    async def _until_needed(self) -> None:
        leader = self._mirror.leader or self._roster.sequencer
        if not (self._starting and leader == self._node):
            await self._until_gone()
            await self._wait_for_turn()
        self._starting = False

    async def _until_gone(self) -> None:
        """Return when the sequencer that this node follows is not there."""
        refusals = idle = 0
        while not self._suspected.is_set():
            leader = self._mirror.leader or self._roster.sequencer
            if leader == self._node or not self._listed(leader):  # a node that has left the roster orders nothing
                return
            if time.monotonic() - self._mirror.heard_at > alive_s:
                began = time.monotonic()
                try:
                    report = await ask(self._call, leader, ask_wait_s)
                except MedshardError:
                    refusals += 1
                    if refusals >= refusals_max or time.monotonic() - began > ask_wait_s / 2:
                        _log.warning("the sequencer %s does not answer", self._roster.node(leader).name)
                        return
                    await asyncio.sleep(0.1)
                    continue
                refusals, idle = 0, 0 if report.leads and not report.stalled else idle + 1
                if idle >= idle_answers_max:
                    _log.warning("the sequencer %s answers and orders nothing", self._roster.node(leader).name)
                    return
            await self._pause(look_every_s)

    def _listed(self, node: NodeId) -> bool:
        return any(member.id == node for member in self._roster.nodes)

    async def _wait_for_turn(self) -> None:
        """Let those before this node in the roster go first."""
        leader = self._mirror.leader
        before = [node.id for node in self._roster.nodes if node.log_key and node.id != leader]
        before.sort(key=lambda node: node != self._roster.sequencer)
        rank = before.index(self._node) if self._node in before else len(before)
        await asyncio.sleep(min(rank, turns_max) * turn_s * random.uniform(0.9, 1.1))

    async def _somebody_leads(self) -> bool:
        """Whether any node leads, in the latest epoch that is known."""
        others = [node.id for node in self._roster.nodes if node.id != self._node]
        asked = {asyncio.create_task(ask(self._call, node, ask_wait_s)) for node in others}
        try:
            for answer in asyncio.as_completed(asked):
                try:
                    report: Report = await answer
                except MedshardError:
                    continue
                if report.leads and not report.stalled and report.epoch >= self._mirror.epoch:
                    return True
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        return False

    async def _pause(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._suspected.wait()
        except TimeoutError:
            pass
