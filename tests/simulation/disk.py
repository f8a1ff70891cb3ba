"""The disks of a world: real files and real SQLite, of which a power cut leaves what was synced, and of the rest what the seed says.

Law: the only calls that make anything durable are ``os.fsync`` and a commit of SQLite under ``synchronous=FULL``; so those are what is
watched. At a cut the surviving files are copied to a new folder, and what still runs on the old one changes nothing any more. A file that
was not synced may come back empty, in part, with a hole or whole; a name whose folder was not synced may be there or not.
"""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from tests.simulation import world as worlds
from tests.simulation.world import PowerCut, here

real = SimpleNamespace(replace=os.replace, fsync=os.fsync, fdatasync=os.fdatasync, statvfs=os.statvfs, connect=sqlite3.connect)
_left: list[sqlite3.Connection] = []  # open on databases of which this process has a copy: to close them would write to those
block = 512  # a disk's sector: what is torn is torn there


class Disk:
    """One host's. ``folder`` is another one after each cut."""

    def __init__(self, root: Path) -> None:
        self._root, self._rng = root, random.Random()
        self._cuts = 0
        self.folder = root / "0"
        self.folder.mkdir(parents=True)
        self.full = False
        self.tells = True  # how much room there is; else a write finds out
        self.cut_after: int | None = None  # so many syncs from now the power fails, before or after the last of them
        self.kills = False  # then: it is the process that is killed, after what it wrote and before that was synced
        self._files: dict[int, bytes] = {}  # by inode: content that was synced
        self._names: dict[str, dict[str, int]] = {}  # by folder: names that were synced
        self._wals: dict[str, int] = {}  # by database: bytes of its write-ahead log that were synced
        self.connections: dict[Connection, None] = {}

    def rest(self) -> None:
        """Let all that was written be in the databases themselves."""
        for connection in self.connections:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def become(self, seed: int) -> None:
        """Be this seed's disk, with a copy of what was on it: the same path leads there now."""
        self._rng.seed(f"disk {seed} {self._root}")
        for connection in list(self.connections):
            connection.reopen()
        self.settle()

    # -- what the product does

    def sync(self, descriptor: int) -> None:
        """A file or a folder is to be durable."""
        cut = self._count()
        if cut == "before":
            self._cut()
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        path = os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(os.getcwd() + "/")
        status = os.fstat(descriptor)
        if cut and self.kills:
            self._cut()
        if stat.S_ISDIR(status.st_mode):
            self._names[path] = _names(path)
        elif path.endswith("-wal"):
            self._wals[path.removesuffix("-wal")] = status.st_size
        else:
            self._files[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
        if cut:
            self._cut()

    def commit(self, connection: Connection) -> bool:
        """A transaction is about to be committed. Raises what SQLite would; whether the power is to fail right after it."""
        cut = self._count()
        if cut == "before":
            self._cut()
        if self.full and connection.total_changes > connection.changes_before:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_FULL, "SQLITE_FULL"
            raise error
        return cut == "after"

    def committed(self, path: str, cut: bool) -> None:
        """A transaction has been committed under synchronous=FULL."""
        if cut and self.kills:
            self._cut()
        self._wals[path] = _size(path + "-wal")
        if cut:
            self._cut()

    def _count(self) -> str:
        if self.cut_after is None:
            return ""
        self.cut_after -= 1
        if self.cut_after > 0:
            return ""
        self.cut_after = None
        return self._rng.choice(("before", "after"))

    def _cut(self) -> None:
        machine = here.get()
        assert machine is not None
        if self.kills:
            machine.host.kill()
        else:
            machine.host.cut(silent=True)
        raise PowerCut

    # -- what a power cut leaves, and what a killed process does

    def lose_process(self) -> None:
        """Copy all that was written. No more of it is synced than was."""
        old, names, files, wals = self.folder, self._names, self._files, self._wals
        self._cuts += 1
        self.folder = self._root / str(self._cuts)
        self._names, self._files, self._wals = {}, {}, {}
        for at, _, _ in os.walk(old):
            to = self.folder / Path(at).relative_to(old)
            to.mkdir()
            now, durable, known = _names(at), names.get(at, {}), self._names.setdefault(str(to), {})
            for name, inode in now.items():
                if not name.endswith(("-shm", "-journal")):
                    (to / name).write_bytes(Path(at, name).read_bytes())
                    self._files[os.stat(to / name).st_ino] = files.get(inode, b"")
                    if name.endswith(".sqlite"):
                        self._wals[str(to / name)] = wals.get(os.path.join(at, name), 0)
            copied = {inode: os.stat(to / name).st_ino for name, inode in now.items() if (to / name).exists()}
            for name, inode in durable.items():
                known[name] = copied.get(inode, -inode)  # whose name has gone since
                self._files.setdefault(known[name], files.get(inode, b""))

    def lose_power(self) -> None:
        """Copy what survives."""
        old, self._cuts = self.folder, self._cuts + 1
        new = self._root / str(self._cuts)
        new.mkdir()
        for at, folders, _ in os.walk(old):
            folders.sort()
            now, durable = _names(at), self._names.get(at, {})
            for name in sorted({*now, *durable}):
                self._survive(Path(at), name, now.get(name), durable.get(name), new / Path(at).relative_to(old))
        self.folder = new
        self.settle()

    def settle(self) -> None:
        """Take all that is there for durable."""
        self._files, self._names, self._wals = {}, {}, {}
        for at, _, names in os.walk(self.folder):
            for name in names:
                self._files[os.stat(os.path.join(at, name)).st_ino] = Path(at, name).read_bytes()
            self._names[at] = _names(at)
            for name in names:
                if name.endswith(".sqlite"):
                    self._wals[os.path.join(at, name)] = _size(os.path.join(at, name) + "-wal")

    def _survive(self, folder: Path, name: str, now: int | None, durable: int | None, to: Path) -> None:
        path = folder / name
        if name.endswith(("-shm", "-journal")):
            return
        if name.endswith(".sqlite"):
            data = path.read_bytes() if now is not None else None
        elif name.endswith(".sqlite-wal"):
            data = self._torn_log(path) if now is not None else None
        else:
            chosen = now if now == durable or self._rng.random() < 0.5 else durable
            data = None if chosen is None else self._content(path, chosen, is_there=chosen == now)
        if data is not None:
            to.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes(data)

    def _torn_log(self, path: Path) -> bytes:
        data = path.read_bytes()
        synced = min(len(data), self._wals.get(str(path).removesuffix("-wal"), 0))
        more = self._rng.choice((0, 0, self._rng.randrange(len(data) - synced + 1), len(data) - synced))
        return data[: synced + more]

    def _content(self, path: Path, inode: int, *, is_there: bool) -> bytes:
        synced = self._files.get(inode, b"")
        now = path.read_bytes() if is_there else synced
        if now == synced:
            return now
        part = now[: self._rng.randrange(len(now) + 1) // block * block]
        hole = bytes(len(part)) + now[len(part) :]
        return self._rng.choice((synced, synced, part, hole, now))


class Connection:
    """A connection whose commits are watched, and which can be opened again on a copy of its database."""

    def __init__(self, disk: Disk, path: str, *values: Any, **keywords: Any) -> None:
        self.disk, self.path = disk, path
        self._values, self._keywords = values, keywords
        self._settings: list[str] = []
        self.full_sync = True
        self._is_old = False
        self._open()
        disk.connections[self] = None

    def _open(self) -> None:
        uri = f"file:{quote(self.path)}?vfs=unix-excl"  # locks for this process alone: far fewer system calls
        self._now: sqlite3.Connection = real.connect(uri, *self._values, uri=True, **self._keywords)
        self._now.execute("PRAGMA wal_autocheckpoint=0")
        self.changes_before = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def reopen(self) -> None:
        """Open the copy when it is first used. What is left behind stays open, since to close it would write."""
        assert not self._now.in_transaction
        _left.append(self._now)
        self._is_old = True

    @property
    def _real(self) -> sqlite3.Connection:
        if self._is_old:
            self._is_old = False
            self._open()
            for setting in self._settings:
                self._now.execute(setting)
        return self._now

    def close(self) -> None:
        self.disk.connections.pop(self, None)
        if not self._is_old:
            self._now.close()

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        cut = self.disk.commit(self) if sql.startswith("COMMIT") else False
        cursor = self._real.execute(sql, *values)
        if sql.startswith("PRAGMA"):
            self._look(sql)
        elif not self._real.in_transaction:
            self._after(cut)
        return cursor

    def executescript(self, sql: str) -> sqlite3.Cursor:
        cursor = self._real.executescript(sql if "BEGIN" in sql else f"BEGIN; {sql}; COMMIT;")  # of which each part would be a commit
        self._after(False)
        return cursor

    def commit(self) -> None:
        cut = self.disk.commit(self)
        self._real.commit()
        self._after(cut)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        cut = self.disk.commit(self) if error is None and self._real.in_transaction else False
        result = self._real.__exit__(kind, error, trace)
        self._after(cut)
        return result

    def _look(self, sql: str) -> None:
        name, _, value = sql.removeprefix("PRAGMA ").partition("=")
        if value:
            self._settings.append(sql)
        if name.strip().lower() == "synchronous" and value:
            self.full_sync = value.strip().upper() in ("FULL", "EXTRA", "2", "3")

    def _after(self, cut: bool) -> None:
        self.changes_before = self._real.total_changes
        if self.full_sync:
            self.disk.committed(self.path, cut)
        elif cut:
            self.disk._cut()


def _names(folder: str) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.inode() for entry in entries if entry.is_file(follow_symlinks=False)}


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _disk() -> Disk | None:
    machine = here.get() if worlds.world is not None else None
    return machine.host.disk if machine is not None else None


def _fsync(descriptor: int) -> None:
    disk = _disk()
    if disk is None:
        real.fsync(descriptor)
    else:
        disk.sync(descriptor if isinstance(descriptor, int) else descriptor.fileno())


def _replace(source: Any, target: Any) -> None:
    """Here a folder is durable as soon as it is there; so the 256 that a node makes for its shards are made when a file first needs one."""
    try:
        real.replace(source, target)
    except FileNotFoundError:
        if _disk() is None or not os.path.exists(source):
            raise
        os.mkdir(os.path.dirname(target))
        real.replace(source, target)


def _connect(path: Any, *values: Any, **keywords: Any) -> Any:
    disk = _disk()
    if disk is None or str(path).startswith("file:"):
        return real.connect(path, *values, **keywords)
    return Connection(disk, str(path), *values, **keywords)


def _statvfs(path: Any) -> Any:
    disk = _disk()
    if disk is None:
        return real.statvfs(path)
    return SimpleNamespace(f_bavail=0 if disk.full and disk.tells else 1 << 30, f_frsize=4096)


os.fsync = os.fdatasync = _fsync
os.replace = _replace
os.statvfs = _statvfs  # type: ignore[assignment]
sqlite3.connect = _connect
