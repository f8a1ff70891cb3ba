"""Commands of an auditor: watch the ledger from outside, and say what a piece of evidence proves."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medshard_protocol.errors import Malformed, Unavailable
from storenode.cli.options import Session, shared

if TYPE_CHECKING:
    from medshard_protocol.roster import Roster
    from storenode.watching import Report

found_exit = 6  # something is not what it should be, as for a damaged file

_file = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option("--once", is_flag=True, help="Go around once and exit: 0 all is well, 6 something was found, 5 nobody answered.")
@click.option("--every", default=15.0, show_default=True, type=click.FloatRange(min=0.1), help="Seconds between rounds.")
@click.option("--genesis", type=_file, help="The genesis file [HOME/genesis.medshard].")
@click.option("--certificate", type=_file, help="Certificate (PEM) of an identity that an institution vouches for [this node's].")
@click.option("--key", type=_file, help="Its private key (PEM).")
@click.option("--log", "places", multiple=True, metavar="URL|DIR", help="A static copy of the log to watch too; repeatable.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Where memory and evidence are kept [HOME/watch].")
@click.option("--stale", default=60.0, show_default=True, type=click.FloatRange(min=1), help="Seconds after which a head is stale.")
@shared
def watch(
    session: Session,
    once: bool,
    every: float,
    genesis: Path | None,
    certificate: Path | None,
    key: Path | None,
    places: tuple[str, ...],
    folder: Path | None,
    stale: float,
) -> None:
    """Ask every mirror for the head of the log, and prove that all heads ever seen are one history.

    Needs nothing but the genesis file, and a certificate or static copies of the log. Every node does the same by itself; run this to
    rely on no node. What is found is kept as evidence that anybody can verify: `storenode evidence verify`.

    \b
    Examples:
      storenode watch --once
      storenode watch --genesis genesis.medshard --certificate auditor.crt --key auditor.key --folder ~/ledger
      storenode watch --once --json --genesis genesis.medshard --log https://log.hospital.example/ --folder ~/ledger
    """
    from storenode import logs
    from storenode.genesis import genesis_name, read_genesis

    if (certificate is None) != (key is None):
        raise click.UsageError("--certificate and --key go together")
    roster = read_genesis(genesis or session.home / genesis_name)
    keys = session.home / "keys"
    identity = (certificate, key) if certificate and key else None
    if identity is None and not places:
        identity = (keys / "node.crt", keys / "node.key")
    logs.configure("warning" if not once else "error")
    going = _go(session, roster, folder or session.home / "watch", identity, places, stale, None if once else every)
    raise click.exceptions.Exit(asyncio.run(going))


async def _go(
    session: Session,
    roster: Roster,
    folder: Path,
    identity: tuple[Path, Path] | None,
    places: tuple[str, ...],
    stale_s: float,
    every_s: float | None,
) -> int:
    from storenode.watching.auditing import auditing

    async with auditing(roster, folder, identity=identity, places=places, stale_s=stale_s) as auditor:
        told: object = None
        while True:
            await auditor.follow()
            report = await auditor.watch.round()
            news = ([(f.kind, f.source) for f in report.findings], [name for name, _ in report.silent], len(report.heads))
            if every_s is None or news != told:
                _tell(session, report)
                told = news
            if every_s is None:
                break
            await asyncio.sleep(every_s)
    if report.findings:
        return found_exit
    if not report.heads:
        raise Unavailable("nobody showed a head", hint="; ".join(why for _, why in report.silent[:4]))
    return 0


def _tell(session: Session, report: Report) -> None:
    lines = [
        f"{head.source:20} {head.checkpoint.size} entries, root {head.checkpoint.root.hex()[:16]}, cosigned {_moment(head.at)}"
        for head in report.heads
    ]
    lines += [f"{source:20} silent: {why}" for source, why in sorted(report.silent)]
    lines += [f"FOUND {finding.kind}: {finding.source} {finding.text}" for finding in report.findings]
    lines += [f"evidence: {path}" for path in report.kept]
    session.tell(report.to_json(), *lines, *([] if report.findings or not report.heads else ["one history"]))


@click.group()
def evidence() -> None:
    """What this node or a watch has kept as proof of misbehaviour."""


@evidence.command("list")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Folder of evidence [the node's DATA/evidence].")
@shared
def list_(session: Session, folder: Path | None) -> None:
    """List what is kept, oldest first.

    \b
    Examples:
      storenode evidence list
      storenode evidence list --folder ~/ledger/evidence
    """
    from storenode.config import Config
    from storenode.evidence import Evidence, Exhibit, folder_name

    place = folder or Config.load(session.home).data / folder_name
    found = []
    for path in Evidence(place).files():
        exhibit = Exhibit.read(path)
        found.append({"file": str(path), "kind": exhibit.kind, "kept": _moment(path.stat().st_mtime), "details": dict(exhibit.details)})
    session.tell(
        {"evidence": found}, *(f"{each['kept']}  {each['kind']:14} {_details(each['details'])}\n    {each['file']}" for each in found)
    )


@evidence.command()
@click.argument("file", type=_file)
@click.option("--genesis", type=_file, help="The genesis file [HOME/genesis.medshard].")
@shared
def verify(session: Session, file: Path, genesis: Path | None) -> None:
    """Recompute what a file of evidence proves, and say in words who signed what. Reads that file and the genesis file, nothing else.

    Exit code 0 if it proves what its kind says by itself, 6 if it is its keeper's word, or no proof at all.

    \b
    Examples:
      storenode evidence verify fork-0f3c….evidence --genesis genesis.medshard
    """
    from storenode.evidence import Exhibit
    from storenode.genesis import genesis_name, read_genesis
    from storenode.watching import judge

    roster = read_genesis(genesis or session.home / genesis_name)
    verdict = asyncio.run(judge(Exhibit.read(file), roster))
    outcome = "PROVEN by signatures and hashes." if verdict.proven else "NOT PROVEN by the documents alone."
    session.tell({"proven": verdict.proven, "lines": list(verdict.lines), "genesis_sha256": roster.sha256.hex()}, *verdict.lines, outcome)
    raise click.exceptions.Exit(0 if verdict.proven else found_exit)


@evidence.command()
@click.argument("file", type=_file)
@shared
def show(session: Session, file: Path) -> None:
    """Print what a file of evidence holds, without judging it.

    \b
    Examples:
      storenode evidence show fork-0f3c….evidence
    """
    from storenode.evidence import Exhibit, kinds

    exhibit = Exhibit.read(file)
    if exhibit.kind not in kinds:
        raise Malformed(f"{file}: evidence of a kind that this version does not know")
    documents = {name: _shown(data) for name, data in exhibit.documents.items()}
    session.tell(
        {"kind": exhibit.kind, "details": dict(exhibit.details), "documents": documents},
        f"{exhibit.kind}: {kinds[exhibit.kind]}",
        *(f"{name}: {value}" for name, value in exhibit.details.items()),
        *(f"--- {name}\n{text}" for name, text in documents.items()),
    )


def _shown(data: bytes) -> str:
    """A note as it reads, anything else in hexadecimal."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return data.hex()
    return text if all(c.isprintable() or c == "\n" for c in text) else data.hex()


def _details(details: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in details.items())


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
