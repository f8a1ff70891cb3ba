"""The file system of fsspec against real nodes: what pydicom and pandas see of a vault."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import multiprocessing
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pydicom
import pytest
from fsspec.registry import get_filesystem_class
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard.download import Download
from medshard.filesystem import MedshardFileSystem

root = Path(__file__).parents[2]
study, series = "1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2"
slices, size = 5, 64
large_bytes = 9_000_000


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("filesystem"), institutions=4) as consortium:
        yield consortium


@pytest.fixture(scope="module")
def stored(trial: LocalConsortium, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the vault holds, by name: a series of CT slices, a table and a large file."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "ct").mkdir()
    for number in range(slices):
        write_slice(folder / "ct" / f"{number}.dcm", number)
    (folder / "table.csv").write_text("patient,age\na,41\nb,62\n")
    (folder / "large.bin").write_bytes(os.urandom(large_bytes))

    async def put() -> None:
        async with Vault.open(trial.vault_home, trial.passphrase) as vault:
            report = await vault.put([folder / "ct", folder / "table.csv", folder / "large.bin"])
            assert not report.problems

    asyncio.run(put())
    return {path.name: path.read_bytes() for path in [*folder.glob("ct/*"), *folder.glob("*.*")]}


@pytest.fixture
def fs(trial: LocalConsortium, stored: dict[str, bytes]) -> Iterator[MedshardFileSystem]:
    each = MedshardFileSystem(home=str(trial.vault_home), skip_instance_cache=True)
    yield each
    each.close()


def write_slice(path: Path, number: int) -> None:
    """Slices are named against their order in space."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID(f"{series}.{number}")
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.PatientID = study, series, "P1"
    dataset.Rows = dataset.Columns = size
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, -2.5 * number], [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.RescaleSlope, dataset.RescaleIntercept = [0.5, 0.5], 2, -1024
    dataset.PixelData = np.full((size, size), number, np.int16).tobytes()
    dataset.save_as(path, enforce_file_format=True)


def by_hash(data: bytes) -> str:
    return f"medshard://sha256/{hashlib.sha256(data).hexdigest()}"


def test_the_entry_point_names_the_file_system() -> None:
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["fsspec.specs"]
    module, _, name = points["medshard"].rpartition(".")
    assert (module, name) == (MedshardFileSystem.__module__, MedshardFileSystem.__name__)
    assert get_filesystem_class("medshard") is MedshardFileSystem


def test_files_are_found_by_hash_and_by_study_path(fs: MedshardFileSystem, stored: dict[str, bytes]) -> None:
    assert fs.ls("medshard://", detail=False) == ["sha256", "studies"]
    assert {hashlib.sha256(data).hexdigest() for data in stored.values()} <= {path.split("/")[1] for path in fs.ls("sha256", detail=False)}
    assert fs.ls("studies", detail=False) == [f"studies/{study}"]
    assert fs.ls(f"studies/{study}", detail=False) == [f"studies/{study}/{series}"]
    paths = fs.find("medshard://studies")
    assert paths == [f"studies/{study}/{series}/{series}.{number}" for number in range(slices)]
    about = fs.info(f"medshard://{paths[3]}")
    assert (about["type"], about["size"], about["media_type"]) == ("file", len(stored["3.dcm"]), "application/dicom")
    assert fs.cat(paths[3]) == stored["3.dcm"]
    assert fs.ukey(paths[3]) == hashlib.sha256(stored["3.dcm"]).hexdigest()
    assert fs.exists(paths[0])
    assert not fs.exists("studies/1.2.3")


def test_pydicom_and_pandas_open_files_by_url(trial: LocalConsortium, stored: dict[str, bytes]) -> None:
    options: dict[str, Any] = {"home": str(trial.vault_home)}
    with fsspec.open(f"medshard://studies/{study}/{series}/{series}.2", **options) as file:
        dataset = pydicom.dcmread(file)
    assert dataset.PatientID == "P1"
    assert (dataset.pixel_array == 2).all()
    import pandas  # late: every worker reads this file, one runs it

    table = pandas.read_csv(by_hash(stored["table.csv"]), storage_options=options)
    assert list(table.age) == [41, 62]


def test_a_range_reads_only_the_stripes_it_lies_in(
    fs: MedshardFileSystem, stored: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[range] = []
    whole = Download.run

    async def counted(self: Download, wanted: range, take: Any) -> None:
        fetched.append(wanted)
        await whole(self, wanted, take)

    monkeypatch.setattr(Download, "run", counted)
    data = stored["large.bin"]
    with fs.open(by_hash(data)) as file:
        file.seek(5_000_000)
        assert file.read(100_000) == data[5_000_000:5_100_000]
        assert sum(len(run) for run in fetched) <= 2
        before = len(fetched)
        file.seek(5_000_100)
        assert file.read(50) == data[5_000_100:5_000_150]
        assert len(fetched) == before
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]
    assert fs.cat_file(by_hash(data), 8_000_000, -1) == data[8_000_000:-1]
    assert fs.cat(by_hash(data)) == data
    numbers = [number for run in fetched for number in run]
    assert len(numbers) == len(set(numbers)), "a stripe was fetched twice"


def test_errors_are_those_of_files_in_the_words_of_the_vault(
    fs: MedshardFileSystem, trial: LocalConsortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="holds no file with SHA-256"):
        fs.open("medshard://sha256/" + "0" * 64)
    with pytest.raises(FileNotFoundError, match="64 hexadecimal digits"):
        fs.info("medshard://sha256/zz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        fs.ls("medshard://elsewhere/1")
    with pytest.raises(OSError, match="for reading"):
        fs.open("medshard://sha256/new", "wb")
    with pytest.raises(OSError, match="for reading"):
        fs.rm(f"studies/{study}", recursive=True)
    with pytest.raises(IsADirectoryError):
        fs.open(f"studies/{study}")
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", "another one")
    other = MedshardFileSystem(home=str(trial.vault_home), skip_instance_cache=True)
    with pytest.raises(PermissionError, match="does not open this vault"):
        other.ls("studies")


def test_one_session_with_a_file_is_one_entry_on_the_ledger(
    fs: MedshardFileSystem, trial: LocalConsortium, stored: dict[str, bytes]
) -> None:
    path = by_hash(stored["large.bin"])
    digest = hashlib.sha256(stored["large.bin"]).digest()

    async def reads() -> int:
        async with Vault.open(trial.vault_home, trial.passphrase) as vault:
            return sum(each.what == "read" for each in await vault.shares.log(digest))

    before = asyncio.run(reads())
    with fs.open(path) as file:
        for at in range(0, large_bytes, 1_000_000):
            file.seek(at)
            assert file.read(1_000) == stored["large.bin"][at : at + 1_000]
    assert asyncio.run(reads()) == before + 1


def _read_in_child(fs: MedshardFileSystem, path: str, answer: Any) -> None:
    answer.put(fs.cat(path))
    fs.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_worker_reads_with_a_connection_of_its_own(fs: MedshardFileSystem, stored: dict[str, bytes]) -> None:
    path = by_hash(stored["1.dcm"])
    assert fs.cat(path) == stored["1.dcm"]
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=_read_in_child, args=(fs, path, answer))
    child.start()
    assert answer.get(timeout=60) == stored["1.dcm"]
    child.join(60)
    assert child.exitcode == 0
    assert fs.cat(path) == stored["1.dcm"]


def test_the_example_loads_a_series_in_the_order_of_space(trial: LocalConsortium, stored: dict[str, bytes]) -> None:
    spec = importlib.util.spec_from_file_location("series_to_volume", root / "examples" / "series_to_volume.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    volume, spacing = example.load_series(study, series, home=str(trial.vault_home))
    assert volume.shape == (slices, size, size)
    assert list(spacing) == [2.5, 0.5, 0.5]
    assert [float(each) for each in volume[:, 0, 0]] == [2.0 * number - 1024 for number in reversed(range(slices))]
