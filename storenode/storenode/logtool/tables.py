"""The fold's tables for an audit: small, because nobody will ask about single files afterwards.

Law: what the rules ask about is kept, what only answers readers' questions is not. What grows with the number of files lies in a temporary
database; the rest is in memory. Entries without effect are counted, and the first of them named.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Final

import msgpack

from medshard_protocol.tables import MemoryTables, Row, Table

void_named_max: Final = 100
buffered_rows_max: Final = 4096
cache_kib: Final = 48 * 1024

_unasked: Final = frozenset({Table.HISTORY, Table.GRANTS_BY_FILE, Table.GRANTS_BY_READER, Table.ENDED, Table.UNDO})
_many: Final = frozenset({Table.FILES, Table.GRANTS, Table.HOLDS, Table.MOVES, Table.HOLDS_BY_FILE})


class AuditTables(MemoryTables):
    """``Tables`` that forget what an audit does not need."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.void_named: list[tuple[int, bool]] = []  # (index, signed) of the first entries without effect
        self.unsigned = 0  # entries that are malformed or not signed by their authors
        self._buffer: dict[tuple[int, bytes], bytes | None] = {}
        self._disk = sqlite3.connect(folder / "audit.sqlite", isolation_level=None)
        for setting in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", f"cache_size=-{cache_kib}"):
            self._disk.execute(f"PRAGMA {setting}")
        self._disk.execute("CREATE TABLE row(tab INTEGER, key BLOB, value BLOB, PRIMARY KEY (tab, key)) WITHOUT ROWID")

    def get(self, table: Table, key: bytes) -> Row | None:
        """Give the row under this key."""
        if table not in _many:
            return super().get(table, key)
        name = (int(table), bytes(key))
        if name in self._buffer:
            packed = self._buffer[name]
        else:
            found = self._disk.execute("SELECT value FROM row WHERE tab = ? AND key = ?", name).fetchone()
            packed = found[0] if found else None
        return None if packed is None else _unpacked(packed)

    def put(self, table: Table, key: bytes, row: Row | None) -> None:
        """Set the row under this key; None takes it away."""
        if table in _unasked:
            return
        if table is Table.VOID:
            self.unsigned += row is not None and not row[0]
            if row is not None and len(self.void_named) < void_named_max:
                self.void_named.append((int.from_bytes(key, "big"), bool(row[0])))
            return
        if table not in _many:
            super().put(table, key, row)
            return
        self._buffer[int(table), bytes(key)] = None if row is None else msgpack.packb(row)
        if len(self._buffer) >= buffered_rows_max:
            self._spill()

    def scan(self, table: Table, first: bytes, end: bytes, most: int = 2**31) -> list[tuple[bytes, Row]]:
        """Give keys from ``first`` up to but not including ``end``, ascending, and their rows; ``most`` of them."""
        if table not in _many:
            return super().scan(table, first, end, most)
        self._spill()
        query = "SELECT key, value FROM row WHERE tab = ? AND key >= ? AND key < ? ORDER BY key LIMIT ?"
        return [(key, _unpacked(value)) for key, value in self._disk.execute(query, (int(table), first, end, min(most, 2**31)))]

    def clear(self) -> None:
        """Take everything away."""
        super().clear()
        self._buffer.clear()
        self.void_named.clear()
        self.unsigned = 0
        self._disk.execute("DELETE FROM row")

    def close(self) -> None:
        """Let go of the file."""
        self._disk.close()

    def _spill(self) -> None:
        gone = [name for name, value in self._buffer.items() if value is None]
        kept = [(*name, value) for name, value in self._buffer.items() if value is not None]
        self._disk.execute("BEGIN")
        self._disk.executemany("INSERT OR REPLACE INTO row VALUES (?, ?, ?)", kept)
        self._disk.executemany("DELETE FROM row WHERE tab = ? AND key = ?", gone)
        self._disk.execute("COMMIT")
        self._buffer.clear()


def _unpacked(packed: bytes) -> Row:
    value: Any = msgpack.unpackb(packed, use_list=False)
    return tuple(value)
