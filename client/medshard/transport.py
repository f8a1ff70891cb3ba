"""Talking to nodes: TLS connections, requests, answers turned into values or errors.

Large shards do not come and go this way, but over lines of their own (line.py), which are kept here in between.

It knows who a node is (the roster, and its certificate under its institution's CA), and nothing of keys, files or codes.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final, Self

import aiohttp

from medshard import asking
from medshard.health import Health
from medshard.line import BrokenOff, Lines, Place
from medshard.tls import context_for
from medshard_protocol.errors import Absent, Malformed, MedshardError, Refused, Unavailable
from medshard_protocol.identity import is_issued_by, node_hostname
from medshard_protocol.ids import NodeId
from medshard_protocol.messages import unpack_error
from medshard_protocol.roster import Node, Roster, no_key
from medshard_protocol.rosters import roster_header

answer_bytes_max: Final = 96 * 1024 * 1024  # no answer that is read whole is larger; a hostile node must not fill our memory
connect_timeout_s: Final = 10.0
piece_bytes: Final = 256 * 1024  # a larger body goes out in pieces, so that other connections get their turn
over_lines: Final = frozenset({"/v1/read", "/v1/files", "/v1/lookup", "/v1/ledger/append"})  # what small puts and gets consist of


class Net:
    """Connections to the nodes of one roster. Use as an async context manager."""

    def __init__(self, roster: Roster, contexts: Mapping[int, ssl.SSLContext], certificate: bytes = b"") -> None:
        self._certificate = certificate
        self.health = Health()
        self.lines = Lines()
        self.follower: Callable[[], Awaitable[bool]] | None = None
        self._following: set[asyncio.Future[bool]] = set()
        self._session: aiohttp.ClientSession | None = None
        self.adopt(roster, contexts)

    def show(self, certificate: bytes, contexts: Mapping[int, ssl.SSLContext]) -> None:
        """Be known by this certificate from the next request on."""
        self._certificate = certificate
        self.adopt(self.roster, contexts)

    def adopt(self, roster: Roster, contexts: Mapping[int, ssl.SSLContext]) -> None:
        """Go by this roster from the next request on; ``contexts`` by place of the institution in it."""
        self.roster = roster
        self._contexts = contexts
        self._nodes = {node.id: node for node in roster.nodes}
        self._outside = _outside(roster, self._certificate)

    async def follow(self) -> bool:
        """Ask whether there is a newer roster, and go by it; say whether there was. For answers that make no sense under this one."""
        return self.follower is not None and await self.follower()

    def _hear(self, number: str) -> None:
        """A node says which roster it goes by. Only a reason to ask: what it is, quorums say."""
        if self.follower is not None and number.isascii() and number.isdigit() and len(number) < 11 and int(number) > self.roster.number:
            task = asyncio.ensure_future(self.follower())
            self._following.add(task)
            task.add_done_callback(self._following.discard)

    def holder(self, node: NodeId) -> Node:
        """The node with this id; for one that has left the roster, a stand-in that never answers."""
        known = self._nodes.get(node)
        if known is None:
            known = Node(node, f"{node.hex()[:8]} (has left)", len(self.roster.institutions), "", 0, no_key, no_key)
        return known

    def institution_of(self, node: Node) -> str:
        """The name of a holder's institution; empty for a node that has left."""
        return self.roster.institutions[node.institution].name if node.institution < len(self.roster.institutions) else ""

    async def __aenter__(self) -> Self:
        # No total timeout here: each call sets its own, and a long upload has only stall limits.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60), timeout=timeout, auto_decompress=False, read_bufsize=512 * 1024
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.lines.close()
        if self._session is not None:
            await self._session.close()

    async def call(
        self,
        node: Node,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        timeout_s: float,
        ok: Collection[int] = (200, 201, 204),
        anonymous: bool = False,
    ) -> bytes:
        """One request, its whole answer; ``anonymous``: without our certificate. Raises what the node answered, or Unavailable when it
        did not."""
        if path in over_lines and method == "POST" and not anonymous and len(body) <= piece_bytes:
            answer = await self._post(node, path, body, {}, timeout_s)
            if answer.status not in ok:
                raise unpack_error(answer.status, answer.body, node.name)
            return answer.body
        headers = {"Content-Length": str(len(body))} if len(body) > piece_bytes else {}
        content = _pieces(body) if headers else body or None
        async with self._open(node, method, path, content, headers, timeout_s, anonymous=anonymous) as response:
            data = await _read_all(response)
            if response.status not in ok:
                raise unpack_error(response.status, data, node.name)
            return data

    async def head(self, node: Node, path: str, header: str, *, timeout_s: float) -> str:
        """One header of a HEAD answer. Raises Absent where there is no such thing."""
        async with self._open(node, "HEAD", path, None, {}, timeout_s) as response:
            if response.status == 404:
                raise Absent(f"{node.name}: not there")
            if response.status not in (200, 204):
                raise Unavailable(f"{node.name}: answered {response.status}")
            return response.headers.get(header, "")

    def place(self, node: Node) -> Place:
        """Where a line to this node leads. Raises Unavailable for a node that has left, and Refused where no node knows this vault."""
        self.check_inside()
        node = self._present(node)
        return Place(node, self._contexts[node.institution])

    def is_informed(self, node: NodeId) -> bool:
        """Whether a holder certainly knows what is shown with a request for shards, so that it need not find out first."""
        return True

    def shard_headers(self) -> Mapping[str, str]:
        """What goes with each request for cells of a shard. Called from any thread."""
        return {}

    async def helped(self, node: Node, error: MedshardError, tries: int) -> bool:
        """Whether it is worth while to ask again for the cells that this holder refused for the ``tries``th time."""
        return False

    def _present(self, node: Node) -> Node:
        """A node under the roster of now: url and institution may be others than a moment ago. Raises Unavailable if it has left."""
        known = self._nodes.get(node.id)
        if known is None:
            raise Unavailable(f"{node.name}: no longer in the roster")
        return known

    def check_inside(self) -> None:
        """Raise Refused where the institution that certified this vault is not in the roster."""
        if self._outside is not None:
            raise Refused(
                self._outside, hint="what that means, and what can be done: docs/guides/membership.md, Vaults that are left behind"
            )

    def _anonymous(self, node: Node) -> ssl.SSLContext:
        institution = self.roster.institutions[node.institution]
        return context_for(institution.ca, former=institution.former)

    @asynccontextmanager
    async def _open(
        self,
        node: Node,
        method: str,
        path: str,
        body: bytes | AsyncIterator[memoryview] | None,
        headers: Mapping[str, str],
        timeout_s: float | None,
        *,
        anonymous: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None:
            raise RuntimeError("use Net as an async context manager")
        if not anonymous:
            self.check_inside()
        node = self._present(node)
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(
                    method,
                    node.url + path,
                    data=body,
                    headers=headers,
                    ssl=self._anonymous(node) if anonymous else self._contexts[node.institution],
                    server_hostname=node_hostname(node.id),
                    allow_redirects=False,
                ) as response,
            ):
                self._hear(response.headers.get(roster_header, ""))
                yield response
        except MedshardError:
            raise
        except (TimeoutError, aiohttp.ClientError, OSError, ssl.SSLError) as error:
            raise await self._failed(node, error, timeout_s, anonymous=anonymous) from None
        self.health.well(node.id)

    async def _post(self, node: Node, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> asking.Answer:
        """A short request over a line."""
        place = self.place(node)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await asking.post(self.lines, place, path, headers, body, answer_bytes_max)
        except (TimeoutError, BrokenOff, OSError, Malformed, Unavailable) as error:
            raise await self._failed(node, error, timeout_s) from None
        self._hear(answer.roster)
        self.health.well(node.id)
        return answer

    async def _failed(self, node: Node, error: Exception, timeout_s: float | None, *, anonymous: bool = False) -> MedshardError:
        """What to tell of a request that got no answer. Raises Refused where it never could have."""
        self.health.suspect(node.id)
        if isinstance(error, TimeoutError):
            return Unavailable(f"{node.name}: no answer within {timeout_s or connect_timeout_s:g} s")
        if not anonymous and hung_up(error):  # perhaps because of a change that we have not heard of
            await self.follow()
            self.check_inside()
        return Unavailable(f"{node.name}: {explain(error)}")


def _outside(roster: Roster, certificate: bytes) -> str | None:
    """Why no node of this roster knows a vault with this certificate, if so."""
    authorities = (ca for institution in roster.institutions for ca in (institution.ca, *institution.former))
    if not certificate or any(is_issued_by(certificate, ca) for ca in authorities):
        return None
    which = f"roster {roster.number} of {roster.origin}"
    return f"the institution that took this vault in is no longer in the consortium ({which}), or has another key: no node answers it"


def hung_up(error: BaseException | None) -> bool:
    """Whether a node ended the connection without an answer, as it does where it knows nobody who vouches for our certificate: under
    TLS 1.3 that comes to light after the handshake."""
    while error is not None and not isinstance(error, ssl.SSLError | aiohttp.ServerDisconnectedError | ConnectionResetError | BrokenOff):
        error = error.__cause__ or error.__context__
    return error is not None


async def _pieces(body: bytes) -> AsyncIterator[memoryview]:
    view = memoryview(body)
    for at in range(0, len(view), piece_bytes):
        yield view[at : at + piece_bytes]


async def _read_all(response: aiohttp.ClientResponse) -> bytes:
    chunks: list[bytes] = []
    total = 0
    async for chunk in response.content.iter_any():
        total += len(chunk)
        if total > answer_bytes_max:
            raise Unavailable("the node answered with more bytes than any answer has")
        chunks.append(chunk)
    return b"".join(chunks) if len(chunks) != 1 else chunks[0]


def without_name(node: Node, error: Exception) -> str:
    """What went wrong, for a list that names the node itself."""
    return str(error).removeprefix(f"{node.name}: ")


def explain(error: Exception) -> str:
    """Why a connection failed, for its user."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError | ssl.SSLError):
        return f"TLS refused ({error})"
    if isinstance(error, aiohttp.ClientConnectorError | socket.gaierror):
        return "cannot connect"
    if isinstance(error, BrokenOff):
        return "the connection broke off"
    return str(error) or type(error).__name__
