"""Who takes part changes while the consortium runs: real node processes, the operators' commands, and vaults that go on."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from medshard import Vault, nursery
from medshard.consortium import LocalConsortium
from medshard.home import Home
from medshard_protocol.canonical import decode
from medshard_protocol.checkpoint import Note, cosigners, open_published
from medshard_protocol.errors import MedshardError, Refused, Unavailable
from medshard_protocol.roster import Roster
from medshard_protocol.rosters import Link, follow
from storenode.asking import exchange
from storenode.identity import NodeKeys

size = 40_000
settle_s = 60.0


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    """Four institutions, of which three make a quorum. The vault's home as it was at the beginning is kept at ``asleep``."""
    with LocalConsortium(tmp_path_factory.mktemp("membership"), institutions=4, code=(2, 4)) as consortium:
        shutil.copytree(consortium.vault_home, consortium.folder / "asleep")
        yield consortium


@pytest.fixture
async def vault(trial: LocalConsortium) -> AsyncIterator[Vault]:
    async with Vault.open(trial.vault_home, trial.passphrase) as opened:
        yield opened


def operate(home: Path, *words: str, refused: bool = False) -> dict[str, Any]:
    """One command of an operator, as JSON; or its error if it is to be refused."""
    done = nursery.run(["-m", "storenode", "--home", str(home), "--json", *words])
    assert (done.returncode != 0) == refused, done.stderr + done.stdout
    answer: dict[str, Any] = json.loads(done.stderr.splitlines()[-1] if refused else done.stdout)
    return answer["error"] if refused else answer


def present(trial: LocalConsortium) -> Roster:
    """The newest roster that any node has on disk."""
    links = sorted(trial.folder.glob("nodes/*/data/rosters/*.link"), key=lambda path: path.name)
    if not links:
        return Roster.from_bytes((trial.folder / "genesis.medshard").read_bytes())
    return Roster.from_bytes(Link.from_value(decode(links[-1].read_bytes(), bytes_max=1 << 30, what="link")).roster)


def changed(trial: LocalConsortium, proposer: str, *words: str, signers: int = 2) -> dict[str, Any]:
    """Propose a change and have others sign it until it is in effect on every node that runs."""
    number = operate(trial.home(proposer), "roster", "show")["number"]
    proposed = operate(trial.home(proposer), "roster", "propose", "--yes", *words)
    others = [name for name in members(trial) if name != proposer][:signers]
    for name in others:
        said = operate(trial.home(name), "roster", "sign", "--yes", proposed["sha256"])
    assert said["in_effect"], said
    everywhere(trial, number + 1)
    trial.roster = present(trial)
    return proposed


def members(trial: LocalConsortium) -> list[str]:
    """One node of each institution of the present roster."""
    return [node.name for node in present(trial).nodes]


def number_of(trial: LocalConsortium, name: str) -> int:
    """Which roster the node with this name goes by, as it says itself."""
    return int(operate(trial.home(name), "status")["roster"])


def everywhere(trial: LocalConsortium, number: int) -> None:
    """Wait until every node that runs goes by this roster, as its disk shows."""
    eventually(lambda: all((trial.home(name) / "data" / "rosters" / f"{number:08}.link").exists() for name in trial.running))


def eventually(holds: Callable[[], bool], within_s: float = settle_s) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def stored(vault: Vault, folder: Path, name: str = "file") -> tuple[bytes, bytes]:
    data = os.urandom(size)
    path = folder / name
    path.write_bytes(data)
    report = await vault.put([path])
    assert report.problems == ()
    return report.stored[0].sha256, data


async def assert_comes_back(vault: Vault, digest: bytes, data: bytes, folder: Path) -> None:
    back = folder / f"back-{digest.hex()[:8]}"
    await vault.get(digest, back)
    assert sha256(back.read_bytes()).digest() == digest == sha256(data).digest()
    back.unlink()


@asynccontextmanager
async def traffic(vault: Vault, folder: Path) -> AsyncIterator[list[tuple[bytes, bytes]]]:
    """Put and get all the while; every one must succeed."""
    done: list[tuple[bytes, bytes]] = []

    async def go_on() -> None:
        while True:
            digest, data = await stored(vault, folder, f"during-{len(done)}")
            await assert_comes_back(vault, digest, data, folder)
            done.append((digest, data))
            await asyncio.sleep(0.2)

    running = asyncio.create_task(go_on())
    try:
        yield done
    finally:
        before = len(done)
        deadline = time.monotonic() + settle_s
        while len(done) < before + 2 and not running.done() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        running.cancel()
        results = await asyncio.gather(running, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError), results
    assert len(done) >= before + 2, "puts and gets did not go on after the change"


async def test_too_few_approvals_change_nothing(trial: LocalConsortium) -> None:
    one, two, three, _ = members(trial)
    proposed = operate(trial.home(one), "roster", "propose", "--set-capacity", f"{one}=50GB", "--yes")
    assert (proposed["in_effect"], proposed["approved"]) == (False, [one])
    again = operate(trial.home(one), "roster", "sign", proposed["sha256"], "--yes")
    assert again["approved"] == [one]  # an institution counts once
    second = operate(trial.home(two), "roster", "sign", proposed["sha256"][:12], "--yes")
    assert (second["in_effect"], second["approved"]) == (False, sorted([one, two]))
    signed = [(proposed["sha256"], sorted([one, two]))]
    eventually(lambda: [(each["sha256"], each["approved"]) for each in operate(trial.home(three), "roster", "show")["proposals"]] == signed)
    assert operate(trial.home(three), "roster", "show")["number"] == 0
    assert [number_of(trial, name) for name in trial.names] == [0, 0, 0, 0]
    error = operate(trial.home(two), "roster", "propose", "--set-capacity", f"{two}=1GB", "--yes", refused=True)
    assert "has signed for another document as roster 1" in error["message"]
    third = operate(trial.home(three), "roster", "sign", proposed["sha256"], "--yes")
    assert third["in_effect"]
    everywhere(trial, 1)
    assert operate(trial.home(one), "roster", "show")["history"][0]["approved_by"] == [one, two, three]
    assert operate(trial.home(two), "roster", "sign", proposed["sha256"][:8], "--yes")["in_effect"]  # who comes late is told so
    assert [number_of(trial, name) for name in trial.names] == [1, 1, 1, 1]


async def test_puts_and_gets_go_on_while_a_node_gets_new_keys(trial: LocalConsortium, vault: Vault, tmp_path: Path) -> None:
    name = members(trial)[2]
    before = present(trial)
    drawn = operate(trial.home(name), "rotate")
    async with traffic(vault, tmp_path) as done:
        await asyncio.to_thread(changed, trial, name, "--rotate-keys", drawn["card"])
    assert done
    now = present(trial)
    old, new = (next(node for node in roster.nodes if node.name == name) for roster in (before, now))
    assert old.id == new.id
    assert all(getattr(old, key) != getattr(new, key) for key in ("tls_key", "cosigner_key", "log_key", "pq_key"))

    def cosigns() -> bool:
        notes = published(trial)
        return any(new.id in cosigners(Note.from_bytes(note), now) for note in notes)

    eventually(cosigns)
    assert vault.roster == now  # a node's answer said that there is a newer one


def published(trial: LocalConsortium) -> list[bytes]:
    """The newest checkpoint of each node that answers."""
    roster, keys = present(trial), NodeKeys.load(trial.home(trial.names[0]))
    notes = []
    for node in roster.nodes:
        try:
            status, body = exchange(node, roster, keys, "GET", "/log/checkpoint")
        except Unavailable:
            continue
        if status == 200:
            notes.append(body)
    return notes


async def test_a_fifth_institution_joins_and_the_old_quorum_is_none_any_more(trial: LocalConsortium, vault: Vault, tmp_path: Path) -> None:
    before, note = present(trial), published(trial)[0]
    home, name, port = trial.home("insurer-05"), "insurer-05", free_port()
    made = operate(
        home, "init", "--institution", name, "--url", f"https://127.0.0.1:{port}", "--listen", f"127.0.0.1:{port}", "--capacity", "1GB"
    )
    async with traffic(vault, tmp_path):
        await asyncio.to_thread(changed, trial, members(trial)[0], "--add-node", made["card"], "--code", "2/5/4")
        chain = tmp_path / "chain.medshard"
        operate(trial.home(members(trial)[0]), "roster", "show", "-o", str(chain))
        assert "does not list this node" in operate(home, "adopt", str(trial.folder / "genesis.medshard"), refused=True)["message"]
        adopted = operate(home, "adopt", str(trial.folder / "genesis.medshard"), str(chain))
        assert adopted["number"] == present(trial).number
        await asyncio.to_thread(trial.restart, name)
    five = present(trial)
    assert five.quorum == (1, 4)
    four_signed = Note.from_bytes(note)
    voices = list(cosigners(four_signed, before))
    kept = [line for line in four_signed.signatures if line.name == before.origin or line.name in cosigner_names(before, voices[:3])]
    old = Note(four_signed.text, tuple(kept)).to_bytes()
    assert open_published(old, before)
    with pytest.raises(Refused, match="fewer than 4 institutions"):
        open_published(old, five)
    with pytest.raises(Refused, match="fewer than 4 institutions"):
        vault._ledger.published(old)
    eventually(lambda: operate(home, "status")["ledger"]["published"] >= operate(trial.home(members(trial)[0]), "status")["ledger"]["size"])
    digest, data = await stored(vault, tmp_path)
    eventually(lambda: operate(home, "status")["shards"] >= 1)
    await assert_comes_back(vault, digest, data, tmp_path)


def cosigner_names(roster: Roster, nodes: list[Any]) -> set[str]:
    return {roster.cosigner_name(roster.node(node)) for node in nodes}


async def test_a_node_moves_to_another_port(trial: LocalConsortium, vault: Vault, tmp_path: Path) -> None:
    name, port = members(trial)[1], free_port()
    digest, data = await stored(vault, tmp_path)
    async with traffic(vault, tmp_path):
        await asyncio.to_thread(changed, trial, name, "--set-url", f"{name}=https://127.0.0.1:{port}", signers=3)
        trial.kill(name)
        config = trial.home(name) / "config.toml"
        lines = [f'listen = "127.0.0.1:{port}"' if line.startswith('listen = "127') else line for line in config.read_text().splitlines()]
        config.write_text("\n".join(lines) + "\n")
        await asyncio.to_thread(trial.restart, name)
    await assert_comes_back(vault, digest, data, tmp_path)


async def test_an_institution_gets_a_new_ca_and_its_vaults_go_on(trial: LocalConsortium, vault: Vault, tmp_path: Path) -> None:
    name = members(trial)[0]  # the vault's own institution, and the sequencer
    drawn = operate(trial.home(name), "rotate", "--ca")
    async with traffic(vault, tmp_path):
        await asyncio.to_thread(changed, trial, name, "--rotate-ca", drawn["ca"], signers=3)
    institution = present(trial).institutions[0]
    assert len(institution.former) == 1
    eventually(lambda: not (trial.home(name) / "keys-next").exists())
    code = trial.invite(name)
    await Vault.join(tmp_path / "new", code, "secret", fast_kdf=True)
    async with Vault.open(tmp_path / "new", "secret") as fresh:
        assert fresh.roster == present(trial)
        digest, data = await stored(fresh, tmp_path)
        await assert_comes_back(fresh, digest, data, tmp_path)


async def test_an_identity_is_marked_for_emergencies(trial: LocalConsortium, vault: Vault) -> None:
    name, key = members(trial)[3], os.urandom(32)
    changed(trial, name, "--emergency-add", key.hex(), "--auditors", os.urandom(1216).hex(), signers=3)
    assert key in present(trial).emergency
    assert len(present(trial).auditors) == 1216
    await vault.doctor()
    assert vault.roster == present(trial)


async def test_an_institution_leaves_and_its_node_takes_nothing_any_more(trial: LocalConsortium, vault: Vault, tmp_path: Path) -> None:
    digest, data = await stored(vault, tmp_path)
    name, before = "hospital-03", present(trial)
    assert name in members(trial)
    behind = trial.folder / "behind"
    await Vault.join(behind, await asyncio.to_thread(trial.invite, name), trial.passphrase, fast_kdf=True)
    code = f"2/{len(members(trial)) - 1}/3"
    async with traffic(vault, tmp_path):
        await asyncio.to_thread(changed, trial, members(trial)[0], "--remove-institution", name, "--code", code, signers=4)
    assert name not in members(trial)
    eventually(lambda: operate(trial.home(name), "status")["member"] is False)
    assert "is not in roster" in (trial.home(name) / "log").read_text()
    gone, keys = next(node for node in before.nodes if node.name == name), NodeKeys.load(trial.home(members(trial)[0]))
    status, body = exchange(gone, before, keys, "PUT", "/v1/rosters", b"anything")
    assert (status, "serves reads only" in body.decode(errors="replace")) == (403, True)
    assert exchange(gone, before, keys, "GET", "/v1/status")[0] == 200
    error = operate(trial.home(name), "roster", "propose", "--set-capacity", f"{members(trial)[0]}=2GB", "--yes", refused=True)
    assert "of no institution in roster" in error["message"]
    await assert_comes_back(vault, digest, data, tmp_path)
    async with Vault.open(behind, trial.passphrase) as left:  # its own institution's node is up, and trusts it still
        with pytest.raises(Refused, match="no longer in the consortium"):
            await stored(left, tmp_path)
    trial.kill(name)
    await assert_comes_back(vault, digest, data, tmp_path)


async def test_a_vault_that_slept_through_every_change_follows(trial: LocalConsortium, tmp_path: Path) -> None:
    asleep = trial.folder / "asleep"
    assert Home(asleep).roster().number == 0
    if present(trial).number == 0:  # run by itself
        await asyncio.to_thread(changed, trial, members(trial)[0], "--set-capacity", f"{members(trial)[1]}=4GB")
    async with Vault.open(asleep, trial.passphrase) as woken:
        assert await woken._net.follow() or woken.roster.number > 0
        assert woken.roster == present(trial)
        digest, data = await stored(woken, tmp_path)
        await assert_comes_back(woken, digest, data, tmp_path)
        findings = await woken.doctor()
    assert any(f"roster {present(trial).number}" == finding.what for finding in findings)
    rosters = Home(asleep).rosters()
    assert follow(rosters[0], Home(asleep).links()) == rosters[-1] == present(trial)


async def test_a_node_that_slept_through_a_change_asks_the_others(trial: LocalConsortium) -> None:
    name = members(trial)[1]
    trial.kill(name)
    number = present(trial).number
    first = members(trial)[0]
    proposed = operate(trial.home(first), "roster", "propose", "--set-capacity", f"{first}=3GB", "--yes")
    for other in [each for each in members(trial) if each not in (name, first)]:
        said = operate(trial.home(other), "roster", "sign", "--yes", proposed["sha256"])
    assert said["in_effect"]
    trial.restart(name)
    everywhere(trial, number + 1)


async def test_a_stolen_vault_key_is_withdrawn(trial: LocalConsortium, tmp_path: Path) -> None:
    name = members(trial)[3]
    await Vault.join(tmp_path / "stolen", trial.invite(name), "secret", fast_kdf=True)
    async with Vault.open(tmp_path / "stolen", "secret") as stolen:
        await stored(stolen, tmp_path)
        assert (
            "only the institution"
            in operate(trial.home(members(trial)[1]), "withdraw", stolen.keys.public.hex(), "--yes", refused=True)["message"]
        )
        operate(trial.home(name), "withdraw", stolen.keys.public.hex(), "--yes")
        with pytest.raises(MedshardError, match="withdrawn"):
            await stored(stolen, tmp_path, "after")


async def test_a_quorum_ends_the_log_and_nothing_follows(trial: LocalConsortium, vault: Vault, tmp_path: Path) -> None:
    genesis = str(trial.folder / "genesis.medshard")  # stands for the successor's: only its hash counts
    one, two, three, *_ = members(trial)
    assert operate(trial.home(one), "freeze", "propose", "--successor", genesis, "--yes")["frozen"] is False
    assert operate(trial.home(two), "freeze", "sign", genesis, "--yes")["frozen"] is False
    await stored(vault, tmp_path, "before")
    assert operate(trial.home(three), "freeze", "sign", genesis, "--yes")["frozen"] is True
    with pytest.raises(MedshardError, match="this log has ended"):
        await stored(vault, tmp_path, "after")
    eventually(lambda: operate(trial.home(two), "roster", "show")["frozen"] is not None)
    shown = operate(trial.home(two), "roster", "show")
    assert shown["frozen"]["successor"] == sha256(Path(genesis).read_bytes()).hexdigest()


async def test_the_institution_of_the_sequencer_leaves_and_another_node_orders_entries(tmp_path: Path) -> None:
    with LocalConsortium(tmp_path / "trial", institutions=4, code=(2, 4)) as trial:
        assert trial.roster is not None
        gone, heir = trial.roster.node(trial.roster.sequencer).name, "insurer-02"
        await Vault.join(tmp_path / "vault", trial.invite(heir), "secret", fast_kdf=True)
        async with Vault.open(tmp_path / "vault", "secret") as vault:
            digest, data = await stored(vault, tmp_path, "before")
            await asyncio.to_thread(
                changed, trial, "insurer-04", "--remove-institution", gone, "--sequencer", heir, "--code", "2/3/3", signers=3
            )
            staying = [name for name in trial.names if name != gone]  # where the heir is slow, another of them steps in
            eventually(lambda: any(operate(trial.home(name), "status")["ledger"]["role"] == "sequencer" for name in staying))
            again, more = await stored(vault, tmp_path, "after")
            for each in ((digest, data), (again, more)):
                await assert_comes_back(vault, *each, tmp_path)
            trial.kill(gone)
            for each in ((digest, data), (again, more)):
                await assert_comes_back(vault, *each, tmp_path)
