"""Tahoe-LAFS 1.20 as its users run it: an introducer, 16 storage nodes and a client with its web API, 10-of-16, 1 MiB segments.

Fair to Tahoe: nodes made by `tahoe create-node` are also clients of all others, and a client that speaks HTTP polls every server
once a second (0.7 core at idle). So the storage nodes' own client half speaks Foolscap; only the measured client speaks `protocol`.
Tahoe does not fsync shares; its wire is TLS in both protocols.
"""

from __future__ import annotations

import shutil
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from bench.machine import Processes
from bench.peers import web
from bench.peers.environment import environment, run
from bench.side import ACKNOWLEDGED, NEEDED, NODES, SideError, get_each, put_each

REQUIREMENTS = ("tahoe-lafs==1.20.0",)
Protocol = Literal["http", "foolscap"]
_first_port = {"http": 21000, "foolscap": 22000}


class Tahoe:
    """One grid. The first `start` creates it (half a minute), every `stop` empties its stores."""

    client = "client"

    def __init__(self, root: Path, protocol: Protocol) -> None:
        self.name = f"tahoe-{protocol}"
        self.notes = ["Tahoe-LAFS: shares are not fsynced; TLS on the wire"]
        self._root = root / self.name
        self._protocol = protocol
        self._port = _first_port[protocol]
        self._nodes = [f"s{index:02d}" for index in range(NODES)]
        self.processes = Processes(self._root / "logs")

    def start(self) -> None:
        self._tahoe = str(environment("tahoe", REQUIREMENTS) / "tahoe")
        if not self._root.exists():
            self._create()
        if "intro" not in self.processes.cpu_s():
            self._run("intro")
        for name in (*self._nodes, self.client):
            self._run(name)
        web.wait_until(self._connected, self.name)

    def put(self, path: Path) -> str:
        return web.upload(self._web, "/uri", path).decode().strip()

    def get(self, cap: str, target: Path) -> None:
        web.download(self._web, _location(cap), target)

    def read(self, cap: str, offset: int, length: int) -> bytes:
        return web.read_range(self._web, _location(cap), offset, length)

    def put_many(self, paths: Sequence[Path], parallel: int) -> list[str]:
        return put_each(self, paths, parallel)

    def get_many(self, caps: Sequence[str], targets: Sequence[Path], parallel: int) -> None:
        get_each(self, caps, targets, parallel)

    def stored_bytes(self) -> int:
        shares = (file for name in self._nodes for file in (self._root / name / "storage" / "shares").rglob("*"))
        return sum(file.stat().st_size for file in shares if file.name.isdigit() and file.is_file())

    def freeze(self) -> None:
        self.processes.freeze(self._nodes[3])

    def thaw(self) -> None:
        self.processes.thaw(self._nodes[3])

    def stop(self) -> None:
        self.processes.stop()
        for name in self._nodes:
            shutil.rmtree(self._root / name / "storage", ignore_errors=True)

    @property
    def _web(self) -> int:
        return self._port + 90

    def _run(self, name: str) -> None:
        self.processes.start(name, [self._tahoe, "run", "--allow-stdin-close", str(self._root / name)])

    def _connected(self) -> bool:
        if dead := self.processes.dead():
            raise SideError(f"{self.name}: {dead[0]} ended: {self.processes.log_tail(dead[0])}")
        welcome = web.json_of(self._web, "/?t=json")
        assert isinstance(welcome, dict)
        states = [str(server["connection_status"]).lower() for server in welcome["servers"]]
        return sum(state.startswith("connected") for state in states) == NODES

    def _create(self) -> None:
        self._root.mkdir(parents=True)
        run([self._tahoe, "create-introducer", *_listen(self._port), str(self._root / "intro")])
        self._run("intro")
        furl = self._root / "intro" / "private" / "introducer.furl"
        web.wait_until(lambda: furl.exists() and furl.stat().st_size > 0, "the Tahoe introducer")
        common = [
            f"--introducer={furl.read_text().strip()}",
            f"--shares-needed={NEEDED}",
            f"--shares-total={NODES}",
            f"--shares-happy={ACKNOWLEDGED}",
        ]

        def create_node(index: int) -> None:
            folder = self._root / self._nodes[index]
            run([self._tahoe, "create-node", *_listen(self._port + 1 + index), "--webport=none", *common, str(folder)])
            _force(folder, storage=self._protocol == "foolscap", client=True)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(create_node, range(NODES)))
        folder = self._root / self.client
        run([self._tahoe, "create-client", f"--webport=tcp:{self._web}:interface=127.0.0.1", *common, str(folder)])
        _force(folder, storage=None, client=self._protocol == "foolscap")


def _location(cap: str) -> str:
    return "/uri/" + urllib.parse.quote(cap)


def _listen(port: int) -> list[str]:
    return ["--listen=tcp", f"--port=tcp:{port}:interface=127.0.0.1", f"--location=tcp:127.0.0.1:{port}"]


def _force(folder: Path, storage: bool | None, client: bool) -> None:
    """Say in tahoe.cfg which halves of a node speak Foolscap only."""
    config = folder / "tahoe.cfg"
    text = config.read_text()
    if storage is not None:
        text = text.replace("[storage]\n", f"[storage]\nforce_foolscap = {str(storage).lower()}\n", 1)
    config.write_text(text.replace("[client]\n", f"[client]\nforce_foolscap = {str(client).lower()}\n", 1))
