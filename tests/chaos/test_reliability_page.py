"""docs/reliability.md names tests: they are there, and each of the first three promises has some."""

from __future__ import annotations

import re
from pathlib import Path

from tests.simulation.mutants import mutants

root = Path(__file__).parents[2]
page = (root / "docs/reliability.md").read_text()


def section(title: str) -> str:
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


def named(text: str) -> list[tuple[Path, str]]:
    """Each test that a text names, with its file: (file, "" for all of it, else a part of the test's name)."""
    found, file = [], root
    for word in re.findall(r"`([^`]+)`", text):
        if re.fullmatch(r"tests/[\w/.]+", word):
            file = root / word
            found.append((file, ""))
        elif re.fullmatch(r"test_\w+\.py", word):
            file = file.parent / word
            found.append((file, ""))
        elif re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+){2,}", word):
            found.append((file, word))
    return found


def check(text: str) -> int:
    for file, name in named(text):
        assert file.exists(), file
        assert not name or re.search(rf"def test_\w*{name}", file.read_text()), f"{file.name} has no test {name}"
    return sum(bool(name) for _, name in named(text))


def test_every_test_that_the_page_names_is_there() -> None:
    assert check(section("How soon a loss is found")) >= 6
    assert check(section("Bugs planted by hand")) >= 10
    for path in re.findall(r"tests/[\w/]+(?:\.py)?", page):
        assert (root / path).exists(), path


def test_each_of_the_first_three_promises_points_to_tests() -> None:
    rows = [line for line in section("The promises and their tests").splitlines() if re.match(r"\| [123]\. ", line)]
    assert [row[2] for row in rows] == ["1", "2", "3"]
    assert all(check(row) >= 2 for row in rows)


def test_the_page_has_every_planted_bug() -> None:
    assert re.findall(r"^\| `([^`]+)` \| [^|]+ \| (?:seed|not)", page, re.MULTILINE) == list(mutants)
