"""Exit codes, all of them, and which error means which. docs/guides/exit-codes.md is this table for people."""

from __future__ import annotations

import errno
from enum import IntEnum

from medshard_protocol.errors import (
    Absent,
    Conflict,
    Damaged,
    Full,
    Malformed,
    MedshardError,
    Refused,
    TooLarge,
    Unavailable,
)


class Exit(IntEnum):
    """What the command leaves behind in ``$?``."""

    OK = 0
    BUG = 1  # an error nobody foresaw; the traceback was written to a file
    USAGE = 2  # the command line is wrong
    ABSENT = 3  # no such file in the vault, or no vault
    REFUSED = 4  # not allowed, or the wrong passphrase
    UNAVAILABLE = 5  # too few nodes, no quorum, or no answer in time
    DAMAGED = 6  # bytes that are not what they should be: verification failed
    LOCAL = 7  # this machine's disk or files: unreadable, full, in the way
    PARTIAL = 8  # some files were not stored or restored; the rest were
    PIPE = 141  # whoever read our output stopped reading
    INTERRUPTED = 130  # Ctrl-C


_codes: dict[type[MedshardError], Exit] = {
    Malformed: Exit.DAMAGED,
    Refused: Exit.REFUSED,
    Absent: Exit.ABSENT,
    Conflict: Exit.LOCAL,
    Damaged: Exit.DAMAGED,
    TooLarge: Exit.LOCAL,
    Full: Exit.LOCAL,
    Unavailable: Exit.UNAVAILABLE,
}


def exit_of(error: MedshardError | OSError) -> Exit:
    """The exit code of an error."""
    return next((code for kind, code in _codes.items() if isinstance(error, kind)), Exit.LOCAL)


def explain(error: OSError) -> tuple[str, str]:
    """What to tell people of an operating system's error: (message, hint)."""
    place = f"{error.filename}: " if error.filename is not None else ""
    message = f"{place}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return message, "Free some space and run the command again. Nothing was left half-written under its final name."
    if error.errno in (errno.EACCES, errno.EPERM):
        return message, "Check who owns it and its permissions."
    return message, ""
