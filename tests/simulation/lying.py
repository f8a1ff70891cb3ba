"""Lies that a node can tell: each exchanges some parts of the running node.

Law: who lies knows all that a node knows, and has no other node's keys. What is in ``of_holders`` is said when somebody wants what the
node has: it stores what it is given, and can be made honest again.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from typing import Any

from tests.simulation.cluster import Host

from medshard_protocol.checkpoint import Note
from medshard_protocol.errors import Absent, Unavailable
from medshard_protocol.ids import FileId
from medshard_protocol.manifest import Manifest
from medshard_protocol.shards import digests, shard_root, split
from storenode.ledger.wire import Push
from storenode.repairing.routes import repairs_key
from storenode.shardstore import Put


def forgets(host: Host, rng: Random) -> None:
    """It says that it stored a shard, and did not."""
    store = host.parts.node.store

    async def commit(incoming: Any, *_: Any) -> Put:
        incoming.finish()
        return Put(shard_root(incoming.digests, digests["blake3"]), created=True)

    async def commit_small(shard: bytes, manifest: Manifest, index: int) -> Put:
        return Put(manifest.shards[index].root, created=True)

    async def put_manifest(manifest: Manifest) -> bool:
        return True

    store.commit, store.commit_small = commit, commit_small
    store.put_manifest = put_manifest


def spoils_reads(host: Host, rng: Random) -> None:
    """It gives out other bytes than it was given."""
    store = host.parts.node.store
    read, shard = store.read, store.shard

    def wrong(shard: Any, offset: int, length: int) -> bytes:
        data = read(shard, offset, length)
        return flipped(data, rng)

    store.read = wrong
    if rng.random() < 0.25:

        def remade(file_id: FileId) -> Any:
            known = shard(file_id)
            if known is None:
                return None
            return replace(known, root=flipped(known.root, rng), digests=tuple(flipped(each, rng) for each in known.digests))

        store.shard = remade


def spoils_manifests(host: Host, rng: Random) -> None:
    """It answers with manifests that were changed, or are of other files."""
    store = host.parts.node.store
    manifest = store.manifest

    def wrong(file_id: FileId) -> bytes:
        if rng.random() < 0.5:
            return flipped(manifest(file_id), rng)
        rows = store.catalog.all("SELECT file_id FROM manifests ORDER BY file_id")
        return bytes(manifest(FileId(rng.choice(rows)[0]) if rows else file_id))

    store.manifest = wrong


def counterfeits(host: Host, rng: Random) -> None:
    """It gives out other bytes with digests that fit them, under the root that was registered."""
    store = host.parts.node.store
    read, shard = store.read, store.shard

    def remade(file_id: FileId) -> Any:
        known = shard(file_id)
        if known is None:
            return None
        cells = split(inverted(read(known, 0, known.size)), known.cell_size)
        data = known.data and inverted(known.data)
        return replace(known, data=data, digests=tuple(digests["blake3"](cell) for cell in cells))

    store.shard = remade
    store.read = lambda known, *span: read(known, *span) if known.data is not None else inverted(read(known, *span))


def forges_manifests(host: Host, rng: Random) -> None:
    """It answers with manifests that are well formed and name other shards, and sooner than others answer."""
    host.quick = True
    store = host.parts.node.store
    manifest = store.manifest

    def forged(file_id: FileId) -> bytes:
        known = Manifest.from_bytes(manifest(file_id))
        return replace(known, shards=tuple(replace(ref, root=inverted(ref.root)) for ref in known.shards)).to_bytes()

    store.manifest = forged


def spoils_sums(host: Host, rng: Random) -> None:
    """As a helper it adds something else."""
    helper = host.app[repairs_key].helper  # type: ignore[attr-defined]
    add = helper._add
    helper._add = lambda *values: flipped(add(*values), rng)


def hides(host: Host, rng: Random) -> None:
    """It says of some files, or of all, that it has nothing of them."""
    store = host.parts.node.store
    shard, shard_at, share = store.shard, store.shard_at, rng.choice((2, 256))

    def known(file_id: FileId) -> Any:
        return None if file_id[0] % share != 1 else shard(file_id)

    def at(file_id: FileId, index: int) -> Any:
        if known(file_id) is None:
            raise Absent("not here")
        return shard_at(file_id, index)

    store.shard, store.shard_at = known, at


def cosigns_anything(host: Host, rng: Random) -> None:
    """As a mirror it signs every head that it is shown, stores nothing, and promises every epoch to everybody."""
    mirror = host.parts.node.ledger.mirror

    async def take(push: Push, node: Any) -> str:
        return mirror.cosign(Note.from_bytes(push.signed).text).line() if push.signed else ""

    async def promise(epoch: int, node: Any, signature: bytes) -> None: ...

    mirror.take = take
    if rng.random() < 0.5:
        mirror.promise = promise


def withholds(host: Host, rng: Random) -> None:
    """It answers nothing that is asked about the ledger, or only now and then."""
    ledger = host.parts.node.ledger

    async def never(*_: Any) -> Any:
        await asyncio.sleep(rng.choice((1.0, 60.0)))
        raise Unavailable("no")

    ledger.mirror.take = never
    ledger.append_here = never


lies = (
    *(forgets, spoils_reads, spoils_manifests, spoils_sums, cosigns_anything, withholds),
    *(counterfeits, forges_manifests) * 2,  # what only a certain file and a certain node's answer bring to light
)
of_holders = (spoils_reads, spoils_manifests, spoils_sums, counterfeits, forges_manifests, hides)


def inverted(data: Any) -> bytes:
    return bytes(data).translate(bytes(255 - each for each in range(256)))


def flipped(data: bytes, rng: Random) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
