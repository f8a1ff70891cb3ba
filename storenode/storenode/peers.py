"""Calling other nodes of the roster, as this node: one session, one TLS context for each institution."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp

from medshard_protocol.errors import Unavailable
from medshard_protocol.identity import node_hostname
from medshard_protocol.ids import NodeId
from medshard_protocol.roster import Roster
from medshard_protocol.rosters import log_header
from storenode.line import Line

answer_bytes_max = 6 * 1024 * 1024  # nothing that nodes tell each other is larger; a hostile one must not fill our memory


class Peers:
    """A ``PeerCaller`` over TLS. Close it at the end."""

    def __init__(self, roster: Roster, contexts: Mapping[int, ssl.SSLContext]) -> None:
        self._roster = roster
        self._contexts = contexts
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=300), timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
        )

    def adopt(self, roster: Roster, contexts: Mapping[int, ssl.SSLContext]) -> None:
        """Go by this roster from the next call on. Open connections stay as they are."""
        self._roster, self._contexts = roster, contexts

    async def __call__(self, node: NodeId, method: str, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """(status, body) of the answer. Raises Unavailable when there is none."""
        target = self._roster.node(node)
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(
                    method,
                    target.url + path,
                    data=body or None,
                    headers={log_header: self._roster.origin},
                    ssl=self._contexts[target.institution],
                    server_hostname=node_hostname(node),
                    allow_redirects=False,
                ) as response,
            ):
                data = bytearray()
                async for chunk in response.content.iter_any():
                    data += chunk
                    if len(data) > answer_bytes_max:
                        raise Unavailable(f"{target.name}: an answer of more than {answer_bytes_max} bytes")
                return response.status, bytes(data)
        except TimeoutError:
            raise Unavailable(f"{target.name}: no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ssl.SSLError) as error:
            raise Unavailable(f"{target.name}: {_reason(error)}") from None

    @asynccontextmanager
    async def open(self, node: NodeId, method: str, path: str, body: bytes, timeout_s: float) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer whose head has come within the time, and whose body is still to be read. Raises Unavailable or Absent."""
        target = self._roster.node(node)
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._session.request(
                    method,
                    target.url + path,
                    data=body or None,
                    ssl=self._contexts[target.institution],
                    server_hostname=node_hostname(node),
                    allow_redirects=False,
                )
        except TimeoutError:
            raise Unavailable(f"{target.name}: no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ssl.SSLError) as error:
            raise Unavailable(f"{target.name}: {_reason(error)}") from None
        async with response:
            yield response

    async def connect(self, node: NodeId, timeout_s: float) -> Line:
        """A connection of one's own, for many short requests. Raises Unavailable where that does not work in time."""
        target = self._roster.node(node)
        tls, headers = self._contexts[target.institution], {log_header: self._roster.origin}
        try:
            return await Line.open(target.url, tls, node_hostname(node), headers, timeout_s)
        except TimeoutError:
            raise Unavailable(f"{target.name}: no answer within {timeout_s:g} s") from None
        except (OSError, UnicodeError) as error:
            said = error.strerror if isinstance(error, OSError) else ""
            raise Unavailable(f"{target.name}: {said or error or type(error).__name__}") from None

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, aiohttp.ClientConnectorSSLError):
        return error.os_error.strerror or "cannot connect"  # the error's own text names an SSLContext object
    return str(error) or type(error).__name__
