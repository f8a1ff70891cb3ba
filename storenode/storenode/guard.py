"""What every request passes, whichever way it is answered: who is it, may it speak at all, and how errors become answers.

Law: no route does any of that. What goes past aiohttp (quick.py) is let in, counted and refused by the same lines.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from medshard_protocol.errors import Full, MedshardError, Refused, Unavailable
from medshard_protocol.ids import NodeId
from medshard_protocol.messages import body_type, pack_error
from medshard_protocol.rosters import log_header
from medshard_protocol.succession import successor_path
from storenode.callers import peer_key, somebody
from storenode.config import Config
from storenode.doorkeeper import Doorkeeper
from storenode.draining import Draining
from storenode.identity import Peer, peer_of
from storenode.membership import Membership
from storenode.metrics import Metrics
from storenode.quick import Answer, Request, answer_of
from storenode.succession import archive_prefix
from storenode.wire import body_size

log = logging.getLogger("storenode")
open_paths: Final = frozenset(
    {"/healthz", "/v1/genesis", "/v1/rosters", "/v1/join", "/v1/rotate", "/v1/senders", "/v1/certificate", successor_path}
)  # answer without a certificate
public_prefixes: Final = ("/log/", archive_prefix)  # so do these, where the operator says so
writes: Final = frozenset(
    {"/v1/files", "/v1/ledger/append", "/v1/join", "/v1/rotate", "/v1/senders", "/v1/certificate"}
)  # beside every PUT and DELETE; not for a node that has left
failing: Final = frozenset({errno.EIO, errno.EROFS, errno.ENODEV, errno.ENXIO, errno.ESTALE})  # of a disk

Work = Callable[[Peer, Mapping[str, str], bytes], Awaitable[tuple[int, bytes]]]  # who asks, headers, body; status and body of the answer


class Guard:
    """One node's."""

    def __init__(self, config: Config, node: NodeId, membership: Membership, metrics: Metrics) -> None:
        self._config = config
        self._node = node
        self._membership = membership
        self._metrics = metrics

    def middleware(self) -> Middleware:
        """For all that aiohttp answers."""

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            started = time.monotonic()
            transport = request.transport
            peer = self._caller(transport.get_extra_info("ssl_object")) if transport else None
            if peer is not None:
                request[peer_key] = peer
            resource = request.match_info.route.resource
            route = resource.canonical if resource else "unknown"
            status, sent = 500, 0
            try:
                self._let_in(request.method, request.path, peer, request.headers.get(log_header))
                if request.headers.get("Content-Encoding", "identity") != "identity":
                    raise web.HTTPUnsupportedMediaType(text="bodies are sent as they are, without Content-Encoding")
                response = await handler(request)
                status, sent = response.status, response.content_length or 0
                return response
            except (MedshardError, OSError, sqlite3.OperationalError) as error:
                status, body = self._told(error)
                return web.Response(status=status, body=body, content_type=body_type)
            except web.HTTPException as error:
                status = error.status
                raise
            finally:
                self._note(request.method, route, status, started, body_size(request) or 0, sent, peer)

        return guard

    def quick(self, method: str, path: str, work: Work, draining: Draining, doorkeeper: Doorkeeper) -> Answer:
        """For what is answered below aiohttp."""

        async def answer(request: Request) -> bytes:
            started = time.monotonic()
            peer = self._caller(request.tls)
            status, sent = 500, 0
            try:
                self._let_in(method, path, peer, request.headers.get(log_header))
                doorkeeper.heard(request.protocol)
                with draining.counted():
                    status, body = await work(somebody(peer), request.headers, request.body)
                sent = len(body)
            except (MedshardError, OSError, sqlite3.OperationalError) as error:
                status, body = self._told(error)
            finally:
                self._note(method, path, status, started, len(request.body), sent, peer)
            return answer_of(status, body_type, body, self._membership.roster.number)

        return answer

    def _caller(self, tls: ssl.SSLObject | None) -> Peer | None:
        """Who asks; on a node that has left, its own institution is known too, as it was."""
        members = self._membership
        peer = peer_of(tls, members.roster, members.just_before)
        return peer_of(tls, members.last_with(self._node)) if peer is None and not members.lists(self._node) else peer

    def _let_in(self, method: str, path: str, peer: Peer | None, origin: str | None) -> None:
        """Raises Refused for who may not ask this."""
        members = self._membership
        if path not in open_paths and not (self._config.public_log and path.startswith(public_prefixes)):
            somebody(peer)
        if origin is not None and origin != members.roster.origin:
            raise Refused(f"this node goes by the log {members.roster.origin}")
        if (method in ("PUT", "DELETE") or path in writes) and not members.lists(self._node):
            raise Refused("this node is no longer in the consortium and serves reads only", hint="follow the roster to the other nodes")

    def _told(self, error: MedshardError | OSError | sqlite3.OperationalError) -> tuple[int, bytes]:
        """What the caller hears of an error. Raises it where it is not for others."""
        if isinstance(error, MedshardError):
            self._metrics.refused(type(error).__name__)
            return pack_error(error)
        answer = _disk_error(error)
        if answer is None:
            raise error
        if not isinstance(answer, Full):
            where = getattr(error, "filename", None) or self._config.data
            log.error("the disk under %s fails (%s): look at the kernel's log, and replace it", where, error)
        return pack_error(answer)

    def _note(self, method: str, route: str, status: int, started: float, came: int, sent: int, peer: Peer | None) -> None:
        took = time.monotonic() - started
        self._metrics.request(method, route, status, took, came, sent)
        if log.isEnabledFor(logging.DEBUG) or status >= 500:
            log.log(
                logging.WARNING if status >= 500 else logging.DEBUG,
                "request",
                extra={
                    "method": method,
                    "route": route,
                    "status": status,
                    "ms": round(took * 1000, 1),
                    "peer": peer.key.hex()[:16] if peer else "",
                },
            )


def _disk_error(error: OSError | sqlite3.OperationalError) -> MedshardError | None:
    """What a caller hears of a disk that is full or fails; None if it is neither."""
    if isinstance(error, OSError):
        full, failed = error.errno in (errno.ENOSPC, errno.EDQUOT), error.errno in failing
    else:
        full, failed = getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR), False
    if full:
        return Full("this node's disk is full", hint="the operator must free space or add a disk")
    return Unavailable("this node's disk fails", hint="other nodes serve; the operator must replace the disk") if failed else None
