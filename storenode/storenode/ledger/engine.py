"""What a ledger needs of a database. One conformance suite runs on every engine: tests/storenode/test_engines.py.

Law: an append is one transaction, guarded by the epoch it was decided in and the size it builds on, and is durable when ``extend`` returns.
Entries are only ever added, save by ``rewind``, which a mirror may call for a suffix that was never published (``mirror`` says when). Knows
bytes, not what they mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol

import msgpack

from medshard_protocol.entries import nonce_size
from medshard_protocol.errors import Malformed
from medshard_protocol.ids import key_size
from medshard_protocol.tiles import FullTile, tile_height

format_version = 2
name_size = key_size + nonce_size
levels_max = 7  # 2**56 entries


class Head(NamedTuple):
    """How far the log goes in this store."""

    size: int
    root: bytes
    note: bytes  # the checkpoint that a sequencer signed for it; empty in the store of the one who did
    accepted: int = 0  # the newest epoch whose sequencer has shown this log in full


class Standing(NamedTuple):
    """Whom this node follows, and whether it may speak."""

    epoch: int  # nothing of an earlier one is taken
    leader: bytes  # node id of its sequencer; empty before there was one
    lost: bytes  # the cosigner key that must never sign again, because what it signed is no longer here; or empty


class Memory(NamedTuple):
    """What was found out about entries below ``checked``, and the newest published checkpoint."""

    checked: int
    unsigned: frozenset[int]  # places of entries that are malformed or that their author did not sign
    published: bytes


class Engine(Protocol):
    """One log in one database. Writes come from one thread at a time; reads from several, also during a write.

    Every method raises Unavailable while the database cannot be used, and Damaged where it holds what it never should.
    """

    @property
    def remote(self) -> Remote | None:
        """Where calls may take long, what appends wait for, to be awaited in the one event loop that ends with ``close``; else None."""

    def close(self) -> None:
        """Let go of everything."""

    def head(self) -> Head:
        """Read how far the log goes."""

    def standing(self) -> Standing:
        """Read whom this node follows."""

    def promise(self, epoch: int, leader: bytes) -> None:
        """Follow this sequencer from now on, durably. Raises Conflict if a later epoch was promised, or this one to another node."""

    def lose(self, key: bytes) -> None:
        """Note durably that this key must not sign."""

    def extend(
        self,
        epoch: int,
        old_size: int,
        entries: Sequence[bytes],
        tiles: Iterable[FullTile],
        head: Head,
        names: Sequence[bytes],
        *,
        own: bool,
    ) -> None:
        """Append durably. ``names`` are those of the entries (see ``name_of``), by which ``find`` finds them.

        ``own`` says that this node orders the entries: then a name that is taken already is a Conflict; else the first one stays.
        Raises Conflict if epoch or size are others by now, Full or Unavailable if it cannot be written; then nothing has changed, save
        that after Unavailable from a remote engine nobody knows, and the head is to be read again.
        """

    def rewind(
        self, epoch: int, old_size: int, start: int, entries: Sequence[bytes], tiles: Iterable[FullTile], head: Head, names: Sequence[bytes]
    ) -> None:
        """Drop everything from ``start`` on and append, in one transaction. Raises as ``extend`` does."""

    def entries(self, start: int, end: int) -> list[bytes]:
        """Read entries from ``start`` up to but not including ``end``. Raises Damaged if one is missing."""

    def tile(self, level: int, number: int) -> bytes:
        """Read a full tile. Raises Damaged if it is missing."""

    def find(self, names: Sequence[bytes]) -> dict[bytes, int]:
        """Find where entries stand, by their names."""

    def memory(self) -> Memory:
        """Read what was remembered."""

    def remember(self, checked: int, unsigned: Iterable[int], published: bytes) -> None:
        """Note which entries need no second check, and the newest published checkpoint. May get lost in a crash."""


class Remote(Protocol):
    """Some calls of an engine, for one event loop."""

    async def extend(
        self,
        epoch: int,
        old_size: int,
        entries: Sequence[bytes],
        tiles: Iterable[FullTile],
        head: Head,
        names: Sequence[bytes],
        *,
        own: bool,
    ) -> None:
        """Append durably: as ``Engine.extend``, with which it takes turns."""

    async def find(self, names: Sequence[bytes]) -> dict[bytes, int]:
        """Find where entries stand, by their names."""


class Reader(Protocol):
    """The part of an engine that may be read beside the node that writes it."""

    def close(self) -> None:
        """Let go of everything."""

    def entries(self, start: int, end: int) -> list[bytes]:
        """Read entries from ``start`` up to but not including ``end``. Raises Damaged if one is missing."""

    def tile(self, level: int, number: int) -> bytes:
        """Read a full tile. Raises Damaged if it is missing."""

    def memory(self) -> Memory:
        """Read what was remembered."""


def open_engine(dsn: str, folder: Path, origin: str, empty_root: bytes, number: int = 0) -> Engine:
    """Open what config.toml names: ``sqlite``, or a PostgreSQL DSN. ``number`` counts the logs before this one, which share a database.

    Raises Unavailable, Damaged, or Malformed for another name.
    """
    if dsn == "sqlite":
        from storenode.ledger.store import Store

        return Store(folder, origin, empty_root)
    made: Engine = _postgres(dsn).PostgresStore(dsn, origin, empty_root, number)
    return made


def open_reader(dsn: str, folder: Path, number: int = 0) -> Reader:
    """Open the same to read, beside the running node. Raises as ``open_engine`` does, and Absent where there is none yet."""
    if dsn == "sqlite":
        from storenode.ledger.store import StoreReader

        return StoreReader(folder)
    made: Reader = _postgres(dsn).PostgresReader(dsn, number)
    return made


def _postgres(dsn: str) -> ModuleType:
    if not dsn.startswith(("postgresql://", "postgres://")):
        raise Malformed(f"ledger.engine: expected sqlite or a DSN postgresql://…, got {dsn!r}")
    try:
        from storenode.ledger import postgres
    except ModuleNotFoundError:
        raise Malformed("ledger.engine: the PostgreSQL client is not installed", hint="pip install 'medshard[postgres]'") from None
    return postgres


def name_of(data: bytes) -> bytes:
    """An entry's author and nonce, which name it in its log; empty for bytes that are no entry."""
    try:
        _, _, body, author, _ = msgpack.unpackb(data)
        nonce = body[-1]
    except (ValueError, TypeError, LookupError, RecursionError, msgpack.UnpackException):
        return b""
    if not (isinstance(author, bytes) and isinstance(nonce, bytes) and len(author) == key_size and len(nonce) == nonce_size):
        return b""
    return author + nonce


def first_tile_after(level: int, size: int) -> int:
    """The number of the first tile of a level that has a leaf from ``size`` on under it."""
    return size >> tile_height * (level + 1)
