"""When the log had which size, as a node remembers it for people."""

from __future__ import annotations

from pathlib import Path

import pytest

from storenode.clock import Clock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clock"


def opened(path: Path) -> Clock:
    clock = Clock(path)
    clock.open()
    return clock


def test_an_entry_was_published_with_the_first_checkpoint_over_it(path: Path) -> None:
    clock = opened(path)
    for size, time in ((1, 100), (5, 101), (6, 107), (900, 200)):
        clock.note(size, time)
    assert clock.times([0, 1, 4, 5, 6, 899, 900]) == [100, 101, 101, 107, 200, 200, 0]


def test_of_several_checkpoints_in_one_second_one_record_is_kept(path: Path) -> None:
    clock = opened(path)
    for size in range(1, 11):
        clock.note(size, 100)
    assert path.stat().st_size == 16
    assert clock.times([0, 9, 10]) == [100, 100, 0]


def test_an_older_or_equal_checkpoint_changes_nothing(path: Path) -> None:
    clock = opened(path)
    clock.note(5, 100)
    for size, time in ((5, 105), (4, 105), (6, 99)):
        clock.note(size, time)
    assert clock.times([4, 5]) == [100, 0]


def test_what_was_noted_is_there_after_a_restart_and_a_torn_record_is_not(path: Path) -> None:
    clock = opened(path)
    clock.note(3, 100)
    clock.note(7, 200)
    clock.close()
    with path.open("ab") as file:
        file.write(b"half")
    again = opened(path)
    again.note(9, 300)
    assert again.times([2, 6, 8, 9]) == [100, 200, 300, 0]


def test_an_empty_clock_knows_nothing(path: Path) -> None:
    assert opened(path).times([0, 7]) == [0, 0]
