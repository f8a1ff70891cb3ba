"""From one roster to the next: what may follow what, who must have agreed, and how that is shown to somebody who was away.

Law: a roster is replaced only by a document that names it by hash, and only when a quorum of its own institutions approved exactly that
document. A chain is checked by those signatures alone, so whoever holds the genesis file needs to believe nobody: not the node that
answers, not the ledger. At each step a quorum's worth of institutions stays, and a key never passes from one owner to another, so
no voice can be counted for somebody else, before a change or after it.

When a change takes effect is the ledger's business (``state``): at the entry with which the quorum is complete. Knows no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from medshard_protocol.canonical import Fields, Value, decode, encode
from medshard_protocol.entries import Approve, Entry, entry_bytes_max
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.identity import certificate_key
from medshard_protocol.ids import Key, NodeId
from medshard_protocol.roster import Institution, Node, Roster, institutions_max, roster_bytes_max

message_version = 1
roster_header = "Medshard-Roster"  # in every answer of a node: the number of the roster it goes by
log_header = "Medshard-Log"  # in what nodes ask each other: the origin of the log that they speak of
links_max = 256  # in one answer
page_bytes = 1 << 20  # an answer ends with the link that passes this; a roster of sixteen institutions has 40 KB
link_bytes_max = roster_bytes_max + institutions_max * (entry_bytes_max + 3) + 16
chain_bytes_max = page_bytes + link_bytes_max + 64


@dataclass(frozen=True, slots=True)
class Link:
    """One change: the new roster, and the entries by which institutions of the roster before approved it. Checked by ``follow``."""

    roster: bytes
    approvals: tuple[bytes, ...]

    def to_value(self) -> Value:
        """The form to put into a canonical message."""
        return [self.roster, list(self.approvals)]

    @classmethod
    def from_value(cls, value: object) -> Link:
        """Parse. Raises Malformed."""
        fields = Fields(value, count=2, what="roster link")
        roster, approvals = fields.bytes(most=roster_bytes_max), tuple(fields.list(most=institutions_max))
        if not all(isinstance(entry, bytes) and len(entry) <= entry_bytes_max for entry in approvals):
            raise Malformed(f"roster link: an approval is an entry of at most {entry_bytes_max} bytes")
        return cls(roster, approvals)


def pack_links(links: Iterable[Link]) -> bytes:
    """Answer to GET /v1/rosters?after=NUMBER: as many of the links, from the first on, as one answer carries. The asker asks on."""
    page: list[Value] = []
    size = 0
    for link in links:
        if len(page) == links_max or size > page_bytes:
            break
        page.append(link.to_value())
        size += len(link.roster) + sum(map(len, link.approvals))
    return encode([message_version, page])


def unpack_links(data: bytes) -> tuple[Link, ...]:
    """Parse the answer to GET /v1/rosters. Raises Malformed; the links are still to be followed."""
    fields = Fields(decode(data, bytes_max=chain_bytes_max, what="rosters"), count=2, what="rosters")
    fields.uint(least=message_version, most=message_version)
    return tuple(Link.from_value(item) for item in fields.list(most=links_max))


def follow(roster: Roster, links: Iterable[Link]) -> Roster:
    """Go from a trusted roster along links to the newest. Raises Malformed or Refused for the first link that does not hold."""
    for link in links:
        successor = Roster.from_bytes(link.roster)
        check_successor(roster, successor)
        check_approvals(roster, successor, link.approvals)
        roster = successor
    return roster


def check_approvals(old: Roster, new: Roster, approvals: Sequence[bytes]) -> None:
    """Check that a quorum of the old roster's institutions signed for the new one. Raises Malformed or Refused."""
    voices: set[Key] = set()
    for data in approvals:
        entry = Entry.from_bytes(data)
        if not isinstance(entry.body, Approve) or entry.body.roster_sha256 != new.sha256:
            raise Refused(f"roster {new.number}: an approval is of something else")
        institution = old.institution_of(entry.author)
        if institution is None:
            raise Refused(f"roster {new.number}: an approval is by nobody that roster {old.number} lists")
        if entry.author in voices:
            raise Refused(f"roster {new.number}: {institution.name} is counted twice")
        entry.verify(old.origin)
        voices.add(entry.author)
    if len(voices) < old.quorum.q:
        raise Refused(f"roster {new.number}: approved by {len(voices)} institutions, and {old.quorum.q} are needed")


def check_successor(old: Roster, new: Roster) -> None:
    """Check that one roster may follow another, whoever approved it. Raises Refused."""
    if complaint := successor_complaint(old, new):
        raise Refused(f"roster {new.number} cannot follow roster {old.number}: {complaint}")


def successor_complaint(old: Roster, new: Roster) -> str | None:
    """Say what rule a change breaks, if any."""
    if new.origin != old.origin:
        return "it is of another log"
    if new.before != old.before:
        return "the logs before this one stay what they are"
    if new.number != old.number + 1:
        return f"its number is not {old.number + 1}"
    if new.previous != old.sha256:
        return "it names another roster as the one before"
    staying = {each.name for each in old.institutions} & {each.name for each in new.institutions}
    if len(staying) < old.quorum.q:
        return f"only {len(staying)} institutions would stay, and a quorum of {old.quorum.q} must; remove them in steps"
    return takeover_complaint(old, new)


def takeover_complaint(old: Roster, new: Roster) -> str | None:
    """Say what keeps a roster from taking over keys, nodes and files of another, if anything does."""
    return _owners_complaint(old, new) or _former_complaint(old, new) or _nodes_complaint(old, new) or _room_complaint(new)


def _owners_complaint(old: Roster, new: Roster) -> str | None:
    """A key that changes hands would let what one signed count for another."""
    before = _owners(old)
    for key, (owner, role) in _owners(new).items():
        if key in before and before[key] != (owner, role):
            return f"a key of {before[key][0]} would become the {role} of {owner}"
    return None


def _owners(roster: Roster) -> dict[bytes, tuple[str, str]]:
    owners: dict[bytes, tuple[str, str]] = {each.key: (each.name, "CA key") for each in roster.institutions}
    for node in roster.nodes:
        keys = ((node.tls_key, "TLS key"), (node.cosigner_key, "cosigner key"), (node.log_key, "log key"), (node.pq_key, "ML-DSA key"))
        owners |= {key: (f"node {node.id.hex()}", role) for key, role in keys if key}
    return owners


def _former_complaint(old: Roster, new: Roster) -> str | None:
    for each in new.institutions:
        before = old.institution_named(each.name)
        own = (before.ca, *before.former) if before else ()
        if not set(each.former) <= set(own):
            return f"a former CA of {each.name} never was its CA"
    keys = [certificate_key(ca) for each in new.institutions for ca in each.former] + [each.key for each in new.institutions]
    if len(set(keys)) < len(keys):
        return "a former CA has the key of another CA"
    return None


def _nodes_complaint(old: Roster, new: Roster) -> str | None:
    known = {node.id: node for node in old.nodes}
    for node in new.nodes:
        before = known.get(node.id)
        if before is None:
            continue
        if before.name != node.name:
            return f"node {before.name} would be called {node.name}; a node keeps its name"
        if old.institutions[before.institution].name != new.institutions[node.institution].name:
            return f"node {node.name} would pass to another institution"
    return None


def _room_complaint(new: Roster) -> str | None:
    """Whoever puts needs w institutions, and room for n shards with fewer than k at any of them."""
    k, n, w = new.code
    if w > len(new.institutions):
        return f"a put needs {w} institutions to acknowledge, and there would be {len(new.institutions)}; change the code too"
    counts = [sum(node.institution == number for node in new.nodes) for number in range(len(new.institutions))]
    room = sum(min(count, max(k - 1, 1)) for count in counts)
    if room < n:
        return f"there would be room for {room} of a file's {n} shards with fewer than {k} at one institution; change the code too"
    return None


class Difference(NamedTuple):
    """One thing that a change does, in words for people."""

    what: str
    text: str


def differences(old: Roster, new: Roster) -> list[Difference]:
    """Say what a change does, for whoever is to sign it. Complete: two rosters without a difference differ in number alone."""
    found = [*_institution_differences(old, new), *_node_differences(old, new)]
    if new.sequencer != old.sequencer:
        found.append(Difference("sequencer", f"{_node_name(old, old.sequencer)} -> {_node_name(new, new.sequencer)}"))
    if new.code != old.code:
        found.append(Difference("code", f"{_slashed(old.code)} -> {_slashed(new.code)}"))
    found += [Difference("emergency", f"add {key.hex()}") for key in new.emergency if key not in old.emergency]
    found += [Difference("emergency", f"remove {key.hex()}") for key in old.emergency if key not in new.emergency]
    if new.auditors != old.auditors:
        found.append(Difference("auditors", "another key" if old.auditors and new.auditors else "a key" if new.auditors else "no key"))
    if [each.name for each in new.institutions if old.institution_named(each.name)] != [
        each.name for each in old.institutions if new.institution_named(each.name)
    ]:
        found.append(Difference("order", "institutions are listed in another order"))
    return found


def _institution_differences(old: Roster, new: Roster) -> list[Difference]:
    found = []
    for each in new.institutions:
        before = old.institution_named(each.name)
        if before is None:
            found.append(Difference("institution", f"add {each.name}, CA key {each.key.hex()}"))
            found += [Difference("keepers", f"{each.name}: add {key.hex()}") for key in each.keepers]
            continue
        if each.ca != before.ca:
            kind = "new CA key" if each.key != before.key else "new CA certificate for the same key"
            found.append(Difference("institution", f"{each.name}: {kind} {each.key.hex()}"))
        for ca in each.former:
            if ca not in before.former:
                found.append(Difference("institution", f"{each.name}: what CA {certificate_key(ca).hex()[:16]} issued stays good"))
        found += [Difference("keepers", f"{each.name}: add {key.hex()}") for key in each.keepers if key not in before.keepers]
        found += [Difference("keepers", f"{each.name}: remove {key.hex()}") for key in before.keepers if key not in each.keepers]
        if bool(each.keepers) != bool(before.keepers):
            needed = "two keepers must want each hold and release" if each.keepers else "a hold or release needs no second person any more"
            found.append(Difference("keepers", f"{each.name}: {needed}"))
        for ca in (before.ca, *before.former):
            if ca not in (each.ca, *each.former):
                found.append(Difference("institution", f"{each.name}: what CA {certificate_key(ca).hex()[:16]} issued is refused"))
    gone = [each for each in old.institutions if new.institution_named(each.name) is None]
    return found + [Difference("institution", f"remove {each.name}, its nodes and its vaults") for each in gone]


def _node_differences(old: Roster, new: Roster) -> list[Difference]:
    known, found = {node.id: node for node in old.nodes}, []
    for node in new.nodes:
        before = known.pop(node.id, None)
        if before is None:
            text = f"add {node.name} of {new.institutions[node.institution].name}, {node.url}, {node.capacity} bytes"
            found.append(Difference("node", text))
        else:
            found += [Difference("node", f"{node.name}: {text}") for text in _changes(before, node)]
    return found + [Difference("node", f"remove {node.name} of {old.institutions[node.institution].name}") for node in known.values()]


def _changes(before: Node, node: Node) -> list[str]:
    texts = []
    if node.url != before.url:
        texts.append(f"{before.url} -> {node.url}")
    if node.capacity != before.capacity:
        texts.append(f"{before.capacity} -> {node.capacity} bytes")
    for role, old, new in (
        ("TLS", before.tls_key, node.tls_key),
        ("cosigner", before.cosigner_key, node.cosigner_key),
        ("log", before.log_key, node.log_key),
        ("ML-DSA", before.pq_key, node.pq_key),
    ):
        if old != new:
            texts.append(f"new {role} key {new.hex()[:16]}" if new else f"no {role} key any more")
    return texts


def _node_name(roster: Roster, node: NodeId) -> str:
    return roster.node(node).name


def _slashed(code: tuple[int, int, int]) -> str:
    return "/".join(map(str, code))


def institution_signing(roster: Roster, key: Key) -> Institution:
    """Find whose CA key this is. Raises Refused for a key that is nobody's in this roster."""
    institution = roster.institution_of(key)
    if institution is None:
        raise Refused(f"this CA key is of no institution in roster {roster.number}")
    return institution
