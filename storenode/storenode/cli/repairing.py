"""The command that makes a lost shard again, at this home's node."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from medshard_protocol.errors import Unavailable
from storenode.cli.options import Session, shared, shown_size

poll_s = 0.3
answer_s = 60.0  # looking waits for every holder


@click.command()
@click.argument("file_id")
@click.option("--shard", type=click.IntRange(0, 254), help="Which shard; without it, the first that is missing.")
@click.option("--dry-run", is_flag=True, help="Say what is missing and who would help, and do nothing.")
@click.option("--take-over", is_flag=True, help="Also if another node has said on the ledger that it takes the shard, and has not done it.")
@shared
def repair(session: Session, file_id: str, shard: int | None, dry_run: bool, take_over: bool) -> None:
    """Make a lost shard of FILE_ID again, and keep it at this node from now on.

    The running node asks k holders in a line for it. It sees nothing but the shard; they see nothing but random sums. A MOVE entry on the
    ledger says first that this node takes the shard over. Asking again goes on with what was left.

    \b
    Examples:
      storenode repair 5f0c…e1 --dry-run
      storenode repair 5f0c…e1
      storenode repair 5f0c…e1 --shard 3 --json
    """
    from medshard_protocol.ids import file_id_from_hex
    from medshard_protocol.repairorder import Wish, pack_wish
    from storenode.asking import ask
    from storenode.config import Config
    from storenode.identity import NodeKeys

    path = f"/v1/repair/{file_id_from_hex(file_id.strip().lower()).hex()}"
    config, keys = Config.load(session.home), NodeKeys.load(session.home)
    told = ask(config, keys, path, "POST", pack_wish(Wish(shard, dry_run, take_over)), timeout_s=answer_s)
    if dry_run:
        session.tell(told, *_planned(told))
        return
    shown = False
    while told["state"] in ("looking", "moving", "summing"):
        if sys.stderr.isatty() and not session.json:
            sys.stderr.write(f"\r{told['state']} {shown_size(told['done'])} of {shown_size(told['total'])} ")
            sys.stderr.flush()
            shown = True
        time.sleep(poll_s)
        told = ask(config, keys, path)
    if shown:
        sys.stderr.write("\r\033[K")
    if told["state"] == "failed":
        raise Unavailable(f"the repair failed: {told['error']}", hint="run the same command again: it goes on with what it left")
    session.tell(told, *_done(told))


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
