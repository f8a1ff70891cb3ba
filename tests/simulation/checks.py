"""What must hold in every run, and the witnesses that see it: each raises or collects ``Broken`` with the promise that was not kept.

Law: a witness looks and changes nothing. What a byzantine node does is no breach; what an honest one lets it do is.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Set
from typing import Any

from tests.simulation.cluster import Cluster, Host
from tests.simulation.world import here

from medshard import sealing
from medshard.sealing import FileSeal
from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint
from medshard_protocol.entries import Access, Entry
from medshard_protocol.errors import MedshardError
from medshard_protocol.ids import FileId
from medshard_protocol.manifest import Manifest
from medshard_protocol.merkle import sha256
from medshard_protocol.repair import Mask, holders
from medshard_protocol.repairorder import counted
from medshard_protocol.shards import digests, shard_root, split
from storenode.ledger.mirror import Mirror
from storenode.repairing import ground, helping
from storenode.shardstore import Shard, ShardStore


class Broken(Exception):
    """A promise was not kept."""


class Witness:
    """Sees every cosignature, every published checkpoint and every sealed segment of a run."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.cosigned: dict[tuple[int, bytes], set[Host]] = defaultdict(set)
        self.sealed: dict[tuple[bytes, bytes], bytes] = {}
        self.stored: dict[tuple[Host, FileId], int] = {}  # the shard's number
        self.broken: list[str] = []
        self._watch_cosignatures()
        self._watch_seals()
        self._watch_sums()
        self._watch_stores()

    def _watch_cosignatures(self) -> None:
        cosign = Mirror.cosign

        def watched(mirror: Mirror, text: str) -> Any:
            signature = cosign(mirror, text)
            machine, checkpoint = here.get(), Checkpoint.from_text(text)
            assert machine is not None
            self.cosigned[checkpoint.size, checkpoint.root].add(machine.host)
            return signature

        Mirror.cosign = watched  # type: ignore[method-assign]

    def _watch_seals(self) -> None:
        seal_into = FileSeal.seal_into

        def watched(seal: FileSeal, number: int, last: bool, plain: Any, out: memoryview) -> None:
            digest = hashlib.sha256(plain).digest()
            if self.sealed.setdefault((seal.file_key + seal.file_id, sealing.segment_nonce(number, last)), digest) != digest:
                self.broken.append(f"segment {number} of a file was sealed twice with one key and nonce")
            seal_into(seal, number, last, plain, out)

        FileSeal.seal_into = watched  # type: ignore[method-assign]

    def _watch_sums(self) -> None:
        add = helping.add

        def watched(before: Any, factor: int, own: bytes, mask: Any) -> bytes:
            total = add(before, factor, own, mask)
            if len(mask._streams) < 2:
                self.broken.append("a sum left a helper without a mask that the replacement does not know")
            if own.strip(b"\0") and total == add(before, factor, own, Mask()):
                self.broken.append("a sum left a helper without a mask")
            return total

        helping.add = watched  # type: ignore[assignment]

    def _watch_stores(self) -> None:
        """Each shard that a node says it has stored, when it is given it or whenever it is asked for it: a node may lose its power between
        the commit of a shard and its answer, and the put that is begun again finds that shard there."""

        def watched(name: str) -> None:
            real = getattr(ShardStore, name)

            async def stored(store: ShardStore, *values: Any) -> Any:
                machine = here.get()
                answer = await real(store, *values)
                assert machine is not None
                manifest = next((each for each in values if isinstance(each, Manifest)), None)
                file_id = manifest.file_id if manifest else next(each for each in values if isinstance(each, bytes) and len(each) == 32)
                self.stored[machine.host, FileId(file_id)] = next(each for each in values if isinstance(each, int))
                return answer

            setattr(ShardStore, name, stored)

        for name in ("commit", "commit_small", "commit_described"):
            watched(name)
        shard_at = ShardStore.shard_at

        def found(store: ShardStore, file_id: FileId, index: int) -> Shard:
            machine, shard = here.get(), shard_at(store, file_id, index)
            if machine is not None and machine.host.parts is not None and machine.host.parts.node.store is store:
                self.stored[machine.host, file_id] = index  # and not where a check looks at another's disk
            return shard

        ShardStore.shard_at = found  # type: ignore[method-assign]

    def check_stores(self, spoiled: set[Host]) -> None:
        """What a node said it has stored is there, whatever happened to its power, unless its disk spoiled it or it lies."""
        for (host, file_id), index in self.stored.items():
            if host not in spoiled and not is_whole(host, file_id, index):
                raise Broken(f"lost: {host} said that it had stored a shard, and has not got it")

    def check(self, byzantine: set[Host]) -> None:
        """One history: all that a quorum could publish, and all that honest nodes hold to be published, is of the same log."""
        if self.broken:
            raise Broken(self.broken[0])
        honest = [host for host in self.cluster.nodes if host not in byzantine and host.parts is not None]
        longest = max(honest, key=lambda host: (published(host), host.number))
        journal, size = longest.parts.node.ledger.journal, published(longest)
        tree, ahead = journal.tree, []
        for (at, root), hosts in self.cosigned.items():
            if not journal.roster_of(at).has_quorum(host.node.id for host in hosts | byzantine):
                continue
            if at > size:
                ahead.append((at, root))  # a quorum has it, and nobody has counted it yet, or all have forgotten
            elif tree.root(at) != root:
                raise Broken(f"forked: a quorum cosigned another history of {at} entries than was published")
        if ahead and not any(all(_has(host, *head) for head in ahead) for host in honest):
            raise Broken(f"lost: no honest node has all that a quorum cosigned after {size} entries")
        for host in honest:
            other, at = host.parts.node.ledger.journal, published(host)
            if not at:
                continue  # it has lost its power before it wrote down what is published, and nothing has been since
            if tree.root(at) != other.published.checkpoint.root:
                raise Broken(f"forked: {host} and {longest} hold different logs of {at} entries to be published")
            leaves = [merkle.leaf_hash(entry, sha256) for entry in other.store.entries(0, at)]
            if merkle.root(leaves, sha256) != other.published.checkpoint.root:
                raise Broken(f"{host} has other entries than it says are published")


def _has(host: Host, at: int, root: bytes) -> bool:
    journal = host.parts.node.ledger.journal
    return bool(journal.head.size >= at and journal.tree.root(at) == root)


def standing(cluster: Cluster) -> str:
    """How far each node's log goes, for people."""
    said = []
    for host in cluster.nodes:
        if host.parts is None:
            said.append(f"{host} is down ({host.error!r})")
        else:
            ledger = host.parts.node.ledger
            said.append(
                f"{host} has {ledger.journal.head.size}, published {published(host)}, epoch {ledger.mirror.epoch}"
                f"{' leads' if ledger.leads else ''}{' lost' if ledger.mirror.lost else ''}"
            )
    return "; ".join(said)


def published(host: Host) -> int:
    """How many entries a node knows to be published."""
    known = host.parts.node.ledger.published
    return known.checkpoint.size if known else 0


def entries(host: Host) -> list[Entry]:
    """All published entries that a node has."""
    found = []
    for data in host.parts.node.ledger.journal.store.entries(0, published(host)):
        try:
            found.append(Entry.from_bytes(data))
        except MedshardError:
            continue
    return found


def can_go_on(hosts: list[Host], quorum: int) -> bool:
    """Whether a quorum of these could follow one of their logs, none of them dropping anything."""
    journals = [host.parts.node.ledger.journal for host in hosts]
    logs = [journal.store.entries(0, journal.head.size) for journal in journals]
    return any(sum(log[: len(other)] == other for other in logs) >= quorum for log in logs)


def check_traces(host: Host, reads: list[tuple[bytes, list[FileId]]], known: Set[FileId]) -> None:
    """Each file that was read stands in an ACCESS entry of its reader.

    A put that failed to its user may have been registered all the same; what is read then by its hash is a file that nobody counts.
    """
    announced = {(entry.author, file_id) for entry in entries(host) if isinstance(entry.body, Access) for file_id in entry.body.file_ids}
    uncounted = {reader for reader, file_id in announced if file_id not in known}
    for reader, file_ids in reads:
        if reader not in uncounted and not any((reader, file_id) in announced for file_id in file_ids):
            raise Broken(f"file {file_ids[0].hex()[:8]} was read without an entry")


def check_k_are_left(cluster: Cluster, file_ids: list[FileId]) -> None:
    """Of each of these files as many shards are whole as it takes."""
    k, n, _ = cluster.roster.code
    if any(len(missing_shards(cluster, file_id)) > n - k for file_id in file_ids):
        raise Broken("lost: fewer than k shards of an acknowledged file are left")


def missing_shards(cluster: Cluster, file_id: FileId) -> list[tuple[int, Host]]:
    """Shards that are not whole where the ledger says they are, with those who should have them. Looks at the disks themselves."""
    return [(index, host) for index, host, is_there in _held(cluster, file_id) if not is_there]


def truthful_shards(cluster: Cluster, file_id: FileId, liars: set[Host]) -> int:
    """How many shards of a file are whole with those who are not among the liars."""
    return sum(is_there and host not in liars for _, host, is_there in _held(cluster, file_id))


def _held(cluster: Cluster, file_id: FileId) -> list[tuple[int, Host, bool]]:
    by_id = {host.node.id: host for host in cluster.nodes}
    someone = next(host for host in cluster.nodes if host.parts is not None)
    ledger = someone.parts.node.ledger
    manifest = manifest_of(cluster, file_id)
    moves = counted(manifest, ground.given(ledger, file_id), ground.institutions(ledger.state))
    if not all(node in by_id for node in holders(manifest, moves)):
        raise Broken("a node has left that still is a holder")
    present = [by_id[node] for node in holders(manifest, moves)]
    return [(index, host, _is_stored(host, manifest, index)) for index, host in enumerate(present)]


def manifest_of(cluster: Cluster, file_id: FileId) -> Manifest:
    """The registered manifest of a file, from any node that has it."""
    for host in cluster.nodes:
        try:
            manifest = Manifest.from_bytes(host.parts.node.store.manifest(file_id))
            registration = host.parts.node.ledger.state.registration(file_id)
            if registration is not None and manifest.sha256 == registration.manifest_sha256:
                return manifest
        except MedshardError:
            continue
    raise Broken("lost: no node has the manifest of a file that was acknowledged")


def rows(host: Host) -> list[tuple[FileId, int]]:
    """The files and numbers of the shards that a node's catalog lists."""
    try:
        return [(FileId(row[0]), row[1]) for row in host.parts.node.store.catalog.all("SELECT file_id, idx FROM shards ORDER BY file_id")]
    except (MedshardError, AttributeError):
        return []


def is_whole(host: Host, file_id: FileId, index: int) -> bool:
    """Whether a node has a shard, and each of its cells still has its digest. Asks the disk, and none of the store's own checks."""
    return bool(condition(host, file_id, index) & 1)


def condition(host: Host, file_id: FileId, index: int) -> int:
    """0 for a shard that is not there, 2 for one whose bytes alone are right, 3 for one whose digests in the catalog are, too."""
    try:
        store = host.parts.node.store
        shard = store.shard_at(file_id, index)
        data = shard.data if shard.data is not None else store._path(file_id, shard.root).read_bytes()
        cells = [digests["blake3"](cell) for cell in split(data, shard.cell_size)]
        if len(data) != shard.size or shard_root(cells, digests["blake3"]) != shard.root:
            return 0
        return 3 if tuple(cells) == shard.digests else 2
    except (MedshardError, OSError, AttributeError):
        return 0


def describes(host: Host, file_id: FileId) -> bool:
    """Whether a node has a manifest of this file that it can read."""
    try:
        return bool(host.parts.node.store.manifest(file_id))
    except (MedshardError, AttributeError):
        return False


def _is_stored(host: Host, manifest: Manifest, index: int) -> bool:
    try:
        store = host.parts.node.store
        same = store.shard_at(manifest.file_id, index).root == manifest.shards[index].root
        rows = store.catalog.all("SELECT bytes FROM manifests WHERE file_id = ?", manifest.file_id)
        return same and bool(rows) and rows[0][0] == manifest.to_bytes() and is_whole(host, manifest.file_id, index)
    except (MedshardError, AttributeError):
        return False
