"""De-identification on the real files in pydicom's packages, and on one that hides names wherever DICOM has room for them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from medshard.dicom.deidentify import Clean, Profile, Unclean, deidentify

secret = b"s" * 32
names = ("Mustermann", "Erika", "Krankenhaus Nordstadt", "KH_4711_0815", "Dr. Weber", "+49 511 123456", "SN-99812-X")
real = sorted(
    path for path in Path(pydicom.__file__).parent.glob("data/*_files/**/*") if path.is_file() and path.read_bytes()[128:132] == b"DICM"
)
identifying = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientAddress", "OtherPatientIDs", "AccessionNumber", "InstitutionName",
    "InstitutionAddress", "ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "PhysiciansOfRecord", "RequestingPhysician",
    "StationName", "DeviceSerialNumber", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID", "StudyDate",
    "StudyTime",
)  # fmt: skip
dummies = {"ANONYMIZED", "Anonymized", "anonymous", "Anonymous", "000000"}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's remarks on its own broken files
        yield


def values(dataset: Dataset) -> set[str]:
    """What the identifying attributes say, at every depth."""
    found: set[str] = set()
    for element in dataset.iterall():
        if element.keyword in identifying and element.value:
            found.update(part for part in str(element.value).replace("=", "^").split("^") if len(part) >= 4)
    return found


def copy_of(path: Path, profile: Profile = Profile.BASIC) -> Clean | None:
    try:
        return deidentify(path.read_bytes(), profile, secret)
    except Unclean:
        return None


def test_no_value_of_an_identifying_attribute_survives_in_any_real_file() -> None:
    copied = 0
    for path in real:
        if (clean := copy_of(path)) is None:
            continue
        copied += 1
        for value in values(pydicom.dcmread(path)) - dummies:
            for encoding in ("utf-8", "latin-1"):
                assert value.encode(encoding, "replace") not in clean.data, f"{path.name}: {value}"
    assert copied >= 140


def test_every_copy_says_by_which_profile_it_was_made_and_is_still_an_image() -> None:
    path = Path(str(get_testdata_file("CT_small.dcm")))
    original = pydicom.dcmread(path)
    clean = copy_of(path)
    assert clean is not None
    copy = pydicom.dcmread(io.BytesIO(clean.data))
    assert copy.PatientIdentityRemoved == "YES"
    assert [item.CodeValue for item in copy.DeidentificationMethodCodeSequence] == ["113100"]
    assert copy.LongitudinalTemporalInformationModified == "REMOVED"
    assert (copy.pixel_array == original.pixel_array).all()
    assert copy.file_meta.TransferSyntaxUID == original.file_meta.TransferSyntaxUID
    assert (copy.RescaleSlope, copy.PixelSpacing) == (original.RescaleSlope, original.PixelSpacing)
    assert copy.preamble == bytes(128)
    assert not [element for element in copy.iterall() if element.tag.is_private]


def hiding() -> bytes:
    """A file with names in comments, nested sequences, private attributes, other identifiers, the preamble, and after its end."""
    dataset = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    dataset.PatientName, dataset.PatientID, dataset.InstitutionName = "Mustermann^Erika", "KH_4711_0815", "Krankenhaus Nordstadt"
    dataset.ReferringPhysicianName, dataset.PatientTelephoneNumbers, dataset.DeviceSerialNumber = (
        "Dr. Weber",
        "+49 511 123456",
        "SN-99812-X",
    )
    dataset.ImageComments = "Erika Mustermann, Krankenhaus Nordstadt"
    dataset.BodyPartExamined = "KH_4711_0815"  # kept by the table, and abused
    dataset.SeriesDescription = "for Dr. Weber"
    dataset.PatientBirthDate = "19610203"
    inner, outer = Dataset(), Dataset()
    inner.PatientName, inner.CodeMeaning = "Mustermann^Erika", "call +49 511 123456"
    outer.ConceptNameCodeSequence = Sequence([inner])
    dataset.AnatomicRegionSequence = Sequence([outer])  # kept by the table
    block = dataset.private_block(0x0029, "KRANKENHAUS", create=True)
    block.add_new(0x10, "LO", "Mustermann")
    dataset.preamble = b"Mustermann".ljust(128, b"\0")
    dataset.file_meta.PrivateInformationCreatorUID = UID("1.2.3")
    dataset.file_meta.PrivateInformation = b"Krankenhaus Nordstadt"
    dataset.file_meta.SourceApplicationEntityTitle = "KH_4711_0815"
    dataset.add_new(0xFFFCFFFC, "OB", b"Mustermann Erika")
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()


@pytest.mark.parametrize("profile", list(Profile))
def test_names_are_found_wherever_dicom_has_room_for_them(profile: Profile) -> None:
    data = hiding()
    assert all(name.encode() in data for name in names)
    clean = deidentify(data, profile, secret)
    for name in (*names, "19610203"):
        assert name.lower().encode() not in clean.data.lower()
    assert str(pydicom.dcmread(io.BytesIO(clean.data)).AnatomicRegionSequence[0].get("ConceptNameCodeSequence", "")) != ""


def test_a_name_inside_the_pixels_bytes_refuses_the_copy() -> None:
    dataset = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    dataset.PatientName = "Mustermann^Erika"
    dataset.PixelData = b"Mustermann" + dataset.PixelData[10:]
    out = io.BytesIO()
    dataset.save_as(out)
    with pytest.raises(Unclean, match="still in it"):
        deidentify(out.getvalue(), Profile.BASIC, secret)


def test_references_between_copies_hold_and_another_secret_gives_other_uids() -> None:
    data = hiding()
    dataset = pydicom.dcmread(io.BytesIO(data))
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    dataset.ReferencedImageSequence = Sequence([reference])
    out = io.BytesIO()
    dataset.save_as(out)
    first, second = deidentify(data, Profile.BASIC, secret), deidentify(out.getvalue(), Profile.BASIC, secret)
    assert (first.study, first.series, first.uid) == (second.study, second.series, second.uid)
    copy = pydicom.dcmread(io.BytesIO(second.data))
    assert copy.ReferencedImageSequence[0].ReferencedSOPInstanceUID == copy.SOPInstanceUID == copy.file_meta.MediaStorageSOPInstanceUID
    assert copy.ReferencedImageSequence[0].ReferencedSOPClassUID == dataset.SOPClassUID
    other = deidentify(data, Profile.BASIC, b"t" * 32)
    assert {other.study, other.series, other.uid}.isdisjoint({first.study, first.series, first.uid})


def test_each_option_keeps_what_it_is_for_and_says_so() -> None:
    data = hiding()
    original = pydicom.dcmread(io.BytesIO(data))
    dates = pydicom.dcmread(io.BytesIO(deidentify(data, Profile.KEEP_DATES, secret).data))
    assert (dates.StudyDate, dates.AcquisitionDate) == (original.StudyDate, original.AcquisitionDate)
    assert not dates.PatientBirthDate
    assert dates.LongitudinalTemporalInformationModified == "UNMODIFIED"
    assert "113106" in [item.CodeValue for item in dates.DeidentificationMethodCodeSequence]
    assert dates.StudyInstanceUID != original.StudyInstanceUID
    uids = pydicom.dcmread(io.BytesIO(deidentify(data, Profile.KEEP_UIDS, secret).data))
    assert (uids.StudyInstanceUID, uids.SOPInstanceUID) == (original.StudyInstanceUID, original.SOPInstanceUID)
    assert not uids.StudyDate
    assert "113110" in [item.CodeValue for item in uids.DeidentificationMethodCodeSequence]


def test_pixels_with_text_burned_in_are_warned_of() -> None:
    dataset = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))

    def warned() -> tuple[str, ...]:
        out = io.BytesIO()
        dataset.save_as(out)
        return deidentify(out.getvalue(), Profile.BASIC, secret).warnings

    assert not warned()
    dataset.Modality = "US"
    assert "may have text burned in" in warned()[0]
    dataset.BurnedInAnnotation = "NO"
    assert not warned()
    dataset.BurnedInAnnotation = "YES"
    assert "says itself" in warned()[0]


def test_what_is_broken_is_refused_whole() -> None:
    for data in (b"", b"no DICOM at all" * 20, hiding()[:400]):
        with pytest.raises(Unclean):
            deidentify(data, Profile.BASIC, secret)
