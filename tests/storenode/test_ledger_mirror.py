"""What a mirror cosigns and what it never does, asked by a sequencer that may be anybody."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace

import pytest

from medshard_protocol import merkle
from medshard_protocol.canonical import encode
from medshard_protocol.checkpoint import Checkpoint, Note, Signature, cosigner_verifier, log_verifier
from medshard_protocol.entries import Enrol, Genesis, Register
from medshard_protocol.errors import Damaged, Full, Malformed, Refused, Unavailable
from medshard_protocol.identity import public_key
from medshard_protocol.merkle import sha256
from medshard_protocol.messages import unpack_error
from storenode.ledger import wire
from storenode.ledger.journal import Journal
from storenode.ledger.mirror import Behind, Mirror
from storenode.ledger.store import Head, Store
from storenode.ledger.wire import Push

pytestmark = pytest.mark.filterwarnings("ignore::aiohttp.web.NotAppKeyWarning")

nonce = bytes(16)
clock_time = 1_700_000_123


class Log:
    """A log whose author, the test, holds the log key and may sign whatever it likes."""

    def __init__(self, consortium, entries):
        self.consortium, self.entries = consortium, entries

    def note(self, size, root=None):
        checkpoint = self.consortium.checkpoint(self.entries[:size])
        return self.consortium.note(checkpoint if root is None else Checkpoint(checkpoint.origin, size, root), [])

    def push(self, start, end, published=b""):
        return Push(1, 0, start, tuple(self.entries[start:end]), self.note(end).to_bytes(), published)


@pytest.fixture
def log(consortium):
    c = consortium(4)
    entries = [c.entry("log", Genesis(c.roster.sha256, nonce)), c.entry("ca 0", Enrol(public_key(c.key("vault")), 0, nonce))]
    entries += [c.entry("vault", Register(n.to_bytes(32, "big"), bytes(32), nonce)) for n in range(300)]
    return Log(c, [entry.to_bytes() for entry in entries])


@pytest.fixture
def fork(log):
    """The same first three entries, and then others."""
    others = [log.consortium.entry("vault", Register(n.to_bytes(32, "big"), b"\x01" * 32, nonce)).to_bytes() for n in range(300)]
    return Log(log.consortium, log.entries[:3] + others)


@pytest.fixture
async def mirror(log, tmp_path):
    roster = log.consortium.roster
    journal = Journal(tmp_path, roster)
    await journal.start()
    made = Mirror(journal, roster, roster.nodes[1].id, log.consortium.key("cosigner 1"), lambda: clock_time + 0.9)
    take = made.take
    made.take = lambda push, node=roster.sequencer: take(push, node)
    yield made
    await made._journal.close()  # a test may have put another in its place


async def cosigned(mirror, log, push):
    """Push, and give the size that was cosigned, after checking the cosignature."""
    line = await mirror.take(push)
    note = Note.from_bytes(push.signed)
    verifier = cosigner_verifier(log.consortium.roster, log.consortium.roster.nodes[1].id)
    assert verifier.verify(note.text, Signature.from_line(line)) == clock_time
    checkpoint = Checkpoint.from_text(note.text)
    assert mirror._journal.store.head() == (len(push.entries) + push.old_size, checkpoint.root, push.signed, push.epoch)
    return checkpoint.size


async def test_it_stores_first_and_then_cosigns(mirror, log):
    for start, end in ((0, 1), (1, 5), (5, 300), (300, 302)):
        assert await cosigned(mirror, log, log.push(start, end)) == end
    assert mirror._journal.store.entries(0, 302) == log.entries


async def test_the_same_checkpoint_may_be_cosigned_again(mirror, log):
    await mirror.take(log.push(0, 7))
    assert await mirror.take(log.push(7, 7)) == await mirror.take(log.push(7, 7))


@pytest.mark.parametrize(("start", "end"), [(0, 9), (6, 9), (8, 9), (0, 7), (6, 7), (0, 5), (5, 5), (9, 9)])
async def test_a_push_from_anywhere_but_its_end_is_answered_with_its_size(mirror, log, start, end):
    """Among these are a gap, a repetition, and a rollback to an older head."""
    await mirror.take(log.push(0, 7))
    with pytest.raises(Behind) as caught:
        await mirror.take(log.push(start, end))
    assert caught.value.size == 7
    assert mirror._journal.store.head().size == 7


@pytest.mark.parametrize("grown", [3, 7])
async def test_a_fork_is_refused_for_good(mirror, log, fork, grown):
    await mirror.take(log.push(0, 7))
    with pytest.raises(Damaged, match="another history"):
        await mirror.take(fork.push(7, 7))
    with pytest.raises(Damaged, match="another history"):
        await mirror.take(fork.push(7, 7 + grown))
    assert await cosigned(mirror, log, log.push(7, 9)) == 9


def published(log, size, cosigners=(0, 2, 3)):
    return log.consortium.note(log.consortium.checkpoint(log.entries[:size]), cosigners).to_bytes()


def proof(log, old_size, size):
    return tuple(merkle.consistency_path([merkle.leaf_hash(entry, sha256) for entry in log.entries[:size]], old_size, sha256))


@pytest.mark.parametrize(("start", "end", "size"), [(3, 9, 9), (0, 9, 9), (2, 5, 5), (3, 5, 12), (3, 20, 280), (3, 280, 280)])
async def test_a_suffix_is_dropped_for_what_a_quorum_published(mirror, log, fork, start, end, size):
    await mirror.take(log.push(0, 270))
    push = replace(fork.push(start, end, published(fork, size)), proof=proof(fork, end, size) if end < size else ())
    assert await cosigned(mirror, fork, push) == end
    assert mirror._journal.store.entries(0, end) == fork.entries[:end]
    assert mirror._journal.state.size == end
    assert await cosigned(mirror, fork, fork.push(end, 290)) == 290


async def test_a_suffix_is_kept_where_nothing_published_rules_it_out(mirror, log, fork):
    await mirror.take(log.push(0, 9))
    refused = {
        "too few institutions": (fork.push(3, 9, published(fork, 9, (0, 2))), Refused),
        "one institution twice": (fork.push(3, 9, published(fork, 9, (0, 2, 2))), Refused),
        "published before they part": (fork.push(3, 9, published(fork, 3)), Behind),
        "published on this side": (fork.push(3, 9, published(log, 9)), Damaged),
        "no proof": (fork.push(3, 5, published(fork, 9)), Damaged),
        "a proof of another log": (replace(fork.push(3, 5, published(fork, 9)), proof=proof(log, 5, 9)), Damaged),
        "nothing": (fork.push(3, 9), Behind),
    }
    for name, (push, error) in refused.items():
        with pytest.raises(error):
            await mirror.take(push)
        assert mirror._journal.store.entries(0, 9) == log.entries[:9], name
    assert await cosigned(mirror, log, log.push(9, 12)) == 12


async def test_a_root_that_is_not_that_of_the_entries_is_refused(mirror, log):
    for root in (bytes(32), merkle.leaf_hash(log.entries[0], sha256)):
        with pytest.raises(Damaged):
            await mirror.take(Push(1, 0, 0, tuple(log.entries[:4]), log.note(4, root).to_bytes(), b""))
    assert mirror._journal.store.head().size == 0
    assert await cosigned(mirror, log, log.push(0, 4)) == 4


async def test_entries_in_another_order_or_one_left_out_are_refused(mirror, log):
    swapped = Push(1, 0, 0, (log.entries[1], log.entries[0], log.entries[2]), log.note(3).to_bytes(), b"")
    with pytest.raises(Damaged):
        await mirror.take(swapped)
    with pytest.raises(Malformed, match="do not add up"):
        await mirror.take(Push(1, 0, 0, tuple(log.entries[:2]), log.note(3).to_bytes(), b""))


async def test_a_checkpoint_that_the_log_did_not_sign_is_refused(mirror, log):
    note, roster = log.note(3), log.consortium.roster
    other = log_verifier(roster).sign(note.text, log.consortium.key("vault").sign)
    for signed in (Note(note.text, (other,)), Note(note.text, (Signature(roster.origin, b"\0\0\0\0", note.signatures[0].value),))):
        with pytest.raises(Refused):
            await mirror.take(Push(1, 0, 0, tuple(log.entries[:3]), signed.to_bytes(), b""))
    with pytest.raises(Malformed):
        await mirror.take(Push(1, 0, 0, tuple(log.entries[:3]), note.text.encode(), b""))


async def test_of_two_pushes_at_once_one_is_taken(mirror, log, fork):
    results = await asyncio.gather(
        mirror.take(log.push(0, 9)), mirror.take(fork.push(0, 9)), mirror.take(log.push(0, 5)), return_exceptions=True
    )
    assert [type(item) for item in results] == [str, Behind, Behind]


async def test_what_cannot_be_written_is_not_cosigned(mirror, log, monkeypatch):
    await mirror.take(log.push(0, 250))

    def full(*values, **more):
        raise Full("no room")

    with monkeypatch.context() as patch:
        patch.setattr(mirror._journal.store, "extend", full)
        with pytest.raises(Full):
            await mirror.take(log.push(250, 270))
    assert mirror._journal.head.size == mirror._journal.tree.size == 250
    assert await cosigned(mirror, log, log.push(250, 270)) == 270


async def test_a_push_that_is_cut_off_midway_is_whole_or_not_there(mirror, log, monkeypatch):
    monkeypatch.setattr("storenode.ledger.journal.quick_commit_s", 0.0)
    for start in range(0, 40, 4):
        task = asyncio.create_task(mirror.take(log.push(start, start + 4)))
        for _ in range(start // 4):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        head = mirror._journal.store.head()
        assert (mirror._journal.head.size, mirror._journal.tree.size) == (head.size, head.size)
        if head.size == start:
            await mirror.take(log.push(start, start + 4))


async def test_an_entry_that_the_sequencer_should_have_refused_has_no_effect(mirror, log, tmp_path):
    """It is part of the log all the same, for everybody to see; and a restart does not change its mind."""
    c = log.consortium
    register = c.entry("vault", Register(b"x" * 32, b"y" * 32, nonce)).to_bytes()
    log.entries[3:] = [
        register[:-1] + bytes([register[-1] ^ 1]),
        b"not an entry",
        b"",
        c.entry("stranger", Register(b"x" * 32, b"y" * 32, nonce)).to_bytes(),
    ]
    assert await cosigned(mirror, log, log.push(0, 7)) == 7
    state = mirror._journal.state
    assert (state.size, dict(state.counts)) == (7, {"ROSTER": 2, "REGISTER": 1, "void": 4})
    rows = state.rows()
    await mirror._journal.close()
    again = mirror._journal = Journal(tmp_path, c.roster)
    await again.start()
    assert again.state.rows() == rows
    assert again.store.memory().unsigned == {3, 4, 5}


async def test_a_mirror_that_catches_up_keeps_its_state_close_behind(mirror, log, monkeypatch):
    monkeypatch.setattr("storenode.ledger.journal.unfolded_entries_max", 20)
    for start in range(0, 300, 50):
        await mirror.take(log.push(start, start + 50))
        assert mirror._journal.folded.size >= start + 30


async def test_it_starts_again_where_it_stopped(mirror, log, fork, tmp_path):
    await mirror.take(log.push(0, 290))
    await mirror._journal.close()
    mirror._journal = Journal(tmp_path, log.consortium.roster)
    await mirror._journal.start()
    with pytest.raises(Behind):
        await mirror.take(fork.push(3, 290))
    with pytest.raises(Damaged):
        await mirror.take(fork.push(290, 295))
    assert await cosigned(mirror, log, log.push(290, 302)) == 302


def test_a_cosigner_key_that_the_roster_does_not_list_is_the_operators_mistake(consortium, tmp_path):
    c = consortium(4)
    journal = Journal(tmp_path, c.roster)
    with pytest.raises(ValueError, match="cosigner key"):
        Mirror(journal, c.roster, c.roster.nodes[1].id, c.key("cosigner 2"), lambda: 0)
    journal.store.close()


# -- what is said to be published


async def test_a_published_checkpoint_is_believed_with_a_quorum_and_the_same_history(mirror, log, fork):
    c, journal = log.consortium, mirror._journal
    await mirror.take(log.push(0, 10))
    good = c.note(c.checkpoint(log.entries[:9]), [0, 2, 3]).to_bytes()
    for lie in (
        b"nonsense",
        log.note(9).to_bytes(),
        c.note(c.checkpoint(log.entries[:9]), [0, 1]).to_bytes(),
        c.note(c.checkpoint(fork.entries[:9]), [0, 1, 2]).to_bytes(),
    ):
        await mirror.take(log.push(10, 10, published=lie))
        assert journal.published is None
    await mirror.take(Push(1, 0, 10, (), b"", good))
    assert journal.published.note == good
    await mirror.take(log.push(10, 10, published=c.note(c.checkpoint(log.entries[:8]), [0, 1, 2]).to_bytes()))
    assert journal.published.checkpoint.size == 9


async def test_a_published_checkpoint_ahead_of_the_mirror_waits_for_its_entries(mirror, log):
    c = log.consortium
    await mirror.take(log.push(0, 10, published=c.note(c.checkpoint(log.entries[:20]), [0, 2, 3]).to_bytes()))
    assert mirror._journal.published is None
    await mirror.take(log.push(10, 25))
    assert mirror._journal.published.checkpoint.size == 20


# -- on the channel


async def test_only_nodes_push_and_only_one_of_them_in_an_epoch(net, log):
    await net.start(1)
    body = log.push(0, 3).to_bytes()
    assert (await net.push(1, body, as_node=None))[0] == 403
    status, answer = await net.push(1, body)
    assert status == 200
    assert wire.unpack_cosignature(answer).line.startswith("— consortium.example/log/node1 ")
    assert await net.push(1, body, as_node=2) == (wire.fenced, wire.pack_fence(1, net.roster.nodes[0].id))
    assert (await net.push(1, replace(log.push(3, 5), epoch=2).to_bytes(), as_node=2))[0] == 200
    assert await net.push(1, log.push(5, 7).to_bytes()) == (wire.fenced, wire.pack_fence(2, net.roster.nodes[2].id))


async def test_the_answers_to_a_wrong_push_are_those_of_the_protocol(net, log, fork):
    await net.start(1)
    assert (await net.push(1, log.push(0, 5).to_bytes()))[0] == 200
    for push, expected in ((log.push(3, 9), 409), (fork.push(5, 9), 422), (Push(1, 0, 5, (), b"x", b""), 400)):
        status, answer = await net.push(1, push.to_bytes())
        assert status == expected
        if status == 409:
            assert wire.unpack_size(answer) == (5, 0)
        else:
            assert isinstance(unpack_error(status, answer, "mirror"), {422: Damaged, 400: Malformed}[status])


async def test_a_mirror_that_starts_again_is_reached_anew(net, log):
    await net.start(1)
    channel = net.channel(1)
    assert (await channel.ask(log.push(0, 3).to_bytes(), 5.0))[0] == 200
    await net.stop(1)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await channel.ask(log.push(3, 5).to_bytes(), 5.0)
    await net.start(1)
    assert (await channel.ask(log.push(3, 5).to_bytes(), 5.0))[0] == 200
    channel.drop()


async def test_an_answer_that_comes_too_late_is_not_taken_for_the_next(net, log):
    await net.start(1)
    channel = net.channel(1)
    await channel.ask(log.push(0, 1).to_bytes(), 5.0)
    net.frozen.add(1)
    with pytest.raises(Unavailable, match="no answer within"):
        await channel.ask(log.push(1, 3).to_bytes(), 0.05)
    net.thaw()
    await net.until(lambda: net.ledgers[1].journal.head.size == 3)
    status, answer = await channel.ask(log.push(1, 3).to_bytes(), 5.0)
    assert (status, wire.unpack_size(answer)) == (409, (3, 0))
    channel.drop()


async def test_a_sequencer_older_than_its_mirrors_fetches_what_it_lacks_before_it_signs(net, log):
    await net.start(1, 2, 3)
    for number in (1, 2, 3):
        await net.push(number, log.push(0, 50).to_bytes())
    await net.start(0)
    await net.until(lambda: net.published(0) == 50)
    assert net.ledgers[0].journal.entries(0, 50) == log.entries[:50]
    assert net.ledgers[0].mirror.epoch == 2


good_push = [2, 1, 0, 0, [], b"", b"", [], b""]
bad_pushes = {
    "empty": b"",
    "no array": encode(1),
    "version 1": encode([1, *good_push[1:]]),
    "negative epoch": encode([2, -1, *good_push[2:]]),
    "negative size": encode([2, 1, 0, -1, *good_push[4:]]),
    "a long entry": encode([2, 1, 0, 0, [bytes(2049)], b"x", b"", [], b""]),
    "text for an entry": encode([2, 1, 0, 0, ["a"], b"x", b"", [], b""]),
    "entries without a checkpoint": encode([2, 1, 0, 0, [b"a"], b"", b"", [], b""]),
    "too many entries": encode([2, 1, 0, 0, [b""] * 2049, b"x", b"", [], b""]),
    "a proof of short hashes": encode([*good_push[:7], [bytes(31)], b""]),
    "one item too few": encode(good_push[:-1]),
}


def test_a_push_may_be_empty():
    assert Push.from_bytes(encode(good_push)) == Push(1, 0, 0, (), b"", b"")


@pytest.mark.parametrize("name", bad_pushes)
def test_any_other_push_is_malformed(name):
    with pytest.raises(Malformed):
        Push.from_bytes(bad_pushes[name])


@pytest.mark.parametrize("unpack", [wire.unpack_cosignature, wire.unpack_size])
@pytest.mark.parametrize(
    "data", [b"", encode([1]), encode([1, -1]), encode([2, 0]), encode([1, b"\xff"]), encode([1, None]), bytes(20_000)]
)
def test_any_other_answer_is_malformed(unpack, data):
    with pytest.raises(Malformed):
        unpack(data)


# -- on disk


def head(size):
    return Head(size, bytes([size]) * 32, b"note")


def test_one_process_at_a_time_has_a_ledger(tmp_path):
    store = Store(tmp_path, "origin", bytes(32))
    with pytest.raises(Unavailable, match="another process"):
        Store(tmp_path, "origin", bytes(32))
    store.close()
    Store(tmp_path, "origin", bytes(32)).close()


def test_a_ledger_of_another_log_is_not_opened(tmp_path):
    Store(tmp_path, "origin", bytes(32)).close()
    with pytest.raises(Damaged, match="other"):
        Store(tmp_path, "other", bytes(32))


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE entry SET data = x'00' WHERE place = 301",
        "DELETE FROM entry WHERE place = 300",
        "UPDATE tile SET hashes = zeroblob(8192)",
        "DELETE FROM tile",
        "UPDATE head SET root = zeroblob(32)",
        "UPDATE head SET size = 301",
    ],
)
async def test_a_ledger_whose_parts_do_not_fit_is_not_opened(mirror, log, tmp_path, damage):
    await mirror.take(log.push(0, 302))
    await mirror._journal.close()
    database = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    database.execute(damage)
    database.close()
    with pytest.raises(Damaged):
        Journal(tmp_path, log.consortium.roster)
    mirror._journal = Journal(tmp_path / "other", log.consortium.roster)


def test_a_file_that_is_no_database_is_damaged(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database at all" * 1000)
    with pytest.raises(Damaged):
        Store(tmp_path, "origin", bytes(32))
