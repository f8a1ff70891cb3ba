"""Judging what mirrors show as the newest head: by itself, beside the others', and beside what they showed before.

Law: a finding says what is wrong, about whom, and holds the documents that show it. Judging does no I/O and reads no clock; times come
in as arguments. A head counts as published only under the signatures of a quorum of distinct institutions; a head that merely the log
signed still counts against the log when it excludes another.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from medshard_protocol.checkpoint import Checkpoint
from medshard_protocol.errors import MedshardError
from medshard_protocol.ids import NodeId
from medshard_protocol.roster import Roster
from storenode.evidence import Detail
from storenode.watching.verdict import Signed, apart_s, read_note

stale_after_s: Final = 60.0  # a head is cosigned anew every 5 s
shown_bytes_max: Final = 64 * 1024  # of a document that is no checkpoint


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that should not be. ``documents`` is empty where nothing can be shown to others."""

    kind: str
    source: str  # who showed it
    text: str
    documents: Mapping[str, bytes] = field(default_factory=dict)
    details: Mapping[str, Detail] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Head:
    """What one source showed, with signatures checked."""

    source: str
    node: NodeId | None  # the source, where it is a mirror of the roster
    note: bytes
    signed: Signed
    published: bool

    @property
    def checkpoint(self) -> Checkpoint:
        """The claim."""
        return self.signed.checkpoint

    @property
    def at(self) -> float:
        """When it was cosigned: the median of what the cosigners state, in Unix seconds; 0 for one that nobody cosigned."""
        return statistics.median(self.signed.cosigned.values()) if self.signed.cosigned else 0.0

    @property
    def own_time(self) -> int | None:
        """When the source itself cosigned it."""
        return self.signed.cosigned.get(self.node) if self.node is not None else None


def read_head(source: str, node: NodeId | None, data: bytes, rosters: Sequence[Roster]) -> tuple[Head | None, list[Finding]]:
    """Check what a source shows. ``rosters`` are those to which a head may belong, newest last."""
    try:
        signed = read_note(data, rosters)
    except MedshardError as error:
        return None, [Finding("bad-signature", source, f"shows no checkpoint of this log: {error}", {"note 1": data[:shown_bytes_max]})]
    head = Head(source, node, data, signed, signed.roster.has_quorum(signed.cosigned))
    findings = []
    if not head.published:
        voices = signed.roster.voices.intersection(signed.cosigned)
        text = f"shows a head as published that {len(voices)} institutions cosigned; {signed.roster.quorum.q} are needed"
        findings.append(Finding("few-cosigners", source, text, {"note 1": data}))
    if node is not None and head.own_time is None:
        findings.append(Finding("not-cosigned", source, "shows a head without its own cosignature", {"note 1": data}))
    return head, findings + list(_clocks(head))


def _clocks(head: Head) -> Iterable[Finding]:
    for node, time in head.signed.cosigned.items():
        off = time - head.at
        if len(head.signed.cosigned) > 2 and abs(off) > apart_s:
            name = head.signed.roster.node(node).name
            text = f"cosigns with a clock that is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the other cosigners'"
            yield Finding("clock", name, text, {"note 1": head.note}, {"seconds": int(abs(off))})


def forks(shown: Sequence[Head], before: Iterable[Head]) -> list[Finding]:
    """Pairs of heads of one size with two roots, at least one of them shown now."""
    first: dict[int, Head] = {}
    for head in (*before, *shown):
        first.setdefault(head.checkpoint.size, head)
    findings = []
    for head in shown:
        other = first[head.checkpoint.size]
        if other.checkpoint.root != head.checkpoint.root:
            text = f"shows another history of {head.checkpoint.size} entries than {other.source} did"
            one, two = sorted((other.note, head.note))  # so that whoever sees the pair, in whatever order, keeps the same file
            findings.append(Finding("fork", head.source, text, {"note 1": one, "note 2": two}, {"size": head.checkpoint.size}))
    return findings


def rollback(head: Head, before: Head | None, *, again: bool) -> Finding | None:
    """Judge a source that shows a smaller head than it showed before. A node that was restored or restarted may do so for a moment, so
    that counts only when it does it ``again``, unless its own signature shows that it went back."""
    if before is None or head.checkpoint.size >= before.checkpoint.size:
        return None
    backwards = head.own_time is not None and before.own_time is not None and head.own_time > before.own_time
    if not backwards and not again:
        return None
    sizes = {"size": head.checkpoint.size, "old_size": before.checkpoint.size}
    text = f"went back from {sizes['old_size']} entries to {sizes['size']}" + (" and cosigned that" if backwards else "")
    return Finding("rollback", head.source, text, {"note 1": before.note, "note 2": head.note}, sizes)


def laggards(heads: Sequence[Head], after_s: float) -> list[Finding]:
    """Sources whose head is much older than that of others."""
    newest = max((head.at for head in heads if head.published), default=0.0)
    return [
        Finding(
            "stale",
            head.source,
            f"shows a head that is {newest - head.at:.0f} s older than the newest",
            {"note 1": head.note},
            {"seconds": int(newest - head.at)},
        )
        for head in heads
        if head.published and newest - head.at > after_s
    ]
