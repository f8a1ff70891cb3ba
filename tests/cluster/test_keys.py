"""Keys that survive people, on four real nodes: a vault brought back from its kit, from its custodians, and not by too few of them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.hearing import wait_for_every_shard
from tests.cluster.keyholders import folded_everywhere, handed_in, refused, refused_everywhere, sign_withdrawal

from medshard import Vault, enrolment, escrow, nursery, rotation, sender
from medshard.cli.exits import Exit
from medshard.cli.main import main
from medshard.consortium import LocalConsortium
from medshard.envelopes import sealing_key
from medshard.escrow import Escrow, share_type
from medshard.home import Home
from medshard.keys import VaultKeys, open_root
from medshard.recovery import RecoveryCode, code_of, genesis_of, restore_home
from medshard_protocol.errors import Absent, Damaged, MedshardError, Refused, Unavailable
from medshard_protocol.ids import FileId, Key
from medshard_protocol.rights import Reason, reason_in
from medshard_protocol.sharing import access_header, pack_tickets

passphrase = "three words suffice"
people = {
    "ada": "hospital-01",
    "ben": "insurer-02",
    "cem": "hospital-03",
    "dora": "insurer-04",
    "emil": "insurer-04",
    "fresh": "hospital-01",
}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("keys"), institutions=4) as consortium:
        for name, node in people.items():
            code = consortium.invite(node)
            asyncio.run(Vault.join(consortium.folder / name, code, passphrase, fast_kdf=True))
        yield consortium


@pytest.fixture(autouse=True)
def every_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_every_shard(monkeypatch)


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
            if name == "ben":  # as many as it takes, and one of them wrong
                found = await Escrow(fresh).collect(request)
                assert (found.root, found.good, found.wrong) == (None, (custodians["ada"],), (custodians["ben"],))
        found = await Escrow(fresh).collect(request)
        assert found.root is not None
        assert set(found.good) == {custodians["ada"], custodians["cem"]}
        assert found.wrong == (custodians["ben"],)
        async with opened(trial, "ben") as custodian:  # what is deposited there is right
            await Escrow(custodian).approve(request)
        found = await Escrow(fresh).collect(request)
        assert (set(found.good), found.wrong) == (set(custodians.values()), ())


async def test_a_withdrawn_key_gets_no_certificate_again(trial: LocalConsortium, tmp_path: Path) -> None:
    async with opened(trial, "emil") as emil:
        root, urls, genesis = emil.keys.root, [node.url for node in emil.roster.nodes], emil.home.genesis.read_bytes()
        public = emil.keys.public
    await restore_home(tmp_path / "one", root, "words", urls, genesis, fast_kdf=True)
    await handed_in(trial, sign_withdrawal(trial, "insurer-04", public))
    with pytest.raises(Refused, match="no institution vouches"):
        await restore_home(tmp_path / "two", root, "words", urls, genesis, fast_kdf=True)


async def test_a_vault_with_new_keys_has_everything_and_the_old_key_nothing(trial: LocalConsortium, tmp_path: Path) -> None:
    mine, theirs = os.urandom(30_000), os.urandom(20_000)
    old_home, home = tmp_path / "old", tmp_path / "home"
    await Vault.join(home, trial.invite("hospital-01"), passphrase, fast_kdf=True)
    ben = await key_of(trial, "ben")
    (tmp_path / "mine").write_bytes(mine)
    (tmp_path / "theirs").write_bytes(theirs)
    async with Vault.open(home, passphrase) as vault, opened(trial, "ben") as reader:
        await vault.put([tmp_path / "mine"])
        await vault.shares.share([sha256(mine).digest()], ben)
        vault.contacts.add("Ben", ben)
        await reader.put([tmp_path / "theirs"])
        await reader.shares.share([sha256(theirs).digest()], vault.keys.public)
        await vault.shares.sync()
        before = vault.keys.public
    shutil.copytree(home, old_home)

    code = trial.invite("hospital-01")
    keys = await rotation.rotate(Home(home), passphrase, code, fast_kdf=True)
    assert keys.public != before
    async with Vault.open(home, passphrase) as vault, opened(trial, "ben") as reader:
        await vault.shares.publish_key()
        await rotation.keep_former(vault)
        assert vault.keys.public == keys.public
        assert vault.contacts.names() == {ben: "Ben"}
        for content in (mine, theirs):
            report = await vault.get(sha256(content).digest(), tmp_path / "back")
            assert report.path is not None
            assert report.path.read_bytes() == content
        _, proven = await vault.prove(sha256(mine).digest())
        assert proven.owner == before
        assert (await vault.verify(sha256(mine).digest())).ok
        await reader.shares.sync()
        await reader.get(sha256(mine).digest(), tmp_path / "bens")  # what was granted before goes on
        assert [each.what for each in await vault.shares.log(sha256(mine).digest())][-1] == "read"
        await vault.shares.revoke([sha256(mine).digest()], ben)
        reader.forget_tickets()
        assert "revoked" in await refused(reader.get(sha256(mine).digest(), tmp_path / "bens"))
        await vault.shares.share([sha256(mine).digest()], ben)  # a file of the old key, granted with the new one
        await reader.shares.sync()
        await reader.get(sha256(mine).digest(), tmp_path / "bens")
        await reader.shares.share([sha256(theirs).digest()], before)  # whoever knows the old key reaches the vault
        (tmp_path / "new").write_bytes(theirs[::-1])
        await vault.put([tmp_path / "new"])
        assert (await vault.put([tmp_path / "mine"])).stored[0].already
        size = vault._ledger.reached
    await folded_everywhere(trial, size)
    async with Vault.open(old_home, passphrase) as thief:
        assert "withdrawn" in await refused(thief.get(sha256(mine).digest(), tmp_path / "stolen"))
        assert "withdrawn" in await refused(thief.shares.share([sha256(mine).digest()], await key_of(trial, "cem")))
        (tmp_path / "planted").write_bytes(os.urandom(5_000))
        with pytest.raises(MedshardError, match="withdrawn"):
            await thief.put([tmp_path / "planted"])
    restored = tmp_path / "restored"
    async with opened(trial, "ben") as reader:
        urls, genesis = [node.url for node in reader.roster.nodes], reader.home.genesis.read_bytes()
    await restore_home(restored, keys.root, passphrase, urls, genesis, fast_kdf=True)
    async with Vault.open(restored, passphrase) as vault:  # the new root alone finds what the old one had
        await vault.reindex()
        assert [each.public for each in vault.keys.line] == [keys.public, before]
        for content in (mine, theirs, theirs[::-1]):
            await vault.get(sha256(content).digest(), tmp_path / "back")
    async with Vault.open(restored, passphrase) as vault:
        assert {row.sha256 for row in vault.ls()} >= {sha256(mine).digest(), sha256(theirs[::-1]).digest()}


async def test_a_rotation_that_was_cut_off_anywhere_is_run_again(
    trial: LocalConsortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, code = tmp_path / "home", trial.invite("hospital-01")
    await Vault.join(home, trial.invite("hospital-01"), passphrase, fast_kdf=True)
    (tmp_path / "file").write_bytes(b"kept")
    async with Vault.open(home, passphrase) as vault:
        before = vault.keys.public
        await vault.put([tmp_path / "file"])
    drawn = set()
    true = enrolment.rotate

    async def unasked(*_: object) -> bytes:
        raise Unavailable("cut off")

    async def unheard(*given: Any) -> bytes:
        await true(*given)
        raise Unavailable("cut off")

    for cut in (unasked, unheard):
        with monkeypatch.context() as patched:
            patched.setattr(enrolment, "rotate", cut)
            with pytest.raises(Unavailable):
                await rotation.rotate(Home(home), passphrase, code, fast_kdf=True)
        drawn.add(open_root(Home(home).next_key.read_bytes(), passphrase).public)
    with monkeypatch.context() as patched:  # the certificate is here, and neither file is in place yet
        patched.setattr(rotation, "finish", lambda _: None)
        await rotation.rotate(Home(home), passphrase, code, fast_kdf=True)
    assert Home(home).next_certificate.exists()
    shutil.copytree(home, tmp_path / "twin")
    assert (await rotation.rotate(Home(tmp_path / "twin"), passphrase, code)).public in drawn  # run again, it ends where it would have
    drawn.add(open_root(Home(home).next_key.read_bytes(), passphrase).public)
    assert len(drawn) == 1
    async with Vault.open(home, passphrase) as vault:  # whoever opens it first finishes it
        assert {vault.keys.public} == drawn
        assert vault.keys.former[0].public == before
        await vault.get(sha256(b"kept").digest(), tmp_path / "back")
    assert list(home.glob("next.*")) == []


async def test_a_stolen_key_is_withdrawn_and_its_owner_goes_on_with_a_new_one(
    trial: LocalConsortium, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    await Vault.join(home, trial.invite("hospital-03"), passphrase, fast_kdf=True)
    content = os.urandom(10_000)
    (tmp_path / "file").write_bytes(content)
    async with Vault.open(home, passphrase) as vault:
        await vault.put([tmp_path / "file"])
        await vault.get(sha256(content).digest(), tmp_path / "back")  # its ticket would live on
        await handed_in(trial, sign_withdrawal(trial, "hospital-03", vault.keys.public))
        sealed = await vault._lookup.file(FileId(next(vault.ls()).file_id))
        (held,) = vault._reader.tickets.held([sealed.manifest.file_id], 0)
        ticket = {access_header: pack_tickets([held.inclusion.index])}
        for node in vault.roster.nodes:  # at each of them, by the ticket it has, and by every other way
            holds = sealed.manifest.index_on(node.id)
            if holds is not None:
                path = f"/v1/shards/{sealed.manifest.file_id.hex()}/{holds}"
                async with vault._net._open(node, "GET", path, None, ticket, 5.0) as response:
                    assert response.status == 403
                    assert reason_in((await response.read()).decode(errors="replace")) is Reason.WITHDRAWN
            ways = [
                ("PUT", "/v1/keys", sealing_key(vault.keys).to_bytes()),
                ("PUT", f"/v1/manifests/{sealed.manifest.file_id.hex()}", sealed.manifest.to_bytes()),
                ("PUT", f"/v1/shards/{os.urandom(32).hex()}/0", bytes(1000)),
                ("GET", "/v1/grants", b""),
            ]
            for method, path, data in ways:
                assert "withdrawn this key" in await refused(vault._net.call(node, method, path, data, timeout_s=5.0)), (node.name, path)
        assert "no institution of the roster vouches" in await refused(vault.get(sha256(content).digest(), tmp_path / "back"))
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", passphrase)
    assert await asyncio.to_thread(main, ["--home", str(home), "put", str(tmp_path / "file")]) == Exit.OK  # it is safe, and told no more
    out, err = capsys.readouterr()
    assert out.startswith(sha256(content).hexdigest())
    assert "hospital-03 has withdrawn this vault's key" in err
    with pytest.raises(Refused):  # another institution has no say, and nothing of the try is left
        await rotation.rotate(Home(home), passphrase, trial.invite("insurer-02"), fast_kdf=True)
    assert [path.name for path in home.iterdir() if path.name.startswith(("next", "former"))] == []
    keys = await rotation.rotate(Home(home), passphrase, trial.invite("hospital-03"), fast_kdf=True)
    async with Vault.open(home, passphrase) as vault:
        assert vault.keys.public == keys.public
        await vault.get(sha256(content).digest(), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == content


async def test_what_only_sends_stores_for_its_vault_and_reads_nothing_back(trial: LocalConsortium, tmp_path: Path) -> None:
    home, owner = Home(tmp_path / "scanner"), tmp_path / "owner"
    await Vault.join(owner, trial.invite("hospital-01"), passphrase, fast_kdf=True)
    async with Vault.open(owner, passphrase) as vault:
        key = vault.keys.public
    keys = await sender.new(home, trial.invite("hospital-01"), key)
    assert {path.name for path in home.folder.iterdir()} == {"sender.key", "certificate.der", "genesis.medshard", "rosters"}
    contents = [os.urandom(size) for size in (500, 60_000, 3_000_000)]
    for number, content in enumerate(contents):
        (tmp_path / f"scan-{number}").write_bytes(content)
    async with sender.opened(home) as scanner:
        report = await scanner.put([tmp_path / f"scan-{number}" for number in range(3)], tags={"room": "3"})
        hashes = [each.sha256 for each in report.stored]
        assert sorted(hashes) == sorted(sha256(content).digest() for content in contents)
        with scanner._draw() as drawn:
            assert "only sends" in await refused(drawn._reader.tickets.announce([FileId(report.stored[0].file_id)], 0))
        size = max(each.ledger_index for each in report.stored) + 2  # the grant comes after them
    assert {path.name for path in home.folder.iterdir()} == {"sender.key", "certificate.der", "genesis.medshard", "rosters"}
    assert "only sends" in await refused(Vault.open(home.folder, passphrase).__aenter__())
    await folded_everywhere(trial, size)
    async with Vault.open(owner, passphrase) as vault:
        await vault.shares.sync()
        assert {row.sha256 for row in vault.ls()} == set(hashes)  # its own, not another's
        assert list(vault.ls(shared=True)) == []
        for content in contents:
            report_ = await vault.get(sha256(content).digest(), tmp_path / "back")
            assert report_.path is not None
            assert report_.path.read_bytes() == content
        ben = await key_of(trial, "ben")
        await vault.shares.share([hashes[0]], ben)
        assert (await vault.prove(hashes[0]))[1].owner == keys.public  # who signed for it; its institution enrolled the sender
        assert [each.what for each in await vault.shares.log(hashes[0])] == ["registered", "granted", "read", "granted"]
        assert await vault.reindex() == 3
        file_id = FileId(next(vault.ls()).file_id)
        manifest = (await vault._lookup.file(file_id)).manifest
    async with opened(trial, "ben") as reader:
        await reader.shares.sync()
        await reader.get(hashes[0], tmp_path / "bens")
    async with sender.opened(home) as scanner:  # a later run has not even the key of what was sent
        with pytest.raises(Damaged), scanner._draw() as drawn:
            drawn._lookup.open(manifest, None)  # type: ignore[arg-type]
        (tmp_path / "later").write_bytes(b"later")
    await rotation.rotate(Home(owner), passphrase, trial.invite("hospital-01"), fast_kdf=True)
    async with Vault.open(owner, passphrase) as vault:
        await vault.shares.publish_key()
        size = vault._ledger.reached
    async with sender.opened(home) as scanner:  # a sender finds its vault's new key by itself
        await scanner.put([tmp_path / "later"])
    async with Vault.open(owner, passphrase) as vault:
        await vault.shares.sync()
        for digest in (*hashes, sha256(b"later").digest()):
            await vault.get(digest, tmp_path / "back")
        assert await vault.reindex() == 4


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_new_keys_and_senders_by_command(
    trial: LocalConsortium, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", passphrase)
    monkeypatch.setattr("medshard.keys.scrypt_log2_n", 10)
    names = {name: asyncio.run(key_of(trial, name)).hex() for name in ("ada", "ben")}

    def run(home: str, *words: str, code: int = Exit.OK) -> str:
        found = main(["--home", str(tmp_path / home), *words])
        told = capsys.readouterr()
        assert found == code, told
        return told.out + told.err

    asyncio.run(Vault.join(tmp_path / "owner", trial.invite("hospital-01"), passphrase, fast_kdf=True))
    (tmp_path / "letter").write_bytes(b"letter")
    (tmp_path / "scan").write_bytes(b"scan")
    run("owner", "put", "letter")
    run("owner", "keys", "kit", "-o", "old.txt")
    run("owner", "keys", "escrow", "--custodians", ",".join(names.values()), "--threshold", "2")
    key = run("owner", "key").split()[0]
    told = run("scanner", "sender", "new", trial.invite("hospital-01"), "--for", key)
    scanner = told.split()[0]
    run("scanner", "put", "scan")
    assert "only sends" in run("scanner", "ls", code=Exit.REFUSED)
    told = run("owner", "keys", "rotate", trial.invite("hospital-01"))
    assert all(each in told for each in ("2 custodians have shares of the new key", "new kit"))
    lost = run("owner", "key").split()[0]
    assert "custodians" not in run("owner", "keys", "rotate")  # nothing is left to do
    assert "escrow/" not in run("owner", "shared") + run("owner", "find", "escrow")  # no document
    assert "escrow/" in run("owner", "shared", "--all")
    listed = run("owner", "ls")
    assert all(name in listed for name in ("letter", "scan"))
    assert "escrow/" not in listed
    assert run("owner", "ls", "--all").count("escrow/") == 2
    users = vouched_for(trial)
    assert [users[each]["state"] for each in (key, lost, scanner)] == ["succeeded", "user", "sender"]
    assert (users[key]["heir"], users[scanner]["heir"]) == (lost, key)
    assert users[key]["succeeded"] == users[key]["withdrawn"]
    if not whole:
        return
    assert "no institution vouches" in run("late", "recover", "--kit", "old.txt", code=Exit.REFUSED)
    run("owner", "keys", "kit", "-o", "new.txt")
    run("restored", "recover", "--kit", "new.txt")
    assert all(name in run("restored", "ls") for name in ("letter", "scan"))
    for name in ("ada", "ben"):  # escrow after the rotation brings everything back, too
        wanted = ("--of", lost, "--custodians", ",".join(names.values()))
        asyncio.run(asked_and_approved(trial, lost, name))
    monkeypatch.setenv("MEDSHARD_NEW_PASSPHRASE", passphrase)
    run(str(trial.folder / "fresh"), "keys", "recover", *wanted, "--into", str(tmp_path / "into"))
    assert all(name in run("into", "ls") for name in ("letter", "scan"))
    # A thief has the machine and the passphrase; the institution withdraws the key, and the owner begins anew from the kit.
    asyncio.run(handed_in(trial, sign_withdrawal(trial, "hospital-01", Key(bytes.fromhex(lost)))))
    assert "found" in run("anew", "keys", "rotate", trial.invite("hospital-01"), "--kit", "new.txt")
    assert all(name in run("anew", "ls") for name in ("letter", "scan"))
    stolen = vouched_for(trial)[lost]
    assert (stolen["state"], stolen["succeeded"] > stolen["withdrawn"]) == ("succeeded", True)
    run("anew", "get", sha256(b"scan").hexdigest(), "-o", "back")
    assert (tmp_path / "back").read_bytes() == b"scan"


def vouched_for(trial: LocalConsortium) -> dict[str, dict[str, Any]]:
    """What the first hospital's operator is told of all keys, by key."""
    listed = nursery.run(["-m", "storenode", "--home", str(trial.home("hospital-01")), "users", "--all", "--json"])
    return {each["key"]: each for each in json.loads(listed.stdout)["users"]}


async def test_users_of_one_institution_have_files_of_their_own_and_share_them(trial: LocalConsortium, tmp_path: Path) -> None:
    homes = {name: tmp_path / name for name in ("weber", "klein")}
    for home in homes.values():
        await Vault.join(home, trial.invite("hospital-01"), passphrase, fast_kdf=True)
    (tmp_path / "file").write_bytes(b"of Dr. Weber")
    digest = sha256(b"of Dr. Weber").digest()
    async with Vault.open(homes["weber"], passphrase) as weber, Vault.open(homes["klein"], passphrase) as klein:
        await weber.put([tmp_path / "file"])
        with pytest.raises(Absent):  # a colleague has no more than a stranger
            await klein.get(digest, tmp_path / "back")
        opened_ = await weber._lookup.file(FileId(next(weber.ls()).file_id))
        await refused_everywhere(klein, opened_)
        await weber.shares.share([digest], klein.keys.public)
        await klein.shares.sync()
        await klein.get(digest, tmp_path / "back")
        await handed_in(trial, sign_withdrawal(trial, "hospital-01", klein.keys.public))
        klein.forget_tickets()
        assert "withdrawn this key" in await refused(klein.get(digest, tmp_path / "back"))
        assert "hospital" in (found := [each.what for each in await klein.doctor() if each.level == "bad"])[0].lower(), found
        await weber.get(digest, tmp_path / "back")  # who stays goes on


async def asked_and_approved(trial: LocalConsortium, lost: str, name: str) -> None:
    """``fresh`` asks for the shares of a lost key, unless it has, and a custodian approves."""
    async with opened(trial, "fresh") as fresh:
        mine = [each for each in await Escrow(fresh).requests() if each.lost.hex() == lost and each.asker == fresh.keys.public]
        custodians = [await key_of(trial, each) for each in ("ada", "ben")]
        request = mine[-1].sha256 if mine else await Escrow(fresh).ask(Key(bytes.fromhex(lost)), custodians)
    async with opened(trial, name) as custodian:
        await Escrow(custodian).approve(request)


def test_the_commands_do_it(trial: LocalConsortium, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", passphrase)
    monkeypatch.setattr("medshard.keys.scrypt_log2_n", 10)
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
    assert re.search(r"can be brought back: 2 custodians, \d+ s after the request", told)
    code_, told = run(fresh, "keys", "recover", *wanted, "--into", str(tmp_path / "into"))
    assert code_ == Exit.OK, told
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", "entirely new words")
    assert "letter" in run(tmp_path / "into", "ls")[1]
