"""Giving others the right to read, taking it back, and learning what one was given.

A right is a GRANT entry; the file's key goes beside the manifest, sealed to the reader. First the entry, then the key: nodes take a sealed
key only for a grant that stands in their mirror. What others gave is believed if the ledger proves the grant and the registration, the
manifest is the registered one, and the sealed key is the one that the manifest commits to.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from medshard.envelopes import open_grant, seal_grant
from medshard.grants import KnownGrant
from medshard.index import Index
from medshard.keys import VaultKeys
from medshard.ledger import LedgerClient
from medshard.lookup import Lookup, Opened
from medshard.model import Header, OnProgress, Progress
from medshard.putting import rows_of
from medshard.quorum import waiting_for_the_ledger
from medshard.rights import Ledgered, Rights
from medshard.transport import Net
from medshard_protocol.entries import Entry, Grant, Revoke, access_files_max, nonce_size
from medshard_protocol.errors import Absent, MedshardError, Refused
from medshard_protocol.ids import FileId, Key, Sha256
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import manifest_path
from medshard_protocol.roster import Institution, Node
from medshard_protocol.sharing import SharedFile

files_at_once: Final = 8
manifest_timeout_s: Final = 5.0

T = TypeVar("T")


class Sharing:
    """Grants of one vault and to it."""

    def __init__(self, net: Net, keys: VaultKeys, index: Index, ledger: LedgerClient, lookup: Lookup, rights: Rights) -> None:
        self._net = net
        self._keys = keys
        self._index = index
        self._ledger = ledger
        self._lookup = lookup
        self._rights = rights
        self._learned = 0  # grants that were taken in

    # -- giving

    async def grant(
        self, files: Sequence[Opened], reader: Key, until: int, purpose: int, progress: OnProgress | None = None
    ) -> list[KnownGrant]:
        """Let ``reader`` read these files of ours. A grant with the same terms that stands already is used again, and its key sent again.

        Raises Refused or Absent for a reader who cannot read, Unavailable where too few nodes are up.
        """
        reader = await self._present(reader)
        sealing_key = await self._rights.key_of(reader)
        by_id = {file.manifest.file_id: file for file in files}
        standing = {file_id: self._standing(file_id, reader, until, purpose) for file_id in by_id}
        fresh = [file_id for file_id, known in standing.items() if known is None]
        for known in await self._append_grants(fresh, reader, until, purpose):
            standing[known.file_id] = known
        done = 0

        async def deliver(file: Opened) -> None:
            nonlocal done
            known = standing[file.manifest.file_id]
            assert known is not None, "granted above"
            await self._deliver(file, sealing_key, known)
            done += 1
            if progress:
                progress(Progress(done, len(by_id), "files", os.fsdecode(file.header.name)))

        await _each(by_id.values(), deliver)
        return [known for known in standing.values() if known is not None]

    async def revoke(self, file_ids: Sequence[FileId], reader: Key | None, grant: Sha256 | int | None = None) -> list[KnownGrant]:
        """End every grant of these files to ``reader``, or the one with this id or place; what was ended, with the place of its end.

        A grant that also covers other files is given anew for those first. Raises Absent where there is nothing to end.
        """
        ended: dict[Sha256, tuple[int, Entry]] = {}
        for file_id in file_ids:
            live = live_grants(await self._rights.history(file_id), [keys.public for keys in self._keys.line])
            mine = {
                index: entry
                for index, entry in live.items()
                if isinstance(entry.body, Grant)
                and (reader is None or entry.body.reader == reader)
                and (grant is None or grant in (index, entry.id))
            }
            if not mine:
                raise Absent(
                    f"there is no such grant of file {file_id.hex()[:16]}…", hint="`medshard shared` lists what this vault shares."
                )
            ended.update({entry.id: (index, entry) for index, entry in mine.items()})
        for _, entry in ended.values():
            await self._grant_the_rest(entry, set(file_ids))
        bodies = [Revoke(grant_id, os.urandom(nonce_size)) for grant_id in ended]
        inclusions = await waiting_for_the_ledger(self._net, self._ledger.append(bodies))
        gone: list[KnownGrant] = []
        for (index, entry), inclusion in zip(ended.values(), inclusions, strict=True):
            gone += [replace(known, ended=inclusion.index) for known in _known(index, entry)]
        with self._index.together():
            for known in gone:
                self._index.put_grant(known)
        return [known for known in gone if known.file_id in file_ids]

    async def _grant_the_rest(self, entry: Entry, revoked: set[FileId]) -> None:
        assert isinstance(entry.body, Grant)
        terms = entry.body
        rest = [await self._lookup.file(file_id) for file_id in terms.file_ids if file_id not in revoked]
        if rest:
            sealing_key = await self._rights.key_of(terms.reader)
            # New grants, not ones that stand: the grant that ends is among those.
            known = await self._append_grants([file.manifest.file_id for file in rest], terms.reader, terms.until, terms.purpose)
            for file, each in zip(rest, known, strict=True):
                await self._deliver(file, sealing_key, each)

    async def _deliver(self, file: Opened, sealing_key: bytes, known: KnownGrant) -> None:
        nodes = {node.id for node in self._net.roster.nodes}
        holders = [self._net.roster.node(ref.node) for ref in file.manifest.shards if ref.node in nodes]
        await self._rights.deliver(file.manifest.file_id, holders, seal_grant(sealing_key, file.seal, known.grant))

    async def _append_grants(self, file_ids: Sequence[FileId], reader: Key, until: int, purpose: int) -> list[KnownGrant]:
        groups = [tuple(file_ids[at : at + access_files_max]) for at in range(0, len(file_ids), access_files_max)]
        entries = [self._ledger.sign(Grant(group, reader, until, purpose, os.urandom(nonce_size))) for group in groups]
        if not entries:
            return []
        inclusions = await waiting_for_the_ledger(self._net, self._ledger.append_signed(entries))
        known = [each for inclusion in inclusions for each in _known(inclusion.index, Entry.from_bytes(inclusion.entry))]
        with self._index.together():
            for each in known:
                self._index.put_grant(each)
        return known

    def _standing(self, file_id: FileId, reader: Key, until: int, purpose: int) -> KnownGrant | None:
        for known in self._index.grants(file_id):
            if known.given and not known.ended and (known.peer, known.until, known.purpose) == (reader, until, purpose):
                return known
        return None

    async def _present(self, reader: Key) -> Key:
        """The key of a reader who can read: this one, or the one that has succeeded it."""
        if self._keys.of(reader):
            raise Refused("that is the key of this vault itself, which may read its files anyway")
        vouched = await self._rights.vouched(reader)
        if vouched is None:
            return reader  # nobody to ask: the ledger will say it
        if not vouched.institution:
            hint = "Compare it with what `medshard key` prints there, and see that the vault has joined."
            raise Refused(f"no institution vouches for the key {reader.hex()[:16]}…", hint=hint)
        if not vouched.withdrawn:
            return reader
        heir = await self._rights.heir(reader)
        if heir == reader:
            raise Refused(f"{vouched.institution} vouches no longer for the key {reader.hex()[:16]}…", hint="Ask for the new key.")
        return heir

    # -- looking after grants that were given

    async def refresh_given(self, progress: OnProgress | None = None) -> None:
        """Learn which grants that this vault gave others have ended."""
        file_ids = list(dict.fromkeys(known.file_id for known in self._index.grants() if known.given and not known.ended))
        await self.refresh(file_ids, progress)

    async def refresh(self, file_ids: Sequence[FileId], progress: OnProgress | None = None) -> None:
        """Learn which grants of these files have ended."""
        done = 0

        async def one(file_id: FileId) -> None:
            nonlocal done
            told = await self._rights.history(file_id)
            ends = ended_grants(told, self._net.roster.institutions, await self._rights.heirs_in(told))
            for known in self._index.grants(file_id):
                if known.grant in ends and not known.ended:
                    self._index.put_grant(replace(known, ended=ends[known.grant]))
            done += 1
            if progress:
                progress(Progress(done, len(file_ids), "files", file_id.hex()[:16]))

        await _each(file_ids, one)

    # -- receiving

    async def sync(self, *, whole: bool = False) -> bool:
        """Learn what others have granted to this vault, from every node that answers; whether there was anything new.

        ``whole`` asks for everything and not only for what is new, and so finds which grants have ended.
        """
        before = self._learned
        told: set[tuple[Sha256, FileId]] = set()
        answered = await asyncio.gather(*(self._sync_with(node, told, whole=whole) for node in self._net.roster.nodes))
        if whole and any(answered):
            gone = [
                known for known in self._index.grants() if not known.given and not known.ended and (known.grant, known.file_id) not in told
            ]
            await self.refresh(list(dict.fromkeys(known.file_id for known in gone)))
        return self._learned > before

    async def _sync_with(self, node: Node, told: set[tuple[Sha256, FileId]], *, whole: bool) -> bool:
        cursor = -1 if whole else self._index.cursor(node.id)
        complete = True
        try:
            async for page in self._rights.received(node, cursor):
                for file in page.files:
                    try:
                        told.add((await self._take(node, file), file.file_id))
                    except MedshardError:  # not proved, or not to be had now: the next time begins with it
                        complete, cursor = False, min(cursor, file.grant.index - 1)
                    if complete:
                        cursor = max(cursor, file.grant.index)
        except MedshardError:
            return False
        finally:
            self._index.put_cursor(node.id, cursor)
        return True

    async def _take(self, node: Node, file: SharedFile) -> Sha256:
        """Check one granted file and keep it; the grant's id. Raises MedshardError for what is not proved."""
        entry = self._ledger.verified(file.grant)
        body = entry.body
        if not isinstance(body, Grant) or self._keys.of(body.reader) is None or file.file_id not in body.file_ids:
            raise Refused("not a grant of this file to this vault")
        if any(known.grant == entry.id and known.sealed for known in self._index.grants(file.file_id)):
            return entry.id
        manifest = await self._manifest(node, file)
        passed = await self._rights.heirs(manifest.owner, fresh=manifest.owner != entry.author)
        if manifest.file_id != file.file_id or entry.author not in (manifest.owner, *passed):
            raise Refused("the grant is not by the file's owner")
        sent = any(self._keys.of(key) for key in passed)  # by a sender of ours: the file is our own
        self._ledger.check(manifest, file.registration)
        seal = open_grant([keys.hpke for keys in self._keys.line], manifest, entry.id, file.sealed)
        header = Header.from_bytes(seal.open_header(manifest.header))
        known = KnownGrant(
            file.grant.index, file.file_id, entry.id, entry.author, body.until, body.purpose, given=False, sealed=file.sealed
        )
        with self._index.together():
            self._index.put_grant(known)
            self._lookup.remember(manifest, file.registration)
            rows = rows_of(manifest, header, file.registration.index)
            if not sent:
                rows = [replace(row, owner=bytes(entry.author)) for row in rows]
            self._index.add_many([(self._keys.row_tag(row.sha256), row) for row in rows])
        self._learned += 1
        return entry.id

    async def _manifest(self, node: Node, file: SharedFile) -> Manifest:
        if file.manifest:
            return Manifest.from_bytes(file.manifest)
        return Manifest.from_bytes(await self._net.call(node, "GET", manifest_path(file.file_id), timeout_s=manifest_timeout_s))


def live_grants(told: Ledgered, owner: Collection[Key]) -> dict[int, Entry]:
    """The grants by the keys of ``owner`` that nobody has revoked, by their places."""
    revoked = {entry.body.grant for entry in told.entries.values() if isinstance(entry.body, Revoke)}
    return {
        index: entry
        for index, entry in told.entries.items()
        if isinstance(entry.body, Grant) and entry.author in owner and entry.id not in revoked
    }


def ended_grants(told: Ledgered, institutions: Iterable[Institution], heirs: Mapping[Key, Sequence[Key]]) -> dict[Sha256, int]:
    """Where each grant was revoked by somebody who may, the ``heirs`` of a key among them."""
    keys = {institution.key for institution in institutions}
    grants = {entry.id: entry for entry in told.entries.values() if isinstance(entry.body, Grant)}
    ends: dict[Sha256, int] = {}
    for index, entry in sorted(told.entries.items()):
        given = grants.get(entry.body.grant) if isinstance(entry.body, Revoke) else None
        if given is None or not isinstance(given.body, Grant):
            continue
        parties = [each for key in (given.author, given.body.reader) for each in (key, *heirs.get(key, ()))]
        if entry.author in parties or entry.author in keys:
            ends.setdefault(given.id, index)
    return ends


def _known(index: int, entry: Entry) -> list[KnownGrant]:
    body = entry.body
    assert isinstance(body, Grant)
    return [KnownGrant(index, file_id, entry.id, body.reader, body.until, body.purpose, given=True) for file_id in body.file_ids]


async def _each(items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
    """Do ``work`` for each item, ``files_at_once`` at a time. The first error is raised when all of them have ended."""
    slots = asyncio.Semaphore(files_at_once)

    async def one(item: T) -> None:
        async with slots:
            await work(item)

    results = await asyncio.gather(*map(one, items), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
