"""Nodes under observation in repairs: the real program, which writes down every byte that it receives over HTTP, and can be told to fail.

    python repairers.py HOME        runs the node of that home

HOME/received has the bodies that came, requests' and answers' alike, one after the other as they came off the wire.
HOME/misbehave.json: {"do": "lie"} adds a bit to its sums, {"do": "die", "frame": N} ends the process before its Nth frame, {"do": "dawdle",
"s": S} takes so long for each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import aiohttp.streams

rules_name, received_name = "misbehave.json", "received"


def record(home: Path) -> None:
    """Keep what arrives, before anything else in the program sees it."""
    file = (home / received_name).open("ab", buffering=0)
    feed = aiohttp.streams.StreamReader.feed_data

    def feeding(this: Any, data: bytes, *more: Any) -> Any:
        file.write(data)
        return feed(this, data, *more)

    aiohttp.streams.StreamReader.feed_data = feeding  # type: ignore[method-assign]


def misbehave(home: Path) -> None:
    """Bend this node's part in sums, as the file says at the moment."""
    from storenode.repairing.helping import Helper

    add, frames = Helper._add, 0

    def bent(this: Any, *values: Any) -> bytes:
        nonlocal frames
        try:
            rule = json.loads((home / rules_name).read_text())
        except FileNotFoundError:
            return add(this, *values)
        frames += 1
        if rule["do"] == "die" and frames >= rule["frame"]:
            os._exit(9)
        if rule["do"] == "dawdle":
            time.sleep(rule["s"])  # in a thread of its own
        total = add(this, *values)
        return total[:-1] + bytes([total[-1] ^ 1]) if rule["do"] == "lie" else total

    Helper._add = bent  # type: ignore[method-assign]


def main(home: Path) -> int:
    """Run the node."""
    record(home)
    misbehave(home)
    from storenode.cli import main as storenode

    return storenode(["--home", str(home), "run"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
