"""Who connects and asks for nothing is shown out; who has asked, or is still sending, is not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from storenode import logs
from storenode.doorkeeper import Doorkeeper

silence_s = 0.2


@pytest.fixture
async def port(unused_tcp_port: int) -> AsyncIterator[int]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))

    app = web.Application()
    doorkeeper = Doorkeeper(app, silence_s=silence_s)
    app.router.add_route("*", "/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    assert runner.server is not None
    server = runner.server
    await web.TCPSite(runner, "127.0.0.1", unused_tcp_port).start()
    task = asyncio.create_task(doorkeeper.watch(lambda: server.connections))
    yield unused_tcp_port
    task.cancel()
    await runner.cleanup()


async def is_hung_up(reader: asyncio.StreamReader, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            return await reader.read(1000) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: n\r\nX-Slow: "])
async def test_who_does_not_end_a_first_request_is_hung_up_on(port: int, said: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    assert await is_hung_up(reader, silence_s * 4)
    writer.close()


async def test_who_has_asked_may_wait_before_asking_again(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: n\r\n\r\n")
    assert (await reader.read(1000)).startswith(b"HTTP/1.1 200")
    assert not await is_hung_up(reader, silence_s * 3)
    writer.close()


async def test_a_first_body_may_take_its_time(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PUT / HTTP/1.1\r\nHost: n\r\nContent-Length: 2\r\n\r\na")
    assert not await is_hung_up(reader, silence_s * 3)
    writer.write(b"b")
    assert (await reader.read(1000)).startswith(b"HTTP/1.1 200")
    writer.close()


def test_bytes_that_are_no_http_are_not_an_error_of_ours() -> None:
    def record(error: Exception) -> logging.LogRecord:
        told = (type(error), error, None)
        return logging.LogRecord("aiohttp.server", logging.ERROR, "", 0, "Error handling request", (), told)

    assert not logs._is_ours(record(BadHttpMessage("no HTTP")))
    assert logs._is_ours(record(ValueError("a bug")))
