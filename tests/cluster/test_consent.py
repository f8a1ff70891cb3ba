"""Asking and being asked, on four real nodes: a request gives no right, an approval exactly the right that was asked for."""

from __future__ import annotations

import asyncio
import json
import os
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

from medshard import Vault, consent, rotation
from medshard.cli.exits import Exit
from medshard.cli.main import main
from medshard.consent import Consents, Wish
from medshard.consortium import LocalConsortium
from medshard.home import Home
from medshard.patients import export
from medshard.policies.archive import Policies
from medshard.policies.model import Terms
from medshard_protocol.entries import Purpose
from medshard_protocol.errors import Absent, Conflict, Malformed, MedshardError, Refused, Unavailable

passphrase = "three words suffice"


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("consent"), institutions=4) as consortium:
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


async def test_a_request_gives_no_right_and_an_approval_the_one_that_was_asked_for(
    vaults: tuple[Vault, Vault], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, asker = vaults
    wanted, other = await put(owner, tmp_path / "a", "R-1"), await put(owner, tmp_path / "b", "R-2")
    until = int(time.time()) + 3600
    sent = await Consents(asker).ask(owner.keys.public, Wish(policy_number="R-1", purpose=Purpose.RESEARCH, until=until, message="Bitte"))
    (request,) = [each for each in await Consents(owner).requests() if each.sha256 == sent]
    assert (request.asker, request.wish.message, request.answer) == (asker.keys.public, "Bitte", "")
    assert [row.sha256 for row in Consents(owner).meeting(request)] == [wanted]
    with pytest.raises(MedshardError):
        await asker.get(wanted, tmp_path / "no")
    with monkeypatch.context() as late:
        late.setattr(consent, "request_s", -1)
        with pytest.raises(Conflict, match="can be approved for"):
            await Consents(owner).approve(sent)
    with monkeypatch.context() as early:  # made in two days, as its asker says: to be approved for longer
        early.setattr(consent, "time", SimpleNamespace(time=lambda: time.time() - 2 * 86_400, gmtime=time.gmtime, strftime=time.strftime))
        with pytest.raises(Conflict, match="can be approved for"):
            await Consents(owner).approve(sent)
    with monkeypatch.context() as few:
        few.setattr(consent, "hashes_max", 0)
        with pytest.raises(Malformed, match="1 files meet the request"):
            await Consents(owner).approve(sent)
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


async def test_a_request_from_before_both_sides_had_new_keys_is_answered_and_the_answer_is_heard(
    trial: LocalConsortium, tmp_path: Path
) -> None:
    homes = {tmp_path / "owner": "hospital-01", tmp_path / "asker": "insurer-02"}
    for home, node in homes.items():
        await Vault.join(home, trial.invite(node), passphrase, fast_kdf=True)
    async with Vault.open(tmp_path / "owner", passphrase) as owner, Vault.open(tmp_path / "asker", passphrase) as asker:
        wanted = await put(owner, tmp_path / "a", "K-1")
        sent = await Consents(asker).ask(owner.keys.public, Wish(policy_number="K-1"))
        asked_of = owner.keys.public
    for home, node in homes.items():
        await rotation.rotate(Home(home), passphrase, trial.invite(node), fast_kdf=True)
    async with Vault.open(tmp_path / "owner", passphrase) as owner, Vault.open(tmp_path / "asker", passphrase) as asker:
        for vault in (owner, asker):
            await vault.shares.publish_key()
        assert owner.keys.public != asked_of
        with pytest.raises(Absent):
            await Consents(asker).approve(sent)  # its own, though under another key
        (request,) = await Consents(owner).requests()
        assert (request.sha256, request.answer) == (sent, "")
        (granted,) = await Consents(owner).approve(sent)
        assert granted.sha256 == wanted
        (own,) = await Consents(asker).requests()
        assert (own.answer, own.files) == ("approved", 1)
        (answered,) = await Consents(owner).requests()
        assert answered.answer == "approved"
        await asker.get(wanted, tmp_path / "back")


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
    assert run(owner, "contacts", "add", "The doctor", run(asker, "key")[1].split()[0])[0] == Exit.OK
    listed = run(owner, "requests", "ls")[1]
    assert "1 file" in listed
    assert "from The doctor" in listed
    assert run(owner, "requests", "approve", sent)[0] == Exit.USAGE
    assert run(owner, "requests", "approve", sent, "--yes")[0] == Exit.OK
    assert "approved" in run(asker, "requests", "ls")[1]
    assert "insurance" in run(owner, "consents", "ls")[1]
    assert run(owner, "consents", "usage", "--csv", str(tmp_path / "use.csv"))[0] == Exit.OK
    assert (tmp_path / "use.csv").read_text().startswith("month,reader")
    assert "usage" in json.loads(run(owner, "consents", "usage", "--json")[1])
    assert run(asker, "request", "--from", key, "--study-date", "someday")[0] == Exit.USAGE
    assert run(owner, "consents", "revoke")[0] == Exit.USAGE
    assert run(owner, "consents", "revoke", "--patient", " ", "--from", "The doctor", "--yes")[0] == Exit.USAGE
    assert run(owner, "consents", "revoke", "--from", "The doctor")[0] == Exit.USAGE
    assert run(owner, "consents", "revoke", "--from", "The doctor", "--patient", "nobody", "--yes")[0] == Exit.ABSENT
    assert "from The doctor" in run(owner, "consents", "revoke", "--from", "The doctor", "--yes")[1]
    assert "insurance" not in run(owner, "consents", "ls")[1]


async def test_all_that_concerns_a_patient_is_handed_over_whole_and_nobody_elses(
    trial: LocalConsortium,
    vaults: tuple[Vault, Vault],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, asker = vaults
    folder = tmp_path / "scans"
    folder.mkdir()
    for number, name in enumerate(("Export^Pat", "Export^Pat", "Other^Person")):
        scan = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
        scan.PatientName, scan.PatientID = name, "P-77" if name == "Export^Pat" else "P-78"
        scan.SOPInstanceUID = scan.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        scan.save_as(folder / f"<b>{number}.dcm")
    await owner.put([folder])
    letter = tmp_path / "letter.pdf"
    letter.write_bytes(b"%PDF-1.7\n" + os.urandom(3000))
    (stored,) = (await Policies(owner).put([letter], Terms(number="VN-77", holder="Pat Export"))).stored
    await owner.shares.share([stored.sha256], asker.keys.public, purpose=Purpose.INSURANCE)
    await asker.get(stored.sha256, tmp_path / "read", purpose=Purpose.INSURANCE)
    owner.links.make([stored.sha256], label="for Pat")
    target = tmp_path / "out"
    whole, calls = owner.prove, []

    async def cut_off(digest: bytes) -> object:
        calls.append(digest)
        if len(calls) == 2:
            raise Unavailable("somebody pulled the plug")
        return await whole(digest)

    monkeypatch.setattr(owner, "prove", cut_off)
    with pytest.raises(Unavailable):
        await export(owner, "pat export", target)
    assert not (target / "manifest.json").exists()
    done = await export(owner, "pat export", target)
    assert (done.documents, done.fetched, done.proofs, len(calls)) == (3, 0, 3, 4)  # what was there was neither fetched nor proved again
    manifest = json.loads((target / "manifest.json").read_text())
    originals = {sha256((folder / f"<b>{n}.dcm").read_bytes()).hexdigest() for n in (0, 1)} | {stored.sha256.hex()}
    assert {each["sha256"] for each in manifest["documents"]} == originals
    for each in manifest["documents"]:
        assert sha256((target / each["path"]).read_bytes()).hexdigest() == each["sha256"]
    assert {path.name for path in (target / "documents").iterdir()} == {Path(each["path"]).name for each in manifest["documents"]}
    assert [each["what"] for each in manifest["history"] if each["author"] == asker.keys.public.hex()] == ["read"]
    assert [each["peer"] for each in manifest["grants"]] == [asker.keys.public.hex()]
    assert [each["state"] for each in manifest["links"]] == ["open"]
    page = (target / "report.html").read_text()
    assert "&lt;b&gt;0.dcm" in page
    assert "<b>" not in page
    assert "Other" not in page
    proof, document = target / manifest["documents"][0]["proof"], target / manifest["documents"][0]["path"]
    assert main(["check-proof", str(proof), str(document), "--genesis", str(target / "genesis.medshard")]) == Exit.OK
    (target / manifest["documents"][0]["path"]).write_bytes(b"changed")
    assert (await export(owner, "pat export", target)).fetched == 1
    with pytest.raises(Conflict, match="another patient"):
        await export(owner, "P-78", target)
    with pytest.raises(Conflict, match="not empty"):
        await export(owner, "P-78", folder)
    with pytest.raises(Absent, match="nothing of a patient"):
        await export(owner, "nobody", tmp_path / "none")
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", trial.passphrase)
    capsys.readouterr()
    assert (target.stat().st_mode & 0o077, (target / "documents").stat().st_mode & 0o400) == (0, 0o400)
    words = ["--home", str(trial.vault_home), "export", "patient", "P-77", "-o", str(tmp_path / "p.zip")]
    assert await asyncio.to_thread(main, [*words, "--no-proofs", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["documents"] == 2
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} >= {"manifest.json", "report.html", "documents", "SHA256SUMS"}
    assert (tmp_path / "p.zip").stat().st_mode & 0o077 == 0
    assert await asyncio.to_thread(main, words) == Exit.LOCAL
    assert await asyncio.to_thread(main, ["--home", str(trial.vault_home), "export", "patient", "P-77", "--list"]) == Exit.OK
    assert "<b>0.dcm" in capsys.readouterr().out
