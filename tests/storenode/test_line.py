"""Short requests between nodes: what is no plain answer ends the connection, and nobody gets the answer to another request."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from medshard_protocol.errors import Malformed, Unavailable
from medshard_protocol.identity import node_certificate, public_key, to_pem
from storenode.identity import create_institution, key_pem
from storenode.line import Line
from storenode.peers import Peers

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
good = b"HTTP/1.1 200 OK\r\nDate: now\r\nContent-Length: 3\r\n\r\none"


@asynccontextmanager
async def node(answering: Answering, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Something that listens on a port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            await answering(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def asked(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))


def saying(*answers: bytes) -> Answering:
    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await asked(reader)
            writer.write(answer)
        await reader.read()

    return answering


async def opened(port: int) -> Line:
    return await Line.open(f"http://127.0.0.1:{port}", None, "", {"More": "1"}, 5.0)


async def test_one_request_after_the_other_goes_over_one_connection() -> None:
    heard = []

    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (good, b"HTTP/1.1 423 Locked\r\nContent-Length: 0\r\n\r\n", good.replace(b"200 OK", b"409")):
            heard.append(await asked(reader))
            for at in range(0, len(answer), 30):
                writer.write(answer[at : at + 30])
                await asyncio.sleep(0.001)

    async with node(answering) as port:
        line = await opened(port)
        assert await line.post("/it", b"first", 3, 5.0) == (200, b"one")
        assert await line.post("/it", b"", 3, 5.0) == (423, b"")
        assert await line.post("/it", bytes(300_000), 3, 5.0) == (409, b"one")
        line.close()
    assert heard[0] == f"POST /it HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nMore: 1\r\nContent-Length: 5\r\n\r\nfirst".encode()


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        good.replace(b"3", b"4").replace(b"one", b"four more"),
        good.replace(b"Date: now", b"Content-Length: 3"),
        good.replace(b"Date: now", b"Transfer-Encoding: chunked"),
        good.replace(b" 3", b" 5").replace(b"one", b"three"),
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 4000,
        good + b"more",
        b"",
    ],
)
async def test_an_answer_that_is_none_ends_the_connection(answer: bytes) -> None:
    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(answer)

    async with node(answering) as port:
        line = await opened(port)
        with pytest.raises((Malformed, Unavailable)):
            await line.post("/it", b"", 3, 5.0)
        with pytest.raises(Unavailable, match="closed"):
            await line.post("/it", b"", 3, 5.0)


async def test_what_nobody_asked_for_ends_the_connection() -> None:
    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(good)
        await asyncio.sleep(0.01)
        writer.write(good)
        await reader.read()

    async with node(answering) as port:
        line = await opened(port)
        assert await line.post("/it", b"", 3, 5.0) == (200, b"one")
        async with asyncio.timeout(20):
            while not line.closed:
                await asyncio.sleep(0.005)


async def test_who_says_that_it_was_the_last_answer_is_not_asked_again() -> None:
    async with node(saying(good.replace(b"Date: now", b"Connection: close"))) as port:
        line = await opened(port)
        assert await line.post("/it", b"", 3, 5.0) == (200, b"one")
        assert line.closed


@pytest.mark.parametrize("given_up", [False, True])
async def test_who_stops_waiting_hangs_up(given_up: bool) -> None:
    async with node(saying()) as port:
        line = await opened(port)
        asking = asyncio.create_task(line.post("/it", b"", 3, 20.0 if given_up else 0.02))
        await asyncio.sleep(0.01)
        if given_up:
            asking.cancel()
        with pytest.raises(asyncio.CancelledError if given_up else Unavailable):
            await asking
        assert line.closed


async def test_a_node_is_known_by_its_certificate(consortium: Any, tmp_path: Path) -> None:
    institution, roster = create_institution("Clinic"), consortium(4).roster
    key = consortium(4).key("tls")
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cadata=to_pem(institution.certificate))
    certificate = node_certificate(institution.key, institution.certificate, public_key(key), datetime.now(UTC), node_id=roster.nodes[1].id)
    (tmp_path / "server.pem").write_bytes(key_pem(key) + to_pem(certificate).encode())
    server.load_cert_chain(tmp_path / "server.pem")
    async with node(saying(good, good), server) as port:
        nodes = [replace(each, url=f"https://127.0.0.1:{port}") for each in roster.nodes]
        peers = Peers(replace(roster, nodes=tuple(nodes)), dict.fromkeys(range(4), client))
        try:
            line = await peers.connect(nodes[1].id, 5.0)
            assert [await line.post("/it", bytes(100_000), 3, 5.0) for _ in range(2)] == [(200, b"one")] * 2
            line.close()
            with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
                await peers.connect(nodes[2].id, 5.0)
        finally:
            await peers.close()
    with pytest.raises(Unavailable):
        await peers.connect(nodes[1].id, 5.0)
