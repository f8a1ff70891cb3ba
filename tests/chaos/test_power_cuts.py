"""The power goes at any moment: what was acknowledged is there after booting, and nothing is half there.

All nodes lie on one ext4, so they all lose their power at once, as in a fire of one machine room; the client does not. A single node with
code 1/1 hides nothing behind other copies; four nodes show that the ledger of the consortium stands up again too. The negative control
runs the same nodes with an fsync that does nothing, and loses files: so the cuts do bite.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.chaos.disks import LoopDisk, loop_disk
from tests.chaos.workload import Workload, stop

from medshard.consortium import LocalConsortium
from medshard_protocol.errors import MedshardError

disk_bytes = 4 << 30  # a sparse file
longest_s = 0.6  # of work before a cut
at_once = 0.3  # of the cuts come while nodes begin: four of them take a second or two to agree on who orders the ledger
begun_wait_s = 60.0

no_fsync = """
int fsync(int descriptor) { return 0; }
int fdatasync(int descriptor) { return 0; }
void sync(void) { }
int msync(void *address, unsigned long length, int flags) { return 0; }
"""


async def cut_once(trial: LocalConsortium, disk: LoopDisk, work: Workload) -> list[bytes]:
    """Cut the power while files are being put, boot again; which files had been acknowledged in between."""
    before = set(work.acknowledged)
    task = asyncio.create_task(work.run())
    if work.draw.random() >= at_once:
        async with asyncio.timeout(begun_wait_s):
            while len(work.acknowledged) == len(before) and not task.done():
                await asyncio.sleep(0.02)
    await asyncio.sleep(0.1 + work.draw.random() * longest_s)
    disk.cut()
    for process in trial.running.values():
        process.kill()
        process.wait()
    disk.power_on()
    list(trial.ended())
    await stop(task)
    for name in trial.names:
        await asyncio.to_thread(trial.restart, name)
    return [digest for digest in work.acknowledged if digest not in before]  # some answers were still under way


@contextmanager
def on_disk(trial: LocalConsortium, disk: LoopDisk) -> Iterator[None]:
    """Let the data folder of every node of a consortium that has not started yet lie on ``disk``."""
    trial._make()
    for name in trial.names:
        (disk.folder / name).mkdir()
        assert not (trial.home(name) / "data").exists()
        (trial.home(name) / "data").symlink_to(disk.folder / name)
    yield


async def cut_often(folder: Path, institutions: int, code: tuple[int, int], cuts: int, seed: int) -> int:
    """Cut ``cuts`` times; everything acknowledged comes back each time, and at the end all of it. How many files that were."""
    files = folder / "files"
    files.mkdir()
    trial = LocalConsortium(folder / "trial", institutions=institutions, code=code)
    with loop_disk(folder, disk_bytes) as disk, on_disk(trial, disk), trial:
        work = Workload(trial, files, random.Random(seed))
        disk.sync()  # an old node: only what comes now is in question
        for _ in range(cuts):
            acknowledged = await cut_once(trial, disk, work)
            async with work.open() as vault:
                await work.check(vault, acknowledged)
        async with work.open() as vault:
            assert await work.check(vault) > 0
            await work.put(vault, work.make())  # and it still takes files
    print(f"{cuts} cuts, {len(work.acknowledged)} files acknowledged, {work.refused} refused, lost: 0")
    return len(work.acknowledged)


async def test_what_was_acknowledged_survives_power_cuts(tmp_path: Path) -> None:
    assert await cut_often(tmp_path, 1, (1, 1), cuts=3, seed=1) > 1  # a slow machine acknowledges little in between


def test_without_fsync_a_power_cut_does_lose_what_was_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the test above would notice."""
    if shutil.which("cc") is None:
        pytest.skip("the control needs a C compiler")
    library = tmp_path / "no_fsync.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(library)], input=no_fsync.encode(), check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    with pytest.raises((AssertionError, MedshardError), match=r"LOST|ended at once") as caught:
        asyncio.run(cut_often(tmp_path, 1, (1, 1), cuts=3, seed=1))
    print(caught.value)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("institutions", "code", "cuts"), [(1, (1, 1), 150), (4, (2, 4), 50)])
async def test_what_was_acknowledged_survives_two_hundred_power_cuts(
    tmp_path: Path, institutions: int, code: tuple[int, int], cuts: int
) -> None:
    assert await cut_often(tmp_path, institutions, code, cuts, seed=2) > cuts
