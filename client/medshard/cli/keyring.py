"""The passphrase in the keyring of the operating system, so that nobody types it: drawn here, known to nobody.

Law: the key file stays what it is, under scrypt; the keyring holds its passphrase. The home says only under which name. A keyring that does
not give back what was just put into it is not used.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from medshard.durable import write_durably
from medshard.keys import open_key_file
from medshard_protocol.errors import Absent, Malformed, MedshardError, Refused, Unavailable

service: Final = "medshard"
marker: Final = "keyring"
name_chars: Final = 32
_instead: Final = "Without --keyring the key file is opened with a passphrase that you know, and needs no keyring."
_locked: Final = (
    "Unlock it, or run the command in the session in which the passphrase was put there (a service needs that session's bus). "
    "Where it is lost, bring the vault back from its kit: medshard recover."
)


def is_used(home: Path) -> bool:
    """Whether the passphrase of the vault at ``home`` is in the keyring."""
    return (home / marker).is_file()


def draw(home: Path) -> str:
    """Put a new passphrase into the keyring and note in ``home`` where; the passphrase. Raises Unavailable where no keyring keeps it."""
    name, secret = secrets.token_hex(name_chars // 2), secrets.token_hex(16)
    backend = _backend()
    try:
        backend.set_password(service, name, secret)
        kept = backend.get_password(service, name)
    except Exception as error:  # each backend has errors of its own, and of its libraries
        raise Unavailable(f"the keyring of this machine does not take a passphrase ({_said(error)})", hint=_instead) from None
    if kept != secret:
        raise Unavailable(f"the keyring of this machine ({backend.name}) does not give back what it was given", hint=_instead)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    _note(home, [name, *_names(home)])
    return secret


def known(home: Path) -> str:
    """The passphrase of the vault at ``home``. Raises Unavailable where the keyring does not answer, Absent where it has none."""
    backend, names = _backend(_locked), _names(home)
    try:
        found = [secret for name in names if (secret := backend.get_password(service, name)) is not None]
    except Exception as error:  # as above
        raise Unavailable(f"the keyring of this machine does not answer ({_said(error)})", hint=_locked) from None
    if not found:
        hint = "It belongs to another user or machine, or was cleared. Bring the vault back from its kit: medshard recover."
        raise Absent(f"the keyring of this machine has no passphrase for {home}", hint=hint)
    return next((secret for secret in found if _opens(home, secret)), found[0]) if len(found) > 1 else str(found[0])


def settle(home: Path, *, used: bool) -> None:
    """Take out of the keyring what opens the key file no more: all but the newest passphrase, or that as well where it is not ``used``."""
    names = _names(home)
    kept = names[:1] if used else []
    _note(home, kept)
    for name in names[len(kept) :]:
        with contextlib.suppress(Exception):  # what is left there opens nothing
            _backend().delete_password(service, name)


def _names(home: Path) -> list[str]:
    """Where the passphrase may be: the newest first, and more than one only while it is changed."""
    if not is_used(home):
        return []
    names = (home / marker).read_text(encoding="ascii", errors="replace").split()
    if not names or any(len(name) != name_chars or not name.isalnum() for name in names):
        raise Malformed(f"{home / marker} names no place in a keyring", hint="Bring the vault back from its kit: medshard recover.")
    return names


def _note(home: Path, names: Sequence[str]) -> None:
    if names:
        write_durably(home / marker, "".join(f"{name}\n" for name in names).encode(), mode=0o600)
    else:
        (home / marker).unlink(missing_ok=True)


def _opens(home: Path, secret: str) -> bool:
    try:
        open_key_file(home / "vault.key", secret)
    except MedshardError:
        return False
    return True


def _backend(instead: str = _instead) -> Any:
    try:
        import keyring
        from keyring.backends import fail, null
    except ImportError:
        raise Refused("the keyring needs a library that is not installed", hint="pip install 'medshard[keyring]'. " + instead) from None
    try:
        backend = keyring.get_keyring()
    except Exception as error:  # a backend named in the user's configuration that does not load
        raise Unavailable(f"the keyring of this machine does not open ({_said(error)})", hint=instead) from None
    if isinstance(backend, fail.Keyring | null.Keyring) or type(backend).__module__.startswith("keyrings.alt"):
        raise Unavailable("no keyring runs on this machine that keeps a secret", hint=instead)
    return backend


def _said(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".!") or type(error).__name__
