"""gateway, import and receipt: the department's door to the store."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.gatewaytoken import token
from medshard.cli.options import Session, dicom_index, examples, run, shared

if TYPE_CHECKING:
    from medshard.gateway.importing import Imported
    from medshard.gateway.model import Receipt
    from medshard.gateway.service import Settings
    from medshard.gateway.web import WebRules


def _from_file(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Let a file say what flags leave unsaid."""
    if path is None:
        return
    from medshard.gateway.settings import read_file

    found = read_file(path)
    known = {each.name for each in context.command.params}
    if unknown := sorted(key.replace("_", "-") for key in found if key not in known):
        raise click.BadParameter(f"{path}: {', '.join(unknown)} is not known; `medshard gateway --help` lists the names")
    context.default_map = found


@click.group(
    invoke_without_command=True,
    epilog=examples(
        "medshard gateway                                             # this machine alone may send",
        "medshard gateway --peer PACS=127.0.0.1:4242 --calling CT01",
        "echoscu -aec MEDSHARD 127.0.0.1 11112 && storescu -aec MEDSHARD 127.0.0.1 11112 +sd study/",
        "curl http://127.0.0.1:8042/dicom-web/studies?PatientName=doe*",
        "medshard gateway --viewer ohif/dist                          # then open http://127.0.0.1:8042/",
        "medshard gateway --index 'postgresql://gateway@db.example/medshard?sslmode=verify-full&sslrootcert=ca.pem'  # several gateways",
        "medshard gateway token add viewer                            # from now on DICOMweb wants a token",
        "medshard --home /srv/ct gateway --calling CT01               # a sender's home: takes in, and gives nothing back",
        "curl http://127.0.0.1:8043/status",
        "medshard receipt 1.2.840.113…                                # SHA-256, file id and ledger index",
    ),
)
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), is_eager=True, expose_value=False, callback=_from_file,
              metavar="FILE", help="Settings in TOML: keys as these flags, and [[peers]].")  # fmt: skip
@click.option("--dir", "dir", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="For the spool [HOME/gateway].")
@click.option(
    "--dimse", metavar="HOST:PORT", default="127.0.0.1:11112", show_default=True, help="Where the DICOM node listens; 'off' for none."
)
@click.option("--title", default="MEDSHARD", show_default=True, metavar="AE", help="AE title of this node.")
@click.option("--any-called", is_flag=True, help="Answer whatever AE title is called.")
@click.option("--calling", multiple=True, metavar="AE", help="An AE title that may call. Repeatable; peers may as well.")
@click.option("--any-calling", is_flag=True, help="Anybody may call. Only on 127.0.0.1.")
@click.option(
    "--peer", "peers", multiple=True, metavar="AE=HOST:PORT", help="A node that C-MOVE and commitment reports may go to. Repeatable."
)
@click.option(
    "--private-class", "private_class", multiple=True, metavar="UID", help="A private SOP class to store; '*' for all. Repeatable."
)
@click.option("--tls-cert", type=click.Path(path_type=Path), metavar="FILE", help="PEM certificate for DICOM over TLS.")
@click.option("--tls-key", type=click.Path(path_type=Path), metavar="FILE", help="Its key.")
@click.option("--tls-peers", type=click.Path(path_type=Path), metavar="FILE", help="CA of the peers' certificates; each has to show one.")
@click.option("--same-uid", type=click.Choice(("keep-both", "refuse")), default="keep-both", show_default=True,
              help="What to do with other bytes under a SOP Instance UID that is stored.")  # fmt: skip
@click.option("--quiet-time", type=click.FloatRange(0.1, 3600), default=15.0, show_default=True, metavar="SECONDS",
              help="A series to which nothing came for so long is complete.")  # fmt: skip
@click.option(
    "--spool-size", default="20GiB", show_default=True, metavar="SIZE", help="What may wait for the nodes; more is answered with A700."
)
@click.option("--associations", type=click.IntRange(1, 1000), default=64, show_default=True, help="How many at a time.")
@click.option("--http", metavar="HOST:PORT", default="127.0.0.1:8042", show_default=True, help="Where DICOMweb listens; 'off' for none.")
@click.option("--http-cert", type=click.Path(path_type=Path), metavar="FILE", help="PEM certificate for HTTPS.")
@click.option("--http-key", type=click.Path(path_type=Path), metavar="FILE", help="Its key.")
@click.option("--http-client-ca", type=click.Path(path_type=Path), metavar="FILE", help="CA of the clients' certificates; each shows one.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Pages from there may use DICOMweb. Repeatable.")
@click.option(
    "--viewer", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="A built viewer, such as OHIF's dist, served at /."
)
@click.option("--base-url", default="", metavar="URL", help="How clients call /dicom-web, where a proxy stands in front.")
@click.option("--cache-size", default="10GiB", show_default=True, metavar="SIZE", help="For what was read lately, encrypted, in DIR.")
@dicom_index
@click.option("--status", metavar="HOST:PORT", default="127.0.0.1:8043", show_default=True, help="Status and metrics; 'off' for none.")
@shared
def gateway(session: Session, **flags: Any) -> int:
    """Be a DICOM archive for scanners, PACS and viewers.

    Runs in the foreground. What is sent with C-STORE is on this machine's disk, encrypted and fsynced, before it is answered. Each
    series becomes one sealed object in the store when its sender has gone, when a storage commitment is asked for, or when nothing
    more has come for a while. Queries (C-FIND) are answered from an index that is encrypted at rest; C-MOVE and C-GET send what is
    stored, byte for byte, and every retrieval is in the ledger first. DICOMweb does the same over HTTP, at /dicom-web.

    On the home of a sender (`medshard sender new`) it stores for the sender's vault, and refuses whoever wants to read.

    SIGTERM ends it in good order: running messages are finished, and what waits is stored if the nodes take it within a minute. What
    is left in the spool is stored after the next start. Log lines are JSON on standard error and name no patient.
    """
    if click.get_current_context().invoked_subcommand is not None:
        return Exit.OK
    import logging

    from medshard.gateway.service import JsonLines, serve
    from medshard.home import Home

    if Home(session.home).sender.exists() and (flags["viewer"] or flags["index"]):
        raise click.UsageError(f"{session.home} only sends: it has no index and shows nothing, so --viewer and --index mean nothing there")
    settings = _settings(session, **flags)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    log = logging.getLogger("medshard.gateway")
    log.addHandler(handler)
    log.setLevel(logging.WARNING if session.quiet else logging.INFO)

    async def work() -> None:
        async with session.storing() as source:
            await serve(source, settings)

    run(work())
    return Exit.OK


def _settings(session: Session, **flags: Any) -> Settings:
    from medshard.gateway import settings
    from medshard.gateway.intake import Rules
    from medshard.gateway.service import Settings, check_status

    tls = None
    given = [flags["tls_cert"], flags["tls_key"], flags["tls_peers"]]
    if any(given):
        if not all(given):
            raise click.UsageError("--tls-cert, --tls-key and --tls-peers belong together")
        tls = settings.TlsFiles(*map(Path, given))
    dimse = None
    if flags["dimse"] != "off":
        dimse = settings.listening(
            flags["dimse"],
            flags["title"],
            calling=flags["calling"],
            any_calling=flags["any_calling"],
            any_called=flags["any_called"],
            peers=map(settings.peer, flags["peers"]),
            private=flags["private_class"],
            associations_max=flags["associations"],
            tls=tls,
        )
    return Settings(
        folder=flags["dir"] or session.home / "gateway",
        spool_bytes_max=settings.size(flags["spool_size"]),
        rules=Rules(keep_both=flags["same_uid"] == "keep-both", quiet_s=flags["quiet_time"]),
        dimse=dimse,
        web=None if flags["http"] == "off" else _web(session, **flags),
        cache_bytes_max=settings.size(flags["cache_size"]),
        index=flags["index"],
        status=None if flags["status"] == "off" else check_status(settings.address(flags["status"])),
    )


def _web(session: Session, **flags: Any) -> WebRules:
    from medshard.gateway import settings, web
    from medshard.gateway.tokens import tokens_file

    rules = web.WebRules(
        *settings.address(flags["http"]),
        tokens_file(flags["dir"] or session.home / "gateway"),
        certificate=flags["http_cert"],
        key=flags["http_key"],
        client_ca=flags["http_client_ca"],
        cors=tuple(flags["cors"]),
        viewer=flags["viewer"],
        base_url=flags["base_url"].rstrip("/"),
    )
    web.check(rules)
    return rules


gateway.add_command(token)


@click.command(epilog=examples("medshard receipt 1.2.840.113619.2.5.1762583153…", "medshard receipt --json 1.2.840…"))
@click.argument("sop_uid", metavar="SOP_UID")
@dicom_index
@shared
def receipt(session: Session, sop_uid: str, index: str) -> int:
    """Show what proves that a DICOM instance is stored.

    Its SHA-256, the file that it lies in, and that file's place in the ledger. The SHA-256 is that of the file as it was imported or
    came by STOW-RS; of what came by C-STORE, that of the data set behind the head that docs/dicom-conformance.md describes.
    `medshard prove SHA256` makes a proof for outsiders from it.
    """

    async def work() -> Receipt:
        from medshard.gateway.receipts import look_up

        async with session.vault() as vault:
            return await look_up(vault, sop_uid, index)

    found = run(work())
    if session.json:
        output.document(output.plain(found))
    else:
        output.line(f"{found.sha256.hex()}  {found.sop_uid}")
        output.line(f"  in file {found.file_id.hex()}, ledger index {found.ledger_index}")
        if found.flagged:
            output.line("  other bytes were sent under this UID too; both are kept, these are served")
    return Exit.OK


@click.command(
    "import",
    epilog=examples(
        "medshard import /media/cdrom/DICOMDIR",
        "medshard import studies/ old-archive.zip > imported.sha256",
        "medshard import --watch --delete /srv/drop",
    ),
)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True), metavar="PATH...")
@click.option("--watch", is_flag=True, help="Go on for ever with what is put into one folder.")
@click.option("--delete", is_flag=True, help="With --watch: remove a file once it is in the store.")
@click.option("--same-uid", type=click.Choice(("keep-both", "refuse")), default="keep-both", show_default=True,
              help="What to do with other bytes under a SOP Instance UID that is stored.")  # fmt: skip
@dicom_index
@shared
def import_files(session: Session, paths: tuple[Path, ...], watch: bool, delete: bool, same_uid: str, index: str) -> int:
    """Import DICOM files from folders, ZIP archives and media with a DICOMDIR; print SHA256 PATH.

    A series becomes one sealed object. Files are kept bit for bit. A line is printed when a file is safe, as with `medshard put`, or
    was so before. What is no DICOM instance is refused, named on standard error with the reason, and stops none of the others. An
    import that broke off can be run again: it goes on. A gateway that runs shows what was imported within seconds.
    """
    if watch and (len(paths) != 1 or not paths[0].is_dir()):
        raise click.UsageError("--watch takes one folder")
    if delete and not watch:
        raise click.UsageError("--delete belongs to --watch")
    told: list[Imported] = []

    def tell(each: Imported) -> None:
        if not watch:
            told.append(each)
        if not session.json:
            _tell_imported(session, each)

    async def work() -> None:
        from medshard.gateway.indexing import catalog_of

        async with session.vault() as vault, catalog_of(vault, index) as catalog:
            from medshard.gateway.importing import Importer

            importer = Importer(vault, catalog, keep_both=same_uid == "keep-both")
            if watch:
                await importer.watch(paths[0], tell, delete=delete)
            else:
                await importer.run(paths, tell)

    run(work())
    if session.json:
        output.document({"files": output.plain(told)})
    refused = sum(each.outcome == "refused" for each in told)
    if not refused:
        return Exit.OK
    return Exit.PARTIAL if refused < len(told) else Exit.LOCAL


def _tell_imported(session: Session, each: Imported) -> None:
    if each.outcome == "refused":
        output.problem(f"{each.path}: refused: {each.reason}")
        return
    output.hashed(each.sha256, os.fsencode(each.path))
    sys.stdout.flush()
    if each.outcome == "kept-beside" and not session.quiet:
        output.note(f"{each.path}: other bytes are stored under its SOP Instance UID; both are kept, this file is served")
