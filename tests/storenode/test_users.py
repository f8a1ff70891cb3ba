"""`storenode users`: what became of each key, and by which entry."""

from __future__ import annotations

import pytest

from storenode.cli.users import _more, _told

old, new = "0a" * 32, "0b" * 32


@pytest.mark.parametrize(
    ("withdrawn", "heir", "inherits", "sends", "state", "said"),
    [
        (None, None, None, False, "user", "Dr. Weber"),
        (9, None, None, False, "withdrawn", "Dr. Weber  with entry 9"),
        (9, new, 9, False, "succeeded", f"Dr. Weber  by {new[:16]}… with entry 9"),
        (9, new, 12, False, "succeeded", f"Dr. Weber  by {new[:16]}… with entry 12  withdrawn with entry 9"),
        (None, new, 7, True, "sender", f"Dr. Weber  sends for {new[:16]}…"),
    ],
)
def test_each_key_is_told_with_the_entry_that_ended_it_and_the_one_that_passed_it_on(
    withdrawn: int | None, heir: str | None, inherits: int | None, sends: bool, state: str, said: str
) -> None:
    known = {"key": old, "first": 3, "withdrawn": withdrawn, "heir": heir, "inherits": inherits, "before": None, "sends": sends}
    told = _told(known, {old: "Dr. Weber"})
    assert (told["state"], told["succeeded"]) == (state, inherits if state == "succeeded" else None)
    assert _more(told) == said
