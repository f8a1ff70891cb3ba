"""Reading the whole log, as an auditor does: every entry, from a node that cannot leave one out, with the reasons of emergencies.

The root over all entries is computed again and compared with the one that a quorum cosigned, before anything is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Final

from medshard.grants import Happened
from medshard.history import Teller
from medshard.model import OnProgress, Progress
from medshard.transport import Net
from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, cosigners, open_published
from medshard_protocol.entries import Entry
from medshard_protocol.errors import Damaged, MedshardError, Unavailable
from medshard_protocol.roster import Node, Roster
from medshard_protocol.tiles import tile_names, unpack_bundle

timeout_s: Final = 15.0


async def audit(net: Net, teller: Teller, progress: OnProgress | None = None) -> tuple[list[Happened], Checkpoint, int]:
    """Everything that ever happened to any file, with the checkpoint that covers it and when that was cosigned.

    Raises Unavailable when no node gives a log, Damaged for one that is not what the institutions cosigned.
    """
    checkpoint, time, nodes = await _newest(net)
    failures: list[str] = []
    for node in nodes:
        try:
            return await _read(net, node, checkpoint, teller, progress), checkpoint, time
        except (Unavailable, Damaged) as error:
            failures.append(str(error))
    raise Damaged(f"no node gives the log that the institutions cosigned ({'; '.join(failures)})", hint="See `medshard doctor`.")


async def _read(net: Net, node: Node, checkpoint: Checkpoint, teller: Teller, progress: OnProgress | None) -> list[Happened]:
    frontier = merkle.Frontier(merkle.sha256)
    happened: list[Happened] = []
    teller.begin()
    async for bundle in _bundles(net, node, checkpoint.size):
        start = frontier.size
        happened += await asyncio.to_thread(_tell, teller, net.roster, start, bundle)
        for entry in bundle:
            frontier.append(merkle.leaf_hash(entry, merkle.sha256))
        if progress:
            progress(Progress(frontier.size, checkpoint.size, "files", f"entry {frontier.size:,}"))
    if frontier.root() != checkpoint.root:
        raise Damaged(f"{node.name}: its log does not have the root that the institutions cosigned")
    return happened


def _tell(teller: Teller, roster: Roster, start: int, bundle: Iterable[bytes]) -> list[Happened]:
    told: list[Happened] = []
    for index, data in enumerate(bundle, start):
        try:
            entry = Entry.from_bytes(data)
            entry.verify(roster.origin_at(index))
        except MedshardError:
            continue  # without an effect for everybody
        happened = teller.tell(index, entry)
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
