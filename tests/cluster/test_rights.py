"""Rights against real nodes: shared, read, written down, taken back, refused. Three vaults of three institutions, four nodes."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import UID
from tests.cluster.hearing import heard_everywhere, wait_for_every_shard

from medshard import Vault
from medshard.cli.exits import Exit
from medshard.cli.main import main
from medshard.consortium import LocalConsortium, standing_reason
from medshard.envelopes import seal_reason
from medshard.grants import Happened
from medshard.rights import Rights
from medshard_protocol.entries import Access, Grant, Purpose
from medshard_protocol.errors import Absent, Damaged, Malformed, Refused, Unavailable
from medshard_protocol.ids import FileId
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import pack_small_reads, shard_path, unpack_shards
from medshard_protocol.rights import Reason, reason_in
from medshard_protocol.roster import Node
from medshard_protocol.sharing import access_header, emergency_header, pack_emergency

passphrase = "three words suffice"
small, large = 30_000, 9_000_000


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("rights"), institutions=4) as consortium:
        for node, name in (("insurer-02", "insurer"), ("hospital-03", "stranger")):
            code = consortium.invite(node)
            asyncio.run(Vault.join(consortium.folder / name, code, passphrase, fast_kdf=True))
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
async def vaults(trial: LocalConsortium) -> AsyncIterator[tuple[Vault, Vault, Vault]]:
    """Owner, insurer, stranger."""
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(Vault.open(trial.vault_home, trial.passphrase))]
        for name in ("insurer", "stranger"):
            opened.append(await stack.enter_async_context(Vault.open(trial.folder / name, passphrase)))
        yield opened[0], opened[1], opened[2]


async def stored(vault: Vault, folder: Path, size: int = small, name: str = "file.bin") -> bytes:
    path = folder / name
    path.write_bytes(os.urandom(size))
    (report,) = (await vault.put([path])).stored
    return report.sha256


async def read(vault: Vault, digest: bytes, folder: Path) -> bytes:
    back = folder / "back"
    back.unlink(missing_ok=True)
    await vault.get(digest, back)
    return back.read_bytes()


async def assert_reads(vault: Vault, digest: bytes, folder: Path) -> None:
    assert sha256(await read(vault, digest, folder)).digest() == digest


async def refusal(vault: Vault, digest: bytes, folder: Path) -> Reason | None:
    """Why a read that is announced anew is refused."""
    vault._reader.tickets.expire()
    with pytest.raises(Refused) as caught:
        await read(vault, digest, folder)
    return reason_in(str(caught.value))


async def told(vault: Vault, digest: bytes) -> list[str]:
    await heard_everywhere(vault)
    return [each.what for each in await vault.shares.log(digest)]


async def manifest_of(vault: Vault, digest: bytes) -> Manifest:
    manifest, _ = await vault.evidence(digest)
    return manifest


async def ask(vault: Vault, manifest: Manifest, headers: dict[str, str]) -> bytes:
    """Ask a holder for its shard as a client of one's own making would."""
    node = vault.roster.node(manifest.shards[0].node)
    async with vault._net._open(node, "GET", shard_path(manifest.file_id, 0), None, headers, 10.0) as response:
        data = await response.read()
        if response.status != 200:
            from medshard_protocol.messages import unpack_error

            raise unpack_error(response.status, data, node.name)
        return data


async def why_not(vault: Vault, manifest: Manifest, headers: dict[str, str]) -> Reason | None:
    with pytest.raises(Refused) as caught:
        await ask(vault, manifest, headers)
    return reason_in(str(caught.value))


# Share, read, revoke


@pytest.mark.parametrize("size", [small, large])
async def test_a_shared_file_is_read_written_down_and_refused_after_it_was_taken_back(
    vaults: tuple[Vault, Vault, Vault], tmp_path: Path, size: int
) -> None:
    owner, insurer, stranger = vaults
    digest = await stored(owner, tmp_path, size)
    with pytest.raises(Absent):
        await read(insurer, digest, tmp_path)
    (shared,) = await owner.shares.share([digest], insurer.keys.public, purpose=Purpose.INSURANCE)
    await assert_reads(insurer, digest, tmp_path)
    with pytest.raises(Absent):
        await read(stranger, digest, tmp_path)
    (ended,) = await owner.shares.revoke([digest], insurer.keys.public)
    assert ended.grant == shared.grant
    assert await refusal(insurer, digest, tmp_path) is Reason.REVOKED
    await assert_reads(owner, digest, tmp_path)
    await heard_everywhere(owner)
    log = await owner.shares.log(digest)
    attempt = "tried to read without a right"
    assert [each.what for each in log] == ["registered", "granted", "read", "revoked", attempt, "read"]
    assert all(each.exact and abs(each.time - time.time()) < 60 for each in log)
    granted, access, tried = log[1], log[2], log[4]
    assert (granted.reader, granted.purpose) == (insurer.keys.public, "insurance")
    assert (access.author, access.institution, access.grant_index) == (insurer.keys.public, "insurer-02", granted.index)
    assert tried.author == insurer.keys.public


async def test_what_a_reader_was_given_is_found_and_listed_until_it_is_taken_back(
    vaults: tuple[Vault, Vault, Vault], tmp_path: Path
) -> None:
    owner, insurer, _ = vaults
    digest = await stored(owner, tmp_path, name="policy-7.txt")
    await owner.shares.share([digest], insurer.keys.public)
    listed = [each for each in await insurer.shares.all() if each.sha256 == digest]
    assert [(each.given, each.peer, each.ended) for each in listed] == [(False, owner.keys.public, 0)]
    (row,) = [row for row in insurer.ls(shared=True) if row.sha256 == digest]
    assert (row.name, row.owner) == (b"policy-7.txt", owner.keys.public)
    assert digest not in {row.sha256 for row in insurer.ls()}
    await owner.shares.revoke([digest], insurer.keys.public)
    await heard_everywhere(owner)
    listed = [each for each in await insurer.shares.all() if each.sha256 == digest]
    assert all(each.ended for each in listed)
    assert digest not in {row.sha256 for row in insurer.ls(shared=True)}
    mine = [each for each in await owner.shares.all() if each.sha256 == digest]
    assert all(each.given and each.ended for each in mine)


async def test_without_their_indexes_owner_and_reader_know_again_what_is_shared(vaults: tuple[Vault, Vault, Vault], tmp_path: Path) -> None:
    owner, insurer, _ = vaults
    kept, ended = await stored(owner, tmp_path, name="kept"), await stored(owner, tmp_path, name="ended")
    await owner.shares.share([kept], insurer.keys.public, purpose=Purpose.LEGAL)
    await owner.shares.share([ended], insurer.keys.public)
    await owner.shares.revoke([ended], insurer.keys.public)
    before = [known for known in owner._index.grants() if known.given]
    await heard_everywhere(owner)
    await owner.reindex()
    assert [known for known in owner._index.grants() if known.given] == before
    await insurer.reindex()
    assert kept in {row.sha256 for row in insurer.ls(shared=True)}
    assert ended not in {row.sha256 for row in insurer.ls(shared=True)}
    await assert_reads(insurer, kept, tmp_path)


async def test_an_expired_grant_is_refused_by_the_cosigners_clock(vaults: tuple[Vault, Vault, Vault], tmp_path: Path) -> None:
    owner, insurer, _ = vaults
    digest = await stored(owner, tmp_path)
    until = int(time.time()) + 6
    await owner.shares.share([digest], insurer.keys.public, until=until)
    await assert_reads(insurer, digest, tmp_path)
    await asyncio.sleep(until + 1.5 - time.time())
    await stored(owner, tmp_path, name="another")  # so that the ledger has a head from after that time
    assert await refusal(insurer, digest, tmp_path) is Reason.ENDED


async def test_only_the_owner_shares(vaults: tuple[Vault, Vault, Vault], tmp_path: Path) -> None:
    owner, insurer, stranger = vaults
    digest = await stored(owner, tmp_path)
    await owner.shares.share([digest], insurer.keys.public)
    await assert_reads(insurer, digest, tmp_path)
    with pytest.raises(Refused, match="only its owner"):
        await insurer.shares.share([digest], stranger.keys.public)
    file_id = (await manifest_of(owner, digest)).file_id
    with pytest.raises(Refused):  # nor does the ledger take such an entry from a client of one's own making
        await insurer._ledger.append([Grant((file_id,), stranger.keys.public, 0, 0, os.urandom(16))])


async def test_a_key_that_nobody_enrolled_is_no_reader(vaults: tuple[Vault, Vault, Vault], tmp_path: Path) -> None:
    owner, _, _ = vaults
    digest = await stored(owner, tmp_path)
    with pytest.raises(Refused, match="no institution vouches"):
        await owner.shares.share([digest], type(owner.keys.public)(os.urandom(32)))


async def test_sharing_again_makes_no_second_grant_and_revoking_one_of_two_files_keeps_the_other(
    vaults: tuple[Vault, Vault, Vault], tmp_path: Path
) -> None:
    owner, insurer, _ = vaults
    one, two = await stored(owner, tmp_path, name="one"), await stored(owner, tmp_path, name="two")
    first = await owner.shares.share([one, two], insurer.keys.public)
    assert len({each.grant for each in first}) == 1  # one entry for both
    again = await owner.shares.share([two, one], insurer.keys.public)
    assert {each.grant for each in again} == {each.grant for each in first}
    await assert_reads(insurer, one, tmp_path)
    await owner.shares.revoke([one], insurer.keys.public)
    await assert_reads(insurer, two, tmp_path)
    assert await refusal(insurer, one, tmp_path) is Reason.REVOKED
    await owner.shares.revoke([two], insurer.keys.public)
    assert await refusal(insurer, two, tmp_path) is Reason.REVOKED


# Packs


async def test_a_member_of_a_pack_is_shared_without_its_neighbours(vaults: tuple[Vault, Vault, Vault], tmp_path: Path) -> None:
    owner, insurer, _ = vaults
    folder = tmp_path / "letters"
    folder.mkdir()
    for number in range(3):
        (folder / f"letter-{number}.txt").write_bytes(os.urandom(2_000))
    await owner.put([folder])
    digests = [sha256(path.read_bytes()).digest() for path in sorted(folder.iterdir())]
    pack = (await manifest_of(owner, digests[0])).file_id
    (shared,) = await owner.shares.share([digests[1]], insurer.keys.public)
    assert shared.copied
    assert shared.file_id != pack
    await assert_reads(insurer, digests[1], tmp_path)
    (row,) = [row for row in insurer.ls(shared=True) if row.file_id == shared.file_id]
    assert (row.name, row.member) == (b"letters/letter-1.txt", None)
    for neighbour in (digests[0], digests[2]):
        with pytest.raises(Absent):
            await read(insurer, neighbour, tmp_path)
    assert sum(row.sha256 == digests[1] for row in owner.ls()) == 1  # the copy is no second file to its owner
    assert not list(owner.home.folder.glob(".sharing-*"))  # and its plaintext did not stay on the disk
    await heard_everywhere(owner)
    assert "read" in [each.what for each in await owner.shares.log(digests[1]) if each.author == insurer.keys.public]
    await owner.shares.revoke([digests[1]], insurer.keys.public)
    assert await refusal(insurer, digests[1], tmp_path) is Reason.REVOKED


async def test_a_pack_of_which_every_member_is_shared_is_shared_as_it_is(vaults: tuple[Vault, Vault, Vault], tmp_path: Path) -> None:
    owner, insurer, _ = vaults
    folder = tmp_path / "series"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_bytes(os.urandom(2_000))
    await owner.put([folder])
    digests = [sha256(path.read_bytes()).digest() for path in folder.iterdir()]
    shared = await owner.shares.share(digests, insurer.keys.public)
    assert {each.file_id for each in shared} == {(await manifest_of(owner, digests[0])).file_id}
    assert not any(each.copied for each in shared)
    for digest in digests:
        await assert_reads(insurer, digest, tmp_path)


# Announced first


async def test_one_entry_announces_a_whole_folder_and_comes_before_its_first_byte(
    vaults: tuple[Vault, Vault, Vault], tmp_path: Path
) -> None:
    owner, _, _ = vaults
    digests = [await stored(owner, tmp_path, size, f"{size}") for size in (1_000, 50_000, 5_000_000)]
    (tmp_path / "out").mkdir()
    await owner.get_many(digests, tmp_path / "out", purpose=Purpose.TREATMENT)
    logs = [await owner.shares.log(digest) for digest in digests]
    accesses = {each.index: each for log in logs for each in log if each.what == "read"}
    assert len(accesses) == 1
    (access,) = accesses.values()
    assert (len(access.file_ids), access.purpose) == (3, "treatment")


async def test_without_an_access_entry_no_byte_of_a_shard_leaves(vaults: tuple[Vault, Vault, Vault], tmp_path: Path) -> None:
    owner, insurer, _ = vaults
    digest = await stored(owner, tmp_path)
    manifest = await manifest_of(owner, digest)
    assert await why_not(owner, manifest, {}) is Reason.NO_ENTRY
    assert await why_not(insurer, manifest, {}) is Reason.NO_ENTRY
    node = owner.roster.node(manifest.shards[0].node)
    with pytest.raises(Refused):
        unpack_shards(await owner._net.call(node, "POST", "/v1/read", pack_small_reads([(manifest.file_id, 0)]), timeout_s=5.0), 1)


async def test_a_ticket_opens_its_own_file_for_its_own_reader_alone(vaults: tuple[Vault, Vault, Vault], tmp_path: Path) -> None:
    owner, insurer, _ = vaults
    one, two = await stored(owner, tmp_path, name="one"), await stored(owner, tmp_path, name="two")
    first, second = await manifest_of(owner, one), await manifest_of(owner, two)
    (mine,) = await owner._ledger.append([Access((first.file_id,), 0, b"", os.urandom(16))])
    (theirs,) = await insurer._ledger.append([Access((first.file_id,), 0, b"", os.urandom(16))])
    await heard_everywhere(owner)
    assert len(await ask(owner, first, {access_header: str(mine.index)})) > 0
    assert await why_not(owner, second, {access_header: str(mine.index)}) is Reason.OTHER_FILE
    assert await why_not(insurer, first, {access_header: str(mine.index)}) is Reason.OTHER_READER
    assert await why_not(insurer, first, {access_header: str(theirs.index)}) is Reason.NEVER_GRANTED
    assert await why_not(owner, first, {access_header: str(theirs.index + 10_000)}) is Reason.NOT_IN_MIRROR
    assert await why_not(owner, first, {access_header: "0"}) is Reason.NOT_AN_ACCESS


async def test_an_expired_ticket_is_replaced_once_and_the_read_goes_on(
    vaults: tuple[Vault, Vault, Vault], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten minutes are not waited for here: a holder says it of the first ticket that it is shown."""
    owner, _, _ = vaults
    for size in (small, large):
        digest = await stored(owner, tmp_path, size)
        await assert_reads(owner, digest, tmp_path)
        file_id = (await manifest_of(owner, digest)).file_id
        held = owner._reader.tickets._held
        stale = held[file_id, 0].inclusion
        tickets = owner._reader.tickets
        (made,) = await tickets.announce([file_id], 0)
        node = owner.roster.nodes[0]
        assert await made.helped(node, Refused("the access entry is too old (entry 7)"), 1)
        assert held is not tickets._held or tickets._held[file_id, 0].inclusion.index > stale.index
        assert not await made.helped(node, Refused("the access entry is too old (entry 7)"), 3)


async def test_a_grant_of_another_consortium_is_worth_nothing(
    vaults: tuple[Vault, Vault, Vault], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    owner, insurer, _ = vaults
    digest = await stored(owner, tmp_path)
    (shared,) = await owner.shares.share([digest], insurer.keys.public)
    history = await owner.shares._rights.history(FileId(shared.file_id))
    grant = history.entries[shared.grant_index]
    with LocalConsortium(tmp_path_factory.mktemp("another"), institutions=4, code=(2, 4)) as other:
        async with Vault.open(other.vault_home, other.passphrase) as elsewhere:
            assert elsewhere.roster.origin != owner.roster.origin
            with pytest.raises(Refused):
                await elsewhere._ledger.append_signed([grant])


# Emergencies


async def test_without_a_quorum_an_emergency_identity_reads_with_a_reason_and_it_stands_in_the_log_later(
    trial: LocalConsortium, vaults: tuple[Vault, Vault, Vault], tmp_path: Path
) -> None:
    owner, insurer, _ = vaults
    digest = await stored(owner, tmp_path)
    await owner.shares.share([digest], insurer.keys.public)
    await assert_reads(insurer, digest, tmp_path)
    manifest = await manifest_of(owner, digest)
    sealed = seal_reason(owner.roster.auditors, owner.roster.origin, "none")
    early = owner._ledger.sign(Access((manifest.file_id,), Purpose.EMERGENCY, sealed, os.urandom(16)))
    assert await why_not(owner, manifest, {emergency_header: pack_emergency(early)}) is Reason.WITHIN_REACH
    await heard_everywhere(owner)
    victims = trial.names[1::2]
    for name in victims:
        trial.kill(name)
    report = await owner.get(digest, tmp_path / "back", break_glass="patient unconscious")
    assert not report.recorded
    assert sha256((tmp_path / "back").read_bytes()).digest() == digest
    insurer._reader.tickets.expire()
    with pytest.raises(Unavailable, match="2 of 4 institutions answer, 3 are needed") as caught:
        await read(insurer, digest, tmp_path)
    assert all(name in caught.value.hint for name in victims)
    assert "not marked for emergencies" in caught.value.hint
    with pytest.raises(Unavailable):
        await insurer.get(digest, tmp_path / "no", break_glass="I would like to")
    await asyncio.gather(*(asyncio.to_thread(trial.restart, name) for name in victims))
    flagged = await until_flagged(owner, digest)  # by the nodes that served it: this vault has appended nothing
    assert (flagged.author, flagged.sealed_reason, flagged.purpose) == (owner.keys.public, True, "emergency")
    from medshard import auditors

    key = auditors.load(trial.auditors_key, trial.passphrase)
    audited = [each for each in await owner.shares.audit(key) if each.index == flagged.index]
    assert [each.reason for each in audited] == ["patient unconscious"]
    assert owner._pending() != []
    await assert_reads(owner, digest, tmp_path)  # appends it too, which changes nothing: it is the same entry
    assert owner._pending() == []
    assert (await told(owner, digest)).count("read in an emergency") == 1


async def until_flagged(vault: Vault, digest: bytes) -> Happened:
    deadline = time.monotonic() + 60
    while True:
        for each in await vault.shares.log(digest):
            if each.what == "read in an emergency":
                return each
        assert time.monotonic() < deadline, "the emergency read was never written down"
        await asyncio.sleep(0.5)


async def test_a_trial_breaks_the_glass_by_itself(trial: LocalConsortium, vaults: tuple[Vault, Vault, Vault], tmp_path: Path) -> None:
    owner, _, _ = vaults
    digest = await stored(owner, tmp_path, large)
    await heard_everywhere(owner)
    for name in trial.names[:2]:
        trial.kill(name)
    report = await owner.get(digest, tmp_path / "back")
    assert not report.recorded
    assert owner.home.standing_reason() == standing_reason
    verified = await owner.verify(digest)
    assert {holder.state for holder in verified.holders} == {"unproven", "unreachable"}
    assert not verified.ok


# The log


async def test_a_node_that_hides_a_read_hides_nothing(
    vaults: tuple[Vault, Vault, Vault], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, insurer, _ = vaults
    digest = await stored(owner, tmp_path)
    await owner.shares.share([digest], insurer.keys.public)
    await assert_reads(insurer, digest, tmp_path)
    await heard_everywhere(owner)
    whole = await told(owner, digest)
    assert "read" in whole
    honest = Rights._history
    for liar in owner.roster.nodes:

        async def lying(self: Rights, node: Node, file_id: FileId, liar: Node = liar) -> Sequence[object]:
            pages = await honest(self, node, file_id)
            if node.id == liar.id:
                return [type(page)(page.checkpoint, page.entries[:1], more=False) for page in pages]
            return pages

        monkeypatch.setattr(Rights, "_history", lying)
        assert await told(owner, digest) == whole


async def test_a_history_that_is_not_proved_is_not_believed(
    vaults: tuple[Vault, Vault, Vault], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, insurer, _ = vaults
    digest = await stored(owner, tmp_path)
    file_id = (await manifest_of(owner, digest)).file_id
    forged = insurer._ledger.sign(Access((file_id,), 0, b"", bytes(16))).to_bytes()
    call = type(owner._net).call

    async def lying(self: object, node: Node, method: str, path: str, *arguments: object, **named: object) -> bytes:
        from medshard_protocol.sharing import History, Told

        answer: bytes = await call(self, node, method, path, *arguments, **named)  # type: ignore[arg-type]
        if "/history/" not in path:
            return answer
        history = History.from_bytes(answer)
        if not history.entries:
            return answer
        invented = Told(history.entries[-1].index + 1, forged, history.entries[-1].path, effective=True)
        return History(history.checkpoint, (*history.entries, invented), more=False).to_bytes()

    monkeypatch.setattr(type(owner._net), "call", lying)
    with pytest.raises(Unavailable, match="0 institutions"):
        await owner.shares.log(digest)


async def test_a_grantee_verifies_and_it_is_written_down_as_operations(vaults: tuple[Vault, Vault, Vault], tmp_path: Path) -> None:
    owner, insurer, _ = vaults
    digest = await stored(owner, tmp_path)
    await owner.shares.share([digest], insurer.keys.public)
    assert (await insurer.verify(digest)).ok
    await heard_everywhere(owner)
    assert [(each.what, each.purpose) for each in await owner.shares.log(digest)][-1] == ("read", "operations")


async def test_a_sealed_key_that_belongs_elsewhere_is_not_taken(
    vaults: tuple[Vault, Vault, Vault], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes exchange the sealed keys of two grants: the reader notices, and reads neither file as the other."""
    owner, insurer, _ = vaults
    from medshard_protocol.sharing import Shared

    one, two = await stored(owner, tmp_path, name="one"), await stored(owner, tmp_path, name="two")
    await owner.shares.share([one, two], insurer.keys.public)
    parse = Shared.from_bytes

    def exchanged(data: bytes) -> Shared:
        from dataclasses import replace

        page = parse(data)
        sealed = [file.sealed for file in page.files]
        return replace(page, files=tuple(replace(file, sealed=other) for file, other in zip(page.files, reversed(sealed), strict=True)))

    monkeypatch.setattr(Shared, "from_bytes", exchanged)
    for digest in (one, two):
        with pytest.raises((Absent, Damaged)):
            await read(insurer, digest, tmp_path)
    monkeypatch.setattr(Shared, "from_bytes", parse)
    for digest in (one, two):
        await assert_reads(insurer, digest, tmp_path)


# The command line


def test_the_commands_from_contact_to_audit(
    trial: LocalConsortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", passphrase)
    monkeypatch.setenv("MEDSHARD_AUDITORS_PASSPHRASE", trial.passphrase)

    def run(home: Path, *words: str, code: int = Exit.OK) -> str:
        monkeypatch.setenv("MEDSHARD_HOME", str(home))
        if home == trial.vault_home:
            monkeypatch.delenv("MEDSHARD_PASSPHRASE", raising=False)
        else:
            monkeypatch.setenv("MEDSHARD_PASSPHRASE", passphrase)
        assert main(list(words)) == code
        read = capsys.readouterr()
        return read.out if code == Exit.OK else read.err

    owner, insurer = trial.vault_home, trial.folder / "insurer"
    Path("policy.txt").write_bytes(os.urandom(500))
    digest = run(owner, "put", "policy.txt").split()[0]
    key = run(insurer, "key").strip()
    run(owner, "contacts", "add", "Insurer Ltd", key)
    assert run(owner, "contacts", "ls").split() == [key, "Insurer", "Ltd"]
    assert "no contact named" in run(owner, "share", digest, "--to", "nobody", code=Exit.ABSENT)
    granted = json.loads(run(owner, "share", digest, "--to", "insurer ltd", "--until", "30d", "--purpose", "insurance", "--json"))["shared"]
    assert [(each["peer_name"], each["purpose"]) for each in granted] == [("Insurer Ltd", "insurance")]
    assert digest in run(insurer, "shared")
    assert digest in run(insurer, "ls", "--shared")
    assert digest in run(insurer, "find", "policy.txt")
    run(insurer, "get", digest, "-o", "back.txt", "--purpose", "legal")
    assert Path("back.txt").read_bytes() == Path("policy.txt").read_bytes()
    deadline = time.monotonic() + 60
    while "by Insurer Ltd (insurer-02)  for legal  under grant" not in run(owner, "log", digest):  # a quorum hears of a read first
        assert time.monotonic() < deadline
    run(owner, "log", digest, "--csv", "log.csv", "--fhir", "log.json")
    assert [line["what"] for line in csv.DictReader(io.StringIO(Path("log.csv").read_text()))] == ["registered", "granted", "read"]
    assert [entry["resource"]["action"] for entry in json.loads(Path("log.json").read_text())["entry"]] == ["C", "U", "R"]
    assert f"grant {granted[0]['grant_index']} ended" in run(owner, "revoke", digest, "--grant", str(granted[0]["grant_index"]))
    assert "revoked" in run(insurer, "get", digest, "-o", "again.txt", code=Exit.REFUSED)
    assert not Path("again.txt").exists()
    audited = json.loads(run(insurer, "log", "--auditor", str(trial.auditors_key), "--json"))["log"]
    assert {each["what"] for each in audited} >= {"registered", "granted", "read", "revoked", "tried to read without a right"}
    run(owner, "contacts", "rm", "Insurer Ltd")
    assert run(owner, "contacts", "ls") == ""


def test_an_auditors_key_is_made_once_and_opens_with_its_passphrase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medshard import auditors

    monkeypatch.setenv("MEDSHARD_AUDITORS_PASSPHRASE", passphrase)
    path = tmp_path / "auditors.key"
    assert main(["auditor-key", "create", str(path)]) == Exit.OK
    public = bytes.fromhex(capsys.readouterr().out.strip())
    assert auditors.load(path, passphrase).public == public
    assert main(["auditor-key", "create", str(path)]) == Exit.REFUSED
    with pytest.raises(Refused, match=str(path)) as refused:
        auditors.load(path, "another")
    assert "MEDSHARD_AUDITORS_PASSPHRASE" in (refused.value.hint or "")
    path.with_name("auditors.pub").write_text(public.hex())
    with pytest.raises(Malformed, match=r"auditors\.pub is no auditors' key file"):
        auditors.load(path.with_name("auditors.pub"), passphrase)


# De-identified copies


async def test_a_deidentified_copy_is_shared_without_its_original(
    trial: LocalConsortium, vaults: tuple[Vault, Vault, Vault], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owner, insurer, _ = vaults
    folder = tmp_path / "study"
    folder.mkdir()
    dataset = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    dataset.StudyInstanceUID, dataset.PatientName = "1.2.3.4.5.6", "Mustermann^Erika"
    for number in (1, 2):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.4.5.6.{number}")
        dataset.save_as(folder / f"{number}.dcm")
    originals = (await owner.put([folder])).stored
    command = ["deidentify", "1.2.3.4.5.6", "--to", insurer.keys.public.hex(), "--json", "--home", str(trial.vault_home)]
    assert await asyncio.to_thread(main, command) == Exit.OK
    said = json.loads(capsys.readouterr().out)
    assert len(said["shared"]) == 2
    assert not said["left_out"]
    for each in said["shared"]:
        copy = await insurer.read(bytes.fromhex(each["sha256"]), 0, 10**6)
        assert b"Mustermann" not in copy
        assert b"1.2.3.4.5.6" not in copy
        assert str(pydicom.dcmread(io.BytesIO(copy)).StudyInstanceUID) == said["study"]
    with pytest.raises(Absent):
        await insurer.read(originals[0].sha256, 0, 10)
    with pytest.raises(Absent):
        await insurer.read(bytes.fromhex(said["link"]), 0, 10)
    link = json.loads(await owner.read(bytes.fromhex(said["link"]), 0, 10**6))
    assert link["original"] == "1.2.3.4.5.6"
    assert {each["original"]["sha256"] for each in link["instances"]} == {stored.sha256.hex() for stored in originals}
    assert {each["copy"]["sha256"] for each in link["instances"]} == {each["sha256"] for each in said["shared"]}
    assert await asyncio.to_thread(main, command) == Exit.OK
    again = json.loads(capsys.readouterr().out)
    assert (again["study"], again["link"]) == (said["study"], said["link"]), "the same copy for the same receiver"
    assert await asyncio.to_thread(main, ["deidentify", "1.2.3.4.5", *command[2:]]) == Exit.ABSENT
    assert not list(trial.vault_home.glob(".copies-*"))
