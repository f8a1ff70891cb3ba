"""How likely is it that a file is lost: a Markov chain over the number of its shards that are gone, with shocks that take many at once.

Law: no figure without its inputs, and what is left out is said. State i means that i of n shards are gone; with more than n-k gone the file
is lost for good. Each node loses its shard at the same rate (failures plus exits), a lost shard is made anew after an exponentially
distributed time, ``repairs`` of a file's shards at once, and a shock takes each shard that is left with the same probability.

The probability is summed by uniformization, in which nothing is ever subtracted, so that one of 1e-40 has as many good digits as one of a
half (W. K. Grassmann, "Transient solutions in Markovian queueing systems", Computers & Operations Research 4, 1977).
Left out: bugs, operators, lost keys, a ledger without a quorum, repair that waits for room or for bandwidth, and shards that rot unnoticed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

days_a_year: Final = 365.0
steps_max: Final = 2_000_000  # of the chain in the time asked for: some seconds
nines_shown_max: Final = 300.0  # smaller probabilities have no floating-point number

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Model:
    """The inputs. Rates are per node and year; ``shock_rate`` is events a year, each taking a shard with probability ``shock_share``."""

    k: int
    n: int
    afr: float
    exits: float
    repair_days: float
    shock_rate: float = 0.0
    shock_share: float = 0.0
    repairs: int = 1

    def __post_init__(self) -> None:
        if not (1 <= self.k <= self.n <= 255):
            raise ValueError("a code is k/n with 1 <= k <= n <= 255")
        if not (0 <= self.afr <= 100 and 0 <= self.exits <= 100 and 0 <= self.shock_rate <= 100 and 0 <= self.shock_share <= 1):
            raise ValueError("rates are from 0 to 100 a year, and a shock takes a share from 0 to 1")
        if not (0 < self.repair_days <= 36_500 and 1 <= self.repairs <= 255):
            raise ValueError("repair takes from a moment to 36,500 days, of 1 to 255 shards at once")

    @property
    def loss_state(self) -> int:
        """The state in which fewer than k shards are left."""
        return self.n - self.k + 1

    def rates(self) -> Matrix:
        """Give the rates of the chain from each state (row) to each other one, a year."""
        last = self.loss_state
        rates = np.zeros((last + 1, last + 1))
        for gone in range(last):
            left = self.n - gone
            rates[gone, gone + 1] += left * (self.afr + self.exits)
            if gone:
                rates[gone, gone - 1] = min(gone, self.repairs) * days_a_year / self.repair_days
            for taken in range(1, left + 1):
                rates[gone, min(gone + taken, last)] += self.shock_rate * _binomial(left, taken, self.shock_share)
        return rates


def loss_probability(model: Model, years: float = 1.0) -> float:
    """Give the probability that a file which has all its shards now is lost within ``years``. Raises ValueError for too fine a model."""
    rates = model.rates()
    pace = float(rates.sum(axis=1).max())
    if pace == 0.0 or years == 0.0:
        return 0.0
    mean = pace * years
    steps = math.ceil(mean + 12 * math.sqrt(mean) + 60)  # beyond, the Poisson weights are below 1e-30 of the answer
    if steps > steps_max:
        raise ValueError("repair is too quick for the time asked about; ask about less time")
    jump = rates / pace
    jump[np.diag_indices_from(jump)] = (pace - rates.sum(axis=1)) / pace  # the one place with a subtraction: of well separated numbers
    jump[-1, :] = 0.0
    jump[-1, -1] = 1.0
    where = np.zeros(len(jump))
    where[0] = 1.0
    lost = 0.0
    for step in range(steps + 1):
        lost += math.exp(step * math.log(mean) - mean - math.lgamma(step + 1)) * float(where[-1])
        where = where @ jump
    return min(lost, 1.0)


def nines(probability: float) -> float:
    """Give the nines of durability: 3 for a probability of loss of 0.001."""
    return nines_shown_max if probability <= 10**-nines_shown_max else -math.log10(probability)


def _binomial(count: int, taken: int, share: float) -> float:
    if share in (0.0, 1.0):
        return float(taken == count * share)
    return math.comb(count, taken) * share**taken * (1 - share) ** (count - taken)
