"""What all DICOMweb routes share: errors as answers, the gateway's own address, paths of studies.

Law: a route parses, awaits, returns. Errors become statuses in one table; what nobody foresaw is a 500 that tells nothing, and a line
in the log without any value of the request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from aiohttp import web

from medshard.gateway.dicomweb import multipart
from medshard.gateway.dicomweb.datasets import root
from medshard.gateway.dicomweb.media import JSON, MULTIPART, XML, BadAccept, Range, fits, parsed
from medshard.gateway.dicomweb.nativemodel import document
from medshard.gateway.part10 import is_uid
from medshard_protocol.errors import (
    Absent,
    Conflict,
    Damaged,
    Full,
    Malformed,
    MedshardError,
    Refused,
    TooLarge,
    Unavailable,
)

log = logging.getLogger("medshard.gateway")
base_key: Final = web.AppKey("base_url", str)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
retry_after_s: Final = 5
status_of: Final[dict[type[MedshardError], int]] = {
    Absent: 404,
    Malformed: 400,
    Refused: 403,
    Conflict: 409,
    TooLarge: 413,
    Full: 507,
    Unavailable: 503,
    Damaged: 500,
}


class NotAcceptable(Exception):
    """None of what the client accepts can be given."""


def answer(status: int, message: str, hint: str = "") -> web.Response:
    """An error for people and programs."""
    headers = {"Retry-After": str(retry_after_s)} if status == 503 else None
    return web.json_response({"status": status, "message": message, "hint": hint}, status=status, headers=headers)


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error as an answer, or, where one has begun, as its end."""
    try:
        return await handler(request)
    except (web.HTTPException, ConnectionError):
        raise
    except Exception as error:
        if request.writer.output_size and request.transport is not None:
            _say("broke-off", error)
            request.transport.abort()  # so that nobody takes what was sent for the whole
            raise ConnectionResetError from None
        return _told(error)


def _told(error: Exception) -> web.Response:
    match error:
        case MedshardError():
            status = next((code for kind, code in status_of.items() if isinstance(error, kind)), 500)
            return answer(status, str(error), error.hint)
        case NotAcceptable():
            return answer(
                406, str(error), "accept multipart/related; type=application/dicom; transfer-syntax=* for what is stored as it is"
            )
        case BadAccept() | ValueError():
            return answer(400, str(error))
    _say("bug", error)
    return answer(500, "an error nobody foresaw", "the gateway's log says where")


def _say(event: str, error: Exception) -> None:
    place = traceback.extract_tb(error.__traceback__)[-1]
    log.error(json.dumps({"event": event, "kind": type(error).__name__, "at": f"{place.filename}:{place.lineno}"}))


def accepted(request: web.Request) -> list[Range]:
    """What the client accepts: the query parameter ``accept`` before the header (PS3.18 section 8.3.3.1). Raises BadAccept."""
    return parsed(request.query.get("accept") or ", ".join(request.headers.getall("Accept", [])))


def base(request: web.Request) -> str:
    """The address of the DICOMweb root, as this client calls it."""
    return request.app[base_key] or f"{origin(request)}/dicom-web"


def origin(request: web.Request) -> str:
    """Scheme, host and port as this client calls them. Some clients leave the port out of their Host header."""
    host = request.host
    if host in ("127.0.0.1", "localhost") and request.transport is not None:
        host = f"{host}:{request.transport.get_extra_info('sockname')[1]}"
    return f"{request.scheme}://{host}"


def form_of(request: web.Request) -> str:
    """How data sets are given to this client: as DICOM JSON or, where it asks for that, as XML. Raises NotAcceptable."""
    for each in accepted(request):
        if not each.multipart and each.media in (JSON, "application/json", "*/*", "application/*"):
            return JSON
        if each.media == XML or (each.multipart and fits(each.media, XML)):
            return XML
    raise NotAcceptable(f"this is given as {JSON}, or as {MULTIPART}; type={XML}")


async def datasets_answer(request: web.Request, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A data set, or a list of them, in JSON; as the client wants it, with the gateway's own address in it. Raises NotAcceptable."""
    form = form_of(request)
    body = body.replace(root.encode(), base(request).encode())
    if form == JSON:
        return web.Response(body=body, status=status, content_type=JSON, headers=headers)
    found = await asyncio.to_thread(json.loads, body)
    if isinstance(found, dict):
        return web.Response(body=await asyncio.to_thread(document, found), status=status, content_type=XML, headers=headers)
    if not found:
        return web.Response(status=204, headers=headers)
    boundary = multipart.new_boundary()
    made = await asyncio.to_thread(_as_parts, found, boundary)
    kind = f'{MULTIPART}; type="{XML}"; boundary={boundary}'
    return web.Response(body=made, status=status, headers={**(headers or {}), "Content-Type": kind})


def _as_parts(found: Sequence[Any], boundary: str) -> bytes:
    parts = [multipart.head(boundary, XML, first=number == 0) + document(each) for number, each in enumerate(found)]
    return b"".join([*parts, multipart.tail(boundary)])


def dumped(value: Any) -> bytes:
    """JSON in as few bytes as can be."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def uids(request: web.Request) -> tuple[str, str | None, str | None]:
    """Study, series and instance that a path names. Raises Absent for what can be no UID."""
    named = [request.match_info.get(name) for name in ("study", "series", "instance")]
    if any(each is not None and not is_uid(each) for each in named):
        raise Absent("there is no such study, series or instance here")
    return str(named[0]), named[1], named[2]


def path_of(study: str, series: str | None = None, uid: str | None = None) -> str:
    """The path of a resource under the DICOMweb root."""
    return f"/studies/{study}" + (f"/series/{series}" if series else "") + (f"/instances/{uid}" if uid else "")
