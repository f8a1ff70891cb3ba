"""Repair without a network: what is planned, that a chain makes the shard, what everybody in it learns, and which orders are none."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from medshard_protocol import repairorder
from medshard_protocol.erasure import code
from medshard_protocol.errors import Refused
from medshard_protocol.facts import Moved
from medshard_protocol.galois import mul, reciprocal
from medshard_protocol.identity import public_key
from medshard_protocol.ids import FileId, Key, NodeId, Sha256, Tag
from medshard_protocol.manifest import Manifest, ShardRef
from medshard_protocol.repair import Lost, Mask, Rebuild, add, coefficients, frames, helper_sets, holders, plan, spread_sets
from medshard_protocol.repairorder import (
    Link,
    Order,
    Reason,
    line_up,
    objection_to_chain,
    objection_to_replacement,
    pair_secrets,
    sign_offer,
    sign_order,
    unpack_offer,
)
from medshard_protocol.shards import Layout

vectors = json.loads((Path(__file__).parents[1] / "vectors" / "repair.json").read_text())
key = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
origin = "consortium.example/log"


def node(number: int) -> NodeId:
    return NodeId(hashlib.sha256(b"node %d" % number).digest()[:16])


def shards_of(k: int, n: int, draw: random.Random, size: int) -> list[bytes]:
    data = [draw.randbytes(size) for _ in range(k)]
    parity = [bytearray(size) for _ in range(n - k)]
    code(k, n).encode(data, parity)
    return [*data, *map(bytes, parity)]


order_id = Sha256(b"o" * 32)


def secrets_of(private: Sequence[bytes], order: Sha256 = order_id) -> list[list[bytes]]:
    """For each helper, what it shares with each other one."""
    keys = [X25519PrivateKey.from_private_bytes(each) for each in private]
    publics = [each.public_key().public_bytes_raw() for each in keys]
    return [pair_secrets(each, place, order, publics) for place, each in enumerate(keys)]


def chained(
    k: int, n: int, cells: Sequence[bytes], chain: Sequence[int], target: int, seeds: Sequence[bytes], secrets: Sequence[Sequence[bytes]]
) -> list[bytes]:
    """What each helper sends."""
    factors, sums = coefficients(code(k, n), chain, target), list[bytes]()
    for shard, factor, seed, shared in zip(chain, factors, seeds, secrets, strict=True):
        sums.append(add(sums[-1] if sums else None, factor, cells[shard], Mask(seed, *shared)))
    return sums


# -- planning


def test_a_plan_names_what_is_missing_and_who_helps() -> None:
    assert plan(range(6), code(3, 6)) is None
    assert plan((5, 1, 4, 2), code(3, 6)) == Rebuild(helpers=(5, 1, 4), targets=(0, 3))
    assert plan((5, 1), code(3, 6)) == Lost((0, 2, 3, 4))


def test_helper_sets_begin_with_the_best_then_exchange_one_and_come_to_all() -> None:
    sets = list(helper_sets("abcde", 3))
    assert sets[0] == tuple("abc")
    assert [set("abc") - set(each) for each in sets[1:4]] == [{"a"}, {"b"}, {"c"}]
    assert all("d" in each for each in sets[1:4])
    assert sorted("".join(sorted(each)) for each in sets) == ["abc", "abd", "abe", "acd", "ace", "ade", "bcd", "bce", "bde", "cde"]
    assert list(helper_sets("ab", 3)) == []
    assert list(helper_sets("abc", 3)) == [tuple("abc")]


@pytest.mark.parametrize(("helpers", "k"), [(15, 10), (9, 5), (5, 3)])
def test_two_who_spoil_sums_are_soon_left_out(helpers: int, k: int) -> None:
    sets = [set(each) for each in islice(helper_sets(range(helpers), k), 1 + k + spread_sets)]
    for spoilers in combinations(range(helpers), 2):
        assert any(not each & set(spoilers) for each in sets), spoilers


def test_the_latest_move_says_who_holds_a_shard() -> None:
    manifest = manifest_of(2, 4)
    assert holders(manifest, {}) == tuple(node(i) for i in range(4))
    assert holders(manifest, {2: Moved(node(9), 7)}) == (node(0), node(1), node(9), node(3))


# -- sums


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**32))
def test_any_k_helpers_in_any_order_make_the_shard_byte_for_byte(k: int, more: int, seed: int) -> None:
    draw, n = random.Random(seed), k + more
    cells = shards_of(k, n, draw, draw.randrange(1, 200))
    target = draw.randrange(n)
    chain = draw.sample([i for i in range(n) if i != target], k)
    seeds = [draw.randbytes(32) for _ in chain]
    secrets = secrets_of([draw.randbytes(32) for _ in chain])
    sums = chained(k, n, cells, chain, target, seeds, secrets)
    assert Mask(*seeds).add(sums[-1]) == cells[target]


def test_a_mask_goes_on_over_the_frames_of_a_chain() -> None:
    whole, parts = Mask(b"s" * 32), Mask(b"s" * 32)
    data = bytes(range(256)) * 3
    assert whole.add(data) == parts.add(data[:7]) + parts.add(data[7:500]) + parts.add(data[500:])


def test_whoever_colludes_lacks_a_mask_of_what_it_receives() -> None:
    """Every step carries a seed's mask, which no other helper knows, and one for each pair, of which the replacement knows none."""
    draw = random.Random(5)
    cells = shards_of(4, 8, draw, 64)
    chain, seeds = (1, 6, 2, 7), [draw.randbytes(32) for _ in range(4)]
    secrets = secrets_of([draw.randbytes(32) for _ in chain])
    assert len({secret for shared in secrets for secret in shared}) == 6
    factors = coefficients(code(4, 8), chain, 0)
    plain = [bytes(mul(factor, byte) for byte in cells[shard]) for shard, factor in zip(chain, factors, strict=True)]
    sums = chained(4, 8, cells, chain, 0, seeds, secrets)
    for place, total in enumerate(sums):
        step = xor(total, sums[place - 1] if place else bytes(64))
        assert xor(step, plain[place]) == Mask(seeds[place], *secrets[place]).add(bytes(64))
    # The replacement and the second helper: what came to it is still masked by what the first shares with the third and fourth.
    mine = [secret for secret in secrets[0] if secret in secrets[1]]
    left = Mask(*seeds[:1], *mine).add(sums[0])
    assert left != plain[0]
    assert xor(left, plain[0]) == Mask(*(secret for secret in secrets[0] if secret not in secrets[1])).add(bytes(64))
    # The replacement and all helpers but the first and the third: the same, by what those two share.
    assert set(secrets[0]) & set(secrets[2]) == {secrets[0][1]}


def test_keys_between_helpers_are_of_one_order_and_one_helper() -> None:
    offer = sign_offer(origin, order_id, b"p" * 32, key.sign)
    assert offer.is_of(origin, order_id, public_key(key))
    assert not offer.is_of("another.example/log", order_id, public_key(key))
    assert not offer.is_of(origin, Sha256(bytes(32)), public_key(key))
    assert not replace(offer, public=b"q" * 32).is_of(origin, order_id, public_key(key))
    assert not offer.is_of(origin, order_id, Key(bytes(32)))
    with pytest.raises(Refused, match="keys"):
        pair_secrets(X25519PrivateKey.from_private_bytes(b"k" * 32), 0, order_id, [bytes(32), bytes(32)])
    offer = unpack_offer(bytes.fromhex(next(each["bytes"] for each in vectors["messages"] if each["what"] == "offer")))
    order = Order.from_bytes(bytes.fromhex(vectors["order"]["order"]))
    assert offer.is_of(vectors["order"]["origin"], order.id, Key(bytes.fromhex(vectors["order"]["tls_key"])))


@pytest.mark.parametrize("vector", vectors["chains"], ids=lambda vector: vector["what"])
def test_the_second_implementation_sums_alike(vector: dict) -> None:
    k, n, chain = vector["k"], vector["n"], vector["chain"]
    cells, seeds = ([bytes.fromhex(each) for each in vector[name]] for name in ("cells", "seeds"))
    assert list(coefficients(code(k, n), chain, vector["shard"])) == vector["coefficients"]
    secrets = secrets_of([bytes.fromhex(each) for each in vector["private_keys"]], Sha256(bytes.fromhex(vector["order_sha256"])))
    sums = chained(k, n, cells, chain, vector["shard"], seeds, secrets)
    assert [each.hex() for each in sums] == vector["sums"]
    assert Mask(*seeds).add(sums[-1]) == cells[vector["shard"]]


@given(st.integers(1, 6), st.integers(1, 3_000_000), st.integers(64, 300_000), st.data())
def test_frames_are_the_rest_of_the_shard_without_gap(k: int, size: int, cell_size: int, data: st.DataObject) -> None:
    layout = Layout.for_plain(size, k, k + 2, cell_size)
    first = data.draw(st.integers(0, layout.stripes - 1))
    at, cell = first * layout.cell_size, first
    for frame in frames(layout, first):
        assert (frame.offset, frame.cells.start) == (at, cell)
        at, cell = at + frame.length, frame.cells.stop
        assert frame.length == sum(layout.cell_length(number) for number in frame.cells)
    assert (at, cell) == (layout.shard_size, layout.stripes)


# -- what the replacement's institution would learn even if it knew all masks


@settings(max_examples=80, deadline=None)
@given(st.integers(3, 7), st.integers(1, 5), st.integers(0, 2**32))
def test_the_replacements_institution_learns_no_more_than_its_shards_when_its_helpers_stand_last(k: int, more: int, seed: int) -> None:
    draw, n = random.Random(seed), k + more
    target, *rest = draw.sample(range(n), n)
    own = set(rest[: draw.randrange(0, min(k - 1, len(rest) - 1))])
    helpers = [Link(node(shard), shard) for shard in draw.sample(rest, k)]

    def institution(of: NodeId) -> str:
        return "own" if of in {node(shard) for shard in (*own, target)} else "another"

    chain = [link.shard for link in line_up(helpers, node(target), institution)]
    known = [generator(k, n, shard) for shard in (target, *own)]
    assert len(known) < k
    assert rank(known + seen(k, n, chain, target, own)) == rank(known)


def test_a_helper_of_the_replacements_institution_in_the_middle_would_learn_a_cell() -> None:
    known = [generator(3, 6, shard) for shard in (0, 4)]
    assert rank(known + seen(3, 6, [1, 4, 2], 0, {4})) == 3
    assert rank(known + seen(3, 6, [1, 2, 4], 0, {4})) == 2


def seen(k: int, n: int, chain: Sequence[int], target: int, own: set[int]) -> list[bytes]:
    """The sums without masks that come to own helpers, as functions of the data cells."""
    factors, total, found = coefficients(code(k, n), chain, target), bytes(k), []
    for shard, factor in zip(chain, factors, strict=True):
        if shard in own:
            found.append(total)
        total = xor(total, bytes(mul(factor, each) for each in generator(k, n, shard)))
    return found


def generator(k: int, n: int, shard: int) -> bytes:
    return code(k, n).row(range(k), shard)


def rank(rows: Sequence[bytes]) -> int:
    left, found = [row for row in rows if any(row)], 0
    while left:
        pivot = left.pop()
        column = next(i for i, each in enumerate(pivot) if each)
        found += 1
        scaled = bytes(mul(reciprocal(pivot[column]), each) for each in pivot)
        left = [xor(row, bytes(mul(row[column], each) for each in scaled)) for row in left]
        left = [row for row in left if any(row)]
    return found


def xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


# -- orders


def manifest_of(k: int, n: int) -> Manifest:
    shards = tuple(ShardRef(node(i), bytes([i]) * 32) for i in range(n))
    layout = Layout.for_plain(1_000_000, k, n, 1024)
    return Manifest(FileId(b"f" * 32), layout, "blake3", bytes(32), shards, Key(bytes(32)), b"", bytes(48), (Tag(bytes(32)),), bytes(64))


def order_of(chain: Sequence[int], shard: int = 0, first: int = 0) -> Order:
    links = [Link(node(i), i) for i in chain]
    return sign_order(origin, FileId(b"f" * 32), shard, 7, links, first, bytes(16), key.sign)


def test_the_vector_of_an_order_is_read_checked_and_written_again() -> None:
    told = vectors["order"]
    order = Order.from_bytes(bytes.fromhex(told["order"]))
    assert order.to_bytes().hex() == told["order"]
    order.verify(told["origin"], Key(bytes.fromhex(told["tls_key"])))
    assert (order.shard, order.move, order.first, [link.shard for link in order.chain]) == (3, 77, 12, [0, 2, 5])


def test_an_order_holds_for_its_signer_its_log_and_these_fields_alone() -> None:
    order = order_of((1, 2))
    order.verify(origin, public_key(key))
    with pytest.raises(Refused, match="forged"):
        order.verify("another.example/log", public_key(key))
    with pytest.raises(Refused, match="forged"):
        order.verify(origin, public_key(Ed25519PrivateKey.from_private_bytes(b"l" * 32)))
    changes = {"file_id": FileId(bytes(32)), "shard": 1, "move": 8, "chain": order.chain[::-1], "first": 1, "nonce": b"n" * 16}
    for name, value in changes.items():
        with pytest.raises(Refused, match="forged"):
            replace(order, **{name: value}).verify(origin, public_key(key))


institution_of = {node(i): f"institution {i}" for i in range(6)} | {
    node(9): "institution 9",
    node(10): "institution 1",
    node(12): "institution 1",
}


def against(manifest: Manifest, shard: int, who: int, ever: Sequence[tuple[int, NodeId]] = ()) -> Reason | None:
    found = objection_to_replacement(manifest, shard, node(who), ever, institution_of.get)
    return None if found is None else found.reason


def test_a_node_without_a_shard_of_the_file_may_take_one_over() -> None:
    assert against(manifest_of(3, 6), 2, 9) is None
    assert against(manifest_of(3, 6), 2, 2) is None  # its own, which its disk lost


def test_a_node_that_holds_another_shard_or_held_one_may_not() -> None:
    assert against(manifest_of(3, 6), 2, 4) is Reason.HOLDS_ANOTHER
    assert against(manifest_of(3, 6), 2, 9, [(5, node(9)), (5, node(11))]) is Reason.HOLDS_ANOTHER


def test_an_institution_never_gets_k_shards_counting_all_that_it_ever_had() -> None:
    assert against(manifest_of(3, 6), 2, 10) is None  # the second of three
    assert against(manifest_of(2, 4), 2, 10) is Reason.INSTITUTION
    assert against(manifest_of(3, 6), 2, 10, [(5, node(12)), (5, node(9))]) is Reason.INSTITUTION


def test_a_node_of_no_institution_may_not() -> None:
    assert against(manifest_of(3, 6), 2, 77) is Reason.INSTITUTION


def test_a_move_by_a_node_that_may_not_changes_no_holder() -> None:
    given = [(2, Moved(node(9), 5)), (1, Moved(node(4), 6)), (3, Moved(node(9), 7)), (0, Moved(node(10), 8)), (7, Moved(node(11), 9))]
    found = repairorder.counted(manifest_of(3, 6), given, institution_of.get)
    assert found == {2: Moved(node(9), 5), 0: Moved(node(10), 8)}
    assert repairorder.counted(manifest_of(3, 6), [*given, (2, Moved(node(2), 10))], institution_of.get)[2] == Moved(node(2), 10)


@pytest.mark.parametrize(
    ("chain", "shard", "first", "fits"),
    [
        ((1, 2, 3), 0, 0, True),
        ((5, 3, 2), 0, 10, True),
        ((1, 2), 0, 0, False),
        ((1, 2, 3, 4), 0, 0, False),
        ((1, 2, 2), 0, 0, False),
        ((0, 1, 2), 0, 0, False),
        ((1, 2, 6), 0, 0, False),
        ((1, 2, 3), 6, 0, False),
        ((1, 2, 3), 0, 10**6, False),
    ],
)
def test_a_line_is_k_other_present_holders(chain: tuple[int, ...], shard: int, first: int, fits: bool) -> None:
    found = objection_to_chain(order_of(chain, shard, first), manifest_of(3, 6), node(9), {}, institution_of.get)
    assert (found is None) == fits
    assert found is None or found.reason is Reason.CHAIN


def test_a_line_names_who_holds_a_shard_now() -> None:
    moves = {2: Moved(node(9), 5)}
    assert objection_to_chain(order_of((1, 2, 3)), manifest_of(3, 6), node(8), moves, institution_of.get) is not None
    order = replace(order_of((1, 2, 3)), chain=(Link(node(1), 1), Link(node(9), 2), Link(node(3), 3)))
    assert objection_to_chain(order, manifest_of(3, 6), node(8), moves, institution_of.get) is None


def test_the_replacements_own_institution_stands_last_in_a_line() -> None:
    manifest = manifest_of(3, 6)
    for chain, fits in (((2, 3, 1), True), ((1, 2, 3), False), ((2, 1, 3), False)):
        found = objection_to_chain(order_of(chain), manifest, node(10), {}, institution_of.get)
        assert (found is None) == fits
    assert [link.shard for link in line_up([Link(node(i), i) for i in (1, 2, 3)], node(10), institution_of.get)] == [2, 3, 1]


def test_every_refusal_says_its_reason() -> None:
    for reason in Reason:
        assert str(repairorder.Objection(reason).error()).startswith(f"repair refused ({reason}): ")
