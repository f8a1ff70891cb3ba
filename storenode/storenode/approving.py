"""Signing for a new roster, or for the end of a log, as an institution.

    FOLDER/signed/roster-NUMBER-PREVIOUS   the SHA-256 of the one document that this institution approved as the successor of PREVIOUS
    FOLDER/signed/successor-of-SHA256      the genesis file of the log that it signed goes on from the one with that genesis file
    FOLDER/signed/end-of-SHA256            the successor that it named when it signed for the end of the log with that genesis file

Law: an institution signs one successor of a roster and no other, for that is what keeps the chain of rosters from forking. The note of it
lies beside the CA key, is durable before a signature exists, and nothing overwrites it. Signing the same again gives the same
bytes, so handing it in twice is handing it in once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol.entries import Approve, Entry, Freeze, Hold, Release, Withdraw, nonce_size, sign_entry
from medshard_protocol.errors import Refused
from medshard_protocol.identity import public_key
from medshard_protocol.ids import FileId, Key, Sha256
from medshard_protocol.roster import Institution, Roster
from medshard_protocol.rosters import check_successor, institution_signing
from medshard_protocol.succession import Successor
from storenode import durable
from storenode.identity import load_key

signed_name: Final = "signed"


class Seal:
    """An institution's CA key, and what it has signed for."""

    def __init__(self, path: Path) -> None:
        self._key: Ed25519PrivateKey = load_key(path)
        self._notes = path.parent / signed_name
        self.public = Key(public_key(self._key))

    def institution(self, roster: Roster) -> Institution:
        """Whose key this is. Raises Refused."""
        return institution_signing(roster, self.public)

    def approve(self, old: Roster, new: Roster) -> Entry:
        """Sign for a successor. Raises Refused for one that cannot follow, or if another was signed before."""
        check_successor(old, new)
        self.institution(old)
        self._note(f"roster-{new.number}-{old.sha256.hex()}", new.sha256, f"roster {new.number}")
        return self._sign(old.origin, Approve(new.sha256, _nonce(b"approve", new.sha256)))

    def freeze(self, roster: Roster, genesis: Roster, successor: Sha256) -> Entry:
        """Sign for the end of a log. Raises Refused, also if it was signed with another successor before."""
        self.institution(roster)
        self._note(f"end-of-{genesis.sha256.hex()}", successor, "the log's successor")
        nonce = _nonce(b"freeze", roster.sha256 + successor)  # voices are counted under one roster: each may be asked again
        return self._sign(roster.origin, Freeze(successor, nonce))

    def succeed(self, document: Successor) -> Successor:
        """Sign that a log that has ended goes on in that one. Raises Refused, also if another successor was signed before."""
        change = document.look()
        self.institution(change.last)
        self._note(f"successor-of-{change.rosters[0].sha256.hex()}", change.genesis.sha256, "the log that goes on")
        return document.signed(self.public, self._key.sign)

    def withdraw(self, roster: Roster, key: Key) -> Entry:
        """Take back the institution's word for a key. Raises Refused."""
        self.institution(roster)
        return self._sign(roster.origin, Withdraw(key, os.urandom(nonce_size)))

    def hold(self, roster: Roster, file_id: FileId) -> Entry:
        """Keep a file of a vault that this institution vouches for. Raises Refused."""
        self.institution(roster)
        return self._sign(roster.origin, Hold(file_id, os.urandom(nonce_size)))

    def release(self, roster: Roster, hold: Sha256) -> Entry:
        """End a hold of such a file, whoever of the two made it. Raises Refused."""
        self.institution(roster)
        return self._sign(roster.origin, Release(hold, os.urandom(nonce_size)))

    def signed(self, old: Roster) -> Sha256 | None:
        """Which successor of a roster this institution has signed for, if any."""
        path = self._notes / f"roster-{old.number + 1}-{old.sha256.hex()}"
        return Sha256(bytes.fromhex(path.read_text().strip())) if path.exists() else None

    def _note(self, name: str, document: Sha256, what: str) -> None:
        path, text = self._notes / name, document.hex() + "\n"
        if not self._notes.exists():
            self._notes.mkdir(mode=0o700)
            durable.sync_folder(self._notes.parent)
        part = path.with_name(f".{name}.{os.getpid()}")
        durable.replace(part, text.encode())
        try:
            os.link(part, path)  # whole or not there, and never over another
            durable.sync_folder(self._notes)
        except FileExistsError:
            before = path.read_text().strip()
            if before != text.strip():
                raise Refused(
                    f"this institution has signed for another document as {what}: {before}",
                    hint="two signatures could fork the chain, so it signs no other; the others can decide without it",
                ) from None
        finally:
            part.unlink()

    def _sign(self, origin: str, body: Approve | Freeze | Withdraw | Hold | Release) -> Entry:
        return sign_entry(origin, body, self.public, self._key.sign)


def check_no_split(proposals: Sequence[Mapping[str, Any]], document: Sha256, own: str, needed: int) -> None:
    """Raise Refused if others have signed for another successor that is at least as far as this one: votes that split so that none
    can reach the quorum are never taken back. ``proposals`` is what a node tells of open ones; ``own`` is the institution that asks."""
    voices = {each["sha256"]: [name for name in each["approved"] if name != own] for each in proposals}
    ours = len(voices.pop(document.hex(), ()))
    ahead = {sha256: names for sha256, names in voices.items() if names and len(names) >= ours}
    if not ahead:
        return
    told = "; ".join(f"{sha256[:8]}… by {', '.join(names)}" for sha256, names in ahead.items())
    raise Refused(
        f"others have signed for another next roster ({needed} are needed): {told}",
        hint="read it (storenode roster show) and sign that one, or talk first: split votes are never taken back. --force signs this",
    )


def _nonce(what: bytes, of: bytes) -> bytes:
    return sha256(b"medshard/" + what + b"/v1" + of).digest()[:nonce_size]
