"""What tests about keys say and ask in the names of vaults and institutions."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable

import pytest
from tests.cluster.hearing import heard_everywhere

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard.home import Home
from medshard.lookup import Opened
from medshard_protocol.checkpoint import open_published
from medshard_protocol.entries import Withdraw, nonce_size, sign_entry
from medshard_protocol.errors import Refused
from medshard_protocol.ids import Key
from medshard_protocol.rights import Reason, reason_in
from storenode.identity import NodeKeys


async def refused(work: Awaitable[object]) -> str:
    """What a vault hears that is refused something."""
    with pytest.raises(Refused) as caught:
        await work
    return str(caught.value)


async def folded_everywhere(trial: LocalConsortium, size: int) -> None:
    """Wait until every node has folded the log up to this size."""
    async with asyncio.timeout(60), Vault.open(trial.vault_home, trial.passphrase) as vault:
        for node in vault.roster.nodes:
            while open_published(await vault._net.call(node, "GET", "/log/checkpoint", timeout_s=5.0), vault.roster).size < size:
                await asyncio.sleep(0.1)


async def refused_everywhere(vault: Vault, file: Opened) -> None:
    """Announce a read in a vault's name and ask each holder of a file for its shard; all of them refuse."""
    (shown,) = await vault._reader.tickets.announce([file.manifest.file_id], 0)
    await heard_everywhere(vault)
    for number, ref in enumerate(file.manifest.shards):
        path = f"/v1/shards/{file.manifest.file_id.hex()}/{number}"
        async with vault._net._open(vault.roster.node(ref.node), "GET", path, None, shown.headers(), 5.0) as response:
            assert response.status == 403
            assert reason_in((await response.read()).decode(errors="replace")) is Reason.NEVER_GRANTED


def sign_withdrawal(trial: LocalConsortium, node: str, key: Key) -> bytes:
    """An institution's word that it vouches no longer for a key."""
    ca, roster = NodeKeys.load(trial.folder / "nodes" / node).ca, Home(trial.vault_home).roster()
    assert ca is not None
    author = next(roster.institutions[each.institution].key for each in roster.nodes if each.name == node)
    return sign_entry(roster.origin, Withdraw(key, os.urandom(nonce_size)), author, ca.sign).to_bytes()


async def handed_in(trial: LocalConsortium, entry: bytes) -> None:
    """Bring an entry into the ledger, and wait until every node has it."""
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        await vault._ledger._submit_all([entry])
        size = vault._ledger.reached
    await folded_everywhere(trial, size)
