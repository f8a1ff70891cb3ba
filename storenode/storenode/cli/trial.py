"""The command for a trial: a whole consortium on one machine."""

from __future__ import annotations

from pathlib import Path

import click

from medshard_protocol.errors import Malformed
from storenode.cli.options import Session, shared, size


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), metavar="DIR")
@click.option("--institutions", type=int, default=6, show_default=True, help="How many institutions, with a node each.")
@click.option("--code", metavar="K/N[/W]", help="Default code of the consortium [by the number of institutions].")
@click.option("--base-port", type=int, help="First of the ports on 127.0.0.1 [free ones].")
@click.option("--capacity", default="100GB", show_default=True, callback=size, help="Most that each node stores.")
@click.option("--invite", "with_invite", is_flag=True, help="Make an invitation by the first institution too.")
@click.option("--emergency", "emergency", multiple=True, metavar="KEY", help="This identity may read while the ledger is out of reach.")
@click.option("--auditors", type=click.Path(dir_okay=False, exists=True, path_type=Path), help="File with the auditors' public key.")
@shared
def consortium(
    session: Session,
    folder: Path,
    institutions: int,
    code: str | None,
    base_port: int | None,
    capacity: int,
    with_invite: bool,
    emergency: tuple[str, ...],
    auditors: Path | None,
) -> None:
    """Lay out a whole consortium in DIR, for a trial on this machine. It starts nothing; `medshard up` does both.

    Never put real data in: one folder holds the keys of every institution. Asked again for the same, it changes nothing.

    \b
    Examples:
      storenode consortium /tmp/trial
      storenode consortium /tmp/trial --institutions 16 --code 10/16 --json
      storenode --home /tmp/trial/nodes/hospital-01 run
    """
    from medshard_protocol.ids import key_from_hex
    from storenode.consortium import invite_code, lay_out
    from storenode.genesis import parse_code

    layout = lay_out(
        folder,
        institutions,
        code=parse_code(code) if code else None,
        capacity=capacity,
        base_port=base_port,
        emergency=[key_from_hex(text) for text in emergency],
        auditors=_public_key(auditors) if auditors else b"",
    )
    roster = layout.roster
    k, n, w = roster.code
    document: dict[str, object] = {
        "folder": str(layout.folder),
        "created": layout.created,
        "genesis": str(layout.genesis),
        "genesis_sha256": roster.sha256.hex(),
        "origin": roster.origin,
        "code": {"k": k, "n": n, "w": w},
        "sequencer": roster.node(roster.sequencer).name,
        "nodes": [
            {
                "name": node.name,
                "id": node.id.hex(),
                "institution": roster.institutions[node.institution].name,
                "url": node.url,
                "home": str(layout.home(node.name)),
            }
            for node in roster.nodes
        ],
    }
    if with_invite:
        document["invite"] = invite_code(layout)
    lines = [f"{node.name}  {node.url}  {layout.home(node.name)}" for node in roster.nodes]
    session.tell(document, *lines, *([str(document["invite"])] if with_invite else []))
    first = roster.nodes[0].name
    session.note("", "Start each node:", f"  storenode --home {layout.home(first)} run")


def _public_key(path: Path) -> bytes:
    from medshard_protocol.roster import auditors_key_size

    text = path.read_text(encoding="ascii", errors="replace").strip()
    if len(text) != 2 * auditors_key_size or not all(digit in "0123456789abcdef" for digit in text):
        raise Malformed(f"{path} holds no public key", hint="`medshard auditor-key create` prints one")
    return bytes.fromhex(text)
