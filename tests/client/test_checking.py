"""What a vault is told of its shards: a holder's word that it can check, the margin, audits and receipts in the word of who signed them."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
from tests.conftest import consortium_of, key_named

from medshard import checking
from medshard.checking import verify_target
from medshard.custody import Custody, Ended
from medshard_protocol import merkle
from medshard_protocol.audit import Report, Result, Verdict, sign_report
from medshard_protocol.ending import Receipt, sign_receipt
from medshard_protocol.entries import Type
from medshard_protocol.errors import Absent
from medshard_protocol.ids import FileId, NodeId, Sha256
from medshard_protocol.messages import SpanHead, pack_check
from medshard_protocol.roster import Node

cells, size, file_id = 3, 100, FileId(b"f" * 32)
roster = consortium_of(6).roster


class Holders:
    """Nodes 0 to 3 hold shards 0 to 3 of a file, 2 of 4; node 4 took shard 3 over."""

    institution_of = staticmethod(lambda node: "")
    roster = roster

    def __init__(self) -> None:
        self.shards = [[bytes([shard, cell]) * (size // 2) for cell in range(cells)] for shard in range(4)]
        self.lost, self.bad, self.changed, self.forger = {3}, set[int](), set[int](), -1

    def holder(self, node: NodeId) -> Node:
        return roster.node(node)

    def leaves(self, shard: int) -> list[bytes]:
        return [merkle.leaf_hash(hashlib.sha256(cell).digest(), sha256) for cell in self.shards[shard]]

    def target(self) -> Any:
        refs = [SimpleNamespace(node=roster.nodes[i].id, root=merkle.root(self.leaves(i), sha256)) for i in range(4)]
        layout = SimpleNamespace(k=2, n=4, stripes=cells, cell_length=lambda cell: size)
        return SimpleNamespace(sha256=b"", manifest=SimpleNamespace(file_id=file_id, shards=refs, layout=layout, digest="sha256"))

    async def call(self, node: Node, method: str, path: str, **_: object) -> bytes:
        number = roster.nodes.index(node)
        if path.startswith("/v1/audit"):
            results = (Result(0, roster.nodes[0].id, Verdict.GOOD, 1, 2, 1),)
            key = key_named(f"tls {5 if number == self.forger else number}")
            return sign_report(roster.origin, Report(file_id, node.id, 3, results), key.sign).to_bytes()
        shard = 3 if number == 4 else number
        if number in self.lost:
            raise Absent("it is not here")
        if path.endswith("/check"):
            return pack_check([1] if number in self.bad else [])
        cell = int(path.partition("cells=")[2].partition("-")[0])
        head = SpanHead(cell, 1, b"", (tuple(merkle.inclusion_path(self.leaves(shard), cell, sha256)),)).to_bytes()
        data = bytes(size) if number in self.changed else self.shards[shard][cell]
        return len(head).to_bytes(4, "big") + head + data


def sha256(data: bytes) -> Sha256:
    return Sha256(hashlib.sha256(data).digest())


@pytest.fixture
def holders(monkeypatch: pytest.MonkeyPatch) -> Holders:
    async def moved(*_: object) -> dict[int, NodeId]:
        return {3: roster.nodes[4].id}

    monkeypatch.setattr(checking, "moved", moved)
    return Holders()


async def states(holders: Holders) -> tuple[list[str], bool, int]:
    report = await verify_target(holders, holders.target())  # type: ignore[arg-type]
    return [each.state for each in report.holders], report.ok, report.margin


async def test_a_holder_proves_its_shard_by_cells_and_its_word_and_who_took_one_over_counts(holders: Holders) -> None:
    assert await states(holders) == (["proven"] * 4, True, 2)
    holders.bad, holders.changed = {0}, {1}  # one owns up, one does not
    assert await states(holders) == (["damaged", "damaged", "proven", "proven"], False, 0)
    holders.lost = {3, 4}
    assert await states(holders) == (["damaged", "damaged", "proven", "missing"], False, -1)


async def test_audits_are_those_that_present_holders_have_signed(holders: Holders) -> None:
    holders.forger = 1
    report = await verify_target(holders, holders.target())  # type: ignore[arg-type]
    assert [each.auditor for each in report.audits] == [roster.nodes[i].name for i in (0, 2, 4)]


# -- what was destroyed


@pytest.mark.parametrize(
    ("signer", "by", "of", "what", "counts"),
    [
        (1, 1, file_id, Type.ERASE, True),
        (2, 1, file_id, Type.ERASE, False),  # not signed by whom it names
        (2, 2, file_id, Type.ERASE, False),  # another node's
        (1, 1, FileId(b"x" * 32), Type.ERASE, False),
        (1, 1, file_id, Type.RETIRE, False),  # of less than was asked for
    ],
)
async def test_a_receipt_counts_if_its_holder_signed_it_for_this_file_and_this_end(
    signer: int, by: int, of: FileId, what: Type, counts: bool
) -> None:
    nodes = roster.nodes
    receipt = sign_receipt(roster.origin, Receipt(of, 7, what, nodes[by].id, 0, 1, 3, b""), key_named(f"tls {signer}").sign)

    async def call(*_: object, **__: object) -> bytes:
        return receipt.to_bytes()

    custody: Any = SimpleNamespace(_net=SimpleNamespace(roster=roster, call=call))
    inclusion: Any = None
    note = Ended(file_id, Type.ERASE, inclusion, (), (), (nodes[1].id,))
    told = await Custody._collected(custody, note, 0.0)
    assert (told.receipts, told.missing) == (((receipt,), ()) if counts else ((), (nodes[1].id,)))
