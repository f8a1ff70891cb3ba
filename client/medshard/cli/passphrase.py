"""Where the passphrase comes from: the environment, a file, the keyring, the terminal. Never the command line, which everybody on the
machine can read.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from medshard.cli import keyring
from medshard_protocol.errors import Refused

file_bytes_max = 4_096
beside = "passphrase"  # written by `medshard up` alone, for vaults that hold nothing of worth
_hint = "Set MEDSHARD_PASSPHRASE or MEDSHARD_PASSPHRASE_FILE, or run the command on a terminal."


def known(home: Path) -> str:
    """The passphrase of the vault at ``home``. Raises Refused where there is nobody to ask."""
    found = _given(home)
    return found if found is not None else _ask(f"Passphrase of the vault {home}: ")


def new(home: Path) -> str:
    """A passphrase for a vault that does not exist yet; on a terminal it is asked for twice."""
    found = _given(home)
    if found is not None:
        return found
    while True:
        first = _ask(f"New passphrase for the vault {home}: ")
        if not first:
            raise Refused("an empty passphrase protects nothing", hint="Choose several words that nobody else would.")
        if first == _ask("Again: "):
            return first
        sys.stderr.write("These differ. Once more.\n")


def changed(home: Path) -> str:
    """Another passphrase for a vault: MEDSHARD_NEW_PASSPHRASE, or on the terminal, twice."""
    if (text := os.environ.get("MEDSHARD_NEW_PASSPHRASE")) is not None:
        if not text:
            raise Refused("an empty passphrase protects nothing", hint="Choose several words that nobody else would.")
        return text
    hint = "Set MEDSHARD_NEW_PASSPHRASE, or run the command on a terminal."
    while True:
        first = _ask(f"New passphrase for the vault {home}: ", hint)
        if not first:
            raise Refused("an empty passphrase protects nothing", hint="Choose several words that nobody else would.")
        if first == _ask("Again: ", hint):
            return first
        sys.stderr.write("These differ. Once more.\n")


def of_auditors(file: Path, *, new: bool = False) -> str:
    """The passphrase of an auditors' key file: MEDSHARD_AUDITORS_PASSPHRASE, or on the terminal; twice for a new one."""
    if (text := os.environ.get("MEDSHARD_AUDITORS_PASSPHRASE")) is not None:
        return text
    hint = "Set MEDSHARD_AUDITORS_PASSPHRASE, or run the command on a terminal."
    first = _ask(f"Passphrase of {file}: ", hint)
    if new and not first:
        raise Refused("an empty passphrase protects nothing", hint="Choose several words that nobody else would.")
    while new and first != _ask("Again: ", hint):
        sys.stderr.write("These differ. Once more.\n")
        first = _ask(f"Passphrase of {file}: ", hint)
    return first


def lies_beside(home: Path) -> bool:
    """Whether the vault is a trial's, whose passphrase lies beside its key."""
    return (home / beside).is_file()


def named() -> str:
    """The variable that says the passphrase; empty where none does."""
    return next((name for name in ("MEDSHARD_PASSPHRASE", "MEDSHARD_PASSPHRASE_FILE") if name in os.environ), "")


def _given(home: Path) -> str | None:
    if (text := os.environ.get("MEDSHARD_PASSPHRASE")) is not None:
        return text
    if (named := os.environ.get("MEDSHARD_PASSPHRASE_FILE")) is not None:
        return read(Path(named))
    if lies_beside(home):
        return read(home / beside)
    return keyring.known(home) if keyring.is_used(home) else None


def read(path: Path) -> str:
    """The passphrase in a file: UTF-8, on one line. Raises Refused or OSError."""
    with path.open("rb") as file:
        data = file.read(file_bytes_max)
    try:
        return data.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise Refused(f"{path} is not a text file", hint="It should hold the passphrase, in UTF-8, on one line.") from None


def _ask(prompt: str, hint: str = _hint) -> str:
    if not sys.stdin.isatty():
        raise Refused("a passphrase is needed, and there is no terminal to ask on", hint=hint)
    import getpass

    return getpass.getpass(prompt, stream=sys.stderr)
