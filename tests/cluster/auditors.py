"""Nodes under observation in audits: the real program, which can be told to answer challenges in other ways.

    python auditors.py HOME        runs the node of that home

HOME/misbehave.json: {"do": "slow", "seconds": S} waits before it answers; {"do": "tag"} makes its tags from a cell that is not there;
{"do": "hashes"} shows hashes of another cell; {"do": "silent", "seconds": S} is long in answering.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

rules_name = "misbehave.json"


def misbehave(home: Path) -> None:
    """Bend this node's answers, as the file says at the moment."""
    from storenode.auditing import answering

    program: Any = answering
    look, tag = program.Answerer._look, program.tag

    def rule() -> dict[str, Any]:
        try:
            told: dict[str, Any] = json.loads((home / rules_name).read_text())
        except FileNotFoundError:
            return {"do": "nothing"}
        return told

    async def bent(this: Any, *values: Any) -> Any:
        wanted = rule()
        if wanted["do"] == "silent":
            await asyncio.sleep(wanted["seconds"])
        answer = await look(this, *values)
        if wanted["do"] == "slow":
            await asyncio.sleep(wanted["seconds"])
        return replace(answer, digest=bytes(32)) if wanted["do"] == "hashes" else answer

    def bent_tag(file_id: Any, number: int, nonce: bytes, cell: bytes, size: int) -> bytes:
        made: bytes = tag(file_id, number, nonce, bytes(len(cell)) if rule()["do"] == "tag" else cell, size)
        return made

    program.Answerer._look = bent
    program.tag = bent_tag


def main(home: Path) -> int:
    """Run the node."""
    misbehave(home)
    from storenode.cli import main as storenode

    return storenode(["--home", str(home), "run"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
