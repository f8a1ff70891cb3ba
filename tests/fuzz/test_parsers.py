"""Every parser under a coverage-guided fuzzer, and the inputs that it found before."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.protocol.test_fuzz_parsers import check, names, table

root = Path(__file__).parents[2]
corpora = Path(__file__).parent / "corpus"
soak_s = 60
needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install 'medshard[fuzz]'"
)
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")


@pytest.mark.parametrize("name", names)
def test_inputs_found_before_are_malformed_or_mean_just_themselves(name: str) -> None:
    path = corpora / f"{name}.txt"
    for line in path.read_text().splitlines() if path.exists() else ():
        check(table()[name], bytes.fromhex(line))


def test_every_corpus_is_of_a_parser() -> None:
    assert {path.stem for path in corpora.glob("*.txt")} <= set(names)


def fuzzed(name: str, folder: Path, seconds: int) -> int:
    """Fuzz in a process of its own; how many inputs it tried. Fails with what it found."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fuzz.parsers", name, str(folder), str(seconds)],
        cwd=root,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds + 100,
    )
    found = [f"{path.name} {path.read_bytes().hex()}" for path in folder.glob("*-*") if re.match("(crash|oom|timeout|leak)-", path.name)]
    assert done.returncode == 0, f"{found}\n{done.stderr[-3000:]}"
    tried = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert tried is not None, done.stderr[-3000:]
    return int(tried[1])


@needs_atheris
def test_no_parser_lets_anything_through_in_some_seconds(tmp_path: Path) -> None:
    assert fuzzed("all", tmp_path / "corpus", 4) > 1000


@needs_atheris
@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", names)
def test_a_parser_lets_nothing_through_in_a_minute(tmp_path: Path, name: str) -> None:
    print(f"{name}: {fuzzed(name, tmp_path / 'corpus', soak_s)} inputs")
