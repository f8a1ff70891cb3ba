"""The archive: the one thing that DIMSE, DICOMweb and import are built on.

What comes in is durable in the spool before it is answered. A series is packed into one sealed object when it is complete: when its
sender has gone (``settle``), when somebody asks for a commitment, or when nothing more has come for a while (``watch``). Until then, and
while nodes are out of reach, it is served from the spool.

Law: ``take`` and ``find`` block and are safe to call from many threads; whatever is ``async`` belongs to the vault's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

from medshard.gateway import model
from medshard.gateway.catalog import Catalog
from medshard.gateway.describing import describe
from medshard.gateway.indexing import catch_up
from medshard.gateway.model import Committed, Incoming, Instance, Outcome, Place, Query, Receipt, Row, Verdict
from medshard.gateway.objects import Objects
from medshard.gateway.packing import framed, instance_of, places, plan_of
from medshard.gateway.receipts import receipt_in
from medshard.gateway.segments import Entry
from medshard.gateway.spool import Arrival, Spool
from medshard.model import PutReport
from medshard.vault import Vault
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


class Stored:
    """One instance that can be read, from the spool or from the store."""

    def __init__(self, instance: Instance, archive: Archive) -> None:
        self.instance = instance
        self._archive = archive

    @property
    def size(self) -> int:
        """Bytes of its file."""
        return self.instance.size

    @property
    def transfer_syntax(self) -> str:
        """What its data set is encoded in."""
        return self.instance.transfer_syntax

    async def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of its file as it is stored. Raises Absent, Refused, Unavailable, Damaged."""
        stop = self.size if stop is None else min(stop, self.size)
        if start >= stop:
            return b""
        if (entry := self._archive.entry(self.instance)) is not None:
            with contextlib.suppress(Absent):
                return await asyncio.to_thread(self._archive.spool.read, entry, start, stop)
        place, objects = await self._archive.place_of(self.instance), self._archive.objects
        offset, _ = await objects.span(place.file_id, place.member)
        return await objects.read(place.file_id, offset + start, offset + stop)


class Archive:
    """One department's instances: those in the spool and those in the store. ``start`` it once."""

    def __init__(self, vault: Vault, spool: Spool, catalog: Catalog, objects: Objects, rules: Rules | None = None) -> None:
        self.vault = vault
        self.loop: asyncio.AbstractEventLoop  # the vault's, from ``start`` on
        self.spool = spool
        self.catalog = catalog
        self.objects = objects
        self.rules = rules or Rules()
        self.counts: dict[str, int] = defaultdict(int)
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
        self.after_changes: list[Callable[[], Awaitable[None]]] = []  # called when others have changed what the vault has
        self._behind = True  # whether the vault may have what the catalog has not
        self._made = catalog.made

    @property
    def folder(self) -> Path:
        """Where the gateway keeps what is its own."""
        return self.spool.folder.parent

    async def start(self) -> None:
        """Learn what the vault has and what the spool was left with. Raises Damaged or Malformed."""
        self.loop = asyncio.get_running_loop()
        await self.catch_up()
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
            known = self.catalog.instances(said.uid)
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
        pause_s = elsewhere_s if self.catalog.shared else retry_s
        while True:
            try:
                here = await asyncio.to_thread(lambda: [each for uid in wanted for each in self.catalog.instances(uid)])
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
            if any(each.place is None for each in self.catalog.instances(uid)):
                waiting.add(uid)  # other bytes under the same UID may be safe, but these are those that were sent last
            else:
                with contextlib.suppress(Absent):
                    receipts[uid] = self.receipt(uid)
        return Committed(receipts, frozenset(waiting))

    def commit_soon(self, uids: Iterable[str]) -> Future[Committed]:
        """``committed`` from another thread, with patience."""
        return asyncio.run_coroutine_threadsafe(self.committed(list(uids), commitment_patience_s), self.loop)

    # -- out

    def find(self, query: Query) -> Iterator[Row]:
        """Matches, newest study first. Blocks for some milliseconds at a time."""
        return self.catalog.find(query)

    def instances(self, study: str, series: str | None = None, uids: Collection[str] | None = None) -> list[Instance]:
        """The instances of a study or series that are served, by instance number."""
        return self.catalog.served(study, series, uids)

    async def open(self, instance: Instance) -> Stored:
        """Make an instance readable. Reading it from the store is announced with its whole study. Raises Refused or Unavailable."""
        if self.entry(instance) is None:
            files = await asyncio.to_thread(lambda: self.catalog.files_of(instance.study) | {self.place(instance).file_id})
            await self.objects.announce(sorted(files))
        return Stored(instance, self)

    def is_safe(self, instance: Instance) -> bool:
        """Whether an instance is in the store or in this gateway's spool, and not in another one's alone."""
        return instance.place is not None or ((entry := self.entry(instance)) is not None and entry not in self.damaged)

    def entry(self, instance: Instance) -> Entry | None:
        """Where an instance lies in the spool; None once it is in the store."""
        with self._lock:
            return self._spooled.get((instance.uid, instance.sha256))

    def place(self, instance: Instance) -> Place:
        """Where an instance lies in the store. Raises Absent, or Unavailable as long as it waits in another gateway's spool. May block."""
        if instance.place is not None:
            return instance.place
        for each in self.catalog.instances(instance.uid):
            if each.sha256 == instance.sha256 and each.place is not None:
                return each.place
            if each.sha256 == instance.sha256:
                raise Unavailable(
                    "another gateway has received it and not yet stored it", hint="ask again in some seconds, or ask that one"
                )
        raise Absent(f"instance {instance.uid} is here no more")

    async def place_of(self, instance: Instance) -> Place:
        """``place``, in the event loop."""
        return instance.place if instance.place is not None else await asyncio.to_thread(self.place, instance)

    def receipt(self, sop_uid: str) -> Receipt:
        """What proves that an instance is stored. Raises Absent."""
        return receipt_in(self.catalog, sop_uid)

    def waiting(self) -> tuple[int, int]:
        """How many instances of how many series are in the spool and not yet in the store."""
        with self._lock:
            return sum(map(len, self._open.values())), len(self._open)

    # -- inside

    async def catch_up(self) -> None:
        """Take in what others have put into the vault or the catalog, or taken out of it, since we last looked. Raises Unavailable."""
        self._behind |= self.vault.index_changed()
        await asyncio.to_thread(self.catalog.refresh)
        if self._made != self.catalog.made:  # somebody has made it anew, and knows nothing of our spool
            with self._lock:
                waiting = [instance_of(entry) for entry in self._spooled.values()]
            self.catalog.put(waiting)
            await asyncio.to_thread(self.catalog.flush)
            self._made = self.catalog.made
        if self._behind:
            await asyncio.to_thread(catch_up, self.vault, self.catalog)
            for act in self.after_changes:
                await act()
            self._behind = False

    def _recover(self) -> None:
        done, left = [], []
        for entry in self.spool.recover():
            stored = [each.place for each in self.catalog.instances(entry.attributes["sop-uid"]) if each.sha256 == entry.sha256]
            if any(stored):
                done.append(entry)
            else:
                self._keep(entry)
                left.append((entry.attributes["sop-uid"], entry.sha256))
        self.spool.done(done)
        if self.spool.cut_off:
            self._say("cut-off", instances=self.spool.cut_off)  # nobody was told yes; what was lost with a disk looks the same
        self.catalog.forget_waiting(left)

    def _keep(self, entry: Entry) -> None:
        instance = instance_of(entry)
        with self._lock:
            before = self._spooled.get((instance.uid, instance.sha256))
            self._spooled[instance.uid, instance.sha256] = entry
        self.catalog.put([instance])
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
                report = await self.vault.store(plan_of(series, entries, self.spool))
            except MedshardError as error:
                self._not_before = time.monotonic() + retry_s
                self.last_failure = str(error)
                self._say("not-stored", instances=len(entries), why=str(error))
                raise
            finally:
                await asyncio.wait([preparing])
            self.last_failure = ""
            done = await asyncio.to_thread(self._stored, series, entries, report)
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

    def _stored(self, series: Series, entries: list[Entry], report: PutReport) -> list[Entry]:
        placed = places(self.vault, report)
        done: list[Entry] = []
        instances: list[Instance] = []
        parts = [part for unit in plan_of(series, entries, self.spool).units for part in unit.parts]
        for part, entry in zip(parts, entries, strict=True):
            digest, place = placed.get(part.path, (b"", None))
            if digest == entry.sha256:
                instances.append(replace(instance_of(entry), place=place))
                done.append(entry)
        if len(done) < len(entries):
            self._not_before = time.monotonic() + retry_s
        self.catalog.put(instances)
        self.catalog.flush()  # durable, before the spool forgets them
        with self._lock:
            waiting = self._open.get(series, {})
            for entry in done:
                waiting.pop(entry, None)
                self._spooled.pop((entry.attributes["sop-uid"], entry.sha256), None)
            if not waiting:
                self._open.pop(series, None)
        self.spool.done(done)
        for problem in report.problems:
            self._say("problem", why=problem.message)
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
