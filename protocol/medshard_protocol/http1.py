"""The least of HTTP/1.1 that shards and pushes need (RFC 9112): the heads of requests and answers. Pure; no node is trusted here.

Law: an answer says its length in one Content-Length and comes as it is. Chunks, codings and interim answers, which no node sends
for them, are refused rather than understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from medshard_protocol.errors import Malformed
from medshard_protocol.rosters import roster_header

head_bytes_max: Final = 16 * 1024  # of a status line and all headers; ours take 300
length_digits_max: Final = 15  # of Content-Length: 1 PB, above any shard
_start: Final = b"HTTP/1.1 "
_end: Final = b"\r\n\r\n"
_roster: Final = roster_header.lower().encode()


@dataclass(frozen=True, slots=True)
class Head:
    """What precedes an answer's body: status, the body's bytes, whether the connection may be used again after them, and which roster the
    node says it goes by."""

    status: int
    length: int
    keep: bool
    roster: str = ""


def request_head(method: str, host: str, path: str, headers: Mapping[str, str]) -> bytes:
    """What precedes a request's body. Raises ValueError for what would break the lines."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    every = "".join(lines)
    if not (every.isprintable() and every.isascii()):
        raise ValueError("a request's lines are printable ASCII")
    return "\r\n".join(lines).encode("ascii") + _end


def split_head(data: bytes | bytearray) -> tuple[Head, bytes] | None:
    """An answer's head and what follows it, or None while the head is not whole. Raises Malformed."""
    if not data.startswith(_start[: len(data)]):
        raise Malformed("not an answer of HTTP/1.1")
    at = data.find(_end, 0, head_bytes_max)
    if at < 0:
        if len(data) >= head_bytes_max:
            raise Malformed("an answer's head is longer than any node's")
        return None
    return _parse(bytes(data[:at])), bytes(data[at + len(_end) :])


def _parse(head: bytes) -> Head:
    first, *lines = head.split(b"\r\n")
    rest = first.removeprefix(_start)
    status = rest[:3]
    if not (len(status) == 3 and status.isdigit() and rest[3:4] in (b" ", b"")) or status < b"200":
        raise Malformed("not an answer of HTTP/1.1")
    lengths: list[bytes] = []
    keep, roster = True, ""
    for line in lines:
        name, colon, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        if not colon or not name or name != name.strip():
            raise Malformed("a header is a name and a value")
        if name in (b"transfer-encoding", b"content-encoding"):
            raise Malformed("an answer that does not come as it is")
        if name == b"content-length":
            lengths.append(value)
        if name == b"connection":
            keep = value.lower() == b"keep-alive"
        if name == _roster:
            roster = value.decode("ascii", "replace")
    if len(lengths) != 1 or not lengths[0].isdigit() or len(lengths[0]) > length_digits_max:
        raise Malformed("an answer says its length once, as a number")
    return Head(int(status), int(lengths[0]), keep, roster)
