"""What other homes of the same vault have erased or retired: it leaves this home's index, as if it had been ended here.

Law: nodes are not believed. The ledger proves that this vault signed the end of a file; that it had an effect counts only if nodes of so
many institutions say so that one of them is honest. A node's silence is made up for by the others. Before a pack goes, what the other home
has stored anew of it is taken in; where that cannot be found out now, nothing is forgotten until the next time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from medshard import moves
from medshard.custody import Custody, Ended
from medshard.index import Index
from medshard.keepers import Keepers
from medshard.keys import VaultKeys
from medshard.ledger import LedgerClient
from medshard.lookup import Lookup
from medshard.putting import rows_of
from medshard.transport import Net
from medshard_protocol.entries import Entry, Erase, Retire
from medshard_protocol.errors import Absent, MedshardError, Refused
from medshard_protocol.ids import FileId
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import Node
from medshard_protocol.sharing import EndedFiles, ended_path

timeout_s: Final = 5.0
pages_max: Final = 100_000


@dataclass(slots=True)
class Told:
    """What one node says."""

    cursor: int  # everything up to there is settled, but for ``ends``
    ends: dict[FileId, Inclusion] = field(default_factory=dict)  # proved, and of files that this home knows


class Elsewhere:
    """Of one open vault in one of its homes."""

    def __init__(self, net: Net, keys: VaultKeys, index: Index, ledger: LedgerClient, lookup: Lookup, custody: Custody) -> None:
        self._net = net
        self._keys = keys
        self._index = index
        self._ledger = ledger
        self._lookup = lookup
        self._custody = custody
        self._keepers = Keepers(net, keys, ledger)

    async def learn(self, whole: bool) -> bool:
        """Forget what has ended since the last time, or ever; whether there was anything. Nodes that do not answer are asked next time."""
        nodes = self._net.roster.nodes
        told = dict(zip(nodes, await asyncio.gather(*(self._told(node, whole) for node in nodes)), strict=True))
        ends = self._believed(told)
        try:
            await self._take_in(ends)
        except MedshardError:
            return False
        for file_id, inclusion in ends.items():
            self._custody.let_go(await self._note(file_id, inclusion))
        with self._index.together():
            for node, each in told.items():
                left = [inclusion.index - 1 for file_id, inclusion in each.ends.items() if file_id not in ends]
                self._index.put_cursor(_slot(node), min([each.cursor, *left]))
        return bool(ends)

    async def _told(self, node: Node, whole: bool) -> Told:
        told = Told(-1 if whole else self._index.cursor(_slot(node)))
        at, unproved = told.cursor, False
        try:
            for _ in range(pages_max):
                path = ended_path(None if at < 0 else at)
                page = EndedFiles.from_bytes(await self._net.call(node, "GET", path, timeout_s=timeout_s))
                for inclusion in page.entries:
                    try:
                        self._take(inclusion, told)
                    except MedshardError:  # the next time begins with it
                        unproved = True
                    told.cursor = told.cursor if unproved else inclusion.index
                if page.next - 1 <= at:
                    break
                at = page.next - 1
                told.cursor = told.cursor if unproved else at
                if not page.more:
                    break
        except MedshardError:
            pass
        return told

    def _take(self, inclusion: Inclusion, told: Told) -> None:
        """Keep one entry if it ends a file that is here. Raises Refused or Malformed for what is not proved."""
        body = Entry.from_bytes(inclusion.entry).body
        if not isinstance(body, Erase | Retire):
            raise Refused("an entry that ends no file")
        if not self._index.by_file(body.file_id):
            return
        entry = self._ledger.verified(inclusion)
        if self._keys.of(entry.author) is None:
            raise Refused("the end of a file is not by its owner")
        told.ends.setdefault(body.file_id, inclusion)

    def _believed(self, told: dict[Node, Told]) -> dict[FileId, Inclusion]:
        """Of what is proved, that of which an honest institution's node says that it had an effect."""
        ends: dict[FileId, Inclusion] = {}
        institutions: dict[FileId, set[int]] = {}
        for node, each in told.items():
            for file_id, inclusion in each.ends.items():
                ends.setdefault(file_id, inclusion)
                institutions.setdefault(file_id, set()).add(node.institution)
        return {file_id: inclusion for file_id, inclusion in ends.items() if len(institutions[file_id]) > self._net.roster.quorum.f}

    async def _take_in(self, ended: Collection[FileId]) -> None:
        """Learn where the neighbours lie now whose pack is destroyed. Raises Unavailable."""
        rows = [row for file_id in ended for row in self._index.by_file(file_id) if row.member is not None]
        if not rows:
            return
        for file_id, opened in (await self._lookup.homes(list(dict.fromkeys(row.sha256 for row in rows)))).items():
            if file_id in ended or self._index.by_file(file_id) or (await self._keepers.standing(file_id)).end is not None:
                continue
            found = rows_of(opened.manifest, opened.header, opened.inclusion.index)
            self._index.add_many([(self._keys.row_tag(row.sha256), row) for row in found])

    async def _note(self, file_id: FileId, inclusion: Inclusion) -> Ended:
        try:
            known = self._custody.ended(file_id)
            if known.inclusion.index >= inclusion.index:
                return known  # with its receipts
        except Absent:
            pass
        kept = self._lookup.remembered(file_id)
        holders = [node.id for node in self._net.roster.nodes]  # without the manifest nobody knows which: each may have been one
        if kept is not None:
            holders = [ref.node for ref in kept[0].shards] + list((await moves.moved(self._net, file_id)).values())
        documents = tuple((row.size, row.sha256) for row in self._index.by_file(file_id))
        type_ = Entry.from_bytes(inclusion.entry).body.type
        return Ended(file_id, type_, inclusion, documents, (), tuple(dict.fromkeys(holders)))


def _slot(node: Node) -> bytes:
    """Beside the node's id alone, under which stands how far it has told of grants."""
    return b"ended" + node.id
