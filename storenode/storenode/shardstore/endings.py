"""Files that the ledger has ended: what this node had of them goes, and what went is noted for good.

Law: wrapped keys go first, in the transaction that takes the shard out of the catalog, so that from then on nobody could read what is left
on the disk; then the shard's file; then the log in which the catalog had written the keys down; then the note that it is gone. A crash
between two steps is gone on from. The note is all that remains: whoever asks, years later, gets the same receipt.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from sqlite3 import Connection

from medshard_protocol.entries import Type
from medshard_protocol.ids import FileId
from storenode.shardstore.store import ShardStore


@dataclass(frozen=True, slots=True)
class Gone:
    """What a node had of a file that has ended."""

    file_id: FileId
    place: int  # of the entry that ended it
    type: Type
    shard: int | None
    keys: int
    at: int | None  # Unix seconds; None while it is not all gone


class Endings:
    """Tables of the catalog, and the shards' files."""

    def __init__(self, store: ShardStore) -> None:
        self._store = store
        self._catalog = store.catalog

    def of(self, file_id: FileId) -> Gone | None:
        """What went of a file, or is about to go."""
        row = self._catalog.one("SELECT place, type, idx, keys, gone_at FROM endings WHERE file_id = ?", file_id)
        return None if row is None else Gone(file_id, int(row[0]), Type(row[1]), row[2], int(row[3]), row[4])

    def counts(self) -> tuple[int, int]:
        """(files that are gone, files that are about to go)."""
        row = self._catalog.one("SELECT count(gone_at), count(*) - count(gone_at) FROM endings") or (0, 0)
        return int(row[0]), int(row[1])

    async def destroy_due(self, now: int, most: int = 1000) -> int:
        """Destroy what is due by ``now`` (Unix seconds, by the cosigners), at most so many files; how many are gone.

        None are while a long read keeps the catalog from forgetting them: the next call goes on.
        """
        rows = self._catalog.all("SELECT file_id, type FROM endings WHERE gone_at IS NULL AND due <= ? LIMIT ?", now, most)
        for file_id, number in rows:
            await self._destroy(FileId(file_id), Type(number))
        if not rows or not await self._catalog.forget():
            return 0
        told = [(now, file_id) for file_id, _ in rows]
        await self._catalog.write(lambda c: c.executemany("UPDATE endings SET gone_at = ? WHERE file_id = ?", told))
        return len(rows)

    async def _destroy(self, file_id: FileId, type_: Type) -> None:
        def take_out(connection: Connection) -> tuple[int, bytes | None]:
            row = connection.execute("SELECT idx, root, size FROM shards WHERE file_id = ?", (file_id,)).fetchone()
            keys = 0
            if type_ is Type.ERASE:
                keys = connection.execute("DELETE FROM sealed_grants WHERE file_id = ?", (file_id,)).rowcount
                keys += connection.execute("DELETE FROM manifests WHERE file_id = ?", (file_id,)).rowcount  # with the owner's wrapped key
                connection.execute("DELETE FROM tags WHERE file_id = ?", (file_id,))
            connection.execute("DELETE FROM shards WHERE file_id = ?", (file_id,))
            connection.execute("DELETE FROM audit_tags WHERE file_id = ?", (file_id,))
            connection.execute("UPDATE endings SET keys = keys + ? WHERE file_id = ?", (keys, file_id))
            if row is not None:
                connection.execute("UPDATE endings SET idx = ?, root = ? WHERE file_id = ?", (row[0], row[1], file_id))
            root = connection.execute("SELECT root FROM endings WHERE file_id = ?", (file_id,)).fetchone()[0]
            return 0 if row is None else int(row[2]), root

        size, root = await self._catalog.write(take_out)
        self._store.used -= size
        if root is not None:
            await asyncio.to_thread(self._store.unlink, file_id, root)
