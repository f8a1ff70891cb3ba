"""The command line without a consortium: parsing, output, errors and exit codes. tests/cluster/test_cli.py has the rest."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from medshard.cli import output, passphrase, store
from medshard.cli.exits import Exit, exit_of, explain
from medshard.cli.main import command, main
from medshard.cli.sharing import until
from medshard.grants import purpose_name, purpose_number, purposes
from medshard.model import Audited, Header, Problem, PutReport, StoredFile
from medshard_protocol import errors
from medshard_protocol.entries import Purpose
from medshard_protocol.errors import MedshardError, Refused

docs = Path(__file__).parent.parent.parent / "docs" / "guides"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MEDSHARD_PASSPHRASE", "MEDSHARD_PASSPHRASE_FILE", "MEDSHARD_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MEDSHARD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


Captured = pytest.CaptureFixture[str]
digest = "ab" * 32


# Parsing


def words(group: click.Group = command, before: str = "") -> list[str]:
    """Every command, those of groups with the groups' names."""
    named = []
    for name, each in sorted(group.commands.items()):
        named += words(each, f"{before}{name} ") if isinstance(each, click.Group) else [before + name]
    return named


@pytest.mark.parametrize("name", words())
def test_every_command_has_help_with_examples(name: str, capsys: Captured) -> None:
    assert main([*name.split(), "--help"]) == Exit.OK
    told = capsys.readouterr().out
    assert f"Usage: medshard {name}" in told
    assert "Examples:\n" in told
    assert f"  medshard {name}" in told or f" medshard {name}" in told
    for option in ("--home", "--json", "--quiet"):
        assert option in told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["get", "abc"], "3 hexadecimal digits, not 64"),
        (["get", "x" * 64], "expected 64 hexadecimal digits"),
        (["get", "a" * 64, "--purpose", "curiosity"], "curiosity"),
        (["get", "a" * 64, "--break-glass", " "], "a reason has 1 to 400 bytes"),
        (["get", "a" * 64, "--break-glass", "x" * 401], "a reason has 1 to 400 bytes"),
        (["share", "a" * 64], "--to"),
        (["share", "a" * 64, "--to", "x", "--until", "soon"], "write 30d, 12h"),
        (["share", "a" * 64, "--to", "x", "--until", "2001-01-01"], "has passed"),
        (["revoke", "a" * 64], "--from"),
        (["revoke", "a" * 64, "--from", "x", "--grant", "7"], "--from"),
        (["log"], "--auditor"),
        (["log", "a" * 64, "--auditor", "key"], "--auditor"),
        (["get"], "Missing argument"),
        (["put"], "Missing argument"),
        (["put", "--tag", "novalue", "f"], "write NAME=VALUE"),
        (["put", "--tag", "=v", "f"], "not an attribute name"),
        (["put", "--tag", "k=" + "v" * 2000, "f"], "more than the 1024 allowed"),
        (["put", "--tag", "k=\udcff", "f"], "not Unicode"),
        (["put", "--policy-number", "9" * 2000, "f"], "more than the 1024 allowed"),
        (["find", "--study-date", "soon"], "not a date"),
        (["find", "a", "--name", "b"], "name once"),
        (["verify"], "--all"),
        (["verify", "--all", digest], "--all"),
        (["up", "--code", "6/3"], "not a code"),
        (["up", "--institutions", "0"], "0 is not in the range"),
        (["nonsense"], "No such command"),
        (["--nonsense"], "No such option"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(arguments: list[str], says: str, capsys: Captured) -> None:
    assert main(arguments) == Exit.USAGE
    told = capsys.readouterr()
    assert told.out == ""
    assert says in told.err
    assert "hint: See `medshard" in told.err


@pytest.mark.parametrize("arguments", [["--json", "ls"], ["ls", "--json"], ["--json", "-q", "ls", "--quiet"]])
def test_shared_options_stand_before_or_after_the_command(arguments: list[str], capsys: Captured) -> None:
    assert main(arguments) == Exit.ABSENT
    assert json.loads(capsys.readouterr().err)["error"]["kind"] == "absent"


def test_home_comes_from_option_environment_or_default(tmp_path: Path, capsys: Captured) -> None:
    for arguments in (["--home", str(tmp_path / "a"), "ls"], ["ls", "--home", str(tmp_path / "a")]):
        main(arguments)
        assert str(tmp_path / "a") in capsys.readouterr().err
    main(["ls"])
    assert str(tmp_path / "home") in capsys.readouterr().err


def test_a_usage_error_in_json_is_json(capsys: Captured) -> None:
    assert main(["get", "abc", "--json"]) == Exit.USAGE
    error = json.loads(capsys.readouterr().err)["error"]
    assert (error["code"], error["kind"]) == (2, "usage")
    assert error["message"]
    assert error["hint"]


@pytest.mark.parametrize("arguments", [["--help"], ["put", "--help"]])
def test_help_is_quick_and_loads_nothing_heavy(arguments: list[str]) -> None:
    program = f"import sys; from medshard.cli.main import main; main({arguments!r}); "
    program += "heavy = {'aiohttp', 'cryptography', 'numpy', 'pydicom', 'rich', 'asyncio', 'ssl'} & set(sys.modules); "
    program += "sys.exit(str(heavy) if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Errors


def raising(error: BaseException) -> Callable[..., Any]:
    def work(*_: object, **__: object) -> None:
        raise error

    return work


def run_failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, *arguments: str) -> int:
    monkeypatch.setattr(store, "_check_policy_number", raising(error))
    return main(["put", "file", *arguments])


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MedshardError)])
def test_every_error_of_the_tree_has_an_exit_code(kind: type[MedshardError], monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    error = kind("what happened", hint="what to do")
    code = run_failing(monkeypatch, error)
    assert code == exit_of(error)
    assert code in set(Exit) - {Exit.OK, Exit.BUG, Exit.USAGE}
    assert capsys.readouterr().err == "medshard: what happened\nhint: what to do\n"


def test_an_operating_system_error_names_the_file(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert run_failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/scans/x")) == Exit.LOCAL
    assert capsys.readouterr().err.startswith("medshard: /scans/x: No space left on device\nhint: Free some space")
    assert explain(PermissionError(errno.EACCES, "Permission denied", "/x"))[1]


def test_ctrl_c_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert run_failing(monkeypatch, KeyboardInterrupt()) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_bug_leaves_its_traceback_in_a_file(monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_failing(monkeypatch, ZeroDivisionError("oops")) == Exit.BUG
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "ZeroDivisionError: oops" in told
    (written,) = tmp_path.glob("medshard-error-*.txt")
    assert str(written) in told
    assert "Traceback" in written.read_text()
    assert written.stat().st_mode & 0o777 == 0o600


def test_debugging_shows_a_bug_as_python_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSHARD_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run_failing(monkeypatch, ZeroDivisionError("oops"))


def test_a_reader_that_stops_reading_is_no_error() -> None:
    program = "import sys; from medshard.cli.main import main; from medshard.cli import output, options, local\n"
    program += "def talk(*_, **__): [output.line('x' * 1000) for _ in range(10_000)]\n"
    program += "local.demo.callback = options.shared(talk); sys.exit(main(['demo']))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(10)
        child.stdout.close()
        said = child.stderr.read()
    assert (child.returncode, said) == (Exit.PIPE, b"")


def test_the_guide_lists_every_exit_code() -> None:
    table = (docs / "exit-codes.md").read_text()
    for code in Exit:
        assert f"| {int(code)} |" in table, code


# Output


def test_lines_are_those_of_sha256sum(tmp_path: Path) -> None:
    names = [b"plain.dcm", b"with space", b"back\\slash", b"new\nline", b"re\rturn", b"caf\xe9", "日本".encode()]
    folder = os.fsencode(tmp_path)
    for name in names:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(name)
    expected = subprocess.run([b"sha256sum", b"--", *names], cwd=tmp_path, capture_output=True, check=True).stdout
    program = "import sys, os, hashlib; from medshard.cli import output\n"
    program += "for name in sys.argv[1:]:\n output.hashed(hashlib.sha256(open(name, 'rb').read()).digest(), os.fsencode(name))"
    done = subprocess.run([os.fsencode(sys.executable), b"-c", program.encode(), *names], cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == expected
    (tmp_path / "sums").write_bytes(done.stdout)
    assert subprocess.run(["sha256sum", "--check", "--quiet", "sums"], cwd=tmp_path, check=False).returncode == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (10_190, "10 KiB"),
        (1_023_000, "999 KiB"),
        (1_023_500, "1.0 MiB"),
        (5 * 2**40, "5.0 TiB"),
        (2**70, "1024 EiB"),
    ],
)
def test_sizes_are_for_people(count: int, text: str) -> None:
    assert output.size(count) == text


def test_json_has_text_for_names_and_hexadecimal_for_hashes() -> None:
    header = Header("file", b"caf\xe9.pdf", 3, b"\xab" * 32, "application/pdf", {"title": "Zürich"})
    assert json.loads(json.dumps(output.plain(header))) == {
        "kind": "file",
        "name": "caf\\xe9.pdf",
        "size": 3,
        "sha256": digest,
        "media_type": "application/pdf",
        "attributes": {"title": "Zürich"},
        "members": [],
        "put_time": 0,
    }


def report(*problems: Problem, stored: int = 1) -> PutReport:
    return PutReport(tuple(StoredFile(Path("a.dcm"), b"\xab" * 32, 5, bytes(32), 3, False) for _ in range(stored)), problems)


@pytest.mark.parametrize(
    ("given", "code", "out", "err"),
    [
        (report(), Exit.OK, f"{digest}  a.dcm\n", ""),
        (
            report(Problem(Path("b\x1b.dcm"), "broken DICOM: x", True)),
            Exit.OK,
            f"{digest}  a.dcm\n",
            "medshard: b\\x1b.dcm: broken DICOM: x; stored as it is\n",
        ),
        (
            report(Problem(Path("b"), "cannot be read: no", False)),
            Exit.PARTIAL,
            f"{digest}  a.dcm\n",
            "medshard: b: cannot be read: no; not stored\n",
        ),
        (
            report(Problem(Path("b"), "cannot be read: no", False), stored=0),
            Exit.LOCAL,
            "",
            "medshard: b: cannot be read: no; not stored\n",
        ),
        (report(stored=0), Exit.OK, "", "medshard: there are no files to store in what was named\n"),
    ],
)
def test_put_tells_what_is_stored_and_what_is_not(
    given: PutReport, code: Exit, out: str, err: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def run(task: Any) -> tuple[PutReport, str]:
        task.close()
        return given, ""

    monkeypatch.setattr(store, "run", run)
    assert main(["put", "x"]) == code
    told = capsys.readouterr()
    assert (told.out, told.err) == (out, err)
    assert main(["put", "x", "--json"]) == code
    assert len(json.loads(capsys.readouterr().out)["stored"]) == len(given.stored)


# Passphrase


def test_the_passphrase_comes_from_environment_file_or_trial(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    (home / "passphrase").write_text("from the trial\n")
    assert passphrase.known(home) == "from the trial"
    (tmp_path / "secret").write_bytes("aus der Datei ü \r\n".encode())
    monkeypatch.setenv("MEDSHARD_PASSPHRASE_FILE", str(tmp_path / "secret"))
    assert passphrase.known(home) == "aus der Datei ü "
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", "from the environment")
    assert passphrase.known(home) == passphrase.new(home) == "from the environment"


def test_without_a_terminal_the_passphrase_must_be_given(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115 -- pytest closes it
    with pytest.raises(Refused) as caught:
        passphrase.known(home)
    assert "MEDSHARD_PASSPHRASE" in caught.value.hint


def test_a_missing_passphrase_file_is_a_local_problem(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    home.mkdir()
    monkeypatch.setenv("MEDSHARD_PASSPHRASE_FILE", str(tmp_path / "nowhere"))
    assert main(["ls"]) == Exit.LOCAL
    assert "nowhere" in capsys.readouterr().err


def test_a_new_passphrase_is_asked_for_twice(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["one", "two", "three", "three"])
    monkeypatch.setattr(passphrase, "_ask", lambda prompt: next(answers))
    assert passphrase.new(home) == "three"


def test_an_empty_new_passphrase_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passphrase, "_ask", lambda prompt: "")
    with pytest.raises(Refused):
        passphrase.new(home)


def test_the_command_tree_is_whole() -> None:
    assert isinstance(command, click.Group)
    keeping = {"put", "get", "ls", "find", "info", "verify", "doctor", "reindex", "join", "up", "demo"}
    sharing = {
        "share",
        "revoke",
        "shared",
        "log",
        "key",
        "contacts",
        "auditor-key",
        "deidentify",
        "prove",
        "check-proof",
        "links",
        "request",
        "requests",
        "consents",
    }
    custody = {"retain", "hold", "release", "kept", "retire", "erase", "certificate", "check-certificate", "keys", "recover", "proposals"}
    custody |= {"sender", "export"}
    departments = {"report", "policy", "claim", "gateway", "receipt", "import"}
    assert set(command.commands) == keeping | sharing | custody | departments


@pytest.mark.parametrize(("text", "seconds"), [("12h", 43_200), ("30d", 2_592_000), ("4w", 2_419_200), ("1y", 31_536_000)])
def test_an_end_may_be_said_as_a_span(text: str, seconds: int) -> None:
    assert abs(until(text) - time.time() - seconds) < 5


def test_a_right_until_a_day_lasts_to_the_end_of_that_day() -> None:
    assert time.localtime(until("2100-05-01"))[:6] == (2100, 5, 2, 0, 0, 0)
    assert time.localtime(until("2100-05-01T18:30"))[:5] == (2100, 5, 1, 18, 30)


def test_a_purpose_has_one_name_and_one_number() -> None:
    assert [purpose_number(name) for name in purposes] == list(Purpose)
    assert purpose_name(Purpose.PATIENT_REQUEST) == "patient-request"
    assert purpose_name(200) == "purpose-200"
    with pytest.raises(ValueError, match="there are"):
        purpose_number("curiosity")


def test_what_holders_found_of_each_other_is_told_with_the_time_and_whose_word_it_is(capsys: Captured) -> None:
    from medshard.cli.check import _tell_audits

    found = [Audited("node-a", 3, "node-b", "absent", 1_800_000_000, 1_800_000_600, 4), Audited("node-a", 1, "node-c", "good", 1, 2, 9)]
    _tell_audits(found, whole=True)
    told = capsys.readouterr().out.splitlines()
    assert "audits by 1 holders" in told[0]
    assert "1 of 2 results are good" in told[0]
    assert "node-a found shard 3 of node-b absent, 4 times since 2027-01-" in told[1]
    _tell_audits(found[1:], whole=False)
    assert capsys.readouterr().out == ""
