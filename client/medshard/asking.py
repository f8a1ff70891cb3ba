"""A short request and its whole answer over a line, in the event loop.

What an HTTP library does for each request costs more than a small shard does, and a small read is ten of them. Only what is asked often
goes this way, and only where answers say their length (http1.py); the rest goes by aiohttp. What is asked so may be asked twice.

Law: a line that was left in the middle of anything is closed, whoever left it. Errors leave as they come; the caller translates.
"""

from __future__ import annotations

import asyncio
import ipaddress
import select
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from medshard.line import Address, BrokenOff, Line, Lines, Place, Steps, read_bytes
from medshard_protocol.errors import Unavailable

block_bytes: Final = 1024 * 1024  # of an answer: room is made as it comes, not as it is announced

_scratch: Final = memoryview(bytearray(read_bytes))  # emptied before anything else runs, whoever's event loop it is
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node said, and which roster it goes by."""

    status: int
    roster: str
    body: bytes


async def post(lines: Lines, place: Place, path: str, headers: Mapping[str, str], body: bytes, bytes_max: int) -> Answer:
    """Ask a node. Raises OSError, BrokenOff or Malformed, and Unavailable for an answer of more than ``bytes_max``."""
    if (line := lines.take(place, _scratch)) is not None:
        try:
            return await _exchanged(lines, line, path, headers, body, bytes_max)
        except (OSError, BrokenOff):
            if line.touched:
                raise  # else the node closed an idle line just as we took it: it has not failed yet
    addresses = await _addresses(*place.host)
    line = Line(place, _scratch)
    try:
        await _driven(line, line.connect(addresses))
    except BaseException:
        line.close()
        raise
    return await _exchanged(lines, line, path, headers, body, bytes_max)


async def _exchanged(lines: Lines, line: Line, path: str, headers: Mapping[str, str], body: bytes, bytes_max: int) -> Answer:
    try:
        answer = await _driven(line, _asked(line, path, headers, body, bytes_max))
    except BaseException:
        line.close()
        raise
    lines.give(line)
    return answer


def _asked(line: Line, path: str, headers: Mapping[str, str], body: bytes, bytes_max: int) -> Steps[Answer]:
    yield from line.ask("POST", path, {**headers, "Content-Length": str(len(body))}, body)
    head = yield from line.answer()
    if head.length > bytes_max:
        raise Unavailable("the node answered with more bytes than any answer has")
    blocks = []
    while line.left:
        blocks.append((yield from line.read(min(line.left, block_bytes))))
    return Answer(head.status, head.roster, blocks[0] if len(blocks) == 1 else b"".join(blocks))


class _Course(Generic[_T]):
    """Steps that go on whenever the line's socket has bytes, or takes them; no task is woken before they have ended."""

    def __init__(self, line: Line, steps: Steps[_T]) -> None:
        self._line = line
        self._steps = steps
        self._loop = asyncio.get_running_loop()
        self._watched = (-1, 0)  # descriptor and events
        self.done: asyncio.Future[_T] = self._loop.create_future()

    def go_on(self) -> None:
        if self.done.done():
            return
        if self._watched[1] == select.POLLOUT:  # while it connects, its socket may be closed, and the next one have the same number
            self._watch(-1, 0)
        try:
            events = next(self._steps)
        except StopIteration as end:
            self.done.set_result(end.value)
        except Exception as error:
            self.done.set_exception(error)
        else:
            assert self._line.socket is not None, "it waits for one"
            self._watch(self._line.socket.fileno(), events)

    def stop(self) -> None:
        self._watch(-1, 0)
        self._steps.close()

    def _watch(self, descriptor: int, events: int) -> None:
        """By number: a selector that does not know a socket yet asks the system for its addresses."""
        if self._watched == (descriptor, events):
            return
        known, before = self._watched
        self._watched = descriptor, events
        if before:
            (self._loop.remove_reader if before == select.POLLIN else self._loop.remove_writer)(known)
        if events:
            (self._loop.add_reader if events == select.POLLIN else self._loop.add_writer)(descriptor, self.go_on)


async def _driven(line: Line, steps: Steps[_T]) -> _T:
    course = _Course(line, steps)
    try:
        course.go_on()
        return await course.done
    finally:
        course.stop()


async def _addresses(host: str, port: int) -> list[Address]:
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [(family, address) for family, _, _, _, address in found]
    return [(socket.AF_INET if number.version == 4 else socket.AF_INET6, (host, port))]
