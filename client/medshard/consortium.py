"""A whole consortium on one machine: a process for each node, and a vault that has joined. For trials, tests and the demo.

Law: it drives ``python -m storenode`` like any operator would and knows nothing else of a node but its files' names. It starts,
stops, kills and freezes processes; it restarts nothing by itself. Its nodes never outlive it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from medshard import nursery
from medshard.nursery import Process
from medshard_protocol.errors import Absent, Conflict, Unavailable
from medshard_protocol.identity import node_hostname
from medshard_protocol.roster import Node, Roster

if TYPE_CHECKING:
    from medshard.cli.options import Session

institutions_default = 6
standing_reason = "a trial on one machine, with too few of its nodes running"
start_wait_s = 60.0  # sixteen Python processes on two busy cores take 10
stop_wait_s = 10.0  # what a node gets to finish what is in flight
_probe_wait_s = 2.0
_poll_s = 0.05


class LocalConsortium:
    """The nodes under ``folder/nodes`` and the vault at ``folder/vault``. Made by ``start`` where they are not there yet."""

    def __init__(self, folder: Path, *, institutions: int | None = None, code: tuple[int, int] | None = None) -> None:
        self.folder = folder.absolute()
        self.vault_home = self.folder / "vault"
        self.auditors_key = self.folder / "auditors.key"  # under the vault's passphrase
        self._genesis = self.folder / "genesis.medshard"
        self._institutions = institutions
        self._code = code
        self._running: dict[str, Process] = {}
        self._lock: int | None = None
        self.roster: Roster | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def passphrase(self) -> str:
        """The vault's, which lies beside its key: this is a trial."""
        return (self.vault_home / "passphrase").read_text().strip()

    @property
    def exists(self) -> bool:
        """Whether it was made before."""
        return self._genesis.exists()

    @property
    def names(self) -> list[str]:
        """The nodes' names, sorted."""
        return sorted(path.parent.name for path in self.folder.glob("nodes/*/config.toml"))

    def invite(self, name: str | None = None) -> str:
        """A one-time code to join the institution of a node, the first by default. Raises Unavailable."""
        invited = nursery.run(["-m", "storenode", "--home", str(self.home(name or self.names[0])), "invite"])
        if invited.returncode != 0:
            raise Unavailable(f"no invitation could be made: {invited.stderr.strip()}")
        return invited.stdout.split()[0]

    def home(self, name: str) -> Path:
        """A node's folder."""
        return self.folder / "nodes" / name

    def make(self) -> None:
        """Make what is missing and start nothing, so that a node's configuration can be changed before it starts. Raises MedshardError."""
        self._make()

    def start(self) -> None:
        """Make what is missing, start every node, wait until all answer, and join the vault. Raises MedshardError."""
        self._make()
        self._hold()
        try:
            self.roster = Roster.from_bytes(self._genesis.read_bytes())
            for name in self.names:
                self._spawn(name)
            self._wait_for(self.names)
            self._join()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop every node: ask, wait, then kill. Idempotent."""
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
        deadline = time.monotonic() + stop_wait_s
        for name, process in self._running.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            (self.home(name) / "pid").unlink(missing_ok=True)
        self._running.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def kill(self, name: str) -> None:
        """End a node as a power cut would: SIGKILL."""
        process = self._running.pop(name)
        process.kill()
        process.wait()
        (self.home(name) / "pid").unlink(missing_ok=True)

    def freeze(self, name: str) -> None:
        """Stop a node without ending it, as a hung disk or a full memory would: SIGSTOP."""
        self._running[name].send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """Let a frozen node go on."""
        self._running[name].send_signal(signal.SIGCONT)

    def restart(self, name: str) -> None:
        """Start a node that ended, and wait until it answers."""
        if name in self._running and self._running[name].poll() is None:
            raise ValueError(f"{name} is running")
        self._spawn(name)
        self._wait_for([name])

    def pid(self, name: str) -> int:
        """The process id of a running node."""
        return self._running[name].pid

    @property
    def running(self) -> Mapping[str, Process]:
        """The processes of the nodes that were started and not killed, by name."""
        return self._running

    def ended(self) -> Iterator[tuple[str, int]]:
        """Each node that ended by itself since the last call: (name, exit code; negative for a signal)."""
        for name, process in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[name]
                (self.home(name) / "pid").unlink(missing_ok=True)
                yield name, code

    # Inside

    def _make(self) -> None:
        if self._genesis.exists():
            self._check_same()
            return
        code = ["--code", f"{self._code[0]}/{self._code[1]}"] if self._code else []
        institutions = ["--institutions", str(self._institutions or institutions_default)]
        made = nursery.run(["-m", "storenode", "consortium", str(self.folder), *institutions, *code, *self._emergency()])
        if made.returncode != 0:
            said, _, hint = made.stderr.strip().partition("\nhint: ")
            if "No module named" in said:
                hint = "Nodes need more packages than clients: pip install 'medshard[node]'."
            message = said.splitlines()[-1] if said else f"exit code {made.returncode}"
            raise Absent(f"no consortium could be made in {self.folder}: {message.removeprefix('storenode: ')}", hint=hint)

    def _emergency(self) -> list[str]:
        """Make the vault's key and the auditors' before the roster that is to name them."""
        from medshard import auditors
        from medshard.home import Home
        from medshard.keys import create_key_file, open_key_file

        self.vault_home.mkdir(parents=True, mode=0o700, exist_ok=True)
        secret, reason = self.vault_home / "passphrase", self.vault_home / "break-glass"
        if not secret.exists():
            _write_private(secret, secrets.token_urlsafe(24) + "\n")
        if not reason.exists():
            _write_private(reason, standing_reason + "\n")
        key_file, public = Home(self.vault_home).key_file, self.folder / "auditors.pub"
        keys = open_key_file(key_file, self.passphrase) if key_file.exists() else create_key_file(key_file, self.passphrase, fast=True)
        if not self.auditors_key.exists():
            auditors.create(self.auditors_key, self.passphrase, fast=True)
        public.write_text(auditors.load(self.auditors_key, self.passphrase).public.hex() + "\n")
        return ["--emergency", keys.public.hex(), "--auditors", str(public)]

    def _check_same(self) -> None:
        there = Roster.from_bytes(self._genesis.read_bytes())
        k, n, _ = there.code
        if self._institutions not in (None, len(there.institutions)) or self._code not in (None, (k, n)):
            raise Conflict(
                f"{self.folder} holds a consortium of {len(there.institutions)} institutions with code {k}/{n}",
                hint="Leave --institutions and --code out to use it, or choose another --dir.",
            )

    def _hold(self) -> None:
        """Make sure that nobody else runs these nodes."""
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise Conflict(f"the consortium in {self.folder} runs already", hint="Use it, or choose another --dir.") from None

    def _program(self, name: str) -> list[str]:
        """The command line of a node."""
        return [sys.executable, "-m", "storenode", "--home", str(self.home(name)), "run"]

    def _spawn(self, name: str) -> None:
        home = self.home(name)
        program = self._program(name)
        loaded = nursery.loaded() if program[0] == sys.executable else None

        def start() -> Process:
            if loaded:
                with contextlib.suppress(Absent):
                    return loaded.start(program[1:], home / "log")
            with (home / "log").open("ab") as log:
                return subprocess.Popen(
                    [sys.executable, "-I", "-S", str(nursery.tether), str(os.getpid()), *program],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for us: we stop them in order
                )

        process = nursery.starter.submit(start).result()
        self._running[name] = process
        (home / "pid").write_text(f"{process.pid}\n")

    def _wait_for(self, names: Sequence[str]) -> None:
        assert self.roster is not None
        waiting = {node.name: node for node in self.roster.nodes if node.name in names}
        deadline = time.monotonic() + start_wait_s
        while waiting:
            for name, node in list(waiting.items()):
                if (code := self._running[name].poll()) is not None:
                    raise Unavailable(
                        f"node {name} ended at once ({_how(code)})\n{self._last_words(name)}", hint=f"See {self.home(name) / 'log'}."
                    )
                if answers(node, self.roster):
                    del waiting[name]
            if waiting and time.monotonic() > deadline:
                raise Unavailable(
                    f"{', '.join(waiting)} did not answer within {start_wait_s:.0f} s", hint=f"See the logs in {self.folder / 'nodes'}."
                )
            if waiting:
                time.sleep(_poll_s)

    def _last_words(self, name: str) -> str:
        lines = (self.home(name) / "log").read_text(errors="replace").splitlines()[-5:]
        return "\n".join(f"  | {line}" for line in lines)

    def _join(self) -> None:
        from medshard.home import Home
        from medshard.vault import Vault

        if Home(self.vault_home).certificate.exists():
            return
        joining = Vault.join(self.vault_home, self.invite(), self.passphrase, fast_kdf=True)
        # In another thread, because this one may have an event loop that runs.
        with ThreadPoolExecutor(max_workers=1) as aside:
            aside.submit(asyncio.run, joining).result()


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def answers(node: Node, roster: Roster) -> bool:
    """Whether a node answers a question for its health, and is who it should be."""
    from medshard.tls import context_for

    address = urlsplit(node.url)
    try:
        with (
            socket.create_connection((address.hostname or "", address.port or 443), timeout=_probe_wait_s) as plain,
            context_for(roster.institutions[node.institution].ca).wrap_socket(plain, server_hostname=node_hostname(node.id)) as connection,
        ):
            connection.sendall(f"GET /healthz HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n".encode())
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except (OSError, ssl.SSLError):
        return False


class _Asked(BaseException):
    """Somebody asked us to stop."""


def serve(consortium: LocalConsortium, session: Session) -> int:
    """Run a consortium in the foreground until Ctrl-C or SIGTERM. What ``medshard up`` does; its exit code."""

    def stop(number: int, frame: object) -> None:
        raise _Asked

    from medshard.cli import output

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        if not session.quiet and not consortium.exists:
            output.note(f"making a consortium in {consortium.folder}")
        consortium.start()
        _tell_ready(consortium, session)
        while True:
            for name, code in consortium.ended():
                again = f"{Path(sys.executable).name} -m storenode --home {consortium.home(name)} run"
                output.note(f"medshard: node {name} ended ({_how(code)}). Start it again with: {again}")
            time.sleep(_poll_s * 4)
    except _Asked:
        return 0
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # stopping takes 10 s at the most, and is not to be interrupted
        if not session.quiet and consortium.roster is not None:
            output.note("stopping")
        consortium.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell_ready(consortium: LocalConsortium, session: Session) -> None:
    from medshard.cli import output

    assert consortium.roster is not None
    k, n, w = consortium.roster.code
    if session.json:
        output.document({"ready": True, "home": str(consortium.vault_home), "nodes": consortium.names, "k": k, "n": n, "w": w})
    else:
        output.line(f"ready: {len(consortium.names)} nodes; any {k} of a file's {n} shards restore it, {w} institutions acknowledge it")
        if not session.quiet:
            output.line(f"in another terminal: export MEDSHARD_HOME={consortium.vault_home}")
    sys.stdout.flush()
