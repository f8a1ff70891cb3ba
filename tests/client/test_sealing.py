"""Sealing: byte-exact, bound to one key and one place, and nothing that was changed, moved or cut ever opens."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from Crypto.Cipher import AES
from hypothesis import given
from hypothesis import strategies as st

from medshard import sealing
from medshard.encoding import Decoder, Encoder
from medshard.model import Description, header_bytes_max
from medshard.sealing import FileSeal, padded_least, padme, segment_nonce, unwrap, wrap
from medshard.source import Part, Source
from medshard_protocol.erasure import code
from medshard_protocol.errors import Damaged
from medshard_protocol.ids import FileId, Key, NodeId
from medshard_protocol.manifest import Manifest, ShardRef
from medshard_protocol.manifest import header_bytes_max as manifest_header_bytes_max
from medshard_protocol.shards import Layout, tag_bytes

vectors = json.loads((Path(__file__).parents[1] / "vectors" / "sealing.json").read_text())
objects = pytest.mark.parametrize("vector", vectors["objects"], ids=lambda vector: vector["what"])


def seal_of(vector: dict[str, Any]) -> FileSeal:
    return FileSeal(bytes.fromhex(vector["file_key"]), FileId(bytes.fromhex(vector["file_id"])))


def manifest_of(seal: FileSeal, layout: Layout, **changes: Any) -> Manifest:
    refs = tuple(ShardRef(NodeId(bytes([i]) * 16), bytes(32)) for i in range(layout.n))
    plain = Manifest(seal.file_id, layout, "blake3", seal.commitment, refs, Key(bytes(32)), b"", bytes(48), (), bytes(32))
    return replace(plain, **changes)


def encode(seal: FileSeal, layout: Layout, plain: bytes, folder: Path, digest: str = "blake3") -> tuple[list[tuple[bytes, ...]], Encoder]:
    """The cells of every stripe, and the encoder with the roots."""
    path = folder / "plain"
    path.write_bytes(plain)
    source = Source([Part.at(path, b"plain", Description("text/plain"))])
    encoder = Encoder(source, seal, layout, digest)
    stripes = []
    while encoder:
        stripes.append(tuple(bytes(cell) for cell in encoder.next().cells))
    return stripes, encoder


# -- vectors


@objects
def test_a_file_is_sealed_and_coded_as_in_its_vector(vector: dict[str, Any], tmp_path: Path) -> None:
    seal, plain = seal_of(vector), bytes.fromhex(vector["plain"])
    assert seal.commitment.hex() == vector["commitment"]
    assert padme(len(plain)) == vector["padded_size"]
    layout = Layout(vector["k"], vector["n"], vector["cell_size"], vector["sealed_size"])
    assert layout.plain_size == vector["padded_size"]
    stripes, encoder = encode(seal, layout, plain, tmp_path, vector["digest"])
    shards = [b"".join(stripe[i] for stripe in stripes) for i in range(layout.n)]
    assert [shard.hex() for shard in shards] == vector["shards"]
    assert [root.hex() for root in encoder.roots()] == vector["roots"]


@objects
def test_a_vectors_file_opens_from_its_parity(vector: dict[str, Any]) -> None:
    layout = Layout(vector["k"], vector["n"], vector["cell_size"], vector["sealed_size"])
    decoder, shards = Decoder(seal_of(vector), layout), [memoryview(bytes.fromhex(shard)) for shard in vector["shards"]]
    plain = b""
    for number in range(layout.stripes):
        at = number * layout.cell_size
        cells = {i: shards[i][at : at + layout.cell_length(number)] for i in range(layout.n - layout.k, layout.n)}
        plain += decoder.open(number, cells)
    expected = bytes.fromhex(vector["plain"])
    assert plain == expected + bytes(len(plain) - len(expected))


@objects
def test_header_and_wrap_are_those_of_the_vector(vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seal, sealed, header = seal_of(vector), bytes.fromhex(vector["sealed_header"]), bytes.fromhex(vector["header"])
    assert seal.open_header(sealed) == header
    monkeypatch.setattr(sealing.os, "urandom", lambda size: sealed[:size])
    assert seal.seal_header(header) == sealed
    vault_key, wrapped = bytes.fromhex(vector["vault_key"]), bytes.fromhex(vector["wrap"])
    assert wrap(vault_key, seal) == wrapped
    manifest = manifest_of(seal, Layout.for_plain(1024, 1, 1), wrap=wrapped)
    assert unwrap(vault_key, manifest).file_key == seal.file_key


# -- padding


def paper_padme(size: int) -> int:
    """Padmé as in the paper's algorithm: round up so that only the floor(log2 log2 L) + 1 leading bits after the first can be set."""
    exponent = size.bit_length() - 1
    kept = exponent.bit_length()
    unit = 2 ** (exponent - kept)
    return -(-size // unit) * unit


@pytest.mark.parametrize(("size", "padded"), vectors["padme"])
def test_sizes_are_padded_as_in_the_table(size: int, padded: int) -> None:
    assert padme(size) == padded


@given(st.integers(0, 2**44))
def test_padding_follows_the_paper_and_costs_little(size: int) -> None:
    padded = padme(size)
    if size <= padded_least:
        assert padded == padded_least
        return
    assert padded == paper_padme(size)
    assert size <= padded <= size * 1.12  # the paper's bound
    assert (padded - size) * 16 < size  # from 1 KiB up it is half of that
    assert padme(padded) == padded
    assert padme(size - 1) <= padded


# -- keys


def test_a_file_key_or_id_of_another_length_is_a_callers_mistake() -> None:
    for key, file_id in ((b"x" * 31, b"y" * 32), (b"x" * 32, b"y" * 33)):
        with pytest.raises(ValueError, match="32 bytes"):
            FileSeal(key, FileId(file_id))


def test_two_seals_never_share_key_or_id() -> None:
    seals = [FileSeal.fresh() for _ in range(8)]
    assert len({seal.file_key for seal in seals} | {seal.file_id for seal in seals}) == 16


def test_the_wrap_opens_for_its_vault_and_its_file_alone() -> None:
    mine, other, seal, layout = os.urandom(32), os.urandom(32), FileSeal.fresh(), Layout.for_plain(1024, 1, 1)
    manifest = manifest_of(seal, layout, wrap=wrap(mine, seal))
    assert unwrap(mine, manifest).file_key == seal.file_key
    with pytest.raises(Damaged, match="does not open"):
        unwrap(other, manifest)
    stranger = FileSeal.fresh()
    with pytest.raises(Damaged, match="does not open"):
        unwrap(mine, manifest_of(stranger, layout, wrap=manifest.wrap))
    for at in (0, 31, 32, 47):
        with pytest.raises(Damaged):
            unwrap(mine, replace(manifest, wrap=flipped(manifest.wrap, at)))


def test_a_wrapped_key_that_the_manifest_does_not_commit_to_is_refused() -> None:
    vault_key, honest = os.urandom(32), FileSeal.fresh()
    second = FileSeal(os.urandom(32), honest.file_id)
    manifest = manifest_of(honest, Layout.for_plain(1024, 1, 1), wrap=wrap(vault_key, second))
    with pytest.raises(Damaged, match="commits to another key"):
        unwrap(vault_key, manifest)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# -- one ciphertext that opens under two keys


def gf128(x: int, y: int) -> int:
    """The product in GHASH's field (NIST SP 800-38D, section 6.3); the first bit is the coefficient of 1."""
    product = 0
    for bit in range(127, -1, -1):
        if x >> bit & 1:
            product ^= y
        y = y >> 1 ^ (0xE1 << 120 if y & 1 else 0)
    return product


def gf128_power(x: int, exponent: int) -> int:
    power = 1 << 127
    while exponent:
        if exponent & 1:
            power = gf128(power, x)
        x, exponent = gf128(x, x), exponent >> 1
    return power


def block_cipher(key: bytes, block: bytes) -> int:
    return int.from_bytes(AES.new(key, AES.MODE_ECB).encrypt(block), "big")


def opens_under_both(first: bytes, second: bytes, nonce: bytes, blocks: list[int]) -> bytes:
    """Ciphertext and tag that AES-GCM accepts under two keys: all ``blocks`` as given but the last, which is solved for.

    The tag is linear in the ciphertext for each key, so demanding equal tags is one equation in one block
    (Dodis, Grubbs, Ristenpart, Woodage, Fast Message Franking, CRYPTO 2018).
    """
    hashes = [block_cipher(key, bytes(16)) for key in (first, second)]
    length = len(blocks) * 128

    def tag(number: int, key: bytes, given: list[int]) -> int:
        at = 0
        for block in [*given, length]:
            at = gf128(at ^ block, hashes[number])
        return at ^ block_cipher(key, nonce + b"\0\0\0\1")

    unsolved = [*blocks[:-1], 0]
    difference = tag(0, first, unsolved) ^ tag(1, second, unsolved)
    weight = gf128_power(hashes[0], 2) ^ gf128_power(hashes[1], 2)  # the last block's, with the length block after it
    solved = [*blocks[:-1], gf128(difference, gf128_power(weight, 2**128 - 2))]
    assert tag(0, first, solved) == tag(1, second, solved)
    return b"".join(block.to_bytes(16, "big") for block in [*solved, tag(0, first, solved)])


def content_key(seal: FileSeal) -> bytes:
    return sealing.hkdf(seal.file_key, seal.file_id, b"medshard/file/v1", 96)[:32]


def test_a_ciphertext_crafted_to_open_under_two_keys_is_refused_by_the_commitment() -> None:
    first = FileSeal.fresh()
    second = FileSeal(os.urandom(32), first.file_id)
    layout = Layout.for_plain(padded_least, 2, 4)
    blocks = [int.from_bytes(os.urandom(16), "big") for _ in range(padded_least // 16)]
    segment = opens_under_both(content_key(first), content_key(second), segment_nonce(0, True), blocks)
    plains = []
    for seal in (first, second):  # the attack is real: plain AES-GCM gives two plaintexts, in two libraries, and our segments do too
        cipher = AES.new(content_key(seal), AES.MODE_GCM, nonce=segment_nonce(0, True))
        plains.append(cipher.decrypt_and_verify(segment[:-tag_bytes], segment[-tag_bytes:]))
        assert seal.open_segment(0, True, segment) == plains[-1]
    assert plains[0] != plains[1]
    # A manifest commits to one of the keys; the other is refused before anything is decrypted.
    manifest = manifest_of(first, layout)
    assert FileSeal.of(manifest, first.file_key).open_segment(0, True, segment) == plains[0]
    with pytest.raises(Damaged, match="commits to another key"):
        FileSeal.of(manifest, second.file_key)


def test_the_commitment_binds_key_and_file_id() -> None:
    seal, layout = FileSeal.fresh(), Layout.for_plain(1024, 2, 4)
    assert FileSeal.of(manifest_of(seal, layout), seal.file_key).commitment == seal.commitment
    for manifest, key in (
        (manifest_of(seal, layout), flipped(seal.file_key, 31)),
        (manifest_of(seal, layout, file_id=FileId(flipped(seal.file_id, 0))), seal.file_key),
        (manifest_of(seal, layout, commitment=flipped(seal.commitment, 31)), seal.file_key),
    ):
        with pytest.raises(Damaged, match="commits to another key"):
            FileSeal.of(manifest, key)


# -- segments stay whole and in their place


@pytest.fixture
def layout() -> Layout:
    return Layout.for_plain(padme(4000), 2, 4, 300)


@pytest.fixture
def seal() -> FileSeal:
    return FileSeal.fresh()


def open_all(seal: FileSeal, layout: Layout, stripes: Sequence[Sequence[bytes]], have: Sequence[int] = (0, 1)) -> bytes:
    decoder = Decoder(seal, layout)
    return b"".join(decoder.open(number, {i: memoryview(stripes[number][i]) for i in have}) for number in range(layout.stripes))


@pytest.mark.parametrize("have", [(0, 1), (0, 3), (2, 3), (3, 1, 0)])
def test_a_sealed_file_comes_back_from_any_k_cells(seal: FileSeal, layout: Layout, tmp_path: Path, have: Sequence[int]) -> None:
    plain = os.urandom(4000)
    stripes, _ = encode(seal, layout, plain, tmp_path)
    assert layout.stripes == 8
    opened = open_all(seal, layout, stripes, have)
    assert opened == plain + bytes(layout.plain_size - 4000)


@pytest.mark.parametrize(
    ("what", "order"),
    [
        ("swapped", [1, 0, 2, 3, 4, 5, 6, 7]),
        ("duplicated", [0, 1, 1, 3, 4, 5, 6, 7]),
        ("reversed", [7, 6, 5, 4, 3, 2, 1, 0]),
        ("shifted", [1, 2, 3, 4, 5, 6, 7, 0]),
        ("the last twice", [0, 1, 2, 3, 4, 5, 7, 7]),
    ],
)
def test_segments_in_another_order_do_not_open(seal: FileSeal, tmp_path: Path, what: str, order: list[int]) -> None:
    layout = Layout(2, 4, 300, 8 * 600)  # full stripes alone, so that lengths give nothing away
    stripes, _ = encode(seal, layout, b"x" * layout.plain_size, tmp_path)
    assert open_all(seal, layout, stripes) == b"x" * layout.plain_size
    with pytest.raises(Damaged, match="does not open"):
        open_all(seal, layout, [stripes[i] for i in order])


@pytest.mark.parametrize("left", [1, 3, 7])
def test_a_file_cut_off_after_a_whole_segment_does_not_open(seal: FileSeal, tmp_path: Path, left: int) -> None:
    layout = Layout(2, 4, 300, 8 * 600)
    stripes, _ = encode(seal, layout, b"x" * layout.plain_size, tmp_path)
    with pytest.raises(Damaged, match=f"segment {left - 1} does not open"):  # it does not carry the mark of a last one
        open_all(seal, Layout(2, 4, 300, left * 600), stripes[:left])


def test_a_file_cut_off_inside_a_segment_does_not_open(seal: FileSeal, layout: Layout, tmp_path: Path) -> None:
    stripes, _ = encode(seal, layout, b"x" * 4000, tmp_path)
    for cut in (1, 2, 7):
        shorter = Layout(2, 4, 300, layout.sealed_size - cut)
        last = shorter.cell_length(7)
        sealed = (stripes[7][0] + stripes[7][1])[: shorter.segment_length(7)].ljust(2 * last, b"\0")
        cells = {0: memoryview(sealed)[:last], 1: memoryview(sealed)[last:]}
        with pytest.raises(Damaged):
            Decoder(seal, shorter).open(7, cells)


def test_nothing_can_be_added_at_the_end(seal: FileSeal, tmp_path: Path) -> None:
    layout = Layout(2, 4, 300, 3 * 600)
    stripes, _ = encode(seal, layout, b"x" * layout.plain_size, tmp_path)
    with pytest.raises(Damaged, match="segment 2"):
        open_all(seal, Layout(2, 4, 300, 4 * 600), [*stripes, stripes[2]])


def test_a_segment_of_another_file_of_the_same_vault_does_not_open(seal: FileSeal, layout: Layout, tmp_path: Path) -> None:
    plain = b"x" * 4000
    mine, _ = encode(seal, layout, plain, tmp_path)
    same_key = FileSeal(seal.file_key, FileId(os.urandom(32)))  # even one that shares the file key
    for other in (FileSeal.fresh(), same_key):
        theirs, _ = encode(other, layout, plain, tmp_path)
        with pytest.raises(Damaged, match="segment 3"):
            open_all(seal, layout, [*mine[:3], theirs[3], *mine[4:]])
        with pytest.raises(Damaged, match="header"):
            seal.open_header(other.seal_header(b"header"))


def test_a_wrong_cell_is_found_when_its_segment_opens(seal: FileSeal, layout: Layout, tmp_path: Path) -> None:
    stripes, _ = encode(seal, layout, b"x" * 4000, tmp_path)
    for index in range(4):
        broken = [list(stripe) for stripe in stripes]
        broken[5][index] = flipped(broken[5][index], 77)
        others = tuple(i for i in range(4) if i != index)[:2]
        assert open_all(seal, layout, broken, others)
        with pytest.raises(Damaged, match="segment 5"):
            open_all(seal, layout, broken, (index, (index + 1) % 4))


def test_a_cell_of_a_wrong_length_is_damaged_not_a_crash(seal: FileSeal, layout: Layout, tmp_path: Path) -> None:
    stripes, _ = encode(seal, layout, b"x" * 4000, tmp_path)
    with pytest.raises(Damaged, match="wrong length"):
        Decoder(seal, layout).open(0, {0: memoryview(stripes[0][0]), 1: memoryview(stripes[0][1])[:-1]})


@pytest.mark.parametrize("data", [b"", b"x", b"x" * 11, b"x" * 12, b"x" * 27, b"x" * 28, b"x" * 100])
def test_what_is_no_sealed_header_or_segment_is_damaged(seal: FileSeal, data: bytes) -> None:
    with pytest.raises(Damaged):
        seal.open_header(data)
    with pytest.raises(Damaged):
        seal.open_segment(0, True, data)


def test_a_changed_header_does_not_open(seal: FileSeal) -> None:
    sealed = seal.seal_header(b"names and hashes")
    assert seal.open_header(sealed) == b"names and hashes"
    assert seal.seal_header(b"names and hashes") != sealed
    for at in range(len(sealed)):
        with pytest.raises(Damaged):
            seal.open_header(flipped(sealed, at))


def test_the_largest_header_fits_into_a_manifest_once_it_is_sealed(seal: FileSeal) -> None:
    assert len(seal.seal_header(bytes(header_bytes_max))) == manifest_header_bytes_max


def test_a_segment_needs_exactly_the_room_for_its_tag(seal: FileSeal) -> None:
    for room in (15, 17):
        with pytest.raises(ValueError, match="tag"):
            seal.seal_into(0, True, b"abc", memoryview(bytearray(3 + room)))


def test_parity_of_a_sealed_stripe_is_the_erasure_codes(seal: FileSeal, layout: Layout, tmp_path: Path) -> None:
    stripes, _ = encode(seal, layout, b"x" * 4000, tmp_path)
    parity = [bytearray(300), bytearray(300)]
    code(2, 4).encode(stripes[0][:2], parity)
    assert tuple(map(bytes, parity)) == stripes[0][2:]
