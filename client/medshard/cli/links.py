"""links, and what `share --link` and `get LINK` do."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, run, shared
from medshard.text import shown

if TYPE_CHECKING:
    from medshard.links.model import Note
    from medshard.links.opening import Fetched

_default_s = 30 * 86_400
_pem = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(epilog=examples("medshard links serve --url https://share.clinic.example", "medshard links ls", "medshard links revoke Qm3x…"))
def links() -> None:
    """Links for people without a key, made by `medshard share --link`."""


def make(
    session: Session,
    hashes: tuple[bytes, ...],
    end: int | None,
    wants_passcode: bool,
    max_uses: int,
    label: str,
    url: str | None,
    qr: Path | None,
) -> int:
    """Make a link, print it, draw its QR code."""
    from medshard.links.model import label_chars_max

    base = _base(url)
    if len(label) > label_chars_max:
        raise click.UsageError(f"--label: {label_chars_max} characters at most; this has {len(label)}")
    if qr is not None and qr.suffix.lower() not in (".svg", ".png"):
        raise click.UsageError("--qr: the name must end with .svg or .png")
    passcode = _passcode(twice=True) if wants_passcode else ""

    async def work() -> tuple[Note, str]:
        async with session.vault() as vault:
            until = end or int(time.time()) + _default_s
            note = vault.links.make(hashes, until=until, passcode=passcode, uses_max=max_uses, label=label)
            return note, note.link(base).to_text(f"{base}/link")

    note, text = run(work())
    if qr is not None:
        _draw(text, qr)
    if session.json:
        output.document({"link": text, "name": note.name, "until": note.until})
        return Exit.OK
    output.line(text)
    if not session.quiet:
        output.note(
            f"medshard: link {note.name}, {time.strftime('until %Y-%m-%d %H:%M', time.localtime(note.until))}; whoever has it opens it"
        )
        if sys.stdout.isatty() and qr is None:
            _show(text)
    return Exit.OK


@links.command("ls", epilog=examples("medshard links ls", "medshard links ls --json"))
@shared
def list_links(session: Session) -> int:
    """List the links of this vault: name, state, uses, end, label."""

    async def work() -> list[tuple[Note, str]]:
        async with session.vault() as vault:
            return [(note, vault.links.state(note)) for note in vault.links.all()]

    found = run(work())
    if session.json:
        output.document({"links": [_as_json(note, state) for note, state in found]})
        return Exit.OK
    for note, state in found:
        uses = f"opened {f'{note.uses} of ' if note.uses_max else ''}{output.counted(note.uses_max or note.uses, 'time')}"
        wrong = f", {output.counted(note.wrong, 'wrong passcode')}" if note.wrong else ""
        output.line(f"{note.name}  {state}  {uses}{wrong}  until {output.day(note.until)}  {note.label}")
    return Exit.OK


@links.command(epilog=examples("medshard links revoke Qm3x"))
@click.argument("name", metavar="NAME")
@shared
def revoke(session: Session, name: str) -> int:
    """End a link. What was read stays read."""

    async def work() -> Note:
        async with session.vault() as vault:
            return vault.links.revoke(name)

    note = run(work())
    if session.json:
        output.document(_as_json(note, note.state(time.time())))
    elif not session.quiet:
        output.line(f"{note.name}  revoked")
    return Exit.OK


@links.command(
    epilog=examples(
        "medshard links serve --url https://share.clinic.example --listen 0.0.0.0:443 --cert cert.pem --key key.pem",
        "medshard links serve --url https://share.clinic.example          # behind a proxy that speaks TLS",
    )
)
@click.option("--url", envvar="MEDSHARD_LINKS_URL", metavar="URL", help="The address that links say [env MEDSHARD_LINKS_URL].")
@click.option("--listen", default="127.0.0.1:8045", metavar="HOST:PORT", help="Where to listen [127.0.0.1:8045].")
@click.option("--cert", type=_pem, help="PEM: the certificate, with those above it.")
@click.option("--key", type=_pem, help="PEM: its key.")
@shared
def serve(session: Session, url: str | None, listen: str, cert: Path | None, key: Path | None) -> int:
    """Serve this vault's links, until Ctrl-C. Nothing else of the vault can be reached through it.

    Off this machine it needs TLS. Every use of a link is written into the ledger before a document is read.
    """
    base = _base(url)
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise click.BadParameter(f"{listen!a}: write HOST:PORT", param_hint="--listen")
    if (cert is None) != (key is None):
        raise click.UsageError("a certificate needs its key: give both --cert and --key")

    async def work() -> None:
        from medshard.links.web import forever

        async with session.vault() as vault:
            await forever(vault.links, base, host.strip("[]"), int(port), cert, key, lambda bound: output.note(f"ready {host}:{bound}"))

    run(work())
    return Exit.OK


def open_link(session: Session, text: str, folder: Path, *, overwrite: bool) -> int:
    """Fetch what a link opens into a folder."""
    from medshard.links.model import Link
    from medshard.links.opening import fetch

    link = Link.from_text(text)
    passcode = _passcode(twice=False) if link.passcode else None
    found: list[Fetched] = run(fetch(link, folder, passcode, overwrite=overwrite))
    if session.json:
        output.document({"fetched": output.plain(found)})
    else:
        for each in found:
            output.line(shown(os.fsencode(each.path)))
    return Exit.OK


def _base(url: str | None) -> str:
    parts = urlsplit(url or "")
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not parts.netloc or parts.query or parts.fragment or (parts.scheme != "https" and not (local and parts.scheme == "http")):
        raise click.UsageError("say where links are served, with --url https://…, or in MEDSHARD_LINKS_URL")
    assert url is not None, "it has a host"
    return url.rstrip("/")


def _passcode(*, twice: bool) -> str:
    """MEDSHARD_LINK_PASSCODE, or asked for on the terminal. Never on the command line, which everybody on the machine can read."""
    from medshard_protocol.errors import Refused

    if (text := os.environ.get("MEDSHARD_LINK_PASSCODE")) is not None:
        if not text:
            raise Refused("an empty passcode protects nothing")
        return text
    if not sys.stdin.isatty():
        raise Refused("a passcode is needed, and there is no terminal to ask on", hint="Set MEDSHARD_LINK_PASSCODE.")
    return str(click.prompt("Passcode of the link", hide_input=True, confirmation_prompt=twice, err=True))


def _draw(text: str, path: Path) -> None:
    import io

    import segno

    from medshard.durable import write_durably

    out = io.BytesIO()
    segno.make_qr(text, error="m").save(out, kind=path.suffix.lower()[1:], scale=4, border=4)
    write_durably(path, out.getvalue(), mode=0o600)


def _show(text: str) -> None:
    try:
        import segno
    except ImportError:
        return
    segno.make_qr(text, error="l").terminal(out=sys.stderr, compact=True)


def _as_json(note: Note, state: str) -> dict[str, Any]:
    return {
        "name": note.name,
        "state": state,
        "documents": [sha256.hex() for sha256 in note.documents],
        "made": note.made,
        "until": note.until,
        "uses": note.uses,
        "uses_max": note.uses_max,
        "wrong_passcodes": note.wrong,
        "passcode": bool(note.passcode),
        "label": note.label,
    }
