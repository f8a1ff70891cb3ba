"""The text of a proof that an entry is in a log (C2SP tlog-proof): extra data, index, audit path, checkpoint.

Law: one text for one proof, read strictly; whatever this would not itself have written is malformed. Reading checks no hash and no
signature. The extra data are opaque here and authenticated by nobody.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from medshard_protocol.checkpoint import note_bytes_max, size_max
from medshard_protocol.errors import Malformed
from medshard_protocol.merkle import hash_size, path_hashes_max

header = "c2sp.org/tlog-proof@v1"
extra_bytes_max = 24 << 20  # a chain of rosters is by far the largest thing in it
proof_bytes_max = note_bytes_max + extra_bytes_max // 3 * 4 + (path_hashes_max + 4) * 64

_index = re.compile(r"index (0|[1-9][0-9]{0,18})\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class TlogProof:
    """A proof as it is written down. Nothing in it is checked."""

    index: int
    path: tuple[bytes, ...]
    checkpoint: bytes  # the note
    extra: bytes = b""

    def to_bytes(self) -> bytes:
        """The text."""
        lines = [header, *([f"extra {base64.b64encode(self.extra).decode()}"] if self.extra else []), f"index {self.index}"]
        lines += [base64.b64encode(item).decode() for item in self.path]
        return "".join(line + "\n" for line in lines).encode() + b"\n" + self.checkpoint

    @classmethod
    def from_bytes(cls, data: bytes) -> TlogProof:
        """Parse. Raises Malformed."""
        if len(data) > proof_bytes_max:
            raise Malformed(f"proof: {len(data)} bytes, more than the {proof_bytes_max} allowed")
        head, blank, note = bytes(data).partition(b"\n\n")
        try:
            lines = head.decode("ascii").split("\n")
        except UnicodeDecodeError:
            raise Malformed("proof: not a tlog-proof") from None
        if lines.pop(0) != header or not blank or not lines or len(note) > note_bytes_max:
            raise Malformed("proof: not a tlog-proof")
        extra = _base64(lines.pop(0).removeprefix("extra ")) if lines[0].startswith("extra ") else b""
        match = _index.match(lines.pop(0)) if lines else None
        if match is None or int(match[1]) > size_max or len(lines) > path_hashes_max:
            raise Malformed("proof: expected an index and a path")
        path = tuple(_base64(line) for line in lines)
        if any(len(item) != hash_size for item in path):
            raise Malformed(f"proof: a path consists of hashes of {hash_size} bytes")
        proof = cls(int(match[1]), path, note, extra)
        if proof.to_bytes() != data:
            raise Malformed("proof: not written as it should be")
        return proof


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Malformed("proof: not base64") from None
