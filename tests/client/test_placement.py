"""Placement: who holds which shard. Nobody twice, no institution enough to rebuild, larger nodes more often, little moved by a change."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medshard.placement import order, place
from medshard_protocol.errors import Unavailable
from medshard_protocol.ids import FileId, Key, NodeId, node_id_of
from medshard_protocol.roster import Institution, Node, Roster


def file_number(number: int) -> FileId:
    return FileId(hashlib.sha256(b"file %d" % number).digest())


def roster(shape: Sequence[int], capacities: Sequence[int] | None = None) -> Roster:
    """``shape[i]`` nodes for institution i. Placement reads only ids, institutions and capacities."""
    owners = [institution for institution, count in enumerate(shape) for _ in range(count)]
    nodes = []
    for number, institution in enumerate(owners):
        key = Key(hashlib.sha256(b"node %d" % number).digest())
        capacity = capacities[number] if capacities else 10**12
        nodes.append(Node(node_id_of(key), f"node{number}", institution, f"https://127.0.0.1:{number + 1}", capacity, key, key))
    institutions = tuple(Institution(f"Institution {i}", b"", Key(bytes(32))) for i in range(len(shape)))
    return Roster("test.example/log", nodes[0].id, institutions, tuple(nodes), (1, 1, 1))


def without(whole: Roster, node: NodeId) -> Roster:
    return replace(whole, nodes=tuple(other for other in whole.nodes if other.id != node))


def held(whole: Roster, chosen: Sequence[NodeId]) -> Counter[int]:
    return Counter(whole.node(node).institution for node in chosen)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 10), st.integers(0, 10), st.integers(0, 10**6))
def test_no_node_holds_two_shards_and_no_institution_k(shape: list[int], k: int, more: int, number: int) -> None:
    whole, n = roster(shape), k + more
    room = sum(min(count, max(k - 1, 1)) for count in shape)
    if room < n:
        with pytest.raises(Unavailable, match=f"room for {room} of the {n} shards") as caught:
            place(file_number(number), whole, k, n)
        assert caught.value.hint
        return
    chosen = place(file_number(number), whole, k, n)
    assert len(chosen) == len(set(chosen)) == n
    assert max(held(whole, chosen).values()) < max(k, 2)


@pytest.mark.parametrize(("k", "n"), [(2, 4), (3, 6), (10, 16)])
def test_shards_go_to_as_many_institutions_as_there_are(k: int, n: int) -> None:
    """w acknowledgements must come from distinct institutions, so none is left out while another gets two."""
    whole = roster([4] * 8)
    for number in range(50):
        counts = held(whole, place(file_number(number), whole, k, n))
        assert len(counts) == min(n, 8)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_everybody_computes_the_same_places_whatever_the_order_of_the_roster() -> None:
    whole = roster([2, 2, 2])
    shuffled = replace(whole, nodes=whole.nodes[::-1])
    for number in range(20):
        assert place(file_number(number), whole, 3, 5) == place(file_number(number), shuffled, 3, 5)
    assert len({place(file_number(number), whole, 3, 5) for number in range(20)}) > 10


def test_places_do_not_change_by_accident() -> None:
    whole = roster([1] * 6)
    names = {node.id: node.name for node in whole.nodes}
    assert [names[node] for node in place(FileId(bytes(32)), whole, 3, 6)] == ["node0", "node3", "node4", "node5", "node1", "node2"]


def test_the_first_choice_falls_on_a_node_in_proportion_to_its_capacity() -> None:
    capacities = [1, 2, 3, 4, 10]
    whole, files = roster([1] * 5, capacities), 4000
    first = Counter(order(file_number(number), whole)[0].name for number in range(files))
    for number, capacity in enumerate(capacities):
        expected = files * capacity / sum(capacities)
        assert abs(first[f"node{number}"] - expected) < 4 * expected**0.5  # four standard deviations, and the files are fixed


def test_a_node_without_capacity_is_last() -> None:
    whole = roster([1] * 4, [10**12, 10**12, 0, 10**12])
    assert {order(file_number(number), whole)[-1].name for number in range(200)} == {"node2"}


def test_equal_nodes_share_the_load_evenly() -> None:
    whole, files = roster([2] * 6), 1000
    load = Counter(node for number in range(files) for node in place(file_number(number), whole, 3, 6))
    assert all(abs(load[node.id] - files / 2) < 5 * (files / 4) ** 0.5 for node in whole.nodes)


@pytest.mark.parametrize("shape", [[1] * 9, [3, 3, 3], [4, 2, 1, 1, 1]])
def test_a_node_that_leaves_moves_nothing_but_its_own_shard(shape: list[int]) -> None:
    whole = roster(shape)
    for number in range(60):
        before = set(place(file_number(number), whole, 4, 6))
        for gone in whole.nodes:
            after = set(place(file_number(number), without(whole, gone.id), 4, 6))
            assert before - after == before & {gone.id}


def test_a_node_that_comes_takes_its_share_and_no_more() -> None:
    larger = roster([1] * 10)
    newcomer = larger.nodes[-1].id
    smaller = replace(without(larger, newcomer), institutions=larger.institutions)
    taken = 0
    for number in range(500):
        before, after = (set(place(file_number(number), whole, 3, 6)) for whole in (smaller, larger))
        assert after - before <= {newcomer}
        taken += newcomer in after
    assert abs(taken - 300) < 5 * (500 * 0.6 * 0.4) ** 0.5  # six shards for ten nodes
