"""Nodes that go on in the successor of their log: entries copied, entries fetched, and what none of them takes."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.conftest import Consortium, key_named
from tests.storenode.conftest import Net

from medshard_protocol.entries import Freeze
from medshard_protocol.errors import Refused
from medshard_protocol.identity import public_key
from medshard_protocol.succession import Change, Successor, line_after
from storenode.ledger import Ledger
from storenode.succession import _copy_log

pytestmark = pytest.mark.filterwarnings("ignore::aiohttp.web.NotAppKeyWarning")


@dataclass
class Later(Net):
    """The successor's ledgers. Its nodes are those of the old log."""

    change: Change | None = None

    def open(self, number: int, **keywords: object) -> Ledger:
        folder, name = self.folder, self.roster.nodes[number].name
        assert self.change is not None
        _copy_log(folder / name, folder / "log-1" / name, self.change)
        self.folder = folder / "log-1"
        try:
            return super().open(number, line=[self.change.rosters[0]], **keywords)
        finally:
            self.folder = folder


@pytest.fixture
async def later(net: Net) -> AsyncIterator[Later]:
    """A log of 260 entries and more, ended; and its successor, not started."""
    await net.start(0, 1, 2, 3)
    await net.enrol()
    for _ in range(4):
        await net.ledgers[0].append([net.register() for _ in range(64)])
    await net.ledgers[0].append([net.consortium.entry(f"ca {number}", Freeze(bytes(32), b"f" * 16)) for number in (0, 1, 2)])
    size = net.ledgers[0].journal.head.size
    await net.until(lambda: all(net.published(number) == size for number in range(4)))
    note, checkpoint = net.ledgers[0].published.note, net.ledgers[0].published.checkpoint
    await net.stop(0, 1, 2, 3)
    roster = replace(net.roster, origin="consortium.example/log-2", before=line_after(net.roster, checkpoint))
    document = Successor(net.roster.to_bytes(), (), note, roster.to_bytes())
    for number in (0, 1, 2):
        document = document.signed(public_key(key_named(f"ca {number}")), key_named(f"ca {number}").sign)
    made = Later(Consortium(roster), net.folder, change=document.check())
    made._count = net._count
    (net.folder / "log-1").mkdir()
    try:
        yield made
    finally:
        await made.close()


async def test_nodes_go_on_at_the_place_where_the_old_log_ended(later: Later) -> None:
    await later.start(0, 1, 2, 3)
    size = later.change.checkpoint.size
    (inclusion,) = await later.ledgers[0].append([later.register()])
    assert inclusion.verify(later.roster)[0].size == size + 2
    old = (7).to_bytes(32, "big")
    await later.until(lambda: all(later.ledgers[number].inclusion_of(old) for number in range(4)))
    proof = later.ledgers[3].inclusion_of(old)
    assert proof.verify(later.roster)[0].size > size > proof.index
    assert all(later.ledgers[number].state == later.ledgers[0].state for number in range(4))


async def test_a_node_without_the_old_log_fetches_it(later: Later) -> None:
    shutil.rmtree(later.folder / "node3")
    await later.start(0, 1, 2, 3)
    await later.ledgers[0].append([later.register()])
    await later.until(lambda: later.published(3) == later.change.checkpoint.size + 2)
    assert later.ledgers[3].state == later.ledgers[0].state


async def test_a_sequencer_without_the_old_log_fetches_it_before_it_begins(later: Later) -> None:
    shutil.rmtree(later.folder / "node0")
    await later.start(0, 1, 2, 3)
    await later.until(lambda: later.published(1) > later.change.checkpoint.size)
    await later.ledgers[1].append([later.register()])


async def test_what_is_left_of_another_history_is_not_taken(later: Later) -> None:
    wrong = replace(later.change.checkpoint, root=bytes(32))
    with pytest.raises(Refused, match="another one"):
        _copy_log(later.folder / "node1", later.folder / "log-1" / "node1", later.change._replace(checkpoint=wrong))
    assert not (later.folder / "log-1" / "node1").exists()


async def test_a_mirror_refuses_other_entries_than_the_genesis_file_names(later: Later) -> None:
    wrong = replace(later.roster, before=(replace(later.roster.before[0], root=b"\x01" * 32),))
    later.roster, later.consortium = wrong, Consortium(wrong)
    shutil.rmtree(later.folder / "node3")
    await later.start(0, 1, 2)
    later.change = later.change._replace(genesis=wrong)
    await later.start(3)
    await later.ledgers[0].append([later.register()])
    end = later.change.checkpoint.size
    await later.until(lambda: any(number == 3 and push.old_size + len(push.entries) >= end for number, push in later.pushes))
    await later.ledgers[0].append([later.register()])
    assert later.ledgers[3].journal.head.size < end


def test_a_copy_that_broke_off_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / ".log-1.part").mkdir()
    _copy_log(tmp_path, tmp_path / "log-1", None)  # type: ignore[arg-type]
    assert not (tmp_path / "log-1").exists()
