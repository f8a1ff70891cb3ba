"""How a consortium begins: each institution hands its card to a founder, who makes the genesis file that everybody then adopts.

Law: a card and a genesis file say only what is public. A card is signed with the institution's own key, so it is whole; that it came
from that institution, people check by comparing fingerprints over another channel than the one that carried the file. The genesis file
is trusted by its SHA-256 and nothing else. A card's bytes are specified in docs/formats/invite.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medshard_protocol import canonical
from medshard_protocol.canonical import Fields, Value
from medshard_protocol.errors import Absent, Conflict, Malformed, Refused
from medshard_protocol.identity import certificate_bytes_max, check_institution, public_key
from medshard_protocol.ids import Key, key_size, node_id_of
from medshard_protocol.roster import (
    Institution,
    Node,
    Roster,
    capacity_bytes_max,
    name_chars_max,
    pq_key_size,
    roster_bytes_max,
    url_chars_max,
)
from medshard_protocol.rosters import Link, follow
from storenode import durable
from storenode.config import Config
from storenode.identity import Institution as Ca
from storenode.identity import NodeKeys
from storenode.membership import Membership

genesis_name: Final = "genesis.medshard"
card_suffix: Final = ".card"
card_version: Final = 2
card_bytes_max: Final = 8192
signature_size: Final = 64


class Code(NamedTuple):
    """k shards rebuild a file, n are made, w must be durable before a put is acknowledged."""

    k: int
    n: int
    w: int


profiles: Final = {4: Code(2, 4, 4), 6: Code(3, 6, 5), 9: Code(4, 9, 7), 16: Code(8, 16, 12), 30: Code(15, 30, 22)}
economy: Final = Code(10, 16, 13)  # for who would rather store less; never chosen by itself
shards_default_max: Final = 30  # a consortium of more institutions spreads each file over thirty of them


def default_code(institutions: int) -> Code:
    """Choose a code: the profiles of the design, and between them half of the shards to rebuild and three quarters to acknowledge."""
    n = min(institutions, shards_default_max)
    if n in profiles:
        return profiles[n]
    k = -(-n // 2)
    return Code(k, n, min(n, max(k + 1, -(-3 * n // 4))))


def parse_code(text: str) -> Code:
    """Read "k/n" or "k/n/w". Raises Malformed."""
    match = re.fullmatch(r"([1-9]\d{0,2})/([1-9]\d{0,2})(?:/([1-9]\d{0,2}))?", text)
    if not match:
        raise Malformed(f"code: expected K/N or K/N/W, got {text!r}", hint="3/6 makes 6 shards of which any 3 rebuild the file")
    k, n = int(match[1]), int(match[2])
    profile = next((each for each in (*profiles.values(), economy) if (each.k, each.n) == (k, n)), None)
    usual = profile.w if profile else min(n, max(k + 1, -(-3 * n // 4)))
    if not k <= n <= 255:
        raise Malformed(f"code: {text} has K > N or more than 255 shards", hint="3/6 makes 6 shards of which any 3 rebuild the file")
    w = int(match[3]) if match[3] else usual
    if not 1 <= k <= w <= n <= 255:
        raise Malformed(f"code: {text} does not satisfy 1 <= K <= W <= N <= 255", hint="3/6/5: any 3 of 6 rebuild, 5 must be durable first")
    return Code(k, n, w)


@dataclass(frozen=True, slots=True)
class Card:
    """What one node brings to a new consortium."""

    institution: str
    ca: bytes  # DER certificate
    node: str
    url: str
    capacity: int  # bytes
    tls_key: Key
    cosigner_key: Key
    log_key: Key
    pq_key: bytes  # ML-DSA-44

    @classmethod
    def of(cls, institution: str, node: str, url: str, capacity: int, keys: NodeKeys, ca: bytes | None = None) -> Card:
        """Describe a node by its keys, and by another CA certificate than lies with them if ``ca`` is given."""
        if keys.log is None:
            raise Absent(f"{keys.folder}/log.key is missing")
        cosigner, log = public_key(keys.cosigner), public_key(keys.log)
        pq_key = keys.cosigner_pq.public_key().public_bytes_raw()
        return cls(institution, ca or keys.ca_certificate, node, url, capacity, keys.tls_key, cosigner, log, pq_key)

    def to_bytes(self, ca: Ca) -> bytes:
        """Sign with the institution's key."""
        return canonical.encode([*self._values(), ca.key.sign(self._signed())])

    @classmethod
    def from_bytes(cls, data: bytes) -> Card:
        """Parse and check the signature. Raises Malformed."""
        fields = Fields(canonical.decode(data, bytes_max=card_bytes_max, what="card"), count=11, what="card")
        fields.uint(least=card_version, most=card_version)
        institution, ca = fields.text(most=name_chars_max), fields.bytes(most=certificate_bytes_max)
        node, url, capacity = fields.text(most=name_chars_max), fields.text(most=url_chars_max), fields.uint(most=capacity_bytes_max)
        tls_key, cosigner_key, log_key = (Key(fields.bytes(exactly=key_size)) for _ in range(3))
        pq_key = fields.bytes(exactly=pq_key_size)
        card = cls(institution, ca, node, url, capacity, tls_key, cosigner_key, log_key, pq_key)
        try:
            Ed25519PublicKey.from_public_bytes(check_institution(ca)).verify(fields.bytes(exactly=signature_size), card._signed())
        except (InvalidSignature, ValueError):
            raise Malformed("card: not signed by the institution it names", hint="ask for the file again") from None
        return card

    @property
    def fingerprint(self) -> str:
        """What two people compare over the telephone: of all that the card says, whatever the signature."""
        digits = sha256(self._signed()).hexdigest()[:32]
        return " ".join(digits[i : i + 4] for i in range(0, 32, 4))

    def _values(self) -> list[Value]:
        names: list[Value] = [card_version, self.institution, self.ca, self.node, self.url, self.capacity]
        return [*names, self.tls_key, self.cosigner_key, self.log_key, self.pq_key]

    def listed(self, institution: int) -> Node:
        """Give the roster's line for this node."""
        node_id = node_id_of(self.tls_key)
        keys = (self.tls_key, self.cosigner_key, self.log_key, self.pq_key)
        return Node(node_id, self.node, institution, self.url, self.capacity, *keys)

    def _signed(self) -> bytes:
        return b"medshard/card/v2" + canonical.encode(self._values())


def found(cards: Sequence[Card], *, sequencer: str, code: Code | None = None, origin: str = "") -> Roster:
    """Make the roster of a new consortium. Cards with the same CA are nodes of one institution. Raises Malformed, Conflict or Absent."""
    if not cards:
        raise Malformed("a consortium needs at least one card")
    institutions: dict[Key, Institution] = {}
    nodes: list[Node] = []
    for card in cards:
        if any(node.tls_key == card.tls_key for node in nodes):
            raise Conflict(f"the card of {card.node} is given twice", hint="give each node's card once")
        key = check_institution(card.ca)
        known = institutions.setdefault(key, Institution(card.institution, card.ca, key))
        if known.name != card.institution or known.ca != card.ca:
            raise Conflict(
                f"{card.institution} and {known.name} have the same CA key", hint="an institution has one name; make the card again"
            )
        index = list(institutions).index(key)
        nodes.append(card.listed(index))
    chosen = next((card for card in cards if card.node == sequencer), None)
    if chosen is None:
        raise Absent(f"no card is of a node named {sequencer!r}", hint=f"there are {', '.join(card.node for card in cards)}")
    if not origin:
        origin = "medshard.local/" + sha256(b"".join(sorted(institutions))).hexdigest()[:16]
    k, n, w = code or default_code(len(institutions))
    roster = Roster(
        origin=origin,
        sequencer=node_id_of(chosen.tls_key),
        institutions=tuple(institutions.values()),
        nodes=tuple(nodes),
        code=(k, n, w),
    )
    try:
        roster.to_bytes()
    except ValueError as error:
        raise Malformed(f"these cards make no roster: {error}") from None
    return roster


def load_genesis(home: Path) -> Roster:
    """Read HOME/genesis.medshard. Raises Absent or Malformed."""
    path = home / genesis_name
    try:
        return read_genesis(path)
    except Absent:
        hint = f"get the file from the founder of the consortium, then: storenode --home {home} adopt FILE"
        raise Absent(f"{path} does not exist: this node is in no consortium yet", hint=hint) from None


def read_genesis(path: Path) -> Roster:
    """Read a genesis file. Raises Absent or Malformed."""
    try:
        with path.open("rb") as file:
            data = file.read(roster_bytes_max + 1)
    except FileNotFoundError:
        raise Absent(f"{path} does not exist") from None
    except OSError as error:
        raise Malformed(f"{path} cannot be read ({error.strerror})") from None
    try:
        return Roster.from_bytes(data)
    except Malformed as error:
        raise Malformed(f"{path} is not a genesis file: {error}", hint="ask the founder of the consortium for it again") from None


def check_membership(roster: Roster, keys: NodeKeys) -> Node:
    """Find this node in a roster, under the keys it has. Raises Refused where something does not fit; this is asked at every start."""
    node = next((each for each in roster.nodes if each.id == keys.node_id), None)
    which = f"roster {roster.number}" if roster.number else "the genesis file"
    if node is None:
        hint = "was it made with this node's card? A roster never takes up a node by itself"
        raise Refused(f"{which} does not list this node ({keys.node_id.hex()})", hint=hint)
    if node.tls_key != keys.tls_key or node.cosigner_key != public_key(keys.cosigner):
        raise Refused(f"{which} lists {node.name} with other keys", hint="restore the keys from the backup")
    owner = roster.institutions[node.institution]
    if keys.ca_certificate not in (owner.ca, *owner.former):
        raise Refused(f"{which} lists {node.name} under another CA certificate", hint="restore ca.crt from the backup of the keys")
    if node.log_key and (keys.log is None or public_key(keys.log) != node.log_key):
        raise Refused(f"{node.name} may be sequencer and lacks its log key", hint="restore log.key from the backup of the keys")
    if node.pq_key and node.pq_key != keys.cosigner_pq.public_key().public_bytes_raw():
        raise Refused(f"{which} lists {node.name} with another ML-DSA key", hint="restore the keys from the backup")
    return node


def adopt(home: Path, data: bytes, keys: NodeKeys, links: Sequence[Link] = (), *, sync: bool = True) -> Roster:
    """Check a genesis file, and the changes since, against this node's keys and put them in place; the newest roster. Adopting the
    same again is no change.

    Raises Malformed, Refused, or Conflict where another genesis file is in place: a log cannot be changed for another.
    """
    genesis = Roster.from_bytes(data)
    roster = follow(genesis, links)
    check_membership(roster, keys)
    path = home / genesis_name
    if path.exists() and path.read_bytes() != data:
        hint = "a node serves one consortium; make a new node in another --home for the other"
        raise Conflict(f"{path} is another genesis file, {load_genesis(home).sha256.hex()}", hint=hint)
    if links:
        Membership(Config.load(home).data, genesis, sync=sync).follow(links)
    if not path.exists():
        durable.create(path, data, mode=0o644, durable=sync)
    return roster
