"""From many measurements to what a reader wants: medians, ratios, verdicts on the promised speed, a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bench.machine import Cost
from bench.steps import Result

OURS = "medshard"
TAHOE = ("tahoe-http", "tahoe-foolscap")
SWIFT = ("swift",)
PEERS = (*TAHOE, *SWIFT)

Runs = Sequence[Mapping[str, Mapping[str, Result]]]
Medians = Mapping[str, Mapping[str, Result]]


def medians(runs: Runs) -> dict[str, dict[str, Result]]:
    """The median of every figure over the runs that have it. A step that failed in any run counts as failed."""
    found: dict[str, dict[str, list[Result]]] = {}
    for run in runs:
        for side, steps in run.items():
            for step, result in steps.items():
                found.setdefault(side, {}).setdefault(step, []).append(result)
    return {side: {step: _median(results) for step, results in steps.items()} for side, steps in found.items()}


def _median(results: Sequence[Result]) -> Result:
    cost = Cost(**{each.name: statistics.median(getattr(result.cost, each.name) for result in results) for each in fields(Cost)})
    stored = [result.stored_ratio for result in results if result.stored_ratio is not None]
    return Result(
        cost=cost,
        plain_bytes=results[0].plain_bytes,
        busy_before=statistics.median(result.busy_before for result in results),
        stored_ratio=statistics.median(stored) if stored else None,
        error=next((result.error for result in results if result.error), None),
    )


# The quickest way to the same end counts. Peers have no better way with a folder than with its files.
_ways = ("200 x 512 KiB, serial", "200 x 512 KiB, parallel")


def _steps_for(side: str, step: str) -> tuple[str, ...]:
    verb, _, work = step.partition(" ")
    alike = work == "200 x 512 KiB, separate" or (work == "200 x 512 KiB, folder" and side != OURS)
    return tuple(f"{verb} {way}" for way in _ways) if alike else (step,)


def best(figures: Medians, sides: Sequence[str], step: str) -> tuple[str, float] | None:
    """The quickest of some sides at (a counterpart of) a step, and its seconds; None where none of them did it."""
    found = [
        (side, figures[side][each].cost.wall_s)
        for side in sides
        for each in _steps_for(side, step)
        if side in figures and each in figures[side] and not figures[side][each].error
    ]
    return min(found, key=lambda pair: pair[1]) if found else None


def wall(figures: Medians, step: str) -> float | None:
    pair = best(figures, (OURS,), step)
    return pair[1] if pair else None


@dataclass(frozen=True)
class Verdict:
    """One promise: what was measured, against what was wanted. `met` is None where it was not measured."""

    promise: str
    measured: str
    met: bool | None


@dataclass(frozen=True)
class _Faster:
    step: str
    than: tuple[str, ...]
    whom: str
    times: float


_promises = (
    _Faster("put 100 MiB", TAHOE, "Tahoe-LAFS", 4),
    _Faster("get 100 MiB", TAHOE, "Tahoe-LAFS", 6),
    _Faster("put 100 MiB", SWIFT, "Swift", 1),
    _Faster("get 100 MiB", SWIFT, "Swift", 1),
    _Faster("put 200 x 512 KiB, folder", PEERS, "the better peer", 10),
    _Faster("get 200 x 512 KiB, folder", PEERS, "the better peer", 10),
    _Faster("put 200 x 512 KiB, separate", PEERS, "the better peer", 2),
    _Faster("get 200 x 512 KiB, separate", PEERS, "the better peer", 2),
    _Faster("put 1 MiB", PEERS, "the better peer", 1),
    _Faster("get 1 MiB", PEERS, "the better peer", 1),
    _Faster("read 64 KiB of 100 MiB", TAHOE, "Tahoe-LAFS", 4),
)
STORED_RATIO_MAX = 1.62
RATE_KEPT_MIN = 0.8
MEMORY_MAX_MIB = 128.0
FROZEN_EXTRA_MAX_S = 2.0
FAULTS_TIMES_MAX = 1.3


def verdicts(figures: Medians) -> list[Verdict]:
    found = [_faster(figures, promise) for promise in _promises]
    for verb in ("put", "get"):
        found += [_rate_kept(figures, verb), _memory(figures, verb), _frozen(figures, verb), _faults(figures, verb)]
    return [*found, *(_stored(figures, size) for size in ("100 MiB", "1 GiB"))]


def _faster(figures: Medians, promise: _Faster) -> Verdict:
    text = (
        f"{promise.step}: at least {promise.times:g} times {promise.whom}"
        if promise.times > 1
        else f"{promise.step}: ahead of {promise.whom}"
    )
    ours, theirs = wall(figures, promise.step), best(figures, promise.than, promise.step)
    if ours is None or theirs is None:
        return Verdict(text, "not measured", None)
    ratio = theirs[1] / ours
    return Verdict(text, f"{ratio:.2f} times ({ours:.3f} s, {theirs[0]} {theirs[1]:.3f} s)", ratio >= promise.times)


def _rate_kept(figures: Medians, verb: str) -> Verdict:
    text = f"{verb} 1 GiB: at least {RATE_KEPT_MIN:.0%} of the rate at 100 MiB"
    small, large = wall(figures, f"{verb} 100 MiB"), wall(figures, f"{verb} 1 GiB")
    if small is None or large is None:
        return Verdict(text, "not measured", None)
    kept = small * 10.24 / large
    return Verdict(text, f"{kept:.0%} ({100 / small:.0f} and {1024 / large:.0f} MiB/s)", kept >= RATE_KEPT_MIN)


def _memory(figures: Medians, verb: str) -> Verdict:
    text = f"{verb} 1 GiB: client memory under {MEMORY_MAX_MIB:g} MiB"
    result = figures.get(OURS, {}).get(f"{verb} 1 GiB")
    if result is None:
        return Verdict(text, "not measured", None)
    peak = result.cost.client_peak_rss_mib
    return Verdict(text, f"{peak:.0f} MiB", peak < MEMORY_MAX_MIB)


def _frozen(figures: Medians, verb: str) -> Verdict:
    text = f"{verb} 100 MiB with one node frozen: at most {FROZEN_EXTRA_MAX_S:g} s longer"
    usual, frozen = wall(figures, f"{verb} 100 MiB"), wall(figures, f"{verb} 100 MiB, one node frozen")
    if usual is None or frozen is None:
        return Verdict(text, "not measured", None)
    return Verdict(text, f"{frozen - usual:+.2f} s", frozen - usual <= FROZEN_EXTRA_MAX_S)


def _faults(figures: Medians, verb: str) -> Verdict:
    text = f"{verb} 100 MiB with a node dead, one frozen, one ten times slower: at most {FAULTS_TIMES_MAX:g} times as long"
    well, harmed = wall(figures, f"{verb} 100 MiB, well"), wall(figures, f"{verb} 100 MiB, faults")
    if well is None or harmed is None:
        return Verdict(text, "not measured", None)
    return Verdict(text, f"{harmed / well:.2f} times ({harmed:.3f} s, {well:.3f} s)", harmed <= FAULTS_TIMES_MAX * well)


def _stored(figures: Medians, size: str) -> Verdict:
    text = f"{size}: stored bytes over plain bytes at most {STORED_RATIO_MAX}"
    result = figures.get(OURS, {}).get(f"put {size}")
    if result is None or result.stored_ratio is None:
        return Verdict(text, "not measured", None)
    return Verdict(text, f"{result.stored_ratio:.4f}", result.stored_ratio <= STORED_RATIO_MAX)


KERNEL_LEAST = {"gfni": 15.0, "avx2": 8.0}  # GB/s of data on one core, by the instruction sets that a path uses


def kernel_verdicts(measured: Mapping[str, Any]) -> list[Verdict]:
    """What bench/kernel.py measured for encoding with cells in cache, against what the kernel promises for the instructions it uses."""
    found = []
    for row in measured["results"]:
        for family, least in KERNEL_LEAST.items():
            if row["path"].split("-")[0] == family and row["cell_bytes"] == 32 * 1024:
                rate = row["encode"]["best"]
                found.append(Verdict(f"kernel, {row['path']}: at least {least:g} GB/s a core", f"{rate:.1f} GB/s", rate >= least))
    return found


def noise(runs: Runs) -> str:
    """How much other jobs disturbed the steps, for whoever judges the figures."""
    shares = [result.cost.others_share for run in runs for steps in run.values() for result in steps.values()]
    if not shares:
        return "Nothing was measured"
    return f"Other jobs used {statistics.median(shares):.0%} of the machine in the median step, {max(shares):.0%} in the worst"


_works = ("1 MiB", "100 MiB", "1 GiB", "200 x 512 KiB, folder", "200 x 512 KiB, separate", "100 MiB, one node frozen")
TABLE_STEPS = (*(f"{verb} {work}" for work in _works for verb in ("put", "get")), "read 64 KiB of 100 MiB")


def table(figures: Medians) -> str:
    """Seconds and ratios, as markdown."""
    lines = ["| work | medshard | Tahoe-LAFS | Swift | Tahoe / ours | Swift / ours |", "|---|---|---|---|---|---|"]
    for step in TABLE_STEPS:
        ours = wall(figures, step)
        pairs = [best(figures, sides, step) for sides in (TAHOE, SWIFT)]
        theirs = [pair[1] if pair else None for pair in pairs]
        cells = [_seconds(ours), *map(_seconds, theirs), *(_times(ours, their) for their in theirs)]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def resources(figures: Medians) -> str:
    """CPU seconds of the client and of all 16 nodes, and the client's peak memory, as markdown."""
    sides = [side for side in (OURS, *PEERS) if side in figures]
    lines = ["| work | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for step in (step for step in _every_step(figures) if "frozen" not in step):
        cells = []
        for side in sides:
            result = figures[side].get(step)
            cells.append("" if result is None else _resources(result.cost))
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _every_step(figures: Medians) -> list[str]:
    """In the order in which they are done."""
    return list(dict.fromkeys(step for steps in figures.values() for step in steps))


def promises_table(found: Sequence[Verdict]) -> str:
    word = {True: "yes", False: "**no**", None: ""}
    rows = [f"| {verdict.promise} | {verdict.measured} | {word[verdict.met]} |" for verdict in found]
    return "\n".join(["| promise | measured | kept |", "|---|---|---|", *rows]) + "\n"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _times(ours: float | None, theirs: float | None) -> str:
    return "" if ours is None or theirs is None else f"{theirs / ours:.1f}"


def _resources(cost: Cost) -> str:
    return f"{cost.client_cpu_s:.2f} + {cost.servers_cpu_s:.2f} s, {cost.client_peak_rss_mib:.0f} MiB"


def plot(figures: Medians, file: Path) -> None:
    """Grouped bars on a logarithmic scale, with the ratio to our own time above each peer's bar."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    groups = (("medshard", (OURS,), "#0b6e4f"), ("Tahoe-LAFS", TAHOE, "#b08968"), ("Swift", SWIFT, "#5b7db1"))
    shown = [step for step in TABLE_STEPS if any(best(figures, sides, step) for _, sides, _ in groups)]
    figure, axes = pyplot.subplots(figsize=(12, 0.55 * len(shown) + 1.8), layout="constrained")
    height = 0.26
    for number, (_, sides, colour) in enumerate(groups):
        for row, step in enumerate(shown):
            pair = best(figures, sides, step)
            if pair is None:
                continue
            at = row + (number - 1) * height
            axes.barh(at, pair[1], height * 0.94, color=colour)
            ours = wall(figures, step)
            ratio = f"  ({pair[1] / ours:.1f}x)" if ours and number else ""
            axes.annotate(f"{_seconds(pair[1])} s{ratio}", (pair[1], at), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.set_xlabel("seconds, median; shorter is better (in brackets: how many times our time)")
    axes.set_title("16 nodes on loopback, 10 of 16")
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour, label=label) for label, _, colour in groups]
    axes.legend(handles=handles, loc="lower right", frameon=False)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
