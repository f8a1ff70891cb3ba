"""What the gateway's tests share: a small consortium, an archive over its vault, and instances made to measure."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from io import BytesIO
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard.gateway.archive import Archive
from medshard.gateway.catalog import Catalog
from medshard.gateway.intake import Rules
from medshard.gateway.objects import StoreObjects
from medshard.gateway.spool import Spool

Opened = Callable[..., AbstractAsyncContextManager[Archive]]


def make_instance(study: str = "", series: str = "", uid: str = "", *, number: int = 1, size: int = 64, **attributes: object) -> bytes:
    """A DICOM file of one CT slice of ``size`` by ``size`` random pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = uid = uid or generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, uid
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study or generate_uid(), series or generate_uid()
    dataset.StudyDate, dataset.StudyTime, dataset.Modality = "20260315", "101500", "CT"
    dataset.PatientName, dataset.PatientID = "Müller^Änne=山田^太郎", "PID-1"
    dataset.AccessionNumber, dataset.SeriesNumber, dataset.InstanceNumber = "ACC1", "2", str(number)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows = dataset.Columns = size
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.PixelData = os.urandom(2 * size * size)
    out = BytesIO()
    dcmwrite(out, dataset, enforce_file_format=True)
    return out.getvalue()


@pytest.fixture(scope="session")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("gateway"), institutions=4, code=(2, 4)) as consortium:
        yield consortium


@pytest.fixture
async def vault(trial: LocalConsortium) -> AsyncIterator[Vault]:
    async with Vault.open(trial.vault_home, trial.passphrase) as opened:
        yield opened


@pytest.fixture
def opened(vault: Vault, tmp_path: Path) -> Opened:
    """Open an archive in this test's folder; again and again, like a gateway that is restarted."""

    @asynccontextmanager
    async def open_archive(rules: Rules | None = None, *, bytes_max: int = 1 << 30) -> AsyncIterator[Archive]:
        spool = Spool(tmp_path / "spool", b"s" * 32, bytes_max=bytes_max)
        catalog = Catalog(tmp_path / "dicom.sqlite", b"c" * 32)
        try:
            archive = Archive(vault, spool, catalog, StoreObjects(vault), rules)
            await archive.start()
            yield archive
        finally:
            catalog.close()
            spool.close()

    return open_archive


@pytest.fixture
async def archive(opened: Opened) -> AsyncIterator[Archive]:
    async with opened() as made:
        yield made
