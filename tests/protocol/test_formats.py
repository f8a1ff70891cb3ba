"""The pages on formats and the vectors: complete, linked, and what the second implementation makes today."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

root = Path(__file__).parents[2]
pages = sorted((root / "docs" / "formats").glob("*.md"))
vectors = sorted((root / "tests" / "vectors").glob("*.json"))


@pytest.mark.parametrize("tool", ["make_vectors", "make_ledger_vectors", "make_key_vectors"])
def test_the_second_implementation_still_makes_the_vectors(tool: str) -> None:
    spec = importlib.util.spec_from_file_location(tool, root / "tools" / f"{tool}.py")
    assert spec
    assert spec.loader
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    for name, text in program.pages().items():
        assert (root / "tests" / "vectors" / f"{name}.json").read_text(encoding="utf-8") == text, f"{name}.json: run `make vectors`"


@pytest.mark.parametrize("page", pages, ids=lambda page: page.stem)
def test_every_link_on_a_page_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w-]", "", line.lstrip("# ").lower().replace(" ", "-")) for line in text.splitlines() if line.startswith("#")}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_index_names_every_page_and_every_file_of_vectors() -> None:
    index = (root / "docs" / "formats" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in pages if page.name != "README.md" and f"({page.name})" not in index] == []
    assert [path.name for path in vectors if path.name not in index] == []


def test_every_file_of_vectors_is_named_on_a_page_and_used_by_a_test() -> None:
    written = "".join(page.read_text(encoding="utf-8") for page in pages if page.name != "README.md")
    used = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").glob("*/test_*.py") if path != Path(__file__))
    for path in vectors:
        assert f"tests/vectors/{path.name}" in written
        assert re.search(rf"\b{path.stem}\b", used)
