"""Links as text, and what is sent under them: cut, changed, another's."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from medshard.links import jwe
from medshard.links.model import Link, Note, label_chars_max, wrong_max
from medshard.links.opening import _name, _tries
from medshard_protocol.errors import Damaged, Malformed


def test_a_link_is_text_that_comes_back_with_or_without_its_page() -> None:
    link = Link("https://share.example/shl/abc", bytes(range(32)), 1_900_000_000, passcode=True, label="Röntgen 2026")
    assert Link.from_text(link.to_text()) == link
    assert Link.from_text(f"  {link.to_text('https://share.example/link')}\n") == link
    assert Link.from_text(Link("https://a/b", bytes(32)).to_text()) == Link("https://a/b", bytes(32))


def test_a_cut_or_changed_link_is_malformed() -> None:
    text = Link("https://share.example/shl/abc", os.urandom(32), 1_900_000_000).to_text()
    for wrong in ("", "https://share.example", text[:-3], text.replace("shlink:/", "shlink:/%"), "shlink:/" + "A" * 5000, "shlink:/e30"):
        with pytest.raises(Malformed):
            Link.from_text(wrong)

    def link(**told: object) -> str:
        good = {"url": "https://a/b", "key": "A" * 43}
        return "shlink:/" + base64.urlsafe_b64encode(json.dumps(good | told).encode()).decode().rstrip("=")

    Link.from_text(link())
    for told in ({"url": "file:///etc/passwd"}, {"url": 7}, {"key": "AA"}, {"v": 2}, {"flag": 1}, {"exp": "soon"}, {"label": []}):
        with pytest.raises(Malformed):
            Link.from_text(link(**told))


def test_what_is_sent_opens_with_the_links_key_alone() -> None:
    key, plain = os.urandom(32), os.urandom(1000)
    data = jwe.seal(key, plain, "application/pdf")
    assert jwe.open_(key, data) == (plain, "application/pdf")
    with pytest.raises(Damaged):
        jwe.open_(os.urandom(32), data)
    for at in range(0, len(data), 37):
        changed = data[:at] + (b"A" if data[at : at + 1] != b"A" else b"B") + data[at + 1 :]
        if changed.count(b".") == 4 and base64.urlsafe_b64decode(changed.split(b".")[3] + b"==") != base64.urlsafe_b64decode(
            data.split(b".")[3] + b"=="
        ):
            with pytest.raises((Malformed, Damaged)):
                jwe.open_(key, changed)


def test_no_other_algorithm_is_taken() -> None:
    key = os.urandom(32)
    head, _, nonce, body, tag = jwe.seal(key, b"x", "text/plain").split(b".")
    for header in ({"alg": "none", "enc": "A256GCM"}, {"alg": "dir", "enc": "A128GCM"}, {"alg": "dir", "enc": "A256GCM", "zip": "DEF"}, []):
        other = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=")
        with pytest.raises(Malformed):
            jwe.open_(key, b".".join((other, b"", nonce, body, tag)))
    for wrong in (b"", b"a.b.c", b".".join((head, b"x", nonce, body, tag)), b".".join((head, b"", b"AA", body, tag)), b"!.." + body):
        with pytest.raises(Malformed):
            jwe.open_(key, wrong)


def test_a_note_comes_back_and_says_why_a_link_is_closed() -> None:
    note = Note.fresh((bytes(32), bytes(31) + b"1"), until=2_000, uses_max=2, passcode="4711", label="Für Sie")
    assert Note.from_bytes(note.to_bytes()) == note
    assert note.fits("4711")
    assert not note.fits("4712")
    assert not note.fits("")
    assert note.state(1_999) == "open"
    assert note.state(2_000) == "expired"
    assert note.counted(right=True).counted(right=True).state(0) == "used up"
    locked = note
    for _ in range(wrong_max):
        assert locked.state(0) == "open"
        locked = locked.counted(right=False)
    assert "wrong passcodes" in locked.state(0)
    assert b"4711" not in note.to_bytes()
    assert Note.fresh((bytes(32),)).fits("anything")


def test_a_label_that_is_too_long_makes_no_link_and_costs_the_others_nothing() -> None:
    """One note that could not be read would stop the list of links, and every export with it."""
    with pytest.raises(Malformed, match="80 characters"):
        Note.fresh((bytes(32),), label="x" * (label_chars_max + 1))
    before = replace(Note.fresh((bytes(32),)), label="x" * 95)  # as an earlier version has stored them
    assert Note.from_bytes(before.to_bytes()).label == "x" * label_chars_max


def test_no_links_name_is_taken_for_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([bytes([0xFB]) * 32, bytes([0xF8]) * 32, b"0" * 32, b"k" * 32])
    monkeypatch.setattr("medshard.links.model.os.urandom", lambda size: next(drawn))
    assert Note.fresh((bytes(32),)).name[0] != "-"


@pytest.mark.parametrize(
    ("left", "says"), [(2, "2 tries are left"), (1, "1 try is left"), (0, "locked"), ("<b>", "compare"), (None, "compare")]
)
def test_the_tries_that_are_left_are_told_in_words(left: object, says: str) -> None:
    assert says in _tries(left)


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("letter.pdf", "letter.pdf"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("C:\\Windows\\x", "C_Windows_x"),
        ("..", "document-3.pdf"),
        ("", "document-3.pdf"),
        (None, "document-3.pdf"),
        ("a\x00b\x1b[2J", "a_b_[2J"),
    ],
)
def test_a_name_from_outside_never_leaves_the_folder(told: object, name: str) -> None:
    found = _name(told, 3, "application/pdf")
    assert Path(found).name == found
    assert found == name
