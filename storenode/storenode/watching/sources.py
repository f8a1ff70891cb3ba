"""Where the watch reads a log: a node of the roster, a web server with the same files, or a folder.

Law: a source fetches bytes, counts them as they come, and believes nothing. ``Absent`` is an answer; ``Unavailable`` is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

import aiohttp

from medshard_protocol.errors import Absent, Malformed, MedshardError, Refused, Unavailable
from medshard_protocol.ids import NodeId
from medshard_protocol.messages import unpack_error

answer_bytes_max: Final = 2 << 20  # a bundle has at most 513 KiB, a note of the largest roster 2 MiB
answer_wait_s: Final = 5.0


class Source(Protocol):
    """One place that shows the log. ``node`` is None where it is no mirror of the roster."""

    name: str
    node: NodeId | None

    async def get(self, path: str) -> bytes:
        """The bytes at a path below the log's prefix, such as ``checkpoint``. Raises Absent, Refused or Unavailable."""


class Ask(Protocol):
    """As ``PeerCaller``."""

    def __call__(self, node: NodeId, method: str, path: str, body: bytes, timeout_s: float) -> Awaitable[tuple[int, bytes]]:
        """(status, body)."""


class Mirror:
    """A node of the roster."""

    def __init__(self, name: str, node: NodeId, ask: Ask) -> None:
        self.name = name
        self.node: NodeId | None = node
        self._ask = ask
        self._id = node

    async def get(self, path: str) -> bytes:
        """Ask the node."""
        try:
            status, data = await self._ask(self._id, "GET", f"/log/{path}", b"", answer_wait_s)
        except (OSError, TimeoutError, aiohttp.ClientError) as error:
            raise Unavailable(f"{self.name}: {error or type(error).__name__}") from None
        if status != 200:
            raise _said(self.name, status, data)
        return data


class Site:
    """Static files behind http or https."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise Malformed(f"{url!r} is no http address")
        self.name = url.rstrip("/")
        self.node: NodeId | None = None
        self._session = session

    async def get(self, path: str) -> bytes:
        """Fetch the file."""
        try:
            async with asyncio.timeout(answer_wait_s), self._session.get(f"{self.name}/{path}", allow_redirects=False) as response:
                data = bytearray()
                async for chunk in response.content.iter_any():
                    data += chunk
                    if len(data) > answer_bytes_max:
                        raise Unavailable(f"{self.name}: an answer of more than {answer_bytes_max} bytes")
                if response.status != 200:
                    raise _said(self.name, response.status, bytes(data))
                return bytes(data)
        except (OSError, TimeoutError, aiohttp.ClientError) as error:
            raise Unavailable(f"{self.name}: {error or type(error).__name__}") from None


class Folder:
    """Static files on a disk, as ``storenode log export`` writes them."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self.node: NodeId | None = None
        self._folder = folder

    async def get(self, path: str) -> bytes:
        """Read the file."""
        try:
            with (self._folder / path).open("rb") as file:
                return file.read(answer_bytes_max)
        except FileNotFoundError:
            raise Absent(f"{self._folder / path} does not exist") from None
        except OSError as error:
            raise Unavailable(f"{self._folder / path} cannot be read ({error.strerror})") from None


def _said(name: str, status: int, data: bytes) -> MedshardError:
    if status == 404:
        return Absent(f"{name}: not there")
    if status >= 500:
        return unpack_error(status, data, name)
    return Refused(f"{name}: answered {status}")
