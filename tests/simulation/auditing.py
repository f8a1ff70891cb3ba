"""Audits in a run: nodes challenge each other at a pace that a run meets, and what they find is compared with the disks.

Law: an audit is the node's own, only its moment is drawn here. Of whoever does not lie nobody says so, whatever others say and however many
of them lie; a shard that is there is not called gone, and one that is gone is not called good.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from dataclasses import replace
from random import Random
from typing import Any

from tests.simulation import checks, lying
from tests.simulation.checks import Broken
from tests.simulation.cluster import Cluster, Host
from tests.simulation.faults import Harm

from medshard_protocol.audit import Answer, Verdict
from medshard_protocol.errors import MedshardError
from medshard_protocol.ids import FileId
from storenode.auditing.challenger import Round
from storenode.auditing.routes import audits_key

share = 4  # one seed in so many has audits
patience_s = 30.0  # for one, whose node may lose its power
_gone = (Verdict.ABSENT, Verdict.DAMAGED)
_there = (Verdict.GOOD, Verdict.SAID)
_Conditions = dict[tuple[Host, FileId, int], int]


async def audits(harm: Harm, rng: Random) -> None:
    """Nodes audit what they draw, while all else goes wrong."""
    while not harm.ended:
        await asyncio.sleep(rng.uniform(0.1, 1.0))
        host = rng.choice(harm.cluster.nodes)
        if host.machine is not None and host.parts is not None:
            await _heard(host, harm, rng, None)


async def audit(harm: Harm, rng: Random, file_ids: list[FileId]) -> None:
    """Every file is audited by a node of its own."""
    for file_id in file_ids:
        await _heard(rng.choice([host for host in harm.cluster.nodes if host.parts is not None]), harm, rng, file_id)


async def again(harm: Harm, rng: Random | None, host: Host, file_id: FileId) -> None:
    """In a seed with audits a node looks again at a file, as it does by itself a minute after it found something wrong in it: whoever lied
    then may be honest by now."""
    if rng is not None:
        await _heard(host, harm, rng, file_id)


async def _heard(host: Host, harm: Harm, rng: Random, file_id: FileId | None) -> None:
    for liar in sorted((harm.byzantine | harm.false) - harm.reformed, key=str):
        if liar.machine is not None and liar.parts is not None and harm.vouching.get(liar) is not liar.machine:
            harm.vouching[liar] = liar.machine
            _vouches(liar, rng)
    up = {each: each.machine for each in harm.cluster.nodes if each.parts is not None}
    before = _conditions(harm.cluster)
    asking = host.run(host.app[audits_key].auditor.now(1, file_id))
    await asyncio.wait([asking], timeout=patience_s)
    if not asking.done() or host in harm.byzantine | harm.false - harm.reformed:
        return  # without power nobody asks any more, and what a liar finds is nobody's concern
    with contextlib.suppress(MedshardError, OSError, sqlite3.Error):  # it lacks the file's manifest, or its disk is full
        for done in asking.result():
            _judge(done, host, harm, before, {each for each, machine in up.items() if each.parts is not None and each.machine is machine})


def _vouches(host: Host, rng: Random) -> None:
    """Whatever else it says: as a holder it gives tags of cells that it has not got."""
    answerer = host.app[audits_key].answerer
    look = answerer._look

    async def lies(*values: Any) -> Answer:
        answer = await look(*values)
        return replace(answer, tag=lying.flipped(answer.tag, rng))

    answerer._look = lies


def _conditions(cluster: Cluster) -> _Conditions:
    """Of all shards that catalogs list."""
    held = [(host, *each) for host in cluster.nodes if host.parts is not None for each in checks.rows(host)]
    return {each: _condition(*each) for each in held}


def _condition(host: Host, file_id: FileId, index: int) -> int:
    """As ``checks`` tells, but that a holder can vouch only for what it has a manifest of: a put leaves that with w nodes."""
    found = checks.condition(host, file_id, index)
    return found if found < 3 or checks.describes(host, file_id) else 2


def _judge(done: Round, auditor: Host, harm: Harm, before: _Conditions, up: set[Host]) -> None:
    by_id = {host.node.id: host for host in harm.cluster.nodes}
    liars = (harm.byzantine | harm.false) - harm.reformed
    for shard, (node, heard) in done.verdicts.items():
        host = by_id[node]
        harm.audited[str(heard.verdict)] += 1
        if host not in liars and heard.verdict is Verdict.WRONG:  # rot is owned up to, so this is said of liars alone
            raise Broken(f"{auditor} calls {host} a liar ({heard.why})")
        now = _condition(host, done.file_id, shard)
        if host in liars or host not in up or before.get((host, done.file_id, shard), 0) != now:
            continue  # or it changed, or was away, meanwhile
        if host in harm.spoiled and not harm.ended:
            continue  # whose disk changes all the time, and is mended
        if now == 3 and heard.verdict in _gone:
            raise Broken(f"{auditor} calls a shard {heard.verdict} that {host} has and shows ({heard.why})")
        if now == 0 and heard.verdict in _there:
            raise Broken(f"{auditor} calls a shard {heard.verdict} that {host} has not got")
