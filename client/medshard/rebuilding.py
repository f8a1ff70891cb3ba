"""Rebuilding the local index: from the ledger, the nodes that live, and the keys.

The whole log is read and its root recomputed, so no node can leave a file of this vault out. Manifests come from any holder and
are checked against the hash on the ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Final

from medshard.grants import KnownGrant
from medshard.index import Index
from medshard.keys import VaultKeys
from medshard.model import Header, Progress
from medshard.placement import order
from medshard.putting import rows_of
from medshard.sealing import unwrap
from medshard.transport import Net
from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, open_published
from medshard_protocol.entries import Entry, Erase, Grant, Register, Retire, Revoke
from medshard_protocol.errors import Absent, Damaged, Malformed, MedshardError, Unavailable
from medshard_protocol.ids import FileId, Sha256
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import manifest_path
from medshard_protocol.roster import Node, Roster
from medshard_protocol.tiles import tile_names, unpack_bundle

timeout_s: Final = 10.0
manifests_at_once: Final = 16
OnProgress = Callable[[Progress], None]


async def rebuild(net: Net, keys: VaultKeys, index: Index, progress: OnProgress | None = None) -> int:
    """Fill an empty index with all files of this vault; how many rows. Raises Unavailable when no node has a whole log."""
    mine, given, ended = await _registrations(net, keys)
    with index.together():
        for known in given:
            index.put_grant(known)
    slots = asyncio.Semaphore(manifests_at_once)
    done = rows = 0
    lost: list[str] = []

    async def one(file_id: FileId, number: int, manifest_sha256: bytes) -> None:
        nonlocal done, rows
        async with slots:
            manifest = await _manifest(net, file_id, manifest_sha256)
        done += 1
        if progress:
            progress(Progress(done, len(mine), "files", file_id.hex()[:16]))
        if manifest is None:
            if file_id not in ended:
                lost.append(file_id.hex())
            return
        owner = keys.of(manifest.owner)
        if owner is None:
            return  # hash and author do not fit together: nothing of ours
        header = Header.from_bytes(unwrap(owner.vault, manifest).open_header(manifest.header))
        found = rows_of(manifest, header, number)
        index.add_many([(keys.row_tag(row.sha256), row) for row in found])
        rows += len(found)

    await asyncio.gather(*(one(file_id, number, digest) for file_id, (number, digest) in mine.items()))
    if lost:
        raise Unavailable(
            f"{len(lost)} of {len(mine)} files have no holder that answers now; {rows} rows were rebuilt",
            hint="run `medshard reindex` again when more nodes are up",
        )
    return rows


async def _registrations(net: Net, keys: VaultKeys) -> tuple[dict[FileId, tuple[int, bytes]], list[KnownGrant], set[FileId]]:
    """This vault's files, the grants that it gave, and the files that it has erased or retired, as far as it may."""
    failures: list[str] = []
    best: tuple[Checkpoint, Node] | None = None
    for node in net.roster.nodes:
        try:
            checkpoint = open_published(await net.call(node, "GET", "/log/checkpoint", timeout_s=timeout_s), net.roster)
        except MedshardError as error:
            failures.append(str(error))
            continue
        if best is None or checkpoint.size > best[0].size:
            best = (checkpoint, node)
    if best is None:
        raise Unavailable(f"no node gives a cosigned checkpoint ({'; '.join(failures[:4])})", hint="see `medshard doctor`")
    entries = [entry async for entry in _entries(net, *best)]
    leaves = [merkle.leaf_hash(entry, merkle.sha256) for entry in entries]
    if merkle.root(leaves, merkle.sha256) != best[0].root:
        raise Damaged(f"{best[1].name}: its log does not have the root that the institutions cosigned")
    mine: dict[FileId, tuple[int, bytes]] = {}
    granted: dict[Sha256, tuple[int, Grant]] = {}
    ended: dict[Sha256, int] = {}
    gone: set[FileId] = set()
    for number, entry in _mine(entries, keys, net.roster):
        match entry.body:
            case Register(file_id=file_id, manifest_sha256=digest):
                mine.setdefault(file_id, (number, digest))  # the first registration counts, as in the ledger's state
            case Grant():
                granted[entry.id] = number, entry.body
            case Revoke(grant=grant):
                ended.setdefault(grant, number)
            case Erase(file_id=file_id) | Retire(file_id=file_id):
                gone.add(file_id)
    known = [
        KnownGrant(number, file_id, grant, body.reader, body.until, body.purpose, given=True, ended=ended.get(grant, 0))
        for grant, (number, body) in granted.items()
        for file_id in body.file_ids
    ]
    return mine, known, gone


async def _entries(net: Net, checkpoint: Checkpoint, node: Node):  # type: ignore[no-untyped-def]
    for name in tile_names(checkpoint.size):
        if name.level is None:
            data = await net.call(node, "GET", "/log/tile/" + name.path(), timeout_s=timeout_s)
            for entry in unpack_bundle(data, name.width):
                yield entry


def _mine(entries: list[bytes], keys: VaultKeys, roster: Roster) -> Iterator[tuple[int, Entry]]:
    for number, data in enumerate(entries):
        try:
            entry = Entry.from_bytes(data)
            if isinstance(entry.body, Register | Grant | Revoke | Erase | Retire) and keys.of(entry.author):
                entry.verify(roster.origin_at(number))
                yield number, entry
        except MedshardError:
            continue  # an entry of another type or a void one: the fold ignores it too


async def _manifest(net: Net, file_id: FileId, manifest_sha256: bytes) -> Manifest | None:
    # Rendezvous order: the holders come first.
    for node in sorted(order(file_id, net.roster), key=lambda node: net.health.is_suspect(node.id)):
        try:
            manifest = Manifest.from_bytes(await net.call(node, "GET", manifest_path(file_id), timeout_s=timeout_s))
        except (Absent, Unavailable, Malformed):
            continue
        if manifest.sha256 == manifest_sha256:
            return manifest
    return None
