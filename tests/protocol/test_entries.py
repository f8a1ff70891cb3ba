from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medshard_protocol.canonical import encode
from medshard_protocol.entries import (
    Access,
    Approve,
    Enrol,
    Entry,
    Erase,
    Freeze,
    Genesis,
    Grant,
    Hold,
    Move,
    Propose,
    Purpose,
    Register,
    Release,
    Retain,
    Retire,
    Revoke,
    Rotate,
    Sender,
    Timestamp,
    Type,
    Withdraw,
    entry_bytes_max,
    rotation_signed,
    signed_bytes,
)
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.identity import public_key

nonce = bytes(16)
bodies = {
    "genesis": Genesis(b"\x01" * 32, nonce),
    "enrol": Enrol(b"\x02" * 32, 3, nonce),
    "register": Register(b"\x03" * 32, b"\x04" * 32, nonce),
    "access": Access((b"\x05" * 32, b"\x06" * 32), Purpose.TREATMENT, b"", nonce),
    "emergency access": Access((b"\x05" * 32,), Purpose.EMERGENCY, b"r" * 1600, nonce),
    "approve": Approve(b"\x07" * 32, nonce),
    "sender": Sender(b"\x08" * 32, b"\x09" * 32, nonce),
    "withdraw": Withdraw(b"\x08" * 32, nonce),
    "grant": Grant((b"\x05" * 32,), b"\x09" * 32, 2_000_000_000, Purpose.INSURANCE, nonce),
    "revoke": Revoke(b"\x0a" * 32, nonce),
    "move": Move(b"\x05" * 32, 254, b"\x0b" * 16, nonce),
    "retain": Retain(b"\x05" * 32, 2_000_000_000, nonce),
    "hold": Hold(b"\x05" * 32, nonce),
    "release": Release(b"\x0c" * 32, nonce),
    "retire": Retire(b"\x05" * 32, 2_000_000_000, nonce),
    "erase": Erase(b"\x05" * 32, 2_000_000_000, nonce),
    "timestamp": Timestamp(7, b"\x0d" * 32, b"t" * 1700, nonce),
    "freeze": Freeze(bytes(32), nonce),
    "propose": Propose(Type.RELEASE, b"\x0c" * 32, True, nonce),
}


@pytest.mark.parametrize("name", bodies)
def test_an_entry_comes_back_as_it_was_and_its_signature_holds(consortium, name):
    entry = consortium(4).entry("vault", bodies[name])
    again = Entry.from_bytes(entry.to_bytes())
    assert again == entry
    again.verify("consortium.example/log")


@pytest.mark.parametrize("name", bodies)
def test_an_entry_of_one_log_means_nothing_in_another(consortium, name):
    entry = consortium(4).entry("vault", bodies[name])
    with pytest.raises(Refused):
        entry.verify("consortium.example/log2")


def test_origin_and_type_cannot_be_traded_for_each_other():
    assert signed_bytes("a", bodies["register"])[17:21] == b"\x00\x01a\x02"
    assert len({signed_bytes(origin, body) for origin in ("a", "a\x02") for body in bodies.values()}) == 2 * len(bodies)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: replace(e, author=bytes(32)),
        lambda e: replace(e, author=b"\xff" * 32),
        lambda e: replace(e, signature=bytes(64)),
        lambda e: replace(e, body=replace(e.body, nonce=b"\x01" * 16)),
    ],
)
def test_a_changed_entry_is_not_the_authors(consortium, change):
    entry = change(consortium(4).entry("vault", bodies["register"]))
    with pytest.raises(Refused):
        Entry.from_bytes(entry.to_bytes()).verify("consortium.example/log")


origin = "consortium.example/log"


def rotation(c, *, signed_by=("old", "new"), log=origin, named=("old", "new")):
    keys = {name: c.key(name) for name in ("old", "new", "thief")}
    public = {name: public_key(key) for name, key in keys.items()}
    said = rotation_signed(log, *(public[name] for name in ("old", "new")))
    signatures = [keys[name].sign(said) for name in signed_by]
    return c.entry("ca 0", Rotate(*(public[name] for name in named), *signatures, nonce))


def test_a_rotation_is_signed_by_the_old_and_the_new_key_and_by_its_author(consortium):
    c = consortium(4)
    good = Entry.from_bytes(rotation(c).to_bytes())
    good.verify(origin)
    assert good.body.passes == (good.body.old, good.body.key)
    for wrong in (
        rotation(c, signed_by=("thief", "new")),
        rotation(c, signed_by=("old", "thief")),
        rotation(c, signed_by=("new", "old")),
        rotation(c, log="consortium.example/log2"),  # signed for another log, and shown in this one
        rotation(c, named=("old", "thief")),
        replace(good, signature=bytes(64)),
    ):
        with pytest.raises(Refused):
            Entry.from_bytes(wrong.to_bytes()).verify(origin)


author, signature, id32 = bytes(32), bytes(64), b"\x09" * 32
malformed = {
    "not an array": b"\x01",
    "a map": b"\x80",
    "empty": b"",
    "wrong version": encode([2, 2, [id32, id32, nonce], author, signature]),
    "too few items": encode([1, 2, [id32, id32, nonce], author]),
    "too many items": encode([1, 2, [id32, id32, nonce], author, signature, 0]),
    "type 0": encode([1, 0, [id32, id32, nonce], author, signature]),
    "type 15": encode([1, 15, [id32, id32, nonce], author, signature]),
    "proposal of a RETIRE": encode([1, 14, [10, id32, 1, nonce], author, signature]),
    "proposal that half stands": encode([1, 14, [8, id32, 2, nonce], author, signature]),
    "grant to nobody": encode([1, 3, [[id32], b"", 0, 0, nonce], author, signature]),
    "reason too long": encode([1, 5, [[id32], 0, bytes(1601), nonce], author, signature]),
    "move of shard 255": encode([1, 6, [id32, 255, bytes(16), nonce], author, signature]),
    "retain until the end of days": encode([1, 7, [id32, 2**40 + 1, nonce], author, signature]),
    "token too long": encode([1, 12, [1, id32, bytes(1701), nonce], author, signature]),
    "type as a boolean": encode([1, True, [0, id32, nonce], author, signature]),
    "change as a boolean": encode([1, 1, [False, id32, nonce], author, signature]),
    "unknown change": encode([1, 1, [6, id32, nonce], author, signature]),
    "rotation without signatures": encode([1, 1, [4, id32, id32, nonce], author, signature]),
    "rotation with a short signature": encode([1, 1, [4, id32, id32, bytes(64), bytes(63), nonce], author, signature]),
    "sender without a vault": encode([1, 1, [5, id32, nonce], author, signature]),
    "roster body empty": encode([1, 1, [], author, signature]),
    "genesis with a role": encode([1, 1, [0, id32, 1, nonce], author, signature]),
    "enrol without roles": encode([1, 1, [1, id32, nonce], author, signature]),
    "short author": encode([1, 2, [id32, id32, nonce], bytes(31), signature]),
    "short signature": encode([1, 2, [id32, id32, nonce], author, bytes(63)]),
    "short file id": encode([1, 2, [bytes(31), id32, nonce], author, signature]),
    "text for bytes": encode([1, 2, ["a" * 32, id32, nonce], author, signature]),
    "long nonce": encode([1, 2, [id32, id32, bytes(17)], author, signature]),
    "access to nothing": encode([1, 5, [[], 0, b"", nonce], author, signature]),
    "access to one file twice": encode([1, 5, [[id32, id32], 0, b"", nonce], author, signature]),
    "access to 49 files": encode([1, 5, [[bytes([n]) * 32 for n in range(49)], 0, b"", nonce], author, signature]),
    "access to something else": encode([1, 5, [[1], 0, b"", nonce], author, signature]),
    "purpose 256": encode([1, 5, [[id32], 256, b"", nonce], author, signature]),
    "integer not in shortest form": encode([1, 2, [id32, id32, nonce], author, signature]).replace(b"\x95\x01\x02", b"\x95\x01\xcc\x02"),
    "something after the end": encode([1, 2, [id32, id32, nonce], author, signature]) + b"\x00",
    "too long": bytes(entry_bytes_max + 1),
}


@pytest.mark.parametrize("name", malformed)
def test_anything_else_is_malformed(name):
    with pytest.raises(Malformed):
        Entry.from_bytes(malformed[name])


def test_48_files_fit_into_one_access(consortium):
    files = tuple(bytes([n]) * 32 for n in range(48))
    assert len(consortium(4).entry("vault", Access(files, 255, b"", b"\xff" * 16)).to_bytes()) <= entry_bytes_max


def test_the_numbers_of_the_types_are_fixed():
    names = "ROSTER REGISTER GRANT REVOKE ACCESS MOVE RETAIN HOLD RELEASE RETIRE ERASE TIMESTAMP FREEZE PROPOSE"
    assert " ".join(kind.name for kind in Type) == names
    assert [int(kind) for kind in Type] == list(range(1, 15))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_malformed(data):
    with suppress(Malformed):
        assert Entry.from_bytes(data).to_bytes() == data


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_byte_is_malformed_or_not_signed(consortium, data):
    entry = consortium(4).entry("vault", data.draw(st.sampled_from(list(bodies.values()))))
    packed = bytearray(entry.to_bytes())
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises((Malformed, Refused)):
        Entry.from_bytes(bytes(packed)).verify("consortium.example/log")
