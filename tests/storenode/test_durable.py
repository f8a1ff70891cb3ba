"""What a killed process left in a database's log is synced before anybody hears of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medshard_protocol.ids import FileId, Key
from storenode.ledger.store import Store
from storenode.shardstore import ShardStore

opened: dict[str, Callable[[Path], Any]] = {
    "store.sqlite": lambda folder: ShardStore(folder, capacity=1_000_000),
    "ledger.sqlite": lambda folder: Store(folder, "consortium.example", bytes(32)),
}


@pytest.mark.parametrize("name", opened)
async def test_what_a_killed_process_wrote_is_synced_before_it_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "before").mkdir()
    before = opened[name](tmp_path / "before")
    if isinstance(before, ShardStore):
        incoming = before.begin(1000, 1000)
        incoming.write([bytes(1000)])
        await before.commit(incoming, FileId(bytes(32)), 0, Key(bytes(32)))
    left = tmp_path / "left"
    shutil.copytree(tmp_path / "before", left)  # as a kill leaves it: the log has not been brought into the database
    before.close()
    assert (left / f"{name}-wal").stat().st_size > 0
    synced, fsync = [], os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    opened[name](left).close()
    assert str((left / f"{name}-wal").resolve()) in synced
