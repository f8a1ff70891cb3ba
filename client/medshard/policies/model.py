"""What an insurer says of a document: whose policy, which version, in force when, kept until when.

Law: all of it is sealed with the document, as attributes of the header, so whoever has the key finds it again and nobody else learns it.
Days are ISO 8601 (2024-01-31). Values from outside raise ``Malformed`` and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Final

from medshard.model import Row, check_attributes
from medshard_protocol.errors import Malformed

kinds: Final = ("policy", "endorsement", "letter", "claim")
_span = re.compile(r"([1-9][0-9]{0,2})([dmy])")
_fields: Final = {
    "number": "policy-number",
    "holder": "policy-holder",
    "product": "policy-product",
    "valid_from": "policy-from",
    "valid_to": "policy-to",
    "retain_until": "policy-retain",
    "kind": "policy-kind",
    "claim": "claim-number",
}


@dataclass(frozen=True, slots=True)
class Terms:
    """What is said of one document. Empty where nothing is."""

    number: str
    holder: str = ""
    product: str = ""
    valid_from: str = ""
    valid_to: str = ""
    retain_until: str = ""
    kind: str = "policy"
    claim: str = ""

    def checked(self) -> Terms:
        """The terms with days in one form. Raises Malformed."""
        if not self.number.strip():
            raise Malformed("a policy needs a number")
        if self.kind not in kinds:
            raise Malformed(f"{self.kind!a} is no kind of document; expected {', '.join(kinds)}")
        days = {name: str(day(getattr(self, name))) if getattr(self, name) else "" for name in ("valid_from", "valid_to", "retain_until")}
        if days["valid_from"] and days["valid_to"] and days["valid_from"] > days["valid_to"]:
            raise Malformed(f"valid from {days['valid_from']} to {days['valid_to']}: it ends before it begins")
        texts = {name: getattr(self, name).strip() for name in ("number", "holder", "product", "kind", "claim")}
        terms = Terms(**texts, **days)
        check_attributes(terms.attributes)
        return terms

    @property
    def attributes(self) -> dict[str, str]:
        """For the sealed header."""
        return {key: value for name, key in _fields.items() if (value := getattr(self, name))}

    @classmethod
    def of(cls, attributes: Mapping[str, str]) -> Terms:
        """Read them back."""
        found = {name: attributes.get(key, "") for name, key in _fields.items()}
        return cls(**(found | {"kind": found["kind"] or "policy"}))

    def in_force(self, on: date) -> bool:
        """Whether a day lies within its dates. An open end has no limit."""
        return (not self.valid_from or self.valid_from <= str(on)) and (not self.valid_to or str(on) <= self.valid_to)


@dataclass(frozen=True, slots=True)
class Version:
    """One document of a policy, with its place among the others."""

    terms: Terms
    version: int  # from 1 in the order of the ledger, claims and letters not counted (0)
    row: Row


def day(text: str) -> date:
    """Read a day. Raises Malformed."""
    try:
        return date.fromisoformat(text.strip())
    except ValueError:
        raise Malformed(f"{text!a} is not a day; write 2024-01-31") from None


def retained(text: str, valid_to: str, today: date) -> str:
    """The day until which a document is kept, from a day or a span (10y, 18m, 90d) that counts from the end of the policy, or from today.

    Raises Malformed.
    """
    match = _span.fullmatch(text.strip())
    if match is None:
        return str(day(text))
    start, count = max(day(valid_to), today) if valid_to else today, int(match[1])
    if match[2] == "d":
        return str(start + timedelta(days=count))
    months = start.year * 12 + start.month - 1 + count * (12 if match[2] == "y" else 1)
    for last in (start.day, 30, 29, 28):  # ten years after 29 February is 28 February
        try:
            return str(date(months // 12, months % 12 + 1, min(start.day, last)))
        except ValueError:
            continue
    raise Malformed(f"{text!a} from {start} is no day")


def end_of(day_text: str) -> int:
    """The end of a day in UTC, Unix seconds."""
    return int((datetime.combine(day(day_text), datetime.min.time(), UTC) + timedelta(days=1)).timestamp())


def versions(rows: list[Row]) -> list[Version]:
    """The documents of one policy in the order of the ledger, numbered; a copy that was made to be shared is no version."""
    found, seen, number = [], set[bytes](), 0
    for row in sorted(rows, key=lambda row: (row.ledger_index, row.put_time, row.name)):
        if row.sha256 in seen:
            continue
        seen.add(row.sha256)
        terms = Terms.of(row.attributes)
        counted = terms.kind in ("policy", "endorsement")
        number += counted
        found.append(Version(terms, number if counted else 0, row))
    return found
