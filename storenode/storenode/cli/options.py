"""What every command takes (--home and --json, before or after its name), and how words become numbers."""

from __future__ import annotations

import functools
import json
import os
import pwd
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from medshard_protocol.errors import Refused

home_default: Final = Path.home() / ".storenode"
_sizes: Final = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15} | {
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "pib": 2**50,
}
_spans: Final = {"m": 60, "h": 3600, "d": 86_400}


@dataclass
class Session:
    """The choices made for this run."""

    home: Path
    json: bool = False

    def tell(self, document: Mapping[str, Any], *lines: str) -> None:
        """Write a command's result: the document where JSON is wanted, else the lines."""
        if self.json:
            lines = (json.dumps(document, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None),)
        sys.stdout.write("".join(line + "\n" for line in lines))

    def note(self, *lines: str) -> None:
        """Write what helps people and is no result, on standard error."""
        if not self.json:
            sys.stderr.write("".join(line + "\n" for line in lines))

    def check_owner(self) -> None:
        """Refuse to write as root into a home that is another user's: the node could then not read it. Raises Refused."""
        if os.geteuid() != 0 or not self.home.exists():
            return
        owner = self.home.stat().st_uid
        if owner != 0:
            try:
                name = pwd.getpwuid(owner).pw_name
            except KeyError:
                name = f"#{owner}"
            raise Refused(
                f"{self.home} belongs to {name}, and files made by root would be closed to it", hint=f"sudo -u '{name}' storenode …"
            )


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the shared options and, as its first argument, the session."""

    @click.option("--home", type=click.Path(file_okay=False, path_type=Path), help="Folder of the node [env STORENODE_HOME].")
    @click.option("--json", is_flag=True, help="Write one JSON document instead of text.")
    @click.pass_obj
    @functools.wraps(command)
    def with_session(session: Session, /, home: Path | None, json: bool, **others: Any) -> Any:
        session.home = (home or session.home).absolute()
        session.json |= json
        return command(session, **others)

    return with_session


def size(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    """Read a number of bytes such as 2TB or 500GiB."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgtp]i?b|)", text.strip().replace("_", "").lower())
    if not match or not (bytes_ := int(float(match[1]) * _sizes[match[2]])):
        raise click.BadParameter(f"{text!r} is no size; write for example 2TB or 500GiB")
    return bytes_


def span(_context: click.Context, _option: click.Parameter, text: str) -> float:
    """Read a time such as 7d, 12h or 30m, in seconds."""
    match = re.fullmatch(r"([1-9]\d{0,5})([mhd])", text.strip().lower())
    if not match:
        raise click.BadParameter(f"{text!r} is no time; write for example 7d, 12h or 30m")
    return float(int(match[1]) * _spans[match[2]])


def shown_size(count: int) -> str:
    """Bytes for people."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} PB"
