"""Saying that files will be read, before a byte of them is asked for.

A read begins with an ACCESS entry in the ledger; its place there is the ticket that goes with every request for shards. One entry speaks
for up to 48 files and for ten minutes. A holder that has not heard of the entry yet is shown the proof once; a ticket that it calls expired
is replaced once, and so is one of an earlier read that it refuses: a right that was given since needs an entry after it. When the ledger
has no quorum, an identity that the roster marks for emergencies may show a signed entry with a sealed reason instead; it is kept here too,
and appended as soon as the ledger is back.

Law: nothing here decides who may read. The nodes do, each by its own mirror, and what a node refuses is told to the user in its words.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

import aiohttp

from medshard.asking import Answer
from medshard.envelopes import seal_reason
from medshard.ledger import LedgerClient
from medshard.quorum import no_quorum, waiting_for_the_ledger
from medshard.transport import Net, without_name
from medshard_protocol.checkpoint import Note, cosigned_by
from medshard_protocol.entries import Access, Entry, Purpose, access_files_max, entry_bytes_max, nonce_size
from medshard_protocol.errors import MedshardError, Refused, Unavailable
from medshard_protocol.ids import FileId, Key, NodeId, file_id_size
from medshard_protocol.proofs import Inclusion
from medshard_protocol.rights import Reason, not_yet, reason_in
from medshard_protocol.roster import Node, Roster
from medshard_protocol.sharing import (
    access_header,
    checkpoint_header,
    emergency_header,
    pack_checkpoint,
    pack_emergency,
    pack_shown,
    pack_tickets,
    tickets_max,
    unpack_seen,
)
from medshard_protocol.vouchers import for_reader, pack_vouchers, vouchers_header

ticket_s: Final = 540.0  # nodes honour 600 s, counted from a checkpoint before the entry; a minute is for idle heads and the way
pass_files_max: Final = tickets_max * access_files_max
fresh_s: Final = 2.0  # nodes are told within half a second what is published; so long a read tells them itself
show_timeout_s: Final = 3.0
emergency_wait_s: Final = 30.0  # nodes want 10 s of silence from the ledger before they serve without it
emergency_pause_s: Final = 0.5

not_then: Final = frozenset({Reason.UNREGISTERED, Reason.NEVER_GRANTED, Reason.REVOKED, Reason.ENDED})  # and perhaps now
tries_max: Final = 2  # how often one request is asked again

Work: TypeAlias = Callable[[Net, frozenset[FileId]], Awaitable[None]]  # reads these files over this net


class Early(Protocol):
    """Reading that begins before the ledger's proof is verified, and whose fruits nobody sees until it is."""

    def begin(self, net: Net) -> None:
        """The ledger says that it has the entry; holders are asked over this net."""

    async def end(self) -> None:
        """Stop, if it has not ended."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """One announced read."""

    inclusion: Inclusion
    until: float  # by the monotonic clock
    vouchers: Mapping[NodeId, bytes] = field(default_factory=dict)  # for its checkpoint


class Tickets:
    """The reads that one open vault has announced."""

    def __init__(self, net: Net, ledger: LedgerClient) -> None:
        self._net = net
        self._ledger = ledger
        self._held: dict[tuple[FileId, int], Ticket] = {}
        self._unsent: dict[tuple[tuple[FileId, ...], int], Entry] = {}  # signed, and perhaps on their way: tried again, not made again

    async def announce(self, file_ids: Sequence[FileId], purpose: int, early: Early | None = None) -> list[Pass]:
        """Announce a read of these files, in as few entries as can be; a pass for each ``pass_files_max`` of them, in order.

        ``early`` is begun if all of them go into one new entry. Raises Refused with the ledger's reason, Unavailable saying what is down.
        """
        distinct = list(dict.fromkeys(file_ids))
        parts = [distinct[at : at + pass_files_max] for at in range(0, len(distinct), pass_files_max)]
        fresh = [file_id for file_id in distinct if not self.holds(file_id, purpose)]
        await self._append(fresh, purpose, early if len(fresh) == len(distinct) else None)
        if any(len(self.held(part, purpose)) > tickets_max for part in parts):  # many small reads before this large one
            await self._append(distinct, purpose)
        kept = frozenset(distinct) - frozenset(fresh)
        return [
            Pass(self, self._net, frozenset(part), purpose, self.held(part, purpose), reused=not kept.isdisjoint(part)) for part in parts
        ]

    async def renew(self, file_ids: Collection[FileId], purpose: int) -> list[Ticket]:
        """Announce again, whatever is held."""
        await self._append(list(file_ids), purpose)
        return self.held(file_ids, purpose)

    def expire(self) -> None:
        """Hold no tickets any more: the next read is announced anew."""
        self._held.clear()

    def forget(self, file_ids: Collection[FileId], purpose: int) -> None:
        """What was announced of these was refused: the next read of them is announced anew."""
        for file_id in file_ids:
            self._held.pop((file_id, purpose), None)

    def holds(self, file_id: FileId, purpose: int) -> bool:
        """Whether a read of this file is announced, and still good."""
        ticket = self._held.get((file_id, purpose))
        return ticket is not None and ticket.until > time.monotonic()

    async def _append(self, file_ids: Sequence[FileId], purpose: int, early: Early | None = None) -> None:
        if not file_ids:
            return
        now = time.monotonic()
        groups = [tuple(file_ids[at : at + access_files_max]) for at in range(0, len(file_ids), access_files_max)]
        for group in groups:
            if (group, purpose) not in self._unsent:
                self._unsent[group, purpose] = self._ledger.sign(Access(group, purpose, b"", os.urandom(nonce_size)))
        entries = [self._unsent[group, purpose] for group in groups]

        def answered(inclusions: Sequence[Inclusion], vouchers: Mapping[NodeId, bytes]) -> None:
            if early is not None and len(groups) == 1:
                ticket = Ticket(inclusions[0], now + ticket_s, vouchers)
                early.begin(Admitted(self._net, Pass(self, self._net, frozenset(file_ids), purpose, [ticket])))

        inclusions = await waiting_for_the_ledger(self._net, self._ledger.append_signed(entries, answered))
        self._held = {known: ticket for known, ticket in self._held.items() if ticket.until > now}
        for group, inclusion in zip(groups, inclusions, strict=True):
            self._unsent.pop((group, purpose), None)
            ticket = Ticket(inclusion, now + ticket_s, self._ledger.vouchers(inclusion.checkpoint))
            self._held.update({(file_id, purpose): ticket for file_id in group})

    def held(self, file_ids: Collection[FileId], purpose: int) -> list[Ticket]:
        """The tickets for these files, each once, oldest first."""
        tickets = (self._held[file_id, purpose] for file_id in file_ids)
        return sorted({ticket.inclusion.index: ticket for ticket in tickets}.values(), key=lambda ticket: ticket.inclusion.index)


class Pass:
    """What one read shows to the holders of its files, and what can be done when one of them objects."""

    def __init__(
        self, tickets: Tickets, net: Net, file_ids: frozenset[FileId], purpose: int, tickets_held: Sequence[Ticket], *, reused: bool = False
    ) -> None:
        self.file_ids = file_ids
        self._reused = reused  # by an earlier read: what is refused for its tickets may be granted since
        self.refusals: dict[NodeId, MedshardError] = {}
        self.within_reach = False  # a holder says that the ledger is: of interest in an emergency
        self._tickets = tickets
        self._net = net
        self._purpose = purpose
        self._held = list(tickets_held)
        self._packed: tuple[list[Ticket], bool, dict[str, str]] | None = None  # what was shown last, and for which tickets
        self._cosigned: tuple[Ticket, Roster, list[NodeId]] | None = None  # who cosigned which, by which roster
        self._showing: dict[NodeId, asyncio.Task[bool]] = {}
        self._renewing: asyncio.Task[None] | None = None

    def headers(self) -> dict[str, str]:
        """What goes with each request for shards: the places, and while they are new the checkpoint that shows that they are published."""
        held, fresh, packed = self._held, self._is_fresh, self._packed
        if packed is None or packed[0] is not held or packed[1] is not fresh:
            shown = {access_header: pack_tickets(ticket.inclusion.index for ticket in held)}
            if fresh and (checkpoint := pack_checkpoint(held[-1].inclusion.checkpoint)):
                shown[checkpoint_header] = checkpoint
            packed = self._packed = held, fresh, shown
        return packed[2]

    def vouchers_for(self, node: NodeId) -> dict[str, str]:
        """What goes with a request to this node beside ``headers``, and saves it the checking of a quorum's signatures."""
        if not (self._is_fresh and self._held[-1].vouchers):
            return {}
        shown = pack_vouchers(for_reader(self._held[-1].vouchers, self._cosigners(), self._net.roster, node))
        return {vouchers_header: shown} if shown else {}

    def is_known_to(self, node: NodeId) -> bool:
        """Whether this node has stored the newest entry: it cosigned it, or has had the time."""
        if not self._is_fresh:
            return True
        return node in self._cosigners()

    def _cosigners(self) -> list[NodeId]:
        """Of the newest ticket's checkpoint, in the order of its lines."""
        newest, roster, known = self._held[-1], self._net.roster, self._cosigned
        if known is None or known[0] is not newest or known[1] is not roster:
            note = Note.from_bytes(newest.inclusion.checkpoint)
            known = self._cosigned = newest, roster, cosigned_by(note, roster)
        return known[2]

    @property
    def _is_fresh(self) -> bool:
        return bool(self._held) and time.monotonic() < self._held[-1].until - ticket_s + fresh_s

    async def helped(self, node: Node, error: MedshardError, tries: int) -> bool:
        """Whether it is worth while to ask again what this holder objected to for the ``tries``th time."""
        reason = reason_in(str(error)) if tries <= tries_max else None
        if reason is Reason.EXPIRED or (self._reused and tries == 1 and reason in not_then):
            if self._renewing is None:
                self._renewing = asyncio.create_task(self._renew())
            await asyncio.shield(self._renewing)
            return True
        if reason in not_yet:
            if node.id not in self._showing:
                self._showing[node.id] = asyncio.create_task(self._show(node))
            if await asyncio.shield(self._showing[node.id]):
                return True
        self._note(node, error)
        return False

    def explained(self, error: MedshardError) -> MedshardError:
        """A failed read in the holders' words, if it was they who refused it."""
        refused = [self._net.holder(node).institution for node in self.refusals]
        if not isinstance(error, Unavailable) or len(set(refused)) < min(2, len(self._net.roster.institutions)):
            return error
        said = [without_name(self._net.holder(node), why) for node, why in self.refusals.items()]
        reason = max(set(said), key=said.count)
        hint = next(why.hint for node, why in self.refusals.items() if without_name(self._net.holder(node), why) == reason)
        return Refused(f"{len(said)} nodes refuse this read: {reason}", hint=hint)

    def forget(self) -> None:
        """Show these tickets to nobody any more, now that holders have refused the read."""
        self._tickets.forget(self.file_ids, self._purpose)

    def _note(self, node: Node, error: MedshardError) -> None:
        if isinstance(error, Refused):
            self.refusals[node.id] = error

    async def _show(self, node: Node) -> bool:
        """Show a holder that the entries are published; the newest proof does for all, as one checkpoint covers what is before it."""
        newest = self._held[-1].inclusion
        try:
            answer = await self._net.call(node, "POST", "/v1/access", pack_shown(newest), timeout_s=show_timeout_s)
            return unpack_seen(answer) == newest.index
        except MedshardError as error:
            self._note(node, error)
            return False

    async def _renew(self) -> None:
        self._held = await self._tickets.renew(self.file_ids, self._purpose)
        self._showing.clear()


class EmergencyPass(Pass):
    """A signed entry that the ledger does not have yet, with a sealed reason. Holders keep it, and append it when they can."""

    def __init__(self, tickets: Tickets, net: Net, file_ids: frozenset[FileId], entry: Entry) -> None:
        super().__init__(tickets, net, file_ids, Purpose.EMERGENCY, ())
        self.entry = entry

    def headers(self) -> dict[str, str]:
        """What goes with each request for shards."""
        return {emergency_header: pack_emergency(self.entry)}

    async def helped(self, node: Node, error: MedshardError, tries: int) -> bool:
        """Never: who refuses an emergency has a reason that asking again does not change."""
        if reason_in(str(error)) is Reason.WITHIN_REACH:
            self.within_reach = True
        self._note(node, error)
        return False


class Admitted(Net):
    """The connections of a net, with a pass shown along with each request for shards. Lives for one read."""

    def __init__(self, net: Net, shown: Pass) -> None:
        self.__dict__.update(net.__dict__)  # the same sessions, lines and memory of who was slow: only what is shown differs
        self._shown = shown

    def is_informed(self, node: NodeId) -> bool:
        """Whether a holder certainly knows the entry that is shown."""
        return self._shown.is_known_to(node)

    def shard_headers(self) -> dict[str, str]:
        """What goes with each request for shards."""
        return self._shown.headers()

    async def helped(self, node: Node, error: MedshardError, tries: int) -> bool:
        """Whether it is worth while to ask again what a holder refused for the ``tries``th time."""
        return await self._shown.helped(node, error, tries)

    async def call(
        self,
        node: Node,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        timeout_s: float,
        ok: Collection[int] = (200, 201, 204),
        anonymous: bool = False,
    ) -> bytes:
        """As a net's, asking again where an objection could be met."""
        tries = 1
        while True:
            try:
                return await super().call(node, method, path, body, timeout_s=timeout_s, ok=ok, anonymous=anonymous)
            except MedshardError as error:
                if not await self.helped(node, error, tries):
                    raise
            tries += 1

    async def _post(self, node: Node, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> Answer:
        shown = {**headers, **self.shard_headers(), **self._shown.vouchers_for(node.id)}
        return await super()._post(node, path, body, shown, timeout_s)

    @asynccontextmanager
    async def _open(
        self,
        node: Node,
        method: str,
        path: str,
        body: bytes | AsyncIterator[memoryview] | None,
        headers: Mapping[str, str],
        timeout_s: float | None,
        *,
        anonymous: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        shown = {**headers, **self.shard_headers()}
        async with super()._open(node, method, path, body, shown, timeout_s, anonymous=anonymous) as response:
            yield response


class Reader:
    """Reads of one vault: each under a pass, or in an emergency under a signed reason."""

    def __init__(self, net: Net, ledger: LedgerClient, line: Collection[Key], keep: Callable[[Entry], None]) -> None:
        """``line`` are the vault's keys, those before the present one too: a mark in the roster stays through rotations."""
        self._net = net
        self._ledger = ledger
        self._line = frozenset(line)
        self._keep = keep
        self.tickets = Tickets(net, ledger)

    async def read(self, file_ids: Sequence[FileId], purpose: int, reason: str | None, work: Work, early: Early | None = None) -> bool:
        """Do ``work`` on these files, part by part; whether it is on the ledger. ``reason`` is given for the case that it cannot be.

        ``early`` is begun where it can be, and has ended when this returns. Raises Refused in the ledger's or the holders' words,
        Unavailable saying what is down, and what ``work`` raises.
        """
        try:
            try:
                passes = await self.tickets.announce(file_ids, purpose, early)
            except Unavailable as error:
                if reason is None:
                    raise self._hopeless(error) from None
                return await self._read_in_emergency(file_ids, purpose, reason, work)
            for shown in passes:
                await self._under(shown, work)
            return True
        finally:
            if early is not None:
                await early.end()

    async def _read_in_emergency(self, file_ids: Sequence[FileId], purpose: int, reason: str, work: Work) -> bool:
        """As long as holders say that the ledger is within reach, both ways are tried in turn."""
        passes: list[EmergencyPass] = self._emergency_passes(file_ids, reason)
        deadline = time.monotonic() + emergency_wait_s
        while passes:
            passes[0].within_reach = False
            try:
                await self._under(passes[0], work)
                del passes[0]
                continue
            except (Unavailable, Refused):
                if not passes[0].within_reach or time.monotonic() > deadline:
                    raise
            passes[0].refusals.clear()
            await asyncio.sleep(emergency_pause_s)
            left = [file_id for each in passes for file_id in each.file_ids]
            try:
                for shown in await self.tickets.announce(left, purpose):
                    await self._under(shown, work)
            except Unavailable:
                continue
            return len(left) == len(set(file_ids))
        return False

    async def _under(self, shown: Pass, work: Work) -> None:
        if isinstance(shown, EmergencyPass):
            self._keep(shown.entry)
        try:
            await work(Admitted(self._net, shown), shown.file_ids)
        except MedshardError as error:
            if shown.refusals:
                shown.forget()
            raise shown.explained(error) from None

    def _emergency_passes(self, file_ids: Sequence[FileId], reason: str) -> list[EmergencyPass]:
        roster = self._net.roster
        if self._line.isdisjoint(roster.emergency) or not roster.auditors:
            raise self._hopeless(no_quorum(self._net, ()))
        sealed = seal_reason(roster.auditors, roster.origin, reason)
        room = entry_bytes_max - len(self._entry((FileId(bytes(file_id_size)),), sealed).to_bytes()) - 2  # the list's length may grow
        each = min(access_files_max, 1 + room // (file_id_size + 2))
        distinct = list(dict.fromkeys(file_ids))
        groups = [tuple(distinct[at : at + each]) for at in range(0, len(distinct), each)]
        return [EmergencyPass(self.tickets, self._net, frozenset(group), self._entry(group, sealed)) for group in groups]

    def _entry(self, file_ids: tuple[FileId, ...], sealed: bytes) -> Entry:
        return self._ledger.sign(Access(file_ids, Purpose.EMERGENCY, sealed, os.urandom(nonce_size)))

    def _hopeless(self, error: MedshardError) -> MedshardError:
        if self._line.isdisjoint(self._net.roster.emergency) or not self._net.roster.auditors:
            way_out = "This vault is not marked for emergencies in the roster, so there is no other way."
        else:
            way_out = "In an emergency: the same command with --break-glass and a reason, which the auditors will read."
        return Unavailable(
            str(error), hint=f"A read is written down before it is served. {error.hint or 'Start the nodes that are down.'} {way_out}"
        )
