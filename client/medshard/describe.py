"""Say what a file is, by its content first and its name second, and what people will look for it by.

Law: ``describe`` reads a bounded part of the file, raises only OSError from the file itself, and never decides whether the file
is kept: a broken file is described as plain bytes and the problem is told. pydicom and pypdf are loaded when the first file of
their kind is seen.
"""

from __future__ import annotations

import mimetypes
import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from medshard.model import Description

dicom = "application/dicom"
pdf = "application/pdf"
unknown = "application/octet-stream"
_head_bytes = 1_024
_dicom_names = (".dcm", ".dicom", ".ima")
_types = mimetypes.MimeTypes()  # the table in Python's library: the same on every machine


@dataclass(frozen=True)
class Described:
    """``problem`` is a remark for people, without the file's name; None where all is well."""

    description: Description
    problem: str | None = None


def describe(source: BinaryIO, name: bytes) -> Described:
    """Describe ``source``, a seekable binary file called ``name``. Leaves it positioned at its start.

    Raises OSError where the file cannot be read.
    """
    source.seek(0)
    try:
        return _describe(source, name, source.read(_head_bytes))
    finally:
        source.seek(0)


def _describe(source: BinaryIO, name: bytes, head: bytes) -> Described:
    lower = os.fsdecode(name).lower()
    if head[128:132] == b"DICM":
        return _dicom(source, sure=True)
    if head.startswith(b"%PDF-") or (lower.endswith(".pdf") and b"%PDF-" in head):
        return _pdf(source)
    if _bare(head, named=lower.endswith(_dicom_names)):
        return _dicom(source, sure=lower.endswith(_dicom_names))
    media_type = _types.guess_type(lower)[0] or unknown
    if head and (media_type == pdf or lower.endswith(_dicom_names)):
        kind = "PDF" if media_type == pdf else "DICOM"
        return Described(Description(unknown), f"named like a {kind} file, and is none")
    return Described(Description(media_type))


def _bare(head: bytes, *, named: bool) -> bool:
    if not named and head[:2] not in (b"\x02\0", b"\x08\0", b"\0\x02", b"\0\x08"):
        return False
    return _looks_bare(head)


def _looks_bare(head: bytes) -> bool:
    """Whether ``head`` could start a DICOM data set without preamble: group 2 or 8, a small element number, a plausible length."""
    if len(head) < 8:
        return False
    for order in "<>":
        group, element = struct.unpack(order + "HH", head[:4])
        if group in (2, 8) and element < 0x2000:
            return (head[4:6].isalpha() and head[4:6].isupper()) or struct.unpack(order + "L", head[4:8])[0] < 2**16
    return False


def _dicom(source: BinaryIO, *, sure: bool) -> Described:
    try:
        from medshard.dicom.attributes import read_attributes
    except ImportError:
        return Described(Description(dicom if sure else unknown), "DICOM attributes not read: install medshard[dicom]")
    attributes, problem = read_attributes(source)
    if attributes is None:
        return Described(Description(unknown), f"broken DICOM: {problem}" if sure else None)
    return Described(Description(dicom, attributes), f"broken DICOM: {problem}" if problem else None)


def _pdf(source: BinaryIO) -> Described:
    from medshard.policies.attributes import read_attributes

    attributes, problem = read_attributes(source)
    return Described(Description(pdf, attributes), f"PDF: {problem}" if problem else None)
