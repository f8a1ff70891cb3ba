"""Stripes of one file, made in buffers that are used again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medshard.encoding import Encoder
from medshard.model import Description
from medshard.sealing import FileSeal
from medshard.source import Part, Source
from medshard_protocol.shards import Layout


@pytest.mark.parametrize("size", [1, 50_000, 3 * 4 * 1024 - 16, 100_001])
def test_buffers_that_are_used_again_change_no_cell(tmp_path: Path, size: int) -> None:
    (tmp_path / "plain").write_bytes(os.urandom(size))
    seal, layout = FileSeal.fresh(), Layout.for_plain(size, 3, 5, 4 * 1024)

    def shards(*, again: bool) -> list[bytes]:
        source = Source([Part.at(tmp_path / "plain", b"plain", Description("application/dicom"))])
        encoder, columns = Encoder(source, seal, layout), [bytearray() for _ in range(layout.n)]
        while encoder:
            stripe = encoder.next()
            for column, part in zip(columns, stripe.cells, strict=True):
                column += part
            if again:
                for part in stripe.cells:
                    part[:] = b"\xff" * len(part)
                encoder.give_back(stripe)
        source.close()
        return [bytes(column) for column in columns]

    assert shards(again=True) == shards(again=False)


def test_the_first_bursts_are_short_and_all_of_them_together_are_the_file(tmp_path: Path) -> None:
    size = 40 * 3 * 4 * 1024
    (tmp_path / "plain").write_bytes(bytes(size))
    layout = Layout.for_plain(size, 3, 5, 4 * 1024)
    source = Source([Part.at(tmp_path / "plain", b"plain", Description("application/dicom"))])
    encoder, bursts = Encoder(source, FileSeal.fresh(), layout), []
    while encoder:
        bursts.append([stripe.number for stripe in encoder.next_burst()])
    source.close()
    assert [len(burst) for burst in bursts[:5]] == [1, 1, 2, 4, 4]
    assert [number for burst in bursts for number in burst] == list(range(layout.stripes))
