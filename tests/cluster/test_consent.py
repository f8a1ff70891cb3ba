"""Asking and being asked, on six real nodes: a request gives no right, an approval exactly the right that was asked for."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

from medshard import Vault
from medshard.cli.exits import Exit
from medshard.cli.main import main
from medshard.consent import Consents, Wish
from medshard.consortium import LocalConsortium
from medshard_protocol.entries import Purpose
from medshard_protocol.errors import Absent, Conflict, Malformed, MedshardError, Refused

passphrase = "three words suffice"


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("consent")) as consortium:
        code = consortium.invite("insurer-02")
        asyncio.run(Vault.join(consortium.folder / "doctor", code, passphrase, fast_kdf=True))
        yield consortium


@pytest.fixture
async def vaults(trial: LocalConsortium) -> AsyncIterator[tuple[Vault, Vault]]:
    """Owner and asker."""
    async with AsyncExitStack() as stack:
        owner = await stack.enter_async_context(Vault.open(trial.vault_home, trial.passphrase))
        asker = await stack.enter_async_context(Vault.open(trial.folder / "doctor", passphrase))
        for vault in (owner, asker):
            await vault.shares.publish_key()
        yield owner, asker


async def put(vault: Vault, path: Path, number: str) -> bytes:
    path.write_bytes(os.urandom(4_000))
    (stored,) = (await vault.put([path], policy_number=number)).stored
    return stored.sha256


async def test_a_request_gives_no_right_and_an_approval_the_one_that_was_asked_for(vaults: tuple[Vault, Vault], tmp_path: Path) -> None:
    owner, asker = vaults
    wanted, other = await put(owner, tmp_path / "a", "R-1"), await put(owner, tmp_path / "b", "R-2")
    until = int(time.time()) + 3600
    sent = await Consents(asker).ask(owner.keys.public, Wish(policy_number="R-1", purpose=Purpose.RESEARCH, until=until, message="Bitte"))
    (request,) = [each for each in await Consents(owner).requests() if each.sha256 == sent]
    assert (request.asker, request.wish.message, request.answer) == (asker.keys.public, "Bitte", "")
    assert [row.sha256 for row in Consents(owner).meeting(request)] == [wanted]
    with pytest.raises(MedshardError):
        await asker.get(wanted, tmp_path / "no")
    (granted,) = await Consents(owner).approve(sent)
    assert (granted.sha256, granted.until, granted.purpose) == (wanted, until, "research")
    await asker.get(wanted, tmp_path / "yes", purpose=Purpose.RESEARCH)
    with pytest.raises(MedshardError):
        await asker.get(other, tmp_path / "no")
    (own,) = [each for each in await Consents(asker).requests() if each.sha256 == sent]
    assert (own.answer, own.files) == ("approved", 1)
    with pytest.raises(Conflict):
        await Consents(owner).approve(sent)
    assert [each.sha256 for each in await Consents(owner).standing()] == [wanted]
    used = await Consents(owner).usage(Purpose.RESEARCH)
    assert [(each.reader, each.purpose, each.reads, each.files) for each in used] == [(asker.keys.public, "research", 1, 1)]
    assert await Consents(owner).usage(Purpose.TREATMENT) == []


async def test_a_refusal_is_told_and_nothing_is_granted(vaults: tuple[Vault, Vault], tmp_path: Path) -> None:
    owner, asker = vaults
    await put(owner, tmp_path / "a", "N-1")
    before = len(await Consents(owner).standing())
    sent = await Consents(asker).ask(owner.keys.public, Wish(policy_number="N-1"))
    await Consents(owner).refuse(sent, "not without the patient")
    (own,) = [each for each in await Consents(asker).requests() if each.sha256 == sent]
    assert (own.answer, own.why) == ("refused", "not without the patient")
    assert len(await Consents(owner).standing()) == before
    with pytest.raises(Absent):
        await Consents(asker).approve(sent)  # one does not approve oneself
    empty = await Consents(asker).ask(owner.keys.public, Wish(patient="nobody of that name"))
    with pytest.raises(Absent, match="no file"):
        await Consents(owner).approve(empty)


async def test_nobody_answers_for_whom_was_asked(trial: LocalConsortium, vaults: tuple[Vault, Vault], tmp_path: Path) -> None:
    owner, asker = vaults
    await put(owner, tmp_path / "a", "S-1")
    sent = await Consents(asker).ask(owner.keys.public, Wish(policy_number="S-1"))
    (request,) = [each for each in await Consents(owner).requests() if each.sha256 == sent]
    await Vault.join(trial.folder / "stranger", trial.invite("hospital-03"), passphrase, fast_kdf=True)
    async with Vault.open(trial.folder / "stranger", passphrase) as stranger:
        for deceived in (owner, asker):
            to = replace(request, asker=deceived.keys.public)
            await Consents(stranger)._answer(to, approved=False, why="go away", files=0)
    for vault in (owner, asker):
        assert [each.answer for each in await Consents(vault).requests() if each.sha256 == sent] == [""]
    assert len(await Consents(owner).approve(sent)) == 1
    assert [each.answer for each in await Consents(asker).requests() if each.sha256 == sent] == ["approved"]


async def test_research_gets_copies_that_say_nothing_of_whom_and_the_owner_an_account_of_their_use(
    vaults: tuple[Vault, Vault], tmp_path: Path
) -> None:
    owner, asker = vaults
    folder = tmp_path / "study"
    folder.mkdir()
    scans = {name: folder / f"{name}.dcm" for name in ("CT", "MR")}
    for name, path in scans.items():
        scan = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
        scan.Modality, scan.PatientName = name, "Doe^Jane"
        scan.SOPInstanceUID = scan.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        scan.StudyInstanceUID = "1.2.3.4.5"
        scan.SeriesInstanceUID = generate_uid()
        scan.save_as(path)
    await owner.put([folder])
    await put(owner, tmp_path / "letter", "R-9")
    wish = Wish(modality="CT", purpose=Purpose.RESEARCH, deidentified=True)
    sent = await Consents(asker).ask(owner.keys.public, wish)
    (request,) = [each for each in await Consents(owner).requests() if each.sha256 == sent]
    assert (request.wish, len(Consents(owner).meeting(request))) == (wish, 1)
    with pytest.raises(Refused, match="no DICOM original"):
        await Consents(owner).approve(sent, [sha256((tmp_path / "letter").read_bytes()).digest()])
    (granted,) = await Consents(owner).approve(sent)
    await asker.get(granted.sha256, tmp_path / "copy.dcm", purpose=Purpose.RESEARCH)
    copy = pydicom.dcmread(tmp_path / "copy.dcm")
    assert (copy.Modality, copy.PatientIdentityRemoved) == ("CT", "YES")
    assert b"Doe" not in (tmp_path / "copy.dcm").read_bytes()
    for path in scans.values():
        with pytest.raises(MedshardError):
            await asker.get(sha256(path.read_bytes()).digest(), tmp_path / "no")
    (read,) = [each for each in await Consents(owner).reads(Purpose.RESEARCH) if each.grant == granted.grant_index]
    assert (read.reader, read.file_ids) == (asker.keys.public, (granted.file_id,))
    assert any(each.first <= read.entry <= each.last for each in await Consents(owner).usage(Purpose.RESEARCH))


async def test_a_wish_that_makes_no_sense_is_malformed(vaults: tuple[Vault, Vault]) -> None:
    owner, asker = vaults
    with pytest.raises(Malformed):
        await Consents(asker).ask(owner.keys.public, Wish(study_date="someday"))
    with pytest.raises(Malformed):
        await Consents(asker).ask(owner.keys.public, Wish(message="x" * 1000))


def test_the_commands_do_the_same(trial: LocalConsortium, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", passphrase)
    owner, asker = trial.vault_home, trial.folder / "doctor"

    def run(home: Path, *words: str) -> tuple[int, str]:
        monkeypatch.setenv("MEDSHARD_PASSPHRASE", trial.passphrase if home == owner else passphrase)
        code = main(["--home", str(home), *words])
        told = capsys.readouterr()
        return code, told.out if code == Exit.OK else told.err

    (tmp_path / "policy").write_bytes(os.urandom(900))
    assert run(owner, "put", "--policy-number", "CLI-9", str(tmp_path / "policy"))[0] == Exit.OK
    key = run(owner, "key")[1].split()[0]
    code, told = run(asker, "request", "--from", key, "--policy-number", "CLI-9", "--purpose", "insurance", "--message", "claim")
    assert code == Exit.OK
    sent = told.strip()
    assert "1 file" in run(owner, "requests", "ls")[1]
    assert run(owner, "requests", "approve", sent)[0] == Exit.USAGE
    assert run(owner, "requests", "approve", sent, "--yes")[0] == Exit.OK
    assert "approved" in run(asker, "requests", "ls")[1]
    assert "insurance" in run(owner, "consents", "ls")[1]
    assert run(owner, "consents", "usage", "--csv", str(tmp_path / "use.csv"))[0] == Exit.OK
    assert (tmp_path / "use.csv").read_text().startswith("month,reader")
    assert "usage" in json.loads(run(owner, "consents", "usage", "--json")[1])
    assert run(asker, "request", "--from", key, "--study-date", "someday")[0] == Exit.USAGE
