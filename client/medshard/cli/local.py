"""up, join and demo."""

from __future__ import annotations

import re
from pathlib import Path

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, run, shared


@click.command(epilog=examples("medshard join ABCD-…", "medshard join ABCD-… --keyring", "MEDSHARD_HOME=~/radiology medshard join ABCD-…"))
@click.argument("code", metavar="CODE")
@click.option("--keyring", "in_keyring", is_flag=True, help="Draw the passphrase and keep it in the keyring of the operating system.")
@shared
def join(session: Session, code: str, in_keyring: bool) -> int:
    """Join a consortium with a one-time CODE.

    An operator makes the code with `storenode invite`. Makes the vault's keys, unless the home has some, and enrols them with
    the institution. Keep a copy of vault.key and its passphrase: without both, nothing can ever be restored. With --keyring nobody knows
    the passphrase, so make a kit at once (`medshard keys kit`): the keyring dies with the machine.
    """
    from medshard.cli import keyring, passphrase
    from medshard.home import Home
    from medshard.vault import Vault

    fresh = not Home(session.home).key_file.exists()
    if fresh and in_keyring:
        secret = keyring.draw(session.home)
    else:
        secret = passphrase.new(session.home) if fresh else passphrase.known(session.home)
    run(Vault.join(session.home, code, secret, fast_kdf=fresh and in_keyring))
    if session.json:
        output.document({"home": output.plain(session.home), "new_keys": fresh})
    elif not session.quiet:
        output.line(f"joined: {session.home}")
        if fresh and in_keyring:
            output.line("The passphrase is in the keyring of this machine, and nowhere else: make a kit now (medshard keys kit).")
        elif fresh:
            output.line(f"Keep a copy of {Home(session.home).key_file} in another place, and the passphrase in a third.")
    return Exit.OK


def _code(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,3})/([0-9]{1,3})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 255:
        raise click.BadParameter(f"{text!a} is not a code; write K/N with 1 <= K <= N <= 255, such as 3/6")
    return int(match[1]), int(match[2])


@click.command(epilog=examples("medshard up", "medshard up --dir /tmp/trial --institutions 16 --code 10/16"))
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default="medshard-trial",
    show_default=True,
    help="Where all of it lives.",
)
@click.option("--institutions", type=click.IntRange(1, 64), help="How many, with one node each [6].")
@click.option("--code", type=_code, metavar="K/N", help="Any K of N shards restore a file [3/6 for 6 institutions].")
@shared
def up(session: Session, folder: Path, institutions: int | None, code: tuple[int, int] | None) -> int:
    """Run a consortium on this machine, for trials.

    Stays in the foreground; Ctrl-C stops all of it. Each institution's node is a process of its own, with its data in
    DIR/nodes/NAME and its process id in DIR/nodes/NAME/pid. The client's home is DIR/vault. An existing DIR is used again, with
    all its files. This is for trials: one machine is one point of failure, and the passphrase lies beside the key.
    It opens DIR/auditors.key too.
    """
    from medshard.consortium import LocalConsortium, serve

    consortium = LocalConsortium(folder, institutions=institutions, code=code)
    return serve(consortium, session)


@click.command(epilog=examples("medshard demo"))
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), help="Keep everything in this folder [a temporary one].")
@shared
def demo(session: Session, folder: Path | None) -> int:
    """Show all of it in under a minute.

    Stores scans and a policy, shows what a node sees, kills half the nodes, gets everything back, finds a flipped bit, checks
    the ledger.
    """
    from medshard.demo import play

    return run(play(folder, quiet=session.quiet, json=session.json))
