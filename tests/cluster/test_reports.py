"""Reports over four real nodes: they say what happened, and what is not whole."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pypdf
import pytest

from medshard import Vault
from medshard.cli.exits import Exit
from medshard.cli.main import main
from medshard.consortium import LocalConsortium
from medshard.model import HolderReport
from medshard.paper import latin
from medshard.reports import Bars, Report, Reports, Table
from medshard.reports.making import _holders
from medshard.reports.pages import pdf
from medshard_protocol.errors import Refused

passphrase = "three words suffice"


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("reports"), institutions=4) as consortium:
        code = consortium.invite("insurer-02")
        asyncio.run(Vault.join(consortium.folder / "insurer", code, passphrase, fast_kdf=True))
        yield consortium


@pytest.fixture
async def vault(trial: LocalConsortium) -> AsyncIterator[Vault]:
    async with Vault.open(trial.vault_home, trial.passphrase) as opened:
        yield opened


def text_of(data: bytes) -> str:
    return "\n".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages)


async def test_an_access_review_names_readers_and_purposes(trial: LocalConsortium, vault: Vault, tmp_path: Path) -> None:
    (tmp_path / "policy").write_bytes(os.urandom(30_000))
    (stored,) = (await vault.put([tmp_path / "policy"])).stored
    async with Vault.open(trial.folder / "insurer", passphrase) as insurer:
        await insurer.shares.publish_key()
        insurer_key = insurer.keys.public
        vault.contacts.add("Insurer =1+1", insurer_key)
        await vault.shares.share([stored.sha256], insurer.keys.public)
        await insurer.get(stored.sha256, tmp_path / "back", purpose=2)
        (tmp_path / "other").write_bytes(os.urandom(30_000))
        await insurer.put([tmp_path / "other"])  # which is none of this vault's business
    now = int(time.time())
    report = await Reports(vault).access(now - 3600, now + 3600)
    facts = dict(report.facts)
    assert facts["of these by other vaults"] == "1"
    (line,) = [row for row in report.tables[0].rows if row[1] == "read"]
    assert line[2] == "Insurer =1+1"
    assert line[4] == "insurance"
    assert line[5] == stored.sha256.hex()
    assert {row[1] for row in report.tables[0].rows} == {"registered", "granted", "read"}
    await vault.shares.revoke([stored.sha256], insurer_key)
    async with Vault.open(trial.folder / "insurer", passphrase) as insurer:
        with pytest.raises(Refused):
            await insurer.get(stored.sha256, tmp_path / "again")
    later = (await Reports(vault).access(now - 3600, now + 3600)).tables[0]
    assert (later.urgent, later.rows[0][1]) == (1, "tried to read without a right")
    assert (await Reports(vault).access(now - 7200, now - 3600)).tables[0].rows == ()
    table = list(csv.reader(io.StringIO(report.as_csv())))
    assert tuple(table[0]) == report.tables[0].columns
    assert json.loads(report.as_json())["kind"] == "access"
    assert "Access review" in (page := text_of(pdf(report)))
    assert "Insurer =1+1" in page
    assert pdf(report) == pdf(report)


async def test_integrity_shows_what_is_gone(trial: LocalConsortium, vault: Vault, tmp_path: Path) -> None:
    (tmp_path / "scan").write_bytes(os.urandom(900_000))
    (stored,) = (await vault.put([tmp_path / "scan"])).stored
    whole = await Reports(vault).integrity()
    assert whole.holds
    assert dict(whole.facts)["objects of this vault"] == dict(whole.facts)["with every shard proven"]
    (shard,) = (trial.folder / "nodes" / "hospital-03").glob(f"**/shards/*/{stored.file_id.hex()}-*")
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    broken = await Reports(vault).integrity()
    assert not broken.holds
    ((sha256, margin, holders),) = broken.tables[0].rows
    assert (sha256, margin) == (stored.sha256.hex(), "1")
    assert "hospital-03: damaged" in holders
    assert broken.tables[0].urgent == 1
    data[1000] ^= 1
    shard.write_bytes(data)


async def test_a_drill_reads_back_and_keeps_nothing(vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").write_bytes(os.urandom(50_000))
    await vault.put([tmp_path / "one"])
    (tmp_path / "one").unlink()
    report = await Reports(vault).restore_drill(50)
    assert report.holds
    assert {row[4] for row in report.tables[0].rows} == {"whole"}
    assert list(tmp_path.iterdir()) == []


async def test_keys_without_an_escrow_want_attention(vault: Vault) -> None:
    report = await Reports(vault).keys()
    facts = dict(report.facts)
    assert facts["this vault's key"] == vault.keys.public.hex()
    assert facts["shares of the root key with custodians"] == "0"
    assert not report.holds


def test_names_are_text_and_never_markup() -> None:
    evil = "<b>&amp;</b><img src='file:///etc/passwd'/>" + "山" * 50 + "x" * 2000
    table = Table(evil, ("a", evil), ((evil, "=cmd()"), ("", evil)) * 60)
    report = Report(
        "keys", evil, 0, evil, ((evil, evil),), (table, Table("none", ("a",), ())), (Bars(evil, ((evil, 3.0),)), Bars("empty", ()))
    )
    assert "<b>&amp;</b>" in text_of(pdf(report))
    assert "'=cmd()" in report.as_csv()


def test_pages_are_numbered_and_no_word_of_a_heading_is_broken() -> None:
    columns = ("time (UTC)", "what", "who", "institution", "purpose", "documents (sha256)", "under", "to or from", "reason", "entry")
    who = "Prof. Dr. Wolfgang-Amadeus von Hohenlohe-Schillingsfürst, 서울대학교병원"
    row = (
        "2026-11-21 17:13:39",
        "read",
        who,
        "hospital-01",
        "patient-request",
        "ab" * 32,
        "grant 4711",
        who,
        "sealed to the auditors",
        "2770",
    )
    told = text_of(
        pdf(Report("access", "Access review", 1, "x", (), (Table("What", columns, (row,) * 80, 1),), (Bars("who", ((who, 1),)),)))
    )
    assert "page 1 of 4" in told
    lines = told.replace("\u00a0", " ").splitlines()
    for word in ("institution", "hospital-01", "patient-request", "entry", "2026-11-21 17:13:39", "abababababababab…"):
        assert any(word in line for line in lines), word
    assert "서울대학교병원" in told.replace("\n", "")
    assert "…" in told


def test_letters_that_the_fonts_lack_are_shown_plain() -> None:
    assert latin("5c1e… – Łódź, Škoda, Ζ") == "5c1e… – Lódz, Škoda, ?"


def test_a_report_names_those_who_said_the_same_together() -> None:
    def holder(node: str, state: str, detail: str = "") -> HolderReport:
        return HolderReport(node, node, 0, state, detail=detail)  # type: ignore[arg-type]

    down = [holder(node, "unreachable", f"{node}: cannot connect") for node in ("a", "b")]
    assert (
        _holders([*down, holder("c", "proven"), holder("d", "damaged", "cell 3")])
        == "a, b: unreachable (cannot connect); d: damaged (cell 3)"
    )


def test_the_commands_write_files(trial: LocalConsortium, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("MEDSHARD_HOME", str(trial.vault_home))
    monkeypatch.chdir(tmp_path)
    assert main(["report", "access", "-o", "a.pdf", "-o", "a.csv", "-o", "a.json"]) == Exit.OK
    assert "Access review" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a.pdf", "a.csv", "a.json"}
    assert (tmp_path / "a.pdf").stat().st_mode & 0o777 == 0o600
    assert main(["report", "restore-drill", "--files", "1", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["kind"] == "restore-drill"
    assert main(["report", "keys"]) == Exit.OK
    assert main(["report", "keys", "-o", "keys.docx"]) == Exit.USAGE
    for command in ("prove", "certificate"):
        assert main([command, "00" * 32, "-o", "page.pdf"]) == Exit.USAGE
    assert not (tmp_path / "page.pdf").exists()
    assert main(["report", "access", "--from", "2026-02-01", "--to", "2026-01-01"]) == Exit.USAGE
    assert main(["report", "access", "--from", "yesterday"]) == Exit.USAGE
