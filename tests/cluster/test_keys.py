"""Keys that survive people, on six real nodes: a vault brought back from its kit, from its custodians, and not by too few of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from medshard import Vault, escrow
from medshard.cli.exits import Exit
from medshard.cli.main import main
from medshard.consortium import LocalConsortium
from medshard.escrow import Escrow, share_type
from medshard.home import Home
from medshard.keys import VaultKeys
from medshard.recovery import RecoveryCode, code_of, genesis_of, restore_home
from medshard_protocol.entries import Withdraw, nonce_size, sign_entry
from medshard_protocol.errors import Absent, Refused
from medshard_protocol.ids import Key
from storenode.identity import NodeKeys

passphrase = "three words suffice"
people = {
    "ada": "hospital-01",
    "ben": "insurer-02",
    "cem": "hospital-03",
    "dora": "insurer-04",
    "emil": "hospital-05",
    "fresh": "hospital-01",
}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("keys")) as consortium:
        for name, node in people.items():
            code = consortium.invite(node)
            asyncio.run(Vault.join(consortium.folder / name, code, passphrase, fast_kdf=True))
        yield consortium


def opened(trial: LocalConsortium, name: str):  # type: ignore[no-untyped-def]
    return Vault.open(trial.folder / name, passphrase)


async def key_of(trial: LocalConsortium, name: str) -> Key:
    async with opened(trial, name) as vault:
        await vault.shares.publish_key()
        return Key(vault.keys.public)


async def test_from_the_kit_and_one_node_everything_is_found_on_a_new_machine(trial: LocalConsortium, tmp_path: Path) -> None:
    content = os.urandom(200_000)
    (tmp_path / "scan").write_bytes(content)
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        await vault.put([tmp_path / "scan"])
        code = RecoveryCode.from_code(code_of(vault.home, vault.keys, vault.roster).to_code())
        public, count = vault.keys.public, len(list(vault.ls()))
        url = vault.roster.nodes[0].url
    genesis = await genesis_of(url)
    assert sha256(genesis).digest() == code.genesis_sha256
    home = tmp_path / "new"
    keys = await restore_home(home, code.root, "other words", [url], genesis, fast_kdf=True)
    assert keys.public == public
    async with Vault.open(home, "other words") as vault:
        assert await vault.reindex() == count
        report = await vault.get(sha256(content).digest(), tmp_path / "back")
        assert report.path is not None
        assert report.path.read_bytes() == content
    await restore_home(home, code.root, "other words", [url], genesis, fast_kdf=True)  # a run that was cut off is run again
    with pytest.raises(Refused):
        await restore_home(home, os.urandom(32), "other words", [url], genesis, fast_kdf=True)


async def test_a_key_that_nobody_vouches_for_gets_no_certificate(trial: LocalConsortium, tmp_path: Path) -> None:
    genesis = Home(trial.vault_home).genesis.read_bytes()
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        url = vault.roster.nodes[0].url
    with pytest.raises(Refused, match="no institution vouches"):
        await restore_home(tmp_path / "stranger", os.urandom(32), "words", [url], genesis, fast_kdf=True)
    assert not (tmp_path / "stranger").exists()


async def test_custodians_bring_a_vault_back_and_fewer_do_not(trial: LocalConsortium, tmp_path: Path) -> None:
    names = ("ada", "ben", "cem", "dora", "emil")
    custodians = [await key_of(trial, name) for name in names]
    async with Vault.open(trial.vault_home, trial.passphrase) as owner:
        lost, urls = owner.keys.public, [node.url for node in owner.roster.nodes]
        await Escrow(owner).deposit(custodians, 3)
        first = [row.sha256 for row in owner.ls() if row.media_type == share_type]
        id_ = await Escrow(owner).deposit(custodians, 3)
        assert {key: len(rows) for key, rows in Escrow(owner).deposited().items()} == {id_.hex(): 5}
        assert {digest for ended in owner.custody.all_ended() for _, digest in ended.documents} >= set(first)
        genesis, shares = owner.home.genesis.read_bytes(), [row.sha256 for row in owner.ls() if row.media_type == share_type]
    async with opened(trial, "fresh") as fresh:
        await fresh.shares.publish_key()
        request = await Escrow(fresh).ask(lost, custodians, "Dr. Weber, call 4711")
        assert (await Escrow(fresh).collect(request)).root is None
        for number, name in enumerate(names[:3], 1):
            async with opened(trial, name) as custodian:
                (asked,) = [each for each in await Escrow(custodian).requests() if each.sha256 == request]
                assert (asked.lost, asked.asker, asked.message) == (lost, fresh.keys.public, "Dr. Weber, call 4711")
                await Escrow(custodian).approve(request)
                with pytest.raises(Absent):
                    await Escrow(custodian).approve(bytes(32))
            found = await Escrow(fresh).collect(request)
            assert (len(found.good), found.root is not None) == (number, number == 3)
        assert found.root is not None
        assert VaultKeys.from_root(found.root).public == lost
        assert len(shares) == 5
        kept_back = 0
        for digest in shares:  # what two custodians did not approve is nobody else's
            try:
                await fresh.info(digest)
            except Absent:
                kept_back += 1
        assert kept_back == 2
        await restore_home(tmp_path / "again", found.root, "words", urls, genesis, fast_kdf=True)
    async with Vault.open(tmp_path / "again", "words") as again:
        assert await again.reindex() > 0
        told = [each.what for digest in shares for each in await again.shares.log(digest)]
        assert told.count("read") >= 3  # every custodian's look at its share stands in the ledger


async def test_a_custodian_that_sends_a_wrong_share_is_named(trial: LocalConsortium, monkeypatch: pytest.MonkeyPatch) -> None:
    custodians = {name: await key_of(trial, name) for name in ("ada", "ben", "cem")}
    async with Vault.open(trial.vault_home, trial.passphrase) as owner:
        lost = owner.keys.public
        await Escrow(owner).deposit(list(custodians.values()), 2)
    async with opened(trial, "fresh") as fresh:
        request = await Escrow(fresh).ask(lost, list(custodians.values()))
        for name in custodians:
            async with opened(trial, name) as custodian:
                with monkeypatch.context() as lying:
                    if name == "ben":
                        true = escrow.Share.to_bytes
                        lying.setattr(escrow.Share, "to_bytes", lambda share, true=true: true(replace(share, data=os.urandom(32))))
                    await Escrow(custodian).approve(request)
        found = await Escrow(fresh).collect(request)
        assert found.root is not None
        assert set(found.good) == {custodians["ada"], custodians["cem"]}
        assert found.wrong == (custodians["ben"],)


async def test_a_withdrawn_key_gets_no_certificate_again(trial: LocalConsortium, tmp_path: Path) -> None:
    async with opened(trial, "emil") as emil:
        root, urls, genesis = emil.keys.root, [node.url for node in emil.roster.nodes], emil.home.genesis.read_bytes()
        index = next(node.institution for node in emil.roster.nodes if node.name == "hospital-05")
        public, origin, ca = emil.keys.public, emil.roster.origin, emil.roster.institutions[index].key
    await restore_home(tmp_path / "one", root, "words", urls, genesis, fast_kdf=True)
    keys = NodeKeys.load(trial.folder / "nodes" / "hospital-05")
    assert keys.ca is not None
    entry = sign_entry(origin, Withdraw(public, os.urandom(nonce_size)), ca, keys.ca.sign)
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        await vault._ledger._submit_all([entry.to_bytes()])
    async with asyncio.timeout(20):
        while True:
            try:
                await restore_home(tmp_path / "two", root, "words", urls, genesis, fast_kdf=True)
            except Refused:
                break
            (tmp_path / "two" / "vault.key").unlink()
            await asyncio.sleep(0.2)


def test_the_commands_do_it(trial: LocalConsortium, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", passphrase)
    names = ("ada", "ben")
    keys = {name: asyncio.run(key_of(trial, name)).hex() for name in names}

    def run(home: Path, *words: str) -> tuple[int, str]:
        code = main(["--home", str(home), *words])
        told = capsys.readouterr()
        return code, told.out + told.err

    owner = tmp_path / "owner"
    code = trial.invite("hospital-01")
    asyncio.run(Vault.join(owner, code, passphrase, fast_kdf=True))
    (tmp_path / "letter").write_bytes(os.urandom(9_000))
    assert run(owner, "put", "letter")[0] == Exit.OK
    assert run(owner, "keys", "escrow", "--custodians", ",".join(keys.values()), "--threshold", "2")[0] == Exit.OK
    assert run(owner, "keys", "escrow", "--custodians", keys["ada"], "--threshold", "2")[0] == Exit.REFUSED
    assert run(owner, "keys", "kit", "-o", "kit.txt")[0] == Exit.OK
    assert (tmp_path / "kit.txt").stat().st_mode & 0o777 == 0o600
    assert run(owner, "keys", "kit", "-o", "kit.txt")[0] == Exit.REFUSED
    lost = run(owner, "key")[1].split()[0]
    assert run(tmp_path / "restored", "recover", "--kit", "kit.txt")[0] == Exit.OK
    assert "1 file" not in run(tmp_path / "restored", "ls")[1]
    assert "letter" in run(tmp_path / "restored", "ls")[1]
    monkeypatch.setenv("MEDSHARD_NEW_PASSPHRASE", "entirely new words")
    assert run(tmp_path / "restored", "keys", "passphrase")[0] == Exit.OK
    assert run(tmp_path / "restored", "ls")[0] == Exit.REFUSED
    fresh, wanted = trial.folder / "fresh", ("--of", lost, "--custodians", ",".join(keys.values()))
    code_, told = run(fresh, "keys", "drill", *wanted)
    assert code_ == Exit.UNAVAILABLE
    assert "keys approve" in told
    for name in names:
        home = trial.folder / name
        request = next(line.split()[0] for line in run(home, "keys", "requests")[1].splitlines() if lost[:4] in line)
        assert run(home, "keys", "approve", request)[0] == Exit.OK
    code_, told = run(fresh, "keys", "drill", *wanted)
    assert code_ == Exit.OK
    assert "can be brought back: 2 custodians" in told
    code_, told = run(fresh, "keys", "recover", *wanted, "--into", str(tmp_path / "into"))
    assert code_ == Exit.OK, told
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", "entirely new words")
    assert "letter" in run(tmp_path / "into", "ls")[1]
