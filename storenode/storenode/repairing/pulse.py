"""Which nodes answer at all, and since when some do not.

Law: a node is gone when the roster does not list it, or when it has not answered once for the whole time of grace. One answer in that
time is enough: slow is not gone. Where most are silent, it is this node that is cut off: nobody more is gone, and that time, like time in
which this process stood still, counts for nobody's silence. What is known here is this node's own experience and goes to nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from medshard_protocol.errors import MedshardError
from medshard_protocol.ids import NodeId
from medshard_protocol.roster import Roster
from storenode.peers import Peers
from storenode.repairing.lasting import lasting
from storenode.traffic import Lull

every_s: Final = 15.0
per_beat: Final = 6  # nodes are asked in that time: in a larger consortium each is asked less often, or all together would ask n * n times
answer_s: Final = 5.0
late_s: Final = 10.0  # that a beat may come after its time, for a lull and answers that do not come; what is beyond was this node's own

log = logging.getLogger(__name__)


def _now() -> float:
    return asyncio.get_running_loop().time()


class Pulse:
    """Asks every node of the roster for its health. Lives in one event loop."""

    def __init__(
        self, me: NodeId, peers: Peers, roster: Callable[[], Roster], grace_s: float, lull: Lull, clock: Callable[[], float] = _now
    ) -> None:
        self._me, self._peers, self._roster, self._grace_s = me, peers, roster, grace_s
        self._lull, self._clock = lull, clock
        self._silent: dict[NodeId, float] = {}  # for how long each has been missed that did not answer last, as far as that counts
        self._beaten = 0.0  # when everybody was asked last
        self._gone: frozenset[NodeId] = frozenset()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Ask everybody from now on."""
        self._task = asyncio.create_task(lasting(self._run, "asking the others for their health"))

    async def close(self) -> None:
        """Ask no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._lull()
            await self.beat()
            await asyncio.sleep(self.every_s)

    @property
    def every_s(self) -> float:
        """How often each is asked."""
        return min(every_s * max(1.0, len(self._roster().nodes) / per_beat), self._grace_s / 4)

    @property
    def gone(self) -> frozenset[NodeId]:
        """Nodes of the roster that have not answered for the time of grace."""
        return self._gone

    def is_gone(self, node: NodeId) -> bool:
        """Whether a node is not to be counted on any more."""
        return node in self._gone or all(each.id != node for each in self._roster().nodes)

    def answers(self, node: NodeId) -> bool:
        """Whether a node is in the roster and answered when it was asked last."""
        return not self.is_gone(node) and node not in self._silent

    async def beat(self) -> None:
        """Ask everybody once."""
        now = self._clock()
        passed, self._beaten = min(now - self._beaten, self.every_s + late_s), now
        nodes = [each.id for each in self._roster().nodes if each.id != self._me]
        are_up = await asyncio.gather(*map(self._ask, nodes))
        silent = [node for node, is_up in zip(nodes, are_up, strict=True) if not is_up]
        is_cut_off = 2 * len(silent) > len(nodes)  # more likely than that most others are gone
        before, counted = self._silent, 0.0 if is_cut_off else passed
        self._silent = {node: before[node] + counted if node in before else 0.0 for node in silent}
        if is_cut_off:
            return
        gone = frozenset(node for node, seconds in self._silent.items() if seconds >= self._grace_s)
        for node in gone - self._gone:
            log.warning("a node has been silent too long: its shards count as lost", extra={"node_failed": node.hex()[:16]})
        self._gone = gone

    async def _ask(self, node: NodeId) -> bool:
        try:
            status, _ = await self._peers(node, "GET", "/healthz", b"", min(answer_s, max(self.every_s, 1.0)))
        except MedshardError:
            return False
        return status == 200
