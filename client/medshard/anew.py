"""Storing members of packs once more, in objects of their own: because a pack has one key, and is shared and destroyed as a whole.

Law: the plaintext passes through a private scratch folder that is gone when this returns; nothing is said to be stored before it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from medshard.index import Index
from medshard.keys import VaultKeys
from medshard.ledger import LedgerClient
from medshard.lookup import Lookup
from medshard.model import Description, OnProgress
from medshard.packs import Plan, Unit
from medshard.putting import Code, Putter
from medshard.restoring import Target
from medshard.scratch import scratch_folder
from medshard.source import Part
from medshard.transport import Net
from medshard_protocol.errors import Unavailable

RestoreTo: TypeAlias = Callable[[Sequence[tuple[Target, Path | None]], OnProgress | None], Awaitable[None]]
Arrange: TypeAlias = Callable[[Sequence[Part]], Sequence[Unit]]


class Anew:
    """Of one open vault. ``restore`` writes targets to paths; ``folder`` is private to the vault's user."""

    def __init__(
        self, net: Net, keys: VaultKeys, index: Index, ledger: LedgerClient, lookup: Lookup, folder: Path, restore: RestoreTo
    ) -> None:
        self._net = net
        self._keys = keys
        self._index = index
        self._ledger = ledger
        self._lookup = lookup
        self._folder = folder
        self._restore = restore

    async def store(
        self, members: Sequence[Target], arrange: Arrange, progress: OnProgress | None, marks: Mapping[str, str] | None = None
    ) -> None:
        """Store members of packs as ``arrange`` puts them into objects, ``marks`` beside their attributes. Raises Unavailable."""
        with scratch_folder(self._folder) as place:
            paths = [Path(place, str(number)) for number in range(len(members))]
            await self._restore(list(zip(members, paths, strict=True)), progress)
            units = arrange([_part(target, path, marks or {}) for target, path in zip(members, paths, strict=True)])
            putter = Putter(self._net, self._keys, self._index, self._ledger, self._lookup, Code(*self._net.roster.code), alone=True)
            report = await putter.put(Plan(tuple(units), ()), progress)
        if report.problems:
            raise Unavailable(f"what lies in a pack could not be stored once more: {report.problems[0].message}")


def _part(target: Target, path: Path, marks: Mapping[str, str]) -> Part:
    member = next(member for member in target.header.members if member.sha256 == target.sha256)
    return Part.at(path, member.name, Description(member.media_type, {**member.attributes, **marks}))
