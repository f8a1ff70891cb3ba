"""After an institution joined, shards move to its node where it stands in the placement: real processes, and a vault that reads on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.cluster.mending import Repairing
from tests.cluster.test_membership import assert_comes_back, changed, eventually, free_port, members, operate, present, stored

from medshard import Vault

files = 20  # each has its place at the new node with a probability of three in seven


@pytest.mark.soak
async def test_a_node_that_joins_gets_its_part_of_what_is_stored(tmp_path: Path) -> None:
    trial = Repairing(tmp_path / "trial", institutions=6, code=(2, 3))
    trial.make()
    trial.configure(grace_s=1.0, rebalance_over=0.0)
    with trial:
        async with Vault.open(trial.vault_home, trial.passphrase) as vault:
            put = [await stored(vault, tmp_path, f"file {number}") for number in range(files)]
            name, port = "insurer-07", free_port()
            words = ("--url", f"https://127.0.0.1:{port}", "--listen", f"127.0.0.1:{port}", "--capacity", "100GB")
            card = operate(trial.home(name), "init", "--institution", name, *words)["card"]
            first = members(trial)[0]
            await asyncio.to_thread(changed, trial, first, "--add-node", card, signers=present(trial).quorum.q - 1)
            chain = tmp_path / "chain.medshard"
            operate(trial.home(first), "roster", "show", "-o", str(chain))
            operate(trial.home(name), "adopt", str(trial.folder / "genesis.medshard"), str(chain))
            await asyncio.to_thread(trial.restart, name)

            def has_some() -> bool:
                return operate(trial.home(name), "status")["shards"] > 0

            await asyncio.to_thread(eventually, has_some, 60.0)
            for digest, data in put[:8]:
                report = await vault.verify(digest)
                assert report.ok, report
                assert len({holder.node for holder in report.holders}) == 3
                await assert_comes_back(vault, digest, data, tmp_path)
