"""Other bytes in a node's ledger and in the state it folded from it: what it says of files and rights stays right, or is an error.

Law: an entry or a tile that a disk changed may be served, since whoever asks checks it against the cosigned root; then the check must fail.
What the node decides by, nobody else checks: it must not change.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.chaos.rot import Target, damaged, places_of
from tests.storenode.conftest import Net

from medshard_protocol import merkle
from medshard_protocol.entries import Entry, Register
from medshard_protocol.errors import MedshardError
from medshard_protocol.ids import FileId
from medshard_protocol.merkle import sha256
from medshard_protocol.roster import Roster
from storenode.ledger.journal import Journal

entries_count = 600  # two full tiles and a part


@dataclass(frozen=True)
class Log:
    """A node's folder, closed, and what it said before the damage."""

    folder: Path
    roster: Roster
    entries: tuple[bytes, ...]
    root: bytes
    facts: dict[FileId, object]


@pytest.fixture
async def log(consortium: Callable[..., object], tmp_path: Path) -> Log:
    net = Net(consortium(4), tmp_path)
    await net.start(0, 1, 2, 3)
    await net.enrol()
    made: list[Entry] = [net.register() for _ in range(entries_count)]
    for start in range(0, entries_count, 200):
        await net.ledgers[0].append(made[start : start + 200])
    await net.until(lambda: net.ledgers[1].journal.head.size == net.ledgers[0].journal.head.size > entries_count, 20)
    await net.close()
    folder = tmp_path / net.roster.nodes[1].name
    journal = Journal(folder, net.roster)
    await journal.start()
    size = journal.head.size
    entries = tuple(journal.entries(0, size))
    files = [entry.body.file_id for entry in made if isinstance(entry.body, Register)]
    facts = {file_id: journal.state.registration(file_id) for file_id in files}
    assert all(facts.values())
    root = journal.head.root
    await journal.close()
    return Log(folder, net.roster, entries, root, facts)


async def ask_everything(log: Log) -> str:
    """Start a node's ledger and ask it; "right", or how the damage was found. Fails where the node would decide wrongly."""
    try:
        journal = Journal(log.folder, log.roster)
    except MedshardError:
        return "found at the start"
    try:
        try:
            await journal.start()
            if journal.folding.verifying is not None:
                await journal.folding.verifying
            for file_id, fact in log.facts.items():
                assert journal.state.registration(file_id) == fact, "the state is wrong, and the node does not know"
        except MedshardError:
            return "found when asked"
        found = "right"
        for place in range(0, len(log.entries), 7):
            try:
                entry = journal.entries(place, place + 1)
                path = journal.tree.inclusion_path(place, len(log.entries))
                leaf = merkle.leaf_hash(entry[0], sha256)
                proved = merkle.root_from_path(leaf, place, len(log.entries), path, sha256) == log.root
            except MedshardError:
                proved = False
            if not proved:
                found = "found by who asks"
            else:
                assert entry[0] == log.entries[place]
        return found
    finally:
        with suppress(MedshardError):
            await journal.close()


async def damage(log: Log, times: int, seed: int) -> Counter[str]:
    draw, told = random.Random(seed), Counter[str]()
    path = log.folder / "ledger.sqlite"
    tile = b"".join(merkle.leaf_hash(entry, sha256) for entry in log.entries[:256])
    kinds: dict[str, Callable[[], list[Target]]] = {
        "entry": lambda: places_of("entry", path, list(log.entries)),
        "tile": lambda: places_of("tile", path, [tile]),
        "ledger": lambda: [Target("ledger", path)],
        "state": lambda: [Target("state", log.folder / "state.sqlite")],
    }
    for _ in range(times):
        before = log.folder.with_name("before")
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(log.folder, before)
        if draw.random() < 0.5:  # the node must fold anew, from what is on its disk
            (log.folder / "state.sqlite").write_bytes(b"")
        name = draw.choice(sorted(kinds))
        target = draw.choice(kinds[name]())
        if target.path.stat().st_size:
            with damaged(draw, target) as what:
                try:
                    told[f"{name}, {await ask_everything(log)}"] += 1
                except BaseException as error:
                    error.add_note(what)
                    raise
        shutil.rmtree(log.folder)
        before.rename(log.folder)
    assert await ask_everything(log) == "right"
    return told


async def test_rot_in_the_ledger_never_changes_what_the_node_decides(log: Log) -> None:
    print(dict(await damage(log, 20, seed=1)))


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_rot_in_the_ledger_sixteen_hundred_times(log: Log) -> None:
    print(dict(sorted((await damage(log, 1600, seed=2)).items())))
