"""Listening for associations: who may have one, what is agreed upon in it, and which service gets each message.

Law: one thread for each association, and a bound on their number. A peer that breaks the rules ends its own association and no other.
Log lines name AE titles and numbers, never a patient.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from medshard.gateway import sendonly
from medshard.gateway.archive import Archive
from medshard.gateway.dimse import commands, commitment, finding, identifiers, pdus, retrieving, storing
from medshard.gateway.dimse.association import Association, Released
from medshard.gateway.dimse.commands import Command
from medshard.gateway.dimse.commitment import COMMITMENT
from medshard.gateway.dimse.owed import Owed, Reports
from medshard.gateway.dimse.pdus import Associate, Context, Role
from medshard.gateway.dimse.peers import Peer, Peers
from medshard.gateway.intake import Intake
from medshard.gateway.model import Committed, Outcome
from medshard_protocol.errors import Full, Malformed, MedshardError, Unavailable

ECHO: Final = "1.2.840.10008.1.1"
handshake_s: Final = 10.0  # for TLS and the association request
listen_s: Final = 0.5  # how soon a commitment is told on the association that asked for it
standard_syntaxes: Final = "1.2.840.10008.1.2"
_reads: Final = frozenset(
    (service, abstract)
    for service, classes in ((commands.C_FIND, finding.FIND), (commands.C_MOVE, retrieving.MOVE), (commands.C_GET, retrieving.GET))
    for abstract in classes
)
_reading: Final = finding.FIND | retrieving.MOVE | retrieving.GET
log = logging.getLogger("medshard.gateway")


@dataclass(frozen=True, slots=True)
class Listening:
    """How the DICOM node is set up."""

    host: str = "127.0.0.1"
    port: int = 11112
    title: str = "MEDSHARD"
    any_called: bool = False  # answer to other called titles too
    calling: frozenset[str] | None = None  # who may call; None: anybody
    peers: tuple[Peer, ...] = ()
    private_classes: frozenset[str] = frozenset()
    associations_max: int = 64
    timeout_s: float = 60.0
    tls_in: ssl.SSLContext | None = field(default=None, compare=False)
    tls_out: ssl.SSLContext | None = field(default=None, compare=False)


class DimseServer:
    """``start`` it, and ``stop`` it."""

    def __init__(self, archive: Intake, settings: Listening) -> None:
        self.counts: Counter[str] = Counter()
        self.peers = Peers(settings.peers, settings.title, settings.tls_out, settings.timeout_s)
        self.reports = Reports(archive, self.peers, settings.title, archive.folder / "commitments")
        self._archive = archive
        self._settings = settings
        self._running: set[threading.Thread] = set()
        self._open: set[Association] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._listener: socket.socket | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._listener is not None
        return int(self._listener.getsockname()[1])

    @property
    def associations(self) -> int:
        """How many there are now."""
        return len(self._running)

    def start(self) -> None:
        """Listen. Raises OSError."""
        self._listener = socket.create_server((self._settings.host, self._settings.port), backlog=128)
        threading.Thread(target=self._accept, name="dimse-accept", daemon=True).start()
        self.reports.start()

    def stop(self, wait_s: float) -> None:
        """Take no new associations, let running messages end, break off what lasts longer. Blocking."""
        self._stopping = True
        self.reports.stop()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        deadline = time.monotonic() + wait_s
        for thread in list(self._running):
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            left = list(self._open)
        for association in left:
            association.abort()
            association.close()

    # -- associations

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self.stopping():
                    return
                time.sleep(0.1)  # out of descriptors, most likely: some will be closed
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), name="dimse", daemon=True)
            with self._lock:
                self._running.add(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        association: Association | None = None
        try:
            connection.settimeout(handshake_s)
            if self._settings.tls_in is not None:
                connection = self._settings.tls_in.wrap_socket(connection, server_side=True)
            association = Association(connection, self._settings.timeout_s)
            with self._lock:
                self._open.add(association)
            _Talk(association, self._archive, self._settings, self.peers, self).run()
        except (MedshardError, OSError, ssl.SSLError) as error:
            self._failed(association, error)
        except Exception as error:  # a bug of ours must not take the listener with it
            self._failed(association, error)
            log.exception(json.dumps({"event": "bug"}))
        finally:
            with contextlib.suppress(OSError):
                connection.close()
            with self._lock:
                self._running.discard(threading.current_thread())
                if association is not None:
                    self._open.discard(association)

    def _failed(self, association: Association | None, error: Exception) -> None:
        self.counts["associations-broken"] += 1
        calling = association.calling if association else ""
        log.warning(json.dumps({"event": "association-broken", "calling": calling, "why": str(error)[:200]}))
        if association is not None:
            association.abort()

    @property
    def full(self) -> bool:
        """Whether one more association is too many."""
        return len(self._running) > self._settings.associations_max

    def stopping(self) -> bool:
        """Whether the gateway is about to stop."""
        return self._stopping


class _Talk:
    """One association from its request to its end."""

    def __init__(self, association: Association, archive: Intake, settings: Listening, peers: Peers, server: DimseServer) -> None:
        self._association = association
        self._archive = archive
        self._settings = settings
        self._peers = peers
        self._server = server
        self._counts = server.counts
        self._series: dict[tuple[str, str], None] = {}
        self._reports = server.reports
        self._pending: list[tuple[Context, Owed, Future[Committed]]] = []
        self._told: dict[int, tuple[Context, Owed, Future[Committed]]] = {}  # reports that the peer has not yet answered, by their number

    def run(self) -> None:
        request = self._association.asked()
        if why := self._unwelcome(request):
            self._counts["associations-rejected"] += 1
            log.warning(json.dumps({"event": "association-rejected", "calling": request.calling[:16], "source": why[1], "reason": why[2]}))
            self._association.reject(*why)
            return
        self._association.accept(request, [self._answer(each) for each in request.contexts], self._roles(request))
        self._counts["associations"] += 1
        began = time.monotonic()
        try:
            self._converse()
        finally:
            self._archive.settle_soon(self._series)
            self._tell_later()
            about = {"calling": request.calling[:16], "seconds": round(time.monotonic() - began, 3), "series": len(self._series)}
            log.info(json.dumps({"event": "association-ended", **about}))

    def _converse(self) -> None:
        while True:
            if self._server.stopping():
                self._association.abort()
                return
            silent_since = time.monotonic()
            while not self._association.is_readable(listen_s if self._pending else 1.0):
                self._tell_pending()
                if not self._pending and time.monotonic() - silent_since > self._settings.timeout_s:
                    raise Unavailable("the peer has said nothing for too long")
                if self._server.stopping():
                    self._association.abort()
                    return
            try:
                context, command = self._association.receive()
            except Released:
                return
            self._dispatch(context, command)
            self._tell_pending()

    def _unwelcome(self, request: Associate) -> tuple[int, int, int] | None:
        """Result, source and reason of a rejection: PS3.8 table 9-21."""
        settings = self._settings
        if self._server.full or self._server.stopping():
            return 2, 3, 2
        if settings.calling is not None and request.calling not in settings.calling:
            return 1, 1, 3
        if not settings.any_called and request.called != settings.title:
            return 1, 1, 7
        return None

    def _answer(self, proposed: Context) -> Context:
        abstract = proposed.abstract
        if abstract in _reading and not isinstance(self._archive, Archive):  # a status would do; but clients take one for no matches
            self._counts["reads-refused"] += 1
            log.warning(json.dumps({"event": "refused", "calling": self._association.calling, "why": sendonly.reason}))
            return Context(proposed.number, abstract, proposed.syntaxes[:1], pdus.NO_CLASS)
        if storing.is_storage(abstract, self._settings.private_classes):
            able = [each for each in proposed.syntaxes if each == standard_syntaxes or each.startswith(standard_syntaxes + ".")]
        elif abstract in (ECHO, COMMITMENT) or abstract in _reading:
            able = [each for each in identifiers.syntaxes if each in proposed.syntaxes]
            if abstract == COMMITMENT:
                able = [each for each in able if each != identifiers.syntaxes[2]]
        else:
            return Context(proposed.number, abstract, proposed.syntaxes[:1], pdus.NO_CLASS)
        result = pdus.ACCEPTED if able else pdus.NO_SYNTAX
        return Context(proposed.number, abstract, tuple(able[:1]) or proposed.syntaxes[:1], result)

    def _roles(self, request: Associate) -> list[Role]:
        """For C-GET the peer receives; for commitment reports on the same association nothing has to be said."""
        private = self._settings.private_classes
        return [Role(role.sop_class, role.scu, role.scp and storing.is_storage(role.sop_class, private)) for role in request.roles]

    def _dispatch(self, context: Context, command: Command) -> None:
        service, abstract = command[commands.FIELD], context.abstract
        if service == commands.C_STORE:
            self._store(context, command)
        elif service == commands.C_ECHO and abstract == ECHO:
            self._association.send(context.number, commands.response(command, commands.SUCCESS))
        elif (service, abstract) in _reads and isinstance(self._archive, Archive):
            self._read(self._archive, context, command)
        elif service == commands.N_ACTION and abstract == COMMITMENT:
            self._commit(context, command)
        elif service == commands.N_EVENT_REPORT | commands.RESPONSE:
            self._heard(command)
        elif service != commands.C_CANCEL:  # a cancel that comes after the last response means nothing
            raise Malformed(f"command {service:#06x} in a context of {abstract}")

    def _read(self, archive: Archive, context: Context, command: Command) -> None:
        if command[commands.FIELD] == commands.C_FIND:
            self._counts["matches"] += finding.find(self._association, context, command, archive)
        elif command[commands.FIELD] == commands.C_MOVE:
            self._counts["moved"] += retrieving.move(self._association, context, command, archive, self._peers)
        else:
            self._counts["got"] += retrieving.get(self._association, context, command, archive)

    def _store(self, context: Context, command: Command) -> None:
        verdict = storing.store(self._association, context, command, self._archive)
        if verdict.outcome is not Outcome.REFUSED:
            self._series[verdict.study, verdict.series] = None
            return
        about = {"calling": self._association.calling, "status": f"{verdict.status:04X}", "why": verdict.reason}
        log.warning(json.dumps({"event": "refused", **about}))

    def _commit(self, context: Context, command: Command) -> None:
        information = self._association.identifier()
        status, owed = commands.SUCCESS, None
        if command.get(commands.ACTION) != commitment.REQUEST:
            status = commands.NO_SUCH_ACTION
        else:
            try:
                owed = self._reports.owe(self._association.calling, commitment.read_request(information, context.syntaxes[0]))
            except Malformed:
                status = commands.PROCESSING_FAILURE
            except Full as error:
                status = commands.RESOURCE_LIMITATION
                log.warning(json.dumps({"event": "commitment-refused", "calling": self._association.calling, "why": str(error)}))
        answer = commands.response(command, status)
        if commands.ACTION in command:
            answer[commands.ACTION] = command[commands.ACTION]
        if owed is not None:
            self._counts["commitments"] += 1
            self._pending.append((context, owed, self._reports.begin(owed)))
        self._association.send(context.number, answer)

    def _tell_pending(self) -> None:
        """Report on this association what has become certain, one at a time: the next one when the peer has answered."""
        for each in [each for each in self._pending if each[2].done() and not each[2].cancelled()][: 0 if self._told else 1]:
            context, owed, found = each
            about = commitment.report_of(owed.asked, found.result(), self._settings.title, context.syntaxes[0])
            self._told[commitment.send(self._association, context, *about)] = each
            self._pending.remove(each)

    def _heard(self, command: Command) -> None:
        if command.get(commands.DATA_SET, commands.NO_DATA_SET) != commands.NO_DATA_SET:
            self._association.identifier()
        told = self._told.pop(int(command.get(commands.RESPONDING_TO, 0)), None)
        if told is None:
            raise Malformed("an answer to something else than our report")
        commitment.check_answer(self._association.calling, command)
        self._reports.heard(told[1])

    def _tell_later(self) -> None:
        """The association is gone: what it asked for is told on a new one."""
        for _, owed, found in [*self._told.values(), *self._pending]:
            self._reports.later(owed, found)


def loopback(hosts: Collection[str]) -> bool:
    """Whether all of these addresses reach this machine alone."""
    return all(host in ("127.0.0.1", "::1", "localhost") or host.startswith("127.") for host in hosts)
