"""A proof for outsiders: what it shows, what each broken link of its chain of reasons does, and what it does not give away."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import c2sp

from medshard_protocol import evidence, merkle
from medshard_protocol.canonical import decode, encode
from medshard_protocol.checkpoint import Checkpoint
from medshard_protocol.documentproof import DocumentProof, First, Opening, Place, Proven, Seal, Stamp, Step
from medshard_protocol.entries import Approve, Enrol, Genesis, Register, Timestamp, sign_entry
from medshard_protocol.errors import Malformed, MedshardError, Refused
from medshard_protocol.identity import public_key
from medshard_protocol.merkle import sha256
from medshard_protocol.rosters import Link
from medshard_protocol.tlogproof import TlogProof

documents = [(100 + n, hashlib.sha256(b"document %d" % n).digest()) for n in range(5)]
file_id, key, content = b"f" * 32, b"e" * 32, b"c" * 32
quorum = [0, 1, 2]


@dataclass
class Log:
    """A log of signed entries, some noise between them."""

    c: Any
    entries: list[bytes]

    def leaves(self, size: int) -> list[bytes]:
        return [merkle.leaf_hash(entry, sha256) for entry in self.entries[:size]]

    def place(self, index: int, size: int | None = None) -> Place:
        leaves = self.leaves(size or len(self.entries))
        return Place(index, self.entries[index], tuple(merkle.inclusion_path(leaves, index, sha256)))

    def checkpoint(self, size: int | None = None) -> Checkpoint:
        size = size or len(self.entries)
        return Checkpoint(self.c.roster.origin, size, merkle.root(self.leaves(size), sha256))

    def note(self, ed25519: list[int] = quorum, ml_dsa: list[int] = quorum, size: int | None = None) -> bytes:
        return self.c.note(self.checkpoint(size), ed25519, ml_dsa).to_bytes()


def opening_of(owner: bytes, member: int) -> Opening:
    leaves = evidence.leaves(owner, file_id, key, documents)
    size, digest = documents[member]
    path = tuple(merkle.inclusion_path(leaves, member, sha256))
    return Opening(content, evidence.salt(key, member), size, digest, member, len(documents), path)


def log_of(c: Any, more: tuple[Any, ...] = ()) -> Log:
    """0 genesis, 1 ENROL, 2 REGISTER, then ``more`` and noise."""
    owner = public_key(c.key("vault"))
    root = evidence.root(evidence.leaves(owner, file_id, key, documents))
    genesis = sign_entry(c.roster.origin, Genesis(c.roster.sha256, bytes(16)), c.roster.log_key, c.key("log").sign)
    entries = [
        genesis,
        c.entry("ca 1", Enrol(owner, 0, bytes(16))),
        c.entry("vault", Register(file_id, evidence.registered_hash(root, content), bytes(16))),
        *more,
    ]
    return Log(c, [entry.to_bytes() for entry in entries] + [b"noise %d" % n for n in range(9)])


@pytest.fixture(scope="module")
def log(consortium: Callable[..., Any]) -> Log:
    return log_of(consortium(4, pq=True))


def proof_of(log: Log, member: int = 3, **changes: Any) -> DocumentProof:
    opening = opening_of(public_key(log.c.key("vault")), member)
    return replace(DocumentProof(log.place(2), log.note(), opening, log.place(1)), **changes)


def again(proof: DocumentProof) -> DocumentProof:
    read = DocumentProof.from_bytes(proof.to_bytes())
    assert read == proof
    return read


def test_it_shows_document_owner_institution_and_cosigners(log: Log) -> None:
    proven = again(proof_of(log)).verify(log.c.roster)
    assert (proven.sha256, proven.size) == (documents[3][1], 103)
    assert (proven.index, proven.enrolled_at, proven.log_size) == (2, 1, 12)
    assert (proven.owner, proven.institution) == (public_key(log.c.key("vault")), "Institution 1")
    assert [each.institution for each in proven.cosigned] == ["Institution 0", "Institution 1", "Institution 2"]
    assert [each.node for each in proven.cosigned_pq] == ["node0", "node1", "node2"]
    assert proven.known_by == 1_700_000_000
    assert proven.stamp is None


@pytest.mark.parametrize("member", range(5))
def test_each_document_of_a_pack_has_a_proof_of_its_own(log: Log, member: int) -> None:
    assert proof_of(log, member).verify(log.c.roster).sha256 == documents[member][1]


def test_it_gives_away_one_document_and_nothing_else(log: Log) -> None:
    data = proof_of(log, 3).to_bytes()
    extra = TlogProof.from_bytes(data).extra
    for other in (0, 1, 2, 4):
        assert documents[other][1] not in extra
        assert evidence.salt(key, other) not in extra
    assert key not in extra
    assert file_id in extra  # it stands on the ledger anyway


def test_a_reader_of_c2sp_proofs_accepts_it(log: Log) -> None:
    from storenode.logtool.export import policy

    rules = c2sp.Policy(policy(log.c.roster))
    data = proof_of(log).to_bytes().decode()
    index, extra = c2sp.check_proof(data, hashlib.sha256(b"\x00" + log.entries[2]).digest(), rules)
    assert (index, len(extra) > 300) == (2, True)
    with pytest.raises(AssertionError):
        c2sp.check_proof(data, hashlib.sha256(b"\x00" + log.entries[3]).digest(), rules)


def test_without_a_quorum_of_each_kind_it_proves_nothing(log: Log) -> None:
    """Whoever breaks Ed25519, or ML-DSA, and not both, has forged nothing."""
    for ed25519, ml_dsa in ((quorum, []), (quorum, [0, 1]), ([], quorum), ([0, 1], quorum)):
        with pytest.raises(Refused, match="fewer than 3"):
            proof_of(log, note=log.note(ed25519, ml_dsa)).verify(log.c.roster)


def changed(value: bytes) -> bytes:
    return bytes([value[0] ^ 1]) + value[1:]


@pytest.mark.parametrize(
    "change",
    [
        lambda o: replace(o, digest=changed(o.digest)),
        lambda o: replace(o, size=o.size + 1),
        lambda o: replace(o, salt=changed(o.salt)),
        lambda o: replace(o, content=changed(o.content)),
        lambda o: replace(o, member=2),
        lambda o: replace(o, members=9),
        lambda o: replace(o, path=o.path[:-1]),
        lambda o: replace(o, path=(changed(o.path[0]), *o.path[1:])),
        lambda o: replace(o, member=0, members=1, path=()),
    ],
    ids=["digest", "size", "salt", "content", "member", "members", "short path", "path", "no path"],
)
def test_another_document_is_not_what_was_registered(log: Log, change: Callable[[Opening], Opening]) -> None:
    proof = proof_of(log)
    with pytest.raises((Refused, Malformed)):
        again(replace(proof, opening=change(proof.opening))).verify(log.c.roster)


def test_a_thief_cannot_carry_an_owner_s_evidence_into_a_registration_of_the_thief_s(consortium: Callable[..., Any]) -> None:
    """A node sees the evidence first. It may register it under its own key, and gets no proof from that."""
    c = consortium(4, pq=True)
    root = evidence.root(evidence.leaves(public_key(c.key("vault")), file_id, key, documents))
    for stolen in (file_id, b"g" * 32):
        theft = [
            c.entry("ca 2", Enrol(public_key(c.key("thief")), 0, bytes(16))),
            c.entry("thief", Register(stolen, evidence.registered_hash(root, content), bytes(16))),
        ]
        log = log_of(c, tuple(theft))
        stolen_proof = proof_of(log, register=log.place(4), enrolment=log.place(3))
        with pytest.raises(Refused, match="not this document"):
            stolen_proof.verify(c.roster)


def test_what_stands_in_the_wrong_place_proves_nothing(log: Log, consortium: Callable[..., Any]) -> None:
    proof, c = proof_of(log), log.c
    for register in (replace(log.place(2), index=3), replace(log.place(2), path=log.place(2).path[::-1]), log.place(1), log.place(5)):
        with pytest.raises(MedshardError):
            replace(proof, register=register).verify(c.roster)
    for enrolment in (log.place(2), log.place(0), log.place(6), replace(log.place(1), index=0)):
        with pytest.raises(MedshardError):
            replace(proof, enrolment=enrolment).verify(c.roster)
    with pytest.raises(Refused):
        proof.verify(consortium(7, pq=True).roster)


def test_an_enrolment_after_the_registration_does_not_count(consortium: Callable[..., Any]) -> None:
    c = consortium(4, pq=True)
    late = log_of(c, (c.entry("ca 0", Enrol(public_key(c.key("vault")), 0, b"1" * 16)),))
    with pytest.raises(Refused, match="vouched"):
        proof_of(late, enrolment=late.place(3)).verify(c.roster)
    stranger = log_of(c, (c.entry("ca 9", Enrol(public_key(c.key("vault")), 0, b"1" * 16)),))
    entries = [stranger.entries[0], stranger.entries[3], stranger.entries[2]]
    moved = Log(c, entries)
    with pytest.raises(Refused, match="nobody of this consortium"):
        proof_of(moved, register=moved.place(2), enrolment=moved.place(1), note=moved.note()).verify(c.roster)


def test_an_entry_in_the_log_that_its_author_did_not_sign_proves_nothing(consortium: Callable[..., Any]) -> None:
    c = consortium(4, pq=True)
    log = log_of(c)
    log.entries[2] = changed(log.entries[2][::-1])[::-1]
    with pytest.raises(Refused, match="signature"):
        proof_of(log).verify(c.roster)


# -- when


def test_the_checkpoint_of_the_day_tells_the_time_though_the_proof_is_younger(log: Log) -> None:
    later = log.c.note(log.checkpoint(), [], [])
    from tests.conftest import pq_key_named

    from medshard_protocol.checkpoint import cosigner_verifier, pq_verifier

    lines = []
    for n in quorum:
        node = log.c.roster.nodes[n].id
        lines.append(cosigner_verifier(log.c.roster, node).sign(later.text, log.c.key(f"cosigner {n}").sign, 1_900_000_000 + n))
        lines.append(pq_verifier(log.c.roster, node).sign(later.text, pq_key_named(f"pq {n}").sign, 1_900_000_000 + n))
    note = later.signed_by(lines).to_bytes()
    proof = proof_of(log, note=note)
    assert proof.verify(log.c.roster).known_by == 1_900_000_001  # one of four may be wrong, so the earliest word is not believed
    first = First(log.note(quorum, [], size=3), log.place(2, 3).path)
    assert again(replace(proof, first=first)).verify(log.c.roster).known_by == 1_700_000_000
    for bad in (First(log.note([0, 1], [], size=3), first.path), First(log.note(quorum, [], size=4), first.path)):
        with pytest.raises((Refused, Malformed)):
            replace(proof, first=bad).verify(log.c.roster)


def stamped(c: Any, size: int = 3, root: bytes | None = None) -> Log:
    log = log_of(c)
    head = log.checkpoint(size)
    entry = c.entry("tls 0", Timestamp(size, root or head.root, b"token", bytes(16)))
    return log_of(c, (entry,))


def test_a_timestamp_is_bound_to_the_head_it_was_given_for(consortium: Callable[..., Any]) -> None:
    c = consortium(4, pq=True)
    log = stamped(c)
    path = tuple(merkle.consistency_path(log.leaves(len(log.entries)), 3, sha256))
    proof = proof_of(log, stamp=Stamp(log.place(3), path))
    proven = again(proof).verify(c.roster)
    assert proven.stamp is not None
    assert (proven.stamp.text, proven.stamp.token) == (log.checkpoint(3).text().encode(), b"token")
    with pytest.raises(Malformed):
        replace(proof, stamp=Stamp(log.place(3), path[:-1])).verify(c.roster)
    with pytest.raises(Refused, match="no timestamp"):
        replace(proof, stamp=Stamp(log.place(1), path)).verify(c.roster)


def test_a_timestamp_of_another_history_or_of_a_shorter_log_is_refused(consortium: Callable[..., Any]) -> None:
    c = consortium(4, pq=True)
    for size, root in ((3, b"r" * 32), (2, None), (13, b"r" * 32)):
        log = stamped(c, size, root) if size < 13 else log_of(c, (c.entry("tls 0", Timestamp(size, b"r" * 32, b"", bytes(16))),))
        path = tuple(merkle.consistency_path(log.leaves(len(log.entries)), min(size, len(log.entries)), sha256))
        with pytest.raises((Refused, Malformed)):
            proof_of(log, stamp=Stamp(log.place(3), path)).verify(c.roster)


# -- rosters after genesis


def with_change(c: Any, ml_dsa: list[int] = quorum, *, approvals: int = 3) -> tuple[Log, DocumentProof]:
    new = replace(c.roster, number=1, previous=c.roster.sha256, nodes=(replace(c.roster.nodes[0], capacity=5), *c.roster.nodes[1:]))
    votes = [c.entry(f"ca {n}", Approve(new.sha256, bytes(16))) for n in range(3)]
    log = log_of(c, tuple(votes))
    places = tuple((3 + n, log.place(3 + n).path) for n in range(approvals))
    step = Step(Link(new.to_bytes(), tuple(vote.to_bytes() for vote in votes[:approvals])), Seal(log.note(quorum, ml_dsa), places))
    return log, proof_of(log, steps=(step,))


def test_it_crosses_a_change_of_the_roster(consortium: Callable[..., Any]) -> None:
    c = consortium(4, pq=True)
    _, proof = with_change(c)
    assert again(proof).verify(c.roster).roster_number == 1
    (step,) = proof.steps
    assert replace(proof, steps=(replace(step, seal=replace(step.seal, note=b"")),)).verify(c.roster).roster_number == 1


def test_a_change_of_the_roster_needs_both_kinds_too(consortium: Callable[..., Any]) -> None:
    """Or whoever breaks Ed25519 could approve a roster of their own keys."""
    c = consortium(4, pq=True)
    _, proof = with_change(c, [0, 1])
    with pytest.raises(Refused, match="ML-DSA"):
        proof.verify(c.roster)


def test_approvals_must_be_a_quorum_and_in_the_log(consortium: Callable[..., Any]) -> None:
    c = consortium(4, pq=True)
    _, few = with_change(c, approvals=2)
    with pytest.raises(Refused, match="approved by 2"):
        few.verify(c.roster)
    _, proof = with_change(c)
    (step,) = proof.steps
    (index, path), *rest = step.seal.approvals
    for approvals in (((index + 1, path), *rest), tuple(rest), ((index, path[::-1]), *rest)):
        with pytest.raises((Refused, Malformed)):
            replace(proof, steps=(replace(step, seal=replace(step.seal, approvals=approvals)),)).verify(c.roster)


# -- hostile files


def test_a_tlog_proof_of_something_else_is_malformed(log: Log) -> None:
    place = log.place(2)
    for extra in (b"", b"x", encode([1]), encode([2, *([0] * 6)])):
        with pytest.raises(Malformed):
            DocumentProof.from_bytes(TlogProof(2, place.path, log.note(), extra).to_bytes())


@pytest.mark.parametrize(
    "rest",
    [
        "", "\n", "\nindex 1\n", "\nindex 01\n\nnote", "\nindex -1\n\nnote", "\nindex 9223372036854775808\n\nnote",
        "\nindex 1\nAAAA\n\nnote", "\nextra \nindex 1\n\nnote", "\nindex 1\nextra AA==\n\nnote", "\nextra AB==\nindex 1\n\nnote",
        "\nextra A A=\nindex 1\n\nnote",
        "\r\nindex 1\r\n\r\nnote", "\nextra AA==\nextra AA==\nindex 1\n\nnote", "\nindex 1 \n\nnote", "\nindex \u0661\n\nnote",
        "\nindex 1\n" + ("A" * 43 + "=\n") * 65 + "\nnote", " \nindex 1\n\nnote", "x\nindex 1\n\nnote",
    ],
)  # fmt: skip
def test_a_text_that_breaks_a_rule_is_no_tlog_proof(rest: str) -> None:
    with pytest.raises(Malformed):
        TlogProof.from_bytes(b"c2sp.org/tlog-proof@v1" + rest.encode())


def test_the_smallest_and_the_largest_are_read() -> None:
    for proof in (TlogProof(0, (), b"note"), TlogProof(2**63 - 1, (bytes(32),) * 64, b"note\n\nx", b"extra" * 9)):
        assert TlogProof.from_bytes(proof.to_bytes()) == proof


@pytest.fixture(scope="module")
def good(log: Log) -> list[tuple[DocumentProof, Proven]]:
    """A proof within one roster and one across a change, and what they prove: making them takes longer than a look at a changed one."""
    return [(proof, proof.verify(log.c.roster)) for proof in (proof_of(log), with_change(log.c)[1])]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_proves_the_same(log: Log, good: list[tuple[DocumentProof, Proven]], at: int, change: int) -> None:
    proof, true = good[0]
    packed = bytearray(proof.to_bytes())
    packed[at % len(packed)] ^= change
    try:
        proven = DocumentProof.from_bytes(bytes(packed)).verify(log.c.roster)
    except MedshardError:
        return
    assert proven == true  # one byte says how many members a pack has, which is no claim


values = st.recursive(
    st.none() | st.integers(0, 2**64 - 1) | st.binary(max_size=70), lambda inner: st.lists(inner, max_size=7), max_leaves=20
)


@settings(max_examples=300, deadline=None)
@given(st.booleans(), st.lists(st.integers(0, 1000), min_size=1, max_size=8), values)
def test_a_changed_item_anywhere_inside_is_refused_or_proves_the_same(
    log: Log, good: list[tuple[DocumentProof, Proven]], across: bool, way: list[int], value: Any
) -> None:
    """``way`` leads into the lists. How many members a pack has is no claim, and a step that is left out may not have been needed."""
    proof, true = good[across]
    text = TlogProof.from_bytes(proof.to_bytes())
    items: Any = decode(text.extra, bytes_max=10**6, what="extra")
    at, (*deeper, last) = items, way
    for turn in deeper:
        inner = at[turn % len(at)]
        if isinstance(inner, list) and inner:
            at = inner
    if at[last % len(at)] == value:
        return
    at[last % len(at)] = value
    try:
        proven = DocumentProof.from_bytes(replace(text, extra=encode(items)).to_bytes()).verify(log.c.roster)
    except MedshardError:
        return
    for name in ("sha256", "size", "owner", "institution", "index", "file_id", "root", "log_size", "cosigned_pq"):
        assert getattr(proven, name) == getattr(true, name)


def test_the_size_of_a_proof_in_a_log_of_a_hundred_million_entries(consortium: Callable[..., Any]) -> None:
    """7 mirrors, so 5 cosignatures of each kind; the limit is for the proof itself, with entry and evidence."""
    c = consortium(7, pq=True)
    log, size, path = log_of(c), 10**8, tuple(bytes([n]) * 32 for n in range(27))
    note = c.note(Checkpoint(c.roster.origin, size, bytes(32)), range(5), range(5)).to_bytes()
    plain = TlogProof(size - 5, path, note).to_bytes()
    opening = replace(opening_of(bytes(32), 0), member=0, members=1, path=())
    proof = DocumentProof(Place(size - 5, log.entries[2], path), note, opening, Place(size // 2, log.entries[1], path))
    whole = proof.to_bytes()
    assert len(plain) < 18_600
    assert len(whole) < 20_480
    assert len(base64.b64encode(log.entries[2])) + len(plain) < 19_000
