"""The ledger over HTTP. A route parses, awaits one call, returns; errors of the one tree are translated by the node's middleware.

Who may: anybody with a certificate of the roster reads and hands in entries, which speak for themselves. What nodes ask each other is in
``peering``.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING

from aiohttp import web

from medshard_protocol.checkpoint import Note
from medshard_protocol.entries import Type
from medshard_protocol.errors import Absent, Malformed, TooLarge, Unavailable
from medshard_protocol.facts import Facts, ballot_prefix
from medshard_protocol.ids import FileId, file_id_from_hex
from medshard_protocol.messages import body_type
from medshard_protocol.proofs import Places, append_bytes_max, pack_registration
from medshard_protocol.tables import Table, after
from medshard_protocol.tiles import TileName, pack_bundle, tile_width
from storenode.ledger.fullhead import with_line

if TYPE_CHECKING:
    from storenode.ledger import Ledger

body_wait_s = 30.0
immutable = {"Cache-Control": "public, max-age=31536000, immutable"}
fleeting = {"Cache-Control": "no-cache"}


class Routes:
    """The handlers of one ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def table(self) -> list[web.RouteDef]:
        """All routes of this file."""
        return [
            web.post("/v1/ledger/append", self.append),
            web.get("/v1/ledger/registrations/{file}", self.registration),
            web.get("/v1/ledger/places/{file}", self.places, allow_head=False),
            web.get("/log/checkpoint", self.checkpoint),
            web.get("/log/tile/{name:.+}", self.tile),
        ]

    async def append(self, request: web.Request) -> web.Response:
        """Put entries into the log, here or at the sequencer, and wait until they are published."""
        status, answer = await self._ledger.append_packed(await read_body(request, append_bytes_max))
        return web.Response(status=status, body=answer, content_type=body_type)

    async def registration(self, request: web.Request) -> web.Response:
        """Prove that a file is registered."""
        inclusion = await self._ledger.inclusion(file_id_from_hex(request.match_info["file"]))
        if inclusion is None:
            raise Absent("no published entry registers this file")
        return web.Response(body=pack_registration(inclusion), content_type=body_type)

    async def places(self, request: web.Request) -> web.Response:
        """Say where stands what a proof for outsiders needs."""
        return web.Response(
            body=places_of(self._ledger.state, file_id_from_hex(request.match_info["file"])).to_bytes(), content_type=body_type
        )

    async def checkpoint(self, request: web.Request) -> web.Response:
        """The newest published checkpoint, as C2SP tlog-tiles has it, this node's own cosignature among the others.

        ``full=1`` asks for one with both kinds of cosignature, ``roster=N`` for one that the cosigners of that earlier roster gave at its
        end.
        """
        full, published = self._ledger.full, self._ledger.published
        if "roster" in request.query:
            number = request.query["roster"]
            note = full.sealed(int(number)) if number.isascii() and number.isdigit() and len(number) < 10 else None
            if note is None:
                raise Absent("this node has no full head of that roster's end")
        elif request.query.get("full") == "1":
            note = (await full.full()).note
        elif published is None:
            raise Absent("no checkpoint has been published yet")
        else:
            note = with_line(published.note, full.own_line(Note.from_bytes(published.note).text))
        return web.Response(body=note, content_type="text/plain", charset="utf-8", headers=fleeting)

    async def tile(self, request: web.Request) -> web.Response:
        """A hash tile or an entry bundle of the published log, as C2SP tlog-tiles has them."""
        try:
            name, published = TileName.from_path(request.match_info["name"]), self._ledger.published
        except Malformed as error:
            raise Absent(str(error)) from None  # a folder of static files would say the same
        if published is None or not name.within(published.checkpoint.size):
            raise Absent("the published log has no such tile")
        journal, start = self._ledger.journal, name.index * tile_width
        data = journal.tree.tile(name) if name.level is not None else pack_bundle(journal.entries(start, start + name.width))
        return web.Response(body=data, content_type="application/octet-stream", headers=immutable)


def places_of(facts: Facts, file_id: FileId) -> Places:
    """Where stands what a proof of this file's registration needs. Raises Absent."""
    registration = facts.registration(file_id)
    identity = None if registration is None else facts.identity(registration.owner)
    if registration is None or identity is None:
        raise Absent("no entry registers this file")
    stamps = (index for index, size, _ in facts.timestamps() if size > registration.index)
    approvals = []
    for decided, new in facts.decided:
        prefix = ballot_prefix(new, new.number - 1, Type.ROSTER) + new.sha256
        votes = (int(vote[0]) for _, vote in facts.tables.scan(Table.VOTES, prefix, after(prefix)))
        approvals.append(tuple(sorted(index for index in votes if index <= decided)))
    return Places(identity.first, tuple(islice(stamps, 1)), tuple(approvals))


async def read_body(request: web.Request, bytes_max: int) -> bytes:
    """Read a whole small body, counted as it comes."""
    chunks: list[bytes] = []
    total = 0
    try:
        async with asyncio.timeout(body_wait_s):
            async for chunk in request.content.iter_any():
                total += len(chunk)
                if total > bytes_max:
                    raise TooLarge(f"a body of more than {bytes_max} bytes")
                chunks.append(chunk)
    except TimeoutError:
        raise Unavailable(f"the body did not arrive within {body_wait_s:.0f} s") from None
    return b"".join(chunks)
