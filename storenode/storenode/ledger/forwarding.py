"""Getting entries to whoever orders them, through a change of that node, and noticing one that leaves them out.

Law: whoever hands an entry to this node gets the sequencer's answer, or is told that there is none; a takeover in between costs time and
nothing else, because an entry that is handed in twice stands in the log once. Of one that is published any node tells, where the sequencer
does not. An entry that its author had the right to make, and that a sequencer leaves out of the heads that it publishes for ten seconds, is
evidence: this node keeps it, cosigns none of those heads, and lets another node take over. It hands the entry in again itself, to whoever
orders entries by then: nobody is accused of leaving out what nobody gave him, and the ten seconds begin anew with each sequencer.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medshard_protocol.checkpoint import Note, cosigned_times
from medshard_protocol.entries import Entry
from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.ids import NodeId
from medshard_protocol.proofs import Appended, pack_append, pack_appended, unpack_append
from storenode.evidence import evidence_in
from storenode.ledger import wire
from storenode.ledger.engine import name_of

if TYPE_CHECKING:
    from storenode.ledger import Ledger

append_wait_s = 12.0  # the sequencer gives up first, and says why
leaderless_wait_s = 6.0  # a takeover takes two seconds
retry_s = 0.05
look_here_after_s = 2.0  # of silence: longer than a round takes
left_out_after_s = 10.0
unheard_s = 60.0  # without a head for so long there is no quorum, and nobody to accuse
again_after_s = 3.0
again_wait_s = 2.0
again_max = 16  # handed in again at once
watch_every_s = 0.5
watched_max = 4096

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Watched:
    entry: bytes
    since: float  # monotonic
    published: bytes  # the newest published checkpoint when it was handed in
    size: int  # of that one
    leader: NodeId | None  # to whom it was handed in
    sent: float  # monotonic
    overdue: bool = False


def _median(times: Mapping[NodeId, int]) -> float:
    return float(statistics.median(times.values())) if times else 0.0


class Unreachable(Unavailable):
    """A node gave no answer: another one may, soon."""


class Forwarding:
    """One node's entries on their way."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._watched: dict[bytes, _Watched] = {}  # by name
        self.left_out = 0  # entries that a sequencer leaves out at present
        ledger.mirror.withhold = self._objection

    async def append(self, body: bytes) -> tuple[int, bytes]:
        """Hand in the body of an append request, to whichever node orders entries; give that node's status and answer.

        Raises Malformed for a body that is none, and Unavailable.
        """
        unpack_append(body)  # what is wrong with it is said here
        deadline = time.monotonic() + append_wait_s
        leaderless = time.monotonic() + leaderless_wait_s
        said = "no node orders entries at present"
        while (left := deadline - time.monotonic()) > 0:
            leader = self._ledger.mirror.leader or self._ledger.roster.sequencer
            try:
                answered = await self._until_change(leader, body, left)
                if answered is not None and answered[0] != wire.not_leading:
                    return answered if answered[0] < 500 else await self._published(body) or answered
            except Unreachable as error:
                if found := await self._published(body):
                    return found
                said = str(error)
            if time.monotonic() > leaderless:
                break
            await self._ledger.mirror.change(retry_s)
        raise Unavailable(f"{said}; the ledger takes nothing now", hint="try again in a few seconds; handing it in again is safe")

    async def _until_change(self, leader: NodeId, body: bytes, left_s: float) -> tuple[int, bytes] | None:
        """Ask one node; give up when this node hears that another one leads."""
        mirror = self._ledger.mirror
        if self._ledger.leads:  # who is deposed meanwhile says so by itself
            return await self._ledger.append_here(body)
        self._watch(body)
        asking = asyncio.create_task(self._ledger.send(leader, body, left_s))
        changing = asyncio.create_task(mirror.change(left_s))
        try:
            await asyncio.wait({asking, changing}, return_when=asyncio.FIRST_COMPLETED, timeout=look_here_after_s)
            if not (asking.done() or changing.done()) and (found := await self._published(body)):
                return found
            await asyncio.wait({asking, changing}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done() or mirror.leader == leader:
                return await asking
            return None
        finally:
            for task in (asking, changing):
                task.cancel()
            await asyncio.gather(asking, changing, return_exceptions=True)

    async def _published(self, body: bytes) -> tuple[int, bytes] | None:
        """What the sequencer owes as an answer to entries that are published already; None if not all of them are, as far as is known
        here. One that keeps its answers to itself leaves nothing out, so nobody replaces it, and who handed in would wait for ever."""
        entries, journal = unpack_append(body), self._ledger.journal
        published, places = self._ledger.published, await journal.find([name_of(entry) for entry in entries])
        found = [places.get(name_of(entry), -1) for entry in entries]
        if published is None or not all(0 <= place < published.checkpoint.size for place in found):
            return None
        inclusions = tuple(journal.inclusion(place, published) for place in found)
        return (200, pack_appended(Appended(inclusions, {}))) if [each.entry for each in inclusions] == list(entries) else None

    # -- entries that are left out

    def _watch(self, body: bytes) -> None:
        published = self._ledger.published
        if published is None:
            return
        for entry in unpack_append(body):
            if len(self._watched) < watched_max and (name := name_of(entry)):
                now, leader = time.monotonic(), self._ledger.mirror.leader
                self._watched.setdefault(name, _Watched(entry, now, published.note, published.checkpoint.size, leader, now))

    async def watch(self) -> None:
        """Look after what was handed in. Ends by being cancelled."""
        while True:
            await asyncio.sleep(watch_every_s)
            self._follow_leader()
            now = time.monotonic()
            due = {name: item for name, item in self._watched.items() if now - item.sent > again_after_s or self.left_out}
            if not due and not self.left_out:
                continue
            try:
                found = await self._ledger.journal.find(list(due))
            except MedshardError as error:
                _log.info("what was handed in cannot be looked for: %s", error)
                continue
            for name, item in due.items():
                left_out = None if item.overdue else self._is_left_out(item)
                if name in found or left_out is False or (item.overdue and not self._has_right(item)):
                    del self._watched[name]
                elif left_out:
                    item.overdue = True
                    self._accuse(item)
            self.left_out = sum(item.overdue for item in self._watched.values())
            waiting = [item for name, item in due.items() if name in self._watched and now - item.sent > again_after_s]
            await asyncio.gather(*map(self._hand_in_again, waiting[:again_max]))

    def _follow_leader(self) -> None:
        """Another sequencer starts with a clean slate, and is given what the one before did not take."""
        if not self._watched:
            return
        leader, published = self._ledger.mirror.leader, self._ledger.published
        for item in self._watched.values():
            if item.leader != leader and published is not None:
                item.leader, item.since, item.sent, item.overdue = leader, time.monotonic(), 0.0, False
                item.published, item.size = published.note, published.checkpoint.size

    async def _hand_in_again(self, item: _Watched) -> None:
        item.sent = time.monotonic()
        leader = self._ledger.mirror.leader
        if leader is None or not self._has_right(item):
            return
        try:
            async with asyncio.timeout(again_wait_s):
                await self._ledger.send(leader, pack_append([item.entry]), again_wait_s)
        except (MedshardError, TimeoutError) as error:
            _log.info("an entry was handed in again in vain: %s", error or "no answer in time")

    def _is_left_out(self, item: _Watched) -> bool | None:
        """Whether heads were published meanwhile that could have this entry, and it has every right to be in them; None if that cannot
        be said yet. A head of as many entries as before counts too: who only keeps the log's time orders nothing."""
        published, waited = self._ledger.published, time.monotonic() - item.since
        if waited <= left_out_after_s:
            return None
        if not self._has_right(item):
            return False
        if published is not None and published.checkpoint.size > item.size:
            return True
        if published is not None and published.note != item.published:
            before, after = (
                _median(cosigned_times(Note.from_bytes(note), self._ledger.roster)) for note in (item.published, published.note)
            )
            if after - before > left_out_after_s:
                return True
        return None if waited < unheard_s else False

    def _has_right(self, item: _Watched) -> bool:
        try:
            entry = Entry.from_bytes(item.entry)
            entry.verify(self._ledger.roster.origin)
            return self._ledger.state.objection(entry) is None
        except MedshardError:
            return False

    def _accuse(self, item: _Watched) -> None:
        ledger, published = self._ledger, self._ledger.published
        assert published is not None, "something was published meanwhile"
        details: dict[str, str | int] = {
            "sequencer": ledger.leader_name,
            "seconds": int(time.monotonic() - item.since),
            "epoch": ledger.mirror.epoch,
        }
        documents = {"entry": item.entry, "before": item.published, "after": published.note}
        evidence_in(ledger.journal.evidence).keep("left-out", details, documents)
        ledger.suspect(f"{ledger.leader_name} leaves out an entry that was handed in")

    def _objection(self) -> str:
        """Why this node cosigns nothing at present; empty if it does."""
        return "an entry that was handed in ten seconds ago is left out of this head" if self.left_out else ""
