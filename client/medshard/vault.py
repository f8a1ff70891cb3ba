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
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, Final

from medshard import checking, diagnosis, enrolment, memory, rebuilding
from medshard.getting import Getter, default_destination
from medshard.home import Home
from medshard.index import Index
from medshard.keys import VaultKeys, create_key_file, open_key_file
from medshard.ledger import LedgerClient
from medshard.lookup import Lookup
from medshard.model import Finding, GetReport, Info, Progress, PutReport, Row, VerifyReport
from medshard.packs import plan
from medshard.putting import Code, Putter
from medshard.query import Query
from medshard.restoring import Restore, Target
from medshard.source import hash_file
from medshard.tls import context_for
from medshard.transport import Net
from medshard_protocol import canonical
from medshard_protocol.errors import Absent, Conflict, MedshardError
from medshard_protocol.ids import FileId
from medshard_protocol.manifest import Manifest
from medshard_protocol.proofs import Inclusion

OnProgress = Callable[[Progress], None]
announce_wait_s: Final = 1.5  # how long a restore waits for its trace when the quorum is out of reach
give_back_bytes: Final = 32 * 1024 * 1024  # after moving this much, freed memory is worth returning
ticket_s: Final = 600.0  # how long one ACCESS entry speaks for reads of its files, as a ticket does in the design
pending_slot: Final = b"access-pending"
pending_bytes_max: Final = 16 * 1024 * 1024


class Vault:
    """Use ``Vault.open``. One event loop, many operations at a time."""

    def __init__(self, home: Home, keys: VaultKeys, net: Net, index: Index) -> None:
        self.home = home
        self.keys = keys
        self.roster = net.roster
        self._net = net
        self._index = index
        self._ledger = LedgerClient(net, keys)
        self._lookup = Lookup(net, keys, index, self._ledger)
        self._announced_until: dict[FileId, float] = {}

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

    @classmethod
    @asynccontextmanager
    async def open(cls, home: Path, passphrase: str) -> AsyncIterator[Vault]:
        """Open a joined vault. Raises Absent (no vault), Refused (passphrase), Malformed or Damaged (files)."""
        memory.share_one_heap()
        files = Home(home)
        keys = await asyncio.to_thread(open_key_file, files.key_file, passphrase)
        roster, certificate = files.roster(), files.certificate_bytes()
        contexts = {number: context_for(each.ca, certificate, keys.signing) for number, each in enumerate(roster.institutions)}
        index = Index(files.index, keys.index)
        try:
            async with Net(roster, contexts) as net:
                yield cls(files, keys, net, index)
        finally:
            index.close()

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
        await self._append_pending()
        planned = await asyncio.to_thread(plan, [Path(path) for path in paths], attributes)
        putter = Putter(self._net, self.keys, self._index, self._ledger, self._lookup, Code(*self.roster.code))
        report = await putter.put(planned, progress)
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
    ) -> GetReport:
        """Restore one file by its SHA-256 to ``dest`` (a path or a folder; else its own name here), or into ``out``.

        Without ``overwrite``, raises Conflict where another file has that name.
        """
        (target,) = await self._lookup.targets([sha256])
        path = None if out is not None else _destination(target, dest)
        if path is not None and not overwrite:
            await asyncio.to_thread(_check_free, path, sha256)
        (report,) = await self._restore([(target, path)], out, progress)
        return report

    async def get_many(
        self, hashes: Sequence[bytes], folder: Path, *, overwrite: bool = True, progress: OnProgress | None = None
    ) -> list[GetReport]:
        """Restore many files into ``folder`` under their stored names. Members of one pack are read together.

        Raises Conflict where two of them have one name, and without ``overwrite`` where another file has it.
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
        return await self._restore(pairs, None, progress)

    async def read(self, sha256: bytes, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` of one file, by reading only the stripes they lie in. Fewer at the end of the file."""
        (target,) = await self._lookup.targets([sha256])
        return await Getter(self._net, self._lookup, self._announce).read(target, offset, length)

    async def _restore(
        self, pairs: Sequence[tuple[Target, Path | None]], out: BinaryIO | None, progress: OnProgress | None
    ) -> list[GetReport]:
        await self._append_pending()
        getter = Getter(self._net, self._lookup, self._announce)
        restores: list[Restore] = []
        try:
            for target, path in pairs:
                restores.append(Restore(target, path, out))
        except BaseException:
            for restore in restores:
                restore.abandon()
            raise
        recorded = await getter.restore(restores, progress)
        if sum(target.size for target, _ in pairs) >= give_back_bytes:
            memory.give_back()
        bad = tuple(getter.bad_cells)
        return [GetReport(path, target.size, target.sha256, bad, recorded) for target, path in pairs]

    # -- look

    def ls(self) -> Iterator[Row]:
        """Every file of this vault, from the local index, oldest first."""
        return self._index.rows()

    def find(self, query: Query) -> Iterator[Row]:
        """The files that meet a query, from the local index."""
        return self._index.find(query)

    async def info(self, sha256: bytes) -> Info:
        """What is known of one file."""
        (target,) = await self._lookup.targets([sha256])
        return await checking.describe_target(self._net, target, self._row(target))

    async def evidence(self, sha256: bytes) -> tuple[Manifest, Inclusion]:
        """The public part of a stored file and the proof that the ledger holds it: what a third party needs to check both."""
        (target,) = await self._lookup.targets([sha256])
        return target.manifest, target.inclusion

    async def verify(self, sha256: bytes) -> VerifyReport:
        """Ask every holder of a file to prove its shard; nothing is downloaded but a few cells."""
        (target,) = await self._lookup.targets([sha256])
        return await checking.verify_target(self._net, target)

    async def doctor(self) -> list[Finding]:
        """What is wrong, why, and what to do."""
        return await diagnosis.diagnose(self.home, self.keys, self._net, self._index, self._ledger)

    async def reindex(self, progress: OnProgress | None = None) -> int:
        """Rebuild the local index from the ledger and any nodes that live; how many rows it has now."""
        self._index.clear()
        return await rebuilding.rebuild(self._net, self.keys, self._index, progress)

    # -- parts

    def _row(self, target: Target) -> Row:
        for row in self._index.by_tag(self.keys.tag(target.sha256)):
            if row.file_id == target.manifest.file_id:
                return row
        member = next((i for i, m in enumerate(target.header.members) if m.sha256 == target.sha256), None)
        about = target.header if member is None else target.header.members[member]
        return Row(
            target.sha256, target.size, target.name, about.media_type, about.attributes, target.manifest.file_id, member,
            target.header.put_time, target.inclusion.index,
        )  # fmt: skip

    async def _announce(self, file_ids: Sequence[FileId]) -> bool:
        """Put the read on the ledger; whether it is there. If the quorum is out of reach it is kept and appended later.

        An entry speaks for ``ticket_s``: pages of one file, or frames of one study, are one read and not a thousand.
        """
        now = time.monotonic()
        file_ids = [file_id for file_id in file_ids if self._announced_until.get(file_id, 0.0) <= now]
        if not file_ids:
            return True
        try:
            async with asyncio.timeout(announce_wait_s):
                await self._ledger.announce(file_ids)
            self._announced_until = {file_id: until for file_id, until in self._announced_until.items() if until > now}
            self._announced_until.update(dict.fromkeys(file_ids, now + ticket_s))
            return True
        except (MedshardError, TimeoutError):
            with self._index.together():
                self._keep_pending([*self._pending(), *file_ids])
            return False

    async def _append_pending(self) -> None:
        """Append the reads that could not be written down when they were made."""
        pending = self._pending()
        if not pending:
            return
        with contextlib.suppress(MedshardError, TimeoutError):
            async with asyncio.timeout(announce_wait_s):
                await self._ledger.announce(pending)
            with self._index.together():
                self._keep_pending([file_id for file_id in self._pending() if file_id not in set(pending)])

    def _pending(self) -> list[FileId]:
        value = self._index.journal_get(pending_slot)
        return (
            [] if value is None else [FileId(item) for item in canonical.decode(value, bytes_max=pending_bytes_max, what="pending reads")]
        )

    def _keep_pending(self, file_ids: Sequence[FileId]) -> None:
        if file_ids:
            self._index.journal_put(pending_slot, canonical.encode(list(dict.fromkeys(file_ids))))
        else:
            self._index.journal_delete(pending_slot)


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
