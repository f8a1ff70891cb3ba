"""Storing: read → hash and seal → encode → send → manifest → ledger. Nothing is acknowledged before all of it.

An object's keys are random, so a second try would make other ciphertext. To finish an interrupted put instead, the manifest is
written to the journal before any shard can be complete, and reused only after the plaintext's hash was compared with it: one
key and nonce must never seal two plaintexts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from medshard.encoding import Encoder, Stripe
from medshard.index import Index
from medshard.keys import VaultKeys
from medshard.ledger import LedgerClient
from medshard.lookup import Lookup
from medshard.model import Header, Member, Problem, Progress, PutReport, Row, StoredFile
from medshard.packs import Plan, Unit
from medshard.placement import place
from medshard.sealing import FileSeal, padme, unwrap, wrap
from medshard.smallfiles import Encoded, institutions, object_bytes_max, send_all
from medshard.source import Part, Source, fingerprint
from medshard.transport import Net, without_name
from medshard.upload import Upload, too_few
from medshard_protocol import evidence
from medshard_protocol.errors import Conflict, Damaged, Malformed, MedshardError, Unavailable
from medshard_protocol.ids import FileId, Sha256
from medshard_protocol.manifest import Manifest, ShardRef
from medshard_protocol.messages import manifest_path, root_header, shard_path
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import Node
from medshard_protocol.shards import Layout

batch_bytes_max: Final = 4 * 1024 * 1024
batch_units_max: Final = 64
batches_at_once: Final = 2
manifest_timeout_s: Final = 10.0
_said: Final = ("tag:", "policy-", "claim-")  # attributes that come from the user and not from the file
OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Code:
    """k of n, acknowledged by w institutions."""

    k: int
    n: int
    w: int


class Putter:
    """One run of ``medshard put``."""

    def __init__(
        self, net: Net, keys: VaultKeys, index: Index, ledger: LedgerClient, lookup: Lookup, code: Code, *, alone: bool = False
    ) -> None:
        self._net = net
        self._keys = keys
        self._index = index
        self._ledger = ledger
        self._lookup = lookup
        self._code = code
        self._alone = alone  # a file that lies in a pack is not stored already: it is wanted as an object of its own
        self._stored: list[StoredFile] = []
        self._problems: list[Problem] = []
        self._progress: OnProgress | None = None
        self._done = 0
        self._total = 0

    async def put(self, plan: Plan, progress: OnProgress | None = None) -> PutReport:
        """Store every unit of a plan. Raises Unavailable when nothing could be stored because too few nodes answer."""
        self._progress = progress
        self._problems += plan.problems
        self._total = sum(unit.size for unit in plan.units)
        small: list[Unit] = []
        large: list[Unit] = []
        for unit in plan.units:
            left = await self._without_known(unit)
            if left is not None:
                (small if left.size <= object_bytes_max else large).append(left)
        down: Unavailable | None = None
        try:
            await self._put_batches(_batches(small))
            for unit in large:
                await self._guard([unit], self._put_large(unit))
        except Unavailable as error:
            down = error
        if down is not None:
            if not self._stored:
                raise down
            self._give_up(plan, str(down))
        return PutReport(tuple(self._stored), tuple(self._problems))

    # -- what is stored already

    async def _without_known(self, unit: Unit) -> Unit | None:
        fresh: list[Part] = []
        for part in unit.parts:
            known = await self._known(part)
            if known is None:
                fresh.append(part)
            else:
                self._stored.append(known)
                self._advance(part.size, part)
        if len(fresh) == len(unit.parts):
            return unit
        return Unit(unit.name, tuple(fresh), unit.is_pack and len(fresh) > 1) if fresh else None

    async def _known(self, part: Part) -> StoredFile | None:
        """A part that an earlier put stored. The note of its name, size and time says that hashing it is worth while."""
        if self._index.journal_get(_seen(part)) is None:
            return None
        digest = await asyncio.to_thread(part.digest)
        return self._row_of(part, digest)

    def _row_of(self, part: Part, digest: bytes) -> StoredFile | None:
        # What the user says of a file is sealed with it: a new tag or policy number makes a new object, or it would be lost.
        said = {key: value for key, value in part.description.attributes.items() if key.startswith(_said)}
        for row in self._index.by_tag(self._keys.row_tag(digest)):
            if not said.items() <= row.attributes.items() or (self._alone and row.member is not None):
                continue
            return StoredFile(part.path, digest, part.size, row.file_id, row.ledger_index, already=True)
        return None

    # -- small objects, in batches

    async def _put_batches(self, batches: Sequence[Sequence[Unit]]) -> None:
        slots = asyncio.Semaphore(batches_at_once)

        async def one(batch: Sequence[Unit]) -> None:
            async with slots:
                await self._put_small(batch)

        async with _first_error() as group:
            for batch in batches:
                group.append(asyncio.create_task(one(batch)))

    async def _put_small(self, units: Sequence[Unit]) -> None:
        encoded: list[tuple[Unit, Encoded, Header]] = []
        for unit in units:
            try:
                encoded.append((unit, *await asyncio.to_thread(self._encode_small, unit)))
            except (MedshardError, OSError) as error:
                self._fail([unit], error)
        # The same bytes may stand under two names in one batch, or be stored already under another name.
        encoded = [item for item in encoded if not self._duplicate(*item)]
        if not encoded:
            return
        stored = {item.manifest.file_id: await self._shards_there(item.manifest) for unit, item, _ in encoded if self._journalled(unit)}
        with self._index.together():
            for unit, item, _ in encoded:
                self._index.journal_put(_journal_key(unit), item.manifest.to_bytes())
        outcomes = await send_all(self._net, [item for _, item, _ in encoded], self._code.w, stored)
        ready: list[tuple[Unit, Encoded, Header]] = []
        short: Unavailable | None = None
        for triple, sent in zip(encoded, outcomes, strict=True):
            good = institutions(self._net, triple[1].manifest, sent.done)
            if good >= self._code.w:
                ready.append(triple)
            else:
                self._net.check_inside()
                short = too_few(good, self._code.w, sent.failures)
        if ready:
            proofs = await self._ledger.register([item.manifest for _, item, _ in ready])
            with self._index.together():
                for (unit, item, header), proof in zip(ready, proofs, strict=True):
                    self._finish(unit, item.manifest, header, proof)
        if short is not None:
            raise short

    def _encode_small(self, unit: Unit) -> tuple[Encoded, Header]:
        earlier = self._resume(unit)
        seal = unwrap(self._keys.vault, earlier) if earlier else FileSeal.fresh()
        source = Source(unit.parts)
        try:
            encoder = Encoder(source, seal, self._layout(unit.size))
            columns: list[list[memoryview]] = [[] for _ in range(self._code.n)]
            while encoder:
                for column, cell in zip(columns, encoder.next().cells, strict=True):
                    column.append(cell)
        finally:
            source.close()
        shards = tuple(b"".join(column) for column in columns)
        manifest, header = self._describe(unit, seal, encoder, source.hashes, earlier)
        return Encoded(manifest, shards), header

    def _duplicate(self, unit: Unit, item: Encoded, header: Header) -> bool:
        if unit.is_pack or self._journalled(unit):
            return False
        known = self._row_of(unit.parts[0], header.sha256)
        if known is not None:
            self._stored.append(known)
            self._index.journal_put(_seen(unit.parts[0]), b"")
            self._advance(unit.size, unit.parts[0])
        return known is not None

    # -- large objects, streamed

    async def _put_large(self, unit: Unit) -> None:
        earlier = await asyncio.to_thread(self._resume, unit)
        seal = unwrap(self._keys.vault, earlier) if earlier else FileSeal.fresh()
        layout = self._layout(unit.size)
        source = Source(unit.parts)
        encoder = Encoder(source, seal, layout)
        there = await self._shards_there(earlier) if earlier else set()
        holders = [self._net.holder(ref.node) for ref in earlier.shards] if earlier else self._holders(seal.file_id)
        upload = Upload(self._net, seal.file_id, layout, holders, self._code.w, frozenset(there))
        coming: asyncio.Task[list[Stripe]] | None = None
        try:
            burst = await asyncio.to_thread(encoder.next_burst)
            while True:
                coming = asyncio.create_task(asyncio.to_thread(encoder.next_burst)) if encoder else None
                if coming is None:
                    # Before the last cells go out: no shard can be complete that the journal does not know.
                    manifest, header = await asyncio.to_thread(self._describe, unit, seal, encoder, source.hashes, earlier)
                    self._index.journal_put(_journal_key(unit), manifest.to_bytes())
                for sent in await upload.feed(burst):
                    encoder.give_back(sent)
                self._advance(sum(stripe.plain for stripe in burst), unit.parts[0])
                if coming is None:
                    break
                burst = await coming
            done = await upload.finish([ref.root for ref in manifest.shards])
        finally:
            if coming is not None:
                await asyncio.wait([coming])
            await upload.close()
            source.close()
        await self._spread(manifest, done)
        (proof,) = await self._ledger.register([manifest])
        with self._index.together():
            self._finish(unit, manifest, header, proof, advanced=True)

    async def _spread(self, manifest: Manifest, shards: set[int]) -> None:
        """Put the manifest beside the shards; w institutions must have it."""
        failures: dict[str, str] = {}
        good: set[int] = set()

        async def one(index: int) -> None:
            node = self._net.holder(manifest.shards[index].node)
            try:
                await self._net.call(node, "PUT", manifest_path(manifest.file_id), manifest.to_bytes(), timeout_s=manifest_timeout_s)
                good.add(index)
            except MedshardError as error:
                failures[node.name] = without_name(node, error)

        tasks = {asyncio.create_task(one(index)) for index in shards}
        pending = tasks
        try:
            while pending and institutions(self._net, manifest, good) < self._code.w:
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if pending:
                await asyncio.wait(pending, timeout=0.3)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if institutions(self._net, manifest, good) < self._code.w:
            self._net.check_inside()
            raise too_few(institutions(self._net, manifest, good), self._code.w, failures)

    # -- an interrupted put

    def _journalled(self, unit: Unit) -> bool:
        return self._index.journal_get(_journal_key(unit)) is not None

    def _resume(self, unit: Unit) -> Manifest | None:
        """The manifest of an earlier, unfinished put of these very bytes. Blocking: it hashes them."""
        data = self._index.journal_get(_journal_key(unit))
        if data is None:
            return None
        try:
            manifest = Manifest.from_bytes(data)
            header = Header.from_bytes(unwrap(self._keys.vault, manifest).open_header(manifest.header))
            known = {node.id for node in self._net.roster.nodes}
        except (Malformed, Damaged):
            return None
        hashes = [part.digest() for part in unit.parts]
        before = [member.sha256 for member in header.members] if unit.is_pack else [header.sha256]
        same = hashes == before and manifest.layout == self._layout(unit.size) and all(ref.node in known for ref in manifest.shards)
        if not same:
            self._index.journal_delete(_journal_key(unit))
        return manifest if same else None

    async def _shards_there(self, manifest: Manifest) -> set[int]:
        async def held(index: int) -> bool:
            ref = manifest.shards[index]
            try:
                root = await self._net.head(self._net.holder(ref.node), shard_path(manifest.file_id, index), root_header, timeout_s=2.0)
            except MedshardError:
                return False
            return root == ref.root.hex()

        answers = await asyncio.gather(*(held(index) for index in range(manifest.layout.n)))
        return {index for index, there in enumerate(answers) if there}

    # -- parts

    def _layout(self, size: int) -> Layout:
        return Layout.for_plain(padme(size), self._code.k, self._code.n)

    def _holders(self, file_id: FileId) -> list[Node]:
        return [self._net.holder(node) for node in place(file_id, self._net.roster, self._code.k, self._code.n)]

    def _describe(
        self, unit: Unit, seal: FileSeal, encoder: Encoder, hashes: Sequence[bytes], earlier: Manifest | None
    ) -> tuple[Manifest, Header]:
        roots = encoder.roots()
        if earlier is not None:
            if roots != tuple(ref.root for ref in earlier.shards):
                raise Conflict("the file changed while an interrupted put was finished", hint="put it again")
            return earlier, Header.from_bytes(seal.open_header(earlier.header))
        header = _header(unit, hashes, int(time.time()))
        tags = sorted({self._keys.tag(digest) for digest in hashes})
        nodes = place(seal.file_id, self._net.roster, self._code.k, self._code.n)
        manifest = Manifest(
            seal.file_id,
            encoder.layout,
            "blake3",
            seal.commitment,
            tuple(ShardRef(node, root) for node, root in zip(nodes, roots, strict=True)),
            self._keys.public,
            seal.seal_header(header.to_bytes()),
            wrap(self._keys.vault, seal),
            tuple(tags),
            evidence.root(evidence.leaves(self._keys.public, seal.file_id, seal.evidence_key, header.documents)),
        )
        return manifest, header

    def _finish(self, unit: Unit, manifest: Manifest, header: Header, proof: Inclusion, *, advanced: bool = False) -> None:
        rows = rows_of(manifest, header, proof.index)
        self._index.add_many([(self._keys.row_tag(row.sha256), row) for row in rows])
        self._lookup.remember(manifest, proof)
        self._index.journal_delete(_journal_key(unit))
        for part, row in zip(unit.parts, rows, strict=True):
            if part.opener is None:  # what is no file is not put again by its name
                self._index.journal_put(_seen(part), b"")
            self._stored.append(StoredFile(part.path, row.sha256, part.size, row.file_id, row.ledger_index, already=False))
        if not advanced:
            self._advance(unit.size, unit.parts[0])

    async def _guard(self, units: Sequence[Unit], work: Awaitable[None]) -> None:
        try:
            await work
        except Unavailable:
            raise
        except (MedshardError, OSError) as error:
            self._fail(units, error)

    def _fail(self, units: Sequence[Unit], error: Exception) -> None:
        for unit in units:
            self._problems += [Problem(part.path, str(error), stored=False) for part in unit.parts]

    def _give_up(self, plan: Plan, why: str) -> None:
        settled = {stored.path for stored in self._stored} | {problem.path for problem in self._problems if not problem.stored}
        for unit in plan.units:
            self._problems += [Problem(part.path, f"not stored: {why}", stored=False) for part in unit.parts if part.path not in settled]

    def _advance(self, size: int, part: Part) -> None:
        self._done += size
        if self._progress:
            self._progress(Progress(self._done, self._total, "sending", str(part.path)))


def rows_of(manifest: Manifest, header: Header, ledger_index: int) -> list[Row]:
    """What the index keeps of one object: a row for a file, or one for each member of a pack."""
    if header.kind == "file":
        return [
            Row(
                header.sha256,
                header.size,
                header.name,
                header.media_type,
                header.attributes,
                manifest.file_id,
                None,
                header.put_time,
                ledger_index,
            )
        ]
    return [
        Row(m.sha256, m.size, m.name, m.media_type, m.attributes, manifest.file_id, number, header.put_time, ledger_index)
        for number, m in enumerate(header.members)
    ]


def _header(unit: Unit, hashes: Sequence[bytes], now: int) -> Header:
    if not unit.is_pack:
        (part,), (digest,) = unit.parts, hashes
        return Header("file", part.name, part.size, digest, part.description.media_type, part.description.attributes, (), now)
    members, offset = [], 0
    for part, digest in zip(unit.parts, hashes, strict=True):
        members.append(Member(part.name, offset, part.size, digest, part.description.media_type, part.description.attributes))
        offset += part.size
    # Every member has its own hash; the pack's is a hash over those, so that no byte is hashed twice.
    return Header.pack(unit.name, offset, Sha256(sha256(b"".join(hashes)).digest()), members, put_time=now)


def _batches(units: Sequence[Unit]) -> list[list[Unit]]:
    batches: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not batches or size + unit.size > batch_bytes_max or len(batches[-1]) == batch_units_max:
            batches.append([])
            size = 0
        batches[-1].append(unit)
        size += unit.size
    return batches


def _journal_key(unit: Unit) -> bytes:
    return b"put:" + fingerprint(unit.parts)


def _seen(part: Part) -> bytes:
    return b"seen:" + fingerprint([part])


class _first_error:  # noqa: N801 - reads as a statement: async with _first_error() as group
    """Wait for tasks; on the first error let the others finish what they began, then raise it."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> list[asyncio.Task[None]]:
        return self._tasks

    async def __aexit__(self, *_: object) -> None:
        try:
            results = await asyncio.gather(*self._tasks, return_exceptions=True)
        except asyncio.CancelledError:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            raise
        for result in results:
            if isinstance(result, BaseException):
                raise result
