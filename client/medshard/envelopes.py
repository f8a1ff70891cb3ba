"""What is sealed to whom: file keys to readers, reasons of emergencies to auditors. Bytes in, bytes out; no disk, no network.

Law: an envelope opens in one place only. A file key is bound to its file and to the GRANT entry it was given by, a reason to its log, so
neither can be shown elsewhere as something it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from medshard import hpke
from medshard.keys import VaultKeys
from medshard.sealing import FileSeal
from medshard_protocol.entries import reason_bytes_max
from medshard_protocol.errors import Damaged
from medshard_protocol.ids import Sha256
from medshard_protocol.manifest import Manifest
from medshard_protocol.sharing import SealedGrant, SealingKey, sealing_key_signed

reason_text_bytes_max: Final = 400
_grant_info: Final = b"medshard/grant/v1"
_reason_info: Final = b"medshard/reason/v1"
assert reason_text_bytes_max + hpke.overhead_bytes <= reason_bytes_max


def sealing_key(keys: VaultKeys) -> SealingKey:
    """The vault's word for what may be sealed to it."""
    public = keys.hpke.public
    return SealingKey(keys.public, public, keys.signing.sign(sealing_key_signed(public)))


def seal_grant(reader: bytes, seal: FileSeal, grant: Sha256) -> SealedGrant:
    """A file's key for the reader whose HPKE key is given, under the GRANT entry with this id. Raises Malformed for a key that is none."""
    return SealedGrant(grant, hpke.seal(reader, seal.file_key, _grant_info + seal.file_id + grant))


def open_grant(readers: Sequence[hpke.PrivateKey], manifest: Manifest, grant: Sha256, sealed: bytes) -> FileSeal:
    """The seal of a file that was granted to one of a vault's keys. Raises Damaged unless it is that file's key, given by that grant."""
    for number, reader in enumerate(readers, 1):
        try:
            file_key = reader.open(sealed, _grant_info + manifest.file_id + grant)
            break
        except Damaged:
            if number == len(readers):
                raise
    if len(file_key) != 32:
        raise Damaged("a grant holds a key of 32 bytes")
    return FileSeal.of(manifest, file_key)


def seal_reason(auditors: bytes, origin: str, text: str) -> bytes:
    """Why files are read in an emergency, for the auditors of one log. Raises ValueError for an empty or too long text."""
    data = text.strip().encode()
    if not 1 <= len(data) <= reason_text_bytes_max:
        raise ValueError(f"a reason has 1 to {reason_text_bytes_max} bytes of text")
    return hpke.seal(auditors, data, _reason_info + origin.encode())


def open_reason(auditors: hpke.PrivateKey, origin: str, sealed: bytes) -> str:
    """The text of a sealed reason. Raises Damaged."""
    # Whoever wrote it may have written anything: bytes that are no text stand as escapes.
    return auditors.open(sealed, _reason_info + origin.encode()).decode("utf-8", "backslashreplace")
