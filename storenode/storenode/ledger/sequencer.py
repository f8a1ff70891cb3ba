"""Putting entries in order: the one node that decides which entry comes next, in one epoch.

Law: durable here, then signed, then cosigned by a quorum, then published; nothing earlier is told to anybody. The next checkpoint is not
begun before the last one with entries has its quorum, so mirrors of different speed never work on different checkpoints for ever.
An entry is known by its author and nonce: handed in twice, it stands in the log once. A checkpoint ends with an entry that may change
who cosigns, so that those who decided it cosign it too. Once a later epoch is promised, here or at any mirror, this object is done.

Who pushes the checkpoints to the mirrors is ``pushing``; who may be sequencer, ``takeover``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, Signature, cosigner_verifier, log_verifier
from medshard_protocol.entries import Approve, Entry, Freeze, Genesis, Type, nonce_size, sign_entry, signature_size
from medshard_protocol.errors import Conflict, MedshardError, Refused, Unavailable
from medshard_protocol.ids import NodeId
from medshard_protocol.merkle import sha256
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import Roster
from storenode.ledger.channel import PeerCaller
from storenode.ledger.engine import Head, name_of
from storenode.ledger.journal import Journal, Published
from storenode.ledger.mirror import Mirror
from storenode.ledger.pushing import Acts, Pushers, Round, Spread, report_end

batch_entries_max = 1024
queue_entries_max = 16 * batch_entries_max  # 32 MiB at worst
cadence_s = 0.1  # under load, at most one checkpoint in this time
cadence_rounds = 2.0  # and no more of the machines than one round of work in this many
fresh_after_s = 5.0  # an idle log is cosigned anew, so that readers can tell an old view from a new one
append_wait_s = 10.0
stalled_after_s = 5.0  # a quorum takes a few milliseconds
minority_fence_s = 30.0  # after so long this node takes over again, with an epoch that they follow too
lately_max = 4 * batch_entries_max
spreads = {Type.ACCESS: Spread.LATER, Type.REGISTER: Spread.NEXT}  # readers show theirs themselves; a REVOKE above all goes at once
checks_in_a_row_max = 32  # signatures checked before other requests get a turn: 3 ms

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Queued:
    data: bytes
    name: bytes
    entry: Entry


class Deposed(Unavailable):
    """Another node orders the entries by now."""

    def __init__(self) -> None:
        super().__init__("this node no longer orders the ledger's entries", hint="try again in a moment")


class Sequencer:
    """The log's author in one epoch. Lives in one event loop."""

    def __init__(
        self, journal: Journal, mirror: Mirror, roster: Roster, node: NodeId, key: Ed25519PrivateKey, call: PeerCaller, epoch: int
    ) -> None:
        self._journal = journal
        self._mirror = mirror
        self._roster = roster
        self._node = node
        self._key = key
        self._epoch = epoch
        self._deposed = False
        self._fences: dict[NodeId, float] = {}  # mirrors that follow a later epoch, and since when
        self.heard_epoch = epoch  # the latest that anybody told of
        self._changed = asyncio.Event()
        self._verifiers = {member.id: cosigner_verifier(roster, member.id) for member in roster.nodes}
        self._queue: list[_Queued] = []
        self._coming: dict[bytes, tuple[int, bytes]] = {}  # place and what it says, by name, of entries accepted but not yet stored
        self._lately: dict[bytes, tuple[int, bytes]] = {}  # the same of those just stored, which a search under way may have missed
        self._submissions = 0  # in the queue
        self._crowded = False  # the last round carried more than one submission
        self._round_s = 0.0  # how long the last one took
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._vouched: tuple[bytes, dict[NodeId, bytes]] = b"", {}  # the newest published note, and its cosigners' vouchers
        self._round = self._sign()
        self._waits_since = self._round.began  # for a quorum, whichever rounds have begun meanwhile
        self._pushers = Pushers(journal, roster, node, call, epoch, self._round, Acts(self._cosigned, self._sign_at, self._fenced))

    async def start(self) -> None:
        """Write the genesis entry if this is a new log, have the present head cosigned, and take entries. Raises Conflict if deposed."""
        genesis: list[_Queued] = []
        if self._journal.head.size < self._roster.begins:
            raise Unavailable("this node has not all entries of the log before")
        if self._journal.head.size == self._roster.begins:
            nonce = self._roster.sha256[:nonce_size] if self._roster.before else bytes(nonce_size)
            body = Genesis(self._roster.sha256, nonce)
            entry = sign_entry(self._roster.origin, body, self._roster.log_key, self._key.sign)
            genesis = [_Queued(entry.to_bytes(), name_of(entry.to_bytes()), entry)]
        await self._store(genesis)  # if only to note that this log is, in full, that of the new epoch
        self._begin()
        self._pushers.start()
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(report_end)
        self._task.add_done_callback(lambda _: self.depose())

    async def close(self) -> None:
        """Stop. Entries that are stored are published after the next start; others are refused now."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._pushers.close()
        self._fail(
            Deposed() if self._deposed else Unavailable("the sequencer stops", hint="try again in a moment"), everybody=self._deposed
        )

    async def deposed(self) -> None:
        """Wait until another node has taken over."""
        await self._changed.wait()

    def depose(self) -> None:
        """Sign nothing more: a later epoch was promised."""
        self._deposed = True
        self._changed.set()

    @property
    def stalled(self) -> bool:
        """Whether a checkpoint waits for its quorum for longer than it ever should."""
        return not self._round.done.is_set() and time.monotonic() - self._waits_since > stalled_after_s

    def adopt(self, roster: Roster) -> None:
        """Go by this roster from the next checkpoint on; where it does not list this node, there is none."""
        if not any(member.id == self._node for member in roster.nodes):
            self.depose()
            return
        self._roster = roster
        self._verifiers = {member.id: cosigner_verifier(roster, member.id) for member in roster.nodes}
        self._pushers.adopt(roster)
        self._begin()

    def hurry(self, node: NodeId) -> None:
        """A mirror needs the newest entries now, not with the next ones."""
        self._pushers.hurry(node)

    async def append(self, entries: Sequence[bytes]) -> tuple[Inclusion, ...]:
        """Give each entry its place and wait until a quorum has cosigned it. Raises what is wrong with the first bad entry, and
        then takes none of them; Unavailable if the quorum does not come together in time."""
        places = await self._accept(entries)
        published = self._journal.published
        if published is None or published.checkpoint.size <= max(places):
            published = await self._await_published(max(places))
        return tuple(self._journal.inclusion(place, published) for place in places)

    def vouchers(self, note: bytes) -> dict[NodeId, bytes]:
        """What its cosigners gave for those who will be shown this note; nothing for another one than the newest."""
        return self._vouched[1] if note == self._vouched[0] else {}

    def status(self) -> dict[str, object]:
        """What an operator wants to know."""
        return {"queued": len(self._queue), "cosigned_by": len(self._round.cosigned), "mirrors": self._pushers.status()}

    # -- taking entries in

    async def _accept(self, entries: Sequence[bytes]) -> list[int]:
        named: dict[bytes, bytes] = {}
        for data in entries:
            name = name_of(data) or Entry.from_bytes(data).id
            if _said(named.setdefault(name, data)) != _said(data):
                raise self._taken()
        size = self._journal.head.size
        places = await self._places(named)
        fresh: dict[bytes, _Queued] = {}
        for name, data in named.items():
            if name not in places:
                fresh[name] = _Queued(data, name, self._check(data))
                if len(fresh) % checks_in_a_row_max == 0:
                    await asyncio.sleep(0)
        if fresh:  # the same may have been handed in twice, and be known by now
            searched = self._journal.head.size - size < lately_max  # what came after the search is still remembered
            places |= await self._places({name: item.data for name, item in fresh.items()}, searched=searched)
        new = [item for name, item in fresh.items() if name not in places]
        if self._deposed:
            raise Deposed
        if len(self._queue) + len(new) > queue_entries_max:
            raise Unavailable("more entries are waiting than the ledger can take", hint="try again in a few seconds")
        for item in new:
            places[item.name] = self._journal.head.size + len(self._queue)
            self._coming[item.name] = (places[item.name], _said(item.data))
            self._queue.append(item)
        if new:
            self._submissions += 1
            self._wake.set()
        return [places[name_of(data)] for data in entries]

    def _check(self, data: bytes) -> Entry:
        entry = Entry.from_bytes(data)
        entry.verify(self._roster.origin)
        if objection := self._journal.state.objection(entry):
            raise objection
        return entry

    async def _places(self, named: Mapping[bytes, bytes], *, searched: bool = False) -> dict[bytes, int]:
        """Where entries of these names stand already, or will. Raises Conflict if one says something else.

        ``searched`` says that the store had none of them a moment ago.
        """
        absent = [] if searched else [name for name in named if name not in self._coming and name not in self._lately]
        stored = await self._journal.find(absent) if absent else {}
        places = {}
        for name, data in named.items():  # nobody else gets a turn from here on
            known = self._coming.get(name) or self._lately.get(name)
            if known is None and (place := stored.get(name)) is not None:
                known = (place, _said(self._journal.entries(place, place + 1)[0]))
            if known is not None:
                if known[1] != _said(data):
                    raise self._taken()
                places[name] = known[0]
        return places

    def _taken(self) -> Conflict:
        return Conflict("another entry of this author has the same nonce", hint="draw a new nonce for each entry")

    async def _await_published(self, place: int) -> Published:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((place, future))
        try:
            async with asyncio.timeout(append_wait_s):
                await future
        except TimeoutError:
            raise Unavailable(
                f"fewer than {self._roster.quorum.q} institutions cosigned within {append_wait_s:.0f} s",
                hint="the entry may still be published; handing it in again is safe",
            ) from None
        published = self._journal.published
        assert published is not None, "set before the waiters are woken"
        return published

    # -- making checkpoints

    async def _run(self) -> None:
        while not self._deposed:
            if not await self._due():
                self._begin()  # the same head again, for a fresh date
                continue
            batch = self._batch()
            try:
                await self._store(batch)
            except Conflict as error:  # another node has this log, or another process this database
                _log.error("this node stops ordering entries: %s", error)
                self.depose()
                return
            except MedshardError as error:
                _log.error("entries could not be stored: %s", error)
                self._fail(error)
                await asyncio.sleep(cadence_s)
                continue
            self._begin(max(spreads.get(item.entry.body.type, Spread.AT_ONCE) for item in batch))
            await self._round.done.wait()
            self._round_s = time.monotonic() - self._round.began
            if frozen := self._journal.frozen:
                self._fail(Refused(f"this log has ended with entry {frozen[0]}; its successor's genesis file is {frozen[1].hex()}"))

    def _batch(self) -> list[_Queued]:
        """What goes under the next checkpoint: nothing after an entry by which those who cosign may change."""
        batch = self._queue[:batch_entries_max]
        ends = (number for number, item in enumerate(batch, 1) if isinstance(item.entry.body, Approve | Freeze))
        return batch[: next(ends, len(batch))]

    async def _due(self) -> bool:
        """Wait for entries, and for a moment when they should go. False if the head has become stale instead."""
        while not self._queue:
            self._wake.clear()
            try:
                async with asyncio.timeout(max(0.0, self._round.began + fresh_after_s - time.monotonic())):
                    await self._wake.wait()
            except TimeoutError:
                return False
        if self._submissions > 1 or self._crowded:
            pause = self._round.began + min(cadence_s, cadence_rounds * self._round_s) - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
        return True

    async def _store(self, batch: Sequence[_Queued]) -> None:
        frontier, leaves = self._journal.frontier(), [merkle.leaf_hash(item.data, sha256) for item in batch]
        for leaf in leaves:
            frontier.append(leaf)
        head = Head(frontier.size, frontier.root(), b"", self._epoch)
        parsed = [item.entry for item in batch]
        await self._journal.extend([item.data for item in batch], leaves, head, parsed=parsed, epoch=self._epoch)
        for item in batch:
            if item.name in self._coming:
                self._lately[item.name] = self._coming.pop(item.name)
        for name in list(self._lately)[: max(0, len(self._lately) - lately_max)]:
            del self._lately[name]
        del self._queue[: len(batch)]
        self._crowded, self._submissions = self._submissions > 1, 0 if not self._queue else 2

    def _begin(self, spread: Spread = Spread.AT_ONCE) -> None:
        if self._deposed:
            return
        had_quorum, self._round = self._round.done.is_set(), self._sign()
        if had_quorum:
            self._waits_since = self._round.began
        if self._mirror.may_cosign:
            text = self._round.note.text
            signature = self._mirror.cosign(text)
            self._round.vouchers[self._node] = self._mirror.vouchers(text, signature)
            self._cosigned(self._round, self._node, signature)
        self._pushers.push(self._round, spread)

    def _sign(self) -> Round:
        head = self._journal.head
        checkpoint = Checkpoint(self._roster.origin, head.size, head.root)
        return Round(checkpoint, self._signed(checkpoint), time.monotonic())

    def _sign_at(self, size: int) -> Note:
        """Sign an earlier size again, for a mirror that catches up in steps."""
        return self._signed(Checkpoint(self._roster.origin, size, self._journal.tree.root(size)))

    def _signed(self, checkpoint: Checkpoint) -> Note:
        text = checkpoint.text()
        return Note(text, (log_verifier(self._roster, self._node).sign(text, self._key.sign),))

    # -- publishing

    def _cosigned(self, round_: Round, node: NodeId, signature: Signature) -> None:
        """Count a cosignature. Raises Refused if it does not hold."""
        if round_.done.is_set() or round_ is not self._round or self._deposed:
            return
        self._verifiers[node].verify(round_.note.text, signature)
        round_.cosigned[node] = signature
        if self._roster.has_quorum(round_.cosigned):
            self._publish(round_)

    def _publish(self, round_: Round) -> None:
        voices = [signature for node, signature in round_.cosigned.items() if node in self._roster.voices]
        grown = self._journal.published is None or self._journal.published.checkpoint.size < round_.checkpoint.size
        published = Published(round_.checkpoint, round_.note.signed_by(voices).to_bytes())
        self._journal.publish(published)
        self._vouched = published.note, {node: row for node, row in round_.vouchers.items() if row}
        round_.done.set()
        served = [item for item in self._waiting if item[0] < round_.checkpoint.size]
        self._waiting = [item for item in self._waiting if item[0] >= round_.checkpoint.size and not item[1].done()]
        for _, future in served:
            if not future.done():
                future.set_result(None)
        self._pushers.tell(soon=grown)

    def _fail(self, error: MedshardError, *, everybody: bool = False) -> None:
        """Turn away everybody whose entries are not stored, or everybody."""
        self._queue.clear()
        self._coming.clear()
        self._submissions = 0
        for place, future in self._waiting:
            if (everybody or place >= self._journal.head.size) and not future.done():
                future.set_exception(error)
        self._waiting = [item for item in self._waiting if not item[1].done()]

    def _fenced(self, node: NodeId, epoch: int) -> None:
        """A mirror follows a later epoch. One alone may lie, or follow somebody who came to nothing."""
        self.heard_epoch = max(self.heard_epoch, epoch)
        now = time.monotonic()
        self._fences.setdefault(node, now)
        voices = {self._roster.node(each).institution for each in self._fences}
        if len(voices) > self._roster.quorum.f or now - min(self._fences.values()) > minority_fence_s:
            _log.warning("mirrors follow epoch %d: this node, with %d, orders entries no more", epoch, self._epoch)
            self.depose()


def _said(data: bytes) -> bytes:
    """An entry without its signature, which ends it."""
    return data[:-signature_size]
