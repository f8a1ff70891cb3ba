"""What an instance says of itself: the attributes it is searched by, decoded to Unicode, and where its pixels lie.

Law: reads the head of a file and no pixels. Broken files give ``Malformed`` with a sentence and nothing else. Values are kept as DICOM
text: several are separated by backslashes, numbers are written in decimal, trailing padding is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from struct import unpack_from
from typing import Final

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

from medshard.gateway import tags
from medshard.gateway.elements import Cut, deflated_le, explicit_be, explicit_le, inflated, pixel_data, undefined, walk
from medshard.gateway.part10 import Meta, is_uid, read_head
from medshard.model import attribute_value_max
from medshard_protocol.errors import Malformed

head_bytes: Final = 256 * 1024  # enough for nearly all files; where it is not, it is doubled
head_bytes_max: Final = 64 * 1024 * 1024  # of everything before the pixel data
pixels_at: Final = "pixels-at"  # header attribute: offset in the file of the value of the pixel data, and its length or "undefined"
_text: Final = frozenset(("LO", "LT", "PN", "SH", "ST", "UC", "UT"))
_numbers: Final = {"US": ("H", 2), "UL": ("L", 4), "SS": ("h", 2), "SL": ("l", 4)}
_required: Final = {
    tags.SOP_CLASS: "SOP Class UID",
    tags.SOP_UID: "SOP Instance UID",
    tags.STUDY_UID: "Study Instance UID",
    tags.SERIES_UID: "Series Instance UID",
}

Read = Callable[[int, int], bytes]  # bytes of the file from the first number to the second


@dataclass(frozen=True, slots=True)
class Described:
    """One instance: its UIDs, and all of its attributes by their names in a sealed header."""

    study: str
    series: str
    uid: str
    sop_class: str
    transfer_syntax: str
    attributes: Mapping[str, str]


def describe(read: Read, size: int) -> Described:
    """Describe a file of ``size`` bytes. Raises Malformed; and what ``read`` raises."""
    want = min(size, head_bytes)
    while True:
        head = read(0, want)
        try:
            return _describe(head, size)
        except Cut:
            if want == size:
                raise Malformed("ends early, inside an element") from None
            if want >= head_bytes_max:
                raise Malformed("more than 64 MiB before the pixel data") from None
            want = min(size, want * 8)


def _describe(head: bytes, size: int) -> Described:
    meta = read_head(head)
    raw, pixels = _values(head, meta, size)
    big = meta.transfer_syntax == explicit_be
    encodings = encodings_of(raw.get(tags.CHARACTER_SET, b""))
    found = {
        tag: text for tag, value in raw.items() if tag in tags.known and (text := decoded(tags.known[tag].vr, value, encodings, big=big))
    }
    found[tags.TRANSFER_SYNTAX] = meta.transfer_syntax
    for tag, said in ((tags.SOP_CLASS, meta.sop_class), (tags.SOP_UID, meta.sop_uid)):
        if said and tag not in found:
            found[tag] = said
    for tag, what in _required.items():
        if not is_uid(found.get(tag, "")):
            raise Malformed(f"it has no {what}")
    attributes = {tags.known[tag].name: text for tag, text in found.items() if len(text) <= attribute_value_max}
    if pixels:
        attributes[pixels_at] = pixels
    study, series, uid = found[tags.STUDY_UID], found[tags.SERIES_UID], found[tags.SOP_UID]
    return Described(study, series, uid, found[tags.SOP_CLASS], meta.transfer_syntax, attributes)


def _values(head: bytes, meta: Meta, size: int) -> tuple[dict[int, bytes], str]:
    """The raw values of the attributes we know, and where the pixels lie."""
    raw: dict[int, bytes] = {}
    pixels = ""
    if deflated := meta.transfer_syntax == deflated_le:
        data = inflated(memoryview(head)[meta.start :])
        elements = walk(data, 0, explicit_le, whole=len(data) if len(head) == size else 1 << 40)
    else:
        data, elements = head, walk(head, meta.start, meta.transfer_syntax, whole=size)
    for element in elements:
        if element.tag == pixel_data and not deflated:
            pixels = f"{element.start} {'undefined' if element.length == undefined else element.length}"
        elif (element.tag in tags.known or element.tag == tags.CHARACTER_SET) and element.length != undefined:
            if element.start + element.length > len(data):
                raise Cut("data set: ends inside an element")
            raw[element.tag] = data[element.start : element.start + element.length]
    return raw, pixels


def encodings_of(value: bytes) -> list[str]:
    """Python's names for the values of Specific Character Set."""
    try:
        names = [name.strip() for name in value.decode("ascii").rstrip("\0 ").split("\\")]
        return convert_encodings(names if names != [""] else ["ISO_IR 6"])
    except (LookupError, UnicodeDecodeError, ValueError):
        return ["latin-1"]  # every byte means something in it, and nothing is lost: the file keeps what it says


def decoded(vr: str, value: bytes, encodings: list[str], *, big: bool) -> str:
    """A raw value as DICOM text."""
    if vr in _numbers:
        form, width = _numbers[vr]
        count = len(value) // width
        return "\\".join(map(str, unpack_from(f"{'>' if big else '<'}{count}{form}", value)))
    if vr == "DA":
        return _stripped(value.decode("ascii", "replace")).replace(".", "")  # ACR-NEMA wrote 2004.01.19
    if vr not in _text or (value.isascii() and b"\x1b" not in value):
        return _stripped(value.decode("ascii", "replace"))
    try:
        return _stripped(decode_bytes(value, encodings, PN_DELIMS if vr == "PN" else TEXT_VR_DELIMS))
    except (LookupError, UnicodeError, ValueError):
        return _stripped(value.decode("latin-1"))


def _stripped(text: str) -> str:
    return "\\".join(each.strip(" \0") for each in text.split("\\")) if "\\" in text else text.strip(" \0")
