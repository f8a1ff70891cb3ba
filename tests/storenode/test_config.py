"""config.toml: what is accepted, and how each mistake is explained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from medshard_protocol.errors import Absent, Conflict, Malformed
from storenode.config import AuditSection, Config, Limits, TimestampSection, write_config

good = 'url = "https://node.example:9700"\n'

mistakes = {
    "misspelt": (good + "capacity_byte = 5", "capacity_byte: no such key", "did you mean capacity_bytes?"),
    "misspelt in a section": (good + "[limits]\nbody_stal_s = 5", "limits.body_stal_s: no such key", "did you mean body_stall_s?"),
    "outside its section": (good + "sweep_after_s = 5", "sweep_after_s: no such key", "move it under [limits]"),
    "unknown": (good + "colour = 5", "colour: no such key", "remove it"),
    "no url": ("", "url: missing", "https://HOST:PORT"),
    "url without port": ('url = "https://node.example"', "url: expected https://HOST:PORT", "for example"),
    "url without TLS": ('url = "http://node.example:9700"', "url: expected https://HOST:PORT", "for example"),
    "url with a path": ('url = "https://node.example:9700/x"', "url: expected https://HOST:PORT", "for example"),
    "number as text": (good + 'capacity_bytes = "5"', "capacity_bytes: expected a whole number, got text", "without quotes"),
    "text as number": ("url = 5", "url: expected text, got a whole number", 'in "quotes"'),
    "fraction of a byte": (good + "capacity_bytes = 1e15", "capacity_bytes: expected a whole number", "without quotes"),
    "too little": (good + "capacity_bytes = 5", "capacity_bytes: expected a number from 1_048_576 to", "in that range"),
    "negative": (good + "[limits]\nbody_stall_s = -1", "limits.body_stall_s: expected a number from 0.1", "in that range"),
    "not a number": (good + "[limits]\nbody_stall_s = nan", "limits.body_stall_s: expected a number from 0.1", "in that range"),
    "a name to listen on": (good + 'listen = "localhost:9700"', "listen: expected IP:PORT", "0.0.0.0:9700"),
    "port out of range": (good + 'listen = "127.0.0.1:99999"', "listen: expected IP:PORT", "0.0.0.0:9700"),
    "no port": (good + 'listen = "127.0.0.1"', "listen: expected IP:PORT", "0.0.0.0:9700"),
    "metrics for all": (good + '[metrics]\nlisten = "0.0.0.0:9701"', "metrics.listen: expected an address of this machine", "allow_remote"),
    "loud": (good + '[log]\nlevel = "loud"', "log.level", '"debug", "info", "warning", "error"'),
    "odd format": (good + '[log]\nformat = "xml"', "log.format", '"auto", "json", "text"'),
    "a value for a section": (good + "limits = 3", "limits: expected a section", "comments"),
    "no data folder": (good + 'data = ""', "data: expected a folder", 'data = "data"'),
    "not TOML": ("url = \n", "not TOML", "quotes"),
    "not text": ("\udc80", "not TOML", "quotes"),
}


@pytest.mark.parametrize("name", mistakes)
def test_a_mistake_is_explained_with_file_key_expectation_and_fix(name: str) -> None:
    text, message, hint = mistakes[name]
    with pytest.raises(Malformed) as raised:
        Config.parse(Path("/srv/node"), text)
    assert "/srv/node/config.toml" in str(raised.value)
    assert message in str(raised.value)
    assert hint in raised.value.hint


def test_what_init_writes_is_accepted_and_says_the_defaults(tmp_path: Path) -> None:
    write_config(tmp_path, url="https://node.example:9700", capacity_bytes=5_000_000_000, metrics="127.0.0.1:9701")
    config = Config.load(tmp_path)
    assert (config.url, config.listen_address) == ("https://node.example:9700", ("127.0.0.1", 9700))
    assert (config.capacity_bytes, config.metrics_address) == (5_000_000_000, ("127.0.0.1", 9701))
    assert config.data == tmp_path / "data"
    assert config.limits == Limits()


def test_the_commented_defaults_are_the_defaults(tmp_path: Path) -> None:
    write_config(tmp_path, url="https://node.example:9700")
    before = Config.load(tmp_path)
    lines = (tmp_path / "config.toml").read_text().splitlines()
    uncommented = [line.removeprefix("# ") if line.startswith("# ") and " = " in line and line[2].islower() else line for line in lines]
    assert uncommented != lines
    assert Config.parse(tmp_path, "\n".join(uncommented)) == before


def test_every_key_can_be_set(tmp_path: Path) -> None:
    text = (
        'url = "https://[::1]:9700"\nlisten = "[::]:9700"\ndata = "/srv/data"\ncapacity_bytes = 2_000_000\n'
        '[metrics]\nlisten = "10.0.0.5:9701"\nallow_remote = true\n[log]\nlevel = "debug"\nformat = "json"\n'
        '[ledger]\npublic = true\n[timestamp]\nurl = "https://tsa.example"\nevery_h = 2\ndigest = "sha512"\n'
        "[audit]\nper_day = 10\nsilence_s = 60\nscrub_bytes_per_s = 0\n"
        "[limits]\nshard_bytes_max = 70000\nmanifest_bytes_max = 70000\nsmall_shard_bytes_max = 0\nbody_stall_s = 1\nsweep_after_s = 0.5\n"
    )
    config = Config.parse(tmp_path, text)
    assert (config.listen_address, config.metrics_address) == (("::", 9700), ("10.0.0.5", 9701))
    assert (config.data, config.log_level, config.log_format) == (Path("/srv/data"), "debug", "json")
    assert (config.public_log, config.timestamp) == (True, TimestampSection(url="https://tsa.example", every_h=2, digest="sha512"))
    assert config.audit == AuditSection(per_day=10, silence_s=60, scrub_bytes_per_s=0)
    assert config.limits.body_stall_s == 1
    assert config.limits.sweep_after_s == 0.5
    assert dataclasses.is_dataclass(config)


def test_a_home_without_configuration_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(Absent) as raised:
        Config.load(tmp_path)
    assert "init" in raised.value.hint


def test_a_configuration_is_never_overwritten(tmp_path: Path) -> None:
    write_config(tmp_path, url="https://node.example:9700")
    with pytest.raises(Conflict):
        write_config(tmp_path, url="https://other.example:9700")
    assert Config.load(tmp_path).url == "https://node.example:9700"


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("#" * 70_000)
    with pytest.raises(Malformed, match="larger than"):
        Config.load(tmp_path)
