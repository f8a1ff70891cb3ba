"""Links over real nodes: one document and no other, for so long, so often, with so many guesses, and every use in the ledger."""

from __future__ import annotations

import asyncio
import io
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from hashlib import sha256
from pathlib import Path

import aiohttp
import pytest
from reportlab.pdfgen.canvas import Canvas
from tests.browser import browser, chromium

from medshard import Vault
from medshard.cli.exits import Exit
from medshard.cli.main import main
from medshard.consortium import LocalConsortium
from medshard.links.model import Link, wrong_max
from medshard.links.opening import fetch
from medshard.links.web import serving
from medshard_protocol.errors import Absent, Damaged, Refused

label = "Ihre Aufnahmen"


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("links"), institutions=4) as consortium:
        yield consortium


@pytest.fixture
async def vault(trial: LocalConsortium) -> AsyncIterator[Vault]:
    async with Vault.open(trial.vault_home, trial.passphrase) as opened:
        yield opened


@pytest.fixture
async def base(vault: Vault, unused_tcp_port: int) -> AsyncIterator[str]:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    async with serving(vault.links, url, "127.0.0.1", unused_tcp_port):
        yield url


async def put(vault: Vault, folder: Path, *sizes: int) -> dict[bytes, bytes]:
    folder.mkdir()
    contents = [b"%PDF-1.4\n" + os.urandom(size) for size in sizes]
    for number, content in enumerate(contents):
        (folder / f"letter-{number}.pdf").write_bytes(content)
    await vault.put([folder] if len(sizes) > 1 else [folder / "letter-0.pdf"])
    return {sha256(content).digest(): content for content in contents}


def printed(text: str) -> bytes:
    """A PDF of one page."""
    out = io.BytesIO()
    canvas = Canvas(out)
    canvas.drawString(72, 720, text)
    canvas.save()
    return out.getvalue()


def uses(told: list[object]) -> int:
    return sum(each.what == "read" and each.purpose == "patient-request" for each in told)  # type: ignore[attr-defined]


async def test_a_link_opens_its_documents_and_every_use_is_in_the_ledger(vault: Vault, base: str, tmp_path: Path) -> None:
    stored = await put(vault, tmp_path / "study", 30_000, 400_000)
    link = vault.links.make(list(stored), label=label).link(base)
    found = await fetch(Link.from_text(link.to_text(f"{base}/link")), tmp_path / "patient")
    assert {each.path.read_bytes() for each in found} == set(stored.values())
    assert {each.path.name for each in found} == {"letter-0.pdf", "letter-1.pdf"}
    first = uses(await vault.shares.log(next(iter(stored))))
    await fetch(link, tmp_path / "again")
    assert uses(await vault.shares.log(next(iter(stored)))) == first + 1
    assert [note.uses for note in vault.links.all() if note.label == label] == [2]


async def test_a_link_to_one_document_opens_nothing_else(vault: Vault, base: str, tmp_path: Path) -> None:
    """By trying: other hashes, ids, passes and keys, and whatever else the service may have."""
    stored = await put(vault, tmp_path / "pack", 20_000, 20_000, 20_000)
    mine, other, third = stored
    one, two = vault.links.make([mine]), vault.links.make([other])
    (got,) = await fetch(one.link(base), tmp_path / "one")
    assert got.path.read_bytes() == stored[mine]
    with pytest.raises(Damaged):  # another link's documents do not open with this link's key
        await fetch(Link(two.link(base).url, one.key), tmp_path / "no")
    async with aiohttp.ClientSession() as session:
        listed = (await (await session.post(one.link(base).url, json={"recipient": "x"})).json())["files"]
        assert len(listed) == 1
        for path in (
            f"/shl-file/{third.hex()}",
            f"/shl-file/{mine.hex()}",
            f"/shl/{third.hex()}",
            "/shl/",
            "/shl-file/../vault.key",
            "/",
            "/dicom-web/studies",
            "/v1/status",
        ):
            async with session.get(base + path) as response:
                assert response.status in (404, 405), path
            async with session.post(base + path, json={"recipient": "x", "documents": [third.hex()]}) as response:
                assert response.status in (404, 405), path
        body = await (await session.get(listed[0]["location"])).read()
        for secret in (stored[other][:64], stored[third][:64], stored[mine][:64], vault.keys.root, vault.keys.vault, one.key):
            assert secret not in body


async def test_an_expired_a_used_up_and_a_revoked_link_open_nothing(vault: Vault, base: str, tmp_path: Path) -> None:
    (digest,) = await put(vault, tmp_path / "one", 9_000)
    once = vault.links.make([digest], uses_max=1).link(base)
    outcomes = await asyncio.gather(*(fetch(once, tmp_path / f"at-once-{number}") for number in range(5)), return_exceptions=True)
    assert sum(not isinstance(each, BaseException) for each in outcomes) == 1
    assert all(isinstance(each, list | Absent) for each in outcomes)
    late = vault.links.make([digest], until=int(time.time()) - 1).link(base)
    with pytest.raises(Absent, match="expired"):
        await fetch(Link(late.url, late.key), tmp_path / "late")  # a reader whose clock is wrong, or who took the date out of the link
    note = vault.links.make([digest])
    async with aiohttp.ClientSession() as session:
        (listed,) = (await (await session.post(note.link(base).url, json={"recipient": "x"})).json())["files"]
        assert vault.links.revoke(note.name).revoked
        assert (await session.get(listed["location"])).status == 404  # not even what was handed out just before
    with pytest.raises(Absent, match="revoked"):
        await fetch(note.link(base), tmp_path / "revoked")
    assert not (tmp_path / "late").exists()
    (one,) = await put(vault, tmp_path / "gone", 9_000)
    empty = vault.links.make([one])
    assert vault.links.state(empty) == "open"
    await vault.custody.end([one])
    assert "destroyed" in vault.links.state(empty)
    with pytest.raises(Absent, match="destroyed"):
        await fetch(empty.link(base), tmp_path / "gone too")


async def test_guesses_of_a_passcode_are_counted_and_few(vault: Vault, base: str, tmp_path: Path) -> None:
    (digest,) = stored = await put(vault, tmp_path / "one", 9_000)
    note = vault.links.make([digest], passcode="right 4711")
    link = note.link(base)
    assert link.passcode
    with pytest.raises(Refused, match="needs a passcode"):
        await fetch(link, tmp_path / "none")
    before = uses(await vault.shares.log(digest))
    for left in range(wrong_max - 1, wrong_max - 4, -1):
        with pytest.raises(Refused) as refused:
            await fetch(link, tmp_path / "wrong", f"guess {left}")
        assert str(left) in refused.value.hint
    assert uses(await vault.shares.log(digest)) == before  # nothing was read for a guess
    (got,) = await fetch(link, tmp_path / "right", "right 4711")
    assert got.path.read_bytes() == stored[digest]
    outcomes = await asyncio.gather(*(fetch(link, tmp_path / "wrong", "no") for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(each, Refused) for each in outcomes) == wrong_max - 3
    with pytest.raises(Absent, match="locked"):
        await fetch(link, tmp_path / "locked", "right 4711")


@pytest.mark.skipif(chromium is None, reason="Chromium is not installed")
async def test_a_browser_opens_a_link_with_its_passcode_and_saves_the_very_bytes(vault: Vault, base: str, tmp_path: Path) -> None:
    stored = await put(vault, tmp_path / "study", 30_000, 9_000)
    note = vault.links.make(list(stored), passcode="korrekt", label=label, until=int(time.time()) + 86_400)
    async with browser(tmp_path) as page:
        await page.open(note.link(base).to_text(f"{base}/link"))
        assert await page.run("document.title") == label
        await page.picture(tmp_path / "1-asked.png")
        for left in ("9 tries are left", "8 tries are left"):
            await page.run("document.getElementById('passcode').value = 'falsch'; document.getElementById('open').click()")
            await page.until(f"document.getElementById('told').textContent.includes({left!r})")
        assert await page.run("document.getElementById('list').children.length") == 0
        await page.picture(tmp_path / "2-wrong.png")
        await page.run("document.getElementById('passcode').value = 'korrekt'; document.getElementById('open').click()")
        await page.until("document.getElementById('list').children.length === 2")
        await page.picture(tmp_path / "3-open.png")
        await page.run("document.getElementById('all').click()")
        await eventually(lambda: all((tmp_path / f"letter-{number}.pdf").exists() for number in range(2)))
        await eventually(lambda: not list(tmp_path.glob("*.crdownload")))
        saved = [(tmp_path / f"letter-{number}.pdf").read_bytes() for number in range(2)]
        assert {sha256(each).digest(): each for each in saved} == stored
        guarded = vault.links.make(list(stored), passcode="korrekt")
        await page.open(guarded.link(base).to_text(f"{base}/link"))
        for _ in range(wrong_max):
            await page.until("!document.getElementById('open').disabled")
            await page.run("document.getElementById('passcode').value = 'x'; document.getElementById('open').click()")
            await page.until(
                "document.getElementById('told').className === 'wrong' && document.getElementById('told').textContent !== 'seen'"
            )
            last = await page.run("document.getElementById('told').textContent")
            await page.run("document.getElementById('told').textContent = 'seen'")
        assert "locked" in last
        assert await page.run("document.getElementById('open').disabled")
        await page.open(guarded.link(base).to_text(f"{base}/link")[:-30])
        assert "cut" in await page.run("document.getElementById('told').textContent")
    assert uses(await vault.shares.log(next(iter(stored)))) >= 1


@pytest.mark.skipif(chromium is None, reason="Chromium is not installed")
async def test_a_browser_shows_what_it_can_show_in_a_tab_of_its_own(vault: Vault, base: str, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "letter.txt").write_text("Grüße aus der Klinik <script>document.title='run'</script>", encoding="utf-8")
    (folder / "letter.pdf").write_bytes(printed("Befund"))
    (folder / "scan.bin").write_bytes(os.urandom(3_000))
    report = await vault.put(sorted(folder.iterdir()))
    note = vault.links.make([each.sha256 for each in report.stored])
    async with browser(tmp_path) as page:
        await page.open(note.link(base).to_text(f"{base}/link"))
        await page.run(
            "var opened = []; var real = window.open; window.open = (...a) => { const t = real(...a); opened.push(t); return t; }"
        )
        await page.run("document.getElementById('open').click()")
        await page.until("document.getElementById('list').children.length === 3")
        acts = await page.run(
            "Object.fromEntries([...document.querySelectorAll('#list li')].map((item) => "
            "[item.querySelector('.name').firstChild.textContent, [...item.querySelectorAll('button')].map((each) => each.textContent)]))"
        )
        assert acts == {"letter.pdf": ["View", "Save"], "letter.txt": ["View", "Save"], "scan.bin": ["Save"]}
        for number, name in enumerate(("letter.txt", "letter.pdf")):
            await page.run(f"document.querySelector('button[aria-label^=\"View {name}\"]').click()")
            await page.until(f"opened.length === {number + 1} && opened[{number}].location.href.startsWith('blob:')")
            await page.until(f"opened[{number}].document.readyState === 'complete' && Boolean(opened[{number}].document.body)")
        assert "Grüße aus der Klinik <script>" in await page.run("opened[0].document.body.innerText")
        assert await page.run("opened[0].document.title") != "run"
        assert await page.run("opened[1].document.contentType") == "application/pdf"
        assert await page.run("document.getElementById('told').textContent") == ""
        await page.picture(tmp_path / "list.png")


async def eventually(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.05)


async def test_links_are_to_own_documents_that_are_there(vault: Vault, base: str, tmp_path: Path) -> None:
    with pytest.raises(Absent):
        vault.links.make([bytes(32)])
    with pytest.raises(Absent):
        vault.links.revoke("nowhere")
    (digest,) = await put(vault, tmp_path / "one", 9_000)
    link = vault.links.make([digest]).link(base)
    await vault.custody.end([digest])
    with pytest.raises(Absent, match="destroyed"):
        await fetch(link, tmp_path / "gone")


async def test_what_is_no_request_is_refused_and_the_page_runs_nothing_foreign(vault: Vault, base: str, tmp_path: Path) -> None:
    (digest,) = await put(vault, tmp_path / "one", 9_000)
    url = vault.links.make([digest]).link(base).url
    async with aiohttp.ClientSession() as session:
        for body in (b"", b"[]", b"{}", b'{"recipient": 7}', b'{"recipient": "x", "passcode": 7}', b"\xff"):
            assert (await session.post(url, data=body)).status in (400, 404)
        assert (await session.post(url, data=b"x" * 10_000)).status in (400, 404, 413)
        async with session.options(url) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "*"
        async with session.get(f"{base}/link") as response:
            assert response.status == 200
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            page = await response.text()
            assert re.findall("<script[^>]*>.*?</script>", page, re.DOTALL) == ['<script type="module" src="link.js"></script>']
    assert [note.uses for note in vault.links.all() if digest in note.documents] == [0]


async def test_links_are_not_served_off_this_machine_without_tls(vault: Vault, unused_tcp_port: int) -> None:
    with pytest.raises(Refused, match="without TLS"):
        async with serving(vault.links, "https://x", "0.0.0.0", unused_tcp_port):
            pass


def test_the_commands_make_and_open_links(trial: LocalConsortium, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("MEDSHARD_HOME", str(trial.vault_home))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.pdf").write_bytes(b"%PDF-1.4\n" + os.urandom(500))
    assert main(["put", "policy.pdf"]) == Exit.OK
    digest = capsys.readouterr().out.split()[0]
    monkeypatch.setenv("MEDSHARD_LINK_PASSCODE", "4711")
    made = [
        "share",
        digest,
        "--link",
        "--url",
        "https://share.example",
        "--passcode",
        "--max-uses",
        "3",
        "--until",
        "2d",
        "--qr",
        "link.svg",
    ]
    assert main(made) == Exit.OK
    text = capsys.readouterr().out.strip()
    link = Link.from_text(text)
    assert text.startswith("https://share.example/link#shlink:/")
    assert (link.passcode, 0 < link.until - time.time() < 3 * 86_400) == (True, True)
    assert (tmp_path / "link.svg").read_text().startswith("<?xml")
    assert main(["links", "ls"]) == Exit.OK
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "of 3 times" in line]
    assert main(["links", "revoke", line.split()[0]]) == Exit.OK
    assert main(["share", digest]) == Exit.USAGE
    assert main(["share", digest, "--link"]) == Exit.USAGE
    assert main(["share", digest, "--link", "--url", "http://share.example"]) == Exit.USAGE
    assert main(["share", digest, "--to", "x", "--max-uses", "1"]) == Exit.USAGE
    assert main(["get", "shlink:/AAAA"]) == Exit.DAMAGED
