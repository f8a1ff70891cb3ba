"""Nodes of a trial are forked from one program: each is a process of its own, and how it ended is told as often as it is asked."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from medshard import nursery as module
from medshard.nursery import Nursery
from medshard_protocol.errors import Absent


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    made = Nursery(Path(module.__file__).with_name("tether.py"))
    yield made
    made.close()


def test_a_child_runs_the_program_with_its_output_in_its_log(nursery: Nursery, tmp_path: Path) -> None:
    child = nursery.start(["--version"], tmp_path / "log")
    assert child.wait(30) == 0
    assert (tmp_path / "log").read_text().startswith("storenode ")
    assert child.pid not in (0, os.getpid())


def test_how_a_child_ended_is_told_twice(nursery: Nursery, tmp_path: Path) -> None:
    """Two threads may ask at once; the second question must not end the program and every node with it."""
    child = nursery.start(["no-such-command"], tmp_path / "log")
    assert child.wait(30) == 2
    assert nursery.ask({"poll": child.pid}) == 2
    assert nursery.fits


def test_where_the_program_has_ended_nothing_is_started_and_its_children_count_as_killed(nursery: Nursery, tmp_path: Path) -> None:
    child = nursery.start(["--home", str(tmp_path), "run"], tmp_path / "log")
    nursery.close()
    assert child.poll() == -signal.SIGKILL
    with pytest.raises(Absent):
        nursery.start(["--version"], tmp_path / "log")


def test_a_setting_that_acts_at_a_programs_start_fits_no_loaded_one(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER", "1")
    assert nursery.fits
    monkeypatch.setenv("LD_PRELOAD", "/nowhere.so")
    assert not nursery.fits
