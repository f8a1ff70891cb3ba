"""What happened to files, for other programs: CSV for spreadsheets, FHIR R4 AuditEvent for a hospital's audit repository.

Values in, text out, in pieces: a log may have millions of entries. A file's names and attributes are not in it: whoever may know them can
look them up by the SHA-256.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from medshard.grants import Happened

columns: Final = (
    "index", "time", "time_is", "what", "author", "author_name", "institution", "purpose", "sha256", "file_ids", "reader", "reader_name",
    "until", "grant_index", "grant", "reason", "entry",
)  # fmt: skip

_events: Final = "http://terminology.hl7.org/CodeSystem/audit-event-type"
_lifecycle: Final = "http://terminology.hl7.org/CodeSystem/iso-21089-lifecycle"
_dicom: Final = "http://dicom.nema.org/resources/ontology/DCM"
_reasons: Final = "http://terminology.hl7.org/CodeSystem/v3-ActReason"
_object: Final = (_events, "object", "Object")
_alert: Final = (_dicom, "110113", "Security Alert")
_rights: Final = (_dicom, "110137", "User security Attributes Changed")
_access: Final = (_lifecycle, "access", "Access/View Record Lifecycle Event")
_hold: Final = (_lifecycle, "hold", "Add Legal Hold Record Lifecycle Event")
_unhold: Final = (_lifecycle, "unhold", "Remove Legal Hold Record Lifecycle Event")

# what happened: type, subtype, action, outcome
_kinds: Final = {
    "registered": (_object, (_lifecycle, "originate", "Originate/Retain Record Lifecycle Event"), "C", "0"),
    "granted": (_alert, _rights, "U", "0"),
    "revoked": (_alert, _rights, "U", "0"),
    "read": (_object, _access, "R", "0"),
    "read in an emergency": (_object, _access, "R", "0"),
    "tried to read without a right": (_object, _access, "R", "8"),
    "void grant": (_alert, _rights, "U", "8"),
    "void revocation": (_alert, _rights, "U", "8"),
    "held": (_object, _hold, "U", "0"),
    "retained": (_object, _hold, "U", "0"),
    "released": (_object, _unhold, "U", "0"),
    "hold proposed": (_alert, _rights, "U", "0"),
    "release proposed": (_alert, _rights, "U", "0"),
    "proposed hold refused": (_alert, _rights, "U", "0"),
    "proposed release refused": (_alert, _rights, "U", "0"),
    "erased": (_object, (_lifecycle, "destroy", "Destroy/Delete Record Lifecycle Event"), "D", "0"),
    "retired": (_object, (_lifecycle, "deprecate", "Deprecate Record Lifecycle Event"), "U", "0"),
    "shard moved": (_object, (_lifecycle, "archive", "Archive Record Lifecycle Event"), "U", "0"),
}
_purposes: Final = {
    "treatment": ("TREAT", "treatment"),
    "insurance": ("HPAYMT", "healthcare payment"),
    "operations": ("HOPERAT", "healthcare operations"),
    "research": ("HRESCH", "healthcare research"),
    "patient-request": ("PATRQT", "patient requested"),
    "legal": ("HLEGAL", "legal"),
    "emergency": ("BTG", "break the glass"),
}


def as_csv(happened: Iterable[Happened]) -> Iterator[str]:
    """One line for each entry, with a line of column names first."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(columns)
    for each in happened:
        yield _taken(out)
        time_is = ("exact" if each.exact else "before") if each.time else ""
        values = (
            each.index, _instant(each.time), time_is, each.what, each.author.hex(), each.author_name, each.institution, each.purpose,
            each.sha256.hex(), " ".join(file_id.hex() for file_id in each.file_ids), each.reader.hex(), each.reader_name,
            _instant(each.until), each.grant_index if each.grant_index >= 0 else "", each.grant.hex(), _reason(each), each.entry.hex(),
        )  # fmt: skip
        writer.writerow([_harmless(value) for value in values])
    yield _taken(out)


def _taken(out: io.StringIO) -> str:
    text = out.getvalue()
    out.seek(0)
    out.truncate()
    return text


def as_fhir(happened: Iterable[Happened], origin: str, now: int) -> Iterator[str]:
    """A Bundle (FHIR R4, type collection) with an AuditEvent for each entry, one a line. ``origin`` names the log, ``now`` is in Unix
    seconds."""
    yield f'{{"resourceType": "Bundle", "type": "collection", "timestamp": "{_instant(now)}"'
    empty = True
    for each in happened:
        entry = {"fullUrl": f"urn:uuid:{UUID(bytes=each.entry[:16])}", "resource": _event(each, origin, now)}
        yield (', "entry": [\n' if empty else ",\n") + json.dumps(entry, ensure_ascii=False)
        empty = False
    yield "}\n" if empty else "\n]}\n"  # FHIR knows no empty arrays


def _event(each: Happened, origin: str, now: int) -> dict[str, Any]:
    kind, subtype, action, outcome = _kinds.get(each.what, (_object, _access, "E", "0"))
    purpose = _purposes.get(each.purpose)
    codes = [{"coding": [_coding(_reasons, *purpose)]}] if purpose else []
    event: dict[str, Any] = {
        "resourceType": "AuditEvent",
        "id": each.entry.hex(),
        "type": _coding(*kind),
        "subtype": [_coding(*subtype)],
        "action": action,
        "recorded": _instant(each.time or now),
        "outcome": outcome,
        "outcomeDesc": each.what + ("" if each.exact else ", at the recorded time or before"),
        "agent": [_agent(origin, each.author, each.author_name, each.institution, codes, requestor=True)],
        "source": {
            "site": origin,
            "observer": {"identifier": {"system": f"https://{origin}", "value": origin}, "display": "medshard ledger"},
        },
        "entity": [_entity(each, origin, file_id) for file_id in each.file_ids],
    }
    if codes:
        event["purposeOfEvent"] = codes
    if each.reader:
        event["agent"].append(_agent(origin, each.reader, each.reader_name, "", [], requestor=False))
    return event


def _agent(origin: str, key: bytes, name: str, institution: str, purposes: list[Any], *, requestor: bool) -> dict[str, Any]:
    shown = " ".join(part for part in (name or key.hex()[:16], f"({institution})" if institution else "") if part)
    who = {"identifier": {"system": f"https://{origin}#key", "value": key.hex()}, "display": shown}
    return {"who": who, "requestor": requestor} | ({"purposeOfUse": purposes} if purposes else {})


def _entity(each: Happened, origin: str, file_id: bytes) -> dict[str, Any]:
    details = {
        "ledger entry": str(each.index),
        "sha256": each.sha256.hex(),
        "grant": each.grant.hex(),
        "grant entry": str(each.grant_index) if each.grant_index >= 0 else "",
        "until": _instant(each.until),
        "reason": _reason(each),
    }
    return {
        "what": {"identifier": {"system": f"https://{origin}#file", "value": file_id.hex()}},
        "type": _coding("http://terminology.hl7.org/CodeSystem/audit-entity-type", "2", "System Object"),
        "role": _coding("http://terminology.hl7.org/CodeSystem/object-role", "4", "Domain Resource"),
        "detail": [{"type": name, "valueString": value} for name, value in details.items() if value],
    }


def _coding(system: str, code: str, display: str) -> dict[str, str]:
    return {"system": system, "code": code, "display": display}


def _instant(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if seconds else ""
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s after 1970"


def _reason(each: Happened) -> str:
    return each.reason or ("(sealed to the auditors)" if each.sealed_reason else "")


def _harmless(value: object) -> object:
    """A spreadsheet takes text that begins so for a formula: somebody else wrote names and reasons."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
