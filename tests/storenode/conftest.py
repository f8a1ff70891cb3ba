"""Ledgers of several nodes in one process, joined by real HTTP servers on loopback."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from tests.conftest import pq_key_named
from tests.storenode.auditing import world  # noqa: F401 - a fixture

from medshard_protocol.entries import Enrol, Entry, Register
from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.identity import public_key, to_pem
from medshard_protocol.ids import Key, NodeId
from medshard_protocol.messages import pack_error
from storenode.callers import peer_key
from storenode.identity import Peer, create_institution, key_pem
from storenode.ledger import Ledger
from storenode.ledger.channel import Channel
from storenode.ledger.mirror import Mirror
from storenode.ledger.wire import Push
from storenode.line import Line


@dataclass(frozen=True)
class Caller:
    """Node ``number`` calling others."""

    net: Net
    number: int | None

    async def __call__(self, node: NodeId, method: str, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(timeout_s):
                return await self.net.request(self.net.number(node), method, path, body, as_node=self.number)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(f"no answer ({error!r})") from None

    async def connect(self, node: NodeId, timeout_s: float) -> Line:
        try:
            number = self.net.number(node)
            return await Line.open(self.net.url(number), None, "", self.net.headers(self.number), timeout_s)
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"no connection ({error!r})") from None


@dataclass
class Net:
    """A consortium's ledgers. Nodes are numbered as in the roster; node 0 is the sequencer."""

    consortium: object
    folder: Path
    ledgers: dict[int, Ledger] = field(default_factory=dict)
    frozen: set[int] = field(default_factory=set)  # takes connections and never answers
    standbys: set[int] = field(default_factory=set)  # who takes over when node 0 is gone
    engines: dict[int, str] = field(default_factory=dict)
    pushes: list[tuple[int, Push]] = field(default_factory=list)  # what came to which mirror
    _runners: dict[int, web.AppRunner] = field(default_factory=dict)
    _ports: dict[NodeId, int] = field(default_factory=dict)
    _thawed: asyncio.Event = field(default_factory=asyncio.Event)
    _count: int = 0

    def __post_init__(self) -> None:
        self.roster = self.consortium.roster
        self.session = aiohttp.ClientSession()
        self._numbers = {node.id: number for number, node in enumerate(self.roster.nodes)}

    def number(self, node: NodeId) -> int:
        return self._numbers[node]

    def url(self, number: int) -> str:
        port = self._ports.get(self.roster.nodes[number].id)
        if port is None:
            raise ConnectionRefusedError
        return f"http://127.0.0.1:{port}"

    def headers(self, as_node: int | None) -> dict[str, str]:
        return {} if as_node is None else {"As-Node": str(as_node)}

    async def request(self, number: int, method: str, path: str, body: bytes = b"", as_node: int | None = None) -> tuple[int, bytes]:
        async with self.session.request(method, self.url(number) + path, data=body, headers=self.headers(as_node)) as response:
            return response.status, await response.read()

    def channel(self, number: int, as_node: int | None = 0) -> Channel:
        """A connection to a mirror such as the sequencer has."""
        return Channel(self.roster.nodes[number].id, Caller(self, as_node))

    async def push(self, number: int, body: bytes, as_node: int | None = 0) -> tuple[int, bytes]:
        """Say one thing on the channel of a mirror."""
        channel = self.channel(number, as_node)
        try:
            return await channel.ask(body, 5.0)
        finally:
            channel.drop()

    def open(self, number: int, **keywords: object) -> Ledger:
        node, key = self.roster.nodes[number], self.consortium.key
        log_key = key(f"log {number}" if number else "log")
        pq_key = pq_key_named(f"pq {number}") if node.pq_key else None
        keywords = {"standby": number in self.standbys, "pq_key": pq_key} | keywords
        folder = self.folder / node.name
        return Ledger.open(folder, self.roster, node.id, key(f"cosigner {number}"), log_key, Caller(self, number), **keywords)

    async def start(self, *numbers: int) -> None:
        """Start nodes, mirrors first, as a sequencer that finds nobody pauses before it tries again."""
        for number in sorted(numbers, reverse=True):
            self.ledgers[number] = self.open(number)
            self._watch(number, self.ledgers[number].mirror)
            app = web.Application(middlewares=[self._middleware(number)], client_max_size=0)
            app.add_routes(self.ledgers[number].routes())
            self._runners[number] = web.AppRunner(app, shutdown_timeout=0.05, access_log=None)
            await self._runners[number].setup()
            site = web.TCPSite(self._runners[number], "127.0.0.1", 0)
            await site.start()
            self._ports[self.roster.nodes[number].id] = self._runners[number].addresses[0][1]
            await self.ledgers[number].start()

    async def stop(self, *numbers: int) -> None:
        for number in numbers:
            del self._ports[self.roster.nodes[number].id]
            await self._runners.pop(number).cleanup()
            await self.ledgers.pop(number).close()

    def thaw(self) -> None:
        self.frozen.clear()
        self._thawed.set()
        self._thawed = asyncio.Event()

    async def close(self) -> None:
        self.thaw()
        await self.stop(*sorted(self.ledgers))
        await self.session.close()

    def register(self, manifest: int = 0, author: str = "vault") -> Entry:
        """A REGISTER entry of a new file."""
        self._count += 1
        file_id, nonce = self._count.to_bytes(32, "big"), self._count.to_bytes(16, "big")
        return self.consortium.entry(author, Register(file_id, bytes([manifest]) * 32, nonce))

    async def enrol(self, who: str = "vault") -> None:
        """Enrol a key, and wait until every node that answers has the entry: a quorum has it before the others."""
        enrol = Enrol(public_key(self.consortium.key(who)), 0, bytes(16))
        (inclusion,) = await self.ledgers[0].append([self.consortium.entry("ca 0", enrol)])
        answering = [ledger for number, ledger in self.ledgers.items() if number not in self.frozen]
        await self.until(lambda: all(ledger.journal.head.size > inclusion.index for ledger in answering))

    def published(self, number: int) -> int:
        """How many entries a node knows to be published."""
        published = self.ledgers[number].published
        return published.checkpoint.size if published else 0

    async def until(self, true: Callable[[], object], within_s: float = 45.0) -> None:
        async with asyncio.timeout(within_s):
            while not true():
                await asyncio.sleep(0.005)

    def _watch(self, number: int, mirror: Mirror) -> None:
        take = mirror.take

        async def watched(push: Push, node: NodeId) -> str:
            self.pushes.append((number, push))
            if number in self.frozen:
                await self._thawed.wait()
            return await take(push, node)

        mirror.take = watched

    def _middleware(self, number: int) -> Callable[..., object]:
        @web.middleware
        async def middleware(request: web.Request, handler: Callable[..., object]) -> web.StreamResponse:
            if number in self.frozen:
                await self._thawed.wait()
            as_node = request.headers.get("As-Node")
            request[peer_key] = Peer(Key(bytes(32)), 0, None if as_node is None else self.roster.nodes[int(as_node)].id)
            try:
                return await handler(request)
            except MedshardError as error:
                status, body = pack_error(error)
                return web.Response(status=status, body=body)

        return middleware


@pytest.fixture
async def net(consortium: Callable[..., object], tmp_path: Path) -> AsyncIterator[Net]:
    """Four institutions with a node each, none of them started; a quorum is three."""
    made = Net(consortium(4), tmp_path)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
def contexts(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server, and of a client that takes it for whom it likes."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    institution = create_institution("Clinic")
    (tmp_path / "server.pem").write_bytes(key_pem(institution.key) + to_pem(institution.certificate).encode())
    server.load_cert_chain(tmp_path / "server.pem")
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    return server, client
