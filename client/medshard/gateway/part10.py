"""DICOM files: what stands before the data set (PS3.10 section 7.1), and the rule by which the gateway writes it.

Law: a data set that came by C-STORE is kept byte for byte, behind a head that follows from nothing but its SOP class, its SOP instance and
its transfer syntax: 128 zero bytes, ``DICM``, and the six elements below. So the same data set makes the same file, whoever
sends it and whenever, and its SHA-256 can be computed by anybody (docs/dicom-conformance.md). The class UID and the name never change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from struct import pack
from typing import Final

from medshard.gateway.elements import Cut, explicit_le, implicit_le, walk
from medshard_protocol.errors import Malformed

implementation_class: Final = "2.25.201735180452861126429352671048823301893"
implementation_version: Final = "MEDSHARD_1"
head_bytes_max: Final = 64 * 1024  # of preamble and file meta information; a usual one has 400 bytes
_uid_form: Final = re.compile(r"[0-9.]{1,64}")


@dataclass(frozen=True, slots=True)
class Meta:
    """What a file's head says, and where its data set begins. UIDs are empty where it says nothing."""

    sop_class: str
    sop_uid: str
    transfer_syntax: str
    start: int


def is_uid(text: str) -> bool:
    """Whether this can be a UID, as the wild has them: digits and dots, leading zeros and all."""
    return _uid_form.fullmatch(text) is not None


def head_of(sop_class: str, sop_uid: str, transfer_syntax: str) -> bytes:
    """The head by the gateway's rule. The caller has checked the UIDs."""
    rest = b"".join(
        (
            _element(0x0001, b"OB", b"\x00\x01"),
            _element(0x0002, b"UI", _uid(sop_class)),
            _element(0x0003, b"UI", _uid(sop_uid)),
            _element(0x0010, b"UI", _uid(transfer_syntax)),
            _element(0x0012, b"UI", _uid(implementation_class)),
            _element(0x0013, b"SH", implementation_version.encode()),
        )
    )
    return bytes(128) + b"DICM" + _element(0x0000, b"UL", pack("<L", len(rest))) + rest


def read_head(data: bytes | memoryview) -> Meta:
    """Read the head of a file, or guess the transfer syntax of a bare data set. Raises Malformed for what begins like no DICOM file."""
    if bytes(data[128:132]) != b"DICM":
        return Meta("", "", _guess(data), 0)
    found: dict[int, str] = {}
    start = 132
    try:
        for element in walk(data[: head_bytes_max + 132], 132, explicit_le, whole=len(data)):
            if element.tag >> 16 != 2:
                break
            start = element.start + element.length
            if element.tag in (0x00020002, 0x00020003, 0x00020010):
                found[element.tag] = bytes(data[element.start : start]).rstrip(b"\0 ").decode("ascii", "replace")
    except Malformed as error:
        if isinstance(error, Cut) or start == 132:
            raise Malformed("file meta information: broken, or longer than 64 KiB") from None
        # The data set is implicit or deflated, so its first element made no sense as an explicit one: the head ended before it.
    syntax = found.get(0x00020010, "")
    return Meta(found.get(0x00020002, ""), found.get(0x00020003, ""), syntax or _guess(data[start : start + 64]), start)


def _guess(data: bytes | memoryview) -> str:
    for syntax in (explicit_le, implicit_le):
        try:
            first = next(walk(data, 0, syntax, whole=1 << 40))
        except (Malformed, StopIteration):
            continue
        if first.tag >> 16 in (0x0002, 0x0008) and first.length < 1 << 20:
            return syntax
    raise Malformed("no DICOM file: neither DICM at byte 128 nor a data set at its beginning")


def _uid(text: str) -> bytes:
    data = text.encode("ascii")
    return data + b"\0" * (len(data) % 2)


def _element(number: int, vr: bytes, value: bytes) -> bytes:
    if vr == b"OB":
        return pack("<HH2s2xL", 0x0002, number, vr, len(value)) + value
    return pack("<HH2sH", 0x0002, number, vr, len(value)) + value
