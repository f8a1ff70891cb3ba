"""How long a lost shard takes to be made again over links of 100 Mbit/s, beside sending it once and beside fetching k shards to one place.

    python -m bench.repair [--mbit 100] [--shard-mib 10] [--files 5]

Every node of a 10/16 consortium, and one more, has a network of its own (Linux network namespaces, joined by a bridge), and its link is
limited in both directions with a token bucket (tc tbf). It needs root and changes nothing outside: it begins again in a network of its own.
Sending once and fetching are bare TCP between the same networks, with nothing encrypted or checked, which is the least they can take.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard_protocol.ids import Key, NodeId
from medshard_protocol.repairorder import Wish, pack_wish
from storenode import consortium as layout
from storenode.asking import exchange
from storenode.config import write_config
from storenode.genesis import Card, Code
from storenode.identity import NodeKeys, create_institution, create_node

k, n = 10, 16
nodes = n + 1
port = 9700
inside = "MEDSHARD_BENCH_INSIDE"

send = """
import socket, sys
server = socket.create_server((sys.argv[1], 9000))
print("ready", flush=True)
line, data = server.accept()[0], bytes(1 << 20)
for _ in range(int(sys.argv[2])):
    line.sendall(data)
line.close()
"""
fetch = """
import socket, sys, threading, time
def one(host):
    line = socket.create_connection((host, 9000))
    while line.recv(1 << 20): pass
threads = [threading.Thread(target=one, args=(host,)) for host in sys.argv[1:]]
began = time.perf_counter()
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(time.perf_counter() - began)
"""


def run(*words: str) -> None:
    subprocess.run(words, check=True)


class Networks:
    """One for each node, number i at 10.77.0.(i + 1); this process is at 10.77.0.254, without a limit."""

    def __init__(self, count: int, mbit: int) -> None:
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "br0", "type", "bridge")
        run("ip", "addr", "add", "10.77.0.254/24", "dev", "br0")
        run("ip", "link", "set", "br0", "up")
        self.keepers = [subprocess.Popen(["unshare", "-n", "sleep", "infinity"]) for _ in range(count)]
        time.sleep(0.5)
        shape = [
            "root",
            "tbf",
            "rate",
            f"{mbit}mbit",
            "burst",
            "128kb",
            "latency",
            "100ms",
        ]  # a burst of 10 ms: the kernel may keep segments together
        for i in range(count):
            run("ip", "link", "add", f"n{i}", "type", "veth", "peer", "name", "eth0", "netns", str(self.keepers[i].pid))
            run("ip", "link", "set", f"n{i}", "master", "br0", "up")
            run("tc", "qdisc", "add", "dev", f"n{i}", *shape)  # into the node
            run(*self.within(i), "ip", "link", "set", "lo", "up")
            run(*self.within(i), "ip", "addr", "add", f"{address(i)}/24", "dev", "eth0")
            run(*self.within(i), "ip", "link", "set", "eth0", "up")
            run(*self.within(i), "tc", "qdisc", "add", "dev", "eth0", *shape)  # out of it

    def within(self, i: int) -> list[str]:
        """The beginning of a command line that runs in network i."""
        return [shutil.which("nsenter") or "nsenter", "-t", str(self.keepers[i].pid), "-n"]

    def close(self) -> None:
        """End what keeps them."""
        for keeper in self.keepers:
            keeper.kill()
            keeper.wait()

    def bare(self, sources: list[int], to: int, mib: int) -> float:
        """Seconds to send so many MiB from each source to one network at once, over bare TCP."""
        senders = [
            subprocess.Popen([*self.within(i), sys.executable, "-c", send, address(i), str(mib)], stdout=subprocess.PIPE) for i in sources
        ]
        for sender in senders:
            assert sender.stdout is not None
            sender.stdout.readline()
        done = subprocess.run(
            [*self.within(to), sys.executable, "-c", fetch, *map(address, sources)], capture_output=True, text=True, check=True
        )
        for sender in senders:
            sender.wait()
        return float(done.stdout)


def address(i: int) -> str:
    """A node's."""
    return f"10.77.0.{i + 1}"


class Far(LocalConsortium):
    """A consortium whose nodes run in those networks."""

    networks: Networks

    def _make(self) -> None:
        if not self.exists:
            emergency = self._emergency()
            key, auditors = Key(bytes.fromhex(emergency[1])), bytes.fromhex(Path(emergency[3]).read_text())
            layout.lay_out(self.folder, nodes, code=Code(k, n, 13), capacity=10**11, emergency=[key], auditors=auditors)

    def _program(self, name: str) -> list[str]:
        return [*self.networks.within(int(name[-2:]) - 1), *super()._program(name)]


def lay_out_node(home: Path, name: str, _port: int, capacity: int, *, sequencer: bool) -> tuple[Card, NodeKeys]:
    """As ``storenode.consortium`` does it, at the node's own address."""
    i = int(name[-2:]) - 1
    institution = create_institution(name)
    keys = create_node(home, institution, sync=False)
    where = f"{address(i)}:{port}"
    write_config(home, url=f"https://{where}", listen=where, capacity_bytes=capacity, sequencer=sequencer, durable=False)
    path = home / "config.toml"
    path.write_text(path.read_text().replace("[repair]\n", "[repair]\non = false\nrate_bytes_per_s = 0\n"))
    return Card.of(name, name, f"https://{where}", capacity, keys), keys


def number(trial: LocalConsortium, node: NodeId) -> int:
    """Of a node's network."""
    assert trial.roster is not None
    return int(trial.roster.node(node).name[-2:]) - 1


def repaired(trial: LocalConsortium, node: NodeId, file_id: str, shard: int) -> dict[str, Any]:
    """Have a node make a shard again; how it went, with the seconds from the request to the last byte durable."""
    assert trial.roster is not None
    at = trial.roster.node(node)
    keys, path = NodeKeys.load(trial.home(at.name)), f"/v1/repair/{file_id}"
    body, method = pack_wish(Wish(shard)), "POST"
    while True:
        status, answer = exchange(at, trial.roster, keys, method, path, body)
        assert status == 200, answer
        told: dict[str, Any] = json.loads(answer)
        if told["state"] in ("done", "failed", "nothing"):
            assert told["state"] == "done", told
            return told
        body, method = b"", "GET"
        time.sleep(0.2)


def cpu_s(trial: LocalConsortium) -> float:
    """Processor seconds that all running nodes have used."""
    ticks = 0
    for process in trial.running.values():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def put(trial: Far, folder: Path, size: int, files: int) -> list[Any]:
    """Manifests of so many files, all of whose shards lie where they should; the first node of the second institution holds one of each."""
    assert trial.roster is not None
    victim, manifests = trial.roster.nodes[5].id, []
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        while len(manifests) < files:
            path = folder / "plain"
            path.write_bytes(os.urandom(size))
            (stored,) = (await vault.put([path])).stored
            manifest, _ = await vault.evidence(stored.sha256)
            if victim in [ref.node for ref in manifest.shards]:
                manifests.append(manifest)
    return manifests


def measure(folder: Path, mbit: int, mib: int, files: int) -> None:
    """Print the table."""
    Far.networks = networks = Networks(nodes, mbit)
    layout._lay_out_node = lay_out_node  # type: ignore[attr-defined]
    trial = Far(folder / "trial", institutions=nodes, code=(k, n))
    try:
        with trial:
            assert trial.roster is not None
            manifests = asyncio.run(put(trial, folder, mib * k * 1024 * 1024 - 200_000, files))
            victim = trial.roster.nodes[5]
            trial.kill(victim.name)
            once, gathered, chained, summed, worked = (list[float]() for _ in range(5))
            for manifest in manifests:
                holders = [ref.node for ref in manifest.shards]
                (spare,) = {node.id for node in trial.roster.nodes} - set(holders)
                sources = [number(trial, node) for node in holders if node != victim.id][:k]
                size = manifest.layout.shard_size
                once.append(networks.bare(sources[:1], number(trial, spare), mib) * size / (mib << 20))
                gathered.append(networks.bare(sources, number(trial, spare), mib) * size / (mib << 20))
                before = cpu_s(trial)
                told = repaired(trial, spare, manifest.file_id.hex(), holders.index(victim.id))
                chained.append(told["seconds"])
                summed.append(told["took"]["summing"])
                worked.append(cpu_s(trial) - before)
    finally:
        networks.close()
    print_table(size, mbit, once, gathered, chained, summed)
    print(f"\nprocessor time of all nodes for one repair: {statistics.median(worked):.2f} s, on {os.cpu_count()} cores that they share")


def print_table(size: int, mbit: int, once: list[float], gathered: list[float], chained: list[float], summed: list[float]) -> None:
    """Seconds for people."""
    base = statistics.median(once)
    print(
        f"one shard of {size / (1 << 20):.2f} MiB, code {k}/{n}, links of {mbit} Mbit/s each way, {len(once)} files: median (least to most)"
    )
    print()
    for what, took in (
        ("the shard sent once, bare TCP", once),
        ("repaired in a chain: survey, MOVE entry, keys, sums, fsync", chained),
        ("  of which keys, sums and fsync", summed),
        (f"{k} shards fetched to one place, bare TCP", gathered),
    ):
        middle = statistics.median(took)
        print(f"{what:62} {middle:6.2f} s ({min(took):.2f} to {max(took):.2f})  {middle / base:5.2f} times")


def main() -> int:
    """Begin again in a network of our own, then measure there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=int, default=100)
    parser.add_argument("--shard-mib", type=int, default=10)
    parser.add_argument("--files", type=int, default=5)
    asked = parser.parse_args()
    if inside not in os.environ:
        words = ["unshare", "-n", sys.executable, "-m", "bench.repair", *sys.argv[1:]]
        return subprocess.run(words, env=os.environ | {inside: "1"}).returncode
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), asked.mbit, asked.shard_mib, asked.files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
