"""Reading the whole log, as an auditor does: every entry, from a node that cannot leave one out, with the reasons of emergencies.

Law: the root over all entries is computed again and compared with the one that a quorum cosigned, before anything is told. A log may have
millions of entries: they wait in temporary files, in memory is only what tells whose a file is. Neither names nor opened reasons are
written there.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import IO, Final

import msgpack

from medshard.grants import Happened
from medshard.history import Names, Teller
from medshard.model import OnProgress, Progress
from medshard.transport import Net
from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, cosigners, open_published
from medshard_protocol.entries import Entry, entry_bytes_max
from medshard_protocol.errors import Damaged, MedshardError, Unavailable
from medshard_protocol.ids import Key
from medshard_protocol.roster import Node, Roster
from medshard_protocol.tiles import tile_names, tile_width, unpack_bundle

timeout_s: Final = 15.0
told_at_once: Final = 16  # bundles: 4,096 entries, whose times are asked for at once
OnTold = Callable[[list[Happened]], Awaitable[list[Happened]]]

_fields: Final = tuple(each.name for each in fields(Happened))


class Audited:
    """Everything that happened, in the log's order, as often as it is asked for. Lies in a file that nobody else can open."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as we do
        self._count = 0
        self._reasons: dict[int, str] = {}  # of emergencies, by place

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Happened]:
        self._file.seek(0)
        for values in msgpack.Unpacker(self._file, use_list=False):
            each = Happened(*values)
            reader = self._names.of(Key(each.reader)) if each.reader else ""
            reason = self._reasons.get(each.index, "")
            yield replace(each, author_name=self._names.of(Key(each.author)), reader_name=reader, reason=reason)

    def add(self, happened: Iterable[Happened]) -> None:
        """Put these at the end."""
        for each in happened:
            if each.reason:
                self._reasons[each.index] = each.reason
            bare = replace(each, author_name="", reader_name="", reason="")
            self._file.write(msgpack.packb([getattr(bare, name) for name in _fields]))
            self._count += 1

    def close(self) -> None:
        """Forget it all."""
        self._file.close()


async def audit(net: Net, teller: Teller, names: Names, timed: OnTold, progress: OnProgress | None = None) -> Audited:
    """Everything that ever happened to any file. ``timed`` adds what is known of times to some of it.

    Raises Unavailable when no node gives a log, Damaged for one that is not what the institutions cosigned.
    """
    checkpoint, time, nodes = await _newest(net)
    failures: list[str] = []
    for node in nodes:
        with tempfile.TemporaryFile() as entries:
            try:
                await _fetch(net, node, checkpoint, entries, progress)
            except (Unavailable, Damaged) as error:
                failures.append(str(error))
                continue
            return await _told(entries, net.roster, teller, Audited(names), time, timed)
    raise Damaged(f"no node gives the log that the institutions cosigned ({'; '.join(failures)})", hint="See `medshard doctor`.")


async def _fetch(net: Net, node: Node, checkpoint: Checkpoint, to: IO[bytes], progress: OnProgress | None) -> None:
    frontier = merkle.Frontier(merkle.sha256)
    async for bundle in _bundles(net, node, checkpoint.size):
        for entry in bundle:
            frontier.append(merkle.leaf_hash(entry, merkle.sha256))
        to.write(msgpack.packb(bundle))
        if progress:
            progress(Progress(frontier.size, checkpoint.size, "files", f"entry {frontier.size:,}"))
    if frontier.root() != checkpoint.root:
        raise Damaged(f"{node.name}: its log does not have the root that the institutions cosigned")


async def _told(entries: IO[bytes], roster: Roster, teller: Teller, audited: Audited, time: int, timed: OnTold) -> Audited:
    entries.seek(0)
    bundles = msgpack.Unpacker(entries, max_buffer_size=2 * tile_width * (entry_bytes_max + 8))
    start, some = 0, []
    for bundle in bundles:
        some.extend(bundle)
        if len(some) >= told_at_once * tile_width:
            audited.add(await timed(await asyncio.to_thread(_tell, teller, roster, start, some, time)))
            start, some = start + len(some), []
    audited.add(await timed(await asyncio.to_thread(_tell, teller, roster, start, some, time)))
    return audited


def _tell(teller: Teller, roster: Roster, start: int, entries: Sequence[bytes], time: int) -> list[Happened]:
    told: list[Happened] = []
    for index, data in enumerate(entries, start):
        try:
            entry = Entry.from_bytes(data)
            entry.verify(roster.origin_at(index))
        except MedshardError:
            continue  # without an effect for everybody
        happened = teller.tell(index, entry, time=time)
        if happened is not None:
            told.append(happened)
    return told


async def _bundles(net: Net, node: Node, size: int) -> AsyncIterator[list[bytes]]:
    for name in tile_names(size):
        if name.level is None:
            data = await net.call(node, "GET", "/log/tile/" + name.path(), timeout_s=timeout_s)
            yield unpack_bundle(data, name.width)


async def _newest(net: Net) -> tuple[Checkpoint, int, list[Node]]:
    """The newest checkpoint that any node gives, its time, and the nodes, those that have it first."""

    async def ask(node: Node) -> tuple[Checkpoint, int] | None:
        try:
            note = await net.call(node, "GET", "/log/checkpoint", timeout_s=timeout_s)
            checkpoint = open_published(note, net.roster)
        except MedshardError:
            return None
        times = sorted(cosigners(Note.from_bytes(note), net.roster).values())
        return checkpoint, times[len(times) // 2]

    nodes = net.roster.nodes
    answers = {node: answer for node, answer in zip(nodes, await asyncio.gather(*map(ask, nodes)), strict=True) if answer}
    if not answers:
        raise Unavailable("no node gives a cosigned checkpoint", hint="See `medshard doctor`.")
    ranked = sorted(answers, key=lambda node: -answers[node][0].size)
    return (*answers[ranked[0]], ranked)
