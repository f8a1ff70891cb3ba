"""When a node audits what, in the background, for as long as it runs.

Law: draws come at a steady rate with jitter, and the next one's time is kept, so a restart neither skips nor repeats one. Whatever was bad
is looked at again soon, and then less and less often. Besides, holders are asked from time to time about all files there are, which finds
whatever an honest node knows to be gone. Nothing here repairs: ``Findings`` says what is missing, and others read it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

from medshard_protocol.audit import Verdict, inventory_items_max, pack_inventory, unpack_held
from medshard_protocol.errors import MedshardError, Refused
from medshard_protocol.ids import FileId, NodeId, file_id_size
from storenode.auditing.challenger import Challenger, Round
from storenode.auditing.findings import Finding, Findings, gap_s_max
from storenode.auditing.sampling import Sampler
from storenode.auditing.scrub import Scrubber
from storenode.config import AuditSection
from storenode.ledger.channel import PeerCaller
from storenode.routes import Node

look_every_s: Final = 10.0  # for what is due
again_s_max: Final = 1800.0  # between two looks at what is bad
again_at_once: Final = 4
page: Final = 64
inventory_every_s: Final = 86_400.0  # from the beginning of one pass to that of the next, at least
inventory_answer_s: Final = 20.0

_by_tags: Final = (Verdict.WRONG, Verdict.REFUSED)  # what no answer without a tag undoes

log = logging.getLogger(__name__)


class Auditor:
    """One node's audits. Lives in one event loop. ``start`` once, ``close`` at the end."""

    def __init__(
        self,
        node: Node,
        peers: PeerCaller,
        findings: Findings,
        challenger: Challenger,
        scrubber: Scrubber,
        config: AuditSection,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._node, self._peers, self.findings, self._challenger, self._scrubber = node, peers, findings, challenger, scrubber
        self._config, self._clock, self._sampler = config, clock, Sampler(node.store)
        self._draw = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin. Nothing is audited where the rate is zero, and nothing is scrubbed where that one is."""
        loops: list[Callable[[], Awaitable[None]]] = (
            [self._drawing, self._looking_again, self._asking_about_all] if self._config.per_day else []
        )
        if self._config.scrub_bytes_per_s:
            loops.append(self._scrubber.run)
        self._tasks = [asyncio.create_task(_for_ever(loop), name=f"audit-{loop.__name__}") for loop in loops]

    async def close(self) -> None:
        """Stop, and close the notebook."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.findings.close()

    async def now(self, count: int, file_id: FileId | None = None) -> list[Round]:
        """Audit a few drawn files, or one that is named, at once."""
        if file_id is not None:
            return [await self._challenger.audit(file_id, patient=False, tagged=True)]
        rounds = [await self._one(patient=False) for _ in range(count)]
        return [each for each in rounds if each is not None]

    def missing(self) -> Iterator[tuple[FileId, int, NodeId, float]]:
        """Shards that are bad beyond doubt, who should hold them, and when that was found last."""
        return ((each.file_id, each.shard, each.node, each.checked) for each in self.findings.missing())

    def status(self) -> dict[str, Any]:
        """For people and programs."""
        roster, now = self._node.ledger.roster, self._clock()
        names = {each.id: each.name for each in roster.nodes}
        tallies, bad = self.findings.tallies(7, now), self.findings.bad()
        nodes = {
            names[each.node]: {
                "answered": each.answered,
                "silent_since": each.silent_since,
                "seconds": each.seconds,
                "week": {verdict.value: count for verdict, count in tallies.get(each.node, Counter()).items()},
            }
            for each in self.findings.nodes()
            if each.node in names
        }
        return {
            "per_day": self._config.per_day,
            "nodes": nodes,
            "silent": sorted(names.get(node, node.hex()) for node in self.findings.silent()),
            "bad": dict(Counter(each.verdict.value for each in bad)),
            "missing": sum(1 for _ in self.findings.missing()),
            "worst": [_told(each, names) for each in bad[:20]],
            "scrub": self._scrubber.status(),
            "inventory": self.findings.noted("inventory ended"),
        }

    # -- loops

    async def _drawing(self) -> None:
        """Draw at the configured rate."""
        interval = 86_400.0 / self._config.per_day
        due = float(self.findings.noted("next draw") or 0.0)
        if not 0.0 < due <= self._clock() + 2 * interval:  # the first start of this node, or its clock has jumped
            due = self._clock() + interval * random.random()
        while True:
            await asyncio.sleep(max(0.0, due - self._clock()))
            due = max(due, self._clock()) + interval * random.uniform(0.5, 1.5)
            await asyncio.to_thread(self.findings.note, "next draw", due)
            await self._one(patient=True)

    async def _one(self, *, patient: bool) -> Round | None:
        async with self._draw:
            file_id = await asyncio.to_thread(self._sampler.draw)
        return None if file_id is None else await self._audit(file_id, patient=patient)

    async def _audit(self, file_id: FileId, *, patient: bool, tagged: bool = False) -> Round | None:
        try:
            return await self._challenger.audit(file_id, patient=patient, tagged=tagged)
        except Refused:  # not registered yet, or ended: nothing of it is to be kept
            await asyncio.to_thread(self.findings.forget, file_id)
        except MedshardError as error:  # this node's own manifest is not there or not whole, which the scrub finds
            log.warning("an audit did not come about: %s", error)
        return None

    async def _looking_again(self) -> None:
        """Look again at what was bad, a few at a time: the first time soon, then in ever longer steps."""
        while True:
            await asyncio.sleep(min(look_every_s, self._config.confirm_s) * random.uniform(0.5, 1.5))
            await asyncio.gather(*map(self._knock, await asyncio.to_thread(self._unheard)))
            due = await asyncio.to_thread(self._due)
            for each in await asyncio.to_thread(self._own_due):
                await self._scrubber.look(each)
            await asyncio.gather(*(self._audit(each.file_id, patient=False, tagged=each.verdict in _by_tags) for each in due))
            roster = self._node.ledger.roster
            await asyncio.to_thread(self.findings.forget_nodes, [each.id for each in roster.nodes])

    def _own_due(self) -> list[FileId]:
        """Own shards that were bad: somebody may have made them whole."""
        now, own = self._clock(), [each for each in self.findings.bad() if each.node == self._node.id]
        due = [each.file_id for each in own if now - each.checked >= self._wait(each)]
        return list(dict.fromkeys(due))[:again_at_once]

    def _wait(self, finding: Finding) -> float:
        """How long after the last look what is bad is looked at again."""
        return min(max(self._config.confirm_s, finding.checked - finding.since), again_s_max)

    def _unheard(self) -> list[NodeId]:
        """Nodes that were not asked for anything lately, as this one shares few files with them."""
        now, tried = self._clock(), {each.node: each.tried for each in self.findings.nodes()}
        nodes = [each.id for each in self._node.ledger.roster.nodes if each.id != self._node.id]
        return [node for node in nodes if now - tried.get(node, 0.0) >= gap_s_max][:again_at_once]

    async def _knock(self, node: NodeId) -> None:
        verdict, began = Verdict.SAID, time.monotonic()
        try:
            await self._peers(node, "POST", "/v1/inventory", pack_inventory([]), self._config.answer_s)
        except MedshardError:
            verdict = Verdict.LATE
        await asyncio.to_thread(self.findings.note_node, node, verdict, self._clock(), time.monotonic() - began)

    def _due(self) -> list[Finding]:
        now, due, seen = self._clock(), list[Finding](), set[FileId]()
        answering = {each.node for each in self.findings.nodes() if each.silent_since is None}
        tried: set[NodeId] = {each.node for each in self.findings.nodes() if now - each.tried < self._config.confirm_s}
        for each in sorted(self.findings.bad(), key=lambda finding: finding.checked):
            if now - each.checked < self._wait(each) or each.file_id in seen or each.node == self._node.id:
                continue
            if each.node not in answering:  # one of its shards is enough to hear whether it is back
                if each.node in tried:
                    continue
                tried.add(each.node)
            due.append(each)
            seen.add(each.file_id)
            if len(due) == again_at_once:
                break
        return due

    async def _asking_about_all(self) -> None:
        """Ask holders about every file that this node knows, slowly, again and again."""
        while True:
            begun = float(self.findings.noted("inventory begun") or 0.0)
            at = bytes(self.findings.noted("inventory at") or b"")
            if not at:
                every = min(inventory_every_s, 192 * inventory_every_s / self._config.per_day)
                await asyncio.sleep(min(max(0.0, begun + every - self._clock()), every))
                await asyncio.to_thread(self.findings.note, "inventory begun", self._clock())
            while files := await asyncio.to_thread(self._page, at):
                await self._ask_about(files)
                at = files[-1]
                await asyncio.to_thread(self.findings.note, "inventory at", at)
                await asyncio.sleep(len(files) / self._config.inventory_per_s)
            await asyncio.to_thread(self.findings.note, "inventory at", b"")
            await asyncio.to_thread(self.findings.note, "inventory ended", self._clock())

    def _page(self, after: bytes) -> list[FileId]:
        rows = self._node.store.catalog.all(f"SELECT file_id FROM shards WHERE file_id > ? ORDER BY file_id LIMIT {page}", after)  # noqa: S608
        return [FileId(row[0]) for row in rows if isinstance(row[0], bytes) and len(row[0]) == file_id_size]

    async def _ask_about(self, files: list[FileId]) -> None:
        wanted = await asyncio.to_thread(self._wanted, files)

        async def ask(node: NodeId, items: list[tuple[FileId, int]]) -> None:
            try:
                status, data = await self._peers(node, "POST", "/v1/inventory", pack_inventory(items), inventory_answer_s)
                held = unpack_held(data, len(items)) if status == 200 else [True] * len(items)
            except MedshardError:  # who does not answer is found by the draws
                return
            gone = [
                (file_id, shard, node, Verdict.ABSENT, b"", 0.0)
                for (file_id, shard), is_there in zip(items, held, strict=True)
                if not is_there
            ]
            if gone:
                await asyncio.to_thread(self.findings.report_all, gone, self._clock())

        listed = {each.id for each in self._node.ledger.roster.nodes}
        asked = [
            (node, items[i : i + inventory_items_max])
            for node, items in wanted.items()
            if node in listed
            for i in range(0, len(items), inventory_items_max)
        ]
        await asyncio.gather(*(ask(node, items) for node, items in asked))

    def _wanted(self, files: list[FileId]) -> dict[NodeId, list[tuple[FileId, int]]]:
        wanted: dict[NodeId, list[tuple[FileId, int]]] = {}
        for file_id in files:
            try:
                subject = self._challenger.subject(file_id)
            except MedshardError:
                continue
            for shard, node in enumerate(subject.present):
                if node != self._node.id:
                    wanted.setdefault(node, []).append((file_id, shard))
        return wanted


async def _for_ever(loop: Callable[[], Awaitable[None]]) -> None:
    """Run a loop again when its disk failed it."""
    while True:
        try:
            await loop()
        except (OSError, sqlite3.Error, MedshardError):
            log.exception("audits were interrupted")
            await asyncio.sleep(60.0)


def _told(finding: Finding, names: dict[NodeId, str]) -> dict[str, Any]:
    return {
        "file": finding.file_id.hex(),
        "shard": finding.shard,
        "node": names.get(finding.node, finding.node.hex()),
        "verdict": finding.verdict.value,
        "since": finding.since,
        "checked": finding.checked,
        "times": finding.times,
    }
