"""Which DICOM attributes the archive is searched by, at which level each stands, and under which name it lies in a sealed header.

Law: a table and nothing else. A name is the DICOM keyword in lower case with hyphens, but for the four UIDs and the SOP class, whose names
are older than this table (docs/formats/header.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from pydicom.datadict import dictionary_VR, keyword_for_tag


class Level(IntEnum):
    """What an attribute describes."""

    PATIENT = 0
    STUDY = 1
    SERIES = 2
    INSTANCE = 3


@dataclass(frozen=True, slots=True)
class Known:
    """One attribute of the table."""

    tag: int
    name: str
    vr: str
    level: Level


STUDY_UID: Final = 0x0020000D
SERIES_UID: Final = 0x0020000E
SOP_UID: Final = 0x00080018
SOP_CLASS: Final = 0x00080016
PATIENT_ID: Final = 0x00100020
MODALITY: Final = 0x00080060
CHARACTER_SET: Final = 0x00080005
TRANSFER_SYNTAX: Final = 0x00083002  # Available Transfer Syntax UID: how the instance is stored
# What is counted, not stored (PS3.4 C.3.4)
PATIENT_STUDIES: Final = 0x00201200
PATIENT_SERIES: Final = 0x00201202
PATIENT_INSTANCES: Final = 0x00201204
STUDY_SERIES: Final = 0x00201206
STUDY_INSTANCES: Final = 0x00201208
SERIES_INSTANCES: Final = 0x00201209
MODALITIES_IN_STUDY: Final = 0x00080061
SOP_CLASSES_IN_STUDY: Final = 0x00080062

_at: Final = {
    Level.PATIENT: (0x00100010, PATIENT_ID, 0x00100021, 0x00100030, 0x00100032, 0x00100040, 0x00102160, 0x00104000),
    Level.STUDY: (
        STUDY_UID, 0x00080020, 0x00080030, 0x00080050, 0x00080051, 0x00080080, 0x00080090, 0x00080201, 0x00081030, 0x00081060,
        0x00081080, 0x00101010, 0x00101020, 0x00101030, 0x00200010,
    ),
    Level.SERIES: (
        SERIES_UID, 0x00080021, 0x00080031, MODALITY, 0x00080070, 0x00081010, 0x00081040, 0x0008103E, 0x00081050, 0x00081070, 0x00081090,
        0x00180015, 0x00181030, 0x00185100, 0x00200011, 0x00200052, 0x00200060, 0x00400244, 0x00400245, 0x00400254,
    ),
    Level.INSTANCE: (
        SOP_CLASS, SOP_UID, 0x00080008, 0x00080022, 0x00080023, 0x00080032, 0x00080033, TRANSFER_SYNTAX, 0x00200012, 0x00200013,
        0x00280008, 0x00280010, 0x00280011, 0x00280100,
    ),
}  # fmt: skip
_older: Final = {
    STUDY_UID: "study-uid",
    SERIES_UID: "series-uid",
    SOP_UID: "sop-uid",
    SOP_CLASS: "sop-class",
    TRANSFER_SYNTAX: "transfer-syntax",
}


def _name(tag: int) -> str:
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]*|[0-9]+", keyword_for_tag(tag))
    return _older.get(tag, "-".join(words).lower())


known: Final = {tag: Known(tag, _name(tag), dictionary_VR(tag), level) for level, tags in _at.items() for tag in tags}
by_name: Final = {each.name: each for each in known.values()}
counted: Final = {
    PATIENT_STUDIES: Level.PATIENT,
    PATIENT_SERIES: Level.PATIENT,
    PATIENT_INSTANCES: Level.PATIENT,
    STUDY_SERIES: Level.STUDY,
    STUDY_INSTANCES: Level.STUDY,
    MODALITIES_IN_STUDY: Level.STUDY,
    SOP_CLASSES_IN_STUDY: Level.STUDY,
    SERIES_INSTANCES: Level.SERIES,
}
key_of: Final = {Level.PATIENT: PATIENT_ID, Level.STUDY: STUDY_UID, Level.SERIES: SERIES_UID, Level.INSTANCE: SOP_UID}


def level_of(tag: int) -> Level | None:
    """The level of an attribute, stored or counted; None for one that the archive does not know."""
    return known[tag].level if tag in known else counted.get(tag)
