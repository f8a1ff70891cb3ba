"""Many small objects at once: all that goes to one node, or comes from it, in one request.

A request costs more than a small shard, so files are batched by node. Each file is still placed, counted and checked alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from medshard.download import BadCell
from medshard.moves import moved
from medshard.transport import Net, without_name
from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import (
    SmallPut,
    pack_small_puts,
    pack_small_reads,
    unpack_outcomes,
    unpack_shards,
)
from medshard_protocol.roster import Node
from medshard_protocol.shards import digests, shard_root, split

object_bytes_max: Final = 4 * 1024 * 1024  # plaintext of one object that is handled whole, in memory
request_bytes_max: Final = 8 * 1024 * 1024
request_items_max: Final = 256
hedge_s: Final = 0.4
timeout_s: Final = 30.0
linger_s = (0.3, 1.0)  # for a slow rest, once w have theirs: half of the time so far, between these two


@dataclass(frozen=True, slots=True)
class Encoded:
    """A small object ready to go: its manifest, and all its shards."""

    manifest: Manifest
    shards: tuple[bytes, ...]


@dataclass(slots=True)
class Sent:
    """What became of one object: the shards that are durable, and per node what went wrong."""

    done: set[int] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)


async def send_all(net: Net, objects: Sequence[Encoded], w: int, stored: Mapping[FileId, set[int]]) -> list[Sent]:
    """Send every shard that is not ``stored`` yet; wait until each object has w institutions, and a little for the rest."""
    outcomes = [Sent(set(stored.get(item.manifest.file_id, ()))) for item in objects]
    by_node: dict[NodeId, list[tuple[int, int]]] = defaultdict(list)
    for number, item in enumerate(objects):
        for index, ref in enumerate(item.manifest.shards):
            if index not in outcomes[number].done:
                by_node[ref.node].append((number, index))
    started = time.monotonic()

    async def one(node: Node, items: Sequence[tuple[int, int]]) -> None:
        body = pack_small_puts([SmallPut(objects[n].manifest.to_bytes(), i, objects[n].shards[i]) for n, i in items])
        answers: list[MedshardError | None]
        try:
            answers = unpack_outcomes(await net.call(node, "POST", "/v1/files", body, timeout_s=timeout_s), node.name)
        except MedshardError as failure:
            answers = [failure] * len(items)
        for (number, index), error in zip(items, answers, strict=False):
            if error is None:
                outcomes[number].done.add(index)
            else:
                outcomes[number].failures[node.name] = without_name(node, error)

    tasks = {
        asyncio.create_task(one(net.holder(node), items[at : at + request_items_max])): node
        for node, items in by_node.items()
        for at in range(0, len(items), request_items_max)
    }
    try:
        await _until_enough(
            net, tasks, lambda: all(_enough(net, item, sent, w) for item, sent in zip(objects, outcomes, strict=True)), started
        )
    finally:
        for task, node in tasks.items():
            if not task.done():
                task.cancel()
                net.health.suspect(node)
                for sent in outcomes:
                    sent.failures.setdefault(net.holder(node).name, "slower than the others")
        await asyncio.gather(*tasks, return_exceptions=True)
    return outcomes


async def _until_enough(net: Net, tasks: Mapping[asyncio.Task[None], NodeId], enough: Callable[[], bool], started: float) -> None:
    pending = set(tasks)
    while pending and not enough():
        _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    # A slow node is left behind: its shards go to repair, and nobody waits a second time for one that stalled lately.
    patient = {task for task in pending if not net.health.is_suspect(tasks[task])}
    if patient:
        least, most = linger_s
        await asyncio.wait(patient, timeout=max(least, min(most, (time.monotonic() - started) / 2)))


def _enough(net: Net, item: Encoded, sent: Sent, w: int) -> bool:
    return institutions(net, item.manifest, sent.done) >= w


def institutions(net: Net, manifest: Manifest, shards: set[int]) -> int:
    """How many distinct institutions hold these shards."""
    return len({net.holder(manifest.shards[i].node).institution for i in shards})


class SmallReads:
    """Fetch whole shards of many small objects, any k good ones of each."""

    def __init__(self, net: Net, manifests: Sequence[Manifest], found_bad: Callable[[BadCell], None] = lambda cell: None) -> None:
        self._net = net
        self._found_bad = found_bad
        self._manifests = {manifest.file_id: manifest for manifest in manifests}
        self.shards: dict[FileId, dict[int, bytes]] = {file_id: {} for file_id in self._manifests}
        self._asked: dict[FileId, set[int]] = {file_id: set() for file_id in self._manifests}
        self._holders = {file_id: [ref.node for ref in each.shards] for file_id, each in self._manifests.items()}
        self._asked_for_moves: set[FileId] = set()
        self._failures: dict[str, str] = {}
        self._running: dict[asyncio.Task[None], set[tuple[FileId, int]]] = {}

    async def fetch(self) -> dict[FileId, dict[int, bytes]]:
        """For each file id, at least k checked shards. Raises Unavailable when one of them cannot be had."""
        try:
            self._ask(lambda file_id: self._short(file_id) - self._in_flight(file_id))
            while any(self._short(file_id) > 0 for file_id in self._manifests):
                if not self._running:
                    if not await self._has_moved():
                        raise self._too_few()
                    continue
                done, _ = await asyncio.wait(self._running, timeout=hedge_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del self._running[task]
                    task.result()
                if done:
                    self._ask(lambda file_id: self._short(file_id) - self._in_flight(file_id))
                else:  # somebody stands still: ask others beside them
                    self._ask(self._short)
            return self.shards
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _has_moved(self) -> bool:
        """Ask, once for each file that is short of shards, whether other nodes have taken some over; ask those."""
        short = [id_ for id_ in self._manifests if self._short(id_) > 0 and id_ not in self._asked_for_moves]
        self._asked_for_moves |= set(short)
        for file_id, told in zip(short, await asyncio.gather(*(moved(self._net, id_) for id_ in short)), strict=True):
            holders = self._holders[file_id]
            for index, node in told.items():
                if index < len(holders) and holders[index] != node:
                    holders[index] = node
                    self._asked[file_id].discard(index)
        self._ask(self._short)
        return bool(self._running)

    def _short(self, file_id: FileId) -> int:
        return self._manifests[file_id].layout.k - len(self.shards[file_id])

    def _in_flight(self, file_id: FileId) -> int:
        return sum(1 for items in self._running.values() for item in items if item[0] == file_id)

    def _ask(self, wanted: Callable[[FileId], int]) -> None:
        by_node: dict[NodeId, list[tuple[FileId, int]]] = defaultdict(list)
        for file_id, manifest in self._manifests.items():
            for index in self._choose(manifest, wanted(file_id) if self._short(file_id) > 0 else 0):
                by_node[self._holders[file_id][index]].append((file_id, index))
                self._asked[file_id].add(index)
        for node, items in by_node.items():
            for chunk in self._chunks(items):
                self._running[asyncio.create_task(self._read(self._net.holder(node), chunk))] = set(chunk)

    def _choose(self, manifest: Manifest, count: int) -> list[int]:
        if count <= 0:
            return []
        suspect, informed = self._net.health.is_suspect, self._net.is_informed
        free = [i for i in range(manifest.layout.n) if i not in self._asked[manifest.file_id]]
        holders = self._holders[manifest.file_id]
        return sorted(free, key=lambda i: (suspect(holders[i]), not informed(holders[i]), i))[:count]

    def _chunks(self, items: list[tuple[FileId, int]]) -> list[list[tuple[FileId, int]]]:
        chunks: list[list[tuple[FileId, int]]] = [[]]
        size = 0
        for item in items:
            size += self._manifests[item[0]].layout.shard_size
            if chunks[-1] and (size > request_bytes_max or len(chunks[-1]) == request_items_max):
                chunks.append([])
                size = self._manifests[item[0]].layout.shard_size
            chunks[-1].append(item)
        return chunks

    async def _read(self, node: Node, items: list[tuple[FileId, int]]) -> None:
        try:
            data = await self._net.call(node, "POST", "/v1/read", pack_small_reads(items), timeout_s=timeout_s)
            answers = unpack_shards(data, len(items))
        except MedshardError as error:
            self._failures[node.name] = without_name(node, error)
            return
        for (file_id, index), shard in zip(items, answers, strict=True):
            if shard is None:
                self._failures[node.name] = f"shard {index} is missing or damaged there"
            elif self._is_good(self._manifests[file_id], index, shard):
                self.shards[file_id][index] = shard
            else:
                self._failures[node.name] = f"shard {index} has other bytes than were stored"
                self._found_bad((node.name, index, 0))

    @staticmethod
    def _is_good(manifest: Manifest, index: int, shard: bytes) -> bool:
        digest = digests[manifest.digest]
        if len(shard) != manifest.layout.shard_size:
            return False
        return shard_root([digest(cell) for cell in split(shard, manifest.layout.cell_size)], digest) == manifest.shards[index].root

    def _too_few(self) -> Unavailable:
        worst = max(self._manifests.values(), key=lambda manifest: self._short(manifest.file_id))
        have, layout = len(self.shards[worst.file_id]), worst.layout
        listed = "; ".join(f"{name}: {why}" for name, why in sorted(self._failures.items()))
        return Unavailable(
            f"{layout.k} of {layout.n} shards are needed and only {have} can be had ({listed})",
            hint="nothing is lost while the nodes come back: start them, then run the same command again",
        )
