"""The protocol data units of the DICOM upper layer: PS3.8 section 9.3.

Law: bytes to values and back. No socket. Whatever is not the shape that PS3.8 says is ``Malformed``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import pack, unpack_from
from typing import Final

from medshard.gateway.part10 import implementation_class, implementation_version
from medshard_protocol.errors import Malformed

ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)
application_context: Final = "1.2.840.10008.3.1.1.1"
associate_bytes_max: Final = 256 * 1024  # 128 contexts with 60 transfer syntaxes each have 200 KiB
contexts_max: Final = 128
release_rq: Final = pack(">BxL4x", RELEASE_RQ, 4)
release_rp: Final = pack(">BxL4x", RELEASE_RP, 4)
ACCEPTED, NO_CLASS, NO_SYNTAX = 0, 3, 4  # results of a presentation context


@dataclass(frozen=True, slots=True)
class Context:
    """A presentation context. A proposal has many transfer syntaxes; an answer has one, and a result."""

    number: int
    abstract: str
    syntaxes: tuple[str, ...]
    result: int = ACCEPTED


@dataclass(frozen=True, slots=True)
class Role:
    """Which roles the requestor of an association plays for one SOP class."""

    sop_class: str
    scu: bool
    scp: bool


@dataclass(frozen=True, slots=True)
class Associate:
    """A-ASSOCIATE-RQ, or with ``accepted`` A-ASSOCIATE-AC."""

    called: str
    calling: str
    contexts: tuple[Context, ...]
    pdu_max: int
    roles: tuple[Role, ...] = ()
    accepted: bool = False

    def to_bytes(self) -> bytes:
        """The whole PDU."""
        items = _item(0x10, application_context.encode())
        for context in self.contexts:
            syntaxes = b"".join(_item(0x40, uid.encode()) for uid in context.syntaxes)
            if self.accepted:
                items += _item(0x21, pack("BxBx", context.number, context.result) + syntaxes)
            else:
                items += _item(0x20, pack("B3x", context.number) + _item(0x30, context.abstract.encode()) + syntaxes)
        user = _item(0x51, pack(">L", self.pdu_max)) + _item(0x52, implementation_class.encode())
        for role in self.roles:
            user += _item(0x54, pack(">H", len(role.sop_class)) + role.sop_class.encode() + bytes([role.scu, role.scp]))
        user += _item(0x55, implementation_version.encode())
        body = pack(">H2x16s16s32x", 1, _title(self.called), _title(self.calling)) + items + _item(0x50, user)
        return pack(">BxL", ASSOCIATE_AC if self.accepted else ASSOCIATE_RQ, len(body)) + body

    @classmethod
    def from_bytes(cls, body: bytes, *, accepted: bool) -> Associate:
        """From what stands behind the head of the PDU. Raises Malformed."""
        if len(body) < 68:
            raise Malformed("association: its head is too short")
        called, calling = (body[at : at + 16].decode("ascii", "replace").strip(" \0") for at in (4, 20))
        contexts: list[Context] = []
        roles: list[Role] = []
        pdu_max = 0
        for kind, value in _items(body, 68):
            if kind == (0x21 if accepted else 0x20):
                contexts.append(_context(value, accepted=accepted))
            elif kind == 0x50:
                for part, inner in _items(value, 0):
                    if part == 0x51 and len(inner) == 4:
                        (pdu_max,) = unpack_from(">L", inner)
                    elif part == 0x54:
                        roles.append(_role(inner))
        if len(contexts) > contexts_max:
            raise Malformed("association: more than 128 presentation contexts")
        return cls(called, calling, tuple(contexts), pdu_max, tuple(roles), accepted)


def reject(result: int, source: int, reason: int) -> bytes:
    """A-ASSOCIATE-RJ."""
    return pack(">BxLxBBB", ASSOCIATE_RJ, 4, result, source, reason)


def abort(source: int = 2, reason: int = 0) -> bytes:
    """A-ABORT, by the service provider."""
    return pack(">BxLxxBB", ABORT, 4, source, reason)


def data_head(context: int, size: int, *, command: bool, last: bool) -> bytes:
    """The heads of a P-DATA-TF PDU with one value of ``size`` bytes."""
    return pack(">BxLLBB", DATA, size + 6, size + 2, context, (1 if command else 0) | (2 if last else 0))


def _title(title: str) -> bytes:
    return title.encode("ascii").ljust(16)


def _item(kind: int, value: bytes) -> bytes:
    return pack(">BxH", kind, len(value)) + value


def _items(data: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    while at < len(data):
        if at + 4 > len(data):
            raise Malformed("association: an item is cut off")
        kind, size = unpack_from(">BxH", data, at)
        if at + 4 + size > len(data):
            raise Malformed("association: an item is longer than what it lies in")
        yield kind, data[at + 4 : at + 4 + size]
        at += 4 + size


def _uid(value: bytes) -> str:
    return value.decode("ascii", "replace").strip(" \0")


def _context(value: bytes, *, accepted: bool) -> Context:
    if len(value) < 4:
        raise Malformed("association: a presentation context is too short")
    abstract, syntaxes = "", []
    result = value[2] if accepted else ACCEPTED
    for kind, inner in _items(value, 4):
        if kind == 0x30:
            abstract = _uid(inner)
        elif kind == 0x40:
            syntaxes.append(_uid(inner))
    return Context(value[0], abstract, tuple(syntaxes), result)


def _role(value: bytes) -> Role:
    size = int.from_bytes(value[:2])
    if len(value) != size + 4:
        raise Malformed("association: a role selection has the wrong length")
    return Role(_uid(value[2 : 2 + size]), value[-2] == 1, value[-1] == 1)
