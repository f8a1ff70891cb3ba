"""Audits without a network: what tags tell, what they give away, and which bodies are none."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from medshard_protocol import merkle
from medshard_protocol.audit import Answer, Claim, Report, Result, Verdict, sign_answer, sign_report, unpack_held
from medshard_protocol.crosscheck import Agreement, allowance, compare, ever, tag, times_moved
from medshard_protocol.erasure import code
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.galois import mul, reciprocal
from medshard_protocol.identity import public_key
from medshard_protocol.ids import FileId, Key, NodeId
from medshard_protocol.manifest import Manifest, ShardRef
from medshard_protocol.shards import Layout, digests

vectors = json.loads((Path(__file__).parents[1] / "vectors" / "audit.json").read_text())
key, other_key = (Ed25519PrivateKey.from_private_bytes(name * 32) for name in (b"k", b"o"))
origin = "consortium.example/log"
file_id, nonce = FileId(b"f" * 32), b"n" * 32
codes = st.tuples(st.integers(1, 12), st.integers(0, 10)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def node(number: int) -> NodeId:
    return NodeId(hashlib.sha256(b"node %d" % number).digest()[:16])


def stripe_of(k: int, n: int, draw: random.Random, size: int) -> list[bytes]:
    data = [draw.randbytes(size) for _ in range(k)]
    parity = [bytearray(size) for _ in range(n - k)]
    code(k, n).encode(data, parity)
    return [*data, *map(bytes, parity)]


def tags_of(cells: Sequence[bytes], size: int = 4) -> dict[int, bytes]:
    return {shard: tag(file_id, 0, nonce, cell, size) for shard, cell in enumerate(cells)}


def manifest_of(k: int, holders: Sequence[NodeId], roots: Sequence[bytes] | None = None, sealed: int = 100_000) -> Manifest:
    roots = roots or [bytes(32)] * len(holders)
    refs = tuple(ShardRef(each, root) for each, root in zip(holders, roots, strict=True))
    layout = Layout(k, len(holders), 1024, sealed)
    return Manifest(file_id, layout, "blake3", b"c" * 32, refs, Key(b"o" * 32), b"", bytes(48), (), bytes(96))


# -- tags


@pytest.mark.parametrize("vector", vectors["tags"], ids=lambda vector: vector["what"])
def test_tags_are_those_of_the_vectors(vector: dict[str, object]) -> None:
    cells = [bytes.fromhex(cell) for cell in vector["cells"]]  # type: ignore[attr-defined]
    told = [tag(bytes.fromhex(vector["file_id"]), vector["cell"], bytes.fromhex(vector["nonce"]), cell, vector["size"]) for cell in cells]  # type: ignore[arg-type]
    assert [each.hex() for each in told] == vector["tags"]


@settings(max_examples=40, deadline=None)
@given(codes, st.integers(1, 1600), st.randoms(use_true_random=False))
def test_tags_of_a_stripe_are_a_word_of_its_code_and_a_changed_cell_is_none(shape: tuple[int, int], size: int, draw: random.Random) -> None:
    k, n = shape
    cells = stripe_of(k, n, draw, size)
    tags = tags_of(cells)
    agreement = compare(code(k, n), tags)
    assert agreement == (Agreement(frozenset(range(n)), frozenset()) if n > k else None)
    if n < k + 2:
        return
    changed, at = draw.randrange(n), draw.randrange(size)
    bad = bytearray(cells[changed])
    bad[at] ^= draw.randrange(1, 256)
    told = compare(code(k, n), tags | {changed: tag(file_id, 0, nonce, bytes(bad), 4)})
    assert told == Agreement(frozenset(range(n)) - {changed}, frozenset({changed}))


def test_a_changed_cell_passes_as_seldom_as_its_tag_is_long() -> None:
    draw, passed = random.Random(7), 0
    for size, rounds, most in ((1, 4000, 2 / 256), (2, 4000, 4 / 65536 + 0.001)):
        passed = 0
        for _ in range(rounds):
            error, fresh = bytearray(20), draw.randbytes(32)
            error[draw.randrange(20)] = draw.randrange(1, 256)  # tags are linear: the tag of the error is that of what differs
            passed += not any(tag(file_id, 0, fresh, bytes(error), size))
        assert passed / rounds < 1.5 * most, size


def test_a_tag_depends_on_each_byte_and_on_the_question() -> None:
    cell = bytes(range(256)) * 600
    whole = tag(file_id, 3, nonce, cell, 4)
    for at in (0, 511, 512, 70_000, len(cell) - 1):
        assert tag(file_id, 3, nonce, cell[:at] + bytes([cell[at] ^ 1]) + cell[at + 1 :], 4) != whole
    assert (
        len({whole, tag(file_id, 4, nonce, cell, 4), tag(file_id, 3, b"m" * 32, cell, 4), tag(FileId(b"g" * 32), 3, nonce, cell, 4)}) == 4
    )


@pytest.mark.parametrize(("k", "n", "liars"), [(10, 16, 3), (2, 4, 1), (3, 6, 1), (4, 9, 2), (8, 16, 4)])
def test_liars_are_told_from_the_others_even_if_they_agree_among_themselves(k: int, n: int, liars: int) -> None:
    for seed in range(5):
        draw = random.Random(seed)
        false = draw.sample(range(1, n), liars)
        true, made_up = tags_of(stripe_of(k, n, draw, 300)), tags_of(stripe_of(k, n, draw, 300))
        told = compare(code(k, n), {shard: made_up[shard] if shard in false else true[shard] for shard in range(n)}, trusted=0)
        assert told == Agreement(frozenset(range(n)) - set(false), frozenset(false))


def test_nobody_is_called_a_liar_where_it_cannot_be_told() -> None:
    tags = tags_of(stripe_of(3, 6, random.Random(1), 300))
    of = code(3, 6)
    assert compare(of, {0: tags[0], 1: tags[1], 2: tags[2]}) is None  # any three fit
    assert compare(of, {0: tags[0], 1: tags[1], 2: tags[2], 3: b"none"}) is None  # one of the four is wrong
    halves = tags_of(stripe_of(3, 6, random.Random(2), 300))
    assert compare(code(1, 4), {0: tags[0], 1: tags[0], 2: halves[0], 3: halves[0]}) is None
    short = tags_of(stripe_of(3, 6, random.Random(1), 300), 1)
    assert compare(of, {**{shard: short[shard] for shard in range(4)}, 4: b"?"}, 0) is None  # four fit by chance too often


# -- what is given away


@settings(max_examples=300, deadline=None)
@given(codes, st.integers(1, 3000), st.integers(0, 6))
def test_with_all_shards_and_all_tags_that_it_can_get_an_institution_has_less_than_k_cells(
    shape: tuple[int, int], length: int, moves: int
) -> None:
    k, n = shape
    if k * length <= 16:
        return
    layout = Layout(k, n, length, k * length)
    told = sum(
        each.size * each.times for each in (allowance(layout, 0, moved) for moved in range(moves + 1))
    )  # of one cell, by all who had it
    for held in range(k):  # repair leaves an institution with fewer than k, counting all that it ever had
        assert held * length + (n - held) * told <= (k - 0.5) * length  # half a cell is lacking


def test_what_a_dishonest_institution_learns_leaves_half_a_cell_of_each_stripe_unknown() -> None:
    """Not by counting: the rank of all that it has, over the field, for an institution with k - 1 shards that asks everybody for all."""
    for k, n, length in ((2, 4, 48), (3, 6, 40), (2, 6, 64)):
        layout = Layout(k, n, length, k * length)
        size, times = allowance(layout, 0, 0)
        assert times, "the test would show nothing"
        rows = [_units(k, length, shard) for shard in range(k - 1)]
        known = [row for each in rows for row in each]
        generator = [code(k, n).row(range(k), shard) for shard in range(n)]
        for shard in range(k - 1, n):
            for number in range(times):
                fresh = hashlib.sha256(b"%d %d" % (shard, number)).digest()  # other coefficients from each, as nobody makes it ask alike
                basis = [tag(file_id, 0, fresh, bytes(at) + b"\1" + bytes(length - at - 1), size) for at in range(length)]
                for r in range(size):
                    known.append(bytes(mul(factor, basis[at][r]) for factor in generator[shard] for at in range(length)))
        assert _rank(known) <= k * length - length // 2


def _units(k: int, length: int, shard: int) -> list[bytes]:
    total = k * length
    return [bytes(shard * length + at) + b"\1" + bytes(total - shard * length - at - 1) for at in range(length)]


def _rank(rows: list[bytes]) -> int:
    left, rank = [bytearray(row) for row in rows], 0
    for column in range(len(rows[0])):
        pivot = next((row for row in left if row[column]), None)
        if pivot is None:
            continue
        left.remove(pivot)
        rank += 1
        scale = reciprocal(pivot[column])
        for row in left:
            if row[column]:
                factor = mul(row[column], scale)
                for at in range(column, len(row)):
                    row[at] ^= mul(factor, pivot[at])
    return rank


def test_who_had_a_shard_before_is_counted_and_entries_that_do_not_count_are_not() -> None:
    manifest = manifest_of(2, [node(i) for i in range(4)])

    def institution(of: NodeId) -> str:
        return of.hex()

    held = ever(
        manifest, [(1, node(7)), (1, node(8)), (1, node(0)), (9, node(5))], institution
    )  # node 0 holds another; there is no shard 9
    assert times_moved(held, 1) == 2
    assert times_moved(held, 0) == 0
    assert {each for shard, each in held if shard == 1} == {node(1), node(7), node(8)}


# -- bodies


def test_an_answer_is_believed_under_its_holders_key_and_in_its_consortium_alone() -> None:
    answer = sign_answer(origin, Answer(file_id, 2, 0, nonce, node(1), Claim.ABSENT, 5), key.sign)
    Answer.from_bytes(answer.to_bytes()).verify(origin, public_key(key))
    for changed in (replace(answer, shard=3), replace(answer, time=6), replace(answer, auditor=node(2)), replace(answer, nonce=b"m" * 32)):
        with pytest.raises(Refused):
            changed.verify(origin, public_key(key))
    for name, whose in (("another/log", key), (origin, other_key)):
        with pytest.raises(Refused):
            answer.verify(name, public_key(whose))


def test_hashes_lead_to_the_registered_root_or_not() -> None:
    digest, draw = digests["blake3"], random.Random(3)
    cells = [draw.randbytes(1024) for _ in range(50)]
    leaves = [merkle.leaf_hash(digest(cell), digest) for cell in cells]
    manifest = manifest_of(2, [node(0), node(1), node(2)], [bytes(32), merkle.root(leaves, digest), bytes(32)], sealed=2 * 1024 * 50)
    path = tuple(merkle.inclusion_path(leaves, 7, digest))
    good = Answer(file_id, 1, 7, nonce, node(0), Claim.HELD, 0, digest(cells[7]), path)
    assert good.leads_to_root(manifest)
    for bad in (replace(good, cell=8), replace(good, shard=2), replace(good, digest=digest(cells[8])), replace(good, path=path[1:])):
        assert not bad.leads_to_root(manifest)
    assert not replace(good, shard=9).leads_to_root(manifest)
    assert not replace(good, digest=b"").leads_to_root(manifest)


def test_who_has_no_cell_can_show_nothing_of_it() -> None:
    answer = sign_answer(origin, Answer(file_id, 2, 0, nonce, node(1), Claim.ABSENT, 5, tag=b"tag"), key.sign)
    with pytest.raises(Malformed):
        Answer.from_bytes(answer.to_bytes())


def test_a_report_names_each_shard_once_and_is_its_authors() -> None:
    rows = (Result(0, node(0), Verdict.GOOD, 1, 2, 3), Result(4, node(1), Verdict.WRONG, 1, 2, 3))
    report = sign_report(origin, Report(file_id, node(5), 9, rows), key.sign)
    assert Report.from_bytes(report.to_bytes()) == report
    report.verify(origin, public_key(key))
    with pytest.raises(Refused):
        replace(report, results=rows[:1]).verify(origin, public_key(key))
    with pytest.raises(Malformed):
        Report.from_bytes(replace(report, results=rows[::-1]).to_bytes())


def test_an_inventory_answers_for_each_shard_that_was_asked_for() -> None:
    assert unpack_held(bytes.fromhex(next(each["bytes"] for each in vectors["messages"] if each["what"] == "held")), 2) == [True, False]
    for wrong in (b"\x92\x01\xc4\x02\x01\x02", b"\x92\x01\xc4\x03\x01\x00\x00"):
        with pytest.raises(Malformed):
            unpack_held(wrong, 2)


@pytest.mark.parametrize("what", ["answer", "answer of one that has it not", "report"])
def test_signed_bodies_are_those_of_the_vectors(what: str) -> None:
    data = bytes.fromhex(next(each["bytes"] for each in vectors["messages"] if each["what"] == what))
    parsed = Report.from_bytes(data) if what == "report" else Answer.from_bytes(data)
    parsed.verify(vectors["origin"], Key(bytes.fromhex(vectors["tls_key"])))
    assert parsed.to_bytes() == data
