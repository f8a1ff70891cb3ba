"""Reading a proof that somebody hands over, as a text or attached to a printed page's PDF, and checking it with a document.

Law: needs no vault, no node and no network. The genesis file is the only thing trusted; one that comes inside the PDF counts only if its
SHA-256 is the one that the user names.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from medshard.source import hash_file
from medshard.timestamps import Stamped, check_token, load_certificates
from medshard_protocol.documentproof import DocumentProof, Proven
from medshard_protocol.errors import Absent, Malformed, Refused
from medshard_protocol.roster import Roster, roster_bytes_max
from medshard_protocol.tlogproof import proof_bytes_max

proof_name: Final = "proof.tlog-proof"
genesis_name: Final = "genesis.medshard"
pdf_bytes_max: Final = 64 << 20


@dataclass(frozen=True)
class Handed:
    """What a file holds: the proof, and perhaps a genesis file that nobody vouches for yet."""

    proof: DocumentProof
    genesis: bytes | None


@dataclass(frozen=True)
class Verdict:
    """What was found to hold."""

    proven: Proven
    document: Path | None  # whose bytes were compared
    stamped: Stamped | None
    stamp_unchecked: bool  # there is a timestamp, and no certificate to check it with


def read(path: Path) -> Handed:
    """Read a proof from a file. Raises Malformed, or OSError for a file that cannot be read."""
    with open(path, "rb") as file:
        data = file.read(max(proof_bytes_max, pdf_bytes_max) + 1)
    if not data.startswith(b"%PDF-"):
        return Handed(DocumentProof.from_bytes(data), None)
    if len(data) > pdf_bytes_max:
        raise Malformed(f"{path}: more than {pdf_bytes_max} bytes, which no proof's page has")
    found = _attachments(data)
    if proof_name not in found:
        raise Malformed(f"{path}: a PDF without a proof attached to it")
    return Handed(DocumentProof.from_bytes(found[proof_name]), found.get(genesis_name))


def trusted(handed: Handed, genesis_file: Path | None, pinned: bytes | None, own: Path | None) -> Roster:
    """The genesis file to go by: the one named, that of the user's own vault, or the one handed over if its hash is pinned.

    Raises Absent where there is none to trust, Refused for one that is not the pinned one.
    """
    if genesis_file is not None:
        data = genesis_file.read_bytes()
    elif pinned is not None and handed.genesis is not None:
        data = handed.genesis
    elif own is not None and own.exists():
        data = own.read_bytes()
    else:
        raise Absent(
            "there is no genesis file to check the proof against",
            hint="ask an institution for it and name it with --genesis FILE; for a PDF its SHA-256 is enough: --genesis-sha256 HEX",
        )
    if len(data) > roster_bytes_max:
        raise Malformed("the genesis file is too large to be one")
    if pinned is not None and hashlib.sha256(data).digest() != pinned:
        raise Refused("this genesis file is not the one that you named by its SHA-256")
    return Roster.from_bytes(data)


def check(handed: Handed, genesis: Roster, document: Path | None = None, certificates: Path | None = None) -> Verdict:
    """Check a proof, the document if there is one, and the timestamp if there are certificates. Raises Malformed or Refused."""
    proven = handed.proof.verify(genesis)
    if document is not None:
        found = hash_file(document)
        if found != proven.sha256:
            raise Refused(f"the proof is of another document: {document} has SHA-256 {found.hex()}, and it is of {proven.sha256.hex()}")
    stamped = None
    if certificates is not None:
        if proven.stamp is None:
            raise Refused("the proof carries no timestamp to check", hint="ask for a proof made after the next timestamp")
        stamped = check_token(proven.stamp.text, proven.stamp.token, load_certificates(certificates.read_bytes()))
    return Verdict(proven, document, stamped, proven.stamp is not None and stamped is None)


def _attachments(data: bytes) -> dict[str, bytes]:
    """The files attached to a PDF whose names we know. Raises Malformed."""
    import pypdf  # late: few files are PDFs
    from pypdf.errors import PyPdfError

    found: dict[str, bytes] = {}
    try:
        for name, files in pypdf.PdfReader(io.BytesIO(data), strict=False).attachments.items():
            if name in (proof_name, genesis_name) and files:
                found[name] = bytes(files[0])
    except (PyPdfError, ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError, zlib.error) as error:
        raise Malformed(f"not a PDF that can be read ({type(error).__name__})") from None
    return found
