"""Sending shards to many nodes at once, in one thread below asyncio: a body's parts go through OpenSSL straight to the socket.

Who sends how much to whom, and who is too slow, is decided by the upload (upload.py) in the event loop; here it is carried out.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from medshard.line import Steps
from medshard.polling import Course, Failure, Poller
from medshard.transport import Net, explain
from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.messages import error_bytes_max, unpack_error
from medshard_protocol.roster import Node

answer_bytes_max: Final = error_bytes_max  # of what a node says to a PUT; a good answer has 40


@dataclass(eq=False, slots=True, kw_only=True)
class Outgoing(Course):
    """A PUT on its way: ``parts`` of its body as they come; its ``answer`` in the event loop."""

    answer: asyncio.Future[bytes]
    parts: deque[memoryview] = field(default_factory=deque)
    taken: int = 0  # parts that the system took
    moved_at: float = field(default_factory=time.monotonic)
    body: bytes = b""


class Sending:
    """PUTs that go on together. Make it in the event loop and ``close`` it there, in any case."""

    def __init__(self, net: Net, moved: Callable[[], None]) -> None:
        self._net = net
        self._moved = moved
        self._loop = asyncio.get_running_loop()
        self._poller = Poller(net, self._ended)
        self._fresh: deque[Outgoing] = deque()
        self._stopping = self._took = self._telling = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="medshard-put")
        self._working = self._loop.run_in_executor(self._pool, self._work)

    def begin(self, node: Node, path: str, size: int, headers: Mapping[str, str]) -> Outgoing:
        """Begin a PUT of ``size`` bytes. The answer's future gives what the node answered, or raises that; cancel it to stop."""
        outgoing = Outgoing(node, answer=self._loop.create_future())
        outgoing.steps = self._run(outgoing, path, size, headers)
        outgoing.answer.add_done_callback(lambda _: self.ring())
        self._fresh.append(outgoing)
        self.ring()
        return outgoing

    def ring(self) -> None:
        """Say that there are new parts."""
        self._poller.ring()

    async def close(self) -> None:
        """Stop what is still going. No thread and no line is left."""
        self._stopping = True
        self.ring()
        while not self._working.done():
            with contextlib.suppress(asyncio.CancelledError):  # a second Ctrl-C: the thread ends by itself, at once
                await asyncio.wait([self._working])
        self._pool.shutdown()
        self._poller.close()
        self._working.result()

    def _work(self) -> None:
        running: list[Outgoing] = []
        try:
            while not self._stopping:
                if self._poller.turn(None):
                    running += [self._fresh.popleft() for _ in range(len(self._fresh))]
                    for outgoing in [outgoing for outgoing in running if outgoing.answer.cancelled()]:
                        self._poller.drop(outgoing)
                        outgoing.parts.clear()  # they hold whole stripes in memory
                    running = [outgoing for outgoing in running if outgoing.steps is not None]
                    for outgoing in [outgoing for outgoing in running if outgoing.waits_for_bell]:
                        self._poller.resume(outgoing)
                if self._took and not self._telling:
                    self._took, self._telling = False, True  # one message at a time, whatever moved meanwhile
                    self._tell(self._tell_moved)
        finally:
            for outgoing in running:
                self._poller.drop(outgoing)
                self._tell(outgoing.answer.cancel)

    def _tell(self, what: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(what)

    def _tell_moved(self) -> None:
        self._telling = False
        self._moved()

    def _run(self, outgoing: Outgoing, path: str, size: int, headers: Mapping[str, str]) -> Steps[None]:
        line = yield from self._poller.asked(outgoing, "PUT", path, {**headers, "Content-Length": str(size)})
        left = size
        while left:
            while not outgoing.parts:
                yield 0
            if outgoing.answer.cancelled():  # what was handed over may be used for other cells by now
                return line.close()
            part = outgoing.parts.popleft()
            if not (yield from line.send(part)):
                break
            left -= len(part)
            outgoing.taken += 1
            outgoing.moved_at = time.monotonic()
            self._took = True
        head = yield from line.answer()
        if head.length > answer_bytes_max:
            raise Unavailable(f"answered {head.status}")
        outgoing.body = yield from line.read(head.length)
        if left:
            line.close()  # it does not want the rest, and would take another request for it
        if head.status not in (200, 201):
            raise unpack_error(head.status, outgoing.body, outgoing.node.name)
        if left:
            raise Unavailable("answered before it had everything")
        self._net.health.well(outgoing.node.id)

    def _ended(self, outgoing: Outgoing, failure: Failure | None) -> None:
        error: MedshardError | None = None
        if isinstance(failure, MedshardError):
            error = failure
        elif failure is not None:
            self._net.health.suspect(outgoing.node.id)
            error = Unavailable(f"{outgoing.node.name}: {explain(failure)}")
        self._tell(lambda: _settle(outgoing, error))


def _settle(outgoing: Outgoing, error: MedshardError | None) -> None:
    if outgoing.answer.done():
        return
    if error is None:
        outgoing.answer.set_result(outgoing.body)
    else:
        outgoing.answer.set_exception(error)
