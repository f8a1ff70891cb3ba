"""The manifest: its bytes are fixed, and one that breaks a rule is refused whole."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from medshard_protocol import canonical
from medshard_protocol.errors import Malformed
from medshard_protocol.ids import FileId, Key, NodeId, Tag
from medshard_protocol.manifest import Manifest, ShardRef, header_bytes_max, manifest_bytes_max, tags_max
from medshard_protocol.shards import Layout

vectors = json.loads((Path(__file__).parents[1] / "vectors" / "manifest.json").read_text())
good = bytes.fromhex(vectors["manifests"][0]["manifest"])


def from_vector(vector: dict[str, Any]) -> Manifest:
    raw = {key: bytes.fromhex(vector[key]) for key in ("file_id", "commitment", "owner", "sealed_header", "wrap", "evidence")}
    refs = tuple(
        ShardRef(NodeId(bytes.fromhex(node)), bytes.fromhex(root)) for node, root in zip(vector["nodes"], vector["roots"], strict=True)
    )
    return Manifest(
        FileId(raw["file_id"]),
        Layout(vector["k"], vector["n"], vector["cell_size"], vector["sealed_size"]),
        vector["digest"],
        raw["commitment"],
        refs,
        Key(raw["owner"]),
        raw["sealed_header"],
        raw["wrap"],
        tuple(Tag(bytes.fromhex(tag)) for tag in vector["tags"]),
        raw["evidence"],
    )


@pytest.mark.parametrize("vector", vectors["manifests"], ids=lambda vector: vector["what"])
def test_a_manifest_has_the_bytes_of_its_vector(vector: dict[str, Any]) -> None:
    manifest = from_vector(vector)
    assert manifest.to_bytes().hex() == vector["manifest"]
    assert manifest.sha256.hex() == vector["manifest_sha256"]
    assert manifest.content_sha256 == sha256(manifest.to_bytes()).digest()
    parsed = Manifest.from_bytes(bytes.fromhex(vector["manifest"]))
    assert parsed == manifest
    assert parsed.to_bytes() == manifest.to_bytes()


@pytest.mark.parametrize("vector", vectors["refused"], ids=lambda vector: vector["what"])
def test_a_manifest_that_breaks_a_rule_is_malformed(vector: dict[str, str]) -> None:
    with pytest.raises(Malformed):
        Manifest.from_bytes(bytes.fromhex(vector["bytes"]))


@pytest.mark.parametrize("field", range(14))
def test_a_field_of_another_kind_is_malformed(field: int) -> None:
    items = canonical.decode(good, bytes_max=manifest_bytes_max, what="manifest")
    values: list[canonical.Value] = [None, True, -1, 2**64 - 1, "blake", b"", b"x", [], [1], [[b"x", b"y"]], [None], "x" * 99]
    for value in values:
        if (field, value) in ((10, b""), (10, b"x"), (12, [])):
            continue  # a sealed header is any bytes here, and a file without tags is allowed
        with pytest.raises(Malformed):
            Manifest.from_bytes(canonical.encode([*items[:field], value, *items[field + 1 :]]))


def test_a_header_a_list_of_tags_or_a_manifest_over_its_limit_is_malformed() -> None:
    items = canonical.decode(good, bytes_max=manifest_bytes_max, what="manifest")
    tags = [number.to_bytes(32, "big") for number in range(tags_max + 1)]
    assert Manifest.from_bytes(canonical.encode([*items[:12], tags[:-1], items[13]])).tags[-1] == tags[-2]
    for broken in ([*items[:12], tags, items[13]], [*items[:10], bytes(header_bytes_max + 1), *items[11:]]):
        with pytest.raises(Malformed, match=r"more than|at most"):
            Manifest.from_bytes(canonical.encode(broken))
    with pytest.raises(Malformed, match="more than"):
        Manifest.from_bytes(bytes(manifest_bytes_max + 1))


def test_it_knows_which_shard_a_node_should_hold() -> None:
    manifest = Manifest.from_bytes(good)
    assert [manifest.index_on(ref.node) for ref in manifest.shards] == list(range(manifest.layout.n))
    assert manifest.index_on(NodeId(bytes(16))) is None


def test_a_changed_copy_has_bytes_of_its_own() -> None:
    manifest = Manifest.from_bytes(good)
    changed = replace(manifest, owner=Key(bytes(32)))
    assert changed.to_bytes() != manifest.to_bytes()
    assert Manifest.from_bytes(changed.to_bytes()) == changed


def test_it_names_no_plaintext_and_no_file_name() -> None:
    sealing = json.loads((Path(__file__).parents[1] / "vectors" / "sealing.json").read_text())["objects"]
    for vector, sealed in zip(vectors["manifests"], sealing, strict=True):
        data, plain = bytes.fromhex(vector["manifest"]), bytes.fromhex(sealed["plain"])
        header = canonical.decode(bytes.fromhex(sealed["header"]), bytes_max=10**6, what="header")
        assert sha256(plain).digest() not in data
        assert header[4] not in data
        assert bytes.fromhex(sealed["file_key"]) not in data
