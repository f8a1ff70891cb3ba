"""Faults of the machine below: a disk that is full at the client or at a node, and clocks that are an hour off."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from medshard import Vault, nursery
from medshard.consortium import LocalConsortium

mib = 1024 * 1024


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("faults"), institutions=6, code=(3, 6)) as consortium:
        yield consortium


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of its own with ``size`` bytes. Skips where mounts are not allowed."""
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system needs root and mount")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True).returncode != 0:
        pytest.skip("mounts are not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def medshard(trial: LocalConsortium, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return nursery.run(["-m", "medshard", *arguments], {**os.environ, "MEDSHARD_HOME": str(trial.vault_home), **environment})


def test_a_full_disk_at_the_client_is_said_and_leaves_no_partial_file(trial: LocalConsortium, tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(6 * mib))
    digest = sha256(path.read_bytes()).hexdigest()
    assert medshard(trial, "put", str(path)).returncode == 0
    with small_disk(tmp_path / "disk", 2 * mib) as disk:
        told = medshard(trial, "get", digest, "-o", str(disk / "back"))
        assert told.returncode == 7
        assert "No space left on device" in told.stderr or "no room" in told.stderr
        assert "Traceback" not in told.stderr
        assert list(disk.iterdir()) == []
    assert medshard(trial, "get", digest, "-o", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_a_full_disk_at_a_node_loses_nothing_and_the_others_take_the_file(trial: LocalConsortium, tmp_path: Path) -> None:
    assert trial.roster is not None
    name = next(name for name in trial.names if name != trial.roster.node(trial.roster.sequencer).name)
    trial.kill(name)
    data = trial.home(name) / "data"
    kept = data.with_name("data-before")
    data.rename(kept)
    with small_disk(data, 70 * mib):
        shutil.copytree(kept, data, dirs_exist_ok=True)
        trial.restart(name)
        for number in range(3):
            path = tmp_path / f"f{number}"
            path.write_bytes(os.urandom(12 * mib))
            told = medshard(trial, "put", str(path))
            assert told.returncode == 0, told.stderr
            assert medshard(trial, "get", told.stdout.split()[0], "-o", str(tmp_path / "back")).returncode == 0
            assert (tmp_path / "back").read_bytes() == path.read_bytes()
        assert list((data / "tmp").iterdir()) == []  # nothing half-written
        assert dict(trial.running)[name].poll() is None  # and the node is still there
        verified = medshard(trial, "--json", "verify", told.stdout.split()[0])
        assert '"missing"' in verified.stdout
        trial.kill(name)
    data.rmdir()
    kept.rename(data)
    trial.restart(name)


def faketime_library() -> str:
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        pytest.skip("libfaketime is not installed (Debian: faketime)")
    return str(found[0])


@pytest.mark.parametrize("skew", ["+1h", "-1h"])
def test_a_clock_that_is_an_hour_off_changes_nothing(
    trial: LocalConsortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: str
) -> None:
    wrong = {"LD_PRELOAD": faketime_library(), "FAKETIME": skew, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    path = tmp_path / "file"
    path.write_bytes(os.urandom(100_000))
    told = medshard(trial, "put", str(path), **wrong)  # the client's clock
    assert told.returncode == 0, told.stderr
    assert medshard(trial, "get", told.stdout.split()[0], "-o", str(tmp_path / "back"), **wrong).returncode == 0
    assert trial.roster is not None
    sequencer = trial.roster.node(trial.roster.sequencer).name
    for name in (sequencer, next(name for name in trial.names if name != sequencer)):  # a node's clock, and the ledger's
        trial.kill(name)
        with monkeypatch.context() as skewed:
            for key, value in wrong.items():
                skewed.setenv(key, value)
            trial.restart(name)
    path.write_bytes(os.urandom(100_000))
    told = medshard(trial, "put", str(path))
    assert told.returncode == 0, told.stderr
    assert medshard(trial, "get", told.stdout.split()[0], "-o", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    for name in (sequencer, next(name for name in trial.names if name != sequencer)):
        trial.kill(name)
        trial.restart(name)


async def test_ctrl_c_at_any_time_leaves_nothing_behind_and_the_next_run_finishes(trial: LocalConsortium, tmp_path: Path) -> None:
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        for number in range(8):
            path, folder = tmp_path / f"c{number}", tmp_path / f"out{number}"
            folder.mkdir()
            path.write_bytes(os.urandom(8 * mib if number % 2 else 100_000))
            putting = asyncio.create_task(vault.put([path]))
            await asyncio.sleep(0.004 + 0.012 * number)
            putting.cancel()
            await asyncio.gather(putting, return_exceptions=True)
            digest = (await vault.put([path])).stored[0].sha256
            getting = asyncio.create_task(vault.get(digest, folder / "back"))
            await asyncio.sleep(0.004 + 0.008 * number)
            getting.cancel()
            await asyncio.gather(getting, return_exceptions=True)
            assert [file.name for file in folder.iterdir()] in ([], ["back"])
            await vault.get(digest, folder / "back")
            assert (folder / "back").read_bytes() == path.read_bytes()
