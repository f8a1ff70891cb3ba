"""Links over HTTP: the manifest of SMART Health Links, the documents, and a page that opens a link in a browser.

Who may: whoever has a link. Nothing else of the vault can be reached from here; an address that is no link's is answered like one that has
ended. The key of what is sent is behind the # of the link, which browsers send to nobody.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from aiohttp import web

from medshard.links.desk import Closed, Desk, WrongPasscode
from medshard.links.model import id_of
from medshard.model import Row
from medshard.text import shown
from medshard_protocol.errors import Malformed, MedshardError, Refused

body_bytes_max: Final = 4096
opens_per_minute: Final = 60  # from one address, whichever links: a passcode has few bits
addresses_max: Final = 10_000
_cors: Final = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Headers": "content-type",
    "Access-Control-Allow-Methods": "GET, POST",
}
_safe: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
log = logging.getLogger("medshard.links")


class Throttle:
    """How often each address has opened links of late."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, deque[float]] = {}

    def allows(self, address: str) -> bool:
        """Count one; whether it is not too many."""
        now = self._clock()
        if address not in self._seen and len(self._seen) >= addresses_max:
            self._seen.pop(next(iter(self._seen)))
        recent = self._seen.setdefault(address, deque(maxlen=opens_per_minute))
        if len(recent) == opens_per_minute and now - recent[0] < 60:
            return False
        recent.append(now)
        return True


def application(desk: Desk, base: str) -> web.Application:
    """All routes. ``base`` is the address under which the world finds them."""
    throttle = Throttle()

    async def manifest(request: web.Request) -> web.Response:
        if not throttle.allows(request.remote or ""):
            return _problem(429, "too many links were opened from this address; wait a minute")
        asked = await _asked(request)
        passes = await desk.open(id_of(request.match_info["id"]), asked.get("passcode"))
        found = [_listed(base, token, row) for token, row in passes]
        log.info("a link was opened", extra={"documents": len(found)})
        return web.json_response({"status": "can-change", "files": found}, headers=_cors | _safe)

    async def document(request: web.Request) -> web.Response:
        data = await desk.fetch(request.match_info["token"])
        return web.Response(body=data, content_type="application/jose", headers=_cors | _safe)

    async def preflight(request: web.Request) -> web.Response:
        return web.Response(status=204, headers=_cors)

    def page(name: str, content_type: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        body = files("medshard.links").joinpath(name).read_bytes()

        async def get(request: web.Request) -> web.Response:
            return web.Response(body=body, content_type=content_type, charset="utf-8", headers=_safe)

        return get

    app = web.Application(middlewares=[_told], client_max_size=body_bytes_max)
    app.router.add_post("/shl/{id}", manifest)
    app.router.add_route("OPTIONS", "/shl/{id}", preflight)
    app.router.add_get("/shl-file/{token}", document)
    app.router.add_get("/link", page("link.html", "text/html"))
    app.router.add_get("/link.js", page("link.js", "text/javascript"))
    app.router.add_get("/link.css", page("link.css", "text/css"))
    return app


@asynccontextmanager
async def serving(
    desk: Desk, base: str, host: str, port: int, certificate: Path | None = None, key: Path | None = None
) -> AsyncIterator[int]:
    """Serve links; the port. Raises Refused for an address off this machine without TLS, OSError where it cannot be listened on."""
    if certificate is None and not _is_loopback(host):
        raise Refused(f"links would be served on {host} without TLS", hint="Give --cert and --key; or listen on 127.0.0.1, behind a proxy.")
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(certificate, key)
    runner = web.AppRunner(application(desk, base), access_log=None)  # a log of addresses would be a log of links
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, ssl_context=context)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@web.middleware
async def _told(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    try:
        return await handler(request)
    except WrongPasscode as error:
        return web.json_response({"remainingAttempts": error.left}, status=401, headers=_cors | _safe)
    except Malformed as error:
        return _problem(404 if "id" in request.match_info else 400, str(error))
    except Closed as error:
        return _problem(404, str(error))
    except (MedshardError, TimeoutError) as error:
        log.warning("a link could not be served: %s", error)
        return _problem(503, "the documents cannot be fetched just now; try again later")


async def _asked(request: web.Request) -> dict[str, Any]:
    """The request of the specification: a recipient, and perhaps a passcode. Raises Malformed."""
    try:
        asked = json.loads(await request.text())
        recipient, passcode = asked["recipient"], asked.get("passcode")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Malformed("expected JSON with a recipient") from None
    if not isinstance(recipient, str) or not (passcode is None or isinstance(passcode, str)):
        raise Malformed("expected JSON with a recipient")
    return {"recipient": recipient, "passcode": passcode}


def _listed(base: str, token: str, row: Row) -> dict[str, Any]:
    name = shown(row.name.rpartition(b"/")[2])
    return {
        "contentType": row.media_type or "application/octet-stream",
        "location": f"{base.rstrip('/')}/shl-file/{quote(token)}",
        "name": name,
        "size": row.size,
    }


def _problem(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status, headers=_cors | _safe)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


async def forever(
    desk: Desk, base: str, host: str, port: int, certificate: Path | None, key: Path | None, started: Callable[[int], None]
) -> None:
    """Serve until this is cancelled."""
    async with serving(desk, base, host, port, certificate, key) as bound:
        started(bound)
        await asyncio.Event().wait()
