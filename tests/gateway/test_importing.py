"""Files that are here already: real ones of pydicom's own tests, in folders, archives and on media, come back bit for bit."""

from __future__ import annotations

import asyncio
import os
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import data_store
import pydicom.data
import pytest
from pydicom.fileset import FileSet
from pydicom.uid import generate_uid
from tests.gateway.conftest import Opened, make_instance

from medshard.gateway.archive import Archive
from medshard.gateway.importing import Imported, Importer
from medshard.gateway.model import Outcome
from medshard.model import PutReport
from medshard_protocol.errors import Unavailable

real = [Path(os.path.dirname(str(package.__file__))) for package in (pydicom.data, data_store)]
not_instances = {".py", ".pyc", ".md", ".json", ".pem", ".txt", ".toml", ".license", ".typed"}


def files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.suffix not in not_instances)


async def imported(archive: Archive, *paths: Path) -> list[Imported]:
    told: list[Imported] = []
    await Importer(archive.vault, archive.catalog).run(paths, told.append)
    return told


async def test_the_real_files_of_pydicom_go_in_and_come_back_identical(archive: Archive) -> None:
    told = await imported(archive, *real)
    stored = [each for each in told if each.outcome in (Outcome.STORED, Outcome.KEPT_BESIDE)]
    assert len(stored) >= 135
    for each in stored:
        assert each.sha256 == sha256(each.path.read_bytes()).digest()
        (instance,) = (found for found in archive.catalog.instances(each.sop_uid) if found.sha256 == each.sha256)
        assert await (await archive.open(instance)).read() == each.path.read_bytes(), each.path.name
    refused = {each.path.name: each.reason for each in told if each.outcome is Outcome.REFUSED}
    assert "ends" in refused["MR_truncated.dcm"]
    assert all(refused.values())
    assert {each.path for each in told} >= {path for path in files_in(real[0]) if path.name != "DICOMDIR"}
    again = await imported(archive, *real)
    assert {each.outcome for each in again} == {Outcome.ALREADY, Outcome.REFUSED}


async def test_an_archive_and_the_folder_that_it_was_made_of_are_the_same_files(archive: Archive, tmp_path: Path) -> None:
    study, series = generate_uid(), generate_uid()
    files = [make_instance(study, series, number=number) for number in range(3)]
    with zipfile.ZipFile(tmp_path / "study.zip", "w", zipfile.ZIP_DEFLATED) as made:
        for number, file in enumerate(files):
            made.writestr(f"series/{number}.dcm", file)
        made.writestr("series/readme", "not an image")
    told = await imported(archive, tmp_path / "study.zip")
    assert sorted(each.outcome for each in told) == ["refused", "stored", "stored", "stored"]
    assert {each.sha256 for each in told if each.sha256} == {sha256(file).digest() for file in files}
    found = archive.instances(study)
    assert len({each.place.file_id for each in found if each.place}) == 1
    assert {await (await archive.open(each)).read() for each in found} == set(files)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, file in enumerate(files):
        (folder / str(number)).write_bytes(file)
    assert {each.outcome for each in await imported(archive, folder)} == {Outcome.ALREADY}


async def test_a_hostile_member_is_refused_by_itself_and_no_name_leads_out_of_the_archive(archive: Archive, tmp_path: Path) -> None:
    files = [make_instance() for _ in range(3)]
    with zipfile.ZipFile(tmp_path / "odd.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("first.dcm", files[0])
        made.writestr("bomb.dcm", bytes(20_000_000))
        made.writestr("/etc/second.dcm", files[1])
        made.writestr("../third.dcm", files[2])
    told = {each.path.name: each for each in await imported(archive, tmp_path / "odd.zip")}
    assert "grows to 20,000,000 bytes" in told.pop("bomb.dcm").reason
    assert {each.sha256 for each in told.values()} == {sha256(file).digest() for file in files}
    assert all((tmp_path / "odd.zip") in each.path.parents for each in told.values())


async def test_media_are_imported_by_their_dicomdir_and_what_it_names_in_vain_is_told(archive: Archive, tmp_path: Path) -> None:
    study, media = generate_uid(), FileSet()
    for number in range(3):
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(make_instance(study, number=number, StudyID="1"))
        media.add(path)
    media.write(tmp_path / "media")
    lost = next(path for path in sorted((tmp_path / "media").rglob("*")) if path.is_file() and path.name != "DICOMDIR")
    lost.unlink()
    (tmp_path / "media" / "stray").write_bytes(make_instance())
    told = await imported(archive, tmp_path / "media" / "DICOMDIR")
    assert sorted(each.outcome for each in told) == ["refused", "stored", "stored"]
    assert [each.path for each in told if each.outcome is Outcome.REFUSED] == [lost]


async def test_an_import_that_broke_off_goes_on(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medshard.gateway.importing.batch_files", 2)
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.dcm").write_bytes(make_instance(number=number))
    told: list[Imported] = []

    def stop(each: Imported) -> None:
        told.append(each)
        if len(told) == 4:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        await Importer(archive.vault, archive.catalog).run([folder], stop)
    again = await imported(archive, folder)
    assert sorted(each.outcome for each in again) == ["already"] * 4 + ["stored"]


async def test_what_is_dropped_into_a_watched_folder_is_imported_when_it_is_whole(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medshard.gateway.importing.settle_s", 0.05)
    monkeypatch.setattr("medshard.gateway.importing.retry_s", 0.05)
    drop, told = tmp_path / "drop", asyncio.Queue[Imported]()
    drop.mkdir()
    async with opened() as archive:
        importer, store = Importer(archive.vault, archive.catalog), archive.vault.store

        async def away(*_: object) -> PutReport:
            monkeypatch.setattr(archive.vault, "store", store)
            raise Unavailable("the nodes are out of reach")

        monkeypatch.setattr(archive.vault, "store", away)
        watching = asyncio.create_task(importer.watch(drop, told.put_nowait, delete=True))
        try:
            (drop / "good.dcm").write_bytes(file := make_instance())
            (drop / "bad.dcm").write_bytes(b"no image")
            async with asyncio.timeout(60):
                assert "tried again" in (await told.get()).reason
                outcomes = {each.path.name: each for each in (await told.get(), await told.get())}
                while (drop / "good.dcm").exists():
                    await asyncio.sleep(0.01)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        assert outcomes["good.dcm"].sha256 == sha256(file).digest()
        assert outcomes["bad.dcm"].outcome is Outcome.REFUSED
        assert (drop / "bad.dcm").exists()
