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


@pytest.fixture(scope="module")
def two_hundred() -> list[dict[str, Any]]:
    """What 200 seeds told, and the sum of it last."""
    return simulate("-v", "--seeds", "0-199")[1]


def test_no_promise_is_broken_in_two_hundred_seeds(two_hundred: list[dict[str, Any]]) -> None:
    assert len(two_hundred) == 201
    broken = {each["seed"]: each["broken"] for each in two_hundred[:-1] if each["broken"]}
    assert not broken, f"see: python -m tests.simulation --log --seeds N, with N one of {broken}"
    assert two_hundred[-1]["acknowledged"] > 200, "the seeds do less than they should"


def test_a_seed_is_the_same_in_another_process(two_hundred: list[dict[str, Any]]) -> None:
    again = simulate("-v", "--seeds", "0-7", hash_seed="1")[1][:-1]
    assert [(each["trace"], each["steps"]) for each in again] == [(each["trace"], each["steps"]) for each in two_hundred[:8]]
    assert len({each["trace"] for each in again}) == len(again)


def test_planted_bugs_are_found() -> None:
    """Five of them, each with a seed that is known to find it, and after a change of the schedule with any other."""
    code, told = simulate("--mutant", "gate-open@2,mirror-left-behind@0,epochs-begin-anew@0,catalog-not-synced@13,no-mask@0")
    assert code == 0, f"no seed finds {[each['mutant'] for each in told if each['seed'] is None]}"


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
