"""medshard as its users run it: 16 node processes of 16 institutions, and a client process that keeps one open `Vault`.

The client (bench/medshard_client.py) is told what to do in lines of JSON through a pipe and does it with the public library.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.machine import MIB, Processes
from bench.side import NEEDED, NODES, SideError, get_each, put_each
from medshard.consortium import LocalConsortium
from storenode.consortium import free_ports

SLOW_BYTES_S = 3 * MIB  # a healthy node moves its 10 MiB in a third of a second
SLOW_DELAY_S = 0.01  # and answers in a millisecond


class Medshard:
    """One consortium, made anew by every `start`."""

    name = "medshard"
    client = "client"

    def __init__(self, root: Path) -> None:
        self.notes = ["medshard: shards are fsynced; TLS 1.3 with client certificates on the wire; a put waits for the ledger's quorum"]
        self._root = root / self.name
        self.processes = Processes(root / "logs-medshard")
        self._pipe: subprocess.Popen[bytes] | None = None
        self._trial: LocalConsortium | None = None
        self._nodes: list[Path] = []

    def start(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        self._trial = LocalConsortium(self._root, institutions=NODES, code=(NEEDED, NODES))
        self._trial.start()
        self._nodes = [self._trial.home(name) for name in self._trial.names]
        for name, process in self._trial.running.items():
            self.processes.adopt(name, process)
        log = open(self._root / "client.log", "ab")  # noqa: SIM115 -- the child keeps it
        command = [sys.executable, "-m", "bench.medshard_client", str(self._root / "vault")]
        self._pipe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        log.close()
        self.processes.adopt(self.client, self._pipe)
        self._ask("open")

    def put(self, path: Path) -> str:
        return self.put_many([path], 1)[0]

    def get(self, cap: str, target: Path) -> None:
        self._ask("get", sha256=cap, target=str(target))

    def read(self, cap: str, offset: int, length: int) -> bytes:
        return bytes.fromhex(str(self._ask("read", sha256=cap, offset=offset, length=length)))

    def put_many(self, paths: Sequence[Path], parallel: int) -> list[str]:
        """All files in one call, each an object of its own; with `parallel` 1 in a call each, one after the other."""
        if parallel == 1 and len(paths) > 1:
            return put_each(self, paths, 1)
        return self._strings("put", paths=[str(path) for path in paths])

    def get_many(self, caps: Sequence[str], targets: Sequence[Path], parallel: int) -> None:
        """All files in one call; with `parallel` 1 in a call each, one after the other."""
        if parallel == 1:
            get_each(self, caps, targets, 1)
            return
        folder = targets[0].parent / "many"
        restored = self._strings("get_many", hashes=list(caps), folder=str(folder))
        for path, target in zip(restored, targets, strict=True):
            Path(path).rename(target)

    def put_folder(self, folder: Path) -> list[str]:
        return self._strings("put", paths=[str(folder)])

    def get_folder(self, caps: Sequence[str], targets: Sequence[Path]) -> None:
        self.get_many(caps, targets, len(caps))

    def stored_bytes(self) -> int:
        """Everything the nodes keep: shards, manifests, databases and ledger."""
        return sum(file.stat().st_size for home in self._nodes for file in (home / "data").rglob("*") if file.is_file())

    def freeze(self) -> None:
        """A node that is not the sequencer: while that one is away nothing can be acknowledged."""
        self.processes.freeze(self._nodes[-1].name)

    def thaw(self) -> None:
        self.processes.thaw(self._nodes[-1].name)

    def harm(self) -> None:
        """Of three nodes that do not lead the ledger: one dead, one frozen, one behind a relay that is ten times slower than it."""
        assert self._trial is not None
        dead, slow, frozen = (node.name for node in self._nodes[-3:])
        self._trial.kill(dead)
        self.processes.forget(dead)
        self._slow_down(self._trial, slow)
        self.processes.freeze(frozen)

    def _slow_down(self, trial: LocalConsortium, name: str) -> None:
        file = trial.home(name) / "config.toml"
        text, (port,) = file.read_text(), free_ports(1)
        found = re.search(r'^listen = "127\.0\.0\.1:(\d+)"$', text, re.MULTILINE)
        assert found
        file.write_text(text.replace(found[0], f'listen = "127.0.0.1:{port}"'))
        trial.kill(name)
        self.processes.start("relay", [sys.executable, "-m", "bench.relay", found[1], str(port), str(SLOW_BYTES_S), str(SLOW_DELAY_S)])
        trial.restart(name)
        self.processes.adopt(name, trial.running[name])

    def stop(self) -> None:
        self.processes.stop()
        if self._trial is not None:
            self._trial.stop()
        self._pipe = None
        shutil.rmtree(self._root, ignore_errors=True)

    def _strings(self, operation: str, **arguments: object) -> list[str]:
        answer = self._ask(operation, **arguments)
        assert isinstance(answer, list)
        return [str(each) for each in answer]

    def _ask(self, operation: str, **arguments: object) -> object:
        if self._pipe is None or self._pipe.stdin is None or self._pipe.stdout is None:
            raise SideError("medshard: not started")
        self._pipe.stdin.write(json.dumps([operation, arguments]).encode() + b"\n")
        self._pipe.stdin.flush()
        line = self._pipe.stdout.readline()
        if not line:
            raise SideError(f"medshard: the client ended: {(self._root / 'client.log').read_text()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideError(f"medshard: {operation}: {answer['error']}")
        return answer["done"]
