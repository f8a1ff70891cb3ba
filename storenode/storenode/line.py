"""A connection to another node for short requests, one after the other: TLS, and the least of HTTP/1.1 that they take.

A push to a mirror is 3 KB, and sixteen nodes bring each other a dozen for each entry. What an HTTP library and asyncio's TLS do for each
costs the sequencer more than its own work.

Law: an answer says its length once and comes as it is; everything else ends the connection. So does whatever goes wrong in the middle of a
request, and whoever stops waiting for its answer: nobody is given the answer to another request.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from medshard_protocol.errors import Malformed, MedshardError, Unavailable
from medshard_protocol.http1 import Head, head_bytes_max, request_head, split_head

piece_bytes: Final = 64 * 1024  # through OpenSSL at a time
_room: Final = memoryview(bytearray(piece_bytes))  # emptied before anything else runs


class Line(asyncio.Protocol):
    """Made by ``open``. Lives in one event loop."""

    def __init__(self, host: str, headers: Mapping[str, str], tls: ssl.SSLContext | None, hostname: str) -> None:
        self._host, self._headers = host, dict(headers)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = tls.wrap_bio(self._in, self._out, server_hostname=hostname) if tls is not None else None
        self._transport: asyncio.Transport
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None  # to the request that is under way
        self._came = bytearray()
        self._bytes_max = 0
        self._expected: Head | None = None  # of an answer that is not whole yet
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
            self._send(request_head("POST", self._host, path, {**self._headers, "Content-Length": str(len(body))}) + body)
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
            split = split_head(self._came)
            if split is None:
                return
            self._expected, self._came = split[0], bytearray(split[1])
        if max(self._expected.length, len(self._came)) > self._bytes_max:
            raise Malformed("a longer answer than there can be")
        if len(self._came) < self._expected.length:
            return
        if len(self._came) > self._expected.length:
            raise Malformed("more bytes than the answer announced")
        head, body, self._expected = self._expected, bytes(self._came), None
        self._came.clear()
        if not head.keep:
            self.close()
        answer.set_result((head.status, body))

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
