"""Consortia on which repairs are tried: nodes that write down what they receive and can be told to fail, and files on their disks."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cluster.repairers import received_name, rules_name

from medshard import Vault, nursery
from medshard.consortium import LocalConsortium
from medshard_protocol.entries import Move, sign_entry
from medshard_protocol.ids import Key, NodeId
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import unpack_error
from medshard_protocol.proofs import pack_append, unpack_appended
from medshard_protocol.repairorder import Wish, pack_wish
from medshard_protocol.roster import Node
from storenode.asking import exchange
from storenode.identity import NodeKeys

settle_s = 90.0  # on a machine that does other things too


class Repairing(LocalConsortium):
    """A consortium whose nodes write down what they receive."""

    def _program(self, name: str) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("repairers.py")), str(self.home(name))]

    def node(self, name: str) -> Node:
        assert self.roster is not None
        return next(node for node in self.roster.nodes if node.name == name)

    def name(self, node: NodeId) -> str:
        assert self.roster is not None
        return self.roster.node(node).name

    def keys(self, name: str) -> NodeKeys:
        return NodeKeys.load(self.home(name))

    def ask(self, by: str, of: str, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """A request of one node to another, with the first one's own keys."""
        assert self.roster is not None
        return exchange(self.node(of), self.roster, self.keys(by), method, path, body, timeout_s=8.0)

    def repair(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return nursery.run(["-m", "storenode", "--home", str(self.home(name)), "repair", "--json", *arguments])

    def repaired(self, name: str, file_id: str, shard: int | None = None, *, dry_run: bool = False) -> dict[str, Any]:
        """What ``storenode repair`` does, without starting a program for it."""
        path = f"/v1/repair/{file_id}"
        status, answer = self.ask(name, name, "POST", path, pack_wish(Wish(shard, dry_run)))
        assert status == 200, unpack_error(status, answer, name)
        told: dict[str, Any] = json.loads(answer)
        while not dry_run and told["state"] not in ("done", "failed", "nothing"):
            time.sleep(0.05)
            told = json.loads(self.ask(name, name, "GET", path)[1])
        assert dry_run or told["state"] != "failed", told
        return told

    def configure(self, **repair: object) -> None:
        """Change the section ``repair`` of every node's configuration, before it starts."""
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in repair.items())
        for name in self.names:
            path = self.home(name) / "config.toml"
            path.write_text(path.read_text().replace("[repair]\n", "[repair]\n" + lines))

    def misbehave(self, name: str, **rule: object) -> None:
        (self.home(name) / rules_name).write_text(json.dumps(rule))

    def received(self, name: str, since: int = 0) -> bytes:
        return (self.home(name) / received_name).read_bytes()[since:]

    def move(self, name: str, manifest: Manifest, shard: int) -> int:
        """Let a node say on the ledger that it takes a shard over."""
        assert self.roster is not None
        keys = self.keys(name)
        body = Move(manifest.file_id, shard, keys.node_id, os.urandom(16))
        entry = sign_entry(self.roster.origin, body, Key(keys.node.public_key().public_bytes_raw()), keys.node.sign).to_bytes()
        status, answer = self.ask(name, name, "POST", "/v1/ledger/append", pack_append([entry]))
        assert status == 200, answer
        return unpack_appended(answer, [entry]).inclusions[0].index


class File:
    """A file that was put, with all of its shards as they lie on the nodes' disks."""

    def __init__(self, trial: Repairing, plain: Path, sha256: bytes, manifest: Manifest) -> None:
        self.trial, self.plain, self.sha256, self.manifest = trial, plain, sha256, manifest
        self.id = manifest.file_id.hex()
        self.holders = [trial.name(ref.node) for ref in manifest.shards]
        self.others = sorted(set(trial.names) - set(self.holders))

    @property
    def spare(self) -> str:
        """The only node without a shard."""
        (spare,) = self.others
        return spare

    def on_disk(self, name: str) -> Path:
        """Where a node's shard lies."""
        (path,) = self._found(name)
        return path

    def _found(self, name: str) -> list[Path]:
        return list((self.trial.home(name) / "data" / "shards" / self.id[:2]).glob(f"{self.id}-*"))

    def is_at(self, name: str) -> bool:
        """Whether a node has a shard of it."""
        return bool(self._found(name))

    def shards(self) -> list[bytes]:
        """All shards, as the nodes have them that the manifest names."""
        return [self.on_disk(name).read_bytes() for name in self.holders]


async def put_whole(trial: Repairing, vault: Vault, plain: Path, size: int) -> File:
    """Put a file until every holder has its shard: a slow one is left behind, for repair."""
    while True:
        plain.write_bytes(os.urandom(size))
        (stored,) = (await vault.put([plain])).stored
        manifest, _ = await vault.evidence(stored.sha256)
        made = File(trial, plain, stored.sha256, manifest)
        if all(map(made.is_at, made.holders)):
            return made


def bring_back(trial: Repairing) -> None:
    """Start what was killed, thaw what was frozen, and let everybody behave."""
    for name in trial.names:
        (trial.home(name) / rules_name).unlink(missing_ok=True)
        process = trial.running.get(name)
        if process is None or process.poll() is not None:
            trial.restart(name)
        else:
            trial.thaw(name)


async def until(condition: Callable[[], object], what: str) -> Any:
    """Wait for something to be so; what it was."""
    deadline = time.monotonic() + settle_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"it never came to be that {what}")


def told(trial: Repairing, name: str, path: str = "/v1/repair") -> dict[str, Any]:
    status, answer = trial.ask(name, name, "GET", path)
    assert status == 200, answer
    said: dict[str, Any] = json.loads(answer)
    return said
