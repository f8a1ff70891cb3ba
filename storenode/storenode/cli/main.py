"""The one ``main``: runs a command, and turns every error into a sentence, a hint and an exit code."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

import click

from medshard_protocol.errors import Absent, Conflict, Damaged, Full, Malformed, MedshardError, Refused, TooLarge, Unavailable
from storenode.cli import auditing, ending, founding, keeping, log, modelling, operating, repairing, roster, successor, trial, users, watch
from storenode.cli.options import Session, home_default


class Exit(IntEnum):
    """What the command leaves behind in ``$?``; the same numbers as ``medshard`` has. docs/guides/operators.md explains them."""

    OK = 0
    BUG = 1
    USAGE = 2
    ABSENT = 3
    REFUSED = 4
    UNAVAILABLE = 5
    DAMAGED = 6
    LOCAL = 7
    INTERRUPTED = 130


_codes: dict[type[MedshardError], Exit] = {
    Malformed: Exit.DAMAGED,
    Refused: Exit.REFUSED,
    Absent: Exit.ABSENT,
    Conflict: Exit.LOCAL,
    Damaged: Exit.DAMAGED,
    TooLarge: Exit.LOCAL,
    Full: Exit.LOCAL,
    Unavailable: Exit.UNAVAILABLE,
}


class _InOrder(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order an operator needs them."""
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--home", type=click.Path(file_okay=False, path_type=Path), envvar="STORENODE_HOME", help=f"Folder of the node [{home_default}]."
)
@click.option("--json", is_flag=True, help="Write one JSON document instead of text.")
@click.version_option(package_name="medshard", message="storenode %(version)s")
@click.pass_context
def command(context: click.Context, home: Path | None, json: bool) -> None:
    """Run a medshard storage node: it keeps pieces of encrypted files and a copy of the ledger, and can read neither.

    \b
    From nothing to a running node:
      storenode init --institution "Hospital 01" --url https://node.hospital-01.example:9700
                                      # hand the card to the founder, get genesis.medshard back
      storenode adopt genesis.medshard
      storenode run
      storenode invite                # a one-time code with which a department joins

    \b
    A whole consortium on this machine, for a trial:
      storenode consortium /tmp/trial --institutions 6

    \b
    Exit codes: 0 done, 1 a bug, 2 wrong usage, 3 something is missing, 4 not allowed, 5 not running or
    no answer, 6 a file is not what it should be, 7 something is in the way or full, 130 interrupted.
    """
    context.obj = Session(home or home_default, json)


for _part in (
    founding.init,
    founding.genesis,
    founding.adopt,
    operating.run,
    operating.status,
    operating.invite,
    users.users,
    founding.renew,
    roster.roster,
    ending.rotate,
    ending.withdraw,
    ending.freeze,
    keeping.hold,
    keeping.release,
    successor.successor,
    auditing.audit,
    repairing.repair,
    repairing.drain,
    watch.watch,
    watch.evidence,
    log.log,
    trial.consortium,
    modelling.durability,
):
    command.add_command(_part)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    try:
        code = command.main(words, prog_name="storenode", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        hint = f"see `{error.ctx.command_path if error.ctx else 'storenode'} --help`"
        return _tell(Exit.USAGE, error.format_message(), hint, as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        return _tell(Exit.INTERRUPTED, "interrupted", "", as_json=as_json)
    except MedshardError as error:
        code = next((exit_code for kind, exit_code in _codes.items() if isinstance(error, kind)), Exit.LOCAL)
        return _tell(code, str(error), error.hint, as_json=as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more while it ends
        return 141
    except OSError as error:
        return _tell(Exit.LOCAL, *_explain(error), as_json=as_json)
    except Exception as error:
        if os.environ.get("STORENODE_DEBUG") == "1":
            raise
        hint = "this is a bug; run it again with STORENODE_DEBUG=1 to see where, and report that"
        return _tell(Exit.BUG, f"unexpected error, {type(error).__name__}: {error}", hint, as_json=as_json)


def _tell(code: Exit, message: str, hint: str, *, as_json: bool) -> int:
    if as_json:
        text = json.dumps({"error": {"code": int(code), "kind": code.name.lower(), "message": message, "hint": hint}})
    else:
        text = f"storenode: {message}" + (f"\nhint: {hint}" if hint else "")
    sys.stderr.write(text + "\n")
    return int(code)


def _explain(error: OSError) -> tuple[str, str]:
    place = f"{error.filename}: " if error.filename is not None else ""
    message = f"{place}{error.strerror or error}"
    if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
        return message, "another program has that address, or this machine does not; see `listen` in config.toml"
    if error.errno in (errno.EACCES, errno.EPERM):
        return message, "run as the user that owns the node's home, such as: sudo -u storenode storenode …"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return message, "free some space and run the command again"
    return message, ""
