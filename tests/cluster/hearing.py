"""Waiting until every node has what some have: a quorum has an entry, and knows it to be published, before the others, and a put that has
enough acknowledgements waits for the rest a second at most."""

from __future__ import annotations

import asyncio

import pytest

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard.health import Health
from medshard_protocol.checkpoint import open_published
from medshard_protocol.errors import Unavailable
from medshard_protocol.roster import Node


async def heard_everywhere(vault: Vault) -> None:
    """Wait until all nodes that answer know the same entries to be published."""

    async def size(node: Node) -> int | None:
        try:
            note = await vault._net.call(node, "GET", "/log/checkpoint", timeout_s=20.0)
        except Unavailable:
            return None
        return open_published(note, vault.roster).size

    async with asyncio.timeout(60):
        while len({await size(node) for node in vault.roster.nodes} - {None}) > 1:
            await asyncio.sleep(0.05)


def wait_for_every_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let puts of this process leave no slow node behind, for a test that presumes that all of them hold their shards."""
    for module in ("upload", "smallfiles"):
        monkeypatch.setattr(f"medshard.{module}.linger_s", (30.0, 30.0))
    monkeypatch.setattr("medshard.upload.stall_s", 30.0)
    for bad in ("is_slow", "is_suspect"):  # in an earlier test, perhaps
        monkeypatch.setattr(Health, bad, lambda self, node: False)


def all_heard(trial: LocalConsortium) -> None:
    """The same, for a test that runs commands."""

    async def wait() -> None:
        async with Vault.open(trial.vault_home, trial.passphrase) as vault:
            await heard_everywhere(vault)

    asyncio.run(wait())
