"""Accept headers and multipart bodies, without a server."""

from __future__ import annotations

import contextlib
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medshard.gateway.dicomweb import multipart
from medshard.gateway.dicomweb.media import BadAccept, Choice, first_of, for_frames, for_instances, parsed
from medshard_protocol.errors import Malformed

explicit, implicit, jpeg, jls = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.80"
native = {explicit, implicit}
decodable = {*native, jpeg}
octets, dicom = "application/octet-stream", "application/dicom"


def instances(accept: str, *stored: str) -> Choice | None:
    return for_instances(parsed(accept), stored, decodable)


def frames(accept: str, stored: str) -> Choice | None:
    return for_frames(parsed(accept), stored, decodable, native)


def test_instances_come_as_stored_where_any_syntax_is_accepted_and_decoded_otherwise() -> None:
    as_stored = Choice(dicom, True, as_stored=True)
    decoded = Choice(dicom, True, explicit)
    assert instances('multipart/related; type="application/dicom"; transfer-syntax=*', jpeg, jls) == as_stored
    assert instances('multipart/related; type="application/dicom"', jpeg, implicit) == decoded
    assert instances("", explicit) == instances("*/*", explicit) == as_stored
    assert instances("*/*", jpeg) == decoded
    assert instances("*/*", jls) is None, "what cannot be decoded is not acceptable"
    assert instances(f"multipart/related; type=application/dicom; transfer-syntax={jls}", jls) == as_stored
    assert instances(f"multipart/related; type=application/dicom; transfer-syntax={jls}", explicit) is None
    assert instances("application/dicom; transfer-syntax=*", jls) == Choice(dicom, False, as_stored=True)
    assert instances("application/json", explicit) is None


def test_the_heavier_range_wins() -> None:
    header = f'multipart/related; type="application/dicom"; q=0.5, application/dicom; transfer-syntax={jls}; q=0.9, */*;q=0'
    assert instances(header, jls) == Choice(dicom, False, as_stored=True)
    assert instances(header, jpeg) == Choice(dicom, True, explicit)


def test_frames_come_in_the_media_type_of_their_syntax_or_decoded() -> None:
    assert frames(f'multipart/related; type="{octets}"', explicit) == Choice(octets, True, explicit, as_stored=True)
    assert frames(f'multipart/related; type="{octets}"', jpeg) == Choice(octets, True, explicit)
    assert frames(f"multipart/related; type={octets}; transfer-syntax=*", jpeg) == Choice(octets, True, jpeg, as_stored=True)
    assert frames("multipart/related; type=image/jpeg", jpeg) == Choice("image/jpeg", True, jpeg, as_stored=True)
    assert frames("image/*; transfer-syntax=*", jls) == Choice("image/jls", False, jls, as_stored=True)
    assert frames("image/jpeg", explicit) is None
    assert frames("*/*", jls) is None
    assert frames("", explicit) == Choice(octets, True, explicit, as_stored=True)


def test_a_choice_is_made_among_what_is_offered() -> None:
    assert first_of(parsed("image/png, image/jpeg;q=0.9"), ["image/jpeg", "image/png"]) == "image/png"
    assert first_of(parsed("image/*"), ["image/jpeg", "image/png"]) == "image/jpeg"
    assert first_of(parsed("text/html"), ["image/jpeg"]) is None


@pytest.mark.parametrize("header", ["a b", "image/png;;;q", "x" * 5_000, ",".join(["a/b"] * 50), "image/png; q=high"])
def test_nonsense_is_refused(header: str) -> None:
    with pytest.raises(BadAccept):
        parsed(header)


@given(st.text(max_size=200))
def test_no_accept_header_breaks_the_parser(header: str) -> None:
    with contextlib.suppress(BadAccept):
        parsed(header)


def body(parts: list[bytes], boundary: str = "b0undary", preamble: bytes = b"") -> bytes:
    joined = b"".join(
        multipart.head(boundary, "application/dicom", first=number == 0, length=len(part)) + part for number, part in enumerate(parts)
    )
    return preamble + joined + multipart.tail(boundary)


def parse(data: bytes, cuts: list[int], boundary: str = "b0undary") -> list[bytes]:
    parser, parts = multipart.Parser(boundary), []
    places = [0, *sorted(cuts), len(data)]
    for low, high in itertools.pairwise(places):
        for event in parser.feed(data[low:high]):
            match event:
                case multipart.Begin(headers):
                    assert headers["content-type"] == "application/dicom"
                    parts.append(b"")
                case multipart.Data(data=chunk):
                    parts[-1] += bytes(chunk)
    parser.finish()
    return parts


@given(
    st.lists(
        st.one_of(st.binary(max_size=60), st.sampled_from([b"", b"\r\n", b"\r\n--b0undar", b"--b0undary", b"\r\n\r\n--"])),
        min_size=1,
        max_size=5,
    ),
    st.lists(st.integers(0, 400), max_size=12),
    st.sampled_from([b"", b"preamble\r\n", b"\r\n"]),
)
def test_parts_are_the_same_wherever_the_stream_is_cut(parts: list[bytes], cuts: list[int], preamble: bytes) -> None:
    data = body(parts, preamble=preamble)
    assert parse(data, [min(cut, len(data)) for cut in cuts]) == parts


def test_a_part_of_many_megabytes_is_never_held_whole() -> None:
    part = random.Random(1).randbytes(3_000_000)
    data, parser, largest, total = body([part]), multipart.Parser("b0undary"), 0, 0
    for at in range(0, len(data), 65_536):
        for event in parser.feed(data[at : at + 65_536]):
            if isinstance(event, multipart.Data):
                largest, total = max(largest, len(event.data)), total + len(event.data)
    assert total == len(part)
    assert largest <= 65_536 + 100


@pytest.mark.parametrize(
    "data", [b"", b"no multipart", body([b"x"])[:-8], b"--b0undary trash\r\n\r\n\r\n--b0undary--", b"--b0undary\r\n" + b"a: b\r\n" * 3_000]
)
def test_what_is_no_multipart_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        parse(data, [])
