"""The end of a node: what it began it finishes, and it begins nothing more.

aiohttp's own shutdown waits for handlers, but from its first moment drops whatever still comes of their bodies, so an upload in flight
could only fail. Here requests are counted; the server is closed when none is left, or after a limit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from medshard_protocol.errors import Unavailable
from medshard_protocol.messages import body_type, pack_error
from storenode.traffic import Count

ending: Final = Unavailable("this node is ending", hint="ask again when it is back")


class Draining:
    """Counts the requests of one application that are being answered."""

    def __init__(self, app: web.Application) -> None:
        self._requests = Count()
        self._is_ending = False
        app.middlewares.insert(0, self._counting())

    async def wait(self, limit_s: float) -> None:
        """Refuse new requests from now on, and wait until those that run have been answered, at most ``limit_s``."""
        self._is_ending = True
        await self._requests.idle(limit_s)

    def counted(self) -> AbstractContextManager[None]:
        """While a request is being answered."""
        return self._requests.one()

    def _counting(self) -> Middleware:
        @web.middleware
        async def counting(request: web.Request, handler: Handler) -> web.StreamResponse:
            if self._is_ending:
                status, body = pack_error(ending)
                response = web.Response(status=status, body=body, content_type=body_type)
                response.force_close()
                return response
            with self.counted():
                return await handler(request)

        return counting
