"""The catalog's tables in PostgreSQL, for several gateways that share one vault.

Law: what ``Tables`` says; durable is what the server's commit means. The tables lie in a schema of their own, whose name has their version.
The server is on this machine, or shows a certificate that is checked. A lost connection is made anew once, and a change begun again; a
server that does not answer is not asked again for a moment, so that threads do not queue up behind it.

The driver wants an event loop, and the catalog's callers are threads: the loop is in a thread of its own.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import lru_cache
from ipaddress import ip_address
from itertools import count
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from medshard.gateway.tables import Rows, T, damaged, statements, version
from medshard_protocol.errors import Full, Malformed, MedshardError, Refused, Unavailable

connect_timeout_s: Final = 4.0
query_timeout_s: Final = 20.0
pause_s: Final = 1.0  # after a server that was not there
_schema: Final = f"medshard_dicom_{version}"
_settings: Final = {
    "search_path": _schema,
    "application_name": "medshard gateway",
    "lock_timeout": "10s",  # behind another gateway's change
    "idle_in_transaction_session_timeout": "15s",  # a gateway that died in a change must not hold up the others
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}
_lost: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.CannotConnectNowError,
    asyncpg.OperatorInterventionError,
)


class _Gone(Unavailable):
    """The connection broke: what was under way may be tried on another one."""


class PostgresTables:
    """Tables in the database that ``dsn`` names, made if need be. Raises Refused, Malformed or Unavailable."""

    def __init__(self, dsn: str) -> None:
        self.where = checked(dsn)
        self.shared = True
        self._dsn = dsn
        self._connection: asyncpg.Connection[Any] | None = None
        self._changing = False
        self._not_before = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dicom-index", daemon=True)
        self._thread.start()
        try:
            self._run(self._prepare())
        except BaseException:
            self.close()
            raise

    def rows(self, sql: str, *values: object) -> Rows:
        """See ``Tables``."""
        found: Rows
        try:
            found = self._run(self._rows(sql, values))
        except _Gone:
            if self._changing:
                raise
            found = self._run(self._rows(sql, values))
        return found

    def many(self, sql: str, values: Iterable[Sequence[object]]) -> None:
        """See ``Tables``."""
        self._run(self._do(lambda to: to.executemany(_numbered(sql), list(values))))

    def change(self, act: Callable[[], T]) -> T:
        """See ``Tables``."""
        try:
            return self._change(act)
        except _Gone:
            return self._change(act)

    def reset(self) -> None:
        """See ``Tables``."""
        self._run(self._do(lambda to: to.execute(f"DROP SCHEMA IF EXISTS {_schema} CASCADE")))
        self._run(self._prepare())

    def close(self) -> None:
        """See ``Tables``."""
        if self._thread.is_alive():
            self._run(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # -- inside

    def _change(self, act: Callable[[], T]) -> T:
        self._changing = True
        try:
            self._run(self._do(lambda to: to.execute("BEGIN")))
            try:
                done = act()
                self._run(self._do(lambda to: to.execute("COMMIT")))
            except BaseException:
                self._run(self._roll_back())
                raise
        finally:
            self._changing = False
        return done

    async def _rows(self, sql: str, values: Sequence[object]) -> Rows:
        found: Rows = await self._do(lambda to: to.fetch(_numbered(sql), *values))
        return found

    async def _roll_back(self) -> None:
        if self._connection is not None:
            try:
                await asyncio.wait_for(self._connection.execute("ROLLBACK"), query_timeout_s)
            except (asyncpg.PostgresError, *_lost):
                self._drop()

    async def _do(self, act: Callable[[asyncpg.Connection[Any]], Coroutine[Any, Any, Any]]) -> Any:
        try:
            async with asyncio.timeout(query_timeout_s):
                return await act(await self._connected())
        except _lost as error:
            was_connected = self._connection is not None
            self._drop()
            if was_connected and not isinstance(error, TimeoutError):
                raise _Gone(self._away(error)) from error
            self._not_before = time.monotonic() + pause_s
            raise Unavailable(self._away(error), hint="it is asked again with the next request") from error
        except asyncpg.PostgresError as error:
            raise self._translated(error) from error

    async def _connected(self) -> asyncpg.Connection[Any]:
        if self._connection is None or self._connection.is_closed():
            self._connection = None
            if time.monotonic() < self._not_before:
                raise ConnectionError("it did not answer just now")
            self._connection = await asyncpg.connect(
                self._dsn, timeout=connect_timeout_s, target_session_attrs=SessionAttribute.read_write, server_settings=_settings
            )
        return self._connection

    async def _prepare(self) -> None:
        async def made(to: asyncpg.Connection[Any]) -> None:
            async with to.transaction():
                await to.execute("SELECT pg_advisory_xact_lock(hashtext('medshard dicom index'))")  # two gateways that start at once
                if await to.fetchval("SELECT to_regclass($1) IS NULL", f"{_schema}.clock"):
                    await to.execute(f"CREATE SCHEMA IF NOT EXISTS {_schema}")
                    for statement in statements(bytes="BYTEA", id="BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"):
                        await to.execute(statement)

        await self._do(made)

    async def _close(self) -> None:
        if self._connection is not None:
            try:
                await self._connection.close(timeout=1.0)
            except (asyncpg.PostgresError, *_lost):
                self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()  # an answer may still come, and would be taken for that to the next query
            self._connection = None

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _away(self, error: BaseException) -> str:
        return f"the DICOM index, {self.where}, cannot be reached ({str(error) or type(error).__name__})"

    def _translated(self, error: asyncpg.PostgresError) -> MedshardError:
        if isinstance(error, asyncpg.DiskFullError):
            return Full(f"no room for the DICOM index, {self.where}", hint="free some space; nothing has been lost")
        if isinstance(error, asyncpg.DataCorruptedError | asyncpg.IndexCorruptedError):
            return damaged(self.where, str(error))
        refused = (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InsufficientPrivilegeError, asyncpg.InvalidCatalogNameError)
        if isinstance(error, refused):
            hint = (
                "the database has to exist, and its user to have the right to make a schema in it; PGPASSWORD or PGPASSFILE give a password"
            )
            return Refused(f"the DICOM index, {self.where}: {error}", hint=hint)
        return Unavailable(self._away(error))


def checked(dsn: str) -> str:
    """Where a database is, for people. Raises Malformed for what is no address, Refused for one over a network that is not guarded."""
    try:
        parts = urlsplit(dsn)
        asked = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    except ValueError as error:
        raise Malformed("the address of the index cannot be understood", hint=_example) from error
    if parts.scheme not in ("postgresql", "postgres"):
        raise Malformed("the address of the index is no PostgreSQL address", hint=_example)
    named = parts.netloc.rpartition("@")[2] or asked.get("host") or os.environ.get("PGHOST", "")
    hosts = [re.sub(r":\d*$", "", each) for each in named.split(",")]
    mode = asked.get("sslmode") or os.environ.get("PGSSLMODE", "")
    if not all(map(_is_here, hosts)) and mode not in ("verify-full", "verify-ca"):
        raise Refused(
            f"the index at {named} would be reached over a network without a checked certificate",
            hint="add ?sslmode=verify-full&sslrootcert=FILE to its address, FILE being the CA of the server's certificate",
        )
    name = parts.path.strip("/") or asked.get("database") or asked.get("dbname") or "its user's"
    return f"PostgreSQL database {name} at {named or 'this machine'}"


_example: Final = "write postgresql://USER@HOST/DATABASE?sslmode=verify-full&sslrootcert=FILE"


def _is_here(host: str) -> bool:
    if host in ("", "localhost") or host.startswith(("/", "%2F")):
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@lru_cache(256)
def _numbered(sql: str) -> str:
    numbers = count(1)
    return re.sub(r"\?", lambda _: f"${next(numbers)}", sql)
