"""A whole consortium in one folder, for a trial on one machine. Never for real data: one folder holds every institution's keys.

    DIR/nodes/NAME/        a node's home, as `storenode init` and `adopt` make it
    DIR/genesis.medshard   written last, so it is there only when everything else is

Law: laying out the same consortium again changes nothing; an interrupted layout is begun anew. Nothing is fsynced here: what is
lost in a power cut can be laid out again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from medshard_protocol.errors import Conflict, Malformed, Unavailable
from medshard_protocol.ids import Key
from medshard_protocol.invite import Invite
from medshard_protocol.roster import Roster
from storenode.config import write_config
from storenode.genesis import Card, Code, adopt, found, genesis_name, read_genesis
from storenode.identity import Institution, NodeKeys, create_institution, create_node
from storenode.invites import Invites

nodes_name: Final = "nodes"
institutions_max: Final = 64  # each is a process on this machine
port_first: Final = 20_000  # below every system's range for outgoing connections, one of which could else take a node's port
port_last: Final = 32_000
promise_s: Final = 120.0  # from choosing a port to the start of its node; sixteen nodes on a busy machine take 10
promises_bytes_max: Final = 1 << 20  # of the file that says so; a port takes 17 bytes
invite_lifetime_s: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Layout:
    """A consortium in a folder."""

    folder: Path
    roster: Roster
    created: bool

    @property
    def genesis(self) -> Path:
        """The genesis file."""
        return self.folder / genesis_name

    def home(self, name: str) -> Path:
        """A node's home."""
        return self.folder / nodes_name / name


def lay_out(
    folder: Path,
    institutions: int,
    *,
    code: Code | None,
    capacity: int,
    base_port: int | None = None,
    emergency: Sequence[Key] = (),
    auditors: bytes = b"",
) -> Layout:
    """Make a consortium of so many institutions with a node each, or find the one that is there.

    ``emergency`` are identities that may read when the ledger is out of reach; their reasons are sealed to the HPKE key ``auditors``.
    Raises Conflict where another one is there, Malformed for numbers that make none, Unavailable without free ports.
    """
    if not 1 <= institutions <= institutions_max:
        raise Malformed(f"expected 1 to {institutions_max} institutions, got {institutions}")
    folder = folder.absolute()
    if (folder / genesis_name).exists():
        return _existing(folder, institutions, code)
    nodes = folder / nodes_name
    if nodes.exists():
        raise Conflict(f"{nodes} exists, and {folder / genesis_name} does not", hint="choose an empty folder, or remove that one")
    part = folder / f".{nodes_name}.part"
    shutil.rmtree(part, ignore_errors=True)  # left by a layout that was interrupted
    part.mkdir(parents=True)
    cards, keys = [], []
    for name, port in zip(names(institutions), free_ports(institutions, base_port), strict=True):
        card, node_keys = _lay_out_node(part / name, name, port, capacity)
        cards.append(card)
        keys.append(node_keys)
    roster = found(cards, sequencer=cards[0].node, code=code)
    roster = replace(roster, emergency=tuple(sorted(set(emergency))), auditors=auditors)
    data = roster.to_bytes()
    for card, node_keys in zip(cards, keys, strict=True):
        adopt(part / card.node, data, node_keys, sync=False)
    os.replace(part, nodes)
    (folder / genesis_name).write_bytes(data)
    return Layout(folder, roster, created=True)


def invite_code(layout: Layout) -> str:
    """Invite one vault to the first institution."""
    node = layout.roster.nodes[0]
    secret = Invites(layout.home(node.name) / "data").issue("trial", now=time.time(), lifetime_s=invite_lifetime_s)
    return Invite(node.url, layout.roster.sha256, secret, node.institution).to_code()


def names(count: int) -> Sequence[str]:
    """Name institutions: hospitals and insurers in turn."""
    return [f"{'insurer' if i % 2 else 'hospital'}-{i + 1:02}" for i in range(count)]


def free_ports(count: int, base_port: int | None = None) -> list[int]:
    """Find ports of 127.0.0.1 that nobody listens on, and nobody else was given within ``promise_s``. Raises Unavailable."""
    if base_port is not None:
        if not 1024 <= base_port <= 65536 - count:
            raise Malformed(f"base port: expected 1024 to {65536 - count}, got {base_port}")
        ports = list(range(base_port, base_port + count))
        if taken := [port for port in ports if not _is_free(port)]:
            raise Unavailable(f"ports {', '.join(map(str, taken))} are taken", hint="choose another --base-port, or none")
        return ports
    with _promised_ports() as promised:
        now = time.time()
        for port in [port for port, until in promised.items() if not now < until < now + 2 * promise_s]:
            del promised[port]
        start = random.randrange(port_first, port_last)
        found: list[int] = []
        for offset in range(port_last - port_first):
            port = port_first + (start - port_first + offset) % (port_last - port_first)
            if port not in promised and _is_free(port):
                found.append(port)
                if len(found) == count:
                    promised.update(dict.fromkeys(found, now + promise_s))
                    return found
    raise Unavailable(f"fewer than {count} free ports from {port_first} to {port_last}")


@contextmanager
def _promised_ports() -> Iterator[dict[int, float]]:
    """Ports that were given away lately, and until when: nobody listens on them yet, but a node will.

    One small file for each user, locked while it is open. Without it (a full disk, another user's file) ports are only looked at.
    """
    try:
        path = Path(tempfile.gettempdir()) / f"medshard-ports-{os.getuid()}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield {}
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        words = os.read(fd, promises_bytes_max).split() if os.fstat(fd).st_uid == os.getuid() else []
        pairs = zip(words[::2], words[1::2], strict=False)
        promised = {int(port): float(until) for port, until in pairs if port.isdigit() and until.isdigit()}
        yield promised
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, "".join(f"{port} {until:.0f}\n" for port, until in promised.items()).encode(), 0)
    finally:
        os.close(fd)


def _existing(folder: Path, institutions: int, code: Code | None) -> Layout:
    roster = read_genesis(folder / genesis_name)
    if len(roster.institutions) != institutions or (code is not None and tuple(code) != roster.code):
        there = f"{len(roster.institutions)} institutions, code {'/'.join(map(str, roster.code))}"
        raise Conflict(f"{folder} holds a consortium of {there}", hint="ask for the same, or choose another folder")
    return Layout(folder, roster, created=False)


def _lay_out_node(home: Path, name: str, port: int, capacity: int) -> tuple[Card, NodeKeys]:
    institution: Institution = create_institution(name)
    keys = create_node(home, institution, sync=False)
    address = f"127.0.0.1:{port}"
    write_config(home, url=f"https://{address}", listen=address, capacity_bytes=capacity, durable=False)
    return Card.of(name, name, f"https://{address}", capacity, keys), keys


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a connection in TIME_WAIT is no listener
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
