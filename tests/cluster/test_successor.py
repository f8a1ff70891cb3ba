"""The institution of the sequencer is gone for good, the log ends, and another goes on from it: real nodes, and vaults that follow."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from medshard import Vault, nursery
from medshard.consortium import LocalConsortium
from medshard.home import Home
from medshard_protocol.entries import Erase, Hold, Register
from medshard_protocol.errors import MedshardError, Refused
from medshard_protocol.identity import public_key
from medshard_protocol.roster import Roster
from medshard_protocol.succession import Successor
from storenode.consortium import free_ports
from storenode.identity import load_key

passphrase = "three words suffice"
size = 40_000
gone, two, three, four, fifth = "hospital-01", "insurer-02", "hospital-03", "insurer-04", "hospital-05"
staying = (two, three, four)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("successor"), institutions=4, code=(2, 4)) as consortium:
        yield consortium


def operate(home: Path, *words: str, refused: bool = False) -> dict[str, Any]:
    """One command of an operator, as JSON; or its error if it is to be refused."""
    done = nursery.run(["-m", "storenode", "--home", str(home), "--json", *words])
    assert (done.returncode != 0) == refused, done.stderr + done.stdout
    answer: dict[str, Any] = json.loads(done.stderr.splitlines()[-1] if refused else done.stdout)
    return answer["error"] if refused else answer


def eventually(holds: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)


def export(home: Path, folder: Path, past: int) -> dict[str, Any]:
    """Export the log from a node's database, once that shows more than so many entries: it may be a minute behind what the node knows."""
    tries: list[dict[str, Any]] = []

    def exported() -> bool:
        done = nursery.run(["-m", "storenode", "--home", str(home), "--json", "log", "export", str(folder.with_name(f"try-{len(tries)}"))])
        tries.append(json.loads(done.stdout) if done.returncode == 0 else {"size": 0})
        return bool(tries[-1]["size"] > past)

    eventually(exported, within_s=120)
    folder.with_name(f"try-{len(tries) - 1}").rename(folder)
    return tries[-1]


async def stored(vault: Vault, folder: Path, name: str) -> bytes:
    (folder / name).write_bytes(os.urandom(size))
    report = await vault.put([folder / name])
    assert report.problems == ()
    return report.stored[0].sha256


async def assert_reads(vault: Vault, digest: bytes, folder: Path) -> None:
    vault.forget_tickets()
    back = folder / "back"
    await vault.get(digest, back)
    assert sha256(back.read_bytes()).digest() == digest


async def reads(vault: Vault, digest: bytes) -> int:
    return [each.what for each in await vault.shares.log(digest)].count("read")


@pytest.fixture
async def vaults(trial: LocalConsortium, tmp_path: Path) -> AsyncIterator[tuple[Vault, Vault]]:
    """An owner of the second institution and a reader of the third."""
    async with AsyncExitStack() as stack:
        opened = []
        for node, name in ((two, "owner"), (three, "reader"), (four, "asleep")):
            await Vault.join(trial.folder / name, trial.invite(node), passphrase, fast_kdf=True)
            if name != "asleep":
                opened.append(await stack.enter_async_context(Vault.open(trial.folder / name, passphrase)))
        yield opened[0], opened[1]


def end(trial: LocalConsortium) -> None:
    trial.kill(gone)
    eventually(lambda: any(operate(trial.home(name), "status")["ledger"]["role"] == "sequencer" for name in staying))
    operate(trial.home(two), "freeze", "propose", "--no-successor", "--yes")
    error = operate(trial.home(two), "successor", "found", "--remove-institution", gone, "--sequencer", two, "--yes", refused=True)
    assert "has not ended" in error["message"]
    operate(trial.home(three), "freeze", "sign", "--no-successor", "--yes")
    assert operate(trial.home(four), "freeze", "sign", "--no-successor", "--yes")["frozen"] is True


def forged(trial: LocalConsortium, file: Path, folder: Path) -> Path:
    """A successor that names another root, signed by everybody who stays."""
    document = Successor.from_bytes(file.read_bytes())
    genesis = Roster.from_bytes(document.genesis)
    other = replace(genesis, before=(replace(genesis.before[0], root=b"\x01" * 32),))
    signatures = []
    for name in staying:
        key = load_key(trial.home(name) / "keys" / "ca.key")
        signed = b"medshard/successor/v1" + sha256(document.before).digest() + other.sha256
        signatures.append((public_key(key), key.sign(signed)))
    path = folder / "forged.medshard"
    path.write_bytes(replace(document, genesis=other.to_bytes(), signatures=tuple(signatures)).to_bytes())
    return path


def succeed(trial: LocalConsortium, folder: Path) -> Path:
    """Found the successor of those who stay and a new one, have it signed, and let the nodes go on in it."""
    file = folder / "successor.medshard"
    words = ["--remove-institution", gone, "--sequencer", two, "--code", "2/3/3", "--add-node", card(trial), "--yes", "-o", str(file)]
    assert operate(trial.home(two), "successor", "found", *words)["signed"] == [two]
    operate(trial.home(three), "successor", "sign", str(file), "--yes")
    again = ["--origin", "elsewhere.example/log", *words[:-1], str(folder / "other.medshard")]
    error = operate(trial.home(two), "successor", "found", *again, refused=True)
    assert "has signed for another document" in error["message"]
    for name in staying:
        trial.kill(name)
    error = operate(trial.home(two), "successor", "adopt", str(file), refused=True)
    assert "signed by 2 institutions, and 3 are needed" in error["message"]
    for name in staying:
        trial.restart(name)
    error = operate(trial.home(three), "successor", "adopt", str(file), refused=True)
    assert "runs already" in error["message"] or "signed by 2" in error["message"]
    assert len(operate(trial.home(four), "successor", "sign", str(file), "--yes")["signed"]) == 3
    for name in staying:
        trial.kill(name)
        error = operate(trial.home(name), "successor", "adopt", str(forged(trial, file, folder)), refused=True)
        assert "cannot go on" in error["message"]
        operate(trial.home(name), "successor", "adopt", str(file))
        operate(trial.home(name), "successor", "adopt", str(file))  # again is no change
        trial.restart(name)  # while the others are still in the old log
        if name == four:
            eventually(lambda: published(trial, two) > Roster.from_bytes(genesis_of(file)).begins)
    eventually(lambda: published(trial, four) >= published(trial, two))
    begin_in_successor(trial, file)
    return file


def card(trial: LocalConsortium) -> str:
    """Make a node of a new institution, which was in no log before; its card."""
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    made = operate(
        trial.home(fifth), "init", "--institution", fifth, "--url", f"https://{address}", "--listen", address, "--capacity", "1GB"
    )
    return str(made["card"])


def begin_in_successor(trial: LocalConsortium, file: Path) -> None:
    """The new node takes the successor by its genesis file's SHA-256, and fetches the old log's entries from the others."""
    home, right = trial.home(fifth), sha256(genesis_of(file)).hexdigest()
    error = operate(home, "successor", "adopt", str(file), refused=True)
    assert "in no log yet" in error["message"]
    error = operate(home, "successor", "adopt", str(file), "--sha256", "0" * 64, refused=True)
    assert right in error["message"]
    operate(home, "successor", "adopt", str(file), "--sha256", right)
    trial.restart(fifth)
    eventually(lambda: answers_with(trial, fifth) >= published(trial, two))


def answers_with(trial: LocalConsortium, name: str) -> int:
    """How much of the log a node has that may not answer yet."""
    asked = nursery.run(["-m", "storenode", "--home", str(trial.home(name)), "--json", "status"])
    return int(json.loads(asked.stdout)["ledger"]["published"]) if asked.returncode == 0 else 0


def published(trial: LocalConsortium, name: str) -> int:
    return int(operate(trial.home(name), "status")["ledger"]["published"])


def genesis_of(file: Path) -> bytes:
    return Successor.from_bytes(file.read_bytes()).genesis


@pytest.mark.timeout(300)
async def test_a_consortium_goes_on_after_its_sequencers_institution_is_gone(
    trial: LocalConsortium, vaults: tuple[Vault, Vault], tmp_path: Path
) -> None:
    owner, reader = vaults
    shared, held = await stored(owner, tmp_path, "shared"), await stored(owner, tmp_path, "held")
    await owner.shares.share([shared], reader.keys.public)
    await assert_reads(reader, shared, tmp_path)
    manifest, before = await owner.evidence(held)
    await owner._ledger.append([Hold(manifest.file_id, os.urandom(16))])

    end(trial)
    with pytest.raises(MedshardError, match="this log has ended"):
        await owner._ledger.append([Hold(manifest.file_id, os.urandom(16))])
    old = owner.roster
    file = succeed(trial, tmp_path)

    # the vaults, open all the while, go on by themselves
    fresh = await stored(owner, tmp_path, "fresh")
    new = owner.roster
    assert (new.sha256, new.before[0].genesis) == (sha256(genesis_of(file)).digest(), old.sha256)
    for digest in (shared, held, fresh):
        await assert_reads(owner, digest, tmp_path)
    await reader._net.follow()  # what it knows of the shared file is proved by the quorum of the log that has ended
    await assert_reads(reader, shared, tmp_path)
    async with asyncio.timeout(60):
        while await reads(owner, shared) < 3:  # the reader's before the end, and both after it
            await asyncio.sleep(0.2)
    with pytest.raises(Refused, match="on hold"):
        await owner._ledger.append([Erase(manifest.file_id, 0, os.urandom(16))])
    again = await owner._ledger.registration(manifest.file_id)
    assert again is not None
    assert (again.index, again.entry) == (before.index, before.entry)
    checkpoint, entry = again.verify(new)
    assert (checkpoint.origin, isinstance(entry.body, Register)) == (new.origin, True)
    await owner.shares.share([fresh], reader.keys.public)
    await assert_reads(reader, fresh, tmp_path)
    proof, proven = await owner.prove(held)
    assert (proven.origin, proof.verify(new).sha256) == (new.origin, held)

    # one that slept, and a home made of a key file alone
    async with Vault.open(trial.folder / "asleep", passphrase) as woken:
        await stored(woken, tmp_path, "of another")
        assert woken.roster == new
    assert Home(trial.folder / "asleep").roster() == new
    assert await owner.reindex() == 3
    await assert_reads(owner, shared, tmp_path)

    # a vault of the new institution
    await Vault.join(trial.folder / "late", trial.invite(fifth), passphrase, fast_kdf=True)
    async with Vault.open(trial.folder / "late", passphrase) as late:
        await assert_reads(late, await stored(late, tmp_path, "of the new"), tmp_path)

    audit(trial, tmp_path, file)


def audit(trial: LocalConsortium, folder: Path, file: Path) -> None:
    """Both logs from their files: the new one, and the old one as a node still shows it."""
    document = Successor.from_bytes(file.read_bytes())
    (folder / "old").write_bytes(document.before)
    (folder / "new").write_bytes(document.genesis)
    old, begins = Roster.from_bytes(document.before), Roster.from_bytes(document.genesis).begins
    export(trial.home(three), folder / "exported", begins)
    report = operate(trial.home(three), "log", "verify", str(folder / "exported"), "--genesis", str(folder / "new"))
    assert (report["frozen_by"], report["unsigned"], report["size"] > begins) == (None, 0, True)
    url = Roster.from_bytes(document.genesis).nodes[1].url
    report = operate(trial.home(three), "log", "verify", f"{url}/before/0/log", "--genesis", str(folder / "old"))
    assert (report["origin"], report["size"], report["frozen_by"]) == (old.origin, begins, begins - 1)
    report = operate(trial.home(three), "log", "verify", f"{url}/log", "--genesis", str(folder / "new"))
    assert report["size"] > begins
    entries = folder / "exported" / "tile" / "entries"
    damaged = next(path for path in sorted(entries.rglob("*")) if path.is_file())
    data = bytearray(damaged.read_bytes())
    data[40] ^= 1
    damaged.write_bytes(bytes(data))
    error = operate(trial.home(three), "log", "verify", str(folder / "exported"), "--genesis", str(folder / "new"), refused=True)
    assert "other hashes" in error["message"]
