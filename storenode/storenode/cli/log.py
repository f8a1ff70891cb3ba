"""Commands for the log as files: export, verify."""

from __future__ import annotations

import http.client
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medshard_protocol.errors import Absent, Malformed
from storenode.cli.options import Session, shared

if TYPE_CHECKING:
    from medshard_protocol.roster import Node, Roster
    from medshard_protocol.rosters import Link
    from medshard_protocol.succession import Successor
    from storenode.logtool.source import Source

    Files = tuple[Path, Path]

folder = click.Path(file_okay=False, path_type=Path)
document = click.Path(exists=True, dir_okay=False, path_type=Path)


def identity(command: Callable[..., object]) -> Callable[..., object]:
    """Options that say as whom a node is asked."""
    key = click.option("--key", type=document, help="Its private key (PEM).")
    certificate = click.option(
        "--certificate", type=document, help="Certificate (PEM) of an identity that an institution vouches for [this home's node's]."
    )
    return certificate(key(command))


@click.group()
def log() -> None:
    """Write the whole ledger out as static files, or check such files from the first entry to the last."""


@log.command("export")
@click.argument("target", metavar="DIR", type=folder)
@click.option("--from", "url", metavar="URL", help="Take it from there, such as https://node:9700/log, instead of this home's node.")
@click.option("--genesis", "genesis_file", type=document, help="With --from: the genesis file to trust; else that of this home.")
@identity
@shared
def export_command(
    session: Session, target: Path, url: str | None, genesis_file: Path | None, certificate: Path | None, key: Path | None
) -> None:
    """Write the published log to DIR: checkpoint, hash tiles and entries at their C2SP paths, for any web server.

    Run it again to bring DIR up to date: what is there already is not written twice. Without --from it reads the database of this
    home's node, SQLite or PostgreSQL, beside the node whether it runs or not. With --from and --genesis it needs no node here.

    \b
    Examples:
      storenode log export /srv/www/log
      storenode log export /srv/www/log --from https://node.hospital-02.example:9700/log
      storenode log export copy --from https://node.hospital-02.example:9700/log --genesis genesis.medshard \\
          --certificate auditor.crt --key auditor.key
    """
    from storenode.logtool.export import export
    from storenode.logtool.source import Database

    if genesis_file is not None and url is None:
        raise click.UsageError("--genesis goes with --from: this home's node has its own genesis file")
    files = _files(session, certificate, key)
    with ExitStack() as stack:
        if url is None:
            source, genesis, links, before = _beside(session, stack)
        else:
            genesis, links, _ = _trusted_from(session, url, genesis_file, files)
            source, before = _web(url, genesis, files), _before_from(session, url, genesis, files)
        done = export(source, target, genesis, links, _progress(session, "copied"), before=before)
    more = source.later if isinstance(source, Database) else 0
    told = {"size": done.size, "files": done.files_new, "both_kinds": done.full, "folder": str(target), "later": more}
    kinds = "both kinds of cosignature" if done.full else "Ed25519 cosignatures only; ask again when all nodes answer"
    lines = [f"{done.size} entries in {target}, {done.files_new} files new; the checkpoint carries {kinds}"]
    if more:
        lines.append(f"{more} newer entries have one kind of cosignature so far: run this again in a minute")
    session.tell(told, *lines)


@log.command("verify")
@click.argument("place", metavar="DIR|URL")
@click.option("--genesis", "genesis_file", type=document, help="The genesis file to trust; else that of this home.")
@click.option("--processes", type=click.IntRange(1, 256), help="How many processes check signatures; one for each core if not given.")
@identity
@shared
def verify_command(
    session: Session, place: str, genesis_file: Path | None, processes: int | None, certificate: Path | None, key: Path | None
) -> None:
    """Check a whole log: every entry, every hash of every tile, every author's signature, and the quorum under its root.

    Needs no node. A log at a URL is fetched into a temporary folder first. Without a genesis file of your own it says which one it
    went by: compare that SHA-256 with what an institution tells you. A node is asked with the certificate that is named, or this home's
    node's; one that shows its log to everybody (`[ledger] public`) needs none.

    \b
    Examples:
      storenode log verify /srv/www/log --genesis genesis.medshard
      storenode log verify https://log.hospital-02.example/ --genesis genesis.medshard --json
      storenode log verify https://node.hospital-02.example:9700/log --genesis genesis.medshard --certificate auditor.crt --key auditor.key
    """
    from medshard_protocol.roster import Roster
    from storenode.logtool.audit import audit
    from storenode.logtool.export import documents, export, read_before, read_rosters
    from storenode.logtool.source import Folder

    with ExitStack() as stack:
        if "://" in place:
            where = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="medshard-log-")))
            files = _files(session, certificate, key)
            genesis, links, pinned = _trusted_from(session, place, genesis_file, files)
            before = _before_from(session, place, genesis, files)
            export(_web(place, genesis, files), where, genesis, links, _progress(session, "fetched"), before=before)
        else:
            where = Path(place)
            genesis, links = read_rosters(where)
            trusted = _trusted(session, genesis_file)
            pinned = trusted is not None
            genesis = trusted or genesis
            before = read_before(Folder(where), genesis)
        line = [Roster.from_bytes(document.before) for document in before]
        began = time.monotonic()
        report = audit(where, genesis, documents(links, before), line, processes=processes, progress=_progress(session, "checked"))
    took = time.monotonic() - began
    shown: dict[str, Any] = {
        "origin": report.origin,
        "size": report.size,
        "root": report.root.hex(),
        "genesis_sha256": report.genesis_sha256.hex(),
        "genesis_pinned": pinned,
        "entries": dict(report.counts),
        "without_effect": report.void,
        "unsigned": report.unsigned,
        "first_without_effect": [index for index, _ in report.void_named],
        "rosters": [{"number": number, "decided_by": index} for index, number in report.rosters],
        "cosigned": {name: _moment(at) for name, at in report.cosigned.items()},
        "cosigned_ml_dsa": {name: _moment(at) for name, at in report.cosigned_pq.items()},
        "both_kinds": report.pq_quorum,
        "frozen_by": report.frozen[0] if report.frozen else None,
        "seconds": round(took, 1),
    }
    counts = ", ".join(f"{count} {name}" for name, count in sorted(report.counts.items()))
    changes = "; ".join(f"roster {number} from entry {index + 1}" for index, number in report.rosters) or "none"
    lines = [
        f"log          {report.origin}: {report.size} entries, whole",
        f"root         {report.root.hex()}",
        f"entries      {counts}",
        f"no effect    {report.void}, of which {report.unsigned} are malformed or not signed by their authors",
        f"rosters      genesis {report.genesis_sha256.hex()}{'' if pinned else ' (taken from the log itself: NOT PINNED)'}",
        f"             changes: {changes}",
        f"cosigned     {', '.join(report.cosigned)}; with ML-DSA keys {', '.join(report.cosigned_pq) or 'nobody'}",
    ]
    if report.frozen:
        lines.append(f"ended        with entry {report.frozen[0]}; successor {report.frozen[1].hex()}")
    session.tell(shown, *lines)
    session.note(f"checked in {took:.1f} s")


def _trusted(session: Session, genesis_file: Path | None) -> Roster | None:
    """The genesis file that the user trusts, if any."""
    from medshard_protocol.roster import Roster
    from storenode.genesis import load_genesis

    if genesis_file is not None:
        return Roster.from_bytes(genesis_file.read_bytes())
    try:
        return load_genesis(session.home)
    except (Absent, Malformed):
        return None


def _own_links(session: Session, genesis: Roster | None) -> Sequence[Link]:
    """The changes of the roster that this home's node has followed, if there is one of this log."""
    from storenode.config import Config
    from storenode.genesis import load_genesis
    from storenode.membership import Membership

    try:
        config, own = Config.load(session.home), load_genesis(session.home)
    except (Absent, Malformed):
        return ()
    return Membership(config.data, own, sync=False).links(0) if genesis is None or genesis == own else ()


def _beside(session: Session, stack: ExitStack) -> tuple[Source, Roster, Sequence[Link], Sequence[Successor]]:
    """The log in the database of this home's node, its genesis file and what followed and preceded it."""
    from storenode.config import Config
    from storenode.genesis import load_genesis
    from storenode.ledger.engine import open_reader
    from storenode.logtool.source import Database
    from storenode.membership import Membership, log_folder

    genesis, config = load_genesis(session.home), Config.load(session.home)
    membership, at = Membership(config.data, genesis, sync=False), log_folder(config.data, genesis)
    reader = stack.enter_context(closing(open_reader(config.ledger_engine, at, len(genesis.before))))
    return Database(reader, at), genesis, membership.links(0), [document for _, document in membership.successions]


def _files(session: Session, certificate: Path | None, key: Path | None) -> Files | None:
    """As whom a node is asked: as the user says, as this home's node, or as nobody."""
    if (certificate is None) != (key is None):
        raise click.UsageError("--certificate and --key go together")
    if certificate is not None and key is not None:
        return certificate, key
    own = session.home / "keys"
    return (own / "node.crt", own / "node.key") if (own / "node.key").exists() else None


def _trusted_from(session: Session, url: str, genesis_file: Path | None, files: Files | None) -> tuple[Roster, Sequence[Link], bool]:
    """Genesis file and chain for a log on the web: the user's own file, with what lies beside the log there or its node tells."""
    from medshard_protocol.roster import Roster
    from medshard_protocol.rosters import unpack_links
    from storenode.logtool.export import genesis_name, rosters_name

    trusted = _trusted(session, genesis_file)
    source = _web(url, trusted, files)
    try:
        links: Sequence[Link] = unpack_links(source.read(rosters_name))
    except Absent:  # a node's /log has the C2SP files and no others
        links = _own_links(session, trusted) or _told_links(url, trusted, files)
    if trusted is not None:
        return trusted, links, True
    return Roster.from_bytes(source.read(genesis_name)), links, False


def _told_links(url: str, genesis: Roster | None, files: Files | None) -> Sequence[Link]:
    """The changes of the roster as the node at this URL tells them."""
    from medshard_protocol.rosters import unpack_links

    links: list[Link] = []
    node = _node_at(url, genesis)
    while node is not None and genesis is not None:
        path = f"v1/rosters?after={len(links)}&of={genesis.sha256.hex()}"
        more = unpack_links(_web(node.url + "/", genesis, files).read(path))
        links += more
        if not more:
            break
    return links


def _before_from(session: Session, url: str, genesis: Roster, files: Files | None) -> Sequence[Successor]:
    """How it came from the logs before: of this home, from beside the log, or as its node tells."""
    from medshard_protocol.succession import Successor, successor_path
    from storenode.config import Config
    from storenode.logtool.export import read_before
    from storenode.membership import read_successions

    if not genesis.before:
        return ()
    try:
        return [document for _, document in read_successions(Config.load(session.home).data, genesis)]
    except (Absent, Malformed):
        node = _node_at(url, genesis)
    if node is None:
        return read_before(_web(url, genesis, files), genesis)
    web = _web(node.url + "/", genesis, files)
    return [Successor.from_bytes(web.read(f"{successor_path[1:]}?of={each.genesis.hex()}")) for each in genesis.before]


def _node_at(url: str, roster: Roster | None) -> Node | None:
    return next((each for each in roster.nodes if url.startswith(each.url + "/")), None) if roster else None


def _web(url: str, roster: Roster | None, files: Files | None) -> Source:
    """A log on the web. A node of the roster is asked over the consortium's own TLS."""
    from storenode.asking import connect
    from storenode.logtool.source import Web

    node = _node_at(url, roster)
    if node is None or roster is None:
        return Web(url)

    def open_connection(host: str, port: int) -> http.client.HTTPConnection:
        return connect(node, roster, files)

    return Web(url, open_connection, node=True)


def _progress(session: Session, verb: str) -> Callable[[int, int], None]:
    shown = 0.0

    def tell(done: int, of: int) -> None:
        nonlocal shown
        if session.json or not sys.stderr.isatty() or (time.monotonic() - shown < 0.2 and done < of):
            return
        shown = time.monotonic()
        sys.stderr.write(f"\r{verb} {done} of {of}" + ("\n" if done == of else ""))

    return tell


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
