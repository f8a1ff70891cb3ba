"""Repair between real nodes: a shard that is lost for good is made again elsewhere, nobody learns anything, and who may not is refused.

Seven institutions with a node each, and code 3 of 6: one node has no shard of a file, and takes over what another lost.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cluster.mending import File, Repairing, bring_back, put_whole, told, until
from tests.cluster.repairers import rules_name

from medshard import Vault
from medshard.home import Home
from medshard_protocol.galois import mul, times
from medshard_protocol.messages import shard_path, unpack_error
from medshard_protocol.repairorder import (
    Link,
    Order,
    Wish,
    pack_ask,
    pack_keys,
    pack_seed,
    pack_wish,
    sign_offer,
    sign_order,
    unpack_moves,
    unpack_offer,
)
from medshard_protocol.shards import split

k, n = 3, 6
small, large = 2_500_000, 6_000_000  # seven cells a shard and read in one request; sixteen, and streamed


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repairing]:
    consortium = Repairing(tmp_path_factory.mktemp("repair"), institutions=7, code=(k, n))
    consortium.make()
    consortium.configure(on=False)  # here tests say what is repaired, and when
    with consortium:
        yield consortium


@pytest.fixture
async def vault(trial: Repairing) -> AsyncIterator[Vault]:
    async with Vault.open(trial.vault_home, trial.passphrase) as opened:
        yield opened
    bring_back(trial)


@pytest.fixture
async def file(trial: Repairing, vault: Vault, tmp_path: Path, request: pytest.FixtureRequest) -> File:
    return await put_whole(trial, vault, tmp_path / "plain", getattr(request, "param", small))


def orders(trial: Repairing, file: File, name: str, shard: int, move: int, **changed: Any) -> Order:
    """An order by a node, well made but for what is changed."""
    assert trial.roster is not None
    chain = [Link(ref.node, i) for i, ref in enumerate(file.manifest.shards) if i != shard][:k]
    return sign_order(
        changed.get("origin", trial.roster.origin),
        file.manifest.file_id,
        shard,
        move,
        changed.get("chain", chain),
        0,
        os.urandom(16),
        trial.keys(changed.get("signer", name)).node.sign,
    )


def of_each(trial: Repairing, order: Order, by: str, what: str, body: bytes) -> list[bytes | str]:
    """What each helper of an order answers, or what it has against it."""
    path = f"/v1/repair/{order.file_id.hex()}/{order.shard}/{what}"

    def one(link: Link) -> bytes | str:
        name = trial.name(link.node)
        status, answer = trial.ask(by, name, "POST", path, body)
        return answer if status in (200, 204) else str(unpack_error(status, answer, name))

    with ThreadPoolExecutor() as aside:  # one that has not seen a MOVE entry waits for it
        return list(aside.map(one, order.chain))


def hand_in(trial: Repairing, order: Order, by: str) -> list[str]:
    """What each helper of an order has against it; nothing for yes."""
    answers = of_each(trial, order, by, "seed", pack_seed(order, os.urandom(32)))
    return [answer if isinstance(answer, str) else "" for answer in answers]


def agree(trial: Repairing, order: Order, by: str) -> list[bytes | str]:
    """Hand an order in, and all keys."""
    answers = of_each(trial, order, by, "seed", pack_seed(order, os.urandom(32)))
    offers = [unpack_offer(answer) for answer in answers if isinstance(answer, bytes)]
    return of_each(trial, order, by, "keys", pack_keys(order.id, offers))


def ask_for_sum(trial: Repairing, order: Order, by: str, of: str) -> tuple[int, bytes]:
    return trial.ask(by, of, "POST", f"/v1/repair/{order.file_id.hex()}/{order.shard}/sum", pack_ask(order.id))


# -- what it is for


@pytest.mark.parametrize("file", [small, large], ids=["small", "large"], indirect=True)
async def test_a_shard_lost_for_good_is_made_again_and_read(trial: Repairing, vault: Vault, file: File, tmp_path: Path) -> None:
    lost = file.shards()[2]
    trial.kill(file.holders[2])
    planned = trial.repaired(file.spare, file.id, dry_run=True)
    assert (planned["missing"], planned["shard"], planned["next_in_placement"][-1]) == ([2], 2, file.spare)
    told = trial.repaired(file.spare, file.id)
    assert (told["state"], told["shard"], told["suspects"]) == ("done", 2, [])  # a busy helper may have been left out
    assert file.on_disk(file.spare).read_bytes() == lost
    status, moves = trial.ask(file.spare, file.spare, "GET", f"/v1/moves/{file.id}")
    assert (status, unpack_moves(moves)[2].node) == (200, trial.node(file.spare).id)
    assert trial.repaired(file.spare, file.id)["state"] == "nothing"
    report = await vault.verify(file.sha256)
    assert [holder.state for holder in report.holders] == ["proven"] * n
    assert report.holders[2].node == file.spare
    holder = (await vault.info(file.sha256)).nodes[2]
    assert (holder.node, holder.state, holder.detail) == (file.spare, "up", f"taken over from {file.holders[2]}")
    for name in [name for name in file.holders if name != file.holders[2]][:3]:
        file.on_disk(name).unlink()  # now two are left, and the new one
    await vault.get(file.sha256, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.plain.read_bytes()


async def test_no_node_receives_more_than_its_own_shard_and_masked_sums(trial: Repairing, file: File) -> None:
    shards = file.shards()
    put = {name: trial.received(name) for name in trial.names}
    trial.kill(file.holders[1])
    assert trial.repaired(file.spare, file.id)["state"] == "done"
    owners = {name: shard for shard, name in enumerate(file.holders)} | {file.spare: 1}
    in_line = 0
    for name in trial.names:
        if name == file.holders[1]:
            continue
        received = trial.received(name, len(put[name]))
        in_line += len(received) >= len(shards[0])
        for shard, data in enumerate(shards):
            if shard != owners[name]:
                assert not multiples_in(received, data, file.manifest.layout.cell_size), f"{name} got shard {shard}"
    assert in_line == k  # all helpers but the first got a shard's length of sums, and so did the replacement
    assert not multiples_in(trial.received(file.spare, len(put[file.spare])), shards[1], file.manifest.layout.cell_size)
    holder = file.holders[0]  # and the search would have found them
    assert multiples_in(put[holder], shards[0], file.manifest.layout.cell_size)
    assert multiples_in(put[holder].translate(times(77)), shards[0], file.manifest.layout.cell_size)


def multiples_in(received: bytes, shard: bytes, cell_size: int) -> bool:
    """Whether the product of some cell of this shard with some constant occurs in what was received: by 41 bytes of each cell."""
    heard = ratios(received)
    return any(ratios(bytes(cell[100:141])) in heard for cell in split(shard, cell_size) if len(cell) > 141)


def ratios(data: bytes) -> bytes:
    """What stays the same when all bytes are multiplied by one constant: each one's logarithm less the one before; 255 beside a zero."""
    numbers = np.frombuffer(data, dtype=np.uint8)
    steps = (logarithms[numbers[1:]] - logarithms[numbers[:-1]]) % 255
    steps[(numbers[1:] == 0) | (numbers[:-1] == 0)] = 255
    return steps.astype(np.uint8).tobytes()


powers = [1]
while len(powers) < 255:
    powers.append(mul(powers[-1], 2))
logarithms = np.zeros(256, dtype=np.int16)
logarithms[powers] = range(255)


async def test_a_holder_whose_disk_lost_a_shard_makes_it_again(trial: Repairing, file: File) -> None:
    path = file.on_disk(file.holders[4])
    lost = path.read_bytes()
    path.unlink()
    with sqlite3.connect(trial.home(file.holders[4]) / "data" / "store.sqlite", timeout=10) as store:
        store.execute("DELETE FROM shards WHERE file_id = ?", (file.manifest.file_id,))
        store.execute("DELETE FROM manifests WHERE file_id = ?", (file.manifest.file_id,))
    store.close()
    told = trial.repaired(file.holders[4], file.id)
    assert (told["state"], told["shard"]) == ("done", 4)
    assert path.read_bytes() == lost


# -- helpers that fail


async def test_a_helper_that_dies_in_the_middle_is_replaced_and_the_shard_is_finished(trial: Repairing, file: File) -> None:
    lost = file.shards()[0]
    trial.kill(file.holders[0])
    first = trial.repaired(file.spare, file.id, dry_run=True)["helpers"][0]
    trial.misbehave(first, do="die", frame=4)
    told = trial.repaired(file.spare, file.id)
    assert told["state"] == "done"
    assert first in [each.partition(":")[0] for each in told["broken"]]  # and perhaps one that had not heard of the move yet
    assert told["lines"] > 1
    assert file.on_disk(file.spare).read_bytes() == lost


async def test_a_helper_that_lies_is_found_by_exchange_and_named(trial: Repairing, file: File) -> None:
    lost = file.shards()[5]
    trial.kill(file.holders[5])
    liar = trial.repaired(file.spare, file.id, dry_run=True)["helpers"][1]
    trial.misbehave(liar, do="lie")
    told = trial.repaired(file.spare, file.id)
    assert (told["state"], told["suspects"]) == ("done", [liar])
    assert file.on_disk(file.spare).read_bytes() == lost


async def test_a_helper_whose_disk_changed_a_cell_says_so_and_is_left_out(trial: Repairing, file: File) -> None:
    lost = file.shards()[3]
    trial.kill(file.holders[3])
    rotten = trial.repaired(file.spare, file.id, dry_run=True)["helpers"][0]
    with file.on_disk(rotten).open("r+b") as shard:
        shard.seek(file.manifest.layout.cell_size * 2 + 5)
        shard.write(b"rot")
    told = trial.repaired(file.spare, file.id)
    assert told["state"] == "done"
    assert rotten in [each.partition(":")[0] for each in told["broken"]]
    assert file.on_disk(file.spare).read_bytes() == lost


async def test_a_helper_that_freezes_in_the_middle_is_left_out(trial: Repairing, file: File) -> None:
    lost = file.shards()[2]
    trial.kill(file.holders[2])
    for name in trial.running:
        trial.misbehave(name, do="dawdle", s=0.1)
    helpers = trial.repaired(file.spare, file.id, dry_run=True)["helpers"]
    path = f"/v1/repair/{file.id}"
    assert trial.ask(file.spare, file.spare, "POST", path, pack_wish(Wish()))[0] == 200
    await until(lambda: told(trial, file.spare, path)["done"] > 0, "the first sums have come")
    trial.freeze(helpers[-1])
    await until(lambda: told(trial, file.spare, path)["state"] == "done", "the shard is made")
    assert helpers[-1] in [each.partition(":")[0] for each in told(trial, file.spare, path)["broken"]]
    assert file.on_disk(file.spare).read_bytes() == lost


async def test_a_repair_that_is_given_up_leaves_nothing_and_can_be_begun_again(trial: Repairing, file: File) -> None:
    lost = file.shards()[2]
    trial.kill(file.holders[2])
    for name in trial.running:
        trial.misbehave(name, do="dawdle", s=1.0)  # so that the command below comes in time on any machine
    path = f"/v1/repair/{file.id}"
    assert trial.ask(file.spare, file.spare, "POST", path, pack_wish(Wish()))[0] == 200
    await until(lambda: told(trial, file.spare, path)["done"] > 0, "the first sums have come")
    assert trial.ask(file.spare, file.holders[0], "DELETE", path)[0] == 403
    done = trial.repair(file.spare, file.id, "--cancel")
    assert done.returncode == 0, done.stderr
    await until(lambda: told(trial, file.spare, path)["state"] == "failed", "it was given up")
    assert not file.is_at(file.spare)
    assert not list((trial.home(file.spare) / "data" / "tmp").iterdir())
    assert trial.ask(file.spare, file.spare, "DELETE", path)[0] == 404
    for name in trial.running:
        (trial.home(name) / rules_name).unlink()
    assert trial.repaired(file.spare, file.id)["state"] == "done"
    assert file.on_disk(file.spare).read_bytes() == lost


# -- who is refused


async def test_a_node_without_a_move_that_counts_is_refused_by_every_helper(trial: Repairing, file: File) -> None:
    for move in (10**9, 0):  # in this order: a node that was just started does not know the file in its first moment
        assert all("(no-move)" in said for said in hand_in(trial, orders(trial, file, file.spare, 1, move), file.spare))
    move = trial.move(file.spare, file.manifest, 1)
    other = orders(trial, file, file.spare, 2, move)  # another shard than the entry says
    assert all("(no-move)" in said for said in hand_in(trial, other, file.spare))
    again = trial.move(file.spare, file.manifest, 1)  # the latest counts
    assert all("(no-move)" in said for said in hand_in(trial, orders(trial, file, file.spare, 1, move), file.spare))
    assert hand_in(trial, orders(trial, file, file.spare, 1, again), file.spare) == ["", "", ""]


async def test_a_node_that_holds_another_shard_of_the_file_is_refused_by_every_helper(trial: Repairing, file: File) -> None:
    greedy = file.holders[4]
    move = trial.move(greedy, file.manifest, 1)  # the ledger does not know manifests; helpers do
    chain = [Link(file.manifest.shards[i].node, i) for i in (0, 2, 3)]
    said = hand_in(trial, orders(trial, file, greedy, 1, move, chain=chain), greedy)
    assert len(said) == k
    assert all("(holds-another)" in each for each in said)
    assert trial.repaired(file.spare, file.id)["state"] == "nothing"  # such a MOVE makes nobody a holder
    trial.kill(file.holders[1])
    done = trial.repair(greedy, file.id, "--shard", "1")
    assert done.returncode == 4
    assert "holds-another" in done.stderr


async def test_orders_that_are_forged_or_out_of_line_are_refused(trial: Repairing, file: File) -> None:
    move = trial.move(file.spare, file.manifest, 1)
    refs = file.manifest.shards
    forged = orders(trial, file, file.spare, 1, move, signer=file.holders[0])
    assert all("(forged)" in said for said in hand_in(trial, forged, file.spare))
    foreign = orders(trial, file, file.spare, 1, move, origin="another.example/log")
    assert all("(forged)" in said for said in hand_in(trial, foreign, file.spare))
    good = orders(trial, file, file.spare, 1, move)
    assert all("(other-caller)" in said for said in hand_in(trial, good, file.holders[5]))
    for chain in ([Link(refs[0].node, 0), Link(refs[2].node, 2)], [Link(refs[0].node, 2), Link(refs[2].node, 0), Link(refs[3].node, 3)]):
        assert all("(chain)" in said for said in hand_in(trial, orders(trial, file, file.spare, 1, move, chain=chain), file.spare))


async def test_a_sum_is_given_once_and_to_the_next_in_the_line_alone(trial: Repairing, file: File) -> None:
    move = trial.move(file.spare, file.manifest, 1)
    order = orders(trial, file, file.spare, 1, move)
    first, second = (trial.name(order.chain[place].node) for place in (0, 1))
    assert ask_for_sum(trial, order, second, first)[0] == 403  # before the order was handed in
    assert hand_in(trial, order, file.spare) == ["", "", ""]
    assert ask_for_sum(trial, order, second, first)[0] == 403  # before the helpers have each other's keys
    order = orders(trial, file, file.spare, 1, move)
    assert agree(trial, order, file.spare) == [b"", b"", b""]
    assert ask_for_sum(trial, order, file.spare, first)[0] == 403  # not even the replacement
    status, body = ask_for_sum(trial, order, second, first)
    assert (status, len(body) > len(file.shards()[0])) == (200, True)
    assert not multiples_in(body, file.shards()[order.chain[0].shard], file.manifest.layout.cell_size)
    assert ask_for_sum(trial, order, second, first)[0] == 403  # nor twice


async def test_a_replacement_cannot_put_its_own_key_in_a_helpers_place(trial: Repairing, file: File) -> None:
    move = trial.move(file.spare, file.manifest, 1)
    order = orders(trial, file, file.spare, 1, move)
    answers = of_each(trial, order, file.spare, "seed", pack_seed(order, os.urandom(32)))
    offers = [unpack_offer(answer) for answer in answers if isinstance(answer, bytes)]
    own = sign_offer(trial.roster.origin, order.id, os.urandom(32), trial.keys(file.spare).node.sign)
    said = of_each(trial, order, file.spare, "keys", pack_keys(order.id, [offers[0], own, offers[2]]))
    assert all("(keys)" in str(each) for each in said)
    assert all("(keys)" in str(each) for each in of_each(trial, order, file.spare, "keys", pack_keys(order.id, offers[:2])))
    good = pack_keys(order.id, offers)
    assert all("(other-caller)" in str(each) for each in of_each(trial, order, file.holders[5], "keys", good))
    assert of_each(trial, order, file.spare, "keys", good) == [b"", b"", b""]
    assert all("(unknown-order)" in str(each) for each in of_each(trial, order, file.spare, "keys", good))


async def test_a_vault_gets_no_sum_and_begins_no_repair(trial: Repairing, vault: Vault, file: File) -> None:
    move = trial.move(file.spare, file.manifest, 1)
    order = orders(trial, file, file.spare, 1, move)
    helper, path = trial.roster.node(order.chain[0].node), f"/v1/repair/{file.id}"
    with pytest.raises(Exception, match="other-caller"):
        await vault._net.call(helper, "POST", path + "/1/seed", pack_seed(order, bytes(32)), timeout_s=5.0)
    with pytest.raises(Exception, match="own operator"):
        await vault._net.call(helper, "GET", path, timeout_s=5.0)


async def test_a_shard_that_is_there_is_not_made_again(trial: Repairing, file: File) -> None:
    assert trial.repaired(file.spare, file.id)["state"] == "nothing"
    assert trial.repaired(file.spare, file.id, 2)["state"] == "nothing"
    assert trial.ask(file.spare, file.holders[2], "HEAD", shard_path(file.manifest.file_id, 2))[0] == 204


async def test_a_repair_of_an_unknown_file_says_so(trial: Repairing) -> None:
    done = trial.repair(trial.names[0], "ab" * 32)
    assert done.returncode == 4
    assert "not registered" in done.stderr
    assert Home(trial.vault_home).certificate.exists()
