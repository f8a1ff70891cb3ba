"""C-GET and C-MOVE as their provider: PS3.4 sections C.4.2 and C.4.3.

Law: an instance goes out as the bytes that are stored, in the syntax that they are stored in, wherever the peer takes it; else decoded to
little endian where that can be done; else it counts as failed and is named. Reading from the store is announced before the first
byte. A few instances are read ahead, never a whole series.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from medshard.gateway import tags
from medshard.gateway.archive import Archive, Stored
from medshard.gateway.dimse import commands, identifiers
from medshard.gateway.dimse.association import Association
from medshard.gateway.dimse.commands import Command
from medshard.gateway.dimse.finding import WRONG_IDENTIFIER, cancelled
from medshard.gateway.dimse.pdus import Context
from medshard.gateway.dimse.peers import Peers
from medshard.gateway.model import Instance, Query
from medshard.gateway.part10 import head_bytes_max, read_head
from medshard.gateway.tags import Level
from medshard.gateway.transcoding import decodable, targets, transcoded
from medshard_protocol.errors import Malformed, MedshardError, Unavailable

MOVE: Final = frozenset(f"1.2.840.10008.5.1.4.1.2.{root}.2" for root in (1, 2, 3))
GET: Final = frozenset(f"1.2.840.10008.5.1.4.1.2.{root}.3" for root in (1, 2, 3))
NO_DESTINATION: Final = 0xA801
NO_MATCHES_KNOWN: Final = 0xA701
NOTHING_WAS_SENT: Final = 0xA702
SOME_FAILED: Final = 0xB000
ahead_bytes_max: Final = 32 * 1024 * 1024
ahead_max: Final = 8
piece_bytes: Final = 4 * 1024 * 1024
read_timeout_s: Final = 300.0
pairs_max: Final = 60  # of class and syntax in one association of ours: with their fallbacks 120 of 128 contexts
log = logging.getLogger("medshard.gateway")
_keys: Final = (tags.PATIENT_ID, tags.STUDY_UID, tags.SERIES_UID, tags.SOP_UID)


@dataclass(slots=True)
class _Tally:
    remaining: int
    completed: int = 0
    failed: list[str] = field(default_factory=list)
    cancelled: bool = False

    def said(self, command: Command) -> Command:
        counts = {commands.COMPLETED: self.completed, commands.FAILED: len(self.failed), commands.WARNING: 0}
        return {**command, **{number: min(count, 0xFFFF) for number, count in counts.items()}}


def get(association: Association, context: Context, command: Command, archive: Archive) -> int:
    """Send what is asked for back on the same association; how many instances were sent."""
    instances = _instances(association, context, command, archive)
    if instances is None:
        return 0
    tally = _Tally(len(instances))
    _send_all(association, instances, archive, command, tally, _Progress(association, context, command))
    return _close(association, context, command, tally)


def move(association: Association, context: Context, command: Command, archive: Archive, peers: Peers) -> int:
    """Send what is asked for to another node of the table; how many instances were sent."""
    instances = _instances(association, context, command, archive)
    if instances is None:
        return 0
    destination = str(command.get(commands.DESTINATION, ""))
    if destination not in peers:
        association.send(context.number, commands.response(command, NO_DESTINATION, f"no peer is called {destination}"))
        return 0
    tally = _Tally(len(instances))
    progress = _Progress(association, context, command)
    for part in _by_pairs(instances):
        if tally.cancelled:
            break
        done = tally.completed + len(tally.failed)
        try:
            with peers.associated(destination, _proposals(part)) as outgoing:
                _send_all(outgoing, part, archive, command, tally, progress, originator=association.calling)
        except MedshardError as error:
            log.warning(json.dumps({"event": "not-moved", "to": destination, "why": str(error)[:200]}))
            attempted = tally.completed + len(tally.failed) - done
            tally.failed += [each.uid for each in part[attempted:]]
    return _close(association, context, command, tally)


class _Progress:
    """Tells the one who asked how far it has come, and listens for C-CANCEL."""

    def __init__(self, association: Association, context: Context, command: Command) -> None:
        self.association = association
        self._context = context
        self._command = command

    def tell(self, tally: _Tally) -> None:
        said = tally.said(commands.response(self._command, commands.PENDING))
        said[commands.REMAINING] = min(tally.remaining, 0xFFFF)
        self.association.send(self._context.number, said)

    def listen(self, tally: _Tally) -> None:
        if self.association.is_readable() and cancelled(self.association):
            tally.cancelled = True


def _instances(association: Association, context: Context, command: Command, archive: Archive) -> list[Instance] | None:
    """What an identifier asks for; None after a refusal was sent."""
    try:
        asked = identifiers.read(association.identifier(), context.syntaxes[0])
        level = identifiers.levels.get(asked.get(identifiers.LEVEL, "").strip())
        if level is None or not asked.get(tags.key_of[level]):
            raise Malformed("the Query/Retrieve Level or its unique key is missing")
    except Malformed as error:
        association.send(context.number, commands.response(command, WRONG_IDENTIFIER, str(error)))
        return None
    try:
        return _found(archive, Query(level, {tag: asked[tag] for tag in _keys[: level + 1] if asked.get(tag)}))
    except Unavailable as error:
        association.send(context.number, commands.response(command, NO_MATCHES_KNOWN, str(error)))
        return None


def _found(archive: Archive, query: Query) -> list[Instance]:
    found: list[Instance] = []
    for row in archive.find(query):
        if query.level is Level.PATIENT:
            studies = archive.find(Query(Level.STUDY, {tags.PATIENT_ID: row.attributes.get(tags.PATIENT_ID, "")}))
            found += [each for study in studies for each in archive.instances(study.study)]
        else:
            found += archive.instances(row.study, row.series or None, [row.uid] if row.uid else None)
    return found


def _by_pairs(instances: Sequence[Instance]) -> Iterator[list[Instance]]:
    """Parts whose SOP classes and transfer syntaxes fit into the contexts of one association."""
    part: list[Instance] = []
    pairs: set[tuple[str, str]] = set()
    for each in instances:
        pair = each.sop_class, each.transfer_syntax
        if len(pairs | {pair}) > pairs_max:
            yield part
            part, pairs = [], set()
        part.append(each)
        pairs.add(pair)
    if part:
        yield part


def _proposals(instances: Sequence[Instance]) -> list[Context]:
    """A context for each class as it is stored, and one for each class that can be decoded."""
    pairs = list(dict.fromkeys((each.sop_class, each.transfer_syntax) for each in instances))
    fallbacks = dict.fromkeys(sop_class for sop_class, syntax in pairs if syntax in decodable)
    wanted = [(sop_class, (syntax,)) for sop_class, syntax in pairs] + [(sop_class, targets) for sop_class in fallbacks]
    return [Context(2 * number + 1, sop_class, syntaxes) for number, (sop_class, syntaxes) in enumerate(wanted)]


def _send_all(
    outgoing: Association,
    instances: Sequence[Instance],
    archive: Archive,
    request: Command,
    tally: _Tally,
    progress: _Progress,
    originator: str = "",
) -> None:
    ahead = _Ahead(archive, instances)
    try:
        for instance in instances:
            if tally.cancelled:
                return
            pieces = ahead.next()
            tally.remaining -= 1
            if _send(outgoing, instance, pieces, request, tally, originator):
                tally.completed += 1
            else:
                tally.failed.append(instance.uid)
            if progress.association is not outgoing:
                progress.listen(tally)
            progress.tell(tally)
    finally:
        ahead.close()


def _send(outgoing: Association, instance: Instance, pieces: Iterator[bytes], request: Command, tally: _Tally, originator: str) -> bool:
    """One C-STORE sub-operation; whether it went well. Raises what ends the association."""
    chosen = _context_for(outgoing, instance)
    if chosen is None:
        return False
    try:
        if chosen.syntaxes[0] != instance.transfer_syntax:
            data: Iterator[bytes] = iter([transcoded(b"".join(pieces), chosen.syntaxes[0])])
        else:
            data = _without_head(pieces)
        first = next(data, b"")
    except (MedshardError, TimeoutError):
        return False  # it is counted and named; the association goes on
    number = outgoing.next_number()
    command: Command = {
        commands.FIELD: commands.C_STORE,
        commands.AFFECTED_CLASS: instance.sop_class,
        commands.AFFECTED_UID: instance.uid,
        commands.MESSAGE: number,
        commands.PRIORITY: request.get(commands.PRIORITY, 0),
        commands.DATA_SET: commands.WITH_DATA_SET,
    }
    if originator:
        command |= {commands.ORIGINATOR: originator, commands.ORIGINATOR_MESSAGE: request.get(commands.MESSAGE, 0)}
    outgoing.send(chosen.number, command, _chained(first, data))
    while True:
        _, answer = outgoing.receive()
        if answer[commands.FIELD] == commands.C_CANCEL:
            tally.cancelled = True
        elif answer.get(commands.RESPONDING_TO) == number:
            status = int(answer.get(commands.STATUS, 0xC000))
            return status == commands.SUCCESS or status & 0xF000 == 0xB000


def _context_for(outgoing: Association, instance: Instance) -> Context | None:
    """The context to send an instance in: as it is stored if possible."""
    able = [each for each in outgoing.contexts.values() if each.abstract == instance.sop_class]
    for syntax in (instance.transfer_syntax, *(targets if instance.transfer_syntax in decodable else ())):
        for each in able:
            if each.syntaxes[0] == syntax:
                return each
    return None


class _Ahead:
    """Reads instances from the archive while earlier ones are on their way."""

    def __init__(self, archive: Archive, instances: Sequence[Instance]) -> None:
        self._archive = archive
        self._left = deque(instances)
        self._coming: deque[tuple[int, Future[bytes], Instance]] = deque()

    def next(self) -> Iterator[bytes]:
        """The next instance's file, in pieces."""
        self._fill()
        return self._pieces(*self._coming.popleft())

    def _pieces(self, size: int, first: Future[bytes], instance: Instance) -> Iterator[bytes]:
        yield first.result(read_timeout_s)
        self._fill()
        for start in range(piece_bytes, size, piece_bytes):
            yield self._begin(instance, start).result(read_timeout_s)

    def close(self) -> None:
        """Read no further."""
        for _, coming, _ in self._coming:
            coming.cancel()

    def _fill(self) -> None:
        while self._left and len(self._coming) < ahead_max and sum(min(size, piece_bytes) for size, _, _ in self._coming) < ahead_bytes_max:
            instance = self._left.popleft()
            self._coming.append((instance.size, self._begin(instance, 0), instance))

    def _begin(self, instance: Instance, start: int) -> Future[bytes]:
        async def read() -> bytes:
            stored: Stored = await self._archive.open(instance)
            return await stored.read(start, start + piece_bytes)

        return asyncio.run_coroutine_threadsafe(read(), self._archive.loop)


def _without_head(pieces: Iterator[bytes]) -> Iterator[bytes]:
    first = next(pieces)
    yield first[read_head(first[: head_bytes_max * 2]).start :]
    yield from pieces


def _chained(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    try:
        yield from rest
    except (MedshardError, TimeoutError) as error:
        raise Unavailable(
            f"the instance could not be read to its end: {error}"
        ) from None  # half of it is out: nothing can be said but this


def _close(association: Association, context: Context, command: Command, tally: _Tally) -> int:
    """The last response, with the UIDs of what failed."""
    status = commands.SUCCESS
    if tally.cancelled:
        status = commands.CANCELLED
    elif tally.failed:
        status = SOME_FAILED if tally.completed else NOTHING_WAS_SENT
    answer = tally.said(commands.response(command, status))
    if status == commands.CANCELLED:
        answer[commands.REMAINING] = min(tally.remaining, 0xFFFF)
    if not tally.failed:
        association.send(context.number, answer)
    else:
        failed: Mapping[int, str] = {identifiers.FAILED_UIDS: "\\".join(tally.failed)}
        answer[commands.DATA_SET] = commands.WITH_DATA_SET
        association.send(context.number, answer, [identifiers.write(failed, context.syntaxes[0])])
    return tally.completed
