"""A gateway on the home of what only sends: it takes in, and gives nothing back.

Law: no key that it has opens what is stored. What waits in its spool can be read by whoever has this machine, and is shredded as soon as it
is stored; what is remembered after that is a book that answers to a UID and tells none. Whatever asks to read hears why not.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from medshard.gateway.book import Book
from medshard.gateway.dicomweb.http import answer
from medshard.gateway.intake import Intake, Placed, Rules
from medshard.gateway.model import Place
from medshard.gateway.spool import Spool
from medshard.packs import Plan
from medshard.sender import Sender

reason: Final = "this gateway only sends: it can read nothing back"
hint: Final = "ask a gateway of the vault that it sends for"


class SenderStore:
    """A sender as the store of what its vault can read."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    async def store(self, planned: Plan) -> Placed:
        """As ``Sender.store``: its vault can read what has a place."""
        report = await self._sender.store(planned)
        placed = {each.path: (each.sha256, Place(each.file_id, None, each.ledger_index)) for each in report.stored}
        return Placed(placed, tuple(problem.message for problem in report.problems))


@asynccontextmanager
async def intake_of(sender: Sender, spool: Spool, rules: Rules) -> AsyncIterator[Intake]:
    """An intake for a sender, started."""
    with contextlib.closing(Book(spool.folder.parent / "stored.sqlite", sender.keys.derived("stored"))) as book:
        intake = Intake(spool, book, SenderStore(sender), sender.keys.derived("commitments"), rules)
        await intake.start()
        yield intake


def routes(prefix: str) -> list[web.RouteDef]:
    """A refusal for everything that reads over DICOMweb."""

    async def refuse(_: web.Request) -> web.StreamResponse:
        return answer(403, reason, hint)

    return [web.get("/wado", refuse), web.get(prefix + "/{rest:.*}", refuse)]
