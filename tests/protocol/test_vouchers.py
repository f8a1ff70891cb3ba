"""What one cosigner vouches for to one other node: told apart from everything else, and never more than the signatures say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medshard_protocol.checkpoint import Note, Signature, cosigned_by, cosigner_lines
from medshard_protocol.errors import Malformed
from medshard_protocol.ids import NodeId
from medshard_protocol.vouchers import Voucher, for_reader, header_chars_max, nodes_max, pack_vouchers, unpack_vouchers, voucher_size

Consortium = Callable[..., Any]


class Four:
    """Four nodes that have cosigned one head, and what they gave with it."""

    def __init__(self, made: Any, cosigners: tuple[int, ...] = (0, 1, 2)) -> None:
        self.made, self.roster = made, made.roster
        self.note: Note = made.note(made.checkpoint([b"entry"]), cosigners)
        self.rows = {node: self.of(node).row(self.roster, self.note.text, line) for node, _, line in cosigner_lines(self.note, self.roster)}

    def number(self, node: NodeId) -> int:
        return [each.id for each in self.roster.nodes].index(node)

    def of(self, node: NodeId) -> Voucher:
        key = self.made.key(f"cosigner {self.number(node)}")
        return Voucher(key.private_bytes_raw(), key.public_key().public_bytes_raw())

    def shown_to(self, number: int) -> list[bytes]:
        return for_reader(self.rows, cosigned_by(self.note, self.roster), self.roster, self.roster.nodes[number].id)

    def who(self, number: int, vouchers: list[bytes], note: Note | None = None) -> list[int]:
        return sorted(map(self.number, self.of(self.roster.nodes[number].id).who(self.roster, note or self.note, vouchers)))


@pytest.fixture
def four(consortium: Consortium) -> Four:
    return Four(consortium(4))


def test_every_node_believes_its_own_vouchers_and_nobody_elses(four: Four) -> None:
    for reader in range(4):
        assert four.who(reader, four.shown_to(reader)) == [0, 1, 2]
        for other in set(range(4)) - {reader}:
            assert four.who(reader, four.shown_to(other)) == [reader] * (reader < 3)


def test_a_voucher_is_for_one_text_one_time_and_one_signature(four: Four) -> None:
    vouchers = four.shown_to(3)
    log, *lines = four.note.signatures
    assert four.who(3, vouchers, replace(four.note, text=four.note.text.replace("\n1\n", "\n2\n"))) == []
    for changed in range(3):
        for at in (0, 7, 8, 71):
            value = bytearray(lines[changed].value)
            value[at] ^= 1
            spoilt = [replace(line, value=bytes(value)) if n == changed else line for n, line in enumerate(lines)]
            assert four.who(3, vouchers, Note(four.note.text, (log, *spoilt))) == [n for n in range(3) if n != changed]
    assert four.who(3, vouchers, Note(four.note.text, (log, lines[1], lines[0], lines[2]))) == [2]


def test_every_flipped_bit_of_a_voucher_costs_that_voice(four: Four) -> None:
    vouchers = four.shown_to(3)
    for bit in range(8 * voucher_size):
        spoilt = bytearray(vouchers[1])
        spoilt[bit // 8] ^= 1 << bit % 8
        assert four.who(3, [vouchers[0], bytes(spoilt), vouchers[2]]) == [0, 2]
    assert four.who(3, [bytes(voucher_size)] * 3) == []
    assert four.who(3, vouchers[:1]) == [0]
    assert four.who(3, []) == []


def test_what_a_node_vouches_for_to_itself_is_nothing_and_its_own_signature_is_checked(four: Four) -> None:
    assert four.shown_to(1)[1] == bytes(voucher_size)
    log, *lines = four.note.signatures
    forged = replace(lines[1], value=lines[1].value[:-1] + bytes([lines[1].value[-1] ^ 1]))
    assert four.who(1, four.shown_to(1), Note(four.note.text, (log, lines[0], forged, lines[2]))) == [0, 2]


def test_a_row_of_another_rosters_length_is_no_voucher(four: Four) -> None:
    first = four.roster.nodes[0].id
    four.rows[first] = four.rows[first][:-voucher_size]
    assert four.who(3, four.shown_to(3)) == [1, 2]
    assert for_reader({first: b""}, [first], four.roster, four.roster.nodes[3].id) == []
    assert for_reader(four.rows, list(four.rows), four.roster, NodeId(bytes(16))) == []


def test_a_cosigner_key_of_small_order_is_vouched_to_by_nobody(four: Four) -> None:
    nodes = (*four.roster.nodes[:3], replace(four.roster.nodes[3], cosigner_key=bytes([1]) + bytes(31)))
    row = four.of(four.roster.nodes[0].id).row(replace(four.roster, nodes=nodes), four.note.text, four.note.signatures[1])
    assert row[3 * voucher_size :] == bytes(voucher_size)
    assert row[voucher_size : 2 * voucher_size] == four.shown_to(1)[0]


def test_a_large_consortium_does_without(four: Four) -> None:
    many = replace(four.roster, nodes=four.roster.nodes[:1] * (nodes_max + 1))
    assert four.of(four.roster.nodes[0].id).row(many, "text", Signature("name", b"key!", bytes(72))) == b""


def test_the_header_takes_vouchers_there_and_back_and_nothing_else(four: Four) -> None:
    vouchers = four.shown_to(3)
    assert unpack_vouchers(pack_vouchers(vouchers)) == vouchers
    assert len(pack_vouchers([bytes(voucher_size)] * nodes_max)) <= header_chars_max
    assert pack_vouchers([bytes(voucher_size)] * (nodes_max + 1)) == ""
    for text in ("", "A", "A" * 20, "+" * 64, pack_vouchers(vouchers) + "=", "A" * (header_chars_max + 4)):
        with pytest.raises(Malformed):
            unpack_vouchers(text)


def test_the_vouchers_of_the_vectors_are_those_that_another_implementation_made() -> None:
    from medshard_protocol.proofs import unpack_append, unpack_appended
    from medshard_protocol.roster import Roster

    vectors = json.loads((Path(__file__).parents[1] / "vectors" / "ledger.json").read_text())
    roster = Roster.from_bytes(bytes.fromhex(vectors["roster"]["bytes"]))
    message = {name: bytes.fromhex(text) for name, text in vectors["messages"].items()}
    rows = unpack_appended(message["appended"], unpack_append(message["append"])).vouchers
    note = Note.from_bytes(vectors["checkpoint"].encode())
    assert len(rows) == 3
    for number, (node, verifier, line) in enumerate(cosigner_lines(note, roster)):
        key = vectors["keys"][f"cosigner {number}"]
        voucher = Voucher(bytes.fromhex(key["seed"]), bytes.fromhex(key["public"]))
        assert voucher.public == verifier.key
        assert voucher.row(roster, note.text, line) == rows[node]
