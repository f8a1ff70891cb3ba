"""Nodes that keep their ledger in PostgreSQL, with real processes and a real server: takeover, export, and a log that goes on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest
from tests.cluster.test_failover import append, assert_one_history, sequencer, status
from tests.cluster.test_successor import assert_reads, eventually, export, genesis_of, operate, published, stored
from tests.postgres import Server, running_server

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard_protocol.errors import MedshardError
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import Roster
from medshard_protocol.succession import Successor

first, second, third, fourth = "hospital-01", "insurer-02", "hospital-03", "insurer-04"
on_server = (first, second)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as made:
        yield made


@pytest.fixture(scope="module")
def trial(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    """The first two nodes, which may both order entries, keep their ledger in the server; the others in SQLite."""
    consortium = LocalConsortium(tmp_path_factory.mktemp("postgresql"), institutions=4, code=(2, 4))
    consortium.make()
    for name in on_server:
        database = name.replace("-", "_")
        server.sql(f"CREATE DATABASE {database}")
        configure(consortium.home(name), '# engine = "sqlite"', f'engine = "{server.dsn(database)}"')
    with consortium:
        yield consortium


def configure(home: Path, old: str, new: str) -> None:
    text = (home / "config.toml").read_text()
    assert old in text
    (home / "config.toml").write_text(text.replace(old, new, 1))


@pytest.fixture
async def vault(trial: LocalConsortium) -> AsyncIterator[Vault]:
    async with Vault.open(trial.vault_home, trial.passphrase) as opened:
        yield opened


async def test_a_killed_sequencer_on_postgresql_is_replaced_and_comes_back(vault: Vault, trial: LocalConsortium, server: Server) -> None:
    """Each next sequencer has another engine, and the database is dead for a moment in between."""
    proofs: list[Inclusion] = []
    led: list[str] = []
    with ThreadPoolExecutor(1) as aside:
        for _ in range(3):
            await append(vault, proofs, 20)
            led.append(await sequencer(vault, trial))
            trial.kill(led[-1])
            again = aside.submit(lambda: (server.kill(), server.start()))
            acknowledged = len(proofs)
            async with asyncio.timeout(60):
                while len(proofs) == acknowledged:  # whoever takes over may need the database, too
                    with suppress(MedshardError):
                        await append(vault, proofs)
            await asyncio.to_thread(again.result)
            await asyncio.to_thread(trial.restart, led[-1])
    assert len(set(led)) > 1
    assert first in led
    await assert_one_history(vault, trial, proofs)
    assert (await status(vault, first))["lost"] is False


def test_the_log_of_a_node_on_postgresql_is_exported_beside_it(trial: LocalConsortium, tmp_path: Path) -> None:
    eventually(lambda: published(trial, second) > 60)
    # An export goes by the head with both kinds of cosignature, which a node renews once a minute.
    done = export(trial.home(second), tmp_path / "log", 60)
    report = operate(trial.home(second), "log", "verify", str(tmp_path / "log"))
    assert (report["size"], report["unsigned"], done["size"] > 60) == (done["size"], 0, True)
    assert published(trial, second) >= done["size"]  # the node goes on: reading took nothing over


@pytest.mark.timeout(300)
async def test_a_log_on_postgresql_goes_on_in_its_successor(trial: LocalConsortium, vault: Vault, tmp_path: Path) -> None:
    digest = await stored(vault, tmp_path, "old")
    for name in (first, third, fourth):
        operate(trial.home(name), "freeze", "propose" if name == first else "sign", "--no-successor", "--yes")
    eventually(lambda: len({(published(trial, name)) for name in trial.names}) == 1)
    file = tmp_path / "successor.medshard"
    operate(trial.home(first), "successor", "found", "--yes", "-o", str(file))
    for name in (third, fourth):
        operate(trial.home(name), "successor", "sign", str(file), "--yes")
    for name in trial.names:
        trial.kill(name)
        operate(trial.home(name), "successor", "adopt", str(file))
        operate(trial.home(name), "successor", "adopt", str(file))  # again is no change
    begins = Roster.from_bytes(genesis_of(file)).begins
    for name in (first, second):
        trial.restart(name)
    for name in (first, second):  # copied, not fetched: nobody else runs
        assert operate(trial.home(name), "status")["ledger"]["size"] >= begins
    for name in (third, fourth):
        trial.restart(name)
    fresh = await stored(vault, tmp_path, "fresh")
    for each in (digest, fresh):
        await assert_reads(vault, each, tmp_path)
    assert vault.roster.sha256 == sha256(genesis_of(file)).digest()
    (tmp_path / "new").write_bytes(Successor.from_bytes(file.read_bytes()).genesis)
    eventually(lambda: published(trial, first) > begins + 2)
    export(trial.home(first), tmp_path / "log", begins)
    report = operate(trial.home(first), "log", "verify", str(tmp_path / "log"), "--genesis", str(tmp_path / "new"))
    assert (report["unsigned"], report["size"] > begins) == (0, True)
    assert os.path.exists(tmp_path / "log" / "before-0")
