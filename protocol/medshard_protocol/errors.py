"""Every error that leaves a medshard package, in one shallow tree.

    MedshardError
    ├── Malformed     bytes from outside that are not what their format says
    ├── Refused       understood, and not allowed
    ├── Absent        the thing asked for is not here
    ├── Conflict      other bytes already stand under this name
    ├── Damaged       bytes that do not match the digest they should have
    ├── TooLarge      over a named limit
    ├── Full          no room, or over quota
    └── Unavailable   too few nodes, no quorum, no answer in time

A caller's own mistake (a wrong type, a negative count) raises ValueError or TypeError instead. Errors neither log nor exit:
the edges (HTTP middleware, command line) translate them with a table.
"""

from __future__ import annotations


class MedshardError(Exception):
    """Base of the tree. ``hint`` says what the user can do next; empty where nothing sensible can be said."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Malformed(MedshardError):
    """Bytes from outside that are not what their format says."""


class Refused(MedshardError):
    """Understood, and not allowed."""


class Absent(MedshardError):
    """The thing asked for is not here."""


class Conflict(MedshardError):
    """Other bytes already stand under this name."""


class Damaged(MedshardError):
    """Bytes that do not match the digest they should have."""


class TooLarge(MedshardError):
    """Over a named limit."""


class Full(MedshardError):
    """No room, or over quota."""


class Unavailable(MedshardError):
    """Too few nodes, no quorum, or no answer in time."""
