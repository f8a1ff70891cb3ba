"""The ledger of a node: a mirror of the log on every node, and the sequencer on one.

Law: this file only puts the parts together. ``journal`` keeps what there is, ``mirror`` decides what is cosigned, ``sequencer`` what comes
next, ``pushing`` brings it to the others, ``routes`` is the way in.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol.checkpoint import Note, cosigners, note_bytes_max
from medshard_protocol.entries import Entry
from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.messages import unpack_error
from medshard_protocol.proofs import Inclusion, pack_append, pack_appended, unpack_append, unpack_appended
from medshard_protocol.roster import Roster
from medshard_protocol.state import State
from storenode.ledger import wire
from storenode.ledger.channel import Channels, PeerCaller
from storenode.ledger.journal import Journal, Published
from storenode.ledger.mirror import Behind, Mirror
from storenode.ledger.routes import Routes
from storenode.ledger.sequencer import Sequencer, append_wait_s
from storenode.ledger.wire import Push

forward_wait_s = append_wait_s + 2.0  # the sequencer gives up first, and says why
ask_wait_s = 1.0

_log = logging.getLogger(__name__)

__all__ = ["Ledger", "PeerCaller", "Published"]


class Ledger:
    """One node's part in the ledger. ``open``, then ``start`` and ``close`` in the node's event loop."""

    def __init__(self, journal: Journal, mirror: Mirror, sequencer: Sequencer | None, call: PeerCaller) -> None:
        self.roster = journal.roster
        self.journal = journal
        self.mirror = mirror
        self._sequencer = sequencer
        self._call = call
        self.channels = Channels(self._take)
        self._catching_up: asyncio.Task[None] | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        roster: Roster,
        node: NodeId,
        cosigner_key: Ed25519PrivateKey,
        log_key: Ed25519PrivateKey | None,
        call: PeerCaller,
        *,
        clock: Callable[[], float] = time.time,
    ) -> Ledger:
        """Open the ledger's files in ``folder``. The roster's sequencer needs the log key; other nodes ignore one.

        Raises ValueError for keys that are not the roster's, Damaged for files that are not of this log or not whole, and
        Unavailable if another process has them open.
        """
        if node == roster.sequencer and log_key is None:
            raise ValueError("this node is the roster's sequencer and needs the log key")
        journal = Journal(folder, roster)
        try:
            mirror = Mirror(journal, roster, node, cosigner_key, clock)
            sequencer = None
            if log_key is not None and node == roster.sequencer:
                sequencer = Sequencer(journal, mirror, roster, node, log_key, call)
        except ValueError:
            journal.store.close()
            raise
        return cls(journal, mirror, sequencer, call)

    async def start(self) -> None:
        """Read the log that is on disk, and take part."""
        await self.journal.start()
        if self._sequencer is not None:
            await self._sequencer.start()
        else:
            self._catching_up = asyncio.create_task(self._ask_what_is_published())

    async def close(self) -> None:
        """Finish what is being written and close the files."""
        if self._catching_up is not None:
            self._catching_up.cancel()
            await asyncio.gather(self._catching_up, return_exceptions=True)
        if self._sequencer is not None:
            await self._sequencer.close()
        await self.journal.close()

    async def hang_up(self) -> None:
        """Close the connections on which the sequencer pushes, which never end by themselves. For a node that is about to stop."""
        await self.channels.hang_up()

    def routes(self) -> list[web.RouteDef]:
        """The HTTP routes of the ledger."""
        return Routes(self).table()

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
        return statistics.median(cosigners(Note.from_bytes(self.published.note), self.roster).values())

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
        if self._sequencer is not None:
            return await self._sequencer.append(packed)
        status, answer = await self._forward(pack_append(packed))
        if status != 200:
            raise unpack_error(status, answer, "sequencer")
        inclusions = unpack_appended(answer, packed)
        for inclusion in inclusions:
            inclusion.verify(self.roster)
        return inclusions

    async def append_packed(self, body: bytes) -> tuple[int, bytes]:
        """Answer the body of an append request with status and body, as the sequencer does."""
        if self._sequencer is None:
            return await self._forward(body)
        return 200, pack_appended(await self._sequencer.append(unpack_append(body)))

    def status(self) -> dict[str, object]:
        """What an operator wants to know, as JSON values."""
        head, published = self.journal.head, self.published
        status: dict[str, object] = {
            "origin": self.roster.origin,
            "size": head.size,
            "root": head.root.hex(),
            "published": published.checkpoint.size if published else 0,
            "entries": dict(self.state.counts),
            "role": "mirror" if self._sequencer is None else "sequencer",
        }
        return status if self._sequencer is None else status | self._sequencer.status()

    async def _take(self, body: bytes) -> tuple[int, bytes]:
        try:
            return 200, wire.pack_cosignature(await self.mirror.take(Push.from_bytes(body)))
        except Behind as behind:
            return 409, wire.pack_size(behind.size)

    async def _forward(self, body: bytes) -> tuple[int, bytes]:
        try:
            return await self._call(self.roster.sequencer, "POST", "/v1/ledger/append", body, forward_wait_s)
        except (OSError, TimeoutError, aiohttp.ClientError) as error:
            raise Unavailable(f"the sequencer does not answer ({error or type(error).__name__})", hint="try again later") from None

    async def _ask_what_is_published(self) -> None:
        try:
            status, note = await self._call(self.roster.sequencer, "GET", "/log/checkpoint", b"", ask_wait_s)
        except (MedshardError, OSError, TimeoutError, aiohttp.ClientError) as error:
            _log.info("the sequencer does not say what is published: %s", error or type(error).__name__)
            return
        if status == 200 and len(note) <= note_bytes_max:
            self.journal.hear(note)
