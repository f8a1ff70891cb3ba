"""Keeping up with who takes part: the chain of rosters from the genesis file on, as nodes tell of it and as it lies in the home.

Law: no node is believed. Each change must be approved by a quorum of the institutions before it, so a node can keep a change from us but
not invent one; and because f institutions may be faulty, f + 1 are asked. What was followed is on disk before it is gone by.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Final

from medshard.home import Home
from medshard.transport import Net, hung_up
from medshard_protocol.errors import Absent, MedshardError, Refused
from medshard_protocol.ids import Sha256
from medshard_protocol.roster import Node, Roster
from medshard_protocol.rosters import Link, follow, unpack_links
from medshard_protocol.succession import Change, Successor, successor_path

ask_timeout_s: Final = 2.0
_asking: Final = ContextVar("asking", default=False)
again_after_s: Final = 0.25  # many answers that fail at once are one reason to ask
look_every_s: Final = 60.0

log = logging.getLogger(__name__)
Contexts = Callable[[Roster], Mapping[int, ssl.SSLContext]]


class Follower:
    """Follows the rosters for one vault, and moves its connections along."""

    def __init__(self, home: Home, net: Net, contexts: Contexts) -> None:
        self._home = home
        self._net = net
        self._contexts = contexts
        self._running: asyncio.Task[bool] | None = None
        self._asked_at = -again_after_s
        self._answered = 0
        self._strange = False  # whether somebody hung up on us, as who knows nobody that vouches for us does
        self._anonymous = False  # while we ask without our certificate

    async def follow(self) -> bool:
        """Ask what follows our newest roster; say whether something did. Raises nothing: who cannot be asked tells nothing."""
        if _asking.get():
            return False  # a node hung up on this very question, which must not wait for itself
        if self._running is None or self._running.done():
            if asyncio.get_running_loop().time() - self._asked_at < again_after_s:
                return False
            self._running = asyncio.create_task(self._follow())
        before = self._net.roster
        await asyncio.shield(self._running)  # others may wait for it too
        return self._net.roster is not before or self._running.result()

    async def run(self) -> None:
        """Look now and then, for a program that runs for days. To be cancelled at the end."""
        while True:
            await self.follow()
            await asyncio.sleep(look_every_s * random.uniform(0.75, 1.25))

    async def close(self) -> None:
        """Stop what is under way."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _follow(self) -> bool:
        _asking.set(True)  # in the context of this task and of those that it starts
        grown = False
        while await self._step():
            grown = True
        known = self._answered > (self._net.roster.quorum.f if self._strange else 0)
        if not grown and not known:  # our institution may be gone, and with it the nodes' trust in our certificate
            self._anonymous = True
            while await self._step():
                grown = True
            self._anonymous = False
        self._asked_at = asyncio.get_running_loop().time()
        return grown

    async def _step(self) -> bool:
        """Ask f + 1 institutions, or whoever answers of the rest, and take the longest chain that holds."""
        roster = self._net.roster
        nodes, needed, answered = list(self._candidates(roster)), roster.quorum.f + 1, 0
        self._strange = False
        links: Sequence[Link] = ()
        while nodes and answered < needed:
            batch, nodes = nodes[: needed - answered], nodes[needed - answered :]
            for chain in await asyncio.gather(*(self._ask(node, roster) for node in batch)):
                if chain is not None:
                    answered += 1
                    links = max(links, chain, key=len)
        self._answered = answered
        if self._net.roster is not roster:
            return False
        if not links:
            return await self._succeed(roster)
        newest = Roster.from_bytes(links[-1].roster)
        await asyncio.to_thread(self._home.keep_links, roster.number, links)
        self._net.adopt(newest, await asyncio.to_thread(self._contexts, newest))
        log.info("roster %d is in effect", newest.number)
        return True

    async def _succeed(self, roster: Roster) -> bool:
        """Go on with the successor of a log that has ended, if some node tells of one that a quorum of its institutions signed."""
        genesis, answered = self._home.genesis_sha256(), 0
        for node in self._candidates(roster):
            if answered > roster.quorum.f:
                break
            try:
                path = f"{successor_path}?of={genesis.hex()}"
                answer = await self._net.call(node, "GET", path, timeout_s=ask_timeout_s, ok=(200,), anonymous=self._anonymous)
                answered += 1
            except Absent:
                answered += 1  # as a rule there is none
                continue
            except MedshardError:
                continue
            try:
                change = await asyncio.to_thread(_changed, answer, genesis, roster)
            except MedshardError as error:
                log.warning("%s tells of a successor that does not hold: %s", node.name, error)
                continue
            if self._net.roster is not roster:
                return False
            await asyncio.to_thread(self._home.succeed, answer, change)
            self._net.adopt(change.genesis, await asyncio.to_thread(self._contexts, change.genesis))
            log.warning("the log %s has ended; this vault goes on in %s", roster.origin, change.genesis.origin)
            return True
        return False

    async def _ask(self, node: Node, roster: Roster) -> Sequence[Link] | None:
        """What a node tells, as far as it holds; None if it tells nothing."""
        genesis = self._home.genesis_sha256()
        try:
            path = f"/v1/rosters?after={roster.number}&of={genesis.hex()}"
            data = await self._net.call(node, "GET", path, timeout_s=ask_timeout_s, ok=(200,), anonymous=self._anonymous)
            links = unpack_links(data)
        except MedshardError as error:
            self._strange |= hung_up(error)
            return None
        good: list[Link] = []
        try:
            for link in links:
                roster = follow(roster, [link])
                good.append(link)
        except MedshardError as error:
            log.warning("%s tells of a change of the roster that does not hold: %s", node.name, error)
        return good

    def _candidates(self, roster: Roster) -> Iterator[Node]:
        """One node of each institution in turn, those that answered lately first."""
        order = random.sample(roster.nodes, len(roster.nodes))
        order.sort(key=lambda node: self._net.health.is_suspect(node.id))
        first = {node.institution: node for node in reversed(order)}
        yield from (node for node in order if first[node.institution] is node)
        yield from (node for node in order if first[node.institution] is not node)


def _changed(document: bytes, genesis: Sha256, roster: Roster) -> Change:
    """What a successor's document says, if it is about the log of this genesis file and roster. Raises Malformed or Refused."""
    change = Successor.from_bytes(document).check()
    if change.rosters[0].sha256 != genesis or roster not in change.rosters:
        raise Refused("it is about another log than this vault's")
    return change


@contextlib.asynccontextmanager
async def following(home: Home, net: Net, contexts: Contexts) -> AsyncIterator[Follower]:
    """Follow in the background while the block runs; ``net.follow`` asks at once."""
    follower = Follower(home, net, contexts)
    net.follower = follower.follow
    running = asyncio.create_task(follower.run())
    try:
        yield follower
    finally:
        net.follower = None
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await follower.close()
