"""DICOM attributes: right for pydicom's own test files, in every character set, and bounded for files made to hurt."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from medshard.describe import Described, describe
from medshard.model import check_attributes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
folder = Path(str(get_testdata_file("CT_small.dcm", download=False))).parent


def told(data: bytes, name: bytes = b"IM1") -> Described:
    return describe(io.BytesIO(data), name)


def made(dataset: Dataset, syntax: UID = ExplicitVRLittleEndian) -> bytes:
    """A DICOM file of ``dataset``, which gets the UIDs that a file needs."""
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, "1.2.3.4"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def test_a_ct_slice_is_described() -> None:
    described = told((folder / "CT_small.dcm").read_bytes())
    assert described.problem is None
    assert described.description.media_type == "application/dicom"
    assert described.description.attributes == {
        "patient-name": "CompressedSamples^CT1",
        "patient-id": "1CT1",
        "study-uid": "1.3.6.1.4.1.5962.1.2.1.20040119072730.12322",
        "study-date": "20040119",
        "study-description": "e+1",
        "series-uid": "1.3.6.1.4.1.5962.1.3.1.1.20040119072730.12322",
        "sop-uid": "1.3.6.1.4.1.5962.1.1.1.1.1.20040119072730.12322",
        "sop-class": "1.2.840.10008.5.1.4.1.1.2",
        "modality": "CT",
        "instance-number": "1",
    }


broken = {
    "MR_truncated.dcm",
    "rtplan_truncated.dcm",
    "empty_charset_LEI.dcm",
    "meta_missing_tsyntax.dcm",
    "nested_priv_SQ.dcm",
    "no_meta.dcm",
}


@pytest.mark.parametrize("path", sorted(folder.glob("*.dcm")), ids=lambda path: path.name)
def test_every_test_file_of_pydicom_is_described(path: Path) -> None:
    with open(path, "rb") as source:
        described = describe(source, os.fsencode(path.name))
    assert (described.problem is not None) == (path.name in broken)
    if path.name not in broken:
        assert described.description.media_type == "application/dicom"
        assert described.description.attributes.keys() & {"sop-uid", "study-uid"}


@pytest.mark.parametrize("name", ["ExplVR_BigEndNoMeta.dcm", "ExplVR_LitEndNoMeta.dcm", "rtstruct.dcm"])
def test_a_file_without_preamble_is_known_by_its_content(name: str) -> None:
    assert told((folder / name).read_bytes(), b"IM1").description.media_type == "application/dicom"


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 192", "Müller^Jürgen"),
        ("ISO_IR 100", "Gómez^Lucía"),
        ("ISO_IR 144", "Люкceмбypг"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        ("ISO_IR 13", "ヤマダ^タロウ"),
    ],
)
def test_names_come_out_in_every_character_set(charset: str | list[str], name: str) -> None:
    dataset = Dataset()
    dataset.SpecificCharacterSet = charset
    dataset.PatientName = name
    described = told(made(dataset))
    assert described.problem is None
    shown = described.description.attributes["patient-name"]
    assert shown == name or charset == "ISO_IR 13"  # half-width katakana may come back full-width
    assert "\ufffd" not in shown
    assert "\x1b" not in shown


def test_an_unknown_character_set_hides_no_file() -> None:
    dataset = Dataset()
    dataset.PatientName = "Doe^Jane"
    data = made(dataset).replace(b"\x08\x00\x16\x00UI", b"\x08\x00\x05\x00CS\x06\x00BOGUS \x08\x00\x16\x00UI", 1)
    described = told(data)
    assert described.description.attributes["patient-name"] == "Doe^Jane"


def test_control_characters_in_a_name_are_dropped() -> None:
    dataset = Dataset()
    dataset.PatientName = "Doe^Jane"
    described = told(made(dataset).replace(b"Doe^Jane", b"D\x1b]0;\x07e"))
    assert described.description.attributes["patient-name"].isprintable()


def cut(at: int) -> bytes:
    return (folder / "CT_small.dcm").read_bytes()[:at]


@pytest.mark.parametrize(
    "data",
    [
        cut(140),
        cut(500),
        cut(2_000),
        cut(30_000),
        b"\0" * 128 + b"DICM",
        b"\0" * 128 + b"DICM" + b"garbage " * 500,
        b"\0" * 128 + b"DICM" + os.urandom(5_000),
    ],
    ids=["meta", "meta end", "elements", "pixels", "nothing", "text", "noise"],
)
def test_a_broken_file_is_told_and_described_as_well_as_can_be(data: bytes) -> None:
    described = told(data, b"broken.dcm")
    assert described.problem is not None
    assert described.problem.startswith("broken DICOM")


def test_a_file_cut_in_its_pixels_keeps_its_attributes() -> None:
    described = told(cut(30_000))
    assert described.description.attributes["patient-id"] == "1CT1"
    assert described.problem == "broken DICOM: ends early: 9,068 bytes of pixel data are missing"


def test_a_deflated_file_is_inflated_only_as_far_as_needed() -> None:
    dataset = Dataset()
    dataset.PatientName = "Doe^Jane"
    data = made(dataset, DeflatedExplicitVRLittleEndian)
    assert told(data).description.attributes["patient-name"] == "Doe^Jane"
    meta_end = 132 + 12 + struct.unpack("<L", data[140:144])[0]
    elements = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[meta_end:])
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = deflate.compress(elements + struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OB", 0, 200 * 2**20))
    bomb += b"".join(deflate.compress(bytes(2**20)) for _ in range(200)) + deflate.flush()
    start = time.thread_time()
    assert told(data[:meta_end] + bomb).description.attributes["patient-name"] == "Doe^Jane"
    assert time.thread_time() - start < 0.5


class Counting(io.BytesIO):
    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


def test_a_multi_frame_file_is_not_read_whole() -> None:
    dataset = Dataset()
    dataset.PatientName = "Doe^Jane"
    frames = []
    for i in range(500):
        frame = Dataset()
        frame.InstanceNumber = i
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    dataset.add_new(0x7FE00010, "OB", bytes(20 * 2**20))
    source = Counting(made(dataset))
    described = describe(source, b"IM1")
    assert described.description.attributes["patient-name"] == "Doe^Jane"
    assert described.problem is None
    assert source.taken < 32 * 1024


def test_an_element_that_claims_to_be_huge_is_not_read() -> None:
    data = made(Dataset()).replace(b"\x08\x00\x16\x00UI", b"\x08\x00\x05\x00UT\0\0" + struct.pack("<L", 2**31) + b"\x08\x00\x16\x00UI", 1)
    assert told(data + bytes(1_000)).problem is not None


def test_nested_sequences_do_not_exhaust_the_stack() -> None:
    opening = struct.pack("<HH2sHLHHL", 0x0008, 0x1115, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    described = told(made(Dataset()) + opening * 20_000)
    assert described.problem is not None


heads = [
    (folder / name).read_bytes()[:4_000]
    for name in ("CT_small.dcm", "MR_small_bigendian.dcm", "rtplan.dcm", "image_dfl.dcm", "nested_priv_SQ.dcm")
]
changes = st.lists(st.tuples(st.integers(0, 3_999), st.binary(min_size=1, max_size=8)), min_size=1, max_size=10)


@given(st.sampled_from(heads), changes)
def test_a_changed_file_raises_nothing_and_gives_attributes_that_can_be_kept(head: bytes, edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(head)
    for at, piece in edits:
        data[at : at + len(piece)] = piece
    check_attributes(told(bytes(data)).description.attributes)


def test_a_slice_takes_little_time() -> None:
    data = (folder / "CT_small.dcm").read_bytes()
    told(data)
    times = []
    for _ in range(50):
        start = time.thread_time()
        told(data)
        times.append(time.thread_time() - start)
    assert sorted(times)[25] < 0.005  # 0.9 ms here
