"""The commands that make lost shards again, and that hand all shards on, at this home's node."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Self

import click

from medshard_protocol.errors import Unavailable
from storenode.cli.options import Session, shared, shown_size

poll_s = 0.3
answer_s = 60.0  # looking waits for every holder
watch_s = 1.0
stuck_polls = 20  # so often a node must say that nobody takes what is left


@click.command()
@click.argument("file_id", required=False)
@click.option("--shard", type=click.IntRange(0, 254), help="Which shard; without it, the first that is missing.")
@click.option("--dry-run", is_flag=True, help="Say what is missing and who would help, and do nothing.")
@click.option("--take-over", is_flag=True, help="Also if another node has said on the ledger that it takes the shard, and has not done it.")
@click.option("--cancel", is_flag=True, help="Give the repair of this file up that runs here.")
@click.option("--watch", is_flag=True, help="Show what this node repairs by itself, until Ctrl-C; with --json, a line whenever it changes.")
@shared
def repair(session: Session, file_id: str | None, shard: int | None, dry_run: bool, take_over: bool, cancel: bool, watch: bool) -> None:
    """Make a lost shard of FILE_ID again, and keep it at this node from now on. Or watch what nodes repair by themselves.

    The running node asks k holders in a line for it. It sees nothing but the shard; they see nothing but random sums. A MOVE entry on the
    ledger says first that this node takes the shard over. Asking again begins anew, under the same entry.

    \b
    Examples:
      storenode repair --watch
      storenode repair 5f0c…e1 --dry-run
      storenode repair 5f0c…e1
      storenode repair 5f0c…e1 --shard 3 --json
      storenode repair 5f0c…e1 --cancel
    """
    from medshard_protocol.ids import file_id_from_hex
    from medshard_protocol.repairorder import Wish, pack_wish
    from storenode.asking import ask
    from storenode.config import Config
    from storenode.identity import NodeKeys

    config, keys = Config.load(session.home), NodeKeys.load(session.home)
    if watch:
        _watch(session, lambda: ask(config, keys, "/v1/repair"))
        return
    if file_id is None:
        raise click.UsageError("name a FILE_ID, or --watch what is repaired without being asked")
    path = f"/v1/repair/{file_id_from_hex(file_id.strip().lower()).hex()}"
    if cancel:
        told = ask(config, keys, path, "DELETE")
        session.tell(told, "given up; what had come of the shard is dropped")
        return
    told = ask(config, keys, path, "POST", pack_wish(Wish(shard, dry_run, take_over)), timeout_s=answer_s)
    if dry_run:
        session.tell(told, *_planned(told))
        return
    with _Line(session) as line:
        while told["state"] in ("looking", "moving", "summing", "fetching"):
            line.show(f"{told['state']} {shown_size(told['done'])} of {shown_size(told['total'])}")
            time.sleep(poll_s)
            told = ask(config, keys, path)
    if told["state"] == "failed":
        raise Unavailable(f"the repair failed: {told['error']}", hint="run the same command again: it goes on with what it left")
    session.tell(told, *_done(told))


@click.command()
@click.option("--stop", is_flag=True, help="Keep what is still here, and take shards over again.")
@click.option("--status", "only_status", is_flag=True, help="Say how far it is, and change nothing.")
@shared
def drain(session: Session, stop: bool, only_status: bool) -> None:
    """Hand every shard of this node to the next node in placement order, so that this node can leave.

    Each shard goes straight to a node that may have it, which says so on the ledger and checks it; then it is deleted here. Goes on
    through restarts and after Ctrl-C; the same command shows it again. Ends when nothing is left: then the roster can be changed.

    \b
    Examples:
      storenode drain
      storenode drain --status --json | jq .left
      storenode drain --stop
    """
    from medshard_protocol.repairorder import pack_drain
    from storenode.asking import ask
    from storenode.config import Config
    from storenode.identity import NodeKeys

    config, keys = Config.load(session.home), NodeKeys.load(session.home)
    if stop or only_status:
        told = ask(config, keys, "/v1/drain", "POST", pack_drain(False)) if stop else ask(config, keys, "/v1/drain")
        session.tell(told, _drained(told) if told["draining"] else f"not draining; {told['left']} shards are here")
        return
    told = ask(config, keys, "/v1/drain", "POST", pack_drain(True))
    idle = 0
    with _Line(session) as line:
        while told["left"] and idle < stuck_polls:
            line.show(_drained(told))
            time.sleep(poll_s)
            told = ask(config, keys, "/v1/drain")
            idle = idle + 1 if 0 < told["left"] <= told["stuck"] and not told["handing"] else 0
    if told["left"]:
        raise Unavailable(
            f"{told['stuck']} shards are left that no node may take, or none that answers", hint="add a node, or start those that are down"
        )
    session.tell(
        told,
        f"nothing is left here: {told['moved']} shards were handed over",
        "The roster can be changed now: `storenode roster propose --remove-node` or `--remove-institution`.",
        "Keep this node running until then: what is put meanwhile is handed over too.",
    )


class _Line:
    """A line on a terminal that is written over, and cleared at the end."""

    def __init__(self, session: Session) -> None:
        self._is_shown = sys.stderr.isatty() and not session.json

    def __enter__(self) -> Self:
        return self

    def show(self, text: str) -> None:
        """Write it over what was there."""
        if self._is_shown:
            sys.stderr.write(f"\r\033[K{text}")
            sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        self.show("")


def _watch(session: Session, look: Callable[[], dict[str, Any]]) -> None:
    """Show the queue until somebody stops it."""
    last: object = None
    while True:
        told = look()
        if session.json:
            if told != last:
                sys.stdout.write(json.dumps(told) + "\n")
        elif sys.stdout.isatty():
            sys.stdout.write("\033[H\033[2J" + "\n".join(_queue(told)) + "\n")
        elif (lines := _queue(told)) != last:
            sys.stdout.write("\n".join(lines) + "\n\n")
        sys.stdout.flush()
        last = told if session.json else _queue(told)
        time.sleep(watch_s)


def _queue(told: dict[str, Any]) -> list[str]:
    limit = f" of {shown_size(told['rate_limit'])}/s" if told["rate_limit"] else ""
    margins = [f"{told['margins'][margin]} with margin {margin}" for margin in sorted(told["margins"], key=int)]
    short = f"{told['files']} files are short of shards: {', '.join(margins)}" if margins else "all is well"
    eta = f", done in {shown_time(told['eta_s'])}" if told["eta_s"] is not None else ""
    lines = [
        "repairs   " + ("" if told["on"] else "OFF in config.toml; ") + short,
        f"here      {told['mine']} shards to make, {shown_size(told['left_bytes'])}; {shown_size(told['rate'])}/s{limit}{eta}",
    ]
    if told["gone"]:
        lines.append(f"gone      {', '.join(told['gone'])}")
    if told["stuck"]:
        lines.append(f"STUCK     {told['stuck']} files have a lost shard that no node may take: add nodes, or bring one back")
    for job in told["running"]:
        lines.append(f"  {job['file'][:16]}  shard {job['shard']}  {job['state']} {shown_size(job['done'])} of {shown_size(job['total'])}")
    running = {job["file"] for job in told["running"]}
    for each in told["queue"]:
        if each["file"] not in running:
            who = "waits here" if each["mine"] is not None else "nobody may" if each["stuck"] else "with another node"
            lines.append(f"  {each['file'][:16]}  margin {each['margin']}, without {', '.join(map(str, each['missing']))}: {who}")
    return lines


def _drained(told: dict[str, Any]) -> str:
    eta = f", done in {shown_time(told['eta_s'])}" if told["eta_s"] is not None else ""
    stuck = f"; {told['stuck']} nobody may take" if told["stuck"] else ""
    return (
        f"{told['moved']} handed over, {told['left']} left ({shown_size(told['left_bytes'])}) at {shown_size(told['rate'])}/s{eta}{stuck}"
    )


def shown_time(seconds: float) -> str:
    """A time for people."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _planned(told: dict[str, Any]) -> list[str]:
    if not told["missing"]:
        return [f"nothing to do: all {len(told['there'])} shards are there"]
    missing = ", ".join(f"{shard} ({told['holders'][shard]})" for shard in told["missing"])
    if told["lost"]:
        return [f"missing  {missing}", f"LOST     only {len(told['there'])} shards can be had, fewer than are needed"]
    lines = [
        f"missing  {missing}",
        f"repairs  shard {told['shard']}, {shown_size(told['bytes'])}",
        f"helpers  {', '.join(told['helpers'])}",
    ]
    lines.append(f"places   {', '.join(told['next_in_placement']) or 'no node may take it'} (best first)")
    return [*lines, f"BUT      {told['objection']}"] if told["objection"] else lines


def _done(told: dict[str, Any]) -> list[str]:
    if told["state"] == "nothing":
        return ["nothing to do: the shard is there" if told["shard"] is not None else "nothing to do: all shards are there"]
    lines = [f"repaired shard {told['shard']}, {shown_size(told['total'])} in {told['seconds']:g} s; MOVE is entry {told['move']}"]
    lines += [f"left out {each}" for each in told["broken"]]
    return lines + [
        f"SUSPECT  {each} sent a wrong sum (this node's own finding, which proves nothing to others)" for each in told["suspects"]
    ]
