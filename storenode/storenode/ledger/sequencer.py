"""Putting entries in order: the one node that decides which entry comes next.

Law: durable here, then signed, then cosigned by a quorum, then published; nothing earlier is told to anybody. The next checkpoint is not
begun before the last one with entries has its quorum, so mirrors of different speed never work on different checkpoints for ever.
An entry is known by its bytes: handed in twice, it stands in the log once.

Who pushes the checkpoints to the mirrors is ``pushing``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, Signature, cosigner_verifier, log_verifier
from medshard_protocol.entries import Entry, Genesis, nonce_size, sign_entry
from medshard_protocol.errors import MedshardError, Refused, Unavailable
from medshard_protocol.ids import NodeId
from medshard_protocol.merkle import sha256
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import Roster
from storenode.ledger.channel import PeerCaller
from storenode.ledger.journal import Journal, Published
from storenode.ledger.mirror import Mirror
from storenode.ledger.pushing import Pushers, Round, report_end
from storenode.ledger.store import Head

batch_entries_max = 1024
queue_entries_max = 16 * batch_entries_max  # 32 MiB at worst
cadence_s = 0.1  # under load, at most one checkpoint in this time
cadence_rounds = 2.0  # and no more of the machines than one round of work in this many
fresh_after_s = 5.0  # an idle log is cosigned anew, so that readers can tell an old view from a new one
append_wait_s = 10.0
checks_in_a_row_max = 32  # signatures checked before other requests get a turn: 3 ms

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Queued:
    data: bytes
    leaf: bytes
    entry: Entry


class Sequencer:
    """The log's author. Lives in one event loop."""

    def __init__(self, journal: Journal, mirror: Mirror, roster: Roster, node: NodeId, key: Ed25519PrivateKey, call: PeerCaller) -> None:
        if key.public_key().public_bytes_raw() != roster.log_key:
            raise ValueError("the roster lists another log key")
        self._journal = journal
        self._mirror = mirror
        self._roster = roster
        self._node = node
        self._key = key
        self._verifiers = {member.id: cosigner_verifier(roster, member.id) for member in roster.nodes}
        self._queue: list[_Queued] = []
        self._places: dict[bytes, int] = {}  # by leaf hash, of entries accepted but not yet stored
        self._submissions = 0  # in the queue
        self._crowded = False  # the last round carried more than one submission
        self._round_s = 0.0  # how long the last one took
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._round = self._sign()
        self._pushers = Pushers(journal, roster, node, call, self._round, self._cosigned, self._sign_at)

    async def start(self) -> None:
        """Write the genesis entry if this is a new log, have the present head cosigned, and take entries."""
        await self._journal.index()
        if self._journal.head.size == 0:
            body = Genesis(self._roster.sha256, bytes(nonce_size))
            entry = sign_entry(self._roster.origin, body, self._roster.log_key, self._key.sign)
            await self._store([_Queued(entry.to_bytes(), merkle.leaf_hash(entry.to_bytes(), sha256), entry)])
        self._begin()
        self._pushers.start()
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(report_end)

    async def close(self) -> None:
        """Stop. Entries that are stored are published after the next start; others are refused now."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._pushers.close()
        self._fail(Unavailable("the sequencer stops", hint="try again in a moment"))

    async def append(self, entries: Sequence[bytes]) -> tuple[Inclusion, ...]:
        """Give each entry its place and wait until a quorum has cosigned it. Raises what is wrong with the first bad entry, and
        then takes none of them; Unavailable if the quorum does not come together in time."""
        places = await self._accept(entries)
        published = self._journal.published
        if published is None or published.checkpoint.size <= max(places):
            published = await self._await_published(max(places))
        return tuple(self._journal.inclusion(place, published) for place in places)

    def status(self) -> dict[str, object]:
        """What an operator wants to know."""
        return {"queued": len(self._queue), "cosigned_by": len(self._round.cosigned), "mirrors": self._pushers.status()}

    # -- taking entries in

    async def _accept(self, entries: Sequence[bytes]) -> list[int]:
        hashed = [(data, merkle.leaf_hash(data, sha256)) for data in entries]
        fresh: dict[bytes, _Queued] = {}
        for number, (data, leaf) in enumerate(hashed, 1):
            if leaf not in fresh and self._place(leaf) is None:
                fresh[leaf] = _Queued(data, leaf, self._check(data))
            if number % checks_in_a_row_max == 0:
                await asyncio.sleep(0)
        new = [item for leaf, item in fresh.items() if self._place(leaf) is None]  # others may have come meanwhile
        if len(self._queue) + len(new) > queue_entries_max:
            raise Unavailable("more entries are waiting than the ledger can take", hint="try again in a few seconds")
        for item in new:
            self._places[item.leaf] = self._journal.head.size + len(self._places)
        if new:
            self._queue += new
            self._submissions += 1
            self._wake.set()
        return [self._known_place(leaf) for _, leaf in hashed]

    def _check(self, data: bytes) -> Entry:
        entry = Entry.from_bytes(data)
        entry.verify(self._roster.origin)
        if objection := self._journal.state.objection(entry):
            raise objection
        return entry

    def _place(self, leaf: bytes) -> int | None:
        place = self._places.get(leaf)
        return self._journal.store.find(leaf) if place is None else place

    def _known_place(self, leaf: bytes) -> int:
        place = self._place(leaf)
        if place is None:
            raise Refused("the entry is not in the ledger")
        return place

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
        while True:
            if not await self._due():
                self._begin()  # the same head again, for a fresh date
                continue
            batch = self._queue[:batch_entries_max]
            try:
                await self._store(batch)
            except MedshardError as error:
                _log.error("entries could not be stored: %s", error)
                self._fail(error)
                continue
            self._begin()
            await self._round.done.wait()
            self._round_s = time.monotonic() - self._round.began

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
        frontier, leaves = self._journal.frontier(), [item.leaf for item in batch]
        for leaf in leaves:
            frontier.append(leaf)
        head = Head(frontier.size, frontier.root(), b"")
        await self._journal.extend([item.data for item in batch], leaves, head, parsed=[item.entry for item in batch])
        for item in batch:
            self._places.pop(item.leaf, None)
        del self._queue[: len(batch)]
        self._crowded, self._submissions = self._submissions > 1, 0 if not self._queue else 2

    def _begin(self) -> None:
        self._round = self._sign()
        self._cosigned(self._round, self._node, self._mirror.cosign(self._round.note.text))
        self._pushers.push(self._round)

    def _sign(self) -> Round:
        head = self._journal.head
        checkpoint = Checkpoint(self._roster.origin, head.size, head.root)
        return Round(checkpoint, self._signed(checkpoint), time.monotonic())

    def _sign_at(self, size: int) -> Note:
        """Sign an earlier size again, for a mirror that catches up in steps."""
        return self._signed(Checkpoint(self._roster.origin, size, self._journal.tree.root(size)))

    def _signed(self, checkpoint: Checkpoint) -> Note:
        text = checkpoint.text()
        return Note(text, (log_verifier(self._roster).sign(text, self._key.sign),))

    # -- publishing

    def _cosigned(self, round_: Round, node: NodeId, signature: Signature) -> None:
        """Count a cosignature. Raises Refused if it does not hold."""
        if round_.done.is_set() or round_ is not self._round:
            return
        self._verifiers[node].verify(round_.note.text, signature)
        round_.cosigned[node] = signature
        if self._roster.has_quorum(round_.cosigned):
            self._publish(round_)

    def _publish(self, round_: Round) -> None:
        voices = {self._roster.node(node).institution: signature for node, signature in round_.cosigned.items()}
        grown = self._journal.published is None or self._journal.published.checkpoint.size < round_.checkpoint.size
        published = Published(round_.checkpoint, round_.note.signed_by(voices.values()).to_bytes())
        self._journal.publish(published)
        round_.done.set()
        served = [item for item in self._waiting if item[0] < round_.checkpoint.size]
        self._waiting = [item for item in self._waiting if item[0] >= round_.checkpoint.size and not item[1].done()]
        for _, future in served:
            if not future.done():
                future.set_result(None)
        self._pushers.tell(soon=grown)

    def _fail(self, error: MedshardError) -> None:
        """Turn away everybody whose entries are not stored."""
        self._queue.clear()
        self._places.clear()
        self._submissions = 0
        for place, future in self._waiting:
            if place >= self._journal.head.size and not future.done():
                future.set_exception(error)
        self._waiting = [item for item in self._waiting if not item[1].done()]
