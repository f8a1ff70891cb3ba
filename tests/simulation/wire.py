"""Where the product meets the network of a world: what stands in the place of sockets, polls, TLS and the event loop's own connections.

Law: everything above TLS is the product's, aiohttp's and asyncio's own. A way to the outside that has moved in the product is an error, and
none that goes past this world.
"""

from __future__ import annotations

import contextvars
import errno
import select
import socket
import ssl
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from aiohttp import web
from tests.simulation import world as worlds
from tests.simulation.network import End, Network, Transport, lay, network
from tests.simulation.world import Machine, here


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


async def _start_connection(*, addr_infos: Sequence[Any], **keywords: Any) -> Any:
    return SimpleNamespace(address=addr_infos[0][4])


async def _create_connection(self: worlds.Loop, factory: Any, host: str = "", port: int = 0, *, sock: Any = None, **keywords: Any) -> Any:
    machine = here.get()
    assert machine is not None
    end = await network().connect(machine, port if sock is None else sock.address[1])
    protocol = factory()
    return Transport(end, protocol), protocol


async def _create_server(self: worlds.Loop, factory: Any, host: str, port: int, **keywords: Any) -> _Server:
    machine = here.get()
    assert machine is not None
    network().listeners[port] = (machine, factory)
    return _Server(network(), port)


def install(made: worlds.World) -> Network:
    """Give the world its network."""
    import aiohttp.connector

    import medshard.line
    import medshard.polling
    import medshard.tls
    import storenode.app

    laid = lay(made.loop, made.rng)
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
    return laid
