"""Taking in: from a sender's yes in the spool to one sealed object of a series in the store.

What comes in is durable in the spool before it is answered. A series is packed into one sealed object when it is complete: when its
sender has gone (``settle``), when somebody asks for a commitment, or when nothing more has come for a while (``watch``).

Law: knows no way to read what is stored. Where it is stored, and what is remembered of it, are the ``Store`` and the ``Known`` that it is
given: the archive's, or those of what only sends. ``take`` and ``admit`` block and are safe to call from many threads; whatever is
``async`` belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol
from weakref import WeakValueDictionary

from medshard.gateway import model
from medshard.gateway.describing import describe
from medshard.gateway.model import Committed, Incoming, Instance, Outcome, Place, Receipt, Verdict
from medshard.gateway.packing import framed, instance_of, plan_of
from medshard.gateway.segments import Entry
from medshard.gateway.spool import Arrival, Spool
from medshard.packs import Plan
from medshard_protocol.errors import Absent, Damaged, Full, Malformed, MedshardError, Unavailable

quiet_s: Final = 15.0  # a series to which nothing came for so long is taken to be complete
retry_s: Final = 10.0  # after a put that failed for want of nodes
puts_at_once: Final = 2
check_bytes: Final = 4 * 1024 * 1024  # read at once of what may be spoiled
commitment_patience_s: Final = 3600.0  # of nodes that are out of reach, before a peer is told that it failed
elsewhere_s: Final = 1.0  # until it is looked again for what lies in another gateway's spool
log = logging.getLogger("medshard.gateway")

Series = tuple[str, str]  # Study Instance UID, Series Instance UID


@dataclass(frozen=True, slots=True)
class Rules:
    """What the department decided."""

    keep_both: bool = True  # other bytes under a known UID: keep them beside the first, or refuse them
    quiet_s: float = quiet_s


@dataclass(frozen=True, slots=True)
class Placed:
    """What became of a plan: SHA-256 and place of each part that is stored, by its path, and why others are not."""

    places: Mapping[Path, tuple[bytes, Place]]
    problems: tuple[str, ...] = ()


class Store(Protocol):
    """Where sealed objects go."""

    async def store(self, planned: Plan) -> Placed:
        """Durable on w nodes and in the ledger on return, as far as it says so. Raises Unavailable."""


class Known(Protocol):
    """What is remembered of instances that came in."""

    @property
    def shared(self) -> bool:
        """Whether other gateways may write here too."""

    def instances(self, uid: str) -> list[Instance]:
        """All that is known under one SOP Instance UID, the newest first. Raises Unavailable."""

    def put(self, instances: Iterable[Instance]) -> None:
        """Add instances; those without a place wait in the spool."""

    def flush(self) -> None:
        """What was put is durable on return, but for what waits in the spool."""

    def forget_waiting(self, kept: Iterable[tuple[str, bytes]]) -> None:
        """The spool holds these, by UID and SHA-256, and no others."""


def receipt_in(known: Known, sop_uid: str) -> Receipt:
    """What proves that an instance is stored. Raises Absent."""
    for instance in known.instances(sop_uid):
        if place := instance.place:
            return Receipt(instance.sop_class, sop_uid, instance.sha256, place.file_id, place.ledger_index, instance.flagged)
    raise Absent(f"no instance {sop_uid} is in the store", hint="it may still wait in a gateway's spool")


class Intake:
    """What is between a DICOM node, or STOW-RS, and the store. ``start`` it once."""

    def __init__(self, spool: Spool, known: Known, store: Store, owed_key: bytes, rules: Rules | None = None) -> None:
        self.loop: asyncio.AbstractEventLoop  # from ``start`` on
        self.spool = spool
        self.owed_key = owed_key  # what peers are still to be told is sealed with it
        self.rules = rules or Rules()
        self.counts: dict[str, int] = defaultdict(int)
        self._known = known
        self._store = store
        self._lock = threading.Lock()
        self._open: dict[Series, dict[Entry, float]] = {}  # what waits in the spool, and when it came (monotonic)
        self._spooled: dict[tuple[str, bytes], Entry] = {}
        self.damaged: set[Entry] = set()  # those of the spool that cannot be read; they hold up no others
        self._turns: WeakValueDictionary[Series, asyncio.Lock] = WeakValueDictionary()  # one put of a series at a time
        self._slots = asyncio.Semaphore(puts_at_once)
        self._not_before = 0.0
        self.prepare: Callable[[str, str], Awaitable[None]] | None = None  # what is made of a series before it leaves the spool
        self.last_failure = ""  # why the last put failed; empty after one that did not
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def folder(self) -> Path:
        """Where the gateway keeps what is its own."""
        return self.spool.folder.parent

    async def start(self) -> None:
        """Learn what the spool was left with. Raises Damaged or Malformed."""
        self.loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._recover)

    # -- in

    def take(self) -> Arrival:
        """Begin to take in one instance: ``write`` its file, then ``admit`` it. Raises Full."""
        return self.spool.begin()

    def admit(self, arrival: Arrival, sop_class: str = "", sop_uid: str = "") -> Verdict:
        """Decide about an instance whose bytes have all come; a yes is durable on return. The UIDs are what its sender says."""
        try:
            said = describe(arrival.read, arrival.size)
        except Malformed as error:
            arrival.drop()
            return self._counted(Verdict(Outcome.REFUSED, model.NOT_UNDERSTOOD, str(error), sop_class=sop_class, sop_uid=sop_uid))
        about = Verdict(Outcome.STORED, model.SUCCESS, "", said.study, said.series, said.sop_class, said.uid, arrival.digest())
        if (sop_uid and sop_uid != said.uid) or (sop_class and sop_class != said.sop_class):
            arrival.drop()
            return self._counted(_refused(about, model.MISMATCH, "the data set is of another SOP instance or class than its sender says"))
        try:
            known = self._known.instances(said.uid)
        except Unavailable as error:
            arrival.drop()
            return self._counted(_refused(about, model.OUT_OF_RESOURCES, str(error)))
        if any(each.sha256 == about.sha256 and self.is_safe(each) for each in known):
            arrival.drop()
            return self._counted(replace(about, outcome=Outcome.ALREADY))
        known = [each for each in known if each.sha256 != about.sha256]  # the same bytes wait in another gateway's spool: here as well
        if known and not self.rules.keep_both:
            arrival.drop()
            return self._counted(_refused(about, model.DUPLICATE, "other bytes are stored under this SOP Instance UID"))
        try:
            entry = arrival.finish(said.attributes)
        except Full as error:
            return self._counted(_refused(about, model.OUT_OF_RESOURCES, str(error)))
        self._keep(entry)
        return self._counted(replace(about, outcome=Outcome.KEPT_BESIDE) if known else about)

    async def receive(self, incoming: Incoming) -> Verdict:
        """Take in one instance that is here as a whole; a yes is durable on return."""
        return await asyncio.to_thread(self._receive, incoming)

    def _receive(self, incoming: Incoming) -> Verdict:
        try:
            arrival = self.take()
            arrival.write(incoming.file)
        except Full as error:
            return self._counted(Verdict(Outcome.REFUSED, model.OUT_OF_RESOURCES, str(error)))
        return self.admit(arrival, incoming.sop_class, incoming.sop_uid)

    # -- into the store

    async def settle(self, series: Iterable[Series] | None = None) -> None:
        """Store what waits of these series, or all that waits: durable on w nodes and in the ledger on return. Raises Unavailable."""
        with self._lock:
            wanted = [each for each in (list(self._open) if series is None else dict.fromkeys(series)) if each in self._open]
        results = await asyncio.gather(*(self._settle(each) for each in wanted), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def settle_soon(self, series: Iterable[Series]) -> None:
        """Begin to store what waits of these series, and do not wait for it. For any thread."""
        wanted = list(series)

        def begin() -> None:
            task = asyncio.ensure_future(self.settle(wanted))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

        if wanted:
            self.loop.call_soon_threadsafe(begin)

    async def watch(self) -> None:
        """Settle each series to which nothing has come for a while, for ever."""
        while True:
            await asyncio.sleep(min(0.5, self.rules.quiet_s / 2))
            now = time.monotonic()
            with self._lock:
                complete = [each for each, entries in self._open.items() if max(entries.values()) + self.rules.quiet_s <= now]
            if complete and now >= self._not_before:
                with contextlib.suppress(MedshardError, OSError):  # it is logged, and tried again
                    await self.settle(complete)

    async def committed(self, uids: Iterable[str], patience_s: float = 0.0) -> Committed:
        """What is safe of these SOP instances, after everything that waits of their series was stored; tried again for ``patience_s``."""
        wanted, deadline = list(dict.fromkeys(uids)), time.monotonic() + patience_s
        pause_s = elsewhere_s if self._known.shared else retry_s
        while True:
            try:
                here = await asyncio.to_thread(lambda: [each for uid in wanted for each in self._known.instances(uid)])
                waiting = {(each.study, each.series) for each in here if each.place is None}
                with contextlib.suppress(MedshardError, OSError):
                    await self.settle(waiting)
                found = await asyncio.to_thread(self._committed, wanted)
            except Unavailable:  # the index is away: nothing can be said for certain
                found = Committed({}, frozenset(wanted))
            if not found.waiting or time.monotonic() >= deadline:
                return found
            await asyncio.sleep(min(pause_s, max(0.0, deadline - time.monotonic())))

    def _committed(self, wanted: Iterable[str]) -> Committed:
        receipts: dict[str, Receipt] = {}
        waiting: set[str] = set()
        for uid in wanted:
            if any(each.place is None for each in self._known.instances(uid)):
                waiting.add(uid)  # other bytes under the same UID may be safe, but these are those that were sent last
            else:
                with contextlib.suppress(Absent):
                    receipts[uid] = self.receipt(uid)
        return Committed(receipts, frozenset(waiting))

    def commit_soon(self, uids: Iterable[str]) -> Future[Committed]:
        """``committed`` from another thread, with patience."""
        return asyncio.run_coroutine_threadsafe(self.committed(list(uids), commitment_patience_s), self.loop)

    # -- look

    def is_safe(self, instance: Instance) -> bool:
        """Whether an instance is in the store or in this gateway's spool, and not in another one's alone."""
        return instance.place is not None or ((entry := self.entry(instance)) is not None and entry not in self.damaged)

    def entry(self, instance: Instance) -> Entry | None:
        """Where an instance lies in the spool; None once it is in the store."""
        with self._lock:
            return self._spooled.get((instance.uid, instance.sha256))

    def receipt(self, sop_uid: str) -> Receipt:
        """What proves that an instance is stored. Raises Absent."""
        return receipt_in(self._known, sop_uid)

    def waiting(self) -> tuple[int, int]:
        """How many instances of how many series are in the spool and not yet in the store."""
        with self._lock:
            return sum(map(len, self._open.values())), len(self._open)

    # -- inside

    def _destroyed(self) -> Mapping[bytes, int]:
        """When (Unix milliseconds) files were destroyed on purpose, by SHA-256."""
        return {}

    def _recover(self) -> None:
        done, left = [], []
        entries = self.spool.recover()
        destroyed = self._destroyed() if entries else {}
        for entry in entries:
            stored = [each.place for each in self._known.instances(entry.attributes["sop-uid"]) if each.sha256 == entry.sha256]
            # Stored, destroyed before this process could tell its spool that it was stored, and not to come back.
            if any(stored) or destroyed.get(entry.sha256, -1) >= entry.received:
                done.append(entry)
            else:
                self._keep(entry)
                left.append((entry.attributes["sop-uid"], entry.sha256))
        self.spool.done(done)
        if self.spool.cut_off:
            self._say("cut-off", instances=self.spool.cut_off)  # nobody was told yes; what was lost with a disk looks the same
        self._known.forget_waiting(left)

    def _keep(self, entry: Entry) -> None:
        instance = instance_of(entry)
        with self._lock:
            before = self._spooled.get((instance.uid, instance.sha256))
            self._spooled[instance.uid, instance.sha256] = entry
        self._known.put([instance])
        with self._lock:
            self._open.setdefault((instance.study, instance.series), {})[entry] = time.monotonic()
            again = before in self.damaged and self._open[instance.study, instance.series].pop(before, None) is not None
        if before is not None and again:  # it was sent again
            self.damaged.discard(before)
            self.spool.done([before])

    async def _settle(self, series: Series) -> None:
        turn = self._turns.setdefault(series, asyncio.Lock())
        async with turn, self._slots:
            with self._lock:
                entries = [each for each in self._open.get(series, ()) if each not in self.damaged]
            if not entries:
                return
            began = time.monotonic()
            entries = await asyncio.to_thread(framed, entries, self.spool)
            preparing = asyncio.create_task(self._prepare(series))
            try:
                placed = await self._store.store(plan_of(series, entries, self.spool))
            except MedshardError as error:
                self._not_before = time.monotonic() + retry_s
                self.last_failure = str(error)
                self._say("not-stored", instances=len(entries), why=str(error))
                raise
            finally:
                await asyncio.wait([preparing])
            self.last_failure = ""
            done = await asyncio.to_thread(self._stored, series, entries, placed)
            about = {"instances": len(done), "bytes": sum(each.size for each in done), "seconds": round(time.monotonic() - began, 3)}
            self._say("stored" if done else "not-stored", **about)
        if len(done) < len(entries) and await asyncio.to_thread(self._set_aside, entries):
            await self._settle(series)  # the others

    async def _prepare(self, series: Series) -> None:
        if self.prepare is not None:
            with contextlib.suppress(Exception):  # whoever asks for it later hears what is wrong
                await self.prepare(*series)

    def _set_aside(self, entries: Iterable[Entry]) -> bool:
        """Find out which of these this disk has spoiled; whether there were any. A part that cannot be read fails its whole object."""
        found = set()
        for entry in entries:
            try:
                for at in range(0, entry.size, check_bytes):
                    self.spool.read(entry, at, at + check_bytes)
            except Damaged as error:
                found.add(entry)
                self.last_failure = str(error)
                self._say("damaged", why=str(error))
            except Absent:
                continue  # it was stored
        self.damaged |= found
        return bool(found)

    def _stored(self, series: Series, entries: list[Entry], placed: Placed) -> list[Entry]:
        done: list[Entry] = []
        instances: list[Instance] = []
        parts = [part for unit in plan_of(series, entries, self.spool).units for part in unit.parts]
        for part, entry in zip(parts, entries, strict=True):
            digest, place = placed.places.get(part.path, (b"", None))
            if digest == entry.sha256:
                instances.append(replace(instance_of(entry), place=place))
                done.append(entry)
        if len(done) < len(entries):
            self._not_before = time.monotonic() + retry_s
        self._known.put(instances)
        self._known.flush()  # durable, before the spool forgets them
        with self._lock:
            waiting = self._open.get(series, {})
            for entry in done:
                waiting.pop(entry, None)
                self._spooled.pop((entry.attributes["sop-uid"], entry.sha256), None)
            if not waiting:
                self._open.pop(series, None)
        self.spool.done(done)
        for problem in placed.problems:
            self._say("problem", why=problem)
        return done

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, MedshardError | OSError):
            self._say("bug", why=f"{type(error).__name__}: {error}")

    def _counted(self, verdict: Verdict) -> Verdict:
        with self._lock:
            self.counts[verdict.outcome] += 1
        return verdict

    def _say(self, event: str, **about: object) -> None:
        log.info(json.dumps({"event": event, **about}))  # numbers only: nothing here names a patient


def _refused(about: Verdict, status: int, reason: str) -> Verdict:
    return replace(about, outcome=Outcome.REFUSED, status=status, reason=reason)
