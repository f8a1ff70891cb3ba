"""Keeping this node's rosters up to date: with its own ledger, and with other nodes while it was away.

Law: nothing here decides. The ledger says which change was decided, and it counts once that entry is published; ``membership`` checks the
signatures. A document travels to every node as soon as one has it, so that none has to ask for it when it counts. Asking others for
the chain is what brings back a node that slept through a change of every key it knew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import Final

from aiohttp import web

from medshard_protocol.entries import Type
from medshard_protocol.errors import Absent, Malformed, MedshardError, Refused, TooLarge, Unavailable
from medshard_protocol.ids import NodeId, Sha256, sha256_from_hex
from medshard_protocol.messages import body_type, unpack_error
from medshard_protocol.roster import Roster, roster_bytes_max
from medshard_protocol.rosters import Link, pack_links, unpack_links
from medshard_protocol.state import State
from storenode.callers import caller
from storenode.ledger import Ledger, Published
from storenode.ledger.channel import PeerCaller
from storenode.membership import Membership

ask_every_s: Final = 15.0  # one node, drawn anew each time: at sixteen nodes each is asked once in a quarter of a minute
look_every_s: Final = 1.0
fold_s: Final = 0.25
ask_wait_s: Final = 3.0
body_wait_s: Final = 30.0

log = logging.getLogger(__name__)


class Following:
    """The tasks behind a node's membership. ``start`` after the ledger, ``close`` before it."""

    def __init__(self, membership: Membership, ledger: Ledger, node: NodeId, call: PeerCaller) -> None:
        self._membership = membership
        self._ledger = ledger
        self._node = node
        self._call = call
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Ask the others once what this node has missed, then keep up."""
        self._membership.settle()
        self._ledger.journal.on_published.append(self._published)
        self._spawn(self._ask_forever())
        self._spawn(self._look_forever())

    async def close(self) -> None:
        """Stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spread(self, roster: Roster, data: bytes) -> None:
        """Give a document to all other nodes, in the background. Who is away now asks for it later."""
        for node in self._others(self._membership.roster):
            self._spawn(self._give(node, roster, data))

    async def ask(self, node: NodeId) -> bool:
        """Ask one node what follows our newest roster; say whether it knew something new. Raises MedshardError."""
        grown = False
        while True:
            links = unpack_links(await self._get(node, f"/v1/rosters?after={self._membership.roster.number}"))
            if not links or not self._membership.follow(links):
                return grown
            grown = True

    # -- inside

    async def _ask_forever(self) -> None:
        order = random.sample(self._others(self._membership.roster), k=len(self._others(self._membership.roster)))
        for node in order[:3]:  # at the start, do not depend on one
            await self._try_to_ask(node)
        while True:
            await asyncio.sleep(ask_every_s * random.uniform(0.75, 1.25))
            others = self._others(self._membership.roster)
            if others:
                await self._try_to_ask(random.choice(others))

    async def _try_to_ask(self, node: NodeId) -> None:
        try:
            await self.ask(node)
        except MedshardError as error:
            log.debug("no news of rosters", extra={"peer": node.hex(), "why": str(error)})

    async def _look_forever(self) -> None:
        """Take over what the ledger has decided, and fetch what it names."""
        while True:
            self._take_over()
            await self._fetch_missing()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ledger.journal.news.wait(), look_every_s)
            await asyncio.sleep(fold_s)  # the state follows a moment after the entries

    def _published(self, published: Published, heard_at: float) -> None:
        """Who orders entries must begin no checkpoint under a roster that is no more."""
        if self._ledger.leads and self._ledger.journal.state.roster.number > self._membership.roster.number:
            self._take_over()

    def _take_over(self) -> None:
        """Go by the rosters that published entries have decided."""
        state = self._ledger.journal.folded
        decided = state.decided[self._membership.roster.number :]
        if not decided:  # or every head would be verified here at once, by nodes that nobody asks
            return
        published = self._ledger.published
        for index, roster in decided:
            if published is None or published.checkpoint.size <= index:
                return
            try:
                self._membership.follow([self._link(state, index, roster)])
            except MedshardError as error:  # the ledger's rules are those of the chain: this never happens
                log.error("a roster that the ledger decided was not taken: %s", error)
                return

    async def _fetch_missing(self) -> None:
        state = self._ledger.journal.folded
        for document in state.ballots(Type.ROSTER, state.roster.number):
            self._membership.approved(document)
            if self._membership.document(document) is None:
                await self._fetch(document)
        missing = self._ledger.journal.folding.missing  # of an earlier roster, perhaps
        if missing is not None and self._membership.document(missing) is None:
            await self._fetch(missing)

    def _link(self, state: State, index: int, roster: Roster) -> Link:
        """The change that this entry decided, with the approvals up to it."""
        places = sorted(state.ballots(Type.ROSTER, roster.number - 1)[roster.sha256].values())
        journal = self._ledger.journal
        return Link(roster.to_bytes(), tuple(journal.entries(place, place + 1)[0] for place in places if place <= index))

    def votes(self) -> dict[str, object]:
        """What is proposed and who signed for it, as JSON values."""
        state = self._ledger.journal.folded
        ballots = state.ballots(Type.ROSTER, state.roster.number)
        known = {document.sha256: sorted(ballots.get(document.sha256, ())) for document in self._membership.documents()}
        proposals = known | {document: sorted(names) for document, names in ballots.items()}
        freezes = state.ballots(Type.FREEZE, state.roster.number)
        frozen = state.frozen
        return {
            "roster": state.roster.number,
            "sha256": state.roster.sha256.hex(),
            "proposals": [{"sha256": document.hex(), "approved": names} for document, names in proposals.items()],
            "freezes": [{"successor": successor.hex(), "approved": sorted(names)} for successor, names in freezes.items()],
            "frozen": None if frozen is None else {"index": frozen[0], "successor": frozen[1].hex() if any(frozen[1]) else ""},
        }

    async def _fetch(self, document: Sha256) -> None:
        for node in self._others(self._membership.roster):
            try:
                self._membership.keep_wanted(document, await self._get(node, f"/v1/rosters/{document.hex()}"))
            except MedshardError:
                continue
            return
        log.warning("no node has the roster document %s, which the ledger names", document.hex())

    async def _give(self, node: NodeId, roster: Roster, data: bytes) -> None:
        try:
            await self._call(node, "PUT", "/v1/rosters", data, ask_wait_s)
        except MedshardError as error:
            log.info("a roster document did not reach a node", extra={"peer": node.hex(), "sha256": roster.sha256.hex(), "why": str(error)})

    async def _get(self, node: NodeId, path: str) -> bytes:
        status, body = await self._call(node, "GET", path, b"", ask_wait_s)
        if status != 200:
            raise unpack_error(status, body, node.hex()[:8])
        return body

    def _others(self, roster: Roster) -> list[NodeId]:
        return [node.id for node in roster.nodes if node.id != self._node]

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def roster_routes(membership: Membership, following: Following) -> list[web.RouteDef]:
    """The way in. Rosters are public, as the genesis file is: whoever joins must follow them before it has a certificate."""

    async def get_links(request: web.Request) -> web.Response:
        after = request.query.get("after", "0")
        if not after.isascii() or not after.isdigit() or len(after) > 10:
            raise Malformed("rosters: after=NUMBER names the roster that you have")
        if request.query.get("of", membership.genesis.sha256.hex()) != membership.genesis.sha256.hex():
            return web.Response(body=pack_links(()), content_type=body_type)  # of another log: its end is told by /v1/successor
        return web.Response(body=pack_links(membership.links(int(after))), content_type=body_type)

    async def get_document(request: web.Request) -> web.Response:
        roster = membership.document(sha256_from_hex(request.match_info["sha256"]))
        if roster is None:
            raise Absent("this node has no such roster document")
        return web.Response(body=roster.to_bytes(), content_type=body_type)

    async def get_votes(request: web.Request) -> web.Response:
        return web.json_response(following.votes())

    async def put_document(request: web.Request) -> web.Response:
        if caller(request).node is None:
            raise Refused("only nodes hand in roster documents", hint="propose from a node's machine: storenode roster propose")
        data = await _body(request)
        roster, new = membership.keep(data)
        if new:
            following.spread(roster, data)
        return web.Response(status=201 if new else 200)

    return [
        web.get("/v1/rosters", get_links, allow_head=False),
        web.get("/v1/rosters/votes", get_votes, allow_head=False),
        web.get("/v1/rosters/{sha256:[0-9a-f]{64}}", get_document, allow_head=False),
        web.put("/v1/rosters", put_document),
    ]


async def _body(request: web.Request) -> bytes:
    data = b""
    try:
        async with asyncio.timeout(body_wait_s):
            async for chunk in request.content.iter_any():
                data += chunk
                if len(data) > roster_bytes_max:
                    raise TooLarge(f"roster: more than the {roster_bytes_max} bytes allowed")
    except TimeoutError:
        raise Unavailable(f"roster: not whole within {body_wait_s:g} s") from None
    return data
