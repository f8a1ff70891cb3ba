"""What is sealed for readers, kept beside the manifests: keys to seal to, and the file key of each grant.

Law: these bytes are not in the ledger so that they can be destroyed. What a published REVOKE ends is deleted in the same
transaction that notes how far the ledger was obeyed, so a crash forgets nothing. Files that end are noted there, and go in ``endings``.
Who may put what is decided by ``sharing``.
"""

from __future__ import annotations

from collections.abc import Sequence
from sqlite3 import Connection

from medshard_protocol.entries import Type
from medshard_protocol.facts import Ended
from medshard_protocol.ids import FileId, Key, Sha256
from storenode.shardstore.catalog import Catalog


class Sealed:
    """Tables of the catalog. Async methods return when the change is durable; the plain ones are quick reads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def put_key(self, owner: Key, data: bytes) -> None:
        """Keep what may be sealed to this key's owner, in place of what was kept before."""
        await self._catalog.write(lambda c: c.execute("INSERT OR REPLACE INTO sealing_keys VALUES (?, ?)", (owner, data)))

    def key(self, owner: Key) -> bytes | None:
        """What may be sealed to this key's owner."""
        row = self._catalog.one("SELECT data FROM sealing_keys WHERE owner = ?", owner)
        return None if row is None else bytes(row[0])

    async def put_grant(self, file_id: FileId, grant: Sha256, sealed: bytes) -> None:
        """Keep a file's key for one grant, in place of what was kept before."""
        await self._catalog.write(lambda c: c.execute("INSERT OR REPLACE INTO sealed_grants VALUES (?, ?, ?)", (grant, file_id, sealed)))

    def grant(self, file_id: FileId, grant: Sha256) -> bytes | None:
        """A file's key for one grant."""
        row = self._catalog.one("SELECT sealed FROM sealed_grants WHERE grant_id = ? AND file_id = ?", grant, file_id)
        return None if row is None else bytes(row[0])

    async def drop_grant(self, file_id: FileId, grant: Sha256) -> bool:
        """Delete one; whether it was there."""

        def change(connection: Connection) -> bool:
            return connection.execute("DELETE FROM sealed_grants WHERE grant_id = ? AND file_id = ?", (grant, file_id)).rowcount > 0

        return await self._catalog.write(change)

    def obeyed(self) -> int:
        """Up to which place in the log what it ended has been destroyed."""
        row = self._catalog.one("SELECT place FROM sealed_obeyed")
        return 0 if row is None else int(row[0])

    async def obey(self, ended: Sequence[Ended], due: Sequence[int], place: int) -> int:
        """Destroy the keys of the grants that these entries revoked, and note the files that they ended, each ``due`` at its time.

        ``ended`` are all that there are before ``place``; how many keys were destroyed.
        """

        def change(connection: Connection) -> int:
            destroyed = 0
            for each, when in zip(ended, due, strict=True):
                if each.type is Type.REVOKE:
                    destroyed += connection.execute("DELETE FROM sealed_grants WHERE grant_id = ?", (each.id,)).rowcount
                else:
                    connection.execute(_note, (each.id, each.index, int(each.type), when))
            connection.execute("INSERT OR REPLACE INTO sealed_obeyed VALUES (0, ?)", (place,))
            return destroyed

        destroyed = await self._catalog.write(change)
        if destroyed:
            await self._catalog.forget()  # and where a long read is in the way, with the next ones
        return destroyed


# An ERASE after a RETIRE makes more to be destroyed. What the first one destroyed stays noted.
_note = """
INSERT INTO endings(file_id, place, type, due) VALUES (?, ?, ?, ?)
ON CONFLICT(file_id) DO UPDATE SET place = excluded.place, type = excluded.type, due = excluded.due, gone_at = NULL
WHERE excluded.place > place
"""
