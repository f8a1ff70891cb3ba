"""Many lines in one thread: each has a course, a generator that is resumed when its socket has or takes bytes, or when the bell rings.

The thread belongs to whoever calls ``turn``; others may only ``ring``. What a course does, and what its end means, is its owner's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import select
import socket
from collections.abc import Callable, Coroutine, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

from medshard.line import Address, BrokenOff, Line, Steps, read_bytes
from medshard.transport import Net
from medshard_protocol.errors import MedshardError
from medshard_protocol.roster import Node

Failure = MedshardError | OSError | BrokenOff  # ssl.SSLError is an OSError
_failures: Final = (MedshardError, OSError, BrokenOff)


@dataclass(eq=False, slots=True)
class Course:
    """One exchange with one node, on its way."""

    node: Node
    steps: Generator[int, None, None] | None = None
    line: Line | None = None
    registered: tuple[int, int] | None = None  # file descriptor and events

    @property
    def waits_for_bell(self) -> bool:
        """Whether only a ring lets it go on."""
        return self.steps is not None and self.registered is None


class Poller:
    """Drives courses. Make it in the event loop, use it in one thread, close it when that has ended."""

    def __init__(self, net: Net, ended: Callable[[Any, Failure | None], None]) -> None:
        self._net = net
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._poll = select.poll()
        self._courses: dict[int, Course] = {}  # by file descriptor
        self._scratch = memoryview(bytearray(read_bytes))
        self._bell, self._ear = socket.socketpair()
        self._poll.register(self._ear, select.POLLIN)

    def ring(self) -> None:
        """Wake the thread. Any thread may call, at any time."""
        with contextlib.suppress(OSError):  # full of rings already, or closed
            self._bell.send(b"!", socket.MSG_DONTWAIT)

    def turn(self, wait_s: float | None) -> bool:
        """Wait for something and resume the courses that waited for it; whether the bell rang (its courses are the caller's to resume)."""
        rang = False
        for descriptor, _ in self._poll.poll(None if wait_s is None else wait_s * 1000):
            if descriptor == self._ear.fileno():
                rang = True
                with contextlib.suppress(BlockingIOError):
                    self._ear.recv(64, socket.MSG_DONTWAIT)
            elif course := self._courses.get(descriptor):
                self.resume(course)
        return rang

    def resume(self, course: Course) -> None:
        """Let a course go on until it waits again; tells ``ended`` when it does not."""
        if course.steps is None:
            return
        try:
            events = next(course.steps)
        except StopIteration:
            course.steps = None
            self.release(course)
            self._ended(course, None)
        except _failures as error:
            self.drop(course)
            self._ended(course, error)
        else:
            self._watch(course, events)

    def release(self, course: Course) -> None:
        """Give its line back."""
        self._watch(course, 0)
        if course.line is not None:
            self._net.lines.give(course.line)
            course.line = None

    def drop(self, course: Course) -> None:
        """Stop it and hang up."""
        self._watch(course, 0)
        if course.steps is not None:
            course.steps.close()
            course.steps = None
        if course.line is not None:
            course.line.close()
            course.line = None

    def close(self) -> None:
        """After the thread has ended."""
        self._bell.close()
        self._ear.close()

    # -- steps for courses

    def asked(self, course: Course, method: str, path: str, headers: Mapping[str, str]) -> Steps[Line]:
        """A line, taken or made, on which the head of a request has been sent."""
        place = self._net.place(course.node)
        course.line = self._net.lines.take(place, self._scratch)
        if course.line is not None:
            try:
                yield from course.line.ask(method, path, headers)
                if method == "GET":
                    yield from course.line.heard()
                return course.line
            except (OSError, BrokenOff):
                # The node closed an idle line just as we took it: it has not failed yet.
                touched = course.line.touched
                self._watch(course, 0)
                course.line.close()
                if touched:
                    raise
        addresses = yield from self._addresses(*place.host)
        course.line = Line(place, self._scratch)
        yield from course.line.connect(addresses)
        yield from course.line.ask(method, path, headers)
        return course.line

    def waited(self, work: Coroutine[Any, Any, Any]) -> Steps[Any]:
        """What the event loop answers."""
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        future.add_done_callback(lambda _: self.ring())
        try:
            while not future.done():
                yield 0
        finally:
            future.cancel()
        return future.result()

    def _addresses(self, host: str, port: int) -> Steps[list[Address]]:
        try:
            number = ipaddress.ip_address(host)
        except ValueError:
            found = yield from self.waited(self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            return [(family, address) for family, _, _, _, address in found]
        return [(socket.AF_INET if number.version == 4 else socket.AF_INET6, (host, port))]

    def _watch(self, course: Course, events: int) -> None:
        line = course.line.socket if course.line else None
        wanted = (line.fileno(), events) if line and events else None
        if wanted == course.registered:
            return
        if course.registered:
            self._poll.unregister(course.registered[0])
            del self._courses[course.registered[0]]
        if wanted:
            self._poll.register(*wanted)
            self._courses[wanted[0]] = course
        course.registered = wanted
