"""Every parser of bytes from outside: it raises Malformed and nothing else, or what it reads has exactly these bytes.

A parser that is new in one of the modules below fails ``test_every_parser_is_fuzzed`` until it stands in the table. The runs here are a
short slice with fixed seeds; ``make soak`` runs the same for longer.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medshard_protocol
from medshard.escrow import Share
from medshard.model import Header
from medshard.sender import SenderKeys
from medshard_protocol import (
    audit,
    canonical,
    documentproof,
    identity,
    ids,
    messages,
    proofs,
    repairorder,
    rosters,
    sharing,
    tiles,
    tlogproof,
    vouchers,
)
from medshard_protocol.checkpoint import Checkpoint, Note, Signature, Verifier
from medshard_protocol.ending import Receipt
from medshard_protocol.entries import Entry
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.identity import client_csr
from medshard_protocol.invite import (
    Invite,
    Rotation,
    pack_join,
    pack_joined,
    pack_readmission,
    pack_sender,
    unpack_join,
    unpack_joined,
    unpack_readmission,
    unpack_sender,
)
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import SpanHead
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import Predecessor, Roster
from medshard_protocol.succession import Successor
from medshard_protocol.tiles import TileName
from storenode.invites import Issued
from storenode.ledger import wire
from storenode.ledger.fullhead import Lines

pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # of serial numbers, then refused
vectors = Path(__file__).parents[1] / "vectors"
modules = [
    f"medshard_protocol.{found.name}" for found in pkgutil.iter_modules(medshard_protocol.__path__) if not found.name.startswith("_")
]
modules += [
    "medshard.model",
    "medshard.escrow",
    "medshard.sender",
    "storenode.invites",
    "storenode.ledger.wire",
    "storenode.ledger.fullhead",
]
parser_name = re.compile(r"unpack_\w+|from_(bytes|text|line|path|code|vkey|value)|\w+_from_hex")
elsewhere = {"messages.unpack_error"}  # it never raises and never fails: test_messages.py


def load(name: str) -> Any:
    return json.loads((vectors / f"{name}.json").read_text())


@dataclass(frozen=True)
class Parser:
    """How to read bytes, how to write the value again (None where reading forgets something), and bytes to start from."""

    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes] | None
    seeds: tuple[bytes, ...]


def of_text(read: Callable[[str], Any], write: Callable[[Any], str] | None, *seeds: str) -> Parser:
    """A parser of text, fuzzed as the bytes of its UTF-8."""

    def read_bytes(data: bytes) -> Any:
        try:
            return read(data.decode())
        except UnicodeDecodeError:
            raise Malformed("not UTF-8") from None

    return Parser(read_bytes, None if write is None else lambda value: write(value).encode(), tuple(seed.encode() for seed in seeds))


def raw(*seeds: str) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(seed) for seed in seeds)


def hex_id(read: Callable[[str], bytes], size: int) -> Parser:
    return of_text(read, bytes.hex, "ab" * size, "00" * size)


def whole_file(read: Callable[[bytes], Any], *seeds: bytes) -> Parser:
    return Parser(read, lambda value: bytes(value.to_bytes()), seeds)


@lru_cache
def table() -> dict[str, Parser]:
    return {**of_files(), **of_messages(), **of_ledger(), **of_proofs(), **of_sharing(), **of_repair(), **of_audit(), **of_certificates()}


def of_files() -> dict[str, Parser]:
    issued = Issued("front desk", 1, 2, None, False)
    return {
        "canonical.decode": Parser(
            lambda data: canonical.decode(data, bytes_max=10**6, what="value"),
            canonical.encode,
            raw(*(vector["bytes"] for vector in load("encoding")["values"])),
        ),
        "manifest.Manifest.from_bytes": whole_file(Manifest.from_bytes, *raw(*(v["manifest"] for v in load("manifest")["manifests"]))),
        "model.Header.from_bytes": whole_file(Header.from_bytes, *raw(*(vector["bytes"] for vector in load("header")))),
        "escrow.Share.from_bytes": whole_file(Share.from_bytes, *raw(*load("escrow")["escrows"][0]["shares"])),
        "sender.SenderKeys.from_bytes": whole_file(SenderKeys.from_bytes, *raw(load("rotation")["sender"]["file"])),
        "invites.Issued.from_bytes": whole_file(Issued.from_bytes, issued.to_bytes()),
        "invite.Invite.from_code": of_text(
            Invite.from_code, None, Invite("https://[::1]:9700", ids.Sha256(b"g" * 32), b"s" * 16, 3).to_code()
        ),
        "ids.file_id_from_hex": hex_id(ids.file_id_from_hex, 32),
        "ids.node_id_from_hex": hex_id(ids.node_id_from_hex, 16),
        "ids.key_from_hex": hex_id(ids.key_from_hex, 32),
        "ids.sha256_from_hex": hex_id(ids.sha256_from_hex, 32),
        "ids.tag_from_hex": hex_id(ids.tag_from_hex, 32),
    }


def of_messages() -> dict[str, Parser]:
    wired = {vector["what"]: bytes.fromhex(vector["bytes"]) for vector in load("wire")["messages"]}
    m = messages
    return {
        "messages.unpack_small_puts": Parser(m.unpack_small_puts, m.pack_small_puts, (wired["small puts"],)),
        "messages.unpack_outcomes": Parser(lambda data: m.unpack_outcomes(data, "node"), None, (wired["outcomes"],)),
        "messages.unpack_small_reads": Parser(m.unpack_small_reads, m.pack_small_reads, (wired["small reads"],)),
        "messages.unpack_shards": Parser(lambda data: m.unpack_shards(data, 2), m.pack_shards, (wired["shards"],)),
        "messages.unpack_lookup": Parser(m.unpack_lookup, m.pack_lookup, (wired["lookup"],)),
        "messages.unpack_found": Parser(lambda data: m.unpack_found(data, 3), None, (wired["found"],)),
        "messages.SpanHead.from_bytes": whole_file(SpanHead.from_bytes, wired["span with digests"], wired["span with paths"]),
        "messages.unpack_stored": Parser(m.unpack_stored, None, (wired["stored"],)),
        "messages.unpack_check": Parser(m.unpack_check, m.pack_check, (wired["check"],)),
        "invite.unpack_readmission": Parser(unpack_readmission, pack_readmission, (pack_readmission(b"csr"),)),
        "invite.unpack_join": Parser(unpack_join, lambda value: pack_join(*value), (pack_join(b"s" * 16, b"csr"),)),
        "invite.Rotation.from_bytes": whole_file(Rotation.from_bytes, *raw(load("rotation")["rotation"]["body"])),
        "invite.unpack_sender": Parser(unpack_sender, lambda value: pack_sender(*value), raw(load("rotation")["sender"]["body"])),
        "invite.unpack_joined": Parser(unpack_joined, pack_joined, (pack_joined(b"certificate"),)),
    }


def of_ledger() -> dict[str, Parser]:
    ledger = load("ledger")
    sent = {name: bytes.fromhex(data) for name, data in ledger["messages"].items()}
    note, vkeys = ledger["checkpoint"], tuple(ledger["vkeys"].values())
    text, lines = note.partition("\n\n")[0] + "\n", [line + "\n" for line in note.rpartition("\n\n")[2].splitlines()]
    inclusion = bytes.fromhex(ledger["inclusion_of_2"])
    appended = proofs.unpack_append(sent["append"])
    bundle = bytes.fromhex(ledger["bundle_000.p_5"])

    links = rosters.unpack_links(bytes.fromhex(load("rosters")["answer"]))

    def read_inclusion(data: bytes) -> Inclusion:
        return Inclusion.from_value(canonical.decode(data, bytes_max=10**6, what="inclusion"))

    def read_link(data: bytes) -> rosters.Link:
        return rosters.Link.from_value(canonical.decode(data, bytes_max=10**6, what="link"))

    def read_before(data: bytes) -> Predecessor:
        return Predecessor.from_value(canonical.decode(data, bytes_max=10**6, what="log before"))

    before = canonical.encode(Roster.from_bytes(bytes.fromhex(ledger["successor"]["roster"])).before[0].to_value())

    return {
        "roster.Roster.from_bytes": whole_file(Roster.from_bytes, *raw(ledger["roster"]["bytes"], ledger["successor"]["roster"])),
        "roster.Predecessor.from_value": Parser(read_before, lambda value: canonical.encode(value.to_value()), (before,)),
        "succession.Successor.from_bytes": whole_file(Successor.from_bytes, *raw(ledger["successor"]["document"])),
        "rosters.Link.from_value": Parser(
            read_link, lambda value: canonical.encode(value.to_value()), (canonical.encode(links[0].to_value()),)
        ),
        "rosters.unpack_links": Parser(rosters.unpack_links, rosters.pack_links, (rosters.pack_links(links), rosters.pack_links(()))),
        "entries.Entry.from_bytes": whole_file(Entry.from_bytes, *raw(*(entry["entry"] for entry in ledger["entries"]))),
        "checkpoint.Note.from_bytes": whole_file(Note.from_bytes, note.encode()),
        "checkpoint.Signature.from_line": of_text(Signature.from_line, Signature.line, *lines),
        "checkpoint.Checkpoint.from_text": of_text(unless_refused(Checkpoint.from_text), Checkpoint.text, text),
        "checkpoint.Verifier.from_vkey": of_text(Verifier.from_vkey, Verifier.vkey, *vkeys),
        "proofs.Inclusion.from_value": Parser(read_inclusion, lambda value: canonical.encode(value.to_value()), (inclusion,)),
        "proofs.unpack_append": Parser(proofs.unpack_append, proofs.pack_append, (sent["append"],)),
        "proofs.unpack_appended": Parser(lambda data: proofs.unpack_appended(data, appended), proofs.pack_appended, (sent["appended"],)),
        "proofs.unpack_registration": Parser(proofs.unpack_registration, proofs.pack_registration, (sent["registration"],)),
        "tiles.TileName.from_path": of_text(TileName.from_path, TileName.path, "0/x001/x234/067.p/8", "entries/000", "63/255"),
        "tiles.unpack_bundle": Parser(lambda data: tiles.unpack_bundle(data, 5), tiles.pack_bundle, (bundle,)),
        "wire.Push.from_bytes": whole_file(wire.Push.from_bytes, sent["push"]),
        "wire.unpack_cosignature": Parser(wire.unpack_cosignature, wire.pack_cosignature, (sent["cosignature"],)),
        "wire.unpack_size": Parser(wire.unpack_size, lambda value: wire.pack_size(*value), (sent["size"],)),
        "wire.unpack_fence": Parser(wire.unpack_fence, lambda value: wire.pack_fence(value[0], value[1] or b""), (sent["fence"],)),
        "wire.unpack_promise": Parser(wire.unpack_promise, lambda value: wire.pack_promise(*value), (sent["promise"],)),
        "wire.Report.from_bytes": whole_file(wire.Report.from_bytes, sent["report"]),
        "fullhead.Lines.from_bytes": whole_file(Lines.from_bytes, sent["cosignatures"]),
        "proofs.Places.from_bytes": whole_file(proofs.Places.from_bytes, sent["places"]),
    }


def of_proofs() -> dict[str, Parser]:
    text = load("ledger")["proof"]["text"].encode()
    proof = documentproof.DocumentProof.from_bytes(text)
    assert proof.first is not None
    seal = documentproof.Seal(b"note", ((3, (b"h" * 32,)), (4, ())))
    stamp = documentproof.Stamp(proof.enrolment, (b"h" * 32,))

    def item(of: Any, *seeds: Any) -> Parser:
        def read(data: bytes) -> Any:
            return of.from_value(canonical.decode(data, bytes_max=10**6, what="item"))

        return Parser(read, lambda value: canonical.encode(value.to_value()), tuple(canonical.encode(seed.to_value()) for seed in seeds))

    return {
        "tlogproof.TlogProof.from_bytes": whole_file(tlogproof.TlogProof.from_bytes, text),
        "documentproof.DocumentProof.from_bytes": whole_file(documentproof.DocumentProof.from_bytes, text),
        "documentproof.Place.from_value": item(documentproof.Place, proof.register, proof.enrolment),
        "documentproof.Opening.from_value": item(documentproof.Opening, proof.opening),
        "documentproof.First.from_value": item(documentproof.First, proof.first),
        "documentproof.Seal.from_value": item(documentproof.Seal, seal),
        "documentproof.Stamp.from_value": item(documentproof.Stamp, stamp),
    }


def of_sharing() -> dict[str, Parser]:
    ledger = load("ledger")
    inclusion = Inclusion.from_value(canonical.decode(bytes.fromhex(ledger["inclusion_of_2"]), bytes_max=10**6, what="inclusion"))
    entry, note = Entry.from_bytes(inclusion.entry), inclusion.checkpoint
    key, one = sharing.SealingKey(ids.Key(b"k" * 32), b"h" * 1216, b"s" * 64), sharing.SealedGrant(ids.Sha256(b"g" * 32), b"sealed")
    shared = sharing.Shared(note, (sharing.SharedFile(ids.FileId(b"f" * 32), inclusion, inclusion, b"manifest", b"sealed"),), True)
    told = (sharing.Told(1, entry.to_bytes(), inclusion.path, False), sharing.Told(2, inclusion.entry, inclusion.path, True))
    return {
        "sharing.unpack_tickets": of_text(sharing.unpack_tickets, sharing.pack_tickets, "0", "7,8,1000000", str(2**63 - 1)),
        "sharing.unpack_checkpoint": of_text(
            sharing.unpack_checkpoint, sharing.pack_checkpoint, sharing.pack_checkpoint(inclusion.checkpoint)
        ),
        "vouchers.unpack_vouchers": of_text(vouchers.unpack_vouchers, vouchers.pack_vouchers, "A" * 64, "zz" * 32),
        "sharing.unpack_emergency": of_text(sharing.unpack_emergency, sharing.pack_emergency, sharing.pack_emergency(entry)),
        "sharing.unpack_shown": Parser(sharing.unpack_shown, sharing.pack_shown, (sharing.pack_shown(inclusion),)),
        "sharing.unpack_seen": Parser(sharing.unpack_seen, sharing.pack_seen, (sharing.pack_seen(0), sharing.pack_seen(2**40))),
        "sharing.unpack_places": Parser(
            sharing.unpack_places, sharing.pack_places, (sharing.pack_places([]), sharing.pack_places([0, 2**40]))
        ),
        "sharing.unpack_times": Parser(sharing.unpack_times, sharing.pack_times, (sharing.pack_times([0, 1_700_000_000]),)),
        "sharing.SealingKey.from_bytes": whole_file(sharing.SealingKey.from_bytes, key.to_bytes()),
        "sharing.SealedGrant.from_bytes": whole_file(sharing.SealedGrant.from_bytes, one.to_bytes()),
        "sharing.Shared.from_bytes": whole_file(sharing.Shared.from_bytes, shared.to_bytes(), sharing.Shared(b"", (), False).to_bytes()),
        "sharing.History.from_bytes": whole_file(sharing.History.from_bytes, sharing.History(note, told, False).to_bytes()),
        "sharing.EndedFiles.from_bytes": whole_file(
            sharing.EndedFiles.from_bytes,
            sharing.EndedFiles(note, (inclusion,), 2**40, True).to_bytes(),
            sharing.EndedFiles(b"", (), 0, False).to_bytes(),
        ),
        "sharing.Vouched.from_bytes": whole_file(sharing.Vouched.from_bytes, sharing.Vouched("Klinik", 0, 7, True).to_bytes()),
    }


def of_audit() -> dict[str, Parser]:
    sent = {each["what"]: bytes.fromhex(each["bytes"]) for each in load("audit")["messages"]}
    return {
        "audit.Challenge.from_bytes": whole_file(audit.Challenge.from_bytes, sent["challenge"]),
        "audit.Answer.from_bytes": whole_file(audit.Answer.from_bytes, sent["answer"], sent["answer of one that has it not"]),
        "audit.Report.from_bytes": whole_file(audit.Report.from_bytes, sent["report"]),
        "audit.unpack_inventory": Parser(audit.unpack_inventory, audit.pack_inventory, (sent["inventory"],)),
        "audit.unpack_held": Parser(lambda data: audit.unpack_held(data, 2), audit.pack_held, (sent["held"],)),
    }


def of_repair() -> dict[str, Parser]:
    page, r = load("repair"), repairorder
    sent = {each["what"]: bytes.fromhex(each["bytes"]) for each in page["messages"]}
    return {
        "repairorder.Order.from_bytes": whole_file(r.Order.from_bytes, *raw(page["order"]["order"])),
        "repairorder.unpack_seed": Parser(r.unpack_seed, lambda value: r.pack_seed(*value), (sent["seed"],)),
        "repairorder.Offer.from_value": Parser(
            lambda data: r.Offer.from_value(canonical.decode(data, bytes_max=10**6, what="key")),
            lambda value: canonical.encode(value.to_value()),
            (canonical.encode([b"p" * 32, b"s" * 64]),),
        ),
        "repairorder.unpack_offer": Parser(r.unpack_offer, r.pack_offer, (sent["offer"],)),
        "repairorder.unpack_keys": Parser(r.unpack_keys, lambda value: r.pack_keys(*value), (sent["keys"],)),
        "repairorder.unpack_ask": Parser(r.unpack_ask, r.pack_ask, (sent["ask"],)),
        "repairorder.unpack_moves": Parser(r.unpack_moves, r.pack_moves, (sent["moves"], r.pack_moves({}))),
        "repairorder.unpack_grants": Parser(
            r.unpack_grants,
            r.pack_grants,
            (r.pack_grants({}), r.pack_grants({ids.Sha256(bytes(32)): b"one", ids.Sha256(b"\1" * 32): b"two"})),
        ),
        "repairorder.unpack_wish": Parser(r.unpack_wish, r.pack_wish, (sent["wish"], r.pack_wish(r.Wish()))),
        "repairorder.unpack_drain": Parser(
            r.unpack_drain, lambda value: r.pack_drain(on=value), (r.pack_drain(on=True), r.pack_drain(on=False))
        ),
        "ending.Receipt.from_bytes": whole_file(Receipt.from_bytes, *raw(*(each["receipt"] for each in load("ending")["receipts"]))),
    }


def of_certificates() -> dict[str, Parser]:
    ledger = load("ledger")
    ca = Roster.from_bytes(bytes.fromhex(ledger["roster"]["bytes"])).institutions[0].ca
    key = identity.Ed25519PrivateKey.from_private_bytes(b"k" * 32)
    now = datetime(2025, 1, 1, tzinfo=UTC)
    own = identity.institution_certificate(key, "Klinik", now)
    node = identity.node_certificate(key, own, identity.public_key(key), now)
    vault = identity.client_certificate(key, own, client_csr(key), now)
    readers = {
        identity.certificate_key: (ca, own, node, vault),
        identity.certificate_expiry: (ca, own, node, vault),
        identity.certified_node: (ca, own, node, vault),
        identity.check_institution: (ca, own),
    }
    return {f"identity.{reader.__name__}": Parser(reader, None, seeds) for reader, seeds in readers.items()} | {
        "identity.csr_key": Parser(unless_refused(identity.csr_key), None, (client_csr(key),))
    }


def unless_refused(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """For the two that also judge what they read well: a request without proof of its key, a checkpoint with extension lines."""

    def read_or_none(data: Any) -> Any:
        try:
            return read(data)
        except Refused:
            return None

    return read_or_none


names = sorted(table())


def parsers_found() -> Iterator[str]:
    for name in modules:
        module, short = importlib.import_module(name), name.rpartition(".")[2]
        for found, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == name and parser_name.fullmatch(found):
                yield f"{short}.{found}"
            elif inspect.isclass(value) and value.__module__ == name:
                yield from (f"{short}.{found}.{method}" for method in vars(value) if parser_name.fullmatch(method))


def test_every_parser_is_fuzzed() -> None:
    assert sorted(set(parsers_found()) - set(names) - elsewhere) == []


@pytest.mark.parametrize("name", names)
def test_the_seeds_are_read_and_written_again(name: str) -> None:
    parser = table()[name]
    assert parser.seeds
    for seed in parser.seeds:
        value = parser.read(seed)
        assert parser.write is None or parser.write(value) == seed


# -- changing valid bytes

telling = b"\x00\x01\x7f\x80\x8f\x90\x9f\xa0\xbf\xc0\xc1\xc2\xc3\xc4\xc6\xc7\xca\xcb\xcc\xcf\xd0\xd4\xd9\xdb\xdc\xdd\xde\xdf\xe0\xff \n/+=-"


def mutate(draw: random.Random, data: bytes) -> bytes:
    """A few changes of bytes, or of one value inside where the bytes are msgpack."""
    if draw.random() < 0.4:
        try:
            return bytes(msgpack.packb(reshape(draw, msgpack.unpackb(data, strict_map_key=False)), use_bin_type=True))
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
            pass
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at, end = sorted(draw.randrange(len(changed) + 1) for _ in range(2))
        how = draw.randrange(6)
        if how == 0 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << draw.randrange(8)
        elif how == 1 and changed:
            changed[min(at, len(changed) - 1)] = draw.choice(telling)
        elif how == 2:
            del changed[at : min(end, at + draw.choice((1, 4, 10_000)))]
        elif how == 3:
            changed[at:at] = changed[at : at + 40]
        elif how == 4:
            changed[at:at] = draw.randbytes(draw.choice((1, 2, 9)))
        else:
            del changed[at:]
    return bytes(changed)


def reshape(draw: random.Random, value: Any) -> Any:
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        how = draw.randrange(8)
        if how == 0:
            return value[:at] + value[at + 1 :]
        if how == 1:
            return [*value[: at + 1], *value[at:]]
        return [*value[:at], reshape(draw, value[at]), *value[at + 1 :]]
    if isinstance(value, bytes) and draw.random() < 0.5:
        return draw.choice((value[:-1], value + b"\0", bytes(len(value)), value[::-1], value * 2))
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.7:
        return max(-(2**63), min(2**64 - 1, draw.choice((value + 1, value - 1, 2 * value, value ^ 1 << draw.randrange(63), 0, 2**64 - 1))))
    choices = (
        None,
        True,
        0,
        -1,
        2**32,
        2**64 - 1,
        "",
        "é" * 70,
        "a" * 200,
        b"",
        b"\0" * 32,
        [],
        [[]] * 3,
        [b"", 0],
        {},
        1.5,
        msgpack.ExtType(1, b""),
    )
    return draw.choice(choices)


def check(parser: Parser, data: bytes) -> None:
    try:
        value = parser.read(data)
    except Malformed:
        return
    if parser.write is not None and value is not None:
        assert parser.write(value) == data


def run(name: str, rounds: int) -> None:
    parser, draw = table()[name], random.Random(name)
    for _ in range(rounds):
        data = mutate(draw, draw.choice(parser.seeds))
        try:
            check(parser, data)
        except BaseException as error:
            error.add_note(f"{name} given {data.hex()}")
            raise


@pytest.mark.parametrize("name", names)
def test_changed_bytes_are_malformed_or_mean_just_themselves(name: str) -> None:
    run(name, 300)


@pytest.mark.soak
@pytest.mark.parametrize("name", names)
def test_changed_bytes_for_longer(name: str) -> None:
    run(name, 100_000)


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8) | st.binary(max_size=33)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=13), max_leaves=20)


@settings(max_examples=60)
@given(
    st.binary(max_size=80)
    | st.text(max_size=60).map(str.encode)
    | values.map(lambda value: canonical.encode([1, value]))
    | values.map(canonical.encode)
)
def test_bytes_from_nowhere_are_malformed_or_mean_just_themselves(data: bytes) -> None:
    for parser in table().values():
        check(parser, data)
