"""share, revoke, shared, key and contacts."""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, purpose, run, sha256, shared
from medshard_protocol.errors import Malformed
from medshard_protocol.ids import Key, Sha256

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medshard.grants import Shared

_spans = {"h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}


def until(text: str) -> int:
    """Parse 30d, 12h, 4w, 1y, a day (to its end, local time) or a day and a time; Unix seconds."""
    text = text.strip()
    if match := re.fullmatch(r"([1-9][0-9]{0,4})([hdwy])", text):
        return int(time.time()) + int(match[1]) * _spans[match[2]]
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(f"{text!a} is no end; write 30d, 12h, 2026-12-31 or 2026-12-31T18:00") from None
    if len(text) <= 10:
        at += timedelta(days=1)  # to the end of that day
    if at.timestamp() <= time.time():
        raise click.BadParameter(f"{text} has passed")
    return int(at.timestamp())


@click.command(
    epilog=examples(
        "medshard share 3b1f… --to Insurer --until 90d --purpose insurance",
        "medshard share 3b1f… 77a0… --to 5c1e…",
        "medshard find --patient doe --json | jq -r '.files[].sha256' | xargs medshard share --to 'Dr. Weber'",
        "medshard share 3b1f… --link --url https://share.clinic.example --until 14d --passcode --qr link.svg",
    )
)
@click.argument("hashes", nargs=-1, required=True, type=sha256, metavar="SHA256...")
@click.option("--to", "reader", metavar="KEY|NAME", help="Who may read: a key, as `medshard key` prints it, or a contact.")
@click.option("--link", is_flag=True, help="Make a link instead, for somebody without a key; `medshard links serve` serves it.")
@click.option("--until", "end", type=until, default=None, metavar="WHEN", help="30d, 12h, 2026-12-31 [for good; a link: 30d].")
@click.option("--passcode", "wants_passcode", is_flag=True, help="Of a link: ask for a passcode to give to its reader another way.")
@click.option("--max-uses", type=click.IntRange(1, 1_000_000), help="Of a link: how often it may be opened.")
@click.option("--label", default="", metavar="TEXT", help="Of a link: what its reader sees above the documents.")
@click.option("--url", envvar="MEDSHARD_LINKS_URL", metavar="URL", help="Of a link: where `links serve` is found [env MEDSHARD_LINKS_URL].")
@click.option("--qr", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Of a link: its QR code, FILE.svg or FILE.png.")
@purpose("What for, as the ledger will say.")
@shared
def share(
    session: Session,
    hashes: tuple[bytes, ...],
    reader: str | None,
    link: bool,
    end: int | None,
    wants_passcode: bool,
    max_uses: int | None,
    label: str,
    url: str | None,
    qr: Path | None,
    purpose: int,
) -> int:
    """Let another vault read files, or make a link for somebody who has none.

    The right stands in the ledger for all to see, without names; the files' keys are sealed to the reader alone. Nodes serve the
    reader from then on, and write down each read: see `medshard log`. A file that was stored together with others in one pack is
    stored once more first, because a pack has one key.

    A link opens the files that it was made for and nothing else; its key is behind the # and reaches no server. Every use is a line in
    `medshard log`. `medshard links revoke` ends it.
    """
    if link == (reader is not None):
        raise click.UsageError("say who may read with --to, or make a link with --link")
    if link:
        from medshard.cli.links import make

        return make(session, hashes, end, wants_passcode, max_uses or 0, label, url, qr)
    if wants_passcode or max_uses or label or qr:
        raise click.UsageError("--passcode, --max-uses, --label and --qr are of links: say --link")
    assert reader is not None, "checked above"

    async def work() -> list[Shared]:
        async with session.vault() as vault:
            key = vault.contacts.key(reader)
            with output.meter(wanted=not (session.quiet or session.json)) as progress:
                return await vault.shares.share(hashes, key, until=end or 0, purpose=purpose, progress=progress)

    return tell_granted(session, run(work()))


def tell_granted(session: Session, granted: Sequence[Shared]) -> int:
    """Say what somebody may read from now on."""
    if session.json:
        output.document({"shared": output.plain(granted)})
        return Exit.OK
    for each in granted:
        output.hashed(each.sha256, each.name, f"grant {each.grant_index}", _end(each))
    if not session.quiet and any(each.copied for each in granted):
        output.note("medshard: files that lie in packs were stored once more, each alone, to be shared without their neighbours")
    return Exit.OK


@click.command(epilog=examples("medshard revoke 3b1f… --from Insurer", "medshard revoke 3b1f… --grant 118"))
@click.argument("hashes", nargs=-1, required=True, type=sha256, metavar="SHA256...")
@click.option("--from", "reader", metavar="KEY|NAME", help="From whom: a key or a contact.")
@click.option("--grant", metavar="ID", help="Only this grant: its place in the ledger or its id, as `medshard shared` shows them.")
@shared
def revoke(session: Session, hashes: tuple[bytes, ...], reader: str | None, grant: str | None) -> int:
    """Take back the right to read files.

    From the entry in the ledger on, nodes refuse the reader. What was read before stays read: nobody can take that back.
    """
    if (reader is None) == (grant is None):
        raise click.UsageError("say whose right ends with --from, or which grant with --grant")

    async def work() -> list[Shared]:
        async with session.vault() as vault:
            key = None if reader is None else vault.contacts.key(reader)
            return await vault.shares.revoke(hashes, key, None if grant is None else _grant(grant))

    ended = run(work())
    if session.json:
        output.document({"revoked": output.plain(ended)})
    else:
        for each in ended:
            output.hashed(each.sha256, each.name, f"grant {each.grant_index} ended by entry {each.ended}")
    return Exit.OK


def _grant(text: str) -> Sha256 | int:
    return int(text) if text.isdecimal() and len(text) < 16 else Sha256(sha256(text))


@click.command("shared", epilog=examples("medshard shared", "medshard shared --json | jq '.with_others[] | select(.ended == 0)'"))
@click.option("--all", "everything", is_flag=True, help="With grants that have ended, and with messages.")
@shared
def shared_files(session: Session, everything: bool) -> int:
    """List what is shared with this vault, and what it shares.

    Messages between vaults, such as shares of a root key and requests, are listed with --all alone.
    Every node is asked, and only what the ledger proves is listed. Also puts this vault's key on the nodes again, so that others
    can share with it.
    """

    async def work() -> list[Shared]:
        async with session.vault() as vault:
            with output.meter(wanted=not (session.quiet or session.json)) as progress:
                return await vault.shares.all(progress)

    now = time.time()
    found = [each for each in run(work()) if everything or not (each.message or each.ended or 0 < each.until < now)]
    mine, theirs = [each for each in found if each.given], [each for each in found if not each.given]
    if session.json:
        output.document({"with_me": output.plain(theirs), "with_others": output.plain(mine)})
        return Exit.OK
    for title, listed, word in (("with this vault:", theirs, "by"), ("by this vault:", mine, "to")):
        if listed and not session.quiet:
            output.note(title)
        for each in listed:
            output.hashed(each.sha256, each.name, f"{word} {_peer(each)}", each.purpose, _end(each), f"grant {each.grant_index}")
    return Exit.OK


def _peer(each: Shared) -> str:
    name = each.peer_name or f"{each.peer.hex()[:16]}…"
    return f"{name} ({each.institution})" if each.institution else name


def _end(each: Shared) -> str:
    if each.ended:
        return f"ended by entry {each.ended}"
    return "for good" if not each.until else time.strftime("until %Y-%m-%d %H:%M", time.localtime(each.until))


@click.command(epilog=examples("medshard key", "medshard key --json"))
@shared
def key(session: Session) -> int:
    """Print this vault's public key.

    It is what others name in `medshard share --to`. Give it to them over a channel they trust, or compare its short form over the
    telephone. Also puts on the nodes what others seal to, which `join` did once.
    """

    async def work() -> tuple[bytes, int]:
        async with session.vault() as vault:
            return vault.keys.public, await vault.shares.publish_key()

    public, nodes = run(work())
    if session.json:
        output.document({"key": public.hex(), "short": short(public), "nodes": nodes})
    else:
        output.line(public.hex())
        if not session.quiet:
            output.note(f"short form: {short(public)}; {nodes} nodes have what others seal to")
    return Exit.OK


def short(public: bytes) -> str:
    """Sixteen digits in fours: enough to tell vaults apart over the telephone."""
    digits = public.hex()[:16]
    return " ".join(digits[at : at + 4] for at in range(0, 16, 4))


@click.group(epilog=examples("medshard contacts add Insurer 5c1e…", "medshard contacts ls", "medshard contacts rm Insurer"))
def contacts() -> None:
    """Names for other vaults' keys.

    They are sealed in this vault's home, and nobody else sees them.
    """


@contacts.command("add", epilog=examples("medshard contacts add 'Dr. Weber' 5c1e…"))
@click.argument("name", metavar="NAME")
@click.argument("key", type=sha256, metavar="KEY")
@shared
def add_contact(session: Session, name: str, key: bytes) -> int:
    """Call a KEY by a NAME."""

    async def work() -> None:
        async with session.vault() as vault:
            vault.contacts.add(name, Key(key))

    try:
        run(work())
    except Malformed as error:
        raise click.UsageError(f"{error}. {error.hint}") from None
    if session.json:
        output.document({"name": name, "key": key.hex()})
    elif not session.quiet:
        output.line(f"{name}  {short(key)}")
    return Exit.OK


@contacts.command("ls", epilog=examples("medshard contacts ls --json"))
@shared
def list_contacts(session: Session) -> int:
    """List the contacts: key and name."""

    async def work() -> dict[str, bytes]:
        async with session.vault() as vault:
            return dict(vault.contacts.all())

    known = run(work())
    if session.json:
        output.document({"contacts": [{"name": name, "key": known[name].hex()} for name in sorted(known)]})
    else:
        for name in sorted(known):
            output.line(f"{known[name].hex()}  {name}")
    return Exit.OK


@contacts.command("rm", epilog=examples("medshard contacts rm 'Dr. Weber'"))
@click.argument("name", metavar="NAME")
@shared
def remove_contact(session: Session, name: str) -> int:
    """Forget a name. What was shared stays shared."""

    async def work() -> bytes:
        async with session.vault() as vault:
            return vault.contacts.remove(name)

    was = run(work())
    if session.json:
        output.document({"name": name, "key": was.hex()})
    return Exit.OK
