"""The whole of medshard under a seeded world, and planted bugs that it must find. A seed that fails is printed with what to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

root = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)


def simulate(*arguments: str, hash_seed: str = "0") -> tuple[int, list[dict[str, Any]]]:
    """Run ``python -m tests.simulation``: its exit code and what it told, the sum of it last."""
    command = [sys.executable, "-m", "tests.simulation", *arguments]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_no_promise_is_broken_in_two_hundred_seeds() -> None:
    code, told = simulate("--seeds", "0-199")
    assert code == 0, f"see: python -m tests.simulation --log --seeds {told[0]['seed']}\n{told[0]['broken']}"
    assert told[-1]["acknowledged"] > 300, "the seeds do less than they should"


def test_a_seed_is_the_same_in_another_process() -> None:
    first, second = (simulate("-v", "--seeds", "0-5", hash_seed=hash_seed)[1][:-1] for hash_seed in ("0", "1"))
    assert [(each["trace"], each["steps"]) for each in first] == [(each["trace"], each["steps"]) for each in second]
    assert len({each["trace"] for each in first}) == len(first)


@pytest.mark.parametrize("mutant", ["gate-open", "another's-move", "mirror-left-behind", "epochs-begin-anew", "catalog-not-synced"])
def test_a_planted_bug_is_found(mutant: str) -> None:
    _, told = simulate("--mutant", mutant)
    assert told[0]["seed"] is not None, f"no seed finds {mutant}"


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_nineteen_of_twenty_planted_bugs_are_found_within_two_hundred_seeds() -> None:
    _, told = simulate("--mutant", "all", "--jobs", str(os.cpu_count() or 1))
    missed = [each["mutant"] for each in told if each["seed"] is None]
    assert len(told) >= 40
    assert len(missed) <= len(told) // 20, missed


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_no_promise_is_broken_in_ten_thousand_seeds() -> None:
    code, told = simulate("--seeds", "0-9999", "--jobs", str(os.cpu_count() or 1))
    assert code == 0, [f"{each['seed']}: {each['broken']}" for each in told[:-1]]
