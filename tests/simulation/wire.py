"""The network of a world: connections whose bytes come late, in order, or not at all, as the seed says.

Law: TLS is left out, and what it proves comes with the connection: each machine has one certificate, and whoever answers at an address is
whom the address belongs to. Everything above TLS is the product's, aiohttp's and asyncio's own. As TCP does, a connection either brings
all bytes in order or breaks; a lost packet is a late one, and while a partition lasts nothing comes through.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import itertools
import random
import select
import socket
import ssl
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from aiohttp import web
from tests.simulation import world as worlds
from tests.simulation.world import Machine, here

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
        self.sockets: dict[int, Socket] = {}
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


class _Server:
    """What ``create_server`` gives."""

    sockets: tuple[object, ...] = ()

    def __init__(self, net: Network, port: int) -> None:
        self._net, self._port = net, port

    def close(self) -> None:
        self._net.listeners.pop(self._port, None)

    def is_serving(self) -> bool:
        return self._port in self._net.listeners

    async def wait_closed(self) -> None: ...


class Socket:
    """A socket as the client's lines use one: never blocking."""

    def __init__(self, family: int = 0, kind: int = 0) -> None:
        self._net = network()
        self._number = self._net.number()
        self._net.sockets[self._number] = self
        self._in = bytearray()
        self._end: End | None = None
        self._pair: Socket | None = None
        self._over = self._connecting = False
        self._error = 0
        self._wakes: list[Callable[[], None]] = []

    def setblocking(self, on: bool) -> None: ...
    def setsockopt(self, *values: Any) -> None: ...

    def fileno(self) -> int:
        return self._number

    def connect_ex(self, address: tuple[str, int]) -> int:
        self._connecting = True
        machine = here.get()
        assert machine is not None
        self._net.loop.create_task(self._connect(machine, address[1]))
        return errno.EINPROGRESS

    async def _connect(self, machine: Machine, port: int) -> None:
        try:
            self._end = await self._net.connect(machine, port)
            self._end.on_data, self._end.on_end = self._data, self._ended
        except OSError as error:
            self._error = error.errno or errno.EIO
        self._connecting = False
        self._changed()

    def getsockopt(self, *what: int) -> int:
        return self._error

    def send(self, data: Any, flags: int = 0) -> int:
        if self._pair is not None:
            self._pair._data(bytes(data))
        elif self._end is None or self._end.closed:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        else:
            self._end.send(bytes(data))
        return len(data)

    def recv_into(self, room: Any) -> int:
        data = self.recv(len(room))
        room[: len(data)] = data
        return len(data)

    def recv(self, size: int, flags: int = 0) -> bytes:
        if not self._in:
            if self._error:
                raise ConnectionResetError(self._error, "reset")
            if self._over:
                return b""
            raise BlockingIOError
        data = bytes(self._in[:size])
        if not flags & socket.MSG_PEEK:
            del self._in[:size]
        return data

    def close(self) -> None:
        self._net.sockets.pop(self._number, None)
        if self._end is not None:
            self._end.close()

    def events(self, wanted: int) -> int:
        """Which of these it is ready for."""
        if self._connecting:
            return 0
        return (select.POLLIN if self._in or self._over or self._error else 0) & wanted | (select.POLLOUT & wanted)

    def _data(self, data: bytes) -> None:
        self._in += data
        self._changed()

    def _ended(self, error: Exception | None) -> None:
        self._over = True
        self._error = errno.ECONNRESET if error is not None else 0
        self._changed()

    def _changed(self) -> None:
        wakes, self._wakes = self._wakes, []
        for wake in wakes:
            self._net.loop.call_soon(wake)


def socketpair() -> tuple[Socket, Socket]:
    """Two that are joined."""
    one, other = Socket(), Socket()
    one._pair, other._pair = other, one
    return one, other


class Poll:
    """A ``select.poll`` over sockets of a world."""

    def __init__(self) -> None:
        self._net = network()
        self._wanted: dict[int, int] = {}

    def register(self, what: Any, events: int) -> None:
        self._wanted[what if isinstance(what, int) else what.fileno()] = events

    def unregister(self, number: int) -> None:
        del self._wanted[number]

    def poll(self, timeout_ms: float | None = None) -> list[tuple[int, int]]:
        found = self._look()
        if not found:

            def arm(wake: Callable[[], None]) -> None:
                for number in self._wanted:
                    self._net.sockets[number]._wakes.append(wake)

            self._net.loop.park(arm, None if timeout_ms is None else timeout_ms / 1000)
            found = self._look()
        return found

    def _look(self) -> list[tuple[int, int]]:
        sockets = self._net.sockets
        return [(number, found) for number, events in self._wanted.items() if (found := sockets[number].events(events))]


class Watched:
    """What an event loop is asked to watch: a socket of a world, for one event, as long as it is ready for it."""

    def __init__(self) -> None:
        self._watched: dict[tuple[int, int], object] = {}

    def add(self, loop: worlds.Loop, number: int, event: int, callback: Callable[[], None]) -> None:
        name, mark, context = (number, event), object(), contextvars.copy_context()
        self._watched[name] = mark

        def look() -> None:
            known = network().sockets.get(number)
            if self._watched.get(name) is not mark or known is None:
                return
            if known.events(event):
                loop.call_soon(go_on, context=context)
            else:
                known._wakes.append(look)

        def go_on() -> None:
            if self._watched.get(name) is mark:
                callback()
                look()

        look()

    def remove(self, number: int, event: int) -> bool:
        return self._watched.pop((number, event), None) is not None


class Context(ssl.SSLContext):
    """In the place of a TLS context: what it would prove is known."""

    def wrap_bio(self, incoming: Any, outgoing: Any, server_side: bool = False, server_hostname: Any = None, session: Any = None) -> Any:
        def read(size: int, room: memoryview) -> int:
            data = incoming.read(size)
            if not data:
                raise ssl.SSLWantReadError
            room[: len(data)] = data
            return len(data)

        return SimpleNamespace(do_handshake=lambda: None, write=outgoing.write, read=read)


class _Site(web.TCPSite):
    """In the place of the node's own TLS below aiohttp."""

    def __init__(self, runner: web.BaseRunner, host: str, port: int, context: ssl.SSLContext) -> None:
        super().__init__(runner, host, port, ssl_context=context)

    def close(self) -> None: ...


_network: Network | None = None


def network() -> Network:
    """The network of this world."""
    assert _network is not None
    return _network


async def _start_connection(*, addr_infos: Sequence[Any], **keywords: Any) -> Any:
    return SimpleNamespace(address=addr_infos[0][4])


async def _create_connection(self: worlds.Loop, factory: Any, *, sock: Any, **keywords: Any) -> Any:
    machine = here.get()
    assert machine is not None
    end = await network().connect(machine, sock.address[1])
    protocol = factory()
    return Transport(end, protocol), protocol


async def _create_server(self: worlds.Loop, factory: Any, host: str, port: int, **keywords: Any) -> _Server:
    machine = here.get()
    assert machine is not None
    network().listeners[port] = (machine, factory)
    return _Server(network(), port)


def become(seed: int) -> None:
    """The masks that websockets draw are this seed's."""
    import aiohttp.http_websocket

    init = aiohttp.http_websocket.WebSocketWriter.__init__
    for value in (*(init.__defaults__ or ()), *(init.__kwdefaults__ or {}).values()):
        if isinstance(value, random.Random):
            value.seed(f"masks {seed}")


def install(made: worlds.World) -> Network:
    """Give the world its network."""
    import aiohttp.connector

    import medshard.line
    import medshard.polling
    import medshard.tls
    import storenode.app

    global _network
    _network = Network(made.loop, made.rng)
    aiohttp.connector.aiohappyeyeballs.start_connection = _start_connection  # type: ignore[assignment]
    worlds.Loop.create_connection = _create_connection  # type: ignore[method-assign,assignment]
    worlds.Loop.create_server = _create_server  # type: ignore[method-assign,assignment]
    watched = Watched()
    worlds.Loop.add_reader = lambda self, number, callback: watched.add(self, number, select.POLLIN, callback)  # type: ignore
    worlds.Loop.add_writer = lambda self, number, callback: watched.add(self, number, select.POLLOUT, callback)  # type: ignore
    worlds.Loop.remove_reader = lambda self, number: watched.remove(number, select.POLLIN)  # type: ignore
    worlds.Loop.remove_writer = lambda self, number: watched.remove(number, select.POLLOUT)  # type: ignore
    sockets = SimpleNamespace(**vars(socket))
    sockets.socket, sockets.socketpair = Socket, socketpair
    selects = SimpleNamespace(**vars(select))
    selects.poll = Poll
    context = Context(ssl.PROTOCOL_TLS_CLIENT)
    contexts = lambda roster, keys: dict.fromkeys(range(len(roster.institutions)), context)  # noqa: E731
    for module, name, new in (
        *((each, "socket", sockets) for each in (medshard.line, medshard.polling)),
        *((each, "select", selects) for each in (medshard.line, medshard.polling)),
        (medshard.tls, "context_for", lambda *a, **k: context),
        (storenode.app, "client_contexts", contexts),
        (storenode.app, "server_ssl_context", lambda roster, keys: context),
        (storenode.app, "TlsSite", _Site),
        (storenode.app, "trust", lambda context, roster: None),
    ):
        assert hasattr(module, name), f"{module.__name__}.{name} is not there any more, so the product would go past this world"
        setattr(module, name, new)
    return _network
