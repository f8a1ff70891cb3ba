"""C-STORE as its provider (PS3.4 annex B): from the wire into the spool, piece by piece, and an answer when it is durable.

Law: the data set is kept as it came, behind the head of part10.py. Success means fsynced in the spool. Nothing here knows the store.
"""

from __future__ import annotations

from typing import Final

from pydicom._uid_dict import UID_dictionary

from medshard.gateway import model
from medshard.gateway.dimse import commands
from medshard.gateway.dimse.association import Association
from medshard.gateway.dimse.commands import Command
from medshard.gateway.dimse.pdus import Context
from medshard.gateway.intake import Intake
from medshard.gateway.model import Outcome, Verdict
from medshard.gateway.part10 import head_of, is_uid
from medshard.gateway.spool import Arrival
from medshard_protocol.errors import Full

_other: Final = ("Directory", "Commitment", "Verification")
standard_classes: Final = frozenset(
    uid
    for uid, (name, kind, *_) in UID_dictionary.items()
    if kind == "SOP Class" and "Storage" in name and not any(word in name for word in _other)
)
_image_root: Final = "1.2.840.10008.5.1.4.1.1."  # where DICOM puts its storage classes: those too that are newer than our table
_standard_root: Final = "1.2.840.10008."


def is_storage(sop_class: str, private: frozenset[str]) -> bool:
    """Whether the gateway stores this class: every one of the standard, and the ``private`` ones that were named, or ``*`` for all."""
    if sop_class in standard_classes or sop_class in private:
        return True
    if sop_class.startswith(_image_root):
        return sop_class not in UID_dictionary
    return "*" in private and is_uid(sop_class) and not sop_class.startswith(_standard_root)


def store(association: Association, context: Context, command: Command, intake: Intake) -> Verdict:
    """Take in one instance and answer. Raises what the association raises; nothing of the instance is kept then."""
    sop_class = str(command.get(commands.AFFECTED_CLASS, ""))
    sop_uid = str(command.get(commands.AFFECTED_UID, ""))
    verdict = _refusal(context, sop_class, sop_uid) or _take(association, context, sop_class, sop_uid, intake)
    if isinstance(verdict, Verdict):  # refused before its end: what still comes has to be read, for the association goes on
        for _ in association.data():
            pass
    else:
        verdict = intake.admit(verdict, sop_class, sop_uid)
    comment = verdict.reason if verdict.outcome is Outcome.REFUSED else ""
    association.send(context.number, commands.response(command, verdict.status, comment))
    return verdict


def _refusal(context: Context, sop_class: str, sop_uid: str) -> Verdict | None:
    if sop_class != context.abstract:
        return Verdict(Outcome.REFUSED, commands.NO_SUCH_CLASS, "not the SOP class of this presentation context")
    if not is_uid(sop_uid):
        return Verdict(Outcome.REFUSED, model.NOT_UNDERSTOOD, "its SOP Instance UID is none")
    return None


def _take(association: Association, context: Context, sop_class: str, sop_uid: str, intake: Intake) -> Arrival | Verdict:
    try:
        arrival = intake.take()
    except Full as error:
        return Verdict(Outcome.REFUSED, model.OUT_OF_RESOURCES, str(error))
    try:
        arrival.write(head_of(sop_class, sop_uid, context.syntaxes[0]))
        for piece in association.data():
            arrival.write(piece)
    except Full as error:
        return Verdict(Outcome.REFUSED, model.OUT_OF_RESOURCES, str(error))
    except BaseException:
        arrival.drop()
        raise
    return arrival
