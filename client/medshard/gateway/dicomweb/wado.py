"""WADO-RS: studies, series and instances, their metadata, frames and bulk data (PS3.18 section 10.4).

Law: what is sent as stored is sent byte for byte, in long chunks, with its length said beforehand. What has to be decoded is decoded one
instance or frame at a time, in a thread. An error before the first byte is a status; after it the connection is cut, so that nobody
takes half for the whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Final

from aiohttp import web

from medshard.gateway.derived import Derived
from medshard.gateway.describing import describe, pixels_at
from medshard.gateway.dicomweb import bulk, media, multipart
from medshard.gateway.dicomweb.http import NotAcceptable, accepted, datasets_answer, form_of, uids
from medshard.gateway.dicomweb.media import DICOM, Choice, explicit_le
from medshard.gateway.dicomweb.pixels import native
from medshard.gateway.frames import FrameTable, shifted, unwrapped
from medshard.gateway.media_types import native_in_place, uncompressed
from medshard.gateway.model import Instance
from medshard.gateway.part10 import head_of
from medshard.gateway.reading import Shelf, Study
from medshard.gateway.transcoding import decodable, transcoded
from medshard_protocol.errors import Absent, Malformed, TooLarge

write_bytes: Final = 1024 * 1024
frames_at_once_max: Final = 100_000
decode_bytes_max: Final = 512 * 1024 * 1024  # of one instance in memory, as it is stored
decoding_max: Final = 2


class Wado:
    """Routes of retrievals."""

    def __init__(self, shelf: Shelf, derived: Derived) -> None:
        self._shelf = shelf
        self._derived = derived
        self._decoding = asyncio.Semaphore(decoding_max)

    def routes(self, prefix: str) -> list[web.RouteDef]:
        """All of PS3.18 table 10.4.1-1 but pictures."""
        study = prefix + "/studies/{study}"
        series, instance = study + "/series/{series}", study + "/series/{series}/instances/{instance}"
        return [
            *(web.get(path, self.instances) for path in (study, series, instance)),
            *(web.get(path + "/metadata", self.metadata) for path in (study, series, instance)),
            web.get(instance + "/frames/{frames}", self.frames),
            web.get(instance + "/bulkdata/{path:[0-9A-Fa-f/]+}", self.bulkdata),
        ]

    async def instances(self, request: web.Request) -> web.StreamResponse:
        """Whole instances."""
        study, instances = await self._found(request)
        choice = media.for_instances(accepted(request), {each.transfer_syntax for each in instances}, decodable)
        if choice is None or (not choice.multipart and len(instances) > 1):
            stored = ", ".join(sorted({each.transfer_syntax for each in instances}))
            raise NotAcceptable(f"what is stored in {stored} cannot be given as this request wants it")
        await self._shelf.announce(study)
        return await self.send_instances(request, instances, choice)

    async def send_instances(self, request: web.Request, instances: Sequence[Instance], choice: Choice) -> web.StreamResponse:
        """Send instances of a study that is announced."""
        await self._shelf.check(instances)
        if choice.as_stored:
            return await self._send_stored(request, instances, choice)
        return await self._send_decoded(request, instances, choice)

    async def metadata(self, request: web.Request) -> web.StreamResponse:
        """Data sets as JSON or XML, without bulk data."""
        study, instances = await self._found(request)
        form_of(request)  # refuses what cannot be accepted, before anything is read
        await self._shelf.announce(study)
        return await datasets_answer(request, await self._derived.metadata(instances))

    async def frames(self, request: web.Request) -> web.StreamResponse:
        """Some frames of one instance, each read by itself."""
        study, (instance,) = await self._found(request)
        numbers = frame_numbers(request.match_info["frames"])
        choice = media.for_frames(accepted(request), instance.transfer_syntax, decodable, uncompressed)
        if choice is None or (not choice.multipart and len(numbers) > 1):
            raise NotAcceptable(f"frames that are stored in {instance.transfer_syntax} cannot be given as this request wants them")
        await self._shelf.announce(study)
        source, table = await self.source(instance)
        for number in numbers:
            table.place(number)  # raises Absent, while there is still a status to say it with
        kind = choice.media + (f"; transfer-syntax={choice.syntax}" if choice.syntax else "")
        return await send_parts(request, self._frames(source, table, numbers, choice), kind, choice.media, multiple=choice.multipart)

    async def bulkdata(self, request: web.Request) -> web.StreamResponse:
        """The value of one element that the metadata give by reference."""
        study, (instance,) = await self._found(request)
        await self._shelf.announce(study)
        path = request.match_info["path"]
        at = instance.attributes.get(pixels_at, "")
        if path.upper() == "7FE00010" and at.endswith("undefined"):
            choice = media.for_frames(accepted(request), instance.transfer_syntax, decodable, uncompressed)
            if choice is None or not choice.multipart:
                raise NotAcceptable("encapsulated pixels are given frame by frame, as multipart/related")
            source, table = await self.source(instance)
            frames = self._frames(source, table, range(1, table.count + 1), choice)
            return await send_parts(request, frames, f"{choice.media}; transfer-syntax={choice.syntax}", choice.media, multiple=True)
        ranges = [each for each in accepted(request) if media.fits(each.media, media.OCTETS)]
        if not ranges:
            raise NotAcceptable("bulk data are given as application/octet-stream")
        if path.upper() == "7FE00010" and at and native_in_place(instance.transfer_syntax):
            start, length = (int(each) for each in at.split())
            parts = self._stretch(instance, start, start + length)
        else:
            parts = _alone(await asyncio.to_thread(bulk.value_at, await self._whole(instance), path))
        multiple = ranges[0].multipart
        return await send_parts(request, _joined(parts) if multiple else parts, media.OCTETS, media.OCTETS, multiple=multiple)

    async def source(self, instance: Instance) -> tuple[Source, FrameTable]:
        """Where frames are read from: the instance as it is stored, or decoded as a whole where its pixels do not lie in it as they are."""
        if instance.transfer_syntax not in uncompressed or native_in_place(instance.transfer_syntax):
            return Source(self._shelf, instance), await self._derived.frames(instance)
        file = head_of(instance.sop_class, instance.uid, explicit_le) + await self._transcoded(instance)
        said = describe(lambda start, stop: file[start:stop], len(file))
        changed = Instance(instance.study, instance.series, instance.uid, len(file), instance.sha256, instance.received, said.attributes)
        return Source(self._shelf, changed, file), await self._derived.frames(changed)

    # -- inside

    async def _found(self, request: web.Request) -> tuple[Study, tuple[Instance, ...]]:
        study, series, uid = uids(request)
        found = await self._shelf.study(study)
        return found, found.chosen(series, uid)

    async def _send_stored(self, request: web.Request, instances: Sequence[Instance], choice: Choice) -> web.StreamResponse:
        boundary = multipart.new_boundary()
        heads = [
            multipart.head(boundary, f"{DICOM}; transfer-syntax={each.transfer_syntax}", first=number == 0, length=each.size)
            for number, each in enumerate(instances)
        ]
        end = multipart.tail(boundary)
        if not choice.multipart:
            heads, end = [b""], b""
        kind = f'{media.MULTIPART}; type="{DICOM}"; boundary={boundary}' if choice.multipart else DICOM
        response = web.StreamResponse(headers={"Content-Type": kind})
        response.content_length = sum(map(len, heads)) + len(end) + sum(each.size for each in instances)
        await response.prepare(request)
        gathered: list[bytes | memoryview] = []
        size = number = 0
        begun = False
        async for _, data, last in self._shelf.stream(instances):
            if not begun:
                gathered.append(heads[number])
                begun = True
            gathered.append(data)
            size += len(data)
            if last:
                number, begun = number + 1, False
            if size >= write_bytes:
                await response.write(b"".join(gathered))
                gathered, size = [], 0
        await response.write(b"".join([*gathered, end]))
        await response.write_eof()
        return response

    async def _send_decoded(self, request: web.Request, instances: Sequence[Instance], choice: Choice) -> web.StreamResponse:
        if any(each.size > decode_bytes_max for each in instances):
            raise NotAcceptable("an instance of more than 512 MiB is not decoded here")

        async def parts() -> AsyncIterator[bytes]:
            for each in instances:
                if each.transfer_syntax == explicit_le:
                    yield await self._shelf.read(each, 0, each.size)
                else:
                    yield head_of(each.sop_class, each.uid, explicit_le) + await self._transcoded(each)

        return await send_parts(request, parts(), f"{DICOM}; transfer-syntax={explicit_le}", DICOM, multiple=choice.multipart)

    async def _transcoded(self, instance: Instance) -> bytes:
        async with self._decoding:
            return await asyncio.to_thread(transcoded, await self._whole(instance), explicit_le)

    async def _whole(self, instance: Instance) -> bytes:
        if instance.size > decode_bytes_max:
            raise TooLarge("an instance of more than 512 MiB is not taken apart here")
        return await self._shelf.read(instance, 0, instance.size)

    async def _frames(self, source: Source, table: FrameTable, numbers: Sequence[int], choice: Choice) -> AsyncIterator[bytes]:
        head = b"" if choice.as_stored or not table.encapsulated else await self._derived.head(source.instance)
        for number in numbers:
            data = await frame(source, table, number)
            if head:
                async with self._decoding:
                    data = await asyncio.to_thread(native, head, data, encapsulated=True)
            yield data

    async def _stretch(self, instance: Instance, start: int, stop: int) -> AsyncIterator[bytes]:
        for at in range(start, stop, 4 * write_bytes):
            yield await self._shelf.read(instance, at, min(at + 4 * write_bytes, stop))


class Source:
    """An instance whose frames are read: as it is stored, or its decoded bytes in memory."""

    def __init__(self, shelf: Shelf, instance: Instance, decoded: bytes | None = None) -> None:
        self.instance = instance
        self._shelf = shelf
        self._decoded = decoded

    @property
    def is_stored(self) -> bool:
        """Whether its bytes are those that are stored."""
        return self._decoded is None

    async def read(self, start: int, stop: int) -> bytes:
        """Some of its bytes."""
        return await self._shelf.read(self.instance, start, stop) if self._decoded is None else self._decoded[start:stop]


async def frame(source: Source, table: FrameTable, number: int) -> bytes:
    """One frame as it is stored. Raises Absent, Malformed, and what reading raises."""
    first, last, skip = table.place(number)
    data = await source.read(first, last)
    if table.encapsulated:
        return unwrapped(data)
    return shifted(data, skip, table.bits) if table.bits % 8 else data


def frame_numbers(text: str) -> list[int]:
    """``1,2,5`` as numbers from 1. Raises Malformed."""
    parts = text.split(",")
    if len(parts) > frames_at_once_max or not all(part.isdecimal() and len(part) < 9 for part in parts):
        raise Malformed("frames are named by numbers with commas between them")
    return [int(part) for part in parts]


async def send_parts(
    request: web.Request, parts: AsyncIterator[bytes], part_type: str, inner: str, *, multiple: bool
) -> web.StreamResponse:
    """Send what ``parts`` gives as the parts of a multipart, or as one body. The first one is made before the head is sent."""
    first = await anext(parts, None)
    if first is None:
        raise Absent("there is nothing of the kind in it")
    boundary = multipart.new_boundary()
    kind = f'{media.MULTIPART}; type="{inner}"; boundary={boundary}' if multiple else part_type
    response = web.StreamResponse(headers={"Content-Type": kind})
    await response.prepare(request)
    if multiple:
        await response.write(multipart.head(boundary, part_type, first=True, length=len(first)) + first)
        async for part in parts:
            await response.write(multipart.head(boundary, part_type, first=False, length=len(part)) + part)
        await response.write(multipart.tail(boundary))
    else:
        await response.write(first)
        async for part in parts:
            await response.write(part)
    await response.write_eof()
    return response


async def _alone(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _joined(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield b"".join([part async for part in parts])
