"""TLS between sockets and handlers: long bodies are carried beside aiohttp, and no connection, however slow, holds a thread."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from storenode import lending, wire
from storenode.lending import Gone, Stalled
from storenode.wire import Connection, TlsSite, body_size

size = 3_000_000
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Site:
    """A site with three resources: /aside/ takes bodies aside, /no/ does too but answers without them, /out sends ``size`` bytes."""

    port: int
    client: ssl.SSLContext
    said: list[str] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    stall_s: float = 20.0
    plain: bytes = field(default_factory=lambda: os.urandom(size))

    async def take(self, request: web.Request) -> web.Response:
        connection, body = request.transport, bytearray()
        if not isinstance(connection, Connection) or not connection.body_size:
            self.said.append("aiohttp")
            return web.Response(text=str(len(await request.read())))
        self.said.append("aside")
        assert request.content_length == 0
        assert body_size(request) == connection.body_size
        try:
            await connection.receive(body.extend, self.stall_s)
        except (Gone, Stalled) as error:
            self.said.append(type(error).__name__)
            connection.abort()
        self.received.append(bytes(body))
        return web.Response(text=str(len(body)))

    async def refuse(self, request: web.Request) -> web.Response:
        return web.Response(status=403)

    async def fail(self, request: web.Request) -> web.Response:
        connection = request.transport
        assert isinstance(connection, Connection)

        def full(block: memoryview) -> None:
            raise OSError("no space")

        with pytest.raises(OSError, match="no space"):
            await connection.receive(full, self.stall_s)
        return web.Response(status=507)

    async def give(self, request: web.Request) -> web.StreamResponse:
        connection = request.transport
        assert isinstance(connection, Connection)
        response = web.StreamResponse(headers={"Content-Length": str(4 * size)})
        await response.prepare(request)
        await response.write(b"")

        def read(at: int, room: memoryview) -> None:
            at %= size
            piece = (self.plain + self.plain)[at : at + len(room)]
            room[:] = piece

        try:
            await connection.send(4 * size, read, self.stall_s)
        except (Gone, Stalled) as error:
            self.said.append(type(error).__name__)
            connection.abort()
        return response

    async def connect(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.client, limit=1 << 24)

    async def heard(self, what: str) -> None:
        async with asyncio.timeout(60):
            while what not in self.said:
                await asyncio.sleep(0.01)


@pytest.fixture
async def site(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> AsyncIterator[Site]:
    server, client = contexts
    app, made = web.Application(client_max_size=0), Site(0, client)
    for path, handler in (("/aside/1", made.take), ("/aside/no", made.refuse), ("/aside/full", made.fail), ("/plain", made.take)):
        app.router.add_put(path, handler)
    app.router.add_get("/out", made.give)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    tls = TlsSite(runner, "127.0.0.1", 0, server, b"PUT /aside/")
    await tls.start()
    made.port = tls.port
    yield made
    await runner.cleanup()
    tls.close()


def head(path: str, length: int, *headers: str, method: str = "PUT") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: n", f"Content-Length: {length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    async with asyncio.timeout(60):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length"))
        return int(lines[0].split()[1]), await reader.readexactly(length)


@asynccontextmanager
async def connected(site: Site) -> AsyncIterator[Streams]:
    reader, writer = await site.connect()
    yield reader, writer
    writer.close()


@pytest.mark.parametrize("first", [0, 1, 100_000, size])
async def test_a_long_body_is_taken_aside_however_much_of_it_comes_with_its_head(site: Site, first: int) -> None:
    async with connected(site) as (reader, writer):
        for _ in range(2):
            writer.write(head("/aside/1", size) + site.plain[:first])
            await site.heard("aside") if first < size else None
            writer.write(site.plain[first:])
            assert await answer(reader) == (200, str(size).encode())
    assert site.received == [site.plain] * 2
    assert set(site.said) == {"aside"}


async def test_requests_of_other_kinds_go_the_usual_way_before_and_after(site: Site) -> None:
    async with connected(site) as (reader, writer):
        for path, length, way in (("/plain", size, "aiohttp"), ("/aside/1", 1000, "aiohttp"), ("/aside/1", size, "aside")) * 2:
            writer.write(head(path, length))
            writer.write(site.plain[:length])
            assert await answer(reader) == (200, str(length).encode())
            assert site.said.pop() == way


async def test_a_request_that_follows_at_once_is_answered_too(site: Site) -> None:
    async with connected(site) as (reader, writer):
        writer.write(head("/aside/1", size) + site.plain + head("/plain", 5) + b"hello")
        assert await answer(reader) == (200, str(size).encode())
        assert await answer(reader) == (200, b"5")


@pytest.mark.parametrize(
    "headers",
    [("Transfer-Encoding: chunked",), ("transfer-encoding : chunked",), (f"content-length: {size}",), ("content-length: 1",)],
)
async def test_a_head_that_says_the_length_twice_is_left_to_aiohttp(site: Site, headers: tuple[str, ...]) -> None:
    async with connected(site) as (reader, writer):
        writer.write(head("/aside/1", size, *headers) + site.plain[:1000])
        assert (await answer(reader))[0] == 400
    assert "aside" not in site.said


async def test_a_refusal_comes_through_and_the_connection_stands_once_the_body_has_passed(site: Site) -> None:
    async with connected(site) as (reader, writer):
        for _ in range(2):
            writer.write(head("/aside/no", size))
            assert (await answer(reader))[0] == 403
            writer.write(site.plain + head("/plain", 5) + b"hello")
            assert await answer(reader) == (200, b"5")


async def test_a_body_that_cannot_be_kept_ends_with_an_answer_and_the_connection_stands(site: Site) -> None:
    async with connected(site) as (reader, writer):
        writer.write(head("/aside/full", size) + site.plain + head("/plain", 5) + b"hello")
        assert (await answer(reader))[0] == 507
        assert await answer(reader) == (200, b"5")


async def test_who_does_not_send_the_body_of_a_refused_request_is_hung_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "refused_s", 0.2)
    async with connected(site) as (reader, writer):
        writer.write(head("/aside/no", size))
        assert (await answer(reader))[0] == 403
        await ended(reader)


async def test_a_body_that_stands_still_is_given_up(site: Site) -> None:
    site.stall_s = 0.2
    async with connected(site) as (reader, writer):
        writer.write(head("/aside/1", size) + site.plain[:1_000_000])
        await site.heard("Stalled")
        await ended(reader)


async def test_a_body_that_breaks_off_is_noticed_and_what_came_was_taken(site: Site) -> None:
    _, writer = await site.connect()
    writer.write(head("/aside/1", size) + site.plain[:1_000_000])
    await site.heard("aside")
    writer.close()
    await site.heard("Gone")
    assert site.received[0]
    assert site.plain.startswith(site.received[0])


async def test_slow_connections_hold_no_thread(site: Site) -> None:
    slow = [await site.connect() for _ in range(3 * lending.threads)]
    for number, (_, writer) in enumerate(slow):
        if number % 2:
            writer.write(head("/aside/1", size) + site.plain[:400_000])  # and no more
        else:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(head("/out", 0, method="GET"))
    async with connected(site) as (reader, writer):
        for _ in range(3):
            writer.write(head("/aside/1", size) + site.plain)
            assert await answer(reader) == (200, str(size).encode())
    for _, writer in slow:
        writer.transport.abort()


class Listening:
    """Work that is done when its wire has something to read."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    def go_on(self, wire: socket.socket, room: lending.Room, may_wait: Callable[[int], bool]) -> int:
        self.begun.set()
        return 0 if may_wait(select.POLLIN) else select.POLLIN


async def test_a_thread_that_waits_for_one_connection_lets_go_when_another_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "patience_s", 3600.0)
    threads = lending.Threads(1)
    (silent, far), (ready, talker) = socket.socketpair(), socket.socketpair()
    talker.send(b"!")
    work = Listening()
    waiting = asyncio.create_task(threads.carry(silent, work, 3600.0))
    await asyncio.to_thread(work.begun.wait)
    carried = asyncio.create_task(threads.carry(ready, Listening(), 3600.0))
    assert (await asyncio.wait([carried], timeout=60))[0]
    assert not waiting.done()
    far.send(b"!")
    await waiting
    threads.close()
    for each in (silent, far, ready, talker):
        each.close()


async def test_a_long_answer_comes_whole_and_another_request_after_it(site: Site) -> None:
    async with connected(site) as (reader, writer):
        for _ in range(2):
            writer.write(head("/out", 0, method="GET"))
            assert await answer(reader) == (200, site.plain * 4)


async def test_who_does_not_read_an_answer_is_hung_up_in_time(site: Site) -> None:
    site.stall_s = 0.2
    _, writer = await site.connect()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    site.plain = bytes(size)
    for _ in range(8):  # more than the kernel takes for both ends
        writer.write(head("/out", 0, method="GET"))
    await site.heard("Stalled")
    writer.transport.abort()


async def ended(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(60):
        try:
            while await reader.read(1 << 16):
                pass
        except (ConnectionError, ssl.SSLError):
            pass


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"])
async def test_who_does_not_shake_hands_is_hung_up(site: Site, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(wire, "handshake_s", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(said)
    await ended(reader)
    writer.close()


async def test_the_end_of_a_connection_is_said(site: Site) -> None:
    async with connected(site) as (reader, writer):
        writer.write(head("/plain", 5, "Connection: close") + b"hello")
        assert await answer(reader) == (200, b"5")
        async with asyncio.timeout(60):
            assert await reader.read() == b""  # an end without farewell would be an error here
