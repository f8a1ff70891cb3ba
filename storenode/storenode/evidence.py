"""What this node has seen that should not be: kept in files that a third party can check with nothing but the genesis file.

Law: a piece of evidence is one file that names its kind and holds the documents themselves, byte for byte as they came. The file's name
is made from kind and documents, so the same proof is kept once. A kind that comes in floods cannot push out the others: each has its own
room, half of it for what came first, half for what came last. Documents are the ledger's (notes, entries, tiles) and so hold no personal
data; details are numbers and short words.

Says nothing about guilt: ``watching.verdict`` recomputes what a file proves. The bytes are specified in docs/formats/evidence.md.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, TypeAlias

from medshard_protocol.canonical import Fields, Value, decode, encode
from medshard_protocol.errors import Absent, Malformed
from storenode import durable

folder_name: Final = "evidence"  # below the node's data folder
suffix: Final = ".evidence"
evidence_version: Final = 1
evidence_bytes_max: Final = 8 << 20  # two notes of the largest roster, and tiles
files_max: Final = 64  # of one kind
bytes_max: Final = 64 << 20  # of one kind
names_max: Final = 64
text_chars_max: Final = 300

kinds: Final = {
    "fork": "two histories of one size",
    "rewritten": "a later head that does not continue an earlier one",
    "rollback": "an older head after a newer one",
    "stale": "a head that nobody has cosigned for too long",
    "damaged-tile": "a tile or bundle that does not belong to the head it was served with",
    "withheld": "a head whose entries are not given out",
    "few-cosigners": "a checkpoint shown as published without the signatures of a quorum",
    "bad-signature": "a checkpoint with a signature that does not hold, or of another log",
    "not-cosigned": "a mirror that serves a head without its own cosignature",
    "left-out": "an entry that was handed in and is not in the log",
    "abandoned": "entries that a log key signed and that no quorum ever cosigned",
    "forged-proof": "an inclusion proof that does not lead to the head it names",
    "false-cell": "a holder that vouches for a cell with hashes that do not lead to the registered root",
    "false-tag": "a holder whose tag of a cell does not fit those of the other holders",
    "clock": "cosignatures of one head that lie far apart in time",
}

Detail: TypeAlias = str | int

_name = re.compile(r"[a-z0-9][a-z0-9_ ./-]{0,119}\Z")
_unprintable = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Exhibit:
    """One piece of evidence, read back. Nothing in it has been checked."""

    kind: str
    details: Mapping[str, Detail]  # what whoever kept it says
    documents: Mapping[str, bytes]  # what speaks for itself

    def to_bytes(self) -> bytes:
        """The file. Raises ValueError for what no file can hold."""
        if complaint := self._complaint():
            raise ValueError(f"evidence: {complaint}")
        details: list[Value] = [[name, value] for name, value in sorted(self.details.items())]
        documents: list[Value] = [[name, data] for name, data in sorted(self.documents.items())]
        return encode([evidence_version, self.kind, details, documents])

    @classmethod
    def from_bytes(cls, data: bytes) -> Exhibit:
        """Parse a file. Raises Malformed."""
        fields = Fields(decode(data, bytes_max=evidence_bytes_max, what="evidence"), count=4, what="evidence")
        fields.uint(least=evidence_version, most=evidence_version)
        kind, details, documents = fields.text(most=40), fields.list(most=names_max), fields.list(most=names_max)
        exhibit = cls(kind, dict(map(_detail, details)), dict(map(_document, documents)))
        if complaint := exhibit._complaint():
            raise Malformed(f"evidence: {complaint}")
        if exhibit.to_bytes() != data:
            raise Malformed("evidence: names are not sorted and distinct")
        return exhibit

    @classmethod
    def read(cls, path: Path) -> Exhibit:
        """Read a file. Raises Absent or Malformed."""
        try:
            with path.open("rb") as file:
                return cls.from_bytes(file.read(evidence_bytes_max + 1))
        except FileNotFoundError:
            raise Absent(f"{path} does not exist") from None
        except OSError as error:
            raise Malformed(f"{path} cannot be read ({error.strerror})") from None

    @property
    def file_name(self) -> str:
        """Kind, and the first half of SHA-256 over kind and documents: who says what about them makes no other proof."""
        documents: list[Value] = [[name, data] for name, data in sorted(self.documents.items())]
        return f"{self.kind}-{sha256(encode([self.kind, documents])).hexdigest()[:32]}{suffix}"

    def _complaint(self) -> str | None:
        if self.kind not in kinds:
            return "of a kind that this version does not know"
        if len(self.details) > names_max or len(self.documents) > names_max:
            return f"more than {names_max} details or documents"
        if not all(_name.match(name) for name in (*self.details, *self.documents)):
            return "a name is 1 to 120 lowercase letters, digits, dashes, dots, slashes and spaces"
        for value in self.details.values():
            if isinstance(value, str) and (len(value) > text_chars_max or _unprintable.search(value)):
                return f"a detail is at most {text_chars_max} printable characters"
            if isinstance(value, int) and not 0 <= value < 2**63:
                return "a number is out of range"
        if sum(map(len, self.documents.values())) > evidence_bytes_max - 64 * 1024:
            return f"documents of more than {evidence_bytes_max} bytes"
        return None


class Evidence:
    """The folder of evidence of one node. Any number of these may share a folder within one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, kind: str, details: Mapping[str, Detail], documents: Mapping[str, bytes]) -> Path:
        """Keep a proof durably, once; give its file. Details are shortened and cleaned.

        Raises ValueError for a kind that is not in ``kinds`` and for documents that are too large, OSError where nothing can be written.
        """
        exhibit = Exhibit(kind, {name: _clean(value) for name, value in details.items()}, dict(documents))
        data = exhibit.to_bytes()
        path = self.folder / exhibit.file_name
        if path.exists():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(kind, len(data))
        durable.replace(path, data)
        _log.error("evidence kept: %s", kinds[kind], extra={"reason": kind, "count": self.counts()[kind]})
        return path

    def files(self, kind: str = "") -> list[Path]:
        """All files, or those of one kind, oldest first."""
        found = [path for path in self.folder.glob(f"{kind or '*'}-*{suffix}") if not kind or _kind_of(path) == kind]
        return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))

    def counts(self) -> Counter[str]:
        """How many files of each kind there are."""
        return Counter(_kind_of(path) for path in self.files())

    def _make_room(self, kind: str, size: int) -> None:
        files = self.files(kind)
        while files and (len(files) >= files_max or sum(path.stat().st_size for path in files) + size > bytes_max):
            oldest_of_the_late = files.pop(len(files) // 2)  # the first half stays for good: it shows how it began
            oldest_of_the_late.unlink(missing_ok=True)
            durable.sync_folder(self.folder)


def evidence_in(data: Path) -> Evidence:
    """The evidence of the node whose data folder this is."""
    return Evidence(data / folder_name)


def _clean(value: Detail) -> Detail:
    return _unprintable.sub("?", value)[:text_chars_max] if isinstance(value, str) else max(0, value)


def _kind_of(path: Path) -> str:
    return os.path.basename(path).rpartition("-")[0]


def _detail(value: object) -> tuple[str, Detail]:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) in (str, int):
        return value[0], value[1]
    raise Malformed("evidence: a detail is a name, and a number or text")


def _document(value: object) -> tuple[str, bytes]:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], bytes):
        return value[0], value[1]
    raise Malformed("evidence: a document is a name and bytes")
