"""OpenStack Swift 2.38 with erasure coding 10+6 (ISA-L Cauchy, 1 MiB segments) and its encryption middleware on, as a proxy, an
account, a container and 16 object servers.

Fair to Swift: its wire here is plain HTTP, as it is inside a Swift cluster, and the pyeclib wheel brings ISA-L and liberasurecode along,
so no system package is needed. Object servers fsync before they answer, as in production.
Swift keeps metadata in user extended attributes: where the tmpfs has none (Linux before 6.6) its data goes to a disk, and a note says so.
"""

from __future__ import annotations

import base64
import os
import pwd
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from bench.machine import Processes
from bench.peers import web
from bench.peers.environment import environment, run
from bench.side import ENVIRONMENTS, NEEDED, NODES, SideError, get_each, put_each

REQUIREMENTS = ("swift==2.38.3", "pyeclib==1.8.0", "setuptools<81")
_proxy_port = 23000
_account_port = 23001
_container_port = 23002
_object_port = 23010

# Storage policies are read from /etc/swift/swift.conf while swift is imported: point it at our own file first. Without
# this Swift quietly stores 16 full replicas.
_boot = """\
import runpy, sys
import swift.common.utils as utils
utils.SWIFT_CONF_FILE = sys.argv[1]
sys.argv = ["swift", sys.argv[2]]
runpy.run_path(%r, run_name="__main__")
"""

_cluster = """\
[swift-hash]
swift_hash_path_suffix = bench
swift_hash_path_prefix = bench
[storage-policy:0]
name = ec
default = yes
policy_type = erasure_coding
ec_type = isa_l_rs_cauchy
ec_num_data_fragments = {data}
ec_num_parity_fragments = {parity}
ec_object_segment_size = 1048576
"""

_server = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {etc}
devices = {devices}
mount_check = false
log_level = WARNING
log_address = /nonexistent
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""

_proxy = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {etc}
log_level = WARNING
log_address = /nonexistent
[pipeline:main]
pipeline = catch_errors keymaster encryption proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:keymaster]
use = egg:swift#keymaster
encryption_root_secret = {secret}
[filter:encryption]
use = egg:swift#encryption
"""


class Swift:
    """One cluster; the proxy is the client, since it is what encrypts and codes. Every `start` makes a new, empty one."""

    name = "swift"
    client = "proxy"

    def __init__(self, root: Path) -> None:
        self.notes = ["Swift: plain HTTP on the wire; encryption middleware on"]
        base = root
        if not _has_user_attributes(root):
            ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
            base = Path(tempfile.mkdtemp(prefix="swift-", dir=ENVIRONMENTS))
            self.notes.append("Swift: data on a disk, since the tmpfs has no user extended attributes")
        self._root = base / self.name
        self._etc = self._root / "etc"
        self.processes = Processes(root / "logs-swift")

    def start(self) -> None:
        self._bin = environment("swift", REQUIREMENTS)
        shutil.rmtree(self._root, ignore_errors=True)
        self._etc.mkdir(parents=True)
        (self._etc / "swift.conf").write_text(_cluster.format(data=NEEDED, parity=NODES - NEEDED))
        self._ring("account", [_account_port])
        self._ring("container", [_container_port])
        self._ring("object", [_object_port + index for index in range(NODES)])
        self._serve("account", "account", _account_port, 0)
        self._serve("container", "container", _container_port, 0)
        for index in range(NODES):
            self._serve(f"object{index:02d}", "object", _object_port + index, index)
        self._serve_proxy()
        web.wait_until(self._ready, self.name)

    def put(self, path: Path) -> str:
        name = f"/v1/AUTH_bench/files/{uuid.uuid4().hex}"
        web.upload(_proxy_port, name, path)
        return name

    def get(self, cap: str, target: Path) -> None:
        web.download(_proxy_port, cap, target)

    def read(self, cap: str, offset: int, length: int) -> bytes:
        return web.read_range(_proxy_port, cap, offset, length)

    def put_many(self, paths: Sequence[Path], parallel: int) -> list[str]:
        return put_each(self, paths, parallel)

    def get_many(self, caps: Sequence[str], targets: Sequence[Path], parallel: int) -> None:
        get_each(self, caps, targets, parallel)

    def stored_bytes(self) -> int:
        return sum(file.stat().st_size for file in self._root.rglob("*.data"))

    def freeze(self) -> None:
        self.processes.freeze("object03")

    def thaw(self) -> None:
        self.processes.thaw("object03")

    def stop(self) -> None:
        self.processes.stop()
        shutil.rmtree(self._root, ignore_errors=True)

    def _ring(self, kind: str, ports: Sequence[int]) -> None:
        tool, builder = str(self._bin / "swift-ring-builder"), str(self._etc / f"{kind}.builder")
        run([tool, builder, "create", "8", str(len(ports)), "0"])
        for zone, port in enumerate(ports, 1):
            place = ["--region", "1", "--zone", str(zone), "--ip", "127.0.0.1", "--port", str(port), "--device", "d"]
            run([tool, builder, "add", *place, "--weight", "1"])
        run([tool, builder, "rebalance"])

    def _serve(self, name: str, kind: str, port: int, index: int) -> None:
        devices = self._root / f"n{index:02d}"
        (devices / "d").mkdir(parents=True, exist_ok=True)
        config = _server.format(port=port, user=_user(), etc=self._etc, devices=devices, kind=kind)
        self._launch(name, kind, config)

    def _serve_proxy(self) -> None:
        secret = base64.b64encode(os.urandom(32)).decode()
        self._launch(self.client, "proxy", _proxy.format(port=_proxy_port, user=_user(), etc=self._etc, secret=secret))

    def _launch(self, name: str, kind: str, config: str) -> None:
        file = self._etc / f"{name}.conf"
        file.write_text(config)
        program = _boot % str(self._bin / f"swift-{kind}-server")
        self.processes.start(name, [str(self._bin / "python"), "-c", program, str(self._etc / "swift.conf"), str(file)])

    def _ready(self) -> bool:
        if dead := self.processes.dead():
            raise SideError(f"swift: {dead[0]} ended: {self.processes.log_tail(dead[0])}")
        for port in range(_object_port, _object_port + NODES):
            web.request(port, "GET", "/")
        status, _ = web.request(_proxy_port, "PUT", "/v1/AUTH_bench/files")
        return status in (201, 202)


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _has_user_attributes(folder: Path) -> bool:
    probe = folder / "attribute-probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.bench", b"x" * 4000)
    except OSError:
        return False
    finally:
        probe.unlink()
    return True
