"""The answers of nodes that nobody has to trust: what is taken, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medshard_protocol.errors import Malformed
from medshard_protocol.http1 import Head, head_bytes_max, request_head, split_head


def answer(*lines: str, status: str = "HTTP/1.1 200 OK") -> bytes:
    return "\r\n".join((status, *lines, "", "")).encode()


def test_a_head_gives_status_length_and_what_follows() -> None:
    assert split_head(answer("Content-Length: 12", "Server: x") + b"rest") == (Head(200, 12, True), b"rest")
    assert split_head(answer("content-length:0", "Connection: close", status="HTTP/1.1 404 Not Found")) == (Head(404, 0, False), b"")


@pytest.mark.parametrize("cut", range(40))
def test_a_head_that_is_not_whole_is_waited_for(cut: int) -> None:
    assert split_head(answer("Content-Length: 1234567")[:cut]) is None


def test_a_head_without_an_end_is_not_waited_for() -> None:
    with pytest.raises(Malformed):
        split_head(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * head_bytes_max)


@pytest.mark.parametrize(
    "data",
    [
        answer(),
        answer("Content-Length: 1", "Content-Length: 2"),
        answer("Content-Length: 1", "Content-Length: 1"),
        answer("Content-Length: -1"),
        answer("Content-Length: +1"),
        answer("Content-Length: 1_000"),
        answer("Content-Length: 0x10"),
        answer("Content-Length: ²"),
        answer("Content-Length: " + "9" * 16),
        answer("Content-Length: "),
        answer("Transfer-Encoding: chunked"),
        answer("Content-Length: 1", "Transfer-Encoding: chunked"),
        answer("Content-Length: 1", "Content-Encoding: gzip"),
        answer("Content-Length: 1", " folded"),
        answer("Content-Length : 1"),
        answer("Content-Length: 1", "nothing"),
        answer("Content-Length: 1", status="HTTP/1.0 200 OK"),
        answer("Content-Length: 1", status="HTTP/1.1 100 Continue"),
        answer("Content-Length: 1", status="HTTP/1.1 2000 OK"),
        answer("Content-Length: 1", status="HTTP/1.1 20"),
        answer("Content-Length: 1", status="SSH-2.0-OpenSSH"),
    ],
)
def test_what_no_node_sends_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        split_head(data)


@given(st.binary(max_size=300))
def test_whatever_comes_is_a_head_or_waited_for_or_malformed(data: bytes) -> None:
    for tried in (data, b"HTTP/1.1 200 OK\r\n" + data + b"\r\n\r\n"):
        try:
            split_head(tried)
        except Malformed:
            continue


def test_a_request_cannot_be_made_to_hold_another() -> None:
    assert request_head("GET", "h:1", "/p", {"A": "b"}) == b"GET /p HTTP/1.1\r\nHost: h:1\r\nA: b\r\n\r\n"
    for path, header in (("/p\r\nX: y", "b"), ("/p", "b\r\n\r\nGET /q"), ("/ä", "b")):
        with pytest.raises(ValueError, match="printable"):
            request_head("GET", "h:1", path, {"A": header})
