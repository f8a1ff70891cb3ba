"""Before a byte of a shard leaves: has the reader said so in the ledger, and may it read?

Law: the ledger decides, as of the index of the ACCESS entry that the reader shows. The entry must stand in this node's own mirror, under a
checkpoint that a quorum published; what the reader says about it is not believed. Times are those of the cosigners, never this node's
clock. Only when no published checkpoint has come for a while may an emergency identity read first and be written down afterwards.

``judge`` and ``Ages`` decide and know no network; ``Gate`` waits, remembers and keeps what must be appended later.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from medshard_protocol.checkpoint import Checkpoint, Note, cosigned_times, open_published
from medshard_protocol.entries import Access, Entry, Type
from medshard_protocol.errors import Malformed, MedshardError, Refused
from medshard_protocol.facts import Facts
from medshard_protocol.ids import FileId, Key
from medshard_protocol.proofs import Inclusion
from medshard_protocol.rights import Reason, Refusal, Right, not_yet
from medshard_protocol.roster import Roster
from medshard_protocol.sharing import (
    access_header,
    checkpoint_header,
    emergency_header,
    unpack_checkpoint,
    unpack_emergency,
    unpack_tickets,
)
from medshard_protocol.vouchers import unpack_vouchers, vouchers_header
from storenode.emergency import Emergencies
from storenode.ledger import Ledger, Published
from storenode.metrics import Metrics

enforced = True  # whether reads without a ticket are refused
ticket_s: Final = 600.0  # how long one ACCESS entry opens its files
wait_s: Final = 1.0  # for an entry or a checkpoint that is on its way to this node
out_of_reach_s: Final = 10.0  # a quorum publishes a fresh head every 5 s
admitted_max: Final = 65_536  # remembered decisions; 200 bytes each


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shown:
    """An entry that a reader pointed at, as it stands in this node's mirror."""

    place: int
    entry: Entry | None  # None for one that cannot be parsed
    effective: bool


def judge(facts: Facts, shown: Shown, file_id: FileId, caller: Key, now: float, age: float | None) -> Right | Refusal:
    """Say why ``caller`` may read a file by this entry, or why not.

    ``now`` is the cosigners' time of the newest published checkpoint; ``age`` at most how old the entry is, None if nobody knows.
    """
    entry = shown.entry
    if entry is None or not isinstance(entry.body, Access):
        return Refusal(Reason.NOT_AN_ACCESS, f"entry {shown.place}")
    if entry.author != caller:
        return Refusal(Reason.OTHER_READER, f"entry {shown.place}")
    if not shown.effective:
        return Refusal(Reason.VOID, f"entry {shown.place}")
    if file_id not in entry.body.file_ids:
        return Refusal(Reason.OTHER_FILE, f"entry {shown.place}")
    right = facts.right_at(file_id, caller, shown.place, now)
    if isinstance(right, Refusal):
        return right
    if facts.vouched_at(caller, facts.size) is None:  # a stolen key is shut out at once, with the tickets it has
        return Refusal(Reason.WITHDRAWN)
    known = facts.registration(file_id)
    if known is not None and known.is_erased(now):
        return Refusal(Reason.ERASED)
    if right.until and now > right.until:
        return Refusal(Reason.ENDED)
    if age is None or age > ticket_s:
        return Refusal(Reason.EXPIRED, f"entry {shown.place}")
    return right


class Ages:
    """How old an entry is, told by the published checkpoints that do not have it yet."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._times: list[float] = []
        self._heard_at = 0.0

    def note(self, size: int, cosigned: float, heard_at: float) -> bool:
        """Take in a published checkpoint; ``heard_at`` by the monotonic clock. False for one that is not newer than the last."""
        if self._times and (cosigned <= self._times[-1] or size < self._sizes[-1]):
            return False
        self._sizes.append(size)
        self._times.append(cosigned)
        self._heard_at = heard_at
        while len(self._times) > 2 and self._times[1] < cosigned - 2 * ticket_s:
            del self._sizes[0], self._times[0]
        return True

    @property
    def now(self) -> float:
        """The time of the newest, by its cosigners' clocks; 0 if none was noted."""
        return self._times[-1] if self._times else 0.0

    def reach(self, place: int) -> bool:
        """Whether a checkpoint from before this entry is known."""
        return bool(self._sizes) and self._sizes[0] <= place

    def of(self, place: int, monotonic: float) -> float | None:
        """At most how many seconds ago this entry came to be; None if no checkpoint from before it is known."""
        at = bisect_right(self._sizes, place) - 1
        return None if at < 0 else self._times[-1] - self._times[at] + max(0.0, monotonic - self._heard_at)


class Gate:
    """One node's gate. Lives in one event loop."""

    def __init__(self, ledger: Ledger, emergencies: Emergencies, metrics: Metrics) -> None:
        self._ledger = ledger
        self._journal = ledger.journal
        self._emergencies = emergencies
        self._metrics = metrics
        self._ages = Ages()
        self._fresh_at = time.monotonic()
        self._vouched = 0  # how many entries are published, by vouchers
        self._admitted: dict[tuple[Key, FileId, int], float] = {}  # until when, by the monotonic clock
        self._stamp = (0, 0)  # of the state that ``_admitted`` was decided by
        self._journal.on_published.append(self._note)
        if (published := self._journal.published) is not None:
            self._note(published, time.monotonic())

    async def admit(self, caller: Key, headers: Mapping[str, str], file_ids: Sequence[FileId]) -> None:
        """Return if the caller may read all of these files now. Raises Refused with the reason, or Malformed."""
        emergency = headers.get(emergency_header)
        try:
            if emergency is not None:
                await self._admit_in_emergency(caller, unpack_emergency(emergency), file_ids)
                return
            shown = headers.get(access_header)
            if shown is None:
                if enforced:
                    raise _Denied(Refusal(Reason.NO_ENTRY))
                return
            await self._admit_by(caller, unpack_tickets(shown), file_ids, headers)
        except _Denied as denied:
            self._metrics.denied(denied.refusal.reason)
            raise denied.refusal.error() from None

    async def show(self, inclusion: Inclusion) -> int:
        """Learn from a reader's proof that an entry is published; give its place. Raises Refused or Malformed."""
        try:
            self._check(inclusion)
            await self._wait(lambda: self._pending([inclusion.index]))
        except _Denied as denied:
            self._metrics.denied(denied.refusal.reason)
            raise denied.refusal.error() from None
        return inclusion.index

    @property
    def is_out_of_reach(self) -> bool:
        """Whether no published checkpoint has come for so long that emergencies count."""
        _ = self._journal.published  # what was heard is believed once it is checked
        return time.monotonic() - self._fresh_at > out_of_reach_s

    # -- the ordinary way

    async def _admit_by(self, caller: Key, places: Sequence[int], file_ids: Sequence[FileId], headers: Mapping[str, str]) -> None:
        if self._all_admitted(caller, places, file_ids):
            return
        checkpoint, vouchers = headers.get(checkpoint_header), headers.get(vouchers_header)
        if checkpoint is not None:
            note = unpack_checkpoint(checkpoint)
            if vouchers is None or not self._take_vouched(note, unpack_vouchers(vouchers)):
                self._hear(note, min(places))
        refusal = self._unreadable(caller, places, file_ids)
        if refusal is not None and refusal.reason in not_yet:
            await self._wait(lambda: self._pending(places) if self._unreadable(caller, places, file_ids) else None)
            refusal = self._unreadable(caller, places, file_ids)
        if refusal is not None:
            raise _Denied(refusal)

    def _all_admitted(self, caller: Key, places: Sequence[int], file_ids: Sequence[FileId]) -> bool:
        facts = self._journal.state
        stamp = (facts.count(Type.ROSTER), facts.count(Type.ERASE))
        if stamp != self._stamp or len(self._admitted) > admitted_max:
            self._admitted.clear()
            self._stamp = stamp
        now = time.monotonic()
        return all(any(self._admitted.get((caller, file_id, place), 0.0) > now for place in places) for file_id in file_ids)

    def _unreadable(self, caller: Key, places: Sequence[int], file_ids: Sequence[FileId]) -> Refusal | None:
        """Decide, and remember; the reason why the first file is refused that is."""
        shown = self._find(places)
        if not shown:
            return self._pending(places)
        facts, now = self._journal.state, time.monotonic()
        for file_id in file_ids:
            refusals = []
            for each in shown:
                age = self._ages.of(each.place, now)
                verdict = judge(facts, each, file_id, caller, self._ages.now, age)
                if isinstance(verdict, Right):
                    left = ticket_s - (age or 0.0)
                    until = min(left, verdict.until - self._ages.now) if verdict.until else left
                    self._admitted[caller, file_id, each.place] = now + until
                    break
                refusals.append(verdict)
            else:
                return self._pending(places) or max(refusals, key=_tells_most)
        return None

    def _find(self, places: Sequence[int]) -> list[Shown]:
        """The entries that stand in the mirror, are published, and are folded."""
        facts = self._journal.state
        end = min(facts.size, self._published_size(max(places)))
        return [
            Shown(place, _parse(self._journal.entries(place, place + 1)[0]), facts.entry_effective(place))
            for place in places
            if place < end
        ]

    def _pending(self, places: Sequence[int]) -> Refusal | None:
        """What is still missing before the last of these can be judged; None if nothing."""
        last = max(places)
        if last >= min(self._journal.head.size, self._journal.state.size):
            return Refusal(Reason.NOT_IN_MIRROR, f"entry {last}")
        if last >= self._published_size(last):
            return Refusal(Reason.NOT_PUBLISHED, f"entry {last}")
        return None

    async def _wait(self, pending: Callable[[], Refusal | None]) -> None:
        """Wait until nothing is pending. Raises what still is when it has taken too long."""
        refusal = pending()
        if refusal is None or refusal.reason not in not_yet:
            return
        if refusal.reason is Reason.NOT_IN_MIRROR:
            self._ledger.hurry()
        try:
            async with asyncio.timeout(wait_s):
                while (refusal := pending()) is not None and refusal.reason in not_yet:
                    await self._journal.news.wait()
        except TimeoutError:
            assert refusal is not None, "or the wait would have ended"
            raise _Denied(refusal) from None

    # -- checkpoints

    def _note(self, published: Published, heard_at: float) -> None:
        self._take_time(published.checkpoint.size, cosigned_at(published.note, self._ledger.roster), heard_at)

    def _take_time(self, size: int, cosigned: float, heard_at: float) -> None:
        if self._ages.note(size, cosigned, heard_at):
            self._fresh_at = heard_at

    def _hear(self, note: bytes, first: int) -> None:
        """Look at the published checkpoint that a reader shows, since this node may not have been told yet. One that does not hold under
        this node's roster helps nobody: what the node hears by itself counts, as without it. Raises Malformed."""
        if not self._ages.reach(first):  # what was heard before may tell how old the entry is at most
            _ = self._journal.published
        try:
            self._journal.believe(note)
        except Malformed:
            raise
        except MedshardError as error:
            log.info("a checkpoint that a reader showed is not believed: %s", error)

    def _published_size(self, last: int) -> int:
        """How many entries are published, as far as this node must know to judge the one at ``last``."""
        if last < self._vouched:
            return self._vouched
        published = self._journal.published
        return max(self._vouched, published.checkpoint.size if published else 0)

    def _take_vouched(self, note: bytes, vouchers: Sequence[bytes]) -> bool:
        """Believe the checkpoint that a reader shows if a quorum vouches to this node for having cosigned it; whether that is so.

        It counts here and nowhere else: vouchers convince nobody but this node, so what the journal keeps is checked by signatures.
        Raises Malformed.
        """
        try:
            opened = Note.from_bytes(note)
            checkpoint = Checkpoint.from_text(opened.text)
            if checkpoint.size <= self._vouched:
                return True
            if checkpoint.origin != self._ledger.roster.origin or checkpoint.size > self._journal.head.size:
                return False
            roster = self._journal.roster_of(checkpoint.size)
        except Refused:
            return False
        times = self._ledger.mirror.voucher.who(roster, opened, vouchers)
        if not roster.has_quorum(times) or self._journal.tree.root(checkpoint.size) != checkpoint.root:
            return False
        self._vouched = checkpoint.size
        self._take_time(checkpoint.size, float(statistics.median(times.values())), time.monotonic())
        return True

    def _check(self, inclusion: Inclusion) -> None:
        """Hear the checkpoint of a proof, if it holds. Each is checked once."""
        published = self._journal.published
        if published is None or inclusion.checkpoint != published.note:
            try:
                checkpoint = open_published(inclusion.checkpoint, self._ledger.roster)
            except Refused as error:
                raise _Denied(Refusal(Reason.OLD_ROSTER, str(error))) from None
            seen = {inclusion.checkpoint: checkpoint}
        else:
            checkpoint = published.checkpoint
            seen = {published.note: checkpoint}
        try:
            inclusion.verify(self._ledger.roster, seen)
        except Refused as error:
            raise _Denied(Refusal(Reason.FORGED, str(error))) from None
        if published is None or checkpoint.size > published.checkpoint.size:
            self._journal.hear(inclusion.checkpoint)

    # -- emergencies

    async def _admit_in_emergency(self, caller: Key, entry: Entry, file_ids: Sequence[FileId]) -> None:
        facts, body = self._journal.state, entry.body
        if not self.is_out_of_reach:
            raise _Denied(Refusal(Reason.WITHIN_REACH))
        if entry.author != caller:
            raise _Denied(Refusal(Reason.OTHER_READER))
        if not isinstance(body, Access) or not body.reason or not facts.is_marked(facts.roster.emergency, caller):
            raise _Denied(Refusal(Reason.NO_EMERGENCY))
        if facts.vouched_at(caller, facts.size) is None:
            raise _Denied(Refusal(Reason.WITHDRAWN))
        for file_id in file_ids:
            if file_id not in body.file_ids:
                raise _Denied(Refusal(Reason.OTHER_FILE))
            known = facts.registration(file_id)
            if known is None or known.is_erased(self._ages.now):
                raise _Denied(Refusal(Reason.UNREGISTERED if known is None else Reason.ERASED))
        try:
            entry.verify(self._ledger.roster.origin)
        except Refused:
            raise _Denied(Refusal(Reason.FORGED)) from None
        if not await self._emergencies.keep(entry, ticket_s):
            raise _Denied(Refusal(Reason.EXPIRED))
        self._metrics.emergency()


class _Denied(Exception):
    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal


def cosigned_at(note: bytes, roster: Roster) -> float:
    """When a checkpoint that was checked before was cosigned: the median of its cosigners' clocks, in Unix seconds."""
    times = cosigned_times(Note.from_bytes(note), roster)
    return float(statistics.median(times.values())) if times else 0.0


_order: Final = {reason: number for number, reason in enumerate(Reason)}


def _tells_most(refusal: Refusal) -> int:
    """Of several reasons, the one that says most: that of an entry that does name the file comes after one that does not."""
    return -1 if refusal.reason is Reason.OTHER_FILE else _order[refusal.reason]


def _parse(data: bytes) -> Entry | None:
    try:
        return Entry.from_bytes(data)
    except MedshardError:
        return None


gate_key: Final = web.AppKey("gate", Gate)
