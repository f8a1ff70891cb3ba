"""One upload to a node, and a fault at every system call by which the node makes it durable: the process dies, the disk fails or is full.

After each: whatever was acknowledged is restored from a restarted node; every shard there is whole or not there; the same put again
finishes. A short write is made by a limit on the size of files, since strace can only pretend one; a pretended write is a lying disk, and
then a reader must find it.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.chaos.tracing import Call, calls_in, injected, kinds, traced
from tests.chaos.workload import Workload

from medshard.consortium import LocalConsortium
from medshard_protocol.errors import Damaged, MedshardError
from storenode.shardstore import ShardStore

faults = ("signal=KILL", "error=EIO", "error=ENOSPC")
large, small = 300_000, 3_000  # a shard in a file of its own, and one inside the catalog
patience_s = 6.0  # a put that meets a dead node gives up by itself, or is cut off here


class Bench:
    """One node, alone in its consortium, so that no other copy hides what it lost."""

    def __init__(self, folder: Path) -> None:
        self.trial = LocalConsortium(folder / "trial", institutions=1, code=(1, 1))
        self.folder = folder
        self.met = 0  # how many faults did happen
        (folder / "files").mkdir()
        self.work = Workload(self.trial, folder / "files", random.Random(1))

    @property
    def name(self) -> str:
        return self.trial.names[0]

    @property
    def data(self) -> Path:
        return self.trial.home(self.name) / "data"

    async def put(self, *paths: Path) -> set[Path]:
        """Put files; which were acknowledged."""
        done: set[Path] = set()
        async with self.work.open() as vault:
            with suppress(MedshardError, TimeoutError):
                async with asyncio.timeout(patience_s):
                    for path in paths:
                        await self.work.put(vault, path)
                        done.add(path)
        return done

    async def restore(self, paths: set[Path]) -> None:
        async with self.work.open() as vault:
            assert await self.work.check(vault, [each for each, path in self.work.acknowledged.items() if path in paths]) == len(paths)

    async def reboot(self) -> None:
        """Kill the node if it lives, look at its store, and start it again."""
        process = self.trial.running.get(self.name)
        if process is not None:
            process.kill()
            process.wait()
            list(self.trial.ended())
        store = ShardStore(self.data, capacity=1 << 40)  # as the node opens it
        try:
            for (file_id,) in store.catalog.all("SELECT file_id FROM shards"):
                shard = store.shard(file_id)
                assert shard is not None
                assert store.bad_cells(shard) == []
            assert list((self.data / "tmp").iterdir()) == []
        finally:
            store.close()
        await asyncio.to_thread(self.trial.restart, self.name)

    def files(self) -> tuple[Path, Path]:
        made = self.work.make(), self.work.make()
        for path, size in zip(made, (large, small), strict=True):
            path.write_bytes(os.urandom(size))
        return made

    async def meets(self, call: Call, fault: str) -> set[Path]:
        """Put a large and a small file while ``call`` meets ``fault``; then boot, restore, and finish. What was acknowledged at once."""
        paths = self.files()
        with injected(self.trial.pid(self.name), call, fault, self.folder / "strace"):
            done = await self.put(*paths)
        log = (self.folder / "strace").read_text()
        self.met += "(INJECTED)" in log or "killed by SIGKILL" in log
        if "KILL" not in fault:
            assert self.trial.running[self.name].poll() is None, "the node ended"
        await self.reboot()
        await self.restore(done)
        assert await self.put(*paths) == set(paths)
        await self.restore(set(paths))
        return done


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("crash"))
    with made.trial:
        asyncio.run(made.put(*made.files()))
        yield made


async def every_call(bench: Bench) -> list[Call]:
    """What one upload of a large and a small file does on the node's disk."""
    log = bench.folder / "calls"
    with traced(bench.trial.pid(bench.name), ["-y", "-s", "0", "-e", f"trace={','.join(kinds)}"], log):
        assert len(await bench.put(*bench.files())) == 2
    calls = calls_in(log, bench.data)
    assert {call.kind for call in calls} >= {"write", "pwrite64", "fsync", "fdatasync", "rename"}
    return calls


async def test_a_fault_at_some_system_calls_of_an_upload_loses_nothing_that_was_acknowledged(bench: Bench) -> None:
    """One of each kind, each with another fault; the soak has them all."""
    calls = await every_call(bench)
    draw, before = random.Random(4), bench.met
    for number, kind in enumerate(("write", "pwrite64", "fsync", "fdatasync", "rename")):
        await bench.meets(draw.choice([call for call in calls if call.kind == kind]), faults[number % 3])
    assert bench.met - before >= 4


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", faults)
async def test_a_fault_at_any_system_call_of_an_upload_loses_nothing_that_was_acknowledged(bench: Bench, fault: str) -> None:
    calls = await every_call(bench)
    at_once, before = 0, bench.met
    for call in calls:
        at_once += len(await bench.meets(call, fault))
    print(f"{fault} at {len(calls)} calls, {bench.met - before} met; {at_once} of {2 * len(calls)} files acknowledged at once, lost: 0")


@pytest.mark.parametrize("kind", ["fsync", "fdatasync"])
async def test_while_every_fsync_fails_nothing_is_acknowledged(bench: Bench, kind: str) -> None:
    for path in [""] if kind == "fsync" else [str(bench.data / name) for name in ("store.sqlite-wal", "ledger.sqlite-wal")]:
        before = bench.met
        done = await bench.meets(Call(kind, path, 1, onward=True), "error=EIO")
        assert bench.met == before + 1
        assert all(file.stat().st_size == small for file in done) if kind == "fsync" else done == set()


async def test_a_write_that_stops_half_way_is_no_shard(bench: Bench) -> None:
    for limit in (100_000, 4_096, 1):
        paths = bench.files()
        pid = bench.trial.pid(bench.name)
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, before[1]))
        done = await bench.put(*paths)
        assert bench.trial.running[bench.name].poll() is None
        await bench.reboot()
        await bench.restore(done)
        assert await bench.put(*paths) == set(paths)


async def test_a_disk_that_only_pretends_to_write_is_found_by_the_reader(bench: Bench) -> None:
    path, _ = bench.files()
    with injected(bench.trial.pid(bench.name), Call("write", "", 1), "retval=1000", bench.folder / "strace"):
        done = await bench.put(path)
    met = re.search(r", \d{6}\) += 1000 \(INJECTED\)", (bench.folder / "strace").read_text(errors="replace"))  # the shard, not a log line
    if done and met:  # the node cannot know; the reader does
        with pytest.raises(AssertionError, match="LOST"):
            await bench.restore(done)
        async with bench.work.open() as vault:
            with pytest.raises((Damaged, MedshardError)):
                await vault.get(next(digest for digest, each in bench.work.acknowledged.items() if each == path), bench.folder / "back")
        assert not (bench.folder / "back").exists()
