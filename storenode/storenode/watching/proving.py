"""Proving one round's heads to be one history, and the continuation of the anchor.

Law: the newest head that can be proved from its own tiles to continue the anchor is the best one, and every other head is then compared
with the root that the best one's tree had at its size. So one mirror's tiles are enough for the history of all; the tiles of
others are read in turn, for themselves, because one that answers well to some may have damage or lie.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from typing import Final

from medshard_protocol.errors import MedshardError
from medshard_protocol.tiles import tile_width
from storenode.watching.heads import Finding, Head
from storenode.watching.tilereader import Fetch, HeadTiles, Withheld, WrongTile

sources_at_once: Final = 8

_log = logging.getLogger(__name__)


class Proving:
    """One round. ``settle`` once, then read ``findings`` and ``silent``."""

    def __init__(self, anchor: Head | None, fetch: Callable[[str], Fetch]) -> None:
        self._anchor = anchor
        self._fetch = fetch
        self._tried: set[str] = set()  # sources
        self._proved: list[tuple[Head, HeadTiles]] = []
        self._gate = asyncio.Semaphore(sources_at_once)
        self.findings: list[Finding] = []
        self.silent: list[tuple[str, str]] = []

    async def settle(self, published: Sequence[Head], sample: int | None) -> Head | None:
        """Prove these heads, reading the tiles of ``sample`` sources chosen at random (None for all) and of the newest. Gives the best."""
        chosen = published if sample is None else random.sample(list(published), min(sample, len(published)))
        await asyncio.gather(*map(self._read, chosen))
        for head in sorted(published, key=lambda each: -each.checkpoint.size):
            if head.source not in self._tried:
                await self._read(head)
            if best := next((each for each in self._proved if each[0] is head), None):
                await self._compare(best, published)
                return head
        return None

    async def _read(self, head: Head) -> None:
        """Read a source's tiles for its own head, a random bundle with them, and what it says about the anchor."""
        self._tried.add(head.source)
        tiles = HeadTiles(head.checkpoint.size, head.checkpoint.root, self._fetch(head.source))
        try:
            async with self._gate:
                await tiles.check_edge()
                if head.checkpoint.size:
                    await tiles.bundle(random.randrange(-(-head.checkpoint.size // tile_width)))
                if self._anchor is not None and (finding := await _broken(self._anchor, head, tiles)):
                    self.findings.append(finding)
                elif not _excludes(self._anchor, head):  # else it is a fork, and found already
                    self._proved.append((head, tiles))
        except (WrongTile, Withheld) as error:
            self.findings.append(_tile_finding(head, error))
        except MedshardError as error:
            self.silent.append((head.source, str(error)))

    async def _compare(self, best: tuple[Head, HeadTiles], heads: Sequence[Head]) -> None:
        """Prove smaller heads to be prefixes of the best one."""
        accused = {finding.source for finding in self.findings}
        for head in heads:
            try:
                if head.source not in accused and (finding := await _broken(head, *best, about=head.source)):
                    self.findings.append(finding)
            except (WrongTile, Withheld) as error:
                self.findings.append(_tile_finding(best[0], error))
            except MedshardError as error:
                _log.info("%s could not be compared: %s", head.source, error)


async def _broken(old: Head, new: Head, tiles: HeadTiles, *, about: str = "") -> Finding | None:
    """Compare the root that ``old`` claims with what the tree of ``new`` had at that size. Equal sizes are ``forks``' business."""
    a, b = old.checkpoint, new.checkpoint
    if a.size >= b.size:
        return None
    root = await tiles.root_at(a.size)
    if root == a.root:
        return None
    path = b"".join(await tiles.consistency_path(a.size))
    text = f"shows a history that does not fit: the {b.size} entries of {new.source} do not continue the {a.size} of {old.source}"
    documents = {"note 1": old.note, "note 2": new.note, "root": root, "path": path}
    return Finding("rewritten", about or new.source, text, documents, {"old_size": a.size, "size": b.size})


def _excludes(anchor: Head | None, head: Head) -> bool:
    return anchor is not None and anchor.checkpoint.size == head.checkpoint.size and anchor.checkpoint.root != head.checkpoint.root


def _tile_finding(head: Head, error: WrongTile | Withheld) -> Finding:
    if isinstance(error, WrongTile):
        return Finding("damaged-tile", head.source, str(error), {"note 1": head.note, **error.tiles})
    return Finding("withheld", head.source, f"does not give out what its head stands for: {error}", {"note 1": head.note})
