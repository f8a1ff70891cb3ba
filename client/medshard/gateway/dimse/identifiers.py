"""Identifiers of queries and their answers: flat data sets, read and written element by element.

Law: bytes to ``{tag: text}`` and back. An answer is in ISO_IR 192 (UTF-8) as soon as one of its letters is not ASCII, so that a name in two
scripts comes back whole, and in no other character set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from struct import Struct
from typing import Final

from pydicom.datadict import dictionary_VR

from medshard.gateway import tags
from medshard.gateway.describing import decoded, encodings_of
from medshard.gateway.elements import deflated_le, explicit_be, implicit_le, undefined, walk
from medshard_protocol.errors import Malformed

LEVEL: Final = 0x00080052
RETRIEVE_TITLE: Final = 0x00080054
AVAILABILITY: Final = 0x00080056
FAILED_UIDS: Final = 0x00080058
utf8: Final = "ISO_IR 192"
levels: Final = {"PATIENT": tags.Level.PATIENT, "STUDY": tags.Level.STUDY, "SERIES": tags.Level.SERIES, "IMAGE": tags.Level.INSTANCE}
syntaxes: Final = ("1.2.840.10008.1.2.1", implicit_le, explicit_be)  # that identifiers are understood in, the one we like best first
_numbers: Final = {"US": "H", "UL": "L", "SS": "h", "SL": "l"}
_zero_padded: Final = ("UI", "OB", "UN")
_long: Final = ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")


def read(data: bytes, syntax: str) -> dict[int, str]:
    """Every element that is no sequence, as Unicode text; a sequence is there with an empty text. Raises Malformed."""
    if syntax == deflated_le:
        raise Malformed("a deflated identifier")
    found = [element for element in walk(data, 0, syntax) if element.tag & 0xFFFF]
    raw = {each.tag: data[each.start : each.start + each.length] if each.length != undefined else b"" for each in found}
    said = raw.get(tags.CHARACTER_SET, b"")
    encodings = encodings_of(said) if said.strip() else [_unsaid(raw.values())]
    big = syntax == explicit_be
    return {tag: "" if vr_of(tag) == "SQ" else decoded(vr_of(tag), value, encodings, big=big) for tag, value in raw.items()}


def _unsaid(values: Iterable[bytes]) -> str:
    """The encoding of keys whose sender names none, and should where they are not ASCII: UTF-8 if they can be that."""
    try:
        b"\\".join(values).decode()
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def write(values: Mapping[int, str], syntax: str) -> bytes:
    """A data set of these elements, in order, with the character set that it needs."""
    plain = all(text.isascii() for text in values.values())
    whole = {tag: text for tag, text in values.items() if tag != tags.CHARACTER_SET}
    if not plain:
        whole[tags.CHARACTER_SET] = utf8
    return b"".join(_element(tag, whole[tag], syntax) for tag in sorted(whole))


def vr_of(tag: int) -> str:
    """By the dictionary; UN for what it does not know."""
    try:
        return dictionary_VR(tag).split(" ")[0]
    except KeyError:
        return "UN"


def _element(tag: int, text: str, syntax: str) -> bytes:
    vr, end = vr_of(tag), ">" if syntax == explicit_be else "<"
    value = _value(vr, text, end)
    if syntax == implicit_le:
        return Struct("<HHL").pack(tag >> 16, tag & 0xFFFF, len(value)) + value
    if vr in _long:
        return Struct(end + "HH2s2xL").pack(tag >> 16, tag & 0xFFFF, vr.encode(), len(value)) + value
    return Struct(end + "HH2sH").pack(tag >> 16, tag & 0xFFFF, vr.encode(), len(value)) + value


def _value(vr: str, text: str, end: str) -> bytes:
    if vr in _numbers:
        numbers = [int(each) for each in text.split("\\") if each.lstrip("-").isdecimal()]
        return Struct(f"{end}{len(numbers)}{_numbers[vr]}").pack(*numbers)
    data = b"" if vr == "SQ" else text.encode()
    return data + (b"\0" if vr in _zero_padded else b" ") * (len(data) % 2)
