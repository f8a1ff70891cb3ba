"""Invitations that this node has given out: a file each under HOME/data/invites, named by the hash of the secret.

Law: one code enrols at most one key. An invitation is bound to the first key that shows it, durably and before anything else happens, so
a crash in the middle lets that key try again and no other. The secret itself is never stored. `storenode invite` and the running node
share nothing but this folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from medshard_protocol import canonical
from medshard_protocol.canonical import Fields
from medshard_protocol.errors import Malformed, MedshardError, Refused
from medshard_protocol.ids import Key, key_size
from medshard_protocol.invite import secret_size
from storenode import durable

folder_name: Final = "invites"
version: Final = 1
label_chars_max: Final = 100
file_bytes_max: Final = 1024
open_max: Final = 10_000  # each attempt to join looks at them all
lifetime_s_max: Final = 366 * 86_400

_unknown = Refused("this invitation is not known here, or not any more", hint="ask the institution for a new one")


@dataclass(frozen=True, slots=True)
class Issued:
    """One invitation as the node remembers it. Times are Unix seconds."""

    label: str
    created: int
    expires: int
    key: Key | None = None  # the vault that it is bound to
    used: bool = False  # that vault is enrolled

    def to_bytes(self) -> bytes:
        """The file's content."""
        return canonical.encode([version, self.label, self.created, self.expires, self.key or b"", int(self.used)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Issued:
        """Parse a file's content. Raises Malformed."""
        fields = Fields(canonical.decode(data, bytes_max=file_bytes_max, what="invitation file"), count=6, what="invitation file")
        fields.uint(least=version, most=version)
        label, created, expires = fields.text(most=label_chars_max), fields.uint(), fields.uint()
        key, used = fields.bytes(most=key_size), fields.uint(most=1)
        if len(key) not in (0, key_size):
            raise Malformed("invitation file: a key has 32 bytes")
        return cls(label, created, expires, Key(key) if key else None, bool(used))

    def state(self, now: float) -> str:
        """One word for people."""
        return "used" if self.used else "expired" if now >= self.expires else "begun" if self.key else "open"


class Invites:
    """The folder. Every method is one short look at a small folder; none needs a thread."""

    def __init__(self, data: Path) -> None:
        self._folder = data / folder_name

    def issue(self, label: str, *, now: float, lifetime_s: float) -> bytes:
        """Make an invitation and give its secret, the only time it is seen. Raises ValueError, or Refused when there are too many."""
        if len(label) > label_chars_max or not 0 < lifetime_s <= lifetime_s_max:
            raise ValueError(f"a label has at most {label_chars_max} characters, and an invitation lives at most {lifetime_s_max} s")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._forget(now - lifetime_s_max)
        if len(list(self._folder.iterdir())) >= open_max:
            raise Refused(f"there are {open_max} invitations already", hint=f"remove old ones from {self._folder}")
        secret = os.urandom(secret_size)
        issued = Issued(label, int(now), int(now + lifetime_s))
        durable.create(self._folder / _name(secret), issued.to_bytes())
        return secret

    def claim(self, secret: bytes, key: Key, *, now: float) -> Issued:
        """Bind an invitation to a key, durably; again for the same key is no change. Raises Refused."""
        name = self._find(secret)
        if name is None:
            raise _unknown
        try:
            issued = Issued.from_bytes((self._folder / name).read_bytes())
        except (Malformed, FileNotFoundError):
            raise _unknown from None
        if issued.key is not None and issued.key != key:
            raise Refused("this invitation has been used by another vault", hint="ask the institution for a new one")
        if now >= issued.expires:
            raise Refused("this invitation has expired", hint="ask the institution for a new one")
        if issued.key is None:
            issued = replace(issued, key=key)
            durable.replace(self._folder / name, issued.to_bytes())
        return issued

    def finish(self, secret: bytes, issued: Issued) -> None:
        """Remember that the key is enrolled."""
        durable.replace(self._folder / _name(secret), replace(issued, used=True).to_bytes())

    def all(self) -> list[Issued]:
        """Every invitation that is still remembered, oldest first."""
        return sorted((issued for _, issued in self._read()), key=lambda issued: issued.created)

    def _find(self, secret: bytes) -> str | None:
        """Look the secret up without telling by the time taken how much of it was right: hashed, and against every one."""
        wanted, found = _name(secret), None
        with contextlib.suppress(FileNotFoundError):
            for path in self._folder.iterdir():
                if hmac.compare_digest(path.name.encode(), wanted.encode()):
                    found = path.name
        return found

    def _forget(self, before: float) -> None:
        for path, issued in self._read():
            if issued.expires < before:
                path.unlink(missing_ok=True)

    def _read(self) -> list[tuple[Path, Issued]]:
        found = []
        with contextlib.suppress(FileNotFoundError):
            for path in self._folder.iterdir():
                with contextlib.suppress(MedshardError, OSError):
                    found.append((path, Issued.from_bytes(path.read_bytes())))
        return found


def _name(secret: bytes) -> str:
    return hashlib.sha256(b"medshard/invite/v1" + secret).hexdigest()
