"""Asking the node of this home how it is, as itself: over TLS, with its own certificate."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from typing import Any, Final

from medshard_protocol.errors import Malformed, Unavailable
from medshard_protocol.identity import node_hostname
from medshard_protocol.messages import unpack_error
from storenode.config import Config
from storenode.identity import NodeKeys, client_ssl_context
from storenode.running import running

answer_bytes_max: Final = 1 << 20
wait_s: Final = 5.0
_anywhere: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what a server listens on, not what we connect to


class _Connection(http.client.HTTPSConnection):
    """Connects to an address and checks the node's name."""

    def __init__(self, host: str, port: int, keys: NodeKeys) -> None:
        self._tls = client_ssl_context(keys.ca_certificate, keys)
        self._name = node_hostname(keys.node_id)
        super().__init__(host, port, timeout=wait_s, context=self._tls)

    def connect(self) -> None:
        self.sock = self._tls.wrap_socket(socket.create_connection((self.host, self.port), self.timeout), server_hostname=self._name)


def ask(config: Config, keys: NodeKeys, path: str) -> dict[str, Any]:
    """Get one JSON answer from the running node. Raises Unavailable with what to do, or what the node answered."""
    host, port = config.listen_address
    connection = _Connection(_anywhere.get(host, host), port, keys)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read(answer_bytes_max)
    except ssl.SSLCertVerificationError as error:
        hint = "another node runs there; see `listen` in config.toml"
        raise Unavailable(f"{config.listen} is not this node ({error.verify_message})", hint=hint) from None
    except (OSError, http.client.HTTPException) as error:
        raise _why_not(config, error) from None
    finally:
        connection.close()
    if response.status != 200:
        raise unpack_error(response.status, body, "node")
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Malformed(f"the node's answer to {path} is no JSON object")
    return answer


def _why_not(config: Config, error: Exception) -> Unavailable:
    pid = running(config.home)
    if pid is None:
        return Unavailable("the node is not running", hint=f"start it: storenode --home {config.home} run")
    if isinstance(error, TimeoutError):
        return Unavailable(f"the node runs (process {pid}) and does not answer within {wait_s:g} s", hint="is its disk stuck? See its log")
    hint = "it may be starting or stopping; see its log"
    return Unavailable(f"the node runs (process {pid}) and does not answer on {config.listen} ({error})", hint=hint)
