"""What is asked most often, answered below aiohttp: reading a request's head, and writing an answer's. Pure.

What aiohttp does for each request costs more than a small read does, and a small get is ten of them. Here a request is understood only if
it is written plainly: known headers, each once, printable. Everything else is aiohttp's, which knows all of HTTP; both ways lead to the
same handler.

Law: ``headers_of`` gives None wherever it is not certain, and nothing is refused here.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Final, NamedTuple

from aiohttp import web

from medshard_protocol.rosters import log_header, roster_header
from medshard_protocol.sharing import access_header, checkpoint_header
from medshard_protocol.vouchers import vouchers_header

line_bytes_max: Final = 8190  # as aiohttp has it
_known: Final = {
    name.lower(): name for name in ("Host", "Content-Length", "Content-Type", log_header, access_header, checkpoint_header, vouchers_header)
}


_phrases: Final = {status.value: status.phrase for status in HTTPStatus}


class Request(NamedTuple):
    """A request whose body has come in full."""

    headers: Mapping[str, str]  # by their names as we write them
    body: bytes
    tls: ssl.SSLObject
    protocol: web.RequestHandler  # whose connection it is


Answer = Callable[[Request], Awaitable[bytes]]  # gives all that is to be sent, and raises nothing


def headers_of(head: bytes) -> dict[str, str] | None:
    """The headers of a request, from its head without the empty line; None if any of it is unusual."""
    try:
        lines = head.decode("ascii").split("\r\n")
    except UnicodeDecodeError:
        return None
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        known = _known.get(name.lower())
        if known is None or known in headers or not colon or len(line) > line_bytes_max or not value.isprintable():
            return None
        headers[known] = value.strip(" ")
    return headers


def answer_of(status: int, media_type: str, body: bytes, roster: int) -> bytes:
    """An answer as it is sent."""
    head = (
        f"HTTP/1.1 {status} {_phrases.get(status, '')}\r\n{roster_header}: {roster}\r\nContent-Type: {media_type}\r\n"
        f"Content-Length: {len(body)}\r\nDate: {_date()}\r\n\r\n"
    )
    return head.encode("ascii") + body


_dated: tuple[int, str] = 0, ""


def _date() -> str:
    """The time of now; made once a second."""
    global _dated
    now = int(time.time())
    if _dated[0] != now:
        _dated = now, formatdate(now, usegmt=True)
    return _dated[1]
