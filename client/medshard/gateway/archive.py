"""The archive: the one thing that DIMSE, DICOMweb and import are built on.

What comes in goes by the intake: into the spool, and from there into the store. Until it is there, and while nodes are out of reach, it
is served from the spool.

Law: ``take`` and ``find`` block and are safe to call from many threads; whatever is ``async`` belongs to the vault's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping

from medshard.gateway.catalog import Catalog
from medshard.gateway.indexing import catch_up
from medshard.gateway.intake import Intake, Placed, Rules
from medshard.gateway.model import Instance, Place, Query, Row
from medshard.gateway.objects import Objects
from medshard.gateway.packing import instance_of, places
from medshard.gateway.spool import Spool
from medshard.keys import VaultKeys
from medshard.packs import Plan
from medshard.sealing import hkdf
from medshard.vault import Vault
from medshard_protocol.errors import Absent, Unavailable


class Stored:
    """One instance that can be read, from the spool or from the store."""

    def __init__(self, instance: Instance, archive: Archive) -> None:
        self.instance = instance
        self._archive = archive

    @property
    def size(self) -> int:
        """Bytes of its file."""
        return self.instance.size

    @property
    def transfer_syntax(self) -> str:
        """What its data set is encoded in."""
        return self.instance.transfer_syntax

    async def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of its file as it is stored. Raises Absent, Refused, Unavailable, Damaged."""
        stop = self.size if stop is None else min(stop, self.size)
        if start >= stop:
            return b""
        if (entry := self._archive.entry(self.instance)) is not None:
            with contextlib.suppress(Absent):
                return await asyncio.to_thread(self._archive.spool.read, entry, start, stop)
        place, objects = await self._archive.place_of(self.instance), self._archive.objects
        offset, _ = await objects.span(place.file_id, place.member)
        return await objects.read(place.file_id, offset + start, offset + stop)


def commitment_key(keys: VaultKeys) -> bytes:
    """What reports that are owed to peers are sealed with."""
    return hkdf(keys.at_home.root, b"", b"medshard/vault/v1/commitments")


class VaultStore:
    """A vault as the store of what it can read again."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    async def store(self, planned: Plan) -> Placed:
        """As ``Vault.store``."""
        report = await self._vault.store(planned)
        placed = await asyncio.to_thread(places, self._vault, report)
        return Placed(placed, tuple(problem.message for problem in report.problems))


class Archive(Intake):
    """One department's instances: those in the spool and those in the store. ``start`` it once."""

    def __init__(self, vault: Vault, spool: Spool, catalog: Catalog, objects: Objects, rules: Rules | None = None) -> None:
        super().__init__(spool, catalog, VaultStore(vault), commitment_key(vault.keys), rules)
        self.vault = vault
        self.catalog = catalog
        self.objects = objects
        self.after_changes: list[Callable[[], Awaitable[None]]] = []  # called when others have changed what the vault has
        self._behind = True  # whether the vault may have what the catalog has not
        self._made = catalog.made

    async def start(self) -> None:
        """Learn what the vault has and what the spool was left with. Raises Damaged or Malformed."""
        await self.catch_up()
        await super().start()

    # -- out

    def find(self, query: Query) -> Iterator[Row]:
        """Matches, newest study first. Blocks for some milliseconds at a time."""
        return self.catalog.find(query)

    def instances(self, study: str, series: str | None = None, uids: Collection[str] | None = None) -> list[Instance]:
        """The instances of a study or series that are served, by instance number."""
        return self.catalog.served(study, series, uids)

    async def open(self, instance: Instance) -> Stored:
        """Make an instance readable. Reading it from the store is announced with its whole study. Raises Refused or Unavailable."""
        if self.entry(instance) is None:
            files = await asyncio.to_thread(lambda: self.catalog.files_of(instance.study) | {self.place(instance).file_id})
            await self.objects.announce(sorted(files))
        return Stored(instance, self)

    def place(self, instance: Instance) -> Place:
        """Where an instance lies in the store. Raises Absent, or Unavailable as long as it waits in another gateway's spool. May block."""
        if instance.place is not None:
            return instance.place
        for each in self.catalog.instances(instance.uid):
            if each.sha256 == instance.sha256 and each.place is not None:
                return each.place
            if each.sha256 == instance.sha256:
                raise Unavailable(
                    "another gateway has received it and not yet stored it", hint="ask again in some seconds, or ask that one"
                )
        raise Absent(f"instance {instance.uid} is here no more")

    async def place_of(self, instance: Instance) -> Place:
        """``place``, in the event loop."""
        return instance.place if instance.place is not None else await asyncio.to_thread(self.place, instance)

    # -- inside

    def _destroyed(self) -> Mapping[bytes, int]:
        ended = [(each.at * 1000 + 999, each.documents) for each in self.vault.custody.all_ended()]
        return {sha256: at for at, documents in sorted(ended) for _, sha256 in documents}

    async def ask(self) -> None:
        """Learn from the nodes what others have put for this vault: its senders. ``catch_up`` takes it in."""
        self._behind |= await self.vault.shares.sync()

    async def catch_up(self) -> None:
        """Take in what others have put into the vault or the catalog, or taken out of it, since we last looked. Raises Unavailable."""
        self._behind |= self.vault.index_changed()
        await asyncio.to_thread(self.catalog.refresh)
        if self._made != self.catalog.made:  # somebody has made it anew, and knows nothing of our spool
            with self._lock:
                waiting = [instance_of(entry) for entry in self._spooled.values()]
            self.catalog.put(waiting)
            await asyncio.to_thread(self.catalog.flush)
            self._made = self.catalog.made
        if self._behind:
            await asyncio.to_thread(catch_up, self.vault, self.catalog)
            for act in self.after_changes:
                await act()
            self._behind = False
