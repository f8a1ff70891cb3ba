"""What messages, help texts and guides tell people to type exists: every command in them, with every option."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from medshard.cli.main import command as medshard
from storenode.cli.main import command as storenode

root = Path(__file__).parents[2]
programs = {"medshard": medshard, "storenode": storenode}
quoted = re.compile(r"`((?:medshard|storenode) [^`]*)`")
line = re.compile(r"^(?:    |\$ )((?:medshard|storenode) [a-z-][^\n]*)$", re.MULTILINE)
begin = re.compile(r"(?:^|: )((?:medshard|storenode) [a-z][a-z-]+(?: [-A-Za-z<{…].*)?)$")
prose = ("medshard recovery kit", "medshard ledger", "medshard proof of", "medshard was", "medshard storage node")  # begin a text too


def sources() -> list[Path]:
    return sorted([*(root / "client").rglob("*.py"), *(root / "storenode").rglob("*.py"), *(root / "protocol").rglob("*.py")])


def strings(path: Path) -> Iterator[str]:
    """Every text in a program, with … where something is put in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def complaint(text: str) -> str | None:
    """Why nobody could type this, or None."""
    if text.startswith(prose):
        return None
    text = re.split(r"\s+#|\s\|\s|;| && | > |…\)", text)[0]
    try:
        words = shlex.split(text.replace("'", "").replace('"', ""))
    except ValueError:
        return None
    here: click.Command = programs[words[0]]
    options = {name for parameter in here.params for name in parameter.opts + parameter.secondary_opts} | {"--help", "-h"}
    for word in words[1:]:
        if word.startswith("--") and "…" not in word:
            if word.partition("=")[0].rstrip(".,)") not in options:
                return f"{text!r}: no option {word}"
        elif isinstance(here, click.Group) and re.fullmatch(r"[a-z][a-z-]*[.,]?", word):
            found = here.commands.get(word.rstrip(".,"))
            if found is None:
                return f"{text!r}: no command {word}"
            here = found
            options |= {name for parameter in here.params for name in parameter.opts + parameter.secondary_opts}
    return None


def test_every_command_that_a_program_names_exists() -> None:
    found = [(path, text) for path in sources() for whole in strings(path) for text in [*quoted.findall(whole), *begin.findall(whole)]]
    assert len(found) > 250
    wrong = sorted({f"{path.relative_to(root)}: {why}" for path, text in found if (why := complaint(text))})
    assert wrong == []


@pytest.mark.parametrize("page", sorted([*(root / "docs").rglob("*.md"), *root.glob("*.md")]), ids=lambda page: page.name)
def test_every_command_on_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [why for each in [*quoted.findall(text), *line.findall(text)] if (why := complaint(each))] == []
