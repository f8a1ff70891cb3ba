"""Holds and releases that need two persons: one keeper proposes, another approves, each with a vault of their own.

    await vault.keepers.propose(Type.RELEASE, [file_id])
    for each in await vault.keepers.open(): ...
    await vault.keepers.approve([each.index])

A proposal has a fortnight by the cosigners' clocks. That is a rule of whoever approves, as the ledger's fold knows no clock.

Law: the ledger decides, and one person's word changes nothing at any honest node. Who the keepers of an institution are stands in the
roster, which a quorum of institutions signs. A keeper needs no right to read what is kept, and gets none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from medshard.keys import VaultKeys
from medshard.ledger import LedgerClient
from medshard.quorum import waiting_for_the_ledger
from medshard.rights import Rights
from medshard.standing import Standing, fold
from medshard.transport import Net
from medshard_protocol.entries import Body, Hold, Propose, Release, Type, nonce_size
from medshard_protocol.errors import Absent, Conflict, Refused
from medshard_protocol.ids import FileId, Key
from medshard_protocol.proofs import Inclusion

proposal_s: Final = 14 * 86_400


@dataclass(frozen=True, slots=True)
class Proposal:
    """A hold, or the release of all holds of a file, that one keeper wants and that waits for another."""

    index: int  # of its entry
    what: Type  # HOLD or RELEASE
    file_id: FileId
    by: Key
    own: bool  # this vault's
    at: int = 0  # when it was published, in Unix seconds, as nodes remember it; 0 where they do not
    expired: bool = False

    @property
    def until(self) -> int:
        """Until when it can be approved; 0 where nobody knows when it was made."""
        return self.at + proposal_s if self.at else 0


class Keepers:
    """Of one open vault."""

    def __init__(self, net: Net, keys: VaultKeys, ledger: LedgerClient) -> None:
        self._net = net
        self._keys = keys
        self._ledger = ledger
        self._rights = Rights(net, keys, ledger)

    async def of(self, owner: Key) -> tuple[Key, ...]:
        """Who keeps this owner's files, two of them together. Empty where nobody needs a second person."""
        if not any(each.keepers for each in self._net.roster.institutions):
            return ()
        vouched = await self._rights.vouched(owner)
        institution = vouched and self._net.roster.institution_named(vouched.institution)
        return institution.keepers if institution else ()

    async def open(self) -> list[Proposal]:
        """Every proposal that waits for its second person, in the ledger's order. Raises Unavailable as a history does."""
        told = await self._rights.proposals()
        times = await self._rights.times(sorted(told.entries))
        found = []
        for index, entry in sorted(told.entries.items()):
            if isinstance(entry.body, Propose) and entry.body.stands:
                own, at = self._keys.of(entry.author) is not None, times.get(index, 0)
                expired = bool(at) and told.time > at + proposal_s
                found.append(Proposal(index, entry.body.what, entry.body.file_id, entry.author, own, at, expired))
        return found

    async def propose(self, what: Type, file_ids: Sequence[FileId]) -> list[Proposal]:
        """Want a hold of these files, or all their holds released. Raises what the ledger has against it.

        What has expired is taken off the table first.
        """
        there = [each for each in await self.open() if each.what is what and each.file_id in file_ids] if file_ids else []
        old = {each.file_id for each in there if each.expired} - {each.file_id for each in there if not each.expired}
        await self._append([Propose(what, file_id, stands=False, nonce=_nonce()) for file_id in sorted(old)])
        bodies = [Propose(what, file_id, stands=True, nonce=_nonce()) for file_id in dict.fromkeys(file_ids)]
        inclusions = await self._append(bodies)
        return [
            Proposal(inclusion.index, what, body.file_id, self._keys.public, own=True)
            for body, inclusion in zip(bodies, inclusions, strict=True)
        ]

    async def approve(self, indices: Sequence[int]) -> list[Proposal]:
        """Be the second person: the holds stand, or are released, when this returns. Raises Absent for what is not open, Refused."""
        chosen = await self._chosen(indices)
        for each in chosen:
            if each.own:
                raise Refused(f"entry {each.index} is this vault's own proposal", hint="Another keeper approves it, with another vault.")
            if each.expired:
                made, days = time.strftime("%Y-%m-%d", time.gmtime(each.at)), proposal_s // 86_400
                hint = f"Propose it anew (`medshard proposals {each.what.name.lower()}`), and let the other keeper approve that."
                raise Refused(f"entry {each.index} was proposed on {made}, and a proposal has {days} days", hint=hint)
        for each in chosen:
            await self.say(each.what, each.file_id)
        return chosen

    async def refuse(self, indices: Sequence[int]) -> list[Proposal]:
        """Take proposals off the table: this vault's own, or another keeper's. Raises as ``approve``."""
        chosen = await self._chosen(indices)
        wanted = dict.fromkeys((each.what, each.file_id) for each in chosen)
        await self._append([Propose(what, file_id, stands=False, nonce=_nonce()) for what, file_id in wanted])
        return chosen

    async def say(self, what: Type, file_id: FileId) -> list[Inclusion]:
        """HOLD a file, or RELEASE each hold of it that stands."""
        if what is Type.HOLD:
            return await self._append([Hold(file_id, _nonce())])
        standing = await self.standing(file_id)
        if not standing.holds:
            raise Conflict(f"{file_id.hex()} is not on hold any more")
        return await self._append([Release(hold, _nonce()) for hold in standing.holds])

    async def standing(self, file_id: FileId) -> Standing:
        """What keeps a file, asked of the ledger now."""
        return fold(await self._rights.history(file_id), [keys.public for keys in self._keys.line])

    async def _chosen(self, indices: Sequence[int]) -> list[Proposal]:
        found = {each.index: each for each in await self.open()}
        for index in indices:
            if index not in found:
                raise Absent(f"entry {index} is no open proposal", hint="`medshard proposals ls` lists them.")
        return [found[index] for index in dict.fromkeys(indices)]

    async def _append(self, bodies: Sequence[Body]) -> list[Inclusion]:
        return await waiting_for_the_ledger(self._net, self._ledger.append(bodies)) if bodies else []


def _nonce() -> bytes:
    return os.urandom(nonce_size)
