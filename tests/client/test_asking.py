"""Short requests over a line: nodes that answer, hang up, say too much or nothing, and lines that are used again."""

from __future__ import annotations

import os
import socket
import ssl

import pytest
from tests.client.servers import Four, Talk, endless_head, hang_up, nonsense, stand_still

from medshard import asking
from medshard.line import Address
from medshard_protocol.errors import Unavailable


async def read(four: Four, body: bytes = b"which?", timeout_s: float = 10.0) -> bytes:
    return await four.net.call(four.net.roster.nodes[0], "POST", "/v1/read", body, timeout_s=timeout_s)


async def test_an_answer_comes_whole_and_its_line_serves_the_next_request(four: Four, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "block_bytes", 100_000)
    four.servers[0].said = os.urandom(345_678)
    for body in (b"which?", b"", b"and these"):
        assert await read(four, body) == four.servers[0].said + body
    assert four.servers[0].connections == 1


async def test_a_line_that_the_node_closed_meanwhile_is_no_failure_of_the_node(four: Four) -> None:
    def answer_once(connection: ssl.SSLSocket, answer: bytes) -> None:
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_RDWR)

    four.servers[0].talk = answer_once
    for _ in range(3):
        assert await read(four) == b"which?"
    assert four.servers[0].connections == 3
    assert not four.net.health.is_suspect(four.net.roster.nodes[0].id)


def announce_much(connection: ssl.SSLSocket, answer: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 X\r\nContent-Length: 99999999999\r\n\r\n")


def say_half(connection: ssl.SSLSocket, answer: bytes) -> None:
    connection.sendall(answer[:-3])
    connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("talk", [hang_up, nonsense, endless_head, announce_much, say_half])
async def test_a_node_that_talks_nonsense_is_unavailable_and_asked_anew_afterwards(four: Four, talk: Talk) -> None:
    honest, four.servers[0].talk = four.servers[0].talk, talk
    with pytest.raises(Unavailable):
        await read(four)
    assert four.net.health.is_suspect(four.net.roster.nodes[0].id)
    four.servers[0].talk = honest
    assert await read(four) == b"which?"
    assert four.servers[0].connections == 2


async def test_nobody_waits_longer_than_allowed_and_a_late_answer_is_taken_for_no_other(four: Four) -> None:
    honest, four.servers[0].talk = four.servers[0].talk, stand_still
    with pytest.raises(Unavailable, match="no answer within"):
        await read(four, timeout_s=0.2)
    four.servers[0].talk = honest
    assert await read(four, b"something else") == b"something else"
    assert four.servers[0].connections == 2


async def test_of_several_addresses_the_next_is_tried_where_one_refuses(four: Four, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = free.getsockname()

    async def addresses(host: str, port: int) -> list[Address]:
        return [(socket.AF_INET, nobody), (socket.AF_INET, nobody), (socket.AF_INET, (host, port))]

    monkeypatch.setattr(asking, "_addresses", addresses)
    assert await read(four) == b"which?"
