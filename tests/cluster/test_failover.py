"""The ledger through the loss of its sequencer, with real processes: nothing acknowledged is lost, nothing forks, clients go on."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard_protocol.entries import Register
from medshard_protocol.errors import MedshardError
from medshard_protocol.proofs import Inclusion

go_on_within_s = 15.0  # a second or two here, where nothing else runs


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("failover"), institutions=6, code=(3, 6)) as consortium:
        yield consortium


@pytest.fixture(autouse=True)
def everybody_up(trial: LocalConsortium) -> Iterator[None]:
    yield
    for name in trial.names:
        if name in trial.running:
            trial.thaw(name)
        else:
            trial.restart(name)


@pytest.fixture
async def vault(trial: LocalConsortium) -> AsyncIterator[Vault]:
    async with Vault.open(trial.vault_home, trial.passphrase) as opened:
        yield opened


def a_registration() -> Register:
    return Register(os.urandom(32), os.urandom(32), os.urandom(16))  # type: ignore[arg-type]


async def status(vault: Vault, name: str) -> dict[str, Any]:
    import json

    node = next(node for node in vault.roster.nodes if node.name == name)
    found: dict[str, Any] = json.loads(await vault._net.call(node, "GET", "/v1/status", timeout_s=2.0))["ledger"]
    return found


async def sequencer(vault: Vault, trial: LocalConsortium) -> str:
    """The node that orders entries now."""
    async with asyncio.timeout(60):
        while True:
            for name in trial.names:
                try:
                    if (await status(vault, name))["role"] == "sequencer":
                        return name
                except MedshardError:
                    continue
            await asyncio.sleep(0.1)


async def append(vault: Vault, proofs: list[Inclusion], count: int = 1) -> float:
    began = time.monotonic()
    proofs += await vault._ledger.append([a_registration() for _ in range(count)])
    return time.monotonic() - began


async def assert_one_history(vault: Vault, trial: LocalConsortium, proofs: list[Inclusion]) -> None:
    """Every node has the same log, and in it every entry that was acknowledged, at its place."""
    tail: list[Inclusion] = []
    await append(vault, tail)  # rules out whatever somebody has beyond the others
    async with asyncio.timeout(60):
        while True:
            states = [await status(vault, name) for name in trial.names]
            if len({(state["root"], state["published"]) for state in states}) == 1 and states[0]["published"] == states[0]["size"]:
                break
            await asyncio.sleep(0.1)
    size = states[0]["size"]
    assert len({proof.index for proof in proofs}) == len(proofs)
    from medshard_protocol.tiles import unpack_bundle

    for node in vault.roster.nodes:
        entries: list[bytes] = []
        for start in range(0, size, 256):
            width = min(256, size - start)
            name = f"{start // 256:03d}" + ("" if width == 256 else f".p/{width}")
            entries += unpack_bundle(await vault._net.call(node, "GET", f"/log/tile/entries/{name}", timeout_s=5.0), width)
        for proof in [*proofs, *tail]:
            assert entries[proof.index] == proof.entry


async def kill_during_appends(vault: Vault, trial: LocalConsortium, kills: int, appends: int) -> tuple[list[Inclusion], list[float]]:
    """Append one entry after the other, and kill the sequencer of the moment at random points."""
    proofs: list[Inclusion] = []
    waits: list[float] = []
    moments = sorted(random.sample(range(5, appends - 5), kills))
    dead: str | None = None
    for number in range(appends):
        if moments and number == moments[0]:
            moments.pop(0)
            if dead is not None:
                await asyncio.to_thread(trial.restart, dead)
                await asyncio.sleep(0.5)
            dead = await sequencer(vault, trial)
            asyncio.get_running_loop().call_later(random.uniform(0, 0.01), trial.kill, dead)
        waits.append(await append(vault, proofs))
    if dead is not None:
        await asyncio.to_thread(trial.restart, dead)
    return proofs, waits


async def test_when_the_sequencer_is_killed_clients_go_on_within_seconds(vault: Vault, trial: LocalConsortium) -> None:
    proofs: list[Inclusion] = []
    await append(vault, proofs, 10)
    trial.kill(await sequencer(vault, trial))
    assert await append(vault, proofs) < go_on_within_s
    trial.restart(next(name for name in trial.names if name not in trial.running))
    await assert_one_history(vault, trial, proofs)


async def test_a_frozen_sequencer_costs_two_seconds_and_is_fenced_when_it_thaws(vault: Vault, trial: LocalConsortium) -> None:
    proofs: list[Inclusion] = []
    await append(vault, proofs, 10)
    frozen = await sequencer(vault, trial)
    epoch = (await status(vault, frozen))["epoch"]
    trial.freeze(frozen)
    assert await append(vault, proofs) < 10.0  # two seconds, and what a busy machine adds
    assert await append(vault, proofs) < 5.0
    trial.thaw(frozen)
    await assert_one_history(vault, trial, proofs)
    states = [await status(vault, name) for name in trial.names]
    assert len({state["leader"] for state in states}) == 1
    assert all(state["epoch"] > epoch for state in states)  # the one that it had led in is over for everybody


async def test_a_frozen_sequencer_slows_neither_put_nor_get(trial: LocalConsortium, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(30_000))
    digest = sha256(path.read_bytes()).digest()
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        frozen = await sequencer(vault, trial)
        trial.freeze(frozen)
        began = time.monotonic()
        report = await vault.put([path])
        took_put, began = time.monotonic() - began, time.monotonic()
        await vault.get(digest, tmp_path / "back")
        took_get = time.monotonic() - began
        assert frozen != await sequencer(vault, trial)
    assert report.problems == ()
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    print(f"put {took_put:.2f} s, get {took_get:.2f} s")
    assert (took_put < 15.0, took_get < 15.0) == (True, True), (took_put, took_get)


async def test_sequencers_killed_at_random_points_lose_nothing_and_fork_nothing(vault: Vault, trial: LocalConsortium) -> None:
    proofs, waits = await kill_during_appends(vault, trial, kills=3, appends=120)
    assert max(waits) < go_on_within_s
    await assert_one_history(vault, trial, proofs)


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_twenty_sequencers_killed_during_a_thousand_appends_lose_nothing(vault: Vault, trial: LocalConsortium) -> None:
    proofs, waits = await kill_during_appends(vault, trial, kills=20, appends=1000)
    print(f"longest waits: {[round(wait, 2) for wait in sorted(waits)[-20:]]}")
    assert max(waits) < go_on_within_s
    await assert_one_history(vault, trial, proofs)


async def test_a_database_from_an_old_backup_is_refilled_before_its_node_signs(vault: Vault, trial: LocalConsortium) -> None:
    import shutil

    proofs: list[Inclusion] = []
    await append(vault, proofs, 5)
    name = await sequencer(vault, trial)
    data = trial.home(name) / "data"
    trial.kill(name)
    backup = data.with_name("backup")
    backup.mkdir()
    for file in data.glob("ledger.sqlite*"):
        shutil.copy(file, backup)
    trial.restart(name)
    await append(vault, proofs, 50)
    others = [other for other in trial.names if other != name]
    trial.kill(name)
    for file in data.glob("ledger.sqlite*"):
        file.unlink()
    for file in backup.iterdir():
        shutil.move(file, data)
    backup.rmdir()
    standbys = [other for other in others if (await status(vault, other))["role"] in ("standby", "sequencer", "candidate")]
    for other in standbys:
        trial.kill(other)  # so that the node with the old database is the one that must lead
    trial.restart(name)
    for other in standbys:
        trial.restart(other)
    await append(vault, proofs, 5)
    await assert_one_history(vault, trial, proofs)


async def test_a_mirror_that_lost_its_ledger_mirrors_again_and_never_cosigns(vault: Vault, trial: LocalConsortium) -> None:
    proofs: list[Inclusion] = []
    await append(vault, proofs, 5)
    name = trial.names[-1]
    trial.kill(name)
    for file in (trial.home(name) / "data").glob("*.sqlite*"):
        if file.name.startswith(("ledger", "state")):
            file.unlink()
    trial.restart(name)
    await append(vault, proofs, 5)
    await assert_one_history(vault, trial, proofs)
    found = await status(vault, name)
    assert (found["lost"], found["size"] > 10) == (True, True)
    log = (trial.home(name) / "log").read_text()
    assert "has lost part of its ledger" in log
