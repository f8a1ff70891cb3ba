"""Where a log's files are read: a folder, a node's database, or anywhere on the web.

Law: a source hands out bytes by their C2SP paths (``checkpoint``, ``tile/0/000``, ``tile/entries/000``) and vouches for none of them.
Whoever reads checks. A folder and a database answer at once; the web answers within a time limit, with a limited number of bytes.
"""

from __future__ import annotations

import http.client
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import urlsplit

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, note_bytes_max
from medshard_protocol.entries import entry_bytes_max
from medshard_protocol.errors import Absent, Malformed, Refused, Unavailable
from medshard_protocol.merkle import sha256
from medshard_protocol.rosters import chain_bytes_max
from medshard_protocol.tiles import TileName, Tree, pack_bundle, tile_bytes, tile_width

if TYPE_CHECKING:
    from storenode.ledger.engine import Reader

wait_s: Final = 30.0
full_age_s_max: Final = 3600
cosignature_bytes: Final = 72
file_bytes_max: Final = max(note_bytes_max, chain_bytes_max, tile_width * (entry_bytes_max + 2))


class Source(Protocol):
    """Something that has a log's files."""

    def read(self, path: str) -> bytes:
        """The file at this path. Raises Absent, Refused, Unavailable, or Malformed for one that is too large."""


class Folder:
    """A log in static files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, path: str) -> bytes:
        """The file at this path."""
        try:
            with open(self.folder / path, "rb") as file:
                data = file.read(file_bytes_max + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise Absent(f"{self.folder / path} does not exist") from None
        return _limited(data, path)


class Web:
    """A log below a URL. ``connect`` opens a connection to a given host and port: how it is secured is its business.

    A ``node`` is asked for a checkpoint with both kinds of cosignature first.
    """

    def __init__(self, url: str, connect: Callable[[str, int], http.client.HTTPConnection] | None = None, *, node: bool = False) -> None:
        self._node = node
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("the address of a log begins with https://")
        self._host, self._port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._prefix = parts.path.rstrip("/")
        self._connect = connect or (_https if parts.scheme == "https" else _http)
        self._own = threading.local()  # a connection for each thread

    def read(self, path: str) -> bytes:
        """The file at this path."""
        if path == "checkpoint" and self._node:
            try:
                return self._read("checkpoint?full=1")
            except Unavailable:
                pass  # no quorum gives its second kind now; the other one does
        return self._read(path)

    def _read(self, path: str) -> bytes:
        where = f"{self._prefix}/{path}"
        for fresh in (False, True):  # an idle connection may have been closed meanwhile
            connection = getattr(self._own, "connection", None)
            if connection is None or fresh:
                connection = self._own.connection = self._connect(self._host, self._port)
            try:
                connection.request("GET", where, headers={"Accept-Encoding": "identity"})
                response = connection.getresponse()
                data = response.read(file_bytes_max + 1)
                if response.status == 404:
                    raise Absent(f"{self._host} has no {path}")
                if response.status == 403:
                    hint = "name an identity that an institution vouches for: --certificate and --key; or ask for an export"
                    raise Refused(f"{self._host} shows its log to members of the consortium only", hint=hint)
                if response.status != 200 or response.headers.get("Content-Encoding", "identity") != "identity":
                    raise Unavailable(f"{self._host} answers {response.status} for {path}")
                return _limited(data, path)
            except ssl.SSLCertVerificationError as error:
                hint = "a node is recognised by the consortium's genesis file: --genesis FILE"
                raise Unavailable(f"{self._host} is nobody that this machine knows ({error.verify_message})", hint=hint) from None
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                why = error
        raise Unavailable(f"{self._host} does not answer ({why or type(why).__name__})")


class Database:
    """The log in a node's database, read beside the running node. Shows the log as of the newest published checkpoint it has.

    ``folder`` is the log's in the node's data.
    """

    def __init__(self, reader: Reader, folder: Path) -> None:
        self._folder = folder
        self._reader = reader
        self._checkpoint = self._newest()
        size = _size_of(self._checkpoint)
        newest = _size_of(reader.memory().published or self._checkpoint)
        self.later = newest - size  # entries whose head has one kind of cosignature yet
        last = reader.entries(size - size % tile_width, size)
        self._tree = Tree.load(size, [merkle.leaf_hash(entry, sha256) for entry in last], reader.tile)

    def read(self, path: str) -> bytes:
        """The file at this path."""
        if path == "checkpoint":
            return self._checkpoint
        if not path.startswith("tile/"):
            raise Absent(f"a node's database has no {path}")
        name = TileName.from_path(path.removeprefix("tile/"))
        if not name.within(self._tree.size):
            raise Absent(f"the log has no {path}")
        if name.level is not None:
            return self._tree.tile(name)
        return pack_bundle(self._reader.entries(name.index * tile_width, name.index * tile_width + name.width))

    def _newest(self) -> bytes:
        full = self._folder / "full-checkpoint"
        notes = [note for note in ((full.read_bytes() if full.exists() else b""), self._reader.memory().published) if note]
        if not notes:
            raise Absent("this node's database knows of no published checkpoint yet", hint="wait until one is a second old, and try again")
        newest = max(map(_time_of, notes))  # the first carries both kinds of cosignature, and may be a little older
        return next(note for note in notes if _time_of(note) >= newest - full_age_s_max)


def size_of(name: TileName) -> int | None:
    """How many bytes a hash tile has; None for a bundle, whose entries differ."""
    return None if name.level is None else name.width * tile_bytes // tile_width


def _size_of(note: bytes) -> int:
    return Checkpoint.from_text(Note.from_bytes(note).text).size


def _time_of(note: bytes) -> int:
    """When a published note was cosigned; taken from this node's own disk, so it is not checked again."""
    times = [int.from_bytes(line.value[:8], "big") for line in Note.from_bytes(note).signatures if len(line.value) == cosignature_bytes]
    return max(times, default=0)


def _limited(data: bytes, path: str) -> bytes:
    if len(data) > file_bytes_max:
        raise Malformed(f"{path}: more than {file_bytes_max} bytes, which no file of a log has")
    return data


def _https(host: str, port: int) -> http.client.HTTPConnection:
    return http.client.HTTPSConnection(host, port, timeout=wait_s, context=ssl.create_default_context())


def _http(host: str, port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(host, port, timeout=wait_s)
