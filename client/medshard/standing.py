"""What keeps one object, by the ledger: retention, holds, proposals, and its end, folded from the entries that name it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from medshard.rights import Ledgered
from medshard_protocol.entries import Entry, Erase, Hold, Propose, Release, Retain, Retire, Type
from medshard_protocol.ids import Key, Sha256


@dataclass(frozen=True, slots=True)
class Standing:
    """What the ledger says of an object, as of ``time`` by its cosigners."""

    until: int
    holds: dict[Sha256, tuple[int, bool]]  # by id: the entry, and whether this vault made it
    proposed: Mapping[Type, Mapping[Key, int]]  # HOLD and RELEASE: who wants it and waits for a second person, and by which entry
    end: tuple[int, Entry] | None
    time: int


def fold(told: Ledgered, own: Collection[Key]) -> Standing:
    """What the effective entries of a file come to."""
    until, holds, end = 0, dict[Sha256, tuple[int, bool]](), None
    proposed: dict[Type, dict[Key, int]] = {Type.HOLD: {}, Type.RELEASE: {}}
    for index, entry in sorted(told.entries.items()):
        if index not in told.told_effective:
            continue
        match entry.body:
            case Retain(until=at):
                until = max(until, at)
            case Propose(what=what, stands=True):
                proposed[what][entry.author] = index
            case Propose(what=what):
                proposed[what].clear()
            case Hold():
                holds[entry.id] = (index, entry.author in own)
                proposed = {Type.HOLD: {}, Type.RELEASE: {}}
            case Release(hold=hold):
                holds.pop(hold, None)
                if not holds:
                    proposed[Type.RELEASE].clear()
            case Retire() | Erase():
                end = (index, entry)
    return Standing(until, holds, proposed, end, told.time)
