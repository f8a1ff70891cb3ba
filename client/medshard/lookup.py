"""From a plaintext's SHA-256 to a checked manifest: the local index first, then any node.

What a node answers counts only if this vault's key opens it and the ledger proves it under a quorum. The index is a cache: without
it the same answers come from the nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from medshard.envelopes import open_grant
from medshard.index import Index
from medshard.keys import VaultKeys
from medshard.ledger import LedgerClient
from medshard.model import Header, Row
from medshard.restoring import Target
from medshard.sealing import FileSeal, unwrap
from medshard.transport import Net
from medshard_protocol import canonical
from medshard_protocol.errors import Absent, Damaged, MedshardError, Refused, Unavailable
from medshard_protocol.ids import FileId
from medshard_protocol.manifest import Manifest, manifest_bytes_max
from medshard_protocol.messages import Found, lookup_tags_max, manifest_path, pack_lookup, unpack_found
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import Node

parallel: Final = 3  # nodes asked at once: one may be frozen, and most hold the manifest
timeout_s: Final = 1.5
new_quorum_s: Final = (0.3, 0.6, 1.2)  # nodes hear of a head that is published anew within a moment of each other
cached_bytes_max: Final = manifest_bytes_max + 1024 * 1024


@dataclass(frozen=True, slots=True)
class Opened:
    """An object of this vault whose header is open."""

    manifest: Manifest
    seal: FileSeal
    header: Header
    inclusion: Inclusion

    def locate(self, wanted: bytes) -> Target | None:
        """The plaintext ``wanted`` in it, if it is there: the file itself, or one member of a pack."""
        header = self.header
        if header.kind == "file":
            if header.sha256 != wanted:
                return None
            return Target(wanted, self.manifest, self.seal, header, self.inclusion, header.name, 0, header.size)
        for member in header.members:
            if member.sha256 == wanted:
                return Target(wanted, self.manifest, self.seal, header, self.inclusion, member.name, member.offset, member.size)
        return None


class Lookup:
    """Finds files of one vault."""

    def __init__(self, net: Net, keys: VaultKeys, index: Index, ledger: LedgerClient) -> None:
        self.sync: Callable[[], Awaitable[object]] | None = None  # learns what others have granted since, where a file is not known
        self.fate: Callable[[bytes], str] = lambda sha256: ""  # what became of a file that is here no more
        self._net = net
        self._keys = keys
        self._index = index
        self._ledger = ledger

    async def targets(self, hashes: Sequence[bytes]) -> list[Target]:
        """A checked target for each hash, this vault's own or one that was shared with it.

        Raises Absent for one that nobody has, Unavailable when nobody could be asked.
        """
        found: dict[bytes, Target] = {}
        opened: dict[FileId, Opened | None] = {}  # a pack with a thousand members is parsed once for all of them
        for wanted in hashes:
            if target := self._from_index(wanted, opened) or self._from_index(wanted, opened, received=True):
                found[wanted] = target
        missing = [wanted for wanted in dict.fromkeys(hashes) if wanted not in found]
        while missing:
            # A node answers at most some megabytes of manifests at once: what is left is asked for again, as long as there is progress.
            try:
                found.update(await self._from_nodes(missing[: lookup_tags_max // len(self._keys.line)]))
            except Absent:
                found.update(await self._from_others(missing))
            missing = [wanted for wanted in missing if wanted not in found]
        return [found[wanted] for wanted in hashes]

    async def located(self, sha256: bytes, file_id: FileId) -> Target:
        """A plaintext in the object that is named, an own one or one that was shared with this vault. Raises Absent."""
        if (target := (await self.file(file_id)).locate(sha256)) is None:
            raise Absent(f"{sha256.hex()[:16]}… does not lie in object {file_id.hex()[:16]}…")
        return target

    def owns(self, manifest: Manifest) -> bool:
        """Whether a file is this vault's own: put by it, under any of its keys, or by a sender for it."""
        return self._keys.of(manifest.owner) is not None or bool(self._index.by_file(manifest.file_id))

    async def alone(self, sha256: bytes) -> Target | None:
        """An own object that has this plaintext and no other in it, so that its key can be given away; None where there is none."""
        opened: dict[FileId, Opened | None] = {}
        return self._from_index(sha256, opened, alone=True)

    async def file(self, file_id: FileId) -> Opened:
        """An own object by its file id. Raises Absent."""
        known = self.remembered(file_id)
        if known is not None:
            return self.open(*known)
        for node in sorted(self._net.roster.nodes, key=lambda node: (self._net.health.is_suspect(node.id), node.id)):
            try:
                data = await self._net.call(node, "GET", manifest_path(file_id), timeout_s=timeout_s)
                if opened := await self._checked(Found(data, None)):
                    return opened
            except MedshardError:
                continue
        raise Absent(f"no node that answers has the manifest of file {file_id.hex()[:16]}…", hint="Try again when more nodes are up.")

    async def homes(self, hashes: Sequence[bytes]) -> dict[FileId, Opened]:
        """All own objects that nodes know these plaintexts to lie in, whatever the index says: after it was lost it knows some of them."""
        opened: dict[bytes, Opened | None] = {}
        found: dict[FileId, Opened] = {}
        most = max(1, lookup_tags_max // 16 // len(self._keys.line))  # a node answers some megabytes of manifests at once
        for group in (hashes[at : at + most] for at in range(0, len(hashes), most)):
            for answer in asyncio.as_completed([self._ask(node, group) for node in self._net.roster.nodes]):
                try:
                    candidates = await answer
                except MedshardError:
                    continue  # what w nodes acknowledged, others that answer know too
                for wanted, file in ((wanted, file) for wanted, files in zip(group, candidates, strict=True) for file in files):
                    if target := await self._first_good([file], wanted, opened):
                        manifest = target.manifest
                        found.setdefault(manifest.file_id, Opened(manifest, target.seal, target.header, target.inclusion))
        return found

    def remember(self, manifest: Manifest, inclusion: Inclusion) -> None:
        """Keep a manifest and its proof beside the index, so that the next restore need not ask for them."""
        self._index.put_manifest(manifest.file_id, canonical.encode([manifest.to_bytes(), inclusion.to_value()]))

    def remembered(self, file_id: FileId) -> tuple[Manifest, Inclusion] | None:
        """A manifest and its proof from the cache; None when it is not there, or not proved to who goes by the present roster."""
        kept = self._kept(file_id)
        try:
            if kept is not None:
                self._ledger.check(*kept)
        except MedshardError:
            return None
        return kept

    def _kept(self, file_id: FileId) -> tuple[Manifest, Inclusion] | None:
        data = self._index.manifest(file_id)
        try:
            return None if data is None else _unpacked(data)
        except MedshardError:
            return None

    async def _prove_again(self, wanted: bytes) -> None:
        """Get a new proof for a file that was shared with us, where ours is of a log that has ended or of a quorum that is no more."""
        for row in self._index.by_tag(self._keys.row_tag(wanted), received=True):
            kept = self._kept(FileId(row.file_id))
            if kept is None or self.remembered(FileId(row.file_id)) is not None:
                continue
            with contextlib.suppress(MedshardError):
                if proof := await self._ledger.registration(FileId(row.file_id)):
                    self._ledger.check(kept[0], proof)
                    self.remember(kept[0], proof)

    def open(self, manifest: Manifest, inclusion: Inclusion) -> Opened:
        """Open an object's header. Raises Damaged or Malformed for what does not open."""
        keys = self._keys.of(manifest.owner)
        seal = self._granted(manifest) if keys is None else unwrap(keys.vault, manifest)
        return Opened(manifest, seal, Header.from_bytes(seal.open_header(manifest.header)), inclusion)

    def _granted(self, manifest: Manifest) -> FileSeal:
        """The seal of another vault's file. Whether the grant still stands is for the nodes to say, and they do."""
        for known in self._index.grants(manifest.file_id):
            if known.sealed:
                return open_grant([keys.hpke for keys in self._keys.line], manifest, known.grant, known.sealed)
        raise Damaged("the key of this file was never given to this vault", hint="run `medshard reindex`")

    async def _from_others(self, hashes: Sequence[bytes]) -> dict[bytes, Target]:
        """Files that somebody has shared since we last looked. Raises Absent if one is still not known."""
        if self.sync is not None:
            await self.sync()
        for wanted in hashes:
            await self._prove_again(wanted)
        opened: dict[FileId, Opened | None] = {}
        found = {wanted: target for wanted in hashes if (target := self._from_index(wanted, opened, received=True))}
        if not found:
            raise self._not_found(hashes[0], ())
        return found

    def _from_index(
        self, wanted: bytes, opened: dict[FileId, Opened | None], *, received: bool = False, alone: bool = False
    ) -> Target | None:
        rows = self._index.by_tag(self._keys.row_tag(wanted), received=received)
        for row in sorted(rows, key=self._last_granted, reverse=True) if received else rows:
            if alone and row.member is not None:
                continue
            file_id = FileId(row.file_id)
            if file_id not in opened:
                known = self.remembered(file_id)
                opened[file_id] = None if known is None else self.open(*known)
            if (file := opened[file_id]) and (target := file.locate(wanted)):
                return target
        return None

    def _last_granted(self, row: Row) -> int:
        """Where the newest right to read an object stands in the ledger, of those not known to have ended: the likeliest to be in force."""
        return max((known.index for known in self._index.grants(row.file_id) if not known.ended), default=-1)

    async def _from_nodes(self, hashes: Sequence[bytes], pauses_s: Sequence[float] = new_quorum_s) -> dict[bytes, Target]:
        found: dict[bytes, Target] = {}
        failures: list[str] = []
        unproved: list[str] = []
        nodes = sorted(self._net.roster.nodes, key=lambda node: (self._net.health.is_suspect(node.id), node.id))
        for at in range(0, len(nodes), parallel):
            missing = [wanted for wanted in hashes if wanted not in found]
            if not missing:
                break
            asked = [self._ask(node, missing) for node in nodes[at : at + parallel]]
            for answer in asyncio.as_completed(asked):
                opened: dict[bytes, Opened | None] = {}
                try:
                    candidates = await answer
                except MedshardError as error:
                    failures.append(str(error))
                    continue
                for wanted, files in zip(missing, candidates, strict=True):
                    if wanted not in found and (target := await self._first_good(files, wanted, opened, unproved)):
                        found[wanted] = target
        if not found:
            if await self._net.follow():
                return await self._from_nodes(hashes)
            if unproved:  # right after a change of the roster, nodes may still show what the quorum before it published
                if not pauses_s:
                    raise Unavailable(f"nodes know this file, and none of them proves it ({unproved[0]})", hint="try again in a moment")
                await asyncio.sleep(pauses_s[0])
                return await self._from_nodes(hashes, pauses_s[1:])
            raise self._not_found(hashes[0], failures)
        return found

    async def _ask(self, node: Node, hashes: Sequence[bytes]) -> list[list[Found]]:
        """What a node knows of each of these, under the present lookup key and those before."""
        tags = [tag for wanted in hashes for tag in self._keys.tags(wanted)]
        found = unpack_found(await self._net.call(node, "POST", "/v1/lookup", pack_lookup(tags), timeout_s=timeout_s), len(tags))
        each = len(self._keys.line)
        return [[file for some in found[at : at + each] for file in some] for at in range(0, len(found), each)]

    async def _first_good(
        self, files: Sequence[Found], wanted: bytes, opened: dict[bytes, Opened | None], unproved: list[str] | None = None
    ) -> Target | None:
        for file in files:
            if file.manifest not in opened:
                try:
                    opened[file.manifest] = await self._checked(file)
                except MedshardError as error:
                    opened[file.manifest] = None  # one node's bad answer is no reason to stop asking
                    if unproved is not None and isinstance(error, Refused):
                        unproved.append(str(error))
            if (good := opened[file.manifest]) and (target := good.locate(wanted)):
                return target
        return None

    async def _checked(self, file: Found) -> Opened | None:
        manifest = Manifest.from_bytes(file.manifest)
        if self._keys.of(manifest.owner) is None:
            return None
        inclusion = await self._proof(manifest, file)
        if inclusion is None:
            return None
        self._ledger.check(manifest, inclusion)
        opened = self.open(manifest, inclusion)
        self.remember(manifest, inclusion)
        return opened

    async def _proof(self, manifest: Manifest, file: Found) -> Inclusion | None:
        if file.inclusion is not None:
            return Inclusion.from_value(file.inclusion)
        return await self._ledger.registration(manifest.file_id)

    def _not_found(self, wanted: bytes, failures: Sequence[str]) -> MedshardError:
        nodes = len(self._net.roster.nodes)
        if fate := self.fate(wanted):
            hint = "`medshard certificate` shows what the nodes have signed, `medshard log` what happened to it before."
            return Absent(f"{wanted.hex()[:16]}… {fate}", hint=hint)
        if len(failures) == nodes:
            return Unavailable(f"no node answered ({'; '.join(failures[:4])})", hint="is the network up? `medshard doctor` says more")
        hint = "check the hash: `medshard ls` lists what this vault holds"
        if failures:
            hint = f"{len(failures)} of {nodes} nodes did not answer ({'; '.join(failures[:4])}); try again when they are back, or {hint}"
        return Absent(f"this vault holds no file with SHA-256 {wanted.hex()}", hint=hint)


@lru_cache(maxsize=4)  # whoever reads a file often, or many ranges of it, has it at hand
def _unpacked(data: bytes) -> tuple[Manifest, Inclusion]:
    """What ``remember`` packed. Raises Malformed."""
    f = canonical.Fields(canonical.decode(data, bytes_max=cached_bytes_max, what="cached manifest"), count=2, what="cached manifest")
    return Manifest.from_bytes(f.bytes(most=manifest_bytes_max)), Inclusion.from_value(f.list(most=8))
