"""Old published heads that a node keeps, so that times can be proved later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medshard_protocol.checkpoint import Checkpoint
from medshard_protocol.errors import Absent
from storenode.heads import Heads, keep_every_s
from storenode.ledger import Published


class Kept:
    """Heads in a file, with a clock that stands where the test puts it."""

    def __init__(self, path: Path, consortium: Any) -> None:
        self.c, self.path, self.now = consortium, path, 0.0
        self.heads = self.opened()

    def opened(self) -> Heads:
        heads = Heads(self.path, lambda: self.now)
        heads.open()
        return heads

    def published(self, size: int) -> Published:
        checkpoint = Checkpoint(self.c.roster.origin, size, bytes([size % 256]) * 32)
        return Published(checkpoint, self.c.note(checkpoint, (0, 1, 2)).to_bytes())

    def note(self, size: int, after_s: float = keep_every_s) -> bytes:
        self.now += after_s
        self.heads.note(self.published(size))
        return self.published(size).note


@pytest.fixture
def kept(tmp_path: Path, consortium: Any) -> Kept:
    return Kept(tmp_path / "heads", consortium(4))


def test_the_oldest_head_over_an_entry_is_shown(kept: Kept) -> None:
    first, second, third = kept.note(3), kept.note(7), kept.note(90)
    assert [kept.heads.over(index) for index in (0, 2, 3, 6, 7, 89)] == [first, first, second, second, third, third]
    with pytest.raises(Absent):
        kept.heads.over(90)


def test_one_is_kept_every_ten_minutes_and_only_of_a_log_that_grew(kept: Kept) -> None:
    first = kept.note(3)
    for size in (4, 5, 6):
        kept.note(size, 1)
    kept.note(3)
    later = kept.note(9, 0)
    assert (kept.heads.over(0), kept.heads.over(3)) == (first, later)
    assert len(kept.path.read_bytes()) == 2 * 12 + len(first) + len(later)


def test_what_was_kept_is_there_after_a_restart_and_a_torn_record_is_not(kept: Kept) -> None:
    first, second = kept.note(3), kept.note(7)
    kept.heads.close()
    kept.path.write_bytes(kept.path.read_bytes()[:-1])
    kept.heads = kept.opened()
    assert kept.heads.over(2) == first
    with pytest.raises(Absent):
        kept.heads.over(3)
    assert kept.note(7) == second == kept.heads.over(3)
