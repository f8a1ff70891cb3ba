"""Why somebody may read, and why not: one closed list of reasons that nodes count, say and hand on.

Law: a refusal names its reason by a fixed phrase, so that a program can tell an expired ticket from a revoked grant and a person can
read it. What the log alone decides is in ``facts``; what needs a mirror or a clock is decided by the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from medshard_protocol.errors import Refused
from medshard_protocol.ids import Sha256


class Reason(StrEnum):
    """Why a read is refused. The value labels a node's counters."""

    NO_ENTRY = "no-entry"
    NOT_IN_MIRROR = "not-in-mirror"
    NOT_PUBLISHED = "not-published"
    NOT_AN_ACCESS = "not-an-access"
    VOID = "void"
    OTHER_READER = "other-reader"
    OTHER_FILE = "other-file"
    EXPIRED = "expired"
    UNREGISTERED = "unregistered"
    NEVER_GRANTED = "never-granted"
    REVOKED = "revoked"
    ENDED = "ended"
    ERASED = "erased"
    WITHDRAWN = "withdrawn"
    SENDS = "sends"
    FORGED = "forged"
    OLD_ROSTER = "old-roster"
    WITHIN_REACH = "within-reach"
    NO_EMERGENCY = "no-emergency"


phrases: dict[Reason, str] = {
    Reason.NO_ENTRY: "a read shows an ACCESS entry of the ledger, and this one shows none",
    Reason.NOT_IN_MIRROR: "the access entry is not in this node's mirror",
    Reason.NOT_PUBLISHED: "the access entry is under no published checkpoint that this node knows",
    Reason.NOT_AN_ACCESS: "the entry shown is no ACCESS entry",
    Reason.VOID: "the entry shown has no effect in the ledger",
    Reason.OTHER_READER: "the access entry is another reader's",
    Reason.OTHER_FILE: "the access entry names other files",
    Reason.EXPIRED: "the access entry is too old",
    Reason.UNREGISTERED: "the file was not registered before the access entry",
    Reason.NEVER_GRANTED: "nobody has granted this file to the reader",
    Reason.REVOKED: "the grant was revoked before the access entry",
    Reason.ENDED: "the grant has ended",
    Reason.ERASED: "the file is erased",
    Reason.WITHDRAWN: "no institution of the roster vouches for the reader's key",
    Reason.SENDS: "the reader's key only sends, and reads nothing back",
    Reason.FORGED: "the proof does not hold",
    Reason.OLD_ROSTER: "the checkpoint has no quorum of the present roster",
    Reason.WITHIN_REACH: "the ledger is within reach: read the ordinary way",
    Reason.NO_EMERGENCY: "this identity or this entry does not open a file in an emergency",
}

hints: dict[Reason, str] = {
    Reason.NO_ENTRY: "use a client that announces its reads",
    Reason.NOT_IN_MIRROR: "show the node the proof, or ask another node",
    Reason.NOT_PUBLISHED: "show the node the proof, or ask another node",
    Reason.EXPIRED: "announce the read anew",
    Reason.NEVER_GRANTED: "ask the owner: medshard share",
    Reason.REVOKED: "ask the owner: medshard share",
    Reason.ENDED: "ask the owner: medshard share",
    Reason.WITHDRAWN: "ask your institution for an invitation, and run `medshard keys rotate`",
    Reason.SENDS: "read it from the vault that it sends for",
}

not_yet = frozenset({Reason.NOT_IN_MIRROR, Reason.NOT_PUBLISHED})  # time, or a proof, may change these


@dataclass(frozen=True, slots=True)
class Right:
    """Why somebody may read a file."""

    index: int  # of the REGISTER entry for an owner, of the GRANT entry for a reader
    grant: Sha256 | None  # id of the GRANT entry; None for the owner
    until: int  # by the cosigners' clocks, in seconds since 1970; 0 for no end


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why somebody may not."""

    reason: Reason
    detail: str = ""

    def error(self) -> Refused:
        """The error to answer with."""
        text = phrases[self.reason] + (f" ({self.detail})" if self.detail else "")
        return Refused(text, hint=hints.get(self.reason, ""))


def reason_in(text: str) -> Reason | None:
    """Find the reason in the message of a refusal; None if it is of another kind."""
    return next((reason for reason, phrase in phrases.items() if phrase in text), None)
