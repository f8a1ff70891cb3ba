"""users: whom this institution vouches for, and whom no longer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from storenode.cli.options import Session, shared

if TYPE_CHECKING:
    from storenode.config import Config
    from storenode.identity import NodeKeys


@click.command()
@click.option("--all", "everybody", is_flag=True, help="Keys that were withdrawn or succeeded, too.")
@shared
def users(session: Session, everybody: bool) -> None:
    """List the keys that this institution vouches for: KEY, since which entry of the ledger, what it is, whose it is.

    Each user, department or sender has a key of its own; `storenode invite --for NAME` lets one in, and NAME is what this list calls it
    (a note of this node, which nobody else sees). `storenode withdraw KEY` ends one.

    \b
    Examples:
      storenode users
      storenode users --all --json | jq -r '.users[] | select(.state == "withdrawn") | .key'
    """
    from storenode.config import Config
    from storenode.genesis import load_genesis
    from storenode.identity import NodeKeys
    from storenode.invites import Invites
    from storenode.membership import Membership

    config, keys = Config.load(session.home), NodeKeys.load(session.home)
    roster = Membership(config.data, load_genesis(session.home)).roster
    own = roster.institutions[roster.node(keys.node_id).institution].name
    labels = {each.key.hex(): each.label for each in Invites(config.data).all() if each.key}
    found = [_told(each, labels) for each in _identities(config, keys) if each["institution"] == own]
    found = sorted((each for each in found if everybody or each["state"] in ("user", "sender")), key=lambda each: int(each["since"]))
    lines = (f"{each['key']}  {each['since']:>8}  {each['state']:9}  {_more(each)}".rstrip() for each in found)
    session.tell({"institution": own, "users": found}, *lines)


def _identities(config: Config, keys: NodeKeys) -> list[dict[str, Any]]:
    """Every key that the ledger knows, as this home's node tells."""
    from storenode.asking import ask

    found: list[dict[str, Any]] = []
    after = ""
    while True:
        answer = ask(config, keys, f"/v1/ledger/identities{after}")
        found += answer["identities"]
        if not answer["more"]:
            return found
        after = f"?after={answer['identities'][-1]['key']}"


def _told(each: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    if each["sends"]:
        state = "sender" if each["withdrawn"] is None else "withdrawn"
    elif each["heir"]:
        state = "succeeded"
    else:
        state = "user" if each["withdrawn"] is None else "withdrawn"
    label = labels.get(each["key"]) or labels.get(each["before"] or "", "")
    return {
        "key": each["key"], "since": each["first"], "state": state, "for": label, "withdrawn": each["withdrawn"],
        "heir": each["heir"], "before": each["before"], "succeeded": each["inherits"] if state == "succeeded" else None,
    }  # fmt: skip


def _more(each: dict[str, Any]) -> str:
    parts = [each["for"]] if each["for"] else []
    if each["state"] == "sender":
        parts.append(f"sends for {each['heir'][:16]}…")
    elif each["state"] == "succeeded":
        parts.append(f"by {each['heir'][:16]}… with entry {each['succeeded']}")
        if each["withdrawn"] != each["succeeded"]:
            parts.append(f"withdrawn with entry {each['withdrawn']}")
    elif each["withdrawn"] is not None:
        parts.append(f"with entry {each['withdrawn']}")
    if each["before"]:
        parts.append(f"was {each['before'][:16]}…")
    return "  ".join(parts)
