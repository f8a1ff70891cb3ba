"""One seed: a consortium, its vaults and what goes wrong; then everything mends, and every promise is looked at.

Law: all that happens is drawn from the seed. What a vault is told to have stored is written down here, and nothing else is believed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.simulation import auditing, changes, checks, faults, lying, trespassing, wire
from tests.simulation import cluster as clusters
from tests.simulation import world as worlds
from tests.simulation.checks import Broken, Witness
from tests.simulation.cluster import Cluster, Host, vault_keys
from tests.simulation.world import Standstill, World

import medshard.getting
import medshard.putting
from medshard.vault import Vault
from medshard_protocol.errors import Full, MedshardError, Unavailable
from medshard_protocol.ids import FileId
from storenode.repairing.routes import repairs_key

patience_s = 120.0  # for what must come about once nothing goes wrong any more
repair_rounds = 12
by_itself_s = 15.0
look_every_s = 0.05
streamed_from = 2500  # bytes; more than an empty file is padded to, of which a stream would ask for nothing
still_after_s = 12.0  # so long no quorum of honest mirrors could follow one log
last_session = 9  # in which only what was begun is put again


@dataclass
class Result:
    """How one seed went."""

    seed: int
    broken: str = ""
    trace: int = 0
    steps: int = 0
    seconds: float = 0.0  # of the world
    acknowledged: int = 0
    failed: int = 0
    faults: tuple[str, ...] = ()
    stands_still: bool = False  # the log: liars left honest mirrors with different ends, none of which got a quorum
    for_good: bool = False  # also when they were honest again
    told_to_repair: int = 0  # shards that nobody found missing by itself in time
    rosters: int = 0  # that took effect after the first
    audited: dict[str, int] = field(default_factory=dict)  # shards, by verdict
    told: list[str] = field(default_factory=list)


def size_of(seed: int) -> int:
    """How many institutions a seed has."""
    return 16 if seed % 100 == 36 else 7 if seed % 20 == 2 else 5 if seed % 10 == 5 else 4


class Run:
    """A consortium in the folder where the process is: first as it begins, the same for all seeds, and then a seed's on its way."""

    def __init__(self, size: int, *, calm: bool = False) -> None:
        self.world = World()
        self.calm = calm  # nothing goes wrong
        self.rng = self.world.rng
        net = wire.install(self.world)
        self.size = size
        self.cluster = Cluster(self.world, net, size)
        clusters.install(self.cluster)
        self.witness = Witness(self.cluster)
        k, n, w = self.cluster.roster.code
        self.harm = faults.Harm(self.cluster, self.rng, w - k, n - k)
        self.result = Result(-1)
        self.stored: dict[bytes, bytes] = {}  # plaintext by its hash: what was acknowledged
        self.files: dict[bytes, list[FileId]] = defaultdict(list)  # the same bytes may be put twice
        self.reads: list[tuple[bytes, bytes]] = []
        self.unfinished: list[Path] = []
        self.split_since, self.still = 0.0, False  # the log stands still, and is right to
        self.reader: Host | None = None
        self.sources = Path("sources")
        self.sources.mkdir()
        self.joining: asyncio.Task[None] | None = None  # a node that is to join
        self.begun = False

    def go(self, seed: int) -> Result:
        """Run this seed to its end."""
        worlds.world, loop = self.world, self.world.loop
        self.result.seed = seed
        try:
            if not self.begun:
                self.begin()
            self._become(seed)
            loop.run_until_complete(self._story())
        except Broken as broken:
            self.result.broken = str(broken)
        except Standstill:
            self.result.broken = f"{self.part} does not end"
        self.result.trace, self.result.steps, self.result.seconds = loop.trace, loop.steps, loop.time()
        self.result.acknowledged, self.result.audited = len(self.stored), dict(self.harm.audited)
        return self.result

    def begin(self) -> None:
        """Start all nodes and enrol the vaults."""
        self.part = "the beginning"
        self.world.loop.run_until_complete(self._begin())
        for host in (*self.cluster.nodes, *self.cluster.vaults):
            host.disk.rest()
        self.begun = True

    def _become(self, seed: int) -> None:
        self.world.become(seed)
        self.changing = Random(f"changes {seed}")
        has_audits = seed % auditing.share == auditing.share - 1
        self.auditing = Random(f"audits {seed}") if has_audits else None  # its own: other seeds stay as they are
        self.cluster.become(seed, self.rng.choice((1 << 16, 1 << 16, 200)))
        medshard.putting.object_bytes_max = medshard.getting.object_bytes_max = self.rng.choice((1 << 22, streamed_from))  # type: ignore[misc]

    async def _story(self) -> None:
        for part in (self._trouble, self._mend, self._look):
            self.part = part.__name__
            await part()

    # -- the beginning

    async def _begin(self) -> None:
        for host in self.cluster.nodes:
            host.start()
        await self._until(lambda: all(host.parts and host.parts.node.ledger.published for host in self.cluster.nodes), "the ledger begins")
        self.owner = self.cluster.vault_host("owner")
        self.mallory = self.cluster.vault_host("mallory")
        bodies = [self.cluster.enrol(name) for name in ("owner", "mallory")]
        first = self.cluster.nodes[0]
        await first.run(self.cluster.append(first, "ca 0", *bodies))

    # -- trouble

    async def _trouble(self) -> None:
        names = self.rng.sample(sorted(faults.kinds), self.rng.choice((0, 1, 1, 2, 2, 3)))
        if self.rng.random() < 0.15 and "byzantine" not in names:
            names.append("byzantine")
        if self.calm:
            names = []
        self.result.faults = tuple(names)
        if self.result.seed % changes.share == changes.rest and not self.calm:
            self.joining = self.world.loop.create_task(changes.joins(self.cluster, self.changing))
        harming = [self.world.loop.create_task(faults.kinds[name](self.harm)) for name in names]
        if self.auditing is not None and not self.calm:
            names.append(auditing.audits.__name__)
            harming.append(self.world.loop.create_task(auditing.audits(self.harm, self.auditing)))
        until = self.world.loop.time() + self.rng.uniform(3, 10)
        for number in range(self.rng.choice((1, 1, 1, 2))):
            if self.world.loop.time() < until:
                await self._session(number, until)
        if self.unfinished and not self.calm:  # what was begun is begun again, with other bytes under the same name, size and time
            for path in self.unfinished[:2]:
                if self.rng.random() < 0.7:
                    self._change(path)
            await self._session(last_session, self.world.loop.time() + self.rng.uniform(2, 6))
        self.harm.ended = True
        ending = {name: task for name, task in zip(names, harming, strict=True) if name not in faults.lasting}
        for name, task in ending.items():
            if name not in faults.finishing:
                task.cancel()
        for answer in await asyncio.gather(*ending.values(), return_exceptions=True):
            if isinstance(answer, Exception) and not isinstance(answer, MedshardError):
                raise answer
        self.result.told += self.harm.done

    async def _session(self, number: int, until: float) -> None:
        """The owner's program runs once, perhaps not to its end."""
        loop, owner = self.world.loop, self.owner
        working = owner.run(self._owner_works(number))
        power_fails_at = loop.time() + self.rng.uniform(0.01, 1.0) if self.rng.random() < 0.25 and number == 0 else until
        while not working.done() and loop.time() < min(until, power_fails_at):
            await asyncio.sleep(look_every_s)
        if working.done():
            working.result()
            return
        owner.cut(silent=True)
        owner.machine = self.world.machine(owner)

    async def _owner_works(self, number: int) -> None:
        async with self.cluster.vault(self.owner) as vault:
            for path in self.unfinished[:2]:
                await self._tried("put again", self._put(vault, path))
            for turn in range(self.rng.choice((1, 1, 2, 3)) if number != last_session else 0):
                await asyncio.sleep(self.rng.uniform(0.0, 1.0))
                what = self.rng.choices(("put", "get", "share"), (6, 3, 1))[0]
                if what == "put" or not self.stored:
                    await self._tried("put", self._put(vault, self._new_file(f"{number}-{turn}")))
                elif what == "get":
                    await self._tried("get", self._get(vault, self.rng.choice(sorted(self.stored))))
                else:
                    await self._tried("share", self._share(vault, self.rng.choice(sorted(self.stored))))

    async def _tried(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except MedshardError as error:
            if what.startswith("put") and self.rng.random() < 0.3:
                self._change(self.unfinished[-1])
            self.result.failed += 1
            self.result.told.append(f"{self.world.loop.time():.1f} {what}: {error}")

    def _new_file(self, name: str) -> Path:
        path = self.sources / f"{name}.bin"
        path.write_bytes(self.rng.randbytes(self.rng.choice((0, 1, 700, 3000, 3000, 9000))))
        os.utime(path, ns=(10**18, 10**18))
        return path

    def _change(self, path: Path) -> None:
        """Put another file under the same name, size and time: nothing of the first may be used for it."""
        path.write_bytes(self.rng.randbytes(path.stat().st_size))
        os.utime(path, ns=(10**18, 10**18))

    async def _put(self, vault: Vault, path: Path) -> None:
        if path not in self.unfinished:
            self.unfinished.append(path)
        content = path.read_bytes()
        report = await vault.put([path])
        for stored in report.stored:
            if stored.sha256 != hashlib.sha256(content).digest():
                raise Broken("a put told another hash than its file has")
            self._count_holders(FileId(stored.file_id), already=stored.already)
            self.stored[stored.sha256] = content
            self.files[stored.sha256].append(FileId(stored.file_id))
            self.unfinished.remove(path)
            if self.rng.random() < 0.3:
                self._change(path)
                self.unfinished.append(path)

    def _count_holders(self, file_id: FileId, *, already: bool) -> None:
        """On how many nodes there are shards of what a put acknowledged: stored for it, or there since an earlier try and found by it."""
        said = {host for host, known in self.witness.stored if known == file_id} | self.harm.byzantine
        if len(said) < self.cluster.roster.code[2] and not already:
            raise Broken(f"acknowledged with shards on {len(said)} nodes of the {self.cluster.roster.code[2]} that are due")

    async def _get(self, vault: Vault, sha256: bytes) -> None:
        path = self.sources / f"got-{vault.keys.public.hex()[:4]}.bin"
        await vault.get(sha256, path)
        if path.read_bytes() != self.stored[sha256]:
            raise Broken("a get gave other bytes than were put")
        self.reads.append((vault.keys.public, sha256))

    async def _share(self, vault: Vault, sha256: bytes) -> None:
        """Let the reader read, and perhaps not any more."""
        if self.reader is None:
            first = next((host for host in self.cluster.nodes if host.parts is not None), None)
            if first is None:
                raise Unavailable("no node is up to enrol the reader at")
            self.reader = self.cluster.vault_host("reader")
            await first.run(self.cluster.append(first, "ca 0", self.cluster.enrol("reader")))
            await self.reader.run(self._publishes_key())
        reader = vault_keys("reader").public
        await vault.shares.share([sha256], reader)
        await self.reader.run(self._reader_gets(sha256))
        await vault.shares.revoke([sha256], reader)
        try:
            await self.reader.run(self._reader_gets(sha256))
        except MedshardError:
            return
        raise Broken("read after a revocation took effect")

    async def _publishes_key(self) -> None:
        assert self.reader is not None
        async with self.cluster.vault(self.reader) as vault:
            await vault.shares.publish_key()

    async def _reader_gets(self, sha256: bytes) -> None:
        assert self.reader is not None
        async with self.cluster.vault(self.reader) as vault:
            await self._get(vault, sha256)

    # -- the end of all trouble

    async def _mend(self) -> None:
        """Networks, disks, clocks and power are well again. Who lies goes on lying."""
        net = self.cluster.net
        net.loss, net.slow = 0.0, (0.0002, 0.003)
        net.split({})
        for host in self.cluster.nodes:
            host.disk.full, host.disk.cut_after, host.skew_s = False, None, 0.0
        await self._until_agreed(self.harm.byzantine)

    async def _reform(self) -> None:
        """Who lied is honest again, but for one who spoils sums, whom a repair must find out by itself."""
        liars = sorted(self.harm.byzantine | self.harm.false, key=str)
        spoiler = next((host for host in liars if host in self.harm.byzantine and lying.spoils_sums in self.harm.lies.get(host, ())), None)
        for host in liars:
            if host is spoiler:
                self.harm.lies[host] = [lying.spoils_sums]
            else:
                self.harm.reformed.add(host)
            host.cut(silent=False)
        await self._until_agreed(set())

    async def _until_agreed(self, left_out: set[Host]) -> None:
        def hosts() -> list[Host]:
            return [host for host in self.cluster.nodes if host not in left_out]

        self.split_since, self.still = self.world.loop.time(), False
        is_led_astray = self.harm.forked or self.harm.mirrors_that_lie()[0]
        handing_in = self.world.loop.create_task(self._hand_in_now_and_then(hosts())) if is_led_astray else None
        await self._until(lambda: self._all_agree(hosts()) or self._stands_still(), "all nodes hold one published log")
        if handing_in is not None:
            handing_in.cancel()

    async def _hand_in_now_and_then(self, hosts: list[Host]) -> None:
        """As long as nobody appends anything, a leader that forked may keep from some what it published, and one that takes no entries may
        leave a node with an end that nothing rules out: the next append brings it out."""
        for number in range(1, 1000):
            await asyncio.sleep(5.0)
            host = self.rng.choice(hosts)
            if host.parts is not None:
                await asyncio.wait(
                    [host.run(faults.handed_in(self.cluster, host, self.cluster.enrol(f"afterwards {number}")))], timeout=15.0
                )

    def _stands_still(self) -> bool:
        """Whether liars have left honest mirrors with different ends, of which none can get a quorum (docs/decisions/0033-simulation.md).
        Nothing is lost or forked by it; without liars nothing brings it about, and after them only a fork lets it last."""
        mute, sign_all = self.harm.mirrors_that_lie()
        if not (mute or self.harm.forked) or not all(host.parts for host in self.cluster.nodes):
            return False
        honest = [host for host in self.cluster.nodes if host not in mute | sign_all]
        if checks.can_go_on(honest, self.cluster.roster.quorum.q - len(sign_all)):
            self.split_since = self.world.loop.time()
        self.still = self.world.loop.time() - self.split_since > still_after_s
        return self.still

    def _all_agree(self, hosts: list[Host]) -> bool:
        self._look_for_errors()
        if self.joining is not None and self.joining.done():
            self.joining.result()
        for host in self.cluster.nodes:
            if host.machine is None:  # it was ending when all trouble ended
                host.start()
        if not all(host.parts is not None and host.parts.node.ledger.published for host in hosts):
            return False
        ledgers = [host.parts.node.ledger for host in hosts]
        if (self.joining is not None and not self.joining.done()) or {host.parts.roster for host in hosts} != {self.cluster.roster}:
            return False
        sizes = {checks.published(host) for host in hosts} | {ledger.journal.head.size for ledger in ledgers}
        return len(sizes) == 1 and any(host.parts and host.parts.node.ledger.leads for host in self.cluster.nodes)

    def _look_for_errors(self) -> None:
        for host in self.cluster.nodes:
            if host.error is not None and not isinstance(host.error, OSError | Full):
                raise Broken(f"{host} ended by itself: {host.error!r}")

    # -- the promises

    async def _look(self) -> None:
        byzantine = set(self.harm.byzantine)
        self.witness.check(byzantine)
        await self._audit_all()  # while liars lie
        self.result.stands_still = stood = self.still
        if not stood:
            await self._on(self.owner, self._all_come_back)
            if self.rng.random() < 0.6:
                await self._on(
                    self.mallory, lambda: trespassing.stranger_reads(self.cluster, self.mallory, self._file_ids()[:1], self.harm.byzantine)
                )
        await self._reform()
        self.witness.check_stores(self.harm.spoiled | byzantine)
        self.witness.check(byzantine)
        if self.still:
            self.result.for_good = True
            checks.check_k_are_left(self.cluster, self._file_ids())
            return
        if stood:
            await self._on(self.owner, self._all_come_back)
        await self._audit_all()
        await self._repair_all()
        await self._repair_beside_a_liar()
        if self.rng.random() < 0.6:
            host = self.rng.choice(self.cluster.nodes)
            await self._on(host, lambda: trespassing.node_grabs(self.cluster, host, self._file_ids()[:1]))
        await self._leave()
        honest = [host for host in self.cluster.nodes if host not in byzantine]
        reads = [(reader, self.files[sha256]) for reader, sha256 in self.reads]
        checks.check_traces(max(honest, key=checks.published), reads, set(self._file_ids()))
        self.witness.check(byzantine)
        self.result.told += self.world.loop.failures[:3]

    async def _audit_all(self) -> None:
        if self.auditing is not None and not self.calm:
            await auditing.audit(self.harm, self.auditing, self._file_ids())

    async def _all_come_back(self) -> None:
        for path in self.owner.disk.folder.glob("index.sqlite*"):
            path.unlink()  # another computer, with nothing but the key
        medshard.getting.object_bytes_max = streamed_from  # type: ignore[misc]
        async with self.cluster.vault(self.owner) as vault:
            for sha256 in sorted(self.stored):
                for tries in range(4):  # a mirror whose connection broke may be seconds behind
                    try:
                        await self._get(vault, sha256)
                        break
                    except MedshardError as error:
                        if not self._can_come_back(sha256):
                            break
                        if tries == 3 or not isinstance(error, Unavailable):
                            raise Broken(f"lost: a file that was acknowledged does not come back ({error})") from None
                        await asyncio.sleep(3.0)

    def _can_come_back(self, sha256: bytes) -> bool:
        """Whether as many shards as it takes are with nodes that do not lie about what they have. Of a file with w shards fewer may be."""
        liars = self.harm.byzantine | self.harm.false
        if not self.harm.false:
            return True
        return any(checks.truthful_shards(self.cluster, file_id, liars) >= self.cluster.roster.code[0] for file_id in self.files[sha256])

    async def _repair_all(self) -> None:
        """Everything returns to n shards: by itself, and what only a look at the disk finds, when each holder is told to look."""
        deadline = self.world.loop.time() + self.rng.choice((0.0, 0.0, 0.0, by_itself_s))
        while self.world.loop.time() < deadline and self._missing():
            await asyncio.sleep(1.0)
        await self._repair_those_told()

    async def _repair_beside_a_liar(self) -> None:
        """A disk loses a shard or changes a manifest, and one of those that may help adds something else: it is made again all the same."""
        if not self.files or self.rng.random() > 0.35:
            return
        liars = [host for host in self.harm.lies if host not in self.harm.reformed]
        if not liars:
            liars = [self.rng.choice(self.cluster.nodes)]
            lying.spoils_sums(liars[0], self.rng)
        file_id = self.rng.choice(self._file_ids())
        loser = self.rng.choice([host for host in self.cluster.nodes if host not in liars])
        harm = faults.spoils_manifest if file_id[0] % 3 == 0 else faults.loses
        harm(loser, file_id)
        self.result.told.append(f"{loser} {harm.__name__} beside {liars}")
        await self._repair_those_told()

    async def _repair_those_told(self) -> None:
        why = ""
        for _ in range(repair_rounds):
            left = self._missing()
            if not left:
                return
            self.result.told_to_repair += len(left)
            for file_id, host in left:
                try:
                    await host.run(self._one_repair(host, file_id))
                except MedshardError as error:
                    why = f"{host}: {error}"
                    await auditing.again(self.harm, self.auditing, host, file_id)
            await asyncio.sleep(0.5)
        raise Broken(f"not repaired: {len(left)} shards are still missing ({why})")

    async def _one_repair(self, host: Host, file_id: FileId) -> None:
        await host.app[repairs_key].repairer.begin(file_id)

    def _missing(self) -> list[tuple[FileId, Host]]:
        return [(file_id, host) for file_id in self._file_ids() for _, host in checks.missing_shards(self.cluster, file_id)]

    async def _leave(self) -> None:
        """A node leaves, and nothing of what it had is missing without it."""
        if self.joining is None:
            return
        host = await changes.leaves(self.cluster, self.changing)
        self.result.rosters = self.cluster.roster.number
        if host is None:
            return
        self.result.told.append(f"{host} leaves")
        await self._until_agreed(set())
        if self._missing():
            raise Broken(f"{host} left, and not all that it had is elsewhere")
        await self._on(self.owner, self._all_come_back)

    # -- parts

    def _file_ids(self) -> list[FileId]:
        return sorted({file_id for file_ids in self.files.values() for file_id in file_ids})

    async def _on(self, host: Host, work: Callable[[], Any]) -> None:
        await host.run(work())

    async def _until(self, true: Callable[[], object], what: str) -> None:
        deadline = self.world.loop.time() + patience_s
        while not true():
            if self.world.loop.time() > deadline:
                raise Broken(f"within {patience_s:.0f} s it does not come about that {what}: {checks.standing(self.cluster)}")
            await asyncio.sleep(0.1)


def run(seed: int, begun: Run | None = None) -> Result:
    """Run one seed, in the folder where the process is; ``begun`` is one of its size that was begun in a folder of which this is a copy.
    Once in a process: the world does not end with it."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    return (begun or Run(size_of(seed))).go(seed)
