"""A node whose disk is full to the last byte: catalog, manifests and ledger cannot be written, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from tests.chaos.callers import Door
from tests.chaos.disks import small_disk
from tests.chaos.workload import Workload

from medshard.consortium import LocalConsortium
from medshard_protocol.errors import MedshardError

mib = 1024 * 1024


def fill(folder: Path, leave: int) -> None:
    """Take all room but ``leave`` bytes."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(mib))
        except OSError:
            file.truncate(max(0, file.tell() - leave))


async def test_a_disk_that_is_full_to_the_last_byte_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    trial = LocalConsortium(tmp_path / "trial", institutions=1, code=(1, 1))
    trial._make()
    name = trial.names[0]
    with small_disk(trial.home(name) / "data", 160 * mib) as disk, trial:
        work, door = Workload(trial, tmp_path / "files", random.Random(1)), Door(trial, name)
        async with work.open() as vault:
            for _ in range(3):
                await work.put(vault, work.make())
            for leave in (0, 8192, 65536):  # nothing; some pages of one database; a commit or two
                fill(disk, leave)
                path, count = work.make(), len(work.acknowledged)
                with pytest.raises((MedshardError, TimeoutError)):
                    async with asyncio.timeout(8):
                        await work.put(vault, path)
                assert len(work.acknowledged) == count
                assert trial.running[name].poll() is None
                (disk / "ballast").unlink()
                await asyncio.sleep(0.3)
                async with work.open() as fresh:
                    await work.put(fresh, path)
                    await work.check(fresh)
        trial.kill(name)
        await asyncio.to_thread(trial.restart, name)
        async with work.open() as vault:
            assert await work.check(vault) == 6
        assert [line for line in door.complaints() if "Traceback" in line] == []


@pytest.mark.soak
async def test_a_ledger_on_a_full_disk_takes_nothing_and_goes_on_with_room(tmp_path: Path) -> None:
    """All four mirrors' disks are full while entries come: none is acknowledged that is not on them afterwards."""
    (tmp_path / "files").mkdir()
    trial = LocalConsortium(tmp_path / "trial", institutions=4, code=(2, 4))
    trial._make()
    with small_disk(tmp_path / "disk", 400 * mib) as disk:
        for name in trial.names:
            (disk / name).mkdir()
            (trial.home(name) / "data").symlink_to(disk / name)
        with trial:
            work = Workload(trial, tmp_path / "files", random.Random(2))
            task = asyncio.create_task(work.run())
            for _ in range(3):
                await asyncio.sleep(0.4)
                fill(disk, 0)
                await asyncio.sleep(0.4)
                (disk / "ballast").unlink()
            await asyncio.sleep(1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert all(process.poll() is None for process in trial.running.values())
            for name in trial.names:
                trial.kill(name)
            for name in trial.names:
                await asyncio.to_thread(trial.restart, name)
            async with work.open() as vault:
                assert await work.check(vault) > 0
