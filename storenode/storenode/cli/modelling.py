"""What an operator reckons before a consortium is founded: durability."""

from __future__ import annotations

import click

from storenode.cli.options import Session, shared


@click.command()
@click.option("--code", required=True, metavar="K/N", help="Any K of a file's N shards restore it.")
@click.option("--afr", type=click.FloatRange(0, 100), required=True, help="Failures per node and year that cost its shards: 0.05.")
@click.option("--exit", "exits", type=click.FloatRange(0, 100), required=True, help="Nodes that leave without handing over, a year: 0.02.")
@click.option(
    "--repair-days", type=click.FloatRange(0, 36500, min_open=True), required=True, help="Mean days until a lost shard is made anew."
)
@click.option("--repairs", type=click.IntRange(1, 255), default=1, show_default=True, help="Shards of one file that are repaired at once.")
@click.option("--shock", metavar="RATE/SHARE", help="Events a year, and the share of nodes that one takes: 0.01/0.3 [none].")
@click.option("--years", type=click.FloatRange(0, 1000, min_open=True), default=1.0, show_default=True, help="Time to reckon with.")
@shared
def durability(
    session: Session, code: str, afr: float, exits: float, repair_days: float, repairs: int, shock: str | None, years: float
) -> None:
    """Reckon how likely a file is lost, from inputs that you must answer for.

    A Markov chain over the shards that are gone, with independent failures, repair, and shocks that take many nodes at once. Without a
    shock the figure says nothing about what institutions have in common: software, vendors, laws, a war. It counts no bugs, no lost keys
    and no operator's mistake, and holds for one file: files on the same nodes are lost together.

    \b
    Examples:
      storenode durability --code 10/16 --afr 0.05 --exit 0.02 --repair-days 3
      storenode durability --code 10/16 --afr 0.05 --exit 0.02 --repair-days 3 --shock 0.01/0.3
    """
    from storenode.durability import Model, loss_probability, nines
    from storenode.genesis import parse_code

    k, n = parse_code(code)[:2]
    rate, share = _shock(shock)
    try:
        model = Model(k, n, afr, exits, repair_days, rate, share, repairs)
        probability = loss_probability(model, years)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    inputs = {"k": k, "n": n, "afr": afr, "exit": exits, "repair_days": repair_days, "repairs": repairs}
    inputs |= {"shock_rate": rate, "shock_share": share, "years": years}
    told = f"shocks   {rate:g} a year, each taking {share:.0%} of the nodes" if rate else "shocks   none: nothing in common is counted"
    session.tell(
        {"inputs": inputs, "loss_probability": probability, "nines": round(nines(probability), 2)},
        f"code     any {k} of {n} shards; lost when more than {n - k} are gone at once",
        f"nodes    {afr:g} failures and {exits:g} exits per node and year",
        f"repair   {repair_days:g} days on average, {repairs} shard{'s' * (repairs > 1)} of a file at a time",
        told,
        f"loss     {probability:.2g} for a file in {years:g} year{'s' * (years != 1)}: {nines(probability):.1f} nines, of this model",
    )


def _shock(text: str | None) -> tuple[float, float]:
    if text is None:
        return 0.0, 0.0
    rate, slash, share = text.partition("/")
    try:
        values = float(rate), float(share)
    except ValueError:
        values = -1.0, -1.0
    if not (slash and 0 <= values[0] <= 100 and 0 <= values[1] <= 1):
        raise click.BadParameter(f"{text!r} is no shock; write events a year and the share of nodes each takes, such as 0.01/0.3")
    return values
