"""The vault: everything a client does, in one object.

    from medshard import Vault

    async with Vault.open(Path("~/.medshard").expanduser(), passphrase) as vault:
        report = await vault.put([Path("scan.dcm")])
        await vault.get(report.stored[0].sha256, Path("back.dcm"))

It composes; the work is done in putting, getting, checking and rebuilding.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final

from medshard import checking, diagnosis, enrolment, memory, rebuilding, rotation
from medshard.access import Reader
from medshard.anew import Anew
from medshard.contacts import Contacts
from medshard.custody import Custody
from medshard.elsewhere import Elsewhere
from medshard.getting import Early, Getter, default_destination
from medshard.home import Home
from medshard.index import Index
from medshard.keepers import Keepers
from medshard.keys import VaultKeys, create_key_file, open_key_file
from medshard.ledger import LedgerClient
from medshard.links.desk import Desk
from medshard.lookup import Lookup, Opened
from medshard.membership import following
from medshard.model import Finding, GetReport, Info, Progress, PutReport, Row, VerifyReport
from medshard.packs import Plan, plan
from medshard.proving import Prover
from medshard.putting import Code, Putter
from medshard.query import Query
from medshard.ranges import Ranges, Span
from medshard.rekeying import rekeying, through
from medshard.restoring import Restore, Target
from medshard.scratch import remove_left
from medshard.shares import Shares, copy_mark, copy_shared
from medshard.source import hash_file
from medshard.tls import Shown
from medshard.transport import Net
from medshard_protocol import canonical
from medshard_protocol.documentproof import DocumentProof, Proven
from medshard_protocol.entries import Entry, Purpose
from medshard_protocol.errors import Absent, Conflict, Damaged, MedshardError, Refused, Unavailable
from medshard_protocol.ids import FileId
from medshard_protocol.manifest import Manifest
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import Roster

OnProgress = Callable[[Progress], None]
pending_wait_s: Final = 3.0  # for emergency reads of an earlier time, before the work that was asked for
give_back_bytes: Final = 32 * 1024 * 1024  # after moving this much, freed memory is worth returning
health_slot: Final = b"health"
pending_slot: Final = b"emergency-pending"
pending_bytes_max: Final = 16 * 1024 * 1024
verify_at_once: Final = 48  # files whose holders are asked under one announcement


class Vault:
    """Use ``Vault.open``. One event loop, many operations at a time."""

    def __init__(self, home: Home, keys: VaultKeys, net: Net, index: Index) -> None:
        self.home = home
        self.contacts = Contacts(home.contacts, keys.at_home.index)
        self._net = net
        self._index = index
        self._shown: Shown | None = None
        self._earlier: list[Ranges] = []  # under earlier keys
        self.links = Desk(self, index)
        self._compose(keys)

    def _compose(self, keys: VaultKeys) -> None:
        """Have all parts that sign or open anything work with these keys."""
        home, net, index = self.home, self._net, self._index
        self.keys = keys
        self._ledger = LedgerClient(net, keys)
        self._lookup = Lookup(net, keys, index, self._ledger)
        anew = Anew(net, keys, index, self._ledger, self._lookup, home.folder, self._restore_for_sharing)
        self.shares = Shares(net, keys, index, self._ledger, self._lookup, self.contacts, anew)
        self._lookup.sync = self.shares.sync
        self.custody = Custody(net, keys, index, self._ledger, self._lookup, anew, self.shares.share_again)
        self._lookup.fate = self.custody.fate
        self.shares.elsewhere = Elsewhere(net, keys, index, self._ledger, self._lookup, self.custody).learn
        self.shares.gone = lambda sha256: [each.file_id for each in self.custody.all_ended(sha256)]
        self.keepers = Keepers(net, keys, self._ledger)
        self._reader = Reader(net, self._ledger, [each.public for each in keys.line], self._keep_pending)
        self.ranges = Ranges(self._lookup, self._reader, home.standing_reason)

    @property
    def roster(self) -> Roster:
        """Who takes part, as far as this vault has followed."""
        return self._net.roster

    @staticmethod
    def create(home: Path, passphrase: str, *, fast_kdf: bool = False) -> VaultKeys:
        """Make a new vault's key file. Raises Refused when there is one. ``fast_kdf`` is for passphrases drawn by a machine."""
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        return create_key_file(Home(home).key_file, passphrase, fast=fast_kdf)

    @classmethod
    async def join(cls, home: Path, code: str, passphrase: str, *, fast_kdf: bool = False) -> None:
        """Enrol a vault with the institution that made the invitation; a new key is drawn unless the home has one."""
        files = Home(home)
        keys = open_key_file(files.key_file, passphrase) if files.key_file.exists() else cls.create(home, passphrase, fast_kdf=fast_kdf)
        await enrolment.join(files, keys, code)
        async with cls.opened(files, keys) as vault:
            with contextlib.suppress(Unavailable):  # it is sent again with `medshard key`
                await vault.shares.publish_key()

    @classmethod
    @asynccontextmanager
    async def open(cls, home: Path, passphrase: str) -> AsyncIterator[Vault]:
        """Open a joined vault. Raises Absent (no vault), Refused (passphrase), Malformed or Damaged (files)."""
        memory.share_one_heap()
        files = Home(home)
        rotation.finish(files)
        if files.sender.exists():
            raise Refused(f"{home} only sends: it holds no key that reads", hint="`medshard put` works here; read from the vault.")
        keys = await asyncio.to_thread(open_key_file, files.key_file, passphrase)
        async with cls.opened(files, keys) as vault, rekeying(vault, passphrase):
            yield vault

    def succeed(self, keys: VaultKeys, certificate: bytes) -> None:
        """Go on under these keys, which have come after the present ones. What is under way ends as it began."""
        assert self._shown is not None, "opened"
        self._shown.certificate, self._shown.signing = certificate, keys.signing
        self._net.show(certificate, self._shown.contexts(self._net.roster))
        before, reached = self.ranges, self._ledger.reached
        self._earlier.append(before)
        self._compose(keys)
        self.ranges.blocks, self._ledger.reached = before.blocks, reached

    @classmethod
    @asynccontextmanager
    async def opened(cls, files: Home, keys: VaultKeys, index_path: Path | None = None) -> AsyncIterator[Vault]:
        """A vault with these keys, whatever lies in the home's key file."""
        roster, certificate = files.roster(), files.certificate_bytes()
        remove_left(files.folder)

        shown = Shown(certificate, keys.signing)
        index = Index(index_path or files.index, keys.at_home.index)
        try:
            async with Net(roster, shown.contexts(roster), certificate) as net, following(files, net, shown.contexts):
                known = index.journal_get(health_slot) or b""
                net.health.recall(known)
                vault = cls(files, keys, net, index)
                vault._shown = shown
                try:
                    yield vault
                finally:
                    for ranges in (*vault._earlier, vault.ranges):
                        await ranges.close()
                    if (notes := net.health.notes()) != known:
                        with contextlib.suppress(sqlite3.Error):  # a full disk, say: of no importance beside what was done
                            index.journal_put(health_slot, notes)
        finally:
            index.close()

    @contextlib.contextmanager
    def beside(self, keys: VaultKeys, index_path: Path) -> Iterator[Vault]:
        """Another vault of the same identity over the same connections, with keys and an index of its own."""
        with contextlib.closing(Index(index_path, keys.at_home.index)) as index:
            yield Vault(self.home, keys, self._net, index)

    # -- store and restore

    async def put(
        self,
        paths: Sequence[Path],
        *,
        tags: Mapping[str, str] | None = None,
        policy_number: str | None = None,
        progress: OnProgress | None = None,
    ) -> PutReport:
        """Store files and folders. On return every stored file is fsynced on w institutions' nodes and on the cosigned ledger.

        What could not be stored is a Problem in the report. Raises Unavailable when nothing could be, for want of nodes.
        """
        attributes = {f"tag:{key}": value for key, value in (tags or {}).items()}
        if policy_number is not None:
            attributes["policy-number"] = policy_number
        planned = await asyncio.to_thread(plan, [Path(path) for path in paths], attributes)
        return await self.store(planned, progress)

    async def store(self, planned: Plan, progress: OnProgress | None = None) -> PutReport:
        """As ``put``, where the caller has decided what is sealed together."""
        await self._append_pending()
        roster = self.roster
        try:
            report = await self._putter().put(planned, progress)
        except Unavailable:
            if self.roster is roster and not await self._net.follow():
                raise
            report = await self._putter().put(planned, progress)  # who takes shards, and how many must, was changed meanwhile
        if sum(unit.size for unit in planned.units) >= give_back_bytes:
            memory.give_back()
        return report

    async def get(
        self,
        sha256: bytes,
        dest: Path | None = None,
        *,
        out: BinaryIO | None = None,
        overwrite: bool = True,
        progress: OnProgress | None = None,
        purpose: int = Purpose.UNSPECIFIED,
        break_glass: str | None = None,
        home: bytes | None = None,
    ) -> GetReport:
        """Restore one file by its SHA-256 to ``dest`` (a path or a folder; else its own name here), or into ``out``.

        A file may lie in several objects; ``home`` is the id of the one to read it from. Without ``overwrite``, raises Conflict where
        another file has that name. The read is on the ledger before a byte is asked for, with its ``purpose``; ``break_glass`` is the
        reason for which it may be served when the ledger is out of reach. Raises Refused where the right is wanting, Unavailable without
        a quorum or with fewer than k holders.
        """
        (target,) = await self._lookup.targets([sha256]) if home is None else [await self._lookup.located(sha256, FileId(home))]
        path = None if out is not None else _destination(target, dest)
        if path is not None and not overwrite:
            await asyncio.to_thread(_check_free, path, sha256)
        (report,) = await self._restore([(target, path)], out, progress, purpose, break_glass)
        return report

    async def get_many(
        self,
        hashes: Sequence[bytes],
        folder: Path,
        *,
        overwrite: bool = True,
        progress: OnProgress | None = None,
        purpose: int = Purpose.UNSPECIFIED,
        break_glass: str | None = None,
    ) -> list[GetReport]:
        """Restore many files into ``folder`` under their stored names. Members of one pack are read together.

        All of them are announced together. Raises what ``get`` does, and Conflict where two of them have one name, and without
        ``overwrite`` where another file has it.
        """
        targets = await self._lookup.targets(list(dict.fromkeys(hashes)))
        paths = [folder / os.fsdecode(target.name) for target in targets]
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise Conflict(f"two of these files are called {twice}", hint="get them one by one, each with -o")
        pairs: list[tuple[Target, Path | None]] = []
        for target, path in zip(targets, paths, strict=True):
            if not overwrite:
                await asyncio.to_thread(_check_free, path, target.sha256)
            path.parent.mkdir(parents=True, exist_ok=True)
            pairs.append((target, path))
        return await self._restore(pairs, None, progress, purpose, break_glass)

    async def get_to(self, pairs: Sequence[tuple[bytes, Path]], *, purpose: int, progress: OnProgress | None = None) -> None:
        """Restore files to these paths, whose folders are there; what is in the way is replaced. Raises as ``get_many``."""
        targets = await self._lookup.targets([sha256 for sha256, _ in pairs])
        chosen = [(target, path) for target, (_, path) in zip(targets, pairs, strict=True)]
        await self._restore(chosen, None, progress, purpose, None)

    async def read(self, sha256: bytes, offset: int, length: int, purpose: int = Purpose.UNSPECIFIED) -> bytes:
        """``length`` bytes from ``offset`` of one file, by reading only the stripes they lie in. Fewer at the end of the file."""
        span = await self.ranges.find(sha256)
        return await through(self, lambda: self.ranges.read(span, offset, offset + length, purpose=purpose))

    async def announce(self, file_ids: Sequence[bytes], purpose: int = Purpose.UNSPECIFIED) -> None:
        """Announce reads of these objects in as few ledger entries as can be; nothing where they were, minutes ago. Raises as ``get``."""
        await self._append_pending()
        await through(self, lambda: self._reader.tickets.announce([FileId(file_id) for file_id in file_ids], purpose))

    async def record(self, file_ids: Sequence[bytes], purpose: int) -> None:
        """Write a read of these objects into the ledger, even if one was announced minutes ago. Raises as ``get``."""
        await self._append_pending()
        await through(self, lambda: self._reader.tickets.renew([FileId(file_id) for file_id in dict.fromkeys(file_ids)], purpose))

    async def object(self, file_id: bytes) -> Opened:
        """An own object with its open header, by its file id. Raises Absent."""
        return await self._lookup.file(FileId(file_id))

    async def read_object(self, opened: Opened, offset: int, length: int, purpose: int = Purpose.UNSPECIFIED) -> bytes:
        """Bytes of an object's whole plaintext (for a pack, of its members back to back), by reading only the stripes they lie in."""
        span = Span(opened, 0, opened.header.size)
        return await through(self, lambda: self.ranges.read(span, offset, offset + length, purpose=purpose))

    def rows_of(self, file_id: bytes) -> list[Row]:
        """What the local index says of one own object: a file, or the members of a pack in order."""
        return self._index.by_file(file_id)

    def index_changed(self) -> bool:
        """Whether others have changed the local index, or this vault has removed a file from it, since the last call; yes at first."""
        return self._index.changed()

    def file_ids(self) -> set[bytes]:
        """Every own object that the local index knows."""
        return self._index.file_ids()

    async def _restore(
        self,
        pairs: Sequence[tuple[Target, Path | None]],
        out: BinaryIO | None,
        progress: OnProgress | None,
        purpose: int,
        break_glass: str | None,
    ) -> list[GetReport]:
        await self._append_pending()
        total, before = sum(target.size for target, _ in pairs), 0
        bad: set[tuple[str, int, int]] = set()
        begun: list[Restore] = []
        early = Early(target.manifest for target, _ in pairs)

        async def work(net: Net, file_ids: frozenset[FileId]) -> None:
            nonlocal before
            if out is not None and any(restore.written for restore in begun):
                raise Damaged("the read broke off after some bytes were written out", hint="Run the command again.")
            chosen = [(target, path) for target, path in pairs if target.manifest.file_id in file_ids]
            begun[:] = _restores(chosen, out)
            getter = Getter(net, early)
            shift = before
            try:
                await getter.restore(begun, progress and (lambda p: progress(Progress(p.done_bytes + shift, total, p.phase, p.path))))
            finally:
                bad.update(getter.bad_cells)
            before += sum(target.size for target, _ in chosen)

        file_ids = [target.manifest.file_id for target, _ in pairs]
        recorded = await self._reader.read(file_ids, purpose, break_glass or self.home.standing_reason(), work, early)
        if total >= give_back_bytes:
            memory.give_back()
        cells = tuple(sorted(bad))
        return [GetReport(path, target.size, target.sha256, cells, recorded) for target, path in pairs]

    async def _restore_for_sharing(self, pairs: Sequence[tuple[Target, Path | None]], progress: OnProgress | None) -> None:
        await self._restore(pairs, None, progress, Purpose.OPERATIONS, None)

    def forget_tickets(self) -> None:
        """Announce the next read anew, as a new run of the program does."""
        self._reader.tickets.expire()

    # -- look

    def ls(self, *, shared: bool = False) -> Iterator[Row]:
        """Every file of this vault, or every one ``shared`` with it and not taken back, from the local index, oldest first."""
        return self.find(Query(), own=not shared, shared=shared)

    def find(self, query: Query, *, own: bool = True, shared: bool = True) -> Iterator[Row]:
        """The files that meet a query, this vault's ``own`` first and then those ``shared`` with it, from the local index."""
        mine = (row for row in self._index.find(query) if row.attributes.get(copy_mark) != copy_shared) if own else ()
        ended = self._ended() if shared else set()
        others = (row for row in self._index.find(query, received=True) if FileId(row.file_id) not in ended) if shared else ()
        return chain(mine, others)

    def _ended(self) -> set[FileId]:
        """Files that were shared with this vault, and are no more as far as it knows."""
        received = [known for known in self._index.grants() if not known.given]
        return {known.file_id for known in received} - {known.file_id for known in received if not known.ended}

    def row(self, sha256: bytes) -> Row | None:
        """What the local index knows of one file, this vault's own or one shared with it."""
        tag = self.keys.row_tag(sha256)
        return next(iter([*self._index.by_tag(tag), *self._index.by_tag(tag, received=True)]), None)

    def documents_in(self, file_id: bytes) -> list[Row]:
        """What the local index knows to lie in an own object: one file, or the members of a pack in order."""
        return self._index.by_file(file_id)

    async def info(self, sha256: bytes) -> Info:
        """What is known of one file."""
        (target,) = await self._lookup.targets([sha256])
        return await checking.describe_target(self._net, target, self._row(target))

    async def evidence(self, sha256: bytes) -> tuple[Manifest, Inclusion]:
        """The public part of a stored file and the proof that the ledger holds it: what a third party needs to check both."""
        (target,) = await self._lookup.targets([sha256])
        return target.manifest, target.inclusion

    async def prove(self, sha256: bytes) -> tuple[DocumentProof, Proven]:
        """A proof for outsiders that one document was registered, checked against this vault's genesis file. Raises Unavailable."""
        (target,) = await self._lookup.targets([sha256])
        await self._net.follow()  # its receiver follows the rosters from the genesis file to the one that the checkpoint is of
        return await Prover(self._net, self.home.rosters()[0], self.home.links()).prove(target)

    async def verify(self, sha256: bytes) -> VerifyReport:
        """Ask every holder of a file to prove its shard; nothing is downloaded but a few cells."""
        (report,) = [each async for each in self.verify_each([sha256])]
        return report

    async def verify_each(self, hashes: Sequence[bytes]) -> AsyncIterator[VerifyReport]:
        """``verify`` for many files, with one announcement for every 48. Without a quorum no cell is asked for, and none is proven."""
        for at in range(0, len(hashes), verify_at_once):
            targets = await self._lookup.targets(hashes[at : at + verify_at_once])
            reports: dict[bytes, VerifyReport] = {}

            async def work(net: Net, file_ids: frozenset[FileId], targets: Sequence[Target] = targets) -> None:
                for target in targets:
                    if target.manifest.file_id in file_ids:
                        reports[target.sha256] = await checking.verify_target(net, target)  # noqa: B023 - awaited in this turn

            try:
                await self._reader.read([target.manifest.file_id for target in targets], Purpose.OPERATIONS, None, work)
            except Unavailable:
                for target in targets:
                    reports[target.sha256] = await checking.verify_target(self._net, target, cells=False)
            for target in targets:
                yield reports[target.sha256]

    async def doctor(self) -> list[Finding]:
        """What is wrong, why, and what to do."""
        return await diagnosis.diagnose(self.home, self.keys, self._net, self._index, self._ledger)

    async def reindex(self, progress: OnProgress | None = None) -> int:
        """Rebuild the local index from the ledger and any nodes that live, with what is shared; how many rows of its own it has now."""
        self._index.clear()
        await rebuilding.rebuild(self._net, self.keys, self._index, progress)
        if await rotation.learn_former(self):
            await rebuilding.rebuild(self._net, self.keys, self._index, progress)
        await self.shares.sync(whole=True)
        return self._index.count()

    # -- parts

    def _putter(self) -> Putter:
        return Putter(self._net, self.keys, self._index, self._ledger, self._lookup, Code(*self.roster.code))

    def _row(self, target: Target) -> Row:
        tag = self.keys.row_tag(target.sha256)
        for row in [*self._index.by_tag(tag), *self._index.by_tag(tag, received=True)]:
            if row.file_id == target.manifest.file_id:
                return row
        member = next((i for i, m in enumerate(target.header.members) if m.sha256 == target.sha256), None)
        about = target.header if member is None else target.header.members[member]
        return Row(
            target.sha256, target.size, target.name, about.media_type, about.attributes, target.manifest.file_id, member,
            target.header.put_time, target.inclusion.index, b"" if self.keys.of(target.manifest.owner) else target.manifest.owner,
        )  # fmt: skip

    async def _append_pending(self) -> None:
        """Append the emergency reads that could not be written down when they were made; nodes that served them do so as well."""
        if not (pending := self._pending()):
            return
        with contextlib.suppress(MedshardError, TimeoutError):
            async with asyncio.timeout(pending_wait_s):
                await self._ledger.append_signed(pending)
            with self._index.together():
                self._note_pending([entry for entry in self._pending() if entry not in pending])

    def _pending(self) -> list[Entry]:
        value = self._index.journal_get(pending_slot)
        if value is None:
            return []
        items = canonical.decode(value, bytes_max=pending_bytes_max, what="pending reads")
        return [Entry.from_bytes(item) for item in items if isinstance(item, bytes)]

    def _keep_pending(self, entry: Entry) -> None:
        with self._index.together():
            pending = self._pending()
            if entry not in pending:
                self._note_pending([*pending, entry])

    def _note_pending(self, entries: Sequence[Entry]) -> None:
        if entries:
            self._index.journal_put(pending_slot, canonical.encode([entry.to_bytes() for entry in entries]))
        else:
            self._index.journal_delete(pending_slot)


def _restores(pairs: Sequence[tuple[Target, Path | None]], out: BinaryIO | None) -> list[Restore]:
    restores: list[Restore] = []
    try:
        for target, path in pairs:
            restores.append(Restore(target, path, out))
    except BaseException:
        for restore in restores:
            restore.abandon()
        raise
    return restores


def _check_free(path: Path, sha256: bytes) -> None:
    """Raise Conflict where ``path`` is a file with other bytes."""
    if path.exists() and (not path.is_file() or hash_file(path) != sha256):
        raise Conflict(f"{path} is here already, and is another file", hint="choose another place with -o, or replace it with --force")


def _destination(target: Target, dest: Path | None) -> Path:
    if dest is None:
        return default_destination(target.name, Path.cwd())
    if dest.is_dir():
        return default_destination(target.name, dest)
    if not dest.parent.is_dir():
        raise Absent(f"the folder {dest.parent} does not exist", hint="make it, or choose another place with -o")
    return dest
