"""C-FIND as its provider: PS3.4 section C.4.1, for the patient root, the study root and the retired patient/study root.

Law: every key of the request comes back, filled where the archive knows it. Keys of any level match at any level (relational queries).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from medshard.gateway import tags
from medshard.gateway.archive import Archive
from medshard.gateway.dimse import commands, identifiers
from medshard.gateway.dimse.association import Association
from medshard.gateway.dimse.commands import Command
from medshard.gateway.dimse.pdus import Context
from medshard.gateway.model import OUT_OF_RESOURCES, Query, Row
from medshard.gateway.tags import Level
from medshard_protocol.errors import Malformed, Unavailable

FIND: Final = frozenset(f"1.2.840.10008.5.1.4.1.2.{root}.1" for root in (1, 2, 3))
UNABLE: Final = 0xC000
WRONG_IDENTIFIER: Final = 0xA900
_always: Final = (identifiers.LEVEL, identifiers.RETRIEVE_TITLE, identifiers.AVAILABILITY)
_not_keys: Final = (*_always, tags.CHARACTER_SET, 0x00080201)  # a time zone is said, not searched


def find(association: Association, context: Context, command: Command, archive: Archive) -> int:
    """Answer one query; how many matches were sent."""
    syntax = context.syntaxes[0]
    try:
        asked = identifiers.read(association.identifier(), syntax)
        query = query_of(asked)
    except Malformed as error:
        association.send(context.number, commands.response(command, WRONG_IDENTIFIER, str(error)))
        return 0
    sent, status = 0, commands.SUCCESS
    pending = {**commands.response(command, commands.PENDING), commands.DATA_SET: commands.WITH_DATA_SET}
    comment = ""
    for row in _rows(archive, query):
        if isinstance(row, Unavailable):
            status, comment = OUT_OF_RESOURCES, str(row)
            break
        if association.is_readable() and cancelled(association):
            status = commands.CANCELLED
            break
        association.send(context.number, pending, [identifiers.write(_answer(asked, row, association.called), syntax)])
        sent += 1
    association.send(context.number, commands.response(command, status, comment))
    return sent


def _rows(archive: Archive, query: Query) -> Iterator[Row | Unavailable]:
    """The matches; where the index cannot be reached any more, the error as the last of them: what the peer does has errors of its own."""
    try:
        yield from archive.find(query)
    except Unavailable as error:
        yield error


def query_of(asked: Mapping[int, str]) -> Query:
    """The query that an identifier stands for. Raises Malformed."""
    level = identifiers.levels.get(asked.get(identifiers.LEVEL, "").strip())
    if level is None:
        raise Malformed("the Query/Retrieve Level is none of PATIENT, STUDY, SERIES, IMAGE")
    return Query(level, {tag: text for tag, text in asked.items() if tag not in _not_keys and text and tags.level_of(tag) is not None})


def cancelled(association: Association) -> bool:
    """Read what the peer says in between; whether it is C-CANCEL."""
    _, command = association.receive()
    return command[commands.FIELD] == commands.C_CANCEL


def _answer(asked: Mapping[int, str], row: Row, title: str) -> dict[int, str]:
    said = {tag: row.attributes.get(tag, "") for tag in asked if tag != tags.CHARACTER_SET}
    names = {level: name for name, level in identifiers.levels.items()}
    key = tags.key_of[row.level]
    said[key] = row.attributes.get(key, "")
    if row.level > Level.PATIENT:
        said[identifiers.AVAILABILITY] = "ONLINE"
    return said | {identifiers.LEVEL: names[row.level], identifiers.RETRIEVE_TITLE: title}
