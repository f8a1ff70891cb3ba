"""Kept and destroyed, on four real nodes: retention and holds against the owner's own will, erasure with receipts, certificates."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.cluster.hearing import wait_for_every_shard

from medshard import Vault, certificate, keepers
from medshard.cli.exits import Exit
from medshard.cli.main import main
from medshard.consortium import LocalConsortium
from medshard.custody import _keeping
from medshard_protocol.entries import Entry, Erase, Hold, Release, Type, sign_entry
from medshard_protocol.errors import Absent, Malformed, MedshardError, Refused
from medshard_protocol.ids import FileId, Key
from medshard_protocol.roster import Node, Roster
from medshard_protocol.sharing import EndedFiles
from storenode.cli.main import main as storenode
from storenode.office import Office

passphrase = "three words suffice"


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("custody"), institutions=4) as consortium:
        code = consortium.invite("insurer-02")
        asyncio.run(Vault.join(consortium.folder / "insurer", code, passphrase, fast_kdf=True))
        yield consortium


@pytest.fixture(autouse=True)
def every_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_every_shard(monkeypatch)


@pytest.fixture(autouse=True)
def everybody_up(trial: LocalConsortium) -> Iterator[None]:
    yield
    for name in trial.names:
        if name not in trial.running:
            trial.restart(name)


@pytest.fixture
async def vault(trial: LocalConsortium) -> AsyncIterator[Vault]:
    async with Vault.open(trial.vault_home, trial.passphrase) as opened:
        yield opened


async def put(vault: Vault, path: Path, *sizes: int) -> list[bytes]:
    """Store files of these sizes as one pack, or one alone; their hashes."""
    path.mkdir()
    contents = [os.urandom(size) for size in sizes]
    for number, content in enumerate(contents):
        (path / f"letter-{number}").write_bytes(content)
    report = await vault.put([path] if len(sizes) > 1 else [path / "letter-0"])
    assert not report.problems
    return [sha256(content).digest() for content in contents]


async def read(vault: Vault, digest: bytes, folder: Path) -> bytes:
    report = await vault.get(digest, folder / digest.hex()[:8])
    assert report.path is not None
    return report.path.read_bytes()


def shard_files(trial: LocalConsortium, file_id: bytes) -> list[Path]:
    return list((trial.folder / "nodes").glob(f"*/**/shards/*/{file_id.hex()}-*"))


async def test_what_is_retained_or_on_hold_is_destroyed_by_nobody(vault: Vault, tmp_path: Path) -> None:
    (digest,) = await put(vault, tmp_path / "one", 40_000)
    until = int(time.time()) + 86_400
    (kept,) = await vault.custody.retain([digest], until)
    assert (kept.until, kept.holds) == (until, ())
    with pytest.raises(Refused, match="retained until"):
        await vault.custody.end([digest])
    with pytest.raises(MedshardError):  # nor by going around this client's own look at it
        await vault._ledger.append([Erase(kept.file_id, int(time.time()), os.urandom(16))])
    (sooner,) = await vault.custody.retain([digest], until - 3600)
    assert sooner.until == until
    (other,) = await put(vault, tmp_path / "two", 40_000)
    (held,) = await vault.custody.hold([other])
    (again,) = await vault.custody.hold([other])
    assert held.holds == again.holds
    with pytest.raises(Refused, match="on hold"):
        await vault.custody.end([other])
    assert {each.file_id for each in vault.custody.kept()} >= {kept.file_id, held.file_id}
    (free,) = await vault.custody.release([other])
    assert free.holds == ()
    with pytest.raises(Absent):
        await vault.custody.release([other])
    (ended,) = await vault.custody.end([other])
    assert not ended.missing
    assert await read(vault, digest, tmp_path)


async def test_an_erased_file_is_gone_everywhere_and_its_neighbours_are_not(trial: LocalConsortium, vault: Vault, tmp_path: Path) -> None:
    hashes = await put(vault, tmp_path / "pack", 400_000, 300_000, 500_000)
    await asyncio.to_thread((tmp_path / "pack" / "letter-0").unlink)
    (row,) = [row for row in vault.ls() if row.sha256 == hashes[0]]
    async with Vault.open(trial.folder / "insurer", passphrase) as insurer:
        await insurer.shares.publish_key()
        shared = await vault.shares.share(hashes, insurer.keys.public)
        assert {each.file_id for each in shared} == {row.file_id}
        (ended,) = await vault.custody.end([hashes[0]])
        assert (ended.type, ended.moved, ended.missing, len(ended.receipts)) == (Type.ERASE, 2, (), 4)
        assert sorted(receipt.shard for receipt in ended.receipts if receipt.shard is not None) == list(range(4))
        assert all(receipt.keys >= 1 for receipt in ended.receipts)
        assert sum(receipt.keys for receipt in ended.receipts) > 4  # with the sealed keys of the grant
        assert shard_files(trial, row.file_id) == []
        with pytest.raises(Absent):
            await vault.get(hashes[0], tmp_path / "back")
        with pytest.raises(MedshardError):
            await insurer.get(hashes[0], tmp_path / "back")
        for number, digest in enumerate(hashes[1:], 1):
            whole = (tmp_path / "pack" / f"letter-{number}").read_bytes()
            assert await read(vault, digest, tmp_path) == whole
            back = await insurer.get(digest, tmp_path / f"insurer-{number}")
            assert back.path is not None
            assert back.path.read_bytes() == whole
    assert not [row for row in vault.ls() if row.sha256 == hashes[0]]


async def test_a_neighbour_that_was_shared_alone_is_still_listed(trial: LocalConsortium, vault: Vault, tmp_path: Path) -> None:
    gone, shared, left = await put(vault, tmp_path / "pack", 20_000, 20_000, 20_000)
    async with Vault.open(trial.folder / "insurer", passphrase) as insurer:
        await insurer.shares.publish_key()
        await vault.shares.share([shared], insurer.keys.public)  # which makes a copy that `ls` does not list
    await vault.custody.end([gone])
    await vault.custody.end([left])
    assert [row.sha256 for row in vault.ls() if row.sha256 in (gone, shared, left)] == [shared]
    assert await read(vault, shared, tmp_path) == (tmp_path / "pack" / "letter-1").read_bytes()


async def test_a_node_that_was_down_obeys_when_it_is_back(trial: LocalConsortium, vault: Vault, tmp_path: Path, monkeypatch) -> None:
    (digest,) = await put(vault, tmp_path / "one", 900_000)
    (row,) = [row for row in vault.ls() if row.sha256 == digest]
    monkeypatch.setattr("medshard.custody.receipts_wait_s", 2.0)
    trial.kill("hospital-03")
    (ended,) = await vault.custody.end([digest])
    async with asyncio.timeout(60):
        while len(ended.missing) > 1:  # one that is slow today
            ended = await vault.custody.collect(row.file_id, 2.0)
    assert len(ended.missing) == 1
    assert len(shard_files(trial, row.file_id)) == 1
    trial.restart("hospital-03")
    whole = await vault.custody.collect(row.file_id, 30.0)
    assert (whole.missing, len(whole.receipts)) == ((), 4)
    assert shard_files(trial, row.file_id) == []
    assert vault.custody.all_ended(digest) == [whole]


async def test_a_retired_file_is_forgotten_and_an_index_made_anew_does_not_miss_it(vault: Vault, tmp_path: Path) -> None:
    (gone,), (kept,) = await put(vault, tmp_path / "one", 30_000), await put(vault, tmp_path / "two", 30_000)
    (ended,) = await vault.custody.end([gone], erase=False)
    assert (ended.type, {receipt.keys for receipt in ended.receipts}) == (Type.RETIRE, {0})
    (erased,) = await vault.custody.end([kept])
    await vault.reindex()
    known = {row.sha256 for row in vault.ls()}
    assert kept not in known
    assert {each.file_id for each in vault.custody.all_ended()} >= {ended.file_id, erased.file_id}


@pytest.fixture
async def elsewhere(trial: LocalConsortium, tmp_path: Path) -> AsyncIterator[Vault]:
    """The same vault in another home, which has no index yet."""
    home = shutil.copytree(trial.vault_home, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("*.sqlite*"))
    async with Vault.open(home, trial.passphrase) as opened:
        yield opened


@contextmanager
def answering(vault: Vault, answer: Callable[[str, bytes], bytes]) -> Iterator[None]:
    """What nodes say to this home of ended files passes by ``answer``, with the node's name."""
    call = vault._net.call

    async def altered(node: Node, method: str, path: str, *args: Any, **more: Any) -> bytes:
        data = await call(node, method, path, *args, **more)
        return answer(node.name, data) if path.startswith("/v1/ledger/ended") else data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vault._net, "call", altered)
        yield


async def test_what_another_home_has_ended_is_gone_here_and_its_neighbours_are_known(
    vault: Vault, elsewhere: Vault, tmp_path: Path
) -> None:
    hashes = await put(vault, tmp_path / "pack", 40_000, 30_000)
    (alone,), (kept,) = await put(vault, tmp_path / "one", 20_000), await put(vault, tmp_path / "two", 20_000)
    await elsewhere.reindex()
    await elsewhere.custody.retain([alone], int(time.time()) - 10)
    packs = {row.file_id for row in elsewhere.ls() if row.sha256 in hashes}
    ended = [*await vault.custody.end([hashes[0]]), *await vault.custody.end([alone], erase=False)]
    silent = ""

    def answer(name: str, data: bytes) -> bytes:
        nonlocal silent
        silent = silent or name
        return replace(EndedFiles.from_bytes(data), entries=()).to_bytes() if name == silent else data

    with answering(elsewhere, answer):
        async with asyncio.timeout(30):
            while {hashes[0], alone} & {row.sha256 for row in elsewhere.ls()}:  # until enough nodes have heard
                await elsewhere.shares.sync()
    rows = {row.sha256: row.file_id for row in elsewhere.ls()}
    assert {hashes[1], kept} <= set(rows)
    assert rows[hashes[1]] not in packs
    assert await read(elsewhere, hashes[1], tmp_path)
    here = {each.file_id: each for each in elsewhere.custody.all_ended()}
    assert [(here[each.file_id].type, here[each.file_id].at) for each in ended] == [(each.type, each.at) for each in ended]
    assert {sha256 for _, sha256 in here[ended[0].file_id].documents} == set(hashes)
    assert elsewhere._index.custody_of(_keeping, ended[1].file_id) is None, "and what kept it is forgotten"
    with pytest.raises(Absent, match="was erased by this vault"):
        await elsewhere.get(hashes[0], tmp_path / "gone")
    collected = await elsewhere.custody.collect(ended[0].file_id)
    assert {receipt.node for receipt in collected.receipts} >= {receipt.node for receipt in ended[0].receipts}
    heard = [0]

    def hear(name: str, data: bytes) -> bytes:
        heard.append(len(EndedFiles.from_bytes(data).entries))
        return data

    with answering(elsewhere, hear):
        async with asyncio.timeout(30):
            while len(heard) == 1 or any(heard[1:]):  # what was told is not told again
                heard = [0]
                assert not await elsewhere.shares.sync()


async def test_nodes_that_lie_about_what_has_ended_change_nothing(
    vault: Vault, elsewhere: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (digest,), (gone,) = await put(vault, tmp_path / "one", 20_000), await put(vault, tmp_path / "two", 20_000)
    await elsewhere.reindex()
    (row,) = [row for row in elsewhere.ls() if row.sha256 == digest]
    (ended,) = await vault.custody.end([gone])
    origin, stranger = vault.roster.origin, Ed25519PrivateKey.generate()
    public = Key(stranger.public_key().public_bytes_raw())
    forged = sign_entry(origin, Erase(FileId(row.file_id), 0, bytes(16)), public, stranger.sign).to_bytes()
    never = sign_entry(origin, Erase(FileId(row.file_id), 0, bytes(16)), vault.keys.public, vault.keys.signing.sign).to_bytes()
    registration = (await vault.evidence(digest))[1]
    lies = [replace(ended.inclusion, entry=never), replace(ended.inclusion, entry=forged), registration]

    def answer(name: str, data: bytes) -> bytes:
        said = EndedFiles.from_bytes(data)
        if lies:
            return EndedFiles(lies[0].checkpoint, (lies[0],), max(said.next, lies[0].index + 1), False).to_bytes()
        return data if name == vault.roster.nodes[0].name else replace(said, entries=()).to_bytes()

    with answering(elsewhere, answer):
        while lies:
            with monkeypatch.context() as patch:
                if lies[0].entry == forged:  # as if it stood in the ledger, without effect
                    patch.setattr(elsewhere._ledger, "verified", lambda inclusion: Entry.from_bytes(inclusion.entry))
                assert not await elsewhere.shares.sync()
            assert {row.sha256 for row in elsewhere.ls()} >= {digest, gone}
            del lies[0]
        assert not await elsewhere.shares.sync(whole=True), "in the word of one institution's node"
    async with asyncio.timeout(30):
        while gone in {row.sha256 for row in elsewhere.ls()}:
            await elsewhere.shares.sync(whole=True)
    assert await read(elsewhere, digest, tmp_path)


async def test_a_certificate_convinces_by_itself_and_not_when_a_word_of_it_is_changed(
    trial: LocalConsortium, vault: Vault, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (digest,) = await put(vault, tmp_path / "one", 50_000)
    (ended,) = await vault.custody.end([digest])
    genesis: Roster = vault.home.rosters()[0]
    told = certificate.make(ended, vault.home.genesis_sha256(), vault.roster, vault.home.links())
    certified = certificate.check(json.dumps(told).encode(), genesis)
    assert (certified.documents, len(certified.receipts), certified.missing) == (((50_000, digest),), 4, ())
    for field, value in (
        ("type", "retired"),
        ("file", "00" * 32),
        ("medshard", "x"),
        ("receipts", told["receipts"] + [{}]),
        ("rosters", "AA"),
    ):
        with pytest.raises((Malformed, Refused)):
            certificate.check(json.dumps(told | {field: value}).encode(), genesis)
    (other,) = await put(vault, tmp_path / "two", 50_000)
    (elsewhere,) = await vault.custody.end([other])
    strange = certificate.make(elsewhere, vault.home.genesis_sha256(), vault.roster, vault.home.links())
    with pytest.raises(Refused):
        certificate.check(json.dumps(told | {"receipts": strange["receipts"]}).encode(), genesis)


def test_the_commands_say_what_they_did(trial: LocalConsortium, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("MEDSHARD_HOME", str(trial.vault_home))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy").write_bytes(os.urandom(20_000))
    assert main(["put", "policy"]) == Exit.OK
    digest = capsys.readouterr().out.split()[0]
    assert main(["hold", digest]) == Exit.OK
    assert "hold" in capsys.readouterr().out
    assert main(["erase", digest, "--yes"]) == Exit.REFUSED
    assert "on hold" in capsys.readouterr().err
    assert main(["release", digest]) == Exit.OK
    assert main(["erase", digest]) == Exit.USAGE
    assert "--yes" in capsys.readouterr().err
    assert main(["erase", digest, "--yes"]) == Exit.OK
    assert "4 of 4 receipts" in capsys.readouterr().out
    assert main(["certificate", digest, "-o", "gone.json", "--pdf", "gone.pdf"]) == Exit.OK
    assert capsys.readouterr().out.split() == ["gone.json", "gone.pdf"]
    for file in ("gone.json", "gone.pdf"):
        assert main(["check-certificate", file]) == Exit.OK
        assert "1 document erased by entry" in capsys.readouterr().out
    assert main(["check-certificate", "policy"]) == Exit.DAMAGED
    capsys.readouterr()
    assert main(["get", digest]) == Exit.ABSENT
    assert "was erased by this vault, with entry" in capsys.readouterr().err
    assert main(["log", digest]) == Exit.OK
    log = capsys.readouterr().out
    assert all(word in log for word in ("registered", "held", "released", "erased"))
    (tmp_path / "other").write_bytes(os.urandom(2_000))
    assert main(["put", "other"]) == Exit.OK
    other = capsys.readouterr().out.split()[0]
    assert main(["retain", other, "--until", "2070-12-31"]) == Exit.OK
    assert "until 2070-12-31" in capsys.readouterr().out  # its last day, as it was said
    assert main(["retain", other, "--until", "1y"]) == Exit.OK
    assert "is kept until 2070-12-31 already" in capsys.readouterr().err
    assert main(["certificate", "--all", "--json"]) == Exit.OK
    assert digest in [document["sha256"] for each in json.loads(capsys.readouterr().out)["ended"] for document in each["documents"]]


# -- the institution, and two persons


def operate(trial: LocalConsortium, name: str, *words: str, code: int = 0) -> None:
    assert storenode(["--home", str(trial.home(name)), "--json", *words]) == code


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


def test_what_an_institution_holds_its_vault_cannot_release(
    trial: LocalConsortium, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSHARD_HOME", str(trial.vault_home))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scan").write_bytes(os.urandom(20_000))
    assert main(["put", "scan"]) == Exit.OK
    digest = capsys.readouterr().out.split()[0]
    assert main(["kept", digest, "--json"]) == Exit.OK
    file_id = told(capsys)["kept"][0]["file_id"]
    operate(trial, "hospital-03", "hold", file_id, "--yes", code=4)
    assert "the institution that vouches for the owner" in capsys.readouterr().err
    operate(trial, "hospital-01", "hold", file_id, "--yes")
    entry = told(capsys)["held"][0]["hold"]
    assert main(["kept", digest]) == Exit.OK
    assert f"hold {entry}" in capsys.readouterr().out
    assert main(["erase", digest, "--yes"]) == Exit.REFUSED
    assert main(["release", digest]) == Exit.REFUSED
    assert "storenode release" in capsys.readouterr().err
    operate(trial, "hospital-01", "release", file_id, "--yes")
    assert told(capsys)["released"][0]["hold"] == entry
    operate(trial, "hospital-01", "release", file_id, "--yes", code=3)
    assert main(["erase", digest, "--yes"]) == Exit.OK
    capsys.readouterr()
    assert main(["log", digest, "--json"]) == Exit.OK
    happened = json.loads(capsys.readouterr().out)["log"]
    assert [each["what"] for each in happened] == ["registered", "held", "released", "erased"]
    operate(trial, "hospital-01", "hold", "00" * 32, "--yes", code=3)  # a file that nobody knows
    assert "not registered" in capsys.readouterr().err


@pytest.fixture
def two_keepers(trial: LocalConsortium, capsys: pytest.CaptureFixture[str]) -> tuple[Path, Path]:
    """Homes of two keepers of what the insurer's vaults own, as a quorum of institutions has signed."""
    homes = trial.folder / "alice", trial.folder / "bob"
    for home in homes:
        asyncio.run(Vault.join(home, trial.invite("insurer-02"), passphrase, fast_kdf=True))
    keys = ",".join(asyncio.run(key_of(home)).hex() for home in homes)
    capsys.readouterr()
    operate(trial, "insurer-02", "roster", "propose", "--keepers", f"insurer-02={keys}", "--yes")
    change = told(capsys)
    assert any("two keepers must want each hold and release" in text for text in change["changes"])
    for name in ("hospital-01", "hospital-03", "insurer-04"):
        operate(trial, name, "roster", "sign", change["sha256"], "--yes")
    assert told(capsys)["in_effect"]
    links = [trial.home(name) / "data" / "rosters" / f"{1:08}.link" for name in trial.names]
    deadline = time.monotonic() + 60
    while not all(link.exists() for link in links):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return homes


async def key_of(home: Path) -> bytes:
    async with Vault.open(home, passphrase) as vault:
        return vault.keys.public


async def by_hand(trial: LocalConsortium, body: Hold | Release) -> None:
    """The institution's CA key says this to the ledger, past its own command's refusal."""
    office = await asyncio.to_thread(Office.open, trial.home("insurer-02"))
    seal = office.seal(None)
    entry = seal.hold(office.roster, body.file_id) if isinstance(body, Hold) else seal.release(office.roster, body.hold)
    await asyncio.to_thread(office.append, entry)


async def late_hold(two_keepers: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that holds a file of its own is no second person of another's proposal that has expired."""
    async with Vault.open(two_keepers[0], passphrase) as alice, Vault.open(two_keepers[1], passphrase) as bob:
        (digest,) = await put(alice, tmp_path / "own", 3_000)
        (file_id,) = [each.file_id for each in await alice.custody.standing([digest])]
        (old,) = await bob.keepers.propose(Type.HOLD, [file_id])

        async def open_now(*entries: int) -> bool:
            return [each.index for each in await alice.keepers.open() if each.file_id == file_id] == list(entries)

        async with asyncio.timeout(30):
            while not await open_now(old.index):
                await asyncio.sleep(0.1)
        with monkeypatch.context() as late:
            late.setattr(keepers, "proposal_s", -1)
            (kept,) = await alice.custody.hold([digest])
        assert kept.holds == ()
        async with asyncio.timeout(30):
            while not (await open_now(kept.waiting) and kept.waiting > old.index):
                await asyncio.sleep(0.1)
                (kept,) = await alice.custody.standing([digest])
        await bob.keepers.refuse([kept.waiting])


def test_with_keepers_one_person_alone_holds_and_releases_nothing(
    trial: LocalConsortium,
    two_keepers: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", passphrase)
    alice, bob = map(str, two_keepers)
    nonce = os.urandom(16)

    async def prepare() -> FileId:
        async with Vault.open(trial.folder / "insurer", passphrase) as insurer:
            (digest,) = await put(insurer, tmp_path / "policy", 30_000)
            with pytest.raises(Refused, match="two keepers of insurer-02"):
                await insurer.custody.hold([digest])
            return (await insurer.custody.standing([digest]))[0].file_id

    async def alone(home: str, body: Hold | Release) -> None:
        async with Vault.open(Path(home), passphrase) as keeper:
            with pytest.raises(Refused, match="two keepers"):
                await keeper._ledger.append([body])
        with pytest.raises(Refused):
            await by_hand(trial, body)

    def settled(*, proposed: list[int], held: int) -> list[bytes]:
        """Wait until nodes that heard it later tell so too; the holds."""

        async def look() -> list[bytes]:
            async with Vault.open(Path(alice), passphrase) as keeper:
                for _ in range(300):
                    found = [each.index for each in await keeper.keepers.open() if each.file_id == file_id]
                    holds = list((await keeper.keepers.standing(file_id)).holds)
                    if (found, len(holds)) == (proposed, held):
                        return holds
                    await asyncio.sleep(0.1)
            raise AssertionError(f"{found}, {holds}")

        return asyncio.run(look())

    def proposal(home: str, what: str) -> int:
        assert main(["--home", home, "proposals", what, file_id.hex(), "--json"]) == Exit.OK
        return int(told(capsys)["proposed"][0]["entry"])

    file_id = asyncio.run(prepare())
    entry = proposal(alice, "hold")
    asyncio.run(alone(alice, Hold(file_id, nonce)))
    assert settled(proposed=[entry], held=0) == []
    assert main(["--home", alice, "proposals", "approve", str(entry)]) == Exit.REFUSED
    assert main(["--home", bob, "proposals", "ls"]) == Exit.OK
    shown = capsys.readouterr().out
    assert f"entry {entry}  hold  by {asyncio.run(key_of(two_keepers[0])).hex()[:16]}…  until 20" in shown
    with monkeypatch.context() as late:  # a fortnight later
        late.setattr(keepers, "proposal_s", -1)
        assert main(["--home", bob, "proposals", "approve", str(entry)]) == Exit.REFUSED
        assert "Propose it anew" in capsys.readouterr().err
        assert main(["--home", bob, "proposals", "ls"]) == Exit.OK
        assert "expired on" in capsys.readouterr().out
        settled(proposed=[entry], held=0)
        entry = proposal(alice, "hold")
    settled(proposed=[entry], held=0)
    assert main(["--home", bob, "proposals", "approve", str(entry)]) == Exit.OK
    (hold,) = settled(proposed=[], held=1)
    operate(trial, "insurer-02", "release", file_id.hex(), "--yes", code=4)
    assert "medshard proposals" in capsys.readouterr().err

    async def destroy() -> None:
        async with Vault.open(trial.folder / "insurer", passphrase) as insurer:
            await insurer.custody.end([sha256((tmp_path / "policy" / "letter-0").read_bytes()).digest()])

    with pytest.raises(Refused, match="on hold"):
        asyncio.run(destroy())
    entry = proposal(bob, "release")
    asyncio.run(alone(bob, Release(hold, nonce)))
    settled(proposed=[entry], held=1)
    assert main(["--home", alice, "proposals", "refuse", str(entry)]) == Exit.OK
    settled(proposed=[], held=1)
    assert main(["--home", alice, "proposals", "approve", str(entry)]) == Exit.ABSENT
    entries = [proposal(home, "release") for home in (alice, bob)]
    settled(proposed=entries, held=1)
    assert main(["--home", bob, "proposals", "approve", str(entries[0])]) == Exit.OK
    settled(proposed=[], held=0)
    asyncio.run(destroy())
    asyncio.run(late_hold(two_keepers, tmp_path, monkeypatch))
