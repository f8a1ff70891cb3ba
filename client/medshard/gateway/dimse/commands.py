"""DIMSE command sets: PS3.7 sections 9.3 and 10.3, and annex E.

Law: bytes to values and back. A command is a dictionary from element number to text or number; unknown elements are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import pack, unpack_from
from typing import Final

from medshard_protocol.errors import Malformed

Command = dict[int, "int | str"]
command_bytes_max: Final = 16 * 1024

AFFECTED_CLASS, REQUESTED_CLASS, FIELD, MESSAGE, RESPONDING_TO = 0x0002, 0x0003, 0x0100, 0x0110, 0x0120
DESTINATION, PRIORITY, DATA_SET, STATUS, COMMENT = 0x0600, 0x0700, 0x0800, 0x0900, 0x0902
AFFECTED_UID, REQUESTED_UID, EVENT, ACTION = 0x1000, 0x1001, 0x1002, 0x1008
REMAINING, COMPLETED, FAILED, WARNING, ORIGINATOR, ORIGINATOR_MESSAGE = 0x1020, 0x1021, 0x1022, 0x1023, 0x1030, 0x1031

C_STORE, C_GET, C_FIND, C_MOVE, C_ECHO, C_CANCEL = 0x0001, 0x0010, 0x0020, 0x0021, 0x0030, 0x0FFF
N_EVENT_REPORT, N_ACTION = 0x0100, 0x0130
RESPONSE: Final = 0x8000
NO_DATA_SET: Final = 0x0101
WITH_DATA_SET: Final = 0x0001

SUCCESS, CANCELLED, PENDING, PENDING_UNSURE = 0x0000, 0xFE00, 0xFF00, 0xFF01
PROCESSING_FAILURE, NO_SUCH_CLASS, NO_SUCH_ACTION, UNRECOGNISED, RESOURCE_LIMITATION = 0x0110, 0x0118, 0x0123, 0x0211, 0x0213

_texts: Final = frozenset((AFFECTED_CLASS, REQUESTED_CLASS, DESTINATION, COMMENT, AFFECTED_UID, REQUESTED_UID, ORIGINATOR))
_uids: Final = frozenset((AFFECTED_CLASS, REQUESTED_CLASS, AFFECTED_UID, REQUESTED_UID))
comment_chars_max: Final = 64


def encode(command: Mapping[int, int | str]) -> bytes:
    """The command set, implicit little endian, its elements in order."""
    body = b""
    for number in sorted(command):
        value = command[number]
        if isinstance(value, int):
            data = pack("<H", value)
        else:
            data = value.encode("ascii", "replace")
            data += (b"\0" if number in _uids else b" ") * (len(data) % 2)
        body += pack("<HHL", 0, number, len(data)) + data
    return pack("<HHLL", 0, 0, 4, len(body)) + body


def decode(data: bytes) -> Command:
    """A command set. Raises Malformed."""
    command: Command = {}
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise Malformed("command: ends inside an element")
        group, number, size = unpack_from("<HHL", data, at)
        value = data[at + 8 : at + 8 + size]
        at += 8 + size
        if group != 0 or len(value) != size:
            raise Malformed("command: an element of another group, or cut off")
        if number in _texts:
            command[number] = value.decode("ascii", "replace").strip(" \0")
        elif size == 2:
            (command[number],) = unpack_from("<H", value)
    if not isinstance(command.get(FIELD), int):
        raise Malformed("command: no command field")
    return command


def response(request: Mapping[int, int | str], status: int, comment: str = "") -> Command:
    """The answer to a request: what it is about is repeated."""
    answer: Command = {
        FIELD: int(request[FIELD]) | RESPONSE,
        RESPONDING_TO: request.get(MESSAGE, 0),
        DATA_SET: NO_DATA_SET,
        STATUS: status,
    }
    for asked, told in (
        (AFFECTED_CLASS, AFFECTED_CLASS),
        (REQUESTED_CLASS, AFFECTED_CLASS),
        (AFFECTED_UID, AFFECTED_UID),
        (REQUESTED_UID, AFFECTED_UID),
    ):
        if asked in request:
            answer[told] = request[asked]
    if comment:
        answer[COMMENT] = comment[:comment_chars_max]
    return answer
