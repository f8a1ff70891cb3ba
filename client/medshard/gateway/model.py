"""The gateway's values: what comes in, what is said of it, what the archive knows of an instance, and what is asked for.

Law: frozen values. No disk, no network, no keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from medshard.gateway import tags
from medshard.gateway.part10 import head_of
from medshard.gateway.tags import Level

SUCCESS: Final = 0x0000
DUPLICATE: Final = 0x0111  # PS3.7 C.5.6
OUT_OF_RESOURCES: Final = 0xA700  # PS3.4 table B.2-1
MISMATCH: Final = 0xA900
NOT_UNDERSTOOD: Final = 0xC000


@dataclass(frozen=True, slots=True)
class Incoming:
    """One instance, whole: the bytes of the file that it is kept as, and what the sender says it is (empty where it says nothing)."""

    file: bytes | memoryview
    sop_class: str = ""
    sop_uid: str = ""

    @classmethod
    def dataset(cls, data: bytes, sop_class: str, sop_uid: str, transfer_syntax: str) -> Incoming:
        """A data set as C-STORE brings it, behind a head by the gateway's rule."""
        return cls(head_of(sop_class, sop_uid, transfer_syntax) + data, sop_class, sop_uid)


class Outcome(StrEnum):
    """What became of an instance that came in."""

    STORED = "stored"
    ALREADY = "already"  # the same bytes are here
    KEPT_BESIDE = "kept-beside"  # other bytes under the same UID are here; both are kept and flagged, this one is served
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Verdict:
    """``status`` is the DIMSE status; ``study``, ``series`` and ``sop_uid`` are empty where they could not be read."""

    outcome: Outcome
    status: int = SUCCESS
    reason: str = ""
    study: str = ""
    series: str = ""
    sop_class: str = ""
    sop_uid: str = ""
    sha256: bytes = b""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored instance lies: member ``member`` of a file, or all of it (None)."""

    file_id: bytes
    member: int | None
    ledger_index: int


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance in the archive. ``place`` is None as long as it is in the spool."""

    study: str
    series: str
    uid: str
    size: int
    sha256: bytes
    received: int  # Unix milliseconds
    attributes: Mapping[str, str] = field(repr=False)
    place: Place | None = None
    flagged: bool = False  # other bytes came under the same UID

    @property
    def sop_class(self) -> str:
        """Its SOP class UID."""
        return self.attributes.get("sop-class", "")

    @property
    def transfer_syntax(self) -> str:
        """What its data set is encoded in."""
        return self.attributes.get("transfer-syntax", "")


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for at one level: ``keys`` are DICOM matching keys by tag, as Unicode text (PS3.4 C.2.2.2).

    An empty or missing key matches everything. Wildcards ``*`` and ``?``, ranges ``20250101-``, and lists ``A\\B`` of UIDs are understood.
    """

    level: Level
    keys: Mapping[int, str] = field(default_factory=dict)
    limit: int | None = None
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One match: every attribute that the archive knows at this level and above it, by tag, with the counts."""

    level: Level
    attributes: Mapping[int, str]

    @property
    def study(self) -> str:
        """Its Study Instance UID."""
        return self.attributes.get(tags.STUDY_UID, "")

    @property
    def series(self) -> str:
        """Its Series Instance UID."""
        return self.attributes.get(tags.SERIES_UID, "")

    @property
    def uid(self) -> str:
        """Its SOP Instance UID."""
        return self.attributes.get(tags.SOP_UID, "")


@dataclass(frozen=True, slots=True)
class Receipt:
    """That an instance is durable on w nodes and in the cosigned ledger."""

    sop_class: str
    sop_uid: str
    sha256: bytes
    file_id: bytes
    ledger_index: int
    flagged: bool = False


@dataclass(frozen=True, slots=True)
class Committed:
    """What was found out about SOP instances: receipts of those that are safe, and those that are here and not yet in the store."""

    receipts: Mapping[str, Receipt]
    waiting: frozenset[str] = frozenset()
