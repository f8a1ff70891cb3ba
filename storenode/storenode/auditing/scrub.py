"""Reading one's own shards again, all of them, over and over, at a bounded rate.

Law: a shard is good when every cell has its digest, the digests have the shard's root, and the root is the manifest's. What is not is
noted as this node's own finding, and the note is taken back when the shard is whole again. Reading goes on after a restart where it was.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from medshard_protocol.audit import Verdict
from medshard_protocol.errors import Absent, Damaged, Malformed
from medshard_protocol.ids import FileId, NodeId, file_id_size
from medshard_protocol.manifest import Manifest
from medshard_protocol.shards import digests, shard_root, split
from storenode.auditing.findings import Findings
from storenode.metrics import Metrics
from storenode.shardstore import Shard, ShardStore

page: Final = 64
first_within_s: Final = 3600.0
block_bytes: Final = 1024 * 1024

log = logging.getLogger(__name__)


class Scrubber:
    """One node's reading of its own. Lives in one event loop; ``concerns`` says which shard of a file this node is to hold, if any."""

    def __init__(
        self,
        store: ShardStore,
        findings: Findings,
        me: NodeId,
        metrics: Metrics,
        concerns: Callable[[FileId], int | None],
        *,
        bytes_per_s: float,
        cells_per_s: float,
        every_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._findings, self._me, self._metrics, self._concerns = store, findings, me, metrics, concerns
        self._bytes_per_s, self._cells_per_s, self._every_s, self._clock = bytes_per_s, cells_per_s, every_s, clock
        self.shards = self.bad = 0  # of this pass, since the start of the process

    async def run(self) -> None:
        """Read for ever."""
        while True:
            begun = self._findings.noted("scrub begun")
            if begun is None:  # not all nodes of a consortium at once, nor each while it is being tried out
                begun = self._clock() - self._every_s + random.random() * min(self._every_s, first_within_s)
                self._findings.note("scrub begun", begun)
            wait = begun + self._every_s - self._clock()
            if not self._findings.noted("scrub at"):  # a pass is over, or none was begun
                await asyncio.sleep(min(max(wait, 0.0), self._every_s))
                self._findings.note("scrub begun", self._clock())
                self.shards = self.bad = 0
            try:
                await self.once()
            except (OSError, sqlite3.Error, Damaged):
                log.exception("the scrub was interrupted")
                await asyncio.sleep(60.0)

    async def once(self) -> None:
        """Read on from where the last pass has come to, up to the end."""
        at = bytes(self._findings.noted("scrub at") or b"")
        while files := await asyncio.to_thread(self._next, at):
            for file_id in files:
                await self.look(file_id)
            at = files[-1]
            await asyncio.to_thread(self._findings.note, "scrub at", at)
        for file_id in await asyncio.to_thread(self._bare):
            await self.look(file_id)
        await asyncio.to_thread(self._findings.note, "scrub at", b"")
        await asyncio.to_thread(self._findings.note, "scrub ended", self._clock())

    def status(self) -> dict[str, Any]:
        """For people and programs."""
        begun, ended = self._findings.noted("scrub begun"), self._findings.noted("scrub ended")
        return {"begun": begun, "ended": ended, "shards": self.shards, "bad": self.bad, "running": bool(self._findings.noted("scrub at"))}

    # -- parts

    def _next(self, after: bytes) -> list[FileId]:
        rows = self._store.catalog.all(f"SELECT file_id FROM shards WHERE file_id > ? ORDER BY file_id LIMIT {page}", after)  # noqa: S608
        return [FileId(row[0]) for row in rows if isinstance(row[0], bytes) and len(row[0]) == file_id_size]

    def _bare(self) -> list[FileId]:
        """Files with a manifest and without a shard."""
        sql = "SELECT file_id FROM manifests WHERE file_id NOT IN (SELECT file_id FROM shards) LIMIT 10000"
        connection = self._store.catalog.another_reader()
        try:
            return [FileId(row[0]) for row in connection.execute(sql) if isinstance(row[0], bytes) and len(row[0]) == file_id_size]
        finally:
            connection.close()

    async def look(self, file_id: FileId) -> None:
        """Read one shard and note what it is."""
        index = await asyncio.to_thread(self._concerns, file_id)
        for each in self._findings.of_file(file_id):
            if each.node == self._me and each.shard != index:  # it moved away, or the file ended
                await asyncio.to_thread(self._findings.forget, file_id, each.shard)
        if index is None:  # not registered, or one of these
            return
        size, verdict = 0, Verdict.GOOD
        try:
            shard = self._store.shard_at(file_id, index)
            size = shard.size
            for cells, length in self._blocks(shard):
                began = time.monotonic()
                if not await asyncio.to_thread(self._is_whole, shard, cells):
                    verdict = Verdict.DAMAGED
                    break
                due = max(length / self._bytes_per_s, len(cells) / self._cells_per_s)
                await asyncio.sleep(max(0.0, due - (time.monotonic() - began)))
            if not await asyncio.to_thread(self._is_registered, shard):
                verdict = Verdict.DAMAGED
        except Absent:
            verdict = Verdict.ABSENT
        except Damaged:
            verdict = Verdict.DAMAGED
        self.shards += 1
        self.bad += verdict.is_bad
        self._metrics.scrubbed(1, size, verdict.is_bad)
        if verdict.is_bad:
            log.error("an own shard is %s", verdict, extra={"file": file_id.hex(), "shard": index})
        if verdict.is_bad or any(each.node == self._me and each.verdict.is_bad for each in self._findings.of_file(file_id)):
            await asyncio.to_thread(self._findings.report, file_id, index, self._me, verdict, self._clock())

    def _blocks(self, shard: Shard) -> Iterator[tuple[range, int]]:
        step = max(1, block_bytes // shard.cell_size)
        for first in range(0, shard.cells, step):
            cells = range(first, min(first + step, shard.cells))
            yield cells, min(cells.stop * shard.cell_size, shard.size) - first * shard.cell_size

    def _is_whole(self, shard: Shard, cells: range) -> bool:
        data = self._store.read(shard, cells.start * shard.cell_size, len(cells) * shard.cell_size)
        digest = digests["blake3"]
        return all(digest(cell) == shard.digests[i] for i, cell in zip(cells, split(data, shard.cell_size), strict=True))

    def _is_registered(self, shard: Shard) -> bool:
        try:
            manifest = Manifest.from_bytes(self._store.manifest(shard.file_id))
        except Malformed:
            return False
        return shard_root(shard.digests, digests["blake3"]) == shard.root == manifest.shards[shard.index].root
