"""What the watch has seen, over restarts: the newest head that it proved, and the last head that each source showed.

Law: one small file, replaced whole. It holds notes as they came, checked before they were written; losing it costs the comparison with
the past and nothing else. A file of another log, or one that is damaged, is refused rather than forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from medshard_protocol.canonical import Fields, Value, decode, encode
from medshard_protocol.checkpoint import note_bytes_max
from medshard_protocol.errors import Damaged, Malformed
from medshard_protocol.roster import nodes_max
from storenode import durable

memory_name: Final = "watch.state"
memory_version: Final = 1
sources_max: Final = nodes_max + 64
name_chars_max: Final = 300
memory_bytes_max: Final = 64 << 20


@dataclass(slots=True)
class Memory:
    """Notes, unparsed."""

    anchor: bytes = b""  # the newest head that continues all heads before it
    shown: dict[str, bytes] = field(default_factory=dict)  # by source

    @classmethod
    def load(cls, path: Path) -> Memory:
        """Read the file; empty where there is none yet. Raises Damaged."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return cls()
        try:
            fields = Fields(decode(data, bytes_max=memory_bytes_max, what="watch state"), count=3, what="watch state")
            fields.uint(least=memory_version, most=memory_version)
            anchor = fields.bytes(most=note_bytes_max)
            return cls(anchor, dict(map(_shown, fields.list(most=sources_max))))
        except Malformed as error:
            hint = "move the file away to begin anew; what was seen before can then not be compared"
            raise Damaged(f"{path}: {error}", hint=hint) from None

    def store(self, path: Path) -> None:
        """Write the file durably."""
        path.parent.mkdir(parents=True, exist_ok=True)
        shown: list[Value] = [[name, note] for name, note in sorted(self.shown.items())]
        durable.replace(path, encode([memory_version, self.anchor, shown]))


def _shown(value: object) -> tuple[str, bytes]:
    fields = Fields(value, count=2, what="watch state")
    return fields.text(most=name_chars_max), fields.bytes(most=note_bytes_max)
