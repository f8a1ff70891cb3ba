"""Tokens for HTTP: who may use the gateway over the web. On the disk there are only their hashes.

A token has 256 random bits, so that one SHA-256 is all the stretching it needs. The file is read again when it changes: a token that is
taken back is refused from the next request on.

Law: the file is written whole, under a new name, and then renamed. A token is shown once, when it is made.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from medshard.durable import write_durably
from medshard_protocol.errors import Absent, Conflict, Malformed

file_bytes_max: Final = 1024 * 1024
_name_form: Final = re.compile(r"[^\x00-\x1f\x7f]{1,64}")


@dataclass(frozen=True, slots=True)
class Token:
    """One token, as the file has it."""

    name: str
    sha256: str
    added: int  # Unix seconds


def tokens_file(folder: Path) -> Path:
    """Where a gateway's tokens are, in its folder."""
    return folder / "tokens.json"


class Tokens:
    """Those in one file, which need not exist."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._known: tuple[Token, ...] = ()

    def all(self) -> tuple[Token, ...]:
        """Every token. Raises Malformed for a file that is none."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            self._seen, self._known = None, ()
            return ()
        seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen != self._seen:
            self._known = self._read()
            self._seen = seen
        return self._known

    def add(self, name: str) -> str:
        """Make a token; it is written nowhere. Raises Conflict for a name that has one, Malformed for one that is none."""
        if not _name_form.fullmatch(name):
            raise Malformed("a token's name has 1 to 64 characters, and no control characters")
        if any(each.name == name for each in self.all()):
            raise Conflict(f"there is a token {name!r} already", hint="take it back first: medshard gateway token rm NAME")
        secret = secrets.token_urlsafe(32)
        self._write([*self.all(), Token(name, _hash(secret), int(time.time()))])
        return secret

    def remove(self, name: str) -> None:
        """Take a token back. Raises Absent."""
        left = [each for each in self.all() if each.name != name]
        if len(left) == len(self.all()):
            raise Absent(f"there is no token {name!r}", hint="medshard gateway token ls shows them")
        self._write(left)

    def whose(self, secret: str) -> str | None:
        """The name of the token that was shown; None for one that is not here."""
        shown = _hash(secret)
        found = None
        for each in self.all():
            if hmac.compare_digest(each.sha256, shown):
                found = each.name
        return found

    def _write(self, tokens: list[Token]) -> None:
        text = json.dumps({"version": 1, "tokens": [{"name": t.name, "sha256": t.sha256, "added": t.added} for t in tokens]}, indent=1)
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_durably(self._path, text.encode() + b"\n", mode=0o600)
        self._seen = None

    def _read(self) -> tuple[Token, ...]:
        try:
            with self._path.open("rb") as file:
                said = json.loads(file.read(file_bytes_max))
            return tuple(Token(str(each["name"]), str(each["sha256"]), int(each["added"])) for each in said["tokens"])
        except (ValueError, KeyError, TypeError):
            raise Malformed(f"{self._path} is not a file of tokens", hint="move it away, and make the tokens again") from None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()
