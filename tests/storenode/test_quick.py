"""What is answered below aiohttp: only what is written plainly, in its turn, and as aiohttp would have it answered."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import pytest
from aiohttp import web
from tests.storenode.test_wire import Streams, answer, ended

from storenode import wire
from storenode.quick import Request, answer_of, headers_of
from storenode.wire import Answered, TlsSite

long = 15_000_000  # more than two kernels' buffers


@dataclass
class Site:
    """A site with one resource, which says which way its answers come."""

    port: int
    client: ssl.SSLContext
    ways: list[str] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    answers: Callable[[bytes], bytes] = lambda body: body

    async def usual(self, request: web.Request) -> web.Response:
        self.ways.append("aiohttp")
        body = await request.read()
        await self.go.wait()
        return web.Response(body=self.answers(body))

    async def quick(self, request: Request) -> bytes:
        self.ways.append("quick")
        await self.go.wait()
        return answer_of(200, "text/plain", self.answers(request.body), 7)

    async def heard(self, *ways: str) -> None:
        async with asyncio.timeout(20):
            while self.ways != list(ways):
                await asyncio.sleep(0.01)


@pytest.fixture
async def site(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> AsyncIterator[Site]:
    server, client = contexts
    app, made = web.Application(client_max_size=0), Site(0, client)
    made.go.set()
    app.router.add_route("*", "/it", made.usual)
    runner = web.AppRunner(app, access_log_class=Answered, shutdown_timeout=0.2)
    await runner.setup()
    tls = TlsSite(runner, "127.0.0.1", 0, server)
    tls.quick = {b"POST /it HTTP/1.1": made.quick}
    await tls.start()
    made.port = tls.port
    yield made
    await runner.cleanup()
    tls.close()


@asynccontextmanager
async def connected(site: Site) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=site.client, limit=1 << 24)
    yield reader, writer
    writer.close()


def asked(body: bytes, *headers: str, method: str = "POST", version: str = "1.1", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    lines = [f"{method} /it HTTP/{version}", "Host: n", f"Content-Length: {size}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def test_both_ways_take_turns_on_one_connection(site: Site) -> None:
    async with connected(site) as (reader, writer):
        for way, request in (("quick", asked(b"one")), ("aiohttp", asked(b"one", method="PUT")), ("quick", asked(b"one"))) * 2:
            writer.write(request)
            assert await answer(reader) == (200, b"one")
            assert site.ways.pop() == way


@pytest.mark.parametrize(
    "request_",
    [
        asked(b"one", "Accept: */*"),
        asked(b"one", "Content-Encoding: identity"),
        asked(b"one", "Connection: close"),
        asked(b"one", "Medshard-Emergency: eA"),
        asked(b"one", "Medshard-Access: 1", "medshard-access: 2"),
        asked(b"one", "Medshard-Access: \xe9"),
        asked(b"one", "Medshard-Checkpoint: " + "x" * 8180, version="1.1"),
        asked(b"one", version="1.0"),
    ],
)
async def test_what_is_written_in_another_way_is_left_to_aiohttp(site: Site, request_: bytes) -> None:
    async with connected(site) as (reader, writer):
        writer.write(request_)
        assert (await answer(reader))[0] in (200, 400)
    assert "quick" not in site.ways


async def test_a_body_that_comes_later_is_left_to_aiohttp(site: Site) -> None:
    async with connected(site) as (reader, writer):
        writer.write(asked(b"o", length=3))
        await site.heard("aiohttp")
        writer.write(b"ne")
        assert await answer(reader) == (200, b"one")


async def test_two_requests_at_once_are_answered_in_their_order(site: Site) -> None:
    async with connected(site) as (reader, writer):
        writer.write(asked(b"one") + asked(b"two"))
        assert [await answer(reader), await answer(reader)] == [(200, b"one"), (200, b"two")]


@pytest.mark.parametrize("first", ["POST", "PUT"])
@pytest.mark.parametrize("second", ["POST", "PUT"])
async def test_what_comes_while_an_answer_is_made_waits_for_its_turn(site: Site, first: str, second: str) -> None:
    site.go.clear()
    async with connected(site) as (reader, writer):
        writer.write(asked(b"one", method=first))
        await site.heard("quick" if first == "POST" else "aiohttp")
        for body in (b"two", b"three"):
            writer.write(asked(body, method=second))
            await asyncio.sleep(0.03)
            assert len(site.ways) == 1
        site.go.set()
        assert [(await answer(reader))[1] for _ in range(3)] == [b"one", b"two", b"three"]


async def test_who_says_farewell_in_the_middle_harms_nobody(site: Site) -> None:
    site.go.clear()
    async with connected(site) as (reader, writer):
        writer.write(asked(b"one"))
        await site.heard("quick")
        writer.close()
        await asyncio.sleep(0.05)
        site.go.set()
        await ended(reader)
    async with connected(site) as (reader, writer):
        writer.write(asked(b"one"))
        assert await answer(reader) == (200, b"one")


async def test_an_idle_connection_is_ended_even_if_aiohttp_never_heard_of_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "keepalive_s", 0.1)
    async with connected(site) as (reader, writer):
        for _ in range(3):
            writer.write(asked(b"one"))
            assert await answer(reader) == (200, b"one")
        await ended(reader)


async def test_an_answer_that_cannot_be_made_ends_the_connection(site: Site) -> None:
    def fail(body: bytes) -> bytes:
        raise LookupError("a mistake of ours")

    site.answers = fail
    async with connected(site) as (reader, writer):
        writer.write(asked(b"one"))
        await ended(reader)


async def test_who_takes_no_answers_is_not_given_more_of_them(site: Site) -> None:
    site.answers = lambda body: bytes(long)
    async with connected(site) as (reader, writer):
        transport = cast(asyncio.Transport, writer.transport)
        transport.pause_reading()
        for ways in (["quick"], ["quick", "aiohttp"], ["quick", "aiohttp"]):
            writer.write(asked(b"one"))
            await site.heard(*ways)
        transport.resume_reading()
        for _ in range(3):
            assert len((await answer(reader))[1]) == long


@pytest.mark.parametrize("head", [b"POST / HTTP/1.1\r\nHost", b"POST / HTTP/1.1\r\n\r\nHost: n", b"POST / HTTP/1.1\r\nHost: a\nb: c"])
def test_a_head_that_is_not_clear_is_not_understood(head: bytes) -> None:
    assert headers_of(head) is None


def test_headers_are_known_by_the_names_that_we_give_them() -> None:
    assert headers_of(b"POST / HTTP/1.1\r\nhost: n\r\nMEDSHARD-ACCESS:  7 ") == {"Host": "n", "Medshard-Access": "7"}


def test_an_answer_says_when_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storenode.quick.time.time", lambda: 784111777.9)
    assert b"\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n" in answer_of(200, "text/plain", b"", 0)
