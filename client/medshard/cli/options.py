"""What every command takes (--home, --json, --quiet, before or after its name) and shares: the session, and running the vault."""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from medshard.sender import Sender
    from medshard.vault import Vault

Result = TypeVar("Result")


class Unread(Exception):
    """Whoever read our output stopped reading."""


@dataclass
class Session:
    """The choices made for this run."""

    home: Path
    json: bool = False
    quiet: bool = False

    @asynccontextmanager
    async def vault(self) -> AsyncIterator[Vault]:
        """The vault at home, open."""
        from medshard.cli import passphrase
        from medshard.home import Home
        from medshard.vault import Vault

        asked = self.home.is_dir() and not Home(self.home).sender.exists()
        secret = passphrase.known(self.home) if asked else ""
        async with Vault.open(self.home, secret) as vault:
            yield vault

    @asynccontextmanager
    async def storing(self) -> AsyncIterator[Vault | Sender]:
        """What stores here: the vault at home, or a sender for one that lives elsewhere."""
        from medshard.home import Home

        if not Home(self.home).sender.exists():
            async with self.vault() as vault:
                yield vault
            return
        from medshard.sender import opened

        async with opened(Home(self.home)) as sender:
            yield sender


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the shared options and, as its first argument, the session."""

    @click.option(
        "--home", type=click.Path(file_okay=False, path_type=Path), help="Folder of the vault [env MEDSHARD_HOME, else ~/.medshard]."
    )
    @click.option("--json", is_flag=True, help="Write one JSON document instead of text.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks, only results and errors.")
    @click.pass_context
    @functools.wraps(command)
    def with_session(context: click.Context, /, home: Path | None, json: bool, quiet: bool, **others: Any) -> Any:
        session = context.ensure_object(Session) if context.obj is None else context.obj
        session.home = home or session.home
        session.json |= json
        session.quiet |= quiet
        try:
            return command(session, **others)
        except BrokenPipeError as error:
            raise Unread from error  # click would end the program with code 1

    return with_session


def dicom_index(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the option that says where the gateways' index is."""
    return click.option(
        "--index", default="", envvar="MEDSHARD_DICOM_INDEX", metavar="URL",
        help="The DICOM index that several gateways share: postgresql://USER@HOST/DATABASE [env MEDSHARD_DICOM_INDEX, else in HOME].",
    )(command)  # fmt: skip


def run(task: Coroutine[Any, Any, Result]) -> Result:
    """Run one coroutine to its end. Ctrl-C cancels it, which cleans up, and comes out as KeyboardInterrupt."""
    import asyncio  # late, as everything that --help does not need

    return asyncio.run(task)


def sha256(text: str) -> bytes:
    """Parse 64 hexadecimal digits, as sha256sum prints them."""
    digits = text.strip().lower().removeprefix("\\")  # sha256sum marks escaped names so
    if not re.fullmatch(r"[0-9a-f]*", digits):
        raise click.BadParameter(f"{text!a} is not a SHA-256: expected 64 hexadecimal digits, as `medshard put` and `sha256sum` print them")
    if len(digits) != 64:
        raise click.BadParameter(f"{text!a} is not a SHA-256: it has {len(digits)} hexadecimal digits, not 64")
    return bytes.fromhex(digits)


def no_pdf(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a name that promises pages where something for programs is written."""
    if value is not None and value.suffix.lower() == ".pdf":
        raise click.BadParameter("for pages to print say --pdf FILE.pdf")
    return value


def tag(text: str) -> tuple[str, str]:
    """Parse NAME=VALUE."""
    from medshard.model import check_attributes
    from medshard_protocol.errors import Malformed

    key, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!a} has no '='; write NAME=VALUE")
    try:
        check_attributes({f"tag:{key}": value})
    except Malformed as error:
        raise click.BadParameter(str(error).removeprefix("header: ")) from None
    return key, value


def purpose(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option --purpose, with what it is for."""

    def parse(context: click.Context, parameter: click.Parameter, value: str | None) -> int:
        from medshard.grants import purpose_number

        return int(purpose_number(value)) if value else 0

    return click.option(
        "--purpose",
        type=click.Choice(_purposes, case_sensitive=False),
        callback=parse,
        metavar="WORD",
        help=f"{text} One of: {', '.join(_purposes)}.",
    )


# Those of the ledger, but for the two that nobody says: unspecified, and emergency, which is --break-glass.
_purposes = ("treatment", "insurance", "operations", "research", "patient-request", "legal")


def examples(*lines: str) -> str:
    """Lay out examples at the end of a help text, unwrapped."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
