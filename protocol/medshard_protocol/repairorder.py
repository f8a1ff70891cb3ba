"""A replacement's order to its helpers, what a helper has against one, and the other bodies of a repair.

Law: an order counts only beside the MOVE entry that it names, which every helper has in its own mirror. The replacement may never hold
more than this one shard of the file, its institution never k of them, counted over all that it ever held; and helpers of its own
institution stand last in the line, where they see nothing but the shard less their own cells, whatever becomes of the masks.
Everything here decides from values; who asks for them, and when they are known, is the node's business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medshard_protocol import canonical
from medshard_protocol.canonical import Fields
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.facts import Moved
from medshard_protocol.ids import FileId, Key, NodeId, Sha256, file_id_size, key_size, node_id_size, sha256_size
from medshard_protocol.manifest import Manifest
from medshard_protocol.repair import holders, seed_size
from medshard_protocol.shards import cells_max, code_n_max
from medshard_protocol.sharing import sealed_bytes_max

version: Final = 1
label: Final = b"medshard/repair-order/v1"
offer_label: Final = b"medshard/repair-key/v1"
pair_label: Final = b"medshard/repair-mask/v1"
order_bytes_max: Final = 8 * 1024  # 255 helpers
nonce_size: Final = 16
signature_size: Final = 64
moves_bytes_max: Final = 16 * 1024  # 255 of them
grants_kept_max: Final = 1024  # of one file in one answer
grants_bytes_max: Final = 6 * 1024 * 1024 - 1024
keys_bytes_max: Final = 32 * 1024  # 255 of them

Institutions: TypeAlias = Callable[[NodeId], str | None]  # the name of a node's institution, in the newest roster that lists it


class Reason(StrEnum):
    """Why a helper refuses. The values are labels of a metric."""

    FORGED = "forged"
    OTHER_CALLER = "other-caller"
    UNREGISTERED = "unregistered"
    GONE = "gone"
    NO_MOVE = "no-move"
    HOLDS_ANOTHER = "holds-another"
    INSTITUTION = "institution"
    CHAIN = "chain"
    KEYS = "keys"
    NOT_HERE = "not-here"
    UNKNOWN_ORDER = "unknown-order"
    BUSY = "busy"


_texts: Final = {
    Reason.FORGED: "the order is not signed by the node that took the shard over",
    Reason.OTHER_CALLER: "only the replacement hands in an order, and only the next in the line asks for the sum",
    Reason.UNREGISTERED: "this file is not registered",
    Reason.GONE: "this file is retired or erased, and is not repaired any more",
    Reason.NO_MOVE: "no MOVE entry at this index gives this shard to this node, or a later one gave it to another",
    Reason.HOLDS_ANOTHER: "the replacement holds another shard of this file, or has held one",
    Reason.INSTITUTION: "the replacement's institution would have had enough shards to rebuild the file",
    Reason.CHAIN: "the line is not one of k present holders, those of the replacement's institution last",
    Reason.KEYS: "a helper's key is not signed by that helper for this order",
    Reason.NOT_HERE: "this node is not in the line with the shard that it has",
    Reason.UNKNOWN_ORDER: "this order was never handed in here, was served before, or has expired",
    Reason.BUSY: "this node helps in as many repairs as it can",
}


class Objection(NamedTuple):
    """What a helper has against an order."""

    reason: Reason
    detail: str = ""

    def error(self) -> Refused:
        """As an error, with the reason in words."""
        return Refused(f"repair refused ({self.reason}): {_texts[self.reason]}" + (f" ({self.detail})" if self.detail else ""))


class Link(NamedTuple):
    """A helper: a node, and the shard that it holds."""

    node: NodeId
    shard: int


@dataclass(frozen=True, slots=True)
class Order:
    """Which shard is made again, by which MOVE, from whom in which order, beginning with which cell."""

    file_id: FileId
    shard: int
    move: int  # index of the MOVE entry, which names the replacement
    chain: tuple[Link, ...]
    first: int  # the first cell that is wanted; the rest of the shard follows
    nonce: bytes
    signature: bytes

    def to_bytes(self) -> bytes:
        """The canonical form."""
        return canonical.encode([*_body(self), self.signature])

    @property
    def id(self) -> Sha256:
        """What the helpers call this order by among themselves."""
        return Sha256(hashlib.sha256(self.to_bytes()).digest())

    @classmethod
    def from_bytes(cls, data: bytes) -> Order:
        """Parse. Raises Malformed and nothing else."""
        f = Fields(canonical.decode(data, bytes_max=order_bytes_max, what="repair order"), count=8, what="repair order")
        f.uint(least=version, most=version)
        file_id, shard, move = FileId(f.bytes(exactly=file_id_size)), f.uint(most=code_n_max - 1), f.uint(most=2**63 - 1)
        chain = tuple(_link(item) for item in f.list(most=code_n_max))
        return cls(file_id, shard, move, chain, f.uint(most=cells_max), f.bytes(exactly=nonce_size), f.bytes(exactly=signature_size))

    def verify(self, origin: str, key: Key) -> None:
        """Check that the node with this TLS key gave this order, in this consortium. Raises Refused."""
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(self.signature, _signed(origin, self))
        except (InvalidSignature, ValueError):
            raise Objection(Reason.FORGED).error() from None

    def place_of(self, node: NodeId) -> int | None:
        """Where a node stands in the line, from 0; None if it does not."""
        return next((place for place, link in enumerate(self.chain) if link.node == node), None)


def sign_order(
    origin: str, file_id: FileId, shard: int, move: int, chain: Sequence[Link], first: int, nonce: bytes, sign: Callable[[bytes], bytes]
) -> Order:
    """Make an order. ``sign`` makes Ed25519 signatures with the replacement's TLS key."""
    order = Order(file_id, shard, move, tuple(chain), first, nonce, bytes(signature_size))
    return Order(file_id, shard, move, tuple(chain), first, nonce, sign(_signed(origin, order)))


# -- keys between helpers


@dataclass(frozen=True, slots=True)
class Offer:
    """A helper's X25519 public key for one order, signed with its TLS key."""

    public: bytes
    signature: bytes

    def to_value(self) -> list[canonical.Value]:
        """The array to encode."""
        return [self.public, self.signature]

    @classmethod
    def from_value(cls, value: object) -> Offer:
        """Parse. Raises Malformed."""
        f = Fields(value, count=2, what="repair key")
        return cls(f.bytes(exactly=key_size), f.bytes(exactly=signature_size))

    def is_of(self, origin: str, order: Sha256, key: Key) -> bool:
        """Whether the node with this TLS key made this offer, for this order."""
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(self.signature, _offered(origin, order, self.public))
        except (InvalidSignature, ValueError):
            return False
        return True


def sign_offer(origin: str, order: Sha256, public: bytes, sign: Callable[[bytes], bytes]) -> Offer:
    """Make an offer. ``sign`` makes Ed25519 signatures with the helper's TLS key."""
    return Offer(public, sign(_offered(origin, order, public)))


def pair_secrets(private: X25519PrivateKey, place: int, order: Sha256, publics: Sequence[bytes]) -> list[bytes]:
    """The secrets that the helper at ``place`` shares with each other one, in the line's order. Raises Refused for a key that is none."""
    secrets = []
    for other, public in enumerate(publics):
        if other == place:
            continue
        try:
            shared = private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise Objection(Reason.KEYS).error() from None
        info = pair_label + order + bytes(sorted((place, other)))
        secrets.append(HKDF(SHA256(), seed_size, None, info).derive(shared))
    return secrets


def line_up(helpers: Sequence[Link], replacement: NodeId, institution: Institutions) -> tuple[Link, ...]:
    """The order in which helpers may stand: those of the replacement's institution last."""
    own = institution(replacement)
    return tuple(sorted(helpers, key=lambda link: institution(link.node) == own))


# -- what there is against it


def objection_to_replacement(
    manifest: Manifest, shard: int, replacement: NodeId, ever: Sequence[tuple[int, NodeId]], institution: Institutions
) -> Objection | None:
    """Say why a node may not take a shard over. ``ever`` are all (shard, node) that MOVE entries named, at any time."""
    held = [*((i, ref.node) for i, ref in enumerate(manifest.shards)), *ever]
    others = {i for i, node in held if node == replacement and i != shard}
    if others:
        return Objection(Reason.HOLDS_ANOTHER, f"shard {min(others)}")
    own = institution(replacement)
    if own is None:
        return Objection(Reason.INSTITUTION, "it is in no roster")
    seen = {i for i, node in held if institution(node) == own} | {shard}
    if len(seen) >= max(manifest.layout.k, 2):
        return Objection(Reason.INSTITUTION, f"{len(seen)} of the {manifest.layout.k} that are needed")
    return None


def counted(manifest: Manifest, given: Sequence[tuple[int, Moved]], institution: Institutions) -> dict[int, Moved]:
    """Of all MOVE entries with effect, in the log's order, the latest for each shard that helpers would follow.

    The ledger knows no manifests and lets any node say that it takes any shard. One that may not does not become its holder.
    """
    present: dict[int, Moved] = {}
    ever: list[tuple[int, NodeId]] = []
    for shard, moved in given:
        if shard < manifest.layout.n and objection_to_replacement(manifest, shard, moved.node, ever, institution) is None:
            present[shard] = moved
            ever.append((shard, moved.node))
    return present


def objection_to_chain(
    order: Order, manifest: Manifest, replacement: NodeId, moves: Mapping[int, Moved], institution: Institutions
) -> Objection | None:
    """Say why the line of an order is none."""
    layout, present = manifest.layout, holders(manifest, moves)
    shards = [link.shard for link in order.chain]
    if order.shard >= layout.n or order.first >= layout.stripes:
        return Objection(Reason.CHAIN, "no such shard or cell")
    if len(shards) != layout.k or len(set(shards)) != layout.k or order.shard in shards:
        return Objection(Reason.CHAIN, f"not {layout.k} other shards")
    for link in order.chain:
        if link.shard >= layout.n or present[link.shard] != link.node:
            return Objection(Reason.CHAIN, f"shard {link.shard} is not that node's")
    if order.chain != line_up(order.chain, replacement, institution):
        return Objection(Reason.CHAIN, "its own institution must come last")
    return None


# -- bodies


def pack_seed(order: Order, seed: bytes) -> bytes:
    """Body of POST …/seed: an order, and what one helper makes its mask from."""
    return canonical.encode([version, order.to_bytes(), seed])


def unpack_seed(data: bytes) -> tuple[Order, bytes]:
    """Parse the body of POST …/seed."""
    f = Fields(canonical.decode(data, bytes_max=order_bytes_max + 64, what="repair seed"), count=3, what="repair seed")
    f.uint(least=version, most=version)
    return Order.from_bytes(f.bytes(most=order_bytes_max)), f.bytes(exactly=seed_size)


def pack_offer(offer: Offer) -> bytes:
    """Answer to POST …/seed: the helper's key for this order."""
    return canonical.encode([version, *offer.to_value()])


def unpack_offer(data: bytes) -> Offer:
    """Parse the answer to POST …/seed."""
    f = Fields(canonical.decode(data, bytes_max=256, what="repair key"), count=3, what="repair key")
    f.uint(least=version, most=version)
    return Offer(f.bytes(exactly=key_size), f.bytes(exactly=signature_size))


def pack_keys(order: Sha256, offers: Sequence[Offer]) -> bytes:
    """Body of POST …/keys: the keys of all helpers of an order, in the line's order."""
    return canonical.encode([version, order, [offer.to_value() for offer in offers]])


def unpack_keys(data: bytes) -> tuple[Sha256, tuple[Offer, ...]]:
    """Parse the body of POST …/keys."""
    f = Fields(canonical.decode(data, bytes_max=keys_bytes_max, what="repair keys"), count=3, what="repair keys")
    f.uint(least=version, most=version)
    return Sha256(f.bytes(exactly=sha256_size)), tuple(Offer.from_value(item) for item in f.list(most=code_n_max))


def pack_ask(order: Sha256) -> bytes:
    """Body of POST …/sum: for which order."""
    return canonical.encode([version, order])


def unpack_ask(data: bytes) -> Sha256:
    """Parse the body of POST …/sum."""
    f = Fields(canonical.decode(data, bytes_max=64, what="repair sum"), count=2, what="repair sum")
    f.uint(least=version, most=version)
    return Sha256(f.bytes(exactly=sha256_size))


@dataclass(frozen=True, slots=True)
class Wish:
    """What an operator wants of the own node."""

    shard: int | None = None
    dry_run: bool = False
    take_over: bool = False


def pack_wish(wish: Wish) -> bytes:
    """Body of POST /v1/repair/{file}."""
    return canonical.encode([version, [] if wish.shard is None else [wish.shard], int(wish.dry_run), int(wish.take_over)])


def unpack_wish(data: bytes) -> Wish:
    """Parse the body of POST /v1/repair/{file}."""
    f = Fields(canonical.decode(data, bytes_max=64, what="repair"), count=4, what="repair")
    f.uint(least=version, most=version)
    shards = f.list(most=1)
    shard = Fields(shards, count=1, what="repair").uint(most=code_n_max - 1) if shards else None
    return Wish(shard, bool(f.uint(most=1)), bool(f.uint(most=1)))


def pack_grants(sealed: Mapping[Sha256, bytes]) -> bytes:
    """Answer to GET /v1/sealed/{file}: the sealed key of each grant of a file, by the grant's id."""
    return canonical.encode([version, [[grant, sealed[grant]] for grant in sorted(sealed)]])


def unpack_grants(data: bytes) -> dict[Sha256, bytes]:
    """Parse the answer to GET /v1/sealed/{file}."""
    f = Fields(canonical.decode(data, bytes_max=grants_bytes_max, what="sealed grants"), count=2, what="sealed grants")
    f.uint(least=version, most=version)
    found: dict[Sha256, bytes] = {}
    for item in f.list(most=grants_kept_max):
        each = Fields(item, count=2, what="sealed grants")
        grant = Sha256(each.bytes(exactly=sha256_size))
        if found and grant <= next(reversed(found)):
            raise Malformed("sealed grants: not in order")
        found[grant] = each.bytes(most=sealed_bytes_max)
    return found


def pack_drain(on: bool) -> bytes:
    """Body of POST /v1/drain: begin, or stop."""
    return canonical.encode([version, int(on)])


def unpack_drain(data: bytes) -> bool:
    """Parse the body of POST /v1/drain."""
    f = Fields(canonical.decode(data, bytes_max=64, what="drain"), count=2, what="drain")
    f.uint(least=version, most=version)
    return bool(f.uint(most=1))


def moves_path(file_id: FileId) -> str:
    """Where any node tells which shards of a file have moved."""
    return f"/v1/moves/{file_id.hex()}"


def pack_moves(moves: Mapping[int, Moved]) -> bytes:
    """Answer to GET /v1/moves/{file}: which node took which shard over last, and by which entry."""
    return canonical.encode([version, [[shard, moves[shard].node, moves[shard].index] for shard in sorted(moves)]])


def unpack_moves(data: bytes) -> dict[int, Moved]:
    """Parse the answer to GET /v1/moves/{file}. It is a hint: whoever holds a shard is believed by its root alone."""
    f = Fields(canonical.decode(data, bytes_max=moves_bytes_max, what="moves"), count=2, what="moves")
    f.uint(least=version, most=version)
    moves: dict[int, Moved] = {}
    last = -1
    for item in f.list(most=code_n_max):
        each = Fields(item, count=3, what="moves")
        last = each.uint(least=last + 1, most=code_n_max - 1)
        moves[last] = Moved(NodeId(each.bytes(exactly=node_id_size)), each.uint(most=2**63 - 1))
    return moves


def _body(order: Order) -> list[canonical.Value]:
    chain: list[canonical.Value] = [[link.node, link.shard] for link in order.chain]
    return [version, order.file_id, order.shard, order.move, chain, order.first, order.nonce]


def _signed(origin: str, order: Order) -> bytes:
    name = origin.encode()
    return label + len(name).to_bytes(2, "big") + name + canonical.encode(_body(order))


def _offered(origin: str, order: Sha256, public: bytes) -> bytes:
    name = origin.encode()
    return offer_label + len(name).to_bytes(2, "big") + name + order + public


def _link(item: object) -> Link:
    f = Fields(item, count=2, what="repair order")
    return Link(NodeId(f.bytes(exactly=node_id_size)), f.uint(most=code_n_max - 1))
