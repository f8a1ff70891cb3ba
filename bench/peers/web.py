"""Talking to a peer's client daemon over plain HTTP on loopback: a file in, a file or a range out, as its users would with curl."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.side import SideError

_block = 1 << 20
_timeout_s = 300.0


def request(port: int, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b"") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_timeout_s)
    try:
        connection.request(method, path, body=body, headers=dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def upload(port: int, path: str, source: Path) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_timeout_s, blocksize=_block)
    try:
        with open(source, "rb") as file:
            connection.request("PUT", path, body=file, headers={"Content-Length": str(os.path.getsize(source))})
            answer = connection.getresponse()
            body = answer.read()
    finally:
        connection.close()
    if answer.status not in (200, 201):
        raise SideError(f"PUT answered {answer.status}: {body[:300]!r}")
    return body


def download(port: int, path: str, target: Path) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_timeout_s)
    buffer = memoryview(bytearray(_block))
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        if answer.status != 200:
            raise SideError(f"GET answered {answer.status}: {answer.read(300)!r}")
        with open(target, "wb") as file:
            while count := answer.readinto(buffer):
                file.write(buffer[:count])
        if answer.length:  # of what was announced, this much never came
            raise SideError(f"GET ended {answer.length} bytes early")
    finally:
        connection.close()


def read_range(port: int, path: str, offset: int, length: int) -> bytes:
    status, body = request(port, "GET", path, {"Range": f"bytes={offset}-{offset + length - 1}"})
    if status != 206 or len(body) != length:
        raise SideError(f"a range of {length} bytes answered {status} with {len(body)} bytes")
    return body


def json_of(port: int, path: str) -> object:
    status, body = request(port, "GET", path)
    if status != 200:
        raise SideError(f"GET {path} answered {status}")
    value: object = json.loads(body)
    return value


def wait_until(ready: Callable[[], bool], what: str, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            if ready():
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise SideError(f"{what} was not up within {limit_s:.0f} s")
        time.sleep(0.2)
