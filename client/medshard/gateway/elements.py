"""Walking a data set element by element: PS3.5 section 7, no more than is needed to find values and where they lie.

Law: bytes in, positions out. Nothing is decoded and no value is copied. Whatever is not the shape that PS3.5 says is ``Malformed``; a
hostile file costs at most ``depth_max`` levels and one step for each element.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final

from medshard_protocol.errors import Malformed

undefined: Final = 0xFFFFFFFF
depth_max: Final = 32  # enhanced objects nest about six deep
inflated_bytes_max: Final = 8 * 1024 * 1024  # what is looked for stands in the first groups
implicit_le: Final = "1.2.840.10008.1.2"
explicit_le: Final = "1.2.840.10008.1.2.1"
deflated_le: Final = "1.2.840.10008.1.2.1.99"
explicit_be: Final = "1.2.840.10008.1.2.2"
pixel_data: Final = 0x7FE00010
_pixels: Final = (0x7FE00008, 0x7FE00009, pixel_data)
_item: Final = 0xFFFEE000
_item_end: Final = 0xFFFEE00D
_sequence_end: Final = 0xFFFEE0DD
_long: Final = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_vrs: Final = _long | {
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS", b"ST", b"TM",
    b"UI", b"UL", b"US",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Element:
    """One element of the outermost level: ``start`` is where its value begins, ``length`` may be ``undefined``."""

    tag: int
    vr: bytes  # empty where the transfer syntax does not say
    start: int
    length: int


class _Shape:
    """How one transfer syntax writes elements."""

    def __init__(self, *, explicit: bool, big: bool) -> None:
        end = ">" if big else "<"
        self.explicit = explicit
        self.head = Struct(end + "HHL")
        self.short = Struct(end + "H")
        self.long = Struct(end + "L")


_implicit: Final = _Shape(explicit=False, big=False)
_explicit: Final = _Shape(explicit=True, big=False)
_big: Final = _Shape(explicit=True, big=True)


class Cut(Malformed):
    """The bytes end inside an element."""


def walk(data: bytes | memoryview, at: int, syntax: str, *, whole: int | None = None) -> Iterator[Element]:
    """The outermost elements from ``at`` on, the pixel data last. ``whole`` is how long the data set really is where ``data`` is its head.

    Raises Cut where ``data`` ends within an element (with a head: more is needed), Malformed for what is no data set.
    """
    shape = _implicit if syntax == implicit_le else _big if syntax == explicit_be else _explicit
    end = len(data) if whole is None else whole
    while at < end:
        element, after = _element(data, at, shape)
        if element.length != undefined and after > end:
            raise Malformed(f"data set: element {element.tag:08X} ends {after - end:,} bytes after the data set does")
        yield element
        if element.tag in _pixels:
            return
        at = _skip_items(data, element.start, shape, 1) if element.length == undefined else after


def inflated(data: bytes | memoryview) -> bytes:
    """The head of a deflated data set as it was before, at most ``inflated_bytes_max`` of it. Raises Malformed."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, inflated_bytes_max)
    except zlib.error as error:
        raise Malformed(f"data set: cannot be inflated ({error})") from None


def _element(data: bytes | memoryview, at: int, shape: _Shape) -> tuple[Element, int]:
    if at + 8 > len(data):
        raise Cut("data set: ends inside an element")
    group, number, length = shape.head.unpack_from(data, at)
    tag, start, vr = group << 16 | number, at + 8, b""
    if shape.explicit and group != 0xFFFE:
        vr = bytes(data[at + 4 : at + 6])
        if vr in _long:
            if at + 12 > len(data):
                raise Cut("data set: ends inside an element")
            (length,), start = shape.long.unpack_from(data, at + 8), at + 12
        elif vr in _vrs:
            (length,) = shape.short.unpack_from(data, at + 6)
        else:
            raise Malformed(f"data set: element {tag:08X} has no value representation that DICOM knows ({vr!r})")
    return Element(tag, vr, start, length), start + length


def _skip_items(data: bytes | memoryview, at: int, shape: _Shape, depth: int) -> int:
    """From the first item of a sequence of undefined length to what stands behind it."""
    if depth > depth_max:
        raise Malformed(f"data set: sequences nest more than {depth_max} deep")
    while True:
        item, after = _element(data, at, shape)
        if item.tag == _sequence_end:
            return after
        if item.tag != _item:
            raise Malformed(f"data set: {item.tag:08X} where an item should be")
        at = after if item.length != undefined else _skip_elements(data, item.start, shape, depth)


def _skip_elements(data: bytes | memoryview, at: int, shape: _Shape, depth: int) -> int:
    while True:
        element, after = _element(data, at, shape)
        if element.tag == _item_end:
            return after
        if element.length != undefined:
            at = after
        else:  # PS3.5 6.2.2: what is UN and of undefined length is written as implicit little endian
            at = _skip_items(data, element.start, _implicit if element.vr == b"UN" else shape, depth + 1)
