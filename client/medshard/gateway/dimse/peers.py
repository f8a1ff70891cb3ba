"""The DICOM nodes that the gateway knows, and associations that it asks for itself.

Law: only nodes of the table are spoken to. The gateway is the calling side here, under its own first title.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from medshard.gateway.dimse.association import Association
from medshard.gateway.dimse.pdus import Context, Role
from medshard_protocol.errors import Absent, Unavailable

connect_timeout_s: Final = 10.0


@dataclass(frozen=True, slots=True)
class Peer:
    """One line of the table."""

    title: str
    host: str
    port: int
    tls: bool = False


class Peers:
    """The table, and how to call."""

    def __init__(self, peers: Iterable[Peer], own_title: str, tls: ssl.SSLContext | None, timeout_s: float) -> None:
        self._peers: Mapping[str, Peer] = {peer.title: peer for peer in peers}
        self._own_title = own_title
        self._tls = tls
        self._timeout_s = timeout_s

    def __contains__(self, title: str) -> bool:
        return title in self._peers

    @contextlib.contextmanager
    def associated(self, title: str, contexts: Iterable[Context], roles: Iterable[Role] = ()) -> Iterator[Association]:
        """An association with a node of the table; released at the end, or broken off. Raises Absent, Refused, Unavailable, Malformed."""
        peer = self._peers.get(title)
        if peer is None:
            raise Absent(f"no peer is called {title}", hint="add it to [[peers]] of the gateway's configuration")
        association = Association(self._connect(peer), self._timeout_s)
        try:
            association.request(title, self._own_title, contexts, roles)
            yield association
            association.release()
        except BaseException:
            association.abort()
            raise
        finally:
            association.close()

    def _connect(self, peer: Peer) -> socket.socket:
        try:
            plain = socket.create_connection((peer.host, peer.port), connect_timeout_s)
            if not peer.tls:
                return plain
            if self._tls is None:
                raise Absent(f"{peer.title} wants TLS, and this gateway has no certificate", hint="set [tls] in the configuration")
            return self._tls.wrap_socket(plain, server_hostname=peer.host)
        except OSError as error:
            raise Unavailable(f"{peer.title} at {peer.host}:{peer.port} does not answer: {error}") from None
