"""Canonical msgpack: one value, one byte string, and nothing else gets in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medshard_protocol import canonical
from medshard_protocol.canonical import Fields, decode_blobs, encode, nesting_max
from medshard_protocol.errors import Malformed

vectors = json.loads((Path(__file__).parents[1] / "vectors" / "encoding.json").read_text())
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=40) | st.binary(max_size=40)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=5), max_leaves=20)


def from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"])
    return [from_json(item) for item in value] if isinstance(value, list) else value


def decode(data: bytes) -> Any:
    return canonical.decode(data, bytes_max=1000, what="thing")


@pytest.mark.parametrize("vector", vectors["values"], ids=lambda vector: vector["bytes"][:20])
def test_a_value_has_the_bytes_of_its_vector(vector: dict[str, Any]) -> None:
    value = from_json(vector["value"])
    assert canonical.encode(value).hex() == vector["bytes"]
    decoded = decode(bytes.fromhex(vector["bytes"]))
    assert decoded == value
    assert type(decoded) is type(value)


@pytest.mark.parametrize("vector", vectors["refused"], ids=lambda vector: vector["what"])
def test_any_other_spelling_is_malformed(vector: dict[str, str]) -> None:
    with pytest.raises(Malformed, match="thing"):
        decode(bytes.fromhex(vector["bytes"]))


@given(values)
def test_what_was_encoded_comes_back(value: Any) -> None:
    data = canonical.encode(value)
    assert canonical.decode(data, bytes_max=len(data), what="thing") == value


@given(st.binary(max_size=60))
def test_what_decodes_has_no_other_bytes(data: bytes) -> None:
    try:
        value = decode(data)
    except Malformed:
        return
    assert canonical.encode(value) == data


def test_bytes_of_any_kind_are_read() -> None:
    data = canonical.encode([1, b"x"])
    assert decode(bytearray(data)) == decode(memoryview(data)) == [1, b"x"]  # type: ignore[arg-type]


def test_lists_and_tuples_are_the_same_array() -> None:
    assert canonical.encode((1, (2, 3))) == canonical.encode([1, [2, 3]])


@pytest.mark.parametrize(
    "value", [1.0, {}, {1: 2}, {1}, object(), bytearray(b"x"), memoryview(b"x"), 2**64, -(2**63) - 1, [[1.5]], 1j, msgpack.ExtType(1, b"x")]
)
def test_what_has_no_canonical_form_is_a_callers_mistake(value: Any) -> None:
    with pytest.raises(TypeError):
        canonical.encode(value)


def test_more_bytes_than_allowed_are_not_looked_at() -> None:
    with pytest.raises(Malformed, match="5 bytes, more than the 4"):
        canonical.decode(b"\xc4\x03abc", bytes_max=4, what="thing")


@pytest.mark.parametrize("depth", [nesting_max, nesting_max + 1, 500, 1_000_000])
def test_a_bomb_of_brackets_is_malformed(depth: int) -> None:
    data = b"\x91" * depth + b"\x00"
    if depth <= nesting_max:
        canonical.decode(data, bytes_max=len(data), what="thing")
    else:
        with pytest.raises(Malformed):
            canonical.decode(data, bytes_max=len(data), what="thing")


@pytest.mark.parametrize("value", [None, 3, b"abc", "abc", [], [1, 2], [1, 2, 3, 4]])
def test_fields_demand_an_array_of_their_count(value: Any) -> None:
    with pytest.raises(Malformed, match="array of 3"):
        Fields(value, count=3, what="thing")


@pytest.mark.parametrize(
    ("value", "take"),
    [
        (-1, lambda f: f.uint()),
        (True, lambda f: f.uint()),
        (False, lambda f: f.uint()),
        (None, lambda f: f.uint()),
        ("1", lambda f: f.uint()),
        (5, lambda f: f.uint(most=4)),
        (5, lambda f: f.uint(least=6)),
        ("abc", lambda f: f.bytes()),
        (3, lambda f: f.bytes()),
        (b"abc", lambda f: f.bytes(exactly=4)),
        (b"abc", lambda f: f.bytes(most=2)),
        (b"abc", lambda f: f.text(most=9)),
        ("abc", lambda f: f.text(most=2)),
        ("abc", lambda f: f.list(most=9)),
        ([1, 2], lambda f: f.list(most=1)),
    ],
)
def test_a_field_of_another_kind_or_size_is_malformed(value: Any, take: Any) -> None:
    with pytest.raises(Malformed, match="thing"):
        take(Fields([value], count=1, what="thing"))


def test_fields_come_in_order() -> None:
    f = Fields([7, b"abc", "text", [1]], count=4, what="thing")
    assert (f.uint(most=7, least=7), f.bytes(exactly=3, most=3), f.text(most=4), f.list(most=1)) == (7, b"abc", "text", [1])


def _counted(count: int, forms: list[tuple[int, int, int]], draw: st.DataObject) -> bytes:
    """A head of msgpack in any form that has room: first byte, bytes of the count, which it says itself if there are none."""
    fitting = [form for form in forms if count < (1 << 8 * form[1] if form[1] else form[2])]
    first, width, _ = draw.draw(st.sampled_from(fitting))
    return bytes([first]) + count.to_bytes(width, "big") if width else bytes([first | count])


@given(st.data())
def test_blobs_are_taken_in_canonical_form_alone(draw: st.DataObject) -> None:
    blobs = draw.draw(st.lists(st.none() | st.sampled_from([b"", b"x", bytes(255), bytes(256), bytes(65_535), bytes(65_536)]), max_size=17))
    arrays, bins = [(0x90, 0, 16), (0xDC, 2, 0), (0xDD, 4, 0)], [(0xC4, 1, 0), (0xC5, 2, 0), (0xC6, 4, 0)]
    number = draw.draw(st.sampled_from([b"\x01", b"\xcc\x01", b"\xd0\x01", b"\xc3", b"\xff"]))
    data = _counted(2, arrays, draw) + number + _counted(len(blobs), arrays, draw)
    data += b"".join(b"\xc0" if blob is None else _counted(len(blob), bins, draw) + blob for blob in blobs)
    try:
        expected = canonical.decode(data, bytes_max=2_000_000, what="blobs")
    except Malformed:
        expected = None
    if expected is None or expected[0] is True or expected[0] < 0:
        with pytest.raises(Malformed):
            decode_blobs(data, bytes_max=2_000_000, what="blobs")
    else:
        assert decode_blobs(data, bytes_max=2_000_000, what="blobs") == (expected[0], expected[1])


@pytest.mark.parametrize("value", [[1], [1, [b""], 2], [1, ["text"]], [1, [3]], [1, [[b""]]], [b"", []], 7, [128, []]])
def test_what_is_no_list_of_blobs_is_malformed(value: Any) -> None:
    with pytest.raises(Malformed):
        decode_blobs(encode(value), bytes_max=1000, what="blobs")
    with pytest.raises(Malformed, match="more than"):
        decode_blobs(encode([1, []]), bytes_max=2, what="blobs")
