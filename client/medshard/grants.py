"""Values about rights: grants that this vault knows of, what sharing reports, and what the ledger says of reads.

Law: frozen values, no disk, no network, no keys. What is in them was verified by whoever made them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from medshard_protocol import canonical
from medshard_protocol.canonical import Fields
from medshard_protocol.entries import Purpose, size_max, time_max
from medshard_protocol.ids import FileId, Key, Sha256, key_size, sha256_size
from medshard_protocol.sharing import sealed_bytes_max

_bytes_max: Final = sealed_bytes_max + 1024


@dataclass(frozen=True)
class KnownGrant:
    """One file of one grant, given by this vault or received by it, as the local index keeps it."""

    index: int  # of the GRANT entry
    file_id: FileId
    grant: Sha256  # the entry's id
    peer: Key  # the reader of a grant that was given, the owner of one received
    until: int  # seconds since 1970; 0 for no end
    purpose: int
    given: bool
    sealed: bytes = b""  # the file key for this vault; empty in a grant that was given
    ended: int = 0  # index of the REVOKE entry; 0 while there is none known

    def to_bytes(self) -> bytes:
        """What is sealed in the index; index, file and direction stand beside it."""
        return canonical.encode([1, self.grant, self.peer, self.until, self.purpose, self.sealed, self.ended])

    @classmethod
    def from_bytes(cls, data: bytes, index: int, file_id: bytes, *, given: bool) -> KnownGrant:
        """Parse. Raises Malformed."""
        f = Fields(canonical.decode(data, bytes_max=_bytes_max, what="known grant"), count=7, what="known grant")
        f.uint(least=1, most=1)
        grant, peer = Sha256(f.bytes(exactly=sha256_size)), Key(f.bytes(exactly=key_size))
        until, purpose, sealed = f.uint(most=time_max), f.uint(most=255), f.bytes(most=sealed_bytes_max)
        return cls(index, FileId(file_id), grant, peer, until, purpose, given, sealed, f.uint(most=size_max))


@dataclass(frozen=True)
class Shared:
    """One file of this vault that another vault may read from now on, or one of another that this vault may."""

    sha256: bytes
    name: bytes
    file_id: bytes
    grant: bytes
    grant_index: int
    peer: bytes  # the reader, or the owner
    peer_name: str  # of the contact; empty if there is none
    institution: str  # that vouches for the peer, in the nodes' word; empty if it could not be learned
    until: int
    purpose: str
    given: bool
    ended: int = 0  # index of the REVOKE entry
    copied: bool = False  # a member of a pack, stored once more to be shared alone
    message: bool = False  # no document: what vaults say to each other


@dataclass(frozen=True)
class Happened:
    """One entry of the ledger about a file, as people want to read it."""

    index: int
    entry: bytes  # its id
    what: str  # "registered", "granted", "revoked", "read", "read in an emergency", "refused", …
    author: bytes
    author_name: str
    institution: str
    file_ids: tuple[bytes, ...]
    sha256: bytes  # of the file that was asked about; empty where it is not known
    purpose: str = ""
    reader: bytes = b""  # in a grant
    reader_name: str = ""
    until: int = 0
    grant: bytes = b""  # under which it was read, or which was revoked
    grant_index: int = -1
    time: int = 0  # seconds since 1970, by the cosigners' clocks; 0 where nobody knows
    exact: bool = False  # as nodes remember it, to a few seconds; False: all that is known is that it happened before ``time``
    reason: str = ""  # of an emergency, for auditors
    sealed_reason: bool = False  # there is a reason, and it is not for us


def purpose_name(number: int) -> str:
    """A purpose for people: what the command line takes."""
    try:
        return Purpose(number).name.lower().replace("_", "-")
    except ValueError:
        return f"purpose-{number}"


def purpose_number(name: str) -> Purpose:
    """The purpose that a word names. Raises ValueError."""
    try:
        return Purpose[name.strip().upper().replace("-", "_")]
    except KeyError:
        raise ValueError(f"{name!a} is no purpose; there are {', '.join(purposes)}") from None


purposes: Final = tuple(purpose_name(each) for each in Purpose)
