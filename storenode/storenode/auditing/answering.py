"""A holder's part in an audit: look at the cell that is asked for, and say so under the own key.

Law: only nodes of institutions that hold a shard of the file are told anything of a cell, and never the cell: hashes, and a tag of a few
bytes as often as ``crosscheck.allowance`` has it, counted durably before the tag leaves. A cell whose bytes are not what they were is
owned up to and noted as this node's own damage. At most ``at_once_max`` are looked at at a time; who comes too much is told to wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from sqlite3 import Connection
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol import merkle
from medshard_protocol.audit import Answer, Challenge, Claim, Verdict, sign_answer
from medshard_protocol.crosscheck import allowance, ever, tag, times_moved
from medshard_protocol.errors import Absent, Damaged, Malformed, Refused, Unavailable
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.manifest import Manifest
from medshard_protocol.repairorder import Institutions
from medshard_protocol.shards import digests
from storenode.auditing.findings import Findings
from storenode.identity import Peer
from storenode.metrics import Metrics
from storenode.repairing import ground
from storenode.repairing.ground import Denied, Standing
from storenode.routes import Node
from storenode.shardstore import Shard, ShardStore

at_once_max: Final = 4


class Answerer:
    """One node's answers. Lives in one event loop."""

    def __init__(
        self, node: Node, key: Ed25519PrivateKey, findings: Findings, metrics: Metrics, clock: Callable[[], float] = time.time
    ) -> None:
        self._node, self._key, self._findings, self._metrics, self._clock = node, key, findings, metrics, clock
        self._running = 0

    async def answer(self, file_id: FileId, shard: int, challenge: Challenge, peer: Peer) -> Answer:
        """What this node says of a cell. Raises Refused, Malformed or Unavailable."""
        if peer.node is None:
            raise Refused("only nodes audit each other")
        if self._running >= at_once_max:
            raise Unavailable("this node answers as many audits as it can", hint="ask again in a moment")
        try:
            known = ground.standing(self._node.ledger, file_id)
        except Denied as denied:
            raise Refused(f"this file is not audited: {denied.objection.reason}") from None
        self._running += 1
        try:
            answer = Answer(file_id, shard, challenge.cell, challenge.nonce, peer.node, Claim.ABSENT, int(self._clock()))
            answer = await self._look(answer, challenge, known)
        finally:
            self._running -= 1
        self._metrics.audit_answered(answer.claim.name.lower(), tagged=bool(answer.tag))
        return sign_answer(self._node.ledger.roster.origin, answer, self._key.sign)

    async def _look(self, answer: Answer, challenge: Challenge, known: Standing) -> Answer:
        try:
            shard = self._node.store.shard_at(answer.file_id, answer.shard)
            manifest = await asyncio.to_thread(self._manifest, answer.file_id, known)
        except Absent:
            return answer
        except Damaged:
            return await self._own_up(answer)
        institution = ground.institutions(self._node.ledger.state)
        held = ever(manifest, known.ever, institution)
        if institution(answer.auditor) not in {institution(node) for _, node in held}:
            raise Refused("a file is audited by institutions that hold a shard of it")
        if challenge.cell >= shard.cells:
            raise Malformed(f"the shard has cells 0 to {shard.cells - 1}")
        try:
            cell, answer = await asyncio.to_thread(show, self._node.store, answer, shard, manifest)
        except Damaged:
            return await self._own_up(answer)
        if challenge.tagged:
            size = await self._spend(answer, manifest, held, institution)
            if size:
                given = await asyncio.to_thread(tag, answer.file_id, answer.cell, answer.nonce, cell, size)
                answer = replace(answer, tag=given)
        return answer

    async def _own_up(self, answer: Answer) -> Answer:
        now = self._clock()
        await asyncio.to_thread(self._findings.report, answer.file_id, answer.shard, self._node.id, Verdict.DAMAGED, now)
        return replace(answer, claim=Claim.DAMAGED)

    def _manifest(self, file_id: FileId, known: Standing) -> Manifest:
        manifest = Manifest.from_bytes(self._node.store.manifest(file_id))
        if not ground.is_described(manifest, known):
            raise Damaged("another manifest is registered")
        return manifest

    async def _spend(self, answer: Answer, manifest: Manifest, held: Sequence[tuple[int, NodeId]], institution: Institutions) -> int:
        """Count one more tag of this cell for the auditor's institution, durably; its size, or 0 if no more are due."""
        allowed = allowance(manifest.layout, answer.cell, times_moved(held, answer.shard))
        who = institution(answer.auditor)

        def change(connection: Connection) -> bool:
            key = (answer.file_id, who, answer.cell)
            row = connection.execute("SELECT given FROM audit_tags WHERE file_id = ? AND institution = ? AND cell = ?", key).fetchone()
            given = 0 if row is None else int(row[0])
            if given >= allowed.times:
                return False
            connection.execute("INSERT OR REPLACE INTO audit_tags VALUES (?, ?, ?, ?)", (*key, given + 1))
            return True

        return allowed.size if await self._node.store.catalog.write(change) else 0


def show(store: ShardStore, answer: Answer, shard: Shard, manifest: Manifest) -> tuple[bytes, Answer]:
    """The cell, and the answer that vouches for it. Blocking. Raises Damaged for a cell or a shard that is not the registered one."""
    if shard.cells != manifest.layout.stripes:
        raise Damaged("the shard is not the registered one")
    cell = store.read(shard, answer.cell * shard.cell_size, shard.cell_size)
    digest = digests[manifest.digest]
    leaves = [merkle.leaf_hash(each, digest) for each in shard.digests]
    path = tuple(merkle.inclusion_path(leaves, answer.cell, digest))
    shown = replace(answer, claim=Claim.HELD, digest=digest(cell), path=path)
    if not shown.leads_to_root(manifest):
        raise Damaged("the cell is not the registered one")
    return cell, shown


def held_here(node: Node, items: Sequence[tuple[FileId, int]]) -> list[bool]:
    """Which of these shards lie here, by the catalog and the names and sizes of files. Blocking."""

    def one(file_id: FileId, index: int) -> bool:
        try:
            return node.store.is_there(node.store.shard_at(file_id, index))
        except (Absent, Damaged):
            return False

    return [one(file_id, index) for file_id, index in items]
