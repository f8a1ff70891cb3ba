"""What an operator types: real processes for the way from nothing to a running node, one process for the mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from medshard import nursery
from medshard_protocol.invite import Invite
from storenode.cli import main
from storenode.cli.main import Exit
from storenode.consortium import free_ports
from storenode.running import hold, running

environment = {name: value for name, value in os.environ.items() if not name.startswith("STORENODE")}


def storenode(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = nursery.run(["-m", "storenode", *map(str, words)], environment)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def started() -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    """Start nodes that end with the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(home: Path) -> subprocess.Popen[bytes]:
        with (home / "log").open("wb") as log:
            process = subprocess.Popen([sys.executable, "-m", "storenode", "--home", str(home), "run"], stderr=log, env=environment)
        processes.append(process)
        deadline = time.monotonic() + 60
        while b'"event":"ready"' not in (home / "log").read_bytes():
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.02)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


# -- from nothing to a running node


def test_from_nothing_to_a_running_node_and_its_end(tmp_path: Path, started: Callable[[Path], subprocess.Popen[bytes]]) -> None:
    home, port = tmp_path / "home", free_ports(2)
    made = storenode(
        "--home", home, "init", "--institution", "Hôpital 01", "--url", f"https://127.0.0.1:{port[0]}",
        "--listen", f"127.0.0.1:{port[0]}", "--metrics", f"127.0.0.1:{port[1]}", "--capacity", "5GB", "--json",
    )  # fmt: skip
    node = json.loads(made.stdout)
    assert (node["name"], node["card"]) == ("hopital-01", str(home / "hopital-01.card"))

    founded = storenode("genesis", node["card"], "--sequencer", "hopital-01", "-o", tmp_path / "genesis.medshard", "--json")
    roster = json.loads(founded.stdout)
    assert roster["fingerprints"] == {"hopital-01": node["fingerprint"]}
    storenode("--home", home, "adopt", tmp_path / "genesis.medshard", "--sha256", roster["genesis_sha256"])

    process = started(home)
    assert (home / "pid").read_text() == f"{process.pid}\n"
    status = json.loads(storenode("--home", home, "status", "--json").stdout)
    assert (status["name"], status["node"], status["pid"]) == ("hopital-01", node["node"], process.pid)
    assert status["capacity_bytes"] == 5_000_000_000
    assert "hopital-01 of Hôpital 01" in storenode("--home", home, "status").stdout
    assert "runs already" in storenode("--home", home, "run", code=Exit.LOCAL).stderr

    code = storenode("--home", home, "invite", "--for", "radiology", "--expires", "2h").stdout.strip()
    assert Invite.from_code(code).genesis_sha256.hex() == roster["genesis_sha256"]
    listed = json.loads(storenode("--home", home, "invite", "--list", "--json").stdout)["invites"]
    assert [(each["for"], each["state"], each["key"]) for each in listed] == [("radiology", "open", None)]

    with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/metrics") as response:
        assert b"medshard_capacity_bytes 5e+09" in response.read()

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert not (home / "pid").exists()
    assert "not running" in storenode("--home", home, "status", code=Exit.UNAVAILABLE).stderr
    for line in (home / "log").read_text().splitlines():
        json.loads(line)


def test_a_trial_of_sixteen_is_laid_out_whole(tmp_path: Path) -> None:
    made = json.loads(storenode("consortium", tmp_path / "t", "--institutions", 16, "--code", "10/16", "--invite", "--json").stdout)
    assert len(made["nodes"]) == 16
    assert made["code"] == {"k": 10, "n": 16, "w": 13}
    assert Path(made["genesis"]).is_file()
    assert all(Path(node["home"], "config.toml").is_file() for node in made["nodes"])
    assert Invite.from_code(made["invite"]).url == made["nodes"][0]["url"]


# -- mistakes: a sentence, a hint, a code


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = main([str(word) for word in words])
    return code, capsys.readouterr().err


def test_mistakes_have_a_message_a_hint_and_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--home", str(tmp_path / "a"), "init", "--institution", "A", "--url", "https://a.example:9700"])
    (tmp_path / "junk").write_bytes(b"junk")
    a, card, junk, nowhere = tmp_path / "a", tmp_path / "a/a.card", tmp_path / "junk", tmp_path / "nowhere"
    attempts: list[tuple[tuple[object, ...], Exit, str]] = [
        (("--home", a, "init", "--institution", "A", "--url", "https://a.example:9700"), Exit.LOCAL, "there is a node"),
        (("--home", nowhere, "run"), Exit.ABSENT, "config.toml does not exist"),
        (("--home", nowhere, "status"), Exit.ABSENT, "config.toml does not exist"),
        (("--home", a, "run"), Exit.ABSENT, "in no consortium yet"),
        (("--home", a, "invite"), Exit.ABSENT, "in no consortium yet"),
        (("--home", a, "adopt", junk), Exit.DAMAGED, "not a genesis file"),
        (("--home", a, "adopt", nowhere), Exit.ABSENT, "does not exist"),
        (("genesis", junk, "--sequencer", "a", "-o", nowhere), Exit.DAMAGED, "not a card"),
        (("genesis", card, "--sequencer", "b", "-o", nowhere), Exit.ABSENT, "'b'"),
        (("genesis", card, card, "--sequencer", "a", "-o", nowhere), Exit.LOCAL, "given twice"),
        (("genesis", card, "--sequencer", "a", "--code", "9", "-o", nowhere), Exit.DAMAGED, "code"),
        (("genesis", card, "--sequencer", "a", "-o", junk), Exit.LOCAL, "exists already"),
        (("genesis",), Exit.USAGE, "CARD"),
        (("frobnicate",), Exit.USAGE, "frobnicate"),
        (("--home", a, "invite", "--expires", "soon"), Exit.USAGE, "7d"),
        (("--home", nowhere, "init", "--institution", "B", "--url", "b.example"), Exit.DAMAGED, "url: expected"),
        (("--home", nowhere, "init", "--institution", "B", "--url", "https://b.example:1", "--name", "B b"), Exit.DAMAGED, "name"),
        (("--home", nowhere, "init", "--institution", "B", "--url", "https://b.example:1", "--capacity", "much"), Exit.USAGE, "2TB"),
        (("--home", nowhere, "init", "--institution", "B", "--url", "https://b.example:1", "--ca", nowhere), Exit.ABSENT, "ca.crt"),
        (("consortium", tmp_path / "c", "--institutions", "0"), Exit.DAMAGED, "1 to 64"),
        (("--home", junk, "init", "--institution", "B", "--url", "https://b.example:9700"), Exit.USAGE, "is a file"),
    ]
    capsys.readouterr()
    for words, expected, message in attempts:
        code, error = told(capsys, *words)
        assert (code, message in error) == (expected, True), (words, code, error)
        assert error.startswith("storenode: ")
        assert len(error.splitlines()) <= 2
        assert "Traceback" not in error


def test_a_failed_init_leaves_nothing_behind_and_can_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--home", str(tmp_path / "a"), "init", "--institution", "A", "--url", "https://a.example:9700"]
    assert main([*words, "--name", "No Name"]) == Exit.DAMAGED
    assert list((tmp_path / "a").iterdir()) == []
    assert main(words) == Exit.OK


def test_errors_are_json_where_json_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = told(capsys, "--home", tmp_path, "status", "--json")
    document = json.loads(error)["error"]
    assert (code, document["code"], document["kind"]) == (3, 3, "absent")
    assert document["hint"]


def test_a_bug_is_called_a_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("storenode.config.Config.load", lambda home: 1 / 0)
    code, error = told(capsys, "status")
    assert code == Exit.BUG
    assert "ZeroDivisionError" in error
    assert "Traceback" not in error


def test_a_wrong_sha256_keeps_a_genesis_file_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "a"
    main(["--home", str(home), "init", "--institution", "A", "--url", "https://a.example:9700"])
    main(["genesis", str(home / "a.card"), "--sequencer", "a", "-o", str(tmp_path / "g")])
    code, error = told(capsys, "--home", home, "adopt", tmp_path / "g", "--sha256", "0" * 64)
    assert (code, "do not use it" in error) == (Exit.REFUSED, True)
    assert not (home / "genesis.medshard").exists()


def test_a_second_node_shares_the_institutions_key_without_a_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "https://a.example:970"
    main(["--home", str(tmp_path / "a"), "init", "--institution", "A", "--url", url + "0"])
    options = ["--institution", "A", "--name", "a-b", "--url", url + "1", "--ca", str(tmp_path / "a/keys")]
    assert main(["--home", str(tmp_path / "b"), "init", *options]) == 0
    assert not (tmp_path / "b/keys/ca.key").exists()
    assert main(["genesis", str(tmp_path / "a/a.card"), str(tmp_path / "b/a-b.card"), "--sequencer", "a", "-o", str(tmp_path / "g")]) == 0
    assert main(["--home", str(tmp_path / "b"), "adopt", str(tmp_path / "g")]) == 0
    capsys.readouterr()
    code, error = told(capsys, "--home", tmp_path / "b", "invite")
    assert (code, "vouch for nobody" in error) == (Exit.REFUSED, True)
    code, error = told(capsys, "--home", tmp_path / "b", "renew")
    assert (code, "--ca" in error) == (Exit.ABSENT, True)
    assert main(["--home", str(tmp_path / "b"), "renew", "--ca", str(tmp_path / "a/keys")]) == 0


@pytest.mark.parametrize("command", ["init", "genesis", "adopt", "run", "status", "invite", "renew", "consortium"])
def test_every_command_teaches_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples:" in text
    assert f"storenode {command}" in text or f" {command}" in text


# -- one process for each node


def test_a_pid_left_by_a_process_that_is_gone_misleads_nobody(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text(f"{os.getpid()}\n")
    assert running(tmp_path) is None
    with hold(tmp_path):
        assert running(tmp_path) == os.getpid()
    assert running(tmp_path) is None
    assert not (tmp_path / "pid").exists()
