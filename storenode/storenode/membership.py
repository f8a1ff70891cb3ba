"""Who takes part, as this node knows it: the genesis file, the chain of changes after it, and documents that may become the next roster.

    DATA/rosters/00000001.link   the change to roster 1: the document and the approvals that decided it (docs/formats/roster.md)
    DATA/rosters/SHA256.roster   a document by its hash: proposed, approved, or in the chain
    DATA/rosters-1/              the same of the first successor, and so on
    DATA/before/SHA256.successor what came after the log with that genesis file (docs/formats/roster.md)

Law: the chain grows only by links that a quorum of the roster before signed, and is on disk before anybody acts on it. Where a link came
from, the ledger or another node, does not matter: its signatures are checked. A document that some institution approved is
never deleted, because whoever folds the ledger needs it.

Knows no socket: ``following`` asks other nodes, ``rosters`` answers them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

from medshard_protocol.canonical import Fields, decode, encode
from medshard_protocol.errors import Absent, Conflict, Damaged, Full, Malformed, MedshardError
from medshard_protocol.ids import NodeId, Sha256
from medshard_protocol.roster import Roster
from medshard_protocol.rosters import Link, check_approvals, check_successor, follow, link_bytes_max
from medshard_protocol.succession import Change, Successor
from storenode import durable

folder_name: Final = "rosters"
before_name: Final = "before"
open_documents_max: Final = 64  # that nobody has approved yet; the oldest makes room
grace_s: Final = 60.0  # how long the keys of the roster before are still taken for those of nodes that stay
chain_file_links_max: Final = 1 << 20
chain_file_bytes_max: Final = 1 << 30

log = logging.getLogger(__name__)
Adopt = Callable[[Roster], None]


class Membership:
    """One node's chain of rosters and kept documents. Opened once, by the node's process; a command only reads it."""

    def __init__(self, data: Path, genesis: Roster, *, sync: bool = True) -> None:
        self.genesis = genesis
        self._data, self._folder = data, rosters_folder(data, genesis)
        self.successions = read_successions(data, genesis)  # one for each log before, oldest first
        self._sync = sync
        self._links: list[Link] = []
        self._rosters: list[Roster] = [genesis]  # by number
        self._documents: dict[Sha256, Roster] = {each.sha256: each for change, _ in self.successions for each in change.rosters}
        self._open: dict[Sha256, None] = {}  # documents that nobody has approved, oldest first
        self._adopt: list[Adopt] = []
        self._changed = -grace_s
        self._settled = False  # whether all that is on this node's ledger was read
        self._load()

    @property
    def roster(self) -> Roster:
        """The newest roster of the chain."""
        return self._rosters[-1]

    @property
    def just_before(self) -> Roster | None:
        """The roster before it, for a minute after the change: not everybody has heard of it yet."""
        return self._rosters[-2] if len(self._rosters) > 1 and time.monotonic() - self._changed < grace_s else None

    def lists(self, node: NodeId) -> bool:
        """Say whether a node is in the newest roster."""
        return any(each.id == node for each in self.roster.nodes)

    def last_with(self, node: NodeId) -> Roster:
        """The newest roster that lists a node; the newest of all if none does."""
        return next((roster for roster in reversed(self._rosters) if any(each.id == node for each in roster.nodes)), self.roster)

    @property
    def history(self) -> Sequence[Roster]:
        """All rosters from genesis on, by number."""
        return self._rosters

    @property
    def line(self) -> list[Roster]:
        """The genesis files of the logs that this one goes on from, oldest first."""
        return [change.rosters[0] for change, _ in self.successions]

    def on_change(self, adopt: Adopt) -> None:
        """Be told of each new roster, once it is on disk."""
        self._adopt.append(adopt)

    # -- documents

    def document(self, document: Sha256) -> Roster | None:
        """Find a kept document, or a roster of the chain."""
        return self._documents.get(document)

    def documents(self) -> list[Roster]:
        """Kept documents that could follow the present roster, oldest first."""
        return [each for each in self._documents.values() if each.previous == self.roster.sha256 and each.number == self.roster.number + 1]

    def keep(self, data: bytes) -> tuple[Roster, bool]:
        """Keep a proposed document; say whether it is new. Raises Malformed, Refused for one that cannot follow, Conflict for one
        that follows a roster which is not the newest here."""
        roster = Roster.from_bytes(data)
        if roster.sha256 in self._documents:
            return roster, False
        if roster.number != self.roster.number + 1:
            hint = "make the change anew on the present roster" if roster.number <= self.roster.number else "try again in a moment"
            raise Conflict(f"this node knows rosters up to {self.roster.number}; the document would be number {roster.number}", hint=hint)
        check_successor(self.roster, roster)
        while self._settled and len(self._open) >= open_documents_max:
            self._drop(next(iter(self._open)))
        self._store(roster, data)
        self._open[roster.sha256] = None
        return roster, True

    def keep_wanted(self, document: Sha256, data: bytes) -> Roster:
        """Keep a document that an entry of the ledger names, whatever it is. Raises Malformed for other bytes than those."""
        if sha256(data).digest() != document:
            raise Malformed("another document than was asked for")
        roster = Roster.from_bytes(data)
        if document not in self._documents:
            self._store(roster, data)
        return roster

    def approved(self, document: Sha256) -> None:
        """Somebody approved this document on the ledger: it stays for ever."""
        self._open.pop(document, None)

    def settle(self) -> None:
        """The whole ledger was read: what nobody has approved by now may be deleted."""
        self._settled = True

    # -- the chain

    def links(self, after: int) -> list[Link]:
        """The changes that follow the roster with this number."""
        return self._links[max(after, 0) :]

    def follow(self, links: Iterable[Link]) -> bool:
        """Take changes that follow the present roster, passing over those that are known; say whether there was a new one.

        Raises Malformed or Refused for one that does not hold; those before it stay.
        """
        grown = False
        for link in links:
            new = Roster.from_bytes(link.roster)
            if new.number <= self.roster.number and new == self._rosters[new.number]:
                continue
            check_successor(self.roster, new)
            check_approvals(self.roster, new, link.approvals)
            self._grow(new, link)
            grown = True
        return grown

    def _grow(self, new: Roster, link: Link) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        durable.replace(self._folder / f"{new.number:08}.link", encode(link.to_value()), mode=0o644)
        self._links.append(link)
        self._rosters.append(new)
        self._changed = time.monotonic()
        self._documents[new.sha256] = new
        self._open.pop(new.sha256, None)
        if self._settled:
            for stale in [document for document in self._open if self._documents[document].number <= new.number]:
                self._drop(stale)
        log.info("roster", extra={"number": new.number, "sha256": new.sha256.hex(), "institutions": len(new.institutions)})
        for adopt in self._adopt:
            adopt(new)

    # -- disk

    def _load(self) -> None:
        self._documents[self.genesis.sha256] = self.genesis
        for number, path in enumerate(sorted(self._folder.glob("*.link")), 1):
            try:
                link = _link(path.read_bytes())
                if path.name != f"{number:08}.link":
                    raise Malformed(f"{number:08}.link is missing")
                self._rosters.append(follow(self.roster, [link]))
            except MedshardError as error:
                hint = f"move {self._folder} away; the node asks the others for it again"
                raise Damaged(f"{path}: {error}", hint=hint) from None
            self._links.append(link)
            self._documents[self.roster.sha256] = self.roster
        for change, _ in self.successions:  # whoever folds the log needs what was approved before it went on
            self._documents |= {roster.sha256: roster for roster in _documents_in(rosters_folder(self._data, change.rosters[0]))}
        for roster in _documents_in(self._folder):
            if roster.sha256 not in self._documents:
                self._documents[roster.sha256] = roster
                self._open[roster.sha256] = None  # until the ledger, read again, says that somebody approved it

    def _store(self, roster: Roster, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{roster.sha256.hex()}.roster"
        if not path.exists():
            durable.create(path, data, mode=0o644, durable=self._sync)
        self._documents[roster.sha256] = roster

    def _drop(self, document: Sha256) -> None:
        del self._open[document]
        del self._documents[document]
        (self._folder / f"{document.hex()}.roster").unlink(missing_ok=True)


def _documents_in(folder: Path) -> Iterator[Roster]:
    """The documents in a folder, oldest file first."""
    for path in sorted(folder.glob("*.roster"), key=lambda each: each.stat().st_mtime_ns):
        try:
            yield Roster.from_bytes(path.read_bytes())
        except Malformed:
            log.warning("not a roster: %s", path)  # a proposal that was never approved, cut off by a full disk


def rosters_folder(data: Path, genesis: Roster) -> Path:
    """Where the chain of a log lies."""
    return data / (f"{folder_name}-{len(genesis.before)}" if genesis.before else folder_name)


def log_folder(data: Path, genesis: Roster) -> Path:
    """Where the entries of a log lie. Those of the logs before it stay where they were."""
    return data / f"log-{len(genesis.before)}" if genesis.before else data


def successor_file(data: Path, before: Sha256) -> Path:
    """Where it lies what came after the log with this genesis file."""
    return data / before_name / f"{before.hex()}.successor"


def read_successions(data: Path, genesis: Roster) -> list[tuple[Change, Successor]]:
    """How it came from the first log to this one. Raises Absent where a document is missing, Damaged for one that is none."""
    found = []
    for number, ended in enumerate(genesis.before, 1):
        path = successor_file(data, ended.genesis)
        try:
            document = Successor.from_bytes(path.read_bytes())
            change = document.look()  # who signed it was checked before it was put there
        except FileNotFoundError:
            raise Absent(f"{path} is missing: how {ended.origin} ended", hint="storenode successor adopt FILE") from None
        except MedshardError as error:
            raise Damaged(f"{path}: {error}", hint="get it from another node: storenode successor adopt FILE") from None
        if change.genesis.before != genesis.before[:number] or change.rosters[0].sha256 != ended.genesis:
            raise Damaged(f"{path} is of another log")
        found.append((change, document))
    return found


def _link(data: bytes) -> Link:
    return Link.from_value(decode(data, bytes_max=link_bytes_max, what="link"))


# -- a chain as a file, for a node or a vault that begins


def pack_chain(links: Iterable[Link]) -> bytes:
    """All changes since the genesis file, to hand to a new member together with it."""
    return encode([1, [link.to_value() for link in links]])


def unpack_chain(data: bytes) -> tuple[Link, ...]:
    """Parse what ``pack_chain`` made. Raises Malformed; the links are still to be followed."""
    fields = Fields(decode(data, bytes_max=chain_file_bytes_max, what="chain"), count=2, what="chain")
    fields.uint(least=1, most=1)
    return tuple(Link.from_value(item) for item in fields.list(most=chain_file_links_max))


def read_chain(path: Path) -> tuple[Link, ...]:
    """Read a chain file. Raises Absent, Malformed or Full."""
    try:
        with path.open("rb") as file:
            data = file.read(chain_file_bytes_max + 1)
    except FileNotFoundError:
        raise Absent(f"{path} does not exist") from None
    except OSError as error:
        raise Full(f"{path} cannot be read ({error.strerror})") from None
    try:
        return unpack_chain(data)
    except Malformed as error:
        raise Malformed(
            f"{path} is not a chain of rosters: {error}", hint="make it on a member's node: storenode roster show -o FILE"
        ) from None
