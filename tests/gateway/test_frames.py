"""Where compressed frames lie stands in the sealed header, made when the instance came: no first reader walks through its pixels."""

from __future__ import annotations

import asyncio
import os
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.uid import JPEGBaseline8Bit
from tests.gateway.conftest import make_instance

from medshard.gateway.archive import Archive
from medshard.gateway.describing import describe
from medshard.gateway.frames import encapsulated, frames_at, sealed, unwrapped
from medshard.gateway.importing import Importer
from medshard.gateway.model import Incoming, Instance
from medshard.gateway.packing import frames_of

real = (
    "SC_rgb_rle_2frame.dcm",
    "emri_small_RLE.dcm",
    "emri_small_jpeg_ls_lossless.dcm",
    "examples_ybr_color.dcm",
    "color3d_jpeg_baseline.dcm",
)


def instance_in(file: bytes) -> Instance:
    said = describe(lambda start, stop: file[start:stop], len(file))
    plain = Instance(said.study, said.series, said.uid, len(file), b"", 0, said.attributes)
    found = frames_of(plain, lambda start, stop: file[start:stop])
    return Instance(said.study, said.series, said.uid, len(file), b"", 0, {**said.attributes, **found})


def made(offsets: str, frames: list[bytes]) -> bytes:
    """A multi-frame instance whose frames are told by a basic or an extended offset table, or by nothing."""
    dataset = dcmread(BytesIO(make_instance(NumberOfFrames=len(frames), size=8)))
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    if offsets == "extended":
        dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = encapsulate_extended(frames)
    else:
        dataset.PixelData = encapsulate(frames, fragments_per_frame=2 if offsets == "fragments" else 1, has_bot=offsets == "basic")
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    out = BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


@pytest.mark.parametrize("offsets", ["basic", "extended", "none", "fragments"])
def test_the_header_tells_what_the_offset_tables_or_the_items_tell(offsets: str) -> None:
    frames = [b"\xff\xd8" + os.urandom(100 + 2 * number) for number in range(300)]
    file = made(offsets, frames)
    instance = instance_in(file)

    async def read(start: int, stop: int) -> bytes:
        return file[start:stop]

    table = sealed(instance)
    assert table == asyncio.run(encapsulated(instance, read))
    assert table is not None
    for number, frame in enumerate(frames, 1):
        first, after, _ = table.place(number)
        assert unwrapped(file[first:after]) == frame


@pytest.mark.parametrize("name", real)
def test_frames_of_real_files_are_where_their_header_says(name: str) -> None:
    path = get_testdata_file(name)
    assert path
    file = Path(str(path)).read_bytes()
    dataset, table = dcmread(BytesIO(file)), sealed(instance_in(file))
    assert table is not None
    wanted = list(generate_frames(dataset.PixelData, number_of_frames=int(dataset.NumberOfFrames)))
    assert [unwrapped(file[slice(*table.place(number)[:2])]) for number in range(1, table.count + 1)] == wanted


def test_what_does_not_fit_the_instance_is_no_table() -> None:
    whole = instance_in(made("none", [b"\xff\xd8" + bytes(10)] * 5))
    assert sealed(whole) is not None
    for wrong in ("", "AAAA", whole.attributes[frames_at[0]][:-4], "!" * 50):
        assert sealed(Instance("1", "2", "3", whole.size, b"", 0, {**whole.attributes, frames_at[0]: wrong})) is None
    assert sealed(Instance("1", "2", "3", 100, b"", 0, whole.attributes)) is None


async def test_the_store_has_the_table_of_what_was_received_and_of_what_was_imported(archive: Archive, tmp_path: Path) -> None:
    files = [made("none", [b"\xff\xd8" + os.urandom(50)] * 3) for _ in range(2)]
    uids = [str(dcmread(BytesIO(file), stop_before_pixels=True).SOPInstanceUID) for file in files]
    await archive.receive(Incoming(files[0]))
    await archive.settle()
    (tmp_path / "second.dcm").write_bytes(files[1])
    await Importer(archive.vault, archive.catalog).run([tmp_path / "second.dcm"], lambda _: None)
    tables = await asyncio.to_thread(lambda: [sealed(instance_in(file)) for file in files])
    rows = {row.attributes.get("sop-uid"): row.attributes for row in archive.vault.ls()}
    for uid, table in zip(uids, tables, strict=True):
        (known,) = archive.catalog.instances(uid)
        assert sealed(known) == table is not None
        assert frames_at[0] in rows[uid]  # in the sealed header, so that an index that is made again has it, too
