"""retain, hold, release, kept, erase, retire, certificate and check-certificate."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, no_pdf, run, sha256, shared
from medshard.cli.sharing import until
from medshard.text import last_day, shown
from medshard_protocol.errors import Absent, Malformed

if TYPE_CHECKING:
    from medshard.custody import Ended, Kept
    from medshard.vault import Vault

_hashes = click.argument("hashes", nargs=-1, required=True, type=sha256, metavar="SHA256...")
_json_path = click.Path(dir_okay=False, path_type=Path)
_yes = click.option("-y", "--yes", is_flag=True, help="Do not ask first.")


@click.command(epilog=examples("medshard retain 3b1f… --until 10y", "medshard retain 3b1f… 77a0… --until 2036-12-31"))
@_hashes
@click.option("--until", "end", type=until, required=True, metavar="WHEN", help="10y, 90d or 2036-12-31.")
@shared
def retain(session: Session, hashes: tuple[bytes, ...], end: int) -> int:
    """Keep files until a date, whatever anybody says later.

    Until then no honest node destroys them, not even for their owner. A later date may replace it, never an earlier one. Files that lie
    in one pack are kept together.
    """

    async def work() -> list[Kept]:
        async with session.vault() as vault:
            return await vault.custody.retain(hashes, end)

    found = run(work())
    if not session.quiet:
        for name, until in dict.fromkeys((each.name, each.until) for each in found if each.until > end):
            output.note(f"medshard: {shown(name)} is kept until {last_day(until)} already; an earlier date does not replace that")
    return _tell(session, found)


@click.command(
    epilog=examples("medshard hold 3b1f…", "medshard find --policy-number VN-7 --json | jq -r '.files[].sha256' | xargs medshard hold")
)
@_hashes
@shared
def hold(session: Session, hashes: tuple[bytes, ...]) -> int:
    """Keep files until `medshard release`: a legal hold.

    It stands in the ledger, without a reason or a name. While it stands no honest node destroys the files, whatever their retention says.
    Where your institution has keepers this only proposes it, or approves what another keeper has proposed: see `medshard proposals`.
    """

    async def work() -> list[Kept]:
        async with session.vault() as vault:
            return await vault.custody.hold(hashes)

    return _tell(session, run(work()))


@click.command(epilog=examples("medshard release 3b1f…"))
@_hashes
@shared
def release(session: Session, hashes: tuple[bytes, ...]) -> int:
    """End this vault's holds of files. What is retained stays retained.

    Where your institution has keepers this only proposes it, or approves what another keeper has proposed: see `medshard proposals`.
    """

    async def work() -> list[Kept]:
        async with session.vault() as vault:
            return await vault.custody.release(hashes)

    return _tell(session, run(work()))


@click.command(epilog=examples("medshard kept", "medshard kept --ends-before 90d", "medshard kept 3b1f…", "medshard kept --refresh --json"))
@click.argument("hashes", nargs=-1, type=sha256, metavar="[SHA256]...")
@click.option("--ends-before", type=until, metavar="WHEN", help="Only what may be destroyed by then: 90d, 2036-12-31.")
@click.option("--refresh", is_flag=True, help="Ask the ledger about every file: after `reindex`, or where an institution made holds.")
@shared
def kept(session: Session, hashes: tuple[bytes, ...], ends_before: int | None, refresh: bool) -> int:
    """List what keeps files: retention dates and holds. What ends soonest comes first.

    With hashes, the ledger is asked; without, the list is what this vault has said or asked before.
    """

    async def work() -> list[Kept]:
        async with session.vault() as vault:
            if hashes:
                return await vault.custody.standing(hashes)
            with output.meter(wanted=not (session.quiet or session.json)) as progress:
                return await vault.custody.refresh(progress) if refresh else vault.custody.kept()

    found = run(work())
    if ends_before is not None:
        found = [each for each in found if 0 < each.until <= ends_before and not each.holds]
    return _tell(session, found)


@click.command(epilog=examples("medshard erase 3b1f…", "medshard erase 3b1f… --yes --json", "medshard certificate 3b1f… --pdf gone.pdf"))
@_hashes
@_yes
@shared
def erase(session: Session, hashes: tuple[bytes, ...], yes: bool) -> int:
    """Destroy files for good: wrapped keys first, then every shard, with a signed receipt of each node.

    Refused while a retention or a hold stands. Other files in the same pack are stored anew first. Nodes that are down obey when they are
    back. What somebody has read before stays read.
    """
    return _end(session, hashes, yes, erase=True)


@click.command(epilog=examples("medshard retire 3b1f…"))
@_hashes
@_yes
@shared
def retire(session: Session, hashes: tuple[bytes, ...], yes: bool) -> int:
    """Give up files that nobody needs any more: their shards go, and that they were registered can still be proved.

    For what must be gone altogether, use `medshard erase`.
    """
    return _end(session, hashes, yes, erase=False)


def _end(session: Session, hashes: tuple[bytes, ...], yes: bool, *, erase: bool) -> int:
    if not yes:
        if not sys.stdin.isatty() or session.json:
            raise click.UsageError("this destroys files for good: say --yes")
        click.confirm(f"Destroy {output.files(len(hashes))} for good?", abort=True, err=True)

    async def work() -> list[Ended]:
        async with session.vault() as vault:
            with output.meter(wanted=not (session.quiet or session.json)) as progress:
                ended = await vault.custody.end(hashes, erase=erase, progress=progress)
            _names.update({node.id: node.name for node in vault.roster.nodes})
            return ended

    _names: dict[bytes, str] = {}
    ended = run(work())
    if session.json:
        output.document({"ended": [_as_json(each, _names) for each in ended]})
        return Exit.OK
    for each in ended:
        for _, digest in each.documents:
            if digest in hashes:
                holders = len(each.receipts) + len(each.missing)
                output.hashed(digest, b"", f"entry {each.inclusion.index}", f"{len(each.receipts)} of {holders} receipts")
        if each.moved and not session.quiet:
            output.note(f"medshard: {output.files(each.moved)} of the same pack were stored anew first")
        if each.missing and not session.quiet:
            absent = ", ".join(sorted(_names.get(node, node.hex()[:16]) for node in each.missing))
            output.note(f"medshard: no receipt yet from {absent}; they obey when they are back. `medshard certificate` asks them again")
    return Exit.OK


@click.command(
    epilog=examples("medshard certificate 3b1f…", "medshard certificate 3b1f… -o gone.json --pdf gone.pdf", "medshard certificate --all")
)
@click.argument("digest", type=sha256, required=False, metavar="[SHA256]")
@click.option("-o", "--output", "target", type=_json_path, callback=no_pdf, help="Where it goes [SHA256.destroyed.json].")
@click.option("--pdf", type=click.Path(dir_okay=False, path_type=Path), help="Pages to print, with the certificate attached to the PDF.")
@click.option("--all", "everything", is_flag=True, help="List all that this vault has destroyed instead.")
@shared
def certificate(session: Session, digest: bytes | None, target: Path | None, pdf: Path | None, everything: bool) -> int:
    """Write the certificate that a file was destroyed: the entry in the ledger, and what each node has signed.

    Receipts that were missing are asked for again. Whoever gets it checks it with the genesis file: `medshard check-certificate`.
    """
    if everything == (digest is not None):
        raise click.UsageError("name one SHA256, or say --all")
    return run(_list_ended(session) if digest is None else _certificate(session, digest, target, pdf))


async def _list_ended(session: Session) -> int:
    async with session.vault() as vault:
        names: dict[bytes, str] = {node.id: node.name for node in vault.roster.nodes}
        ended = vault.custody.all_ended()
    if session.json:
        output.document({"ended": [_as_json(each, names) for each in ended]})
        return Exit.OK
    for each in ended:
        for _, digest in each.documents:
            output.hashed(digest, b"", f"entry {each.inclusion.index}", f"{len(each.missing)} receipts missing")
    return Exit.OK


async def _certificate(session: Session, digest: bytes, target: Path | None, pdf: Path | None) -> int:
    from medshard import certificate
    from medshard.durable import write_durably

    async with session.vault() as vault:
        data = await _made(vault, digest)
        genesis = vault.home.rosters()[0]
    written: list[Path] = []
    if target is not None or pdf is None:
        target = target or Path(f"{digest.hex()}.destroyed.json")
        write_durably(target, data)
        written.append(target)
    certified = certificate.check(data, genesis)
    if pdf is not None:
        from medshard.certificatepage import page

        write_durably(pdf, page(certified, data, int(time.time())))
        written.append(pdf)
    if session.json:
        output.document({"files": written, "receipts": len(certified.receipts), "missing": certified.missing})
        return Exit.OK
    for path in written:
        output.line(shown(os.fsencode(path)))
    if certified.missing and not session.quiet:
        output.note(f"medshard: no receipt yet from {', '.join(certified.missing)}")
    return Exit.OK


async def _made(vault: Vault, digest: bytes) -> bytes:
    from medshard import certificate

    ended = vault.custody.all_ended(digest)
    if not ended:
        raise Absent("this vault has not destroyed such a file", hint="`medshard certificate --all` lists what it has.")
    newest = await vault.custody.collect(ended[-1].file_id)
    told = certificate.make(newest, vault.home.genesis_sha256(), vault.roster, vault.home.links())
    return json.dumps(told, indent=1).encode() + b"\n"


@click.command(
    "check-certificate",
    epilog=examples("medshard check-certificate gone.json --genesis genesis.medshard", "medshard check-certificate gone.pdf --json"),
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE")
@click.option(
    "--genesis", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The genesis file to trust [your own vault's]."
)
@shared
def check_certificate(session: Session, file: Path, genesis: Path | None) -> int:
    """Check a certificate of destruction offline, from its JSON or its PDF. Needs no vault, only the consortium's genesis file.

    Exit code 0 says that everything holds; 4 that something in it does not, 6 that it is no certificate.
    """
    from medshard import certificate
    from medshard.proofpage import moment
    from medshard_protocol.roster import Roster

    path = genesis or session.home / "genesis.medshard"
    if not path.exists():
        raise Absent("there is no genesis file to check it against", hint="Name one with --genesis FILE.")
    certified = certificate.check(_attached(file), Roster.from_bytes(path.read_bytes()))
    if session.json:
        output.document({"holds": True, **output.plain(certified)})
        return Exit.OK
    word = certificate.words[certified.type]
    output.line(f"{output.counted(len(certified.documents), 'document')} {word} by entry {certified.index} of {certified.origin}")
    output.line(f"published not later than {moment(certified.known_by)}, confirmed by {', '.join(certified.cosigners)}")
    for name, receipt in sorted(zip(certified.nodes, certified.receipts, strict=True), key=lambda pair: pair[0]):
        held = "no shard" if receipt.shard is None else f"shard {receipt.shard}"
        output.line(f"  {name}: {held}, {output.counted(receipt.keys, 'wrapped key')}, {moment(receipt.at)}")
    if certified.missing:
        output.line(f"no receipt from {', '.join(certified.missing)}")
    return Exit.OK


def _attached(path: Path) -> bytes:
    """The certificate in a JSON file, or attached to a PDF. Raises Malformed."""
    from medshard.certificate import bytes_max
    from medshard.certificatepage import certificate_name

    with open(path, "rb") as file:
        data = file.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise Malformed(f"{path}: more than {bytes_max} bytes, which no certificate has")
    if not data.startswith(b"%PDF-"):
        return data
    import pypdf
    from pypdf.errors import PyPdfError

    try:
        found = pypdf.PdfReader(io.BytesIO(data), strict=False).attachments.get(certificate_name)
        if found:
            return bytes(found[0])
    except (PyPdfError, ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError, zlib.error) as error:
        raise Malformed(f"{path}: not a PDF that can be read ({type(error).__name__})") from None
    raise Malformed(f"{path}: a PDF without a certificate attached to it")


def _tell(session: Session, found: list[Kept]) -> int:
    if session.json:
        output.document({"kept": output.plain(found)})
        return Exit.OK
    for each in found:
        columns = [f"until {last_day(each.until)}" if each.until else "no retention", *(f"hold {entry}" for entry in each.holds)]
        columns += [f"entry {each.waiting} waits for a second keeper"] if each.waiting else []
        for digest in each.hashes:
            output.hashed(digest, each.name, *columns)
    return Exit.OK


def _as_json(each: Ended, names: dict[bytes, str]) -> dict[str, Any]:
    return {
        "file": each.file_id.hex(),
        "type": each.type.name.lower(),
        "entry": each.inclusion.index,
        "documents": [{"sha256": digest.hex(), "size": size} for size, digest in each.documents],
        "receipts": len(each.receipts),
        "missing": sorted(names.get(node, node.hex()) for node in each.missing),
        "stored_anew": each.moved,
    }
