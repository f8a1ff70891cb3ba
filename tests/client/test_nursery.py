"""Nodes of a trial are forked from one program: each is a process of its own, and how it ended is told as often as it is asked."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from medshard.nursery import Nursery, run
from medshard_protocol.errors import Absent


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


def test_a_child_runs_the_program_with_its_output_in_its_log(nursery: Nursery, tmp_path: Path) -> None:
    child = nursery.start(["-m", "storenode", "--version"], tmp_path / "log")
    assert child.wait(30) == 0
    assert (tmp_path / "log").read_text().startswith("storenode ")
    assert child.pid not in (0, os.getpid())


def test_how_a_child_ended_is_told_twice(nursery: Nursery, tmp_path: Path) -> None:
    """Two threads may ask at once; the second question must not end the program and every node with it."""
    child = nursery.start(["-m", "storenode", "no-such-command"], tmp_path / "out", tmp_path / "err")
    assert child.wait(30) == 2
    assert nursery.ask({"poll": child.pid}) == 2
    assert nursery.fits()
    assert "no-such-command" in (tmp_path / "err").read_text()
    assert (tmp_path / "out").read_text() == ""


def test_a_script_that_runs_the_program_in_another_way_is_run_with_its_arguments(nursery: Nursery, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, storenode.app\nif __name__ == '__main__':\n    print(sys.argv)\n    sys.exit(7)\n")
    child = nursery.start([str(script), "a"], tmp_path / "log")
    assert child.wait(30) == 7
    assert (tmp_path / "log").read_text() == f"{[str(script), 'a']}\n"


def test_where_the_program_has_ended_nothing_is_started_and_its_children_count_as_killed(tmp_path: Path) -> None:
    nursery = Nursery()
    child = nursery.start(["-m", "storenode", "--home", str(tmp_path), "run"], tmp_path / "log")
    nursery.close()
    assert child.poll() == -signal.SIGKILL
    with pytest.raises(Absent):
        nursery.start(["-m", "storenode", "--version"], tmp_path / "log")


def test_a_command_is_run_where_its_caller_stands_with_the_environment_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nprint(os.getcwd(), os.environ.get('OTHER'), file=sys.stderr)\nprint(repr(sys.stdin.read()))\n")
    monkeypatch.chdir(tmp_path)
    for environ in (os.environ, {**os.environ, "OTHER": "1"}, {**os.environ, "PYTHONHASHSEED": "0"}):
        done = run(["script.py"], environ)
        assert (done.returncode, done.stdout, done.stderr) == (0, "''\n", f"{tmp_path} {environ.get('OTHER')}\n")


def test_a_setting_that_acts_at_a_programs_start_fits_no_loaded_one(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER", "1")
    assert nursery.fits()
    monkeypatch.setenv("LD_PRELOAD", "/nowhere.so")
    assert not nursery.fits()
