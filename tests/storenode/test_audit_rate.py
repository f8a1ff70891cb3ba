"""How soon audits find a loss, by the sampler, the configured rates and the findings themselves; chances are reckoned where they can be."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from medshard_protocol.audit import Verdict
from medshard_protocol.ids import FileId, NodeId
from storenode.auditing.findings import Findings
from storenode.auditing.sampling import Sampler
from storenode.config import AuditSection
from storenode.shardstore import ShardStore


def filled(folder: Path, sizes: list[int], seed: int) -> tuple[ShardStore, list[bytes]]:
    """A store whose catalog names shards of these sizes, and their files in order."""
    draw = random.Random(seed)
    store, files = ShardStore(folder, capacity=10**15), sorted(draw.randbytes(32) for _ in sizes)
    row = "INSERT INTO shards VALUES (?, 0, ?, 131072, zeroblob(32), 'blake3', x'', zeroblob(32), 0, 1, NULL)"
    with sqlite3.connect(folder / "store.sqlite") as catalog:
        catalog.executemany(row, zip(files, sizes, strict=True))
    catalog.close()
    store.used = sum(sizes)
    return store, files


def chances(files: list[bytes], window: int) -> list[float]:
    """What the sampler's draw by places comes to: a place before each of the ``window`` files up to one, over the window's length."""
    places = [int.from_bytes(each, "big") for each in files]
    gaps = [(places[i] - places[i - 1]) % 2**256 / 2**256 for i in range(len(places))]
    total, running, chance = len(files), sum(gaps[-window + 1 :]), []
    for i in range(total):
        running += gaps[i]
        chance.append(running / window)
        running -= gaps[i - window + 1]
    return chance


async def test_draws_are_as_likely_as_reckoned(tmp_path: Path) -> None:
    store, files = filled(tmp_path, [4096] * 400, 1)
    sampler = Sampler(store, random.Random(2))
    connection = store.catalog.another_reader()
    drawn = Counter(sampler._any(connection) for _ in range(4000))
    connection.close()
    reckoned = chances(files, 128)
    assert abs(sum(reckoned) - 1) < 1e-9
    for part in range(0, 400, 50):
        share = sum(drawn[FileId(each)] for each in files[part : part + 50]) / 4000
        assert abs(share - sum(reckoned[part : part + 50])) < 0.03
    store.close()


async def test_one_percent_that_is_lost_is_found_within_a_week_with_probability_of_99(tmp_path: Path) -> None:
    """By what is drawn evenly alone, which is half of the draws; and if a node picks its losses where the draws look least."""
    week = 7 * AuditSection().per_day // 2
    for seed in range(5):
        draw = random.Random(seed)
        files = sorted(draw.randbytes(32) for _ in range(20_000))
        chance = chances(files, 128)
        by_chance = sum(draw.sample(chance, 200))
        least = sum(sorted(chance)[:200])
        assert (1 - by_chance) ** week < 0.01
        assert (1 - least) ** week < 0.01


async def test_one_percent_of_the_bytes_in_one_large_shard_is_found_too(tmp_path: Path) -> None:
    sizes = [4096] * 5000 + [8 << 20] * 50
    store, _ = filled(tmp_path, sizes, 4)
    with sqlite3.connect(tmp_path / "store.sqlite") as catalog:
        large = {row[0]: row[1] for row in catalog.execute("SELECT file_id, size FROM shards WHERE size > 1048576")}
    catalog.close()
    sampler = Sampler(store, random.Random(5))
    connection = store.catalog.another_reader()
    drawn = Counter(sampler._weighted(connection) for _ in range(2048))
    connection.close()
    share = sum(count for each, count in drawn.items() if each in large) / 2048
    assert abs(share - 50 * (8 << 20) / sum(sizes)) < 0.03
    store.close()


async def test_an_empty_store_has_nothing_to_audit(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, capacity=10**9)
    sampler = Sampler(store)
    assert [sampler.draw() for _ in range(4)] == [None] * 4
    store.close()


@pytest.mark.parametrize("shared", [1.0, 0.3, 0.0], ids=["all files shared", "a third", "none that was drawn"])
def test_a_node_that_is_lost_is_silent_for_good_within_a_day(tmp_path: Path, shared: float) -> None:
    """Draws at the configured rate with their jitter and a knock where an hour has gone by, by the findings themselves."""
    config, slowest = AuditSection(), 0.0
    for seed in range(2):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        me, lost, other = (NodeId(bytes([i]) * 16) for i in range(3))
        findings = Findings(folder, me=me, silence_s=config.silence_s)
        findings.report(FileId(b"f" * 32), 1, other, Verdict.GOOD, 0)
        findings.note_node(lost, Verdict.SAID, -1.0)
        at = tried = 0.0
        while lost not in findings.silent():
            at += 86_400 / config.per_day * draw.uniform(0.5, 1.5)
            if draw.random() < shared or at - tried >= 3600:
                tried = at
                findings.note_node(lost, Verdict.LATE, at)
        slowest = max(slowest, at)
        findings.close()
    assert config.silence_s <= slowest < 86_400
