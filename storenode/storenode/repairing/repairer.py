"""The replacement's part: take a shard over on the ledger, have it summed up, and store it if its root is right.

Law: nothing is stored that is not the registered shard, and only after the MOVE entry is published. One repair of a file runs at a time;
asking again joins it or goes on with what it left. Helpers that fail are left out and the line begins anew with the cell in hand; when the
root is wrong, helpers are exchanged one at a time until it is right. Who was exchanged then is for this node's log: nobody can check it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol.entries import Move, nonce_size, sign_entry
from medshard_protocol.erasure import code
from medshard_protocol.errors import Absent, Conflict, Damaged, MedshardError, Refused, Unavailable
from medshard_protocol.facts import Moved
from medshard_protocol.ids import FileId, Key, NodeId
from medshard_protocol.manifest import Manifest, manifest_bytes_max
from medshard_protocol.messages import manifest_path, root_header, shard_path, unpack_error
from medshard_protocol.placement import order as placement_order
from medshard_protocol.repair import Lost, Mask, Rebuild, frames, helper_sets, holders, plan, seed_size
from medshard_protocol.repairorder import (
    Link,
    Order,
    counted,
    line_up,
    objection_to_replacement,
    pack_keys,
    pack_seed,
    sign_order,
    unpack_offer,
)
from medshard_protocol.repairorder import nonce_size as order_nonce_size
from storenode.metrics import Metrics
from storenode.peers import Peers
from storenode.repairing import ground
from storenode.repairing.ground import Denied, Standing
from storenode.repairing.line import Broken, sums
from storenode.routes import Node
from storenode.shardstore import Incoming

quick_s: Final = 1.0  # holders that answer within this are alike
look_s: Final = 3.0  # for a holder to say whether it has its shard
seed_s: Final = 5.0  # for a helper to judge an order; it may wait two seconds for the ledger
manifest_s: Final = 20.0
at_once_max: Final = 2  # repairs that this node orders
jobs_max: Final = 256  # remembered for whoever asks how it went

_T = TypeVar("_T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Survey:
    """What the present holders of a file say, asked just now."""

    manifest: Manifest
    known: Standing
    moves: dict[int, Moved]
    present: tuple[NodeId, ...]  # who should hold each shard
    there: tuple[int, ...]  # shards that are there, those of quick nodes first
    answering: frozenset[NodeId]

    def links(self, shards: Sequence[int]) -> list[Link]:
        """The helpers that have these shards."""
        return [Link(self.present[shard], shard) for shard in shards]


@dataclass
class Job:
    """How one repair goes."""

    file_id: FileId
    state: str = "looking"  # then moving, summing, done, failed, nothing
    shard: int | None = None
    move: int | None = None
    done: int = 0
    total: int = 0
    lines: int = 0  # that were begun
    broken: list[str] = field(default_factory=list)  # helpers that failed, and how
    suspects: list[str] = field(default_factory=list)  # with whom the root was wrong, and right without
    error: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For people and programs."""
        return {name: value for name, value in vars(self).items() if name != "file_id"} | {"file": self.file_id.hex()}


class Repairer:
    """One node's repairs. Lives in one event loop."""

    def __init__(self, node: Node, key: Ed25519PrivateKey, peers: Peers, metrics: Metrics) -> None:
        self._node, self._key, self._peers, self._metrics = node, key, peers, metrics
        self._tasks: dict[FileId, asyncio.Task[Job]] = {}
        self._jobs: dict[FileId, Job] = {}
        self._slots = asyncio.Semaphore(at_once_max)

    async def repair(self, file_id: FileId, shard: int | None = None, *, take_over: bool = False) -> Job:
        """Make one lost shard of a file again, here; the first that is missing if none is named. Raises MedshardError.

        Joins a repair of the file that runs. ``take_over`` goes on where another node said that it takes the shard and is still without it.
        """
        return await asyncio.shield(self.begin(file_id, shard, take_over=take_over))

    def begin(self, file_id: FileId, shard: int | None = None, *, take_over: bool = False) -> asyncio.Task[Job]:
        """Start ``repair`` in the background, if it does not run."""
        task = self._tasks.get(file_id)
        if task is None:
            job = Job(file_id, shard=shard)
            while len(self._jobs) >= jobs_max:
                del self._jobs[next(iter(self._jobs))]
            self._jobs.pop(file_id, None)
            self._jobs[file_id] = job
            task = self._tasks[file_id] = asyncio.create_task(self._repair(job, take_over=take_over))
            task.add_done_callback(lambda done: self._ended(job, done))
        return task

    def job(self, file_id: FileId) -> Job:
        """How the latest repair of a file goes, or went. Raises Absent."""
        try:
            return self._jobs[file_id]
        except KeyError:
            raise Absent("this node has not repaired this file since it started") from None

    async def close(self) -> None:
        """Give up what runs; it can be gone on with after a restart."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def look(self, file_id: FileId, shard: int | None = None) -> dict[str, Any]:
        """What ``repair`` would do, and nothing of it done. Raises MedshardError."""
        survey = await self._survey(file_id)
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
            against = self._objection(survey, target)
            chosen = next(helper_sets(self._ranked(survey, target), survey.manifest.layout.k))
            told |= {
                "shard": target,
                "bytes": survey.manifest.layout.shard_size,
                "helpers": [names.get(link.node, "") for link in line_up(chosen, self._node.id, self._institution)],
                "objection": "" if against is None else str(against),
                "next_in_placement": [names[node] for node in self._successors(survey, target)[:4]],
            }
        return told

    # -- the steps

    async def _repair(self, job: Job, *, take_over: bool) -> Job:
        began = time.monotonic()
        try:
            async with self._slots:
                survey = await self._survey(job.file_id)
                needs = _plan(survey)
                if needs is None or (job.shard is not None and job.shard in survey.there):
                    job.state = "nothing"
                    return job
                if isinstance(needs, Lost):
                    there, k = len(survey.there), survey.manifest.layout.k
                    raise Unavailable(
                        f"only {there} of the {k} shards that are needed can be had", hint="start nodes that hold some, then repair again"
                    )
                job.shard = self._target(survey, needs, job.shard, take_over=take_over)
                if (against := self._objection(survey, job.shard)) is not None:
                    raise against
                job.state, job.total = "moving", survey.manifest.layout.shard_size
                job.move = await self._take(survey, job.shard)
                job.state = "summing"
                await _Rebuilding(self, survey, job).run()
                job.state = "done"
        except MedshardError as error:
            job.state, job.error = "failed", str(error)
            raise
        finally:
            job.seconds = round(time.monotonic() - began, 3)
        return job

    def _ended(self, job: Job, task: asyncio.Task[Job]) -> None:
        self._tasks.pop(job.file_id, None)
        if task.cancelled():
            job.state, job.error = "failed", "given up because the node stops"
            return
        error = task.exception()
        if error is not None:
            job.state, job.error = "failed", job.error or f"{type(error).__name__}: {error}"
            log.error("repair failed", extra={"file": job.file_id.hex(), "shard": job.shard, "why": job.error})
        if job.state in ("done", "failed"):
            self._metrics.repaired(job.state)
        if job.state == "done":
            log.info("repaired", extra=job.to_json())

    async def _survey(self, file_id: FileId) -> Survey:
        try:
            known = ground.standing(self._node.ledger, file_id)
        except Denied as denied:
            raise denied.objection.error() from None
        manifest = await self._manifest(file_id, known)
        moves = counted(manifest, known.given, self._institution)
        present = holders(manifest, moves)
        looks = await asyncio.gather(*(self._look_at(manifest, shard, node) for shard, node in enumerate(present)))
        there = sorted((took // quick_s, shard) for shard, (took, has) in enumerate(looks) if has and took is not None)
        answering = frozenset(node for node, (took, _) in zip(present, looks, strict=True) if took is not None)
        return Survey(manifest, known, moves, present, tuple(shard for _, shard in there), answering)

    async def _manifest(self, file_id: FileId, known: Standing) -> Manifest:
        """The registered manifest, from this node or any other."""
        try:
            manifest = Manifest.from_bytes(self._node.store.manifest(file_id))
            if ground.is_described(manifest, known):
                return manifest
        except MedshardError:
            pass
        for node in placement_order(file_id, self._node.ledger.roster):
            if node.id == self._node.id:
                continue
            try:
                async with asyncio.timeout(manifest_s), self._peers.open(node.id, "GET", manifest_path(file_id), b"", look_s) as answer:
                    if answer.status != 200 or (answer.content_length or 0) > manifest_bytes_max:
                        continue
                    data = await answer.content.readexactly(answer.content_length or 0)
                manifest = Manifest.from_bytes(data)
            except (MedshardError, aiohttp.ClientError, OSError, TimeoutError, EOFError):
                continue
            if ground.is_described(manifest, known):
                return manifest
        raise Unavailable("no node that answers has the manifest of this file", hint="try again when more nodes are up")

    async def _look_at(self, manifest: Manifest, shard: int, node: NodeId) -> tuple[float | None, bool]:
        """(seconds to its answer, None for none; whether it has the shard)."""
        if node == self._node.id:
            return 0.0, await asyncio.to_thread(self._has, manifest, shard)
        began = time.monotonic()
        try:
            async with self._peers.open(node, "HEAD", shard_path(manifest.file_id, shard), b"", look_s) as answer:
                root = answer.headers.get(root_header, "")
                return time.monotonic() - began, answer.status == 204 and root == manifest.shards[shard].root.hex()
        except MedshardError:
            return None, False

    def _has(self, manifest: Manifest, shard: int) -> bool:
        """Whether this node has a shard and its manifest, whole. Blocking."""
        try:
            own = self._node.store.shard_at(manifest.file_id, shard)
            self._node.store.manifest(manifest.file_id)
            return own.root == manifest.shards[shard].root and not self._node.store.bad_cells(own)
        except MedshardError:
            return False

    def _target(self, survey: Survey, needs: Rebuild, wanted: int | None, *, take_over: bool) -> int:
        """Which shard. Raises Conflict where another node is about to have it, or where it is not missing."""
        if wanted is not None and wanted not in needs.targets:
            raise Conflict(f"shard {wanted} is not missing", hint=f"missing: {', '.join(map(str, needs.targets))}")
        mine = [shard for shard in needs.targets if survey.present[shard] == self._node.id]
        free = [shard for shard in needs.targets if take_over or not self._is_being_repaired(survey, shard)]
        choices = [wanted] if wanted is not None else mine or free or list(needs.targets)
        if choices[0] not in (*mine, *free):
            name = self._name(survey.present[choices[0]])
            raise Conflict(f"{name} has taken shard {choices[0]} over and may be making it just now", hint="if it is not: --take-over")
        return choices[0]

    def _is_being_repaired(self, survey: Survey, shard: int) -> bool:
        return shard in survey.moves and survey.present[shard] in survey.answering

    def _objection(self, survey: Survey, shard: int) -> MedshardError | None:
        """What every helper would have against this node as the shard's holder."""
        against = objection_to_replacement(survey.manifest, shard, self._node.id, survey.known.ever, self._institution)
        if against is None:
            stored = self._node.store.shard(survey.manifest.file_id)
            return Conflict(f"this node holds shard {stored.index} of this file") if stored and stored.index != shard else None
        names = ", ".join(self._name(node) for node in self._successors(survey, shard)[:4])
        hint = f"repair it at one of {names}" if names else "no node may take it; bring the one back that has it"
        return Refused(str(against.error()), hint=hint)

    def _successors(self, survey: Survey, shard: int) -> list[NodeId]:
        """The nodes that may take a shard over, in the order of placement."""
        ranked = [node.id for node in placement_order(survey.manifest.file_id, self._node.ledger.roster)]
        ever, institution = survey.known.ever, self._institution
        return [node for node in ranked if objection_to_replacement(survey.manifest, shard, node, ever, institution) is None]

    async def _take(self, survey: Survey, shard: int) -> int:
        """The index of the MOVE entry that gives this node the shard: the latest one, or a new one."""
        ledger, moved = self._node.ledger, survey.moves.get(shard)
        if moved is not None and moved.node == self._node.id:
            index = moved.index
        else:
            author = Key(self._key.public_key().public_bytes_raw())
            body = Move(survey.manifest.file_id, shard, self._node.id, os.urandom(nonce_size))
            (inclusion,) = await ledger.append([sign_entry(ledger.roster.origin, body, author, self._key.sign)])
            index = inclusion.index
        if not await ground.published(ledger, index):
            raise Unavailable(f"entry {index} has not reached this node's own mirror yet", hint="run the same command again")
        now = counted(survey.manifest, ground.given(ledger, survey.manifest.file_id), self._institution).get(shard)
        if now is None or (now.node, now.index) != (self._node.id, index):
            raise Conflict("another node has taken this shard over in the meantime")
        return index

    # -- for the parts

    @property
    def _institution(self) -> Any:
        return ground.institutions(self._node.ledger.state)

    def _ranked(self, survey: Survey, target: int) -> list[Link]:
        """Helpers, best first: those of other institutions, then the quick ones."""
        institution = self._institution
        own = institution(self._node.id)
        links = survey.links([shard for shard in survey.there if shard != target])
        return sorted(links, key=lambda link: institution(link.node) == own)

    def _name(self, node: NodeId) -> str:
        return next((each.name for each in self._node.ledger.roster.nodes if each.id == node), node.hex()[:16])


class _Rebuilding:
    """One shard: lines begun until one is whole, and shards summed until one has the root."""

    def __init__(self, repairer: Repairer, survey: Survey, job: Job) -> None:
        assert job.shard is not None, "chosen before"
        self._of, self._survey, self._job = repairer, survey, job
        self._node, self._manifest, self._target = repairer._node, survey.manifest, job.shard
        self._ranked = repairer._ranked(survey, job.shard)
        self._out: dict[NodeId, NodeId] = {}  # who failed, by whom we know it
        self._forgave = False
        self._wrong: list[frozenset[NodeId]] = []  # helpers of each shard that had a wrong root

    async def run(self) -> None:
        """Make the shard and store it. Raises Unavailable when there is no other set of helpers to try."""
        layout = self._manifest.layout
        for _ in range(2 * layout.k + 16):
            incoming = self._node.store.begin(layout.shard_size, layout.cell_size)
            try:
                used = await self._fill(incoming)
                await self._node.store.commit_described(incoming, self._manifest, self._target)
            except Damaged:
                self._wrong.append(used)
                log.warning("a repaired shard has a wrong root: exchanging a helper", extra={"file": self._job.file_id.hex()})
            else:
                self._name_suspects(used)
                return
            finally:
                self._node.store.abandon(incoming)
        raise Unavailable(f"the shard came out wrong with {len(self._wrong)} sets of helpers", hint="more than one helper sends wrong sums")

    async def _fill(self, incoming: Incoming) -> frozenset[NodeId]:
        """Sum up the whole shard, along as many lines as it takes; all helpers that were in one."""
        layout, used = self._manifest.layout, set[NodeId]()
        self._job.done = 0
        while incoming.received < layout.shard_size:
            chain = self._line()
            first = incoming.received // layout.cell_size
            before = incoming.received
            self._job.lines += 1
            try:
                await self._follow(chain, first, incoming)
            except _Failed as failed:
                for broken in failed.each:
                    self._leave_out(broken, {link.node for link in chain}, chain[-1].node)
            if incoming.received > before:
                used |= {link.node for link in chain}
        return frozenset(used)

    def _line(self) -> tuple[Link, ...]:
        """The next set of helpers that has not been found wrong. Raises Unavailable."""
        layout = self._manifest.layout
        left = [link for link in self._ranked if link.node not in self._out]
        for chosen in helper_sets(left, layout.k):
            if not any(frozenset(link.node for link in chosen) >= wrong for wrong in self._wrong):
                return line_up(chosen, self._node.id, self._of._institution)
        if self._out and not self._forgave:
            # A helper may have accused an honest one: try once without those who accused, and with those who were.
            self._forgave = True
            accused = {who for who, by in self._out.items() if by not in (who, self._node.id)}
            accusers = {by for who, by in self._out.items() if who in accused}
            self._out = {who: by for who, by in self._out.items() if who not in accused} | dict.fromkeys(accusers, self._node.id)
            return self._line()
        listed = "; ".join(self._job.broken[-6:])
        raise Unavailable(
            f"no set of {layout.k} helpers is left ({listed})", hint="start nodes that hold shards of this file, then try again"
        )

    async def _follow(self, chain: tuple[Link, ...], first: int, incoming: Incoming) -> None:
        """One line from cell ``first`` on. Raises _Failed."""
        job, layout = self._job, self._manifest.layout
        assert job.move is not None, "taken over before"
        order = sign_order(
            self._node.ledger.roster.origin,
            job.file_id,
            self._target,
            job.move,
            chain,
            first,
            os.urandom(order_nonce_size),
            self._of._key.sign,
        )
        seeds = [os.urandom(seed_size) for _ in chain]
        offers = await self._of_each("seed", order, [pack_seed(order, seed) for seed in seeds], unpack_offer)
        keys = pack_keys(order.id, offers)
        await self._of_each("keys", order, [keys] * len(chain), lambda body: None)
        masks = Mask(*seeds)
        try:
            async with sums(self._of._peers, self._node.id, order, len(chain) - 1) as last:
                for frame in frames(layout, first):
                    total = await last.read(frame.length)
                    await asyncio.to_thread(lambda total=total: incoming.write([masks.add(total)]))  # type: ignore[misc]
                    job.done = incoming.received
        except Broken as broken:
            raise _Failed([broken]) from None

    async def _of_each(self, what: str, order: Order, bodies: Sequence[bytes], parse: Callable[[bytes], _T]) -> list[_T]:
        """What each helper answers. Raises _Failed with those that do not."""
        path = f"/v1/repair/{order.file_id.hex()}/{order.shard}/{what}"

        async def one(link: Link, body: bytes) -> _T | Broken:
            try:
                status, answer = await self._of._peers(link.node, "POST", path, body, seed_s)
                if status not in (200, 204):
                    raise unpack_error(status, answer, "it")
                return parse(answer)
            except MedshardError as error:
                return Broken(link.node, self._node.id, str(error))

        answers = await asyncio.gather(*(one(link, body) for link, body in zip(order.chain, bodies, strict=True)))
        if failed := [each for each in answers if isinstance(each, Broken)]:
            raise _Failed(failed)
        return [each for each in answers if not isinstance(each, Broken)]

    def _leave_out(self, broken: Broken, line: set[NodeId], last: NodeId) -> None:
        """Go on without who failed. If what is told of it cannot be, go on without the one that told it to us."""
        sane = broken.who in line and broken.accuser in (*line, self._node.id)
        who, accuser = (broken.who, broken.accuser) if sane else (last, self._node.id)
        self._out[who] = accuser
        self._job.broken.append(f"{self._of._name(who)}: {broken.why}")
        self._of._metrics.helper_exchanged("broken")
        log.warning("a repair's helper failed", extra={"node_failed": self._of._name(who), "why": broken.why})

    def _name_suspects(self, good: frozenset[NodeId]) -> None:
        """With whom the shard came out wrong, and right without. This node's own finding: others would have to believe it."""
        if not self._wrong:
            return
        common = frozenset.intersection(*self._wrong) - good
        for node in sorted(common or frozenset.union(*self._wrong) - good):
            self._job.suspects.append(self._of._name(node))
            self._of._metrics.helper_exchanged("wrong")
        log.warning("helpers gave wrong sums", extra={"file": self._job.file_id.hex(), "suspects": self._job.suspects})


class _Failed(Exception):
    def __init__(self, each: Sequence[Broken]) -> None:
        super().__init__(str(each))
        self.each = each


def _plan(survey: Survey) -> Rebuild | Lost | None:
    layout = survey.manifest.layout
    return plan(survey.there, code(layout.k, layout.n))
