"""keys and recover."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, run, sha256, shared
from medshard.cli.sharing import short
from medshard_protocol.errors import Absent, Damaged, Malformed, Refused, Unavailable
from medshard_protocol.ids import Key

if TYPE_CHECKING:
    from medshard.escrow import Collected, Request
    from medshard.recovery import RecoveryCode
    from medshard.vault import Vault

look_every_s = 2.0
request_lives_s = 30 * 86_400


@click.group(epilog=examples("medshard keys kit -o kit.txt", "medshard keys escrow --custodians Ada,Ben,Cem,Dora,Emil --threshold 3"))
def keys() -> None:
    """The vault's root key: its passphrase, a kit for the safe, and shares of it in the hands of several custodians.

    Whoever has the key file and its passphrase, or the kit, is the vault. Without any of them, and without enough custodians, nothing can
    ever be restored.
    """


@keys.command(epilog=examples("medshard keys passphrase", "medshard keys passphrase --keyring"))
@click.option("--keyring", "in_keyring", is_flag=True, help="Draw the new one and keep it in the keyring of the operating system.")
@shared
def passphrase(session: Session, in_keyring: bool) -> int:
    """Change the passphrase. Copies of vault.key from before still open with the old one: replace them.

    The new one is asked for, or comes from MEDSHARD_NEW_PASSPHRASE. With --keyring nobody knows it: have a kit (`medshard keys kit`), for
    the keyring dies with the machine.
    """
    from medshard.cli import keyring
    from medshard.cli import passphrase as asking
    from medshard.home import Home
    from medshard.recovery import change_passphrase

    if asking.lies_beside(session.home):
        raise Refused(
            "this vault is a trial's: its passphrase lies beside the key, where `medshard up` finds it",
            hint="A trial holds nothing of worth. What does belongs into a vault that was joined: medshard join CODE.",
        )
    old = asking.known(session.home)
    if Home(session.home).next_key.exists():
        raise Refused("a rotation of this vault's keys was cut off", hint="Finish it first: medshard keys rotate CODE.")
    fresh = keyring.draw(session.home) if in_keyring else asking.changed(session.home)
    changed = change_passphrase(Home(session.home), old, fresh, fast=in_keyring)
    if keyring.is_used(session.home):
        keyring.settle(session.home, used=in_keyring)
    if session.json:
        output.document({"key": changed.public.hex()})
    elif not session.quiet:
        output.line("the passphrase was changed; replace the copies of vault.key that you keep elsewhere")
        if in_keyring:
            output.line("It is in the keyring of this machine, and nowhere else: make a kit now (medshard keys kit).")
            if given := asking.named():
                output.line(f"Unset {given}: what it says opens this vault no more.")
    return Exit.OK


@keys.command(epilog=examples("medshard keys kit -o kit.txt      # print it, put it into the safe, delete the file"))
@click.option("-o", "--output", "target", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Where it goes; - for here.")
@shared
def kit(session: Session, target: Path) -> int:
    """Write down what brings this vault back on another machine: the root key, in the clear, and where the nodes are.

    Whoever reads it is the vault. `medshard recover` takes it.
    """
    from medshard.durable import write_durably
    from medshard.recovery import code_of
    from medshard.rotation import keep_former

    async def work() -> tuple[bytes, str, str]:
        async with session.vault() as vault:
            await keep_former(vault)
            code = code_of(vault.home, vault.keys, vault.roster)
            return vault.keys.public, code.to_code(), code.genesis_sha256.hex()

    public, code, genesis = run(work())
    lines = [code[at : at + 60] for at in range(0, len(code), 60)]
    text = "\n".join(
        (
            "medshard recovery kit. Whoever has this is the vault: keep it in a safe.",
            f"vault    {public.hex()}",
            f"genesis  {genesis}",
            f"made     {time.strftime('%Y-%m-%d')}",
            "",
            *lines,
            "",
            "On a new machine: medshard recover, then type or paste the lines that begin with MEDSHARDKEY1.",
            "",
        )
    )
    if str(target) == "-":
        sys.stdout.write(text)
        return Exit.OK
    if target.exists():
        raise Refused(f"{target} exists already", hint="Choose another name.")
    write_durably(target, text.encode(), mode=0o600)
    if session.json:
        output.document({"file": target, "key": public.hex()})
    elif not session.quiet:
        output.note(f"medshard: {target} holds this vault's root key in the clear: print it, lock it away, delete the file")
    return Exit.OK


@keys.command(epilog=examples("medshard keys escrow --custodians Ada,Ben,Cem,Dora,Emil --threshold 3", "medshard keys escrow"))
@click.option("--custodians", metavar="NAME,…", help="Contacts or keys, each of another vault.")
@click.option("--threshold", type=click.IntRange(2, 32), help="How many of them bring the key back. Fewer learn nothing.")
@shared
def escrow(session: Session, custodians: str | None, threshold: int | None) -> int:
    """Split the root key for custodians, each of whom gets a share that nobody else can open. Without options: say what is deposited.

    Every share is a grant in the ledger. A new escrow ends the one before, as far as its shares have not been copied.
    """
    if (custodians is None) != (threshold is None):
        raise click.UsageError("name both --custodians and --threshold")

    async def work() -> dict[str, int]:
        from medshard.escrow import Escrow

        async with session.vault() as vault:
            if custodians is not None and threshold is not None:
                await Escrow(vault).deposit(_named(vault, custodians), threshold)
            return {id_: len(rows) for id_, rows in Escrow(vault).deposited().items()}

    found = run(work())
    if session.json:
        output.document({"escrows": [{"id": id_, "shares": count} for id_, count in found.items()]})
        return Exit.OK
    for id_, count in found.items():
        output.line(f"escrow {id_}: {count} shares with custodians")
    if not found and not session.quiet:
        output.note("medshard: no share of this vault's key is deposited anywhere")
    return Exit.OK


@keys.command(epilog=examples("medshard keys requests"))
@shared
def requests(session: Session) -> int:
    """List who asks for shares of a lost key: REQUEST, who asks, which vault is lost, when, what they say."""

    async def work() -> list[Request]:
        from medshard.escrow import Escrow

        async with session.vault() as vault:
            return await Escrow(vault).requests()

    found = run(work())
    if session.json:
        output.document({"requests": output.plain(found)})
        return Exit.OK
    for each in found:
        day = output.day(each.at)
        output.hashed(each.sha256, each.message.encode(), f"from {short(each.asker)}", f"for the lost vault {short(each.lost)}", day)
    return Exit.OK


@keys.command(epilog=examples("medshard keys requests", "medshard keys approve 3b1f…"))
@click.argument("request", type=sha256, metavar="REQUEST")
@shared
def approve(session: Session, request: bytes) -> int:
    """Give this vault's share to whoever made a REQUEST.

    First make sure who that is: call them, and let them read you the short form of their key. With enough shares they are the lost vault.
    """

    async def work() -> Request:
        from medshard.escrow import Escrow

        async with session.vault() as vault:
            return await Escrow(vault).approve(request)

    asked = run(work())
    if session.json:
        output.document({"approved": output.plain(asked)})
    elif not session.quiet:
        output.line(f"the share of {short(asked.lost)} was given to {short(asked.asker)}")
    return Exit.OK


def _recovering(command: click.decorators.FC) -> click.decorators.FC:
    for option in (
        click.option("--wait", type=float, default=0.0, metavar="MINUTES", help="Wait so long for custodians [ask, and look once]."),
        click.option("--message", default="", metavar="TEXT", help="What they read, such as who you are and where to call you."),
        click.option("--custodians", required=True, metavar="NAME,…", help="Contacts or keys."),
        click.option("--of", "lost", required=True, type=sha256, metavar="KEY", help="The lost vault's public key."),
    ):
        command = option(command)
    return command


@keys.command(
    "recover",
    epilog=examples(
        "medshard keys recover --of 5c1e… --custodians Ada,Ben,Cem --message 'Dr. Weber, call 4711' --into ~/restored",
        "medshard keys recover --of 5c1e… --custodians Ada,Ben,Cem --into ~/restored   # again: goes on",
    ),
)
@_recovering
@click.option("--into", "target", required=True, type=click.Path(file_okay=False, path_type=Path), help="The home of the vault, made anew.")
@shared
def recover_keys(session: Session, lost: bytes, custodians: str, message: str, wait: float, target: Path) -> int:
    """Ask custodians for their shares of a lost vault's key, and make the vault anew when enough of them have approved.

    Run it from another vault, one that has just joined for instance. Running it again goes on with the same request.
    """
    from medshard.cli import passphrase as asking
    from medshard.home import Home
    from medshard.recovery import restore_home

    async def work() -> tuple[Collected, Mapping[Key, str], list[str], bytes]:
        async with session.vault() as vault:
            found = await _ask_and_collect(session, vault, Key(lost), custodians, message, wait)
            return found, vault.contacts.names(), [node.url for node in vault.roster.nodes], vault.home.genesis.read_bytes()

    found, names, urls, genesis = run(work())
    root = _whole(found, names)
    secret = asking.changed(target) if not Home(target).key_file.exists() else asking.known(target)
    run(restore_home(target, root, secret, urls, genesis))
    files = run(_reindexed(target, secret))
    if session.json:
        output.document(
            {"home": target, "key": lost.hex(), "files": files, "approved": len(found.good), "wrong": output.plain(found.wrong)}
        )
    else:
        output.line(f"{target}: the vault {short(lost)} with {output.files(files)}, {_spent(found)} after the request")
        _tell_wrong(found, names)
    return Exit.OK


@keys.command("drill", epilog=examples("medshard keys drill --of 5c1e… --custodians Ada,Ben,Cem --wait 60"))
@_recovering
@shared
def drill(session: Session, lost: bytes, custodians: str, message: str, wait: float) -> int:
    """Rehearse a recovery: ask, let custodians approve, put the key together, compare, forget it. Prints the time it took.

    Run it from another vault than the one that is rehearsed for, as in earnest.
    """

    async def work() -> tuple[Collected, Mapping[Key, str]]:
        async with session.vault() as vault:
            return await _ask_and_collect(session, vault, Key(lost), custodians, message or "a drill", wait), vault.contacts.names()

    found, names = run(work())
    _whole(found, names)
    if session.json:
        seconds = int(time.time()) - found.asked_at
        output.document({"holds": True, "seconds": seconds, "approved": len(found.good), "wrong": output.plain(found.wrong)})
    else:
        output.line(f"the key of {short(lost)} can be brought back: {len(found.good)} custodians, {_spent(found)} after the request")
        _tell_wrong(found, names)
    return Exit.OK


async def _ask_and_collect(session: Session, vault: Vault, lost: Key, custodians: str, message: str, wait: float) -> Collected:
    import asyncio  # late, as everything that --help does not need

    from medshard.escrow import Escrow

    escrow = Escrow(vault)
    own = [each for each in await escrow.requests() if each.asker == vault.keys.public and each.lost == lost]
    if own and time.time() - own[-1].at < request_lives_s:
        request = own[-1].sha256
    else:
        request = await escrow.ask(lost, _named(vault, custodians), message)
        if not session.quiet:
            output.note(f"medshard: asked. Custodians approve with: medshard keys approve {request.hex()}")
            output.note(f"medshard: they will want to hear the short form of your key: {short(vault.keys.public)}")
    deadline, before = time.monotonic() + 60 * wait, ""
    while True:
        found = await escrow.collect(request)
        if found.root is not None or time.monotonic() >= deadline:
            return found
        if (now := _count(found, vault.contacts.names())) != before and not session.quiet:
            before = now
            output.note(f"medshard: {now}")
        await asyncio.sleep(look_every_s)


def _count(found: Collected, names: Mapping[Key, str]) -> str:
    """How many shares there are, of how many that are needed, and who sent a wrong one."""
    said = f"{len(found.good)} of {found.threshold} shares are here" if found.threshold else "no share is here yet"
    return f"{said}; {_wrong(found, names)}" if found.wrong else said


def _wrong(found: Collected, names: Mapping[Key, str]) -> str:
    who = [f"{names[key]} ({short(key)})" if key in names else short(key) for key in found.wrong]
    return f"a wrong share came from {', '.join(who)}"


def _whole(found: Collected, names: Mapping[Key, str]) -> bytes:
    if found.root is None:
        more = "Run the same command again when more custodians have approved; --wait MINUTES waits for them."
        again = "Any others can make up for it; who sent it can approve once more, as the share deposited there may be right. "
        raise Unavailable(_count(found, names), hint=again + more if found.wrong else more)
    return found.root


def _tell_wrong(found: Collected, names: Mapping[Key, str]) -> None:
    if found.wrong:
        output.note(f"medshard: {_wrong(found, names)}; it was left out")


def _spent(found: Collected) -> str:
    seconds = max(0, int(time.time()) - found.asked_at)
    return f"{seconds} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _named(vault: Vault, text: str) -> list[Key]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise click.UsageError("name at least one custodian")
    return [vault.contacts.key(name) for name in names]


async def _reindexed(home: Path, secret: str) -> int:
    from medshard.vault import Vault

    async with Vault.open(home, secret) as vault:
        return await vault.reindex()


@click.command(
    epilog=examples(
        "medshard recover < kit.txt",
        "MEDSHARD_HOME=~/restored medshard recover --kit kit.txt",
        "medshard recover --root-key-file root.bin --node https://node.example:8443 --genesis-sha256 9f86…",
    )
)
@click.option("--kit", "kit_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="What `keys kit` wrote [asked for].")
@click.option("--root-key-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The 32 bytes of the root key instead.")
@click.option("--node", "urls", multiple=True, metavar="URL", help="A node that is up, where the kit's are not. Repeatable.")
@click.option("--genesis-sha256", "pinned", type=sha256, metavar="HEX", help="What the genesis file must be; the kit says it.")
@shared
def recover(session: Session, kit_file: Path | None, root_key_file: Path | None, urls: tuple[str, ...], pinned: bytes | None) -> int:
    """Bring a vault back on a new machine, from its recovery kit and any node that lives.

    Makes the home anew: the key file under a new passphrase, the consortium's rosters, a certificate for the same key, and the index of
    everything that is stored. Nothing else is needed, and no file is fetched before you ask for it.
    """
    from medshard.cli import passphrase as asking
    from medshard.home import Home
    from medshard.recovery import genesis_of, restore_home

    root, pinned, places = _code(kit_file, root_key_file, pinned, urls)
    genesis, failures = b"", []
    for url in places:
        try:
            genesis = run(genesis_of(url))
            break
        except (Unavailable, Malformed) as error:
            failures.append(str(error))
    if not genesis:
        raise Unavailable(f"no node gives the genesis file ({'; '.join(failures)})", hint="Name a node that is up with --node URL.")
    _compare(session, genesis, pinned)
    secret = asking.known(session.home) if Home(session.home).key_file.exists() else asking.new(session.home)
    keys = run(restore_home(session.home, root, secret, places, genesis))
    if not session.quiet:
        output.note(f"medshard: {session.home} is the vault {short(keys.public)} again; looking for its files")
    files = run(_reindexed(session.home, secret))
    if session.json:
        output.document({"home": session.home, "key": keys.public.hex(), "files": files})
    else:
        output.line(f"{session.home}: {output.files(files)} found")
    return Exit.OK


def _code(
    kit_file: Path | None, root_key_file: Path | None, pinned: bytes | None, urls: tuple[str, ...]
) -> tuple[bytes, bytes | None, list[str]]:
    if root_key_file is not None:
        root = root_key_file.read_bytes()
        if len(root) != 32:
            raise Malformed(f"{root_key_file}: a root key has 32 bytes, not {len(root)}")
        if not urls:
            raise click.UsageError("name a node with --node URL")
        return root, pinned, list(urls)
    if kit_file is not None:
        text = kit_file.read_text(encoding="utf-8", errors="replace")
    elif sys.stdin.isatty():
        text = click.prompt("Recovery code", hide_input=True, err=True)
    else:
        text = sys.stdin.read(65_536)
    code = code_in(text)
    if pinned is not None and pinned != code.genesis_sha256:
        raise Refused("the kit names another genesis file than you do")
    return code.root, code.genesis_sha256, [*urls, *code.urls]


def code_in(text: str) -> RecoveryCode:
    """The recovery code in a kit's text. Raises Malformed."""
    from medshard.recovery import RecoveryCode, prefix

    words = text[text.find(prefix) :] if prefix in text else text
    end = words.find("\n\n")
    return RecoveryCode.from_code(words if end < 0 else words[:end])


def _compare(session: Session, genesis: bytes, pinned: bytes | None) -> None:
    """Trust a genesis file because its hash was written down, or because a person says so."""
    import hashlib

    found = hashlib.sha256(genesis).digest()
    if pinned is not None:
        if found != pinned:
            raise Damaged("the node serves another genesis file than was written down", hint="Do not go on: ask your institution.")
        return
    if not sys.stdin.isatty() or session.json:
        raise Absent(
            "nothing says which genesis file to trust", hint=f"Compare {found.hex()} with your institution's: --genesis-sha256 HEX."
        )
    click.confirm(f"The genesis file has SHA-256 {found.hex()}.\nIs that your consortium's?", abort=True, err=True)
