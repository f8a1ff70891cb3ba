"""Sending to nodes that refuse, stall, break off or say too much: four servers behind real TLS, of which three have to take their shard."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Callable

import pytest
from tests.client.servers import Four, Server, Take, Talk, endless_head, hang_up, http, nonsense, stand_still

from medshard.upload import patience_s
from medshard_protocol.errors import Full, Unavailable
from medshard_protocol.messages import pack_error, pack_stored


async def test_every_shard_arrives_and_its_line_serves_the_next_read(four: Four) -> None:
    upload = await four.put(w=4)
    assert four.done == {0, 1, 2, 3}
    assert upload.failures() == {}
    assert [server.stored for server in four.servers] == [server.shard for server in four.servers]
    assert await four.get() == four.plain
    assert [server.connections for server in four.servers] == [1, 1, 1, 1]


def take_half_then(rest: Talk) -> Callable[[Server], Take]:
    def made(server: Server) -> Take:
        def take(connection: ssl.SSLSocket, begun: bytes) -> None:
            server.receive(connection, begun, len(server.shard) // 2)
            rest(connection, b"")

        return take

    return made


def take_all_then(rest: Talk) -> Callable[[Server], Take]:
    def made(server: Server) -> Take:
        def take(connection: ssl.SSLSocket, begun: bytes) -> None:
            server.receive(connection, begun, len(server.shard))
            rest(connection, b"")

        return take

    return made


def say_full(connection: ssl.SSLSocket, answer: bytes) -> None:
    connection.sendall(http(*pack_error(Full("no room"))))


def say_stored_otherwise(connection: ssl.SSLSocket, answer: bytes) -> None:
    connection.sendall(http(201, pack_stored(bytes(32), created=True)))


def say_much(connection: ssl.SSLSocket, answer: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(b"HTTP/1.1 201 X\r\nContent-Length: 99999999\r\n\r\n" + bytes(1_000_000))


def full_and_still(connection: ssl.SSLSocket, answer: bytes) -> None:
    say_full(connection, answer)
    stand_still(connection, answer)


def full_and_gone(connection: ssl.SSLSocket, answer: bytes) -> None:
    say_full(connection, answer)
    hang_up(connection, answer)


refusals = {
    "full, and reads no more": (take_half_then(full_and_still), "no room"),
    "full, and hangs up": (take_half_then(full_and_gone), ""),
    "full, after all": (take_all_then(say_full), "no room"),
    "hangs up": (take_half_then(hang_up), ""),
    "hangs up at the end": (take_all_then(hang_up), "broke off"),
    "says it is stored, in the middle": (take_half_then(say_stored_otherwise), ""),
    "stored other bytes": (take_all_then(say_stored_otherwise), "other bytes"),
    "says much": (take_all_then(say_much), "answered 201"),
    "nonsense": (take_all_then(nonsense), "HTTP"),
    "endless head": (take_all_then(endless_head), "longer than any"),
    "stands still": (take_half_then(stand_still), ""),
    "stands still at the end": (take_all_then(stand_still), "slower than the others"),
}


@pytest.mark.parametrize("name", refusals)
async def test_a_node_that_does_not_take_its_shard_is_left_behind_and_told(four: Four, name: str) -> None:
    made, why = refusals[name]
    four.servers[1].take = made(four.servers[1])
    began = time.monotonic()
    upload = await four.put()
    assert time.monotonic() - began < patience_s / 3
    assert four.done == {0, 2, 3}
    assert list(upload.failures()) == ["node1"]
    assert why in upload.failures()["node1"]


async def test_when_too_few_take_their_shards_nothing_is_acknowledged(four: Four) -> None:
    for server in four.servers[:2]:
        server.take = take_half_then(say_full)(server)
    with pytest.raises(Unavailable, match="only 2 institutions can take a shard"):
        await four.put()


async def test_an_upload_that_is_cancelled_leaves_no_thread_and_no_line(four: Four) -> None:
    for server in four.servers:
        server.take = take_half_then(stand_still)(server)
    task = asyncio.create_task(four.put())
    await asyncio.sleep(0.4)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < patience_s / 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("medshard-put")]
    assert not any(four.net.lines._idle.values())
