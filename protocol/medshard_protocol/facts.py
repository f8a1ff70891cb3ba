"""What a folded log says: the questions, and nothing that changes an answer.

Law: every answer is a function of the entries folded so far, the same for everybody. A question about an index is answered as of just
before that entry, whatever came later. Knows no clock: where a time decides, the time is given back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from medshard_protocol.entries import Type
from medshard_protocol.errors import Absent
from medshard_protocol.ids import FileId, Key, NodeId, Sha256, key_size, sha256_size
from medshard_protocol.rights import Reason, Refusal, Right
from medshard_protocol.roster import Institution, Roster
from medshard_protocol.tables import Row, Table, Tables, after, end_of_places, place

Documents: TypeAlias = Callable[[Sha256], Roster | None]


@dataclass(frozen=True, slots=True)
class Registration:
    """A file that the ledger knows."""

    index: int  # of the REGISTER entry that counts
    manifest_sha256: Sha256
    owner: Key
    retained_until: int = 0  # seconds since 1970
    retired: int | None = None  # index of the RETIRE entry
    erased: int | None = None  # index of the ERASE entry
    ended_at: int = 0  # when the latest of these two entries lets it go, in seconds since 1970, as its author says

    def is_erased(self, now: float) -> bool:
        """Whether it is to be destroyed by ``now``, in the cosigners' seconds since 1970: an ERASE may be dated ahead."""
        return self.erased is not None and self.ended_at <= now


@dataclass(frozen=True, slots=True)
class Identity:
    """A key that an institution vouches for, or has vouched for."""

    institution: str  # its name
    roles: int
    first: int  # index of the entry that enrolled it first
    index: int  # of the one that did so last
    withdrawn: int | None = None  # index of the entry that took it back, for good
    heir: Key | None = None  # the key whose files this key's are: its successor, or the vault that it sends for
    inherits: int | None = None  # index of the entry from which on they are
    before: Key | None = None  # the key of the same vault that this one succeeded


@dataclass(frozen=True, slots=True)
class Granted:
    """A grant."""

    index: int
    author: Key
    reader: Key
    until: int  # seconds since 1970; 0 for no end
    purpose: int
    file_ids: tuple[FileId, ...]
    revoked: int | None = None  # index of the REVOKE entry


@dataclass(frozen=True, slots=True)
class Held:
    """A hold."""

    index: int
    file_id: FileId
    author: Key
    released: int | None = None  # index of the RELEASE entry


@dataclass(frozen=True, slots=True)
class Moved:
    """Where a shard has gone."""

    node: NodeId
    index: int


@dataclass(frozen=True, slots=True)
class Ended:
    """Something sealed that must be destroyed."""

    index: int
    type: Type  # REVOKE, RETIRE or ERASE
    id: bytes  # of the grant, or of the file


def vote_key(roster: Roster, what: Type, sha256: Sha256, institution: str) -> bytes:
    """Where an institution's voice stands in ``Table.VOTES``: under this roster, for this document, or for the end and this successor."""
    return _vote_prefix(roster, what, sha256) + institution.encode()


def _vote_prefix(roster: Roster, what: Type, sha256: Sha256) -> bytes:
    return ballot_prefix(roster, roster.number, what) + sha256


def ballot_prefix(roster: Roster, number: int, what: Type) -> bytes:
    """Where the voices under one roster of a log begin in ``Table.VOTES``. Logs before it have rosters with the same numbers."""
    return bytes([len(roster.before)]) + number.to_bytes(4, "big") + bytes([what])


def row_of(value: Registration | Identity | Granted | Held) -> Row:
    """Write a value as a row of its table: its fields in order."""
    return tuple(getattr(value, name) for name in value.__slots__)


class Facts:
    """The state after ``size`` entries, to be asked."""

    def __init__(self, genesis: Roster, tables: Tables, documents: Documents | None = None, line: Sequence[Roster] = ()) -> None:
        if [each.sha256 for each in line] != [each.genesis for each in genesis.before]:
            raise ValueError("a log that goes on from others is folded from the first one's genesis file on")
        self.genesis = genesis
        self._line = {each.begins: each for each in (*line, genesis)}  # by the place of the first entry that is its own
        self.tables = tables
        self._documents = documents
        self._rosters: list[tuple[int, Roster]] = []
        self._size = 0
        self._read_again()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Facts) and self.genesis == other.genesis and self.rows() == other.rows()

    __hash__ = None  # type: ignore[assignment]

    def _read_again(self) -> None:
        self._size = int((self.tables.get(Table.META, b"size") or (0,))[0])
        decided = self.tables.scan(Table.ROSTERS, b"", end_of_places)
        begun = [(begins - 1, genesis) for begins, genesis in self._line.items() if begins <= self._size]
        rosters = begun + [(int.from_bytes(key, "big"), Roster.from_bytes(row[0])) for key, row in decided]
        self._rosters = sorted(rosters, key=lambda each: each[0])  # a log ends with a FREEZE, which decides no roster

    @property
    def size(self) -> int:
        """How many entries have been folded."""
        return self._size

    @property
    def counts(self) -> dict[str, int]:
        """How many entries had an effect, by type name, and "void" for those without."""
        return {key.decode(): row[0] for key, row in self.tables.scan(Table.COUNTS, b"", b"\xff")}

    def count(self, type_: Type) -> int:
        """How many entries of this type had an effect."""
        row = self.tables.get(Table.COUNTS, type_.name.encode())
        return 0 if row is None else int(row[0])

    def rows(self) -> dict[Table, dict[bytes, Row]]:
        """Everything that is known, to compare; without what only serves to take entries back."""
        rows: dict[Table, dict[bytes, Row]] = {}
        for table in Table:
            rows[table] = {} if table is Table.UNDO else dict(self.tables.scan(table, b"", b"\xff" * 128))
        rows[Table.META].pop(b"settled", None)
        return rows

    # -- who takes part

    @property
    def roster(self) -> Roster:
        """The roster that the next entry is judged under."""
        return self._rosters[-1][1]

    def roster_at(self, index: int) -> Roster:
        """The roster that the entry at this index was judged under."""
        return next(roster for decided, roster in reversed(self._rosters) if decided < index)

    def has_been_roster(self, sha256: Sha256) -> bool:
        """Whether a document is the present roster, or was one."""
        return any(roster.sha256 == sha256 for _, roster in self._rosters)

    def document(self, sha256: Sha256) -> Roster:
        """A roster that somebody proposed. Raises Absent."""
        found = self._documents(sha256) if self._documents else None
        if found is None:
            raise Absent(f"the proposed roster {sha256.hex()[:16]} is not here", hint="hand it in first: storenode roster propose")
        return found

    def votes(self, what: Type, sha256: Sha256) -> set[str]:
        """The institutions of the present roster that want this document to be the next roster, or the log to end for this successor."""
        prefix = _vote_prefix(self.roster, what, sha256)
        return {key[len(prefix) :].decode() for key, _ in self.tables.scan(Table.VOTES, prefix, after(prefix))}

    @property
    def decided(self) -> list[tuple[int, Roster]]:
        """The rosters that followed the genesis file of the present log, each with the index of the entry that decided it."""
        return [(index, roster) for index, roster in self._rosters if index >= self.begun and roster.number]

    @property
    def begun(self) -> int:
        """Where the log began whose entry the next one is: 0, or the size of the last log before."""
        return max(begins for begins in self._line if begins <= self._size)

    @property
    def beginning(self) -> Roster | None:
        """The genesis file that the next entry must name; None if the next is not a log's first."""
        return self._line.get(self._size)

    @property
    def last_end(self) -> int | None:
        """The entry with which a log ended last; the one that goes on begins just after it."""
        row = self.tables.get(Table.META, b"frozen")
        return None if row is None else int(row[0])

    def ballots(self, what: Type, number: int) -> dict[Sha256, dict[str, int]]:
        """What institutions voted for under the roster with this number: names, and the index of each one's entry."""
        prefix, found = ballot_prefix(self.roster, number, what), dict[Sha256, dict[str, int]]()
        for key, row in self.tables.scan(Table.VOTES, prefix, after(prefix)):
            of, name = Sha256(key[len(prefix) : len(prefix) + sha256_size]), key[len(prefix) + sha256_size :].decode()
            found.setdefault(of, {})[name] = row[0]
        return found

    @property
    def frozen(self) -> tuple[int, Sha256] | None:
        """The entry with which this log ended, and the genesis file of its successor (zeros for none); None while it goes on."""
        row = self.tables.get(Table.META, b"frozen")
        return None if row is None or row[0] < self.begun else (row[0], Sha256(row[1]))

    def identity(self, key: Key) -> Identity | None:
        """Who vouches for a key, or has vouched."""
        row = self.tables.get(Table.IDENTITIES, key)
        return None if row is None else Identity(*row)

    def identities(self, after_key: bytes = b"", most: int = 2**31) -> list[tuple[Key, Identity]]:
        """The keys that institutions vouch for, or have vouched for, in the order of their bytes, those after one."""
        found = self.tables.scan(Table.IDENTITIES, after_key + b"\x00" if after_key else b"", b"\xff" * (key_size + 1), most)
        return [(Key(key), Identity(*row)) for key, row in found]

    def vouched_at(self, key: Key, index: int) -> Identity | None:
        """The identity, if an institution of the roster vouched for it just before ``index``."""
        known = self.identity(key)
        if known is None or known.first >= index or (known.withdrawn is not None and known.withdrawn < index):
            return None
        return known if self.roster_at(index).institution_named(known.institution) else None

    def vouches(self, ca_key: Key, key: Key) -> bool:
        """Say whether this CA key is that of the institution that enrolled ``key``."""
        institution, known = self.roster.institution_of(ca_key), self.identity(key)
        return institution is not None and known is not None and known.institution == institution.name

    def heir(self, key: Key, index: float = math.inf) -> Key:
        """Whose the files and rights of ``key`` are just before ``index``: its own, its successor's, or those of the vault it sends for."""
        while (known := self.identity(key)) is not None and known.heir is not None and (known.inherits or 0) < index:
            key = Key(known.heir)
        return key

    def line(self, key: Key) -> list[Key]:
        """A vault's key and those before it, whose grants are its own; the newest first."""
        keys = [key]
        while (known := self.identity(keys[-1])) is not None and known.before is not None:
            keys.append(Key(known.before))
        return keys

    def is_marked(self, marked: Collection[Key], key: Key) -> bool:
        """Whether this key is among those that a roster marks, or succeeded one of them that was in its owner's hands.

        A key that was withdrawn before it had a successor may have been stolen: its mark ends with it.
        """
        while key not in marked:
            known = self.identity(key)
            before = None if known is None or known.before is None else self.identity(Key(known.before))
            if known is None or known.before is None or before is None or before.withdrawn != before.inherits:
                return False
            key = Key(known.before)
        return True

    def passings(self, key: Key) -> list[int]:
        """The entries by which files of ``key`` came to whom they belong now, in their order."""
        places = []
        while (known := self.identity(key)) is not None and known.heir is not None:
            places.append(known.inherits or 0)
            key = Key(known.heir)
        return places

    def sends(self, key: Key) -> bool:
        """Whether this key only sends, and reads nothing."""
        known = self.identity(key)
        return known is not None and known.heir is not None and self._before(Key(known.heir)) != key

    def _before(self, key: Key) -> Key | None:
        known = self.identity(key)
        return None if known is None else known.before

    def institution(self, ca_key: Key) -> Institution | None:
        """The institution of the present roster with this CA key."""
        return self.roster.institution_of(ca_key)

    # -- files

    def registration(self, file_id: FileId) -> Registration | None:
        """Who owns a file, under which manifest, and what has become of it."""
        row = self.tables.get(Table.FILES, file_id)
        return None if row is None else Registration(*row)

    def owner(self, file_id: FileId) -> Key | None:
        """Whose file this is now."""
        known = self.registration(file_id)
        return None if known is None else self.heir(known.owner)

    def holds(self, file_id: FileId) -> list[Sha256]:
        """The holds that keep this file."""
        found = self.tables.scan(Table.HOLDS_BY_FILE, file_id, after(file_id))
        return [Sha256(key[len(file_id) :]) for key, _ in found]

    def hold(self, hold: Sha256) -> Held | None:
        """A hold by its id."""
        row = self.tables.get(Table.HOLDS, hold)
        return None if row is None else Held(*row)

    def moves(self, file_id: FileId) -> dict[int, Moved]:
        """Where shards have gone since the file was put, by shard."""
        found = self.tables.scan(Table.MOVES, file_id, after(file_id))
        return {key[-1]: Moved(*row) for key, row in found}

    def history(self, file_id: FileId, start: int = 0, most: int = 2**31) -> list[tuple[int, bool]]:
        """Every entry from ``start`` on that names this file: its index, and whether it had an effect."""
        found = self.tables.scan(Table.HISTORY, file_id + place(start), file_id + end_of_places, most)
        return [(int.from_bytes(key[len(file_id) :], "big"), bool(row[0])) for key, row in found]

    def keepers(self, owner: Key) -> frozenset[Key]:
        """Of whom two must want it before a file of this owner is held or released. Empty where nobody needs a second."""
        known = self.identity(owner)
        institution = known and self.roster.institution_named(known.institution)
        return frozenset(institution.keepers) if institution else frozenset()

    def proposals(self, what: Type, file_id: FileId) -> dict[Key, int]:
        """Who proposes a hold of this file, or the release of its holds, and the index of each one's entry."""
        prefix = bytes([what]) + file_id
        return {Key(key[len(prefix) :]): row[0] for key, row in self.tables.scan(Table.PROPOSALS, prefix, after(prefix))}

    def proposed(self) -> list[int]:
        """The entries of all proposals that are open, in the log's order."""
        return sorted(row[0] for _, row in self.tables.scan(Table.PROPOSALS, b"", b"\xff"))

    # -- rights

    def grant(self, grant: Sha256) -> Granted | None:
        """A grant by its id."""
        row = self.tables.get(Table.GRANTS, grant)
        return None if row is None else Granted(*row)

    def grants_to(self, reader: Key, start: int = 0, most: int = 2**31) -> list[tuple[Sha256, Granted]]:
        """The grants to this reader, and to the keys that it succeeded, from index ``start`` on, in the log's order, revoked ones too."""
        found: list[tuple[bytes, Row]] = []
        for key in self.line(reader):
            of_key = self.tables.scan(Table.GRANTS_BY_READER, key + place(start), key + end_of_places, most)
            found += [(name[len(key) :], row) for name, row in of_key]
        return [self._granted(row) for _, row in sorted(found)[:most]]

    def grants_of(self, file_id: FileId, reader: Key) -> list[tuple[Sha256, Granted]]:
        """The grants of this file to this reader, in the log's order, revoked ones too."""
        prefix = file_id + reader
        found = self.tables.scan(Table.GRANTS_BY_FILE, prefix, prefix + end_of_places)
        return [self._granted(row) for _, row in found]

    def _granted(self, row: Row) -> tuple[Sha256, Granted]:
        granted = self.grant(row[0])
        assert granted is not None, "written together"
        return Sha256(row[0]), granted

    def right_at(self, file_id: FileId, reader: Key, index: int, now: float = math.inf) -> Right | Refusal:
        """Say why ``reader`` may read a file by an ACCESS entry at ``index``, or why not. The end of a grant is for the asker to judge.

        An erasure that is dated ahead of ``now`` (seconds since 1970) does not count yet: or a retention could be got around by its date.
        """
        vouched = self.vouched_at(reader, index)
        if vouched is None:
            return Refusal(Reason.WITHDRAWN)
        if vouched.heir is not None and (vouched.inherits or 0) < index:  # and not withdrawn: no successor, but a vault to send for
            return Refusal(Reason.SENDS)
        known = self.registration(file_id)
        if known is None or known.index >= index:
            return Refusal(Reason.UNREGISTERED)
        if known.is_erased(now) and (known.erased or 0) < index:
            return Refusal(Reason.ERASED)
        if self.heir(known.owner, index) == reader:
            return Right(known.index, None, 0)
        given = (each for key in self.line(reader) for each in self.grants_of(file_id, key))
        grants = [(id_, each) for id_, each in given if each.index < index]
        standing = [(id_, each) for id_, each in grants if each.revoked is None or each.revoked >= index]
        if standing:
            id_, best = max(standing, key=lambda item: item[1].until or 2**63)
            return Right(best.index, id_, best.until)
        return Refusal(Reason.REVOKED, f"by entry {grants[-1][1].revoked}") if grants else Refusal(Reason.NEVER_GRANTED)

    # -- entries

    def entry_effective(self, index: int) -> bool:
        """Say whether the entry at this index had an effect."""
        return 0 <= index < self.size and self.tables.get(Table.VOID, place(index)) is None

    def unsigned(self, start: int) -> list[int]:
        """The entries from ``start`` on that are malformed or not signed by their authors."""
        found = self.tables.scan(Table.VOID, place(start), end_of_places)
        return [int.from_bytes(key, "big") for key, row in found if not row[0]]

    def ended(self, start: int, end: int, most: int = 2**31) -> list[Ended]:
        """The revocations, retirements and erasures from ``start`` up to but not including ``end``."""
        found = self.tables.scan(Table.ENDED, place(start), place(end), most)
        return [Ended(int.from_bytes(key, "big"), Type(row[0]), row[1]) for key, row in found]

    def timestamps(self) -> list[tuple[int, int, Sha256]]:
        """(index, size, root) of each TIMESTAMP entry with effect. That the token holds, and is over that head, is for its reader."""
        found = self.tables.scan(Table.TIMESTAMPS, b"", end_of_places)
        return [(int.from_bytes(key, "big"), row[0], Sha256(row[1])) for key, row in found]
