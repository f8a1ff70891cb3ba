"""multipart/related (RFC 2387, RFC 2046) as a stream: the parts of a request as they come, and the heads of parts that are sent.

Law: bytes in, events out; memory is one chunk and one boundary, whatever the size of a part. What is no multipart raises ``Malformed``.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from medshard_protocol.errors import Malformed

boundary_length_max: Final = 200  # RFC 2046 section 5.1.1 allows 70; Orthanc writes 73
head_bytes_max: Final = 8_192
_content_type: Final = re.compile(r"\s*multipart/related\s*(;.*)?", re.IGNORECASE | re.DOTALL)
_parameter: Final = re.compile(r';\s*([A-Za-z0-9-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;\s]+)')


@dataclass(frozen=True, slots=True)
class Begin:
    """A part begins; its headers, names in lower case."""

    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Data:
    """Some bytes of the part in hand."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class End:
    """The part in hand is whole."""


Event = Begin | Data | End


def parameters(header: str) -> dict[str, str] | None:
    """The parameters of a multipart/related content type; None for another type."""
    if not (match := _content_type.fullmatch(header)):
        return None
    return {name.lower(): value[1:-1] if value.startswith('"') else value for name, value in _parameter.findall(match[1] or "")}


def new_boundary() -> str:
    """A boundary that is in no part: 128 random bits."""
    return secrets.token_hex(16)


def head(boundary: str, content_type: str, *, first: bool, location: str = "", length: int | None = None) -> bytes:
    """What stands before a part."""
    lines = [f"--{boundary}", f"Content-Type: {content_type}"]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    if location:
        lines.append(f"Content-Location: {location}")
    return ("" if first else "\r\n").encode() + "\r\n".join([*lines, "", ""]).encode()


def tail(boundary: str) -> bytes:
    """What stands behind the last part."""
    return f"\r\n--{boundary}--\r\n".encode()


class Parser:
    """Feed it what comes; it gives events. ``finish`` when nothing more comes."""

    def __init__(self, boundary: str) -> None:
        if not 0 < len(boundary) <= boundary_length_max:
            raise Malformed("multipart: no boundary, or one of more than 200 characters")
        self._line = b"--" + boundary.encode("latin-1")
        self._mark = b"\r\n" + self._line
        self._rest = b"\r\n"  # so that a boundary at the very beginning is found like any other
        self._state = "preamble"

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that these bytes bring. Raises Malformed."""
        buffer = self._rest + data if self._rest else data
        at = 0
        while self._state != "done":
            if self._state == "head":
                end = buffer.find(b"\r\n\r\n", at)
                if end < 0:
                    if len(buffer) - at > head_bytes_max:
                        raise Malformed("multipart: a part's headers have more than 8 KiB")
                    break
                yield Begin(_headers(buffer[at:end]))
                at, self._state = end + 4, "body"
            elif self._state == "after":
                if len(buffer) - at < 2:
                    break
                if buffer[at : at + 2] == b"--":
                    self._state = "done"
                    break
                end = buffer.find(b"\r\n", at)
                if end < 0:
                    if len(buffer) - at > head_bytes_max:
                        raise Malformed("multipart: a boundary that does not end")
                    break
                if buffer[at:end].strip():
                    raise Malformed("multipart: something stands behind a boundary")
                at, self._state = end, "head-begin"
            elif self._state == "head-begin":
                if len(buffer) - at < 4:
                    break
                at, self._state = (at, "head") if buffer[at : at + 4] == b"\r\n\r\n" else (at + 2, "head")
            else:
                found = buffer.find(self._mark, at)
                # What may be the beginning of a boundary waits for more.
                stop = found if found >= 0 else max(at, len(buffer) - len(self._mark) + 1)
                if self._state == "body" and stop > at:
                    yield Data(memoryview(buffer)[at:stop])
                at = stop
                if found < 0:
                    break
                if self._state == "body":
                    yield End()
                at, self._state = found + len(self._mark), "after"
        self._rest = b"" if self._state == "done" else bytes(buffer[at:])

    def finish(self) -> None:
        """Raise Malformed unless the last boundary has come."""
        if self._state != "done":
            raise Malformed("multipart: it ends before its last boundary")


def _headers(data: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in data.decode("latin-1").strip("\r\n").split("\r\n"):
        name, colon, value = line.partition(":")
        if line and not colon:
            raise Malformed("multipart: a header without a colon")
        headers[name.strip().lower()] = value.strip()
    return headers
