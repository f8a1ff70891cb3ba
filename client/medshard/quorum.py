"""Waiting for the ledger no longer than there is hope, and saying who is missing when there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any, Final, TypeVar

from medshard.transport import Net
from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.roster import Node

look_after_s: Final = 1.5  # without an answer this long, the nodes are asked whether they are there
probe_timeout_s: Final = 2.0
ledger_timeout_s: Final = 15.0  # a sequencer that is gone is replaced within 5 s

T = TypeVar("T")


async def waiting_for_the_ledger(net: Net, answer: Coroutine[Any, Any, T]) -> T:
    """Await what the ledger answers. Raises what it raises, and Unavailable as soon as too few institutions are there for a quorum."""
    task = asyncio.create_task(answer)
    try:
        await asyncio.wait({task}, timeout=look_after_s)
        failed = task.done() and not task.cancelled() and isinstance(task.exception(), Unavailable)
        if not task.done() or failed:
            down = await missing(net)
            if not _has_quorum(net, down) and (not task.done() or failed):
                raise no_quorum(net, down)
        async with asyncio.timeout(ledger_timeout_s):
            return await task
    except TimeoutError:
        raise Unavailable(f"the ledger gave no answer within {ledger_timeout_s:g} s", hint="See `medshard doctor`.") from None
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def missing(net: Net) -> list[Node]:
    """The nodes that do not answer now."""

    async def is_down(node: Node) -> bool:
        try:
            await net.call(node, "GET", "/healthz", timeout_s=probe_timeout_s)
        except MedshardError:
            return True
        return False

    nodes = net.roster.nodes
    return [node for node, down in zip(nodes, await asyncio.gather(*map(is_down, nodes)), strict=True) if down]


def no_quorum(net: Net, down: Collection[Node]) -> Unavailable:
    """That the ledger takes nothing now, and why."""
    roster = net.roster
    there = [node for node in roster.nodes if node.id in roster.voices and node not in down]
    names = ", ".join(sorted(node.name for node in down))
    counted = f": {len(there)} of {len(roster.institutions)} institutions answer, {roster.quorum.q} are needed" if down else ""
    hint = f"Down are {names}: start them." if names else "See `medshard doctor`."
    return Unavailable(f"the ledger has no quorum{counted}", hint=hint)


def _has_quorum(net: Net, down: Collection[Node]) -> bool:
    return net.roster.has_quorum(node.id for node in net.roster.nodes if node not in down)
