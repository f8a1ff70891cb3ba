"""What is sealed for readers, kept beside the manifests: keys to seal to, and the file key of each grant.

Law: these bytes are not in the ledger so that they can be destroyed. What a published REVOKE or ERASE ends is deleted in the same
transaction that notes how far the ledger was obeyed, so a crash forgets nothing. Who may put what is decided by ``sharing``.
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

    async def obey(self, ended: Sequence[Ended], place: int) -> int:
        """Destroy what these entries ended, all that there are before ``place``; how many keys that were."""

        def change(connection: Connection) -> int:
            destroyed = 0
            for each in ended:
                column = "file_id" if each.type is Type.ERASE else "grant_id"
                destroyed += connection.execute(f"DELETE FROM sealed_grants WHERE {column} = ?", (each.id,)).rowcount  # noqa: S608
            connection.execute("INSERT OR REPLACE INTO sealed_obeyed VALUES (0, ?)", (place,))
            return destroyed

        return await self._catalog.write(change)
