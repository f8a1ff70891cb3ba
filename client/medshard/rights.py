"""What the nodes say of rights, believed only where it is proved: keys to seal to, who vouches for a key, grants, histories of files.

A node can stay silent about something, so more than f institutions are asked for a history, and every node for grants; what any of them
proves counts. Who vouches for a key is told in the nodes' word, to be shown to people and not to decide anything.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from medshard.envelopes import sealing_key
from medshard.keys import VaultKeys
from medshard.ledger import LedgerClient
from medshard.transport import Net, without_name
from medshard_protocol.checkpoint import Note, cosigners
from medshard_protocol.entries import (
    Access,
    Entry,
    Erase,
    Grant,
    Hold,
    Move,
    Propose,
    Register,
    Release,
    Retain,
    Retire,
    Revoke,
    Rotate,
    Sender,
)
from medshard_protocol.errors import Absent, Malformed, MedshardError, Refused, Unavailable
from medshard_protocol.identity import certificate_key
from medshard_protocol.ids import FileId, Key, Sha256
from medshard_protocol.roster import Node
from medshard_protocol.sharing import (
    History,
    SealedGrant,
    SealingKey,
    Shared,
    Vouched,
    grants_path,
    history_path,
    identity_path,
    key_path,
    pack_places,
    passings_path,
    places_max,
    proposals_path,
    shared_path,
    unpack_times,
)

timeout_s: Final = 3.0
long_timeout_s: Final = 15.0
put_tries: Final = 12  # a node takes a sealed key only when it has folded its GRANT entry, some 100 ms later
put_pause_s: Final = 0.25
fresh_tries: Final = 20  # a mirror hears some 100 ms later what was published
fresh_pause_s: Final = 0.1
pages_max: Final = 100_000

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ledgered:
    """What the log says of one file, as far as more than f institutions told: proved entries by their places."""

    entries: dict[int, Entry]
    told_effective: frozenset[int]  # of these, some node says that they had an effect
    size: int  # of the newest checkpoint among the answers
    time: int  # when it was cosigned: the median of the cosigners' clocks
    institutions: tuple[str, ...]  # that answered


class Rights:
    """Questions and deliveries about rights, for one vault."""

    def __init__(self, net: Net, keys: VaultKeys, ledger: LedgerClient) -> None:
        self._net = net
        self._keys = keys
        self._ledger = ledger
        self._heirs: dict[Key, list[Key]] = {}
        self.pinned: dict[Key, bytes] = {}  # HPKE keys that need not be asked for: their owners' signatures were checked

    # -- keys to seal to

    async def publish_key(self) -> int:
        """Put what others seal to on every node; how many have it now. Raises Unavailable if none takes it."""
        card = sealing_key(self._keys).to_bytes()
        answers = await self._all(lambda node: self._net.call(node, "PUT", "/v1/keys", card, timeout_s=timeout_s))
        taken = sum(not isinstance(answer, MedshardError) for _, answer in answers)
        if not taken:
            raise Unavailable(f"no node takes this vault's key ({_listed(answers)})", hint="See `medshard doctor`.")
        return taken

    async def key_of(self, owner: Key) -> bytes:
        """The HPKE key that ``owner`` signed. Raises Absent where no node has one."""
        if owner == self._keys.public:
            return self._keys.hpke.public
        if owner in self.pinned:
            return self.pinned[owner]
        answers = await self._all(lambda node: self._net.call(node, "GET", key_path(owner), timeout_s=timeout_s))
        for _, answer in answers:
            try:
                card = SealingKey.from_bytes(answer) if isinstance(answer, bytes) else None
                if card is not None and card.owner == owner:
                    card.verify()
                    return card.hpke_public
            except MedshardError:
                continue
        hint = "It must have joined; then its owner runs `medshard key` once, which puts it on the nodes again."
        raise Absent(f"no node has a key to seal to for {owner.hex()[:16]}…", hint=hint)

    async def vouched(self, key: Key) -> Vouched | None:
        """Who vouches for a key, in the word of two institutions' nodes; None if nobody could be asked."""
        answers = await self._ask_some(lambda node: self._net.call(node, "GET", identity_path(key), timeout_s=timeout_s), 2)
        found = []
        for answer in answers.values():
            try:
                found.append(Vouched.from_bytes(answer))
            except Malformed:
                continue
        # The one who knows of the later entry knows more.
        return max(found, key=lambda each: (each.withdrawn, each.index), default=None)

    # -- whose a key's files are

    async def passings(self, key: Key) -> list[tuple[int, Entry]]:
        """The entries by which the files of a key came to its successors, or to the vault that it sends for, as two institutions tell.

        A successor's stand by the old key's own signature; both kinds by that of an institution.
        """
        answers = await self._ask_some(lambda node: self._net.call(node, "GET", passings_path(key), timeout_s=timeout_s), 2)
        found: dict[int, Entry] = {}
        for answer in answers.values():
            with contextlib.suppress(MedshardError):
                found |= {inclusion.index: self._ledger.verified(inclusion) for inclusion in History.from_bytes(answer).inclusions()}
        known, passed = key, list[tuple[int, Entry]]()
        vouching = {institution.key for institution in self._net.roster.institutions} | self._former_ca_keys()
        for index, entry in sorted(found.items()):
            body = entry.body
            if isinstance(body, Rotate | Sender) and entry.author in vouching and body.passes[0] == known:
                passed.append((index, entry))
                known = body.passes[1]
        return passed

    def _former_ca_keys(self) -> set[Key]:
        return {certificate_key(each) for institution in self._net.roster.institutions for each in institution.former}

    async def heirs(self, key: Key, *, fresh: bool = True) -> list[Key]:
        """The keys that a key's files came to, in order; empty where they are its own. Not ``fresh``: as of when this was last asked."""
        if fresh or key not in self._heirs:
            bodies = [entry.body for _, entry in await self.passings(key)]
            self._heirs[key] = [body.passes[1] for body in bodies if isinstance(body, Rotate | Sender)]
        return self._heirs[key]

    async def heir(self, key: Key) -> Key:
        """Whose the files of a key are now."""
        return ([key] + await self.heirs(key))[-1]

    async def heirs_in(self, told: Ledgered) -> dict[Key, list[Key]]:
        """The heirs of a file's owner and readers, asked for only where somebody else acts in their place."""
        entries = told.entries.values()
        owners = {entry.author for entry in entries if isinstance(entry.body, Register)}
        readers = {entry.body.reader for entry in entries if isinstance(entry.body, Grant)}
        vouching = {institution.key for institution in self._net.roster.institutions}
        acting = {entry.author for entry in entries if isinstance(entry.body, Grant | Retain | Hold | Retire | Erase)} - owners
        reading = {entry.author for entry in entries if isinstance(entry.body, Access | Revoke | Release)} - owners - readers
        if not (acting | reading) - vouching:
            return {}
        return {key: await self.heirs(key) for key in owners | readers}

    # -- grants

    async def deliver(self, file_id: FileId, holders: Sequence[Node], grant: SealedGrant) -> int:
        """Put a sealed key beside the manifest; at how many institutions it lies now. Raises Unavailable below two, if there are two."""
        answers = await asyncio.gather(*(self._deliver(node, file_id, grant) for node in holders))
        reached = {node.institution for node, error in zip(holders, answers, strict=True) if error is None}
        if len(reached) < min(2, len({node.institution for node in holders})):
            why = "; ".join(f"{node.name}: {without_name(node, error)}" for node, error in zip(holders, answers, strict=True) if error)
            raise Unavailable(
                f"the key of file {file_id.hex()[:16]}… reached {len(reached)} institutions ({why})",
                hint="The grant is on the ledger. Run the same command again when more nodes are up: it sends what is missing.",
            )
        return len(reached)

    async def _deliver(self, node: Node, file_id: FileId, grant: SealedGrant) -> MedshardError | None:
        error: MedshardError | None = None
        for _ in range(put_tries):
            try:
                await self._net.call(node, "PUT", grants_path(file_id), grant.to_bytes(), timeout_s=timeout_s)
                return None
            except (Absent, Refused) as failure:
                error = failure  # the node may not have heard of the grant yet
            except MedshardError as failure:
                return failure
            await asyncio.sleep(put_pause_s)
        return error

    async def received(self, node: Node, after: int) -> AsyncIterator[Shared]:
        """What this node tells of grants to this vault, page by page, unchecked."""
        for _ in range(pages_max):
            path = shared_path(None if after < 0 else after)
            page = Shared.from_bytes(await self._net.call(node, "GET", path, timeout_s=long_timeout_s))
            yield page
            if not page.more or not page.files:
                return
            after = max(file.grant.index for file in page.files)

    # -- histories

    async def history(self, file_id: FileId) -> Ledgered:
        """Everything that the log says of a file. Raises Unavailable if so few answer that one could hide something."""
        told = await self._told(lambda after: history_path(file_id, after), "the file's history")
        return replace(told, entries=_about(file_id, told.entries))

    async def proposals(self) -> Ledgered:
        """Holds and releases that wait for a second person. That they still wait is the nodes' word."""
        return await self._told(proposals_path, "what waits for a second person")

    async def _told(self, path: Callable[[int | None], str], what: str) -> Ledgered:
        quorum = self._net.roster.quorum
        wanted = max(min(2, len(self._net.roster.institutions)), quorum.f + 1)
        pages = await self._ask_some(lambda node: self._history(node, path), wanted)
        if len(pages) < wanted:
            raise Unavailable(
                f"{len(pages)} institutions' nodes tell {what}, and {wanted} are needed to rule out that something is hidden",
                hint="See `medshard doctor`.",
            )
        entries: dict[int, Entry] = {}
        effective: set[int] = set()
        size = time = 0
        for told in pages.values():
            for page in told:
                for inclusion, each in zip(page.inclusions(), page.entries, strict=True):
                    entries[inclusion.index] = self._ledger.verified(inclusion)
                    effective |= {inclusion.index} if each.effective else set()
                if page.checkpoint:
                    checkpoint = self._ledger.published(page.checkpoint)
                    if checkpoint.size > size:
                        size, time = checkpoint.size, self._time(page.checkpoint)
        names = tuple(sorted(self._net.roster.institutions[node.institution].name for node in pages))
        return Ledgered(entries, frozenset(effective), size, time, names)

    async def _history(self, node: Node, path: Callable[[int | None], str]) -> list[History]:
        """All that a node tells, proved. Raises Unavailable for a log that is older than what this vault has seen of it."""
        for _ in range(fresh_tries):
            pages = await self._pages(node, path)
            if pages[-1].checkpoint and self._ledger.published(pages[-1].checkpoint).size >= self._ledger.reached:
                return pages
            await asyncio.sleep(fresh_pause_s)
        raise Unavailable(f"{node.name}: its log is out of date")

    async def _pages(self, node: Node, path: Callable[[int | None], str]) -> list[History]:
        pages: list[History] = []
        after: int | None = None
        for _ in range(pages_max):
            page = History.from_bytes(await self._net.call(node, "GET", path(after), timeout_s=long_timeout_s))
            for inclusion in page.inclusions():
                self._ledger.verified(inclusion)  # a node that lies is passed over, and another asked
            pages.append(page)
            if not page.more or not page.entries:
                return pages
            after = page.entries[-1].index
        return pages

    def _time(self, note: bytes) -> int:
        times = sorted(cosigners(Note.from_bytes(note), self._net.roster).values())
        return times[len(times) // 2] if times else 0

    # -- times

    async def times(self, places: Sequence[int]) -> dict[int, int]:
        """When entries were published at the latest, in Unix seconds; those of which nobody knows are left out.

        For people: it is the nodes' word. Of 2f + 1 institutions' answers the (f + 1)th smallest counts, which is not before what some
        honest node says.
        """
        found: dict[int, int] = {}
        f = self._net.roster.quorum.f
        for at in range(0, len(places), places_max):
            asked = list(places[at : at + places_max])
            answers = await self._ask_some(lambda node, asked=asked: self._times(node, asked), 2 * f + 1)  # type: ignore[misc]
            for place, said in zip(asked, zip(*answers.values(), strict=True), strict=True) if answers else ():
                known = sorted(time for time in said if time)
                if known:
                    found[place] = known[min(f, len(known) - 1)]
        return found

    async def _times(self, node: Node, places: Sequence[int]) -> list[int]:
        times = unpack_times(await self._net.call(node, "POST", "/v1/ledger/times", pack_places(places), timeout_s=timeout_s))
        if len(times) != len(places):
            raise Malformed(f"{node.name}: not a time for each entry")
        return times

    # -- asking

    async def _all(self, ask: Callable[[Node], Awaitable[T]]) -> list[tuple[Node, T | MedshardError]]:
        async def one(node: Node) -> T | MedshardError:
            try:
                return await ask(node)
            except MedshardError as error:
                return error

        nodes = self._net.roster.nodes
        return list(zip(nodes, await asyncio.gather(*map(one, nodes)), strict=True))

    async def _ask_some(self, ask: Callable[[Node], Awaitable[T]], wanted: int) -> dict[Node, T]:
        """Answers from ``wanted`` distinct institutions, or from as many as give one."""
        health = self._net.health
        left = sorted(self._net.roster.nodes, key=lambda node: (health.is_suspect(node.id), node.id))
        answers: dict[Node, T] = {}
        while left and len(answers) < wanted:
            settled = {node.institution for node in answers}
            turn: dict[int, Node] = {}
            for node in left:
                if node.institution not in settled and len(turn) < wanted - len(answers):
                    turn.setdefault(node.institution, node)
            if not turn:
                break
            left = [node for node in left if node not in turn.values()]
            results = await asyncio.gather(*(_outcome(ask(node)) for node in turn.values()))
            answers.update(
                {node: result for node, result in zip(turn.values(), results, strict=True) if not isinstance(result, MedshardError)}
            )
        return answers


async def _outcome(asked: Awaitable[T]) -> T | MedshardError:
    try:
        return await asked
    except MedshardError as error:
        return error


def _about(file_id: FileId, entries: dict[int, Entry]) -> dict[int, Entry]:
    """Those entries that are about the file, whatever else a node sent along."""
    known: set[Sha256] = set()
    about: dict[int, Entry] = {}
    for index in sorted(entries):
        entry = entries[index]
        match entry.body:
            case Grant(file_ids=file_ids) | Access(file_ids=file_ids):
                named = file_id in file_ids
            case Register() | Move() | Retain() | Hold() | Propose() | Retire() | Erase():
                named = entry.body.file_id == file_id
            case Revoke(grant=what) | Release(hold=what):
                named = what in known
            case _:
                named = False
        if named:
            known.add(entry.id)
            about[index] = entry
    return about


def _listed(answers: Sequence[tuple[Node, object]]) -> str:
    return "; ".join(f"{node.name}: {without_name(node, error)}" for node, error in answers if isinstance(error, MedshardError))
