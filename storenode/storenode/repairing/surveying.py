"""Asking the holders of a file, just now, whether each still has its shard.

Law: a holder's word that it has its shard is believed for the moment, unless this node's own audits found it wrong, its word that it has
not for good; the registered manifest says
whose root is right, and the ledger in this node's mirror who the holders are. Nothing is moved here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import aiohttp

from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.facts import Moved
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.manifest import Manifest, manifest_bytes_max
from medshard_protocol.messages import manifest_path, root_header, shard_path
from medshard_protocol.placement import order as placement_order
from medshard_protocol.repair import holders
from medshard_protocol.repairorder import Institutions, Link, counted, objection_to_replacement
from storenode.peers import Peers
from storenode.repairing import ground
from storenode.repairing.ground import Denied, Standing
from storenode.routes import Node

quick_s: Final = 1.0  # holders that answer within this are alike
look_s: Final = 3.0  # for a holder to say whether it has its shard
manifest_s: Final = 20.0


@dataclass(frozen=True, slots=True)
class Case:
    """A file as manifest and ledger describe it: who should hold what."""

    manifest: Manifest
    known: Standing
    moves: dict[int, Moved]
    present: tuple[NodeId, ...]  # who should hold each shard

    @property
    def ever(self) -> list[tuple[int, NodeId]]:
        """All (shard, node) that were ever given, by the manifest or by a MOVE entry."""
        return [*((i, ref.node) for i, ref in enumerate(self.manifest.shards)), *self.known.ever]


@dataclass(frozen=True, slots=True)
class Survey(Case):
    """What the present holders of a file say, asked just now."""

    there: tuple[int, ...]  # shards that are there, those of quick nodes first
    answering: frozenset[NodeId]

    def links(self, shards: Sequence[int]) -> list[Link]:
        """The helpers that have these shards."""
        return [Link(self.present[shard], shard) for shard in shards]


class Surveyor:
    """Looks at files as one node can. ``found`` tells which shards of a file this node's audits found wrong, and where."""

    def __init__(self, node: Node, peers: Peers) -> None:
        self._node, self._peers = node, peers
        self.found: Callable[[FileId], Iterable[tuple[int, NodeId, float]]] = lambda file_id: ()

    @property
    def institution(self) -> Institutions:
        """Whose a node is."""
        return ground.institutions(self._node.ledger.state)

    def name(self, node: NodeId) -> str:
        """A node's name in the roster, or what there is instead."""
        return next((each.name for each in self._node.ledger.roster.nodes if each.id == node), node.hex()[:16])

    def case(self, manifest: Manifest, known: Standing) -> Case:
        """Who should hold what now."""
        moves = counted(manifest, known.given, self.institution)
        return Case(manifest, known, moves, holders(manifest, moves))

    async def find(self, file_id: FileId) -> Case:
        """A file's manifest, from this node or another, and who should hold what. Raises MedshardError."""
        try:
            known = ground.standing(self._node.ledger, file_id)
        except Denied as denied:
            raise denied.objection.error() from None
        return self.case(await self._manifest(file_id, known), known)

    async def survey(self, file_id: FileId) -> Survey:
        """Ask all holders of a file. Raises MedshardError."""
        case = await self.find(file_id)
        looks = await asyncio.gather(*(self.look_at(case.manifest, shard, node) for shard, node in enumerate(case.present)))
        lacking = self.found_missing(case)
        there = sorted(
            (took // quick_s, shard) for shard, (took, has) in enumerate(looks) if has and took is not None and shard not in lacking
        )
        answering = frozenset(node for node, (took, _) in zip(case.present, looks, strict=True) if took is not None)
        return Survey(case.manifest, case.known, case.moves, case.present, tuple(shard for _, shard in there), answering)

    def found_missing(self, case: Case) -> set[int]:
        """Shards that this node's audits found wrong or refused where they are now; on its own shard the disk has the last word."""
        found = self.found(case.manifest.file_id)
        return {shard for shard, node, _ in found if node != self._node.id and case.present[shard] == node}

    async def look_at(self, manifest: Manifest, shard: int, node: NodeId) -> tuple[float | None, bool]:
        """(seconds to its answer, None for none; whether it has the shard)."""
        if node == self._node.id:
            return 0.0, await asyncio.to_thread(self.has, manifest, shard)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with self._peers.open(node, "HEAD", shard_path(manifest.file_id, shard), b"", look_s) as answer:
                root = answer.headers.get(root_header, "")
                return loop.time() - began, answer.status == 204 and root == manifest.shards[shard].root.hex()
        except MedshardError:
            return None, False

    def has(self, manifest: Manifest, shard: int) -> bool:
        """Whether this node has a shard and its manifest, whole. Blocking."""
        try:
            own = self._node.store.shard_at(manifest.file_id, shard)
            self._node.store.manifest(manifest.file_id)
            return own.root == manifest.shards[shard].root and not self._node.store.bad_cells(own)
        except MedshardError:
            return False

    def ranked(self, file_id: FileId) -> list[NodeId]:
        """All nodes in the order of placement of a file."""
        return [node.id for node in placement_order(file_id, self._node.ledger.roster)]

    def successors(self, case: Case, shard: int) -> list[NodeId]:
        """The nodes that may take a shard over, in the order of placement."""
        manifest, ever, institution = case.manifest, case.known.ever, self.institution
        ranked = self.ranked(manifest.file_id)
        return [node for node in ranked if objection_to_replacement(manifest, shard, node, ever, institution) is None]

    async def _manifest(self, file_id: FileId, known: Standing) -> Manifest:
        """The registered manifest, from this node or any other."""
        try:
            manifest = Manifest.from_bytes(self._node.store.manifest(file_id))
            if ground.is_described(manifest, known):
                return manifest
        except MedshardError:
            pass
        for node in self.ranked(file_id):
            if node == self._node.id:
                continue
            try:
                async with asyncio.timeout(manifest_s), self._peers.open(node, "GET", manifest_path(file_id), b"", look_s) as answer:
                    if answer.status != 200 or (answer.content_length or 0) > manifest_bytes_max:
                        continue
                    data = await answer.content.readexactly(answer.content_length or 0)
                manifest = Manifest.from_bytes(data)
            except (MedshardError, aiohttp.ClientError, OSError, TimeoutError, EOFError):
                continue
            if ground.is_described(manifest, known):
                return manifest
        raise Unavailable("no node that answers has the manifest of this file", hint="try again when more nodes are up")
