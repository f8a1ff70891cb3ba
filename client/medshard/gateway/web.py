"""The gateway over HTTP: DICOMweb at /dicom-web, WADO-URI at /wado, and a viewer at / where there is one.

Who may: on the loopback without tokens, programs on this machine. With tokens, whoever shows one, as a bearer, as the password of basic
authentication, or as the cookie that /login gives to a browser. With a client CA, whoever has a certificate of it. Off the loopback TLS
and one of the two are needed, and the gateway does not start without.

Law: nothing is answered before its caller is known. A browser on this machine that shows a stranger's page is no caller: where there are
no tokens, the name in the request has to be this machine's own, and no other origin is let in unless it is configured.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from medshard.gateway import sendonly
from medshard.gateway.archive import Archive
from medshard.gateway.cache import BlockCache
from medshard.gateway.derived import Derived
from medshard.gateway.dicomweb.http import Handler, answer, base_key, errors
from medshard.gateway.dicomweb.qido import Qido
from medshard.gateway.dicomweb.rendered import Rendered
from medshard.gateway.dicomweb.stow import Stow
from medshard.gateway.dicomweb.wado import Wado
from medshard.gateway.intake import Intake
from medshard.gateway.reading import Shelf
from medshard.gateway.tokens import Tokens
from medshard.gateway.viewer import Viewer
from medshard_protocol.errors import Absent, Malformed, Refused

prefix: Final = "/dicom-web"
cookie: Final = "medshard-token"
keep_alive_s: Final = 75.0
end_s: Final = 5.0  # what runs when the gateway ends gets so long
connections_backlog: Final = 128
_ciphers: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"  # BCP 195 (RFC 9325)


@dataclass(frozen=True, slots=True)
class WebRules:
    """What the department decided. ``certificate``, ``key`` and ``client_ca`` are PEM files; ``cors`` are origins such as https://host."""

    host: str
    port: int
    tokens: Path
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    cors: tuple[str, ...] = ()
    viewer: Path | None = None
    base_url: str = ""


def check(rules: WebRules) -> None:
    """Raise Refused for rules by which strangers could read, Malformed or Absent for others that cannot be."""
    guarded = rules.client_ca is not None or bool(Tokens(rules.tokens).all())
    if not is_loopback(rules.host):
        if rules.certificate is None:
            raise Refused(
                f"DICOMweb would be open on {rules.host} without TLS",
                hint="give --http-cert and --http-key; or listen on 127.0.0.1, behind a proxy that speaks TLS",
            )
        if not guarded:
            raise Refused(
                f"DICOMweb would be open on {rules.host} for anybody",
                hint="make a token with `medshard gateway token add NAME`, or give --http-client-ca",
            )
    if (rules.certificate is None) != (rules.key is None):
        raise Malformed("a certificate needs its key, and a key its certificate", hint="give both --http-cert and --http-key")
    if rules.client_ca is not None and rules.certificate is None:
        raise Malformed("client certificates need TLS", hint="give --http-cert and --http-key as well")
    for origin in rules.cors:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or origin == "*":
            raise Malformed(f"{origin!a} is no origin", hint="write https://host or https://host:port, without a path")
    if rules.viewer is not None and not (rules.viewer / "index.html").is_file():
        raise Absent(f"there is no index.html in {rules.viewer}", hint="--viewer wants the folder of a built viewer, such as OHIF's dist")


def is_loopback(host: str) -> bool:
    """Whether only this machine can call."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reading(archive: Archive, cache: BlockCache) -> list[web.RouteDef]:
    shelf = Shelf(archive)
    derived = Derived(shelf, cache)
    wado, qido = Wado(shelf, derived), Qido(archive)
    rendered = Rendered(shelf, derived, wado)
    archive.prepare = derived.prepare
    return [*qido.routes(prefix), *wado.routes(prefix), *rendered.routes(prefix), rendered.uri()]


def application(archive: Intake, cache: BlockCache | None, rules: WebRules) -> web.Application:
    """All routes, behind the doorkeeper. Where there is no archive but its intake alone, whoever asks to read hears why not."""
    stow = Stow(archive)
    read = _reading(archive, cache) if isinstance(archive, Archive) and cache is not None else sendonly.routes(prefix)
    door = Door(rules)
    app = web.Application(middlewares=[door.cross_origin, errors, door.check], client_max_size=1024 * 1024)
    app[base_key] = rules.base_url
    app.router.add_routes([*stow.routes(prefix), *read])
    app.router.add_get("/login", door.login)
    app.router.add_post("/login", door.login)
    if rules.viewer is not None:
        app.router.add_routes(Viewer(rules.viewer, prefix).routes())

    async def ended(_: web.Application) -> None:
        await stow.close()

    app.on_response_prepare.append(door.allow)
    app.on_cleanup.append(ended)
    return app


@contextlib.asynccontextmanager
async def serving(archive: Intake, cache: BlockCache | None, rules: WebRules) -> AsyncIterator[str]:
    """Listen until the block ends; gives the address. Raises what ``check`` raises, and OSError for an address that cannot be had."""
    check(rules)
    runner = web.AppRunner(application(archive, cache, rules), access_log=None, keepalive_timeout=keep_alive_s, shutdown_timeout=end_s)
    await runner.setup()
    try:
        site = web.TCPSite(runner, rules.host, rules.port, ssl_context=_tls(rules), backlog=connections_backlog)
        await site.start()
        port = runner.addresses[0][1]
        name = f"[{rules.host}]" if ":" in rules.host else rules.host
        yield f"{'https' if rules.certificate else 'http'}://{name}:{port}"
    finally:
        await runner.cleanup()


class Door:
    """Who is let in."""

    def __init__(self, rules: WebRules) -> None:
        self._rules = rules
        self._tokens = Tokens(rules.tokens)

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer 401 to who may not."""
        if request.path == "/login" or self._may(request):
            return await handler(request)
        response = answer(
            401, "this gateway wants a token", "send Authorization: Bearer TOKEN; `medshard gateway token add NAME` makes one"
        )
        response.headers[hdrs.WWW_AUTHENTICATE] = 'Bearer realm="medshard", Basic realm="medshard"'
        return response

    def _may(self, request: web.Request) -> bool:
        if self._rules.client_ca is not None:
            return True  # TLS has let nobody else in
        if self._tokens.all():
            shown = _shown(request)
            return shown is not None and self._tokens.whose(shown) is not None
        # Nobody has to show anything. But a page from elsewhere, whose name resolves to this machine, may not read either.
        return is_loopback(urlsplit(f"//{request.host}").hostname or "")

    async def login(self, request: web.Request) -> web.StreamResponse:
        """Give a browser the cookie for a token, and send it to the viewer. The token is in the body: an address is kept in histories."""
        if request.method == "GET":
            return web.Response(text=_login_page, content_type="text/html")
        form = await request.post()
        shown = str(form.get("token", ""))
        if self._tokens.whose(shown) is None:
            return answer(401, "this token is not known here")
        response = web.HTTPSeeOther("/")
        response.set_cookie(cookie, shown, httponly=True, samesite="Strict", secure=self._rules.certificate is not None)
        return response

    @web.middleware
    async def cross_origin(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer what a browser asks before it lets a page of a configured origin ask."""
        if request.method == "OPTIONS" and request.headers.get(hdrs.ORIGIN, "") in self._rules.cors:
            response = web.Response(status=204)
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = "GET, POST"
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = "Accept, Authorization, Content-Type"
            response.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = "600"
            return response

        return await handler(request)

    async def allow(self, request: web.Request, response: web.StreamResponse) -> None:
        """Say in an answer, before it is sent, that its origin may read it."""
        if (origin := request.headers.get(hdrs.ORIGIN, "")) and origin in self._rules.cors:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.VARY] = hdrs.ORIGIN


_login_page: Final = """<!doctype html><title>medshard</title>
<form method="post"><label>Token <input name="token" type="password" autofocus></label> <button>Open</button></form>
"""


def _shown(request: web.Request) -> str | None:
    """The token in a request, however it is carried."""
    kind, _, value = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return None
    return request.cookies.get(cookie)


def _tls(rules: WebRules) -> ssl.SSLContext | None:
    if rules.certificate is None or rules.key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_ciphers)
    try:
        context.load_cert_chain(rules.certificate, rules.key)
        if rules.client_ca is not None:
            context.load_verify_locations(rules.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except FileNotFoundError as error:
        raise Absent(f"a file of the TLS settings is missing: {error.filename or rules.certificate}") from None
    except ssl.SSLError as error:
        raise Malformed(f"the TLS files do not fit together: {error}", hint="PEM files of one certificate, its key, and the CA") from None
    return context
