"""Shards that this node hands on: all of them before it leaves, and to a node that joined those that belong there now.

Law: a shard goes to the next node in the order of placement that may take it, which says so by a MOVE entry, fetches it, and checks the
root. It is deleted here only when that node says that it has it, and this node's own mirror that it is the holder. What is left is what
is still in the store, so nothing else has to be remembered; that this node is to leave stands in a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from medshard_protocol.errors import Absent, MedshardError, Unavailable
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.messages import unpack_error
from medshard_protocol.placement import place
from storenode import durable
from storenode.config import RepairSection
from storenode.repairing import ground, triage
from storenode.repairing.fetching import Giver
from storenode.repairing.lasting import lasting
from storenode.repairing.pulse import Pulse
from storenode.repairing.rebuilding import Means
from storenode.repairing.surveying import Case

mark_name: Final = "leaving"  # below the node's data folder
ask_s: Final = 10.0
again_s: Final = 0.5  # between two questions whether a shard has arrived
offer_s_least: Final = 120.0  # a node that says it fetches a shard gets so long, or a second for each `slow_rate` bytes
slow_rate: Final = 64 * 1024
candidates_max: Final = 5  # asked about one shard, one after the other
rest_s: Final = 600.0  # between two goes over the files for balance
fresh_s: Final = 60.0  # for how long a node's word of how full it is counts
spares_least: Final = 2  # nodes that must stay able to take this shard over after it moved for balance alone

log = logging.getLogger(__name__)


class Leaving:
    """What one node hands on. Lives in one event loop. ``held`` gives all files that it has shards of, ``is_sick`` which are in repair."""

    def __init__(
        self,
        means: Means,
        giver: Giver,
        pulse: Pulse,
        section: RepairSection,
        held: Callable[[], AsyncIterator[Case]],
        is_sick: Callable[[FileId], bool],
    ) -> None:
        self._means, self._giver, self._pulse, self._section, self._held, self._is_sick = means, giver, pulse, section, held, is_sick
        self._me = means.node.id
        self._mark: Path = means.node.config.data / mark_name
        self.drains = self._mark.exists()
        self._moved, self._moved_bytes, self._balanced = 0, 0, 0
        self._stuck: set[FileId] = set()  # nobody took their shards, the last time over
        self._refused: set[FileId] = set()  # nor this time, so far
        self._handing: dict[FileId, str] = {}  # to whom, just now
        self._wake = asyncio.Event()
        self._fill: dict[NodeId, tuple[float, float]] = {}  # when each node was asked, and what part of its capacity is used
        self._limit = asyncio.Semaphore(section.at_once)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, once the ledger runs."""
        self._task = asyncio.create_task(lasting(self._run, "handing shards on"))

    async def close(self) -> None:
        """Stop; what is being fetched breaks off, and begins anew after a restart."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def drain(self, *, on: bool) -> None:
        """Hand everything over from now on, through restarts; or stop doing so."""
        if on and not self._mark.exists():
            durable.create(self._mark, b"")
        elif not on:
            self._mark.unlink(missing_ok=True)
            durable.sync_folder(self._mark.parent)
        self.drains = on
        self._wake.set()

    def status(self) -> dict[str, Any]:
        """For people and programs."""
        left, size = self._left()
        recent = self._means.bucket.recent
        return {
            "draining": self.drains,
            "left": left,
            "left_bytes": size,
            "moved": self._moved,
            "moved_bytes": self._moved_bytes,
            "rebalanced": self._balanced,
            "stuck": len(self._stuck),
            "handing": dict(sorted((file_id.hex(), to) for file_id, to in self._handing.items())),
            "rate": recent,
            "eta_s": round(size / recent, 1) if self.drains and size and recent else None,
        }

    def _left(self) -> tuple[int, int]:
        """Shards of registered files that are still here, and their bytes."""
        state = self._means.node.ledger.state
        rows = self._means.node.store.catalog.all("SELECT count(*), coalesce(sum(size), 0) FROM shards WHERE registered = 1")
        young = self._means.node.store.catalog.all("SELECT file_id, size FROM shards WHERE registered = 0")
        known = [size for file_id, size in young if state.registration(FileId(file_id)) is not None]
        return int(rows[0][0]) + len(known), int(rows[0][1]) + sum(known)

    # -- working

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                if self.drains:
                    await self._go_over(self._hand_on)
                    self._means.metrics.draining(self._left()[0])
                elif self._section.rebalance and self._section.on:
                    await self._go_over(self._balance)
            except (MedshardError, OSError):
                log.exception("handing shards on failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0 if self.drains else min(rest_s, self._section.grace_s)):
                    await self._wake.wait()

    async def _go_over(self, see_to: Callable[[Case], Awaitable[None]]) -> None:
        """See to every file, some at a time."""
        self._refused = set()
        tasks: set[asyncio.Task[None]] = set()

        async def one(case: Case) -> None:
            try:
                await see_to(case)
            except MedshardError as error:
                log.info("a shard was not handed on", extra={"file": case.manifest.file_id.hex()[:16], "why": str(error)})
            finally:
                self._limit.release()

        try:
            async for case in self._held():
                await self._limit.acquire()
                tasks.add(asyncio.create_task(one(case)))
                tasks = {task for task in tasks if not task.done()}
            await asyncio.gather(*tasks)
            self._stuck = self._refused
        finally:
            for task in tasks:
                task.cancel()

    async def _hand_on(self, case: Case) -> None:
        """Give one shard to whoever may have it, or delete it where somebody has it already."""
        if not self.drains:
            return
        shard = self._own(case)
        if shard is None:
            return
        candidates = [node for node in self._means.surveyor.successors(case, shard) if node != self._me and self._pulse.answers(node)]
        if (holder := case.present[shard]) != self._me and not self._pulse.is_gone(holder):
            candidates = [holder]
        for node in candidates[:candidates_max]:
            if await self._give(case, shard, node):
                return
        self._refused.add(case.manifest.file_id)

    async def _balance(self, case: Case) -> None:
        """Give one shard to a node that is in its place now, if that makes things more even and leaves enough nodes for repairs."""
        shard, manifest = self._own(case), case.manifest
        if shard is None or case.present[shard] != self._me or self._is_sick(manifest.file_id):
            return
        roster = self._means.node.ledger.roster
        try:
            wanted = place(manifest.file_id, roster, manifest.layout.k, manifest.layout.n)
        except Unavailable:
            return
        ranked, institution = self._means.surveyor.ranked(manifest.file_id), self._means.surveyor.institution
        spares = triage.spares(case, shard, ranked, institution)
        fit = [node for node in spares if node in wanted and self._pulse.answers(node)]
        if self._me in wanted or not fit or len(spares) - 1 < spares_least:
            return
        if await self._used(self._me) - await self._used(fit[0]) > self._section.rebalance_over and await self._give(case, shard, fit[0]):
            self._balanced += 1

    def _own(self, case: Case) -> int | None:
        """The shard that is here."""
        shard = self._means.node.store.shard(case.manifest.file_id)
        return None if shard is None else shard.index

    async def _give(self, case: Case, shard: int, node: NodeId) -> bool:
        """Let a node take the shard over and fetch it; then delete it here. Whether that was done."""
        file_id, loop = case.manifest.file_id, asyncio.get_running_loop()
        until = loop.time() + max(offer_s_least, case.manifest.layout.shard_size / slow_rate)
        self._handing[file_id] = self._means.surveyor.name(node)
        try:
            while loop.time() < until:
                try:
                    status, answer = await self._giver.offer(file_id, shard, node, ask_s)
                except Unavailable:
                    return False
                if status == 204:
                    return await self._is_over(case, shard, node)
                if status != 202:
                    error = unpack_error(status, answer, self._means.surveyor.name(node))
                    if not isinstance(error, Unavailable):
                        log.info("a node does not take a shard", extra={"file": file_id.hex()[:16], "why": str(error)})
                        return False
                await asyncio.sleep(again_s)
            return False
        finally:
            self._giver.withdraw(file_id, shard)
            del self._handing[file_id]

    async def _is_over(self, case: Case, shard: int, node: NodeId) -> bool:
        """Delete a shard that a node says it has, if the ledger says that it is the holder."""
        for _ in range(20):  # the entry may be on its way to this node's mirror
            known = ground.standing(self._means.node.ledger, case.manifest.file_id)
            if self._means.surveyor.case(case.manifest, known).present[shard] == node:
                break
            await asyncio.sleep(again_s / 5)
        else:
            return False
        try:
            own = self._means.node.store.shard_at(case.manifest.file_id, shard)
        except Absent:
            return True
        await self._means.node.store.remove(own)
        self._moved, self._moved_bytes = self._moved + 1, self._moved_bytes + own.size
        return True

    async def _used(self, node: NodeId) -> float:
        """What part of a node's capacity is used. Raises Unavailable."""
        loop = asyncio.get_running_loop()
        asked, part = self._fill.get(node, (-fresh_s, 0.0))
        if loop.time() - asked < fresh_s:
            return part
        if node == self._me:
            part = self._means.node.store.used / self._means.node.config.capacity_bytes
        else:
            status, answer = await self._means.peers(node, "GET", "/v1/status", b"", ask_s)
            try:
                told = json.loads(answer)
                part = float(told["used_bytes"]) / float(told["capacity_bytes"])
            except (ValueError, KeyError, TypeError, ZeroDivisionError):
                raise Unavailable(f"{self._means.surveyor.name(node)} does not say how full it is (answered {status})") from None
        self._fill[node] = (loop.time(), part)
        return part
