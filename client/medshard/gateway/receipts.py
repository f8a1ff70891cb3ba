"""Receipts: from a SOP Instance UID to what proves that it is stored, with or without a gateway that runs."""

from __future__ import annotations

from medshard.gateway.indexing import catalog_of
from medshard.gateway.intake import receipt_in
from medshard.gateway.model import Receipt
from medshard.vault import Vault


async def look_up(vault: Vault, sop_uid: str, address: str = "") -> Receipt:
    """``receipt_in`` the index of this vault. Raises Absent."""
    async with catalog_of(vault, address) as catalog:
        return receipt_in(catalog, sop_uid)
