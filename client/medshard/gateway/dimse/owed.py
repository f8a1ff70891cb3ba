"""Commitment reports that are owed: on the disk before their request is answered, and until the peer has answered the report.

Law: a request that was answered with success is reported about, whatever becomes of the association and of this process, for as long as
``owed_for_s``; twice where the gateway dies between the peer's answer and the forgetting. On the disk lies nothing in clear. The bytes are
in docs/formats/spool.md.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medshard.durable import fsync_folder, write_durably
from medshard.gateway.dimse import commitment
from medshard.gateway.dimse.commitment import Asked
from medshard.gateway.dimse.peers import Peers
from medshard.gateway.intake import Intake
from medshard.gateway.model import Committed
from medshard_protocol import canonical
from medshard_protocol.errors import Full, Malformed, MedshardError

magic: Final = b"medshard/commitment/v1\n"
nonce_size: Final = 12
file_bytes_max: Final = 8 * 1024 * 1024  # 20,000 references of two UIDs each
owed_max: Final = 1_000  # requests that are not yet reported about; a peer that never takes its reports must not fill the disk
owed_for_s: Final = 72 * 3600.0  # a workstation that is off over a weekend is told on Monday
pauses_s: Final = (2.0, 10.0, 60.0, 300.0, 1800.0, 3600.0)  # between tries on new associations; the last one again and again
tries_at_once: Final = 8
log = logging.getLogger("medshard.gateway")


@dataclass(frozen=True, slots=True)
class Owed:
    """One request that has not been reported about: what was asked by which AE title, and when (Unix milliseconds)."""

    path: Path
    peer: str
    asked: Asked
    since: int


class Kept:
    """The folder of requests that are not yet reported about."""

    def __init__(self, folder: Path, key: bytes) -> None:
        self._folder = folder
        self._cipher = AESGCM(key)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def add(self, peer: str, asked: Asked) -> Owed:
        """Durable on return. Raises Full."""
        since = time.time_ns() // 1_000_000
        plain = canonical.encode([peer, asked.transaction, since, [[uid, of] for uid, of in asked.references.items()]])
        nonce = os.urandom(nonce_size)
        path = self._folder / f"{nonce.hex()}.owed"
        try:
            if sum(1 for _ in self._folder.glob("*.owed")) >= owed_max:
                raise Full(f"{owed_max:,} commitment requests wait to be reported about", hint="are the peers of the table reachable?")
            write_durably(path, magic + nonce + self._cipher.encrypt(nonce, plain, magic), mode=0o600)
        except OSError as error:
            raise Full(f"{path}: {error.strerror}", hint="free some space; the peer will ask again") from None
        return Owed(path, peer, asked, since)

    def all(self) -> list[Owed]:
        """Those of earlier processes, oldest first. What does not open is told in the log and left where it is."""
        found = []
        for path in self._folder.glob("*.owed"):
            try:
                found.append(self._read(path))
            except (Malformed, OSError) as error:
                log.warning(json.dumps({"event": "commitment-unreadable", "file": path.name, "why": str(error)}))
        return sorted(found, key=lambda each: each.since)

    def remove(self, owed: Owed) -> None:
        """It is owed no more."""
        owed.path.unlink(missing_ok=True)
        fsync_folder(self._folder)

    def _read(self, path: Path) -> Owed:
        with open(path, "rb") as file:
            data = file.read(file_bytes_max)
        nonce = data[len(magic) : len(magic) + nonce_size]
        if not data.startswith(magic):
            raise Malformed("no commitment request")
        try:
            plain = self._cipher.decrypt(nonce, data[len(magic) + nonce_size :], magic)
        except (InvalidTag, ValueError):
            raise Malformed("it was altered, or is of another vault") from None
        f = canonical.Fields(
            canonical.decode(plain, bytes_max=file_bytes_max, what="commitment request"), count=4, what="commitment request"
        )
        peer, transaction, since = f.text(most=16), f.text(most=64), f.uint()
        pairs = [canonical.Fields(pair, count=2, what="reference") for pair in f.list(most=commitment.references_max)]
        return Owed(path, peer, Asked(transaction, {pair.text(most=64): pair.text(most=64) for pair in pairs}), since)


@dataclass(order=True, slots=True)
class _Try:
    at: float  # monotonic
    number: int  # how many were made before
    owed: Owed
    found: Committed


class Reports:
    """Who is told what, and again until it is heard. ``start`` it, and ``stop`` it."""

    def __init__(self, intake: Intake, peers: Peers, title: str, folder: Path) -> None:
        self._intake = intake
        self._peers = peers
        self._title = title
        self._kept = Kept(folder, intake.owed_key)
        self._wake = threading.Condition()
        self._tries: list[_Try] = []
        self._slots = threading.Semaphore(tries_at_once)
        self._stopping = False

    def start(self) -> None:
        """Go on with what earlier processes owed."""
        for owed in self._kept.all():
            self.later(owed, self.begin(owed))
        threading.Thread(target=self._run, name="dimse-commitment", daemon=True).start()

    def stop(self) -> None:
        """Begin no more tries. What is owed stays on the disk."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()

    def owe(self, peer: str, asked: Asked) -> Owed:
        """A peer asks; once this returns it may be told that it will hear. Raises Full."""
        return self._kept.add(peer, asked)

    def begin(self, owed: Owed) -> Future[Committed]:
        """Store what is waited for."""
        return self._intake.commit_soon(owed.asked.references)

    def heard(self, owed: Owed) -> None:
        """The peer has answered the report."""
        self._kept.remove(owed)

    def later(self, owed: Owed, found: Future[Committed]) -> None:
        """The association that asked is gone: tell it on a new one, as soon as it is known what to tell."""

        def known(done: Future[Committed]) -> None:
            if not done.cancelled() and done.exception() is None:  # else the gateway ends, and the next one asks again
                self._put(_Try(time.monotonic(), 0, owed, done.result()))

        found.add_done_callback(known)

    # -- inside

    def _put(self, each: _Try) -> None:
        with self._wake:
            heapq.heappush(self._tries, each)
            self._wake.notify_all()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._stopping and (not self._tries or self._tries[0].at > time.monotonic()):
                    self._wake.wait(self._tries[0].at - time.monotonic() if self._tries else None)
                if self._stopping:
                    return
                each = heapq.heappop(self._tries)
            self._slots.acquire()
            threading.Thread(target=self._try, args=(each,), name="dimse-report", daemon=True).start()

    def _try(self, each: _Try) -> None:
        try:
            commitment.tell_anew(self._peers, each.owed.peer, each.owed.asked, each.found, self._title)
            self.heard(each.owed)
        except MedshardError as error:
            old = time.time() - each.owed.since / 1000 > owed_for_s
            event = "commitment-given-up" if old else "commitment-not-told"
            log.warning(json.dumps({"event": event, "peer": each.owed.peer, "tries": each.number + 1, "why": str(error)}))
            if old:
                self.heard(each.owed)
            else:
                pause = pauses_s[min(each.number, len(pauses_s) - 1)]
                self._put(_Try(time.monotonic() + pause, each.number + 1, each.owed, each.found))
        finally:
            self._slots.release()
