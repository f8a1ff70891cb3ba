"""A node's own rounds wait for a lull in its transfers, and not for ever."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from storenode import traffic as module
from storenode.repairing.pulse import Pulse
from storenode.traffic import Traffic


async def test_rounds_wait_until_the_last_body_has_come() -> None:
    own, asked = Traffic(), asyncio.Event()

    async def peers(*_: object) -> tuple[int, bytes]:
        asked.set()
        return 200, b"ok"

    roster: Any = SimpleNamespace(nodes=[SimpleNamespace(id=b"other")])
    pulse = Pulse(b"me", peers, lambda: roster, 60.0, own.lull)  # type: ignore[arg-type]
    with own.body():
        with own.body():
            pulse.start()
        await asyncio.sleep(0.05)
        assert not asked.is_set()
    async with asyncio.timeout(60):
        await asked.wait()
    await pulse.close()


async def test_a_body_that_never_ends_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "give_way_s", 0.01)
    always = Traffic()
    with always.body():
        async with asyncio.timeout(60):
            await always.lull()
