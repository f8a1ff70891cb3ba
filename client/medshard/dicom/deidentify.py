"""Taking out of a DICOM data set who it is of: the Basic Application Level Confidentiality Profile of PS3.15 annex E.

What is done to which attribute is the table of the library dicom-anonymizer (PS3.15 2026c, table E.1-1). The library looks at the top
level of a data set only; here every item of every sequence is walked, and what no table can foresee is dealt with: private attributes
and attributes that this program does not know go, person names go wherever they stand, the file's preamble and meta information are
made anew, and a value that identified the patient and turns up again elsewhere, in a comment or an identifier, empties that place too.

UIDs become others, the same ones each time that the same secret is given, so that references between copies hold. Nobody without the
secret can tell which they were, or whether two copies for two receivers are of one patient.

Law: a data set in, a data set out. What cannot be made clean raises ``Unclean``: no half-clean copy leaves this module. Pixels are not
looked at.
"""

from __future__ import annotations

import hmac
import io
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Final

from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector
from dicomanonymizer.simpledicomanonymizer import replace_element
from pydicom.datadict import dictionary_has_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filereader import dcmread
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag
from pydicom.uid import UID, UID_dictionary  # type: ignore[attr-defined]  # it is documented

table: Final = "dicomfields_2026c"
sequence_depth_max: Final = 32
word_letters_least: Final = 4  # shorter ones are in too many other words; the attributes that hold them are emptied all the same
word_digits_least: Final = 6

_method: Final = "medshard, PS3.15 2026c table E.1-1"
_documents: Final = ("1.2.840.10008.5.1.4.1.1.104.", "1.2.840.10008.1.3.10")  # encapsulated PDF, CDA, STL…; DICOMDIR
_required: Final = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_text: Final = frozenset(("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UN", "UR", "UT"))
_times: Final = frozenset(("DA", "DT", "TM"))
_pixels: Final = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))
_at_risk: Final = frozenset(
    ("US", "IVUS", "ES", "XC", "SC", "OT", "XA", "RF", "DX", "CR", "SM", "GM", "ECG", "DOC", "BI", "OP", "OPT", "EC", "HC")
)
_identifying: Final = (
    "PatientName", "PatientID", "PatientBirthDate",
    "IssuerOfPatientID", "OtherPatientIDs", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName",
    "PatientAddress", "PatientTelephoneNumbers", "PatientTelecomInformation", "MedicalRecordLocator", "InsurancePlanIdentification",
    "MilitaryRank", "BranchOfService", "CountryOfResidence", "RegionOfResidence", "ResponsiblePerson", "ResponsibleOrganization",
    "AccessionNumber", "IssuerOfAccessionNumberSequence", "AdmissionID", "ServiceEpisodeID", "FillerOrderNumberImagingServiceRequest",
    "PlacerOrderNumberImagingServiceRequest", "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName",
    "ReferringPhysicianName", "ReferringPhysicianAddress", "ReferringPhysicianTelephoneNumbers", "ConsultingPhysicianName",
    "PhysiciansOfRecord", "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "OperatorsName", "RequestingPhysician",
    "RequestingService", "ScheduledPerformingPhysicianName", "PersonName", "VerifyingObserverName", "ReviewerName", "DeviceSerialNumber",
    "DetectorID", "GantryID", "CassetteID", "PlateID", "ScheduledStationName", "PerformedStationName", "PerformedLocation",
    "ClinicalTrialSponsorName", "ClinicalTrialSubjectID", "ClinicalTrialSiteName", "CurrentPatientLocation", "PatientInstitutionResidence",
)  # fmt: skip


class Profile(StrEnum):
    """What is kept of what the Basic Profile takes."""

    BASIC = "basic"
    KEEP_DATES = "keep-dates"  # Retain Longitudinal Temporal Information Full Dates Option: all dates and times but those of the patient
    KEEP_UIDS = "keep-uids"  # Retain UIDs Option


_codes: Final = {
    Profile.BASIC: (("113100", "Basic Application Confidentiality Profile"),),
    Profile.KEEP_DATES: (
        ("113100", "Basic Application Confidentiality Profile"),
        ("113106", "Retain Longitudinal Temporal Information Full Dates Option"),
    ),
    Profile.KEEP_UIDS: (("113100", "Basic Application Confidentiality Profile"), ("113110", "Retain UIDs Option")),
}


class Unclean(Exception):
    """A file of which no clean copy can be made, and why."""


@dataclass(frozen=True, slots=True)
class Clean:
    """A copy that nobody is named in. ``warnings`` are for people to look at."""

    data: bytes
    study: str
    series: str
    uid: str
    warnings: tuple[str, ...] = ()


def deidentify(data: bytes, profile: Profile, secret: bytes) -> Clean:
    """A clean copy of one file. The same ``secret`` (32 bytes) gives the same pseudonyms. Raises Unclean."""
    try:
        dataset = dcmread(io.BytesIO(data))
        if missing := [name for name in _required if not dataset.get(name)]:
            raise Unclean(f"has no {missing[0]}")
        telling = _telling(dataset, profile)
        original = str(dataset.get("PatientID", "")), str(dataset.get("PatientName", ""))
        warnings = tuple(_warnings(dataset))
        if str(dataset.get("SOPClassUID", "")).startswith(_documents):
            raise Unclean("a document in a DICOM file, whose text no table can clean")
        _Cleaning(profile, secret).dataset(dataset, 0)
        _forget(dataset, telling, 0)
        _mark(dataset, profile, _pseudonym(secret, "\\".join(original)))
        clean = _written(dataset)
    except Unclean:
        raise
    except Exception as error:  # broken files break anywhere in pydicom, and half of one may be clean
        raise Unclean(f"cannot be cleaned: {type(error).__name__}: {str(error)[:200]}") from error
    if left := next((word for word in telling if word in clean), None):
        raise Unclean(
            f"something that identifies the patient is still in it, perhaps inside the compressed pixels ({len(left)} characters)"
        )
    return Clean(clean, str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID), str(dataset.SOPInstanceUID), warnings)


class _Cleaning:
    """One table, one profile, one secret."""

    def __init__(self, profile: Profile, secret: bytes) -> None:
        self._profile = profile
        self._secret = secret

    def dataset(self, dataset: Dataset, depth: int) -> None:
        """Clean one data set and all that is in it."""
        if depth > sequence_depth_max:
            raise Unclean("sequences in sequences, more than 32 deep")
        for tag in list(dataset.keys()):
            if tag.is_private or tag.element == 0 or not dictionary_has_tag(tag) or tag == 0xFFFCFFFC:
                del dataset[tag]
                continue
            if tag in _pixels:
                continue
            element = dataset[tag]
            self._element(dataset, element, _action(tag), depth)

    def _element(self, dataset: Dataset, element: DataElement, action: str, depth: int) -> None:
        keeps_time = self._profile is Profile.KEEP_DATES and element.VR in _times and element.tag.group != 0x0010
        if keeps_time and action != "":
            return
        if action in ("U", "X/Z/U*") and element.VR == "UI":
            self._uids(element)
        elif action == "X" or (element.VR == "UN" and action):
            del dataset[element.tag]
        elif action in ("Z", "X/Z") or (element.VR == "PN" and not action):
            element.value = Sequence() if element.VR == "SQ" else None
        elif action in ("D", "Z/D", "X/D", "X/Z/D"):
            self._dummy(dataset, element, depth)
        elif element.VR == "SQ":
            for item in element.value:
                self.dataset(item, depth + 1)

    def _dummy(self, dataset: Dataset, element: DataElement, depth: int) -> None:
        if element.VR == "SQ":
            for item in element.value:
                self.dataset(item, depth + 1)
                for inner in list(item):
                    if inner.VR not in ("UI", "CS"):  # what the item is and refers to; the UIDs are others by now
                        self._dummy(item, inner, depth + 1)
        elif element.VR == "UI":
            self._uids(element)
        else:
            try:
                replace_element(element)
            except NotImplementedError:
                del dataset[element.tag]

    def _uids(self, element: DataElement) -> None:
        if self._profile is not Profile.KEEP_UIDS and element.value:
            several = element.value if isinstance(element.value, MultiValue) else [element.value]
            changed = [self.uid(str(each)) for each in several]
            element.value = changed if len(changed) > 1 else changed[0]

    def uid(self, known: str) -> str:
        """Another UID: a version 8 UUID (PS3.5 annex B.2). Those that the standard defines stay."""
        if known in UID_dictionary or not known:
            return known
        number = int.from_bytes(hmac.digest(self._secret, b"uid" + known.encode("utf-8", "surrogateescape"), sha256)[:16])
        number = number & ~(0xF << 76) | 0x8 << 76
        number = number & ~(0x3 << 62) | 0x2 << 62
        return f"2.25.{number}"


def _pseudonym(secret: bytes, patient: str) -> str:
    return hmac.digest(secret, b"patient" + patient.encode("utf-8", "surrogateescape"), sha256)[:5].hex().upper()


def _read_table() -> tuple[dict[int, str], list[tuple[int, int, str]]]:
    """The action for each attribute, and for repeating groups (value, mask, action)."""
    lists = dicom_anonymization_database_selector(table)
    single: dict[int, str] = {}
    repeating: list[tuple[int, int, str]] = []
    for name, action in (
        ("D_TAGS", "D"), ("Z_TAGS", "Z"), ("X_TAGS", "X"), ("U_TAGS", "U"), ("Z_D_TAGS", "Z/D"), ("X_Z_TAGS", "X/Z"), ("X_D_TAGS", "X/D"),
        ("X_Z_D_TAGS", "X/Z/D"), ("X_Z_U_STAR_TAGS", "X/Z/U*"),
    ):  # fmt: skip
        for tag in lists[name]:
            if len(tag) == 2:
                single[tag[0] << 16 | tag[1]] = action
            else:
                repeating.append((tag[0] << 16 | tag[1], tag[2] << 16 | tag[3], action))
    return single, repeating


_single, _repeating = _read_table()


def _action(tag: BaseTag) -> str:
    return _single.get(tag) or next((action for value, mask, action in _repeating if tag & mask == value & mask), "")


def _telling(dataset: Dataset, profile: Profile) -> set[bytes]:
    """The bytes of everything in a data set that says who it is of, where it stands in it under a name that says so."""
    words: set[bytes] = set()
    uids: set[str] = set()
    for element in _elements(dataset, 0):
        if element.VR == "SQ" or not element.value:
            continue
        values = [str(value) for value in (element.value if isinstance(element.value, MultiValue) else [element.value])]
        if element.VR == "PN":
            values = [part for value in values for part in value.replace("=", "^").split("^")]
        if element.VR == "UI":
            uids.update(values)
        if element.VR == "PN" or element.keyword in _identifying or (element.VR == "UI" and _action(element.tag) == "U"):
            words.update(each for value in values for each in _encoded(value.strip(" \0"), dataset))
    kept = {uid.encode("utf-8", "replace") for uid in uids} if profile is Profile.KEEP_UIDS else set()
    return {word for word in words if not _is_dummy(word) and not any(word in uid for uid in kept)}


def _encoded(word: str, dataset: Dataset) -> Iterator[bytes]:
    if word in UID_dictionary or len(word) < (word_digits_least if word.replace(".", "").isdigit() else word_letters_least):
        return
    for encoding in {"utf-8", "latin-1", *_encodings(dataset)}:
        try:
            yield word.encode(encoding)
        except (UnicodeError, LookupError):
            continue


def _encodings(dataset: Dataset) -> list[str]:
    from pydicom.charset import convert_encodings

    return [each for each in convert_encodings(dataset.get("SpecificCharacterSet") or "ISO_IR 6") if not each.startswith("iso2022")]


def _elements(dataset: Dataset, depth: int) -> Iterator[DataElement]:
    if depth > sequence_depth_max:
        raise Unclean("sequences in sequences, more than 32 deep")
    for tag in dataset.keys():  # noqa: SIM118 - a data set gives its elements
        if tag in _pixels:
            continue
        element = dataset[tag]
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from _elements(item, depth + 1)


def _forget(dataset: Dataset, telling: set[bytes], depth: int) -> None:
    """Empty what still has one of these values in it: comments, protocol names, identifiers that were built of others."""
    for element in list(dataset):
        if element.tag in _pixels:
            continue
        if element.VR == "SQ":
            for item in element.value:
                _forget(item, telling, depth + 1)
        elif element.VR in _text and element.value is not None:
            said = str(element.value).lower()
            if any(word.decode("utf-8", "replace").lower() in said for word in telling):
                if element.VR == "UI":
                    raise Unclean(f"{element.keyword or element.tag} has a UID that the table does not change")
                element.value = None
        elif element.VR in ("OB", "OW", "OF", "OD") and isinstance(element.value, bytes) and any(word in element.value for word in telling):
            element.value = None


def _mark(dataset: Dataset, profile: Profile, pseudonym: str) -> None:
    dataset.PatientName, dataset.PatientID = f"{pseudonym}^", pseudonym
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = _method
    items = []
    for value, meaning in _codes[profile]:
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
        items.append(item)
    dataset.DeidentificationMethodCodeSequence = Sequence(items)
    dataset.LongitudinalTemporalInformationModified = "UNMODIFIED" if profile is Profile.KEEP_DATES else "REMOVED"


def _written(dataset: FileDataset) -> bytes:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = UID(dataset.SOPInstanceUID)
    dataset.file_meta, dataset.preamble = meta, bytes(128)
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _warnings(dataset: Dataset) -> Iterator[str]:
    burned, modality = str(dataset.get("BurnedInAnnotation", "")), str(dataset.get("Modality", ""))
    if burned == "YES":
        yield "its pixels have text burned in, as it says itself: look at them before you give them away"
    elif burned != "NO" and "PixelData" in dataset and (modality in _at_risk or "SECONDARY" in str(dataset.get("ImageType", ""))):
        yield f"its pixels may have text burned in ({modality or 'no modality'}): look at them before you give them away"
    if str(dataset.get("RecognizableVisualFeatures", "")) == "YES":
        yield "its pixels show a recognizable face, as it says itself"


def _is_dummy(word: bytes) -> bool:
    return word.upper() in (b"ANONYMIZED", b"ANONYMOUS")
