"""Who takes part: the institutions, their nodes and their keys, and how many institutions make a quorum.

Law: an institution speaks through one node, the first that the roster lists for it. Were any of its nodes enough, a sequencer could show
one history to the first and another to the second, and the honest institution would have agreed to both. The genesis file is
``Roster.to_bytes()``; whoever holds its SHA-256 holds all the trust there is to pin. Certificates are checked to carry the key they
are listed under; whether they are valid today is the business of TLS, which has a clock.

A roster changes by a whole new document that names the one before it by hash; ``rosters`` says when such a change counts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from medshard_protocol.canonical import Fields, Value, decode, encode
from medshard_protocol.errors import Absent, Malformed
from medshard_protocol.identity import certificate_bytes_max, certificate_key
from medshard_protocol.ids import Key, NodeId, Sha256, key_size, node_id_size, sha256_size

roster_version = 2
continuing_version = 3  # of a log that goes on from others; one that begins with itself stays version 2, whoever reads it
roster_bytes_max = 4 << 20  # 256 institutions and 1024 nodes with generous certificates and post-quantum keys fit
institutions_max = 256  # a Reed-Solomon code over GF(2^8) has no more shards than that to spread
nodes_max = 1024
name_chars_max = 64
origin_chars_max = 128
before_max = 16  # logs that ended before this one
log_size_max = 2**63 - 1
url_chars_max = 256
capacity_bytes_max = 2**63 - 1
shards_max = 255
former_max = 4  # CA certificates of an institution that are still accepted beside the present one
keepers_max = 16  # persons of one institution
emergency_max = 1024  # identities that may read when the ledger is out of reach
pq_key_size = 1312  # ML-DSA-44
auditors_key_size = 1216  # HPKE with MLKEM768-X25519
numbers_max = 2**32 - 1  # a roster a minute for eight thousand years
no_key = Key(b"")
genesis_previous = Sha256(bytes(sha256_size))

_origin = re.compile(r"[a-z0-9][a-z0-9./_-]*\Z")  # a schema-less URL: no space and no plus, as C2SP key names demand
_node_name = re.compile(r"[a-z0-9][a-z0-9._-]*\Z")
_institution_name = re.compile(r"[^\x00-\x20\x7f-\xa0]([^\x00-\x1f\x7f-\x9f]*[^\x00-\x20\x7f-\xa0])?\Z")
_url = re.compile(r"https://(\[[0-9a-f:.]+\]|[a-z0-9]([a-z0-9.-]*[a-z0-9])?):([1-9][0-9]{0,4})\Z")


def is_node_url(text: str) -> bool:
    """Say whether this is a node's address as a roster writes it: ``https://host:port``, lowercase, with nothing after."""
    url = _url.match(text)
    return url is not None and len(text) <= url_chars_max and int(url[3]) <= 65535


class Quorum(NamedTuple):
    """How many institutions may be faulty, and how many must agree."""

    f: int
    q: int


def quorum_of(institutions: int) -> Quorum:
    """Size the quorum: any two of size q share f + 1 institutions, so at least one honest one."""
    f = (institutions - 1) // 3
    return Quorum(f, (institutions + f) // 2 + 1)


@dataclass(frozen=True, slots=True)
class Institution:
    """One voice in the quorum, and the CA that vouches for its nodes and vaults."""

    name: str  # stays the same over all rosters: places in the list do not
    ca: bytes  # DER certificate
    key: Key  # the CA's public key
    former: tuple[bytes, ...] = ()  # DER; earlier CA certificates, whose nodes and vaults may still connect
    keepers: tuple[Key, ...] = ()  # of whom two must want each hold and each release of its vaults' files; empty: nobody needs a second

    def to_value(self) -> Value:
        """The form to put into a canonical message. Without keepers it has four items, as it had before there were any."""
        keepers: list[Value] = [list(self.keepers)] if self.keepers else []
        return [self.name, self.ca, self.key, list(self.former), *keepers]


@dataclass(frozen=True, slots=True)
class Node:
    """One storage node, which is also a mirror of the ledger."""

    id: NodeId
    name: str
    institution: int  # index into Roster.institutions
    url: str  # https://host:port
    capacity: int  # bytes
    tls_key: Key
    cosigner_key: Key
    log_key: Key = no_key  # signs checkpoints while this node is sequencer; empty for one that never is
    pq_key: bytes = b""  # ML-DSA-44, for the second kind of cosignature; empty for a node that makes none


@dataclass(frozen=True, slots=True)
class Predecessor:
    """A log that has ended, and that another goes on from."""

    origin: str
    genesis: Sha256  # of its genesis file
    size: int  # it has so many entries, those of the logs before it among them
    root: Sha256

    def to_value(self) -> Value:
        """The form to put into a canonical message."""
        return [self.origin, self.genesis, self.size, self.root]

    @classmethod
    def from_value(cls, value: object) -> Predecessor:
        """Parse. Raises Malformed."""
        fields = Fields(value, count=4, what="roster log before")
        origin, genesis = fields.text(most=origin_chars_max), Sha256(fields.bytes(exactly=sha256_size))
        return cls(origin, genesis, fields.uint(least=1, most=log_size_max), Sha256(fields.bytes(exactly=sha256_size)))


@dataclass(frozen=True)
class Roster:
    """Everybody who takes part in one log, and what its clients should code with."""

    origin: str
    sequencer: NodeId  # the node that orders entries when nobody had to take over
    institutions: tuple[Institution, ...]
    nodes: tuple[Node, ...]
    code: tuple[int, int, int]  # default k, n, w
    number: int = 0  # 0 is the genesis file; each change counts up
    previous: Sha256 = genesis_previous  # SHA-256 of the roster before
    emergency: tuple[Key, ...] = ()  # identities that may read when the ledger is out of reach, sorted
    auditors: bytes = b""  # HPKE public key to which reasons for such reads are sealed; empty if there are no auditors
    before: tuple[Predecessor, ...] = ()  # logs whose entries this one begins with, oldest first; the same in every roster of a log

    def __hash__(self) -> int:
        return hash((self.origin, self.number, self.sequencer))  # rosters key caches on hot paths, and there are few of them

    def to_bytes(self) -> bytes:
        """Encode canonically. Raises ValueError if the roster breaks a rule that ``from_bytes`` checks."""
        if complaint := _complaint(self):
            raise ValueError(complaint)
        institutions: list[Value] = [i.to_value() for i in self.institutions]
        nodes: list[Value] = [
            [n.id, n.name, n.institution, n.url, n.capacity, n.tls_key, n.cosigner_key, n.log_key, n.pq_key] for n in self.nodes
        ]
        version = continuing_version if self.before else roster_version
        head: list[Value] = [version, self.origin, self.number, self.previous, self.sequencer]
        tail: list[Value] = [[each.to_value() for each in self.before]] if self.before else []
        return encode([*head, institutions, nodes, list(self.code), list(self.emergency), self.auditors, *tail])

    @classmethod
    def from_bytes(cls, data: bytes) -> Roster:
        """Parse and check a roster. Raises Malformed."""
        value = decode(data, bytes_max=roster_bytes_max, what="roster")
        continues = isinstance(value, list) and len(value) == 11
        fields, version = Fields(value, count=11 if continues else 10, what="roster"), continuing_version if continues else roster_version
        fields.uint(least=version, most=version)
        origin = fields.text(most=origin_chars_max)
        number, previous = fields.uint(most=numbers_max), Sha256(fields.bytes(exactly=sha256_size))
        sequencer = NodeId(fields.bytes(exactly=node_id_size))
        institutions = tuple(_institution(item) for item in fields.list(most=institutions_max))
        nodes = tuple(_node(item) for item in fields.list(most=nodes_max))
        code = Fields(fields.list(most=3), count=3, what="roster code")
        numbers = (code.uint(), code.uint(), code.uint())
        emergency, auditors = tuple(fields.list(most=emergency_max)), fields.bytes(most=auditors_key_size)
        if not all(isinstance(key, bytes) for key in emergency):
            raise Malformed("roster: an emergency identity is a key")
        before = tuple(Predecessor.from_value(item) for item in fields.list(most=before_max)) if continues else ()
        if continues and not before:
            raise Malformed("roster: one that goes on from no other log has ten items")
        roster = cls(origin, sequencer, institutions, nodes, numbers, number, previous, emergency, auditors, before)
        if complaint := _complaint(roster):
            raise Malformed(f"roster: {complaint}")
        return roster

    @cached_property
    def sha256(self) -> Sha256:
        """What the log's first entry names, and what an operator reads out over the telephone."""
        return Sha256(hashlib.sha256(self.to_bytes()).digest())

    @property
    def log_key(self) -> Key:
        """The log key of the node that is sequencer when nobody had to take over. It writes the log's first entry."""
        return self.node(self.sequencer).log_key

    @property
    def begins(self) -> int:
        """The place of this log's own first entry: those below were taken over from the logs before it."""
        return self.before[-1].size if self.before else 0

    def origin_at(self, index: int) -> str:
        """For which log the author of the entry at this index signed it."""
        return next((each.origin for each in self.before if index < each.size), self.origin)

    def institution_named(self, name: str) -> Institution | None:
        """Find an institution."""
        return next((each for each in self.institutions if each.name == name), None)

    def institution_of(self, ca_key: Key) -> Institution | None:
        """Find the institution whose present CA has this key."""
        return next((each for each in self.institutions if each.key == ca_key), None)

    @cached_property
    def quorum(self) -> Quorum:
        """How many of these institutions may be faulty and how many must agree."""
        return quorum_of(len(self.institutions))

    def has_quorum(self, nodes: Iterable[NodeId]) -> bool:
        """Say whether enough institutions speak through these nodes. Nodes that are nobody's voice, and unknown ones, count for nothing."""
        return len(self.voices.intersection(nodes)) >= self.quorum.q

    @cached_property
    def voices(self) -> frozenset[NodeId]:
        """The nodes through which institutions speak: for each the first that is listed."""
        firsts: dict[int, NodeId] = {}
        for node in self.nodes:
            firsts.setdefault(node.institution, node.id)
        return frozenset(firsts.values())

    def node(self, node: NodeId) -> Node:
        """Find a node. Raises Absent."""
        try:
            return self._nodes[node]
        except KeyError:
            raise Absent(f"the roster has no node {node.hex()}") from None

    def cosigner_name(self, node: Node) -> str:
        """Name the key that a node cosigns checkpoints with."""
        return f"{self.origin}/{node.name}"

    @cached_property
    def _nodes(self) -> dict[NodeId, Node]:
        return {node.id: node for node in self.nodes}


def _institution(value: object) -> Institution:
    kept = isinstance(value, list) and len(value) == 5
    fields = Fields(value, count=5 if kept else 4, what="roster institution")
    name, ca = fields.text(most=name_chars_max), fields.bytes(most=certificate_bytes_max)
    key, former = Key(fields.bytes(exactly=key_size)), tuple(fields.list(most=former_max))
    if not all(isinstance(each, bytes) and len(each) <= certificate_bytes_max for each in former):
        raise Malformed("roster institution: a former CA is a certificate")
    keepers = tuple(fields.list(most=keepers_max)) if kept else ()
    if not all(isinstance(each, bytes) for each in keepers):
        raise Malformed("roster institution: a keeper is a key")
    if kept and not keepers:
        raise Malformed("roster institution: one without keepers has four items")
    return Institution(name, ca, key, former, keepers)


def _node(value: object) -> Node:
    fields = Fields(value, count=9, what="roster node")
    return Node(
        id=NodeId(fields.bytes(exactly=node_id_size)),
        name=fields.text(most=name_chars_max),
        institution=fields.uint(most=institutions_max),
        url=fields.text(most=url_chars_max),
        capacity=fields.uint(most=capacity_bytes_max),
        tls_key=Key(fields.bytes(exactly=key_size)),
        cosigner_key=Key(fields.bytes(exactly=key_size)),
        log_key=Key(fields.bytes(most=key_size)),
        pq_key=fields.bytes(most=pq_key_size),
    )


def _complaint(roster: Roster) -> str | None:
    """Say what rule a roster breaks, if any. Field sizes are the parser's business, and checked here for rosters made by hand."""
    checks = (_origin_complaint, _institutions_complaint, _nodes_complaint, _keys_complaint, _code_complaint, _succession_complaint)
    return next(filter(None, (check(roster) for check in checks)), None)


def _origin_complaint(roster: Roster) -> str | None:
    if len(roster.origin) > origin_chars_max or not _origin.match(roster.origin):
        return "the origin must be a lowercase URL without scheme, such as hospital.example/log"
    return None


def _institutions_complaint(roster: Roster) -> str | None:
    if not 1 <= len(roster.institutions) <= institutions_max:
        return f"expected 1 to {institutions_max} institutions"
    if twice := _twice(roster.institutions, lambda i: i.name):
        return f"institution {twice} is listed twice"
    for number, institution in enumerate(roster.institutions):
        if len(institution.name) > name_chars_max or not _institution_name.match(institution.name):
            return f"institution {number} needs a name of 1 to {name_chars_max} printable characters"
        if _certified_key(institution.ca) != institution.key:
            return f"the CA certificate of {institution.name} does not carry its Ed25519 key"
        if len(institution.former) > former_max or any(_certified_key(each) is None for each in institution.former):
            return f"{institution.name} has more than {former_max} former CA certificates, or one that is none"
        if not any(node.institution == number for node in roster.nodes):
            return f"{institution.name} has no node, so it could never cosign"
        if complaint := _keepers_complaint(institution):
            return complaint
    return None


def _keepers_complaint(institution: Institution) -> str | None:
    keepers = institution.keepers
    if len(keepers) == 1 or len(keepers) > keepers_max:
        return f"{institution.name} has 2 to {keepers_max} keepers, or none"
    if list(keepers) != sorted(set(keepers)) or any(len(each) != key_size for each in keepers):
        return f"the keepers of {institution.name} are keys of {key_size} bytes, sorted and distinct"
    if institution.key in keepers:
        return f"the CA key of {institution.name} is no person's, so it is no keeper"
    return None


def _nodes_complaint(roster: Roster) -> str | None:
    if len(roster.nodes) > nodes_max:
        return f"more than {nodes_max} nodes"
    for node in roster.nodes:
        if len(node.name) > name_chars_max or not _node_name.match(node.name):
            return "a node's name is 1 to 64 lowercase letters, digits, dots and dashes"
        if node.institution >= len(roster.institutions):
            return f"node {node.name} belongs to no institution"
        if not is_node_url(node.url):
            return f"node {node.name} needs a url like https://host:port"
        if len(node.id) != node_id_size or not 0 <= node.capacity <= capacity_bytes_max:
            return f"node {node.name} has a wrong id or capacity"
    for of in ("id", "name", "url"):
        if twice := _twice(roster.nodes, lambda n, of=of: getattr(n, of)):  # type: ignore[misc]
            return f"two nodes have the {of} {twice}"
    sequencer = next((node for node in roster.nodes if node.id == roster.sequencer), None)
    if sequencer is None:
        return "the sequencer is not one of the nodes"
    if not sequencer.log_key:
        return "the sequencer has no key to sign checkpoints with"
    return None


def _keys_complaint(roster: Roster) -> str | None:
    """One key, one role: a cosignature/v1 does not name its cosigner, and a log that could cosign itself would be two voices."""
    keys = [institution.key for institution in roster.institutions]
    keys += [key for node in roster.nodes for key in (node.tls_key, node.cosigner_key)]
    keys += [node.log_key for node in roster.nodes if node.log_key]
    if any(len(key) != key_size for key in (*keys, *roster.emergency)):
        return f"a key is {key_size} bytes"
    if twice := _twice(keys, bytes):
        return f"the key {twice} has two roles"
    pq_keys = [node.pq_key for node in roster.nodes if node.pq_key]
    if any(len(key) != pq_key_size for key in pq_keys) or len(set(pq_keys)) < len(pq_keys):
        return f"an ML-DSA-44 key is {pq_key_size} bytes and of one node"
    if len(roster.auditors) not in (0, auditors_key_size):
        return f"the auditors' key is {auditors_key_size} bytes, or empty"
    if len(roster.emergency) > emergency_max or list(roster.emergency) != sorted(set(roster.emergency)):
        return f"emergency identities are at most {emergency_max}, sorted and distinct"
    return None


def _succession_complaint(roster: Roster) -> str | None:
    if not 0 <= roster.number <= numbers_max or len(roster.previous) != sha256_size:
        return "a roster has a number and the SHA-256 of the one before"
    if (roster.number == 0) != (roster.previous == genesis_previous):
        return "the genesis file has number 0 and none before it, and no other roster has"
    sizes = [0, *(each.size for each in roster.before)]
    if len(roster.before) > before_max or any(a >= b for a, b in pairwise(sizes)):
        return "each log before has entries of its own, and the oldest is named first"
    if any(len(each.origin) > origin_chars_max or not _origin.match(each.origin) for each in roster.before):
        return "a log before has an origin like a log"
    if len({roster.origin, *(each.origin for each in roster.before)}) <= len(roster.before):
        return "a log has another origin than those before it"
    return None


def _code_complaint(roster: Roster) -> str | None:
    k, n, w = roster.code
    if not 1 <= k <= w <= n <= shards_max:
        return f"a code needs 1 <= k <= w <= n <= {shards_max}"
    if n > len(roster.nodes):
        return f"a code of {n} shards needs as many nodes; there are {len(roster.nodes)}"
    return None


def _twice(items: Iterable[Any], of: Callable[[Any], str | bytes]) -> str | None:
    seen: set[str | bytes] = set()
    for item in items:
        value = of(item)
        if value in seen:
            return value.hex() if isinstance(value, bytes) else value
        seen.add(value)
    return None


def _certified_key(certificate: bytes) -> Key | None:
    try:
        return certificate_key(certificate)
    except Malformed:
        return None
