"""Where the fold keeps what it knows: ordered tables of rows, and the way back over entries that may yet be dropped.

Law: a row is a tuple of None, integers, bytes, text and such tuples; keys are bytes and ordered. Whoever stores tables elsewhere (a node
keeps them in SQLite) gives back what was put, and nothing else is asked of it. The tables are a cache of the log: they may be lost.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Protocol, TypeAlias

Row: TypeAlias = tuple[Any, ...]


class Table(IntEnum):
    """What there is. The comment gives key, then row."""

    META = 0  # name; what is said of all: how far, since when frozen
    FILES = 1  # file id; Registration
    IDENTITIES = 2  # key; Identity
    GRANTS = 3  # id of the GRANT entry; Granted
    GRANTS_BY_FILE = 4  # file id, reader, index; id of the GRANT entry
    GRANTS_BY_READER = 5  # reader, index; id of the GRANT entry
    HOLDS = 6  # id of the HOLD entry; Held
    HOLDS_BY_FILE = 7  # file id, id of the HOLD entry; nothing. Holds that are not released
    MOVES = 8  # file id, shard; Moved
    HISTORY = 9  # file id, index; 1 if that entry had an effect, or 0. Every entry that names the file
    VOID = 10  # index; 1 if the entry was signed by its author, or 0. Entries without effect
    VOTES = 11  # roster number, what is voted on, name of the institution; index
    ROSTERS = 12  # index of the deciding entry; the roster
    TIMESTAMPS = 13  # index; size, root
    ENDED = 14  # index; type, grant id or file id. Revocations and erasures, for whoever must destroy what is sealed
    COUNTS = 15  # name of a type; how many entries had an effect. "void" for the others
    UNDO = 16  # index, number; table, key, row before
    PROPOSALS = 17  # type, file id, author; index. Open ones, for the second person


class Tables(Protocol):
    """Ordered tables."""

    def get(self, table: Table, key: bytes) -> Row | None:
        """Give the row under this key."""

    def put(self, table: Table, key: bytes, row: Row | None) -> None:
        """Set the row under this key; None takes it away."""

    def scan(self, table: Table, first: bytes, end: bytes, most: int = 2**31) -> list[tuple[bytes, Row]]:
        """Give keys from ``first`` up to but not including ``end``, ascending, and their rows; ``most`` of them."""

    def clear(self) -> None:
        """Take everything away."""


class MemoryTables:
    """Tables in this process. For tests, tools and clients: a scan looks at every key of its table."""

    def __init__(self) -> None:
        self._tables: dict[Table, dict[bytes, Row]] = {table: {} for table in Table}

    def get(self, table: Table, key: bytes) -> Row | None:
        """Give the row under this key."""
        return self._tables[table].get(key)

    def put(self, table: Table, key: bytes, row: Row | None) -> None:
        """Set the row under this key; None takes it away."""
        if row is None:
            self._tables[table].pop(key, None)
        else:
            self._tables[table][key] = tuple(row)

    def scan(self, table: Table, first: bytes, end: bytes, most: int = 2**31) -> list[tuple[bytes, Row]]:
        """Give keys from ``first`` up to but not including ``end``, ascending, and their rows; ``most`` of them."""
        found = sorted(key for key in self._tables[table] if first <= key < end)
        return [(key, self._tables[table][key]) for key in found[:most]]

    def clear(self) -> None:
        """Take everything away."""
        for rows in self._tables.values():
            rows.clear()


class Undoable:
    """Writes that can be taken back, entry by entry, as far as the log may still lose entries."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._index: int | None = None  # of the entry whose writes are noted
        self._number = 0

    def begin(self, index: int, *, noted: bool) -> None:
        """Write for this entry from now on."""
        self._index, self._number = (index if noted else None), 0

    def put(self, table: Table, key: bytes, row: Row | None) -> None:
        """Set a row, and note what was there."""
        if self._index is not None:
            before = self._tables.get(table, key)
            self._tables.put(Table.UNDO, place(self._index) + self._number.to_bytes(4, "big"), (int(table), key, before))
            self._number += 1
        self._tables.put(table, key, row)

    def take_back(self, size: int) -> None:
        """Undo the writes of every entry from ``size`` on."""
        for key, (table, name, before) in reversed(self._tables.scan(Table.UNDO, place(size), end_of_places)):
            self._tables.put(Table(table), name, None if before is None else tuple(before))
            self._tables.put(Table.UNDO, key, None)

    def settle(self, size: int) -> None:
        """Forget how to undo entries below ``size``."""
        for key, _ in self._tables.scan(Table.UNDO, b"", place(size)):
            self._tables.put(Table.UNDO, key, None)


end_of_places = b"\xff" * 13  # after every key that begins with a place


def place(index: int) -> bytes:
    """Write a place in the log as a key, so that keys stand in the log's order."""
    return index.to_bytes(8, "big")


def after(prefix: bytes) -> bytes:
    """Give the first key behind all that begin with ``prefix``, which is not all 0xff."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b"\xff" * (len(prefix) + 64)
