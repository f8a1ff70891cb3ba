"""report."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, run, shared

if TYPE_CHECKING:
    from medshard.model import OnProgress
    from medshard.reports import Report, Reports

_target = click.option(
    "-o",
    "--output",
    "targets",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="FILE.pdf, FILE.csv or FILE.json; repeatable [the facts, here].",
)


@click.group(
    epilog=examples(
        "medshard report access --from 2026-10-01 --to 2026-10-31 -o october.pdf -o october.csv",
        "medshard report integrity --sample 100 -o integrity.pdf",
        "medshard report restore-drill --files 20 -o drill.pdf",
        "medshard report keys -o keys.pdf",
    )
)
def report() -> None:
    """Reports for reviews: who had access, whether all is whole, how fast it comes back, how the keys stand.

    As PDF with charts, as CSV and as JSON. docs/compliance.md says which duties they help with, and which stay yours.
    """


def day(text: str) -> datetime:
    """Parse a day, UTC."""
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    except ValueError:
        raise click.BadParameter(f"{text!a} is not a day; write 2026-10-31") from None


@report.command(epilog=examples("medshard report access", "medshard report access --from 2026-10-01 --to 2026-10-31 -o october.pdf"))
@click.option("--from", "start", type=day, metavar="DAY", help="First day, UTC [30 days ago].")
@click.option("--to", "end", type=day, metavar="DAY", help="Last day, UTC [today].")
@_target
@shared
def access(session: Session, start: datetime | None, end: datetime | None, targets: tuple[Path, ...]) -> int:
    """Who read this vault's files, was given the right to, or lost it. Emergency reads come first.

    The whole ledger is read and its root computed, so that no node can leave anything out.
    """
    last = (end or datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)) + timedelta(days=1)
    first = start or last - timedelta(days=31)
    if first >= last:
        raise click.UsageError("--from is after --to")
    return _give(session, targets, lambda reports, progress: reports.access(int(first.timestamp()), int(last.timestamp()), progress))


@report.command(epilog=examples("medshard report integrity", "medshard report integrity --sample 100 -o integrity.pdf"))
@click.option("--sample", type=click.IntRange(1), help="Ask about so many objects, drawn at random [all].")
@_target
@shared
def integrity(session: Session, sample: int | None, targets: tuple[Path, ...]) -> int:
    """Whether every holder still has its shards, asked now, and which were moved or made again."""
    return _give(session, targets, lambda reports, progress: reports.integrity(sample, progress))


@report.command("restore-drill", epilog=examples("medshard report restore-drill --files 20 -o drill.pdf"))
@click.option("--files", type=click.IntRange(1, 10_000), default=10, help="How many, drawn at random [10].")
@_target
@shared
def restore_drill(session: Session, files: int, targets: tuple[Path, ...]) -> int:
    """Restore files drawn at random, compare their hashes, take the time, keep nothing."""
    return _give(session, targets, lambda reports, progress: reports.restore_drill(files, progress))


@report.command("keys", epilog=examples("medshard report keys -o keys.pdf"))
@_target
@shared
def report_keys(session: Session, targets: tuple[Path, ...]) -> int:
    """How this vault's certificate, escrow and grants stand."""
    return _give(session, targets, lambda reports, progress: reports.keys())


def _give(session: Session, targets: tuple[Path, ...], make: Callable[[Reports, OnProgress | None], Awaitable[Report]]) -> int:
    writers: dict[str, Callable[[Report], bytes]] = {
        ".pdf": _pdf,
        ".csv": lambda made: made.as_csv().encode(),
        ".json": lambda made: made.as_json().encode(),
    }
    if wrong := [str(target) for target in targets if target.suffix.lower() not in writers]:
        raise click.UsageError(f"{wrong[0]}: the name must end with .pdf, .csv or .json")

    async def work() -> Report:
        from medshard.reports import Reports

        async with session.vault() as vault:
            with output.meter(wanted=not (session.quiet or session.json)) as progress:
                return await make(Reports(vault), progress)

    from medshard.durable import write_durably

    made = run(work())
    for target in targets:
        write_durably(target, writers[target.suffix.lower()](made), mode=0o600)
    if session.json:
        sys.stdout.write(made.as_json())
    elif not (targets and session.quiet):
        _tell(made)
    return Exit.OK if made.holds or made.kind in ("access", "keys") else Exit.DAMAGED


def _pdf(made: Any) -> bytes:
    from medshard.reports.pages import pdf

    return pdf(made)


def _tell(made: Report) -> None:
    output.line(f"{made.title}, {made.period} ({time.strftime('%Y-%m-%d %H:%M', time.gmtime(made.made))} UTC)")
    for name, value in made.facts:
        output.line(f"  {name}: {value}")
    for table in made.tables:
        if table.rows:
            output.line(f"{table.title}:")
            for row in table.rows[:20]:
                output.line("  " + "  ".join(cell for cell in row if cell))
            if len(table.rows) > 20:
                output.line(f"  … and {len(table.rows) - 20} more: -o FILE.csv")
