"""An insurer's archive on four real nodes: versions, claims handed over as a whole, imports that go on after a cut."""

from __future__ import annotations

import asyncio
import csv
import json
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from medshard import Vault
from medshard.cli.exits import Exit
from medshard.cli.main import main
from medshard.consortium import LocalConsortium
from medshard.policies import archive, importing
from medshard.policies.archive import Policies
from medshard.policies.importing import import_csv
from medshard.policies.model import Terms
from medshard_protocol.errors import Absent, Conflict, Damaged, Malformed, Refused, Unavailable
from medshard_protocol.ids import Key

passphrase = "three words suffice"
year = datetime.now(UTC).year


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("archive"), institutions=4) as consortium:
        code = consortium.invite("insurer-02")
        asyncio.run(Vault.join(consortium.folder / "insurer", code, passphrase, fast_kdf=True))
        yield consortium


@pytest.fixture
async def vault(trial: LocalConsortium) -> AsyncIterator[Vault]:
    async with Vault.open(trial.vault_home, trial.passphrase) as opened:
        yield opened


def pdf(path: Path, size: int = 5_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"%PDF-1.7\n" + os.urandom(size) + b"\n%%EOF\n")
    return path


async def test_a_policy_has_versions_and_is_kept(vault: Vault, tmp_path: Path) -> None:
    policies = Policies(vault)
    first = Terms("VN-1", "Jane Doe", "life", "2024-01-01", "2034-12-31", f"{year + 10}-06-30")
    (one,) = (await policies.put([pdf(tmp_path / "one.pdf")], first)).stored
    (two,) = (await policies.put([pdf(tmp_path / "two.pdf")], Terms("VN-1", "Jane Doe", kind="endorsement"))).stored
    (letter,) = (await policies.put([pdf(tmp_path / "three.pdf")], Terms("VN-1", kind="letter"))).stored
    (again,) = (await policies.put([tmp_path / "one.pdf"], first)).stored
    assert again.already
    assert [(each.version, each.row.sha256) for each in policies.history("VN-1")] == [(1, one.sha256), (2, two.sha256), (0, letter.sha256)]
    assert {row.sha256 for row in policies.find(holder="doe JANE")} == {one.sha256, two.sha256}
    assert [row.sha256 for row in policies.find(product="Life", in_force=datetime(2030, 1, 1).date())] == [one.sha256]
    assert list(policies.find(in_force=datetime(2020, 1, 1).date(), product="life")) == []
    with pytest.raises(Refused, match=f"retained until {year + 10}"):
        await vault.custody.end([one.sha256])
    with pytest.raises(Absent):
        policies.history("VN-404")
    (tmp_path / "letter.txt").write_text("not a PDF")
    report = await policies.put([tmp_path / "letter.txt", tmp_path / "nowhere.pdf"], Terms("VN-1"))
    assert [problem.stored for problem in report.problems] == [False, False]


async def test_a_claim_is_handed_over_whole_and_checked_without_its_owner(trial: LocalConsortium, vault: Vault, tmp_path: Path) -> None:
    policies = Policies(vault)
    await policies.put([pdf(tmp_path / "policy.pdf")], Terms("VN-2", "John Roe", valid_from="2020-01-01"))
    (tmp_path / "scan.dcm").write_bytes(os.urandom(300_000))
    pdf(tmp_path / "letter.pdf")
    with pytest.raises(OSError, match="no such file"):
        await policies.put_claim("C-1", "VN-2", [tmp_path / "scan.dcm", tmp_path / "nowhere"])
    with pytest.raises(Absent, match="VN-404"):
        await policies.put_claim("C-1", "VN-404", [tmp_path / "scan.dcm"])
    (alone,) = (await vault.put([tmp_path / "scan.dcm"])).stored  # it was stored before, as scans of a hospital are
    report = await policies.put_claim("C-1", "VN-2", [tmp_path / "scan.dcm", tmp_path / "letter.pdf"])
    assert len({stored.file_id for stored in report.stored}) == 1
    with pytest.raises(Conflict):
        await policies.put_claim("C-1", "VN-2", [tmp_path / "letter.pdf"])
    rows = policies.claim("C-1")
    assert [row.name for row in rows] == [b"claim.json", b"001-scan.dcm", b"002-letter.pdf"]
    async with Vault.open(trial.folder / "insurer", passphrase) as insurer:
        await insurer.shares.publish_key()
        await vault.shares.share([alone.sha256], insurer.keys.public)
        await insurer.shares.sync()
        await vault.shares.revoke([alone.sha256], insurer.keys.public)  # which the insurer does not know
        shared = await policies.share_claim("C-1", insurer.keys.public)
        assert {each.file_id for each in shared} == {rows[0].file_id}
        assert [each.sha256 for each in shared] == [row.sha256 for row in rows]
        record = await Policies(insurer).check_claim("C-1")
        assert (record["claim"], record["policy"], record["checked"]) == ("C-1", "VN-2", 2)
        assert (await insurer.get(alone.sha256, tmp_path / "by hash")).sha256 == alone.sha256  # from where it may be read now
        assert [each["version"] for each in record["in_force"]] == [1]
        with pytest.raises(Absent):  # the policy itself was not granted
            await insurer.get(policies.history("VN-2")[0].row.sha256, tmp_path / "no")
        with pytest.raises(Refused, match="only its owner"):
            await Policies(insurer).share_claim("C-1", vault.keys.public)
        await vault.shares.share([alone.sha256], insurer.keys.public)
        lost = await vault.shares.revoke([alone.sha256], insurer.keys.public)  # by itself, and in the claim
        assert {each.sha256 for each in lost} == {row.sha256 for row in rows}
        assert {each.file_id for each in lost} == {alone.file_id, rows[0].file_id}
    async with asyncio.timeout(60):  # mirrors beyond the quorum hear of a read a moment later
        while not (told := [each for each in await vault.shares.log(rows[1].sha256) if each.what == "read"]):
            await asyncio.sleep(0.1)
    assert told[-1].institution
    assert told[0].purpose == "insurance"


async def test_claims_of_one_number_are_told_apart_by_whose_they_are(vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = Policies(vault)
    with pytest.raises(Absent, match="VN-9"):
        await policies.put_claim("C-9", "VN-9", [pdf(tmp_path / "invoice.pdf")])
    await policies.put_claim("C-9", "VN-9", [tmp_path / "invoice.pdf"], elsewhere=True)
    mine = policies.claim("C-9")
    record = json.loads(await vault.read(mine[0].sha256, 0, mine[0].size))
    assert (record["policy"], record["in_force"], record["day"]) == ("VN-9", [], str(datetime.now(UTC).date()))
    theirs = [[replace(row, owner=key, file_id=key) for row in mine] for key in (b"1" * 32, b"2" * 32)]
    known = [*theirs[0], *theirs[1]]
    monkeypatch.setattr(Policies, "find", lambda self, **wanted: iter(known))
    with pytest.raises(Conflict, match="several have shared"):
        policies.claim("C-9")
    assert policies.claim("C-9", Key(b"2" * 32)) == theirs[1]
    with pytest.raises(Absent):
        policies.claim("C-9", Key(b"3" * 32))
    await policies.put_claim("C-9", "VN-9", [tmp_path / "invoice.pdf"], elsewhere=True)  # another's claim of that number stops nobody
    known = [*mine, *known]
    assert policies.claim("C-9") == mine


async def test_a_claim_names_what_was_in_force_on_its_day(vault: Vault, tmp_path: Path) -> None:
    policies = Policies(vault)
    await policies.put([pdf(tmp_path / "policy.pdf")], Terms("VN-11", valid_from="2020-01-01", valid_to="2021-12-31"))
    await policies.put([pdf(tmp_path / "change.pdf")], Terms("VN-11", kind="endorsement", valid_from="2022-01-01"))
    await policies.put_claim("C-11", "VN-11", [pdf(tmp_path / "letter.pdf")], on=date(2021, 5, 1))
    record = await policies.check_claim("C-11")
    assert (record["day"], [each["version"] for each in record["in_force"]]) == ("2021-05-01", [1])


async def test_a_record_that_names_what_is_not_there_is_damaged(vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = Policies(vault)
    await policies.put([pdf(tmp_path / "policy.pdf")], Terms("VN-3"))
    true = archive._record

    def false(terms: Terms, today: object, parts: object, covered: object) -> bytes:
        told = json.loads(true(terms, today, parts, covered))
        told["documents"].append({"name": "another", "sha256": "00" * 32, "size": 1})
        return json.dumps(told).encode()

    monkeypatch.setattr("medshard.policies.archive._record", false)
    await policies.put_claim("C-3", "VN-3", [pdf(tmp_path / "letter.pdf")])
    with pytest.raises(Damaged, match="another"):
        await policies.check_claim("C-3")


def table(path: Path, rows: list[list[str]], heading: str = "file;number;holder;valid_to;retain") -> Path:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(heading.split(";"))
        writer.writerows(rows)
    return path


async def test_an_import_stores_what_is_good_and_names_what_is_not(vault: Vault, tmp_path: Path) -> None:
    folder = tmp_path / "pdf"
    rows = []
    for number in range(12):
        pdf(folder / f"{number}.pdf")
        rows.append([f"{number}.pdf", f"IM-{number}", "Ö. Ångström", f"{year + 1 + number % 2}-03-31", "10y"])
    (folder / "12.pdf").write_bytes(b"MZ no PDF")
    bad = [
        ["12.pdf", "IM-12", "", "", ""],
        ["13.pdf", "IM-13", "", "", ""],
        ["../secret.pdf", "IM-14", "", "", ""],
        ["0.pdf", "IM-15", "", "", ""],
        ["1.pdf", "", "", "", ""],
        ["2.pdf", "IM-16", "", "31.12.2030", ""],
        ["", "IM-17", "", "", ""],
        ["3.pdf", "IM-18", "", "", "", "one more"],
    ]
    pdf(tmp_path / "secret.pdf")
    source, report = table(tmp_path / "policies.csv", rows + bad), tmp_path / "report.csv"
    done = await import_csv(vault, source, folder, report)
    assert (done.stored, done.known, done.refused) == (12, 0, len(bad))
    told = list(csv.DictReader(report.open(encoding="utf-8", newline="")))
    assert [row["status"] for row in told].count("stored") == 12
    assert {int(row["row"]) for row in told if row["status"] == "refused"} == set(range(14, 14 + len(bad)))
    stored = list(Policies(vault).find(number="IM-*"))
    assert len(stored) == 12
    assert len({row.file_id for row in stored}) == 2  # two quarters of retention, two packs
    kept = {each.file_id: each.until for each in vault.custody.kept()}
    assert all(row.file_id in kept for row in stored)
    again = await import_csv(vault, source, folder, report)
    assert (again.stored, again.known, again.refused) == (0, 12, len(bad))
    assert len(list(csv.DictReader(report.open(encoding="utf-8", newline="")))) == 12 + len(bad)


async def test_an_import_that_was_cut_off_goes_on(vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = tmp_path / "pdf", 0
    rows = [[pdf(folder / f"{number}.pdf").name, f"CUT-{number}", "", "", ""] for number in range(9)]
    source, report = table(tmp_path / "policies.csv", rows), tmp_path / "report.csv"
    monkeypatch.setattr(importing, "pack_members_max", 3)
    store = Vault.store

    async def cut(self: Vault, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Unavailable("the network is gone")
        return await store(self, *arguments)

    with monkeypatch.context() as broken:
        broken.setattr(Vault, "store", cut)
        with pytest.raises(Unavailable):
            await import_csv(vault, source, folder, report, retain="1y")
    with open(report, "ab") as file:
        file.write(b"8,CUT-6,6.pdf,stored,abc")  # a line that the cut has left
    done = await import_csv(vault, source, folder, report, retain="1y")
    assert (done.stored, done.known) == (3, 6)
    assert len(list(Policies(vault).find(number="CUT-*"))) == 9


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"file;holder\n", "no column number"),
        (b"file;number\n\xff;1\n", "not UTF-8"),
        (b'file;number\n"a;1\n', "broken near line"),
        (b"", "no column"),
    ],
)
async def test_what_is_no_table_is_refused_whole(vault: Vault, tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "pdf").mkdir()
    (tmp_path / "policies.csv").write_bytes(data)
    with pytest.raises(Malformed, match=why):
        await import_csv(vault, tmp_path / "policies.csv", tmp_path / "pdf", tmp_path / "report.csv")
    with pytest.raises(Absent):
        await import_csv(vault, tmp_path / "policies.csv", tmp_path / "nowhere", tmp_path / "report.csv")


def test_the_commands_do_the_same(trial: LocalConsortium, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("MEDSHARD_HOME", str(trial.vault_home))
    monkeypatch.chdir(tmp_path)
    pdf(tmp_path / "p.pdf")
    assert main(["policy", "put", "p.pdf", "--number", "CLI-1", "--holder", "Jane Doe", "--retain", "1y"]) == Exit.OK
    digest = capsys.readouterr().out.split()[0]
    assert main(["policy", "show", "CLI-1"]) == Exit.OK
    assert digest in (shown := capsys.readouterr().out)
    assert "version 1" in shown
    assert main(["policy", "find", "--holder", "doe", "--json"]) == Exit.OK
    assert digest in [each["sha256"] for each in json.loads(capsys.readouterr().out)["documents"]]
    assert main(["claim", "put", "C-CLI", "--policy", "CLI-1", "p.pdf"]) == Exit.OK
    assert main(["claim", "show", "C-CLI"]) == Exit.OK
    capsys.readouterr()
    assert main(["claim", "check", "C-CLI"]) == Exit.OK
    assert "1 documents are whole" in capsys.readouterr().out
    table(tmp_path / "t.csv", [["p.pdf", "CLI-2", "", "", ""], ["q.pdf", "CLI-3", "", "", ""]])
    assert main(["policy", "import", "t.csv", "--folder", "."]) == Exit.PARTIAL
    assert "1 stored, 1 refused" in capsys.readouterr().out
    assert main(["policy", "put", "p.pdf", "--number", "X", "--retain", "soon"]) == Exit.USAGE
    assert main(["policy", "show", "nowhere"]) == Exit.ABSENT
    assert main(["erase", digest, "--yes"]) == Exit.REFUSED
