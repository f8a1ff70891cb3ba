"""One association over a blocking socket: messages out of it and into it, whichever side asked for it.

Law: knows PDUs and messages and nothing of what they are for. Data sets are handed on in pieces as they come and are never held as a
whole, so a sender that is not read from is slowed down by TCP. Every wait has an end. One thread uses an association at a time.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from collections.abc import Iterable, Iterator, Mapping
from struct import unpack_from
from typing import Final

from medshard.gateway.dimse import commands, pdus
from medshard.gateway.dimse.commands import Command
from medshard.gateway.dimse.pdus import Associate, Context, Role
from medshard_protocol.errors import Malformed, Refused, Unavailable

pdu_max: Final = 256 * 1024  # what we take at once; dcmtk sends 128 KiB at the most
identifier_bytes_max: Final = 4 * 1024 * 1024  # of queries, commitment requests and the like: 20,000 UIDs fit
buffer_bytes: Final = 512 * 1024
_quick = getattr(socket, "TCP_QUICKACK", None)


class Released(Exception):
    """The peer has released the association in good order."""


class Association:
    """Use ``accepting`` or ``requesting``."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self.calling = self.called = ""
        self.contexts: dict[int, Context] = {}  # those accepted, with the one transfer syntax agreed upon
        self.roles: dict[str, Role] = {}
        self._socket = connection
        self._peer_max = 16 * 1024
        self._buffer = memoryview(bytearray(buffer_bytes))
        self._start = self._end = 0
        self._pdu_left = self._pdv_left = 0
        self._context = self._flags = 0
        self._message = 0
        connection.settimeout(timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    # -- beginning and end

    def asked(self) -> Associate:
        """Wait for the peer to ask for an association. Raises Malformed, Unavailable."""
        kind, size = self._head()
        if kind != pdus.ASSOCIATE_RQ or size > pdus.associate_bytes_max:
            raise Malformed("no association request")
        request = Associate.from_bytes(self._exactly(size), accepted=False)
        self.calling, self.called = request.calling, request.called
        return request

    def accept(self, request: Associate, contexts: Iterable[Context], roles: Iterable[Role]) -> None:
        """Answer yes, with a result for each presentation context."""
        answered, roles = tuple(contexts), tuple(roles)
        self.contexts = {each.number: each for each in answered if each.result == pdus.ACCEPTED}
        self.roles = {role.sop_class: role for role in roles}
        self._agree(request.pdu_max)
        answer = Associate(request.called, request.calling, answered, pdu_max, roles, accepted=True)
        self._send(answer.to_bytes())

    def reject(self, result: int, source: int, reason: int) -> None:
        """Answer no."""
        with contextlib.suppress(OSError, Unavailable):
            self._send(pdus.reject(result, source, reason))
            self._socket.shutdown(socket.SHUT_WR)

    def request(self, called: str, calling: str, contexts: Iterable[Context], roles: Iterable[Role] = ()) -> None:
        """Ask for an association. Raises Refused where the peer says no, Unavailable, Malformed."""
        proposed = tuple(contexts)
        self.called, self.calling = called, calling
        self._send(Associate(called, calling, proposed, pdu_max, tuple(roles)).to_bytes())
        kind, size = self._head()
        if size > pdus.associate_bytes_max:
            raise Malformed("an answer to an association request of more than 256 KiB")
        body = self._exactly(size)
        if kind == pdus.ASSOCIATE_RJ and size == 4:
            raise Refused(f"{called} refuses the association (source {body[2]}, reason {body[3]})", hint="is this AE title known there?")
        if kind != pdus.ASSOCIATE_AC:
            raise Unavailable(f"{called} answers an association request with PDU {kind}")
        answer = Associate.from_bytes(body, accepted=True)
        by_number = {each.number: each for each in proposed}
        for each in answer.contexts:
            if each.result == pdus.ACCEPTED and each.number in by_number and each.syntaxes:
                self.contexts[each.number] = Context(each.number, by_number[each.number].abstract, each.syntaxes[:1])
        self.roles = {role.sop_class: role for role in answer.roles}
        self._agree(answer.pdu_max)

    def release(self) -> None:
        """Release in good order and wait for the answer, not for long."""
        with contextlib.suppress(OSError, Unavailable, Malformed):
            self._socket.settimeout(5.0)
            self._send(pdus.release_rq)
            while self._head()[0] not in (pdus.RELEASE_RP, pdus.ABORT):
                self._pdu_left = 0

    def abort(self) -> None:
        """Break off."""
        with contextlib.suppress(OSError, Unavailable):
            self._send(pdus.abort())

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    # -- messages

    def next_number(self) -> int:
        """A message id for a request of our own."""
        self._message = self._message % 0xFFFF + 1
        return self._message

    def receive(self) -> tuple[Context, Command]:
        """The next message's command; its data set, if it has one, is then read with ``data``. Raises Released, Malformed, Unavailable."""
        parts = bytearray()
        while True:
            self._value(command=True)
            parts += self._rest_of_value(commands.command_bytes_max - len(parts))
            if self._flags & 2:
                break
        context = self.contexts.get(self._context)
        if context is None:
            raise Malformed("a message in a presentation context that was not agreed upon")
        return context, commands.decode(bytes(parts))

    def data(self) -> Iterator[memoryview]:
        """The data set that follows a command, in pieces that are valid until the next one is asked for."""
        while True:
            self._value(command=False)
            while self._pdv_left:
                yield self._some(self._pdv_left)
            if self._flags & 2:
                return

    def identifier(self) -> bytes:
        """A whole data set, where it is known to be a small one. Raises Malformed."""
        whole = bytearray()
        for piece in self.data():
            whole += piece
            if len(whole) > identifier_bytes_max:
                raise Malformed("an identifier of more than 4 MiB")
        return bytes(whole)

    def send(self, context: int, command: Mapping[int, int | str], data: Iterable[bytes | memoryview] | None = None) -> None:
        """Send a message. Whether it has a data set stands in the command. Raises Unavailable."""
        encoded = commands.encode(command)
        self._send(pdus.data_head(context, len(encoded), command=True, last=True) + encoded)
        if data is not None:
            self._send_data(context, data)

    def is_readable(self, wait_s: float = 0.0) -> bool:
        """Whether the peer has said something."""
        if self._end > self._start or (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
            return True
        return bool(select.select([self._socket], [], [], wait_s)[0])

    # -- inside

    def _agree(self, peer_max: int) -> None:
        self._peer_max = min(max(peer_max or 1 << 20, 1024), 1 << 20)

    def _send(self, *parts: bytes | memoryview) -> None:
        try:
            for part in parts:
                self._socket.sendall(part)
        except OSError as error:
            raise Unavailable(f"the connection to {self.calling or 'the peer'} broke off: {error}") from None

    def _send_data(self, context: int, data: Iterable[bytes | memoryview]) -> None:
        size = self._peer_max - 6
        waiting = bytearray()
        for piece in data:
            view = memoryview(piece)
            while len(view):
                if not waiting and len(view) > size:  # whole PDUs go out without being copied together
                    self._send(pdus.data_head(context, size, command=False, last=False), view[:size])
                    view = view[size:]
                    continue
                taken = view[: size - len(waiting)]
                if len(waiting) == size:
                    self._send(pdus.data_head(context, size, command=False, last=False), bytes(waiting))
                    waiting.clear()
                    continue
                waiting += taken
                view = view[len(taken) :]
        self._send(pdus.data_head(context, len(waiting), command=False, last=True) + bytes(waiting))

    def _value(self, *, command: bool) -> None:
        """Go to the next presentation data value. Raises Released."""
        while not self._pdu_left:
            self._next_data()
        if self._pdu_left < 6:
            raise Malformed("a data PDU that is cut off")
        head = self._exactly(6)
        size = int.from_bytes(head[:4])
        self._context, self._flags = head[4], head[5]
        self._pdu_left -= 4 + size
        self._pdv_left = size - 2
        if size < 2 or self._pdu_left < 0:
            raise Malformed("a data value that reaches out of its PDU")
        if bool(self._flags & 1) != command:
            raise Malformed("a command where a data set should be, or the other way round")

    def _next_data(self) -> None:
        kind, size = self._head()
        if kind == pdus.DATA:
            if size > pdu_max + 6:
                raise Malformed(f"a PDU of {size} bytes, more than was agreed upon")
            self._pdu_left = size
            return
        if size > pdus.associate_bytes_max:
            raise Malformed("a PDU that is far too long")
        self._exactly(size)
        if kind == pdus.RELEASE_RQ:
            self._send(pdus.release_rp)
            raise Released
        if kind == pdus.ABORT:
            raise Unavailable("the peer broke the association off")
        raise Malformed(f"PDU {kind} in the middle of an association")

    def _rest_of_value(self, most: int) -> bytes:
        if self._pdv_left > most:
            raise Malformed("a command of more than 16 KiB")
        data = self._exactly(self._pdv_left)
        self._pdv_left = 0
        return data

    def _head(self) -> tuple[int, int]:
        kind, size = unpack_from(">BxL", self._exactly(6))
        if _quick is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, _quick, 1)  # a sender that holds small segments back waits for no timer of ours
        return kind, size

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            parts += self._some(size - len(parts), counted=False)
        return bytes(parts)

    def _some(self, most: int, *, counted: bool = True) -> memoryview:
        """At least one and at most ``most`` of the next bytes."""
        if self._start == self._end:
            try:
                got = self._socket.recv_into(self._buffer)
            except TimeoutError:
                raise Unavailable("the peer has said nothing for too long") from None
            except OSError as error:
                raise Unavailable(f"the connection broke off: {error}") from None
            if not got:
                raise Unavailable("the peer closed the connection")
            self._start, self._end = 0, got
        view = self._buffer[self._start : min(self._end, self._start + most)]
        self._start += len(view)
        if counted:
            self._pdv_left -= len(view)
        return view
