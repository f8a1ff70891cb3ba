"""Making a proof for outsiders: everything is fetched from one node, and nothing it says is believed.

Law: the finished proof is checked against this vault's own genesis file, as its receiver will check it, before anybody gets it. Only the
salt and the path of the one document leave the sealed header; the file key does not.

The paths are computed from the log's tiles (C2SP), so a node need not make proofs, and does not learn which it would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from medshard.restoring import Target
from medshard.transport import Net
from medshard_protocol import evidence, merkle
from medshard_protocol.checkpoint import Checkpoint, Note, cosigners, open_published
from medshard_protocol.documentproof import DocumentProof, First, Opening, Path, Place, Proven, Seal, Stamp, Step
from medshard_protocol.entries import Entry, Timestamp
from medshard_protocol.errors import Absent, Damaged, Malformed, MedshardError, Refused, Unavailable
from medshard_protocol.merkle import hash_size, sha256
from medshard_protocol.proofs import Places
from medshard_protocol.roster import Node, Roster
from medshard_protocol.rosters import Link
from medshard_protocol.tiles import TileName, tile_height, tile_width, unpack_bundle

full_timeout_s: Final = 12.0  # the node asks all others, several times if need be
timeout_s: Final = 4.0
first_older_s: Final = 60  # a checkpoint of the day that is hardly older than the proof's says nothing more


class Tiles:
    """The log's tiles at one node, as of one checkpoint. What is computed from them is to be checked against the root."""

    def __init__(self, net: Net, node: Node, size: int) -> None:
        self._net = net
        self._node = node
        self._size = size
        self._files: dict[TileName, bytes] = {}

    async def entry(self, index: int) -> bytes:
        """One entry."""
        name = self._name(None, index >> tile_height, self._size)
        return unpack_bundle(await self._file(name), name.width)[index % tile_width]

    async def place(self, index: int) -> Place:
        """One entry with its audit path."""
        if not 0 <= index < self._size:
            raise Damaged(f"a node speaks of entry {index} of a log that has {self._size}")
        ranges = merkle.inclusion_ranges(index, self._size)
        return Place(index, await self.entry(index), await self._roots(ranges))

    async def consistency(self, old_size: int) -> Path:
        """The proof that the log of that size is the beginning of this one."""
        if not 0 <= old_size <= self._size:
            raise Damaged(f"a node speaks of a log of {old_size} entries, and there are {self._size}")
        return await self._roots(merkle.consistency_ranges(old_size, self._size))

    async def _roots(self, ranges: Sequence[merkle.Range]) -> Path:
        found = []
        for start, end in ranges:
            found.append(merkle.fold([await self._hash(*node) for node in merkle.perfect_nodes(start, end)], sha256))
        return tuple(found)

    async def _hash(self, level: int, index: int) -> bytes:
        tile_level, rows = divmod(level, tile_height)
        first = index << rows
        name = self._name(tile_level, first >> tile_height, self._size >> tile_height * tile_level)
        data, at = await self._file(name), (first % tile_width) * hash_size
        if len(data) != name.width * hash_size:
            raise Malformed(f"tile {name.path()}: {len(data)} bytes")
        return merkle.root([data[at + n * hash_size : at + (n + 1) * hash_size] for n in range(1 << rows)], sha256)

    @staticmethod
    def _name(level: int | None, number: int, hashes: int) -> TileName:
        return TileName(level, number, min(tile_width, hashes - number * tile_width))

    async def _file(self, name: TileName) -> bytes:
        if name not in self._files:
            self._files[name] = await self._net.call(self._node, "GET", f"/log/tile/{name.path()}", timeout_s=timeout_s, ok=(200,))
        return self._files[name]


class Prover:
    """Makes proofs for one vault."""

    def __init__(self, net: Net, genesis: Roster, links: Sequence[Link]) -> None:
        self._net = net
        self._genesis = genesis
        self._links = links  # to the roster that ``net`` goes by

    async def prove(self, target: Target) -> tuple[DocumentProof, Proven]:
        """A proof of one document, checked. Raises Unavailable where no node can give what it takes."""
        opening = opening_of(target)
        failures: list[str] = []
        for node in self._net.roster.nodes:
            try:
                proof = await self._ask(node, target, opening)
                return proof, proof.verify(self._genesis)
            except MedshardError as error:
                failures.append(f"{node.name}: {error}")
        raise Unavailable(f"no node gives what a proof takes ({'; '.join(failures)})", hint="a quorum of institutions must be up")

    async def _ask(self, node: Node, target: Target, opening: Opening) -> DocumentProof:
        note = await self._get(node, "/log/checkpoint?full=1", full_timeout_s)
        checkpoint = open_published(note, self._net.roster, pq=True)
        places = Places.from_bytes(await self._get(node, f"/v1/ledger/places/{target.manifest.file_id.hex()}"))
        tiles = Tiles(self._net, node, checkpoint.size)
        proof = DocumentProof(await tiles.place(target.inclusion.index), note, opening, await tiles.place(places.enrolled))
        steps = await self._steps(node, places, checkpoint)
        stamp = await _stamp(tiles, places, checkpoint)
        return DocumentProof(proof.register, note, opening, proof.enrolment, steps, await self._first(node, target, note), stamp)

    async def _get(self, node: Node, path: str, timeout_s: float = timeout_s) -> bytes:
        return await self._net.call(node, "GET", path, timeout_s=timeout_s, ok=(200,))

    async def _steps(self, node: Node, places: Places, checkpoint: Checkpoint) -> tuple[Step, ...]:
        """Every change of the roster, sealed by the cosigners of the roster before."""
        if len(places.approvals) < len(self._links):
            raise Unavailable("knows fewer changes of the roster than this vault", hint="try again in a moment")
        steps, roster = [], self._genesis
        for link, approvals in zip(self._links, places.approvals, strict=False):
            sealed = await self._sealed(roster, checkpoint)
            size = checkpoint.size if not sealed else open_published(sealed, roster, pq=True).size
            tiles = Tiles(self._net, node, size)
            shown = [await tiles.place(index) for index in approvals]
            seal = Seal(sealed, tuple((place.index, place.path) for place in shown))
            steps.append(Step(Link(link.roster, tuple(place.entry for place in shown)), seal))
            roster = Roster.from_bytes(link.roster)
        return tuple(steps)

    async def _sealed(self, roster: Roster, checkpoint: Checkpoint) -> bytes:
        """The head that a roster's cosigners gave at its end, from whichever node kept it; empty if none did."""
        for node in self._net.roster.nodes:
            try:
                note = await self._get(node, f"/log/checkpoint?roster={roster.number}")
                if open_published(note, roster, pq=True).size <= checkpoint.size:
                    return note
            except MedshardError:
                continue
        return b""  # today's cosigners may still be a quorum of that roster; the check will tell

    async def _first(self, node: Node, target: Target, note: bytes) -> First | None:
        """The oldest checkpoint over the registration that this vault has seen or the node has kept, if that was some time ago."""
        index, now = target.inclusion.index, self._published(note)
        seen = [(self._published(target.inclusion.checkpoint), target.inclusion.checkpoint)]
        try:
            kept = await self._get(node, f"/v1/ledger/heads/{index}")
            seen.append((self._published(kept), kept))
        except MedshardError:
            pass  # it has none; an index that was made anew knows nothing older either
        old = [(head[1], head[0].size, data) for head, data in seen if head is not None and head[0].size > index]
        if now is None or not old:
            return None
        time, size, oldest = min(old)
        if time + first_older_s >= now[1]:
            return None
        mine = oldest == target.inclusion.checkpoint
        return First(oldest, target.inclusion.path if mine else (await Tiles(self._net, node, size).place(index)).path)

    def _published(self, note: bytes) -> tuple[Checkpoint, int] | None:
        """A checkpoint, and when the last of its cosigners saw it; None if no quorum of a roster of this log published it."""
        for roster in [self._genesis, *(Roster.from_bytes(link.roster) for link in self._links)]:
            try:
                return open_published(note, roster), max(cosigners(Note.from_bytes(note), roster).values())
            except (Refused, Malformed):
                continue
        return None


async def _stamp(tiles: Tiles, places: Places, checkpoint: Checkpoint) -> Stamp | None:
    for index in places.timestamps:
        if index >= checkpoint.size:
            continue  # younger than the head that the proof stands on
        place = await tiles.place(index)
        body = Entry.from_bytes(place.entry).body
        if isinstance(body, Timestamp):
            return Stamp(place, await tiles.consistency(body.size))
    return None


def opening_of(target: Target) -> Opening:
    """Open the one leaf of the evidence that is this document's. Raises Absent where the object has no such evidence."""
    manifest, documents = target.manifest, target.header.documents
    leaves = evidence.leaves(manifest.owner, manifest.file_id, target.seal.evidence_key, documents)
    if evidence.root(leaves) != manifest.evidence:
        raise Absent("what was stored does not commit to its documents, so nothing can be proved of it")
    offsets = [member.offset for member in target.header.members] or [0]
    wanted = (target.size, target.sha256)
    member = next(at for at, document in enumerate(documents) if document == wanted and offsets[at] == target.offset)
    path = tuple(merkle.inclusion_path(leaves, member, sha256))
    salt = evidence.salt(target.seal.evidence_key, member)
    return Opening(manifest.content_sha256, salt, *wanted, member, len(documents), path)
