"""The client's folder: where each thing of a vault lies.

vault.key            the root key under a passphrase: the one thing that must be backed up
former-KEY.sealed    the root keys before it, where it was rotated, sealed under it
next.key, next.der   the key that a rotation is about to put in its place, and its certificate: what is left of one that was cut off
sender.key           in the place of vault.key, for what only sends: a key to sign with, and the vault's public key
genesis.medshard     the roster that this vault began with, and trusts
rosters/             the changes since, each as the nodes told of it: NUMBER.link (docs/formats/roster.md); rosters-1/ in a first successor
before/              what came after earlier logs: SHA-256 of the genesis file of each, .successor
certificate.der      the institution's word for the vault's key
index.sqlite         a cache: search, manifests, unfinished puts
contacts.sealed      names for other vaults' keys, which stand nowhere else
passphrase           only in a local trial made by `medshard up`
break-glass          likewise: why files are read when the ledger is out of reach
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from medshard.durable import write_durably
from medshard_protocol.canonical import decode, encode
from medshard_protocol.errors import Absent
from medshard_protocol.ids import Sha256
from medshard_protocol.roster import Roster
from medshard_protocol.rosters import Link, link_bytes_max
from medshard_protocol.succession import Change

_continuing = b"\x9b"  # an array of eleven: a roster of a log that goes on from others


@dataclass(frozen=True, slots=True)
class Home:
    """Paths of one vault."""

    folder: Path

    @property
    def key_file(self) -> Path:
        """The root key under a passphrase."""
        return self.folder / "vault.key"

    @property
    def genesis(self) -> Path:
        """The pinned roster, from which all others are followed."""
        return self.folder / "genesis.medshard"

    @property
    def certificate(self) -> Path:
        """The vault's certificate, DER."""
        return self.folder / "certificate.der"

    @property
    def next_key(self) -> Path:
        """The root key that a rotation is about to put in its place."""
        return self.folder / "next.key"

    @property
    def next_certificate(self) -> Path:
        """The certificate of that key. Once it lies here, the ledger has taken the change."""
        return self.folder / "next.der"

    @property
    def sender(self) -> Path:
        """The keys of what only sends."""
        return self.folder / "sender.key"

    @property
    def index(self) -> Path:
        """The local index."""
        return self.folder / "index.sqlite"

    @property
    def contacts(self) -> Path:
        """Names for keys."""
        return self.folder / "contacts.sealed"

    def standing_reason(self) -> str | None:
        """What a trial's vault gives as its reason when it reads in an emergency; None where a person has to say it."""
        try:
            return (self.folder / "break-glass").read_text(encoding="utf-8").strip() or None
        except OSError:
            return None

    def roster(self) -> Roster:
        """Read the newest roster. Raises Absent or Malformed. What lies here was checked before it was written."""
        links = self.links()
        return Roster.from_bytes(links[-1].roster if links else self._read(self.genesis))

    def rosters(self) -> list[Roster]:
        """Read all rosters by number, the genesis file first. Raises as ``roster`` does."""
        return [Roster.from_bytes(self._read(self.genesis)), *(Roster.from_bytes(link.roster) for link in self.links())]

    def genesis_sha256(self) -> Sha256:
        """What the pinned roster is known by."""
        return Sha256(sha256(self._read(self.genesis)).digest())

    def links(self) -> list[Link]:
        """Read the changes since the genesis file, as far as they were followed. Raises Malformed."""
        found = []
        for number, path in enumerate(sorted(self._rosters.glob("*.link")), 1):
            if path.name != f"{number:08}.link":
                break  # one is missing: from there on it is followed again
            found.append(Link.from_value(decode(path.read_bytes(), bytes_max=link_bytes_max, what="roster link")))
        return found

    def keep_links(self, after: int, links: Sequence[Link]) -> None:
        """Write changes that follow the roster with the number ``after``, durably and in order. The caller has followed them."""
        self._rosters.mkdir(exist_ok=True)
        for number, link in enumerate(links, after + 1):
            write_durably(self._rosters / f"{number:08}.link", encode(link.to_value()))

    def succeed(self, document: bytes, change: Change) -> None:
        """Go by the log that goes on from this one, durably. The caller has checked that it does. The old rosters stay where they are."""
        folder = self.folder / "before"
        folder.mkdir(exist_ok=True)
        write_durably(folder / f"{change.rosters[0].sha256.hex()}.successor", document)
        write_durably(self.genesis, change.genesis.to_bytes())

    @property
    def _rosters(self) -> Path:
        data = self._read(self.genesis)
        before = Roster.from_bytes(data).before if data[:1] == _continuing else ()
        return self.folder / (f"rosters-{len(before)}" if before else "rosters")

    def certificate_bytes(self) -> bytes:
        """Read the certificate. Raises Absent."""
        return self._read(self.certificate)

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise Absent(f"{path} is missing: this vault has not joined a consortium", hint="run `medshard join CODE`") from None
