"""What a node knows of a file before it helps or takes over: the ledger's word in its own mirror, and the manifest beside its shard.

Law: nothing here comes from whoever asks. Both sides of a repair look at the same things, so that a replacement finds out by itself what
every helper would say.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from medshard_protocol.entries import Entry, Move, Type
from medshard_protocol.facts import Facts, Moved, Registration
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.manifest import Manifest
from medshard_protocol.repairorder import Institutions, Objection, Reason
from storenode.ledger import Ledger

wait_s: Final = 2.0  # for an entry or a checkpoint that is on its way to this node
_move_prefix: Final = bytes([0x95, 1, Type.MOVE])  # of every MOVE entry: an array of five, version 1, the type


class Denied(Exception):
    """An objection on its way out."""

    def __init__(self, objection: Objection) -> None:
        super().__init__(objection)
        self.objection = objection


@dataclass(frozen=True, slots=True)
class Standing:
    """How a file stands in the ledger. ``given`` are all MOVE entries with effect, in order: the shard, to whom, and by which."""

    registration: Registration
    given: tuple[tuple[int, Moved], ...]

    @property
    def ever(self) -> list[tuple[int, NodeId]]:
        """All (shard, node) that were ever given."""
        return [(shard, moved.node) for shard, moved in self.given]


def standing(ledger: Ledger, file_id: FileId) -> Standing:
    """How a file stands in this node's mirror. Raises Denied for one that is not repaired."""
    facts = ledger.state
    known = facts.registration(file_id)
    if known is None:
        raise Denied(Objection(Reason.UNREGISTERED))
    if has_ended(ledger, known):
        raise Denied(Objection(Reason.GONE))
    return Standing(known, given(ledger, file_id))


def has_ended(ledger: Ledger, known: Registration) -> bool:
    """Whether a file is retired or erased by now. An end that is dated ahead of the cosigners' clocks is none yet: a retention may run."""
    if known.retired is None and known.erased is None:
        return False
    return known.ended_at <= (ledger.published_at() or 0.0)


def given(ledger: Ledger, file_id: FileId) -> tuple[tuple[int, Moved], ...]:
    """All MOVE entries with effect of a file, in the log's order."""
    found: list[tuple[int, Moved]] = []
    if not ledger.state.moves(file_id):  # the usual file, which may have been read a thousand times
        return ()
    for place, effective in ledger.state.history(file_id):
        data = ledger.journal.entries(place, place + 1)[0] if effective else b""
        if data.startswith(_move_prefix):
            body = Entry.from_bytes(data).body
            assert isinstance(body, Move), "an entry with effect, of this type"
            found.append((body.shard, Moved(body.node, place)))
    return tuple(found)


def institutions(facts: Facts) -> Institutions:
    """Whose a node is: by the newest roster that lists it, so that one that has left is still its institution's."""
    rosters = [facts.roster, *(roster for _, roster in reversed(facts.decided)), facts.genesis]

    def institution(node: NodeId) -> str | None:
        for roster in rosters:
            for each in roster.nodes:
                if each.id == node:
                    return roster.institutions[each.institution].name
        return None

    return institution


def is_described(manifest: Manifest, known: Standing) -> bool:
    """Whether this is the manifest that was registered."""
    return manifest.sha256 == known.registration.manifest_sha256


async def registered(ledger: Ledger, file_id: FileId) -> None:
    """Wait a little for a file that was registered just now, and whose entry is on its way to this node's mirror."""
    with suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            while ledger.state.registration(file_id) is None:
                await ledger.journal.news.wait()


async def published(ledger: Ledger, place: int) -> bool:
    """Wait a little until an entry stands in this node's mirror under a published checkpoint; whether it does."""
    try:
        async with asyncio.timeout(wait_s):
            while not _is_published(ledger, place):
                await ledger.journal.news.wait()
    except TimeoutError:
        return False
    return True


def _is_published(ledger: Ledger, place: int) -> bool:
    head = ledger.published
    return head is not None and place < min(head.checkpoint.size, ledger.state.size)
