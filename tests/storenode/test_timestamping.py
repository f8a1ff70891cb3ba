"""Timestamps of an outside authority, here a real one made with `openssl ts`: asked for, written down, and checked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests import tsa
from tests.storenode.conftest import Net

from medshard.timestamps import check_token, load_certificates
from medshard_protocol.entries import Entry, Timestamp, token_bytes_max
from medshard_protocol.errors import Malformed, MedshardError, Refused, Unavailable
from storenode.config import TimestampSection
from storenode.timestamping import Timestamping, ask, time_of

pytestmark = pytest.mark.skipif(tsa.openssl is None, reason="the authority is made with openssl")

text = b"consortium.example/log\n5\nL5RPiGwiPCne2rPkrKwSrn4pZ70ClWoeLSwbEj8S3xA=\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    made = tsa.Authority(tmp_path_factory.mktemp("tsa"))
    url, stop = made.serve()
    yield SimpleNamespace(made=made, url=url, certificates=load_certificates(made.pem))
    stop()


@pytest.mark.parametrize("digest", ["sha256", "sha512"])
async def test_a_token_fits_into_an_entry_and_holds(authority: SimpleNamespace, digest: str) -> None:
    token = await ask(authority.url, text, digest)
    assert 300 < len(token) < token_bytes_max
    stamped = check_token(text, token, authority.certificates)
    assert stamped.authority == "CN=Test timestamps"
    assert abs((stamped.time - datetime.now(UTC)).total_seconds()) < 60
    assert time_of(token) == stamped.time


async def test_the_authority_learns_a_hash_and_no_more(authority: SimpleNamespace) -> None:
    await ask(authority.url, text)
    assert text not in authority.made.asked[-1]
    assert b"consortium" not in authority.made.asked[-1]


async def test_a_token_over_another_text_is_refused(authority: SimpleNamespace) -> None:
    token = await ask(authority.url, text)
    with pytest.raises(Refused, match="Mismatch"):
        check_token(text + b"x", token, authority.certificates)


async def test_a_token_of_somebody_else_is_refused(authority: SimpleNamespace, tmp_path: Path) -> None:
    token = await ask(authority.url, text)
    other = tsa.Authority(tmp_path / "other")
    with pytest.raises((Refused, Malformed)):
        check_token(text, token, load_certificates(other.pem))
    mixed = (authority.made.folder / "tsa.crt").read_bytes() + (other.folder / "ca.crt").read_bytes()
    with pytest.raises(Refused, match="nobody given issued"):
        check_token(text, token, load_certificates(mixed))
    for alone in ("tsa.crt", "ca.crt"):
        with pytest.raises(Refused, match="must hold"):
            check_token(text, token, load_certificates((authority.made.folder / alone).read_bytes()))


async def test_a_certificate_for_something_else_stamps_nothing(tmp_path: Path, authority: SimpleNamespace) -> None:
    mail = tsa.Authority(tmp_path / "mail", usage="emailProtection")
    token = await ask(authority.url, text)
    with pytest.raises(Refused, match="must hold"):
        check_token(text, token, load_certificates(mail.pem))


async def test_a_changed_token_never_holds(authority: SimpleNamespace) -> None:
    token = await ask(authority.url, text)
    for at in range(0, len(token), 7):
        changed = token[:at] + bytes([token[at] ^ 1]) + token[at + 1 :]
        try:
            stamped = check_token(text, changed, authority.certificates)
        except MedshardError:
            continue
        assert stamped == check_token(text, token, authority.certificates), at  # a byte that no signature covers and nobody reads
    for noise in (b"", b"x", bytes(1700), token[:-1], token + b"x"):
        with pytest.raises(MedshardError):
            check_token(text, noise, authority.certificates)
        assert time_of(noise) is None or noise.startswith(token)


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda body: b"", Unavailable),
        (lambda body: b"x" * 100, Malformed),
        (lambda body: body[:-1], Malformed),
        (lambda body: bytes(70_000), Malformed),
    ],
    ids=["503", "noise", "cut short", "endless"],
)
async def test_an_answer_that_is_none_is_not_written_down(
    authority: SimpleNamespace, spoil: Callable[[bytes], bytes], kind: type[MedshardError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority.made, "spoil", spoil)
    with pytest.raises(kind):
        await ask(authority.url, text)


async def test_an_answer_to_another_question_is_not_written_down(authority: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    old: list[bytes] = []
    monkeypatch.setattr(authority.made, "spoil", lambda body: old[0] if old else old.append(body) or body)
    await ask(authority.url, text)
    with pytest.raises(Malformed, match="another request"):
        await ask(authority.url, text)
    with pytest.raises(Malformed, match="something else"):
        await ask(authority.url, text + b"x")


async def test_nobody_there_is_said_so() -> None:
    with pytest.raises(Unavailable):
        await ask("http://127.0.0.1:1/", text)


# -- on the ledger


@pytest.fixture
async def net(consortium: Callable[..., Any], tmp_path: Path) -> AsyncIterator[Net]:
    made = Net(consortium(4, pq=True), tmp_path)
    try:
        yield made
    finally:
        await made.close()


async def test_it_goes_onto_the_ledger_as_an_entry_with_effect(net: Net, authority: SimpleNamespace) -> None:
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.until(lambda: net.published(2) == 2)
    index = await Timestamping(net.ledgers[2], net.consortium.key("tls 2"), TimestampSection(url=authority.url)).stamp()
    await net.until(lambda: net.ledgers[2].state.size > index)
    ((at, size, root),) = net.ledgers[2].state.timestamps()
    assert (at, size) == (index, 2)
    body = Entry.from_bytes(net.ledgers[2].journal.entries(index, index + 1)[0]).body
    assert isinstance(body, Timestamp)
    checkpoint = net.ledgers[2].published.checkpoint
    stamped = type(checkpoint)(checkpoint.origin, size, root).text().encode()
    assert check_token(stamped, body.token, authority.certificates).authority == "CN=Test timestamps"


async def test_it_is_asked_for_once_in_a_while_and_not_for_its_own_entry(net: Net, authority: SimpleNamespace) -> None:
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.until(lambda: net.published(1) == 2)
    asked = len(authority.made.asked)
    errand = Timestamping(net.ledgers[1], net.consortium.key("tls 1"), TimestampSection(url=authority.url, every_h=1))
    errand.start()
    await net.until(lambda: net.ledgers[1].state.timestamps())
    await net.ledgers[0].append([net.register()])
    await errand.close()
    again = Timestamping(net.ledgers[1], net.consortium.key("tls 1"), TimestampSection(url=authority.url, every_h=1))
    again.start()  # after a restart the last one on the ledger still counts
    await asyncio.sleep(0.2)
    await again.close()
    assert len(authority.made.asked) == asked + 1
    idle = Timestamping(net.ledgers[1], net.consortium.key("tls 1"), TimestampSection())
    idle.start()
    await idle.close()
