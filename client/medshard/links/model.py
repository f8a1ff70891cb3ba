"""A link: what it says, and what the vault remembers of it.

Law: a link carries the key of what is sent under it and of nothing else, and an address that cannot be guessed. The vault's keys are not in
it and cannot be had from it. The text is that of SMART Health Links: ``shlink:/`` and base64url JSON, behind a page that opens it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import time
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import urlsplit

from medshard_protocol import canonical
from medshard_protocol.canonical import Fields
from medshard_protocol.errors import Malformed

scheme: Final = "shlink:/"
link_chars_max: Final = 4096
id_size: Final = 32  # 256 bits: an address is found by whoever has the link alone
key_size: Final = 32
label_chars_max: Final = 80  # of the specification
documents_max: Final = 5000
wrong_max: Final = 10  # passcodes, all together; then the link is dead
passcode_n: Final = 1 << 14  # scrypt: a passcode has few bits, and the note is sealed with the vault's key anyway


@dataclass(frozen=True, slots=True)
class Link:
    """What whoever has a link knows."""

    url: str  # of the manifest
    key: bytes = field(repr=False)
    until: int = 0  # Unix seconds; 0 for no end
    passcode: bool = False
    label: str = ""

    def to_text(self, viewer: str = "") -> str:
        """The link; behind the address of a page that opens it, if there is one."""
        told: dict[str, object] = {"url": self.url, "key": _base64(self.key), "v": 1}
        if self.until:
            told["exp"] = self.until
        if self.passcode:
            told["flag"] = "P"
        if self.label:
            told["label"] = self.label
        text = scheme + _base64(json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode())
        return f"{viewer}#{text}" if viewer else text

    @classmethod
    def from_text(cls, text: str) -> Link:
        """Read a link, with or without a page before it. Raises Malformed."""
        if len(text) > link_chars_max or scheme not in text:
            raise Malformed("not a link", hint=f"it holds {scheme} and then letters and digits; copy the whole of it")
        try:
            told = json.loads(_unbase64(text[text.rindex(scheme) + len(scheme) :].strip()))
            url, key, until = told["url"], _unbase64(told["key"]), told.get("exp", 0)
            flag, label = told.get("flag", ""), told.get("label", "")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise Malformed(f"the link is cut or changed ({type(error).__name__})", hint="copy the whole of it") from None
        if not (isinstance(url, str) and isinstance(flag, str) and isinstance(label, str) and isinstance(until, int | float)):
            raise Malformed("the link is cut or changed", hint="copy the whole of it")
        if len(key) != key_size or urlsplit(url).scheme not in ("https", "http") or told.get("v", 1) != 1:
            raise Malformed("a link that this program cannot open")
        return cls(url, key, int(until), "P" in flag, label[:label_chars_max])


@dataclass(frozen=True, slots=True)
class Note:
    """What the vault remembers of a link that it has made."""

    id: bytes
    key: bytes = field(repr=False)
    documents: tuple[bytes, ...]  # SHA-256 of each
    made: int
    until: int = 0
    uses_max: int = 0  # 0 for any number
    uses: int = 0
    salt: bytes = b""
    passcode: bytes = field(default=b"", repr=False)  # stretched; empty for none
    wrong: int = 0
    revoked: int = 0  # when
    label: str = ""

    @classmethod
    def fresh(cls, documents: tuple[bytes, ...], *, until: int = 0, uses_max: int = 0, passcode: str = "", label: str = "") -> Note:
        """Draw a link's address and key. Raises Malformed for a label that is too long."""
        if len(label) > label_chars_max:
            raise Malformed(f"a label has {label_chars_max} characters at most, and this one {len(label)}")
        id_ = os.urandom(id_size)
        while _base64(id_)[0] == "-":  # its first letters are its name, and a command would take such a name for an option
            id_ = os.urandom(id_size)
        salt = os.urandom(16) if passcode else b""
        stretched = _stretched(passcode, salt) if passcode else b""
        now = int(time.time())
        return cls(id_, os.urandom(key_size), documents, now, until, uses_max, 0, salt, stretched, 0, 0, label)

    def to_bytes(self) -> bytes:
        """The canonical form, to be sealed."""
        counts: list[canonical.Value] = [self.made, self.until, self.uses_max, self.uses, self.wrong, self.revoked]
        return canonical.encode([1, self.id, self.key, list(self.documents), counts, self.salt, self.passcode, self.label])

    @classmethod
    def from_bytes(cls, data: bytes) -> Note:
        """Parse. Raises Malformed."""
        f = Fields(canonical.decode(data, bytes_max=2**20, what="link"), count=8, what="link")
        f.uint(least=1, most=1)
        id_, key, documents = f.bytes(exactly=id_size), f.bytes(exactly=key_size), tuple(f.list(most=documents_max))
        numbers = Fields(f.list(most=6), count=6, what="link")
        made, until, uses_max, uses, wrong, revoked = (numbers.uint(most=2**53) for _ in range(6))
        salt, passcode, label = f.bytes(most=16), f.bytes(most=32), f.text(most=link_chars_max)
        return cls(id_, key, documents, made, until, uses_max, uses, salt, passcode, wrong, revoked, label[:label_chars_max])

    def state(self, now: float) -> str:
        """Open, or why it is not."""
        if self.revoked:
            return "revoked"
        if self.until and now >= self.until:
            return "expired"
        if self.uses_max and self.uses >= self.uses_max:
            return "used up"
        if self.wrong >= wrong_max:
            return "locked after too many wrong passcodes"
        return "open"

    def fits(self, passcode: str) -> bool:
        """Whether this is its passcode. Takes as long for a wrong one."""
        return not self.passcode or hmac.compare_digest(_stretched(passcode, self.salt), self.passcode)

    def counted(self, *, right: bool) -> Note:
        """After a use, or a wrong passcode."""
        return replace(self, uses=self.uses + 1) if right else replace(self, wrong=self.wrong + 1)

    def link(self, base: str) -> Link:
        """What is given away; ``base`` is where the links are served."""
        return Link(f"{base.rstrip('/')}/shl/{_base64(self.id)}", self.key, self.until, bool(self.passcode), self.label)

    @property
    def name(self) -> str:
        """What people call it by, to revoke it: the first letters of its address."""
        return _base64(self.id)[:12]


def id_of(text: str) -> bytes:
    """A link's id in an address. Raises Malformed."""
    found = _unbase64(text)
    if len(found) != id_size:
        raise Malformed("no link has this address")
    return found


def _stretched(passcode: str, salt: bytes) -> bytes:
    return hashlib.scrypt(passcode.encode("utf-8", "surrogatepass"), salt=salt, n=passcode_n, r=8, p=1, dklen=32)


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise Malformed("the link is cut or changed", hint="copy the whole of it") from None
