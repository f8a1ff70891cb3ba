"""Founding: cards, the genesis file, codes, adopting, and the layout of a trial."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medshard_protocol.errors import Absent, Conflict, Malformed, MedshardError, Refused, Unavailable
from medshard_protocol.invite import Invite
from medshard_protocol.roster import Roster
from storenode import consortium
from storenode.config import Config
from storenode.consortium import free_ports, lay_out
from storenode.genesis import Card, Code, adopt, check_membership, default_code, found, load_genesis, parse_code
from storenode.identity import Institution, NodeKeys, create_institution, create_node


def member(home: Path, name: str, institution: Institution | None = None) -> tuple[Institution, NodeKeys, Card]:
    institution = institution or create_institution(name)
    keys = create_node(home, institution, sync=False)
    return institution, keys, Card.of(name, home.name, f"https://{home.name}.example:9700", 10**12, keys)


@pytest.fixture
def members(tmp_path: Path) -> list[tuple[Institution, NodeKeys, Card]]:
    return [member(tmp_path / f"node{number}", f"Institution {number}") for number in range(4)]


# -- cards


def test_a_card_comes_back_as_it_was_written(members: list[tuple[Institution, NodeKeys, Card]]) -> None:
    institution, _, card = members[0]
    assert Card.from_bytes(card.to_bytes(institution)) == card


def test_a_card_changed_on_the_way_is_malformed(members: list[tuple[Institution, NodeKeys, Card]]) -> None:
    institution, _, card = members[0]
    data = card.to_bytes(institution)
    for place in range(0, len(data), 11):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(Malformed):
            Card.from_bytes(bytes(changed))
    for end in range(0, len(data), 31):
        with pytest.raises(Malformed):
            Card.from_bytes(data[:end])


def test_a_card_signed_by_another_institution_is_malformed(members: list[tuple[Institution, NodeKeys, Card]]) -> None:
    with pytest.raises(Malformed, match="not signed"):
        Card.from_bytes(members[0][2].to_bytes(members[1][0]))


def test_the_fingerprint_tells_of_every_change(members: list[tuple[Institution, NodeKeys, Card]]) -> None:
    card, other = members[0][2], members[1][2]
    changes = [dataclasses.replace(card, **{f.name: getattr(other, f.name)}) for f in dataclasses.fields(card) if f.name != "capacity"]
    changes.append(dataclasses.replace(card, capacity=5))
    assert len({card.fingerprint, *(changed.fingerprint for changed in changes)}) == len(changes) + 1


# -- founding


def test_a_consortium_is_made_of_its_cards(members: list[tuple[Institution, NodeKeys, Card]]) -> None:
    roster = found([card for _, _, card in members], sequencer="node2")
    assert Roster.from_bytes(roster.to_bytes()) == roster
    assert roster.node(roster.sequencer).name == "node2"
    assert roster.log_key == members[2][2].log_key
    assert roster.code == (2, 4, 4)
    assert [node.institution for node in roster.nodes] == [0, 1, 2, 3]


def test_the_order_of_cards_does_not_name_the_ledger(members: list[tuple[Institution, NodeKeys, Card]]) -> None:
    cards = [card for _, _, card in members]
    assert found(cards, sequencer="node0").origin == found(cards[::-1], sequencer="node0").origin


def test_two_nodes_of_one_institution_have_one_voice(members: list[tuple[Institution, NodeKeys, Card]], tmp_path: Path) -> None:
    second = member(tmp_path / "node0-b", "Institution 0", members[0][0])
    roster = found([*(card for _, _, card in members), second[2]], sequencer="node0")
    assert len(roster.institutions) == 4
    assert [node.institution for node in roster.nodes] == [0, 1, 2, 3, 0]


def test_cards_that_make_no_roster_are_explained(members: list[tuple[Institution, NodeKeys, Card]], tmp_path: Path) -> None:
    cards = [card for _, _, card in members]
    attempts: list[tuple[list[Card], str, Code | None, type[MedshardError], str]] = [
        ([], "node0", None, Malformed, "at least one card"),
        (cards, "node9", None, Absent, "node9"),
        ([*cards, cards[0]], "node0", None, Conflict, "given twice"),
        ([dataclasses.replace(cards[0], node="Node Zero"), *cards[1:]], "node1", None, Malformed, "name"),
        ([cards[0], dataclasses.replace(cards[1], cosigner_key=cards[0].cosigner_key)], "node0", None, Malformed, "two roles"),
        ([cards[0], dataclasses.replace(cards[1], institution="Institution 0")], "node0", None, Malformed, "twice"),
        (cards, "node0", Code(3, 6, 5), Malformed, "6 shards"),
    ]
    for given, sequencer, code, error, message in attempts:
        with pytest.raises(error, match=message):
            found(given, sequencer=sequencer, code=code)
    renamed = member(tmp_path / "node0-b", "Another name", members[0][0])[2]
    with pytest.raises(Conflict, match="same CA key"):
        found([*cards, renamed], sequencer="node0")


@pytest.mark.parametrize("institutions", range(1, 65))
def test_every_default_code_can_be_used_and_leaves_nobody_enough_to_rebuild(institutions: int) -> None:
    k, n, w = default_code(institutions)
    assert 1 <= k <= w <= n <= institutions
    assert institutions < 3 or k > 1  # with a shard for each institution, one alone never has k
    assert institutions < 4 or n - k >= 2


def test_default_codes_are_the_profiles_of_the_design() -> None:
    assert [default_code(n) for n in (4, 6, 9, 16, 30)] == [(2, 4, 4), (3, 6, 5), (4, 9, 7), (8, 16, 12), (15, 30, 22)]


def test_a_code_is_read_with_or_without_w() -> None:
    assert parse_code("3/6") == (3, 6, 5)
    assert parse_code("10/16") == (10, 16, 13)
    assert parse_code("10/16/13") == (10, 16, 13)
    assert parse_code("1/1") == (1, 1, 1)
    for wrong in ("", "3", "6/3", "0/6", "3/6/2", "3/6/7", "3/256", "3/6/", "a/b", "3 of 6", "-3/6"):
        with pytest.raises(Malformed):
            parse_code(wrong)
    with pytest.raises(Malformed, match="K > N"):
        parse_code("6/3")


# -- adopting


def test_a_node_adopts_the_genesis_that_lists_it_once_and_for_all(
    members: list[tuple[Institution, NodeKeys, Card]], tmp_path: Path
) -> None:
    cards = [card for _, _, card in members]
    home, keys = tmp_path / "node0", members[0][1]
    roster = found(cards, sequencer="node0")
    with pytest.raises(Absent, match="no consortium yet"):
        load_genesis(home)
    adopt(home, roster.to_bytes(), keys)
    adopt(home, roster.to_bytes(), keys)
    assert load_genesis(home) == roster
    with pytest.raises(Conflict):
        adopt(home, found(cards[:2], sequencer="node0").to_bytes(), keys)
    assert load_genesis(home) == roster


def test_a_genesis_that_does_not_fit_the_nodes_keys_is_refused(members: list[tuple[Institution, NodeKeys, Card]]) -> None:
    cards, keys = [card for _, _, card in members], members[0][1]
    with pytest.raises(Refused, match="does not list this node"):
        check_membership(found(cards[1:], sequencer="node1"), keys)
    other = dataclasses.replace(cards[0], cosigner_key=members[0][2].log_key, log_key=members[0][2].cosigner_key)
    with pytest.raises(Refused, match="with other keys"):
        check_membership(found([other, *cards[1:]], sequencer="node1"), keys)
    roster = found(cards, sequencer="node0")
    with pytest.raises(Refused, match="lacks its log key"):
        check_membership(roster, dataclasses.replace(keys, log=None))
    with pytest.raises(Refused, match="another CA certificate"):
        check_membership(roster, dataclasses.replace(keys, ca_certificate=members[1][1].ca_certificate))
    assert check_membership(roster, keys).name == "node0"


def test_a_damaged_genesis_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "genesis.medshard").write_bytes(b"junk")
    with pytest.raises(Malformed, match="not a genesis file"):
        load_genesis(tmp_path)


# -- a trial on one machine


def test_a_trial_is_laid_out_whole(tmp_path: Path) -> None:
    layout = lay_out(tmp_path / "trial", 6, code=None, capacity=10**9)
    assert layout.created
    assert [node.name for node in layout.roster.nodes] == [
        "hospital-01",
        "insurer-02",
        "hospital-03",
        "insurer-04",
        "hospital-05",
        "insurer-06",
    ]
    for node in layout.roster.nodes:
        home = layout.home(node.name)
        config, keys = Config.load(home), NodeKeys.load(home)
        assert check_membership(load_genesis(home), keys) == node
        assert (config.url, config.capacity_bytes) == (node.url, 10**9)
        assert config.listen_address[0] == "127.0.0.1"
    assert load_genesis(layout.home("insurer-02")) == Roster.from_bytes(layout.genesis.read_bytes())
    code = Invite.from_code(consortium.invite_code(layout))
    assert (code.url, code.genesis_sha256) == (layout.roster.nodes[0].url, layout.roster.sha256)


def test_laying_out_again_changes_nothing_and_another_is_refused(tmp_path: Path) -> None:
    first = lay_out(tmp_path, 4, code=None, capacity=10**9)
    again = lay_out(tmp_path, 4, code=Code(2, 4, 4), capacity=10**9)
    assert not again.created
    assert again.roster == first.roster
    for institutions, code in ((5, None), (4, Code(3, 4, 4))):
        with pytest.raises(Conflict, match="holds a consortium of 4"):
            lay_out(tmp_path, institutions, code=code, capacity=10**9)


def test_an_interrupted_layout_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(consortium, "adopt", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lay_out(tmp_path, 2, code=None, capacity=10**9)
    assert not (tmp_path / "nodes").exists()
    assert lay_out(tmp_path, 2, code=None, capacity=10**9).created


def test_numbers_that_make_no_trial_are_refused(tmp_path: Path) -> None:
    for institutions in (0, -1, 65):
        with pytest.raises(Malformed):
            lay_out(tmp_path, institutions, code=None, capacity=10**9)
    assert list(tmp_path.iterdir()) == []


def test_ports_are_free_and_taken_ones_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(Unavailable, match=str(taken)):
            free_ports(1, taken)
    ports = free_ports(16)
    assert len(set(ports)) == 16
    with pytest.raises(Malformed):
        free_ports(2, 65535)


def test_trials_that_begin_at_once_get_different_ports(tmp_path: Path) -> None:
    program = "import random, sys; from storenode.consortium import free_ports; random.seed(1); print(*free_ports(16))"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    runs = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) for _ in range(4)]
    ports = [int(port) for run in runs for port in run.communicate()[0].split()]
    assert len(ports) == len(set(ports)) == 64


def test_promised_ports_run_out_and_a_damaged_or_foreign_file_of_them_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("random.randrange", lambda first, last: first)
    before = free_ports(1)
    assert free_ports(1) != before
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 3600)
    assert free_ports(1) == before
    file.write_bytes(b"\xff 7 x 99999999999999999999 -1\n" * 100)
    assert free_ports(1) == before
    file.unlink()
    file.mkdir()
    assert free_ports(1) == before
