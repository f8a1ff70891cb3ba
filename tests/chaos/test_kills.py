"""Nodes and clients that are killed or stopped at any moment while files are put and got: everything acknowledged comes back.

Law: SIGKILL ends a node without a word and it starts again on what it left; SIGSTOP lets it hold its connections and say nothing. One node
is hurt at a time, so that a quorum of six institutions is left unless it is the sequencer.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.chaos.workload import Workload, stop

from medshard.consortium import LocalConsortium
from medshard_protocol.errors import MedshardError

reader_pause_s = 0.1


class Chaos:
    """Hurts the nodes and clients of one trial, one fault after the other, and counts them."""

    def __init__(self, trial: LocalConsortium, work: Workload) -> None:
        self.trial = trial
        self.work = work
        self.done: Counter[str] = Counter()
        self.read_back = 0

    async def hurt(self, kills: int) -> None:
        """Go on until ``kills`` processes were killed."""
        draw = self.work.draw
        while self.done["node killed"] + self.done["client killed"] < kills:
            how = draw.choices((self.kill_node, self.stop_node, self.kill_client), weights=(5, 2, 3))[0]
            await how()
            await asyncio.sleep(draw.random() * 0.2)

    async def kill_node(self) -> None:
        name = self.work.draw.choice(self.trial.names)
        self.trial.kill(name)
        self.done["node killed"] += 1
        await asyncio.sleep(self.work.draw.random() * 0.5)
        await asyncio.to_thread(self.trial.restart, name)

    async def stop_node(self) -> None:
        name = self.work.draw.choice(self.trial.names)
        self.trial.freeze(name)
        self.done["node stopped"] += 1
        await asyncio.sleep(self.work.draw.random())
        self.trial.thaw(name)

    async def kill_client(self) -> None:
        """Kill a client that puts, or one that gets, at any moment; what it had printed counts."""
        path, known = self.work.make(), list(self.work.acknowledged)
        back = path.with_suffix(".got")
        get = bool(known) and self.work.draw.random() < 0.4
        arguments = ["get", self.work.draw.choice(known).hex(), "-o", str(back)] if get else ["put", str(path)]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "medshard", *arguments),
            env={**os.environ, "MEDSHARD_HOME": str(self.trial.vault_home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        await asyncio.sleep(0.3 + self.work.draw.random() * 0.8)
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            self.done["client killed"] += 1
        out, _ = await process.communicate()
        if get:
            if back.exists():  # a name that stands is a whole file
                assert back.read_bytes() == self.work.acknowledged[bytes.fromhex(arguments[1])].read_bytes()
        else:
            self.work.acknowledged |= {bytes.fromhex(line.split()[0].decode()): path for line in out.splitlines()}

    async def read(self) -> None:
        """Get acknowledged files meanwhile. A refusal is allowed, other bytes never."""
        back = self.work.folder / "meanwhile"
        async with self.work.open() as vault:
            while True:
                await asyncio.sleep(reader_pause_s)
                if self.work.acknowledged:
                    digest = self.work.draw.choice(list(self.work.acknowledged))
                    try:
                        await vault.get(digest, back)
                    except MedshardError:
                        continue
                    assert back.read_bytes() == self.work.acknowledged[digest].read_bytes()
                    self.read_back += 1


async def run(folder: Path, kills: int, seed: int) -> Chaos:
    """Kill so often under load; then restore and compare everything that was acknowledged."""
    (folder / "files").mkdir()
    with LocalConsortium(folder / "trial", institutions=6, code=(3, 6)) as trial:
        chaos = Chaos(trial, Workload(trial, folder / "files", random.Random(seed), workers=2, pause_s=0.2))
        tasks = [asyncio.create_task(chaos.work.run()), asyncio.create_task(chaos.read())]
        hurting = asyncio.create_task(chaos.hurt(kills))
        await asyncio.wait([*tasks, hurting], return_when=asyncio.FIRST_COMPLETED)
        await stop(hurting)
        for task in tasks:
            await stop(task)
        assert set(trial.running) == set(trial.names)
        async with chaos.work.open() as vault:
            count = await chaos.work.check(vault)
            await chaos.work.put(vault, chaos.work.make())
    told = ", ".join(f"{number} times {what}" for what, number in sorted(chaos.done.items()))
    print(f"{told}; {count} files acknowledged, {chaos.work.refused} refused, {chaos.read_back} read meanwhile, lost: 0")
    return chaos


async def test_after_kills_in_the_middle_everything_acknowledged_comes_back(tmp_path: Path) -> None:
    chaos = await run(tmp_path, kills=4, seed=3)
    assert len(chaos.work.acknowledged) > 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_after_five_hundred_kills_everything_acknowledged_comes_back(tmp_path: Path) -> None:
    chaos = await run(tmp_path, kills=500, seed=4)
    assert len(chaos.work.acknowledged) > 500
