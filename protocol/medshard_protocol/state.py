"""What the ledger means: a pure fold over its entries, in order.

Law: an entry that its author had no right to make has no effect, and neither has one that cannot be parsed; everyone who folds the same
entries holds the same state, wherever its tables are kept and however often the fold was interrupted. The fold believes that signatures
were checked: whoever feeds it says so with each entry, because a node checks each signature once and then remembers.

The rights are in ``rules``, the questions in ``facts``; here is what an entry with the right changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from medshard_protocol.entries import (
    Access,
    Approve,
    Enrol,
    Entry,
    Erase,
    Freeze,
    Genesis,
    Grant,
    Hold,
    Move,
    Propose,
    Register,
    Release,
    Retain,
    Retire,
    Revoke,
    Rotate,
    Sender,
    Timestamp,
    Type,
    Withdraw,
)
from medshard_protocol.errors import MedshardError
from medshard_protocol.facts import Documents, Facts, Granted, Held, Identity, Registration, row_of, vote_key
from medshard_protocol.ids import FileId, Key
from medshard_protocol.roster import Roster
from medshard_protocol.rules import objection
from medshard_protocol.tables import MemoryTables, Row, Table, Tables, Undoable, place

_T = TypeVar("_T")

meaning_version = 5  # of these rules and rows: tables of another version are cleared and made anew


class State(Facts):
    """The fold's result. Grows in place by ``apply``, shrinks by ``rewind``, and changes by nothing else.

    ``tables`` may hold an earlier state of the same log, which is gone on from. Tables of another log or of another version are cleared.
    ``line`` are the genesis files of the logs before this one, oldest first: their entries are its first.
    """

    def __init__(
        self, genesis: Roster, tables: Tables | None = None, documents: Documents | None = None, line: Sequence[Roster] = ()
    ) -> None:
        tables = MemoryTables() if tables is None else tables
        if tables.get(Table.META, b"of") != (meaning_version, genesis.sha256):
            tables.clear()
            tables.put(Table.META, b"of", (meaning_version, genesis.sha256))
        super().__init__(genesis, tables, documents, line)
        self._writes = Undoable(tables)
        self._settled = 2**63

    # -- growing

    def apply(self, entry: Entry | None) -> bool:
        """Fold the next entry in; None stands for one that is malformed or not signed by its author. Say whether it had an effect.

        Raises Absent, and then nothing has changed, when the entry is decided by a proposed roster that is not at hand.
        """
        against = None if entry is None else self.objection(entry)
        effective = entry is not None and against is None
        named = [] if entry is None else self._named(entry)
        self._writes.begin(self._size, noted=self._size >= self._settled)
        if entry is not None and effective:
            self._take(entry)
        else:
            self._put(Table.VOID, place(self._size), (int(entry is not None),))
        for file_id in named:
            self._put(Table.HISTORY, file_id + place(self._size), (int(effective),))
        self._count(entry.body.type.name if entry is not None and effective else "void")
        self._size += 1
        self._put(Table.META, b"size", (self._size,))
        if (begins := self.beginning) is not None:
            self._rosters.append((self._size - 1, begins))  # the log has ended; what follows is its successor's
        if self._size <= self._settled:
            self.tables.put(Table.META, b"settled", (self._size,))
        return effective

    def objection(self, entry: Entry) -> MedshardError | None:
        """Say why this entry, were it the next, would have no effect. A repeated REGISTER of the same manifest is no objection.

        Raises Absent as ``apply`` does.
        """
        return objection(self, entry)

    # -- shrinking

    def settle(self, size: int) -> None:
        """From now on be ready to take back entries from ``size`` on, and no earlier ones. Until this is called, none can be."""
        self._settled = size
        settled = self._taken_back_from()
        if settled < size:
            self._writes.settle(min(size, self._size))
            self.tables.put(Table.META, b"settled", (min(size, self._size),))

    def rewind(self, size: int) -> None:
        """Forget every entry from ``size`` on. Afterwards ``size`` may be smaller still: what was settled is folded again from 0."""
        if size >= self._size:
            return
        if size < self._taken_back_from():
            self.tables.clear()
            self.tables.put(Table.META, b"of", (meaning_version, self.genesis.sha256))
        else:
            self._writes.take_back(size)
        self._read_again()

    def _taken_back_from(self) -> int:
        return int((self.tables.get(Table.META, b"settled") or (0,))[0])

    # -- effects

    def _take(self, entry: Entry) -> None:
        body, author, index = entry.body, entry.author, self._size
        match body:
            case Genesis() | Access():
                pass
            case Enrol() | Withdraw() | Rotate() | Sender():
                self._take_identity(body, author)
            case Approve() | Freeze():
                self._take_vote(body, author)
            case Register():
                if self.registration(body.file_id) is None:
                    self._put(Table.FILES, body.file_id, row_of(Registration(index, body.manifest_sha256, author)))
            case Grant():
                self._take_grant(entry, body)
            case Revoke():
                self._put(Table.GRANTS, body.grant, row_of(replace(_known(self.grant(body.grant)), revoked=index)))
                self._put(Table.ENDED, place(index), (int(Type.REVOKE), body.grant))
            case Move():
                self._put(Table.MOVES, body.file_id + bytes([body.shard]), (body.node, index))
            case Hold() | Release():
                self._take_hold(entry, body)
            case Propose():
                self._take_proposal(body, author)
            case Retain():
                self._put(Table.FILES, body.file_id, row_of(replace(_known(self.registration(body.file_id)), retained_until=body.until)))
            case Retire():
                known = replace(_known(self.registration(body.file_id)), retired=index, ended_at=body.at)
                self._put(Table.FILES, body.file_id, row_of(known))
                self._put(Table.ENDED, place(index), (int(Type.RETIRE), body.file_id))
            case Erase():
                known = replace(_known(self.registration(body.file_id)), erased=index, ended_at=body.at)
                self._put(Table.FILES, body.file_id, row_of(known))
                self._put(Table.ENDED, place(index), (int(Type.ERASE), body.file_id))
            case Timestamp():
                self._put(Table.TIMESTAMPS, place(index), (body.size, body.root))

    def _take_identity(self, body: Enrol | Withdraw | Rotate | Sender, author: Key) -> None:
        index, known = self._size, self.identity(body.old if isinstance(body, Rotate) else body.key)
        if isinstance(body, Withdraw):
            self._put(Table.IDENTITIES, body.key, row_of(replace(_known(known), withdrawn=index)))
            return
        institution = _known(self.roster.institution_of(author))
        first = index if known is None else known.first
        match body:
            case Enrol():
                fresh = replace(known, roles=body.roles, index=index) if known else Identity(institution.name, body.roles, first, index)
            case Sender():
                fresh = Identity(institution.name, 0, index, index, None, body.vault, index)
            case Rotate():
                before = _known(known)
                ended = index if before.withdrawn is None else before.withdrawn
                self._put(Table.IDENTITIES, body.old, row_of(replace(before, withdrawn=ended, heir=body.key, inherits=index)))
                fresh = Identity(institution.name, before.roles, index, index, before=body.old)
        self._put(Table.IDENTITIES, body.key, row_of(fresh))

    def _take_vote(self, body: Approve | Freeze, author: Key) -> None:
        institution = _known(self.roster.institution_of(author))
        of = body.roster_sha256 if isinstance(body, Approve) else body.successor
        self._put(Table.VOTES, vote_key(self.roster, body.type, of, institution.name), (self._size,))
        if len(self.votes(body.type, of)) < self.roster.quorum.q:
            return
        if isinstance(body, Freeze):
            self._put(Table.META, b"frozen", (self._size, of))
            return
        successor = self.document(of)
        self._put(Table.ROSTERS, place(self._size), (successor.to_bytes(),))
        self._rosters.append((self._size, successor))

    def _take_grant(self, entry: Entry, body: Grant) -> None:
        index, id_ = self._size, entry.id
        granted = Granted(index, entry.author, body.reader, body.until, body.purpose, body.file_ids)
        self._put(Table.GRANTS, id_, row_of(granted))
        self._put(Table.GRANTS_BY_READER, body.reader + place(index), (id_,))
        for file_id in body.file_ids:
            self._put(Table.GRANTS_BY_FILE, file_id + body.reader + place(index), (id_,))

    def _take_proposal(self, body: Propose, author: Key) -> None:
        if body.stands:
            self._put(Table.PROPOSALS, bytes([body.what]) + body.file_id + author, (self._size,))
        else:
            self._drop_proposals(body.what, body.file_id)

    def _drop_proposals(self, what: Type, file_id: FileId) -> None:
        for author in self.proposals(what, file_id):
            self._put(Table.PROPOSALS, bytes([what]) + file_id + author, None)

    def _take_hold(self, entry: Entry, body: Hold | Release) -> None:
        if isinstance(body, Hold):
            self._drop_proposals(Type.HOLD, body.file_id)
            self._drop_proposals(Type.RELEASE, body.file_id)  # they were of the holds before
            self._put(Table.HOLDS, entry.id, row_of(Held(self._size, body.file_id, entry.author)))
            self._put(Table.HOLDS_BY_FILE, body.file_id + entry.id, ())
            return
        known = _known(self.hold(body.hold))
        self._put(Table.HOLDS, body.hold, row_of(replace(known, released=self._size)))
        self._put(Table.HOLDS_BY_FILE, known.file_id + body.hold, None)
        if not self.holds(known.file_id):
            self._drop_proposals(Type.RELEASE, known.file_id)

    # -- parts

    def _named(self, entry: Entry) -> tuple[FileId, ...]:
        """The files that an entry is about. One that speaks of an unknown grant or hold is about none."""
        match entry.body:
            case Grant(file_ids=file_ids) | Access(file_ids=file_ids):
                return file_ids
            case Revoke(grant=grant):
                granted = self.grant(grant)
                return granted.file_ids if granted else ()
            case Release(hold=hold):
                held = self.hold(hold)
                return (held.file_id,) if held else ()
            case Register() | Move() | Retain() | Hold() | Propose() | Retire() | Erase():
                return (entry.body.file_id,)
            case _:
                return ()

    def _count(self, name: str) -> None:
        key = name.encode()
        row = self.tables.get(Table.COUNTS, key)
        self._put(Table.COUNTS, key, ((row[0] if row else 0) + 1,))

    def _put(self, table: Table, key: bytes, row: Row | None) -> None:
        self._writes.put(table, key, row)


def _known(value: _T | None) -> _T:
    assert value is not None, "checked by the objection"
    return value
