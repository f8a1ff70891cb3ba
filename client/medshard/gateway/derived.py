"""What is made of an instance and costs time to make: its frame table, and its data set as DICOM JSON. Kept in the encrypted cache.

Law: everything here can be made again from the instance, and is bound to its SHA-256: other bytes never get another's. Of whole series the
JSON is kept together, so that a viewer's first question costs one record; and it is kept in the index as well, so that it costs no more
where the cache was lost, or where another gateway has received the series.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import zlib
from collections.abc import Sequence
from itertools import groupby
from typing import Final

from medshard.gateway.cache import BlockCache
from medshard.gateway.describing import pixels_at
from medshard.gateway.dicomweb import datasets
from medshard.gateway.dicomweb.http import dumped, path_of
from medshard.gateway.frames import FrameTable, encapsulated, native, sealed
from medshard.gateway.media_types import in_place
from medshard.gateway.model import Instance
from medshard.gateway.reading import Shelf
from medshard_protocol.errors import MedshardError, TooLarge

head_bytes_max: Final = 64 * 1024 * 1024  # of an instance without pixels, all of which is read
together_max: Final = 2_000
prepared_max: Final = 2_000
making_max: Final = 2  # metadata of series that are being made
_form: Final = b"3"  # another one whenever what is made changes


class Derived:
    """Of one archive. The study that an instance is of is announced."""

    def __init__(self, shelf: Shelf, cache: BlockCache) -> None:
        self._shelf = shelf
        self._cache = cache
        self._tables: dict[bytes, FrameTable] = {}
        self._slots = asyncio.Semaphore(making_max)

    async def frames(self, instance: Instance) -> FrameTable:
        """Where the instance's frames lie. Raises Absent for one without pixels, Malformed for broken ones."""
        if (table := native(instance) or sealed(instance)) is not None:
            return table
        if (known := self._tables.get(instance.sha256)) is not None:
            return known
        name = self._cache.name(b"frames", _form, instance.sha256)
        kept = await asyncio.to_thread(self._cache.get, name)
        if kept is not None:
            table = FrameTable.from_bytes(kept)
        else:
            table = await encapsulated(instance, lambda start, stop: self._shelf.read(instance, start, stop))
            await asyncio.to_thread(self._cache.put, name, table.to_bytes())
        if len(self._tables) > 256:
            self._tables.clear()
        self._tables[instance.sha256] = table
        return table

    async def head(self, instance: Instance) -> bytes:
        """The file up to its pixels; all of it where there are none. Raises TooLarge."""
        start = instance.attributes.get(pixels_at, "").partition(" ")[0]
        size = int(start) if start.isdecimal() and in_place(instance.transfer_syntax) else instance.size
        if size > head_bytes_max:
            raise TooLarge("an instance without pixels of more than 64 MiB")
        return await self._shelf.read(instance, 0, size)

    async def metadata(self, instances: Sequence[Instance]) -> bytes:
        """A JSON array of the data sets of these instances, in their order. Blocks nobody for long."""
        parts: list[bytes] = []
        for _, group in groupby(instances, key=lambda each: each.series):
            of_series = list(group)
            for at in range(0, len(of_series), together_max):
                parts.append(await self._together(of_series[at : at + together_max]))
        return b"[" + b",".join(part for part in parts if part) + b"]"

    async def prepare(self, study: str, series: str) -> None:
        """Make the metadata of a series while all of it is in the spool, so that the first viewer does not wait for it."""
        instances = (await self._shelf.study(study)).chosen(series)
        archive = self._shelf.archive
        if len(instances) <= prepared_max and all(archive.entry(each) is not None for each in instances):
            await self.metadata(instances)

    async def _together(self, instances: Sequence[Instance]) -> bytes:
        mark = _form + hashlib.sha256(b"".join(each.sha256 for each in instances)).digest()
        name = self._cache.name(b"metadata", mark)
        first = instances[0]
        async with self._slots:  # two who ask for one series at once: the second finds what the first made
            if (kept := await asyncio.to_thread(self._cache.get, name)) is not None:
                return await asyncio.to_thread(zlib.decompress, kept)
            summary = await asyncio.to_thread(self._shelf.archive.catalog.summary, first.study, first.series)
            if summary is not None and summary.startswith(mark):
                await asyncio.to_thread(self._cache.put, name, summary[len(mark) :])
                return await asyncio.to_thread(zlib.decompress, summary[len(mark) :])
            made = b",".join([await self._one(each) for each in instances])
            packed = await asyncio.to_thread(zlib.compress, made, 1)
            await asyncio.to_thread(self._cache.put, name, packed)
            with contextlib.suppress(MedshardError):  # what is not kept is made again
                if len(instances) == len((await self._shelf.study(first.study)).chosen(first.series)):
                    await asyncio.to_thread(self._shelf.archive.catalog.keep_summary, first.study, first.series, mark + packed)
        return made

    async def _one(self, instance: Instance) -> bytes:
        url = path_of(instance.study, instance.series, instance.uid)
        try:
            head = await self.head(instance)
            return await asyncio.to_thread(_json, head, url, instance)
        except MedshardError:
            raise
        except Exception:  # broken inside, in one of a hundred ways: what the catalog knows is still true
            return dumped(datasets.of_known(instance.attributes, url))


def _json(head: bytes, url: str, instance: Instance) -> bytes:
    found = datasets.of_file(head, url, instance.transfer_syntax)
    if pixels_at in instance.attributes:
        is_words = instance.attributes.get("bits-allocated") not in ("8", "1") and not instance.attributes[pixels_at].endswith("undefined")
        found["7FE00010"] = datasets.pixels(url, "OW" if is_words else "OB")
    return dumped(found)
