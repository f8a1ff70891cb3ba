"""Plaintext to stripes, and stripes to plaintext. CPU work only: call it from a thread, a stripe at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from medshard.sealing import FileSeal
from medshard.source import Source
from medshard_protocol.erasure import code
from medshard_protocol.errors import Damaged
from medshard_protocol.shards import Digest, Layout, digests, shard_root, tag_bytes

burst_stripes: Final = 4


@dataclass(frozen=True, slots=True)
class Stripe:
    """One encoded stripe: ``cells[i]`` is the cell of shard i; ``plain`` counts the true (unpadded) bytes in it."""

    number: int
    cells: tuple[memoryview, ...]
    plain: int


class Encoder:
    """Seal and encode a source, stripe by stripe, collecting every shard's cell digests."""

    def __init__(self, source: Source, seal: FileSeal, layout: Layout, digest: str = "blake3") -> None:
        self.layout = layout
        self._source = source
        self._seal = seal
        self._code = code(layout.k, layout.n)
        self._digest: Digest = digests[digest]
        self._cell_digests: list[list[bytes]] = [[] for _ in range(layout.n)]
        self._plain = bytearray(min(layout.segment_plain, layout.plain_size))
        self._free: deque[bytearray] = deque()
        self._next = 0

    def __bool__(self) -> bool:
        return self._next < self.layout.stripes

    def next(self) -> Stripe:
        """The next stripe. Raises Changed or OSError from the source."""
        shape, number = self.layout, self._next
        sealed, cell = shape.segment_length(number), shape.cell_length(number)
        plain = memoryview(self._plain)[: sealed - tag_bytes]
        got = self._source.read_into(plain)
        if got < len(plain):
            plain[got:] = bytes(len(plain) - got)  # Padmé's zeros
        # Senders still hold views of the ones before: only what was given back is used again.
        buffer = memoryview(self._free.popleft() if self._free else bytearray(shape.n * cell))
        self._seal.seal_into(number, number == shape.stripes - 1, plain, buffer[:sealed])
        buffer[sealed : shape.k * cell] = bytes(shape.k * cell - sealed)
        cells = tuple(buffer[i * cell : (i + 1) * cell] for i in range(shape.n))
        self._code.encode(cells[: shape.k], cells[shape.k :])
        for known, part in zip(self._cell_digests, cells, strict=True):
            known.append(self._digest(part))
        self._next += 1
        return Stripe(number, cells, got)

    def give_back(self, stripe: Stripe) -> None:
        """Nobody looks at this stripe's cells any more. Any thread may call. A fresh buffer is pages to be found and cleared."""
        buffer = stripe.cells[0].obj
        if isinstance(buffer, bytearray):
            self._free.append(buffer)

    def next_burst(self) -> list[Stripe]:
        """The next few stripes. A holder that gets several cells at once wakes up once for them, which is most of what they cost it."""
        size = min(burst_stripes, max(1, self._next))  # the first ones are short: until there is something to send, only one core works
        burst = [self.next()]
        while self and len(burst) < size:
            burst.append(self.next())
        return burst

    def roots(self) -> tuple[bytes, ...]:
        """The root of every shard, once all stripes are done."""
        return tuple(shard_root(known, self._digest) for known in self._cell_digests)


class Decoder:
    """Open stripes of a sealed file from any k cells that were checked. A wrong cell here would be found by the segment's tag.

    One thread at a time: the plaintext of a stripe stands until the next one is opened.
    """

    def __init__(self, seal: FileSeal, layout: Layout) -> None:
        self.layout = layout
        self._seal = seal
        self._code = code(layout.k, layout.n)
        self._plain = memoryview(bytearray(min(layout.segment_plain, layout.plain_size)))

    def open(self, number: int, cells: Mapping[int, memoryview]) -> bytes:
        """The padded plaintext of stripe ``number``. Raises Damaged."""
        cell, k = self.layout.cell_length(number), self.layout.k
        if any(len(part) != cell for part in cells.values()):
            raise Damaged(f"stripe {number}: a cell of a wrong length")
        stripe = memoryview(bytearray(k * cell))
        for i in range(k):
            if i in cells:
                stripe[i * cell : (i + 1) * cell] = cells[i]
        return bytes(self.open_in_place(number, stripe, cells))

    def open_in_place(self, number: int, stripe: memoryview, cells: Mapping[int, memoryview]) -> memoryview:
        """As ``open``. Those data ``cells`` that are here lie in their places in ``stripe`` already; the others are put there."""
        shape = self.layout
        sealed, cell, k = shape.segment_length(number), shape.cell_length(number), shape.k
        missing = [i for i in range(k) if i not in cells]
        if missing:
            have = sorted(cells, key=lambda i: (i >= k, i))[:k]
            self._code.rebuild(have, [cells[i] for i in have], missing, [stripe[i * cell : (i + 1) * cell] for i in missing])
        plain = self._plain[: sealed - tag_bytes]
        self._seal.open_segment_into(number, number == shape.stripes - 1, stripe[:sealed], plain)
        return plain
