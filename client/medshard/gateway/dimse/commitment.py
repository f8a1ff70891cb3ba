"""Storage commitment, push model, as its provider: PS3.4 annex J.

Law: an instance is committed to when w nodes of distinct institutions have it on their disks and the ledger has its entry under a quorum,
and not before. The report goes out on the association that asked, if it is still there, else on a new one to the peer of the table; when,
and how often it is tried, is decided in owed.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence as Items

from medshard.gateway.dimse import commands, identifiers
from medshard.gateway.dimse.association import Association
from medshard.gateway.dimse.commands import Command
from medshard.gateway.dimse.pdus import Context, Role
from medshard.gateway.dimse.peers import Peers
from medshard.gateway.elements import implicit_le
from medshard.gateway.model import Committed
from medshard.gateway.part10 import is_uid
from medshard_protocol.errors import Malformed, Refused

COMMITMENT: Final = "1.2.840.10008.1.20.1"
instance_uid: Final = "1.2.840.10008.1.20.1.1"  # the one well-known instance
REQUEST: Final = 1
ALL_SAFE, SOME_FAILED = 1, 2
PROCESSING_FAILURE, NO_SUCH_OBJECT, CLASS_CONFLICT = 0x0110, 0x0112, 0x0119
references_max: Final = 20_000
log = logging.getLogger("medshard.gateway")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a peer wants a word for: SOP class by SOP instance, in order."""

    transaction: str
    references: Mapping[str, str]


def read_request(data: bytes, syntax: str) -> Asked:
    """The information of an N-ACTION. Raises Malformed."""
    try:
        dataset = read_dataset(BytesIO(data), syntax == implicit_le, True)
        transaction = str(dataset.TransactionUID)
        items = list(dataset.ReferencedSOPSequence)
        references = {str(item.ReferencedSOPInstanceUID): str(item.ReferencedSOPClassUID) for item in items}
    except Exception as error:  # pydicom raises whatever it meets
        raise Malformed(f"no commitment request ({type(error).__name__})") from None
    if (
        not is_uid(transaction)
        or any(len(uid) > 64 or len(of) > 64 for uid, of in references.items())
        or not 0 < len(references) <= references_max
    ):
        raise Malformed("a commitment request without a transaction, without references that are UIDs, or with too many of them")
    return Asked(transaction, references)


def report_of(asked: Asked, found: Committed, title: str, syntax: str) -> tuple[int, bytes]:
    """The event and the information of an N-EVENT-REPORT."""
    safe, failed = Items(), Items()
    for uid, sop_class in asked.references.items():
        receipt = found.receipts.get(uid)
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
        if receipt is not None and receipt.sop_class == sop_class:
            safe.append(item)
        else:
            item.FailureReason = PROCESSING_FAILURE if uid in found.waiting else NO_SUCH_OBJECT if receipt is None else CLASS_CONFLICT
            failed.append(item)
    dataset = Dataset()
    dataset.TransactionUID, dataset.RetrieveAETitle = asked.transaction, title
    if safe:
        dataset.ReferencedSOPSequence = safe
    if failed:
        dataset.FailedSOPSequence = failed
    out = DicomBytesIO()
    out.is_little_endian, out.is_implicit_VR = True, syntax == implicit_le
    write_dataset(out, dataset)
    return SOME_FAILED if failed else ALL_SAFE, bytes(out.getvalue())


def send(association: Association, context: Context, event: int, information: bytes) -> int:
    """Send a report; the number of the message, which its answer repeats. Raises what the association raises."""
    number = association.next_number()
    command: Command = {
        commands.AFFECTED_CLASS: COMMITMENT,
        commands.FIELD: commands.N_EVENT_REPORT,
        commands.MESSAGE: number,
        commands.DATA_SET: commands.WITH_DATA_SET,
        commands.AFFECTED_UID: instance_uid,
        commands.EVENT: event,
    }
    association.send(context.number, command, [information])
    return number


def tell_anew(peers: Peers, title: str, asked: Asked, found: Committed, own_title: str) -> None:
    """Bring a report on an association of our own. Returns when the peer has answered it. Raises MedshardError."""
    proposal = Context(1, COMMITMENT, identifiers.syntaxes[:2])
    with peers.associated(title, [proposal], [Role(COMMITMENT, scu=False, scp=True)]) as association:
        for context in association.contexts.values():
            number = send(association, context, *report_of(asked, found, own_title, context.syntaxes[0]))
            _, answer = association.receive()
            if answer.get(commands.DATA_SET, commands.NO_DATA_SET) != commands.NO_DATA_SET:
                association.identifier()
            if answer.get(commands.RESPONDING_TO) != number:
                raise Malformed(f"{title} answers something else than the report")
            check_answer(title, answer)
            return
        raise Refused(f"{title} takes no commitment reports", hint="is it set up for storage commitment, as the side that asks?")


def check_answer(title: str, answer: Command) -> None:
    """Say in the log what a peer thinks of a report that it does not like. It has it, and is not told again."""
    if (status := int(answer.get(commands.STATUS, commands.SUCCESS))) != commands.SUCCESS:
        log.warning(json.dumps({"event": "commitment-disliked", "peer": title, "status": f"{status:04X}"}))
