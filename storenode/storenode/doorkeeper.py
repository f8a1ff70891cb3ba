"""What a connection may cost before anybody has asked for anything: little memory, and not forever.

Law: whoever connects has ``silence_s`` to send the head of a first request that the node answers; after that aiohttp's keep-alive limit
holds. What a connection's TLS costs is in wire.py.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Sequence
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

silence_s: Final = 30.0


def prepare() -> None:
    """Let as many connections be open as the operating system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Doorkeeper:
    """Shows out who connects and asks for nothing."""

    def __init__(self, app: web.Application, *, silence_s: float = silence_s, clock: Callable[[], float] = time.monotonic) -> None:
        self._silence_s = silence_s
        self._clock = clock
        self._heard: set[web.RequestHandler] = set()  # both hold a closed connection until the next look: it has no weak references
        self._seen: dict[web.RequestHandler, float] = {}
        app.middlewares.append(self._hear())  # innermost: who is refused by the guard was not let in

    async def watch(self, connections: Callable[[], Sequence[web.RequestHandler]]) -> None:
        """Look at the open connections now and then, until cancelled."""
        while True:
            await asyncio.sleep(self._silence_s / 4)
            self.look(connections())

    def look(self, connections: Sequence[web.RequestHandler]) -> int:
        """Hang up on those that have been silent for too long; how many."""
        now, silent, before = self._clock(), 0, self._seen
        self._heard &= set(connections)
        self._seen = {connection: before.get(connection, now) for connection in connections}
        for connection, since in self._seen.items():
            if connection not in self._heard and now - since > self._silence_s and connection.transport is not None:
                connection.transport.abort()  # no farewell: it would wait for the silent one
                silent += 1
        return silent

    def heard(self, connection: web.RequestHandler) -> None:
        """Somebody who may was heard on this one."""
        self._heard.add(connection)

    def _hear(self) -> Middleware:
        @web.middleware
        async def hear(request: web.Request, handler: Handler) -> web.StreamResponse:
            self.heard(request.protocol)
            return await handler(request)

        return hear
