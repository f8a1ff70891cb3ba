"""What a department sets: read from a file and from flags, and refused where it would let strangers in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medshard.cli.main import main
from medshard.gateway import settings
from medshard.gateway.dimse.peers import Peer
from medshard_protocol.errors import Malformed, Refused


def listening(where: str, **about: Any) -> settings.Listening:
    usual: dict[str, Any] = {
        "calling": (), "any_calling": False, "any_called": False, "peers": (), "private": (), "associations_max": 8, "tls": None,
    }  # fmt: skip
    return settings.listening(where, "MEDSHARD", **(usual | about))


def test_a_node_that_strangers_could_reach_is_refused_with_what_to_do(tmp_path: Path) -> None:
    assert listening("127.0.0.1:11112").calling is None
    for where in ("0.0.0.0:11112", "192.168.1.7:11112", "[::]:11112"):
        with pytest.raises(Refused, match="for anybody") as refused:
            listening(where)
        assert "--calling" in refused.value.hint
        with pytest.raises(Refused, match="for anybody"):
            listening(where, any_calling=True, calling=("CT01",))
        with pytest.raises(Refused, match="without TLS") as refused:
            listening(where, calling=("CT01",))
        assert "--tls-cert" in refused.value.hint


def test_peers_and_titles_that_are_listed_may_call() -> None:
    found = listening("127.0.0.1:1", calling=("CT01",), peers=(settings.peer("PACS=tls:10.0.0.5:2762"), settings.peer("WS=::1:104")))
    assert found.calling == {"CT01", "PACS", "WS"}
    assert found.peers == (Peer("PACS", "10.0.0.5", 2762, True), Peer("WS", "::1", 104))


@pytest.mark.parametrize("text", ["", "A=", "A=host", "A=host:0x1", "ABCDEFGHIJKLMNOPQ=h:1", " A=h:1", "A\\B=h:1", "A=h:99999"])
def test_what_is_no_peer_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        settings.peer(text)


def test_sizes_have_units() -> None:
    assert [settings.size(text) for text in ("5", "1KiB", "1.5 MiB", "20GiB", "1tib")] == [5, 1024, 3 * 2**19, 20 * 2**30, 2**40]
    with pytest.raises(Malformed):
        settings.size("20 GB")


def test_a_file_says_what_flags_leave_unsaid_and_wrong_names_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text('title = "ARCHIVE"\nquiet-time = 2\ndimse = "0.0.0.0:104"\n[[peers]]\ntitle = "PACS"\nhost = "h"\nport = 104\n')
    found = settings.read_file(path)
    assert (found["title"], found["quiet_time"], found["peers"]) == ("ARCHIVE", 2, ["PACS=h:104"])
    home = ["--home", str(tmp_path / "none")]
    assert main([*home, "gateway", "--config", str(path)]) == 4  # the file's address is not the loopback, and there is no TLS
    assert "without TLS" in capsys.readouterr().err
    assert main([*home, "gateway", "--config", str(path), "--dimse", "127.0.0.1:0"]) == 3  # a flag goes before the file; there is no vault
    path.write_text("titel = 1\n")
    assert main([*home, "gateway", "--config", str(path)]) == 2
    assert "titel" in capsys.readouterr().err
    path.write_text('[[peers]]\nname = "PACS"\n')
    assert main([*home, "gateway", "--config", str(path)]) == 6
    path.write_text("title = \n")
    assert main([*home, "gateway", "--config", str(path)]) == 6
