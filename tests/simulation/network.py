"""The network of a world: connections whose bytes come late, in order, or not at all, as the seed says.

Law: TLS is left out, and what it proves comes with the connection: each machine has one certificate, and whoever answers at an address is
whom the address belongs to. As TCP does, a connection either brings all bytes in order or breaks; a lost packet is a late one, and while a
partition lasts nothing comes through. By which of its calls the product comes here is ``wire``'s business.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.simulation import world as worlds
from tests.simulation.world import Machine

connect_wait_s = 30.0  # for somebody who does not answer; callers give up earlier


class End:
    """One end of a connection."""

    def __init__(self, net: Network, machine: Machine) -> None:
        self.net, self.machine = net, machine
        self.other: End
        self.closed = False
        self._last = 0.0  # when what was sent last arrives
        self._held: list[bytes | None] = []
        self._inbox: deque[bytes | None] = deque()
        self.on_data: Callable[[bytes], None] = lambda data: None
        self.on_end: Callable[[Exception | None], None] = lambda error: None

    def send(self, data: bytes | None) -> None:
        """Send bytes; None says that no more come."""
        if self.closed or not self.machine.alive:
            return
        if self.net.blocked(self.machine, self.other.machine):
            self._held.append(data)
            return
        loop = self.net.loop
        self._last = max(self._last, loop.time() + self.net.delay_s(self.machine, self.other.machine))
        self.other._inbox.append(data)  # in this order, whichever of two events of one moment comes first
        loop.call_at(self._last, self.other.arrive, context=self.other.machine.context())
        if not self.other.machine.alive:  # nobody takes what arrives: a new start of the machine says so, an absence does not
            loop.call_at(self._last, self._answered_by_nobody, context=self.machine.context())

    def _answered_by_nobody(self) -> None:
        if self.other.machine.host.machine is not None:
            self.end(ConnectionResetError(errno.ECONNRESET, "reset"))

    def release(self) -> None:
        """The partition is over."""
        held, self._held = self._held, []
        for data in held:
            self.send(data)

    def arrive(self) -> None:
        data = self._inbox.popleft()
        if self.closed:
            return
        self.net.loop.note(self.machine.number, len(data or b""), zlib.crc32(data or b""))
        if data is None:
            self.end(None)
        else:
            self.on_data(data)

    def end(self, error: Exception | None) -> None:
        """The connection is over for this end."""
        if not self.closed:
            self.closed = True
            self.net.ends.pop(self, None)
            self.on_end(error)

    def close(self) -> None:
        """Hang up."""
        if not self.closed:
            self.send(None)
            self.closed = True
            self.net.ends.pop(self, None)


class Network:
    """All connections, and what is wrong with them."""

    def __init__(self, loop: worlds.Loop, rng: Any) -> None:
        self.loop, self._rng = loop, rng
        self.listeners: dict[int, tuple[Machine, Callable[[], asyncio.Protocol]]] = {}
        self.hosts: dict[int, Any] = {}  # by port, whether they have power or not
        self.ends: dict[End, None] = {}
        self.slow: tuple[float, float] = (0.0002, 0.003)
        self.loss = 0.0
        self.parts: dict[Any, int] = {}  # by host: only hosts of one part reach each other
        self.sockets: dict[int, Any] = {}  # by number: those that ``wire`` has made
        self._numbers = itertools.count(1000)

    def delay_s(self, one: Machine, other: Machine) -> float:
        wait = self._rng.uniform(*self.slow)
        if self.loss and self._rng.random() < self.loss:
            wait += self._rng.uniform(0.2, 1.2)  # sent again
        return float(wait) / (10 if one.host.quick or other.host.quick else 1)

    def blocked(self, one: Machine, other: Machine) -> bool:
        return self.parts.get(one.host, 0) != self.parts.get(other.host, 0)

    def split(self, parts: dict[Any, int]) -> None:
        """Let only those reach each other that have the same number here, or none."""
        self.parts = parts
        for end in list(self.ends):
            if end._held and not self.blocked(end.machine, end.other.machine):
                end.release()

    def breaks(self, share: float) -> None:
        """Break some of the connections."""
        for end in list(self.ends):
            if end in self.ends and self._rng.random() < share:
                for each in (end, end.other):
                    self.loop.call_soon(each.end, ConnectionResetError(errno.ECONNRESET, "reset"), context=each.machine.context())

    def lost_power(self, machine: Machine, *, silent: bool) -> None:
        """A machine is gone. Unless it went silently, its system tells the others."""
        for end in [end for end in self.ends if end.machine is machine]:
            end.closed = True
            self.ends.pop(end, None)
            if not silent and not self.blocked(machine, end.other.machine):
                self.loop.call_later(
                    0.001, end.other.end, ConnectionResetError(errno.ECONNRESET, "reset"), context=end.other.machine.context()
                )
        for port in [port for port, (owner, _) in self.listeners.items() if owner is machine]:
            del self.listeners[port]

    async def connect(self, machine: Machine, port: int) -> End:
        """Connect to whoever listens there. Raises OSError."""
        deadline = self.loop.time() + connect_wait_s
        host = self.hosts.get(port)
        while True:
            await asyncio.sleep(self.delay_s(machine, machine) * 2)
            there = host.machine if host is not None else None
            if host is None or (there is None and not host.silent) or (there is not None and port not in self.listeners):
                raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
            if there is not None and not self.blocked(machine, there):
                break
            if self.loop.time() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")
            await asyncio.sleep(0.2)
        owner, factory = self.listeners[port]
        mine, theirs = End(self, machine), End(self, owner)
        mine.other, theirs.other = theirs, mine
        self.ends[mine] = self.ends[theirs] = None
        self.loop.call_soon(lambda: Transport(theirs, factory()), context=owner.context())
        return mine

    def number(self) -> int:
        return next(self._numbers)


class _Certificate:
    """What is left of TLS on a connection: who is at the other end."""

    def __init__(self, certificate: bytes) -> None:
        self._certificate = certificate

    def getpeercert(self, binary_form: bool = False) -> bytes:
        return self._certificate


class Transport(asyncio.Transport):
    """A connection as asyncio's protocols see one."""

    def __init__(self, end: End, protocol: asyncio.Protocol) -> None:
        super().__init__({"ssl_object": _Certificate(end.other.machine.host.certificate), "peername": ("10.0.0.1", 1)})
        self._end, self._protocol = end, protocol
        self._paused = self._lost = self._closing = False
        self._waiting: list[bytes] = []
        end.on_data, end.on_end = self._data, self._ended
        protocol.connection_made(self)

    def _data(self, data: bytes) -> None:
        if self._paused:
            self._waiting.append(data)
        elif not self._closing:
            self._protocol.data_received(data)

    def _ended(self, error: Exception | None) -> None:
        if error is None and not self._closing:
            self._protocol.eof_received()
        self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        self._closing = True
        if not self._lost:
            self._lost = True
            self._protocol.connection_lost(error)

    def write(self, data: Any) -> None:
        if not self._closing and data:
            self._end.send(bytes(data))

    def writelines(self, parts: Any) -> None:
        self.write(b"".join(parts))

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._end.close()
            self._end.net.loop.call_soon(self._lose, None)

    abort = close

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            self._data(data)

    def is_reading(self) -> bool:
        return not self._paused

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

    def get_protocol(self) -> Any:
        return self._protocol

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...


_network: Network | None = None


def network() -> Network:
    """The network of this world."""
    assert _network is not None
    return _network


def lay(loop: worlds.Loop, rng: Any) -> Network:
    """Make the network of this world."""
    global _network
    _network = Network(loop, rng)
    return _network
