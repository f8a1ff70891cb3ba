"""Read the few attributes that a DICOM file is found by.

Law: the file is read up to its pixel data and no further, and never more than ``read_bytes_max`` of it; a deflated data set is inflated
to ``inflated_bytes_max`` at the most. Broken files give a sentence, not an exception. Values are decoded from the raw elements,
so pydicom's global settings, which belong to the program around us, play no part.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Mapping
from typing import BinaryIO, cast

from pydicom.charset import decode_bytes
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_partial
from pydicom.tag import BaseTag
from pydicom.valuerep import TEXT_VR_DELIMS

from medshard.text import clean

read_bytes_max = 8 * 2**20  # all elements before the pixel data that we look at; a usual slice has 2 KiB of them
inflated_bytes_max = 2**20  # our attributes stand in the first groups
value_bytes_max = 4_096  # the longest of them that DICOM allows has 64 characters a component
undefined_length = 0xFFFFFFFF

_tags = {
    0x00080016: "sop-class",
    0x00080018: "sop-uid",
    0x00080020: "study-date",
    0x00080050: "accession-number",
    0x00080060: "modality",
    0x00081030: "study-description",
    0x0008103E: "series-description",
    0x00100010: "patient-name",
    0x00100020: "patient-id",
    0x00100030: "patient-birth-date",
    0x0020000D: "study-uid",
    0x0020000E: "series-uid",
    0x00200013: "instance-number",
}
_last_tag = max(_tags)
_pixel_data = {0x7FE00008, 0x7FE00009, 0x7FE00010}
_telling = {"sop-class", "sop-uid", "study-uid", "series-uid"}  # one of these stands in every DICOM file


class _Deflated(Exception):
    """pydicom asked for the whole rest of the file, which it does only to inflate it."""


class _Window:
    """The file as pydicom may see it: reads are counted, and nobody reads to the end in one go."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._left = read_bytes_max
        self.tell = source.tell
        self.seek = source.seek
        self.ends_early = False

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            raise _Deflated
        self._left -= size
        if self._left < 0:
            raise ValueError("more than 8 MiB before the pixel data")
        data = self._source.read(size)
        if 0 < len(data) < size:
            self.ends_early = True
        return data


class _Stop:
    """Tells pydicom where to stop: at the pixel data, or past our last tag at anything that it could not skip in one step."""

    def __init__(self) -> None:
        self.pixels: int | None = None  # length the pixel data says it has

    def __call__(self, tag: BaseTag, vr: str | None, length: int) -> bool:
        if tag in _pixel_data:
            self.pixels = length
            return True
        return tag >= 0x52000000 or (tag > _last_tag and length == undefined_length)


def read_attributes(source: BinaryIO) -> tuple[dict[str, str] | None, str | None]:
    """Read the attributes of ``source``, a seekable file, and say what is wrong with it.

    Returns (None, None) or (None, problem) for a file that is not DICOM as far as anyone can tell, (attributes, problem or None)
    otherwise. Raises OSError where the file itself cannot be read, and nothing else.
    """
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    window, stop = _Window(source), _Stop()
    try:
        dataset = read_partial(cast(BinaryIO, window), stop, force=True, specific_tags=list(_tags))
        attributes = _attributes(dataset, getattr(dataset, "file_meta", {}))
    except _Deflated:
        return _deflated(source)
    except OSError as error:
        if error.errno is not None:
            raise
        return None, f"broken inside ({error})"  # pydicom says "no tag to read" with an OSError of its own
    except Exception as error:
        return None, f"broken inside ({type(error).__name__}: {clean(str(error))[:120]})"
    if attributes.keys().isdisjoint(_telling):
        return None, "no SOP class, no study and no series in it"
    return attributes, _ending(source, size, window, stop, implicit=bool(dataset.original_encoding[0]))


def _ending(source: BinaryIO, size: int, window: _Window, stop: _Stop, *, implicit: bool) -> str | None:
    """Say whether the file ends before what it announces. Where we stopped early we do not know, and say nothing."""
    if stop.pixels is None:
        return "ends early, inside an element" if window.ends_early or source.tell() > size else None
    if stop.pixels == undefined_length:
        return None
    header = source.read(8)
    long_header = not implicit and header[4:6] in (b"OB", b"OW", b"OF", b"OD", b"UN")
    missing = source.tell() + (4 if long_header else 0) + stop.pixels - size
    return f"ends early: {missing:,} bytes of pixel data are missing" if missing > 0 else None


def _deflated(source: BinaryIO) -> tuple[dict[str, str] | None, str | None]:
    """Inflate the start of a deflated data set. pydicom has read the file meta information, which we read once more."""
    source.seek(0)
    start = 0 if source.read(132)[128:] != b"DICM" else 132
    source.seek(start)
    meta = read_dataset(source, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(source.read(inflated_bytes_max), inflated_bytes_max)
        dataset = read_dataset(
            io.BytesIO(inflated), False, True, stop_when=_past_last_tag, specific_tags=cast("list[BaseTag | int]", list(_tags))
        )
        attributes = _attributes(dataset, meta)
    except Exception as error:
        return None, f"deflated, and broken inside ({type(error).__name__}: {clean(str(error))[:120]})"
    return (attributes, None) if not attributes.keys().isdisjoint(_telling) else (None, "no SOP class, no study and no series in it")


def _past_last_tag(tag: BaseTag, vr: str | None, length: int) -> bool:
    return bool(tag > _last_tag)


def _raw(dataset: Dataset | Mapping[int, object], tag: int) -> bytes:
    element = dataset.get_item(BaseTag(tag)) if isinstance(dataset, Dataset) else None
    value = element.value if isinstance(element, RawDataElement) else None
    return value[:value_bytes_max] if isinstance(value, bytes) else b""


def _attributes(dataset: Dataset, meta: Dataset | Mapping[int, object]) -> dict[str, str]:
    encodings = dataset.original_character_set
    encodings = [encodings] if isinstance(encodings, str) else list(encodings)
    attributes = {}
    for tag, name in _tags.items():
        raw = _raw(dataset, tag)
        if text := clean(decode_bytes(raw, encodings, TEXT_VR_DELIMS) if raw else ""):
            attributes[name] = _short_name(text) if name == "patient-name" else text
    for tag, name in ((0x00020002, "sop-class"), (0x00020003, "sop-uid")):
        if name not in attributes and (text := clean(_raw(meta, tag).decode("ascii", "replace"))):
            attributes[name] = text
    for name in ("study-date", "patient-birth-date"):
        if name in attributes:
            attributes[name] = attributes[name].replace(".", "").replace("-", "")  # ACR-NEMA wrote 2004.01.19
    return attributes


def _short_name(text: str) -> str:
    """Drop the empty trailing components of a person name, which mean nothing (PS3.5 section 6.2.1)."""
    return "=".join(group.rstrip("^ ") for group in text.split("=")).rstrip("=")
