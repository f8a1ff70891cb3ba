"""The sealed header: byte-exact, one encoding for one value, and no hostile one gets through."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medshard.model import Header, Member, attributes_max, header_bytes_max
from medshard_protocol import canonical
from medshard_protocol.errors import Malformed, TooLarge

vectors = json.loads((Path(__file__).parent.parent / "vectors" / "header.json").read_text())
digest = bytes(range(32))


def file_header(**changes: Any) -> Header:
    return replace(Header("file", b"scan.dcm", 7, digest, "application/dicom", {"modality": "CT"}), **changes)


def member(name: bytes = b"a/b.dcm", offset: int = 0, size: int = 5, **attributes: str) -> Member:
    return Member(name, offset, size, digest, "application/dicom", attributes or {"modality": "CT"})


def from_vector(value: dict[str, Any]) -> Header:
    members = tuple(
        Member(bytes.fromhex(m["name"]), m["offset"], m["size"], bytes.fromhex(m["sha256"]), m["media_type"], m["attributes"])
        for m in value["members"]
    )
    plain = {key: value[key] for key in ("kind", "size", "media_type", "attributes", "put_time")}
    return Header(name=bytes.fromhex(value["name"]), sha256=bytes.fromhex(value["sha256"]), members=members, **plain)


@pytest.mark.parametrize("vector", vectors, ids=lambda vector: vector["what"])
def test_a_header_has_the_bytes_of_its_vector(vector: dict[str, Any]) -> None:
    header = from_vector(vector["header"])
    assert header.to_bytes().hex() == vector["bytes"]
    assert Header.from_bytes(bytes.fromhex(vector["bytes"])) == header


def test_a_pack_says_what_its_members_share_only_once() -> None:
    members = [member(b"a", 0, 5, modality="CT", number="1"), member(b"b", 5, 5, modality="CT", number="2")]
    header = Header.pack(b"series", 10, digest, members)
    assert (header.media_type, header.attributes) == ("application/dicom", {"modality": "CT"})
    assert header.to_bytes().count(b"CT") == 1
    assert Header.from_bytes(header.to_bytes()) == header


def test_a_pack_of_several_media_types_names_each() -> None:
    members = [member(b"a", 0, 5), replace(member(b"b", 5, 5), media_type="text/plain")]
    header = Header.pack(b"folder", 10, digest, members)
    assert header.media_type == ""
    assert Header.from_bytes(header.to_bytes()) == header


names = [b"", b"/etc/passwd", b"..", b"../x", b"a/../b", b"a//b", b"a/", b"a/.", b"a\0b", b"x" * 4097]


@pytest.mark.parametrize("name", names)
def test_a_name_that_leaves_its_folder_is_refused(name: bytes) -> None:
    with pytest.raises(Malformed):
        file_header(name=name).to_bytes()
    good = canonical.decode(Header.pack(b"p", 5, digest, [member(b"a")]).to_bytes(), bytes_max=header_bytes_max, what="test")
    good[8][0][0] = name
    with pytest.raises(Malformed):
        Header.from_bytes(canonical.encode(good))


@pytest.mark.parametrize(
    "members",
    [
        [member(b"a", 0, 6), member(b"b", 5, 5)],  # overlap
        [member(b"a", 5, 5), member(b"b", 0, 5)],  # out of order
        [member(b"a", 0, 11)],  # past the end
        [member(b"a", 11, 0)],
    ],
)
def test_members_that_overlap_or_reach_outside_are_refused(members: list[Member]) -> None:
    with pytest.raises(Malformed):
        Header.pack(b"p", 10, digest, members).to_bytes()


@pytest.mark.parametrize(
    "header",
    [
        file_header(sha256=b"short"),
        file_header(media_type=""),
        file_header(media_type="x" * 128),
        file_header(members=(member(),)),
        file_header(kind="pack"),
        file_header(attributes={"Upper": "x"}),
        file_header(attributes={"tag:": "x"}),
        file_header(attributes={"tag:a=b": "x"}),
        file_header(attributes={"modality": "x" * 1025}),
        file_header(attributes={"modality": "\udcff"}),
        file_header(attributes={f"tag:{i}": "" for i in range(attributes_max + 1)}),
        Header("pack", b"p", 9, digest, "application/dicom", {"modality": "MR"}, (member(),)),
    ],
)
def test_a_header_that_nobody_may_write_cannot_be_written(header: Header) -> None:
    with pytest.raises(Malformed):
        header.to_bytes()


def test_a_header_over_the_limit_is_refused() -> None:
    members = [replace(member(b"n" * 4000, i, 1), attributes={"tag:i": str(i)}) for i in range(3_200)]
    with pytest.raises(TooLarge):
        Header.pack(b"p", 3_200, digest, members).to_bytes()


def edits() -> list[tuple[str, list[Any]]]:
    """Decoded headers that differ from a good one in one point that makes them non-canonical."""

    def pack(**own: str) -> list[Any]:
        members = [member(b"a", 0, 5, modality="CT", number="1"), member(b"b", 5, 5, modality="CT", number="2")]
        value: list[Any] = canonical.decode(Header.pack(b"p", 10, digest, members).to_bytes(), bytes_max=2000, what="test")
        return value

    repeated_type, repeated_attribute, unsorted, twice, version, kind = pack(), pack(), pack(), pack(), pack(), pack()
    repeated_type[8][0][4] = "application/dicom"
    repeated_attribute[8][0][5] = [["modality", "CT"], ["number", "1"]]
    unsorted[8][0][5] = [["tag:z", "1"], ["number", "1"]]
    twice[7] = [["modality", "CT"], ["modality", "CT"]]
    version[0] = 2
    kind[1] = 2
    return [
        ("media type said twice", repeated_type),
        ("attribute said twice", repeated_attribute),
        ("unsorted", unsorted),
        ("key twice", twice),
        ("version", version),
        ("kind", kind),
    ]


@pytest.mark.parametrize(("what", "value"), edits(), ids=lambda x: x if isinstance(x, str) else "")
def test_one_value_has_one_encoding(what: str, value: list[Any]) -> None:
    with pytest.raises(Malformed):
        Header.from_bytes(canonical.encode(value))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_malformed_only(data: bytes) -> None:
    with pytest.raises(Malformed):
        Header.from_bytes(data)


good = Header.pack(
    b"p", 10, digest, [member(b"a", 0, 5, modality="CT", number="1"), member(b"b", 5, 5, modality="CT", number="2")]
).to_bytes()


@given(st.integers(0, len(good) - 1), st.integers(1, 255))
def test_a_changed_byte_gives_another_header_or_malformed(at: int, flip: int) -> None:
    data = bytearray(good)
    data[at] ^= flip
    with contextlib.suppress(Malformed):
        assert Header.from_bytes(bytes(data)).to_bytes() == bytes(data)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
attribute_maps = st.dictionaries(st.sampled_from(["modality", "patient-name", "title", "tag:ward", "tag:Ünï"]), text, max_size=5)
relative_names = st.lists(
    st.binary(min_size=1, max_size=9).filter(lambda b: b not in (b".", b"..") and b"/" not in b and b"\0" not in b), min_size=1, max_size=3
).map(b"/".join)


@given(
    st.lists(st.tuples(relative_names, st.integers(0, 9), attribute_maps, st.sampled_from(["a/b", "c/d"])), min_size=1, max_size=5),
    st.integers(0, 2**40),
)
def test_any_pack_comes_back_from_its_bytes(items: list[tuple[bytes, int, dict[str, str], str]], put_time: int) -> None:
    members, end = [], 0
    for name, size, attributes, media_type in items:
        members.append(Member(name, end, size, digest, media_type, attributes))
        end += size
    header = Header.pack(b"p", end, digest, members, put_time=put_time)
    assert Header.from_bytes(header.to_bytes()) == header
