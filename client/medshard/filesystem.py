"""The file system ``medshard://`` of fsspec: pydicom, pandas and many others open stored files by it, as if they lay in a folder.

    medshard://sha256/HEX                               any file, by its SHA-256
    medshard://studies/STUDY_UID/SERIES_UID/SOP_UID     DICOM instances, by their UIDs

Read-only. What is read is announced on the ledger as any other read is, and only the stripes it lies in are fetched (ranges.py).
Listings come from the vault's local index; of two files with the same UIDs the one stored last is given. Errors are those of Python
for files, with the vault's words in them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from medshard.blocking import BlockingVault
from medshard.cli import passphrase
from medshard.grants import purpose_number
from medshard.model import Row
from medshard.ranges import Span
from medshard.vault import Vault
from medshard_protocol.errors import Absent, MedshardError, Refused, Unavailable

read_bytes: Final = 256 * 1024  # a file object asks for so much at a time; stripes are kept below, so that more would only be copied more
_levels: Final = ("study-uid", "series-uid", "sop-uid")

Result = TypeVar("Result")
Tree = dict[str, dict[str, dict[str, Row]]]


class MedshardFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """``home`` is the vault's folder [MEDSHARD_HOME, else ~/.medshard], ``purpose`` the word that the ledger gives for the reads.

    The passphrase is taken from MEDSHARD_PASSPHRASE, from the file that ``passphrase_file`` or MEDSHARD_PASSPHRASE_FILE names, or asked for
    on the terminal. It is no option itself: options are written into catalogs and sent to workers.
    """

    protocol = "medshard"
    root_marker = ""

    def __init__(self, home: str | None = None, passphrase_file: str | None = None, purpose: str = "", **options: Any) -> None:
        super().__init__(**options)
        folder = Path(home or os.environ.get("MEDSHARD_HOME") or Path.home() / ".medshard").expanduser()
        self._purpose = int(purpose_number(purpose)) if purpose else 0
        self._vault = BlockingVault(folder, lambda: passphrase.read(Path(passphrase_file)) if passphrase_file else passphrase.known(folder))
        self._tree: Tree | None = None

    def close(self) -> None:
        """Close the vault. It is opened again when something is read."""
        self._vault.close()

    def invalidate_cache(self, path: str | None = None) -> None:
        """Look into the index again before the next listing."""
        self._tree = None

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        """List a folder, or one file."""
        path = self._strip_protocol(path)
        if options.get("refresh"):
            self.invalidate_cache()
        parts = path.split("/") if path else []
        match parts:
            case []:
                found = [_folder("sha256"), _folder("studies")]
            case ["sha256"]:
                found = [self._file(f"sha256/{row.sha256.hex()}", row) for row in self._call(_all_rows)]
            case ["studies", *uids] if len(uids) < len(_levels):
                found = [
                    self._file(f"{path}/{name}", each) if isinstance(each, Row) else _folder(f"{path}/{name}")
                    for name, each in self._branch(path, uids).items()
                ]
            case _:
                found = [self.info(path)]
        return found if detail else [each["name"] for each in found]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Size, kind and, of a file, its SHA-256, media type and attributes. Raises FileNotFoundError."""
        path = self._strip_protocol(path)
        match path.split("/") if path else []:
            case [] | ["sha256"] | ["studies"]:
                return _folder(path)
            case ["sha256", digits]:
                sha256 = _sha256(digits, path)

                async def look(vault: Vault) -> tuple[Span, Row | None]:
                    return await vault.ranges.find(sha256), vault.row(sha256)

                span, row = self._call(look, path)
                return self._file(path, row) if row else _plain(path, span.size, sha256)
            case ["studies", *uids] if len(uids) <= len(_levels):
                branch = self._branch(path, uids)
                return self._file(path, branch) if isinstance(branch, Row) else _folder(path)
        raise _not_found(path)

    def checksum(self, path: str) -> int:
        """A number that changes when the file does."""
        return int.from_bytes(bytes.fromhex(self.info(path)["sha256"])[:8])

    def ukey(self, path: str) -> str:
        """The file's SHA-256: it never changes."""
        return str(self.info(path)["sha256"])

    def created(self, path: str) -> datetime:
        """When it was stored."""
        return datetime.fromtimestamp(self.info(path).get("put_time", 0), UTC)

    modified = created  # what is stored stays as it is

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """The bytes of a file, or of a part: negative places count from the end."""
        about = self.info(path)
        if about["type"] != "file":
            raise IsADirectoryError(errno.EISDIR, "is a folder", path)
        low, high, _ = slice(start, end).indices(about["size"])
        return self._read(about, low, high) if low < high else b""

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> _File:
        if mode != "rb":
            _refuse(path)
        about = self.info(path)
        if about["type"] != "file":
            raise IsADirectoryError(errno.EISDIR, "is a folder", path)
        options.pop("autocommit", None)
        return _File(self, path, mode, block_size or read_bytes, about, **options)

    def _read(self, about: Mapping[str, Any], start: int, stop: int) -> bytes:
        sha256, purpose = bytes.fromhex(about["sha256"]), self._purpose

        async def work(vault: Vault) -> bytes:
            return await vault.ranges.read(await vault.ranges.find(sha256), start, stop, purpose=purpose)

        return self._call(work, about["name"])

    def _call(self, work: Callable[[Vault], Coroutine[Any, Any, Result]], path: str = "") -> Result:
        try:
            return self._vault.call(work)
        except MedshardError as error:
            raise _translated(error, path) from error

    def _branch(self, path: str, uids: list[str]) -> Any:
        """What lies under these UIDs: a Row under all three. The index is looked into once more for one that is not there."""
        for fresh in (False, True):
            if fresh or self._tree is None:
                self._tree = self._call(_studies)
            branch: Any = self._tree
            for uid in uids:
                branch = branch.get(uid) if isinstance(branch, dict) else None
            if branch is not None:
                return branch
        raise _not_found(path)

    def _file(self, path: str, row: Row) -> dict[str, Any]:
        about = _plain(path, row.size, row.sha256)
        return about | {"media_type": row.media_type, "attributes": dict(row.attributes), "put_time": row.put_time}

    def _changing(self, path: Any = "", *others: Any, **options: Any) -> NoReturn:
        _refuse(path if isinstance(path, str) else "")

    mkdir = makedirs = rmdir = _rm = rm = rm_file = cp_file = copy = mv = pipe_file = put_file = put = touch = _changing


class _File(AbstractBufferedFile):  # type: ignore[misc]
    """A stored file, open for reading."""

    def __init__(self, fs: MedshardFileSystem, path: str, mode: str, block_size: int, about: Mapping[str, Any], **options: Any) -> None:
        self._about = about
        super().__init__(fs, path, mode, block_size=block_size, size=about["size"], **options)

    def _fetch_range(self, start: int, end: int) -> bytes:
        fetched: bytes = self.fs._read(self._about, start, end)
        return fetched


async def _all_rows(vault: Vault) -> list[Row]:
    return list({row.sha256: row for row in vault.ls()}.values())


async def _studies(vault: Vault) -> Tree:
    tree: Tree = {}
    for row in [*vault.ls(shared=True), *vault.ls()]:
        study, series, sop = (row.attributes.get(level, "") for level in _levels)
        if study and series and sop:
            tree.setdefault(study, {}).setdefault(series, {})[sop] = row
    return tree


def _folder(path: str) -> dict[str, Any]:
    return {"name": path, "size": 0, "type": "directory"}


def _plain(path: str, size: int, sha256: bytes) -> dict[str, Any]:
    return {"name": path, "size": size, "type": "file", "sha256": sha256.hex()}


def _sha256(digits: str, path: str) -> bytes:
    try:
        if len(digits) == 64:
            return bytes.fromhex(digits)
    except ValueError:
        pass
    raise FileNotFoundError(errno.ENOENT, "not a SHA-256: expected 64 hexadecimal digits", path)


def _not_found(path: str) -> FileNotFoundError:
    shapes = "medshard://sha256/HEX or medshard://studies/STUDY/SERIES/INSTANCE"
    return FileNotFoundError(errno.ENOENT, f"this vault has no such file; paths are {shapes}", path)


def _refuse(path: str) -> NoReturn:
    raise OSError(errno.EROFS, "medshard:// is for reading; store files with `medshard put` or Vault.put", path)


def _translated(error: MedshardError, path: str) -> OSError:
    text = f"{error}. {error.hint}" if error.hint else str(error)
    for kind, number in ((Absent, errno.ENOENT), (Refused, errno.EACCES), (Unavailable, errno.ECONNREFUSED)):
        if isinstance(error, kind):
            return OSError(number, text, path)  # which Python makes FileNotFoundError, PermissionError, ConnectionRefusedError
    return OSError(errno.EIO, text, path)
