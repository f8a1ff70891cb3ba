"""One SQLite file that says which shards and manifests a node holds, and holds the small shards themselves.

Writes queue up for one thread that commits them together, so a hundred small puts at once cost one fsync. A write's future
resolves only after its commit. Reads go to a second connection (WAL: they wait for nobody).
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from medshard_protocol.errors import Damaged
from storenode import durable

Result = TypeVar("Result")
Write = Callable[[sqlite3.Connection], Any]

_schema = """
CREATE TABLE IF NOT EXISTS shards(
    file_id BLOB NOT NULL, idx INTEGER NOT NULL, size INTEGER NOT NULL, cell_size INTEGER NOT NULL, root BLOB NOT NULL,
    digest TEXT NOT NULL, digests BLOB NOT NULL, owner BLOB NOT NULL, stored_at INTEGER NOT NULL,
    registered INTEGER NOT NULL DEFAULT 0, data BLOB, PRIMARY KEY(file_id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS unregistered ON shards(stored_at) WHERE registered = 0;
CREATE TABLE IF NOT EXISTS manifests(
    file_id BLOB PRIMARY KEY, sha256 BLOB NOT NULL, owner BLOB NOT NULL, stored_at INTEGER NOT NULL, bytes BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS tags(tag BLOB NOT NULL, file_id BLOB NOT NULL, PRIMARY KEY(tag, file_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sealing_keys(owner BLOB PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS sealed_grants(
    grant_id BLOB NOT NULL, file_id BLOB NOT NULL, sealed BLOB NOT NULL, PRIMARY KEY(grant_id, file_id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS sealed_of_file ON sealed_grants(file_id);
CREATE TABLE IF NOT EXISTS audit_tags(
    file_id BLOB NOT NULL, institution TEXT NOT NULL, cell INTEGER NOT NULL, given INTEGER NOT NULL,
    PRIMARY KEY(file_id, institution, cell)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS large ON shards(size, file_id) WHERE size > 1048576;
CREATE TABLE IF NOT EXISTS sealed_obeyed(id INTEGER PRIMARY KEY CHECK (id = 0), place INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS endings(
    file_id BLOB PRIMARY KEY, place INTEGER NOT NULL, type INTEGER NOT NULL, due INTEGER NOT NULL,
    idx INTEGER, root BLOB, keys INTEGER NOT NULL DEFAULT 0, gone_at INTEGER) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS endings_due ON endings(due) WHERE gone_at IS NULL;
"""
wait_ms = 10_000
forget_wait_ms = 100  # for readers to end, while writes wait
batch_max = 256  # one commit's worth: keeps the wait of the first in a batch short


class Catalog:
    """Open at ``path``. Call ``close`` to finish queued writes and stop the thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        durable.sync_log(path)  # what is found here is told to others as stored
        with _whole(path):
            self._reader = _connect(path)
            self._reader.executescript(_schema)
            self._writer = _connect(path)  # here and not in its thread: a thread that dies of a damaged file lets every write wait for ever
        self._queue: queue.SimpleQueue[tuple[Write, asyncio.Future[Any], asyncio.AbstractEventLoop] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="catalog-writer", daemon=True)
        self._thread.start()

    async def write(self, change: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run ``change`` in a transaction shared with its neighbours; return its result once that is durable.

        An exception from ``change`` undoes that change alone and is raised here. Raises Damaged for a file that is not whole.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._queue.put((change, future, loop))
        # Shielded: a reader that hangs up must not cancel a future that the writer thread is about to resolve.
        with _whole(self._path):
            return await asyncio.shield(future)

    async def forget(self) -> bool:
        """Leave nothing on the disk of what was deleted before: not in the log beside the file either, where it stood when it was written.

        False where a long read is in the way; try again in a moment. Raises as ``write``.
        """
        return bool(await self.write(_empty_log))

    def one(self, sql: str, *args: object) -> tuple[Any, ...] | None:
        """The first row, or None. Small point reads only: this runs on the caller's thread. Raises Damaged."""
        with _whole(self._path):
            row: tuple[Any, ...] | None = self._reader.execute(sql, args).fetchone()
        return row

    def all(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        """All rows of a small result. Raises Damaged."""
        with _whole(self._path):
            return self._reader.execute(sql, args).fetchall()

    def another_reader(self) -> sqlite3.Connection:
        """A connection for long reads in another thread, which keep nobody waiting. Whoever asked for it closes it."""
        return _connect(self._path)

    def close(self) -> None:
        """Finish what is queued, then close."""
        self._queue.put(None)
        self._thread.join()
        self._reader.close()

    def _run(self) -> None:
        connection, running = self._writer, True
        while running:
            batch = [self._queue.get()]
            while len(batch) < batch_max:
                try:
                    batch.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            running = None not in batch
            self._commit(connection, [item for item in batch if item is not None])
        connection.close()

    @staticmethod
    def _commit(connection: sqlite3.Connection, batch: list[tuple[Write, asyncio.Future[Any], asyncio.AbstractEventLoop]]) -> None:
        outcomes: list[tuple[asyncio.Future[Any], asyncio.AbstractEventLoop, Any, Exception | None]] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for change, future, loop in batch:
                if change is _empty_log:
                    continue
                connection.execute("SAVEPOINT one")
                try:
                    outcomes.append((future, loop, change(connection), None))
                except Exception as error:
                    connection.execute("ROLLBACK TO one")
                    outcomes.append((future, loop, None, error))
                connection.execute("RELEASE one")
            connection.execute("COMMIT")  # synchronous=FULL: returns after the WAL is on disk
            outcomes += [(future, loop, change(connection), None) for change, future, loop in batch if change is _empty_log]
        except sqlite3.Error as error:  # a full or failing disk: nothing of this batch may be acknowledged
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            outcomes = [(future, loop, None, error) for _, future, loop in batch]
        for future, loop, result, failure in outcomes:
            try:
                loop.call_soon_threadsafe(_resolve, future, result, failure)
            except RuntimeError:  # the loop is closed: the waiter is gone, the write stands
                continue


def _empty_log(connection: sqlite3.Connection) -> bool:
    """Move all that the log holds into the file and cut it to nothing. Not within a transaction."""
    connection.execute(f"PRAGMA busy_timeout={forget_wait_ms}")
    try:
        (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.execute(f"PRAGMA busy_timeout={wait_ms}")
    return not busy


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Say in our words that the file is not what SQLite wrote. What fails in operation, such as a full disk, stays what it is."""
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeError) as error:  # SQLite quotes what is damaged, which Python cannot always decode
        # An operational error without a code is the sqlite3 module's own: a blob that has become text, and is none.
        if isinstance(error, sqlite3.OperationalError) and hasattr(error, "sqlite_errorcode"):
            raise
        hint = "its shards are on other nodes too: move the node's data folder away and start it, and they are made again"
        raise Damaged(f"{path} is damaged ({error})", hint=hint) from error


def _resolve(future: asyncio.Future[Any], result: Any, failure: Exception | None) -> None:
    if future.done():
        return
    if failure is not None:
        future.set_exception(failure)
    else:
        future.set_result(result)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(f"PRAGMA busy_timeout={wait_ms}")
    connection.execute("PRAGMA secure_delete=ON")  # a destroyed key must not stay readable in a free page
    return connection
