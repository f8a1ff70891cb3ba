"""The ledger from put to proof: what the sequencer takes, what a quorum publishes, what survives."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Note, cosigned_by, cosigners, open_published
from medshard_protocol.entries import Access, Enrol, Entry, Genesis, Register
from medshard_protocol.errors import Conflict, Full, Malformed, Refused, Unavailable
from medshard_protocol.identity import public_key
from medshard_protocol.merkle import sha256
from medshard_protocol.messages import unpack_error
from medshard_protocol.proofs import pack_append, unpack_appended, unpack_registration
from medshard_protocol.tiles import TileName, tile_names, unpack_bundle
from medshard_protocol.vouchers import for_reader
from storenode.ledger import Ledger, forwarding, journal, pushing, sequencer, wire

pytestmark = pytest.mark.filterwarnings("ignore::aiohttp.web.NotAppKeyWarning")


@pytest.mark.parametrize("disk", ["quick", "slow"])
async def test_an_entry_is_published_with_a_proof_that_verifies(net, monkeypatch, disk):
    monkeypatch.setattr(journal, "quick_commit_s", 1.0 if disk == "quick" else 0.0)
    await net.start(0, 1, 2, 3)
    await net.enrol()
    entries = [net.register() for _ in range(3)]
    inclusions = await net.ledgers[0].append(entries)
    assert [item.index for item in inclusions] == [2, 3, 4]
    for entry, inclusion in zip(entries, inclusions, strict=True):
        checkpoint, proved = inclusion.verify(net.roster)
        assert (checkpoint.size, proved) == (5, entry)
    assert len(cosigners(Note.from_bytes(inclusions[0].checkpoint), net.roster)) == 3


async def test_entry_0_names_the_genesis_file_and_is_the_log_keys(net):
    await net.start(0, 1, 2, 3)
    await net.until(lambda: net.ledgers[0].published)
    entry = Entry.from_bytes(net.ledgers[0].journal.entries(0, 1)[0])
    assert isinstance(entry.body, Genesis)
    assert (entry.body.genesis_sha256, entry.author) == (net.roster.sha256, net.roster.log_key)


async def test_every_node_hears_soon_what_is_published_and_proves_it(net):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    entry = net.register()
    await net.ledgers[0].append([entry])
    for number in range(4):
        ledger = net.ledgers[number]
        await net.until(lambda ledger=ledger: ledger.inclusion_of(entry.body.file_id))
        assert ledger.inclusion_of(entry.body.file_id).verify(net.roster)[1] == entry
        assert ledger.journal.head.root == net.ledgers[0].journal.head.root
        assert ledger.state == net.ledgers[0].state


async def test_a_mirror_that_knows_the_entry_but_no_quorum_asks_the_sequencer(net):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    entry = net.register()
    await net.ledgers[0].append([entry])
    await net.until(lambda: net.ledgers[2].state.registration(entry.body.file_id))
    status, answer = await net.request(2, "GET", f"/v1/ledger/registrations/{entry.body.file_id.hex()}")
    assert status == 200
    assert unpack_registration(answer).verify(net.roster)[1] == entry


async def test_any_node_takes_an_entry_and_hands_it_to_the_sequencer(net):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    one, two = net.register(), net.register()
    assert (await net.ledgers[3].append([one]))[0].verify(net.roster)[1] == one
    status, answer = await net.request(2, "POST", "/v1/ledger/append", pack_append([two.to_bytes()]))
    assert status == 200
    assert unpack_appended(answer, [two.to_bytes()]).inclusions[0].verify(net.roster)[1] == two


async def test_who_hands_an_entry_in_gets_what_a_quorum_vouches_for_to_each_node(net):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    entry = net.register()
    status, answer = await net.request(2, "POST", "/v1/ledger/append", pack_append([entry.to_bytes()]))
    assert status == 200
    (inclusion,), rows = unpack_appended(answer, [entry.to_bytes()])
    note = Note.from_bytes(inclusion.checkpoint)
    for number, node in enumerate(net.roster.nodes):
        told = for_reader(rows, cosigned_by(note, net.roster), net.roster, node.id)
        assert net.roster.has_quorum(net.ledgers[number].mirror.voucher.who(net.roster, note, told))


@pytest.mark.parametrize("says", ["nothing", "no"])
async def test_who_handed_in_what_is_published_gets_the_proof_from_any_node_where_the_sequencer_gives_none(net, says, monkeypatch):
    monkeypatch.setattr(forwarding, "look_here_after_s", 0.05)
    await net.start(0, 1, 2, 3)
    await net.enrol()
    entry, other = net.register(), net.register()
    await net.ledgers[0].append([entry])
    await net.until(lambda: net.published(2) == net.published(0))

    async def withheld(body):
        if says == "nothing":
            await asyncio.sleep(60)
        raise Unavailable("no")

    net.ledgers[0].append_here = withheld
    async with asyncio.timeout(10):
        (inclusion,) = await net.ledgers[2].append([entry])
    assert inclusion.verify(net.roster)[1] == entry
    with pytest.raises((Unavailable, TimeoutError)):
        async with asyncio.timeout(1):
            await net.ledgers[2].append([entry, other])  # not all of it is there


async def test_an_entry_handed_in_twice_stands_in_the_log_once(net):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    entry, other = net.register(), net.register()
    results = await asyncio.gather(
        net.ledgers[0].append([entry]), net.ledgers[1].append([other, entry]), net.ledgers[0].append([entry, entry])
    )
    again = await net.ledgers[0].append([entry])
    assert len({item.index for result in (*results, again) for item in result if item.entry == entry.to_bytes()}) == 1
    assert net.ledgers[0].journal.head.size == 4


nonce = bytes(16)
refused = {
    "malformed": (lambda net: b"\x00", Malformed),
    "of a type without meaning": (lambda net: net.register().to_bytes().replace(b"\x95\x01\x02", b"\x95\x01\x03"), Malformed),
    "not signed by its author": (lambda net: replace(net.register(), signature=bytes(64)).to_bytes(), Refused),
    "signed for another log": (lambda net: replace(net.register(), author=public_key(net.consortium.key("other"))).to_bytes(), Refused),
    "by a key that nobody enrolled": (lambda net: net.register(author="stranger").to_bytes(), Refused),
    "an enrolment by a vault": (lambda net: net.consortium.entry("vault", Enrol(bytes(32), 0, b"\x02" * 16)).to_bytes(), Refused),
    "a second genesis": (lambda net: net.consortium.entry("log", Genesis(net.roster.sha256, b"\x01" * 16)).to_bytes(), Refused),
    "a taken file id": (lambda net: net.consortium.entry("vault", Register(b"f" * 32, b"x" * 32, nonce)).to_bytes(), Conflict),
}


@pytest.mark.parametrize("name", refused)
async def test_an_entry_without_the_right_is_refused_with_the_reason_and_takes_nobody_with_it(net, name):
    make, error = refused[name]
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.ledgers[0].append([net.consortium.entry("vault", Register(b"f" * 32, b"m" * 32, nonce))])
    good, bad = net.register().to_bytes(), make(net)
    for number in (0, 2):
        status, answer = await net.request(number, "POST", "/v1/ledger/append", pack_append([good, bad]))
        assert type(unpack_error(status, answer, "node")) is error
    assert net.ledgers[0].journal.head.size == 3


async def test_without_a_quorum_nothing_is_acknowledged_and_later_it_is_published(net, monkeypatch):
    monkeypatch.setattr(sequencer, "append_wait_s", 0.2)
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.stop(2, 3)
    entry = net.register()
    with pytest.raises(Unavailable, match="fewer than 3 institutions"):
        await net.ledgers[0].append([entry])
    assert net.published(0) == 2
    assert net.ledgers[0].inclusion_of(entry.body.file_id) is None
    await net.start(2)
    monkeypatch.setattr(sequencer, "append_wait_s", 10)
    (inclusion,) = await net.ledgers[0].append([entry])
    assert inclusion.index == 2
    inclusion.verify(net.roster)


async def test_a_frozen_and_a_dead_mirror_delay_nobody(net, monkeypatch):
    """Of four institutions one may be frozen; the other three are the quorum."""
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.ledgers[0].append([net.register()])
    await net.until(lambda: net.ledgers[3].journal.head.size == 3)
    monkeypatch.setattr(pushing, "push_timeout_s", 100.0)
    net.frozen.add(3)
    async with asyncio.timeout(50):  # less than one push takes to time out
        for _ in range(10):
            await net.ledgers[0].append([net.register()])
    assert net.ledgers[3].journal.head.size == 3
    net.thaw()
    await net.until(lambda: net.ledgers[3].journal.head.size == 13)


async def test_a_new_mirror_catches_up_in_steps_that_the_log_signs(net, monkeypatch):
    monkeypatch.setattr(wire, "push_entries_max", 7)
    await net.start(0, 1, 2)
    await net.enrol()
    await net.ledgers[0].append([net.register() for _ in range(60)])
    await net.start(3)
    await net.until(lambda: net.ledgers[3].journal.head.size == 62)
    assert net.ledgers[3].journal.head.root == net.ledgers[0].journal.head.root
    assert net.ledgers[3].state == net.ledgers[0].state


async def test_after_a_restart_of_everybody_nothing_is_lost_and_no_signature_checked_again(net, monkeypatch):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    entries = [net.register() for _ in range(5)]
    await net.ledgers[1].append(entries)
    state, root = net.ledgers[0].state.rows(), net.ledgers[0].journal.head.root
    await net.until(lambda: all(net.published(number) == 7 for number in range(4)))
    assert all(net.ledgers[number].state.rows() == state for number in range(4))
    await net.stop(0, 1, 2, 3)

    def never(self, origin):
        raise AssertionError("checked twice")

    monkeypatch.setattr(Entry, "verify", never)
    await net.start(1, 2, 3)  # the sequencer stays away
    for number in (1, 2, 3):
        assert (net.ledgers[number].state.rows(), net.ledgers[number].journal.head.root) == (state, root)
        assert net.ledgers[number].inclusion_of(entries[4].body.file_id).index == 6
    await net.start(0)
    assert net.ledgers[0].state.rows() == state
    monkeypatch.undo()
    assert (await net.ledgers[2].append([net.register()]))[0].index == 7


async def test_after_a_crash_what_was_not_yet_noted_as_checked_is_checked_again(net, monkeypatch):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    await net.ledgers[0].append([net.register() for _ in range(5)])
    await net.until(lambda: all(net.ledgers[number].state.size == 7 for number in range(4)))  # all have checked everything once
    net.ledgers[0].journal.store.remember(2, (), b"")
    monkeypatch.setattr(net.ledgers[0].journal.store, "remember", lambda *values: None)
    await net.stop(0)
    for file in net.folder.glob("node0/state.sqlite*"):  # it was saved at the stop, and a crash comes without one
        file.unlink()
    checked = []
    verify = Entry.verify
    monkeypatch.setattr(Entry, "verify", lambda self, origin: (checked.append(self), verify(self, origin))[1])
    await net.start(0)
    assert len(checked) == 5
    assert net.ledgers[0].state == net.ledgers[1].state


async def test_a_sequencer_without_room_says_so_and_goes_on_when_there_is_some(net, monkeypatch):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    store, real = net.ledgers[0].journal.store, net.ledgers[0].journal.store.extend

    def full(*values, **more):
        raise Full("no room on the disk for the ledger")

    monkeypatch.setattr(store, "extend", full)
    entry = net.register()
    with pytest.raises(Full):
        await net.ledgers[0].append([entry, net.register()])
    assert net.ledgers[0].journal.head.size == 2
    monkeypatch.setattr(store, "extend", real)
    (inclusion,) = await net.ledgers[0].append([entry])
    assert inclusion.verify(net.roster)[0].size == 3


async def test_a_mirror_without_room_does_not_cosign_and_recovers(net, monkeypatch):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    store, real = net.ledgers[3].journal.store, net.ledgers[3].journal.store.extend

    def full(*values, **more):
        raise Full("no room on the disk for the ledger")

    monkeypatch.setattr(store, "extend", full)
    await net.ledgers[0].append([net.register()])
    await net.until(lambda: "no room" in str(net.ledgers[0].status()["mirrors"]))
    monkeypatch.setattr(store, "extend", real)
    await net.until(lambda: net.ledgers[3].journal.head.size == 3)
    assert net.ledgers[3].journal.head.root == net.ledgers[0].journal.head.root


async def test_lone_entries_go_at_once_and_crowds_share_checkpoints(net):
    await net.start(0, 1, 2, 3)
    await net.enrol()

    def rounds():
        return len({push.signed for _, push in net.pushes if push.signed})

    before = rounds()
    for _ in range(5):
        await net.ledgers[0].append([net.register()])
        await asyncio.sleep(0.03)
    assert rounds() - before == 5
    before, began = rounds(), time.monotonic()
    await asyncio.gather(*(net.ledgers[0].append([net.register()]) for _ in range(200)))
    assert rounds() - before <= 4 + (time.monotonic() - began) / 0.02


async def test_a_bug_that_stops_the_sequencer_is_not_silent(net, monkeypatch, caplog):
    await net.start(0, 1, 2, 3)
    await net.until(lambda: net.ledgers[0].leads)
    monkeypatch.setattr(net.ledgers[0]._sequencer, "_begin", lambda *_: 1 / 0)
    monkeypatch.setattr(forwarding, "append_wait_s", 0.1)
    with pytest.raises(Unavailable):
        await net.enrol()
    await net.until(lambda: "ZeroDivisionError" in caplog.text)


def test_a_sequencer_without_the_log_key_does_not_start_and_leaves_the_files_free(consortium, tmp_path):
    c = consortium(4)
    node = c.roster.nodes[0].id
    for cosigner, log_key in (("cosigner 0", None), ("cosigner 0", c.key("other")), ("cosigner 1", c.key("log"))):
        with pytest.raises(ValueError, match="key"):
            Ledger.open(tmp_path, c.roster, node, c.key(cosigner), log_key, None)
    Ledger.open(tmp_path, c.roster, node, c.key("cosigner 0"), c.key("log"), None).journal.store.close()


async def test_an_idle_log_is_cosigned_anew(net, monkeypatch):
    monkeypatch.setattr(sequencer, "fresh_after_s", 0.1)
    await net.start(0, 1, 2, 3)
    await net.enrol()
    notes = {net.ledgers[0].published.note}
    await net.until(lambda: notes.add(net.ledgers[0].published.note) or len(notes) >= 2)
    assert {open_published(note, net.roster).size for note in notes} == {2}
    (inclusion,) = await net.ledgers[0].append([net.register()])
    assert inclusion.index == 2


async def test_a_sequencer_whose_idle_heads_find_no_quorum_says_that_it_stalls(net, monkeypatch):
    """Each head that it signs anew for its date is a new round; those who stand by must hear of the time since the last quorum."""
    monkeypatch.setattr(sequencer, "fresh_after_s", 0.1)
    monkeypatch.setattr(sequencer, "stalled_after_s", 0.3)
    await net.start(0, 1, 2, 3)
    await net.enrol()
    leading, signed = net.ledgers[0]._sequencer, set()
    for number in (1, 2):
        net.ledgers[number].mirror.withhold = lambda: "something is left out of this head"
    await net.until(lambda: signed.add(leading._round.began) or (leading.stalled and len(signed) > 3))
    for number in (1, 2):
        net.ledgers[number].mirror.withhold = str
    await net.until(lambda: leading._round.done.is_set() and not leading.stalled)


async def test_the_log_is_served_as_tiles_from_which_the_root_follows(net):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    for _ in range(3):
        await net.ledgers[0].append([net.register() for _ in range(200)])
    await net.until(lambda: net.published(2) == 602)
    status, note = await net.request(2, "GET", "/log/checkpoint")
    checkpoint = open_published(note, net.roster)
    assert (status, checkpoint.size) == (200, 602)
    leaves, tiles = [], {}
    for name in tile_names(checkpoint.size):
        status, data = await net.request(2, "GET", f"/log/tile/{name.path()}")
        assert status == 200
        if name.level is None:
            leaves += [merkle.leaf_hash(entry, sha256) for entry in unpack_bundle(data, name.width)]
        else:
            tiles[name] = data
    assert merkle.root(leaves, sha256) == checkpoint.root
    assert b"".join(tiles[name] for name in tiles if name.level == 0) == b"".join(leaves)
    assert tiles[TileName(1, 0, 2)] == merkle.root(leaves[:256], sha256) + merkle.root(leaves[256:512], sha256)
    for path, answer in (
        ("0/002.p/91", 404),
        ("0/003", 404),
        ("2/000.p/1", 404),
        ("0/0", 404),
        ("entries/002.p/91", 404),
        ("0/002.p/1", 200),
    ):
        assert (await net.request(2, "GET", f"/log/tile/{path}"))[0] == answer


async def test_an_access_entry_of_many_files_is_taken(net):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    access = net.consortium.entry("vault", Access(tuple(bytes([n]) * 32 for n in range(48)), 1, b"", nonce))
    (inclusion,) = await net.ledgers[2].append([access])
    assert inclusion.verify(net.roster)[1] == access
    assert net.ledgers[0].status()["entries"] == {"ROSTER": 2, "ACCESS": 1}


async def test_when_the_sequencer_is_gone_the_others_say_so_and_still_prove(net, monkeypatch):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    entry = net.register()
    await net.ledgers[0].append([entry])
    await net.until(lambda: net.ledgers[1].inclusion_of(entry.body.file_id))
    await net.stop(0)
    monkeypatch.setattr(forwarding, "leaderless_wait_s", 0.2)
    with pytest.raises(Unavailable):
        await net.ledgers[1].append([net.register()])
    assert net.ledgers[1].inclusion_of(entry.body.file_id).verify(net.roster)


@pytest.mark.parametrize(
    ("body", "answer"),
    [(b"", 400), (b"\x00", 400), (pack_append([b"x"]) + b"\x00", 400), (bytes(600_000), 413)],
    ids=["empty", "wrong", "more", "long"],
)
async def test_a_body_that_is_no_append_is_refused(net, body, answer):
    await net.start(0, 1)
    assert (await net.request(0, "POST", "/v1/ledger/append", body))[0] == answer


async def test_an_unknown_file_has_no_registration(net):
    await net.start(0, 1, 2, 3)
    await net.enrol()
    assert (await net.request(1, "GET", f"/v1/ledger/registrations/{bytes(32).hex()}"))[0] == 404
    assert (await net.request(1, "GET", "/v1/ledger/registrations/xyz"))[0] == 400


killed = """
import asyncio, sys
from pathlib import Path
from test_ledger_part import roster, entries, key
from storenode.ledger import Ledger

async def main():
    ledger = Ledger.open(Path(sys.argv[1]), roster, roster.nodes[0].id, key("cosigner 0"), key("log"), None)
    await ledger.start()
    for entry in entries:
        inclusions = await ledger.append([entry])
        print(inclusions[0].index, flush=True)

asyncio.run(main())
"""


def test_a_process_killed_at_any_time_has_what_it_acknowledged(consortium, tmp_path, request):
    """One institution is its own quorum, so each acknowledged entry is one commit, one signature, one cosignature."""
    c = consortium(1)
    entries = [c.entry("ca 0", Enrol(bytes([n]) * 32, 0, bytes([n]) * 16)) for n in range(250)]
    (tmp_path / "test_ledger_part.py").write_text(
        "from medshard_protocol.roster import Roster\nfrom medshard_protocol.entries import Entry\n"
        "from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey\nimport hashlib\n"
        f"roster = Roster.from_bytes({c.roster.to_bytes()!r})\n"
        f"entries = [Entry.from_bytes(item) for item in {[entry.to_bytes() for entry in entries]!r}]\n"
        "def key(name): return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())\n"
    )
    (tmp_path / "run.py").write_text(killed)
    acknowledged = 0
    for stop_after in (3, 40):
        with subprocess.Popen(
            [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "ledger")], stdout=subprocess.PIPE, text=True
        ) as process:
            for _ in range(stop_after):
                acknowledged = max(acknowledged, int(process.stdout.readline()))
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        acknowledged = max(acknowledged, *map(int, rest), 0)

    async def look():
        ledger = Ledger.open(tmp_path / "ledger", c.roster, c.roster.nodes[0].id, c.key("cosigner 0"), c.key("log"), None)
        await ledger.start()
        async with asyncio.timeout(60):
            while ledger.published is None or ledger.published.checkpoint.size < ledger.journal.head.size:
                await asyncio.sleep(0.01)
        size, stored = ledger.journal.head.size, ledger.journal.entries(1, ledger.journal.head.size)
        published = ledger.published.checkpoint.size
        await ledger.close()
        return size, stored, published

    size, stored, published = asyncio.run(look())
    assert size > acknowledged >= 39
    assert published == size
    assert stored == [entry.to_bytes() for entry in entries[: size - 1]]
