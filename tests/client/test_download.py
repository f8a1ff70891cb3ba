"""Reading from nodes that lie, stall, drip, break off or say too much: four servers behind real TLS, of which any two are enough."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from dataclasses import replace

import pytest
from tests.client.servers import Four, Talk, cell, endless_head, hang_up, http, nonsense, stand_still

from medshard import download
from medshard.download import Arrived, Download, patience_s
from medshard.transport import Net
from medshard_protocol.errors import Absent, MedshardError, Unavailable
from medshard_protocol.messages import SpanHead, pack_error
from medshard_protocol.roster import Node
from medshard_protocol.shards import digests, split


async def test_every_stripe_comes_back_and_lines_are_used_again(four: Four) -> None:
    assert await four.get() == four.plain
    per = four.manifest.layout.segment_plain
    assert await four.get(range(3, 5)) == four.plain[3 * per : 5 * per]
    assert await four.get(range(20, 21)) == four.plain[20 * per :]
    assert [server.connections for server in four.servers] == [1, 1, 0, 0]


async def test_two_downloads_at_once_have_lines_of_their_own(four: Four) -> None:
    assert await asyncio.gather(four.get(), four.get()) == [four.plain] * 2
    assert [server.connections for server in four.servers] == [2, 2, 0, 0]


async def test_a_line_that_its_node_closed_meanwhile_is_made_anew(four: Four) -> None:
    def answer_and_close(connection: ssl.SSLSocket, answer: bytes) -> None:
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_RDWR)

    four.servers[0].talk = answer_and_close
    for _ in range(3):
        assert await four.get() == four.plain
    assert [server.connections for server in four.servers] == [3, 1, 0, 0]


def half_then(rest: Talk) -> Talk:
    def talk(connection: ssl.SSLSocket, answer: bytes) -> None:
        connection.sendall(answer[: len(answer) // 2])
        rest(connection, answer)

    return talk


def say_it_is_shorter(connection: ssl.SSLSocket, answer: bytes) -> None:
    connection.sendall(http(200, answer.partition(b"\r\n\r\n")[2][:-1]))


def say_it_is_longer(connection: ssl.SSLSocket, answer: bytes) -> None:
    connection.sendall(http(200, answer.partition(b"\r\n\r\n")[2] + b"!"))


def endless_error(connection: ssl.SSLSocket, answer: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(b"HTTP/1.1 404 X\r\nContent-Length: 99999999999\r\n\r\n")
        while True:
            connection.sendall(bytes(65536))


def long_proof(connection: ssl.SSLSocket, answer: bytes) -> None:
    connection.sendall(http(200, b"\xff\xff\xff\xff" + bytes(1000)))


def chunks(connection: ssl.SSLSocket, answer: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")


def other_cells(connection: ssl.SSLSocket, answer: bytes) -> None:
    connection.sendall(http(200, answer.partition(b"\r\n\r\n")[2].replace(b"\x00\x15\xc5", b"\x01\x15\xc5", 1)))


def absent(connection: ssl.SSLSocket, answer: bytes) -> None:
    connection.sendall(http(*pack_error(Absent("this shard is not here"))))


broken_off = half_then(hang_up)
lies = [absent, broken_off, hang_up, say_it_is_shorter, say_it_is_longer, endless_head, endless_error, long_proof]
lies += [nonsense, chunks, other_cells]


@pytest.mark.parametrize("talk", lies, ids=lambda talk: talk.__name__)
async def test_a_node_that_does_not_answer_as_it_should_is_replaced(four: Four, talk: Talk) -> None:
    four.servers[0].talk = talk
    began = time.monotonic()
    assert await four.get() == four.plain
    assert time.monotonic() - began < patience_s / 3
    assert not four.bad
    four.servers[0].talk = lambda connection, answer: connection.sendall(answer)
    assert await four.get() == four.plain  # and what is left on its line does no harm


@pytest.mark.parametrize("talk", lies, ids=lambda talk: talk.__name__)
async def test_when_too_few_answer_as_they_should_the_error_names_them(four: Four, talk: Talk) -> None:
    for server in four.servers[:3]:
        server.talk = talk
    with pytest.raises(Unavailable) as told:
        await four.get()
    assert "2 of 4 shards are needed and only 1 can be had" in str(told.value)
    assert all(f"node{number}: " in str(told.value) for number in range(3))


async def test_a_flipped_bit_costs_its_node_and_is_told(four: Four) -> None:
    shard = bytearray(four.servers[1].shard)
    shard[7 * cell + 99] ^= 1
    four.servers[1].shard, honest = bytes(shard), four.servers[1].shard
    digest = [digests["blake3"](part) for part in split(honest, cell)]
    four.servers[1].talk = lambda connection, answer: connection.sendall(_with_digests(answer, digest))
    assert await four.get() == four.plain
    assert four.bad == [("node1", 1, 7)]
    assert len(four.servers[1].requests) == 1


def _with_digests(answer: bytes, known: list[bytes]) -> bytes:
    head, _, body = answer.partition(b"\r\n\r\n")
    size = int.from_bytes(body[:4], "big")
    said = SpanHead.from_bytes(body[4 : 4 + size])
    return head + b"\r\n\r\n" + body[:4] + replace(said, digests=b"".join(known)).to_bytes() + body[4 + size :]


async def test_digests_of_another_shard_are_damage(four: Four) -> None:
    four.servers[1].shard = bytes(len(four.servers[1].shard))
    assert await four.get() == four.plain
    assert four.bad == [("node1", 1, 0)]


async def test_a_node_that_stands_still_is_replaced_long_before_patience_ends(four: Four) -> None:
    for talk in (
        half_then(lambda connection, answer: four.servers[0].closed.wait() and None),
        lambda *_: four.servers[0].closed.wait() and None,
    ):
        four.servers[0].talk = talk
        four.net.health.well(four.net.roster.nodes[0].id)
        four.net.health.kept_up(four.net.roster.nodes[0].id)
        began = time.monotonic()
        assert await four.get() == four.plain
        assert time.monotonic() - began < patience_s / 3
        assert four.net.health.is_suspect(four.net.roster.nodes[0].id)


async def test_a_node_that_drips_is_replaced(four: Four) -> None:
    def drip(connection: ssl.SSLSocket, answer: bytes) -> None:
        with contextlib.suppress(OSError):
            for at in range(0, len(answer), 2000):
                connection.sendall(answer[at : at + 2000])
                time.sleep(0.05)

    four.servers[0].talk = drip
    began = time.monotonic()
    assert await four.get() == four.plain
    assert time.monotonic() - began < patience_s / 3
    assert four.net.health.is_slow(four.net.roster.nodes[0].id)
    assert not four.net.health.is_suspect(four.net.roster.nodes[0].id)


async def test_a_holder_that_failed_is_tried_again_after_a_rest(four: Four) -> None:
    came: list[float] = []

    def hang_up_twice(connection: ssl.SSLSocket, answer: bytes) -> None:
        came.append(time.monotonic())
        if len(came) < 3:
            connection.close()
        else:
            connection.sendall(answer)

    for server in four.servers[2:]:
        server.close()
    four.servers[0].talk = hang_up_twice
    assert await four.get() == four.plain
    assert came[1] - came[0] > 0.15
    assert came[2] - came[1] > 0.3


async def test_a_node_that_does_not_even_shake_hands_is_replaced(four: Four) -> None:
    mute = socket.create_server(("127.0.0.1", 0))  # takes connections, says nothing
    first = four.net.roster.nodes[0]
    moved = replace(first, url=f"https://127.0.0.1:{mute.getsockname()[1]}")
    four.net.adopt(replace(four.net.roster, nodes=(moved, *four.net.roster.nodes[1:])), four.net._contexts)
    began = time.monotonic()
    assert await four.get() == four.plain
    assert time.monotonic() - began < patience_s / 3
    mute.close()


async def test_another_nodes_certificate_is_refused(four: Four) -> None:
    nodes = four.net.roster.nodes
    moved = [replace(nodes[number], url=nodes[3].url) for number in range(3)]
    four.net.adopt(replace(four.net.roster, nodes=(*moved, nodes[3])), four.net._contexts)
    with pytest.raises(Unavailable, match="node0: TLS refused"):
        await four.get()
    assert four.servers[3].requests == [] or all(b"/3?" in request.partition(b"\r\n")[0] for request in four.servers[3].requests)


async def test_a_download_that_is_cancelled_leaves_no_thread_and_no_line(four: Four) -> None:
    for server in four.servers:
        server.talk = half_then(stand_still)
    task = asyncio.create_task(four.get())
    await asyncio.sleep(0.3)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < patience_s / 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("medshard-get")]
    assert not any(four.net.lines._idle.values())


async def test_what_the_taker_raises_ends_the_download(four: Four) -> None:
    def take(arrived: Arrived) -> None:
        raise OSError(28, "No space left on device")

    began = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        await Download(four.net, four.manifest).run(range(21), take)
    assert time.monotonic() - began < patience_s / 3


async def test_a_slow_taker_holds_everything_back_and_nobody_is_blamed(four: Four, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "window_stripes", 3)
    taken: list[int] = []
    buffers: set[int] = set()

    def take(arrived: Arrived) -> None:
        time.sleep(0.7 if arrived.number == 4 else 0.02)
        taken.append(arrived.number)
        buffers.add(id(arrived.stripe.obj))

    await Download(four.net, four.manifest).run(range(21), take)
    assert taken == list(range(21))
    assert len(buffers) <= 3
    assert [server.connections for server in four.servers] == [1, 1, 0, 0]


async def test_a_refusal_that_can_be_met_is_met_and_the_request_repeated(four: Four) -> None:
    class Admitted(Net):
        shown = ""

        def shard_headers(self) -> dict[str, str]:
            return {"Medshard-Access": self.shown} if self.shown else {}

        async def helped(self, node: Node, error: MedshardError, tries: int) -> bool:
            assert isinstance(error, Absent)
            self.shown = "7"
            return tries == 1

    def ask_for_a_ticket(connection: ssl.SSLSocket, answer: bytes) -> None:
        request = four.servers[0].requests[-1]
        connection.sendall(answer if b"Medshard-Access: 7\r\n" in request else http(*pack_error(Absent("show your ticket"))))

    four.servers[0].talk = ask_for_a_ticket
    net = Admitted(four.net.roster, four.net._contexts)
    four.net.lines.close()
    four.net = net
    assert await four.get() == four.plain
    assert four.servers[0].connections == 1
    assert len(four.servers[0].requests) == 2
    net.lines.close()
