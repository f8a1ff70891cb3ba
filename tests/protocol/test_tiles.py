from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medshard_protocol import merkle
from medshard_protocol.errors import Damaged, Malformed
from medshard_protocol.merkle import sha256
from medshard_protocol.tiles import TileName, Tree, pack_bundle, split_tile, tile_names, unpack_bundle

leaves = [merkle.leaf_hash(n.to_bytes(4, "big"), sha256) for n in range(70_000)]


@pytest.fixture(scope="module")
def grown():
    tiles: dict[tuple[int, int], bytes] = {}
    tree = Tree(lambda level, number: tiles[level, number])
    for leaf in leaves:
        tiles.update({(tile.level, tile.number): tile.hashes for tile in tree.append(leaf)})
    return tree, tiles


def test_a_log_of_70000_consists_of_the_tiles_that_the_document_counts():
    names = tile_names(70_000)
    hashes = [name for name in names if name.level is not None]
    assert sum(name.level == 0 and name.width == 256 for name in hashes) == 273
    assert {(name.level, name.width) for name in hashes if name.width < 256} == {(0, 112), (1, 17), (2, 1)}
    assert sum(name.level == 1 and name.width == 256 for name in hashes) == 1
    assert sum(name.level is None for name in names) == 274


def test_a_log_of_256_has_a_full_tile_and_one_hash_above():
    assert tile_names(256) == [TileName(None, 0), TileName(0, 0), TileName(1, 0, 1)]
    assert tile_names(0) == []


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (TileName(0, 1234067), "0/x001/x234/067"),
        (TileName(0, 0), "0/000"),
        (TileName(63, 999, 255), "63/999.p/255"),
        (TileName(None, 1000, 1), "entries/x001/000.p/1"),
    ],
)
def test_a_tile_has_one_path(name, path):
    assert name.path() == path
    assert TileName.from_path(path) == name


bad_paths = """0/0 0/00 0/0000 0/x000/001 00/000 64/000 -1/000 0/001/ /0/001 0/x001/x002 0/001.p/0 0/001.p/256 0/001.p/01 0/001.p
0/../000 entry/000 0/٠٠٠ 0/001.p/1/"""


@pytest.mark.parametrize("path", [*bad_paths.split(), "", "0/001\n", "0/" + "x001/" * 50 + "001"])
def test_any_other_path_is_malformed(path):
    with pytest.raises(Malformed):
        TileName.from_path(path)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 511, 512, 65535, 65536, 65537, 69_999, 70_000])
def test_a_tree_proves_for_every_size_it_has_had(grown, size):
    tree, tiles = grown
    root = merkle.root(leaves[:size], sha256)
    assert tree.root(size) == root
    for index in {0, size // 3, size - 1}:
        assert merkle.root_from_path(leaves[index], index, size, tree.inclusion_path(index, size), sha256) == root
    for old in {0, 1, size // 2, size}:
        merkle.verify_consistency(old, merkle.root(leaves[:old], sha256), size, root, tree.consistency_path(old, size), sha256)
    again = Tree.load(size, leaves[size - size % 256 : size], lambda level, number: tiles[level, number])
    assert again.root(size) == again.frontier().root() == root
    again.append(b"\x00" * 32)
    assert again.root(size) == root


def test_tiles_hold_what_the_document_says(grown):
    tree, _ = grown
    assert tree.tile(TileName(0, 273, 112)) == b"".join(leaves[273 * 256 :])
    assert tree.tile(TileName(1, 1, 17))[:32] == merkle.root(leaves[65536 : 65536 + 256], sha256)
    assert tree.tile(TileName(2, 0, 1)) == merkle.root(leaves[:65536], sha256)
    assert tree.tile(TileName(0, 0, 3)) == b"".join(leaves[:3])
    for name in (TileName(0, 273), TileName(0, 273, 113), TileName(2, 0, 2), TileName(3, 0, 1)):
        assert not name.within(70_000)
        with pytest.raises(ValueError, match="no such tile"):
            tree.tile(name)


def test_a_full_tile_can_be_read_before_it_is_stored():
    def nowhere(level, number):
        raise KeyError(number)

    tree = Tree(nowhere)
    for leaf in leaves[:600]:
        tree.append(leaf)
    assert tree.root(600) == merkle.root(leaves[:600], sha256)


@pytest.mark.parametrize("size", [-1, 70_001])
def test_a_size_the_tree_never_had_is_the_callers_mistake(grown, size):
    for call in (grown[0].root, lambda n: grown[0].inclusion_path(0, n), lambda n: grown[0].consistency_path(0, n)):
        with pytest.raises(ValueError, match=r".+"):
            call(size)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=256))
def test_a_bundle_gives_back_its_entries(entries):
    data = pack_bundle(entries)
    assert unpack_bundle(data, len(entries)) == entries
    for bad, width in ((data + b"\x00", len(entries)), (data[:-1], len(entries)), (data, len(entries) + 1)):
        if entries or bad:
            with pytest.raises(Malformed):
                unpack_bundle(bad, width)


def test_a_tile_of_the_wrong_length_is_damaged():
    with pytest.raises(Damaged):
        split_tile(bytes(8191))
