"""keys rotate, and sender: new keys for a vault, and keys that only send."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, run, shared
from medshard.cli.sharing import short
from medshard_protocol.errors import MedshardError, Refused

if TYPE_CHECKING:
    from medshard.home import Home
    from medshard.model import PutReport


@click.command(
    "rotate",
    epilog=examples(
        "medshard keys rotate MEDSHARD1…                 # the code comes from `storenode invite`",
        "medshard keys rotate MEDSHARD1… --kit kit.txt   # on a new machine, after a theft",
        "medshard keys rotate --kit new.txt              # another home of this vault, such as a second gateway's",
    ),
)
@click.argument("code", metavar="[CODE]", required=False)
@click.option(
    "--kit",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Begin with what `keys kit` wrote, in a new home; without CODE: take its keys, to which another home of this vault was rotated.",
)
@shared
def rotate(session: Session, code: str | None, kit: Path | None) -> int:
    """Draw new keys for this vault, with the consent of its institution: an invitation CODE.

    From that entry of the ledger on the old key reads, stores and shares nothing at any node, and the new one has every file and every
    share of it, given and received. A key that was stolen: let the institution withdraw it first (`storenode withdraw KEY`), then do this.
    Run it again if it was cut off; without CODE, it does what is left to do after the ledger has taken the new key (the custodians' shares,
    the former keys in the store). Kits from before no longer bring the vault back: make a new one.
    """
    from medshard.cli import passphrase as asking
    from medshard.home import Home
    from medshard.keys import open_key_file
    from medshard.rotation import finish
    from medshard.rotation import rotate as rotate_keys

    home = Home(session.home)
    if code is None and kit is not None:
        return _adopt(session, home, kit)
    if code is None:
        finish(home)
    fresh = kit is not None and not home.key_file.exists()
    secret = asking.new(session.home) if fresh else asking.known(session.home)
    if kit is not None and code is not None:
        _begin(home, kit, code, secret)
    keys = run(rotate_keys(home, secret, code)) if code is not None else open_key_file(home.key_file, secret)
    if not keys.former:
        raise click.UsageError("name the invitation: CODE, from `storenode invite`")
    if not session.quiet:
        output.note(f"medshard: {session.home} is the vault {short(keys.public)} from now on, and was {short(keys.former[0].public)}")
    custodians, files, trouble = run(_afterwards(session.home, secret, whole=kit is not None))
    if session.json:
        document = {"key": keys.public.hex(), "before": keys.former[0].public.hex(), "custodians": custodians, "trouble": trouble}
        output.document(document | ({} if files is None else {"files": files}))
        return Exit.OK
    if files is not None:
        output.line(f"{session.home}: {output.files(files)} found")
    if custodians:
        output.line(f"{custodians} custodians have shares of the new key")
    for each in trouble:
        output.note(f"medshard: {each}")
    if not session.quiet:
        output.line("Make a new kit (medshard keys kit), replace copies of vault.key, and tell others the new key (medshard key).")
        output.line("Other homes of this vault, such as a second gateway's, take the new keys with `medshard keys rotate --kit FILE`.")
    return Exit.OK


def _adopt(session: Session, home: Home, kit: Path) -> int:
    """Have one more home of a vault go on under the keys that the first was rotated to."""
    from medshard.cli import passphrase as asking
    from medshard.cli.keys import code_in
    from medshard.rotation import adopt

    root = code_in(kit.read_text(encoding="utf-8", errors="replace")).root
    keys = run(adopt(home, asking.known(session.home), root))
    if session.json:
        output.document({"key": keys.public.hex()})
    elif not session.quiet:
        output.note(f"medshard: {session.home} is the vault {short(keys.public)} from now on")
    return Exit.OK


def _begin(home: Home, kit: Path, code: str, secret: str) -> None:
    """Make the home of a vault out of its kit, as far as a rotation needs it. Run again, it finds it made."""
    from medshard.cli.keys import code_in
    from medshard.keys import create_key_file, open_key_file
    from medshard_protocol.invite import Invite

    known = code_in(kit.read_text(encoding="utf-8", errors="replace"))
    if Invite.from_code(code).genesis_sha256 != known.genesis_sha256:
        raise Refused("the invitation and the kit are of different consortia")
    if home.key_file.exists():
        if all(keys.root != known.root for keys in open_key_file(home.key_file, secret).line):
            raise Refused(f"{home.folder} holds another vault", hint="Choose another --home.")
        return
    home.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    create_key_file(home.key_file, secret, root=known.root)


async def _afterwards(folder: Path, secret: str, *, whole: bool) -> tuple[int, int | None, list[str]]:
    """What the new key makes necessary: how many custodians have it, how many files were found (if looked for), and what did not work."""
    from medshard.escrow import Escrow
    from medshard.rotation import keep_former
    from medshard.vault import Vault

    trouble: list[str] = []
    async with Vault.open(folder, secret) as vault:
        files = await vault.reindex() if whole else None
        await vault.shares.publish_key()
        await keep_former(vault)
        try:
            custodians = await Escrow(vault).renew()
        except MedshardError as error:
            custodians = 0
            trouble.append(f"the custodians' shares are still of the old key: {error}; run `medshard keys escrow` again")
    return custodians, files, trouble


@click.group(epilog=examples("medshard --home /srv/scanner sender new MEDSHARD1… --for 5c1e…", "medshard --home /srv/scanner put scans/"))
def sender() -> None:
    """What only sends: a scanner or a drop folder that stores for a vault and can read nothing back, its own files included."""


@sender.command(epilog=examples("medshard --home /srv/scanner sender new MEDSHARD1… --for 5c1e…   # `medshard key` prints the vault's"))
@click.argument("code", metavar="CODE")
@click.option("--for", "vault", required=True, metavar="KEY", help="Public key of the vault that it sends for, of the same institution.")
@shared
def new(session: Session, code: str, vault: str) -> int:
    """Make a sender at --home, with an invitation CODE of the institution. `medshard put` there stores for the vault.

    The home gets a key to sign with and the vault's public key, and nothing that opens a file. No passphrase: whoever takes it can store
    in the vault's name until the institution withdraws the key that this prints (`storenode withdraw`), and can read nothing.
    """
    from medshard.home import Home
    from medshard.sender import new as new_sender
    from medshard_protocol.ids import key_from_hex

    made = run(new_sender(Home(session.home), code, key_from_hex(vault.strip().lower())))
    if session.json:
        output.document({"home": session.home, "key": made.public.hex(), "vault": made.vault.hex()})
    else:
        output.line(made.public.hex())
        if not session.quiet:
            output.note(f"medshard: {session.home} sends for the vault {short(made.vault)}, and reads nothing")
    return Exit.OK


@sender.command(
    epilog=examples(
        "medshard --home /srv/scanner sender watch /srv/drop", "medshard --home /srv/scanner sender watch /srv/drop --keep /srv/sent"
    )
)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Move what was stored here, instead of deleting it.")
@shared
def watch(session: Session, folder: Path, keep: Path | None) -> int:
    """Send what is put into a FOLDER, for ever; print SHA256 PATH. Ctrl-C ends it.

    A file is taken when it has not changed for two seconds, and DELETED from the folder when it is safe in the store, unless --keep says
    where it goes. One that cannot be stored stays, and the reason is told. Names that begin with a dot are left alone.
    """
    from medshard.cli.store import tell_put
    from medshard.home import Home
    from medshard.sender import opened

    if keep is not None and keep.resolve().is_relative_to(folder.resolve()):
        raise click.UsageError("--keep must lie outside the folder that is watched")

    def tell(report: PutReport) -> None:
        tell_put(session, report)

    async def work() -> None:
        async with opened(Home(session.home)) as scanner:
            await scanner.watch(folder, tell, keep=keep)

    run(work())
    return Exit.OK
