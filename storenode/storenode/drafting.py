"""Drafting the next roster: each change as a function from roster to roster, put together into a document that a quorum may approve.

Law: nothing here is signed, sent or stored, and no change touches more than it names. What no roster may hold, and what may not follow
the present one, is said here already, before anybody is asked to sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeAlias

from medshard_protocol.checkpoint import Checkpoint
from medshard_protocol.errors import Absent, Conflict, Malformed
from medshard_protocol.identity import check_institution
from medshard_protocol.ids import Key
from medshard_protocol.roster import Institution, Node, Roster, former_max, genesis_previous
from medshard_protocol.rosters import check_successor
from medshard_protocol.succession import line_after
from storenode.genesis import Card, default_code

Change: TypeAlias = Callable[[Roster], Roster]


def draft(old: Roster, changes: Iterable[Change]) -> Roster:
    """Make the document that follows ``old``. Raises Malformed, Refused, Absent or Conflict for changes that make none."""
    new = replace(old, number=old.number + 1, previous=old.sha256)
    for change in changes:
        new = change(new)
    try:
        new.to_bytes()
    except ValueError as error:
        raise Malformed(f"these changes make no roster: {error}", hint=_hint(old, new)) from None
    if replace(new, number=old.number, previous=old.previous) == old:
        raise Malformed("these changes change nothing")
    check_successor(old, new)
    return new


def draft_successor(genesis: Roster, last: Roster, end: Checkpoint, origin: str, changes: Iterable[Change]) -> Roster:
    """Make the genesis file of the log that goes on from one that has ended. Raises as ``draft`` does."""
    new = replace(last, origin=origin, number=0, previous=genesis_previous, before=line_after(genesis, end))
    for change in changes:
        new = change(new)
    try:
        new.to_bytes()
    except ValueError as error:
        raise Malformed(f"these changes make no roster: {error}", hint=_hint(last, new)) from None
    return new


def add_node(card: Card) -> Change:
    """Take up a node, and its institution if that is new."""

    def change(roster: Roster) -> Roster:
        key = check_institution(card.ca)
        known = roster.institution_named(card.institution)
        if known is None:
            institutions = (*roster.institutions, Institution(card.institution, card.ca, key))
            return replace(roster, institutions=institutions, nodes=(*roster.nodes, card.listed(len(institutions) - 1)))
        if known.ca != card.ca:
            raise Conflict(f"{card.institution} is in the roster with another CA", hint="make the card with the institution's present CA")
        return replace(roster, nodes=(*roster.nodes, card.listed(roster.institutions.index(known))))

    return change


def remove_node(name: str) -> Change:
    """Let a node go. Its institution needs another."""

    def change(roster: Roster) -> Roster:
        node = _node(roster, name)
        if sum(each.institution == node.institution for each in roster.nodes) == 1:
            owner = roster.institutions[node.institution].name
            raise Conflict(f"{name} is the only node of {owner}", hint=f'remove the institution: --remove-institution "{owner}"')
        return replace(roster, nodes=tuple(each for each in roster.nodes if each is not node))

    return change


def remove_institution(name: str) -> Change:
    """Let an institution go, with its nodes and its vaults."""

    def change(roster: Roster) -> Roster:
        place = roster.institutions.index(_institution(roster, name))
        staying = tuple(each for number, each in enumerate(roster.institutions) if number != place)
        nodes = (replace(n, institution=n.institution - (n.institution > place)) for n in roster.nodes if n.institution != place)
        return replace(roster, institutions=staying, nodes=tuple(nodes))

    return change


def set_url(name: str, url: str) -> Change:
    """A node moves to another address."""
    return lambda roster: _with_node(roster, name, lambda node: replace(node, url=url))


def set_capacity(name: str, capacity: int) -> Change:
    """A node offers more or less room."""
    return lambda roster: _with_node(roster, name, lambda node: replace(node, capacity=capacity))


def rotate_keys(card: Card) -> Change:
    """A node gets the keys of this card. Its id, name, address and capacity stay."""

    def change(roster: Roster) -> Roster:
        node = _node(roster, card.node)
        owner = roster.institutions[node.institution]
        if card.institution != owner.name or card.ca not in (owner.ca, *owner.former):
            raise Conflict(f"the card is not by {owner.name}, whose node {card.node} is")
        keys = {"tls_key": card.tls_key, "cosigner_key": card.cosigner_key, "log_key": card.log_key, "pq_key": card.pq_key}
        return _with_node(roster, card.node, lambda each: replace(each, **keys))  # type: ignore[arg-type]

    return change


def rotate_ca(name: str, ca: bytes) -> Change:
    """An institution gets another CA. What the present one issued stays good until ``drop_former``."""

    def change(roster: Roster) -> Roster:
        key, present = check_institution(ca), _institution(roster, name)
        if len(present.former) >= former_max:
            raise Conflict(f"{name} has {former_max} former CAs already", hint=f'drop them: --drop-former "{name}"')
        former = (present.ca, *present.former)
        return _with_institution(roster, replace(present, ca=ca, key=key, former=former))

    return change


def drop_former(name: str) -> Change:
    """What an institution's former CAs issued is refused from then on."""
    return lambda roster: _with_institution(roster, replace(_institution(roster, name), former=()))


def set_keepers(name: str, keepers: Iterable[Key]) -> Change:
    """Two of these must want each hold and each release of an institution's files; none: nobody needs a second person any more."""
    return lambda roster: _with_institution(roster, replace(_institution(roster, name), keepers=tuple(sorted(set(keepers)))))


def add_emergency(key: Key) -> Change:
    """This identity may read while the ledger is out of reach."""
    return lambda roster: replace(roster, emergency=tuple(sorted({*roster.emergency, key})))


def remove_emergency(key: Key) -> Change:
    """This identity may no longer."""

    def change(roster: Roster) -> Roster:
        if key not in roster.emergency:
            raise Absent(f"the roster marks no emergency identity {key.hex()}")
        return replace(roster, emergency=tuple(each for each in roster.emergency if each != key))

    return change


def set_auditors(key: bytes) -> Change:
    """Reasons for reads in an emergency are sealed to this key from then on; empty: to none."""
    return lambda roster: replace(roster, auditors=key)


def set_sequencer(name: str) -> Change:
    """Another node orders the ledger's entries."""
    return lambda roster: replace(roster, sequencer=_node(roster, name).id)


def set_code(code: tuple[int, int, int]) -> Change:
    """New files are coded otherwise; stored ones stay as they are."""
    return lambda roster: replace(roster, code=code)


def _hint(old: Roster, new: Roster) -> str:
    if not any(node.id == new.sequencer for node in new.nodes):
        return "name another sequencer too: --sequencer NODE"
    k, n, w = default_code(len(new.institutions))
    return f"change the code too: --code {k}/{n}/{w}" if new.code[1] > len(new.nodes) else ""


def _node(roster: Roster, name: str) -> Node:
    found = next((node for node in roster.nodes if node.name == name), None)
    if found is None:
        raise Absent(f"the roster has no node {name!r}", hint=f"there are {', '.join(node.name for node in roster.nodes)}")
    return found


def _institution(roster: Roster, name: str) -> Institution:
    found = roster.institution_named(name)
    if found is None:
        raise Absent(f"the roster has no institution {name!r}", hint=f"there are {', '.join(each.name for each in roster.institutions)}")
    return found


def _with_node(roster: Roster, name: str, change: Callable[[Node], Node]) -> Roster:
    node = _node(roster, name)
    return replace(roster, nodes=tuple(change(each) if each is node else each for each in roster.nodes))


def _with_institution(roster: Roster, changed: Institution) -> Roster:
    return replace(roster, institutions=tuple(changed if each.name == changed.name else each for each in roster.institutions))
