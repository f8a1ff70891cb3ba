"""One connection from the sequencer to each mirror, over which pushes go and cosignatures come back.

Law: a channel carries a push and brings status and body of its answer, one at a time; it is opened when it is needed and dropped
at the first sign of trouble.
"""

from __future__ import annotations

from typing import Final, Protocol

from medshard_protocol.errors import Unavailable
from medshard_protocol.ids import NodeId
from storenode.ledger import wire
from storenode.line import Line

answer_bytes_max: Final = wire.cosignature_bytes_max + 64


class PeerCaller(Protocol):
    """How a node reaches another over mutual TLS."""

    async def __call__(self, node: NodeId, method: str, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Send one request; give the status and the body of the answer. Raises Unavailable when there is none in time."""

    async def connect(self, node: NodeId, timeout_s: float) -> Line:
        """Open a connection of one's own. Raises Unavailable where that does not work in time."""


class Channel:
    """The sequencer's end; the other one is a route like any other."""

    def __init__(self, node: NodeId, peers: PeerCaller) -> None:
        self._node = node
        self._peers = peers
        self._line: Line | None = None

    async def ask(self, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Send a push and wait for its answer. Raises Unavailable, or Malformed for an answer that is none."""
        if self._line is None or self._line.closed:
            self._line = await self._peers.connect(self._node, timeout_s)
        try:
            return await self._line.post(wire.path, body, answer_bytes_max, timeout_s)
        except OSError as error:
            self.drop()
            raise Unavailable(f"no answer ({error or type(error).__name__})") from None

    def drop(self) -> None:
        """Give the connection up."""
        if self._line is not None:
            self._line.close()
            self._line = None
