"""Which nodes did not answer, or were slower than the others, and for how long that is remembered.

Only an order of preference: a node of which nothing better is known is asked last and waited for least, and nothing is refused because
of it. What was learnt outlives a command (``notes``), since most commands are over before a second request to the same node.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from medshard_protocol import canonical
from medshard_protocol.errors import Malformed
from medshard_protocol.ids import NodeId

suspect_s: Final = 30.0  # how long a node that stalled is tried last
longest_s: Final = 600.0  # the same for one that stalls time and again: twice as long each time
notes_bytes_max: Final = 64 * 1024


class Health:
    """What one client has seen of each node."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._silent_until: dict[NodeId, float] = {}
        self._slow: dict[NodeId, tuple[float, float]] = {}  # until when, and for how long that was

    def suspect(self, node: NodeId) -> None:
        """It did not answer. Any answer ends this."""
        self._silent_until[node] = self._clock() + suspect_s

    def slow(self, node: NodeId) -> None:
        """It was left behind by the others. That it answers something is no better news."""
        before = self._slow.get(node)
        # Nothing new within the time that it was given: several streams of one moment count once.
        if before is None or before[0] <= self._clock():
            term = suspect_s if before is None else min(longest_s, 2 * before[1])
            self._slow[node] = (self._clock() + term, term)

    def well(self, node: NodeId) -> None:
        """It answered."""
        self._silent_until.pop(node, None)

    def kept_up(self, node: NodeId) -> None:
        """It took or gave as much as the others, as fast."""
        self._slow.pop(node, None)

    def is_suspect(self, node: NodeId) -> bool:
        """Whether it did not answer lately."""
        return self._lasts(self._silent_until.get(node, 0.0))

    def is_slow(self, node: NodeId) -> bool:
        """Whether it did not answer, or was left behind, lately: for much data another one is to be preferred."""
        return self.is_suspect(node) or self._lasts(self._slow.get(node, (0.0, 0.0))[0])

    def _lasts(self, until: float) -> bool:
        now = self._clock()
        return now < until <= now + longest_s  # a clock that was set back must not make a suspicion last

    # -- between commands

    def notes(self) -> bytes:
        """What is known, for ``recall``."""
        now = self._clock()
        silent: list[canonical.Value] = [[node, int(until)] for node, until in sorted(self._silent_until.items()) if until > now]
        slow: list[canonical.Value] = [
            [node, int(until), int(term)] for node, (until, term) in sorted(self._slow.items()) if until > now - longest_s
        ]
        return canonical.encode([silent, slow])

    def recall(self, notes: bytes) -> None:
        """What an earlier client knew. Notes that make no sense are as good as none."""
        try:
            silent, slow = canonical.decode(notes, bytes_max=notes_bytes_max, what="notes of nodes' health")
            self._silent_until |= {NodeId(bytes(node)): float(until) for node, until in silent}
            self._slow |= {NodeId(bytes(node)): (float(until), min(longest_s, float(term))) for node, until, term in slow}
        except (Malformed, TypeError, ValueError):
            return
