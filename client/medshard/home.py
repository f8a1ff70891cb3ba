"""The client's folder: where each thing of a vault lies.

vault.key            the root key under a passphrase: the one thing that must be backed up
genesis.medshard     the roster that this vault trusts
certificate.der      the institution's word for the vault's key
index.sqlite         a cache: search, manifests, unfinished puts
contacts.sealed      names for other vaults' keys, which stand nowhere else
passphrase           only in a local trial made by `medshard up`
break-glass          likewise: why files are read when the ledger is out of reach
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medshard_protocol.errors import Absent
from medshard_protocol.roster import Roster


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
        """The pinned roster."""
        return self.folder / "genesis.medshard"

    @property
    def certificate(self) -> Path:
        """The vault's certificate, DER."""
        return self.folder / "certificate.der"

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
        """Read the roster. Raises Absent or Malformed."""
        return Roster.from_bytes(self._read(self.genesis))

    def certificate_bytes(self) -> bytes:
        """Read the certificate. Raises Absent."""
        return self._read(self.certificate)

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise Absent(f"{path} is missing: this vault has not joined a consortium", hint="run `medshard join CODE`") from None
