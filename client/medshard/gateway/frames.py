"""Where each frame of an instance lies in its file, so that one frame of two hundred megabytes is a range read.

Native pixels are reckoned. Of encapsulated ones the offset tables tell, basic (PS3.5 section A.4) or extended; where there is neither, the
items are walked once. What was found while the instance was packed stands in its sealed header (docs/formats/header.md).

Law: places in, places out: the pixels themselves are not looked at, but for two bytes where only a codec's start marker tells where a frame
begins. What does not fit together is ``Malformed``.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgpack

from medshard.gateway.describing import pixels_at
from medshard.gateway.elements import Cut, explicit_be, walk
from medshard.gateway.model import Instance
from medshard.gateway.part10 import read_head
from medshard.model import attribute_value_max, attributes_max
from medshard_protocol.errors import Absent, Malformed, MedshardError

frames_max: Final = 1_000_000
head_read: Final = 64 * 1024
said_frames_max: Final = 4_000  # more of them fit into no header
frames_at: Final = ("frames-at", "frames-at-2", "frames-at-3", "frames-at-4")  # header attributes
extended_offsets: Final = 0x7FE00001
_item: Final = b"\xfe\xff\x00\xe0"
_end: Final = b"\xfe\xff\xdd\xe0"
_starts: Final = (b"\xff\xd8", b"\xff\x4f")  # JPEG and JPEG-LS; JPEG 2000 codestreams

Read = Callable[[int, int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class FrameTable:
    """Where frames lie: of native pixels ``bits`` each from ``start`` on; of encapsulated ones from where to where, item heads included."""

    count: int
    start: int = 0
    bits: int = 0
    items: tuple[tuple[int, int], ...] = ()

    @property
    def encapsulated(self) -> bool:
        """Whether there are items."""
        return bool(self.items)

    def place(self, number: int) -> tuple[int, int, int]:
        """Bytes of frame ``number``, from 1: (first, last + 1, bits to skip in the first). Raises Absent."""
        if not 1 <= number <= self.count:
            raise Absent(f"there is no frame {number}: the instance has {self.count}")
        if self.items:
            return (*self.items[number - 1], 0)
        first = (number - 1) * self.bits
        return self.start + first // 8, self.start + -(-(first + self.bits) // 8), first % 8

    def to_bytes(self) -> bytes:
        """To be kept in a cache."""
        packed: bytes = msgpack.packb([self.count, self.start, self.bits, [place for pair in self.items for place in pair]])
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> FrameTable:
        """What was kept, by this program alone."""
        count, start, bits, flat = msgpack.unpackb(data)
        return cls(count, start, bits, tuple(zip(flat[::2], flat[1::2], strict=True)))


def native(instance: Instance) -> FrameTable | None:
    """The table of native pixels, from what the catalog knows; None for encapsulated ones. Raises Absent where there are no pixels."""
    start, length = _pixels(instance)
    if length is None:
        return None
    count = _number(instance, "number-of-frames", 1)
    rows, columns, bits = (_number(instance, name, 0) for name in ("rows", "columns", "bits-allocated"))
    if bits == 1 and rows and columns:
        return FrameTable(count, start, rows * columns)
    return FrameTable(count, start, length // count * 8)


async def encapsulated(instance: Instance, read: Read) -> FrameTable:
    """The table of encapsulated pixels. Raises Malformed, and what ``read`` raises."""
    start, _ = _pixels(instance)
    count = _number(instance, "number-of-frames", 1)
    head = await read(start, min(start + head_read, instance.size))
    if head[:4] != _item:
        raise Malformed("encapsulated pixels without an offset table item")
    size = int.from_bytes(head[4:8], "little")
    if size > 4 * frames_max or size % 4:
        raise Malformed("an offset table of a size that it cannot have")
    table = head[8 : 8 + size] if len(head) >= 8 + size else await read(start + 8, start + 8 + size)
    base = start + 8 + size
    offsets = [int.from_bytes(table[at : at + 4], "little") for at in range(0, size, 4)]
    if len(offsets) != count and count > 1:
        offsets = await _extended(instance, read, start, count)
    if len(offsets) == count:
        return FrameTable(count, items=_between([base + offset for offset in offsets], instance.size))
    if count == 1:
        return FrameTable(1, items=((base, instance.size),))
    return FrameTable(count, items=await _walked(instance, read, base, count))


def is_said(instance: Instance) -> bool:
    """Whether a sealed header should tell where the frames lie: there are several, and they are encapsulated. Raises Malformed."""
    encapsulated = instance.attributes.get(pixels_at, "").endswith("undefined")
    return encapsulated and 1 < _number(instance, "number-of-frames", 1) <= said_frames_max


async def said(instance: Instance, read: Read) -> dict[str, str]:
    """The header attributes that tell where encapsulated frames lie; none where they do not fit. Raises as ``encapsulated``."""
    start, _ = _pixels(instance)
    numbers, at = [], start
    for first, after in (await encapsulated(instance, read)).items:
        numbers += [first - at, after - first]
        at = after
    text = base64.b64encode(zlib.compress(msgpack.packb(numbers), 9)).decode()
    pieces = [text[at : at + attribute_value_max] for at in range(0, len(text), attribute_value_max)]
    if len(pieces) > len(frames_at) or len(instance.attributes) + len(pieces) > attributes_max:
        return {}
    return dict(zip(frames_at, pieces, strict=False))


def sealed(instance: Instance) -> FrameTable | None:
    """The table in an instance's header; None where there is none, or none that fits its size."""
    text = "".join(instance.attributes.get(name, "") for name in frames_at)
    if not text:
        return None
    try:
        stream = zlib.decompressobj()
        numbers = msgpack.unpackb(stream.decompress(base64.b64decode(text, validate=True), 20 * said_frames_max))
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        if not stream.eof or len(pairs) != _number(instance, "number-of-frames", 1) or any(gap < 0 or length < 1 for gap, length in pairs):
            return None
        at, items = _pixels(instance)[0], []
        for gap, length in pairs:
            items.append((at + gap, at + gap + length))
            at += gap + length
    except (ValueError, TypeError, zlib.error, MedshardError):
        return None  # of a later version, or of another hand: the pixels tell
    return FrameTable(len(items), items=tuple(items)) if at <= instance.size else None


def unwrapped(data: bytes) -> bytes:
    """A frame without the heads of its items."""
    parts: list[bytes] = []
    at = 0
    while data[at : at + 4] == _item:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        parts.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    if not parts or at > len(data):
        raise Malformed("a frame that is not where its table says")
    return b"".join(parts)


def shifted(data: bytes, skip: int, bits: int) -> bytes:
    """A frame of single bits that begins within a byte, moved to the beginning of one."""
    number = int.from_bytes(data, "little") >> skip & ((1 << bits) - 1)
    return number.to_bytes(-(-bits // 8), "little")


async def _extended(instance: Instance, read: Read, start: int, count: int) -> list[int]:
    """What the extended offset table says, or nothing."""
    head = await read(0, start)
    meta = read_head(head)
    if meta.transfer_syntax == explicit_be:
        return []
    try:
        for element in walk(head, meta.start, meta.transfer_syntax, whole=instance.size):
            if element.tag == extended_offsets and element.length == 8 * count:
                data = head[element.start : element.start + element.length]
                return [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    except Cut:
        return []
    return []


async def _walked(instance: Instance, read: Read, base: int, count: int) -> tuple[tuple[int, int], ...]:
    """The frames by their items: one for each, or as many as begin with a codec's marker."""
    items: list[tuple[int, int]] = []
    begins: list[int] = []
    at = base
    while at + 8 <= instance.size:
        head = await read(at, min(at + 10, instance.size))
        if head[:4] == _end:
            break
        if head[:4] != _item:
            raise Malformed("encapsulated pixels with something between their items")
        if len(items) >= frames_max:
            raise Malformed("encapsulated pixels with more than a million items")
        if head[8:10] in _starts:
            begins.append(at)
        after = at + 8 + int.from_bytes(head[4:8], "little")
        items.append((at, after))
        at = after
    if len(items) == count:
        return tuple(items)
    if len(begins) == count:
        return _between(begins, items[-1][1])
    raise Malformed(f"{count} frames in {len(items)} items, and nothing tells which belong together")


def _between(starts: Sequence[int], end: int) -> tuple[tuple[int, int], ...]:
    def pairs() -> Iterator[tuple[int, int]]:
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            if not start < stop <= end:
                raise Malformed("an offset table whose places are not in order")
            yield start, stop

    return tuple(pairs())


def _pixels(instance: Instance) -> tuple[int, int | None]:
    said = instance.attributes.get(pixels_at, "")
    start, _, length = said.partition(" ")
    if not start.isdecimal():
        raise Absent("the instance has no pixels")
    return int(start), None if length == "undefined" else int(length)


def _number(instance: Instance, name: str, otherwise: int) -> int:
    text = instance.attributes.get(name, "").partition("\\")[0].strip()
    number = int(text) if text.isdecimal() else otherwise
    if number > frames_max or (number < 1 and otherwise):
        raise Malformed(f"{name} is {text[:20]}")
    return number
