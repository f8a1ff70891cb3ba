"""A vault brought back on a new machine, from its root key and any node: key file, rosters, certificate, then everything that it owns.

Law: the root key is the only secret. The genesis file is trusted because its hash was written down with the root key, or because a person
compares it; everything after it follows by signatures. Nothing in an existing home is overwritten.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from medshard import enrolment
from medshard.durable import write_durably
from medshard.home import Home
from medshard.keys import VaultKeys, create_key_file, open_key_file, seal_root
from medshard_protocol import canonical
from medshard_protocol.canonical import Fields
from medshard_protocol.errors import Damaged, Malformed, MedshardError, Refused, Unavailable
from medshard_protocol.ids import Sha256, sha256_size
from medshard_protocol.roster import Roster, is_node_url, url_chars_max

prefix: Final = "MEDSHARDKEY1"
label: Final = b"medshard/recovery-code/v1"
checksum_size: Final = 4
urls_max: Final = 8
code_chars_max: Final = 4096


@dataclass(frozen=True, slots=True)
class RecoveryCode:
    """What brings a vault back. Whoever has it is the vault."""

    root: bytes = field(repr=False)
    genesis_sha256: Sha256
    urls: tuple[str, ...]

    def to_code(self) -> str:
        """Write it as one word of capital letters and digits."""
        body = canonical.encode([1, self.root, self.genesis_sha256, list(self.urls)])
        return prefix + base64.b32encode(body + _checksum(body)).decode().rstrip("=")

    @classmethod
    def from_code(cls, code: str) -> RecoveryCode:
        """Read a code; spaces, line breaks, dashes and small letters do no harm. Raises Malformed."""
        text = "".join(code[: 2 * code_chars_max].split()).replace("-", "").upper()
        if not text.startswith(prefix) or len(text) > code_chars_max:
            raise Malformed(f"not a recovery code: it should start with {prefix}", hint="`medshard keys kit` writes one")
        text = text.removeprefix(prefix)
        try:
            data = base64.b32decode(text + "=" * (-len(text) % 8))
        except (binascii.Error, ValueError):
            data = b""
        body, checksum = data[:-checksum_size], data[-checksum_size:]
        if not body or _checksum(body) != checksum:
            raise Malformed("the recovery code is damaged: its checksum does not fit", hint="type it again; a letter is wrong or missing")
        f = Fields(canonical.decode(body, bytes_max=code_chars_max, what="recovery code"), count=4, what="recovery code")
        f.uint(least=1, most=1)
        root, genesis, urls = f.bytes(exactly=32), Sha256(f.bytes(exactly=sha256_size)), f.list(most=urls_max)
        if not all(isinstance(url, str) and len(url) <= url_chars_max and is_node_url(url) for url in urls):
            raise Malformed("recovery code: expected urls like https://host:port")
        return cls(root, genesis, tuple(urls))


def code_of(home: Home, keys: VaultKeys, roster: Roster) -> RecoveryCode:
    """The recovery code of an open vault, with urls of distinct institutions, its own first where that is known."""
    urls: dict[int, str] = {}
    for node in roster.nodes:
        urls.setdefault(node.institution, node.url)
    return RecoveryCode(keys.root, home.genesis_sha256(), tuple(urls.values())[:urls_max])


def change_passphrase(home: Home, old: str, new: str, *, fast: bool = False) -> VaultKeys:
    """Keep the root key under another passphrase. Raises Refused for a wrong old one. Copies of the old file still open with it."""
    keys = open_key_file(home.key_file, old)
    data = seal_root(keys, new, fast=fast)
    write_durably(home.key_file, data, mode=0o600)
    if open_key_file(home.key_file, new).public != keys.public:
        raise Damaged("the key file that was just written does not open", hint="Do not go on: restore your copy of vault.key.")
    return keys


async def genesis_of(url: str) -> bytes:
    """The genesis file that a node goes by, in its word: its SHA-256 is to be compared. Raises Unavailable or Malformed."""
    data = await enrolment.genesis_of(url)
    Roster.from_bytes(data)
    return data


async def restore_home(
    folder: Path, root: bytes, passphrase: str, urls: Sequence[str], genesis: bytes, *, fast_kdf: bool = False
) -> VaultKeys:
    """Make a vault's home anew. Its index is still empty: `Vault.reindex` fills it.

    Raises Refused where there is another vault, or where no institution vouches for the key; Unavailable where no node answers.
    """
    home, keys = Home(folder), VaultKeys.from_root(root)
    if home.key_file.exists() and open_key_file(home.key_file, passphrase).public != keys.public:
        raise Refused(f"{folder} holds another vault", hint="choose another --home")
    certificate, links = await certificate_of(keys, urls, genesis)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not home.key_file.exists():
        create_key_file(home.key_file, passphrase, root=root, fast=fast_kdf)
    write_durably(home.genesis, genesis)
    home.keep_links(0, links)
    write_durably(home.certificate, certificate)
    return keys


async def certificate_of(keys: VaultKeys, urls: Sequence[str], genesis: bytes) -> tuple[bytes, enrolment.Links]:
    """A certificate for keys that an institution has enrolled, and the rosters since the genesis file. Raises as ``restore_home``."""
    roster, links, failures = Roster.from_bytes(genesis), enrolment.Links(), list[str]()
    for url in urls:
        try:
            roster, links = await enrolment.newest(roster, url)
            break
        except (Unavailable, Malformed) as error:
            failures.append(str(error))
    else:
        raise Unavailable(f"no node tells who takes part ({'; '.join(failures)})", hint="name one that is up with --node URL")
    refused: MedshardError | None = None
    for node in roster.nodes:
        try:
            return await enrolment.certificate_again(roster, node, keys), links
        except Refused as error:
            refused = error  # another institution's node, or one without the CA's key
        except Unavailable as error:
            failures.append(str(error))
    if failures or refused is None:
        raise Unavailable(
            f"no node that answers can certify this vault's key ({'; '.join(failures[:4])})", hint="try again when more are up"
        )
    raise Refused(
        "no institution vouches for this vault's key",
        hint="it was withdrawn or rotated (take the newest kit), or the CA's key is kept off the nodes: ask the institution",
    )


def _checksum(body: bytes) -> bytes:
    """Find typing mistakes; it proves nothing."""
    return hashlib.sha256(label + body).digest()[:checksum_size]
