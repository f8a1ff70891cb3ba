"""Rendered frames, thumbnails, and WADO-URI (PS3.18 sections 10.4.1.1.3, 10.4.1.1.5 and 9).

Law: as the other routes; a picture costs a decoded frame and is made in a thread, a few at a time. Of an instance with several frames the
first stands for it, unless frames are named.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from aiohttp import web

from medshard.gateway.derived import Derived
from medshard.gateway.describing import pixels_at
from medshard.gateway.dicomweb import media
from medshard.gateway.dicomweb.http import NotAcceptable, accepted, uids
from medshard.gateway.dicomweb.media import DICOM
from medshard.gateway.dicomweb.pixels import Look, picture, picture_side_max, thumbnail_side
from medshard.gateway.dicomweb.wado import Wado, frame, frame_numbers, send_parts
from medshard.gateway.media_types import uncompressed
from medshard.gateway.model import Instance
from medshard.gateway.part10 import is_uid
from medshard.gateway.reading import Shelf
from medshard.gateway.transcoding import decodable
from medshard_protocol.errors import Absent, Malformed

making_max: Final = 2
pictures: Final = ("image/jpeg", "image/png")


class Rendered:
    """Routes of pictures."""

    def __init__(self, shelf: Shelf, derived: Derived, wado: Wado) -> None:
        self._shelf = shelf
        self._derived = derived
        self._wado = wado
        self._making = asyncio.Semaphore(making_max)

    def routes(self, prefix: str) -> list[web.RouteDef]:
        """Pictures and thumbnails at every level."""
        study = prefix + "/studies/{study}"
        series, instance = study + "/series/{series}", study + "/series/{series}/instances/{instance}"
        one = instance + "/frames/{frames}"
        return [
            *(web.get(path + "/rendered", self.rendered) for path in (study, series, instance, one)),
            *(web.get(path + "/thumbnail", self.thumbnail) for path in (study, series, instance, one)),
        ]

    def uri(self) -> web.RouteDef:
        """The one path of WADO-URI."""
        return web.get("/wado", self.wado_uri)

    async def rendered(self, request: web.Request) -> web.StreamResponse:
        """Pictures of what is named: of each instance with pixels its first frame, or those frames that are named."""
        study, series, uid = uids(request)
        found = await self._shelf.study(study)
        images = [each for each in found.chosen(series, uid) if pixels_at in each.attributes]
        if not images:
            raise Absent("there are no pixels in it")
        numbers = frame_numbers(request.match_info.get("frames", "1"))
        chosen = media.for_pictures(accepted(request), pictures, single=len(images) * len(numbers) == 1)
        if chosen is None:
            raise NotAcceptable("pictures are given as image/jpeg or image/png; several of them as multipart/related of these")
        if unknown := {each.transfer_syntax for each in images} - uncompressed - set(decodable):
            raise NotAcceptable(f"what is stored in {', '.join(sorted(unknown))} is not decoded here")
        asked = replace(look(request.query), media=chosen.media)
        await self._shelf.check(images)
        await self._shelf.announce(found)
        for image in images if max(numbers) > 1 else ():
            (await self._wado.source(image))[1].place(max(numbers))  # raises Absent, while there is still a status to say it with
        made = (await self._made(image, number, asked) for image in images for number in numbers)
        return await send_parts(request, made, chosen.media, chosen.media, multiple=chosen.multipart)

    async def thumbnail(self, request: web.Request) -> web.StreamResponse:
        """A small picture of what stands for the study, series or instance: the middle one of its images."""
        chosen = media.first_of(accepted(request), pictures)
        if chosen is None:
            raise NotAcceptable("pictures are given as image/jpeg or image/png")
        asked = look(request.query)
        if not (asked.width or asked.height):
            asked = replace(asked, width=thumbnail_side, height=thumbnail_side)
        return await self._picture(request, replace(asked, media=chosen))

    async def wado_uri(self, request: web.Request) -> web.StreamResponse:
        """One instance or one of its frames, named by parameters."""
        given = request.query
        study, series, uid = (given.get(name, "") for name in ("studyUID", "seriesUID", "objectUID"))
        if given.get("requestType") != "WADO" or not all(map(is_uid, (study, series, uid))):
            raise Malformed("a WADO-URI request has requestType=WADO, studyUID, seriesUID and objectUID")
        found = await self._shelf.study(study)
        (instance,) = found.chosen(series, uid)
        kinds = [each.strip().lower() for each in given.get("contentType", "").split(",") if each.strip()]
        kinds = kinds or (["image/jpeg"] if pixels_at in instance.attributes else [DICOM])
        await self._shelf.announce(found)
        if kinds[0] in (DICOM, "*/*"):
            return await self._instance(request, instance, given.get("transferSyntax", ""))
        chosen = next((kind for kind in kinds if kind in pictures), None)
        if chosen is None:
            raise NotAcceptable("this is given as application/dicom, image/jpeg or image/png")
        asked = replace(_uri_look(given), media=chosen)
        number = frame_numbers(given.get("frameNumber", "1"))[0]
        return web.Response(body=await self._made(instance, number, asked), content_type=chosen)

    async def _instance(self, request: web.Request, instance: Instance, syntax: str) -> web.StreamResponse:
        ranges = [media.Range(DICOM, syntax=syntax)]
        choice = media.for_instances(ranges, {instance.transfer_syntax}, decodable)
        if choice is None:
            choice = media.for_instances([media.Range(DICOM, syntax="*")], {instance.transfer_syntax}, decodable)
        assert choice is not None, "as it is stored it can always be sent"
        return await self._wado.send_instances(request, (instance,), choice)

    async def _picture(self, request: web.Request, asked: Look) -> web.StreamResponse:
        study, series, uid = uids(request)
        found = await self._shelf.study(study)
        images = [each for each in found.chosen(series, uid) if pixels_at in each.attributes]
        if not images:
            raise Absent("there are no pixels in it")
        await self._shelf.announce(found)
        instance = images[len(images) // 2]
        numbers = frame_numbers(request.match_info.get("frames", "1"))
        if len(numbers) > 1:
            raise NotAcceptable("pictures are given one frame at a time")
        return web.Response(body=await self._made(instance, numbers[0], asked), content_type=asked.media)

    async def _made(self, instance: Instance, number: int, asked: Look) -> bytes:
        source, table = await self._wado.source(instance)
        data = await frame(source, table, number)
        head = await self._derived.head(source.instance) if source.is_stored else await source.read(0, table.start)
        async with self._making:
            return await asyncio.to_thread(picture, head, data, asked, encapsulated=table.encapsulated)


def look(given: Mapping[str, str]) -> Look:
    """The parameters viewport, window and quality (PS3.18 section 8.3.5.1). Raises Malformed."""
    width = height = 0
    region = None
    if text := given.get("viewport", ""):
        parts = text.split(",")
        if len(parts) not in (2, 6):
            raise Malformed("viewport is vw,vh or vw,vh,sx,sy,sw,sh")
        width, height = (_side(part) for part in parts[:2])
        if len(parts) == 6 and all(parts[4:]):
            x, y, wide, high = (_float(part or "0", "viewport") for part in parts[2:])
            region = (x, y, wide, high)
            if abs(wide) < 1 or abs(high) < 1 or max(abs(wide), abs(high)) > 1 << 20:
                raise Malformed("viewport names a part of the picture that is none")
    window = None
    if text := given.get("window", ""):
        centre, _, rest = text.partition(",")
        wide_text, _, function = rest.partition(",")
        window = _window(centre, wide_text, function or "linear")
    return Look(width=width, height=height, region=region, window=window, quality=_quality(given.get("quality", "")))


def _uri_look(given: Mapping[str, str]) -> Look:
    width, height = _side(given.get("columns", "0")), _side(given.get("rows", "0"))
    window = None
    if "windowCenter" in given or "windowWidth" in given:
        window = _window(given.get("windowCenter", ""), given.get("windowWidth", ""), "linear")
    return Look(width=width, height=height, window=window, quality=_quality(given.get("imageQuality", "")))


def _window(centre: str, width: str, function: str) -> tuple[float, float, str]:
    kind = function.replace("-", "_").upper()
    if kind not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise Malformed("the window's function is linear, linear-exact or sigmoid")
    wide = _float(width, "window")
    if wide < 1:
        raise Malformed("a window is at least 1 wide")
    return _float(centre, "window"), wide, kind


def _quality(text: str) -> int:
    if not text:
        return Look().quality
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise Malformed("quality is a number from 1 to 100")
    return int(text)


def _side(text: str) -> int:
    if not text.isdecimal() or len(text) > 6 or int(text) > picture_side_max:
        raise Malformed(f"a side of a picture has at most {picture_side_max} pixels")
    return int(text)


def _float(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise Malformed(f"{what}: not a number") from None
    if value != value or abs(value) > 1e9:
        raise Malformed(f"{what}: not a number of this size")
    return value
