"""Making, opening and ending links: what is allowed is decided here, and every use is written into the ledger first.

Law: a use is counted, durably, and announced in the ledger before a byte of a document is read for it. Passcodes are counted before they
are answered. Two requests for one link never overlap, so a limit of one use is one. What is served is the documents that the link was made
for, and no other.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from medshard.index import Index
from medshard.links import jwe
from medshard.links.model import Note, documents_max, wrong_max
from medshard.model import Row
from medshard_protocol.entries import Purpose
from medshard_protocol.errors import Absent, Conflict, Malformed, Refused

if TYPE_CHECKING:
    from medshard.vault import Vault

notes: Final = 3  # the kind of note in the index
pass_s: Final = 3600.0  # how long a document's address holds after a use; the specification allows an hour
passes_max: Final = 10_000
document_bytes_max: Final = 512 * 1024 * 1024


class Closed(Absent):
    """A link that opens nothing any more."""


class WrongPasscode(Refused):
    """Not the passcode; ``left`` tries are."""

    def __init__(self, left: int) -> None:
        super().__init__("a wrong passcode" if left else "a wrong passcode, and the last try: the link is locked")
        self.left = left


@dataclass(frozen=True, slots=True)
class Pass:
    """The right to fetch one document, for an hour after the use that it comes of."""

    note: Note
    row: Row
    until: float


class Desk:
    """Of one open vault. Lives in one event loop."""

    def __init__(self, vault: Vault, index: Index, clock: Callable[[], float] = time.time) -> None:
        self._vault = vault
        self._index = index
        self._clock = clock
        self._locks: defaultdict[bytes, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._passes: OrderedDict[str, Pass] = OrderedDict()

    # -- the owner's side

    def make(self, hashes: Sequence[bytes], *, until: int = 0, passcode: str = "", uses_max: int = 0, label: str = "") -> Note:
        """Make a link to documents of this vault. Raises Absent, Refused for another's, Malformed for too many or too long a label."""
        hashes = tuple(dict.fromkeys(hashes))
        if not 1 <= len(hashes) <= documents_max:
            raise Malformed(f"a link is to 1 to {documents_max} documents")
        for sha256 in hashes:
            row = self._vault.row(sha256)
            if row is None:
                raise Absent(f"this vault holds no file with SHA-256 {sha256.hex()}", hint="`medshard ls` lists what it holds")
            if row.owner:
                raise Refused(f"{sha256.hex()[:16]}… was shared with this vault: only its owner makes links to it")
            if row.size > document_bytes_max:
                raise Malformed(
                    f"{sha256.hex()[:16]}… is larger than what a link can carry", hint="share it with a key: `medshard share --to`"
                )
        note = Note.fresh(hashes, until=until, uses_max=uses_max, passcode=passcode, label=label)
        self._put(note)
        return note

    def all(self) -> list[Note]:
        """Every link that this vault has made, the oldest first."""
        return sorted((Note.from_bytes(data) for _, data in self._index.custody(notes)), key=lambda note: (note.made, note.id))

    def state(self, note: Note) -> str:
        """Open, or why it is not."""
        state = note.state(self._clock())
        there = state != "open" or any(self._vault.row(sha256) is not None for sha256 in note.documents)
        return state if there else "empty: its documents were destroyed"

    def revoke(self, name: str) -> Note:
        """End a link, by the first letters of its address. Raises Absent, or Conflict where several begin so."""
        found = [note for note in self.all() if note.name.startswith(name) and len(name) >= 4]
        if len(found) != 1:
            if not found:
                raise Absent(f"there is no link {name}", hint="`medshard links ls` lists them")
            raise Conflict(f"{len(found)} links begin with {name}", hint="give more letters")
        ended = found[0] if found[0].revoked else replace(found[0], revoked=int(self._clock()))
        self._put(ended)
        return ended

    # -- whoever has the link

    async def open(self, id_: bytes, passcode: str | None) -> list[tuple[str, Row]]:
        """Use a link: (a pass for each document, its row). Raises Closed, WrongPasscode, or what the ledger raises."""
        async with self._locks[id_]:
            note = self._note(id_)
            state = note.state(self._clock())
            if state != "open":
                raise Closed(f"this link is {state}")
            if note.passcode:
                if passcode is None:
                    raise WrongPasscode(_left(note))
                attempt = note.counted(right=False)
                self._put(attempt)  # before it is known to be right: a try that is cut off has been one
                if not await asyncio.to_thread(note.fits, passcode):
                    raise WrongPasscode(_left(attempt))
                self._put(note)
            rows = [row for sha256 in note.documents if (row := self._vault.row(sha256)) is not None]
            if not rows:
                raise Closed("what this link was to has been destroyed")
            self._put(note := note.counted(right=True))
            await self._vault.record([row.file_id for row in rows], Purpose.PATIENT_REQUEST)
        return [(self._pass(note, row), row) for row in rows]

    async def fetch(self, token: str) -> bytes:
        """The document of a pass, sealed with its link's key. Raises Closed."""
        found = self._passes.get(token)
        if found is None or found.until <= self._clock():
            raise Closed("this address has run out: open the link again")
        if self._note(found.note.id).revoked:
            raise Closed("this link is revoked")
        row = found.row
        plain = await self._vault.read(row.sha256, 0, row.size, Purpose.PATIENT_REQUEST)
        return await asyncio.to_thread(jwe.seal, found.note.key, plain, row.media_type or "application/octet-stream")

    # -- parts

    def _pass(self, note: Note, row: Row) -> str:
        token = os.urandom(32).hex()
        self._passes[token] = Pass(note, row, self._clock() + pass_s)
        while len(self._passes) > passes_max:
            self._passes.popitem(last=False)
        return token

    def _note(self, id_: bytes) -> Note:
        data = self._index.custody_of(notes, id_)
        if data is None:
            raise Closed("there is no such link")
        return Note.from_bytes(data)

    def _put(self, note: Note) -> None:
        self._index.put_custody(notes, note.id, note.to_bytes())


def _left(note: Note) -> int:
    return max(0, wrong_max - note.wrong)
