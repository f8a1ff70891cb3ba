"""What a vault shares and is shared with, in the terms of its user: hashes in, people's names out.

    await vault.shares.share([sha256], vault.contacts.key("Insurer"), until=...)
    for happened in await vault.shares.log(sha256): ...

Law: a file's key opens its whole object, so what is shared is a whole object; a member of a pack is stored once more for it. The mechanism
is in sharing, what the log means in history; here the two meet the index and the contacts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final

from medshard import auditing
from medshard.anew import Anew
from medshard.auditing import Audited
from medshard.contacts import Contacts
from medshard.grants import Happened, KnownGrant, Shared, purpose_name
from medshard.history import Names, Teller
from medshard.hpke import PrivateKey
from medshard.index import Index
from medshard.keys import VaultKeys
from medshard.ledger import LedgerClient
from medshard.lookup import Lookup, Opened
from medshard.model import OnProgress, Row, is_message
from medshard.packs import Unit
from medshard.restoring import Target
from medshard.rights import Rights
from medshard.sharing import Sharing
from medshard.transport import Net
from medshard_protocol.entries import Purpose
from medshard_protocol.errors import Absent, MedshardError, Refused, Unavailable
from medshard_protocol.ids import FileId, Key, Sha256

copy_mark: Final = "copy"  # attribute of a pack's member that was stored once more, to be shared alone
copy_shared: Final = "shared"


class Shares:
    """Of one open vault."""

    def __init__(
        self,
        net: Net,
        keys: VaultKeys,
        index: Index,
        ledger: LedgerClient,
        lookup: Lookup,
        contacts: Contacts,
        anew: Anew,
    ) -> None:
        self.elsewhere: Callable[[bool], Awaitable[bool]] | None = None  # learns what other homes of this vault have ended
        self.gone: Callable[[bytes], list[FileId]] = lambda sha256: []  # objects with a document that this vault has ended
        self._net = net
        self._keys = keys
        self._index = index
        self._ledger = ledger
        self._lookup = lookup
        self._contacts = contacts
        self._anew = anew
        self._rights = Rights(net, keys, ledger)
        self._sharing = Sharing(net, keys, index, ledger, lookup, self._rights)

    async def publish_key(self) -> int:
        """Put on the nodes what others seal to when they share with this vault; on how many it is now."""
        return await self._rights.publish_key()

    def pin(self, reader: Key, hpke_public: bytes) -> None:
        """Seal to this key for ``reader`` without asking: its owner's signature was checked."""
        self._rights.pinned[reader] = hpke_public

    async def sealing_card(self, owner: Key) -> bytes:
        """What ``owner`` has signed for others to seal to. Raises Absent."""
        return await self._rights.key_of(owner)

    async def sync(self, *, whole: bool = False) -> bool:
        """Learn what others have shared with this vault, and what other homes of it have erased, since the last time, or ever.

        Whether there was anything new.
        """
        new = await self._sharing.sync(whole=whole)
        return bool(self.elsewhere and await self.elsewhere(whole)) or new

    async def share(
        self,
        hashes: Sequence[bytes],
        reader: Key,
        *,
        until: int = 0,
        purpose: int = Purpose.UNSPECIFIED,
        progress: OnProgress | None = None,
    ) -> list[Shared]:
        """Let another vault read files of this one, ``until`` a time in Unix seconds, or for good.

        A member of a pack that is not shared as a whole is stored once more first: the key of a pack opens all of it. Raises Refused where
        the file is not this vault's or the reader nobody's, Absent for a reader without a key, Unavailable without a quorum.
        """
        hashes = list(dict.fromkeys(hashes))
        targets = await self._lookup.targets(hashes)
        for target in targets:
            if not self._lookup.owns(target.manifest):
                raise Refused(f"{target.sha256.hex()[:16]}… was shared with this vault: only its owner shares it further")
        wholes, parts = _whole_objects(targets)
        alone = await self._standing_alone(parts, progress)
        chosen = {target.sha256: target for target in [*wholes, *alone.values()]}
        files = [Opened(each.manifest, each.seal, each.header, each.inclusion) for each in chosen.values()]
        known = {each.file_id: each for each in await self._sharing.grant(files, reader, until, purpose, progress)}
        institution = await self._institution(reader)
        return [
            self._told(chosen[sha256], known[chosen[sha256].manifest.file_id], institution, copied=sha256 in alone) for sha256 in hashes
        ]

    def readers_of(self, file_id: FileId) -> list[Key]:
        """Whom this vault lets read an object now, as far as it knows."""
        return [known.peer for known in self._index.grants(file_id) if known.given and not known.ended]

    async def successors(self, key: Key) -> list[Key]:
        """The keys that have come after another vault's, in order; empty where there are none, or nobody can be asked."""
        try:
            return await self._rights.heirs(key, fresh=False)
        except MedshardError:
            return []

    async def share_objects(
        self, file_ids: Sequence[bytes], reader: Key, *, until: int = 0, purpose: int = Purpose.UNSPECIFIED
    ) -> list[Shared]:
        """Let another vault read whole objects of this one, whatever lies in them and wherever else that lies. Raises as ``share``."""
        files = [await self._lookup.file(FileId(file_id)) for file_id in dict.fromkeys(file_ids)]
        granted = await self._sharing.grant(files, reader, until, purpose)
        institution = await self._institution(reader)
        return [self._listed(known, row.sha256, row.name, institution) for known in granted for row in self._rows_of(known)]

    async def share_again(self, file_id: FileId, hashes: Sequence[bytes]) -> None:
        """Give whoever may read this object the same right to the ones that these documents have been moved to."""
        live = [known for known in self._index.grants(file_id) if known.given and not known.ended]
        for known in live:
            elsewhere = [row for sha256 in hashes for row in self._index.by_tag(self._keys.row_tag(sha256)) if row.file_id != file_id]
            files = [await self._lookup.file(each) for each in dict.fromkeys(FileId(row.file_id) for row in elsewhere)]
            whole = [file for file in files if {sha256 for _, sha256 in file.header.documents} <= set(hashes)]
            await self._sharing.grant(whole, known.peer, known.until, known.purpose, None)

    async def revoke(self, hashes: Sequence[bytes], reader: Key | None, grant: Sha256 | int | None = None) -> list[Shared]:
        """Take files back from a reader, or end the one grant with this id or place; every document that the reader loses by it.

        Wherever the files lie: alone, in a pack or a claim that was shared whole, or as a copy. What was read stays read.
        """
        objects: dict[FileId, Target] = {}
        for target in await self._lookup.targets(list(dict.fromkeys(hashes))):
            homes = list(dict.fromkeys([target.manifest.file_id, *(FileId(row.file_id) for row in self.objects_of([target.sha256]))]))
            await self._sharing.refresh(homes)
            given = [known for home in homes for known in self._index.grants(home) if known.given and not known.ended]
            meant = [each.file_id for each in given if reader in (None, each.peer) and (grant is None or grant in (each.index, each.grant))]
            if not meant:  # an index that was lost knows of no grants: the ledger is asked of the likeliest
                meant = [(await self._lookup.alone(target.sha256) or target).manifest.file_id]
            objects |= dict.fromkeys(meant, target)
        ended = await self._sharing.revoke(list(objects), reader, grant)
        return [each for known in ended for each in self._lost(known, objects[known.file_id])]

    def _lost(self, known: KnownGrant, target: Target) -> list[Shared]:
        rows = self._rows_of(known)
        return [self._listed(known, row.sha256, row.name, "") for row in rows] or [self._told(target, known, "")]

    def readers(self, file_id: bytes) -> list[Key]:
        """Whom this vault has let read an object, whether they still may or not, as far as its index knows."""
        return [known.peer for known in self._index.grants(file_id) if known.given]

    async def all(self, progress: OnProgress | None = None) -> list[Shared]:
        """What is shared with this vault, and by it, with what has ended; asked of the nodes and proved by the ledger."""
        with contextlib.suppress(Unavailable):
            await self.publish_key()
        await self.sync(whole=True)
        await self._sharing.refresh_given(progress)
        grants = self._index.grants()
        institutions = {peer: await self._institution(peer) for peer in dict.fromkeys(known.peer for known in grants)}
        listed: list[Shared] = []
        for known in grants:
            for row in self._rows_of(known):
                told = self._listed(known, row.sha256, row.name, institutions[known.peer])
                listed.append(replace(told, message=is_message(row.media_type)))
        return listed

    async def log(self, sha256: bytes) -> list[Happened]:
        """What the ledger says of one file, wherever it lies or lay: who read it, when, under whose grant.

        Proved, and by more institutions than could conspire.
        """
        owners: dict[FileId, Key | None] = dict.fromkeys(self.gone(sha256))
        try:
            (target,) = await self._lookup.targets([sha256])
            owners[target.manifest.file_id] = target.manifest.owner
        except Absent:
            if not owners:
                raise
        for file_id in dict.fromkeys(FileId(row.file_id) for row in self.objects_of([sha256])):
            if file_id not in owners:
                owners[file_id] = (await self._lookup.file(file_id)).manifest.owner
        told: dict[int, Happened] = {}
        for file_id, owner in owners.items():
            told |= {happened.index: happened for happened in await self._happened(file_id, owner, sha256)}
        return await self._timed([told[index] for index in sorted(told)])

    async def told(self, file_id: FileId, sha256: bytes) -> list[Happened]:
        """What the ledger says of one object of this vault, in which a document is. As ``log``."""
        owner = (await self._lookup.file(file_id)).manifest.owner  # perhaps an earlier key of this vault
        return await self._timed(await self._happened(file_id, owner, sha256))

    def objects_of(self, hashes: Sequence[bytes]) -> list[Row]:
        """Every object of this vault that these documents are in: second puts, and copies that were made to be shared alone."""
        return [row for sha256 in dict.fromkeys(hashes) for row in self._index.by_tag(self._keys.row_tag(sha256))]

    async def _happened(self, file_id: FileId, owner: Key | None, sha256: bytes) -> list[Happened]:
        names = Names(self._contacts.names(), {}, [keys.public for keys in self._keys.line])
        history = await self._rights.history(file_id)
        for author in {entry.author for entry in history.entries.values()}:
            names.institutions[author] = await self._institution(author)
        teller = Teller(self._net.roster, names)
        if owner is not None:
            teller.own(file_id, owner)
        for key in await self._rights.heirs_in(history):
            for index, entry in await self._rights.passings(key):
                teller.passed(index, entry)
        entries = sorted(history.entries.items())
        told = [teller.tell(index, entry, sha256=sha256, file_id=file_id, time=history.time) for index, entry in entries]
        return [happened for happened in told if happened]

    async def audit(self, auditors: PrivateKey | None, progress: OnProgress | None = None) -> Audited:
        """Everything that ever happened to any file, from the whole log; with the auditors' key, why it was read in emergencies."""
        names = Names(self._contacts.names(), {}, [keys.public for keys in self._keys.line])
        return await auditing.audit(self._net, Teller(self._net.roster, names, auditors), names, self._timed, progress)

    async def _timed(self, happened: Sequence[Happened]) -> list[Happened]:
        """With the time of each as far as the nodes kept it; what they did not happened before the checkpoint's, which is there already."""
        times = await self._rights.times([each.index for each in happened])
        return [replace(each, time=times[each.index], exact=True) if each.index in times else each for each in happened]

    async def _standing_alone(self, targets: Sequence[Target], progress: OnProgress | None) -> dict[bytes, Target]:
        """An object of its own for each of these members of packs; those that have none yet are stored once more."""
        found = {target.sha256: alone for target in targets if (alone := await self._lookup.alone(target.sha256))}
        wanting = [target for target in targets if target.sha256 not in found]
        if not wanting:
            return found
        await self._anew.store(
            wanting, lambda parts: [Unit(part.name, (part,), is_pack=False) for part in parts], progress, {copy_mark: copy_shared}
        )
        for target in wanting:
            alone = await self._lookup.alone(target.sha256)
            assert alone is not None, "stored just now"
            found[target.sha256] = alone
        return found

    async def withdrawn_by(self) -> str:
        """The institution that has withdrawn this vault's key, in its nodes' word; empty if none has, or nobody answers."""
        with contextlib.suppress(MedshardError):
            vouched = await self._rights.vouched(self._keys.public)
            return vouched.institution if vouched and vouched.withdrawn else ""
        return ""

    async def _institution(self, key: Key) -> str:
        with contextlib.suppress(MedshardError):
            vouched = await self._rights.vouched(key)
            return vouched.institution if vouched else ""
        return ""

    def _told(self, target: Target, known: KnownGrant, institution: str, *, copied: bool = False) -> Shared:
        return replace(self._listed(known, target.sha256, target.name, institution), copied=copied)

    def _listed(self, known: KnownGrant, sha256: bytes, name: bytes, institution: str) -> Shared:
        return Shared(
            sha256, name, known.file_id, known.grant, known.index, known.peer, self._contacts.names().get(known.peer, ""), institution,
            known.until, purpose_name(known.purpose), known.given, known.ended,
        )  # fmt: skip

    def _rows_of(self, known: KnownGrant) -> list[Row]:
        return self._index.by_file(known.file_id, received=not known.given)


def _whole_objects(targets: Sequence[Target]) -> tuple[list[Target], list[Target]]:
    """Split targets into those whose whole object is meant, and members of packs of which others are not."""
    chosen: dict[FileId, set[bytes]] = {}
    for target in targets:
        chosen.setdefault(target.manifest.file_id, set()).add(target.sha256)
    wholes: list[Target] = []
    parts: list[Target] = []
    for target in targets:
        of_pack = {member.sha256 for member in target.header.members}
        (wholes if of_pack <= chosen[target.manifest.file_id] else parts).append(target)
    return wholes, parts
