"""Heads with both kinds of cosignature, and the log as any C2SP reader asks a mirror for it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.storenode.conftest import Net

from medshard_protocol.checkpoint import Checkpoint, Note, cosigners, open_published
from medshard_protocol.errors import Unavailable
from medshard_protocol.tiles import TileName
from storenode.ledger.fullhead import Lines, cosign_path


@pytest.fixture
async def net(consortium: Callable[..., Any], tmp_path: Path) -> AsyncIterator[Net]:
    """Four institutions with a node each, which all have ML-DSA keys; a quorum is three."""
    made = Net(consortium(4, pq=True), tmp_path)
    try:
        yield made
    finally:
        await made.close()


async def running(net: Net, *numbers: int) -> None:
    await net.start(*numbers)
    await net.enrol()
    await net.until(lambda: all(net.published(number) == 2 for number in numbers))


async def test_any_node_gives_a_head_with_a_quorum_of_each_kind(net: Net) -> None:
    await running(net, 0, 1, 2, 3)
    for number in range(4):
        status, note = await net.request(number, "GET", "/log/checkpoint?full=1")
        assert status == 200
        assert open_published(note, net.roster, pq=True).size == 2
        assert len(Note.from_bytes(note).signatures) == 1 + 3 + 3  # no more than it takes: the second kind is large


async def test_nobody_sends_the_second_kind_unasked(net: Net) -> None:
    await running(net, 0, 1, 2, 3)
    _, note = await net.request(1, "GET", "/log/checkpoint")
    assert cosigners(Note.from_bytes(note), net.roster, pq=True) == {}
    assert all(len(push.published) < 2000 for _, push in net.pushes)


async def test_a_mirror_serves_the_head_with_its_own_cosignature(net: Net) -> None:
    await running(net, 0, 1, 2, 3)
    for number in range(4):
        _, note = await net.request(number, "GET", "/log/checkpoint")
        assert net.roster.nodes[number].id in cosigners(Note.from_bytes(note), net.roster)


async def test_a_full_head_is_made_once_and_again_when_the_log_has_grown(net: Net) -> None:
    await running(net, 0, 1, 2, 3)
    first = await net.ledgers[2].full.full()
    assert await net.ledgers[2].full.full() is first
    await net.ledgers[0].append([net.register()])
    await net.until(lambda: net.published(2) == 3)
    assert (await net.ledgers[2].full.full()).checkpoint.size == 3


async def test_it_takes_a_quorum_of_nodes_that_answer(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storenode.ledger.fullhead.again_after_s", 0.01)
    await running(net, 0, 1, 2, 3)
    await net.stop(3)
    assert open_published((await net.ledgers[1].full.full()).note, net.roster, pq=True)
    await net.ledgers[0].append([net.register()])
    await net.until(lambda: net.published(1) == 3)
    await net.stop(2)
    with pytest.raises(Unavailable, match="no quorum"):
        await net.ledgers[1].full.full()


async def test_the_newest_full_head_survives_a_restart(net: Net) -> None:
    await running(net, 0, 1, 2, 3)
    note = (await net.ledgers[1].full.full()).note
    await net.stop(1)
    await net.start(1)
    assert net.ledgers[1].full.newest is not None
    assert net.ledgers[1].full.newest.note == note


async def test_a_node_gives_its_second_cosignature_only_for_what_it_cosigned(net: Net) -> None:
    await running(net, 0, 1, 2, 3)
    forged = Checkpoint(net.roster.origin, 2, bytes(32)).text()
    for text in (forged, "", "x" * 1024, "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace")):
        assert (await net.request(1, "POST", cosign_path, text.encode(), as_node=0))[0] == 404
    true = Note.from_bytes(net.ledgers[1].published.note).text
    status, answer = await net.request(1, "POST", cosign_path, true.encode(), as_node=0)
    assert status == 200
    assert Lines.from_bytes(answer) == Lines.from_bytes((await net.request(1, "POST", cosign_path, true.encode(), as_node=0))[1])
    assert (await net.request(1, "POST", cosign_path, true.encode()))[0] == 403  # a client has no business with it
    assert (await net.request(1, "POST", cosign_path, bytes(5000), as_node=0))[0] == 413


async def test_both_kinds_state_the_same_time(net: Net) -> None:
    await running(net, 0, 1, 2, 3)
    note = Note.from_bytes((await net.ledgers[0].full.full()).note)
    assert cosigners(note, net.roster) == cosigners(note, net.roster, pq=True)


async def test_a_node_that_answers_with_a_wrong_second_cosignature_is_not_counted(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    await net.start(0, 1, 2, 3)
    liar = net.ledgers[3].full
    true_lines = liar.lines

    def lie(text: str) -> Lines:
        lines = true_lines(text)
        return dataclasses.replace(lines, ml_dsa=dataclasses.replace(lines.ml_dsa, value=lines.ml_dsa.value[:-1] + b"\0"))

    monkeypatch.setattr(liar, "lines", lie)  # before anybody asks it for one
    await net.enrol()
    full = await net.ledgers[0].full.full()
    assert net.roster.nodes[3].id not in cosigners(Note.from_bytes(full.note), net.roster, pq=True)
    await net.stop(2)
    await net.ledgers[0].append([net.register()])
    monkeypatch.setattr("storenode.ledger.fullhead.again_after_s", 0.01)
    with pytest.raises(Unavailable):
        await net.ledgers[0].full.full()


async def test_the_end_of_a_roster_is_sealed_with_both_kinds(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storenode.ledger.fullhead.watch_every_s", 0.05)
    await running(net, 0, 1, 2, 3)
    ledger, old = net.ledgers[1], net.roster
    new = dataclasses.replace(old, number=1, previous=old.sha256, nodes=(dataclasses.replace(old.nodes[0], capacity=9), *old.nodes[1:]))
    await asyncio.sleep(0.1)
    assert ledger.full.sealed(0) is None
    ledger.roster = new
    await net.until(lambda: ledger.full.sealed(0) is not None)
    status, note = await net.request(1, "GET", "/log/checkpoint?roster=0")
    assert status == 200
    assert open_published(note, old, pq=True).size == 2
    for query in ("1", "-1", "x", "²", "9" * 30, ""):
        assert (await net.request(1, "GET", f"/log/checkpoint?roster={query}"))[0] == 404


# -- as C2SP tlog-tiles has it


async def test_files_of_the_log_have_the_types_and_cache_headers_of_tlog_tiles(net: Net) -> None:
    await running(net, 0, 1, 2, 3)
    async with net.session.get(net.url(1) + "/log/checkpoint") as response:
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache"
    for path in ("tile/0/000.p/2", "tile/0/000.p/1", "tile/entries/000.p/2"):
        for headers in ({}, {"Accept-Encoding": "gzip, br"}, {"Accept-Encoding": "identity"}):
            async with net.session.get(f"{net.url(1)}/log/{path}", headers=headers) as response:
                assert (response.status, response.headers["Content-Type"]) == (200, "application/octet-stream")
                assert "immutable" in response.headers["Cache-Control"]
                assert "Content-Encoding" not in response.headers
                data = await response.read()
        async with net.session.head(f"{net.url(1)}/log/{path}") as response:
            assert (response.status, response.content_length) == (200, len(data))


@pytest.mark.parametrize(
    "path",
    [
        "0/000", "0/001", "0/000.p/3", "0/000.p/0", "0/000.p/256", "0/000.p/01", "0/0", "00/000", "1/000", "1/000.p/1", "63/000", "64/000",
        "entries/000", "entries/000.p/3", "entries/x000/000.p/2", "-1/000", "0/000.p/2/", "0/000.p", "data/000.p/2", "0/%2e%2e/000.p/2", "",
    ],
)  # fmt: skip
async def test_what_a_log_of_two_entries_does_not_have_is_not_found(net: Net, path: str) -> None:
    await running(net, 0, 1, 2, 3)
    assert (await net.request(1, "GET", f"/log/tile/{path}"))[0] == 404


async def test_tiles_of_the_spec_s_example_tree_are_named_as_it_says() -> None:
    def name(size: int, level: int) -> list[str]:
        from medshard_protocol.tiles import tile_names

        return [each.path() for each in tile_names(size) if each.level == level]

    assert len(name(70_000, 0)) == 274
    assert name(70_000, 0)[-1] == "0/273.p/112"
    assert name(70_000, 1) == ["1/000", "1/001.p/17"]
    assert name(70_000, 2) == ["2/000.p/1"]
    assert name(256, 0) + name(256, 1) == ["0/000", "1/000.p/1"]
    assert TileName(0, 1234067).path() == "0/x001/x234/067"
