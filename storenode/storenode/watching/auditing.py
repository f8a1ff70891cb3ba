"""A watch for somebody outside: with the genesis file, and a certificate of one of the institutions or static copies of the log.

Law: everything starts from the genesis file. Rosters after it are followed by their approvals, whoever shows them; a mirror that shows none
is believed to know none. Nodes are reached over TLS, each under its own institution's CA.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp

from medshard_protocol.errors import MedshardError
from medshard_protocol.roster import Roster
from medshard_protocol.rosters import Link, follow, pack_links, unpack_links
from storenode.evidence import Evidence, folder_name
from storenode.identity import outside_ssl_context
from storenode.peers import Peers
from storenode.watching.memory import memory_name
from storenode.watching.sources import Ask, Folder, Mirror, Site, Source, answer_wait_s
from storenode.watching.watch import Trust, Watch

answers_max: Final = 3  # mirrors that are asked for newer rosters in a round; an honest one is among f + 1, and rounds are many

_log = logging.getLogger(__name__)


class Chain:
    """The rosters from genesis on, as far as somebody has shown them."""

    def __init__(self, genesis: Roster) -> None:
        self._rosters = [genesis]
        self._links: list[Link] = []

    @property
    def newest(self) -> Roster:
        """The roster to go by."""
        return self._rosters[-1]

    def trust(self) -> Trust:
        """What heads are checked against."""
        return Trust(tuple(self._rosters), pack_links(self._links) if self._links else b"")

    async def ask(self, ask: Ask) -> bool:
        """Ask a few mirrors what comes next; say whether the chain grew."""
        grown = False
        for node in self.newest.nodes[:answers_max]:
            try:
                status, data = await ask(node.id, "GET", f"/v1/rosters?after={self.newest.number}", b"", answer_wait_s)
                links = unpack_links(data) if status == 200 else ()
                for link in links:
                    self._rosters.append(follow(self.newest, [link]))
                    self._links.append(link)
                    grown = True
            except MedshardError as error:
                _log.info("%s shows no rosters: %s", node.name, error)
        return grown


class Auditor:
    """A watch with its own connections. Made by ``auditing``."""

    def __init__(self, chain: Chain, watch: Watch, peers: Peers | None, contexts: _Contexts | None) -> None:
        self.chain = chain
        self.watch = watch
        self._peers = peers
        self._contexts = contexts

    async def follow(self) -> None:
        """Take up changes of the roster. To be called before each round."""
        if self._peers is not None and self._contexts is not None and await self.chain.ask(self._peers):
            self._peers.adopt(self.chain.newest, self._contexts.of(self.chain.newest))


class _Contexts:
    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)

    def of(self, roster: Roster) -> dict[int, ssl.SSLContext]:
        """How to speak to the nodes of each institution."""
        return {number: outside_ssl_context(each, self._files) for number, each in enumerate(roster.institutions)}


@asynccontextmanager
async def auditing(
    genesis: Roster, folder: Path, *, identity: tuple[Path, Path] | None, places: Sequence[str], stale_s: float
) -> AsyncIterator[Auditor]:
    """Open a watch that keeps its memory and evidence in ``folder``. Raises Malformed for files that are none, Damaged for the memory."""
    chain, session = Chain(genesis), aiohttp.ClientSession(auto_decompress=False)
    contexts = _Contexts(*identity) if identity else None
    peers: Peers | None = None
    try:
        static: list[Source] = [Site(place, session) if "://" in place else Folder(Path(place)) for place in places]
        if contexts is not None:
            peers = Peers(genesis, contexts.of(genesis))

        def sources() -> list[Source]:
            mirrors = [Mirror(node.name, node.id, peers) for node in chain.newest.nodes] if peers is not None else []
            return [*mirrors, *static]

        watch = Watch(chain.trust, sources, Evidence(folder / folder_name), folder / memory_name, stale_s=stale_s)
        yield Auditor(chain, watch, peers, contexts)
    finally:
        await session.close()
        if peers is not None:
            await peers.close()
