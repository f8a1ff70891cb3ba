"""A client that remembers what was acknowledged to it, and nothing else, so that a test can ask for just that.

Law: a file counts from the moment ``Vault.put`` returned it. What was cut off before may be there or not; it must only never be wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, field
from pathlib import Path

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard_protocol.errors import MedshardError

sizes = (3_000, 40_000, 300_000, 1_500_000)
worker_pause_s = 0.05  # after a refusal, such as by a node that is down


@dataclass
class Workload:
    """Puts random files into ``trial`` from ``workers`` tasks at once. ``acknowledged`` maps a file's SHA-256 to where it lies."""

    trial: LocalConsortium
    folder: Path
    draw: random.Random
    workers: int = 4
    pause_s: float = 0.0  # of a worker, after each file
    acknowledged: dict[bytes, Path] = field(default_factory=dict)
    refused: int = 0
    _count: int = 0

    async def run(self) -> None:
        """Put files until cancelled, with a vault that is opened anew, as after a restart of the client."""
        async with self.open() as vault, asyncio.TaskGroup() as group:
            for _ in range(self.workers):
                group.create_task(self._work(vault))

    def open(self) -> Vault:
        """The trial's vault."""
        return Vault.open(self.trial.vault_home, self.trial.passphrase)

    async def put(self, vault: Vault, path: Path) -> bytes:
        """Put one file and remember it."""
        report = await vault.put([path])
        assert report.problems == ()
        digest = report.stored[0].sha256
        self.acknowledged[digest] = path
        return digest

    def make(self) -> Path:
        """A new file of random bytes."""
        self._count += 1
        path = self.folder / f"f{self._count:05d}"
        path.write_bytes(self.draw.randbytes(self.draw.choice(sizes)))
        return path

    async def check(self, vault: Vault, digests: list[bytes] | None = None) -> int:
        """Restore acknowledged files (all, or these) and compare each with the original; how many."""
        wanted = list(self.acknowledged) if digests is None else digests
        back = self.folder / "back"
        for digest in wanted:
            try:
                await vault.get(digest, back)
            except MedshardError as error:
                raise AssertionError(f"LOST: {self.acknowledged[digest].name} was acknowledged: {error}") from error
            assert back.read_bytes() == self.acknowledged[digest].read_bytes()
            back.unlink()
        return len(wanted)

    async def _work(self, vault: Vault) -> None:
        while True:
            path = self.make()
            try:
                await self.put(vault, path)
                await asyncio.sleep(self.pause_s)
            except MedshardError:
                self.refused += 1
                path.unlink()
                await asyncio.sleep(worker_pause_s)


async def stop(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it is over; an error of its own is raised."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
