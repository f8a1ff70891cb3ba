from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medshard_protocol import merkle
from medshard_protocol.errors import Malformed
from medshard_protocol.merkle import blake3_256, sha256

# The reference tree of Certificate Transparency's own tests: eight leaves, and the root after each.
contents = [
    bytes.fromhex(text) for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
roots = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
leaves = [merkle.leaf_hash(item, sha256) for item in contents]


def hexes(text):
    return [bytes.fromhex(item) for item in text.split()]


def naive(hashes, digest):
    if len(hashes) < 2:
        return hashes[0] if hashes else digest(b"")
    split = 1
    while 2 * split < len(hashes):
        split *= 2
    return digest(b"\x01" + naive(hashes[:split], digest) + naive(hashes[split:], digest))


@pytest.mark.parametrize("size", range(9))
def test_roots_are_those_of_certificate_transparency(size):
    assert merkle.root(leaves[:size], sha256).hex() == roots[size]


def test_paths_are_those_of_certificate_transparency():
    assert merkle.inclusion_path(leaves, 0, sha256) == hexes(
        """96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7
        5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e
        6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"""
    )
    assert merkle.inclusion_path(leaves[:3], 2, sha256) == [bytes.fromhex(roots[2])]
    assert merkle.consistency_path(leaves, 6, sha256) == hexes(
        """0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a
        ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0
        d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"""
    )
    assert merkle.consistency_path(leaves, 1, sha256)[0].hex().startswith("96a296d2")


@pytest.mark.parametrize("digest", [sha256, blake3_256])
@pytest.mark.parametrize("size", [*range(20), 31, 32, 33, 64, 65, 100])
def test_every_way_to_the_root_agrees(size, digest):
    hashes = [merkle.leaf_hash(bytes([n]), digest) for n in range(size)]
    root = naive(hashes, digest)
    frontier = merkle.Frontier(digest)
    for leaf in hashes:
        frontier.append(leaf)
    assert merkle.root(hashes, digest) == frontier.root() == root
    for index in range(size):
        path = merkle.inclusion_path(hashes, index, digest)
        assert merkle.root_from_path(hashes[index], index, size, path, digest) == root
        assert path == [naive(hashes[start:end], digest) for start, end in merkle.inclusion_ranges(index, size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 33])
def test_every_consistency_proof_holds_and_no_other_does(size):
    hashes = [merkle.leaf_hash(bytes([n]), sha256) for n in range(size)]
    new = naive(hashes, sha256)
    for old_size in range(size + 1):
        old, path = naive(hashes[:old_size], sha256), merkle.consistency_path(hashes, old_size, sha256)
        merkle.verify_consistency(old_size, old, size, new, path, sha256)
        forged = [(bytes(32), new, path), (old, new, [*path, bytes(32)])]
        forged += [(old, new, path[:-1]), (old, bytes(32), path)] if path else []
        forged += [(old, new, [*path[:n], bytes(32), *path[n + 1 :]]) for n in range(len(path))]
        for one, two, proof in forged:
            with pytest.raises(Malformed):
                merkle.verify_consistency(old_size, one, size, two, proof, sha256)


def test_a_log_that_shrank_is_consistent_with_nothing():
    with pytest.raises(Malformed):
        merkle.verify_consistency(3, bytes.fromhex(roots[3]), 2, bytes.fromhex(roots[2]), [], sha256)


@pytest.mark.parametrize(
    ("index", "size", "length"),
    [(0, 1, 1), (0, 2, 0), (0, 8, 2), (0, 8, 4), (6, 7, 3), (6, 7, 1), (8, 8, 3), (-1, 8, 3), (0, 0, 0), (5, 3, 2)],
)
def test_a_path_of_the_wrong_length_proves_nothing(index, size, length):
    with pytest.raises(Malformed):
        merkle.root_from_path(leaves[0], index, size, [bytes(32)] * length, sha256)


@pytest.mark.parametrize("bad", [b"", bytes(31), bytes(33)])
def test_a_path_of_things_that_are_no_hashes_is_malformed(bad):
    with pytest.raises(Malformed):
        merkle.root_from_path(leaves[0], 0, 2, [bad], sha256)
    with pytest.raises(Malformed):
        merkle.verify_consistency(1, leaves[0], 2, bytes.fromhex(roots[2]), [bad], sha256)


def test_a_leaf_cannot_pass_for_a_node():
    pair = leaves[0] + leaves[1]
    assert merkle.leaf_hash(pair, sha256) != merkle.node_hash(leaves[0], leaves[1], sha256)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_forged_path_never_leads_to_the_root(data):
    size = data.draw(st.integers(1, 300))
    hashes = [merkle.leaf_hash(n.to_bytes(2, "big"), sha256) for n in range(size)]
    root, index = merkle.root(hashes, sha256), data.draw(st.integers(0, size - 1))
    path = merkle.inclusion_path(hashes, index, sha256)
    leaf, at = data.draw(st.binary(min_size=32, max_size=32)), data.draw(st.integers(0, len(path)))
    forged = [*path[:at], leaf, *path[at + 1 :]] if at < len(path) else path
    start = hashes[index] if at < len(path) else leaf
    assert merkle.root_from_path(start, index, size, forged, sha256) != root or (start, forged) == (hashes[index], path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_proofs_of_huge_trees_are_short_and_made_of_subtrees(one, two):
    index, size = min(one, two), max(one, two) + 1
    ranges = merkle.inclusion_ranges(index, size)
    assert len(ranges) <= 41
    assert sum(end - start for start, end in ranges) == size - 1
    covered = [merkle.perfect_nodes(start, end) for start, end in ranges + merkle.consistency_ranges(index, size)]
    assert sum(map(len, covered)) <= 41 * 4


def test_a_copied_frontier_grows_on_its_own():
    frontier = merkle.Frontier(sha256)
    frontier.append(leaves[0])
    copy = frontier.copy()
    copy.append(leaves[1])
    assert (frontier.size, frontier.root().hex(), copy.root().hex()) == (1, roots[1], roots[2])


@pytest.mark.parametrize(
    "call", [lambda: merkle.inclusion_path(leaves, 8, sha256), lambda: merkle.Frontier(sha256, 3), lambda: merkle.perfect_nodes(1, 3)]
)
def test_what_no_tree_has_is_the_callers_mistake(call):
    with pytest.raises(ValueError, match=r".+"):
        call()


def test_the_leaf_prefix_is_zero():
    assert leaves[1] == hashlib.sha256(b"\x00\x00").digest()
