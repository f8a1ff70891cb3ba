"""The replacement's part: take a shard over on the ledger, and have it made again or handed over.

Law: one repair of a file runs at a time; asking again joins it, or begins anew under the same entry. The MOVE entry is the lock: nothing is
fetched before it is published, the latest that counts has the shard, and whoever finds a later one than its own gives up before it stores
anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias

from medshard_protocol.entries import Move, nonce_size, sign_entry
from medshard_protocol.erasure import code
from medshard_protocol.errors import Absent, Conflict, Damaged, MedshardError, Refused, Unavailable
from medshard_protocol.ids import FileId, Key, NodeId
from medshard_protocol.repair import Lost, Rebuild, helper_sets, plan
from medshard_protocol.repairorder import counted, line_up, objection_to_replacement
from storenode.repairing import ground
from storenode.repairing.fetching import fetch
from storenode.repairing.inheriting import inherit
from storenode.repairing.rebuilding import Job, Means, Rebuilding, ranked
from storenode.repairing.surveying import Case, Survey

at_once_default: Final = 2  # repairs that this node orders
jobs_max: Final = 256  # remembered for whoever asks how it went

Choose: TypeAlias = Callable[[Survey], int | None]  # which shard this node is to make again, by a survey; None for none

log = logging.getLogger(__name__)


class Repairer:
    """One node's repairs. Lives in one event loop."""

    def __init__(self, means: Means, at_once: int = at_once_default) -> None:
        self._means, self._node, self._surveyor = means, means.node, means.surveyor
        self._tasks: dict[FileId, asyncio.Task[Job]] = {}
        self._jobs: dict[FileId, Job] = {}
        self._at_once = at_once
        self._slots = asyncio.Semaphore(at_once)
        self.made: Callable[[FileId, int], None] = lambda file_id, shard: None  # told of each shard that is here now; may block

    @property
    def free(self) -> int:
        """How many repairs could begin without waiting for another."""
        return self._at_once - len(self._tasks)

    @property
    def running(self) -> list[Job]:
        """The repairs that run or wait for their turn."""
        return [self._jobs[file_id] for file_id in self._tasks if file_id in self._jobs]

    def is_running(self, file_id: FileId) -> bool:
        """Whether a repair of this file runs."""
        return file_id in self._tasks

    def begin(
        self, file_id: FileId, shard: int | None = None, *, take_over: bool = False, choose: Choose | None = None
    ) -> asyncio.Task[Job]:
        """Make one lost shard of a file again, here, in the background; the first that is missing if none is named.

        Joins a repair of the file that runs. ``take_over`` goes on where another node said that it takes the shard and is still without it.
        ``choose`` decides by the survey. The task raises MedshardError.
        """
        return self._begin(Job(file_id, shard=shard), lambda job: self._repair(job, take_over, choose))

    def receive(self, file_id: FileId, shard: int, giver: NodeId) -> asyncio.Task[Job]:
        """Take a shard over from a node that has it and gives it up, in the background."""
        return self._begin(Job(file_id, shard=shard), lambda job: self._receive(job, giver))

    def _begin(self, job: Job, work: Callable[[Job], Coroutine[Any, Any, None]]) -> asyncio.Task[Job]:
        task = self._tasks.get(job.file_id)
        if task is None:
            while len(self._jobs) >= jobs_max:
                del self._jobs[next(iter(self._jobs))]
            self._jobs.pop(job.file_id, None)
            self._jobs[job.file_id] = job
            task = self._tasks[job.file_id] = asyncio.create_task(self._run(job, work))
            task.add_done_callback(lambda done: self._ended(job, done))
        return task

    def job(self, file_id: FileId) -> Job:
        """How the latest repair of a file goes, or went. Raises Absent."""
        try:
            return self._jobs[file_id]
        except KeyError:
            raise Absent("this node has not repaired this file since it started") from None

    def cancel(self, file_id: FileId) -> None:
        """Give up the repair of a file that runs. Raises Absent where none does."""
        task = self._tasks.get(file_id)
        if task is None:
            raise Absent("no repair of this file runs here")
        task.cancel()

    async def close(self) -> None:
        """Give up what runs; it begins anew after a restart."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def look(self, file_id: FileId, shard: int | None = None) -> dict[str, Any]:
        """What a repair would do, and nothing of it done. Raises MedshardError."""
        survey = await self._surveyor.survey(file_id)
        needs = _plan(survey)
        names = {each.id: each.name for each in self._node.ledger.roster.nodes}
        told: dict[str, Any] = {
            "file": file_id.hex(),
            "there": sorted(survey.there),
            "missing": list(needs.missing if isinstance(needs, Lost) else needs.targets if needs else ()),
            "lost": isinstance(needs, Lost),
            "holders": [names.get(node, node.hex()) for node in survey.present],
        }
        if isinstance(needs, Rebuild):
            target = self._target(survey, needs, shard, take_over=True)
            against = self.objection(survey, target)
            chosen = next(helper_sets(ranked(self._means, survey, target), survey.manifest.layout.k))
            told |= {
                "shard": target,
                "bytes": survey.manifest.layout.shard_size,
                "helpers": [names.get(link.node, "") for link in line_up(chosen, self._node.id, self._surveyor.institution)],
                "objection": "" if against is None else str(against),
                "next_in_placement": [names[node] for node in self._surveyor.successors(survey, target)[:4]],
            }
        return told

    # -- the steps

    async def _run(self, job: Job, work: Callable[[Job], Coroutine[Any, Any, None]]) -> Job:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with self._slots:
                job.enter("looking", loop.time())
                await work(job)
        except MedshardError as error:
            job.state, job.error = "failed", str(error)
            raise
        finally:
            job.seconds = round(loop.time() - began, 3)
        return job

    async def _repair(self, job: Job, take_over: bool, choose: Choose | None) -> None:
        survey = await self._surveyor.survey(job.file_id)
        needs = _plan(survey)
        if choose is not None and needs is not None:
            job.shard = choose(survey)
        if needs is None or (job.shard in survey.there if job.shard is not None else choose is not None):
            job.enter("nothing", _now())
            return
        if isinstance(needs, Lost):
            there, k = len(survey.there), survey.manifest.layout.k
            raise Unavailable(
                f"only {there} of the {k} shards that are needed can be had", hint="start nodes that hold some, then repair again"
            )
        job.shard = self._target(survey, needs, job.shard, take_over=take_over)
        if (against := self.objection(survey, job.shard)) is not None:
            raise against
        job.total = survey.manifest.layout.shard_size
        job.enter("moving", _now())
        job.move = await self._take(survey, job.shard)
        job.enter("summing", _now())
        await Rebuilding(self._means, survey, job, lambda: self._is_ours(survey, job)).run()
        await inherit(self._means, survey, [survey.present[shard] for shard in survey.there])
        await self._is_made(job)

    async def _receive(self, job: Job, giver: NodeId) -> None:
        case, shard = await self._surveyor.find(job.file_id), job.shard
        assert shard is not None, "named by the giver"
        if shard >= case.manifest.layout.n or (shard, giver) not in case.ever:
            raise Refused("a shard is handed over by a node that was given it")
        if await asyncio.to_thread(self._surveyor.has, case.manifest, shard):
            job.enter("nothing", _now())
            return
        if (holder := case.present[shard]) not in (giver, self._node.id):
            took, has = await self._surveyor.look_at(case.manifest, shard, holder)
            if has or took is None:
                raise Conflict(f"{self._surveyor.name(holder)} has taken this shard over")
        if (against := self.objection(case, shard)) is not None:
            raise against
        job.total = case.manifest.layout.shard_size
        job.enter("moving", _now())
        job.move = await self._take(case, shard)
        job.enter("fetching", _now())
        await fetch(self._means, case.manifest, job, giver, lambda: self._is_ours(case, job))
        await inherit(self._means, case, [giver, *case.present])
        await self._is_made(job)

    async def _is_made(self, job: Job) -> None:
        assert job.shard is not None, "chosen or named"
        with contextlib.suppress(MedshardError):  # what audits found before is stale, and no more
            await asyncio.to_thread(self.made, job.file_id, job.shard)
        job.enter("done", _now())

    def _ended(self, job: Job, task: asyncio.Task[Job]) -> None:
        self._tasks.pop(job.file_id, None)
        if task.cancelled():
            job.state, job.error = "failed", "given up: cancelled, or the node stops"
        elif (error := task.exception()) is not None:
            job.state, job.error = "failed", job.error or f"{type(error).__name__}: {error}"
            level = logging.INFO if isinstance(error, Absent | Conflict | Refused) else logging.ERROR  # what anybody can ask for in vain
            log.log(level, "repair failed", extra={"file": job.file_id.hex(), "shard": job.shard, "why": job.error})
        if job.state in ("done", "failed"):
            self._means.metrics.repaired(job.state)
        if job.state == "done":
            log.info("repaired", extra=job.to_json())

    def _target(self, survey: Survey, needs: Rebuild, wanted: int | None, *, take_over: bool) -> int:
        """Which shard. Raises Conflict where another node is about to have it, or where it is not missing."""
        if wanted is not None and wanted not in needs.targets:
            raise Conflict(f"shard {wanted} is not missing", hint=f"missing: {', '.join(map(str, needs.targets))}")
        mine = [shard for shard in needs.targets if survey.present[shard] == self._node.id]
        free = [shard for shard in needs.targets if take_over or not self._is_being_repaired(survey, shard)]
        choices = [wanted] if wanted is not None else mine or free or list(needs.targets)
        if choices[0] not in (*mine, *free):
            name = self._surveyor.name(survey.present[choices[0]])
            raise Conflict(f"{name} has taken shard {choices[0]} over and may be making it just now", hint="if it is not: --take-over")
        return choices[0]

    def _is_being_repaired(self, survey: Survey, shard: int) -> bool:
        return shard in survey.moves and survey.present[shard] in survey.answering

    def objection(self, case: Case, shard: int) -> MedshardError | None:
        """What every helper would have against this node as the shard's holder, and what it has itself."""
        against = objection_to_replacement(case.manifest, shard, self._node.id, case.known.ever, self._surveyor.institution)
        if against is None:
            try:
                stored = self._node.store.shard(case.manifest.file_id)
            except Damaged:  # what lies here in this shard's place is what is to be made again
                stored = None
            return Conflict(f"this node holds shard {stored.index} of this file") if stored and stored.index != shard else None
        names = ", ".join(self._surveyor.name(node) for node in self._surveyor.successors(case, shard)[:4])
        hint = f"repair it at one of {names}" if names else "no node may take it; bring the one back that has it"
        return Refused(str(against.error()), hint=hint)

    async def _take(self, case: Case, shard: int) -> int:
        """The index of the MOVE entry that gives this node the shard: the latest one, or a new one."""
        ledger, moved = self._node.ledger, case.moves.get(shard)
        if moved is not None and moved.node == self._node.id:
            index = moved.index
        else:
            author = Key(self._means.key.public_key().public_bytes_raw())
            body = Move(case.manifest.file_id, shard, self._node.id, os.urandom(nonce_size))
            (inclusion,) = await ledger.append([sign_entry(ledger.roster.origin, body, author, self._means.key.sign)])
            index = inclusion.index
        if not await ground.published(ledger, index):
            raise Unavailable(f"entry {index} has not reached this node's own mirror yet", hint="run the same command again")
        if not self._is_latest(case, shard, index):
            raise Conflict("another node has taken this shard over in the meantime")
        return index

    def _is_ours(self, case: Case, job: Job) -> bool:
        assert job.shard is not None, "chosen before"
        assert job.move is not None, "taken over before"
        return self._is_latest(case, job.shard, job.move)

    def _is_latest(self, case: Case, shard: int, index: int) -> bool:
        """Whether the MOVE entry at this index is the latest that counts, and is this node's; and whether the file is still to be kept."""
        try:
            known = ground.standing(self._node.ledger, case.manifest.file_id)
        except ground.Denied:
            return False
        now = counted(case.manifest, known.given, self._surveyor.institution).get(shard)
        return now is not None and (now.node, now.index) == (self._node.id, index)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _plan(survey: Survey) -> Rebuild | Lost | None:
    layout = survey.manifest.layout
    return plan(survey.there, code(layout.k, layout.n))
