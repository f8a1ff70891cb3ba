"""Whether a value meets a matching key: PS3.4 section C.2.2.2, the same for C-FIND and QIDO-RS.

Law: text in, yes or no out. A name matches without regard to case, as a whole or by one of its component groups; everything else matches
as it is written. ``bounds`` and ``glob`` say the same to SQLite, so that it can sort out most of a hundred thousand studies by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from medshard.gateway.tags import MODALITIES_IN_STUDY, SOP_CLASSES_IN_STUDY, counted, known

Test = Callable[[str], bool]
_dates: Final = ("DA", "TM", "DT")
_literal: Final = ("DA", "TM", "DT", "UI", "IS", "DS", "US", "UL", "SS", "SL", "AS")  # no wildcards in these


def vr_of(tag: int) -> str:
    """The value representation of an attribute of the archive."""
    if tag in known:
        return known[tag].vr
    return {MODALITIES_IN_STUDY: "CS", SOP_CLASSES_IN_STUDY: "UI"}.get(tag, "IS") if tag in counted else "LO"


def is_universal(value: str) -> bool:
    """Whether a key asks for everything."""
    return not value.strip(" \0*")


def folded(name: str) -> str:
    """A person name as it is compared: ``=GROUP=GROUP=`` in lower case, without the empty components at a group's end."""
    return "=" + "=".join(group.rstrip("^ ").strip() for group in name.split("=")).casefold() + "="


def glob(value: str) -> str:
    """A DICOM wildcard pattern as SQLite's GLOB writes it."""
    return value.replace("[", "[[]")


def name_pattern(value: str) -> str:
    """What a folded name has to GLOB."""
    groups = folded(value)[1:-1]
    return f"*={glob(groups)}=*"


def bounds(vr: str, value: str) -> tuple[str, str] | None:
    """The first and the last value of a range, as ``ordered`` writes them; None for what is no range."""
    if vr not in _dates or "-" not in value:
        return None
    low, _, high = value.strip().partition("-")
    if len(low) == 4 and vr == "DA" and value.count("-") == 2:
        return None  # 2025-01-31: an old way to write one day
    return ordered(vr, low) if low else "", (ordered(vr, high, fill="9") if high else "\uffff")


def ordered(vr: str, value: str, fill: str = "0") -> str:
    """A date or time so that text order is time order."""
    value = value.strip().replace(":", "").replace(".", "", 1) if vr == "TM" else value.strip().replace(".", "").replace("-", "")
    return value.ljust(12 if vr == "TM" else 8, fill) if value else ""


def test_for(tag: int, value: str) -> Test | None:
    """The test that a key stands for; None where it asks for everything."""
    if is_universal(value):
        return None
    vr = vr_of(tag)
    if vr in _dates:
        return _of_time(vr, value)
    if vr == "PN":
        pattern = _regex(folded(value)[1:-1])
        return lambda name: any(pattern.fullmatch(part) for part in _readings(name))
    if vr in _literal:
        wanted = {each.strip(" \0") for each in value.split("\\")}
        return lambda found: not wanted.isdisjoint(found.split("\\"))
    patterns = [_regex(each.strip(" ")) for each in value.split("\\")]
    return lambda found: any(pattern.fullmatch(each) for each in found.split("\\") for pattern in patterns)


def _readings(name: str) -> list[str]:
    whole = folded(name)[1:-1]
    return [whole, *whole.split("=")]


def _of_time(vr: str, value: str) -> Test:
    if limits := bounds(vr, value):
        low, high = limits
        return lambda found: bool(found) and low <= ordered(vr, found) <= high
    exact = ordered(vr, value)
    return lambda found: ordered(vr, found) == exact


def _regex(value: str) -> re.Pattern[str]:
    return re.compile("".join({"*": ".*", "?": "."}.get(letter) or re.escape(letter) for letter in value), re.DOTALL)
