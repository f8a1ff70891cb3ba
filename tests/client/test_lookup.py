"""Finding a file at nodes, beside what whole consortia show: what a vault says when nodes know it and cannot prove it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from medshard import lookup as module
from medshard.lookup import Lookup
from medshard_protocol.errors import Absent, Refused, Unavailable
from medshard_protocol.messages import Found

target: Any = object()


class Nodes(Lookup):
    """Three nodes that know one file. The first so many answers prove it under the quorum before."""

    def __init__(self, late: int, knows: bool = True) -> None:
        async def follow() -> bool:
            return False

        self._net: Any = SimpleNamespace(
            roster=SimpleNamespace(nodes=[SimpleNamespace(id=number) for number in range(3)]),
            health=SimpleNamespace(is_suspect=lambda node: False),
            follow=follow,
        )
        self.fate = lambda sha256: ""
        self._late, self._knows = late, knows

    async def _ask(self, node: Any, hashes: Any) -> list[list[Found]]:
        return [[Found(b"manifest", None)] if self._knows else [] for _ in hashes]

    async def _checked(self, file: Found) -> Any:
        self._late -= 1
        if self._late >= 0:
            raise Refused("checkpoint: cosigned by fewer than 4 institutions")
        return SimpleNamespace(locate=lambda wanted: target)


@pytest.fixture(autouse=True)
def paused(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    return pauses


async def test_what_nodes_still_prove_under_the_quorum_before_is_asked_for_again(paused: list[float]) -> None:
    assert await Nodes(5)._from_nodes([b"hash"]) == {b"hash": target}
    assert paused == list(module.new_quorum_s[:1])


async def test_a_file_that_nodes_know_and_nobody_proves_is_not_called_unknown(paused: list[float]) -> None:
    with pytest.raises(Unavailable, match="none of them proves it"):
        await Nodes(1000)._from_nodes([b"hash"])
    assert paused == list(module.new_quorum_s)


async def test_a_file_that_no_node_knows_is_unknown_at_once(paused: list[float]) -> None:
    with pytest.raises(Absent):
        await Nodes(0, knows=False)._from_nodes([b"hash"])
    assert not paused
