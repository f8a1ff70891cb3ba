"""What this node's audits found of each shard and each node, kept in one small SQLite file through restarts.

Law: a finding is this node's own; others make theirs. A shard is missing when its holder said so twice some time apart or was caught in a
lie, and a node is silent when it answered nothing for longer than a node is away for repairs of its own: one failure of a disk or a line
is never enough. The time that this node was itself away counts for nobody's silence. What is good is kept to be shown and goes when there
is too much of it; what is bad stays until it is good again or forgotten. The file is a notebook: a damaged one is put aside and begun anew.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from medshard_protocol.audit import Verdict
from medshard_protocol.ids import FileId, NodeId

file_name: Final = "audit.sqlite"  # below the node's data folder
results_max: Final = 20_000  # good ones; some 16 MiB with the answers
tally_days: Final = 35
asks_max: Final = 1_000_000  # cells; some 100 MiB after 14 years
confirm_s: Final = 60.0  # between two failures that make a finding
gap_s_max: Final = 3600.0  # of silence between two tries that counts
tag_again_s: Final = 30 * 86_400.0  # before one asks for a tag of the same cell again: there are only so many of them
_day_s: Final = 86_400

_schema = """
CREATE TABLE IF NOT EXISTS results(
    file_id BLOB NOT NULL, shard INTEGER NOT NULL, node BLOB NOT NULL, verdict TEXT NOT NULL, bad INTEGER NOT NULL, since REAL NOT NULL,
    checked REAL NOT NULL, times INTEGER NOT NULL, answer BLOB NOT NULL, PRIMARY KEY(file_id, shard)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_age ON results(bad, checked);
CREATE TABLE IF NOT EXISTS nodes(
    node BLOB PRIMARY KEY, answered REAL, tried REAL NOT NULL, silent_since REAL, silent_s REAL NOT NULL, seconds REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tallies(
    day INTEGER NOT NULL, node BLOB NOT NULL, verdict TEXT NOT NULL, count INTEGER NOT NULL, PRIMARY KEY(day, node, verdict)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS asks(
    file_id BLOB NOT NULL, cell INTEGER NOT NULL, at REAL NOT NULL, times INTEGER NOT NULL, PRIMARY KEY(file_id, cell));
CREATE TABLE IF NOT EXISTS notes(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
"""
_columns: Final = "file_id, shard, node, verdict, since, checked, times, answer"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finding:
    """The latest result for one shard. Times are Unix seconds."""

    file_id: FileId
    shard: int
    node: NodeId
    verdict: Verdict
    since: float  # the first of this run of good, or of bad, results
    checked: float  # the last
    times: int
    answer: bytes = b""  # as the node signed it, if it did


@dataclass(frozen=True, slots=True)
class Standing:
    """How one node answers."""

    node: NodeId
    answered: float | None  # last, Unix seconds
    tried: float
    silent_since: float | None
    silent_s: float  # as far as this node was there to hear it
    seconds: float | None  # what its answers take, smoothed


class Findings:
    """Open on a node's data folder. Quick, and safe to call from any thread. A write is durable when it returns."""

    def __init__(self, folder: Path, *, me: NodeId, silence_s: float, confirm_s: float = confirm_s) -> None:
        self._path, self._me, self._silence_s, self._confirm_s = folder / file_name, me, silence_s, confirm_s
        self._lock = threading.RLock()
        self._db = _open(self._path)

    def report(
        self, file_id: FileId, shard: int, node: NodeId, verdict: Verdict, at: float, *, answer: bytes = b"", seconds: float = 0.0
    ) -> None:
        """Note what one audit of one shard found, and how long the answer took."""
        self.report_all([(file_id, shard, node, verdict, answer, seconds)], at)

    def report_all(self, results: Sequence[tuple[FileId, int, NodeId, Verdict, bytes, float]], at: float) -> None:
        """Note several at once."""

        def change(db: sqlite3.Connection) -> None:
            for file_id, shard, node, verdict, answer, seconds in results:
                self._note_result(db, file_id, shard, node, verdict, at, answer)
                if node != self._me:
                    _note_node(db, node, verdict, at, seconds)
                _tally(db, node, verdict, at)
            db.execute("DELETE FROM tallies WHERE day < ?", (int(at) // _day_s - tally_days,))
            over = db.execute("SELECT count(*) FROM results WHERE bad = 0").fetchone()[0] - results_max
            if over > 0:
                oldest = db.execute("SELECT file_id, shard FROM results WHERE bad = 0 ORDER BY checked LIMIT ?", (over,)).fetchall()
                db.executemany("DELETE FROM results WHERE file_id = ? AND shard = ?", oldest)

        self._write(change)

    def note_node(self, node: NodeId, verdict: Verdict, at: float, seconds: float = 0.0) -> None:
        """Note whether a node answered at all, where it was asked for no shard."""
        self._write(lambda db: _note_node(db, node, verdict, at, seconds))

    def missing(self) -> Iterator[Finding]:
        """Shards to be made again: bad beyond doubt, the longest known first. What is on silent nodes beside them: see ``silent``."""
        silent = set(self.silent())
        for finding in self.bad():
            if finding.verdict in (Verdict.LATE, Verdict.REFUSED):
                certain = finding.node in silent or self._refuses(finding)
            elif finding.verdict is Verdict.WRONG or finding.node == self._me:
                certain = True
            else:
                certain = finding.times > 1 and finding.checked - finding.since >= self._confirm_s
            if certain:
                yield finding

    def bad(self) -> list[Finding]:
        """All that was not good when it was last looked at, certain or not, the longest known first."""
        return self._found("WHERE bad = 1 ORDER BY since LIMIT 100000")

    def latest(self, count: int) -> list[Finding]:
        """The latest results."""
        return self._found("ORDER BY checked DESC LIMIT ?", count)

    def of_file(self, file_id: FileId) -> list[Finding]:
        """The latest result for each shard of a file that was ever looked at, by shard."""
        return self._found("WHERE file_id = ? ORDER BY shard", file_id)

    def silent(self) -> dict[NodeId, float]:
        """Nodes that have answered nothing for longer than the grace, and since when. None of them if that is most of those tried: then
        it is this node that is cut off."""
        nodes = self.nodes()
        gone = {each.node: each.silent_since for each in nodes if each.silent_since is not None and each.silent_s >= self._silence_s}
        quiet = sum(1 for each in nodes if each.silent_since is not None)
        return {} if len(nodes) > 1 and 2 * quiet > len(nodes) else gone

    def nodes(self) -> list[Standing]:
        """How each node answers that was ever asked."""
        rows = self._rows("SELECT node, answered, tried, silent_since, silent_s, seconds FROM nodes ORDER BY node")
        return [Standing(NodeId(row[0]), *row[1:]) for row in rows]

    def tallies(self, days: int, at: float) -> dict[NodeId, Counter[Verdict]]:
        """How often each node got which verdict in the last days."""
        told: dict[NodeId, Counter[Verdict]] = {}
        since = int(at) // _day_s - days + 1
        for node, verdict, count in self._rows("SELECT node, verdict, sum(count) FROM tallies WHERE day >= ? GROUP BY 1, 2", since):
            told.setdefault(NodeId(node), Counter())[Verdict(verdict)] = count
        return told

    def forget(self, file_id: FileId, shard: int | None = None) -> None:
        """Drop what is known of a shard that was made again or went elsewhere, or of a whole file that is gone."""
        self._write(
            lambda db: db.execute("DELETE FROM results WHERE file_id = ? AND ? IN (shard, -1)", (file_id, -1 if shard is None else shard))
        )

    def forget_nodes(self, still: Sequence[NodeId]) -> None:
        """Drop the standing of nodes that are not in the roster any more."""
        gone = [(each.node,) for each in self.nodes() if each.node not in set(still)]
        if gone:
            self._write(lambda db: db.executemany("DELETE FROM nodes WHERE node = ?", gone))

    def ask(self, file_id: FileId, cell: int, at: float, *, anyhow: bool = False) -> int:
        """Note that tags of a cell are asked for, if it is time to; how often they were, now included, or 0 if it is not time yet."""
        rows = self._rows("SELECT at, times FROM asks WHERE file_id = ? AND cell = ?", file_id, cell)
        if rows and not anyhow and rows[0][0] > at - tag_again_s:
            return 0
        times = int(rows[0][1]) + 1 if rows else 1

        def change(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO asks VALUES (?, ?, ?, ?)", (file_id, cell, at, times))
            db.execute("DELETE FROM asks WHERE rowid <= (SELECT max(rowid) FROM asks) - ?", (asks_max,))

        self._write(change)
        return times

    def note(self, name: str, value: float | bytes) -> None:
        """Keep a value under a name, such as where the scrub has come to."""
        self._write(lambda db: db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, value)))

    def noted(self, name: str) -> Any:
        """What was kept under a name; None for nothing."""
        rows = self._rows("SELECT value FROM notes WHERE name = ?", name)
        return rows[0][0] if rows else None

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # -- parts

    def _refuses(self, finding: Finding) -> bool:
        return finding.verdict is Verdict.REFUSED and finding.checked - finding.since >= self._silence_s

    def _note_result(
        self, db: sqlite3.Connection, file_id: FileId, shard: int, node: NodeId, verdict: Verdict, at: float, answer: bytes
    ) -> None:
        since, times = at, 1
        row = db.execute(
            "SELECT node, bad, since, times, verdict FROM results WHERE file_id = ? AND shard = ?", (file_id, shard)
        ).fetchone()
        if row is not None and (row[0], row[1]) == (node, verdict.is_bad):
            since, times = min(row[2], at), row[3] + 1
        elif row is not None and (row[0], row[4]) == (node, Verdict.WRONG) and verdict is not Verdict.GOOD:
            return  # who was caught lying is not believed
        values = (file_id, shard, node, verdict.value, verdict.is_bad, since, at, times, answer)
        db.execute("INSERT OR REPLACE INTO results VALUES (?,?,?,?,?,?,?,?,?)", values)

    def _found(self, where: str, *arguments: object) -> list[Finding]:
        rows = self._rows(f"SELECT {_columns} FROM results {where}", *arguments)  # noqa: S608 - all from this file
        return [Finding(FileId(row[0]), row[1], NodeId(row[2]), Verdict(row[3]), *row[4:]) for row in rows]

    def _rows(self, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(sql, arguments).fetchall()
            except (sqlite3.DatabaseError, UnicodeError) as error:
                self._begin_anew(error)
                return []

    def _write(self, change: Any) -> None:
        with self._lock:
            try:
                with self._db:  # commits, or rolls back
                    change(self._db)
            except sqlite3.OperationalError:
                raise
            except (sqlite3.DatabaseError, UnicodeError) as error:
                self._begin_anew(error)

    def _begin_anew(self, error: Exception) -> None:
        if isinstance(error, sqlite3.ProgrammingError):
            raise error  # closed: this node stops
        if isinstance(error, sqlite3.OperationalError) and hasattr(error, "sqlite_errorcode"):
            raise error  # a full or failing disk
        log.error("the audits' findings are damaged and begun anew", extra={"why": str(error)})
        self._db.close()
        _put_aside(self._path)
        self._db = _open(self._path)


def _note_node(db: sqlite3.Connection, node: NodeId, verdict: Verdict, at: float, seconds: float) -> None:
    row = db.execute("SELECT answered, tried, silent_since, silent_s, seconds FROM nodes WHERE node = ?", (node,)).fetchone()
    answered, tried, since, silent_s, usual = row or (None, at, None, 0.0, None)
    if verdict is Verdict.LATE:
        silent_s = 0.0 if since is None else silent_s + min(max(at - tried, 0.0), gap_s_max)
        since = at if since is None else since
    else:
        answered, since, silent_s = at, None, 0.0
        usual = seconds if usual is None else usual + (seconds - usual) / 8
    db.execute("INSERT OR REPLACE INTO nodes VALUES (?,?,?,?,?,?)", (node, answered, at, since, silent_s, usual))


def _tally(db: sqlite3.Connection, node: NodeId, verdict: Verdict, at: float) -> None:
    db.execute(
        "INSERT INTO tallies VALUES (?,?,?,1) ON CONFLICT(day, node, verdict) DO UPDATE SET count = count + 1",
        (int(at) // _day_s, node, verdict.value),
    )


def _open(path: Path) -> sqlite3.Connection:
    try:
        return _connect(path)
    except (sqlite3.DatabaseError, UnicodeError) as error:
        if isinstance(error, sqlite3.OperationalError) and hasattr(error, "sqlite_errorcode"):
            raise
        log.error("the audits' findings are damaged and begun anew", extra={"why": str(error)})
        _put_aside(path)
        return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA busy_timeout=10000")
        if db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("not what was written")
        db.executescript(_schema)
    except BaseException:
        db.close()
        raise
    return db


def _put_aside(path: Path) -> None:
    path.replace(path.with_suffix(".damaged"))
    for other in ("-wal", "-shm"):
        path.with_name(path.name + other).unlink(missing_ok=True)
