"""When this node cosigns a checkpoint: after it has stored every entry up to it and found the same root, and never otherwise.

Law: the newest cosigned checkpoint is the journal's head, so one transaction both stores the entries and moves what may be cosigned. It
moves back in one case only: a quorum has published another history of the very entries that are dropped, which shows that they never were
and never can be published (docs/decisions/0021-failover.md). A node follows one sequencer at a time, the one it promised the latest
epoch to. What the entries say does not matter here, save that nothing follows a FREEZE; a log is cosigned for being append-only, and
``state`` gives no effect to what had no right to be written.

A key whose cosignatures are newer than what this node still has never signs again: ``lost`` says since when.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, Signature, cosigner_verifier, log_verifiers, open_signed
from medshard_protocol.errors import Conflict, Damaged, Malformed, MedshardError, Refused
from medshard_protocol.ids import NodeId
from medshard_protocol.merkle import sha256
from medshard_protocol.roster import Roster
from medshard_protocol.vouchers import Voucher
from storenode import durable
from storenode.evidence import evidence_in
from storenode.ledger import wire
from storenode.ledger.engine import Head
from storenode.ledger.journal import Journal, Published
from storenode.ledger.wire import Push

marker_name = "cosigned"  # beside the key
evidence_entries_max = 60  # an exhibit has room for 64 documents

_log = logging.getLogger(__name__)


class Behind(Conflict):
    """The sequencer and this mirror differ on where the log ends; ``size`` is the mirror's, ``agreed`` what it knows to be published."""

    def __init__(self, size: int, agreed: int) -> None:
        super().__init__(f"this mirror has {size} entries")
        self.size = size
        self.agreed = agreed


class Fenced(Conflict):
    """This node follows another sequencer."""

    def __init__(self, epoch: int, leader: bytes) -> None:
        super().__init__(f"epoch {epoch} was promised to another sequencer")
        self.epoch = epoch
        self.leader = leader


class Mirror:
    """One node's cosigner, and whom it follows."""

    def __init__(
        self,
        journal: Journal,
        roster: Roster,
        node: NodeId,
        key: Ed25519PrivateKey,
        clock: Callable[[], float],
        marker: Path | None = None,
    ) -> None:
        self._journal = journal
        self._roster = roster
        self._node = node
        self._key = key
        self._clock = clock
        self._evidence = evidence_in(journal.evidence)
        self._marker = marker  # lies beside the key from its first cosignature on
        self._public = key.public_key().public_bytes_raw()
        self.voucher = Voucher(key.private_bytes_raw(), self._public)
        self._listed = any(member.id == node for member in roster.nodes)
        if self._listed:
            self._verifier = cosigner_verifier(roster, node)
        self._deciding = asyncio.Lock()  # the check and the write are one step
        self._changed: asyncio.Event = asyncio.Event()
        self._dropped = b""  # the newest head that this node had to drop, until it is shown to exclude the published one
        self._looked = False  # at a published checkpoint since the start: what this node cosigned it has ever since
        self.heard_at = -1e9  # when the sequencer last pushed, on the monotonic clock
        self.withhold: Callable[[], str] = str  # says why no head is to be cosigned at present; nothing by default
        self.signed: Callable[[str, Signature], None] = lambda text, signature: None  # hears of each cosignature: ``fullhead``
        if self._listed and self._public != self._verifier.key:
            raise ValueError("the roster lists another cosigner key for this node")

    async def start(self) -> None:
        """Find out whether this key has signed more than what is here."""
        if self._listed and self._marker is not None and self._journal.head.size == 0 and self._marker_names_key():
            await self._lose("this key has cosigned before, and the ledger here is empty")

    # -- whom this node follows

    @property
    def epoch(self) -> int:
        """Nothing of an earlier epoch is taken."""
        return self._journal.standing.epoch

    @property
    def leader(self) -> NodeId | None:
        """The sequencer of that epoch; None before there was one."""
        leader = self._journal.standing.leader
        return NodeId(leader) if leader else None

    @property
    def lost(self) -> bool:
        """Whether this node's key must not sign, because what it signed is no longer here."""
        return self._listed and self._journal.standing.lost == self._verifier.key

    async def change(self, timeout_s: float) -> None:
        """Wait until this node follows another sequencer, but no longer than so."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def promise(self, epoch: int, node: NodeId, signature: bytes) -> None:
        """Follow a node that wants to take over. Raises Fenced, or Refused for one that may not, or if this node lost its state."""
        member = self._roster.node(node)
        try:
            if not member.log_key:
                raise Refused(f"{member.name} has no log key: it may not be sequencer")
            public = Ed25519PublicKey.from_public_bytes(member.log_key)
            public.verify(signature, wire.promise_text(self._roster.origin, epoch, node))
        except (InvalidSignature, ValueError):
            raise Refused(f"{member.name} did not sign that it wants to take over") from None
        if self.lost:
            raise Refused("this node has lost its state, so it cannot say what was published")
        async with self._deciding:
            if epoch <= self.epoch:  # even if it was promised to this very node: what it was told then may be old
                raise Fenced(*self._journal.standing[:2])
            await self._follow(epoch, node)

    async def _follow(self, epoch: int, node: NodeId) -> None:
        standing = self._journal.standing
        if (epoch, node) == (standing.epoch, standing.leader):
            return
        if epoch <= standing.epoch:
            raise Fenced(standing.epoch, standing.leader)
        if not self._roster.node(node).log_key:
            raise Refused("only a node with a log key pushes to mirrors")
        await self._journal.promise(epoch, node)
        _log.info("epoch %d: %s orders entries", epoch, self._roster.node(node).name)
        self.tell()

    def tell(self) -> None:
        """Wake those who wait for another sequencer."""
        self._changed.set()
        self._changed = asyncio.Event()

    # -- what it stores and signs

    async def take(self, push: Push, node: NodeId) -> str:
        """Store what a sequencer pushes and give the cosignature lines; nothing if there was nothing to sign.

        Raises Fenced, Behind, Damaged for a fork, Malformed or Refused for a checkpoint that is not the log's, Full or Unavailable.
        """
        line, note = "", Note.from_bytes(push.signed) if push.signed else Note("", ())
        async with self._deciding:
            await self._follow(push.epoch, node)
        if push.yours:
            await self._look_at_own(push.yours)
        if push.published and not self._looked:
            await self._look_at_own(push.published)
            self._looked = True
        if push.signed:
            checkpoint = open_signed(note, self._roster)
            if checkpoint.size != push.old_size + len(push.entries):
                raise Malformed("push: the entries do not add up to the checkpoint's size")
            await self._accept(push, checkpoint)
            self.heard_at = time.monotonic()
        if push.published:
            self._journal.hear(push.published)
        if push.signed and self.may_cosign:
            if reason := self.withhold():
                raise Refused(reason)
            line = self.cosign(note.text).line()
        if self._dropped:
            self._accuse()
        self.heard_at = time.monotonic()
        return line

    def cosign(self, text: str) -> Signature:
        """Cosign a checkpoint whose entries are stored here. The caller has seen to that. Raises Refused if this key must not."""
        if not self.may_cosign:
            raise Refused("this node's key must not cosign: it has lost what it cosigned, or the roster lists another key")
        self._mark()
        signature = self._verifier.sign(text, self._key.sign, int(self._clock()))
        self._verifier.remember(text, signature)
        self.signed(text, signature)
        return signature

    def vouchers(self, text: str, signature: Signature) -> bytes:
        """What vouches for a cosignature that was just made here, to each node of the roster."""
        return self.voucher.row(self._roster, text, signature)

    @property
    def may_cosign(self) -> bool:
        """Whether the roster lists this node with this key, and no state was lost. A node that may not goes on mirroring."""
        return self._listed and self._public == self._verifier.key and not self.lost

    @property
    def agreed(self) -> int:
        """How many entries are published, as far as this node knows."""
        published = self._journal.published
        return published.checkpoint.size if published else 0

    async def _accept(self, push: Push, checkpoint: Checkpoint) -> None:
        async with self._deciding:
            if push.epoch != self.epoch:  # while this one waited for its turn
                raise Fenced(*self._journal.standing[:2])
            size = self._journal.head.size
            if push.old_size < size and push.published and push.entries:
                await self._replace(push, checkpoint)
                return
            if push.old_size != size:
                raise Behind(size, self.agreed)
            if (
                checkpoint.size == size
                and checkpoint.root != self._journal.head.root
                and self._one_signer(self._journal.head.note, push.signed)
            ):
                documents = {"note 1": self._journal.head.note, "note 2": push.signed}
                self._evidence.keep("fork", {"size": size, "epoch": push.epoch}, documents)
            leaves = self._leaves(push, checkpoint, self._journal.frontier())
            whole = push.epoch if checkpoint.size >= push.base else self._journal.head.accepted
            if leaves or whole != self._journal.head.accepted:
                self._check_not_frozen(push)
                await self._journal.extend(push.entries, leaves, Head(checkpoint.size, checkpoint.root, push.signed, whole))
                await self._journal.keep_up()

    async def fill(self, start: int, entries: Sequence[bytes], signed: bytes, published: Published | None) -> None:
        """Take what another node has, for this node's own takeover. ``signed`` is the checkpoint that a log key signed for its end; empty
        within a longer fill. Raises Damaged where that would drop entries that nothing published rules out.
        """
        async with self._deciding:
            journal, size = self._journal, self._journal.head.size
            here = journal.entries(start, size)
            same = next((at for at, (a, b) in enumerate(zip(here, entries, strict=False)) if a != b), min(len(here), len(entries)))
            if same < len(here) and (published is None or published.checkpoint.size <= start + same):
                raise Damaged("its log is another one, and nothing published rules out what is here")
            frontier = journal.frontier_at(start)
            leaves = [merkle.leaf_hash(entry, sha256) for entry in entries]
            for at, leaf in enumerate(leaves, start + 1):
                frontier.append(leaf)
                self._check_before(frontier)
                if published is not None and at == published.checkpoint.size and frontier.root() != published.checkpoint.root:
                    raise Damaged("its log is not the one that was published")
            head = Head(frontier.size, frontier.root(), signed, journal.head.accepted)
            if same == len(here):
                await journal.extend(entries[same:], leaves[same:], head)
                await journal.keep_up()
                return
            assert published is not None, "checked above"
            self._keep_evidence(start, published.note)
            await journal.replace(start, entries, leaves, head)

    def _leaves(self, push: Push, checkpoint: Checkpoint, frontier: merkle.Frontier) -> list[bytes]:
        leaves = [merkle.leaf_hash(entry, sha256) for entry in push.entries]
        for leaf in leaves:
            frontier.append(leaf)
            self._check_before(frontier)
        if frontier.root() != checkpoint.root:
            raise Damaged(f"the log shows another history of {checkpoint.size} entries than this mirror has: not cosigned")
        return leaves

    def _check_before(self, frontier: merkle.Frontier) -> None:
        """The entries of the logs before this one are those that its genesis file names by their root."""
        for ended in self._roster.before:
            if ended.size == frontier.size and ended.root != frontier.root():
                raise Damaged(f"these are not the {ended.size} entries of {ended.origin} that this log goes on from: not cosigned")

    def _check_not_frozen(self, push: Push) -> None:
        frozen = self._journal.frozen
        if push.entries and frozen:
            raise Refused(f"the log has ended with entry {frozen[0]}: nothing after it is cosigned")

    async def _replace(self, push: Push, checkpoint: Checkpoint) -> None:
        """Drop an unpublished suffix in favour of a published one. Raises Behind where this push does not show that it may."""
        journal, size, end = self._journal, self._journal.head.size, checkpoint.size
        here = journal.entries(push.old_size, min(end, size))
        if list(push.entries[: len(here)]) == here:
            raise Behind(size, max(self.agreed, min(end, size)))
        published = self._journal.open_published(push.published)
        if push.old_size < self.agreed or end > published.size:
            raise Behind(size, self.agreed)
        leaves = self._leaves(push, checkpoint, journal.frontier_at(push.old_size))
        try:
            merkle.verify_consistency(end, checkpoint.root, published.size, published.root, push.proof, sha256)
        except MedshardError:
            raise Damaged("the published checkpoint does not continue what was pushed: not cosigned") from None
        self._keep_evidence(push.old_size, push.published)
        whole = push.epoch if end >= push.base else 0
        await journal.replace(push.old_size, push.entries, leaves, Head(end, checkpoint.root, push.signed, whole))

    def _keep_evidence(self, start: int, published: bytes) -> None:
        """Before anything is dropped it lies in a file: what a sequencer signed and its entries, and the checkpoint that rules them out."""
        size = self._journal.head.size
        dropped = self._journal.entries(start, min(size, start + evidence_entries_max))
        _log.error("%d entries from %d on were never published and are dropped for those that were", size - start, start)
        documents = {"published": published, "signed": self._journal.head.note}
        documents |= {f"entry {start + at}": entry for at, entry in enumerate(dropped)}
        details: dict[str, str | int] = {"size": size, "from": start, "count": size - start, "epoch": self.epoch}
        self._evidence.keep("abandoned", details, {name: data for name, data in documents.items() if data})
        self._dropped = self._journal.head.note

    def _one_signer(self, one: bytes, other: bytes) -> bool:
        """Whether one log key signed both. A sequencer that dies between signing and pushing leaves a head that its successor does not
        continue, and neither has lied; a sequencer's own store has what it signed, so it never contradicts itself by accident."""
        if not (one and other):
            return False
        lines = [Note.from_bytes(data).signatures for data in (one, other)]
        return any(all(any(map(key.made, each)) for each in lines) for key in log_verifiers(self._roster))

    def _accuse(self) -> None:
        """As soon as a published head covers what was dropped, show that whoever signed the dropped head signed another history."""
        dropped, published, tree = Checkpoint.from_text(Note.from_bytes(self._dropped).text), self._journal.published, self._journal.tree
        if published is None or published.checkpoint.size < dropped.size:
            return
        if not self._one_signer(self._dropped, published.note):
            self._dropped = b""
            return
        documents, size = {"note 1": self._dropped, "note 2": published.note}, published.checkpoint.size
        details: dict[str, str | int] = {"old_size": dropped.size, "size": size, "epoch": self.epoch}
        self._dropped, root = b"", tree.root(dropped.size)
        if root != dropped.root and size == dropped.size:
            self._evidence.keep("fork", details, documents)
        elif root != dropped.root:
            path = b"".join(tree.consistency_path(dropped.size, size))
            self._evidence.keep("rewritten", details, documents | {"root": root, "path": path})

    # -- whether this key may sign

    async def _look_at_own(self, data: bytes) -> None:
        """Look at a checkpoint that may bear this node's own cosignature, for more than it has."""
        if self.lost or not self._listed:
            return
        try:
            note = Note.from_bytes(data)
            checkpoint = Checkpoint.from_text(note.text)
        except MedshardError:
            return  # what is said to be published is read, and its errors are told, where it is needed
        if checkpoint.origin != self._roster.origin or checkpoint.size <= self._journal.head.size:
            return
        for signature in note.signatures:
            if self._made(note.text, signature):
                await self._lose(f"this key has cosigned {checkpoint.size} entries, and the ledger here has {self._journal.head.size}")

    def _made(self, text: str, signature: Signature) -> bool:
        try:
            return self._verifier.made(signature) and self._verifier.verify(text, signature) >= 0
        except MedshardError:
            return False

    async def _lose(self, why: str) -> None:
        await self._journal.lose(self._verifier.key)
        _log.critical("this node has lost part of its ledger (%s). It mirrors the log and cosigns nothing until its key is replaced", why)

    def _marker_names_key(self) -> bool:
        assert self._marker is not None, "asked only where there is one"
        try:
            return self._marker.read_bytes() == self._verifier.key.hex().encode() + b"\n"
        except OSError:
            return False

    def _mark(self) -> None:
        if self._marker is not None and not self._marker_names_key():
            durable.replace(self._marker, self._verifier.key.hex().encode() + b"\n")
            self._marker = None  # it stays there, and nobody need look again
        elif self._marker is not None:
            self._marker = None

    def adopt(self, roster: Roster) -> None:
        """Go by this roster from now on. A key that it lists anew for this node is used after a restart with that key."""
        self._roster = roster
        self._listed = any(member.id == self._node for member in roster.nodes)
        if self._listed:
            self._verifier = cosigner_verifier(roster, self._node)
