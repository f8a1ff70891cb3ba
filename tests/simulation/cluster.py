"""A consortium and its vaults in a world: the node's own ``serve`` on each host, and open vaults on hosts of their own.

Law: keys come from names and not from files, and whoever has a vault is enrolled by an entry of institution 0; everything else is done as
the programs do it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from tests.conftest import consortium_of, key_named, pq_key_named
from tests.simulation.disk import Disk
from tests.simulation.network import Network
from tests.simulation.world import Machine, World

import storenode.app
import storenode.shardstore.store
from medshard import hpke
from medshard.home import Home
from medshard.keys import VaultKeys
from medshard.vault import Vault
from medshard_protocol import checkpoint, entries, repairorder, sharing
from medshard_protocol.entries import Body, Enrol, sign_entry
from medshard_protocol.identity import client_certificate, client_csr, node_certificate, public_key
from medshard_protocol.ids import Key
from medshard_protocol.roster import Node, Roster
from medshard_protocol.rosters import Link
from storenode.config import Config, Limits, RepairSection
from storenode.identity import NodeKeys
from storenode.membership import Membership

made_at = datetime(2025, 6, 1, tzinfo=UTC)
codes = {4: (2, 4, 3), 5: (2, 5, 4), 7: (3, 7, 5), 16: (8, 16, 12)}
port_first = 9700


class Host:
    """A computer with a disk, a clock and an address. ``machine`` is its present run, if it has power."""

    node: Node  # as the roster lists it, if it does

    def __init__(self, world: World, net: Network, name: str, number: int, certificate: bytes) -> None:
        self.world, self.net, self.name, self.number = world, net, name, number
        self.disk = Disk(Path(name))
        self.certificate = certificate
        self.skew_s = 0.0
        self.quick = False  # sooner heard than others
        self.silent = False  # without power it does not even say that nobody listens
        self.machine: Machine | None = None
        self.parts: Any = None  # a node's running parts
        self.app: Any = None
        self.lies_in: Machine | None = None  # the run in which it was made to lie
        self.error: BaseException | None = None
        self.main: Callable[[], Coroutine[Any, Any, Any]]

    def __repr__(self) -> str:
        return self.name

    def start(self) -> None:
        """Give it power."""
        assert self.machine is None
        self.error = None
        machine = self.machine = self.world.machine(self)
        self.run(self._living(machine))

    def run(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Let something happen on this host."""
        assert self.machine is not None
        return self.world.loop.create_task(work, context=self.machine.context())

    async def _living(self, machine: Machine) -> None:
        try:
            await self.main()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.error = error
        if self.machine is machine:
            self.cut(silent=False)

    def stop(self) -> None:
        """Ask it to end, as SIGTERM does."""
        if self.machine is not None and self.machine.on_signal is not None:
            self.machine.on_signal()

    def kill(self) -> None:
        """End its program at once. What that wrote and did not sync is there for the next run, until a power cut."""
        self._end(silent=False)
        self.disk.lose_process()

    def cut(self, *, silent: bool) -> None:
        """Take its power."""
        self._end(silent=silent)
        self.disk.lose_power()

    def _end(self, *, silent: bool) -> None:
        machine, self.machine, self.parts = self.machine, None, None
        if machine is not None:
            machine.alive = False
            self.silent = silent
            self.net.lost_power(machine, silent=silent)


class Cluster:
    """The hosts of one consortium."""

    def __init__(self, world: World, net: Network, size: int, *, standbys: int = 2) -> None:
        self.world, self.net = world, net
        self.genesis = self.roster = roster_of(size)
        self.links: list[Link] = []  # from the genesis file to the present roster
        self.nodes: list[Host] = []
        self.by_port: dict[int, Host] = {}
        self.vaults: list[Host] = []
        self.small_bytes_max = 1 << 16
        for number in range(size):
            self._add(roster_of(size), number, number < standbys)

    def _add(self, roster: Roster, number: int, standby: bool) -> Host:
        host = Host(self.world, self.net, roster.nodes[number].name, number, _certificates(len(roster.nodes))[number])
        host.node = roster.nodes[number]
        host.main = functools.partial(self._serve, host, standby)
        self.net.hosts[port_first + number] = self.by_port[port_first + number] = host
        self.nodes.append(host)
        return host

    def join(self) -> Host:
        """One more node, which the roster has begun to list. It has the chain of rosters, as its operator fetches it."""
        host = self._add(roster_of(len(self.nodes) + 1), len(self.nodes), True)
        host.disk.become(self.world.seed)
        return host

    def become(self, seed: int, small_bytes_max: int) -> None:
        """Its disks are this seed's, and shards of up to so many bytes are small."""
        self.small_bytes_max = small_bytes_max
        for host in (*self.nodes, *self.vaults):
            host.disk.become(seed)
            if host.parts is not None:
                host.parts.node.store._small_max = small_bytes_max

    async def _serve(self, host: Host, standby: bool) -> None:
        home = host.disk.folder
        node = host.node
        limits = Limits(small_shard_bytes_max=self.small_bytes_max, watch_every_s=1e9, sweep_after_s=3600.0)
        config = Config(
            home=home,
            url=node.url,
            listen="",
            listen_address=("127.0.0.1", port_first + host.number),
            data=home / "data",
            capacity_bytes=1 << 30,
            limits=limits,
            metrics_address=None,
            log_level="info",
            log_format="text",
            sequencer=standby,
            repair=RepairSection(grace_s=60.0, rebalance=False),
        )
        config.data.mkdir(exist_ok=True)
        (home / "keys").mkdir(exist_ok=True)
        await storenode.app.serve(config)

    def vault_host(self, name: str) -> Host:
        """A host for a vault, which is to be enrolled."""
        keys = vault_keys(name)
        ca = self.roster.institutions[0].ca
        certificate = client_certificate(key_named("ca 0"), ca, client_csr(keys.signing), made_at)
        host = Host(self.world, self.net, name, 100 + len(self.vaults), certificate)
        self.vaults.append(host)
        home = Home(host.disk.folder)
        home.genesis.write_bytes(self.roster.to_bytes())
        home.certificate.write_bytes(certificate)
        host.disk.become(self.world.seed)
        host.machine = self.world.machine(host)
        return host

    @contextlib.asynccontextmanager
    async def vault(self, host: Host) -> AsyncIterator[Vault]:
        """An open vault, on its host."""
        async with Vault.opened(Home(host.disk.folder), vault_keys(host.name)) as vault:
            yield vault

    async def append(self, host: Host, author: str, *bodies: Body) -> Any:
        """Append entries by way of one node."""
        key = key_named(author)
        entries = [sign_entry(self.roster.origin, body, public_key(key), key.sign) for body in bodies]
        return await host.parts.node.ledger.append(entries)

    def enrol(self, name: str) -> Enrol:
        """The body that enrols a vault."""
        return Enrol(vault_keys(name).public, 0, hashlib.sha256(name.encode()).digest()[:16])


@functools.lru_cache
def vault_keys(name: str) -> VaultKeys:
    """A vault's keys, from its name."""
    return VaultKeys.from_root(hashlib.sha256(f"vault {name}".encode()).digest())


@functools.lru_cache
def roster_of(size: int) -> Roster:
    """A roster of so many institutions with a node each."""
    return replace(consortium_of(size).roster, code=codes[size])


@functools.lru_cache
def _certificates(size: int) -> list[bytes]:
    roster = roster_of(size)
    return [
        node_certificate(key_named(f"ca {number}"), roster.institutions[number].ca, Key(public_key(key_named(f"tls {number}"))), made_at)
        for number in range(size)
    ]


@functools.lru_cache
def _keys(size: int, number: int) -> NodeKeys:
    roster = roster_of(size)
    return NodeKeys(
        folder=Path("keys"),
        node=key_named(f"tls {number}"),
        certificate=_certificates(size)[number],
        cosigner=key_named(f"cosigner {number}"),
        cosigner_pq=pq_key_named(f"pq {number}"),
        log=key_named(f"log {number}" if number else "log"),
        ca=key_named(f"ca {number}"),
        ca_certificate=roster.institutions[number].ca,
        node_id=roster.nodes[number].id,
    )


class _Known:
    """A public key that verifies each signature once: sixteen nodes in one process would verify the same ones sixteen times."""

    verified: ClassVar[set[tuple[bytes, bytes, bytes]]] = set()

    def __init__(self, key: bytes) -> None:
        self._key, self._public = bytes(key), Ed25519PublicKey.from_public_bytes(key)

    @classmethod
    def from_public_bytes(cls, key: bytes) -> _Known:
        return cls(key)

    def verify(self, signature: bytes, data: bytes) -> None:
        seen = (self._key, bytes(signature), bytes(data))
        if seen not in self.verified:
            self._public.verify(signature, data)
            self.verified.add(seen)


class _Suite:
    """HPKE that draws from the world: OpenSSL's own randomness is the same in no two runs. Who has the wrong key is not found out by it."""

    def encrypt(self, plain: bytes, key: object, info: bytes) -> bytes:
        drawn = os.urandom(32)
        padding = bytes(hpke.overhead_bytes - 32 - 16)
        return drawn + padding + AESGCM(hashlib.sha256(drawn + info).digest()).encrypt(bytes(12), plain, None)

    def decrypt(self, sealed: bytes, key: object, info: bytes) -> bytes:
        drawn, body = sealed[:32], sealed[hpke.overhead_bytes - 16 :]
        return AESGCM(hashlib.sha256(drawn + info).digest()).decrypt(bytes(12), body, None)


def _no_prefixes(*values: int) -> range:
    return range(0) if values == (256,) else range(*values)


def install(cluster: Cluster) -> None:
    """Let the nodes of this cluster have their keys, and be looked at while they run."""
    for module in (entries, checkpoint, sharing, repairorder):
        module.Ed25519PublicKey = _Known  # type: ignore[attr-defined]
    hpke._suite = _Suite()  # type: ignore[assignment,misc]
    by_port, size = cluster.by_port, len(cluster.nodes)

    def member_keys(config: Config) -> tuple[Membership, NodeKeys]:
        number = config.listen_address[1] - port_first
        membership = Membership(config.data, cluster.genesis)
        if number >= size:
            membership.follow(cluster.links)
        return membership, replace(_keys(max(size, number + 1), number), folder=config.home / "keys")

    build = storenode.app.build

    def built(parts: Any, keys: NodeKeys) -> Any:
        host = by_port[parts.node.config.listen_address[1]]
        host.parts = parts
        app = build(parts, keys)
        host.app = app
        return app

    storenode.shardstore.store.range = _no_prefixes  # type: ignore[attr-defined]
    storenode.app.member_keys = member_keys
    storenode.app.build = built
