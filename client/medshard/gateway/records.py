"""How rows of the catalog are sealed: found by HMACs of UIDs, and bound to where they stand.

Law: whoever keeps the tables learns no word of any patient. He can take rows away or put back older ones; he cannot make one say something
else, nor move it to another study, nor have an instance read from another place: all that counts is inside what is sealed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from typing import Any, Final

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medshard.gateway import tags
from medshard.gateway.model import Instance, Place
from medshard.gateway.tables import damaged
from medshard.gateway.tags import Level

token_size: Final = 16


class Records:
    """Sealing and opening with one key of 32 bytes; ``where`` is for error messages."""

    def __init__(self, key: bytes, where: str) -> None:
        self._cipher = AESGCM(hmac.digest(key, b"medshard/dicom-index/v1/seal", hashlib.sha256))
        self._tokens = hmac.digest(key, b"medshard/dicom-index/v1/token", hashlib.sha256)
        self._where = where

    def token(self, kind: str, uid: str) -> bytes:
        """What a study, a series, an instance or its content is found by."""
        return hmac.digest(self._tokens, f"{kind}/{uid}".encode(), hashlib.sha256)[:token_size]

    def content(self, instance: Instance) -> bytes:
        """The token of an instance's bytes."""
        return self.token("content", instance.sha256.hex())

    def seal(self, kind: str, bound: bytes, value: object) -> bytes:
        """A row's bytes, which open under the same ``bound`` alone."""
        nonce = os.urandom(12)
        return nonce + self._cipher.encrypt(nonce, msgpack.packb(value), kind.encode() + bound)

    def open(self, kind: str, bound: bytes, sealed: bytes) -> Any:
        """What was sealed. Raises Damaged."""
        try:
            return msgpack.unpackb(self._cipher.decrypt(sealed[:12], sealed[12:], kind.encode() + bound))
        except (InvalidTag, ValueError):
            raise damaged(self._where, "an entry was altered, or belongs to another vault") from None

    def sealed_instance(self, instance: Instance) -> bytes:
        """The row of an instance: its place and its own attributes; those of study and series are in their rows."""
        place = instance.place
        own = {name: text for name, text in instance.attributes.items() if level_of(name) is Level.INSTANCE}
        value = [
            instance.study, instance.series, instance.uid, instance.size, instance.sha256, instance.received, own,
            [place.file_id, place.member, place.ledger_index] if place else None,
        ]  # fmt: skip
        return self.seal("instance", self.token("instance", instance.uid) + self.content(instance), value)

    def opened_instance(self, token: bytes, content: bytes, sealed: bytes, served: int) -> Instance:
        """The instance of a row. Raises Damaged."""
        study, series, uid, size, sha256, received, attributes, place = self.open("instance", token + content, sealed)
        return Instance(study, series, uid, size, sha256, received, attributes, Place(*place) if place else None, served > 1)

    def check_home(self, *, fits: bool) -> None:
        """Raise Damaged for a row that stands where it does not belong."""
        if not fits:
            raise damaged(self._where, "an entry stands in a study that it does not belong to")


def level_of(name: str) -> Level:
    """The level at which an attribute of a sealed header stands."""
    known = tags.by_name.get(name)
    return known.level if known else Level.INSTANCE


def of_level(attributes: Mapping[str, str], *levels: Level) -> dict[str, str]:
    """Those attributes that stand at one of these levels."""
    return {name: text for name, text in attributes.items() if level_of(name) in levels}
