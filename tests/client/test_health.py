"""What a client remembers of nodes that did not answer or fell behind, and for how long."""

from __future__ import annotations

import pytest

from medshard.health import Health, longest_s, suspect_s
from medshard_protocol.ids import NodeId

one, two = NodeId(b"1" * 32), NodeId(b"2" * 32)


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def test_who_does_not_answer_is_suspect_for_a_while_or_until_it_answers() -> None:
    health = Health(clock := Clock())
    health.suspect(one)
    health.suspect(two)
    assert health.is_suspect(one)
    assert health.is_slow(one)
    health.well(one)
    assert not health.is_slow(one)
    clock.now += suspect_s + 1
    assert not health.is_suspect(two)


def test_who_fell_behind_stays_slow_though_it_answers_until_it_keeps_up() -> None:
    health = Health(Clock())
    health.slow(one)
    health.well(one)
    assert health.is_slow(one)
    assert not health.is_suspect(one)
    health.kept_up(one)
    assert not health.is_slow(one)


def test_who_falls_behind_again_and_again_is_remembered_longer_up_to_a_limit() -> None:
    health = Health(clock := Clock())
    for term in (30, 60, 120, 240, 480, longest_s, longest_s):
        health.slow(one)
        health.slow(one)  # in the same moment: counts once
        clock.now += term - 1
        assert health.is_slow(one)
        clock.now += 2
        assert not health.is_slow(one)


def test_the_next_command_knows_what_this_one_learnt() -> None:
    health = Health(clock := Clock())
    health.suspect(one)
    health.slow(two)
    later = Health(clock)
    later.recall(health.notes())
    assert later.is_suspect(one)
    assert later.is_slow(two)
    clock.now += suspect_s + 1
    assert not later.is_slow(one)
    assert not later.is_slow(two)


@pytest.mark.parametrize("notes", [b"", b"\xc0", b"\x92\x91\xc0\x90", b"\x92\x90\x91\x91\xa1x", b"\xff" * 100])
def test_notes_that_make_no_sense_are_none(notes: bytes) -> None:
    health = Health(Clock())
    health.recall(notes)
    assert not health.is_slow(one)


def test_a_clock_that_was_set_back_makes_no_suspicion_last() -> None:
    health = Health(clock := Clock())
    health.suspect(one)
    health.slow(one)
    clock.now -= 100_000
    assert not health.is_slow(one)
