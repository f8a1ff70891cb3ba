"""Commands of every day: run, status, invite."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import Any

import click

from medshard_protocol.errors import Refused
from storenode.cli.options import Session, shared, shown_size, span


@click.command()
@click.option("--sequencer", is_flag=True, help="Stand by to order the ledger's entries, as `sequencer = true` in config.toml says.")
@shared
def run(session: Session, sequencer: bool) -> None:
    """Run the node in the foreground, until SIGTERM or Ctrl-C; then finish what is in flight.

    Writes its process id to HOME/pid and removes it at the end. Logs go to standard error: text on a terminal, else a JSON object a
    line. Use `systemd` or a container to keep it running; deploy/ has both.

    \b
    Examples:
      storenode run
      storenode --home /srv/second run
      storenode run --sequencer
    """
    import asyncio
    from dataclasses import replace

    from storenode import logs
    from storenode.config import Config
    from storenode.genesis import check_membership, load_genesis
    from storenode.identity import NodeKeys
    from storenode.membership import Membership
    from storenode.rotation import promote
    from storenode.running import hold

    session.check_owner()
    config = Config.load(session.home)
    config = replace(config, sequencer=True if sequencer else config.sequencer)
    membership, keys = Membership(config.data, load_genesis(session.home)), NodeKeys.load(session.home)
    with hold(session.home):
        keys = promote(session.home, membership.roster)
        check_membership(membership.last_with(keys.node_id), keys)
        logs.configure(config.log_level, config.log_format)
        from storenode.app import serve  # late: it is most of the program, and a wrong configuration should say so at once

        while asyncio.run(serve(config)):
            pass  # its keys were rotated


@click.command()
@shared
def status(session: Session) -> None:
    """Ask the running node how it is. Exit code 5 if it does not run or answer.

    \b
    Examples:
      storenode status
      storenode status --json | jq .ledger
    """
    from medshard_protocol.identity import certificate_expiry
    from storenode.asking import ask
    from storenode.cli.auditing import audited
    from storenode.config import Config
    from storenode.genesis import check_membership, load_genesis
    from storenode.identity import NodeKeys
    from storenode.membership import Membership
    from storenode.running import running

    config, keys = Config.load(session.home), NodeKeys.load(session.home)
    membership = Membership(config.data, load_genesis(session.home))
    roster = membership.last_with(keys.node_id)
    node = check_membership(roster, keys)
    answer = ask(config, keys, "/v1/status")
    expires = certificate_expiry(keys.certificate)
    document = answer | {
        "name": node.name,
        "institution": roster.institutions[node.institution].name,
        "url": node.url,
        "pid": running(session.home),
        "genesis_sha256": membership.genesis.sha256.hex(),
        "roster": membership.roster.number,
        "member": membership.lists(keys.node_id),
        "certificate_expires": expires.isoformat(),
    }
    ledger: dict[str, Any] = answer.get("ledger", {})
    entries, published = ledger.get("size"), ledger.get("published")
    used, free = int(answer.get("used_bytes", 0)), int(answer.get("free_bytes", 0))
    capacity = int(answer.get("capacity_bytes", 0)) or 1
    session.tell(
        document,
        f"node         {node.name} of {document['institution']}, {node.url}, process {document['pid']}",
        f"stored       {answer.get('shards')} shards, {answer.get('manifests')} manifests, {shown_size(used)}"
        f" of {shown_size(capacity)} ({used / capacity:.1%}); {shown_size(free)} free",
        f"ledger       {ledger.get('origin')}, {ledger.get('role')}; {entries} entries here, {published} published"
        + (": PARTLY LOST, so this node cosigns nothing until its key is replaced" if ledger.get("lost") else ""),
        f"sequencer    {ledger.get('leader') or 'none yet'}, epoch {ledger.get('epoch')}",
        f"roster       number {membership.roster.number}" + ("" if document["member"] else ": WITHOUT THIS NODE, which serves reads only"),
        f"audits       {audited(answer.get('audits'))}",
        f"watch        {_watched(answer.get('watch'))}",
        f"repair       {_repaired(answer.get('repair'))}",
        f"genesis      {membership.genesis.sha256.hex()}",
        f"certificate  good until {expires:%Y-%m-%d}",
    )


@click.command()
@click.option("--for", "label", default="", metavar="NAME", help='A note for yourself, such as "radiology".')
@click.option("--expires", default="7d", show_default=True, callback=span, help="How long the code is good: 30m, 12h, 7d.")
@click.option("--list", "listing", is_flag=True, help="Show the invitations given out instead.")
@shared
def invite(session: Session, label: str, expires: float, listing: bool) -> None:
    """Print a one-time code with which one vault joins through this institution.

    Treat it like a password: whoever has it first can join. The running node takes it up at once. Needs keys/ca.key on this machine.

    \b
    Examples:
      storenode invite --for radiology --expires 24h
      storenode invite --json | jq -r .code | qrencode -t utf8
      storenode invite --list
    """
    from medshard_protocol.invite import Invite
    from storenode.config import Config
    from storenode.genesis import check_membership, load_genesis
    from storenode.identity import NodeKeys
    from storenode.invites import Invites, label_chars_max, lifetime_s_max
    from storenode.membership import Membership
    from storenode.running import running

    session.check_owner()
    config, keys = Config.load(session.home), NodeKeys.load(session.home)
    invites, now = Invites(config.data), time.time()
    if listing:
        _list_invites(session, invites, now)
        return
    if len(label) > label_chars_max:
        raise click.BadParameter(f"at most {label_chars_max} characters", param_hint="--for")
    if expires > lifetime_s_max:
        raise click.BadParameter(f"at most {lifetime_s_max // 86_400} days", param_hint="--expires")
    if keys.ca is None:
        raise Refused("keys/ca.key is not on this machine, so this node can vouch for nobody", hint="invite from the node that has it")
    membership = Membership(config.data, load_genesis(session.home))
    roster = membership.roster
    node = check_membership(roster, keys)
    secret = invites.issue(label, now=now, lifetime_s=expires)
    code = Invite(node.url, membership.genesis.sha256, secret, node.institution).to_code()
    until = datetime.fromtimestamp(now + expires, UTC)
    name = roster.institutions[node.institution].name
    session.tell({"code": code, "expires": until.isoformat(timespec="seconds"), "institution": name, "url": node.url, "for": label}, code)
    if sys.stderr.isatty():
        session.note(
            "", f"Good once, until {until:%Y-%m-%d %H:%M} UTC. Send it like a password. The new vault runs", "  medshard join CODE"
        )
    if running(session.home) is None:
        session.note("Note: the node is not running; nobody can join before it does.")


def _list_invites(session: Session, invites: Any, now: float) -> None:
    issued = invites.all()
    session.tell(
        {
            "invites": [
                {
                    "for": each.label,
                    "state": each.state(now),
                    "created": _moment(each.created),
                    "expires": _moment(each.expires),
                    "key": each.key.hex() if each.key else None,
                }
                for each in issued
            ]
        },
        *(f"{each.state(now):8} {_moment(each.expires)}  {each.key.hex()[:16] if each.key else '-':16}  {each.label}" for each in issued),
    )


def _watched(watch: Any) -> str:
    """What the watch over the other mirrors saw last, in a line."""
    last, kept = (watch or {}).get("last"), sum((watch or {}).get("evidence", {}).values())
    if last is None:
        text = "has not looked yet"
    elif last["findings"]:
        text = "FOUND " + "; ".join(f"{each['kind']}: {each['source']} {each['text']}" for each in last["findings"])
    else:
        text = f"{len(last['heads'])} mirrors show one history" + (f", {len(last['silent'])} do not answer" if last["silent"] else "")
    return text + (f" ({kept} files of evidence, see: storenode evidence list)" if kept else "")


def _repaired(repair: Any) -> str:
    """What this node knows to be short of shards, in a line."""
    if not repair:
        return "not told"
    text = "all is well" if repair["on"] else "OFF in config.toml: this node finds and makes no lost shards"
    if repair["files"]:
        worst = repair["lowest_margin"]
        how_bad = "SOME CANNOT BE READ" if worst < 0 else f"the worst could lose {worst} more"
        text = f"{repair['files']} files are short of shards, {how_bad}; {repair['mine']} are for this node"
    text += f"; {repair['stuck']} STUCK, no node may take them" if repair["stuck"] else ""
    text += f"; gone: {', '.join(repair['gone'])}" if repair["gone"] else ""
    drain = repair["drain"]
    return text + (f"; leaving: {drain['left']} shards left to hand over" if drain["draining"] else "")


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="minutes")
