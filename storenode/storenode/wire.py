"""TLS between the sockets and aiohttp's handlers: one buffer for what all connections of a node receive.

asyncio's own TLS gives each connection a read buffer of 256 KiB, idle or not; small ones instead make every byte that comes cost more.
On a selector event loop the kernel fills a buffer between ``get_buffer`` and ``buffer_updated`` and nothing runs in between, so here
all connections share one, and an idle one costs what OpenSSL keeps for it. What a connection says is not looked at: who may speak is
asked in app.py, and who is silent is shown out by the doorkeeper.

Where a head says that a long body follows, to be taken aside, aiohttp is told of an empty one, and a thread takes the body for the
handler (lending.py): what aiohttp's parser and stream cost for each byte is most of what a node's processor would do. Only heads that
say plainly what follows are treated so; from the first other one on, a connection is passed on as it comes. What is asked most often does
not come to aiohttp at all, if it comes whole, is written plainly (quick.py), and aiohttp has nothing of this connection left to answer.

Law: the handler hears of a connection only after the handshake, which has ``handshake_s``; its bytes go through OpenSSL in pieces that stay
in the processor's cache; a connection that this side ends gets a farewell, and ``farewell_s`` to answer it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger

from storenode.lending import Gone, Receiving, Sending, Threads, Work
from storenode.quick import Answer, Request, headers_of

keepalive_s: Final = 330.0  # without a request; clients keep idle connections for 240 s
handshake_s: Final = 30.0
farewell_s: Final = 30.0  # what is still unsent goes on meanwhile
refused_s: Final = 5.0  # to send the rest of a body that nobody wants
read_bytes: Final = 256 * 1024  # taken from a socket at a time
record_bytes: Final = 16 * 1024 + 512  # TLS 1.3: at most, with what is around it
piece_bytes: Final = 64 * 1024  # goes through OpenSSL's buffers, which grow to it and stay so, at a time
drain_look_s: Final = 0.01
aside_bytes_min: Final = 256 * 1024  # a body that is worth a thread
_length: Final = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})(?=\r\n)", re.IGNORECASE)
_unusual: Final = re.compile(rb"\r\n(?:transfer-encoding|upgrade|expect)[ \t]*:", re.IGNORECASE)
backlog: Final = 128  # connections that the system keeps until they are accepted

_log = logging.getLogger(__name__)


class Answered(AbstractAccessLogger):
    """In the place of aiohttp's log: lets a connection know that a request of it was answered."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Called by aiohttp behind each answer."""
        if isinstance(request.transport, Connection):
            request.transport.answered()


class TlsSite(web.BaseSite):
    """Where a node's runner listens. Long bodies of requests that begin with ``aside`` are for ``Connection.receive``."""

    def __init__(self, runner: web.BaseRunner, host: str, port: int, context: ssl.SSLContext, aside: bytes = b"PUT /v1/shards/") -> None:
        super().__init__(runner, ssl_context=context, backlog=backlog)
        self._address = (host, port)
        self.context = context
        self.aside = aside
        self.quick: Mapping[bytes, Answer] = {}  # by a request's first line
        self.threads = Threads()
        self.sealed = memoryview(bytearray(read_bytes))
        self.plain = memoryview(bytearray(read_bytes + record_bytes))  # a record may have been here but for its last byte
        self.stopped = False

    @property
    def name(self) -> str:
        """Its URL."""
        return "https://{}:{}".format(*self._address)

    @property
    def port(self) -> int:
        """Where it listens, once started."""
        return self._address[1]

    async def start(self) -> None:
        """Listen."""
        await super().start()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self), *self._address, backlog=self._backlog, reuse_address=True
        )
        self._address = (self._address[0], self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Listen no more. Connections that end from now on do so at once."""
        self.stopped = True
        await super().stop()

    def close(self) -> None:
        """After the runner's clean-up."""
        self.threads.close()

    def handler(self) -> web.RequestHandler:
        """A new handler of aiohttp's."""
        server = self._runner.server
        assert server is not None  # the runner was set up before the site was made
        handler: web.RequestHandler = server()
        return handler


class Connection(asyncio.BufferedProtocol, asyncio.Transport):
    """One accepted connection: a protocol to the socket's transport below, a transport to aiohttp's handler above."""

    def __init__(self, site: TlsSite) -> None:
        super().__init__()
        self._site = site
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._tls = site.context.wrap_bio(self._in, self._out, server_side=True)
        self._below: asyncio.Transport
        self._handler: web.RequestHandler | None = None
        self._ending = False
        self._timer: asyncio.TimerHandle
        self._plain = True  # whether all heads so far said plainly where the next one begins
        self._passing = 0  # bytes until there, of a body that is passed on
        self._dropping = 0  # the same, of one that nobody wants
        self._aside = self._left = 0  # bytes of the body that was taken aside last, and how many of them have not been received
        self._ahead = b""  # those that came with its head
        self._lent: socket.socket | None = None
        self._unanswered = 0  # requests that the handler has got
        self._answering: asyncio.Task[None] | None = None  # a request that it has not
        self._held = b""  # what came meanwhile
        self._leaving = False  # as soon as that is answered
        self._spoke_at = 0.0  # when the last answer went out, by the loop's clock
        self._idle: asyncio.TimerHandle | None = None  # from the first on that the handler has not seen

    # -- what the socket's transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a handshake."""
        assert isinstance(transport, asyncio.Transport)
        self._below = transport
        self._timer = asyncio.get_running_loop().call_later(handshake_s, transport.abort)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: read and forgotten before any other connection is read."""
        return self._site.sealed

    def buffer_updated(self, nbytes: int) -> None:
        """Take the bytes that came."""
        at, got, ended = 0, 0, self._ending  # the handler wants no more, but what it said may still be on its way
        while at < nbytes and not (ended or self._ending):
            self._in.write(self._site.sealed[at : min(at + piece_bytes, nbytes)])
            at += piece_bytes
            if self._handler is None and not self._shaken():
                continue
            got, ended = self._opened(got)
        if not self._ending:
            self._settle(got, ended)

    def eof_received(self) -> None:
        """The other side has said all; the transport below closes by itself."""
        if self._handler is not None:
            self._handler.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the handler."""
        self._ending = True
        self._timer.cancel()
        if self._idle is not None:
            self._idle.cancel()
        if self._handler is not None:
            self._handler.connection_lost(exc)

    def pause_writing(self) -> None:
        """The socket takes no more for now."""
        if self._handler is not None:
            self._handler.pause_writing()

    def resume_writing(self) -> None:
        """The socket has taken most of it."""
        if self._handler is not None:
            self._handler.resume_writing()

    # -- what the handler calls

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Seal and send. What the socket does not take waits below, as with any transport."""
        if self._left:
            self._refuse()  # an answer before the body was received
        view = memoryview(data)
        try:
            for at in range(0, 0 if self._ending else len(view), piece_bytes):
                self._tls.write(view[at : at + piece_bytes])
                self._below.write(self._out.read())
        except ssl.SSLError:  # the other side has ended this connection
            self.abort()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """As one."""
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        """Say farewell, and end when the other side has heard it."""
        if self._ending:
            return
        if self._answering is not None:
            self._leaving = True
            return
        if self._lent is not None:  # OpenSSL is not ours just now
            self.abort()
            return
        self._ending = True
        with contextlib.suppress(ssl.SSLError):  # the other side's farewell has not come yet, or never will
            self._tls.unwrap()
        self._below.write(self._out.read())
        self._timer.cancel()
        if self._site.stopped:
            self._below.close()
        else:
            # Closed at once, the kernel would answer bytes that still come with a reset, and the other side might not get what we said.
            self._below.resume_reading()
            self._timer = asyncio.get_running_loop().call_later(farewell_s, self._below.abort)

    def abort(self) -> None:
        """End now, without a word."""
        self._ending = True
        if self._lent is not None:
            with contextlib.suppress(OSError):
                self._lent.shutdown(socket.SHUT_RDWR)
        self._below.abort()

    def is_closing(self) -> bool:
        """Whether writing is in vain."""
        return self._ending or self._below.is_closing()

    def pause_reading(self) -> None:
        """Take no more from the socket."""
        self._below.pause_reading()

    def resume_reading(self) -> None:
        """Go on."""
        if self._lent is None and not self._left:
            self._below.resume_reading()

    def is_reading(self) -> bool:
        """Whether bytes are taken from the socket."""
        return self._below.is_reading()

    def get_write_buffer_size(self) -> int:
        """How many sealed bytes wait for the socket."""
        return self._below.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What is known of the connection."""
        if name == "ssl_object":
            return self._tls
        if name == "sslcontext":
            return self._site.context
        return self._below.get_extra_info(name, default)

    # -- long bodies

    @property
    def body_size(self) -> int:
        """How long the body of this request is that was taken aside; 0 if none was."""
        return self._aside

    async def receive(self, take: Callable[[memoryview], None], stall_s: float) -> None:
        """Give all of the body that was taken aside to ``take``, in a thread, block by block.

        Raises Gone, Stalled when nothing comes for ``stall_s``, and what ``take`` raises.
        """
        ahead, self._ahead = self._ahead, b""
        work = Receiving(self._tls, self._in, self._left, ahead, take)
        try:
            await self._lend(work, stall_s)
        finally:
            self._left = work.left
            self.resume_reading()
            asyncio.get_running_loop().call_soon(self._catch_up)

    async def send(self, size: int, read: Callable[[int, memoryview], None], stall_s: float) -> None:
        """Send ``size`` bytes as ``read(offset, buffer)`` gives them, in a thread. Raises Gone, Stalled, and what ``read`` raises."""
        self._below.pause_reading()
        try:
            # The answer's head is on its way already, but to who has not read earlier answers; of that a transport tells its handler only.
            while self._below.get_write_buffer_size():  # noqa: ASYNC110
                await asyncio.sleep(drain_look_s)
            await self._lend(Sending(self._tls, self._out, size, read), stall_s)
        finally:
            self.resume_reading()

    async def _lend(self, work: Work, stall_s: float) -> None:
        if self.is_closing():
            raise Gone
        # A descriptor of our own: the loop may close its one at any time, and the number could be another connection's at once.
        self._lent = socket.socket(fileno=os.dup(self._below.get_extra_info("socket").fileno()))
        try:
            await self._site.threads.carry(self._lent, work, stall_s)
        finally:
            self._lent.close()
            self._lent = None

    # -- parts

    def _settle(self, got: int, ended: bool) -> None:
        """Pass on what was decrypted, and do what OpenSSL wants done."""
        if got:
            self._hand_on(bytes(self._site.plain[:got]))
        if self._out.pending:  # what is about keys, OpenSSL answers by itself
            self._below.write(self._out.read())
        if ended:
            self.close()

    def _catch_up(self) -> None:
        """A thread may have taken more from the socket than the body."""
        if not self.is_closing() and self._lent is None and not self._left:
            self._settle(*self._opened(0))

    def _hand_on(self, data: bytes) -> None:
        """Give the handler what came, but for a body that is taken aside or that nobody wants."""
        assert self._handler is not None
        if self._answering is not None:
            self._held += data
            self._below.pause_reading()
            return
        if self._dropping:
            data, self._dropping = data[self._dropping :], max(0, self._dropping - len(data))
            if self._dropping:
                return
            self._timer.cancel()
        if not self._plain or not data:
            pass
        elif self._passing:
            self._passing -= len(data)
            self._plain = self._passing >= 0
        else:
            data = self._look(data)
        if data:
            self._handler.data_received(data)

    def _look(self, data: bytes) -> bytes:
        """What the handler gets of bytes that begin with a head."""
        self._aside, end = 0, data.find(b"\r\n\r\n") + 4
        lengths = list(_length.finditer(data, 0, end))
        if end < 4 or len(lengths) > 1 or _unusual.search(data, 0, end):
            self._plain = False
            return data
        size, came = int(lengths[0][1]) if lengths else 0, len(data) - end
        if size == came and self._is_quick(data, end):
            return b""
        self._unanswered += 1
        if size < aside_bytes_min or came > size or not data.startswith(self._site.aside):
            self._passing = size - came
            self._plain = self._passing >= 0
            return data
        self._aside = self._left = size
        self._ahead = data[end:]
        self._below.pause_reading()
        digits = lengths[0].span(1)
        return data[: digits[0]] + b"0" * (digits[1] - digits[0]) + data[digits[1] : end]

    def _is_quick(self, data: bytes, end: int) -> bool:
        """Whether this request is answered here. The handler has nothing to do then, and who asks has taken all answers so far."""
        answer = self._site.quick.get(data[: data.find(b"\r\n")])
        if answer is None or self._unanswered or self._below.get_write_buffer_size():
            return False
        headers = headers_of(data[: end - 4])
        if headers is None:
            return False
        assert self._handler is not None, "made after the handshake"
        request = Request(headers, data[end:], self._tls, self._handler)
        self._answering = asyncio.get_running_loop().create_task(self._answer(answer, request))
        return True

    async def _answer(self, answer: Answer, request: Request) -> None:
        try:
            said = await answer(request)
        except Exception:
            _log.exception("a request was not answered")
            self.abort()
            return
        finally:
            self._answering = None
        if not self.is_closing():
            self.write(said)
        if self._leaving:
            self.close()
            return
        self._spoke_at = asyncio.get_running_loop().time()
        if self._idle is None and not self._ending:
            self._idle = asyncio.get_running_loop().call_later(keepalive_s, self._look_idle)
        if self._held:
            held, self._held = self._held, b""
            self._hand_on(held)
            self.resume_reading()

    def answered(self) -> None:
        """The handler has answered a request."""
        self._unanswered -= 1
        self._spoke_at = asyncio.get_running_loop().time()

    def _look_idle(self) -> None:
        """End a connection that nothing was asked on for long. The handler does so as well, from what it has heard."""
        loop = asyncio.get_running_loop()
        busy = self._unanswered or self._answering is not None
        left = keepalive_s if busy else self._spoke_at + keepalive_s - loop.time()
        if left > 0:
            self._idle = loop.call_later(left, self._look_idle)
        else:
            self.close()

    def _refuse(self) -> None:
        """Let the body that is still to come pass unheard, if it comes soon: the answer must not be lost, nor the connection."""
        self._dropping, self._left, self._ahead = self._left - len(self._ahead), 0, b""
        if self._dropping:
            self._timer = asyncio.get_running_loop().call_later(refused_s, self.abort)
        self.resume_reading()

    def _shaken(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError:
            self._ending = True
            self._below.write(self._out.read())  # why, for the other side
            self._below.close()
            return False
        self._timer.cancel()
        self._handler = self._site.handler()
        self._handler.connection_made(self)
        return True

    def _opened(self, got: int) -> tuple[int, bool]:
        """Decrypt what is here behind the first ``got`` bytes; how many there are then, and whether the other side has ended."""
        plain = self._site.plain
        try:
            while True:
                read: int | bytes = self._tls.read(len(plain) - got, plain[got:])
                if not read:
                    return got, True
                got += int(read)
        except ssl.SSLWantReadError:
            return got, False
        except ssl.SSLError:
            return got, True


def body_size(request: web.Request) -> int | None:
    """How long a request's body is, wherever it is; None if its head does not say."""
    connection = request.transport
    return (connection.body_size if isinstance(connection, Connection) else 0) or request.content_length
