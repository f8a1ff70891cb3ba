"""What a search asks, and whether a file meets it. Case and accents never matter; every condition given must hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from fnmatch import translate

from medshard.model import Row
from medshard.text import fold

_digits = re.compile(r"\d{4}|\d{6}|\d{8}")
_range = re.compile(r"(\d{8})?-(\d{8})?")


class Query:
    """The conditions of one search, prepared once for many files. Raises ValueError for a study date that is none."""

    def __init__(
        self,
        *,
        name: str | None = None,
        media_type: str | None = None,
        patient: str | None = None,
        study_date: str | None = None,
        modality: str | None = None,
        policy_number: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._name = None if name is None else _pattern(name, whole=False)
        self._whole_path = name is not None and "/" in name
        self._media_type = None if media_type is None else media_type.casefold()
        self._patient = None if patient is None else (fold(patient), fold(patient).split())
        self._dates = None if study_date is None else dates(study_date)
        exact = {"modality": modality, "policy-number": policy_number} | {f"tag:{key}": value for key, value in (tags or {}).items()}
        self._exact = [(key, _pattern(value, whole=True)) for key, value in exact.items() if value is not None]

    def meets(self, row: Row) -> bool:
        """Whether ``row`` meets every condition."""
        return (
            all(key in row.attributes and pattern.fullmatch(fold(row.attributes[key])) for key, pattern in self._exact)
            and (self._media_type is None or self._media_type in row.media_type.casefold())
            and (self._dates is None or self._dates[0] <= _day(row) <= self._dates[1])
            and (self._patient is None or self._is_patient(row.attributes))
            and (self._name is None or self._is_named(row.name))
        )

    def _is_patient(self, attributes: Mapping[str, str]) -> bool:
        assert self._patient is not None
        text, words = self._patient
        name = fold(attributes.get("patient-name", ""))
        return bool(words) and (all(word in name for word in words) or fold(attributes.get("patient-id", "")) == text)

    def _is_named(self, name: bytes) -> bool:
        assert self._name is not None
        path = fold(name.decode("utf-8", "surrogateescape"))
        return bool(self._name.fullmatch(path) or (not self._whole_path and self._name.fullmatch(path.rpartition("/")[2])))


def dates(text: str) -> tuple[str, str]:
    """Read a day, month, year or a range of them as (first, last), each YYYYMMDD. Raises ValueError."""
    if ".." in text:
        first, _, last = text.partition("..")
    elif (match := _range.fullmatch(text)) and len(text) > 1:
        first, last = match[1] or "", match[2] or ""
    else:
        first = last = text
        if not text:
            raise ValueError("an empty study date")
    low, high = _digits_of(first).ljust(8, "0"), _digits_of(last).ljust(8, "9")
    if low > high:
        raise ValueError(f"the range {text!r} ends before it starts")
    return low, high


def _digits_of(text: str) -> str:
    if not text.strip():
        return ""
    plain = text.strip().replace("-", "")
    try:
        if not _digits.fullmatch(plain):
            raise ValueError
        date.fromisoformat((plain + "0101")[:8] if len(plain) == 4 else (plain + "01")[:8])
    except ValueError:
        raise ValueError(f"{text!r} is not a date; write 2024-01-31, 2024-01, 2024, or a range such as 2024-01..2024-03") from None
    return plain


def _day(row: Row) -> str:
    day = row.attributes.get("study-date", "")
    return day if len(day) == 8 and day.isdigit() else ""


def _pattern(text: str, *, whole: bool) -> re.Pattern[str]:
    folded = fold(text)
    if any(c in folded for c in "*?["):
        return re.compile(translate(folded))
    return re.compile(re.escape(folded) if whole else f".*{re.escape(folded)}.*", re.DOTALL)
