"""What client and node say to each other: the bytes of the vectors, limits on every count, and errors that arrive as they were raised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medshard_protocol import canonical, messages, sharing
from medshard_protocol.errors import Absent, Conflict, Malformed, MedshardError, Unavailable
from medshard_protocol.ids import FileId, Sha256, Tag
from medshard_protocol.messages import (
    Found,
    SmallPut,
    SpanHead,
    bundle_items_max,
    error_bytes_max,
    errors_by_code,
    lookup_files_max,
    lookup_tags_max,
    manifest_path,
    pack_check,
    pack_error,
    pack_found,
    pack_lookup,
    pack_outcomes,
    pack_shards,
    pack_small_puts,
    pack_small_reads,
    pack_stored,
    shard_path,
    unpack_check,
    unpack_error,
    unpack_found,
    unpack_lookup,
    unpack_outcomes,
    unpack_shards,
    unpack_small_puts,
    unpack_small_reads,
    unpack_stored,
)
from medshard_protocol.proofs import Inclusion

vectors = {
    vector["what"]: bytes.fromhex(vector["bytes"])
    for vector in json.loads((Path(__file__).parents[1] / "vectors" / "wire.json").read_text())["messages"]
}
drawn = {name: canonical.decode(vectors[name], bytes_max=10_000, what=name) for name in vectors}
file_id, root, tag = FileId(drawn["small reads"][1][0][0]), drawn["stored"][1], Tag(drawn["lookup"][1][0])
hashes = tuple(drawn["span with paths"][4][0])
conflict = Conflict("another shard of this file is stored here already")
found = [Found(b"manifest", [7, b"entry", [hashes[0]], b"note"]), Found(b"another", None)]
two = (FileId(b"1" * 32), FileId(b"2" * 32))
inclusion = Inclusion(7, b"entry", hashes[:1], b"note")
earlier = Inclusion(3, b"entry", hashes, b"note")

packed: dict[str, Callable[[], bytes]] = {
    "error": lambda: pack_error(conflict)[1],
    "small puts": lambda: pack_small_puts([SmallPut(b"manifest", 2, b"shard")]),
    "outcomes": lambda: pack_outcomes([None, conflict]),
    "small reads": lambda: pack_small_reads([(file_id, 2)]),
    "shards": lambda: pack_shards([b"shard", None]),
    "lookup": lambda: pack_lookup([tag]),
    "found": lambda: pack_found(dict(zip(two, found, strict=True)), [two, (), two[1:]]),
    "span with digests": lambda: SpanHead(0, 2, b"".join(hashes), ()).to_bytes(),
    "span with paths": lambda: SpanHead(1, 1, b"", (hashes,)).to_bytes(),
    "stored": lambda: pack_stored(root, True),
    "check": lambda: pack_check([3, 5]),
    "access shown": lambda: sharing.pack_shown(inclusion),
    "seen": lambda: sharing.pack_seen(7),
    "grant": lambda: sharing.SealedGrant(Sha256(root), b"sealed").to_bytes(),
    "shared": lambda: sharing.Shared(b"note", (sharing.SharedFile(file_id, inclusion, earlier, b"manifest", b"sealed"),), True).to_bytes(),
    "history": lambda: sharing.History(b"note", (told(earlier, True), told(inclusion, False)), False).to_bytes(),
    "identity": lambda: sharing.Vouched("Klinikum Süd", 0, 7, True).to_bytes(),
}


def told(each: Inclusion, effective: bool) -> sharing.Told:
    return sharing.Told(each.index, each.entry, each.path, effective)


@pytest.mark.parametrize("what", vectors)
def test_a_message_has_the_bytes_of_its_vector(what: str) -> None:
    assert packed[what]().hex() == vectors[what].hex()


def test_the_vectors_are_read_as_what_they_say() -> None:
    assert unpack_small_puts(vectors["small puts"]) == [SmallPut(b"manifest", 2, b"shard")]
    assert unpack_small_reads(vectors["small reads"]) == [(file_id, 2)]
    assert unpack_shards(vectors["shards"], 2) == [b"shard", None]
    assert unpack_lookup(vectors["lookup"]) == [tag]
    assert unpack_found(vectors["found"], 3) == [found, [], found[1:]]
    assert SpanHead.from_bytes(vectors["span with digests"]) == SpanHead(0, 2, b"".join(hashes), ())
    assert SpanHead.from_bytes(vectors["span with paths"]) == SpanHead(1, 1, b"", (hashes,))
    assert unpack_stored(vectors["stored"]) == root
    assert unpack_check(vectors["check"]) == [3, 5]
    first, second = unpack_outcomes(vectors["outcomes"], "node1")
    assert first is None
    assert isinstance(second, Conflict)
    assert str(second) == f"node1: {conflict}"


@pytest.mark.parametrize("code", errors_by_code)
def test_an_error_arrives_as_the_class_it_was_raised_as(code: str) -> None:
    status, kind = errors_by_code[code]
    sent = pack_error(kind("what happened", hint="what to do"))
    assert sent[0] == status
    arrived = unpack_error(*sent, "node1")
    assert type(arrived) is kind
    assert (str(arrived), arrived.hint) == ("node1: what happened", "what to do")


def test_every_error_of_the_tree_has_a_status_of_its_own() -> None:
    kinds = {kind for _, kind in errors_by_code.values()}
    from medshard_protocol import errors

    tree = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MedshardError)}
    assert kinds == tree - {MedshardError}
    assert len({status for status, _ in errors_by_code.values()}) == len(errors_by_code)


def test_an_error_of_no_known_kind_says_nothing_of_the_node() -> None:
    status, body = pack_error(MedshardError("/secret/path", hint="secret"))
    assert status == 500
    assert b"secret" not in body


def test_the_longest_error_still_arrives() -> None:
    status, body = pack_error(Absent("\U0001f600" * 10_000, hint="\U0001f600" * 10_000))
    assert len(body) <= error_bytes_max
    assert isinstance(unpack_error(status, body, "node1"), Absent)


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"\x94\x01\xa4nope\xa0\xa0", canonical.encode([1, 2, 3, 4]), b"x" * 20_000, canonical.encode([1, "x" * 33, "", ""])],
)
def test_an_answer_that_is_no_error_of_ours_is_unavailable(body: bytes) -> None:
    assert type(unpack_error(502, body, "node1")) is Unavailable


@given(st.integers(0, 599), st.binary(max_size=300))
def test_reading_an_error_never_raises(status: int, body: bytes) -> None:
    assert isinstance(unpack_error(status, body, "node1"), MedshardError)


def encode(*items: Any) -> bytes:
    return canonical.encode(list(items))


refused: dict[str, Callable[[], object]] = {
    "puts of version 2": lambda: unpack_small_puts(encode(2, [])),
    "more puts than allowed": lambda: unpack_small_puts(encode(1, [[b"", 0, b""]] * (bundle_items_max + 1))),
    "a put without a shard": lambda: unpack_small_puts(encode(1, [[b"", 0]])),
    "a put of index 256": lambda: unpack_small_puts(encode(1, [[b"", 256, b""]])),
    "reads of a short id": lambda: unpack_small_reads(encode(1, [[b"x" * 31, 0]])),
    "more reads than allowed": lambda: unpack_small_reads(encode(1, [[b"x" * 32, 0]] * (bundle_items_max + 1))),
    "another number of shards": lambda: unpack_shards(encode(1, [None]), 2),
    "a shard that is a number": lambda: unpack_shards(encode(1, [3]), 1),
    "a tag of 31 bytes": lambda: unpack_lookup(encode(1, [b"x" * 31])),
    "more tags than allowed": lambda: unpack_lookup(encode(1, [b"x" * 32] * (lookup_tags_max + 1))),
    "another number of answers": lambda: unpack_found(encode(1, [], [[]]), 2),
    "a file that is not there": lambda: unpack_found(encode(1, [[b"m", None]], [[1]]), 1),
    "a file by a negative number": lambda: unpack_found(encode(1, [[b"m", None]], [[-1]]), 1),
    "a file by true": lambda: unpack_found(encode(1, [[b"m", None], [b"m", None]], [[True]]), 1),
    "more files for a tag than allowed": lambda: unpack_found(encode(1, [[b"m", None]], [[0] * (lookup_files_max + 1)]), 1),
    "a manifest that is text": lambda: unpack_found(encode(1, [["m", None]], [[0]]), 1),
    "outcomes that are numbers": lambda: unpack_outcomes(encode(1, [3]), "node1"),
    "a root of 31 bytes": lambda: unpack_stored(encode(1, b"x" * 31, 0)),
    "stored twice over": lambda: unpack_stored(encode(1, b"x" * 32, 2)),
    "a bad cell that is true": lambda: unpack_check(encode(1, [True])),
    "a bad cell below 0": lambda: unpack_check(encode(1, [-1])),
    "digests of 33 bytes": lambda: SpanHead.from_bytes(encode(1, 0, 1, b"x" * 33, [])),
    "a path of 33 hashes": lambda: SpanHead.from_bytes(encode(1, 0, 1, b"", [[b"x" * 32] * 33])),
    "a path of short hashes": lambda: SpanHead.from_bytes(encode(1, 0, 1, b"", [[b"x" * 31]])),
    "a first cell out of reach": lambda: SpanHead.from_bytes(encode(1, messages.cells_max + 1, 1, b"", [])),
}


@pytest.mark.parametrize("what", refused)
def test_a_message_that_breaks_a_rule_is_malformed(what: str) -> None:
    with pytest.raises(Malformed):
        refused[what]()


def test_a_check_names_no_more_cells_than_fit() -> None:
    assert len(unpack_check(pack_check(range(100_000)))) == bundle_items_max


def test_paths_name_things_in_small_hex() -> None:
    assert shard_path(FileId(b"\xab" * 32), 7) == "/v1/shards/" + "ab" * 32 + "/7"
    assert manifest_path(FileId(b"\xab" * 32)) == "/v1/manifests/" + "ab" * 32
