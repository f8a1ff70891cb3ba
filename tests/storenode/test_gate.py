"""Who gets shards, and why not: the decision by itself, and a gate over a real journal that is told of entries and checkpoints."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from medshard_protocol import checkpoint as checkpoints
from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, cosigned_by, cosigner_lines, cosigner_verifier, log_verifier
from medshard_protocol.entries import Access, Enrol, Entry, Erase, Genesis, Grant, Register, Revoke, Rotate, Withdraw, rotation_signed
from medshard_protocol.errors import Malformed, Refused, Unavailable
from medshard_protocol.identity import public_key
from medshard_protocol.merkle import sha256
from medshard_protocol.proofs import Inclusion
from medshard_protocol.rights import Reason, reason_in
from medshard_protocol.sharing import access_header, checkpoint_header, emergency_header, pack_checkpoint, pack_emergency, pack_tickets
from medshard_protocol.vouchers import Voucher, for_reader, pack_vouchers, vouchers_header
from storenode import gate as module
from storenode.emergency import Emergencies
from storenode.gate import Ages, Gate
from storenode.ledger.engine import Head
from storenode.ledger.journal import Journal
from storenode.metrics import Metrics

one, two, never = (bytes([n]) * 32 for n in (1, 2, 9))
began = 1_700_000_000
nonce = bytes(16)


class Mirror:
    """One node's journal, a gate before it, and the consortium's keys to feed it with."""

    def __init__(self, c, folder, number=2):
        self.c, self.folder, self.time = c, folder, began
        self.roster = c.roster
        self.journal = Journal(folder, c.roster)
        self.metrics = Metrics()
        self.appended = []
        self.reachable = False
        self.emergencies = Emergencies(folder, self.append, self.is_appended, retry_s=0.01)
        self.hurried = 0
        witness = SimpleNamespace(voucher=voucher(c, number))
        ledger = SimpleNamespace(journal=self.journal, roster=c.roster, hurry=self.hurry, mirror=witness)
        self.gate = Gate(ledger, self.emergencies, self.metrics)
        self.written = []

    async def append(self, entry):
        if not self.reachable:
            raise Unavailable("no quorum")
        self.appended.append(entry)

    async def is_appended(self, name):
        return name in [each.author + each.body.nonce for each in self.appended]

    def hurry(self):
        self.hurried += 1

    def key(self, who):
        return public_key(self.c.key(who))

    async def store(self, *entries):
        """Take entries into the mirror; the place of the first."""
        datas = [entry if isinstance(entry, bytes) else entry.to_bytes() for entry in entries]
        frontier, leaves = self.journal.frontier(), [merkle.leaf_hash(data, sha256) for data in datas]
        for leaf in leaves:
            frontier.append(leaf)
        self.written += datas
        await self.journal.extend(datas, leaves, Head(frontier.size, frontier.root(), b"note"))
        return frontier.size - len(datas)

    def note(self, size=None, after_s=1.0, cosigners=(0, 1, 2), c=None):
        """A published checkpoint, some seconds later than the last."""
        c = c or self.c
        self.time += int(after_s)
        leaves = [merkle.leaf_hash(data, sha256) for data in self.written[:size]]
        text = Checkpoint(c.roster.origin, len(leaves), merkle.root(leaves, sha256)).text()
        signatures = [log_verifier(c.roster).sign(text, c.key("log").sign)]
        for number in cosigners:
            verifier = cosigner_verifier(c.roster, c.roster.nodes[number].id)
            signatures.append(verifier.sign(text, c.key(f"cosigner {number}").sign, self.time))
        return Note(text, tuple(signatures)).to_bytes()

    def publish(self, after_s=1.0):
        self.journal.hear(self.note(after_s=after_s))

    async def say(self, author, body):
        """Put an entry into the log, and publish; an earlier checkpoint has been checked, as it would be after a second."""
        _ = self.journal.published
        place = await self.store(self.c.entry(author, replace(body, nonce=os.urandom(16))))
        self.publish()
        return place

    async def read(self, who, places, *files, **headers):
        shown = {access_header: pack_tickets(places if isinstance(places, list) else [places])} | headers
        await self.gate.admit(self.key(who), shown, files or (one,))

    async def refused(self, reason, *arguments, **keywords):
        before = self.metrics._denied[reason.value]
        with pytest.raises(Refused) as caught:
            await self.read(*arguments, **keywords)
        assert reason_in(str(caught.value)) is reason
        assert self.metrics._denied[reason.value] == before + 1


@pytest.fixture
async def mirror(consortium, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "enforced", True)
    monkeypatch.setattr(module, "wait_s", 0.15)
    c = consortium(4)
    c = replace(c, roster=replace(c.roster, emergency=(public_key(c.key("doctor")),)))
    made = Mirror(c, tmp_path / "data")
    await made.journal.start()
    await made.store(c.entry("log", Genesis(c.roster.sha256, nonce)))
    await made.store(
        *(c.entry("ca 1", Enrol(public_key(c.key(who)), 0, bytes([n]) * 16)) for n, who in enumerate(("owner", "reader", "doctor")))
    )
    await made.say("ca 2", Enrol(public_key(c.key("other")), 0, nonce))
    await made.say("owner", Register(one, b"m" * 32, nonce))
    await made.say("owner", Register(two, b"m" * 32, nonce))
    assert made.journal.published
    yield made
    await made.journal.close()


def access(*files):
    return Access(files or (one,), 1, b"", nonce)


async def test_the_owner_reads_by_an_entry_of_one_file_or_many(mirror):
    place = await mirror.say("owner", access(one, two))
    await mirror.read("owner", place, one)
    await mirror.read("owner", place, one, two)
    assert sum(mirror.metrics._denied.values()) == 0


async def test_several_entries_open_what_each_of_them_names(mirror):
    places = [await mirror.say("owner", access(file_id)) for file_id in (one, two)]
    await mirror.read("owner", places, one, two)
    await mirror.refused(Reason.OTHER_FILE, "owner", places[0], one, two)


async def test_without_an_entry_nothing_is_read(mirror):
    with pytest.raises(Refused) as caught:
        await mirror.gate.admit(mirror.key("owner"), {}, (one,))
    assert reason_in(str(caught.value)) is Reason.NO_ENTRY
    for text in ("", "x", "1,1", "2,1", "-1", "1,", "٣"):
        with pytest.raises(Malformed):
            await mirror.gate.admit(mirror.key("owner"), {access_header: text}, (one,))


async def test_until_it_is_enforced_a_read_without_an_entry_passes_and_one_with_a_bad_entry_does_not(mirror, monkeypatch):
    monkeypatch.setattr(module, "enforced", False)
    await mirror.gate.admit(mirror.key("owner"), {}, (one,))
    await mirror.refused(Reason.NOT_AN_ACCESS, "owner", 0)


async def test_an_entry_opens_nothing_to_another_reader_nor_another_file(mirror):
    await mirror.say("owner", Grant((one,), mirror.key("reader"), 0, 1, nonce))
    place = await mirror.say("owner", access())
    await mirror.refused(Reason.OTHER_READER, "reader", place)
    await mirror.refused(Reason.OTHER_READER, "other", place)
    await mirror.refused(Reason.OTHER_FILE, "owner", place, two)
    registered = place - 2
    await mirror.refused(Reason.NOT_AN_ACCESS, "owner", registered)


async def test_a_grant_opens_its_files_to_its_reader(mirror):
    early = await mirror.say("reader", access())
    await mirror.refused(Reason.NEVER_GRANTED, "reader", early)
    await mirror.say("owner", Grant((one,), mirror.key("reader"), 0, 1, nonce))
    await mirror.refused(Reason.NEVER_GRANTED, "reader", early)  # the right is judged as of the entry
    place = await mirror.say("reader", access(one, two))
    await mirror.read("reader", place, one)
    await mirror.refused(Reason.NEVER_GRANTED, "reader", place, two)
    await mirror.refused(Reason.NEVER_GRANTED, "other", await mirror.say("other", access()))


async def test_revocation_and_access_are_ordered_by_the_log(mirror):
    granted = await mirror.say("owner", Grant((one,), mirror.key("reader"), 0, 1, nonce))
    before = await mirror.say("reader", access())
    grant = Entry.from_bytes(mirror.written[granted]).id
    await mirror.say("owner", Revoke(grant, nonce))
    after = await mirror.say("reader", access())
    await mirror.read("reader", before)
    await mirror.refused(Reason.REVOKED, "reader", after)


async def test_a_grant_ends_by_the_cosigners_time_and_not_by_this_nodes(mirror):
    until = mirror.time + 20
    await mirror.say("owner", Grant((one,), mirror.key("reader"), until, 1, nonce))
    place = await mirror.say("reader", access())
    await mirror.read("reader", place)
    mirror.publish(after_s=30)
    mirror.gate._admitted.clear()  # the clock of this process has not moved
    await mirror.refused(Reason.ENDED, "reader", place)


async def test_an_entry_is_good_for_ten_minutes_of_the_cosigners_time(mirror):
    place = await mirror.say("owner", access())
    mirror.publish(after_s=590)
    await mirror.read("owner", place)
    mirror.publish(after_s=30)
    mirror.gate._admitted.clear()
    await mirror.refused(Reason.EXPIRED, "owner", place)


async def test_an_entry_ages_while_no_checkpoint_comes(mirror, monkeypatch):
    place = await mirror.say("owner", access())
    await mirror.read("owner", place)
    real = module.time.monotonic
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: real() + 601))
    await mirror.refused(Reason.EXPIRED, "owner", place)


async def test_an_entry_that_no_known_checkpoint_is_older_than_counts_as_expired(mirror):
    assert mirror.journal.published
    mirror.gate._ages = Ages()
    place = await mirror.store(mirror.c.entry("owner", access()))
    mirror.publish()
    await mirror.refused(Reason.EXPIRED, "owner", place)
    await mirror.read("owner", await mirror.say("owner", access()))


async def test_what_is_erased_or_whose_reader_is_withdrawn_is_shut_at_once(mirror):
    await mirror.say("owner", Grant((one, two), mirror.key("reader"), 0, 1, nonce))
    place = await mirror.say("reader", access(one, two))
    await mirror.read("reader", place, one, two)
    await mirror.say("owner", Erase(two, 0, nonce))
    await mirror.refused(Reason.ERASED, "reader", place, two)
    await mirror.read("reader", place, one)
    await mirror.say("ca 1", Withdraw(mirror.key("reader"), nonce))
    await mirror.refused(Reason.WITHDRAWN, "reader", place, one)


async def test_an_entry_of_a_stranger_or_one_that_nobody_signed_has_no_effect(mirror):
    await mirror.refused(Reason.VOID, "stranger", await mirror.say("stranger", access()))
    forged = replace(mirror.c.entry("owner", access()), signature=bytes(64))
    place = await mirror.store(forged)
    mirror.publish()
    await mirror.refused(Reason.VOID, "owner", place)
    place = await mirror.store(b"not an entry")
    mirror.publish()
    await mirror.refused(Reason.NOT_AN_ACCESS, "owner", place)


async def test_a_file_that_was_never_registered_or_only_afterwards_is_not_read(mirror):
    place = await mirror.say("owner", access(never))
    await mirror.refused(Reason.UNREGISTERED, "owner", place, never)
    await mirror.say("owner", Register(never, b"m" * 32, nonce))
    await mirror.refused(Reason.UNREGISTERED, "owner", place, never)


async def test_an_entry_that_is_not_in_the_mirror_or_not_published_is_refused_after_a_while(mirror):
    await mirror.refused(Reason.NOT_IN_MIRROR, "owner", len(mirror.written))
    place = await mirror.store(mirror.c.entry("owner", access()))
    await mirror.refused(Reason.NOT_PUBLISHED, "owner", place)


async def test_a_read_waits_for_an_entry_and_a_checkpoint_that_are_on_their_way(mirror):
    reading = [asyncio.create_task(mirror.read("owner", len(mirror.written))) for _ in range(5)]
    await asyncio.sleep(0.03)
    assert not any(each.done() for each in reading)
    await mirror.store(mirror.c.entry("owner", access()))
    await asyncio.sleep(0.03)
    mirror.publish()
    await asyncio.gather(*reading)


async def test_a_checkpoint_is_verified_once_however_many_wait_for_it(mirror, monkeypatch):
    verified = []
    verify = checkpoints.Verifier.verify
    monkeypatch.setattr(checkpoints.Verifier, "verify", lambda self, *rest: (verified.append(self), verify(self, *rest))[1])
    reading = [asyncio.create_task(mirror.read("owner", len(mirror.written))) for _ in range(20)]
    await asyncio.sleep(0.02)
    await mirror.store(mirror.c.entry("owner", access()))
    mirror.publish()
    await asyncio.gather(*reading)
    for _ in range(100):
        await mirror.read("owner", len(mirror.written) - 1)
    assert len(verified) == 4  # the log and three cosigners


async def test_a_decision_is_remembered_for_this_reader_file_and_entry_alone(mirror, monkeypatch):
    place = await mirror.say("owner", access())
    await mirror.read("owner", place)
    monkeypatch.setattr(module, "judge", lambda *_: pytest.fail("judged again"))
    for _ in range(1000):
        await mirror.read("owner", place)
    for who, file_id in (("reader", one), ("owner", two)):
        with pytest.raises(pytest.fail.Exception):
            await mirror.read(who, place, file_id)


# -- proofs shown


async def show(mirror, place, note):
    size = Checkpoint.from_text(Note.from_bytes(note).text).size
    leaves = [merkle.leaf_hash(data, sha256) for data in mirror.written[:size]]
    return await mirror.gate.show(Inclusion(place, mirror.written[place], tuple(merkle.inclusion_path(leaves, place, sha256)), note))


async def test_a_shown_proof_tells_a_node_what_it_has_not_heard(mirror):
    place = await mirror.store(mirror.c.entry("owner", access()))
    await mirror.refused(Reason.NOT_PUBLISHED, "owner", place)
    assert await show(mirror, place, mirror.note()) == place
    await mirror.read("owner", place)


async def test_a_shown_proof_is_believed_only_under_a_quorum_of_this_roster(mirror, consortium):
    place = await mirror.store(mirror.c.entry("owner", access()))
    other = consortium(7)
    for note in (mirror.note(cosigners=(0, 1)), mirror.note(cosigners=(4, 5, 6), c=other), mirror.note(cosigners=())):
        with pytest.raises(Refused) as caught:
            await show(mirror, place, note)
        assert reason_in(str(caught.value)) is Reason.OLD_ROSTER
    await mirror.refused(Reason.NOT_PUBLISHED, "owner", place)


async def test_a_forged_proof_is_refused(mirror):
    place = await mirror.store(mirror.c.entry("owner", access()))
    forged = mirror.c.entry("owner", access(two)).to_bytes()
    with pytest.raises(Refused) as caught:
        await mirror.gate.show(Inclusion(place, forged, (bytes(32),) * 3, mirror.note()))
    assert reason_in(str(caught.value)) is Reason.FORGED


async def test_a_proof_of_entries_that_the_mirror_lacks_waits_for_them(mirror):
    mirror.written.append(mirror.c.entry("owner", access()).to_bytes())
    place, note = len(mirror.written) - 1, mirror.note()
    with pytest.raises(Refused) as caught:
        await show(mirror, place, note)
    assert reason_in(str(caught.value)) is Reason.NOT_IN_MIRROR
    entry = mirror.written.pop()
    await mirror.store(entry)  # the checkpoint that was shown covers it, and was kept
    await mirror.read("owner", place)


# -- checkpoints shown with a read


def shown(note):
    return {checkpoint_header: pack_checkpoint(note)}


def vouched(mirror, note, voices=(0, 1), reader=2):
    """The same, with what those cosigners tell a node in confidence; this one is the third."""
    c, opened = mirror.c, Note.from_bytes(note)
    rows = {
        node: voucher(c, number).row(c.roster, opened.text, line)
        for number, (node, _, line) in enumerate(cosigner_lines(opened, c.roster))
        if number in voices
    }
    told = for_reader(rows, cosigned_by(opened, c.roster), c.roster, c.roster.nodes[reader].id)
    return shown(note) | ({vouchers_header: pack_vouchers(told)} if told else {})


def voucher(c, number):
    key = c.key(f"cosigner {number}")
    return Voucher(key.private_bytes_raw(), key.public_key().public_bytes_raw())


@pytest.fixture
def checked(monkeypatch):
    """Whose signatures under a head are checked from now on."""
    found, verify = [], checkpoints.Verifier.verify

    def noted(self, text, signature):
        found.append(self.name)
        return verify(self, text, signature)

    monkeypatch.setattr(checkpoints.Verifier, "verify", noted)
    return found


async def test_a_quorum_that_vouches_to_this_node_saves_it_the_signatures(mirror, checked):
    place = await mirror.store(mirror.c.entry("owner", access()))
    note = mirror.note()
    await mirror.read("owner", place, **vouched(mirror, note))
    assert checked == ["consortium.example/log/node2"]  # its own
    assert mirror.journal._published is None or mirror.journal._published.note != note  # what is told to others rests on signatures


async def test_vouchers_that_are_no_quorums_leave_it_to_the_signatures(mirror, checked):
    place = await mirror.store(mirror.c.entry("owner", access()))
    note = mirror.note()
    forged = note[:-9] + b"AAAAAAA=\n"
    few = mirror.note(cosigners=(0, 1))
    for wrong in (vouched(mirror, forged), vouched(mirror, note) | shown(few), vouched(mirror, few)):
        await mirror.refused(Reason.NOT_PUBLISHED, "owner", place, **wrong)
    checked.clear()
    await mirror.read("owner", place, **vouched(mirror, note, reader=3))
    assert {"consortium.example/log/node0", "consortium.example/log/node1"} <= set(checked)


async def test_vouchers_for_another_history_than_this_nodes_are_believed_by_nobody(mirror):
    place = await mirror.store(mirror.c.entry("owner", access()))
    mirror.written[place] = mirror.c.entry("owner", access(two)).to_bytes()
    other = mirror.note()
    mirror.written[place] = mirror.journal.entries(place, place + 1)[0]
    await mirror.refused(Reason.NOT_PUBLISHED, "owner", place, **vouched(mirror, other))


async def test_a_read_after_a_revocation_is_refused_whatever_is_vouched_for(mirror):
    grant = mirror.c.entry("owner", Grant((one,), mirror.key("reader"), 0, 0, os.urandom(16)))
    await mirror.store(grant)
    revoke = await mirror.store(mirror.c.entry("owner", Revoke(grant.id, os.urandom(16))))
    place = await mirror.store(mirror.c.entry("reader", access()))
    assert place > revoke
    await mirror.refused(Reason.REVOKED, "reader", place, **vouched(mirror, mirror.note()))


async def test_the_time_that_is_vouched_for_tells_the_age_of_an_entry(mirror):
    mirror.publish()
    _ = mirror.journal.published
    place = await mirror.store(mirror.c.entry("owner", access()))
    await mirror.refused(Reason.EXPIRED, "owner", place, **vouched(mirror, mirror.note(after_s=module.ticket_s + 10)))


async def test_vouchers_that_are_none_are_malformed(mirror):
    place = await mirror.store(mirror.c.entry("owner", access()))
    for text in ("", "!", "AAAA"):
        with pytest.raises(Malformed):
            await mirror.read("owner", place, **shown(mirror.note()), **{vouchers_header: text})


async def test_a_read_that_shows_the_checkpoint_need_not_wait_until_this_node_is_told(mirror, monkeypatch):
    monkeypatch.setattr(module, "wait_s", 60.0)
    place = await mirror.store(mirror.c.entry("owner", access()))
    await mirror.read("owner", place, **shown(mirror.note()))
    assert mirror.journal.published.checkpoint.size == place + 1
    assert mirror.hurried == 0


async def test_a_shown_checkpoint_is_believed_only_under_a_quorum_of_this_roster_and_this_log(mirror, consortium):
    place = await mirror.store(mirror.c.entry("owner", access()))
    mirror.written[place] = mirror.c.entry("owner", access(two)).to_bytes()
    other_log = mirror.note()
    mirror.written[place] = mirror.journal.entries(place, place + 1)[0]
    signed = mirror.note()
    forged = signed[:-9] + b"AAAAAAA=\n"
    few, other = mirror.note(cosigners=(0, 1)), consortium(7)
    for note in (few, mirror.note(cosigners=(0, 0, 1)), mirror.note(cosigners=(4, 5, 6), c=other), forged, other_log, mirror.note(place)):
        await mirror.refused(Reason.NOT_PUBLISHED, "owner", place, **shown(note))
    await mirror.read("owner", place, **shown(signed))


async def test_a_shown_checkpoint_takes_no_newer_ones_place(mirror):
    place = await mirror.store(mirror.c.entry("owner", access()))
    older = mirror.note()
    await mirror.store(mirror.c.entry("owner", access(two)))
    newest = mirror.note()
    for note in (older, mirror.note(cosigners=(0, 1))):
        mirror.journal.hear(newest)
        await mirror.read("owner", place, **shown(note))
        assert mirror.journal.published.note == newest


async def test_what_was_heard_before_tells_the_age_of_an_entry_whose_checkpoint_is_shown(mirror):
    mirror.gate._ages = Ages()  # as after a start: nothing was checked yet
    mirror.journal._published = None
    mirror.publish()
    place = await mirror.store(mirror.c.entry("owner", access()))
    await mirror.read("owner", place, **shown(mirror.note()))


async def test_a_read_right_after_a_start_is_as_new_as_it_is(mirror):
    """Heads of one second tell no time: the one that was remembered through the start does, and was heard at the start."""
    _ = mirror.journal.published
    await mirror.journal.close()
    again = Mirror(mirror.c, mirror.folder)
    again.written, again.time = mirror.written, mirror.time
    await again.journal.start()
    place = await again.store(again.c.entry("owner", access()))
    _ = again.journal.published
    again.publish(after_s=0)
    await again.read("owner", place)
    mirror.journal = again.journal


async def test_what_is_no_note_in_base64url_is_malformed(mirror):
    place = await mirror.store(mirror.c.entry("owner", access()))
    for text in ("", "!", "A", "QUJD", "QUJD=", "A" * 8001):
        with pytest.raises(Malformed):
            await mirror.read("owner", place, **{checkpoint_header: text})
    assert pack_checkpoint(bytes(6001)) == ""


async def test_a_checkpoint_of_an_entry_on_its_way_is_kept_and_the_entry_asked_for(mirror):
    mirror.written.append(mirror.c.entry("owner", access()).to_bytes())
    place, note = len(mirror.written) - 1, mirror.note()
    reading = asyncio.create_task(mirror.read("owner", place, **shown(note)))
    async with asyncio.timeout(60):
        while not mirror.hurried:
            await asyncio.sleep(0)
    await mirror.store(mirror.written.pop())
    await reading
    assert mirror.hurried == 1


# -- emergencies


def emergency(mirror, who="doctor", files=(one,), reason=b"sealed", signed=True):
    entry = mirror.c.entry(who, Access(files, 7, reason, os.urandom(16)))
    return entry if signed else replace(entry, signature=bytes(64))


async def in_emergency(mirror, entry, who="doctor", *files):
    await mirror.gate.admit(mirror.key(who), {emergency_header: pack_emergency(entry)}, files or (one,))


async def refused_in_emergency(mirror, reason, entry, who="doctor", *files):
    with pytest.raises(Refused) as caught:
        await in_emergency(mirror, entry, who, *files)
    assert reason_in(str(caught.value)) is reason
    assert mirror.metrics._denied[reason.value] > 0


@pytest.fixture
def out_of_reach(mirror):
    assert mirror.journal.published
    mirror.gate._fresh_at -= module.out_of_reach_s + 1
    return mirror


async def test_while_checkpoints_come_there_is_no_emergency(mirror):
    await refused_in_emergency(mirror, Reason.WITHIN_REACH, emergency(mirror))
    assert mirror.journal.published
    mirror.gate._fresh_at -= 11
    await in_emergency(mirror, emergency(mirror))
    mirror.publish()
    await refused_in_emergency(mirror, Reason.WITHIN_REACH, emergency(mirror))


async def test_an_old_checkpoint_heard_again_does_not_end_an_emergency(mirror):
    old = mirror.note()
    mirror.publish(after_s=5)
    assert mirror.journal.published
    mirror.gate._fresh_at -= 11
    mirror.journal.hear(old)
    await in_emergency(mirror, emergency(mirror))


async def test_a_marked_identity_with_a_new_key_still_reads_in_an_emergency(mirror):
    pair = [mirror.c.key(who) for who in ("doctor", "doctor's new")]
    said = rotation_signed(mirror.c.roster.origin, *map(public_key, pair))
    await mirror.say("ca 1", Rotate(*map(public_key, pair), *(key.sign(said) for key in pair), nonce))
    assert mirror.journal.published
    mirror.gate._fresh_at -= module.out_of_reach_s + 1
    await in_emergency(mirror, emergency(mirror, "doctor's new"), "doctor's new")
    await refused_in_emergency(mirror, Reason.NO_EMERGENCY, emergency(mirror, "reader"), "reader")


async def test_only_an_emergency_identity_with_a_reason_of_its_own_is_served(out_of_reach):
    mirror = out_of_reach
    await refused_in_emergency(mirror, Reason.NO_EMERGENCY, emergency(mirror, "owner"), "owner")
    await refused_in_emergency(mirror, Reason.NO_EMERGENCY, emergency(mirror, reason=b""))
    await refused_in_emergency(mirror, Reason.OTHER_READER, emergency(mirror), "owner")
    await refused_in_emergency(mirror, Reason.OTHER_FILE, emergency(mirror), "doctor", two)
    await refused_in_emergency(mirror, Reason.FORGED, emergency(mirror, signed=False))
    await refused_in_emergency(mirror, Reason.UNREGISTERED, emergency(mirror, files=(never,)), "doctor", never)
    assert not list(mirror.folder.glob("emergency/*"))
    await in_emergency(mirror, emergency(mirror, files=(one, two)), "doctor", one, two)
    assert mirror.metrics._emergencies == 1


async def test_an_emergency_identity_that_was_withdrawn_is_not_served(mirror):
    await mirror.say("ca 1", Withdraw(mirror.key("doctor"), nonce))
    assert mirror.journal.published
    mirror.gate._fresh_at -= 11
    await refused_in_emergency(mirror, Reason.WITHDRAWN, emergency(mirror))


async def test_in_an_emergency_a_file_is_there_until_the_day_for_which_its_erasure_is_dated(mirror):
    for ahead, erased in ((100, two), (-1, one)):
        await mirror.say("owner", Erase(erased, mirror.time + ahead, nonce))
    assert mirror.journal.published
    mirror.gate._fresh_at -= module.out_of_reach_s + 1
    await in_emergency(mirror, emergency(mirror, files=(two,)), "doctor", two)
    await refused_in_emergency(mirror, Reason.ERASED, emergency(mirror), "doctor", one)


async def test_an_emergency_read_is_on_disk_before_it_is_served_and_appended_when_the_ledger_is_back(out_of_reach):
    mirror, entry = out_of_reach, emergency(out_of_reach)
    await in_emergency(mirror, entry)
    (path,) = mirror.folder.glob("emergency/*")
    assert path.read_bytes() == entry.to_bytes()
    again = Emergencies(mirror.folder, mirror.append, mirror.is_appended, retry_s=0.01)  # a restart
    assert again.waiting == 1
    running = asyncio.create_task(again.run())
    await asyncio.sleep(0.05)
    assert path.exists()
    mirror.reachable = True
    async with asyncio.timeout(60):
        while path.exists():
            await asyncio.sleep(0.01)
    assert mirror.appended == [entry]
    assert again.waiting == 0
    running.cancel()
    mirror.emergencies._seen.clear()
    await refused_in_emergency(mirror, Reason.EXPIRED, entry)  # it is in the ledger, and serves no second emergency


async def test_one_that_the_ledger_never_takes_is_put_aside(out_of_reach):
    mirror = out_of_reach
    await in_emergency(mirror, emergency(mirror))

    async def never_taken(entry):
        raise Refused("withdrawn")

    running = asyncio.create_task(Emergencies(mirror.folder, never_taken, mirror.is_appended, retry_s=0.01).run())
    async with asyncio.timeout(60):
        while not list(mirror.folder.glob("emergency/*.refused")):
            await asyncio.sleep(0.01)
    running.cancel()


async def test_an_emergency_entry_serves_ten_minutes(out_of_reach):
    mirror, entry = out_of_reach, emergency(out_of_reach)
    await in_emergency(mirror, entry)
    await in_emergency(mirror, entry)
    mirror.emergencies._seen[entry.id] -= 601
    await refused_in_emergency(mirror, Reason.EXPIRED, entry)


async def test_all_reasons_are_counted_from_a_closed_set(mirror):
    await mirror.refused(Reason.NOT_AN_ACCESS, "owner", 0)
    families = {family.name: family for family in mirror.metrics.families()}
    samples = {sample.labels["reason"]: sample.value for sample in families["medshard_reads_refused"].samples}
    assert set(samples) == {reason.value for reason in Reason}
    assert samples["not-an-access"] == 1
