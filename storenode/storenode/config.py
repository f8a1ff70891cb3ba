"""HOME/config.toml, checked and explained.

Law: a file that is wrong anywhere is refused whole, and the error names the file, the key, what was expected and what to write. Nothing
is guessed and no key is ignored, so a misspelt limit cannot silently be the default. Keys and certificates are not configuration:
they lie under HOME/keys, and who takes part stands in HOME/genesis.medshard.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec

from medshard_protocol.errors import Absent, Malformed
from medshard_protocol.manifest import manifest_bytes_max
from medshard_protocol.roster import is_node_url
from storenode.durable import create

config_name: Final = "config.toml"
config_bytes_max: Final = 64 * 1024
listen_default: Final = "127.0.0.1:9700"
capacity_default: Final = 1_000_000_000_000

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
LogFormat: TypeAlias = Literal["auto", "json", "text"]
Address: TypeAlias = tuple[str, int]

_kinds: Final = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "object": "a section"}


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one request may cost. Sizes in bytes, times in seconds."""

    shard_bytes_max: int = 1 << 40
    manifest_bytes_max: int = manifest_bytes_max
    small_shard_bytes_max: int = 64 << 10
    body_stall_s: float = 30.0
    sweep_after_s: float = 86_400.0
    watch_every_s: float = 15.0


class MetricsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where Prometheus asks, over plain HTTP; empty is nowhere."""

    listen: str = ""
    allow_remote: bool = False


class LogSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How loud, and in what form."""

    level: LogLevel = "info"
    format: LogFormat = "auto"


class LedgerSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who may read the ledger here, where it is kept, and whether this node stands by to order its entries."""

    public: bool = False
    engine: str = "sqlite"
    sequencer: bool | Literal["auto"] = "auto"


class RepairSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When lost shards are made again, and how fast. Times in seconds."""

    on: bool = True
    margin: int = 254
    grace_s: float = 3600.0
    patience_s: float = 14_400.0
    rate_bytes_per_s: int = 20_000_000
    at_once: int = 2
    rebalance: bool = True
    rebalance_over: float = 0.05


class TimestampSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which outside authority (RFC 3161) is asked for timestamps over the ledger; an empty url is none."""

    url: str = ""
    every_h: float = 24.0
    digest: Literal["sha256", "sha512"] = "sha256"


class AuditSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How often other nodes are asked for what they hold, and how fast own shards are read again. Zero is never."""

    per_day: int = 192
    answer_s: float = 15.0
    confirm_s: float = 60.0
    silence_s: float = 43_200.0
    inventory_per_s: float = 20.0
    scrub_bytes_per_s: int = 8 << 20
    scrub_cells_per_s: int = 500
    scrub_every_s: float = 86_400.0


_no_authority: Final = TimestampSection()
_repair: Final = RepairSection()
_audits: Final = AuditSection()


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    url: str
    listen: str = listen_default
    data: str = "data"
    capacity_bytes: int = capacity_default
    limits: Limits = Limits()
    metrics: MetricsSection = MetricsSection()
    log: LogSection = LogSection()
    ledger: LedgerSection = LedgerSection()
    timestamp: TimestampSection = TimestampSection()
    repair: RepairSection = RepairSection()
    audit: AuditSection = AuditSection()


@dataclass(frozen=True)
class Config:
    """A node's configuration, checked. Paths are absolute."""

    home: Path
    url: str
    listen: str
    listen_address: Address
    data: Path
    capacity_bytes: int
    limits: Limits
    metrics_address: Address | None
    log_level: LogLevel
    log_format: LogFormat
    public_log: bool = False
    ledger_engine: str = "sqlite"
    sequencer: bool | None = None  # whether it stands by to order the ledger's entries; None: as ``standbys`` says
    timestamp: TimestampSection = _no_authority
    repair: RepairSection = _repair
    audit: AuditSection = _audits

    @classmethod
    def load(cls, home: Path) -> Config:
        """Read HOME/config.toml. Raises Absent or Malformed, both with what to do."""
        path = home / config_name
        try:
            with path.open("rb") as file:
                data = file.read(config_bytes_max + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise Absent(f"{path} does not exist", hint=f"make a node there: storenode --home {home} init --help") from None
        except OSError as error:
            raise Malformed(f"{path}: cannot be read ({error.strerror})", hint="check owner and permissions of the file") from None
        if len(data) > config_bytes_max:
            raise Malformed(f"{path}: larger than {config_bytes_max} bytes", hint="this is not a configuration file")
        return cls.parse(home, data.decode("utf-8", errors="surrogateescape"))

    @classmethod
    def parse(cls, home: Path, text: str) -> Config:
        """Check the text of a configuration file. Raises Malformed."""
        path = home / config_name
        try:
            values = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, UnicodeError) as error:
            raise Malformed(
                f"{path}: not TOML: {error}", hint="strings need quotes; see the comments that `storenode init` writes"
            ) from None
        _refuse_unknown(path, values)
        try:
            file = msgspec.convert(values, _File)
        except msgspec.ValidationError as error:
            raise _explained(path, str(error)) from None
        _check_url(path, file.url)
        _check_numbers(path, file)
        metrics = _address(path, "metrics.listen", file.metrics.listen) if file.metrics.listen else None
        if metrics and not file.metrics.allow_remote and not _is_loopback(metrics[0]):
            raise _wrong(
                path,
                "metrics.listen",
                "an address of this machine only, since /metrics has neither TLS nor a password",
                file.metrics.listen,
                'write listen = "127.0.0.1:9701", or set allow_remote = true where a firewall guards the port',
            )
        return cls(
            home=home.absolute(),
            url=file.url,
            listen=file.listen,
            listen_address=_address(path, "listen", file.listen),
            data=home.absolute() / file.data,
            capacity_bytes=file.capacity_bytes,
            limits=file.limits,
            metrics_address=metrics,
            log_level=file.log.level,
            log_format=file.log.format,
            public_log=file.ledger.public,
            ledger_engine=file.ledger.engine,
            sequencer=None if file.ledger.sequencer == "auto" else file.ledger.sequencer,
            timestamp=file.timestamp,
            repair=file.repair,
            audit=file.audit,
        )


def write_config(
    home: Path,
    *,
    url: str,
    listen: str = listen_default,
    capacity_bytes: int = capacity_default,
    metrics: str = "",
    sequencer: bool | None = None,
    durable: bool = True,
) -> None:
    """Write a commented HOME/config.toml that ``Config.load`` accepts. Raises Conflict where one exists, Malformed for wrong values."""
    text = _template.format(
        url=url,
        listen=listen,
        capacity=f"{capacity_bytes:_}",
        metrics=metrics,
        limits=Limits(),
        sequencer=_shown(sequencer),
        repair=_repair,
        audit=_audits,
        repair_on=str(_repair.on).lower(),
        rebalance=str(_repair.rebalance).lower(),
    )
    Config.parse(home, text)
    create(home / config_name, text.encode(), mode=0o644, durable=durable)


def _shown(sequencer: bool | None) -> str:
    return '# sequencer = "auto"' if sequencer is None else f"sequencer = {str(sequencer).lower()}"


def _refuse_unknown(path: Path, values: dict[str, Any]) -> None:
    sections: dict[str, type[msgspec.Struct]] = {
        "": _File,
        "limits": Limits,
        "metrics": MetricsSection,
        "log": LogSection,
        "ledger": LedgerSection,
        "timestamp": TimestampSection,
        "repair": RepairSection,
        "audit": AuditSection,
    }
    for section, kind in sections.items():
        known = kind.__struct_fields__
        table = values.get(section, {}) if section else values
        for key in table if isinstance(table, dict) else ():
            if key in known:
                continue
            near = difflib.get_close_matches(key, known, 1)
            home = next((name for name, other in sections.items() if name and key in other.__struct_fields__), None)
            hint = f"did you mean {near[0]}?" if near else f"move it under [{home}]" if home and not section else "remove it"
            where = f"{section}.{key}" if section else key
            raise Malformed(f"{path}: {where}: no such key; there are {', '.join(known)}", hint=hint)


def _explained(path: Path, error: str) -> Malformed:
    """Say in our words what msgspec says with a JSON path: "Expected `int`, got `str` - at `$.limits.body_stall_s`"."""
    if missing := re.search(r"missing required field `(\w+)`", error):
        return Malformed(f"{path}: {missing[1]}: missing", hint=f'write {missing[1]} = "https://HOST:PORT", as the others reach this node')
    what, _, where = error.partition(" - at `$.")
    key = where.rstrip("`") or "file"
    what = what.replace("`", "").replace("Expected", "expected").replace("Invalid enum value", "expected another word than")
    hints = {"int": "write a number without quotes", "float": "write a number without quotes", "str": 'write text in "quotes"'}
    hint = next((text for kind, text in hints.items() if f"expected {kind}" in what), "see the comments that `storenode init` writes")
    for theirs, ours in _kinds.items():
        what = re.sub(rf"\b{theirs}\b", ours, what)
    if key == "log.level":
        hint = 'write one of "debug", "info", "warning", "error"'
    elif key == "log.format":
        hint = 'write one of "auto", "json", "text"'
    return Malformed(f"{path}: {key}: {what}", hint=hint)


def _wrong(path: Path, key: str, expected: str, got: object, hint: str) -> Malformed:
    return Malformed(f"{path}: {key}: expected {expected}, got {got!r}", hint=hint)


def _check_url(path: Path, url: str) -> None:
    if not is_node_url(url):
        raise _wrong(path, "url", "https://HOST:PORT in lower case", url, 'write for example url = "https://node.hospital.example:9700"')


def _check_numbers(path: Path, file: _File) -> None:
    limits = file.limits
    checks: tuple[tuple[str, float, float, float], ...] = (
        ("capacity_bytes", file.capacity_bytes, 1 << 20, 2**63 - 1),
        ("limits.shard_bytes_max", limits.shard_bytes_max, 1 << 16, 1 << 44),
        ("limits.manifest_bytes_max", limits.manifest_bytes_max, 1 << 16, manifest_bytes_max),
        ("limits.small_shard_bytes_max", limits.small_shard_bytes_max, 0, 1 << 20),
        ("limits.body_stall_s", limits.body_stall_s, 0.1, 3600),
        ("limits.sweep_after_s", limits.sweep_after_s, 0.1, 10 * 365 * 86400),
        ("limits.watch_every_s", limits.watch_every_s, 0.1, 3600),
        ("timestamp.every_h", file.timestamp.every_h, 0.0001, 24 * 366),
        ("repair.margin", file.repair.margin, 0, 254),
        ("repair.grace_s", file.repair.grace_s, 0.1, 365 * 86400),
        ("repair.patience_s", file.repair.patience_s, 0.1, 365 * 86400),
        ("repair.at_once", file.repair.at_once, 1, 16),
        ("repair.rebalance_over", file.repair.rebalance_over, 0, 1),
    )
    audit = file.audit
    checks += (
        ("audit.per_day", audit.per_day, 0, 1_000_000),
        ("audit.answer_s", audit.answer_s, 0.1, 600),
        ("audit.confirm_s", audit.confirm_s, 0.1, 86_400),
        ("audit.silence_s", audit.silence_s, 0.1, 30 * 86_400),
        ("audit.inventory_per_s", audit.inventory_per_s, 0.01, 100_000),
        ("audit.scrub_bytes_per_s", audit.scrub_bytes_per_s, 0, 1 << 40),
        ("audit.scrub_cells_per_s", audit.scrub_cells_per_s, 1, 10_000_000),
        ("audit.scrub_every_s", audit.scrub_every_s, 0.1, 366 * 86_400),
    )
    for key, value, least, most in checks:
        if not least <= value <= most:
            raise _wrong(path, key, f"a number from {least:,} to {most:,}".replace(",", "_"), value, "choose a number in that range")
    if file.repair.rate_bytes_per_s and not 1 << 20 <= file.repair.rate_bytes_per_s <= 1 << 40:
        expected = f"0 for no limit, or a number from {1 << 20:_} to {1 << 40:_}"  # slower, a line would seem to stand still
        raise _wrong(path, "repair.rate_bytes_per_s", expected, file.repair.rate_bytes_per_s, "choose a number in that range")
    if file.timestamp.url and not file.timestamp.url.startswith(("https://", "http://")):
        raise _wrong(path, "timestamp.url", "a web address", file.timestamp.url, 'write for example url = "http://tsa.example/tsr"')
    if file.ledger.engine != "sqlite" and not file.ledger.engine.startswith(("postgresql://", "postgres://")):
        raise _wrong(path, "ledger.engine", "sqlite or a DSN", file.ledger.engine, 'write engine = "postgresql://USER@HOST/DATABASE"')
    if not file.data:
        raise _wrong(path, "data", "a folder", file.data, 'write data = "data"')


def _address(path: Path, key: str, text: str) -> Address:
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
        number = int(port) if port.isascii() and port.isdigit() else 0
    except ValueError:
        number = 0
    if not colon or not 1 <= number <= 65535:
        raise _wrong(
            path, key, "IP:PORT", text, f'write for example {key.rpartition(".")[2]} = "0.0.0.0:9700" to listen on every interface'
        )
    return host, number


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


_template: Final = """\
# Configuration of a medshard storage node. Every key is checked; a misspelt one stops the node with an explanation.
# What is commented out shows the default. Changes count after a restart: SIGTERM finishes what is in flight.

# How the others reach this node. It stands in the genesis file too, so a change here alone moves nothing.
url = "{url}"

# IP:PORT to listen on. "0.0.0.0:9700" is every IPv4 interface, "[::]:9700" every IPv6 one.
listen = "{listen}"

# Shards and the ledger, relative to this file's folder. Put it on a disk of its own: all of it must survive a power cut.
data = "data"

# Never store more than this. Leave the ledger and the file system some room: about 90 % of the disk is right.
capacity_bytes = {capacity}

[metrics]
# Prometheus asks here, over plain HTTP without a password, so only this machine may. Empty: no metrics.
listen = "{metrics}"
# Set true where the port is guarded otherwise, such as a container's private network.
# allow_remote = false

[log]
# "debug" has a line for every request; "info" starts, stops and failures; also "warning", "error".
level = "info"
# "json" is one object a line, "text" is for eyes; "auto" is text on a terminal and JSON elsewhere.
format = "auto"

[ledger]
# The ledger is served below {url}/log in a form that other programs read (C2SP tlog-tiles). It holds no names, but it does show
# which key announced a read of which file id, and when. Set true to let anybody read it without a certificate.
# public = false
# Where this node keeps the ledger: "sqlite" is a file below data; "postgresql://USER@HOST/DATABASE" is for when one machine is outgrown.
# Several hosts may be named, HOST1,HOST2, where one takes over for the other. Needs pip install 'medshard[postgres]'.
# engine = "sqlite"
# Whether to order the ledger's entries when the node that the roster names for it is gone: true, false, or "auto": the first
# nodes of three institutions do, as the roster lists them. Two should in any case, of different institutions.
{sequencer}

[timestamp]
# The address of an outside authority (RFC 3161), such as http://tsa.example/tsr, whose signed time goes onto the ledger every so many
# hours. One node of the consortium is enough. Empty: none is asked.
# url = ""
# every_h = 24.0
# digest = "sha256"

[repair]
# Lost shards are made again by the nodes themselves. Set false to have none made by this node, and to find none.
# on = {repair_on}
# Repair a file when it could lose no more than so many shards. The default repairs at the first loss.
# margin = {repair.margin}
# A node that has not answered for so many seconds is gone, and its shards with it. Each repair uses up a node that never had a shard of
# the file, for good; so a restart or a broken cable should fit in.
# grace_s = {repair.grace_s}
# A node that said that it makes a shard again, and has not done it after so many seconds, is passed over.
# patience_s = {repair.patience_s}
# Bytes a second that all repairs of this node may move, as the one that gets a shard and as a helper; 0 for no limit.
# rate_bytes_per_s = {repair.rate_bytes_per_s:_}
# Shards that this node makes again at a time.
# at_once = {repair.at_once}
# Hand shards to a node that joined, if that is where they belong now and it is emptier than this one by so large a part of its capacity.
# rebalance = {rebalance}
# rebalance_over = {repair.rebalance_over}

[audit]
# So many times a day, ask all holders of a file that was drawn by chance for a cell of theirs. 192 find 1 % that is lost within a week,
# and a node that is lost within a day. 0: never.
# per_day = {audit.per_day}
# Who does not answer within so many seconds, three times, is late.
# answer_s = {audit.answer_s}
# A shard is missing when its holder has said so twice, so many seconds apart.
# confirm_s = {audit.confirm_s}
# A node is lost when it has answered nothing for so many seconds. A repair of a machine must fit in.
# silence_s = {audit.silence_s}
# Ask holders about all files there are, so many a second, once a day.
# inventory_per_s = {audit.inventory_per_s}
# Read own shards again, so many bytes and cells a second at most; 0 bytes: never.
# scrub_bytes_per_s = {audit.scrub_bytes_per_s:_}
# scrub_cells_per_s = {audit.scrub_cells_per_s}
# From the beginning of one pass over all of them to that of the next, at least so many seconds.
# scrub_every_s = {audit.scrub_every_s}

[limits]
# Largest shard taken. A shard is the file's size over k.
# shard_bytes_max = {limits.shard_bytes_max:_}
# Largest manifest taken. A pack of 10,000 slices needs some MiB.
# manifest_bytes_max = {limits.manifest_bytes_max:_}
# Shards up to this size live in one SQLite file instead of a file each.
# small_shard_bytes_max = {limits.small_shard_bytes_max:_}
# Cut who sends nothing of a body, or reads nothing of a shard, for so many seconds.
# body_stall_s = {limits.body_stall_s}
# Delete a shard that was not registered on the ledger so many seconds after it came. A slow upload must fit in.
# sweep_after_s = {limits.sweep_after_s:_}
# Look at every mirror's head, and prove that all heads are one history, every so many seconds.
# watch_every_s = {limits.watch_every_s}
"""
