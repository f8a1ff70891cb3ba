"""Nodes of a trial are forked from one program: each is a process of its own, and how it ended is told as often as it is asked."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from medshard.nursery import Nursery, loaded, run
from medshard_protocol.errors import Absent


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


def test_a_child_runs_the_program_with_its_output_in_its_log(nursery: Nursery, tmp_path: Path) -> None:
    for _ in range(2):  # a node that is started again
        child = nursery.start(["-m", "storenode", "--version"], tmp_path / "log")
        assert child.wait(30) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.startswith("storenode ") for line in lines] == [True, True]
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


def is_alive(pid: int) -> bool:
    """Whether it runs: a process that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_where_the_program_has_ended_nothing_is_started_and_its_children_count_as_killed(tmp_path: Path) -> None:
    nursery = Nursery()
    (tmp_path / "script.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    child = nursery.start([str(tmp_path / "script.py")], tmp_path / "log")
    deadline = time.monotonic() + 60
    (tmp_path / "log").touch()
    while (tmp_path / "log").read_text() != "up\n" and time.monotonic() < deadline:
        time.sleep(0.01)
    nursery.close()
    assert child.poll() == -signal.SIGKILL
    while (lives := is_alive(child.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    if lives:
        os.kill(child.pid, signal.SIGKILL)
    assert not lives or sys.platform != "linux"
    with pytest.raises(Absent):
        nursery.start(["-m", "storenode", "--version"], tmp_path / "log")


def test_a_command_is_run_where_its_caller_stands_with_the_environment_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "print(os.getcwd(), os.environ.get('OTHER'), time.strftime('%z'), file=sys.stderr)\n"
        "print(repr(sys.stdin.read()), os.getsid(0) == os.getpid())\n"
    )
    assert loaded()  # it stands elsewhere
    monkeypatch.chdir(tmp_path)
    here = {**os.environ, "TZ": "UTC"}
    for environ, zone in (here, "+0000"), ({**here, "OTHER": "1", "TZ": "EAST-05:30"}, "+0530"), ({**here, "PYTHONHASHSEED": "0"}, "+0000"):
        done = run(["script.py"], environ)
        own = "PYTHONHASHSEED" not in environ  # a session: Ctrl-C is for others
        assert (done.returncode, done.stdout, done.stderr) == (0, f"'' {own}\n", f"{tmp_path} {environ.get('OTHER')} {zone}\n")


def test_a_setting_that_acts_at_a_programs_start_fits_no_loaded_one(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER", "1")
    assert nursery.fits()
    monkeypatch.setenv("LD_PRELOAD", "/nowhere.so")
    assert not nursery.fits()
