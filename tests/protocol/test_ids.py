from __future__ import annotations

import pytest

from medshard_protocol import ids
from medshard_protocol.errors import Malformed

parsers = [
    (ids.file_id_from_hex, 32),
    (ids.node_id_from_hex, 16),
    (ids.key_from_hex, 32),
    (ids.sha256_from_hex, 32),
    (ids.tag_from_hex, 32),
]


@pytest.mark.parametrize(("parse", "size"), parsers)
def test_an_id_is_read_from_lowercase_hex(parse, size):
    assert parse("a1" * size) == b"\xa1" * size


@pytest.mark.parametrize(("parse", "size"), parsers)
@pytest.mark.parametrize("spell", ["{short}", "{long}", "{upper}", " {right}", "{right}\n", "0x{short}", "{right:.2}zz", "", "٠" * 64])
def test_any_other_spelling_is_malformed(parse, size, spell):
    right = "a1" * size
    with pytest.raises(Malformed):
        parse(spell.format(short=right[2:], long=right + "a1", upper=right.upper(), right=right))


def test_a_node_is_named_by_the_hash_of_its_first_tls_key():
    assert ids.node_id_of(ids.Key(bytes(32))).hex() == "66687aadf862bd776c8fc18b8e9f8e20"
