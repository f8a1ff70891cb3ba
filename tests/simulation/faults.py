"""What goes wrong in a run: each fault is a coroutine that does harm for a while, as the seed says, and byzantine nodes that lie.

Law: a byzantine node is the real one with some of its parts exchanged, so it knows all that a node knows; it has no other node's keys.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.conftest import key_named
from tests.simulation import disk, lying
from tests.simulation.cluster import Cluster, Host

from medshard.transport import Net
from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, Signature, log_verifier, open_published
from medshard_protocol.entries import Enrol, sign_entry
from medshard_protocol.errors import MedshardError
from medshard_protocol.identity import public_key
from medshard_protocol.ids import FileId
from medshard_protocol.merkle import sha256
from storenode.ledger import wire
from storenode.ledger.channel import Channel
from storenode.ledger.wire import Push
from storenode.peers import Peers

late_s = 1.0  # so late something may arrive that was sent in bad times


@dataclass
class Harm:
    """What a run may do: to whom, and what it has done."""

    cluster: Cluster
    rng: Random
    budget: int  # nodes that may lie about storing, or lose what they were given: fewer than would lose an acknowledged file
    most: int  # nodes of which nothing good is to be had: as many as a file may lose
    byzantine: set[Host] = field(default_factory=set)
    spoiled: set[Host] = field(default_factory=set)
    false: set[Host] = field(default_factory=set)  # those that store, and lie about what they have when somebody wants it
    done: list[str] = field(default_factory=list)
    ended: bool = False
    forked: bool = False
    lies: dict[Host, list[Any]] = field(default_factory=dict)
    reformed: set[Host] = field(default_factory=set)
    vouching: dict[Host, Any] = field(default_factory=dict)  # liars that lie to auditors too, in which of their runs
    audited: Counter[str] = field(default_factory=Counter)  # what audits found

    def victim(self) -> Host | None:
        """A node that may lose data or lie, within the budget."""
        known = self.byzantine | self.spoiled
        is_room = len(known) < self.budget and len(known | self.false) < self.most
        free = [host for host in self.cluster.nodes if host not in known] if is_room else sorted(known, key=str)
        return self.rng.choice(free) if free else None

    def mirrors_that_lie(self) -> tuple[set[Host], set[Host]]:
        """Those that may keep back their voice, or have ends of their own; and those that sign all that they are shown."""
        lying_now = self.byzantine - self.reformed
        mute = {host for host in lying_now if host not in self.lies or lying.withholds in self.lies[host]}
        return mute, {host for host in lying_now - mute if lying.cosigns_anything in self.lies[host]}


# -- the network


async def bad_network(harm: Harm) -> None:
    """Packets are lost and late, connections break."""
    net, rng = harm.cluster.net, harm.rng
    net.loss, net.slow = rng.choice((0.02, 0.1, 0.3)), (0.0005, rng.choice((0.01, 0.1, 0.4)))
    while not harm.ended:
        await asyncio.sleep(rng.uniform(0.3, 3.0))
        net.breaks(rng.choice((0.1, 0.5, 1.0)))


async def duplicates(harm: Harm) -> None:
    """Requests are made twice: by who got no answer in time, or by something in between."""
    rng = harm.rng

    def twice(call: Any) -> Any:
        async def made(*values: Any, **keywords: Any) -> Any:
            if not harm.ended and rng.random() < 0.3:
                first = asyncio.ensure_future(call(*values, **keywords))
                await asyncio.sleep(rng.choice((0.0, 0.01, 1.0)))
                first.add_done_callback(lambda done: done.cancelled() or done.exception())
            return await call(*values, **keywords)

        return made

    Peers.__call__ = twice(Peers.__call__)  # type: ignore[method-assign]
    Net.call = twice(Net.call)  # type: ignore[method-assign]


async def partitions(harm: Harm) -> None:
    """Some hosts do not reach others for a while."""
    rng, cluster = harm.rng, harm.cluster
    while not harm.ended:
        await asyncio.sleep(rng.uniform(0.1, 1.5))
        apart = rng.sample(cluster.nodes, rng.randint(1, max(1, len(cluster.nodes) // 2)))
        cluster.net.split(dict.fromkeys(apart, 1))
        await asyncio.sleep(rng.uniform(0.2, 6.0))
        cluster.net.split({})


async def halves(harm: Harm) -> None:
    """Who leads is in one half and another that may lead in the other for a while, and each half is handed an entry of its own."""
    rng, cluster = harm.rng, harm.cluster
    await asyncio.sleep(rng.uniform(0.0, 1.0))
    may_lead = cluster.nodes[:2]
    leader = next((host for host in may_lead if host.parts is not None and host.parts.node.ledger.leads), None)
    if leader is None:
        return
    rival = next(host for host in may_lead if host is not leader)
    rest = rng.sample(cluster.nodes[2:], len(cluster.nodes) // 2 - 1)
    cluster.net.split(dict.fromkeys((rival, *rest), 1))
    handing_in = []
    for number, host in enumerate((leader, rival)):
        if host.machine is not None and host.parts is not None:
            handing_in.append(host.run(handed_in(cluster, host, cluster.enrol(f"half {number}"))))
    await asyncio.sleep(rng.uniform(6.0, 9.0))
    for task in handing_in:
        task.cancel()
    cluster.net.split({})


async def handed_in(cluster: Cluster, host: Host, body: Enrol) -> None:
    """Hand an entry in at this node; whether it is taken is another question."""
    with contextlib.suppress(MedshardError):
        await cluster.append(host, "ca 0", body)


# -- machines


async def crashes(harm: Harm) -> None:
    """Nodes lose their power at any time, or in the middle of a write, and get it back; now and then all of them at once. Or their process
    is killed, and what it had not synced may go with the next power cut."""
    rng, cluster = harm.rng, harm.cluster
    while not harm.ended:
        await asyncio.sleep(rng.uniform(0.05, 1.0))
        hosts = cluster.nodes if rng.random() < 0.25 else rng.sample(cluster.nodes, rng.choice((1, 1, 2)))
        killed = rng.random() < 0.3
        if rng.random() < 0.7:
            for host in hosts:
                host.disk.cut_after, host.disk.kills = rng.randint(1, 4), killed
            await asyncio.sleep(rng.uniform(0.05, 1.5))
        for host in hosts:
            host.disk.cut_after = None
            if not killed:
                host.cut(silent=rng.random() < 0.5)
            elif host.machine is not None:
                host.kill()
        await asyncio.sleep(rng.uniform(0.05, 4.0))
        for host in hosts:
            if host.machine is None:
                host.start()


async def restarts(harm: Harm) -> None:
    """Nodes are stopped as an operator does, and started again."""
    rng, cluster = harm.rng, harm.cluster
    while not harm.ended:
        await asyncio.sleep(rng.uniform(0.2, 2.0))
        host = rng.choice(cluster.nodes)
        host.stop()
        for _ in range(200):
            if host.machine is None:
                break
            await asyncio.sleep(0.2)
        if host.machine is None:
            host.start()


async def skewed_clocks(harm: Harm) -> None:
    """Some clocks are wrong, and jump."""
    while not harm.ended:
        for host in harm.rng.sample(harm.cluster.nodes, harm.cluster.roster.quorum.f):
            host.skew_s = harm.rng.choice((-3600.0, -30.0, 5.0, 86_400.0 * 400))
        await asyncio.sleep(harm.rng.uniform(0.5, 3.0))


# -- disks


async def full_disks(harm: Harm) -> None:
    """Disks of some nodes, or of all, take nothing for a while."""
    rng, cluster = harm.rng, harm.cluster
    while not harm.ended:
        await asyncio.sleep(rng.uniform(0.1, 1.5))
        hosts = cluster.nodes if rng.random() < 0.2 else rng.sample(cluster.nodes, rng.choice((1, 2, 2)))
        for host in hosts:
            host.disk.full, host.disk.tells = True, rng.random() < 0.3
        await asyncio.sleep(rng.uniform(0.2, 3.0))
        for host in hosts:
            host.disk.full = False


async def bit_rot(harm: Harm) -> None:
    """What some node was given changes on its disk: a bit, a torn write, a write that went elsewhere, or all of it."""
    while not harm.ended:
        await asyncio.sleep(harm.rng.uniform(0.2, 1.5))
        host = harm.victim()
        if host is not None and host.machine is not None:
            harm.spoiled.add(host)
            _spoil(host, harm.rng)


def loses(host: Host, file_id: FileId) -> None:
    """Its disk loses the row of this file's shard."""
    with disk.real.connect(host.disk.folder / "data" / "store.sqlite") as database:
        database.execute("DELETE FROM shards WHERE file_id = ?", (file_id,))
    database.close()


def spoils_manifest(host: Host, file_id: FileId) -> None:
    """Its disk changes this file's manifest, if it has one, and leaves the shard."""
    with disk.real.connect(host.disk.folder / "data" / "store.sqlite") as database:
        for (value,) in database.execute("SELECT bytes FROM manifests WHERE file_id = ?", (file_id,)).fetchall():
            database.execute("UPDATE manifests SET bytes = ? WHERE file_id = ?", (value[:-1] + bytes([value[-1] ^ 1]), file_id))
    database.close()


def _spoil(host: Host, rng: Random) -> None:
    data = host.disk.folder / "data"
    for path in sorted(data.glob("shards/??/*")):
        content = path.read_bytes()
        if content:
            path.write_bytes(_changed(content, rng))
    if not (data / "store.sqlite").exists():
        return
    with disk.real.connect(data / "store.sqlite") as database:
        wanted = rng.choice(("data", "data", "digests", "bytes", "rows"))
        table = "manifests" if wanted == "bytes" else "shards"
        if wanted == "rows":
            database.execute("DELETE FROM shards")
            return
        for file_id, value in database.execute(f"SELECT file_id, {wanted} FROM {table} WHERE {wanted} IS NOT NULL").fetchall():
            database.execute(f"UPDATE {table} SET {wanted} = ? WHERE file_id = ?", (_changed(value, rng), file_id))
    database.close()


def _changed(content: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(content))
    return rng.choice((
        content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
        content[:at] + bytes(len(content) - at),  # torn
        content[at:] + content[:at],  # misdirected
        content[:at],
    )) or b"\x00"  # fmt: skip


# -- nodes that lie


async def byzantine(harm: Harm) -> None:
    """Some nodes lie from now on, also after a restart, until they are reformed."""
    for _ in range(harm.rng.randint(1, max(1, min(harm.budget, harm.cluster.roster.quorum.f)))):
        host = harm.victim()
        if len(harm.byzantine) < harm.cluster.roster.quorum.f and host is not None:
            harm.byzantine.add(host)
            harm.lies[host] = list(dict.fromkeys(harm.rng.sample(lying.lies, harm.rng.randint(1, 3))))
            harm.done += [f"{host} {lie.__name__}" for lie in harm.lies[host]]
    await _lie(harm)


async def false_holders(harm: Harm) -> None:
    """As many nodes as a file may lose lie from some time on about what they have. They store what they are given, and as mirrors they are
    honest, of which a quorum must be."""
    await asyncio.sleep(harm.rng.uniform(0.0, 2.0))
    if harm.ended:
        return
    known = harm.byzantine | harm.spoiled
    free = [host for host in harm.cluster.nodes if host not in known]
    for host in harm.rng.sample(free, max(0, harm.most - len(known) - harm.rng.choice((0, 0, 1)))):
        harm.false.add(host)
        harm.lies[host] = harm.rng.sample(lying.of_holders, harm.rng.randint(1, 2))
        harm.done += [f"{host} {lie.__name__}" for lie in harm.lies[host]]
    await _lie(harm)


async def _lie(harm: Harm) -> None:
    while harm.lies:
        for host, chosen in harm.lies.items():
            if host.parts is not None and host.lies_in is not host.machine and host not in harm.reformed:
                host.lies_in = host.machine
                for lie in chosen:
                    lie(host, harm.rng)
        await asyncio.sleep(0.1)


async def forks(harm: Harm) -> None:
    """A node with a log key shows two histories to two halves of the mirrors, and each half the other's afterwards."""
    cluster, rng = harm.cluster, harm.rng
    await asyncio.sleep(rng.uniform(0.0, 2.0))
    if len(harm.byzantine | harm.spoiled) >= min(harm.budget, cluster.roster.quorum.f):
        return
    host = next((each for each in cluster.nodes if each.parts is not None and each.parts.node.ledger.leads), None)
    if host is None or host in harm.spoiled:
        return
    harm.byzantine.add(host)
    harm.done.append(f"{host} forks")
    harm.forked = True
    while not harm.ended:
        if host.parts is not None and host.parts.node.ledger.leads:
            await asyncio.wait([host.run(_fork(harm, host))], timeout=20.0)  # it may lose its power meanwhile
        await asyncio.sleep(rng.uniform(0.1, 1.0))
    await asyncio.sleep(late_s)


async def _fork(harm: Harm, host: Host) -> None:
    roster, rng, ledger = harm.cluster.roster, harm.rng, host.parts.node.ledger
    journal, epoch = ledger.journal, ledger.mirror.epoch
    others = [node.id for node in roster.nodes if node.id != host.node.id]
    rng.shuffle(others)
    half = rng.randint(1, len(others) - 1)
    key = key_named(f"log {host.number}" if host.number else "log")
    start = journal.head.size
    branches = []
    for branch in range(2):
        body = Enrol(public_key(key_named(f"branch {branch} {start}")), 0, rng.randbytes(16))
        own = key_named(f"ca {host.number}")
        fresh = sign_entry(roster.origin, body, public_key(own), own.sign).to_bytes()
        history = [*journal.store.entries(0, start), fresh]
        root = merkle.root([merkle.leaf_hash(entry, sha256) for entry in history], sha256)
        text = Checkpoint(roster.origin, len(history), root).text()
        branches.append((history, Note(text, (log_verifier(roster, host.node.id).sign(text, key.sign),)).to_bytes()))
    published = journal.published.note if journal.published else b""
    pushes = []
    for node in others:
        first = others.index(node) >= half
        for history, signed in (branches[first], branches[not first]):
            old = rng.choice((start, start, 0, max(0, start - 1)))
            pushes.append((node, Push(epoch, rng.choice((0, start)), old, tuple(history[old:]), signed, published)))
    lines: dict[bytes, list[str]] = {signed: [ledger.mirror.cosign(Note.from_bytes(signed).text).line()] for _, signed in branches}
    for node, push in pushes:
        answer = await _told(ledger, node, push)
        lines[push.signed] += [line for line in answer.splitlines(keepends=True) if line]
    for signed, cosigned in lines.items():
        note = Note.from_bytes(signed)
        whole = note.signed_by([Signature.from_line(line) for line in cosigned]).to_bytes()
        with contextlib.suppress(MedshardError):
            open_published(whole, roster)
            for node in others:
                await _told(ledger, node, Push(epoch, 0, 0, (), b"", whole))


async def _told(ledger: Any, node: Any, push: Push) -> str:
    channel = Channel(node, ledger._call)
    try:
        status, answer = await channel.ask(push.to_bytes(), 1.0)
        return wire.unpack_cosignature(answer).line if status == 200 else ""
    except MedshardError:
        return ""
    finally:
        channel.drop()


_of_networks = (bad_network, duplicates, partitions, halves)
_of_machines = (crashes, restarts, skewed_clocks, full_disks, bit_rot)
_of_people = (byzantine, false_holders, forks)
kinds = {each.__name__: each for each in (*_of_networks, *_of_machines, *_of_people)}
lasting = ("byzantine", "false_holders")  # which go on when all else is well again
finishing = ("forks",)  # which end what they have begun, before anything is judged
