"""What an operator's command needs to speak for a node or its institution: the chain of rosters, and a way to the nodes.

Law: it only reads this home; the running node owns the folder. The chain comes from the disk and goes on with what any node of it tells,
checked link by link, so a command works where this home's own node is down, or was away.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medshard_protocol.entries import Entry
from medshard_protocol.errors import Absent, Damaged, Malformed, MedshardError, Refused, Unavailable
from medshard_protocol.ids import Sha256, sha256_from_hex
from medshard_protocol.proofs import pack_append, unpack_appended
from medshard_protocol.roster import Roster
from medshard_protocol.rosters import Link, follow, unpack_links
from storenode.approving import Seal
from storenode.asking import append_wait_s, ask_any, exchange
from storenode.config import Config
from storenode.genesis import load_genesis, read_genesis
from storenode.identity import NodeKeys
from storenode.membership import Membership


@dataclass
class Office:
    """One home's view of its consortium."""

    home: Path
    keys: NodeKeys
    rosters: list[Roster]  # by number
    links: list[Link]
    silent: str = ""  # why no node could be asked; empty if one was

    @classmethod
    def open(cls, home: Path) -> Office:
        """Read the home, and ask the nodes for what is newer. Raises Absent, Malformed or Damaged for a home that is not whole."""
        config, keys = Config.load(home), NodeKeys.load(home)
        membership = Membership(config.data, load_genesis(home))
        office = cls(home, keys, list(membership.history), membership.links(0))
        try:
            office._catch_up()
        except Unavailable as error:
            office.silent = str(error)
        return office

    @property
    def roster(self) -> Roster:
        """The newest roster."""
        return self.rosters[-1]

    def seal(self, ca_key: Path | None) -> Seal:
        """The institution's CA key, from this home or from a file. Raises Absent or Refused."""
        path = ca_key or self.keys.folder / "ca.key"
        if not path.exists():
            raise Absent(f"{path} is not here", hint="name the institution's CA key: --ca-key FILE")
        seal = Seal(path)
        seal.institution(self.roster)
        return seal

    def hand_in(self, document: Roster) -> str:
        """Give a document to a node, which gives it to the others; the node's name."""
        return ask_any(self.roster, self.keys, "PUT", "/v1/rosters", document.to_bytes())[0].name

    def document(self, text: str) -> Roster:
        """Find a document: a file, the SHA-256 of one that a node keeps, or the beginning of an open proposal's."""
        if Path(text).is_file():
            return read_genesis(Path(text))
        text = text.strip().lower()
        if not 8 <= len(text) <= 64 or text.strip("0123456789abcdef"):
            raise Malformed(f"{text!r} is neither a file nor a SHA-256", hint="see the open proposals: storenode roster show")
        if len(text) < 64:
            told = ([each["sha256"] for each in votes["proposals"] if each["sha256"].startswith(text)] for votes in self.all_votes())
            found = next(filter(None, told), [])  # a new one reaches other nodes than the proposer's a moment later
            if len(found) != 1:
                decided = [each for each in self.rosters if each.sha256.hex().startswith(text.lower())]
                if not found and len(decided) == 1:
                    return decided[0]
                raise Absent(f"{len(found)} open proposals begin with {text}", hint="see them: storenode roster show")
            text = found[0]
        sha256 = sha256_from_hex(text)
        document = Roster.from_bytes(ask_any(self.roster, self.keys, "GET", f"/v1/rosters/{sha256.hex()}", spreading=True)[1])
        if document.sha256 != sha256:
            raise Damaged("a node gave another document than it was asked for")
        return document

    def votes(self) -> dict[str, Any]:
        """What is open, and who has signed for what, as one node sees it."""
        return _votes(ask_any(self.roster, self.keys, "GET", "/v1/rosters/votes")[1])

    def all_votes(self) -> Iterator[dict[str, Any]]:
        """The same as each node sees it that answers, this home's own first."""
        for node in sorted(self.roster.nodes, key=lambda each: each.id != self.keys.node_id):
            with contextlib.suppress(Unavailable):
                status, answer = exchange(node, self.roster, self.keys, "GET", "/v1/rosters/votes")
                if status == 200:
                    yield _votes(answer)

    def append(self, entry: Entry) -> int:
        """Put an entry on the ledger and wait until it is published; its index. Raises what the ledger has against it."""
        data = entry.to_bytes()
        answer = ask_any(self.roster, self.keys, "POST", "/v1/ledger/append", pack_append([data]), timeout_s=append_wait_s)[1]
        (inclusion,) = unpack_appended(answer, [data]).inclusions
        try:
            inclusion.verify(self.roster)
        except Refused:
            self._catch_up()  # the entry may have been the deciding one, and the checkpoint the next quorum's
            inclusion.verify(self.roster)
        return inclusion.index

    def is_decided(self, document: Sha256) -> bool:
        """Say whether a document is in the chain by now."""
        with contextlib.suppress(Unavailable):
            self._catch_up()
        return any(roster.sha256 == document for roster in self.rosters)

    def _catch_up(self) -> None:
        while True:
            path = f"/v1/rosters?after={self.roster.number}&of={self.rosters[0].sha256.hex()}"
            links = unpack_links(ask_any(self.roster, self.keys, "GET", path)[1])
            if not links:
                return
            for link in links:
                try:
                    self.rosters.append(follow(self.roster, [link]))
                except MedshardError as error:
                    raise Damaged(f"a node tells of a change that does not hold: {error}") from None
                self.links.append(link)


def _votes(data: bytes) -> dict[str, Any]:
    answer = json.loads(data)
    if not isinstance(answer, dict) or not isinstance(answer.get("proposals"), list):
        raise Malformed("a node's answer about open proposals cannot be read")
    return answer
