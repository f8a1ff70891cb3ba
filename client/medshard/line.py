"""One TLS connection to a node, below asyncio: bytes go from the socket through OpenSSL straight into the reader's buffer.

A line has no thread and waits for nothing. What takes time is a generator that yields the poll events it waits for (0: to be woken) and is
resumed by whoever polls (polling.py). Errors leave it as they come (OSError, ssl.SSLError, BrokenOff, Malformed); the caller translates.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from medshard_protocol.errors import Malformed
from medshard_protocol.http1 import Head, head_bytes_max, request_head, split_head
from medshard_protocol.identity import node_hostname
from medshard_protocol.roster import Node

read_bytes: Final = 256 * 1024  # taken from a socket at a time: two cells, so that one line does not starve the others
idle_s: Final = 240.0  # a node closes idle connections after 330 s
idle_lines_max: Final = 4  # kept for each node
_underway: Final = frozenset({0, errno.EINPROGRESS, errno.EWOULDBLOCK})

T = TypeVar("T")
Steps = Generator[int, None, T]
Address = tuple[int, Any]  # family and socket address
Resolve = Callable[[str, int], "Future[list[Address]]"]


class BrokenOff(Exception):
    """The other side closed the connection in the middle."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a line leads, and what its TLS checks."""

    node: Node
    context: ssl.SSLContext

    @property
    def host(self) -> tuple[str, int]:
        """Host and port."""
        return _host(self.node.url)


class Line:
    """A connection to one node, one request at a time. ``scratch`` is where its bytes come first: its holder's, who may share it."""

    def __init__(self, place: Place, scratch: memoryview) -> None:
        self.place = place
        self.scratch = scratch
        self.socket: socket.socket | None = None
        self.touched = False  # whether anything was heard since the last request
        self.idle_since = 0.0
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._tls = place.context.wrap_bio(self._in, self._out, server_hostname=node_hostname(place.node.id))
        self._ahead = b""  # plaintext that came with an answer's head
        self._left = 0  # of the answer's body
        self._keep = False

    def connect(self, addresses: Sequence[Address]) -> Steps[None]:
        """Connect to the first address that takes it, and shake hands."""
        for family, address in addresses:
            self.socket = socket.socket(family, socket.SOCK_STREAM)
            self.socket.setblocking(False)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = self.socket.connect_ex(address)
            if code in _underway:
                yield select.POLLOUT
                code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code == 0:
                break
            self.close()
        if self.socket is None:
            raise ConnectionError("cannot connect")
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                yield from self._flush()
                yield from self.fill()
        yield from self._flush()

    def ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Steps[None]:
        """Send the head of a request, and a short ``body`` with it; a long one is sent next. Then the answer is read to its end."""
        self.touched = self._keep = False
        host, port = self.place.host
        self._tls.write(request_head(method, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", path, headers) + body)
        yield from self._flush()

    def send(self, data: memoryview) -> Steps[bool]:
        """Send a part of the request's body. False if an answer comes before all of it went out: it is not wanted."""
        self._tls.write(data)
        sealed = memoryview(self._out.read())
        while sealed:
            if self.socket is None:
                raise BrokenOff
            try:
                sealed = sealed[self.socket.send(sealed) :]
            except BlockingIOError:
                if self._has_news():
                    return False
                yield select.POLLOUT | select.POLLIN
        return True

    def heard(self) -> Steps[None]:
        """Wait until something comes."""
        if not self._in.pending:
            yield from self.fill()

    def answer(self) -> Steps[Head]:
        """Read an answer's head."""
        data = bytearray()
        room = memoryview(bytearray(head_bytes_max))
        yield from self.heard()
        while (found := split_head(data)) is None:
            # Each read is bounded, and split_head gives up on a head that has no end.
            if got := self._decrypt(room):
                data += room[:got]
            else:
                yield from self.fill()
        head, self._ahead = found
        if len(self._ahead) > head.length:
            raise Malformed("more bytes than the answer announced")
        self._left, self._keep = head.length, head.keep
        return head

    def read_some(self, room: memoryview) -> int:
        """Fill the front of ``room`` with what is here of the body; 0 means: ``fill``, then try again. Raises Malformed past its end."""
        if not self._left:
            raise Malformed("a shorter answer than it should be")
        if self._ahead:
            got = min(len(self._ahead), len(room))
            room[:got] = self._ahead[:got]
            self._ahead = self._ahead[got:]
        else:
            got = self._decrypt(room[: self._left])
        self._left -= got
        return got

    def read(self, size: int) -> Steps[bytes]:
        """Exactly ``size`` bytes of the body; the caller has bounded it."""
        data = memoryview(bytearray(size))
        at = 0
        while at < size:
            if got := self.read_some(data[at:]):
                at += got
            else:
                yield from self.fill()
        return bytes(data)

    def fill(self) -> Steps[None]:
        """Take from the socket what is there, waiting until something is."""
        if self.socket is None:
            raise BrokenOff
        while True:
            yield select.POLLIN
            with contextlib.suppress(BlockingIOError):
                got = self.socket.recv_into(self.scratch)
                if not got:
                    raise BrokenOff
                self.touched = True
                self._in.write(self.scratch[:got])
                return

    @property
    def left(self) -> int:
        """How much of the answer's body has not been read."""
        return self._left

    @property
    def is_reusable(self) -> bool:
        """Whether another request may follow: the answer was read to its end, and nothing came after it."""
        return self.socket is not None and self._keep and not self._left and not self._ahead and not self._in.pending

    @property
    def is_quiet(self) -> bool:
        """Whether nothing came on an idle line. What comes unasked is a farewell, or nonsense."""
        return self.socket is not None and time.monotonic() - self.idle_since <= idle_s and not self._has_news()

    def close(self) -> None:
        """Hang up, without a farewell that could block."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def _has_news(self) -> bool:
        """Whether bytes, or the end, wait to be read."""
        try:
            if self.socket is not None:
                self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def _decrypt(self, room: memoryview) -> int:
        try:
            got = self._tls.read(len(room), room)
        except ssl.SSLWantReadError:
            return 0
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            raise BrokenOff from None
        if not got:
            raise BrokenOff
        return int(got)

    def _flush(self) -> Steps[None]:
        data = memoryview(self._out.read())
        while data:
            if self.socket is None:
                raise BrokenOff
            try:
                data = data[self.socket.send(data) :]
            except BlockingIOError:
                yield select.POLLOUT


class Lines:
    """Idle lines, to be taken again. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[tuple[bytes, str, int], list[Line]] = {}
        self._closed = False

    def take(self, place: Place, scratch: memoryview) -> Line | None:
        """An idle line that still stands, if there is one."""
        while True:
            with self._lock:
                idle = self._idle.get(_key(place))
                line = idle.pop() if idle else None
            if line is None:
                return None
            if line.is_quiet:
                line.scratch = scratch
                return line
            line.close()

    def give(self, line: Line) -> None:
        """Take a line back, or close it."""
        line.scratch = memoryview(b"")
        line.idle_since = time.monotonic()
        with self._lock:
            idle = self._idle.setdefault(_key(line.place), [])
            if not self._closed and line.is_reusable and len(idle) < idle_lines_max:
                idle.append(line)
                return
        line.close()

    def close(self) -> None:
        """Hang up all idle lines, and all that are given back from now on."""
        with self._lock:
            self._closed = True
            idle = [line for lines in self._idle.values() for line in lines]
            self._idle.clear()
        for line in idle:
            line.close()


@lru_cache(maxsize=1024)
def _host(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 443


def _key(place: Place) -> tuple[bytes, str, int]:
    return place.node.id, place.node.url, id(place.context)
