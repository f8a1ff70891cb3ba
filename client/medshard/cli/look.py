"""ls, find and info."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, run, sha256, shared, tag
from medshard.model import Info, is_message
from medshard.text import shown

if TYPE_CHECKING:
    from medshard.query import Query

_long = click.option("-l", "--long", is_flag=True, help="With all attributes.")
_everything = click.option("--all", "everything", is_flag=True, help="With messages between vaults, which are stored files, too.")


@click.command(epilog=examples("medshard ls", "medshard ls -l", "medshard ls --shared", "medshard ls --json | jq '.files | length'"))
@_long
@click.option("--shared", "received", is_flag=True, help="What others share with this vault, instead of its own.")
@_everything
@shared
def ls(session: Session, long: bool, received: bool, everything: bool) -> int:
    """List the files: SHA256, size, day, name.

    The list comes from the local index, without asking a node; reindex rebuilds it. What others have shared lately gets into it with
    `medshard shared`. What vaults store for each other, such as shares of a root key and requests, is listed with --all alone.
    """
    from medshard.query import Query

    return run(_list(session, Query(), everything, long=long, own=not received, received=received))


@click.command(
    epilog=examples(
        "medshard find --patient 'doe jane'",
        "medshard find --name '*.pdf' --tag branch=life",
        "medshard find --modality CT --study-date 2024-01..2024-03",
        "medshard find --policy-number 'VN-*' --json",
    )
)
@click.argument("text", required=False, metavar="[NAME]")
@click.option("--name", metavar="TEXT", help="Part of the name, or a pattern with * and ?.")
@click.option("--type", "media_type", metavar="TEXT", help="Part of the media type: dicom, pdf, image/.")
@click.option("--patient", metavar="TEXT", help="Words of the patient's name in any order, or the patient id.")
@click.option("--study-date", metavar="DATE", help="2024-01-31, 2024-01, 2024, or a range: 2024-01..2024-03, 20240101-20240331.")
@click.option("--modality", metavar="TEXT", help="CT, MR, US, …")
@click.option("--policy-number", metavar="TEXT", help="The whole number, or a pattern.")
@click.option("--tag", "tags", multiple=True, type=tag, metavar="NAME=VALUE", help="Your own mark; the value may be a pattern. Repeatable.")
@_long
@_everything
@shared
def find(
    session: Session,
    text: str | None,
    name: str | None,
    media_type: str | None,
    patient: str | None,
    study_date: str | None,
    modality: str | None,
    policy_number: str | None,
    tags: tuple[tuple[str, str], ...],
    long: bool,
    everything: bool,
) -> int:
    """Find files by patient, name, date, policy …

    Every condition given must hold. Case and accents do not matter. Prints what ls prints, and nothing where nothing is found. Files
    that others share with this vault are found too.
    """
    from medshard.query import Query

    if text is not None and name is not None:
        raise click.UsageError("give the name once: as NAME or with --name")
    try:
        query = Query(
            name=name or text,
            media_type=media_type,
            patient=patient,
            study_date=study_date,
            modality=modality,
            policy_number=policy_number,
            tags=dict(tags),
        )
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--study-date") from None
    return run(_list(session, query, everything, long=long))


async def _list(session: Session, query: Query, everything: bool, *, long: bool, own: bool = True, received: bool = True) -> int:
    async with session.vault() as vault:
        found = vault.find(query, own=own, shared=received)
        rows = (row for row in found if everything or not is_message(row.media_type))
        if session.json:
            output.documents("files", rows)
        else:
            for row in rows:
                output.row(row, attributes=long)
    return Exit.OK


@click.command(epilog=examples("medshard info 3b1f…"))
@click.argument("sha256", type=sha256, metavar="SHA256")
@shared
def info(session: Session, sha256: bytes) -> int:
    """Say all there is to say about one file.

    Its code, sizes, holders and whether they are up, its ledger entry, the checkpoint that covers it and who cosigned that.
    """

    async def work() -> Info:
        async with session.vault() as vault:
            return await vault.info(sha256)

    found = run(work())
    if session.json:
        output.document(output.plain(found))
    else:
        _tell(found)
    return Exit.OK


def _tell(info: Info) -> None:
    row = info.row
    up = sum(node.state == "up" for node in info.nodes)
    plain = max(1, info.pack_size or row.size)
    pack = f" (member {row.member} of a pack of {info.pack_members} files, {output.size(info.pack_size or 0)})" if info.pack_members else ""
    lines = {
        "sha256": row.sha256.hex(),
        "name": shown(row.name) + pack,
        "size": f"{row.size:,} bytes, {row.media_type}",
        "put": output.day(row.put_time),
        "code": f"any {info.k} of {info.n} shards; {info.n - info.k} nodes may be lost",
        "stored": f"{info.stored_bytes:,} bytes on {info.n} nodes, {info.stored_bytes / plain:.2f} times the plain size",
        "file id": row.file_id.hex(),
        "manifest": info.manifest_sha256.hex(),
        **({"owner": row.owner.hex()} if row.owner else {}),
        "ledger": f"entry {info.ledger_index} of {info.tree_size}, inclusion proven",
        "cosigned by": ", ".join(info.cosigners),
    }
    for name, text in lines.items():
        output.line(f"{name + ':':<13}{text}")
    for key, value in sorted(row.attributes.items()):
        output.line(f"  {key}: {value}")
    output.line(f"holders: {up} of {info.n} up, {info.k} needed")
    for node in info.nodes:
        detail = f"  {node.detail}" if node.detail else ""
        output.line(f"  shard {node.shard:>3}  {node.state:<4}  {output.holder(node.node, node.institution)} {node.url}{detail}")
    output.line("checkpoint:")
    for text in info.checkpoint.rstrip("\n").split("\n"):
        output.line(f"  {text}")
