"""Long bodies, carried by a few threads: from a socket through OpenSSL to whoever takes the bytes, or the other way, below asyncio.

A connection is lent to a thread while its bytes come, or go, without long pauses, and goes back to the event loop, which can wait for
thousands, when it would stand still. So a slow connection holds no thread, and a quick one costs the loop almost nothing. What memory
bodies take belongs to the threads, not to the connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

threads: Final = 4
patience_s: Final = 0.25  # for the next bytes, in a thread that nobody else wants: to and from the loop costs more than the bytes
turn_s: Final = 0.2  # a thread's work for one connection while others wait
sealed_bytes: Final = 128 * 1024  # through OpenSSL's buffers at a time: they grow to this, and stay so with the connection
block_bytes: Final = 256 * 1024  # taken or given at a time


class Gone(Exception):
    """The other side ended the connection, or broke TLS."""


class Stalled(Exception):
    """Nothing moved for too long."""


class Room:
    """What a thread works in."""

    def __init__(self) -> None:
        self.sealed = memoryview(bytearray(sealed_bytes))
        self.block = memoryview(bytearray(block_bytes))


class Work(Protocol):
    """A body on its way. ``go_on`` in a thread; it answers for which poll events it waits, 0 when all is done. Raises Gone."""

    def go_on(self, wire: socket.socket, room: Room, may_wait: Callable[[int], bool]) -> int: ...


class Receiving:
    """``size`` bytes out of TLS, the first of them ``ahead``, given to ``take`` block by block."""

    def __init__(self, tls: ssl.SSLObject, sealed: ssl.MemoryBIO, size: int, ahead: bytes, take: Callable[[memoryview], None]) -> None:
        self._tls = tls
        self._sealed = sealed
        self._take = take
        self._ahead = memoryview(ahead)
        self.left = size

    def go_on(self, wire: socket.socket, room: Room, may_wait: Callable[[int], bool]) -> int:
        """See ``Work``. Raises what ``take`` raises, too."""
        if self._ahead:
            ahead, self._ahead = self._ahead, memoryview(b"")
            self._give(ahead)
        at = 0
        while self.left > at:
            if got := self._read(room.block[at : min(len(room.block), self.left)]):
                at += got
                if at == len(room.block):
                    self._give(room.block)
                    at = 0
            elif not self._fill(wire, room.sealed) and not may_wait(select.POLLIN):
                break
        if at:
            self._give(room.block[:at])
        return select.POLLIN if self.left else 0

    def _give(self, block: memoryview) -> None:
        self.left -= len(block)
        self._take(block)

    def _read(self, room: memoryview) -> int:
        try:
            got = self._tls.read(len(room), room)
        except ssl.SSLWantReadError:
            return 0
        except ssl.SSLError as error:
            raise Gone from error
        if not got:
            raise Gone
        return int(got)

    def _fill(self, wire: socket.socket, room: memoryview) -> bool:
        try:
            got = wire.recv_into(room)
        except BlockingIOError:
            return False
        except OSError as error:
            raise Gone from error
        if not got:
            raise Gone
        self._sealed.write(room[:got])
        return True


class Sending:
    """``size`` bytes into TLS, as ``read`` puts them into the buffers it is given: offset, buffer."""

    def __init__(self, tls: ssl.SSLObject, sealed: ssl.MemoryBIO, size: int, read: Callable[[int, memoryview], None]) -> None:
        self._tls = tls
        self._sealed = sealed
        self._read = read
        self._at = 0
        self._size = size
        self._out = memoryview(b"")

    def go_on(self, wire: socket.socket, room: Room, may_wait: Callable[[int], bool]) -> int:
        """See ``Work``. Raises what ``read`` raises, too."""
        while True:
            while self._out:
                try:
                    self._out = self._out[wire.send(self._out) :]
                except BlockingIOError:
                    if not may_wait(select.POLLOUT):
                        return select.POLLOUT
                except OSError as error:
                    raise Gone from error
            if self._at == self._size:
                return 0
            block = room.block[: min(sealed_bytes, self._size - self._at)]
            self._read(self._at, block)
            self._at += len(block)
            try:
                self._tls.write(block)
            except ssl.SSLError as error:
                raise Gone from error
            self._out = memoryview(self._sealed.read())


class Threads:
    """The threads of one node, and who waits for one."""

    def __init__(self, count: int = threads) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="storenode-body")
        self._lock = threading.Lock()
        self._rooms: list[Room] = []
        self._count = count
        self._waiting = self._busy = 0
        self._bell, self._ear = socket.socketpair()  # each byte asks one thread that waits for its connection to let go of it
        self._ear.setblocking(False)

    async def carry(self, wire: socket.socket, work: Work, stall_s: float) -> None:
        """Go on until the work is done. ``wire`` is the socket, not blocking, which nobody else uses meanwhile.

        Raises Gone, Stalled when nothing moves for ``stall_s``, and what the work raises. Cancelled, it ends the connection, and returns
        when no thread is at it any more.
        """
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                self._waiting += 1
            if self._is_wanted():
                with contextlib.suppress(BlockingIOError):  # full of rings already
                    self._bell.send(b"!", socket.MSG_DONTWAIT)
            turn = loop.run_in_executor(self._pool, self._turn, wire, work)
            try:
                events = await asyncio.shield(turn)
            except asyncio.CancelledError:
                with contextlib.suppress(OSError):
                    wire.shutdown(socket.SHUT_RDWR)  # whatever the thread waits for comes now
                await asyncio.wait([turn])
                turn.exception()
                raise
            if not events:
                return
            await _ready(wire, events, stall_s)

    def close(self) -> None:
        """When nothing is carried any more."""
        self._pool.shutdown()
        self._bell.close()
        self._ear.close()

    def _turn(self, wire: socket.socket, work: Work) -> int:
        with self._lock:
            self._waiting -= 1
            self._busy += 1
            room = self._rooms.pop() if self._rooms else None
        room = room or Room()
        until = time.monotonic() + turn_s

        def may_wait(events: int) -> bool:
            return not (self._is_wanted() and time.monotonic() > until) and self._comes(wire, events)

        try:
            return work.go_on(wire, room, may_wait)
        finally:
            with self._lock:
                self._busy -= 1
                self._rooms.append(room)

    def _is_wanted(self) -> bool:
        """Whether more wait for a thread than are free."""
        return self._waiting > self._count - self._busy

    def _comes(self, wire: socket.socket, events: int) -> bool:
        """Whether the wire is ready soon enough for this thread to wait for it."""
        poll = select.poll()
        poll.register(wire, events)
        poll.register(self._ear, select.POLLIN)
        until = time.monotonic() + patience_s
        while True:
            wait_s = 0.0 if self._is_wanted() else max(0.0, until - time.monotonic())
            ready = [descriptor for descriptor, _ in poll.poll(wait_s * 1000)]
            if wire.fileno() in ready:
                return True
            if not ready:
                return False
            with contextlib.suppress(BlockingIOError):  # another thread was quicker: it lets go
                if self._ear.recv(1) and self._is_wanted():
                    return False


async def _ready(wire: socket.socket, events: int, stall_s: float) -> None:
    loop, watched = asyncio.get_running_loop(), wire.fileno()  # a socket would be written out in words at each call
    ready = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    add, remove = (loop.add_reader, loop.remove_reader) if events == select.POLLIN else (loop.add_writer, loop.remove_writer)
    add(watched, tell)
    try:
        async with asyncio.timeout(stall_s):
            await ready
    except TimeoutError:
        raise Stalled from None
    finally:
        remove(watched)
