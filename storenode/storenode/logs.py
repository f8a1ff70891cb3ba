"""One line for each event: JSON for machines, plain text for eyes.

Law: redaction by construction. A line carries only the fields named here, each brought into a fixed short form by its own function, so
a secret, a certificate or a file name has no way in. What other libraries write is kept, shortened, and stripped of every run of
characters that could be a key, an id or a code. Times are UTC.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from aiohttp.http_exceptions import HttpProcessingError

from storenode.config import LogFormat, LogLevel

message_chars_max: Final = 500
frames_max: Final = 12

_blob = re.compile(r"[A-Za-z0-9+_=-]{20,}")  # keys, ids, tags, codes and PEM lines; our words and folders' names are shorter
_control = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_word = re.compile(r"[^A-Za-z0-9_.:/{}\[\] -]")


def scrub(text: str) -> str:
    """Take out of free text all that could be a key, an id or a code, and all that a terminal would obey."""
    return _blob.sub("…", _control.sub("?", text))[:message_chars_max]


def _text(value: object) -> str:
    return scrub(_word.sub("?", str(value)))[:100]


def _prefix(value: object) -> str:
    """Enough of a key to tell two apart in one node's log, too little to be the key."""
    text = value.hex() if isinstance(value, bytes) else str(value)
    return re.sub(r"[^0-9a-f]", "", text)[:8]


def _number(value: object) -> int | float | str:
    return value if isinstance(value, int | float) else "?"


fields: Final[dict[str, Callable[[object], int | float | str]]] = {
    "method": _text,
    "route": _text,
    "status": _number,
    "ms": _number,
    "bytes": _number,
    "peer": _prefix,
    "node": _prefix,
    "file": _prefix,
    "shard": _number,
    "shards": _number,
    "index": _number,
    "size": _number,
    "count": _number,
    "listen": _text,
    "url": _text,
    "version": _text,
    "reason": _text,
    "why": _text,
    "entry": _prefix,
    "reader": _prefix,
    "keys": _number,
    "entries": _number,
    "expires": _text,
}


class _Formatter(logging.Formatter):
    """Collect what a record may say; how it is written is the subclass's business."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": scrub(record.getMessage()),
        }
        extra = record.__dict__
        event |= {name: form(extra[name]) for name, form in fields.items() if name in extra}
        if record.exc_info and record.exc_info[1] is not None:
            event["error"] = _error(record.exc_info[1])
        return self.write(event)

    def write(self, event: dict[str, Any]) -> str:
        raise NotImplementedError


class JsonFormatter(_Formatter):
    """One JSON object a line."""

    def write(self, event: dict[str, Any]) -> str:
        """Write one event."""
        return json.dumps(event, ensure_ascii=True, separators=(",", ":"))


class TextFormatter(_Formatter):
    """Time, level, event, then the rest as key=value."""

    def write(self, event: dict[str, Any]) -> str:
        """Write one event."""
        moment = event.pop("time")[11:23]
        head = f"{moment} {event.pop('level'):7} {event.pop('event')}"
        error = event.pop("error", None)
        event.pop("logger")
        rest = "".join(f"  {name}={value}" for name, value in event.items())
        return head + rest + (f"\n    {error['kind']}: {error['message']}\n    {' < '.join(error['at'])}" if error else "")


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a record of aiohttp's server tells of us. Bytes that are no HTTP are the caller's mistake: for debugging, without a trace."""
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, HttpProcessingError):
        return True
    record.levelno, record.levelname, record.exc_info = logging.DEBUG, "DEBUG", None
    return logging.getLogger().isEnabledFor(logging.DEBUG)


def configure(level: LogLevel, form: LogFormat = "auto", stream: TextIO | None = None) -> None:
    """Send every logger of this process to ``stream`` (standard error) in our form."""
    stream = stream or sys.stderr
    as_text = form == "text" or (form == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.getLogger("aiohttp.server").addFilter(_is_ours)
    logging.getLogger("asyncio").setLevel(max(logging.INFO, root.level))  # its debug lines tell of every selector


def _error(error: BaseException) -> dict[str, Any]:
    """Say what failed and where, innermost first: code places, never values."""
    frames = traceback.extract_tb(error.__traceback__)[-frames_max:]
    places = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in reversed(frames)]
    return {"kind": type(error).__name__, "message": scrub(str(error)), "at": places}
