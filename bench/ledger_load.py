"""Load on the ledger of a real consortium: entries at a steady rate, and as many as it takes. Used by bench/ledger.py.

Law: an append counts when its answer has been verified as a client verifies it: quorum of cosigners, inclusion path recomputed to the root,
the author's signature. At a steady rate the next entry is sent when it is due, whether or not earlier ones have been answered, so a
slow ledger shows as latency and cannot hide by slowing the sender down.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from medshard.home import Home
from medshard.keys import VaultKeys, open_key_file
from medshard.tls import context_for
from medshard_protocol.checkpoint import Checkpoint
from medshard_protocol.entries import Register, nonce_size, sign_entry
from medshard_protocol.identity import node_hostname
from medshard_protocol.ids import FileId, Sha256
from medshard_protocol.proofs import pack_append, unpack_appended
from medshard_protocol.roster import Node, Roster

warm_up_s = 2.0


@dataclass(frozen=True)
class Latency:
    """Milliseconds from handing an entry in to the verified answer."""

    entries: int
    rate: float  # entries a second that were answered
    p50_ms: float
    p99_ms: float
    worst_ms: float


class Submitter:
    """One vault's connections to one node."""

    def __init__(self, vault_home: Path, passphrase: str, roster: Roster, node: Node) -> None:
        home = Home(vault_home)
        self._keys: VaultKeys = open_key_file(home.key_file, passphrase)
        self._roster = roster
        self._node = node
        ca = roster.institutions[node.institution].ca
        self._context: ssl.SSLContext = context_for(ca, home.certificate_bytes(), self._keys.signing)
        self._seen: dict[bytes, Checkpoint] = {}

    def entries(self, count: int) -> list[bytes]:
        """New, signed REGISTER entries."""
        made = []
        for _ in range(count):
            body = Register(FileId(os.urandom(32)), Sha256(os.urandom(32)), os.urandom(nonce_size))
            made.append(sign_entry(self._roster.origin, body, self._keys.public, self._keys.signing.sign).to_bytes())
        return made

    async def append(self, session: aiohttp.ClientSession, entries: Sequence[bytes]) -> None:
        """Hand in, wait, verify."""
        async with session.post(
            self._node.url + "/v1/ledger/append",
            data=pack_append(entries),
            ssl=self._context,
            server_hostname=node_hostname(self._node.id),
        ) as response:
            data = await response.read()
            if response.status != 200:
                raise RuntimeError(f"append: {response.status} {data[:200]!r}")
        for inclusion in unpack_appended(data, entries).inclusions:
            inclusion.verify(self._roster, self._seen)

    async def steady(self, rate: float, seconds: float) -> Latency:
        """Hand in single entries at ``rate`` a second."""
        count = int(rate * (seconds + warm_up_s))
        entries, took = self.entries(count), [0.0] * count
        async with _session() as session:
            start = time.perf_counter() + 0.1

            async def one(number: int) -> None:
                due = start + number / rate
                await asyncio.sleep(due - time.perf_counter())
                await self.append(session, [entries[number]])
                took[number] = time.perf_counter() - due

            await asyncio.gather(*map(one, range(count)))
            ended = time.perf_counter()
        counted = sorted(took[int(rate * warm_up_s) :])
        return Latency(len(counted), count / (ended - start), *_milliseconds(counted))

    async def full(self, seconds: float, *, parallel: int = 8, batch: int = 128) -> Latency:
        """Hand in batches on ``parallel`` connections, each as soon as its last one is answered."""
        took: list[float] = []
        done = 0
        stock = [self.entries(batch) for _ in range(int(parallel * max(4, seconds * 4)))]
        async with _session() as session:
            began = time.perf_counter()

            async def worker() -> None:
                nonlocal done
                while stock and time.perf_counter() - began < seconds:
                    entries = stock.pop()
                    start = time.perf_counter()
                    await self.append(session, entries)
                    took.append(time.perf_counter() - start)
                    done += len(entries)

            await asyncio.gather(*(worker() for _ in range(parallel)))
            ended = time.perf_counter()
        return Latency(done, done / (ended - began), *_milliseconds(sorted(took)))


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60))


def _milliseconds(counted: Sequence[float]) -> tuple[float, float, float]:
    return tuple(round(1000 * value, 1) for value in (statistics.median(counted), counted[int(len(counted) * 0.99)], counted[-1]))  # type: ignore[return-value]
