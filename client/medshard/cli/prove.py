"""prove and check-proof."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, no_pdf, run, sha256, shared
from medshard.text import shown

if TYPE_CHECKING:
    from medshard.prooffile import Verdict

_target = click.Path(dir_okay=False, path_type=Path)
_file = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(
    epilog=examples(
        "medshard prove 3b1f… -o policy.tlog-proof", "medshard prove 3b1f… --pdf policy-proof.pdf", "medshard prove 3b1f… -o - | less"
    )
)
@click.argument("digest", type=sha256, metavar="SHA256")
@click.option("-o", "--output", "target", type=_target, callback=no_pdf, help="Where the proof goes [SHA256.tlog-proof].")
@click.option("--pdf", type=_target, help="A page to print, with the proof attached to the PDF.")
@shared
def prove(session: Session, digest: bytes, target: Path | None, pdf: Path | None) -> int:
    """Make a proof that anybody can check offline: this document was registered, by this vault, in this consortium's ledger.

    The proof shows that one document's SHA-256 and size, when it was registered at the latest, and the institution that vouches for
    the vault's key. It gives away no other file, no name and no key. Whoever gets it needs the genesis file and `medshard check-proof`.
    """
    return run(_prove(session, digest, target, pdf))


async def _prove(session: Session, digest: bytes, target: Path | None, pdf: Path | None) -> int:
    from medshard.durable import write_durably

    async with session.vault() as vault:
        proof, proven = await vault.prove(digest)
        genesis = vault.home.genesis.read_bytes()
    data = proof.to_bytes()
    if target is not None and str(target) == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        return Exit.OK
    written: list[Path] = []
    if target is not None or pdf is None:
        target = target or Path(f"{digest.hex()}.tlog-proof")
        write_durably(target, data)
        written.append(target)
    if pdf is not None:
        from medshard.proofpage import page

        write_durably(pdf, page(proven, data, genesis, int(time.time())))
        written.append(pdf)
    document = {"files": written, "bytes": len(data), **_facts(proven)}
    if session.json:
        output.document(document)
        return Exit.OK
    for path in written:
        output.line(shown(os.fsencode(path)))
    if not session.quiet:
        who = ", ".join(sorted({each.institution for each in proven.cosigned}))
        output.note(f"It proves that the document was registered not later than {_moment(proven.known_by)}, by the clocks of {who}.")
    return Exit.OK


def _hash(context: click.Context, parameter: click.Parameter, value: str | None) -> bytes | None:
    if value is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value.strip()):
        raise click.BadParameter("expected 64 hexadecimal digits")
    return bytes.fromhex(value.strip())


@click.command(
    "check-proof",
    epilog=examples(
        "medshard check-proof policy.tlog-proof policy.pdf --genesis genesis.medshard",
        "medshard check-proof page.pdf policy.pdf --genesis-sha256 9f86…",
        "medshard check-proof policy.tlog-proof policy.pdf --genesis genesis.medshard --tsa-ca tsa.pem",
    ),
)
@click.argument("proof", type=_file, metavar="FILE")
@click.argument("document", type=_file, required=False)
@click.option("--genesis", type=_file, help="The genesis file to trust [that of your own vault].")
@click.option("--genesis-sha256", "pinned", callback=_hash, metavar="HEX", help="What its SHA-256 must be; enough for a PDF page.")
@click.option("--tsa-ca", "certificates", type=_file, help="PEM: the timestamp authority's certificate and those above it.")
@shared
def check_proof(
    session: Session, proof: Path, document: Path | None, genesis: Path | None, pinned: bytes | None, certificates: Path | None
) -> int:
    """Check a proof offline. Needs no vault and no network, only the consortium's genesis file.

    FILE is what `medshard prove` wrote, a text or a PDF page. With DOCUMENT, its bytes are compared too. Exit code 0 says that
    everything holds; 4 that something in it does not, 6 that it is no proof.
    """
    from medshard import prooffile

    handed = prooffile.read(proof)
    roster = prooffile.trusted(handed, genesis, pinned, session.home / "genesis.medshard")
    verdict = prooffile.check(handed, roster, document, certificates)
    if session.json:
        output.document(_as_json(verdict))
        return Exit.OK
    for text in _in_words(verdict):
        output.line(text)
    return Exit.OK


def _facts(proven: Any) -> dict[str, Any]:
    return {
        "sha256": proven.sha256.hex(),
        "size": proven.size,
        "file_id": proven.file_id.hex(),
        "origin": proven.origin,
        "index": proven.index,
        "log_size": proven.log_size,
        "owner": proven.owner.hex(),
        "institution": proven.institution,
        "known_by": _moment(proven.known_by),
        "genesis_sha256": proven.genesis_sha256.hex(),
        "roster": proven.roster_number,
        "cosigned": [{"institution": each.institution, "node": each.node, "time": _moment(each.time)} for each in proven.cosigned],
        "cosigned_ml_dsa": [
            {"institution": each.institution, "node": each.node, "time": _moment(each.time)} for each in proven.cosigned_pq
        ],
    }


def _as_json(verdict: Verdict) -> dict[str, Any]:
    stamped = verdict.stamped
    return {
        "holds": True,
        **_facts(verdict.proven),
        "document": verdict.document,
        "timestamp": None if stamped is None else {"authority": stamped.authority, "time": stamped.time.isoformat()},
        "timestamp_unchecked": verdict.stamp_unchecked,
    }


def _in_words(verdict: Verdict) -> list[str]:
    proven = verdict.proven
    what = (
        f"{shown(os.fsencode(verdict.document))} is the document"
        if verdict.document
        else "There is a document (name it to have its bytes compared)"
    )
    institutions = sorted({each.institution for each in proven.cosigned} & {each.institution for each in proven.cosigned_pq})
    lines = [
        "The proof holds.",
        f"  what      {what}: SHA-256 {proven.sha256.hex()}, {proven.size} bytes",
        f"  by whom   registered by the key {proven.owner.hex()}",
        f"            for which {proven.institution} vouches (entry {proven.enrolled_at})",
        f"  where     entry {proven.index} of the ledger {proven.origin}, which had {proven.log_size} entries",
        f"  when      not later than {_moment(proven.known_by)}, by the cosigners' clocks",
    ]
    if verdict.stamped is not None:
        when = verdict.stamped.time.strftime("%Y-%m-%dT%H:%M:%SZ")
        lines.append(f"            and not later than {when}, says {verdict.stamped.authority}")
    elif verdict.stamp_unchecked:
        lines.append("            there is a timestamp of an outside authority too, not checked: name its certificates with --tsa-ca")
    lines += [
        f"  confirmed by {', '.join(institutions)}, each with both kinds of key",
        f"  trusting  the genesis file {proven.genesis_sha256.hex()}",
        "Not shown: that the document is still stored, that it is true, or that the key was not withdrawn later.",
    ]
    return lines


def _moment(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
