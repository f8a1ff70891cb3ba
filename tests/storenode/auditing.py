"""Nodes in one process that audit each other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.conftest import consortium_of, key_named

from medshard_protocol.audit import Answer, Challenge, Verdict
from medshard_protocol.erasure import code
from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.evidence import evidence_size
from medshard_protocol.facts import Moved, Registration
from medshard_protocol.ids import FileId, Key, NodeId, file_id_from_hex
from medshard_protocol.manifest import Manifest, ShardRef
from medshard_protocol.messages import pack_error
from medshard_protocol.shards import Layout, digests, shard_root, split
from storenode.auditing import challenger as challenger_module
from storenode.auditing.answering import Answerer
from storenode.auditing.challenger import Challenger
from storenode.auditing.findings import Findings
from storenode.evidence import Evidence
from storenode.identity import Peer
from storenode.metrics import Metrics
from storenode.repairing import ground
from storenode.routes import Node
from storenode.shardstore import ShardStore

owner = Key(b"o" * 32)
now = 1_800_000_000.0


class World:
    """Nodes with real stores, a ledger that says what it is told, and calls that arrive at once."""

    def __init__(self, folder: Path, nodes: int, code_: tuple[int, int], institutions: int | None = None) -> None:
        institutions = institutions or nodes
        self.roster = consortium_of(institutions, nodes // institutions).roster
        self.k, self.n = code_
        self.time = now
        self.registered: dict[FileId, Registration] = {}
        self.moved: list[tuple[int, Moved]] = []
        self.silent: set[int] = set()
        self.slow: dict[int, float] = {}
        self.bent: dict[int, Callable[[Answer], Answer]] = {}
        state: Any = SimpleNamespace(
            registration=self.registered.get, moves=lambda file_id: {}, roster=self.roster, decided=[], genesis=self.roster
        )
        self.ledger: Any = SimpleNamespace(roster=self.roster, state=state, published_at=lambda: self.time)
        self.nodes, self.findings, self.answerers = list[Node](), list[Findings](), list[Answerer]()
        self.evidence = Evidence(folder / "evidence")
        for number, each in enumerate(self.roster.nodes):
            store = ShardStore(folder / str(number), capacity=10**9, small_bytes_max=1000)
            config: Any = SimpleNamespace(data=folder / str(number))
            self.nodes.append(Node(config, each.id, store, self.ledger))
            self.findings.append(Findings(folder / str(number), me=each.id, silence_s=43_200))
            self.answerers.append(
                Answerer(self.nodes[number], key_named(f"tls {number}"), self.findings[number], Metrics(), clock=lambda: self.time)
            )

    def challenger(self, number: int) -> Challenger:
        return Challenger(
            self.nodes[number],
            key_named(f"tls {number}"),
            self.caller(number),
            self.findings[number],
            self.evidence,
            Metrics(),
            answer_s=5.0,
            clock=lambda: self.time,
        )

    def peer(self, number: int) -> Peer:
        node = self.roster.nodes[number]
        return Peer(node.tls_key, node.institution, node.id)

    def caller(self, number: int) -> Any:
        async def call(node: NodeId, method: str, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
            other = next(i for i, each in enumerate(self.roster.nodes) if each.id == node)
            if other in self.silent:
                raise Unavailable("no answer")
            await asyncio.sleep(self.slow.get(other, 0.0))
            try:
                file, shard = path.split("/")[3:]
                answer = await self.answer(other, number, file_id_from_hex(file), int(shard), Challenge.from_bytes(body))
            except MedshardError as error:
                return pack_error(error)
            return 200, answer.to_bytes()

        return call

    async def answer(self, of: int, by: int, file_id: FileId, shard: int, challenge: Challenge) -> Answer:
        answer = await self.answerers[of].answer(file_id, shard, challenge, self.peer(by))
        return self.bent[of](answer) if of in self.bent else answer

    async def put(self, stripes: int = 3, holders: list[int] | None = None, cell: int = 2048) -> FileId:
        file_id = FileId(os.urandom(32))
        layout = Layout(self.k, self.n, cell, self.k * cell * stripes)
        data = [os.urandom(layout.shard_size) for _ in range(self.k)]
        parity = [bytearray(layout.shard_size) for _ in range(self.n - self.k)]
        code(self.k, self.n).encode(data, parity)
        shards = [*data, *map(bytes, parity)]
        holders = holders or list(range(self.n))
        refs = tuple(ShardRef(self.roster.nodes[at].id, root_of(shard, cell)) for at, shard in zip(holders, shards, strict=True))
        manifest = Manifest(file_id, layout, "blake3", b"c" * 32, refs, owner, b"", bytes(48), (), bytes(evidence_size))
        self.registered[file_id] = Registration(0, manifest.sha256, owner)
        for index, (at, shard) in enumerate(zip(holders, shards, strict=True)):
            await self.store(at, manifest, index, shard)
        return file_id

    async def store(self, at: int, manifest: Manifest, index: int, shard: bytes) -> None:
        store = self.nodes[at].store
        incoming = store.begin(len(shard), manifest.layout.cell_size)
        try:
            incoming.write([shard])
            await store.commit_described(incoming, manifest, index)
        finally:
            store.abandon(incoming)

    async def verdicts(self, by: int, file_id: FileId, **wishes: bool) -> dict[int, Verdict]:
        round_ = await self.challenger(by).audit(file_id, **{"patient": False, "tagged": True, **wishes})
        return {shard: heard.verdict for shard, (_, heard) in round_.verdicts.items()}

    def path(self, at: int, file_id: FileId) -> Path:
        store = self.nodes[at].store
        shard = store.shard(file_id)
        assert shard is not None
        return store._path(file_id, shard.root)

    def flip(self, at: int, file_id: FileId, every: int = 2048) -> None:
        data = bytearray(self.path(at, file_id).read_bytes())
        for place in range(0, len(data), every):
            data[place] ^= 1
        self.path(at, file_id).write_bytes(data)

    async def drop(self, at: int, file_id: FileId) -> None:
        await self.nodes[at].store.catalog.write(lambda c: c.execute("DELETE FROM shards WHERE file_id = ?", (file_id,)))

    def close(self) -> None:
        for node, findings in zip(self.nodes, self.findings, strict=True):
            node.store.close()
            findings.close()


def root_of(data: bytes, cell: int) -> bytes:
    blake3 = digests["blake3"]
    return shard_root([blake3(part) for part in split(data, cell)], blake3)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    made = World(tmp_path, 7, (2, 6))
    monkeypatch.setattr(ground, "given", lambda ledger, file_id: tuple(made.moved))
    monkeypatch.setattr(challenger_module, "pauses_s", (0.0, 0.0))
    monkeypatch.setattr(challenger_module, "slow_s", 0.2)
    yield made
    made.close()
