"""When this node cosigns a checkpoint: after it has stored every entry up to it and found the same root, and never otherwise.

Law: the newest cosigned checkpoint is the journal's head, so one transaction both stores the entries and moves what may be cosigned.
It only moves forward: an older size is answered with ours, another root for the same entries is refused for good. What the entries say
does not matter here; a log is cosigned for being append-only, and ``state`` gives no effect to what had no right to be written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, Signature, cosigner_verifier, open_signed
from medshard_protocol.errors import Conflict, Damaged, Malformed
from medshard_protocol.ids import NodeId
from medshard_protocol.merkle import sha256
from medshard_protocol.roster import Roster
from storenode.ledger.journal import Journal
from storenode.ledger.store import Head
from storenode.ledger.wire import Push


class Behind(Conflict):
    """The sequencer and this mirror differ on where the log ends; ``size`` is the mirror's."""

    def __init__(self, size: int) -> None:
        super().__init__(f"this mirror has {size} entries")
        self.size = size


class Mirror:
    """One node's cosigner."""

    def __init__(self, journal: Journal, roster: Roster, node: NodeId, key: Ed25519PrivateKey, clock: Callable[[], float]) -> None:
        self._journal = journal
        self._roster = roster
        self._key = key
        self._clock = clock
        self._verifier = cosigner_verifier(roster, node)
        self._deciding = asyncio.Lock()  # the check and the write are one step
        if key.public_key().public_bytes_raw() != self._verifier.key:
            raise ValueError("the roster lists another cosigner key for this node")

    async def take(self, push: Push) -> str:
        """Store what is pushed and give the cosignature line; nothing if there was nothing to sign.

        Raises Behind, Damaged for a fork, Malformed or Refused for a checkpoint that is not the log's, Full or Unavailable.
        """
        line = ""
        if push.signed:
            note = Note.from_bytes(push.signed)
            checkpoint = open_signed(note, self._roster)
            if checkpoint.size != push.old_size + len(push.entries):
                raise Malformed("push: the entries do not add up to the checkpoint's size")
            await self._accept(push, checkpoint)
            line = self.cosign(note.text).line()
        if push.published:
            self._journal.hear(push.published)
        return line

    def cosign(self, text: str) -> Signature:
        """Cosign a checkpoint whose entries are stored here. The caller has seen to that."""
        return self._verifier.sign(text, self._key.sign, int(self._clock()))

    async def _accept(self, push: Push, checkpoint: Checkpoint) -> None:
        async with self._deciding:
            if push.old_size != self._journal.head.size:
                raise Behind(self._journal.head.size)
            frontier = self._journal.frontier()
            leaves = [merkle.leaf_hash(entry, sha256) for entry in push.entries]
            for leaf in leaves:
                frontier.append(leaf)
            if frontier.root() != checkpoint.root:
                raise Damaged(f"the log shows another history of {checkpoint.size} entries than this mirror has: not cosigned")
            if leaves:
                await self._journal.extend(push.entries, leaves, Head(checkpoint.size, checkpoint.root, push.signed))
                await self._journal.keep_up()
