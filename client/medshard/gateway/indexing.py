"""Where a vault's DICOM index is, and how it follows the vault: with a gateway that runs, beside one, or without any.

Law: an index of this machine alone has what the vault's own index has, neither more nor less. One that several gateways share has what
each of them knows: only what was destroyed on purpose leaves it, as a vault that was opened on another machine knows of files that this
one has never heard of.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from medshard.gateway.catalog import Catalog, catalog_key, catalog_keys, catalog_path
from medshard.gateway.packing import instances_of
from medshard.gateway.tables import Tables, remove
from medshard.vault import Vault
from medshard_protocol.errors import Absent, Damaged

id_size: Final = 16


def tables_of(vault: Vault, address: str = "") -> Tables | Path:
    """The tables at an address such as ``postgresql://…``; without one, in the vault's home. Raises Refused, Malformed, Unavailable."""
    if not address:
        return catalog_path(vault.home.folder)
    try:
        from medshard.gateway.postgres import PostgresTables
    except ImportError as error:
        raise Absent(
            "an index in PostgreSQL needs a package that is not installed", hint="pip install 'medshard[gateway,postgres]'"
        ) from error
    return PostgresTables(address)


def open_catalog(vault: Vault, address: str = "", gateway: bytes = b"") -> Catalog:
    """The index of a vault, as it is. Blocking. Raises Damaged where none of its keys opens it."""
    first, *others = catalog_keys(vault.keys) if address else [catalog_key(vault.keys)]
    try:
        return Catalog(tables_of(vault, address), first, gateway)
    except Damaged:
        for key in others:
            with contextlib.suppress(Damaged):
                return Catalog(tables_of(vault, address), key, gateway)
        raise


def gateway_id(folder: Path) -> bytes:
    """What tells the spool in ``folder`` from other gateways' spools: random, and made anew where the folder was copied. Blocking."""
    path, inode = folder / "id", 0
    with contextlib.suppress(FileNotFoundError, ValueError):
        known, _, was = path.read_text().partition(" ")
        if len(known) == 2 * id_size and int(was) == path.stat().st_ino:
            return bytes.fromhex(known)
    fresh = os.urandom(id_size)
    part = path.with_name("id.part")
    with part.open("w") as file:
        inode = os.fstat(file.fileno()).st_ino  # a rename keeps it, a copy has another
        file.write(f"{fresh.hex()} {inode}")
    part.replace(path)
    return fresh


def catch_up(vault: Vault, catalog: Catalog) -> None:
    """Take in what was put into the vault, or taken out of it, since the catalog last looked. Blocking."""
    have, known = vault.file_ids(), catalog.files()
    gone = known - have
    if catalog.shared:
        gone &= {bytes(each.file_id) for each in vault.custody.all_ended()}
    catalog.forget(gone)
    _take(vault, catalog, have - known)


def rebuild(vault: Vault, address: str = "") -> None:
    """Make the index again from the vault's. Instances that wait in a running gateway's spool stay in it. Blocking."""
    try:
        _rebuild(vault, open_catalog(vault, address))
    except Damaged:
        tables = tables_of(vault, address)
        if isinstance(tables, Path):
            remove(tables)
        else:
            tables.reset()  # gateways that run see it, and put in again what waits in their spools
        _rebuild(vault, Catalog(tables, catalog_key(vault.keys)))


def _rebuild(vault: Vault, made: Catalog) -> None:
    with contextlib.closing(made) as catalog:
        have = vault.file_ids()
        catalog.forget((catalog.stored_files() | catalog.files()) - have)
        _take(vault, catalog, have)


def _take(vault: Vault, catalog: Catalog, files: set[bytes]) -> None:
    for file_id in files:
        catalog.put(instances_of(vault.rows_of(file_id)))
    catalog.flush()
    catalog.note_files(files)


@asynccontextmanager
async def catalog_of(vault: Vault, address: str = "") -> AsyncIterator[Catalog]:
    """The index of this vault, up to date, for a command that works beside a gateway or without one."""
    catalog = await asyncio.to_thread(open_catalog, vault, address)
    try:
        await asyncio.to_thread(catch_up, vault, catalog)
        yield catalog
    finally:
        await asyncio.to_thread(catalog.close)
