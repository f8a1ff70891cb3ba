"""Nodes that see to repairs by themselves, and nodes that leave: real processes, with the times of waiting cut short.

Eight institutions with a node each, and code 3 of 6: two nodes have no shard of a file. Five of six make a file durable.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.mending import File, Repairing, bring_back, put_whole, told, until

from medshard import Vault, nursery
from medshard_protocol.errors import Refused
from medshard_protocol.messages import shard_path, unpack_error
from medshard_protocol.repairorder import Wish, pack_wish, unpack_moves

k, n = 3, 6
size = 2_500_000  # seven cells a shard


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repairing]:
    consortium = Repairing(tmp_path_factory.mktemp("tending"), institutions=8, code=(k, n))
    consortium.make()
    consortium.configure(grace_s=2.0, patience_s=8.0, rebalance=False)
    with consortium:
        yield consortium


@pytest.fixture
async def vault(trial: Repairing) -> AsyncIterator[Vault]:
    async with Vault.open(trial.vault_home, trial.passphrase) as opened:
        yield opened
    bring_back(trial)


@pytest.fixture
async def file(trial: Repairing, vault: Vault, tmp_path: Path) -> File:
    return await put_whole(trial, vault, tmp_path / "plain", size)


def moves(trial: Repairing, file: File, of: str) -> dict[int, str]:
    """Who took which shard over, as a node with the manifest says."""
    status, answer = trial.ask(of, of, "GET", f"/v1/moves/{file.id}")
    return {shard: trial.name(moved.node) for shard, moved in unpack_moves(answer).items()} if status == 200 else {}


def has(trial: Repairing, file: File, shard: int, name: str, by: str) -> bool:
    return trial.ask(by, name, "HEAD", shard_path(file.manifest.file_id, shard))[0] == 204


def next_ones(trial: Repairing, file: File, shard: int, by: str) -> list[str]:
    """The nodes without a shard, in the order of placement."""
    planned = trial.repaired(by, file.id, dry_run=True)
    assert planned["shard"] == shard
    return [name for name in planned["next_in_placement"] if name in file.others]


async def test_a_node_that_leaves_hands_everything_over_and_goes_on_after_a_restart(
    trial: Repairing, vault: Vault, file: File, tmp_path: Path
) -> None:
    # The first test here: nodes that ever took a shard of a file over may not take another one.
    name = next(name for name in file.holders if name != trial.names[0])
    files = [file, await put_whole(trial, vault, tmp_path / "second", size), await put_whole(trial, vault, tmp_path / "third", size)]
    mine = [each for each in files if name in each.holders]

    def drain(*words: str) -> dict[str, Any]:
        done = nursery.run(["-m", "storenode", "--home", str(trial.home(name)), "drain", "--json", *words])
        assert done.returncode == 0, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    assert drain("--status")["draining"] is False
    spare, shard = file.others[0], file.holders.index(name)
    status, answer = trial.ask(spare, name, "GET", f"/v1/handover/{file.id}/{shard}")
    assert "was not offered" in str(unpack_error(status, answer, name))
    status, answer = trial.ask(file.others[1], spare, "POST", f"/v1/handover/{file.id}/{shard}")
    assert "by a node that was given it" in str(unpack_error(status, answer, spare))
    status, answer = trial.ask(spare, name, "GET", f"/v1/sealed/{file.id}")
    assert "only a holder" in str(unpack_error(status, answer, name))
    trial.kill(name)
    (trial.home(name) / "data" / "leaving").touch()  # as if it had begun before
    trial.restart(name)
    assert drain()["left"] == 0
    giver = next(holder for holder in file.holders if holder != name)
    status, answer = trial.ask(giver, name, "POST", f"/v1/handover/{file.id}/{file.holders.index(giver)}")
    assert "takes no shards over" in str(unpack_error(status, answer, name))
    for each in mine:
        assert not each.is_at(name)
        report = await vault.verify(each.sha256)
        assert report.ok
        assert name not in [holder.node for holder in report.holders]
    assert drain("--stop")["draining"] is False


async def test_after_nodes_die_for_good_every_file_is_back_to_n_shards_without_help(
    trial: Repairing, vault: Vault, file: File, tmp_path: Path
) -> None:
    lost, files = file.holders[1:3], [file]
    files += [await put_whole(trial, vault, tmp_path / f"plain{number}", size) for number in range(3)]
    (tmp_path / "tiny").write_bytes(os.urandom(5_000))
    (tiny,) = (await vault.put([tmp_path / "tiny"])).stored
    for name in lost:
        trial.kill(name)
    wanted = {name for name in trial.names if name not in lost}

    def mended() -> bool:
        queued = [each["file"] for name in wanted for each in told(trial, name)["queue"] if not each["stuck"]]
        return all(sum(each.is_at(name) for name in wanted) == n for each in files) and not queued

    await until(mended, "every file has its six shards on the nodes that live")
    for sha256 in [*(each.sha256 for each in files), tiny.sha256]:
        report = await vault.verify(sha256)
        assert [holder.state for holder in report.holders] == ["proven"] * n
        assert (report.ok, report.margin) == (True, n - k)
        assert not {holder.node for holder in report.holders} & set(lost)
    name = sorted(wanted)[0]
    assert set(told(trial, name)["gone"]) == set(lost)
    status = nursery.run(["-m", "storenode", "--home", str(trial.home(name)), "status"])
    (line,) = [line for line in status.stdout.splitlines() if line.startswith("repair  ")]
    assert line.endswith(f"gone: {', '.join(told(trial, name)['gone'])}")


async def test_a_replacement_that_dies_in_the_middle_is_replaced(trial: Repairing, file: File) -> None:
    lost = file.shards()[1]
    for name in file.holders:
        trial.misbehave(name, do="dawdle", s=0.4)
    trial.kill(file.holders[1])
    first, second = next_ones(trial, file, 1, file.others[0])
    await until(lambda: moves(trial, file, file.holders[0]).get(1) == first, "the first took it over")
    trial.kill(first)
    await until(lambda: file.is_at(second), "the second made it")
    assert file.on_disk(second).read_bytes() == lost
    assert not file.is_at(first)
    assert moves(trial, file, second) == {1: second}


@pytest.mark.soak
async def test_a_replacement_that_is_started_again_goes_on_with_what_it_said_it_would_do(trial: Repairing, file: File) -> None:
    lost = file.shards()[1]
    for name in file.holders:
        trial.misbehave(name, do="dawdle", s=0.4)
    trial.kill(file.holders[1])
    first, second = next_ones(trial, file, 1, file.others[0])
    await until(lambda: moves(trial, file, file.holders[0]).get(1) == first, "the first took it over")
    trial.kill(first)
    trial.restart(first)  # before anybody takes it for gone
    await until(lambda: file.is_at(first), "the first made it")
    assert file.on_disk(first).read_bytes() == lost
    assert not file.is_at(second)
    assert moves(trial, file, first) == {1: first}


async def test_a_holder_whose_disk_lost_a_shard_is_told_and_makes_it_again(trial: Repairing, vault: Vault, file: File) -> None:
    name = file.holders[4]
    home = trial.folder / "reader"
    await Vault.join(home, trial.invite("insurer-02"), trial.passphrase, fast_kdf=True)
    async with Vault.open(home, trial.passphrase) as reader:
        await vault.shares.share([file.sha256], reader.keys.public)
    path = file.on_disk(name)
    lost = path.read_bytes()
    path.unlink()
    with sqlite3.connect(trial.home(name) / "data" / "store.sqlite", timeout=10) as store:
        store.execute("DELETE FROM shards WHERE file_id = ?", (file.manifest.file_id,))
        store.execute("DELETE FROM manifests WHERE file_id = ?", (file.manifest.file_id,))
        store.execute("DELETE FROM sealed_grants")
    store.close()
    await until(lambda: has(trial, file, 4, name, file.holders[0]), "it has its shard again")
    assert path.read_bytes() == lost
    with sqlite3.connect(trial.home(name) / "data" / "store.sqlite", timeout=10) as store:
        await until(lambda: store.execute("SELECT count(*) FROM sealed_grants").fetchone()[0], "it has the reader's sealed key too")
    store.close()
    assert moves(trial, file, name) == {4: name}  # the ledger shows it, though it did not go elsewhere


async def test_a_false_accuser_moves_nothing_and_may_not_go_on_for_long(trial: Repairing, vault: Vault, file: File) -> None:
    spare, path = file.others[0], f"/v1/repair/{file.id}"

    def hint(by: str, shard: int) -> tuple[int, str]:
        status, answer = trial.ask(by, spare, "POST", path, pack_wish(Wish(shard)))
        return status, "" if status == 202 else str(unpack_error(status, answer, spare))

    assert hint(file.holders[0], 2)[0] == 202  # it will look, and find the shard where it should be
    assert "only a holder" in hint(file.others[1], 2)[1]
    assert "only a holder" in hint(file.holders[0], n)[1]
    with pytest.raises(Refused, match="a node says"):
        await vault._net.call(trial.node(spare), "POST", path, pack_wish(Wish(2)), timeout_s=5.0)
    with ThreadPoolExecutor(8) as aside:
        said = list(aside.map(lambda _: hint(file.holders[1], 2), range(80)))
    assert any("too many hints" in why for _, why in said)
    await until(lambda: not told(trial, spare)["files"] and not told(trial, spare)["running"], "it has looked")
    assert moves(trial, file, file.holders[0]) == {}
    assert not file.is_at(spare)


async def test_two_nodes_that_repair_at_once_store_the_shard_once(trial: Repairing, file: File) -> None:
    lost = file.shards()[3]
    for name in file.holders:
        trial.misbehave(name, do="dawdle", s=0.2)
    trial.kill(file.holders[3])
    path = f"/v1/repair/{file.id}"
    for name in file.others:
        assert trial.ask(name, name, "POST", path, pack_wish(Wish(3, take_over=True)))[0] == 200
    ended = ("done", "failed")
    await until(lambda: all(told(trial, name, path)["state"] in ended for name in file.others), "both have ended")
    jobs = {name: told(trial, name, path) for name in file.others}
    (winner,) = [name for name in file.others if jobs[name]["state"] == "done"]
    (loser,) = [name for name in file.others if name != winner]
    assert moves(trial, file, winner) == {3: winner}
    assert file.on_disk(winner).read_bytes() == lost
    assert not file.is_at(loser)
    assert jobs[loser]["state"] == "failed"
