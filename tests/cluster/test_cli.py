"""The command line against a real consortium: six node processes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydicom.data import get_testdata_file
from tests.cluster.hearing import wait_for_every_shard

from medshard.cli.exits import Exit
from medshard.cli.main import main
from medshard.consortium import LocalConsortium
from medshard.demo import policy_pdf


class Told(NamedTuple):
    """What a command wrote."""

    out: str
    err: str


class Captured:
    """Standard output and error as text. File names that are no text become surrogates, as in Python's own names."""

    def __init__(self, binary: pytest.CaptureFixture[bytes]) -> None:
        self._binary = binary

    def readouterr(self) -> Told:
        """What was written since the last call."""
        return Told(*(os.fsdecode(stream) for stream in self._binary.readouterr()))


@pytest.fixture
def capsys(capsysbinary: pytest.CaptureFixture[bytes]) -> Captured:
    return Captured(capsysbinary)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("trial")) as consortium:
        yield consortium


@pytest.fixture(autouse=True)
def every_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_every_shard(monkeypatch)


@pytest.fixture(autouse=True)
def here(trial: LocalConsortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for each test, all nodes up, and the vault at home."""
    for name in ("MEDSHARD_PASSPHRASE", "MEDSHARD_PASSPHRASE_FILE", "MEDSHARD_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MEDSHARD_HOME", str(trial.vault_home))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def without(trial: LocalConsortium) -> Iterator[Callable[[int], list[str]]]:
    """Kill so many nodes, the sequencer last; all are back after the test."""
    killed: list[str] = []

    def kill(count: int) -> list[str]:
        for name in trial.names[::-1][:count]:
            trial.kill(name)
            killed.append(name)
        return killed

    yield kill
    for name in killed:
        trial.restart(name)


@pytest.fixture
def frozen(trial: LocalConsortium) -> Iterator[Callable[[int], list[str]]]:
    """Freeze so many nodes, the sequencer last; all go on after the test."""
    names: list[str] = []

    def freeze(count: int) -> list[str]:
        for name in trial.names[::-1][:count]:
            trial.freeze(name)
            names.append(name)
        return names

    yield freeze
    for name in names:
        trial.thaw(name)


def fresh(path: Path, size: int = 1_000) -> bytes:
    """Write a file that nobody stored before; its SHA-256."""
    data = os.urandom(size)
    path.write_bytes(data)
    return sha256(data).digest()


def stored(path: Path, capsys: Captured, *options: str) -> str:
    """Put one file; its SHA-256 as printed."""
    assert main(["put", "-q", str(path), *options]) == Exit.OK
    printed, name = capsys.readouterr().out.rstrip("\n").split("  ", 1)
    assert name == str(path)
    return printed


def document(capsys: Captured, *arguments: str, code: int = Exit.OK) -> Any:
    """Run a command with --json; its document."""
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def medshard(*arguments: str | bytes, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "medshard", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


# Put and get


def test_what_is_put_comes_back_by_its_hash(here: Path, capsys: Captured) -> None:
    scan, policy = here / "scan.dcm", here / "policy.pdf"
    shutil.copy(str(get_testdata_file("CT_small.dcm", download=False)), scan)
    policy.write_bytes(policy_pdf())
    assert main(["put", "scan.dcm", "policy.pdf"]) == Exit.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in (scan, policy)]
    for line, path in zip(lines, (scan, policy), strict=True):
        assert main(["get", line[:64], "-o", "back"]) == Exit.OK
        assert (here / "back").read_bytes() == path.read_bytes()
        assert capsys.readouterr().out == f"{line[:64]}  back\n"


def test_the_output_of_put_is_checked_by_sha256sum(here: Path) -> None:
    (here / "study").mkdir()
    for name in (b"plain", b"caf\xe9.bin", b"new\nline", b"back\\slash"):
        with open(os.path.join(os.fsencode(here), b"study", name), "wb") as file:
            file.write(os.urandom(100))
    with medshard("put", "study") as child:
        out, err = child.communicate()
    assert (child.returncode, err) == (0, b"")
    (here / "sums").write_bytes(out)
    assert subprocess.run(["sha256sum", "--check", "--quiet", "sums"], check=False).returncode == 0
    assert len(out.splitlines()) == 4


def test_a_name_that_is_not_utf_8_comes_back_as_its_bytes(here: Path) -> None:
    name = os.path.join(os.fsencode(here), b"caf\xe9 \xff.bin")
    with open(name, "wb") as file:
        file.write(os.urandom(100))
    with medshard("put", name) as child:
        out, _ = child.communicate()
    assert out[66:] == name + b"\n"
    os.unlink(name)
    with medshard("get", out[:64]) as child:
        out, _ = child.communicate()
    assert os.path.exists(name)
    assert os.path.basename(out[66:-1]) == b"caf\xe9 \xff.bin"


def test_an_empty_file_is_a_file(here: Path, capsys: Captured) -> None:
    (here / "empty").touch()
    printed = stored(here / "empty", capsys)
    assert printed == sha256(b"").hexdigest()
    assert main(["get", printed, "-o", "back"]) == Exit.OK
    assert (here / "back").read_bytes() == b""


def test_putting_the_same_again_stores_nothing_new(here: Path, capsys: Captured) -> None:
    fresh(here / "file")
    first = document(capsys, "put", "file")
    again = document(capsys, "put", "file")
    assert [entry["already"] for entry in (*first["stored"], *again["stored"])] == [False, True]
    assert first["stored"][0]["ledger_index"] == again["stored"][0]["ledger_index"]


def test_a_tag_given_later_is_not_lost(here: Path, capsys: Captured) -> None:
    fresh(here / "file")
    printed = stored(here / "file", capsys)
    assert stored(here / "file", capsys, "--tag", "case=late") == printed
    assert [row["sha256"] for row in document(capsys, "find", "--tag", "case=late")["files"]] == [printed]
    assert document(capsys, "put", "file", "--tag", "case=late")["stored"][0]["already"]
    assert main(["get", printed, "-o", "back"]) == Exit.OK


def test_a_folder_with_broken_dicom_is_stored_and_the_report_says_which(here: Path, capsys: Captured) -> None:
    study = here / "study"
    study.mkdir()
    good = Path(str(get_testdata_file("MR_small.dcm", download=False))).read_bytes()
    (study / "good.dcm").write_bytes(good)
    (study / "broken.dcm").write_bytes(bytes(128) + b"DICM" + b"garbage" * 40)
    (study / "cut.dcm").write_bytes(good[:-500])
    assert main(["put", "study"]) == Exit.OK
    told = capsys.readouterr()
    assert sorted(line.split("/")[-1] for line in told.out.splitlines()) == ["broken.dcm", "cut.dcm", "good.dcm"]
    assert "study/broken.dcm: broken DICOM" in told.err
    assert "study/cut.dcm: broken DICOM: ends early" in told.err
    assert "good.dcm" not in told.err


@pytest.mark.parametrize("path", ["/proc/self/mem", "nowhere", "/dev/null"])
def test_a_file_that_cannot_be_read_stops_no_other(path: str, here: Path, capsys: Captured) -> None:
    fresh(here / "good")
    assert main(["put", path]) == Exit.LOCAL
    told = capsys.readouterr()
    assert told.out == ""
    assert path in told.err
    assert main(["put", path, "good"]) == Exit.PARTIAL
    told = capsys.readouterr()
    assert told.out.endswith("  good\n")
    assert f"{path}: " in told.err


def test_get_leaves_another_file_alone_unless_told(here: Path, capsys: Captured) -> None:
    fresh(here / "scan")
    printed = stored(here / "scan", capsys)
    assert main(["get", printed]) == Exit.OK  # the same bytes are there: fine
    (here / "scan").write_bytes(b"something else")
    assert main(["get", printed]) == Exit.LOCAL
    assert "--force" in capsys.readouterr().err
    assert (here / "scan").read_bytes() == b"something else"
    assert main(["get", printed, "--force"]) == Exit.OK
    assert sha256((here / "scan").read_bytes()).hexdigest() == printed


def test_several_files_go_into_a_folder(here: Path, capsys: Captured) -> None:
    (here / "study").mkdir()
    hashes = [fresh(here / "study" / name).hex() for name in ("a", "b", "c")]
    assert main(["put", "-q", "study"]) == Exit.OK
    assert main(["get", *hashes, "-o", "restored"]) == Exit.OK
    for name in ("a", "b", "c"):
        assert (here / "restored" / "study" / name).read_bytes() == (here / "study" / name).read_bytes()
    assert main(["get", *hashes, "-o", "study/a"]) == Exit.USAGE


def test_a_file_goes_to_standard_output(here: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    digest = fresh(here / "file", 300_000)
    assert main(["put", "-q", "file"]) == Exit.OK
    capsysbinary.readouterr()
    assert main(["get", digest.hex(), "-o", "-"]) == Exit.OK
    assert sha256(capsysbinary.readouterr().out).digest() == digest


# Refusals


def test_an_unknown_hash_is_said_to_be_unknown(capsys: Captured, here: Path) -> None:
    for command in ("get", "info", "verify"):
        assert main([command, "ab" * 32]) == Exit.ABSENT
        assert "hint: " in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_a_wrong_passphrase_is_refused(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", "not this one")
    assert main(["ls"]) == Exit.REFUSED
    assert "passphrase" in capsys.readouterr().err


def test_joining_with_a_code_that_is_none_is_refused(here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", "some words")
    assert main(["join", "--home", str(here / "new"), "not-a-code"]) not in (Exit.OK, Exit.BUG)
    assert "medshard: " in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(here / "file", 300_000)
    printed = stored(here / "file", capsys)
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); import signal; "
    limited += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from medshard.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", limited, "get", printed, "-o", "back"], capture_output=True, text=True, check=False)
    assert done.returncode == Exit.LOCAL, done.stderr
    assert sorted(path.name for path in here.iterdir()) == ["file"]


# Look


def test_what_was_put_is_found(here: Path, capsys: Captured) -> None:
    (here / "mr.dcm").write_bytes(Path(str(get_testdata_file("MR_small_bigendian.dcm", download=False))).read_bytes())
    (here / "policy.pdf").write_bytes(policy_pdf() + os.urandom(8))
    stored(here / "mr.dcm", capsys)
    policy = stored(here / "policy.pdf", capsys, "--policy-number", "VN-4711", "--tag", "branch=life")
    for query in (
        ["--policy-number", "vn-4711"],
        ["--tag", "branch=life", "--type", "pdf"],
        ["--name", "policy.*", "--policy-number", "VN-47*"],
    ):
        assert [row["sha256"] for row in document(capsys, "find", *query)["files"]] == [policy]
    for query in (["--patient", "mr1"], ["--modality", "mr"], ["--study-date", "2004"], ["mr.dcm"]):
        assert {row["name"] for row in document(capsys, "find", *query)["files"]} >= {"mr.dcm"}
    assert document(capsys, "find", "--patient", "nobody")["files"] == []
    assert main(["find", "-l", "--policy-number", "VN-4711"]) == Exit.OK
    told = capsys.readouterr().out
    assert told.startswith(policy)
    assert "    tag:branch: life\n" in told
    assert main(["ls"]) == Exit.OK
    assert policy in capsys.readouterr().out


def test_info_says_all_there_is_to_say(here: Path, capsys: Captured, trial: LocalConsortium) -> None:
    fresh(here / "file", 5_000)
    printed = stored(here / "file", capsys)
    found = document(capsys, "info", printed)
    assert (found["k"], found["n"], found["row"]["size"]) == (3, 6, 5_000)
    assert sorted(node["node"] for node in found["nodes"]) == trial.names
    assert {node["state"] for node in found["nodes"]} == {"up"}
    assert len(found["cosigners"]) >= 4
    assert main(["info", printed]) == Exit.OK
    told = capsys.readouterr().out
    for text in ("any 3 of 6 shards", trial.names[0], "cosigned by", f"entry {found['ledger_index']} of"):
        assert text in told


def known(capsys: Captured) -> list[Any]:
    """All rows of the index."""
    return sorted(document(capsys, "ls")["files"], key=lambda row: (row["file_id"], row["member"] or 0))


def test_an_index_that_is_gone_or_broken_is_made_again(here: Path, capsys: Captured, trial: LocalConsortium) -> None:
    fresh(here / "file")
    printed = stored(here / "file", capsys, "--tag", "k=v")
    before = known(capsys)
    for path in trial.vault_home.glob("index.sqlite*"):
        path.unlink()
    assert document(capsys, "ls")["files"] == []
    assert main(["get", printed, "-o", "back"]) == Exit.OK  # no index is needed for that
    capsys.readouterr()
    assert document(capsys, "reindex")["files"] == len(before)
    assert known(capsys) == before
    for path in trial.vault_home.glob("index.sqlite*"):
        path.unlink()
    (trial.vault_home / "index.sqlite").write_bytes(b"this is no database" * 1000)
    assert main(["ls"]) == Exit.DAMAGED
    assert "medshard reindex" in capsys.readouterr().err
    assert main(["reindex"]) == Exit.OK
    assert capsys.readouterr().out == f"{len(before)} files\n"
    assert known(capsys) == before


# Faults


def test_a_flipped_bit_is_found_and_does_no_harm(here: Path, capsys: Captured, trial: LocalConsortium) -> None:
    fresh(here / "file", 600_000)
    (entry,) = document(capsys, "put", "file")["stored"]
    assert document(capsys, "verify", entry["sha256"])["ok"]
    name = trial.names[1]
    (shard,) = (trial.home(name) / "data" / "shards").rglob(f"*{entry['file_id']}*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    assert main(["verify", entry["sha256"]]) == Exit.DAMAGED
    told = capsys.readouterr().out
    assert f"damaged     {name}" in told
    assert "2 more shards may be lost" in told
    assert main(["verify", "--all"]) == Exit.DAMAGED
    assert name in capsys.readouterr().out
    assert main(["get", entry["sha256"], "-o", "back"]) == Exit.OK
    assert (here / "back").read_bytes() == (here / "file").read_bytes()
    capsys.readouterr()
    shutil.rmtree(shard.parent)  # and a shard that is gone
    report = document(capsys, "verify", entry["sha256"], code=Exit.DAMAGED)
    assert {holder["node"]: holder["state"] for holder in report["files"][0]["holders"]}[name] in ("missing", "damaged")


def test_with_fewer_than_w_institutions_nothing_is_acknowledged(here: Path, capsys: Captured, without: Callable[[int], list[str]]) -> None:
    fresh(here / "before")
    known = stored(here / "before", capsys)
    gone = without(2)
    digest = fresh(here / "file")
    started = time.monotonic()
    assert main(["put", "file"]) == Exit.UNAVAILABLE
    assert time.monotonic() - started < 60
    told = capsys.readouterr()
    assert told.out == ""
    assert "hint: " in told.err
    assert main(["find", "--name", "file", "--json"]) == Exit.OK
    assert digest.hex() not in capsys.readouterr().out
    assert main(["get", known, "-o", "back"]) == Exit.OK
    assert (here / "back").read_bytes() == (here / "before").read_bytes()
    capsys.readouterr()
    assert main(["verify", known]) == Exit.UNAVAILABLE
    assert "1 more shards may be lost" in capsys.readouterr().out
    main(["doctor"])
    told = capsys.readouterr()
    assert all(name in told.out for name in gone)


def test_with_fewer_than_k_nodes_get_says_how_many_and_which(here: Path, capsys: Captured, without: Callable[[int], list[str]]) -> None:
    fresh(here / "file", 300_000)
    printed = stored(here / "file", capsys)
    gone = without(4)
    assert main(["get", printed, "-o", "back"]) == Exit.UNAVAILABLE
    told = capsys.readouterr().err
    assert "2" in told
    assert "3" in told
    assert all(name in told for name in gone)
    assert sorted(path.name for path in here.iterdir()) == ["file"]


def interrupt(child: subprocess.Popen[bytes], after_s: float) -> bytes:
    """Press Ctrl-C; what was said."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("started in the background: SIGINT is ignored here and in every child")
    time.sleep(after_s)
    assert child.poll() is None, "it ended before it could be interrupted"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    return err


def interrupted(*arguments: str) -> None:
    """Press Ctrl-C in the middle of a command; later where a busy machine was still loading the program."""
    for after_s in (2.0, 6.0, 20.0):
        with medshard(*arguments) as child:
            told = interrupt(child, after_s)
        if b"importlib._bootstrap" not in told:
            break
    assert b"interrupted" in told
    assert child.returncode == Exit.INTERRUPTED


def test_an_interrupted_put_is_finished_by_the_same_command(
    here: Path, capsys: Captured, trial: LocalConsortium, frozen: Callable[[int], list[str]]
) -> None:
    digest = fresh(here / "file", 2_000_000)
    names = frozen(3)
    interrupted("put", "file")
    for name in names:
        trial.thaw(name)
    assert stored(here / "file", capsys) == digest.hex()
    assert main(["get", digest.hex(), "-o", "back"]) == Exit.OK
    assert sha256((here / "back").read_bytes()).digest() == digest


def test_an_interrupted_get_leaves_nothing(here: Path, capsys: Captured, frozen: Callable[[int], list[str]]) -> None:
    fresh(here / "file", 2_000_000)
    printed = stored(here / "file", capsys)
    frozen(4)
    interrupted("get", printed, "-o", "back")
    assert sorted(path.name for path in here.iterdir()) == ["file"]


def test_doctor_finds_nothing_wrong_with_a_sound_vault(capsys: Captured) -> None:
    assert main(["doctor"]) == Exit.OK
    assert "✗" not in capsys.readouterr().out
    assert document(capsys, "doctor")["ok"]


# Up and demo


def wait_for_line(child: subprocess.Popen[bytes], start: bytes) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(start):
            return
    raise AssertionError(f"no line starts with {start!r}: {child.stderr.read() if child.stderr else b''!r}")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # a zombie has ended, and waits for whoever is to be told


def test_up_runs_a_consortium_until_it_is_stopped_and_uses_it_again(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    fresh(here / "file")
    printed = ""
    for number in (signal.SIGINT, signal.SIGTERM):
        with medshard("up", "--dir", str(here / "trial"), "--institutions", "1") as child:
            wait_for_line(child, b"ready")
            pids = {path.parent.name: int(path.read_text()) for path in (here / "trial" / "nodes").glob("*/pid")}
            assert len(pids) == 1
            assert all(alive(pid) for pid in pids.values())
            monkeypatch.setenv("MEDSHARD_HOME", str(here / "trial" / "vault"))
            printed = printed or stored(here / "file", capsys)
            assert main(["get", printed, "-o", "back"]) == Exit.OK
            name, pid = sorted(pids.items())[-1]
            os.kill(pid, signal.SIGKILL)
            assert child.stderr is not None
            told = f"node {name} ended (signal SIGKILL)".encode()
            assert any(told in line for line in child.stderr)  # read until it says so
            child.send_signal(number)
            child.communicate(timeout=60)
        assert child.returncode == 0
        assert not any(alive(pid) for pid in pids.values())
        assert not list((here / "trial" / "nodes").glob("*/pid"))


def test_nodes_do_not_outlive_an_up_that_is_killed(here: Path) -> None:
    with medshard("up", "--dir", str(here / "trial"), "--institutions", "1") as child:
        wait_for_line(child, b"ready")
        (pid,) = [int(path.read_text()) for path in (here / "trial" / "nodes").glob("*/pid")]
        child.kill()
        child.communicate()
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_two_ups_do_not_share_a_folder(trial: LocalConsortium, capsys: Captured) -> None:
    assert main(["up", "--dir", str(trial.folder)]) == Exit.LOCAL
    assert "runs already" in capsys.readouterr().err
    assert main(["up", "--dir", str(trial.folder), "--code", "2/6"]) == Exit.LOCAL
    assert "code 3/6" in capsys.readouterr().err


def test_the_demo_keeps_every_promise() -> None:
    with medshard("demo") as child:
        out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err.decode() + out.decode()
    assert "every promise was kept" in out.decode()
