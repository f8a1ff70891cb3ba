"""A node tends the files that it holds shards of: it finds out which shards are missing, and sees to it that they are made again.

Law: a file with the lowest margin comes first. The ledger's MOVE entries are the only lock, and every node decides by what it saw itself:
a hint from a holder makes a node look, and never act. Nothing is kept on disk: after a restart everything is found again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from medshard_protocol.errors import Full, Malformed, MedshardError, Refused, Unavailable
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import unpack_error
from medshard_protocol.repairorder import Wish, pack_wish
from storenode.config import RepairSection
from storenode.repairing import ground, triage
from storenode.repairing.lasting import lasting
from storenode.repairing.pulse import Pulse
from storenode.repairing.rebuilding import Job, Means
from storenode.repairing.repairer import Repairer
from storenode.repairing.surveying import Case, Survey

sick_max: Final = 20_000  # files in the queue; what finds no room is found again
looks_at_once: Final = 16
batch: Final = 64  # files of the queue that are looked at between two thoughts of what is most urgent
page: Final = 50  # catalog rows at a time
idle_part: Final = 4  # a walk over all files sleeps so many times as long as it works
walk_every_s: Final = 900.0
look_every_s: Final = 1.0  # between two files whose holders are all asked, in the slow walk that never ends
hints_per_s: Final = 10.0  # that one node may give
hints_burst: Final = 40.0
hint_s: Final = 8.0
# What this node's audits found beyond doubt: a shard, who should hold it, and when that was found last.
Missing: TypeAlias = Callable[[], Iterable[tuple[FileId, int, NodeId, float]]]
_held: Final = "SELECT file_id, bytes FROM manifests JOIN shards USING(file_id) WHERE file_id > ? ORDER BY file_id LIMIT ?"

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Sick:
    """A file of which a shard is missing, or may be. Times are the event loop's."""

    file_id: FileId
    since: float
    next_at: float
    suspected: set[int] = field(default_factory=set)  # shards to ask their holders about
    missing: tuple[int, ...] = ()
    margin: int | None = None  # None before it was looked at
    size: int = 0  # of one shard
    mine: int | None = None  # the shard that this node is to make again
    stuck: bool = False  # nobody may take a shard of it
    tries: int = 0
    asked: dict[tuple[int, NodeId], float] = field(default_factory=dict)  # when a node was first to make a shard
    refused: dict[tuple[int, NodeId], float] = field(default_factory=dict)  # until when a node is left out
    manifest: Manifest | None = None


class Tending:
    """One node's care. Lives in one event loop. ``takes`` says whether this node takes shards over at all, now."""

    def __init__(
        self, means: Means, repairer: Repairer, pulse: Pulse, section: RepairSection, takes: Callable[[], bool], missing: Missing = list
    ) -> None:
        self._means, self._repairer, self._pulse, self._section, self._takes = means, repairer, pulse, section, takes
        self._missing = missing
        means.surveyor.found = self.found
        self._me = means.node.id
        self._sick: dict[FileId, Sick] = {}
        self._doubted: set[NodeId] = set()  # nodes that were found without a shard: all theirs are asked about
        self._found: dict[FileId, set[tuple[int, NodeId, float]]] = {}  # what audits said when they were asked last
        self._hints: dict[NodeId, tuple[float, float]] = {}  # when each node's allowance was counted, and what was left of it
        self._young: list[FileId] = []  # stored lately, whose other holders were not asked yet
        self._young_until = 0
        self._unit_s = min(max(section.grace_s / 60, 0.2), 60.0)  # the step of all waiting here
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin, once the ledger runs."""
        for work in (self._keep_walking, self._keep_looking, self._keep_working):
            self._tasks.append(asyncio.create_task(lasting(work, "looking after files")))

    async def close(self) -> None:
        """Stop tending; repairs that run are the repairer's."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def is_on(self) -> bool:
        """Whether this node sees to repairs by itself."""
        return self._section.on

    def is_sick(self, file_id: FileId) -> bool:
        """Whether a file is in the queue."""
        return file_id in self._sick

    # -- what others say

    async def hint(self, by: NodeId | None, file_id: FileId, shard: int) -> None:
        """Take a holder's word that a shard is missing which this node may take over. Raises MedshardError if this node will not."""
        if by is None or all(each.id != by for each in self._means.node.ledger.roster.nodes):
            raise Refused("a node says which shards are missing", hint="run `storenode repair` where the node runs")
        if not (self._section.on and self._takes()):
            raise Refused("this node takes no shards over")
        self._allow(by)
        case = await self._means.surveyor.find(file_id)
        if shard >= case.manifest.layout.n or by not in (node for _, node in case.ever):
            raise Refused("only a holder says what is missing")
        if (against := self._repairer.objection(case, shard)) is not None:
            raise against
        self._means.node.store.check_room(case.manifest.layout.shard_size)
        self.suspect(file_id, [shard], case.manifest)

    def _allow(self, by: NodeId) -> None:
        now = asyncio.get_running_loop().time()
        counted, left = self._hints.get(by, (now, hints_burst))
        left = min(hints_burst, left + (now - counted) * hints_per_s)
        if left < 1:
            raise Unavailable("too many hints at a time", hint="try again in a minute")
        self._hints[by] = (now, left - 1)

    def suspect(self, file_id: FileId, shards: Iterable[int], manifest: Manifest | None = None) -> None:
        """Look into these shards of a file soon."""
        now = asyncio.get_running_loop().time()
        sick = self._sick.get(file_id)
        if sick is None:
            if len(self._sick) >= sick_max:
                raise Unavailable("this node's queue of repairs is full", hint="try again in a minute")
            sick = self._sick[file_id] = Sick(file_id, now, now, manifest=manifest)
        new = set(shards) - sick.suspected
        sick.suspected |= new
        if new:
            sick.next_at, sick.tries = min(sick.next_at, now), 0

    # -- finding out

    async def _keep_walking(self) -> None:
        """Go over all files when a node is gone or doubted, and now and then while one is."""
        loop = asyncio.get_running_loop()
        known: object = None  # at first everything is looked through once
        walked = loop.time()
        while True:
            await asyncio.sleep(self._unit_s / 2)
            self._hear_audits()
            roster = self._means.node.ledger.roster
            now = (self._pulse.gone, roster.number, frozenset(self._doubted))
            is_due = bool(self._pulse.gone) and loop.time() - walked > walk_every_s
            if now == known and not is_due:
                continue
            async for case in self.held():
                self._assess(case)
            self._doubted -= now[2]
            known, walked = (now[0], now[1], frozenset(self._doubted)), loop.time()

    def _hear_audits(self) -> None:
        """Look into what audits found since they were asked last."""
        heard: dict[FileId, set[tuple[int, NodeId, float]]] = {}
        for file_id, shard, node, checked in self._missing():
            heard.setdefault(file_id, set()).add((shard, node, checked))
        for file_id, found in heard.items():
            for shard, node, _ in found - self._found.get(file_id, set()):
                self._suspect(file_id, [shard])
                self._doubt(node)
        self._found = heard

    def found(self, file_id: FileId) -> Collection[tuple[int, NodeId, float]]:
        """What audits said of a file's shards when they were asked last: (shard, who should hold it, when it was looked at)."""
        return self._found.get(file_id, ())

    def _doubt(self, node: NodeId) -> None:
        if node != self._me and not self._pulse.is_gone(node):
            self._doubted.add(node)

    def _assess(self, case: Case) -> None:
        """Queue a file if a holder is gone, or, if it is for this node to ask first, doubted."""
        suspects = [shard for shard, node in enumerate(case.present) if self._pulse.is_gone(node)]
        if any(node in self._doubted for node in case.present) and (self._place(case) or 0) <= 1:
            suspects += [shard for shard, node in enumerate(case.present) if node in self._doubted]
        if suspects:
            self._suspect(case.manifest.file_id, suspects, case.manifest)

    def _suspect(self, file_id: FileId, shards: Iterable[int], manifest: Manifest | None = None) -> None:
        try:
            self.suspect(file_id, shards, manifest)
        except Unavailable:  # the queue is full: it is found again by the next walk
            return

    async def held(self) -> AsyncIterator[Case]:
        """All registered files that this node has a shard of, at leisure."""
        loop = asyncio.get_running_loop()
        after, catalog = b"", self._means.node.store.catalog
        while True:
            began = loop.time()
            try:
                rows = catalog.all(
                    "SELECT file_id, bytes FROM manifests JOIN shards USING(file_id) WHERE file_id > ? ORDER BY file_id LIMIT ?",
                    after,
                    page,
                )
            except MedshardError:
                log.exception("the catalog cannot be read")
                return
            if not rows:
                return
            for file_id, data in rows:
                if (case := self._case(FileId(file_id), data)) is not None:
                    yield case
            after = rows[-1][0]
            await asyncio.sleep((loop.time() - began) * idle_part)

    def _case(self, file_id: FileId, data: bytes) -> Case | None:
        try:
            known = ground.standing(self._means.node.ledger, file_id)
            manifest = Manifest.from_bytes(data)
        except (ground.Denied, Malformed):
            return None
        return self._means.surveyor.case(manifest, known) if ground.is_described(manifest, known) else None

    async def _keep_looking(self) -> None:
        """Ask all holders of files that came lately, and of all files in turn, slowly."""
        every = self.held()
        while True:
            await asyncio.sleep(min(look_every_s, self._unit_s))
            self._find_young()
            later: list[FileId] = []
            for file_id in self._young:
                row = self._means.node.store.catalog.one("SELECT bytes FROM manifests WHERE file_id = ?", file_id)
                case = None if row is None else self._case(file_id, row[0])
                if case is not None:
                    await self._look_into(case)
                elif self._is_here(file_id) and self._means.node.ledger.state.registration(file_id) is None:
                    later.append(file_id)  # its upload goes on
            self._young = later
            try:
                await self._look_into(await anext(every))
            except StopAsyncIteration:
                every = self.held()
                await asyncio.sleep(look_every_s)

    def _is_here(self, file_id: FileId) -> bool:
        """Whether there is a shard, whatever has become of it."""
        return self._means.node.store.catalog.one("SELECT 1 FROM shards WHERE file_id = ?", file_id) is not None

    def _find_young(self) -> None:
        until = int(time.time() - self._unit_s)  # the store's own clock
        rows = self._means.node.store.catalog.all(
            "SELECT file_id FROM shards WHERE registered = 0 AND stored_at > ? AND stored_at <= ? LIMIT 10000", self._young_until, until
        )
        self._young += [FileId(row[0]) for row in rows]
        self._young_until = max(until, self._young_until)

    async def _look_into(self, case: Case) -> None:
        """Ask all holders of a file that answer, if it is for this node to do it."""
        if (self._place(case) or 0) > 1 or self.is_sick(case.manifest.file_id):
            return
        shards = [shard for shard, node in enumerate(case.present) if node != self._me and self._pulse.answers(node)]
        looks = await asyncio.gather(*(self._means.surveyor.look_at(case.manifest, shard, case.present[shard]) for shard in shards))
        if absent := [shard for shard, (took, has) in zip(shards, looks, strict=True) if took is not None and not has]:
            self._suspect(case.manifest.file_id, absent, case.manifest)
            if case.manifest.file_id not in self._young:
                for shard in absent:
                    self._doubt(case.present[shard])

    def _place(self, case: Case) -> int | None:
        ranked = self._means.surveyor.ranked(case.manifest.file_id)
        return triage.place_among_holders(case, self._me, ranked, self._pulse.answers)

    # -- working

    async def _keep_working(self) -> None:
        loop = asyncio.get_running_loop()
        limit = asyncio.Semaphore(looks_at_once)

        async def one(sick: Sick) -> None:
            async with limit:
                try:
                    await self._see_to(sick)
                except MedshardError as error:
                    self._again(sick, str(error))

        while True:
            running = {job.file_id for job in self._repairer.running}
            ready = [sick for sick in self._sick.values() if sick.next_at <= loop.time() and sick.file_id not in running]
            await asyncio.gather(*map(one, sorted(ready, key=_urgency)[:batch]))
            self._begin_some(running)
            self._means.metrics.tended(len(self._sick), self.lowest_margin, sum(1 for sick in self._sick.values() if sick.stuck))
            await asyncio.sleep(self._unit_s / 4 if len(ready) <= batch else 0)

    def _again(self, sick: Sick, why: str) -> None:
        sick.tries += 1
        sick.next_at = asyncio.get_running_loop().time() + self._unit_s * 2 ** min(sick.tries, 5)
        log.info("a file needs another look", extra={"file": sick.file_id.hex()[:16], "why": why})

    async def _see_to(self, sick: Sick) -> None:
        """Look at what is suspected, and let the right node make it again. Raises MedshardError."""
        case = await self._known(sick)
        if case is None or not await self._is_missing(sick, case):
            self._sick.pop(sick.file_id, None)
            return
        now = asyncio.get_running_loop().time()
        sick.mine, sick.tries = None, sick.tries + 1
        sick.next_at = now + self._unit_s * 2 ** min(sick.tries, 5)
        if sick.margin is None or not 0 <= sick.margin <= self._section.margin or not sick.missing:
            return
        assigned = self._assign(sick, case, sick.missing)
        sick.stuck = len(assigned) < len(sick.missing)
        place = self._place(case)
        for shard, node in assigned.items():
            if node == self._me:
                sick.mine = shard
            elif place is not None and now - sick.since >= (place - 1) * self._unit_s:
                await self._tell(sick, shard, node)

    async def _known(self, sick: Sick) -> Case | None:
        """The file as it stands; None if there is nothing more to do for it."""
        try:
            known = ground.standing(self._means.node.ledger, sick.file_id)
        except ground.Denied:
            return None
        if sick.manifest is None or not ground.is_described(sick.manifest, known):
            sick.manifest = (await self._means.surveyor.find(sick.file_id)).manifest
        return self._means.surveyor.case(sick.manifest, known)

    async def _is_missing(self, sick: Sick, case: Case) -> bool:
        """Find out which shards are missing; whether any is, or may be."""
        gone = {shard for shard, node in enumerate(case.present) if self._pulse.is_gone(node)}
        asked = sorted(sick.suspected - gone)
        looks = await asyncio.gather(*(self._means.surveyor.look_at(case.manifest, shard, case.present[shard]) for shard in asked))
        absent = {shard for shard, (took, has) in zip(asked, looks, strict=True) if took is not None and not has}
        absent |= self._means.surveyor.found_missing(case)  # a holder's own word is not enough where this node's audits found it wrong
        sick.suspected = {shard for shard, (_, has) in zip(asked, looks, strict=True) if not has} | gone | absent
        sick.missing = tuple(sorted(gone | absent))
        sick.margin, sick.size = triage.margin(case, sick.missing), case.manifest.layout.shard_size
        return bool(sick.suspected)

    def _assign(self, sick: Sick, case: Case, missing: Iterable[int]) -> dict[int, NodeId]:
        now = asyncio.get_running_loop().time()

        def usable(shard: int, node: NodeId) -> bool:
            if node == self._me:
                return self._takes() and self._repairer.objection(case, shard) is None and sick.refused.get((shard, node), now) <= now
            since = sick.asked.get((shard, node), now)
            return self._pulse.answers(node) and sick.refused.get((shard, node), now) <= now and now - since < self._section.patience_s

        assigned = triage.assign(case, list(missing), self._means.surveyor.ranked(sick.file_id), self._means.surveyor.institution, usable)
        for shard, node in assigned.items():
            sick.asked.setdefault((shard, node), now)
        return assigned

    async def _tell(self, sick: Sick, shard: int, node: NodeId) -> None:
        """Let the node that is to make a shard again know of it."""
        now = asyncio.get_running_loop().time()
        try:
            status, answer = await self._means.peers(node, "POST", f"/v1/repair/{sick.file_id.hex()}", pack_wish(Wish(shard)), hint_s)
        except MedshardError:
            sick.refused[shard, node] = now + self._unit_s
            return
        if status not in (200, 202, 204):
            error = unpack_error(status, answer, self._means.surveyor.name(node))
            sick.refused[shard, node] = now + (self._unit_s if isinstance(error, Unavailable) else self._section.patience_s)
            sick.next_at = now + self._unit_s
            log.info("a node does not take a shard over", extra={"file": sick.file_id.hex()[:16], "why": str(error)})

    def _begin_some(self, running: set[FileId]) -> None:
        """Begin repairs here while there is room, lowest margin first."""
        mine = [sick for sick in self._sick.values() if sick.mine is not None and sick.file_id not in running]
        for sick in sorted(mine, key=_urgency)[: max(self._repairer.free, 0)]:
            task = self._repairer.begin(sick.file_id, take_over=True, choose=lambda survey, sick=sick: self._choose(sick, survey))  # type: ignore[misc]
            task.add_done_callback(lambda task, sick=sick: self._ended(sick, task))  # type: ignore[misc]

    def _choose(self, sick: Sick, survey: Survey) -> int | None:
        """Which shard this node is to make again, by what it was told just now; None for none."""
        layout = survey.manifest.layout
        missing = [
            shard
            for shard in range(layout.n)
            if shard not in survey.there and (survey.present[shard] in survey.answering or self._pulse.is_gone(survey.present[shard]))
        ]
        mine = [shard for shard, node in self._assign(sick, survey, missing).items() if node == self._me]
        if mine:
            self._means.node.store.check_room(layout.shard_size)
        return mine[0] if mine else None

    def _ended(self, sick: Sick, task: asyncio.Task[Job]) -> None:
        now = asyncio.get_running_loop().time()
        shard, sick.mine = sick.mine, None
        if task.cancelled():
            sick.refused[shard or 0, self._me] = now + self._section.patience_s  # somebody does not want it
            return
        error = task.exception()
        if error is None:
            sick.next_at = now
        elif isinstance(error, Full):
            sick.refused[shard or 0, self._me] = now + self._section.patience_s
        else:
            self._again(sick, str(error))

    # -- told

    @property
    def lowest_margin(self) -> int | None:
        """The lowest margin of a file that this node knows to be short of shards."""
        return min((sick.margin for sick in self._sick.values() if sick.margin is not None and sick.missing), default=None)

    def status(self) -> dict[str, Any]:
        """For people and programs."""
        sick = sorted((each for each in self._sick.values() if each.missing), key=_urgency)
        mine = [each for each in sick if each.mine is not None]
        jobs, recent = self._repairer.running, self._means.bucket.recent
        left = sum(each.size for each in mine) + sum(job.total - job.done for job in jobs)
        margins: dict[str, int] = {}
        for each in sick:
            margins[str(each.margin)] = margins.get(str(each.margin), 0) + 1
        return {
            "on": self._section.on,
            "files": len(sick),
            "stuck": sum(1 for each in sick if each.stuck),
            "lowest_margin": self.lowest_margin,
            "margins": margins,
            "mine": len(mine),
            "left_bytes": left,
            "rate": recent,
            "rate_limit": self._means.bucket.rate,
            "eta_s": round(left / recent, 1) if left and recent else None,
            "gone": [self._means.surveyor.name(node) for node in sorted(self._pulse.gone)],
            "running": [job.to_json() for job in jobs],
            "queue": [
                {"file": each.file_id.hex(), "margin": each.margin, "missing": list(each.missing), "mine": each.mine, "stuck": each.stuck}
                for each in sick[:20]
            ],
        }


def _urgency(sick: Sick) -> tuple[int, float]:
    """The lowest margin first; a file that was not looked at yet before those that can wait."""
    return (-1 if sick.margin is None else sick.margin if sick.margin >= 0 else 1000), sick.since
