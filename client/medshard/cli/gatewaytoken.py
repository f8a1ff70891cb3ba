"""gateway token: who may use the gateway over HTTP."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, shared

if TYPE_CHECKING:
    from medshard.gateway.tokens import Tokens


@click.group(epilog=examples("medshard gateway token add viewer", "medshard gateway token ls", "medshard gateway token rm viewer"))
def token() -> None:
    """Tokens for DICOMweb.

    As soon as there is one, every request has to show one: as `Authorization: Bearer TOKEN`, as the password of basic
    authentication, or, in a browser, once at /login. Only hashes are kept. A running gateway heeds changes from the next request on.
    """


@token.command("add", epilog=examples("medshard gateway token add 'reading room'"))
@click.argument("name", metavar="NAME")
@shared
def add(session: Session, name: str) -> int:
    """Make a token and print it. It is shown this once."""
    secret = _tokens(session).add(name)
    if session.json:
        output.document({"name": name, "token": secret})
    else:
        output.line(secret)
        if not session.quiet:
            output.note("medshard: this is the only time that it is shown")
    return Exit.OK


@token.command("ls", epilog=examples("medshard gateway token ls --json"))
@shared
def ls(session: Session) -> int:
    """List the tokens by name."""
    known = _tokens(session).all()
    if session.json:
        output.document({"tokens": [{"name": each.name, "added": each.added} for each in known]})
    else:
        for each in known:
            output.line(f"{time.strftime('%Y-%m-%d', time.localtime(each.added))}  {each.name}")
    return Exit.OK


@token.command("rm", epilog=examples("medshard gateway token rm viewer"))
@click.argument("name", metavar="NAME")
@shared
def remove(session: Session, name: str) -> int:
    """Take a token back. With the last one gone, a gateway on 127.0.0.1 asks for none any more."""
    _tokens(session).remove(name)
    if session.json:
        output.document({"name": name})
    return Exit.OK


def _tokens(session: Session) -> Tokens:
    from medshard.gateway.tokens import Tokens, tokens_file

    context: click.Context | None = click.get_current_context()
    folder: Path | None = None
    while context is not None and folder is None:
        folder = context.params.get("dir")
        context = context.parent
    return Tokens(tokens_file(folder or session.home / "gateway"))
