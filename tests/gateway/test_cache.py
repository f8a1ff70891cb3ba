"""The cache on disk: what comes back is what was put, or nothing; it stays within its bounds; and it tells nobody anything."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from medshard.gateway.blocks import CachedBlocks
from medshard.gateway.cache import BlockCache
from medshard.gateway.sweeping import Sweeper
from medshard_protocol.errors import Conflict
from medshard_protocol.ids import FileId

if TYPE_CHECKING:
    from medshard.custody import Custody

key = b"k" * 32


def opened(folder: Path, bytes_max: int = 1 << 20) -> BlockCache:
    return BlockCache(folder, key, bytes_max=bytes_max)


def test_what_was_put_comes_back_also_after_a_restart(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    names = [cache.name(b"stripe", bytes([number])) for number in range(20)]
    for number, name in enumerate(names):
        cache.put(name, bytes([number]) * 1_000)
    cache.close()
    cache = opened(tmp_path)
    assert [cache.get(name) for name in names] == [bytes([number]) * 1_000 for number in range(20)]
    assert cache.get(cache.name(b"other")) is None
    cache.close()


def test_it_stays_within_its_bounds_and_keeps_what_is_asked_for(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    wanted = cache.name(b"wanted")
    cache.put(wanted, b"w" * 10_000)
    for number in range(500):
        cache.put(cache.name(b"stripe", number.to_bytes(4)), os.urandom(10_000))
        assert cache.get(wanted) == b"w" * 10_000
        assert cache.used_bytes <= 1 << 20
    assert sum(path.stat().st_size for path in tmp_path.glob("*.cache")) <= 1 << 20
    assert not cache.has(cache.name(b"stripe", (0).to_bytes(4)))
    assert cache.has(cache.name(b"stripe", (499).to_bytes(4)))
    cache.put(cache.name(b"huge"), bytes(1 << 20))
    assert not cache.has(cache.name(b"huge")), "one record may not push out all others"
    cache.close()


def test_a_crash_in_the_middle_of_a_write_loses_that_record_alone(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    first, second = cache.name(b"1"), cache.name(b"2")
    cache.put(first, b"first" * 100)
    cache.put(second, b"second" * 100)
    cache.close()
    (path,) = tmp_path.glob("*.cache")
    for cut in (1, 100, 500):
        os.truncate(path, path.stat().st_size - cut)
        cache = opened(tmp_path)
        assert cache.get(first) == b"first" * 100
        assert cache.get(second) is None
        cache.put(second, b"again")
        assert cache.get(second) == b"again"
        cache.close()
        for later in sorted(tmp_path.glob("*.cache"))[1:]:
            later.unlink()


def test_altered_bytes_are_forgotten_and_never_given_out(tmp_path: Path) -> None:
    cache = opened(tmp_path, 1 << 24)
    name = cache.name(b"1")
    cache.put(name, b"plain" * 1_000)
    (path,) = tmp_path.glob("*.cache")
    for _ in range(50):
        data = bytearray(path.read_bytes())
        data[random.randrange(len(data) - 5_000, len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        assert cache.get(name) is None
        assert not cache.has(name)
        cache.put(name, b"plain" * 1_000)
        assert cache.get(name) == b"plain" * 1_000
    cache.close()


def test_neither_bytes_nor_names_lie_open(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    cache.put(cache.name(b"stripe", b"file-id-in-clear"), b"Mustermann" * 100)
    cache.close()
    (path,) = tmp_path.glob("*.cache")
    assert b"Mustermann" not in path.read_bytes()
    assert b"file-id-in-clear" not in path.read_bytes()
    other = BlockCache(tmp_path, b"o" * 32, bytes_max=1 << 20)
    assert other.get(cache.name(b"stripe", b"file-id-in-clear")) is None
    other.close()


def test_two_processes_do_not_share_one(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    with pytest.raises(Conflict, match="another gateway"):
        opened(tmp_path)
    cache.close()


async def test_nothing_of_what_was_erased_stays_also_if_no_gateway_ran_then(tmp_path: Path) -> None:
    ended: list[object] = []
    custody = cast("Custody", SimpleNamespace(all_ended=lambda: ended))
    cache = opened(tmp_path / "cache")
    blocks = CachedBlocks(cache)
    file_id = FileId(b"f" * 32)

    async def kept() -> list[bytes | None]:
        return [await blocks.get(file_id, 0), cache.get(cache.name(b"frames"))]

    async def fill() -> None:
        await blocks.put(file_id, 0, b"plain")
        await asyncio.to_thread(cache.put, cache.name(b"frames"), b"table")

    await fill()
    await Sweeper(custody, blocks, tmp_path / "swept").sweep()
    assert await kept() == [b"plain", b"table"]
    ended.append(object())
    for _ in range(2):  # the second finds nothing to do
        await Sweeper(custody, blocks, tmp_path / "swept").sweep()
    assert await kept() == [None, None]
    assert not list((tmp_path / "cache").glob("*.cache"))
    await fill()
    await Sweeper(custody, blocks, tmp_path / "swept").sweep()
    assert await kept() == [b"plain", b"table"]
    cache.close()
