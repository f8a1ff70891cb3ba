"""A drop folder: what is put into it is sent once it is whole, and leaves it only when it is stored. The store is this test's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from medshard import sender
from medshard.model import Problem, PutReport, StoredFile
from medshard.packs import Plan
from medshard.sender import Sender, SenderKeys
from medshard.source import hash_file
from medshard_protocol.errors import Unavailable
from medshard_protocol.ids import Key


class Store:
    """Takes units, or does not; notes what was granted."""

    def __init__(self) -> None:
        self.shares = self
        self.refused: set[str] = set()
        self.is_down = False
        self.tries = 0
        self.names: list[str] = []
        self.granted: list[bytes] = []
        self.while_storing: Callable[[], object] = lambda: None

    async def store(self, planned: Plan, _progress: object = None) -> PutReport:
        self.tries += 1
        if self.is_down:
            raise Unavailable("too few nodes")
        parts = [part for unit in planned.units for part in unit.parts]
        good = [part for part in parts if part.path.name not in self.refused]
        stored = [StoredFile(part.path, hash_file(part.path), part.size, os.urandom(32), 1, already=False) for part in good]
        self.while_storing()
        self.names += [os.fsdecode(part.name) for part in good]
        bad = [Problem(part.path, "not today", stored=False) for part in parts if part not in good]
        return PutReport(tuple(stored), tuple(bad))

    async def share_objects(self, file_ids: list[bytes], reader: Key) -> None:
        assert reader == b"v" * 32
        self.granted += file_ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "drop"
    (made / "room 3").mkdir(parents=True)
    return made


@contextlib.asynccontextmanager
async def watching(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> AsyncIterator[list[PutReport]]:
    monkeypatch.setattr(sender, "settle_s", 0.01)
    monkeypatch.setattr(sender, "again_s", 0.02)
    told: list[PutReport] = []
    keys = SenderKeys(b"s" * 32, Key(b"v" * 32), bytes(1216))
    task = asyncio.create_task(Sender(keys, lambda: contextlib.nullcontext(cast(Any, store))).watch(folder, told.append, **more))
    try:
        yield told
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.005)


async def test_what_was_stored_leaves_the_folder_and_is_granted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, keep = Store(), tmp_path / "sent"
    (folder / "one").write_bytes(b"1")
    (folder / "room 3" / "two").write_bytes(b"2")
    (folder / ".partial").write_bytes(b"3")
    async with watching(store, folder, monkeypatch, keep=keep) as told:
        await until(lambda: (keep / "room 3" / "two").exists() and (keep / "one").exists())
        assert sorted(store.names) == ["drop/one", "drop/room 3/two"]
        assert len(store.granted) == 2
        assert (folder / ".partial").exists()
        await until(lambda: sum(len(report.stored) for report in told) == 2)
    assert (keep / "one").read_bytes() == b"1"


async def test_what_was_not_stored_stays_and_is_tried_again_when_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    store.refused.add("bad")
    (folder / "bad").write_bytes(b"1")
    async with watching(store, folder, monkeypatch) as told:
        await until(lambda: bool(told))
        tries = store.tries
        (folder / "good").write_bytes(b"2")
        await until(lambda: not (folder / "good").exists())
        assert (folder / "bad").exists()
        assert store.tries == tries + 1  # the bad one was not sent over and over
        store.refused.clear()
        (folder / "bad").write_bytes(b"longer")
        await until(lambda: not (folder / "bad").exists())


async def test_while_the_nodes_are_down_nothing_is_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    store.is_down = True
    (folder / "one").write_bytes(b"1")
    async with watching(store, folder, monkeypatch) as told:
        await until(lambda: store.tries > 2)
        assert (folder / "one").exists()
        assert told[0].problems[0].message == "too few nodes"
        store.is_down = False
        await until(lambda: not (folder / "one").exists())


async def test_a_file_that_changes_while_it_is_stored_is_sent_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    (folder / "one").write_bytes(b"1")
    store.while_storing = lambda: store.tries > 1 or (folder / "one").write_bytes(b"changed")
    async with watching(store, folder, monkeypatch):
        await until(lambda: not (folder / "one").exists())
    assert store.tries == 2
