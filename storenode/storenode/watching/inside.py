"""The watch that runs in every node: over the node's own connections, with its memory and evidence beside the shards."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from aiohttp import web

from medshard_protocol.errors import Damaged
from storenode.evidence import evidence_in
from storenode.traffic import Lull
from storenode.watching.memory import memory_name
from storenode.watching.sources import Ask, Mirror, Source
from storenode.watching.watch import Trust, Watch

watch_key: Final = web.AppKey("watch", Watch)

per_pause: Final = (
    6  # nodes are asked in a pause: in a larger consortium each goes around less often, or all together would ask n * n times
)
sample: Final = 2  # all mirrors' heads are proved in each round; the tiles of this many are read for themselves

_log = logging.getLogger(__name__)


def node_watch(data: Path, trust: Callable[[], Trust], ask: Ask, *, log: Path | None = None) -> Watch:
    """Watch all nodes of the newest roster, this one among them: it is asked as others ask it.

    Evidence lies in ``data``; what was seen of the log in the folder of that ``log``, if it is another.
    """

    def sources() -> list[Source]:
        return [Mirror(node.name, node.id, ask) for node in trust().rosters[-1].nodes]

    path = (log or data) / memory_name
    try:
        return Watch(trust, sources, evidence_in(data), path, sample=sample)
    except Damaged as error:
        _log.error("the watch forgets what it had seen: %s", error)  # a node serves on; the file stays for whoever looks into it
        os.replace(path, path.with_suffix(".damaged"))
        return Watch(trust, sources, evidence_in(data), path, sample=sample)


def start(watch: Watch, every_s: float, lull: Lull) -> asyncio.Task[None]:
    """Run it in the background. To be cancelled at the end."""
    task = asyncio.create_task(watch.run(every_s, lull, per_pause=per_pause), name="watch")
    task.add_done_callback(_report_end)
    return task


def _report_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.critical("the watch has stopped: restart this node", exc_info=task.exception())
