"""Receipts: from a SOP Instance UID to what proves that it is stored, with or without a gateway that runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from medshard.gateway.catalog import Catalog, catalog_key, catalog_path
from medshard.gateway.model import Receipt
from medshard.gateway.packing import instances_of
from medshard.vault import Vault
from medshard_protocol.errors import Absent, Damaged


def receipt_in(catalog: Catalog, sop_uid: str) -> Receipt:
    """What proves that an instance is stored. Raises Absent."""
    for instance in catalog.instances(sop_uid):
        if place := instance.place:
            return Receipt(instance.sop_class, sop_uid, instance.sha256, place.file_id, place.ledger_index, instance.flagged)
    raise Absent(f"no instance {sop_uid} is in the store", hint="it may still wait in a gateway's spool")


def catch_up(vault: Vault, catalog: Catalog) -> None:
    """Take in what was put into the vault, or taken out of it, since the catalog last looked. Blocking."""
    have, known = vault.file_ids(), catalog.files()
    catalog.forget(known - have)
    fresh = have - known
    for file_id in fresh:
        catalog.put(instances_of(vault.rows_of(file_id)))
    catalog.flush()
    catalog.note_files(fresh)


def rebuild(vault: Vault) -> None:
    """Make the index again from the vault's. Instances that wait in a running gateway's spool stay in it. Blocking."""
    path, key = catalog_path(vault.home.folder), catalog_key(vault.keys)
    try:
        catalog = Catalog(path, key)
    except Damaged:
        for end in ("", "-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)
        catalog = Catalog(path, key)
    try:
        catalog.forget(catalog.files())
        catch_up(vault, catalog)
    finally:
        catalog.close()


@asynccontextmanager
async def catalog_of(vault: Vault) -> AsyncIterator[Catalog]:
    """The index of this vault, up to date, for a command that works beside a gateway or without one."""
    catalog = await asyncio.to_thread(Catalog, catalog_path(vault.home.folder), catalog_key(vault.keys))
    try:
        await asyncio.to_thread(catch_up, vault, catalog)
        yield catalog
    finally:
        await asyncio.to_thread(catalog.close)


async def look_up(vault: Vault, sop_uid: str) -> Receipt:
    """``receipt_in`` the index of this vault. Raises Absent."""
    async with catalog_of(vault) as catalog:
        return receipt_in(catalog, sop_uid)
