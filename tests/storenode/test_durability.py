"""The durability model: against the table in the design, against a Monte Carlo, and at its edges."""

from __future__ import annotations

import json
import math
import random

import pytest

from storenode.cli import main
from storenode.durability import Model, loss_probability, nines

# code, and the nines a year that the design gives for AFR 5 %, exit 2 %, repair 3 days
table = {(2, 4): 6.3, (3, 6): 8.3, (4, 9): 12.6, (8, 16): 17.5, (10, 16): 12.9, (15, 30): 28}


@pytest.mark.parametrize(("code", "expected"), table.items(), ids=lambda value: str(value))
def test_the_designs_table_is_this_model_with_repair_of_one_shard_at_a_time(code: tuple[int, int], expected: float) -> None:
    found = nines(loss_probability(Model(*code, 0.05, 0.02, 3.0)))
    assert found == pytest.approx(expected, abs=0.5 if expected == 28 else 0.06)


def lost_in(draw: random.Random, model: Model, years: float) -> bool:
    """One history of one file, event by event; no matrix and no sum."""
    now, gone = 0.0, 0
    while True:
        left = model.n - gone
        rates = (
            left * (model.afr + model.exits),
            min(gone, model.repairs) * 365 / model.repair_days,
            model.shock_rate,
        )
        now += draw.expovariate(sum(rates))
        if now > years:
            return False
        event = draw.choices((0, 1, 2), rates)[0]
        if event == 0:
            gone += 1
        elif event == 1:
            gone -= 1
        else:
            gone += sum(draw.random() < model.shock_share for _ in range(left))
        if model.n - gone < model.k:
            return True


histories = [
    Model(2, 4, 1.0, 0.5, 20.0),
    Model(3, 6, 2.0, 0.0, 30.0, repairs=3),
    Model(3, 6, 0.5, 0.1, 20.0, shock_rate=0.5, shock_share=0.5),
    Model(10, 16, 2.0, 0.5, 10.0, shock_rate=0.3, shock_share=0.3, repairs=2),
]


@pytest.mark.parametrize("number", range(len(histories)))
def test_the_chain_agrees_with_a_monte_carlo(number: int) -> None:
    model, runs, draw = histories[number], 3000, random.Random(number)
    expected = loss_probability(model, 2.0)
    found = sum(lost_in(draw, model, 2.0) for _ in range(runs)) / runs
    assert 0.01 < expected < 0.99
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / runs)


def test_without_redundancy_or_repair_it_is_what_the_exponential_says() -> None:
    assert loss_probability(Model(1, 1, 0.05, 0.0, 1.0), 3.0) == pytest.approx(1 - math.exp(-0.15), rel=1e-9)
    assert loss_probability(Model(2, 2, 0.05, 0.0, 1.0)) == pytest.approx(1 - math.exp(-0.1), rel=1e-9)
    assert loss_probability(Model(1, 1, 0.0, 0.0, 1.0)) == 0.0


def test_a_shock_that_takes_everything_is_all_that_counts() -> None:
    model = Model(10, 16, 0.05, 0.02, 3.0, shock_rate=0.001, shock_share=1.0)
    assert loss_probability(model) == pytest.approx(0.001, rel=1e-3)


def test_more_of_anything_bad_is_never_better() -> None:
    base = loss_probability(Model(10, 16, 0.05, 0.02, 3.0))
    for worse in (
        Model(10, 16, 0.1, 0.02, 3.0),
        Model(10, 16, 0.05, 0.1, 3.0),
        Model(10, 16, 0.05, 0.02, 30.0),
        Model(11, 16, 0.05, 0.02, 3.0),
        Model(10, 16, 0.05, 0.02, 3.0, 0.01, 0.3),
    ):
        assert loss_probability(worse) > base
    assert loss_probability(Model(10, 16, 0.05, 0.02, 3.0, repairs=6)) < base


def test_the_command_says_its_inputs_beside_the_figure(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["durability", "--code", "10/16", "--afr", "0.05", "--exit", "0.02", "--repair-days", "3"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "12.9 nines, of this model" in text
    assert "0.05 failures and 0.02 exits" in text
    assert "nothing in common is counted" in text
    assert main([*words, "--shock", "0.01/0.3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["inputs"]["shock_share"] == 0.3
    assert told["nines"] == pytest.approx(2.75, abs=0.01)


@pytest.mark.parametrize("words", ["--code 10/16", "--afr 0.05 --exit 0.02 --repair-days 3"])
def test_there_is_no_figure_without_inputs(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["durability", *words.split()]) == 2
    assert "Missing option" in capsys.readouterr().err


@pytest.mark.parametrize("shock", ["0.01", "x/0.3", "0.01/1.5", "-1/0.1"])
def test_a_shock_that_is_none_is_said(shock: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"durability --code 2/4 --afr 0.05 --exit 0.02 --repair-days 3 --shock {shock}".split()
    assert main(words) == 2
    assert "no shock" in capsys.readouterr().err
