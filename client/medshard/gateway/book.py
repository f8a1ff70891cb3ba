"""What a gateway that only sends remembers of what it has stored: enough to know an instance again, and nothing to read.

A row is found by an HMAC of its SOP Instance UID and sealed under a key that is made of that UID as well: whoever has this machine can ask
whether an instance that he can name was sent from it, and learns no name, no UID, no date but the day. What waits in the spool is
remembered in memory alone. Rows are forgotten after a month: by then a scanner has asked for its commitments.

Law: nothing here is the only copy of anything. A file that does not open is begun anew; what was in it is stored once more if it is sent
again. Blocking; safe to call from many threads. The bytes are in docs/formats/spool.md.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import sqlite3
import threading
import time
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medshard.gateway.model import Instance, Place
from medshard.sealing import hkdf
from medshard_protocol import canonical
from medshard_protocol.errors import Full, Malformed

kept_days: Final = 31
row_bytes_max: Final = 1024
day_s: Final = 86_400
nonce_size: Final = 12
_tables: Final = """
CREATE TABLE IF NOT EXISTS stored (token BLOB NOT NULL, content BLOB NOT NULL, day INTEGER NOT NULL, sealed BLOB NOT NULL,
    PRIMARY KEY (token, content)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS stored_by_day ON stored (day);
"""


class Book:
    """The file at ``path``, under a key of 32 bytes; made if it is not there."""

    shared: Final = False

    def __init__(self, path: Path, key: bytes) -> None:
        self._path = path
        self._key = key
        self._lock = threading.RLock()
        self._waiting: dict[str, dict[bytes, Instance]] = {}
        self._queue: dict[tuple[str, bytes], Instance] = {}
        try:
            self._db = self._opened()
        except sqlite3.DatabaseError:
            for end in ("", "-wal", "-shm"):
                Path(f"{path}{end}").unlink(missing_ok=True)
            self._db = self._opened()

    def close(self) -> None:
        """Write down what waits and close."""
        with self._lock, contextlib.closing(self._db):
            self.flush()

    def instances(self, uid: str) -> list[Instance]:
        """All that is known under one SOP Instance UID, the newest first."""
        with self._lock:
            rows = self._db.execute("SELECT content, sealed FROM stored WHERE token = ?", (self._token("uid", uid),)).fetchall()
            found = [each for content, sealed in rows if (each := self._read(uid, content, sealed)) is not None]
            found += [each for (of, _), each in self._queue.items() if of == uid]
            newest = {each.sha256: each for each in [*self._waiting.get(uid, {}).values(), *found]}
        return sorted(newest.values(), key=lambda each: each.received, reverse=True)

    def put(self, instances: Iterable[Instance]) -> None:
        """Remember instances: those with a place until ``flush`` writes them down, the others as long as this process lasts."""
        with self._lock:
            for each in instances:
                if each.place is None:
                    self._waiting.setdefault(each.uid, {})[each.sha256] = each
                    continue
                self._queue[each.uid, each.sha256] = each
                if (waiting := self._waiting.get(each.uid)) is not None:
                    waiting.pop(each.sha256, None)
                    if not waiting:
                        del self._waiting[each.uid]

    def flush(self) -> None:
        """Durable on return; what is older than a month is forgotten. Raises Full."""
        with self._lock:
            today = int(time.time()) // day_s
            rows = [(*self._tokens(each), today, self._sealed(each)) for each in self._queue.values()]
            try:
                with self._db:
                    self._db.execute("BEGIN IMMEDIATE")
                    self._db.executemany("INSERT OR REPLACE INTO stored VALUES (?, ?, ?, ?)", rows)
                    self._db.execute("DELETE FROM stored WHERE day < ?", (today - kept_days,))
            except sqlite3.OperationalError as error:
                raise Full(f"{self._path}: {error}", hint="free some space; what is in the spool stays there") from None
            self._queue.clear()

    def forget_waiting(self, kept: Iterable[tuple[str, bytes]]) -> None:
        """Nothing: what waits is told anew by whoever finds it in the spool."""

    # -- inside

    def _opened(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            os.chmod(self._path, 0o600)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")  # an instance leaves the spool once its row is here
            db.execute("PRAGMA secure_delete = ON")
            db.executescript(_tables)
        except BaseException:
            db.close()
            raise
        return db

    def _token(self, kind: str, text: str) -> bytes:
        return hmac.digest(self._key, f"{kind}/{text}".encode(), sha256)[:16]

    def _tokens(self, each: Instance) -> tuple[bytes, bytes]:
        return self._token("uid", each.uid), self._token("content", f"{each.uid}/{each.sha256.hex()}")

    def _cipher(self, uid: str) -> AESGCM:
        return AESGCM(hkdf(self._key, uid.encode(), b"medshard/sender/v1/stored/row"))

    def _sealed(self, each: Instance) -> bytes:
        assert each.place is not None
        place, nonce = each.place, os.urandom(nonce_size)
        plain = canonical.encode([each.sha256, each.sop_class, each.size, each.received, place.file_id, place.ledger_index])
        return nonce + self._cipher(each.uid).encrypt(nonce, plain, b"".join(self._tokens(each)))

    def _read(self, uid: str, content: bytes, sealed: bytes) -> Instance | None:
        """The instance of a row; None for one that was altered, which is then as if it were not there."""
        try:
            plain = self._cipher(uid).decrypt(sealed[:nonce_size], sealed[nonce_size:], self._token("uid", uid) + content)
            f = canonical.Fields(canonical.decode(plain, bytes_max=row_bytes_max, what="stored instance"), count=6, what="stored instance")
            digest, sop_class, size, received = f.bytes(exactly=32), f.text(most=64), f.uint(), f.uint()
            return Instance("", "", uid, size, digest, received, {"sop-class": sop_class}, Place(f.bytes(exactly=32), None, f.uint()))
        except (InvalidTag, ValueError, Malformed):
            return None
