from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medshard_protocol.canonical import decode, encode
from medshard_protocol.entries import Register
from medshard_protocol.errors import Malformed, MedshardError, Refused
from medshard_protocol.proofs import (
    Appended,
    Inclusion,
    append_entries_max,
    pack_append,
    pack_appended,
    pack_registration,
    unpack_append,
    unpack_appended,
    unpack_registration,
)
from medshard_protocol.vouchers import row_bytes_max


def log_of(c, count):
    return [c.entry("vault", Register(bytes([n]) * 32, bytes(32), bytes(16))).to_bytes() for n in range(count)]


@pytest.mark.parametrize(("size", "index"), [(1, 0), (2, 1), (7, 6), (8, 3), (9, 8)])
def test_a_true_inclusion_verifies_and_survives_the_wire(consortium, size, index):
    c = consortium(4)
    inclusion = c.inclusion(log_of(c, size), index, [0, 1, 3])
    checkpoint, entry = unpack_registration(pack_registration(inclusion)).verify(c.roster)
    assert checkpoint == c.checkpoint(log_of(c, size))
    assert entry.body.file_id == bytes([index]) * 32


forgeries = {
    "another index": lambda i: replace(i, index=3),
    "an index outside": lambda i: replace(i, index=7),
    "a path cut short": lambda i: replace(i, path=i.path[:-1]),
    "a path too long": lambda i: replace(i, path=(*i.path, bytes(32))),
    "a path with one hash changed": lambda i: replace(i, path=(bytes(32), *i.path[1:])),
    "a path in another order": lambda i: replace(i, path=i.path[::-1]),
    "another checkpoint size": lambda i: replace(i, checkpoint=i.checkpoint.replace(b"\n7\n", b"\n8\n")),
    "a cut checkpoint": lambda i: replace(i, checkpoint=i.checkpoint[:-200]),
}


@pytest.mark.parametrize("name", forgeries)
def test_a_forged_inclusion_is_refused(consortium, name):
    c = consortium(4)
    inclusion = forgeries[name](c.inclusion(log_of(c, 7), 2, [0, 1, 3]))
    with pytest.raises((Malformed, Refused)):
        inclusion.verify(c.roster)


def test_another_entry_is_refused_under_the_path_of_a_true_one(consortium):
    c = consortium(4)
    log = log_of(c, 7)
    with pytest.raises(Refused, match="not in the ledger"):
        replace(c.inclusion(log, 2, [0, 1, 3]), entry=log[3]).verify(c.roster)


def test_an_inclusion_under_too_few_institutions_is_refused(consortium):
    c = consortium(4, nodes_each=2)
    with pytest.raises(Refused, match="fewer than 3 institutions"):
        c.inclusion(log_of(c, 7), 2, [0, 4, 1, 5]).verify(c.roster)


def test_an_inclusion_under_another_roster_is_refused(consortium):
    inclusion = consortium(4).inclusion(log_of(consortium(4), 7), 2, [0, 1, 3])
    other = replace(consortium(4).roster, origin="other.example/log")
    with pytest.raises(Refused):
        inclusion.verify(other)


def test_a_logged_entry_that_its_author_did_not_sign_is_refused(consortium):
    c = consortium(4)
    log = log_of(c, 3)
    log[1] = log[1][:-1] + bytes([log[1][-1] ^ 1])
    with pytest.raises(Refused, match="author"):
        c.inclusion(log, 1, [0, 1, 3]).verify(c.roster)


def test_a_checkpoint_seen_before_is_not_checked_again_and_a_bad_one_never_remembered(consortium):
    c = consortium(4)
    log, seen = log_of(c, 7), {}
    bad = c.inclusion(log, 2, [0, 1])
    with pytest.raises(Refused):
        bad.verify(c.roster, seen)
    assert not seen
    good = c.inclusion(log, 2, [0, 1, 3])
    good.verify(c.roster, seen)
    assert list(seen) == [good.checkpoint]
    c.inclusion(log, 5, [0, 1, 3]).verify(c.roster, seen)
    assert len(seen) == 1


def test_append_and_its_answer_survive_the_wire(consortium):
    c = consortium(4)
    log = log_of(c, 5)
    assert unpack_append(pack_append(log[1:3])) == log[1:3]
    inclusions = tuple(c.inclusion(log, index, [0, 1, 2]) for index in (1, 2))
    bare, rows = Appended(inclusions), {node.id: bytes(64) for node in c.roster.nodes[:3]}
    for appended in (bare, Appended(inclusions, rows)):
        assert unpack_appended(pack_appended(appended), log[1:3]) == appended
    with pytest.raises(Malformed):
        unpack_appended(pack_appended(bare), log[1:4])


def test_vouchers_that_stand_twice_or_out_of_order_are_malformed(consortium):
    c = consortium(4)
    log = log_of(c, 5)
    rows = {node.id: bytes(64) for node in c.roster.nodes[:3]}
    packed = pack_appended(Appended((c.inclusion(log, 1, [0, 1, 2]),), rows))
    version, note, places, rows = decode(packed, bytes_max=1 << 20, what="appended")
    for wrong in (rows[::-1], [rows[0], rows[0]], [[rows[0][0], bytes(row_bytes_max + 1)]], [[rows[0][0][:-1], b""]]):
        with pytest.raises(Malformed):
            unpack_appended(encode([version, note, places, wrong]), log[1:2])


@pytest.mark.parametrize("count", [0, append_entries_max + 1])
def test_an_append_of_no_or_too_many_entries_is_the_callers_mistake(count):
    with pytest.raises(ValueError, match="256"):
        pack_append([b"x"] * count)


@pytest.mark.parametrize("value", [[1, []], [1, [b""] * 257], [1, [bytes(2049)]], [1, ["a"]], [1, [1]], [2, [b"a"]], [1], [], 1])
def test_a_bad_append_is_malformed(value):
    with pytest.raises(Malformed):
        unpack_append(encode(value))


@pytest.mark.parametrize(
    "value",
    [
        None,
        1,
        [],
        [0, b"", [], b"", 0],
        [-1, b"", [], b""],
        [0, "", [], b""],
        [0, b"", [b"a"], b""],
        [0, b"", [1], b""],
        [0, bytes(2049), [], b""],
    ],
)
def test_a_bad_inclusion_is_malformed(value):
    with pytest.raises(Malformed):
        Inclusion.from_value(value)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_changed_byte_anywhere_is_refused_or_malformed(consortium, data):
    c = consortium(4)
    packed = bytearray(pack_registration(c.inclusion(log_of(c, 7), 2, [0, 1, 3])))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(MedshardError):
        unpack_registration(bytes(packed)).verify(c.roster)
