"""A node that is told to end (SIGTERM) while it takes a shard: it finishes what it began, and leaves nothing half-done."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard.sending import Sending
from medshard_protocol.errors import MedshardError
from medshard_protocol.ids import FileId
from medshard_protocol.messages import cell_size_header, shard_path, unpack_stored
from medshard_protocol.shards import digests, shard_root, split

cell, size = 128 * 1024, 20 * 128 * 1024


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("stopping"), institutions=4) as consortium:
        yield consortium


class Halves:
    """A shard on its way to one node, the second half of it when it is told."""

    def __init__(self, vault: Vault, name: str) -> None:
        self.file_id = FileId(os.urandom(32))
        self.shard = os.urandom(size)
        self.sending = Sending(vault._net, lambda: None)
        node = next(node for node in vault.roster.nodes if node.name == name)
        self.outgoing = self.sending.begin(node, shard_path(self.file_id, 0), size, {cell_size_header: str(cell)})
        self.send(memoryview(self.shard)[: size // 2])

    @property
    def root(self) -> bytes:
        return shard_root([digests["blake3"](part) for part in split(self.shard, cell)], digests["blake3"])

    def send(self, *parts: memoryview) -> None:
        self.outgoing.parts += parts
        self.sending.ring()

    async def half_sent(self) -> None:
        while not self.outgoing.taken:
            await asyncio.sleep(0.02)


async def ended(trial: LocalConsortium, name: str, within_s: float) -> int:
    process = trial.running[name]
    async with asyncio.timeout(within_s):
        while process.poll() is None:
            await asyncio.sleep(0.02)
    return process.returncode


def kept(trial: LocalConsortium, name: str, file_id: FileId) -> list[Path]:
    return list((trial.home(name) / "data" / "shards").glob(f"*/{file_id.hex()}-*"))


async def test_an_upload_in_flight_is_finished_and_acknowledged_before_the_node_ends(trial: LocalConsortium) -> None:
    name = trial.names[-1]
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        halves = Halves(vault, name)
        await halves.half_sent()
        await asyncio.sleep(0.2)
        trial.running[name].terminate()
        await asyncio.sleep(0.5)
        assert trial.running[name].poll() is None
        halves.send(memoryview(halves.shard)[size // 2 :])
        assert unpack_stored(await halves.outgoing.answer) == halves.root
        await halves.sending.close()
    assert await ended(trial, name, 10) == 0
    (file,) = kept(trial, name, halves.file_id)
    assert file.read_bytes() == halves.shard
    trial.kill(name)
    trial.restart(name)


async def test_an_upload_that_breaks_off_meanwhile_leaves_nothing_and_the_node_ends(trial: LocalConsortium) -> None:
    name = trial.names[-1]
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        halves = Halves(vault, name)
        await halves.half_sent()
        await asyncio.sleep(0.2)
        trial.running[name].terminate()
        await asyncio.sleep(0.2)
        halves.outgoing.answer.cancel()
        await halves.sending.close()
    assert await ended(trial, name, 10) == 0
    assert kept(trial, name, halves.file_id) == []
    assert list((trial.home(name) / "data" / "tmp").iterdir()) == []
    trial.kill(name)
    trial.restart(name)


async def test_a_file_that_is_put_while_a_node_ends_is_stored_whole(trial: LocalConsortium, tmp_path: Path) -> None:
    name = trial.names[-1]
    (tmp_path / "plain").write_bytes(os.urandom(24 * 1024 * 1024))
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        putting = asyncio.create_task(vault.put([tmp_path / "plain"]))
        while not any((trial.home(name) / "data" / "tmp").iterdir()):
            await asyncio.sleep(0.002)
            if putting.done():
                break
        trial.running[name].terminate()
        try:
            (stored,) = (await putting).stored
        except MedshardError:  # with 4 of 4 to acknowledge it may be refused, but never half-acknowledged
            stored = None
        assert await ended(trial, name, 35) == 0
        assert list((trial.home(name) / "data" / "tmp").iterdir()) == []
        trial.kill(name)
        trial.restart(name)
        if stored is None:
            (stored,) = (await vault.put([tmp_path / "plain"])).stored
        await vault.get(stored.sha256, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "plain").read_bytes()
