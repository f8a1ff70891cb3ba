"""Restoring: from a plaintext's SHA-256 to its bytes, every step checked.

tag → manifest (from any holder; its hash is on the ledger under a quorum) → ACCESS entry → k shards → cells checked → unsealed →
SHA-256 compared → rename. Nothing wrong is ever written under a final name. The entry is there before anything here begins: the net that
is read over shows it with each request (access.py).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Final

from medshard.download import Arrived, BadCell, Download
from medshard.encoding import Decoder
from medshard.model import Progress
from medshard.restoring import Restore, Target, pour, publish, stripes_needed
from medshard.smallfiles import SmallReads, object_bytes_max
from medshard.transport import Net
from medshard_protocol.errors import MedshardError
from medshard_protocol.ids import FileId
from medshard_protocol.manifest import Manifest
from medshard_protocol.shards import split

batch_bytes_max: Final = 8 * 1024 * 1024
OnProgress = Callable[[Progress], None]


class Early:
    """Asks for small files as soon as the ledger has answered, while its proof is still verified: that takes one core, holders the other.

    Nothing that comes is used before the proof holds, which is what ``take`` is called for. What goes wrong here is not told: the
    files are asked for again, as if this had not been.
    """

    def __init__(self, manifests: Iterable[Manifest]) -> None:
        self._manifests = {manifest.file_id: manifest for manifest in manifests}
        self._reading: asyncio.Task[dict[FileId, dict[int, bytes]]] | None = None
        self.bad_cells: list[BadCell] = []

    def begin(self, net: Net) -> None:
        """Ask, if all of them are small; once."""
        manifests = list(self._manifests.values())
        if (
            self._reading is None
            and all(map(_is_small, manifests))
            and sum(each.layout.sealed_size for each in manifests) <= batch_bytes_max
        ):
            self._reading = asyncio.create_task(SmallReads(net, manifests, self.bad_cells.append).fetch())

    async def take(self, manifests: Collection[Manifest]) -> dict[FileId, dict[int, bytes]] | None:
        """The shards that came of these very files; None if they did not."""
        reading, self._reading = self._reading, None
        if reading is None or {manifest.file_id for manifest in manifests} != set(self._manifests):
            await _ended(reading)
            return None
        try:
            return await reading
        except MedshardError:
            return None
        finally:
            await _ended(reading)

    async def end(self) -> None:
        """Nobody wants them any more."""
        reading, self._reading = self._reading, None
        await _ended(reading)


async def _ended(task: asyncio.Task[dict[FileId, dict[int, bytes]]] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Getter:
    """Restores of one vault over one set of connections."""

    def __init__(self, net: Net, early: Early | None = None) -> None:
        self._net = net
        self._early = early
        self.bad_cells: list[BadCell] = [] if early is None else early.bad_cells

    async def restore(self, restores: Sequence[Restore], progress: OnProgress | None = None) -> None:
        """Fill and finish every restore. On an error what is not finished leaves no trace."""
        total = sum(restore.target.size for restore in restores)
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            done += size
            if progress:
                progress(Progress(done, total, "restoring", ""))

        by_file: dict[FileId, list[Restore]] = defaultdict(list)
        for restore in restores:
            by_file[restore.target.manifest.file_id].append(restore)
        try:
            small: list[list[Restore]] = []
            for group in by_file.values():
                if _is_small(group[0].target.manifest):
                    small.append(group)
                else:
                    await self._restore_large(group, advance if progress else None)
            *batches, last = [*_batches(small)] or [[]]
            for batch in batches:
                await self._restore_small(batch, advance)
            await self._restore_small(last, advance, restores)
        except BaseException:
            for restore in restores:
                restore.abandon()
            raise

    async def _restore_large(self, group: Sequence[Restore], advance: Callable[[int], None] | None) -> None:
        manifest = group[0].target.manifest
        group = sorted(group, key=lambda restore: restore.target.offset)
        decoder = Decoder(group[0].target.seal, manifest.layout)
        loop = asyncio.get_running_loop()

        def take(arrived: Arrived) -> None:
            plain = decoder.open_in_place(arrived.number, arrived.stripe, arrived.cells)
            poured = pour(manifest.layout, arrived.number, plain, group)
            if advance:
                loop.call_soon_threadsafe(advance, poured)

        for run in stripes_needed(manifest.layout, [restore.target for restore in group]):
            await Download(self._net, manifest, self.bad_cells.append).run(run, take)

    async def _restore_small(
        self, groups: Sequence[Sequence[Restore]], advance: Callable[[int], None], finished: Sequence[Restore] = ()
    ) -> None:
        """Fill these, and publish what is ``finished`` then: in one thread, as going there and back takes longer than a small file does."""
        manifests = [group[0].target.manifest for group in groups]
        shards = None if self._early is None else await self._early.take(manifests)
        if shards is None:
            shards = await SmallReads(self._net, manifests, self.bad_cells.append).fetch()

        def pour_all() -> None:
            for group in groups:
                target = group[0].target
                _pour_small(target, shards[target.manifest.file_id], sorted(group, key=lambda r: r.target.offset))
            publish(finished)

        await asyncio.to_thread(pour_all)
        advance(sum(restore.target.size for group in groups for restore in group))


def _pour_small(target: Target, shards: dict[int, bytes], group: Sequence[Restore]) -> None:
    layout = target.manifest.layout
    decoder = Decoder(target.seal, layout)
    cells = {index: list(split(shard, layout.cell_size)) for index, shard in shards.items()}
    for number in range(layout.stripes):
        plain = decoder.open(number, {index: parts[number] for index, parts in cells.items()})
        pour(layout, number, memoryview(plain), group)


def _is_small(manifest: Manifest) -> bool:
    return manifest.layout.sealed_size <= object_bytes_max + object_bytes_max // 8


def _batches(groups: Iterable[list[Restore]]) -> Iterable[list[list[Restore]]]:
    batch: list[list[Restore]] = []
    size = 0
    for group in groups:
        size += group[0].target.manifest.layout.sealed_size
        if batch and size > batch_bytes_max:
            yield batch
            batch, size = [], group[0].target.manifest.layout.sealed_size
        batch.append(group)
    if batch:
        yield batch


def default_destination(name: bytes, folder: Path) -> Path:
    """Where a restore goes when nothing was said: the stored name's last part, in ``folder``."""
    import os

    return folder / os.fsdecode(name.rsplit(b"/", 1)[-1])
