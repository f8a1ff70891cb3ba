"""A peer's own virtual environment, made once under bench/work/ (git-ignored) from pinned versions, by name."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from bench.side import ENVIRONMENTS, SideError


def run(command: Sequence[str], env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    if done.returncode:
        raise SideError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-2000:]}")
    return done.stdout


def environment(name: str, requirements: Sequence[str]) -> Path:
    """The `bin` folder of the environment, with `requirements` installed. Takes a minute the first time."""
    folder = ENVIRONMENTS / f"venv-{name}"
    stamp = folder / "installed"
    wanted = "\n".join(requirements)
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"bench: installing {' '.join(requirements)} into {folder.name}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
        run([str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", *requirements])
        stamp.write_text(wanted)
    return folder / "bin"
