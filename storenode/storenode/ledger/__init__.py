"""The ledger of a node: a mirror of the log on every node, the sequencer on one, and some that stand by.

Law: this file only puts the parts together. ``journal`` keeps what there is, ``mirror`` decides what is cosigned, ``sequencer`` what comes
next, ``pushing`` brings it to the others, ``standby`` when to take over and ``takeover`` how; ``routes`` and ``peering`` are the ways in.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, Signature, cosigned_times, log_verifier, note_bytes_max
from medshard_protocol.entries import Entry
from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.facts import Documents
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.messages import unpack_error
from medshard_protocol.proofs import Appended, Inclusion, pack_append, pack_appended, unpack_append, unpack_appended
from medshard_protocol.roster import Roster
from medshard_protocol.state import State
from storenode.ledger import wire
from storenode.ledger.channel import PeerCaller
from storenode.ledger.engine import open_engine
from storenode.ledger.forwarding import Forwarding, Unreachable
from storenode.ledger.fullhead import FullHeads
from storenode.ledger.journal import Journal, Published
from storenode.ledger.mirror import Behind, Fenced, Mirror, marker_name
from storenode.ledger.peering import PeerRoutes
from storenode.ledger.pushing import report_end
from storenode.ledger.routes import Routes
from storenode.ledger.sequencer import Deposed, Sequencer
from storenode.ledger.standby import Standby
from storenode.ledger.takeover import Takeover
from storenode.ledger.wire import Push, Report

ask_wait_s = 1.0
silence_s = 60.0

_log = logging.getLogger(__name__)

__all__ = ["Ledger", "PeerCaller", "Published", "marker_name"]


class Ledger:
    """One node's part in the ledger. ``open``, then ``start`` and ``close`` in the node's event loop."""

    def __init__(
        self,
        journal: Journal,
        mirror: Mirror,
        roster: Roster,
        node: NodeId,
        log_key: Ed25519PrivateKey | None,
        call: PeerCaller,
        pq_key: MLDSA44PrivateKey | None = None,
    ) -> None:
        self.roster = roster
        self.journal = journal
        self.mirror = mirror
        self._node = node
        self._log_key = log_key
        self._call = call
        self._sequencer: Sequencer | None = None
        self._takeover: Takeover | None = None
        self._standby: Standby | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._hurrying: asyncio.Task[None] | None = None
        self.forwarding = Forwarding(self)
        self.full = FullHeads(journal.folder, node, pq_key, call, lambda: self.roster, lambda: self.published)
        mirror.signed = self.full.remember

    @classmethod
    def open(
        cls,
        folder: Path,
        genesis: Roster,
        node: NodeId,
        cosigner_key: Ed25519PrivateKey,
        log_key: Ed25519PrivateKey | None,
        call: PeerCaller,
        *,
        roster: Roster | None = None,
        documents: Documents | None = None,
        engine: str = "sqlite",
        standby: bool = False,
        marker: Path | None = None,
        pq_key: MLDSA44PrivateKey | None = None,
        clock: Callable[[], float] = time.time,
        line: Sequence[Roster] = (),
        evidence: Path | None = None,
    ) -> Ledger:
        """Open the ledger's database and files in ``folder``, under the present roster if that is not genesis any more.

        The roster's sequencer always stands by to order entries, another node if ``standby`` says so; both need the log key. ``marker``
        is a file that outlives the folder and says that the cosigner key has been used. ``line`` are the genesis files of the logs that
        this one goes on from; ``evidence`` is where the folder of evidence lies, if not in ``folder``. Raises ValueError for keys that
        are not the roster's, Damaged for files that are not of this log or not whole, and Unavailable if another process has them open.
        """
        roster = roster or genesis
        leads = standby or node == roster.sequencer
        _check_keys(roster, node, cosigner_key, log_key if leads else None, leads=leads)
        store = open_engine(engine, folder, genesis.origin, merkle.sha256(b""), len(genesis.before))
        journal = Journal(folder, genesis, store, line=line, evidence=evidence)
        journal.roster = roster
        if documents is not None:
            journal.folding.documents = documents
        mirror = Mirror(journal, roster, node, cosigner_key, clock, marker)
        ledger = cls(journal, mirror, roster, node, log_key, call, pq_key)
        if leads and log_key is not None:
            ledger._stand_by(log_key)
        return ledger

    def _stand_by(self, log_key: Ed25519PrivateKey) -> Standby:
        self._takeover = Takeover(self.journal, self.mirror, self.roster, self._node, log_key, self._call)
        self._standby = Standby(self.mirror, self.roster, self._node, self._call, self._takeover, self._lead)
        return self._standby

    async def start(self) -> None:
        """Read the log that is on disk, and take part."""
        await self.journal.start()
        await self.mirror.start()
        self._spawn(self._ask_what_is_published())
        if self._standby is not None:
            self._spawn(self._standby.run())
        self._spawn(self.forwarding.watch())
        await self.full.start()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(report_end)
        self._tasks.append(task)

    async def close(self) -> None:
        """Finish what is being written and close the files."""
        await self.full.close()
        tasks = [*self._tasks, *([self._hurrying] if self._hurrying else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.journal.close()

    def adopt(self, roster: Roster) -> None:
        """Go by this roster from now on: the entry that decided it is published."""
        self.roster = self.journal.roster = roster
        for part in (self.mirror, self._takeover, self._standby, self._sequencer):
            if part is not None:
                part.adopt(roster)
        if self._standby is None and self._log_key is not None and self._node == roster.sequencer:
            standby = self._stand_by(self._log_key)  # it is the first choice from now on
            if self._tasks:
                self._spawn(standby.run())

    async def _lead(self, epoch: int) -> None:
        """Order entries until another node does."""
        assert self._log_key is not None, "asked only of nodes that may"
        assert self._takeover is not None, "made with it"
        sequencer = Sequencer(self.journal, self.mirror, self.roster, self._node, self._log_key, self._call, epoch)
        deposed = asyncio.create_task(sequencer.deposed())
        try:
            await sequencer.start()
            self._sequencer = sequencer
            self.mirror.tell()
            while (self.mirror.epoch, self.mirror.leader) == (epoch, self._node) and not deposed.done():
                following = asyncio.create_task(self.mirror.change(silence_s))
                await asyncio.wait({deposed, following}, return_when=asyncio.FIRST_COMPLETED)
                following.cancel()
            sequencer.depose()
        except MedshardError as error:
            _log.error("this node took over and could not begin: %s", error)
        finally:
            self._sequencer = None
            deposed.cancel()
            self._takeover.heard_of(sequencer.heard_epoch)
            await sequencer.close()

    def routes(self) -> list[web.RouteDef]:
        """The HTTP routes of the ledger."""
        return Routes(self).table() + PeerRoutes(self).table()

    @property
    def state(self) -> State:
        """What all entries that this node has stored mean. Not to be changed."""
        return self.journal.state

    @property
    def published(self) -> Published | None:
        """The newest checkpoint with a quorum that this node knows of."""
        return self.journal.published

    def published_at(self) -> float | None:
        """When the newest published checkpoint was cosigned, by its cosigners' clocks (their median), in Unix seconds."""
        if self.published is None:
            return None
        return statistics.median(cosigned_times(Note.from_bytes(self.published.note), self.roster).values())

    def inclusion_of(self, file_id: FileId) -> Inclusion | None:
        """Prove a file's registration from what this node knows now; None if that is not enough, for up to 50 ms after it happened."""
        return self.journal.inclusion_of(file_id)

    async def inclusion(self, file_id: FileId) -> Inclusion | None:
        """Prove a file's registration; ask the sequencer for the newest checkpoint if this node knows the entry but no quorum for it."""
        inclusion = self.journal.inclusion_of(file_id)
        if inclusion is None and self._sequencer is None and self.state.registration(file_id) is not None:
            await self._ask_what_is_published()
            inclusion = self.journal.inclusion_of(file_id)
        return inclusion

    async def append(self, entries: Sequence[Entry]) -> tuple[Inclusion, ...]:
        """Put entries into the log and wait until they are published. Raises what the sequencer says against them, or Unavailable.

        The inclusions that another node's sequencer answered with are verified before they are returned.
        """
        packed = [entry.to_bytes() for entry in entries]
        status, answer = await self.append_packed(pack_append(packed))
        if status != 200:
            raise unpack_error(status, answer, "sequencer")
        inclusions = unpack_appended(answer, packed).inclusions
        for inclusion in inclusions:
            inclusion.verify(self.roster)
        return inclusions

    async def append_packed(self, body: bytes) -> tuple[int, bytes]:
        """Answer the body of an append request with status and body, as the sequencer does, whichever node that is by then."""
        return await self.forwarding.append(body)

    async def append_here(self, body: bytes) -> tuple[int, bytes]:
        """Answer the body of an append request if this node orders entries; else with the one that does."""
        sequencer = self._sequencer
        if sequencer is not None:
            try:
                inclusions = await sequencer.append(unpack_append(body))
                return 200, pack_appended(Appended(inclusions, sequencer.vouchers(inclusions[0].checkpoint)))
            except Deposed:
                pass
        return wire.not_leading, wire.pack_fence(self.mirror.epoch, self.mirror.leader or b"")

    async def send(self, node: NodeId, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Hand entries to the node that orders them. Raises Unreachable."""
        if node == self._node:
            return await self.append_here(body)
        try:
            return await self._call(node, "POST", wire.forward_path, body, timeout_s)
        except (Unavailable, OSError, TimeoutError, aiohttp.ClientError) as error:
            raise Unreachable(f"the sequencer does not answer ({error or type(error).__name__})") from None

    def push_now(self, node: NodeId) -> None:
        """A mirror needs the newest entries at once, if this node orders them."""
        if self._sequencer is not None:
            self._sequencer.hurry(node)

    def hurry(self) -> None:
        """Somebody waits here for an entry that is on its way: let the node that orders them push it at once."""
        leader = self.mirror.leader
        if leader is not None and leader != self._node and (self._hurrying is None or self._hurrying.done()):
            self._hurrying = asyncio.create_task(self._ask_to_hurry(leader))

    async def _ask_to_hurry(self, leader: NodeId) -> None:
        try:
            await self._call(leader, "POST", wire.hurry_path, b"", ask_wait_s)
        except (MedshardError, OSError, TimeoutError, aiohttp.ClientError) as error:
            _log.info("the sequencer was not reached: %s", error or type(error).__name__)

    def suspect(self, why: str) -> None:
        """The sequencer does its work badly: take over, if this node may."""
        if self._standby is not None and self._sequencer is None:
            self._standby.suspect(why)

    def report(self, *, signed: bool) -> Report:
        """How this node stands to the log, for another node."""
        head, published, sequencer = self.journal.head, self.journal.published, self._sequencer
        note = head.note if signed else b""
        if signed and not note and head.size and self._log_key is not None:
            text = Checkpoint(self.roster.origin, head.size, head.root).text()
            note = Note(text, (log_verifier(self.roster, self._node).sign(text, self._log_key.sign),)).to_bytes()
        return Report(
            epoch=self.mirror.epoch,
            leader=self.mirror.leader,
            leads=sequencer is not None,
            stalled=sequencer is not None and sequencer.stalled,
            accepted=head.accepted,
            size=head.size,
            signed=note,
            published=published.note if published else b"",
        )

    def status(self) -> dict[str, object]:
        """What an operator wants to know, as JSON values."""
        head, published = self.journal.head, self.published
        status: dict[str, object] = {
            "origin": self.roster.origin,
            "size": head.size,
            "root": head.root.hex(),
            "published": published.checkpoint.size if published else 0,
            "entries": dict(self.state.counts),
            "role": "sequencer" if self._sequencer is not None else self._standby.role if self._standby is not None else "mirror",
            "epoch": self.mirror.epoch,
            "leader": self.leader_name,
            "lost": self.mirror.lost,
            "left_out": self.forwarding.left_out,
        }
        return status if self._sequencer is None else status | self._sequencer.status()

    @property
    def leads(self) -> bool:
        """Whether this node orders entries."""
        return self._sequencer is not None

    @property
    def leader_name(self) -> str:
        """The node that orders entries, as far as this one knows."""
        return self._name(self.mirror.leader) if self.mirror.leader else ""

    def _name(self, node: NodeId) -> str:
        return next((each.name for each in self.roster.nodes if each.id == node), node.hex())

    async def take(self, body: bytes, node: NodeId) -> tuple[int, bytes]:
        """Answer a sequencer's push with status and body. Raises what the mirror says against it."""
        try:
            push = Push.from_bytes(body)
            line = await self.mirror.take(push, node)
            return 200, wire.pack_cosignature(wire.Cosigned(line, self._vouchers(push, line)))
        except Behind as behind:
            return 409, wire.pack_size(behind.size, behind.agreed)
        except Fenced as fenced:
            return wire.fenced, wire.pack_fence(fenced.epoch, fenced.leader)

    def _vouchers(self, push: Push, line: str) -> bytes:
        """A reader may be waiting for the entries that came, and will show this cosignature to others."""
        if not (line and push.entries):
            return b""
        return self.mirror.vouchers(Note.text_of(push.signed), Signature.from_line(line))

    async def _ask_what_is_published(self) -> None:
        leader = self.mirror.leader or self.roster.sequencer
        if leader == self._node:
            return
        try:
            status, note = await self._call(leader, "GET", "/log/checkpoint", b"", ask_wait_s)
        except (MedshardError, OSError, TimeoutError, aiohttp.ClientError) as error:
            _log.info("the sequencer does not say what is published: %s", error or type(error).__name__)
            return
        if status == 200 and len(note) <= note_bytes_max:
            self.journal.hear(note)


def _check_keys(roster: Roster, node: NodeId, cosigner: Ed25519PrivateKey, log: Ed25519PrivateKey | None, *, leads: bool) -> None:
    """Raise ValueError unless these are the keys that the roster lists for the node, if it lists it."""
    member = next((each for each in roster.nodes if each.id == node), None)
    if member is None:
        return
    if cosigner.public_key().public_bytes_raw() != member.cosigner_key:
        raise ValueError("the roster lists another cosigner key for this node")
    if leads and log is None:
        raise ValueError("this node is to order entries and needs its log key")
    if leads and log is not None and log.public_key().public_bytes_raw() != member.log_key:
        raise ValueError("the roster lists another log key for this node, or none")
