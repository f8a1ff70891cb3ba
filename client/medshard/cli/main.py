"""The one ``main``: builds the command, runs it, and turns every error into a sentence, a hint and an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from medshard.cli import (
    check,
    consents,
    custody,
    deidentify,
    export,
    gateway,
    history,
    keys,
    links,
    local,
    look,
    output,
    policy,
    proposals,
    prove,
    report,
    rotation,
    sharing,
    store,
)
from medshard.cli.exits import Exit, exit_of, explain
from medshard.cli.options import Session, Unread, examples
from medshard_protocol.errors import MedshardError


class _InOrder(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of their sections."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Section by section."""
        room = 2 * (formatter.width - 6 - max(map(len, self.commands)))  # two lines rather than half a sentence
        for title, parts in _sections.items():
            with formatter.section(title):
                formatter.write_dl([(part.name or "", part.get_short_help_str(room)) for part in parts], col_max=20)


@click.group(
    cls=_InOrder,
    epilog=examples(
        "medshard demo                       # all of it, in under a minute",
        "medshard up --dir /tmp/trial        # a consortium on this machine",
        "export MEDSHARD_HOME=/tmp/trial/vault",
        "medshard put scan.dcm policy.pdf    # prints SHA256  PATH",
        "medshard get 3b1f… -o back.dcm",
    ),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--home", type=click.Path(file_okay=False, path_type=Path), envvar="MEDSHARD_HOME", help="Folder of the vault [~/.medshard].")
@click.option("--json", is_flag=True, help="Write one JSON document instead of text.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks, only results and errors.")
@click.version_option(package_name="medshard", message="medshard %(version)s")
@click.pass_context
def command(context: click.Context, home: Path | None, json: bool, quiet: bool) -> None:
    """Keep medical images and insurance policies on nodes that nobody has to trust, and get each back by its SHA-256."""
    context.obj = Session(home or Path.home() / ".medshard", json, quiet)


# In the order a newcomer needs them.
_sections: dict[str, tuple[click.Command, ...]] = {
    "Start here": (local.demo, local.up, local.join),
    "Files": (store.put, store.get, look.ls, look.find, look.info, check.verify, check.doctor, check.reindex),
    "Sharing": (
        sharing.share,
        sharing.revoke,
        sharing.shared_files,
        links.links,
        consents.request,
        consents.requests,
        consents.consents,
        deidentify.deidentify,
        export.export,
        history.log,
    ),
    "DICOM": (gateway.gateway, gateway.import_files, gateway.receipt),
    "Insurance": (policy.policy, policy.claim),
    "Keeping and destroying": (
        custody.retain,
        custody.hold,
        custody.release,
        proposals.proposals,
        custody.kept,
        custody.retire,
        custody.erase,
        custody.certificate,
        custody.check_certificate,
    ),
    "Proof": (prove.prove, prove.check_proof, report.report),
    "Keys": (keys.keys, keys.recover, rotation.sender, sharing.key, sharing.contacts, history.auditor_key),
}
for _parts in _sections.values():
    for _part in _parts:
        command.add_command(_part)


keys.keys.add_command(rotation.rotate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; its exit code. Raises nothing but SystemExit where Python itself ends."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    told = _Told(as_json="--json" in words)
    _prepare_streams()
    try:
        code = command.main(words, prog_name="medshard", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        hint = f"{error.ctx.command_path} --help" if error.ctx else "medshard --help"
        return told.error(Exit.USAGE, error.format_message(), f"See `{hint}`.")
    except (KeyboardInterrupt, click.Abort):
        return told.error(Exit.INTERRUPTED, "interrupted", "Nothing half-done was left; run the same command again to finish.")
    except MedshardError as error:
        return told.error(exit_of(error), str(error), error.hint)
    except (BrokenPipeError, Unread):
        return _silence()
    except OSError as error:
        return told.error(exit_of(error), *explain(error))
    except Exception as error:
        if os.environ.get("MEDSHARD_DEBUG") == "1":
            raise
        return told.error(Exit.BUG, *_record(error))


class _Told:
    """Tells of an error, in text or in JSON, on standard error."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def error(self, code: Exit, message: str, hint: str) -> int:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        if self._as_json:
            output.note(
                json.dumps({"error": {"code": int(code), "kind": code.name.lower(), "message": message, "hint": hint}}, ensure_ascii=False)
            )
        else:
            output.problem(message, hint)
        return int(code)


def _record(error: Exception) -> tuple[str, str]:
    """Write the traceback of an error nobody foresaw to a file: (message, hint)."""
    name = f"medshard-error-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.txt"
    path = Path(tempfile.gettempdir()) / name
    message = f"unexpected error, {type(error).__name__}: {error}"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return message, "This is a bug in medshard. MEDSHARD_DEBUG=1 shows where; please report it with that."
    return message, f"This is a bug in medshard; please report it with {path}, after a look whether it names anything private."


def _prepare_streams() -> None:
    import warnings

    warnings.filterwarnings("ignore", module=r"pydicom(\..*)?")  # describe reports broken files itself
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows no UTF-8 must not end a put


def _silence() -> int:
    """Point standard output at nothing, so that Python's last flush does not complain; the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return Exit.PIPE


if __name__ == "__main__":
    sys.exit(main())
