"""Other bytes than were written, anywhere: they are found or mean nothing, nobody is given them, and what is left is right.

Law: after one damage everything is asked of the node's own code. Each answer is the right one, or one of our errors. For a shard the node's
own re-reading must say so too, since audit and repair live on it. What differs after that and is no error would be silent, and fails here.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from tests.chaos.rot import Target, damaged, places_of
from tests.chaos.workload import Workload

from medshard.consortium import LocalConsortium
from medshard.keys import open_key_file
from medshard_protocol.errors import MedshardError
from medshard_protocol.ids import FileId
from storenode.identity import NodeKeys
from storenode.shardstore import ShardStore


@dataclass(frozen=True)
class Held:
    """What a node holds of one file, as it was before the damage."""

    file_id: FileId
    index: int
    shard: bytes
    manifest: bytes


@dataclass(frozen=True)
class Kept:
    """The folder of a node that holds files, and what it holds. ``vault`` is a client's home, with its passphrase."""

    folder: Path
    held: tuple[Held, ...]
    vault: Path
    passphrase: str

    def shards(self) -> list[Target]:
        return [Target("shard file", path) for path in sorted((self.folder / "data/shards").glob("??/*"))]

    def catalog(self) -> list[Target]:
        path = self.folder / "data/store.sqlite"
        manifests = places_of("manifest", path, [each.manifest for each in self.held])
        small = places_of("small shard", path, [each.shard for each in self.held if len(each.shard) <= 65536])
        assert manifests
        assert small
        return [*manifests, *small, Target("catalog", path)]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("rot")
    (folder / "files").mkdir()
    trial = LocalConsortium(folder / "trial", institutions=1, code=(1, 1))

    async def fill() -> None:
        work = Workload(trial, folder / "files", random.Random(1))
        async with work.open() as vault:
            for _ in range(8):
                await work.put(vault, work.make())

    with trial:
        asyncio.run(fill())
        home, passphrase = trial.home(trial.names[0]), trial.passphrase
    for name in ("store.sqlite-wal", "store.sqlite-shm"):
        assert not (home / "data" / name).exists()  # a clean stop leaves one file, which is what we damage
    store = ShardStore(home / "data", capacity=1 << 40)
    held = []
    for file_id, index in store.catalog.all("SELECT file_id, idx FROM shards"):
        shard = store.shard_at(file_id, index)
        held.append(Held(file_id, index, store.read(shard, 0, shard.size), store.manifest(file_id)))
    store.close()
    assert len(held) == 8
    return Kept(home, tuple(held), trial.vault_home, passphrase)


def ask_everything(kept: Kept) -> int:
    """Ask a node's store for all that it held. Fails on an answer that is neither right nor an error; how many were errors."""
    try:
        store = ShardStore(kept.folder / "data", capacity=1 << 40)
    except MedshardError:
        return len(kept.held)
    errors = 0
    try:
        for each in kept.held:
            try:
                shard = store.shard_at(each.file_id, each.index)
                bad = store.bad_cells(shard)
                data = store.read(shard, 0, shard.size)
                assert bad or data == each.shard, "a wrong shard, and the node does not know"
                errors += bool(bad)
            except MedshardError:
                errors += 1
            try:
                assert store.manifest(each.file_id) == each.manifest, "a wrong manifest"
            except MedshardError:
                errors += 1
        try:
            store.counts()
        except MedshardError:
            errors += 1
    finally:
        store.close()
    return errors


def damage(kept: Kept, targets: list[Target], times: int, seed: int) -> Counter[str]:
    """Damage so often, each time ask for everything; how often it was found, by what was hit."""
    draw, told = random.Random(seed), Counter[str]()
    for _ in range(times):
        kind = draw.choice(sorted({each.what for each in targets}))
        target = draw.choice([each for each in targets if each.what == kind])
        with damaged(draw, target) as what:
            try:
                found = ask_everything(kept)
            except BaseException as error:
                error.add_note(what)
                raise
        told[f"{target.what}, {'found' if found else 'in bytes that mean nothing'}"] += 1
    assert ask_everything(kept) == 0  # undone
    return told


def damage_store(kept: Kept, times: int, seed: int) -> None:
    told = damage(kept, kept.shards(), times // 3, seed) + damage(kept, kept.catalog(), times - times // 3, seed)
    print(dict(sorted(told.items())))
    assert told["shard file, in bytes that mean nothing"] == 0
    assert told["shard file, found"] == times // 3
    assert told["manifest, found"] > 0


def test_rot_in_shards_manifests_and_catalog_is_found_and_never_served(kept: Kept) -> None:
    damage_store(kept, 60, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_rot_in_shards_manifests_and_catalog_is_found_thousands_of_times(kept: Kept) -> None:
    damage_store(kept, 3600, seed=2)


def damage_key_files(kept: Kept, times: int, seed: int) -> Counter[str]:
    """Every damage of a key file is an error, or leaves the very same keys."""
    draw, told = random.Random(seed), Counter[str]()
    vault, node = open_key_file(kept.vault / "vault.key", kept.passphrase), NodeKeys.load(kept.folder)
    targets = [Target("vault's key file", kept.vault / "vault.key")]
    targets += [Target("node's key files", path) for path in sorted((kept.folder / "keys").iterdir())]
    for _ in range(times):
        target = draw.choice([targets[0], draw.choice(targets[1:])])
        with damaged(draw, target) as what:
            try:
                if target is targets[0]:
                    assert open_key_file(target.path, kept.passphrase) == vault, what
                else:
                    now = NodeKeys.load(kept.folder)
                    assert sha256(repr(now.node_id).encode()).digest() == sha256(repr(node.node_id).encode()).digest(), what
                    assert now.certificate == node.certificate, what
                    told["node's key files, in bytes that mean nothing"] += 1
            except MedshardError:
                told[f"{target.what}, found"] += 1
            except BaseException as error:
                error.add_note(what)
                raise
    return told


def test_rot_in_key_files_is_found_and_gives_no_other_key(kept: Kept) -> None:
    told = damage_key_files(kept, 20, seed=1)
    assert told["vault's key file, found"] > 5


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_rot_in_key_files_is_found_four_hundred_times(kept: Kept) -> None:
    print(dict(damage_key_files(kept, 400, seed=2)))
