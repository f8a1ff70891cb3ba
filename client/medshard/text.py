"""Text from outside, made fit to keep, to compare and to show. Files name patients and places; none may steer a terminal."""

from __future__ import annotations

import time
import unicodedata

from medshard.model import attribute_value_max


def clean(text: str) -> str:
    """Make one line of printable Unicode of ``text``, at most ``attribute_value_max`` characters."""
    text = text[: 4 * attribute_value_max]
    if not (text.isascii() and text.isprintable()):
        text = "".join(c if c.isprintable() else " " if not _invisible(c) else "" for c in text.encode("utf-8", "replace").decode())
    return " ".join(text.split())[:attribute_value_max].rstrip()


def fold(text: str) -> str:
    """Reduce ``text`` to what search compares: no case, no accents, and ^ and = of person names as blanks."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return " ".join(text.casefold().translate(_blanks).split())


def shown(name: bytes) -> str:
    """Show a file name to people: what is not printable text appears as \\xNN."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else "".join(f"\\x{b:02x}" for b in c.encode()) for c in text)


def quoted(text: str) -> str:
    """Show what somebody has typed: in their own letters, and nothing that a terminal could obey."""
    return f"'{shown(text.encode('utf-8', 'surrogateescape'))}'"


def last_day(end: int) -> str:
    """For people, the last day of what lasts until ``end`` (Unix seconds), where a day ends then in UTC or here; else the minute."""
    if end % 86_400 == 0:
        return time.strftime("%Y-%m-%d", time.gmtime(end - 1))
    local = time.localtime(end)
    at_midnight = (local.tm_hour, local.tm_min, local.tm_sec) == (0, 0, 0)
    return time.strftime("%Y-%m-%d", time.localtime(end - 1)) if at_midnight else time.strftime("%Y-%m-%d %H:%M", local)


def _invisible(c: str) -> bool:
    return unicodedata.category(c) in ("Cf", "Cn", "Co")


_blanks = str.maketrans({"^": " ", "=": " ", ",": " ", "ø": "o", "ł": "l", "đ": "d", "æ": "ae", "œ": "oe", "ı": "i"})
