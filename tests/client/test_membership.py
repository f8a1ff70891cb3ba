"""A vault that follows the rosters: what nodes may tell it, and what it does not believe."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from tests.conftest import Consortium, consortium_of, key_named

from medshard.home import Home
from medshard.membership import Follower, following
from medshard.tls import unverified_context
from medshard.transport import Net
from medshard_protocol.entries import Approve, Genesis
from medshard_protocol.errors import Absent, Malformed, Refused, Unavailable
from medshard_protocol.identity import client_certificate, client_csr, public_key
from medshard_protocol.ids import NodeId
from medshard_protocol.roster import Node, Roster
from medshard_protocol.rosters import Link, pack_links
from medshard_protocol.succession import Successor, label, line_after

four = consortium_of(4)


def after(roster: Roster, capacity: int) -> Roster:
    first = replace(roster.nodes[0], capacity=capacity)
    return replace(roster, number=roster.number + 1, previous=roster.sha256, nodes=(first, *roster.nodes[1:]))


def link(old: Roster, new: Roster, by: Sequence[int] = (0, 1, 2)) -> Link:
    return Link(new.to_bytes(), tuple(Consortium(old).entry(f"ca {i}", Approve(new.sha256, bytes(16))).to_bytes() for i in by))


one = after(four.roster, 1)
two = after(one, 2)
chain = [link(four.roster, one), link(one, two)]


class Told(Net):
    """A net whose nodes answer as the test says: links from genesis on, bytes, or nothing at all."""

    def __init__(self, answers: Sequence[Sequence[Link] | bytes | None], roster: Roster = four.roster) -> None:
        super().__init__(roster, {})
        self.answers = dict(zip((node.id for node in roster.nodes), answers, strict=True))
        self.asked: list[NodeId] = []
        self.strangers = False  # whether nobody knows this vault's certificate
        self.behind: NodeId | None = None  # but for this one, which has not heard of any change

    async def call(  # type: ignore[override]
        self, node: Node, method: str, path: str, body: bytes = b"", *, anonymous: bool = False, **_: object
    ) -> bytes:
        if path.startswith("/v1/successor?of="):
            raise Absent("there is none")
        assert (method, path.split("=")[0]) == ("GET", "/v1/rosters?after")
        self.asked.append(node.id)
        await asyncio.sleep(0)
        answer = [] if node.id == self.behind else self.answers[node.id]
        if self.strangers and not anonymous and node.id != self.behind:
            raise Unavailable("hung up") from ConnectionResetError()
        if answer is None:
            raise Unavailable("no answer")
        return answer if isinstance(answer, bytes) else pack_links(answer[int(path.split("=")[1].removesuffix("&of")) :])


@pytest.fixture
def home(tmp_path) -> Home:
    (tmp_path / "genesis.medshard").write_bytes(four.roster.to_bytes())
    return Home(tmp_path)


@pytest.fixture
def follower(home) -> Callable[[Net], Follower]:
    return lambda net: Follower(home, net, lambda roster: {})


async def test_a_vault_follows_what_a_quorum_signed_and_keeps_it(home, follower):
    net = Told([chain] * 4)
    assert await follower(net).follow()
    assert net.roster == two == home.roster()
    assert home.rosters() == [four.roster, one, two]
    assert home.links() == chain


async def test_a_vault_that_no_node_knows_any_more_follows_all_the_same(home, follower):
    net = Told([chain] * 4)
    net.strangers = True
    assert await follower(net).follow()
    assert net.roster == two == home.roster()


async def test_a_vault_whose_own_institutions_node_was_left_behind_with_it_follows_all_the_same(home, follower):
    net = Told([chain] * 4)
    net.strangers, net.behind = True, four.roster.nodes[3].id
    assert await follower(net).follow()
    assert net.roster == two == home.roster()


async def test_nobody_is_asked_twice_while_nodes_are_only_away(home, follower):
    net = Told([[], None, None, None])
    assert not await follower(net).follow()
    assert len(net.asked) == 4


def test_a_vault_is_told_that_its_institution_has_left() -> None:
    request, now = client_csr(key_named("vault")), datetime.now(UTC)
    certificate = client_certificate(key_named("ca 3"), four.roster.institutions[3].ca, request, now)
    inside = Net(four.roster, dict.fromkeys(range(4), unverified_context()), certificate)
    assert inside.place(four.roster.nodes[0]).node == four.roster.nodes[0]
    gone = replace(four.roster, institutions=four.roster.institutions[:3], nodes=four.roster.nodes[:3])
    inside.adopt(gone, dict.fromkeys(range(3), unverified_context()))
    with pytest.raises(Refused, match="no longer in the consortium"):
        inside.place(four.roster.nodes[0])


async def test_one_honest_answer_is_enough_among_f_that_keep_it_back(home, follower):
    for place in range(4):
        answers: list[Sequence[Link] | bytes | None] = [[]] * 4
        answers[place] = chain
        net = Told(answers)
        for _ in range(30):  # f + 1 = 2 of 4 are drawn: with one that keeps it back, one that tells
            fresh = follower(net)
            await fresh.follow()
            if net.roster == two:
                break
        assert net.roster == two


async def test_with_f_nodes_that_keep_a_change_back_it_is_heard_at_once(home, follower):
    for place in range(4):
        answers: list[Sequence[Link] | bytes | None] = [chain] * 4
        answers[place] = []
        net = Told(answers)
        assert await follower(net).follow()
        assert net.roster == two


async def test_the_longest_chain_that_holds_counts(follower, monkeypatch):
    for answers in ([chain[:1], chain], [chain, chain[:1]]):
        net = Told([*answers, [], []])
        fresh = follower(net)
        monkeypatch.setattr(fresh, "_candidates", lambda roster: roster.nodes)
        assert await fresh._step()
        assert net.roster == two


forged = {
    "a signature is missing": [link(four.roster, one, (0, 1))],
    "an institution counted twice": [link(four.roster, one, (0, 1, 1))],
    "a number left out": chain[1:],
    "another roster before": [link(after(four.roster, 9), after(after(four.roster, 9), 10))],
    "signed by others": [link(four.roster, one, (0, 1, 5))],
}


@pytest.mark.parametrize("what", sorted(forged))
async def test_a_forged_chain_changes_nothing(home, follower, caplog, what):
    net = Told([forged[what]] * 4)
    with caplog.at_level(logging.WARNING):
        assert not await follower(net).follow()
    assert net.roster == four.roster == home.roster()
    assert "does not hold" in caplog.text


async def test_of_a_chain_that_ends_in_a_forgery_the_good_part_is_followed(home, follower):
    net = Told([[chain[0], link(one, two, (0, 1))]] * 4)
    assert await follower(net).follow()
    assert net.roster == one


async def test_who_is_silent_or_talks_nonsense_is_passed_over_for_the_others(home, follower):
    for answers in ([None, b"nonsense", chain, chain], [b"\x92\x01\x90" * 9, None, None, chain]):
        net = Told(answers)
        await follower(net).follow()
        assert net.roster == two


async def test_when_nobody_answers_nothing_changes_and_nothing_is_raised(follower):
    net = Told([None] * 4)
    assert not await follower(net).follow()
    assert len(net.asked) == 8  # once more without a certificate


async def test_many_who_ask_at_once_are_one_question(follower):
    net = Told([chain] * 4)
    fresh = follower(net)
    assert all(await asyncio.gather(*(fresh.follow() for _ in range(50))))
    assert len(net.asked) <= 4  # f + 1 once, and once more to see that nothing follows
    assert not await fresh.follow()
    assert len(net.asked) <= 4


async def test_what_was_followed_is_on_disk_before_it_is_gone_by(home, monkeypatch):
    net = Told([chain] * 4)
    seen: list[int] = []
    monkeypatch.setattr(net, "adopt", lambda roster, contexts: seen.append(home.roster().number))
    await Follower(home, net, lambda roster: {})._step()
    assert seen == [2]


async def test_a_node_that_names_a_newer_roster_is_a_reason_to_ask(home):
    net = Told([chain] * 4)
    async with following(home, net, lambda roster: {}) as follower:
        await follower.follow()
        net._hear("2")
        net._hear("x")
        assert not net._following
        net._hear("3")
        assert len(net._following) == 1
        await asyncio.gather(*net._following)
    net._hear("4")  # nobody follows any more
    assert net.roster == two


def test_a_missing_link_on_disk_is_followed_again(home):
    home.keep_links(0, chain)
    (home.folder / "rosters" / "00000001.link").unlink()
    assert home.roster() == four.roster
    home.keep_links(0, chain)
    (home.folder / "rosters" / "00000002.link").write_bytes(b"\x90")
    with pytest.raises(Malformed):
        home.roster()


async def test_a_holder_that_has_left_is_away_and_no_error(home):
    gone = four.roster.nodes[3]
    left = replace(four.roster, institutions=four.roster.institutions[:3], nodes=four.roster.nodes[:3], code=(2, 3, 3))
    async with Net(left, {}) as net:
        stand_in = net.holder(gone.id)
        assert (net.institution_of(stand_in), net.institution_of(net.holder(left.nodes[0].id))) == ("", "Institution 0")
        with pytest.raises(Unavailable, match="no longer in the roster"):
            await net.call(stand_in, "GET", "/healthz", timeout_s=1.0)
        with pytest.raises(Unavailable, match="no longer in the roster"):
            await net.call(gone, "GET", "/healthz", timeout_s=1.0)


# -- after the log has ended


entries = [Consortium(four.roster).entry("log", Genesis(four.roster.sha256, bytes(16))).to_bytes()]
end = four.checkpoint(entries)
later = replace(four.roster, origin="consortium.example/log-2", before=line_after(four.roster, end))


def succession(genesis: Roster = later, by: Sequence[int] = (0, 1, 2)) -> bytes:
    """Who signs for a successor that must not be signs for its bytes all the same."""
    message = label + four.roster.sha256 + genesis.sha256
    signatures = sorted((public_key(key_named(f"ca {i}")), key_named(f"ca {i}").sign(message)) for i in by)
    note = four.note(end, (1, 2, 3)).to_bytes()
    return Successor(four.roster.to_bytes(), (), note, genesis.to_bytes(), tuple(signatures)).to_bytes()


class Ending(Told):
    """A net whose nodes also tell of a successor."""

    def __init__(self, *successors: bytes | None) -> None:
        super().__init__([[]] * 4)
        self.successors = dict(zip((node.id for node in four.roster.nodes), successors, strict=True))

    async def call(self, node: Node, method: str, path: str, body: bytes = b"", **more: object) -> bytes:  # type: ignore[override]
        if path == f"/v1/successor?of={four.roster.sha256.hex()}":
            answer = self.successors[node.id]
            if answer is None:
                raise Absent("there is none")
            return answer
        return await super().call(node, method, path, body, **more)


async def test_a_vault_goes_on_in_the_successor_that_a_quorum_signed(home, follower):
    net = Ending(*[succession()] * 4)
    assert await follower(net).follow()
    assert net.roster == later == home.roster()
    assert home.links() == []
    kept = (home.folder / "before" / f"{four.roster.sha256.hex()}.successor").read_bytes()
    assert Successor.from_bytes(kept).check().rosters == (four.roster,)
    after_later = replace(later, number=1, previous=later.sha256)
    home.keep_links(0, [Link(after_later.to_bytes(), ())])
    assert home.rosters() == [later, after_later]


bad_successors = {
    "too few signatures": succession(by=(0, 1)),
    "another root": succession(replace(later, before=(replace(later.before[0], root=bytes(32)),))),
    "another log": succession(replace(later, before=(replace(later.before[0], genesis=bytes(32)),))),
    "no successor at all": b"\x00",
}


@pytest.mark.parametrize("name", bad_successors)
async def test_a_vault_stays_where_a_successor_does_not_hold(home, follower, name):
    net = Ending(*[bad_successors[name]] * 4)
    assert not await follower(net).follow()
    assert net.roster == four.roster == home.roster()


async def test_one_node_that_tells_the_truth_is_enough(home, follower):
    for place in range(4):
        answers: list[bytes | None] = [bad_successors["too few signatures"]] * 4
        answers[place] = succession()
        net = Ending(*answers)
        made = follower(net)
        for _ in range(50):
            made._asked_at = -1.0
            await made.follow()
        assert net.roster == later
        home.genesis.write_bytes(four.roster.to_bytes())


class HungUp(Told):
    """A net whose nodes hang up on everything: whoever asks looks first whether the roster has changed, as ``Net`` does."""

    follower: Follower

    async def call(self, node: Node, method: str, path: str, body: bytes = b"", **_: object) -> bytes:  # type: ignore[override]
        await asyncio.sleep(0)
        await self.follower.follow()
        raise Unavailable(f"{node.name}: hung up")


async def test_a_question_that_is_hung_up_on_does_not_wait_for_itself(follower: Callable[[Net], Follower]) -> None:
    net = HungUp([None] * 4)
    net.follower = follower(net)
    async with asyncio.timeout(60):
        assert not await net.follower.follow()
