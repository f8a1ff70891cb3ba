"""Which shards are looked at next, drawn by chance without a list of them all.

Law: half of the draws give each shard the same chance and half give each byte the same, so that neither many small losses nor a large
one hide behind the others. File ids are random, so a random place among them is near a random shard; the gap before a shard would be
its luck for ever, so one of the next ``window`` is taken. Large shards, of which a disk holds few, are drawn by their exact weight.
"""

from __future__ import annotations

import os
import random
import sqlite3
from typing import Final

from medshard_protocol.ids import FileId, file_id_size
from storenode.shardstore import ShardStore

window: Final = 128
large_bytes: Final = 1024 * 1024  # as in the catalog's index
draws: Final = 64  # places among the large ones for which one pass over the index is made


class Sampler:
    """Draws from one node's catalog. Blocking; one thread at a time."""

    def __init__(self, store: ShardStore, rng: random.Random | None = None) -> None:
        self._store, self._rng = store, rng or random.Random()
        self._anew = rng is None
        self._by_weight: list[FileId | None] = []  # drawn ahead; None is any of the small ones
        self._turn = False

    def draw(self) -> FileId | None:
        """The next file whose shards are audited; None where nothing is stored."""
        self._turn = not self._turn
        if self._anew:  # nobody learns what is drawn next from what was
            self._rng.seed(os.urandom(16))
        connection = self._store.catalog.another_reader()
        try:
            return self._any(connection) if self._turn else self._weighted(connection)
        finally:
            connection.close()

    def _any(self, connection: sqlite3.Connection, large: bool = True) -> FileId | None:
        only = "" if large else f"AND size <= {large_bytes}"
        sql = f"SELECT file_id FROM shards WHERE file_id >= ? {only} ORDER BY file_id LIMIT {window}"  # noqa: S608 - all from here
        start = self._rng.randbytes(file_id_size)
        rows = connection.execute(sql, (start,)).fetchall()
        if len(rows) < window:  # the next ones are at the beginning
            rows += connection.execute(sql, (b"",)).fetchall()[: window - len(rows)]
        files = list(dict.fromkeys(row[0] for row in rows if isinstance(row[0], bytes) and len(row[0]) == file_id_size))
        return FileId(self._rng.choice(files)) if files else None

    def _weighted(self, connection: sqlite3.Connection) -> FileId | None:
        if not self._by_weight:
            self._by_weight = self._draw_ahead(connection)
        chosen = self._by_weight.pop()
        return chosen or self._any(connection, large=False) or self._any(connection)

    def _draw_ahead(self, connection: sqlite3.Connection) -> list[FileId | None]:
        rows = connection.execute(f"SELECT coalesce(sum(size), 0) FROM shards WHERE size > {large_bytes}")  # noqa: S608 - all from here
        in_large = int(rows.fetchone()[0])
        places = sorted(self._rng.randrange(max(self._store.used, in_large, 1)) for _ in range(draws))
        wanted = [place for place in places if place < in_large]
        drawn: list[FileId | None] = [None] * (draws - len(wanted))
        passed, each = 0, iter(connection.execute(f"SELECT size, file_id FROM shards WHERE size > {large_bytes}"))  # noqa: S608
        row = next(each, None)
        for place in wanted:
            while row is not None and passed + row[0] <= place:
                passed, row = passed + row[0], next(each, None)
            drawn.append(FileId(row[1]) if row is not None else None)
        self._rng.shuffle(drawn)
        return drawn
