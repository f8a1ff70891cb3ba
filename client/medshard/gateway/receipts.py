"""Receipts: from a SOP Instance UID to what proves that it is stored, with or without a gateway that runs."""

from __future__ import annotations

from medshard.gateway.catalog import Catalog
from medshard.gateway.indexing import catalog_of
from medshard.gateway.model import Receipt
from medshard.vault import Vault
from medshard_protocol.errors import Absent


def receipt_in(catalog: Catalog, sop_uid: str) -> Receipt:
    """What proves that an instance is stored. Raises Absent."""
    for instance in catalog.instances(sop_uid):
        if place := instance.place:
            return Receipt(instance.sop_class, sop_uid, instance.sha256, place.file_id, place.ledger_index, instance.flagged)
    raise Absent(f"no instance {sop_uid} is in the store", hint="it may still wait in a gateway's spool")


async def look_up(vault: Vault, sop_uid: str, address: str = "") -> Receipt:
    """``receipt_in`` the index of this vault. Raises Absent."""
    async with catalog_of(vault, address) as catalog:
        return receipt_in(catalog, sop_uid)
