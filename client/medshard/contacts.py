"""Names for other vaults' keys, for this vault's eyes alone.

A file of its own and not a part of the index: names that somebody typed in stand nowhere else, and the index may be thrown away at any
time. It is sealed, because who knows whom is nobody's business; losing it costs names, never files.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from hmac import digest
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medshard.durable import write_durably
from medshard.text import quoted
from medshard_protocol import canonical
from medshard_protocol.canonical import Fields
from medshard_protocol.errors import Absent, Conflict, Damaged, Malformed
from medshard_protocol.ids import Key, key_from_hex, key_size

contacts_max: Final = 10_000
name_chars_max: Final = 64
_bytes_max: Final = 2 * 2**20
_bound: Final = b"medshard/contacts/v1"
_key_form = re.compile(r"[0-9a-fA-F]{64}\Z")
_name_form = re.compile(r"[^\x00-\x20\x7f-\xa0]([^\x00-\x1f\x7f-\x9f]*[^\x00-\x20\x7f-\xa0])?\Z")


class Contacts:
    """The contacts in the file at ``path``, sealed under a key that comes of ``key``. Several processes may use it at a time."""

    def __init__(self, path: Path, key: bytes) -> None:
        self._path = path
        self._cipher = AESGCM(digest(key, _bound, sha256))

    def all(self) -> Mapping[str, Key]:
        """Every contact, by name. Raises Damaged."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            plain = self._cipher.decrypt(data[:12], data[12:], _bound)
            return self._parse(plain)
        except (InvalidTag, ValueError, Malformed):
            hint = "Move it away, and add the contacts again: no file depends on it."
            raise Damaged(f"{self._path} does not open: it is another vault's, or was changed", hint=hint) from None

    def add(self, name: str, key: Key) -> None:
        """Give a key a name. Raises Conflict if the name means another key, Malformed for what is no name."""
        if len(name) > name_chars_max or not _name_form.match(name) or _key_form.match(name):
            raise Malformed(f"{quoted(name)} is no name for a contact", hint=f"A name has 1 to {name_chars_max} printable characters.")
        with self._changing() as names:
            known = _found(names, name)
            if known is not None and names[known] != key:
                raise Conflict(f"{known} is another key already", hint=f"Remove it first: medshard contacts rm {quoted(known)}")
            if len(names) >= contacts_max:
                raise Conflict(f"there are {contacts_max} contacts already")
            names[known or name] = key

    def remove(self, name: str) -> Key:
        """Forget a name; the key it meant. Raises Absent."""
        with self._changing() as names:
            known = _found(names, name)
            if known is None:
                raise _unknown(name)
            return names.pop(known)

    def key(self, text: str) -> Key:
        """The key that somebody means by a name or by the key itself. Raises Absent."""
        if _key_form.match(text):
            return key_from_hex(text.lower())
        names = self.all()
        known = _found(names, text)
        if known is None:
            raise _unknown(text)
        return names[known]

    def names(self) -> dict[Key, str]:
        """What each key is called; where it has two names, the first of them."""
        names: dict[Key, str] = {}
        for name, key in sorted(self.all().items()):
            names.setdefault(key, name)
        return names

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Key]]:
        lock = os.open(self._path.with_name(self._path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            names = dict(self.all())
            yield names
            plain = canonical.encode([1, [[name, names[name]] for name in sorted(names)]])
            nonce = os.urandom(12)
            write_durably(self._path, nonce + self._cipher.encrypt(nonce, plain, _bound), mode=0o600)
        finally:
            os.close(lock)

    @staticmethod
    def _parse(plain: bytes) -> dict[str, Key]:
        fields = Fields(canonical.decode(plain, bytes_max=_bytes_max, what="contacts"), count=2, what="contacts")
        fields.uint(least=1, most=1)
        names: dict[str, Key] = {}
        for item in fields.list(most=contacts_max):
            one = Fields(item, count=2, what="contact")
            name = one.text(most=name_chars_max)
            names[name] = Key(one.bytes(exactly=key_size))
        return names


def _found(names: Mapping[str, Key], name: str) -> str | None:
    """The contact's name as it was typed in, whatever case it is asked for in."""
    return name if name in names else next((known for known in names if known.casefold() == name.casefold()), None)


def _unknown(name: str) -> Absent:
    hint = "`medshard contacts ls` lists them; a key is 64 hexadecimal digits, as `medshard key` prints it."
    return Absent(f"there is no contact named {quoted(name)}", hint=hint)
