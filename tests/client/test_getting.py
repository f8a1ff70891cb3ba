"""What is asked of holders early is used for the files it was asked for, and otherwise as if it had never been."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from medshard import getting
from medshard.getting import Early
from medshard.smallfiles import object_bytes_max
from medshard_protocol.errors import Unavailable

net: Any = None
Shards = dict[bytes, dict[int, bytes]]


class Reads:
    """In the place of ``SmallReads``: gives what a test says, once it says so."""

    made: ClassVar[list[Reads]] = []
    go: ClassVar[asyncio.Event]
    error: ClassVar[Exception | None] = None

    def __init__(self, net: Any, manifests: Any, found_bad: Any) -> None:
        self.manifests, self.found_bad, self.cancelled = manifests, found_bad, False
        self.made.append(self)

    async def fetch(self) -> Shards:
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        self.found_bad(("node", 1, 0))
        if self.error is not None:
            raise self.error
        return {manifest.file_id: {0: b"shard"} for manifest in self.manifests}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> type[Reads]:
    monkeypatch.setattr(getting, "SmallReads", Reads)
    Reads.made, Reads.go, Reads.error = [], asyncio.Event(), None
    return Reads


def manifests(*sizes: int) -> list[Any]:
    return [SimpleNamespace(file_id=bytes([number]), layout=SimpleNamespace(sealed_size=size)) for number, size in enumerate(sizes)]


async def test_what_came_early_is_used_once_and_its_bad_cells_are_told(reads: type[Reads]) -> None:
    reads.go.set()
    wanted = manifests(10, 20)
    early = Early(wanted)
    early.begin(net)
    early.begin(net)
    assert await early.take(wanted[::-1]) == {b"\0": {0: b"shard"}, b"\1": {0: b"shard"}}
    assert await early.take(wanted) is None
    assert (len(reads.made), early.bad_cells) == (1, [("node", 1, 0)])


@pytest.mark.parametrize("sizes", [(object_bytes_max * 2,), (10, object_bytes_max * 2), (object_bytes_max,) * 3])
async def test_what_is_not_read_in_one_go_is_not_asked_for_early(reads: type[Reads], sizes: tuple[int, ...]) -> None:
    early = Early(manifests(*sizes))
    early.begin(net)
    assert await early.take(manifests(*sizes)) is None
    assert reads.made == []


async def test_what_fails_early_is_as_if_it_had_not_been(reads: type[Reads]) -> None:
    reads.error = Unavailable("2 of 4 shards are needed and only 0 can be had")
    reads.go.set()
    early = Early(manifests(10))
    early.begin(net)
    assert await early.take(manifests(10)) is None


@pytest.mark.parametrize("taken", [False, True])
async def test_what_nobody_wants_is_stopped(reads: type[Reads], taken: bool) -> None:
    early = Early(manifests(10))
    early.begin(net)
    await asyncio.sleep(0)
    if taken:
        assert await early.take(manifests(10, 20)) is None
    else:
        await early.end()
    assert reads.made[0].cancelled
