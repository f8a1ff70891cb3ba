"""How long files are kept, what keeps them, and how they end.

    await vault.custody.retain([sha256], until)      # nobody destroys it before, not even its owner
    await vault.custody.hold([sha256])               # nor until this is released
    ended = await vault.custody.end([sha256])        # destroyed everywhere, with the nodes' receipts

Law: what counts is the ledger and not this vault's memory: every step asks it first. What is destroyed is a whole object, because it has
one key; what else lies in a pack is stored anew, and can be read from there, before anything is destroyed.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from medshard import moves
from medshard.anew import Anew
from medshard.index import Index
from medshard.keepers import Keepers
from medshard.keys import VaultKeys
from medshard.ledger import LedgerClient
from medshard.lookup import Lookup, Opened
from medshard.model import Member, OnProgress
from medshard.packs import Unit
from medshard.quorum import waiting_for_the_ledger
from medshard.rights import Rights
from medshard.shares import copy_mark, copy_shared
from medshard.standing import Standing
from medshard.text import last_day, shown
from medshard.transport import Net
from medshard_protocol import canonical
from medshard_protocol.canonical import Fields
from medshard_protocol.ending import Receipt, endings_path, receipt_bytes_max
from medshard_protocol.entries import Entry, Erase, Hold, Release, Retain, Retire, Type, nonce_size
from medshard_protocol.errors import Absent, Malformed, MedshardError, Refused
from medshard_protocol.ids import FileId, NodeId, file_id_size, node_id_size
from medshard_protocol.proofs import Inclusion

receipts_wait_s: Final = 10.0
receipt_timeout_s: Final = 3.0
look_every_s: Final = 0.2
holders_max: Final = 1024
note_bytes_max: Final = 64 * 1024 * 1024
at_once: Final = 16  # histories that are asked for side by side

ShareAgain: TypeAlias = Callable[[FileId, Sequence[bytes]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Kept:
    """What keeps one object, by the ledger."""

    file_id: FileId
    hashes: tuple[bytes, ...]  # of the documents in it
    name: bytes
    until: int = 0  # retained until then, Unix seconds; 0 for no retention
    holds: tuple[int, ...] = ()  # entries of the holds that stand
    ended: int = 0  # the RETIRE or ERASE entry; 0 while there is none
    waiting: int = 0  # the entry that proposes a hold or a release and waits for a second person; 0 where none does


@dataclass(frozen=True, slots=True)
class Ended:
    """One object that was destroyed: the entry, and what its holders have signed."""

    file_id: FileId
    type: Type
    inclusion: Inclusion
    documents: tuple[tuple[int, bytes], ...]  # size and SHA-256 of each
    receipts: tuple[Receipt, ...]
    missing: tuple[NodeId, ...]  # holders that have not answered yet
    moved: int = field(default=0, compare=False)  # neighbours in its pack that were stored anew

    @property
    def at(self) -> int:
        """When it ended, by its entry: Unix seconds."""
        body = Entry.from_bytes(self.inclusion.entry).body
        assert isinstance(body, Erase | Retire)
        return body.at

    def to_bytes(self) -> bytes:
        """The canonical form."""
        documents: list[canonical.Value] = [[size, sha256] for size, sha256 in self.documents]
        receipts: list[canonical.Value] = [receipt.to_bytes() for receipt in self.receipts]
        return canonical.encode([1, self.file_id, int(self.type), self.inclusion.to_value(), documents, receipts, list(self.missing)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Ended:
        """Parse. Raises Malformed."""
        f = Fields(canonical.decode(data, bytes_max=note_bytes_max, what="ended file"), count=7, what="ended file")
        f.uint(least=1, most=1)
        file_id, type_ = FileId(f.bytes(exactly=file_id_size)), Type(f.uint(least=Type.RETIRE, most=Type.ERASE))
        inclusion = Inclusion.from_value(f.list(most=4))
        documents = tuple((int(size), bytes(sha256)) for size, sha256 in f.list(most=100_000))
        receipts = tuple(Receipt.from_bytes(bytes(each)) for each in f.list(most=holders_max))
        return cls(file_id, type_, inclusion, documents, receipts, tuple(map(_node_id, f.list(most=holders_max))))


class Custody:
    """Of one open vault. ``share_again`` grants what was granted of an object that is replaced."""

    def __init__(
        self,
        net: Net,
        keys: VaultKeys,
        index: Index,
        ledger: LedgerClient,
        lookup: Lookup,
        anew: Anew,
        share_again: ShareAgain,
    ) -> None:
        self._net = net
        self._keys = keys
        self._index = index
        self._ledger = ledger
        self._lookup = lookup
        self._anew = anew
        self._share_again = share_again
        self._rights = Rights(net, keys, ledger)
        self._keepers = Keepers(net, keys, ledger)

    # -- keeping

    async def retain(self, hashes: Sequence[bytes], until: int) -> list[Kept]:
        """Keep files until a time (Unix seconds), for good: a later time may replace it, never an earlier one.

        Raises Refused for another's file or one that has ended. A retention is that of the whole object, so of a pack's other members too.
        """
        objects = await self._objects(hashes)
        standing = await self._all_standing(objects)
        for opened in objects:
            _check_there(opened, standing[opened.manifest.file_id])
        late = [each for each in objects if standing[each.manifest.file_id].until < until]
        await self._append([Retain(each.manifest.file_id, until, _nonce()) for each in late])
        return self._note([_kept(each, replace_until(standing[each.manifest.file_id], until)) for each in objects])

    async def hold(self, hashes: Sequence[bytes]) -> list[Kept]:
        """Keep files until this is released. Those on hold by this vault already stay so, by the same entry.

        Where the institution has keepers this proposes the hold, or approves what another keeper has proposed.
        """
        objects = await self._objects(hashes)
        standing = await self._all_standing(objects)
        for opened in objects:
            _check_there(opened, standing[opened.manifest.file_id])
        if await self._keepers.of(self._keys.public):
            return await self._by_two(Type.HOLD, [each for each in objects if not standing[each.manifest.file_id].holds], objects, standing)
        free = [each for each in objects if not any(mine for _, mine in standing[each.manifest.file_id].holds.values())]
        bodies = [Hold(each.manifest.file_id, _nonce()) for each in free]
        for opened, inclusion in zip(free, await self._append(bodies), strict=True):
            entry = Entry.from_bytes(inclusion.entry)
            standing[opened.manifest.file_id].holds[entry.id] = (inclusion.index, True)
        return self._note([_kept(each, standing[each.manifest.file_id]) for each in objects])

    async def release(self, hashes: Sequence[bytes]) -> list[Kept]:
        """End this vault's holds of files. Raises Absent where there is none, and Refused where only its institution's is left.

        Where the institution has keepers this proposes it for all holds, or approves what another keeper has proposed.
        """
        objects = await self._objects(hashes)
        standing = await self._all_standing(objects)
        for opened in objects:
            if not standing[opened.manifest.file_id].holds:
                raise Absent(f"{_name(opened)} is not on hold", hint="`medshard kept` lists what is.")
        if await self._keepers.of(self._keys.public):
            return await self._by_two(Type.RELEASE, objects, objects, standing)
        bodies = []
        for opened in objects:
            holds = standing[opened.manifest.file_id].holds
            own = [hold for hold, (_, mine) in holds.items() if mine]
            if not own:
                raise Refused(f"{_name(opened)} is on hold by your institution", hint="Its office releases that: `storenode release`.")
            bodies += [Release(hold, _nonce()) for hold in own]
        await self._append(bodies)
        for opened in objects:
            found = standing[opened.manifest.file_id]
            for hold in [hold for hold, (_, mine) in found.holds.items() if mine]:
                del found.holds[hold]
        return self._note([_kept(each, standing[each.manifest.file_id]) for each in objects])

    async def _by_two(
        self, what: Type, wanted: Sequence[Opened], objects: Sequence[Opened], standing: dict[FileId, Standing]
    ) -> list[Kept]:
        """Propose, or be the second person; what keeps each of the objects then."""
        propose = []
        expired = {(each.file_id, each.by) for each in await self._keepers.open() if each.what is what and each.expired}
        for opened in wanted:
            file_id = opened.manifest.file_id
            found = [author for author in standing[file_id].proposed[what] if (file_id, author) not in expired]
            if any(author != self._keys.public for author in found):
                await self._keepers.say(what, file_id)
            elif not found:
                propose.append(file_id)
        await self._keepers.propose(what, propose)
        now = await self._all_standing(objects)
        return self._note([_kept(each, now[each.manifest.file_id]) for each in objects])

    def kept(self) -> list[Kept]:
        """What keeps this vault's files, as far as this vault has said it or has asked; the soonest end first."""
        found = []
        for file_id, data in self._index.custody(_keeping):
            f = Fields(canonical.decode(data, bytes_max=note_bytes_max, what="kept file"), count=3, what="kept file")
            f.uint(least=1, most=1)
            until, holds = f.uint(most=2**62), tuple(int(each) for each in f.list(most=10_000))
            rows = self._index.by_file(file_id)
            if rows and (until or holds):
                name = os.path.commonpath([os.path.dirname(row.name) for row in rows]) if len(rows) > 1 else rows[0].name
                found.append(Kept(FileId(file_id), tuple(row.sha256 for row in rows), bytes(name), until, holds))
        return sorted(found, key=lambda each: (each.until, each.name))

    async def refresh(self, progress: OnProgress | None = None) -> list[Kept]:
        """Ask the ledger what keeps each of this vault's files, and remember it: after `reindex`, or where an institution made holds."""
        file_ids = list(dict.fromkeys(FileId(row.file_id) for row in self._index.rows()))
        slots = asyncio.Semaphore(at_once)

        async def one(file_id: FileId) -> Kept:
            async with slots:
                opened = await self._lookup.file(file_id)
                return _kept(opened, await self._standing(opened))

        self._note(await asyncio.gather(*map(one, file_ids)))
        return self.kept()

    async def standing(self, hashes: Sequence[bytes]) -> list[Kept]:
        """What keeps these files, asked of the ledger now."""
        objects = await self._objects(hashes)
        standing = await self._all_standing(objects)
        return self._note([_kept(each, standing[each.manifest.file_id]) for each in objects])

    # -- ending

    async def end(self, hashes: Sequence[bytes], *, erase: bool = True, progress: OnProgress | None = None) -> list[Ended]:
        """Destroy files: on the ledger first, then each node what it has, its wrapped keys before all else.

        Without ``erase`` the manifests stay, so that the registration can still be proved. Members of a pack that are not named are stored
        anew before. Raises Refused for what is retained, on hold, or another's. Nodes that do not answer now obey when they are back; their
        receipts are fetched by ``collect``.
        """
        objects = await self._objects(hashes)
        standing = await self._all_standing(objects)
        for opened in objects:  # all of them before anything is done to one
            found = standing[opened.manifest.file_id]
            if found.end is None:
                _check_free(opened, found)
        ended = []
        for opened in objects:
            ended.append(await self._end(opened, standing[opened.manifest.file_id], set(hashes), erase, progress))
        return ended

    async def collect(self, file_id: FileId, wait_s: float = receipts_wait_s) -> Ended:
        """Fetch receipts that were missing. Raises Absent for a file that this vault has not ended."""
        known = self.ended(file_id)
        if known.missing:
            known = await self._collected(known, wait_s)
            self._index.put_custody(_ending, file_id, known.to_bytes())
        return known

    def ended(self, file_id: FileId) -> Ended:
        """What is known of a file that this vault has ended. Raises Absent."""
        data = self._index.custody_of(_ending, file_id)
        if data is None:
            raise Absent("this vault has not ended such a file")
        return Ended.from_bytes(data)

    def all_ended(self, sha256: bytes | None = None) -> list[Ended]:
        """Every object that this vault has ended, or those that had one document in them."""
        found = [Ended.from_bytes(data) for _, data in self._index.custody(_ending)]
        chosen = [each for each in found if sha256 is None or any(document == sha256 for _, document in each.documents)]
        return sorted(chosen, key=lambda each: each.inclusion.index)

    def fate(self, sha256: bytes) -> str:
        """What to say of a document that this vault has no more because it has ended it; empty for any other."""
        gone = self.all_ended(sha256)
        return (
            f"was {'erased' if gone[-1].type is Type.ERASE else 'retired'} by this vault, with entry {gone[-1].inclusion.index}"
            if gone
            else ""
        )

    async def _end(self, opened: Opened, standing: Standing, hashes: set[bytes], erase: bool, progress: OnProgress | None) -> Ended:
        file_id, moved = opened.manifest.file_id, 0
        if standing.end is None:
            rest = [member for member in opened.header.members if member.sha256 not in hashes]
            moved = await self._store_anew(opened, rest, progress)
            if moved:
                await self._share_again(file_id, [member.sha256 for member in rest])
            body = (Erase if erase else Retire)(file_id, max(standing.time, standing.until), _nonce())
            (inclusion,) = await self._append([body])
        else:  # an earlier run got as far as the ledger; what stands there already stays at its place
            (inclusion,) = await self._ledger.append_signed([standing.end[1]])
        holders = tuple(
            dict.fromkeys([ref.node for ref in opened.manifest.shards] + list((await moves.moved(self._net, file_id)).values()))
        )
        type_ = Entry.from_bytes(inclusion.entry).body.type
        note = Ended(file_id, type_, inclusion, tuple(opened.header.documents), (), holders, moved)
        self.let_go(note)
        note = await self._collected(note, receipts_wait_s)
        self._index.put_custody(_ending, file_id, note.to_bytes())
        return note

    def let_go(self, note: Ended) -> None:
        """Forget an object that has ended, but for this note of it."""
        with self._index.together():
            self._index.put_custody(_ending, note.file_id, note.to_bytes())
            self._index.drop_custody(_keeping, note.file_id)
            self._index.remove(note.file_id)
        self._index.cut()

    async def _store_anew(self, opened: Opened, members: Sequence[Member], progress: OnProgress | None) -> int:
        """Give members of a pack an object of their own, before theirs is destroyed; how many had none."""
        homeless = [member for member in members if not self._has_another_home(opened.manifest.file_id, member.sha256)]
        if not homeless:
            return 0
        targets = [target for member in homeless if (target := opened.locate(member.sha256))]
        # A pack, even of one: a copy that was made to be shared alone is not taken for it.
        await self._anew.store(targets, lambda parts: [Unit(opened.header.name, tuple(parts), is_pack=True)], progress)
        return len(homeless)

    def _has_another_home(self, file_id: FileId, sha256: bytes) -> bool:
        rows = self._index.by_tag(self._keys.row_tag(sha256))
        # A copy that was made to be shared alone is no home: `ls` does not list it.
        return any(row.file_id != file_id and row.attributes.get(copy_mark) != copy_shared for row in rows)

    async def _collected(self, note: Ended, wait_s: float) -> Ended:
        """The note with the receipts that came within that time."""
        deadline = time.monotonic() + wait_s
        found = {receipt.node: receipt for receipt in note.receipts}

        async def ask(node: NodeId) -> None:
            while True:
                try:
                    data = await self._net.call(
                        self._net.roster.node(node), "GET", endings_path(note.file_id), timeout_s=receipt_timeout_s, ok=(200,)
                    )
                    receipt = Receipt.from_bytes(data) if len(data) <= receipt_bytes_max else None
                    if receipt is not None and (receipt.node, receipt.file_id) == (node, note.file_id):
                        receipt.verify(self._net.roster)
                        if receipt.type is note.type:
                            found[node] = receipt
                            return
                except MedshardError:
                    pass
                if time.monotonic() >= deadline:
                    return
                await asyncio.sleep(look_every_s)

        listed = {node.id for node in self._net.roster.nodes}
        await asyncio.gather(*(ask(node) for node in note.missing if node in listed))
        missing = tuple(node for node in note.missing if node not in found)
        return replace(note, receipts=tuple(found[node] for node in sorted(found)), missing=missing)

    # -- parts

    async def _objects(self, hashes: Sequence[bytes]) -> list[Opened]:
        """The objects that these files lie in, each once. Raises Absent, or Refused for another's."""
        objects: dict[FileId, Opened] = {}
        for target in await self._lookup.targets(list(dict.fromkeys(hashes))):
            if not self._lookup.owns(target.manifest):
                raise Refused(f"{target.sha256.hex()[:16]}… was shared with this vault: only its owner decides how long it is kept")
            objects.setdefault(target.manifest.file_id, Opened(target.manifest, target.seal, target.header, target.inclusion))
        for sha256 in dict.fromkeys(hashes):  # copies that were made to be shared alone, and second puts, are the same document
            for row in self._index.by_tag(self._keys.row_tag(sha256)):
                if FileId(row.file_id) not in objects:
                    objects[FileId(row.file_id)] = await self._lookup.file(FileId(row.file_id))
        for file_id, opened in (await self._lookup.homes(list(dict.fromkeys(hashes)))).items():  # an index that was lost knows not all
            objects.setdefault(file_id, opened)
        return list(objects.values())

    async def _all_standing(self, objects: Sequence[Opened]) -> dict[FileId, Standing]:
        slots = asyncio.Semaphore(at_once)

        async def one(opened: Opened) -> Standing:
            async with slots:
                return await self._standing(opened)

        found = await asyncio.gather(*map(one, objects))
        return {opened.manifest.file_id: standing for opened, standing in zip(objects, found, strict=True)}

    async def _standing(self, opened: Opened) -> Standing:
        return await self._keepers.standing(opened.manifest.file_id)

    async def _append(self, bodies: Sequence[Retain | Hold | Release | Erase | Retire]) -> list[Inclusion]:
        return await waiting_for_the_ledger(self._net, self._ledger.append(bodies)) if bodies else []

    def _note(self, kept: Iterable[Kept]) -> list[Kept]:
        kept = list(kept)
        with self._index.together():
            for each in kept:
                self._index.put_custody(_keeping, each.file_id, canonical.encode([1, each.until, list(each.holds)]))
        return kept


_keeping: Final = 0  # kinds of notes in the index
_ending: Final = 1


def replace_until(standing: Standing, until: int) -> Standing:
    """The standing with a retention until then at least."""
    return replace(standing, until=max(standing.until, until))


def _check_there(opened: Opened, standing: Standing) -> None:
    if standing.end is not None:
        raise Refused(f"{_name(opened)} has ended with entry {standing.end[0]}")


def _check_free(opened: Opened, standing: Standing) -> None:
    if standing.holds:
        entries = ", ".join(str(index) for index, _ in standing.holds.values())
        raise Refused(f"{_name(opened)} is on hold (entry {entries})", hint="Whoever made the hold releases it: `medshard release`.")
    if standing.until > standing.time:
        hint = "No honest node destroys it before. `medshard kept` lists the dates."
        raise Refused(f"{_name(opened)} is retained until {last_day(standing.until)}", hint=hint)


def _kept(opened: Opened, standing: Standing) -> Kept:
    hashes = tuple(sha256 for _, sha256 in opened.header.documents)
    holds = tuple(sorted(index for index, _ in standing.holds.values()))
    waiting = max((index for found in standing.proposed.values() for index in found.values()), default=0)
    end = standing.end[0] if standing.end else 0
    return Kept(opened.manifest.file_id, hashes, opened.header.name, standing.until, holds, end, waiting)


def _name(opened: Opened) -> str:
    return shown(opened.header.name)


def _nonce() -> bytes:
    return os.urandom(nonce_size)


def _node_id(value: object) -> NodeId:
    if not isinstance(value, bytes) or len(value) != node_id_size:
        raise Malformed("ended file: not a node id")
    return NodeId(value)
