"""Four nodes behind real TLS that answer as told, and a sealed file of which any two of them are enough. The fixture is in conftest.py."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from medshard.download import Arrived, Download
from medshard.encoding import Decoder, Encoder, Stripe
from medshard.model import Description
from medshard.sealing import FileSeal
from medshard.source import Part, Source
from medshard.tls import context_for
from medshard.transport import Net
from medshard.upload import Upload
from medshard_protocol.identity import node_certificate, to_pem
from medshard_protocol.ids import Key
from medshard_protocol.manifest import Manifest, ShardRef
from medshard_protocol.messages import SpanHead, pack_stored
from medshard_protocol.shards import Layout, digests, shard_root, split

k, n, cell = 2, 4, 64 * 1024
Take = Callable[[ssl.SSLSocket, bytes], None]  # a connection, and what came of a body with the head of its request
Talk = Callable[[ssl.SSLSocket, bytes], None]  # a connection, and the honest answer to its request


class Server:
    """One node: answers every request for cells of its shard, honestly unless told otherwise."""

    def __init__(self, context: ssl.SSLContext, shard: bytes) -> None:
        self.shard = shard
        self.talk: Talk = lambda connection, answer: connection.sendall(answer)
        self.take: Take = self.store
        self.stored = b""
        self.said = b""  # to whatever is posted, before the body is said again
        self.requests: list[bytes] = []
        self.connections = 0
        self.closed = threading.Event()
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with contextlib.suppress(OSError, ssl.SSLError), self._context.wrap_socket(raw, server_side=True) as connection:
            while not self.closed.is_set():
                request = b""
                while b"\r\n\r\n" not in request:
                    if not (got := connection.recv(65536)):
                        return
                    request += got
                if b"/v1/moves/" in request.partition(b"\r\n")[0]:
                    connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")  # nobody has taken a shard over
                    continue
                self.requests.append(request)
                if request.startswith(b"PUT"):
                    self.take(connection, request.partition(b"\r\n\r\n")[2])
                else:
                    self.talk(connection, self.answer(request))

    def receive(self, connection: ssl.SSLSocket, begun: bytes, size: int) -> bytes:
        """So much of a body; less if it breaks off."""
        body = bytearray(begun)
        while len(body) < size and (got := connection.recv(65536)):
            body += got
        return bytes(body)

    def store(self, connection: ssl.SSLSocket, begun: bytes) -> None:
        """Take a shard as a node does."""
        shard = self.receive(connection, begun, len(self.shard))
        if len(shard) == len(self.shard):
            self.stored = shard
            connection.sendall(http(201, pack_stored(root_of(shard), created=True)))

    def answer(self, request: bytes) -> bytes:
        if request.startswith(b"POST"):
            return http(200, self.said + request.partition(b"\r\n\r\n")[2])
        first, _, last = request.split(b"cells=")[1].split(b"&")[0].partition(b"-")
        cells = range(int(first), int(last) + 1)
        known = b"".join(digests["blake3"](part) for part in split(self.shard, cell))
        head = SpanHead(cells.start, len(cells), known, ()).to_bytes()
        return http(200, len(head).to_bytes(4, "big") + head + self.shard[cells.start * cell : cells.stop * cell])


def http(status: int, body: bytes) -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def root_of(shard: bytes) -> bytes:
    return shard_root([digests["blake3"](part) for part in split(shard, cell)], digests["blake3"])


class Four:
    """Four servers, what they hold, and a download of it."""

    def __init__(self, servers: list[Server], net: Net, manifest: Manifest, seal: FileSeal, plain: bytes) -> None:
        self.servers = servers
        self.net = net
        self.manifest = manifest
        self.seal = seal
        self.plain = plain
        self.bad: list[tuple[str, int, int]] = []
        self.done: set[int] = set()

    async def get(self, wanted: range | None = None) -> bytes:
        decoder, parts = Decoder(self.seal, self.manifest.layout), []

        def take(arrived: Arrived) -> None:
            parts.append(bytes(decoder.open_in_place(arrived.number, arrived.stripe, arrived.cells)))

        await Download(self.net, self.manifest, self.bad.append).run(wanted or range(self.manifest.layout.stripes), take)
        return b"".join(parts)

    async def put(self, w: int = 3) -> Upload:
        """Send every shard to its node; the upload stays open."""
        layout = self.manifest.layout
        upload = Upload(self.net, self.manifest.file_id, layout, self.net.roster.nodes, w)
        try:
            for number in range(layout.stripes):
                cells = [memoryview(bytearray(server.shard[number * cell : (number + 1) * cell])) for server in self.servers]
                for sent in await upload.feed([Stripe(number, tuple(cells), 0)]):
                    for part in sent.cells:
                        part[:] = bytes(len(part))  # as an encoder that uses its buffers again
            self.done = await upload.finish([ref.root for ref in self.manifest.shards])
        finally:
            await upload.close()
        return upload


@asynccontextmanager
async def serving(made: Any, folder: Path) -> AsyncIterator[Four]:
    roster = made.roster
    seal, plain = FileSeal.fresh(), os.urandom(k * cell * 20 + 12345)
    layout = Layout.for_plain(len(plain), k, n, cell)
    (folder / "plain").write_bytes(plain)
    source = Source([Part.at(folder / "plain", b"plain", Description("application/dicom"))])
    encoder, columns = Encoder(source, seal, layout), [bytearray() for _ in range(n)]
    while encoder:
        for column, part in zip(columns, encoder.next().cells, strict=True):
            column += part
    source.close()
    servers, nodes = [], []
    for number, node in enumerate(roster.nodes):
        servers.append(Server(_server_context(made, number, folder), bytes(columns[number])))
        nodes.append(replace(node, url=f"https://127.0.0.1:{servers[-1].port}"))
    roster = replace(roster, nodes=tuple(nodes))
    refs = tuple(ShardRef(node.id, root) for node, root in zip(nodes, encoder.roots(), strict=True))
    manifest = Manifest(seal.file_id, layout, "blake3", seal.commitment, refs, Key(bytes(32)), b"", b"", (), b"")
    contexts = {number: context_for(institution.ca) for number, institution in enumerate(roster.institutions)}
    each = Four(servers, Net(roster, contexts), manifest, seal, plain)
    async with each.net:
        yield each
    for server in servers:
        server.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("medshard-get", "medshard-put"))]


def _server_context(made: Any, number: int, folder: Path) -> ssl.SSLContext:
    ca, key = made.roster.institutions[number].ca, made.key(f"tls {number}")
    certificate = node_certificate(made.key(f"ca {number}"), ca, made.roster.nodes[number].tls_key, datetime.now(UTC))
    path = folder / f"node{number}.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + to_pem(certificate).encode())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    context.load_cert_chain(path)
    return context


def hang_up(connection: ssl.SSLSocket, answer: bytes) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def endless_head(connection: ssl.SSLSocket, answer: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            connection.sendall(b"X-More: and more\r\n" * 100)


def nonsense(connection: ssl.SSLSocket, answer: bytes) -> None:
    connection.sendall(os.urandom(3000))


def stand_still(connection: ssl.SSLSocket, answer: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.recv(1)  # nothing comes
