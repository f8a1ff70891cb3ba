"""A connection to another node for short requests, one after the other: TLS, and the least of HTTP/1.1 that they take.

A push to a mirror is 3 KB, and sixteen nodes bring each other a dozen for each entry. What an HTTP library and asyncio's TLS do for each
costs the sequencer more than its own work.

Law: an answer says its length once and comes as it is; everything else ends the connection. So does whatever goes wrong in the middle of a
request, and whoever stops waiting for its answer: nobody is given the answer to another request.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from medshard_protocol.errors import Malformed, MedshardError, Unavailable

head_bytes_max: Final = 16 * 1024
piece_bytes: Final = 64 * 1024  # through OpenSSL at a time
_status: Final = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2})[ \r]")
_length: Final = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})(?=\r\n)", re.IGNORECASE)
_unusual: Final = re.compile(rb"\r\n(?:transfer-encoding|content-encoding)[ \t]*:", re.IGNORECASE)
_last: Final = re.compile(rb"\r\nconnection:[ \t]*close(?=\r\n)", re.IGNORECASE)
_room: Final = memoryview(bytearray(piece_bytes))  # emptied before anything else runs


class Line(asyncio.Protocol):
    """Made by ``open``. Lives in one event loop."""

    def __init__(self, host: str, headers: Mapping[str, str], tls: ssl.SSLContext | None, hostname: str) -> None:
        self._head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": host, **headers}.items())
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = tls.wrap_bio(self._in, self._out, server_hostname=hostname) if tls is not None else None
        self._transport: asyncio.Transport
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None  # to the request that is under way
        self._came = bytearray()
        self._bytes_max = 0
        self._expected: tuple[int, int] | None = None  # status, and how long head and body are
        self._last = False  # no other request is answered here
        self.closed = False

    @classmethod
    async def open(cls, url: str, tls: ssl.SSLContext | None, hostname: str, headers: Mapping[str, str], timeout_s: float) -> Line:
        """Connect to ``url``, by TLS to who has a certificate for ``hostname``. ``headers`` go with each request.

        Raises OSError, ssl.SSLError among them, and TimeoutError.
        """
        parts = urlsplit(url)
        line = cls(parts.netloc, headers, tls, hostname)
        try:
            async with asyncio.timeout(timeout_s):
                await line._loop.create_connection(lambda: line, parts.hostname or "", parts.port or (443 if tls is not None else 80))
                await line._ready
        except BaseException:
            line.close()
            raise
        return line

    async def post(self, path: str, body: bytes, bytes_max: int, timeout_s: float) -> tuple[int, bytes]:
        """Send a request; the answer's status and its body of at most ``bytes_max``. Raises Unavailable, or Malformed."""
        if self.closed:
            raise Unavailable("the connection was closed")
        assert self._answer is None, "one after the other"
        self._answer, self._bytes_max = self._loop.create_future(), bytes_max
        timer = self._loop.call_later(timeout_s, self._fail, Unavailable(f"no answer within {timeout_s:g} s"))
        try:
            self._send(f"POST {path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n".encode("ascii") + body)
            return await self._answer
        except BaseException:
            self.close()
            raise
        finally:
            timer.cancel()
            self._answer = None

    def close(self) -> None:
        """Hang up, without a farewell: the other end may be frozen."""
        if not self.closed and hasattr(self, "_transport"):
            self._transport.abort()
        self.closed = True

    # -- what the socket's transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._shake()

    def data_received(self, data: bytes) -> None:
        """Take the bytes that came."""
        try:
            if self._tls is None:
                self._came += data
            else:
                self._in.write(data)
                if not self._ready.done() and not self._shake():
                    return
                self._decrypt(self._tls)
            if self._answer is None and self._came:
                raise Malformed("bytes that nobody has asked for")
            if self._answer is not None and not self._answer.done():
                self._look(self._answer)
        except (MedshardError, ssl.SSLError) as error:
            self._fail(error if isinstance(error, MedshardError) else Unavailable(f"TLS ended ({error})"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever waits does so in vain."""
        self._fail(Unavailable(f"the connection was closed{f' ({exc})' if exc else ''}"))

    # -- parts

    def _shake(self) -> bool:
        try:
            if self._tls is not None:
                self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            return False
        finally:
            self._flush()
        if not self._ready.done():
            self._ready.set_result(None)
        return True

    def _decrypt(self, tls: ssl.SSLObject) -> None:
        try:
            while True:
                got: int | bytes = tls.read(len(_room), _room)
                if not got:
                    raise Unavailable("the connection was closed")
                self._came += _room[: int(got)]
                if len(self._came) > head_bytes_max + self._bytes_max:
                    raise Malformed("a longer answer than there can be")
        except ssl.SSLWantReadError:
            self._flush()  # what is about keys, OpenSSL answers by itself

    def _look(self, answer: asyncio.Future[tuple[int, bytes]]) -> None:
        """Give the answer once it is whole."""
        if self._expected is None:
            self._expected = self._parse()
        if self._expected is None or len(self._came) < self._expected[1]:
            return
        (status, size), self._expected = self._expected, None
        if len(self._came) > size:
            raise Malformed("more bytes than the answer announced")
        body = bytes(self._came[self._came.find(b"\r\n\r\n") + 4 :])
        self._came.clear()
        if self._last:
            self.close()
        answer.set_result((status, body))

    def _parse(self) -> tuple[int, int] | None:
        end = self._came.find(b"\r\n\r\n", 0, head_bytes_max) + 4
        if end < 4:
            if len(self._came) >= head_bytes_max:
                raise Malformed("an answer's head is longer than any node's")
            return None
        status, lengths = _status.match(self._came), list(_length.finditer(self._came, 0, end))
        if status is None or _unusual.search(self._came, 0, end) or len(lengths) != (status[1] != b"204"):
            raise Malformed("not an answer of HTTP/1.1 with its length")
        length = int(lengths[0][1]) if lengths else 0
        if length > self._bytes_max:
            raise Malformed("a longer answer than there can be")
        self._last = _last.search(self._came, 0, end) is not None
        return int(status[1]), end + length

    def _send(self, data: bytes) -> None:
        if self._tls is None:
            self._transport.write(data)
            return
        try:
            for at in range(0, len(data), piece_bytes):
                self._tls.write(data[at : at + piece_bytes])
        except ssl.SSLError as error:
            raise Unavailable(f"TLS ended ({error})") from None
        self._flush()

    def _flush(self) -> None:
        if self._out.pending:
            self._transport.write(self._out.read())

    def _fail(self, error: MedshardError) -> None:
        if not self._ready.done():
            self._ready.set_exception(ConnectionError(str(error)))
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self.close()
