"""The command that tells how this home's node audits others, and lets it audit some at once."""

from __future__ import annotations

import time
from typing import Any

import click

from storenode.cli.options import Session, shared

answer_s = 120.0  # a holder that does not answer takes its time


@click.command()
@click.argument("file_id", required=False)
@click.option("--now", is_flag=True, help="Audit some files at once, drawn by chance, beside what is done all the time.")
@click.option("--count", type=click.IntRange(1, 1000), default=8, show_default=True, help="How many, with --now.")
@shared
def audit(session: Session, file_id: str | None, now: bool, count: int) -> None:
    """Show what this node's audits of other nodes found; with --now or a FILE_ID, audit at once.

    Exit code 6 if a shard is missing beyond doubt, or a node has been silent for too long.

    \b
    Examples:
      storenode audit
      storenode audit --now --count 50
      storenode audit 5f0c…e1
      storenode audit --json | jq .nodes
    """
    from medshard_protocol import canonical
    from medshard_protocol.errors import Damaged
    from medshard_protocol.ids import file_id_from_hex
    from storenode.asking import ask
    from storenode.config import Config
    from storenode.identity import NodeKeys

    config, keys = Config.load(session.home), NodeKeys.load(session.home)
    if now or file_id:
        wanted: list[canonical.Value] = [file_id_from_hex(file_id.strip().lower())] if file_id else []
        told = ask(config, keys, "/v1/audit", "POST", canonical.encode([1, count, wanted]), timeout_s=answer_s)
    else:
        told = ask(config, keys, "/v1/audit")
    session.tell(told, *(line for each in told.get("rounds", ()) for line in _round(each)), *_standing(told))
    if told["missing"] or told["silent"]:
        raise Damaged("shards are missing", hint="`storenode repair FILE_ID` makes one again at another node")


def audited(told: Any) -> str:
    """What audits say, in a line."""
    if not told:
        return "none"
    week: dict[str, int] = {}
    for node in told["nodes"].values():
        for verdict, count in node["week"].items():
            week[verdict] = week.get(verdict, 0) + count
    text = f"{sum(week.values())} shards looked at in 7 days" + "".join(f", {count} {verdict}" for verdict, count in sorted(week.items()))
    if told["silent"]:
        text += f"; SILENT: {', '.join(told['silent'])}"
    if told["missing"]:
        text += f"; MISSING: {told['missing']} shards"
    scrub = told["scrub"]
    return text + f"; own shards read again {_ago(scrub['ended'])}" + (f", {scrub['bad']} BAD" if scrub["bad"] else "")


def _round(each: dict[str, Any]) -> list[str]:
    lines = [f"file {each['file']}, cell {each['cell']}" + ("" if each["compared"] else " (the holders' word: tags were not compared)")]
    for result in each["results"]:
        took = f"{result['seconds'] * 1000:7.0f} ms"
        lines.append(f"  shard {result['shard']:3}  {result['node']:16} {result['verdict']:8} {took}  {result['why']}".rstrip())
    return lines


def _standing(told: dict[str, Any]) -> list[str]:
    lines = [f"audits   {audited(told)}"]
    for name, node in sorted(told["nodes"].items()):
        week = ", ".join(f"{count} {verdict}" for verdict, count in sorted(node["week"].items()))
        silent = f"; silent for {_ago(node['silent_since']).removesuffix(' ago')}" if node["silent_since"] else ""
        lines.append(f"  {name:20} {week}{silent}")
    lines += [
        f"  {each['verdict']:8} shard {each['shard']} of {each['file']} at {each['node']}, {each['times']} times" for each in told["worst"]
    ]
    return lines


def _ago(moment: float | None) -> str:
    if not moment:
        return "never"
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
