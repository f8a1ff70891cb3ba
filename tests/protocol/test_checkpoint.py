from __future__ import annotations

import base64
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medshard_protocol import checkpoint
from medshard_protocol.checkpoint import (
    Checkpoint,
    Note,
    Signature,
    Verifier,
    cosigner_verifier,
    cosigners,
    log_verifier,
    open_published,
    open_signed,
    pq_verifier,
    signatures_max,
)
from medshard_protocol.errors import Malformed, MedshardError, Refused

# From the C2SP documents signed-note, tlog-checkpoint and tlog-cosignature.
vkey = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
signed_note = """This is an example message.

— example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=
"""
poem = """Ognuno sta solo sul cuor della terra
trafitto da un raggio di sole:

ed è subito sera.

— quasimodo.example/salvatore NnugSzTjtVAewIS+Z/iJhUPeFDkO/5QQ2i5ddnGITLlC+EhfLW9oJKONrMouFSQU0xMcXxj99ihAQwaqP3ZekRwNtIc=
"""
sofa = """example.com/behind-the-sofa
20852163
CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=
— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==
"""


def test_the_example_of_signed_note_verifies():
    note, verifier = Note.from_bytes(signed_note.encode()), Verifier.from_vkey(vkey)
    assert verifier.vkey() == vkey
    assert verifier.made(note.signatures[0])
    verifier.verify(note.text, note.signatures[0])
    with pytest.raises(Refused):
        verifier.verify(note.text + "\n", note.signatures[0])


def test_a_note_may_have_empty_lines_and_ends_at_the_last_of_them():
    note = Note.from_bytes(poem.encode())
    assert note.text.endswith("ed è subito sera.\n")
    assert note.text.count("\n\n") == 1
    assert note.to_bytes() == poem.encode()


def test_the_example_of_tlog_cosignature_is_read():
    note = Note.from_bytes(sofa.encode())
    assert Checkpoint.from_text(note.text) == Checkpoint(
        "example.com/behind-the-sofa", 20852163, bytes.fromhex("0ac5186a91863e8e1d90c808014aa89bf5da8e3ee1d9f07630f0378f68f1ab62")
    )
    cosignature = note.signatures[1]
    assert (cosignature.name, cosignature.key_id.hex(), len(cosignature.value)) == ("witness.example.com/w1", "8d66cf3f", 72)
    assert int.from_bytes(cosignature.value[:8], "big") == 1679315147  # the time that the document states
    assert note.to_bytes() == sofa.encode()


line = "— a.example/log " + base64.b64encode(bytes(68)).decode() + "\n"
bad_notes = {
    "nothing": "",
    "no signature": "text\n",
    "no signature after the empty line": "text\n\n",
    "no empty line": "text\n" + line,
    "text without its newline": "text" + line,
    "no newline at the end": "text\n\n" + line[:-1],
    "empty line after the signatures": "text\n\n" + line + "\n",
    "another dash": "text\n\n" + line.replace("—", "–"),
    "no space after the dash": "text\n\n" + line.replace("— ", "—"),
    "two spaces": "text\n\n" + line.replace("— ", "—  "),
    "name with a plus": "text\n\n" + line.replace("log", "l+g"),
    "name with a no-break space": "text\n\n" + line.replace("log", "l\u00a0g"),
    "no name": "text\n\n" + line.replace("a.example/log ", ""),
    "a third field": "text\n\n" + line[:-1] + " x\n",
    "base64 with a line break inside": "text\n\n" + line[:40] + "\n" + line[40:],
    "base64 without padding": "text\n\n" + line.replace("=", ""),
    "base64 of the other alphabet": "text\n\n" + line.replace("AAAA", "A_-A", 1),
    "base64 with loose bits": "text\n\n" + line.replace("A=\n", "B=\n"),
    "a key id and nothing else": "text\n\n— a " + base64.b64encode(bytes(4)).decode() + "\n",
    "an endless signature": "text\n\n— a " + base64.b64encode(bytes(9000)).decode() + "\n",
    "a control character": "te\x00xt\n\n" + line,
    "a tab": "te\txt\n\n" + line,
    "a carriage return": "text\r\n\r\n" + line,
    "too many signatures": "text\n\n" + line * (signatures_max + 1),
}


@pytest.mark.parametrize("name", bad_notes)
def test_anything_else_is_no_note(name):
    with pytest.raises(Malformed):
        Note.from_bytes(bad_notes[name].encode())


def test_a_note_that_is_not_utf_8_or_too_long_is_malformed():
    for data in (b"\xff" + signed_note.encode(), bytes(3 << 20)):
        with pytest.raises(Malformed):
            Note.from_bytes(data)


root = base64.b64encode(bytes(32)).decode()
bad_texts = {
    "two lines": f"a\n{root}\n",
    "leading zero": f"a\n01\n{root}\n",
    "sign": f"a\n+1\n{root}\n",
    "blank": f"a\n 1\n{root}\n",
    "underscore": f"a\n1_0\n{root}\n",
    "other digits": f"a\n١\n{root}\n",
    "too large": f"a\n{2**63}\n{root}\n",
    "endless": f"a\n{'9' * 5000}\n{root}\n",
    "empty size": f"a\n\n{root}\n",
    "empty origin": f"\n1\n{root}\n",
    "short root": f"a\n1\n{base64.b64encode(bytes(31)).decode()}\n",
    "root with loose bits": f"a\n1\n{root.replace('A=', 'B=')}\n",
    "no newline at the end": f"a\n1\n{root}",
    "empty line at the end": f"a\n1\n{root}\n\n",
    "empty extension line": f"a\n1\n{root}\n\nx\n",
}


@pytest.mark.parametrize("name", bad_texts)
def test_anything_else_is_no_checkpoint(name):
    with pytest.raises(Malformed):
        Checkpoint.from_text(bad_texts[name])


def test_extension_lines_are_refused():
    with pytest.raises(Refused):
        Checkpoint.from_text(f"a\n1\n{root}\nextension\n")


def test_an_empty_log_and_the_largest_are_read():
    for size in (0, 2**63 - 1):
        assert Checkpoint.from_text(f"a\n{size}\n{root}\n").text() == f"a\n{size}\n{root}\n"


@pytest.mark.parametrize(
    "bad",
    ["", "a", "a+530d903a", "a+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k", vkey[:-4], vkey.replace("+Aek", "+Aqk"), vkey + "+"],
)
def test_a_verifier_key_whose_parts_do_not_fit_is_malformed(bad):
    with pytest.raises(Malformed):
        Verifier.from_vkey(bad)


# -- quorum


def published(consortium, cosigners, institutions=4, **keywords):
    c = consortium(institutions, **keywords)
    return c, c.note(Checkpoint(c.roster.origin, 7, b"\x07" * 32), cosigners)


def test_a_checkpoint_with_a_quorum_is_read(consortium):
    c, note = published(consortium, [0, 2, 3])
    assert open_published(note.to_bytes(), c.roster) == Checkpoint(c.roster.origin, 7, b"\x07" * 32)
    assert cosigners(note, c.roster) == {c.roster.nodes[n].id: 1_700_000_000 for n in (0, 2, 3)}


def test_too_few_institutions_are_refused(consortium):
    c, note = published(consortium, [0, 1])
    with pytest.raises(Refused, match="fewer than 3 institutions"):
        open_published(note.to_bytes(), c.roster)


def test_one_institution_is_not_counted_twice(consortium):
    c, note = published(consortium, [0, 4, 1, 5], nodes_each=2)
    with pytest.raises(Refused, match="fewer than 3 institutions"):
        open_published(note.to_bytes(), c.roster)


def test_one_cosignature_is_not_counted_twice(consortium):
    c, note = published(consortium, [0, 1])
    with pytest.raises(Refused):
        open_published(note.signed_by(note.signatures[1:]).to_bytes(), c.roster)


def test_a_cosignature_without_the_log_is_refused(consortium):
    c, note = published(consortium, [0, 1, 2])
    with pytest.raises(Refused, match="not signed by the log"):
        open_published(Note(note.text, note.signatures[1:]).to_bytes(), c.roster)


def test_a_checkpoint_of_another_log_is_refused(consortium):
    c = consortium(4)
    text = Checkpoint("other.example/log", 7, b"\x07" * 32).text()
    note = Note(text, (log_verifier(c.roster).sign(text, c.key("log").sign),))
    with pytest.raises(Refused, match=r"other\.example"):
        open_signed(note, c.roster)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_one_bad_signature_of_a_known_key_spoils_the_note(consortium, number):
    c, note = published(consortium, [0, 1, 2, 3])
    lines = list(note.signatures)
    lines[number] = Signature(lines[number].name, lines[number].key_id, lines[number].value[:-1] + bytes([lines[number].value[-1] ^ 1]))
    with pytest.raises(Refused):
        open_published(Note(note.text, tuple(lines)).to_bytes(), c.roster)


@pytest.mark.parametrize("length", [1, 8, 63, 71, 73, 2428])
def test_a_known_key_with_a_signature_of_another_length_spoils_the_note(consortium, length):
    c, note = published(consortium, [0, 1, 2])
    verifier = cosigner_verifier(c.roster, c.roster.nodes[3].id)
    with pytest.raises(Refused):
        open_published(note.signed_by([Signature(verifier.name, verifier.key_id, bytes(length))]).to_bytes(), c.roster)


def test_a_signature_that_takes_the_first_bytes_of_its_text_along_does_not_hold(consortium):
    c = consortium(4)
    verifier, text = log_verifier(c.roster), c.checkpoint([b"entry"]).text()
    value = c.key("log").sign(b"x" + text.encode())
    with pytest.raises(Refused, match="does not hold"):
        verifier.verify(text, Signature(verifier.name, verifier.key_id, value + b"x"))
    assert verifier.verify("x" + text, Signature(verifier.name, verifier.key_id, value)) == 0


def test_what_this_process_signed_it_does_not_verify_and_nothing_else_is_taken_for_it(consortium, monkeypatch):
    c = consortium(4)
    verifier, text = cosigner_verifier(c.roster, c.roster.nodes[2].id), c.checkpoint([b"just signed"]).text()
    signature, looked = verifier.sign(text, c.key("cosigner 2").sign, 1234), []
    verifier.remember(text, signature)
    monkeypatch.setattr("medshard_protocol.ed25519.crypto_sign_open", lambda signed, key: looked.append(signed))
    assert verifier.verify(text, signature) == 1234
    assert looked == []
    verifier.verify(c.checkpoint([b"another"]).text(), signature)
    verifier.verify(text, replace(signature, value=signature.value[:-1] + bytes([signature.value[-1] ^ 1])))
    verifier.verify(text, replace(signature, value=(1235).to_bytes(8, "big") + signature.value[8:]))
    cosigner_verifier(c.roster, c.roster.nodes[1].id).verify(text, signature)
    assert len(looked) == 4
    checkpoint._verify.cache_clear()  # it holds what the stand-in let pass


def test_a_cosignature_of_a_time_out_of_range_is_refused(consortium):
    c, note = published(consortium, [0, 1])
    late = cosigner_verifier(c.roster, c.roster.nodes[2].id).sign(note.text, c.key("cosigner 2").sign, 2**63)
    with pytest.raises(Refused):
        open_published(note.signed_by([late]).to_bytes(), c.roster)


def test_lines_of_unknown_keys_are_passed_over(consortium):
    """An ML-DSA-44 cosignature shares its cosigner's name, not its key id, and has 2428 bytes."""
    c, note = published(consortium, [0, 1, 2])
    known = note.signatures[1]
    more = [Signature(known.name, b"\x06\x06\x06\x06", bytes(2428)), Signature("witness.example/w1", known.key_id, bytes(72))]
    lines = (more[0], *note.signatures[:2], more[1], *note.signatures[2:])
    assert open_published(Note(note.text, lines).to_bytes(), c.roster).size == 7


def test_a_log_signature_is_no_cosignature_even_under_its_name(consortium):
    c, note = published(consortium, [0, 1])
    verifier = cosigner_verifier(c.roster, c.roster.nodes[2].id)
    plain = Signature(verifier.name, verifier.key_id, bytes(8) + c.key("cosigner 2").sign(note.text.encode()))
    with pytest.raises(Refused):
        open_published(note.signed_by([plain]).to_bytes(), c.roster)


def test_a_truncated_note_never_counts(consortium):
    c, note = published(consortium, [0, 1, 2])
    whole = note.to_bytes()
    for length in range(len(whole)):
        with pytest.raises(MedshardError):
            open_published(whole[:length], c.roster)


def test_a_checkpoint_for_decades_needs_a_quorum_with_each_kind_of_key(consortium):
    c, checkpoint = consortium(4, pq=True), Checkpoint("consortium.example/log", 7, b"\x07" * 32)
    full = c.note(checkpoint, [0, 1, 2], [1, 2, 3])
    assert open_published(full.to_bytes(), c.roster, pq=True) == checkpoint
    assert cosigners(full, c.roster, pq=True) == {c.roster.nodes[n].id: 1_700_000_000 for n in (1, 2, 3)}
    for ed25519, ml_dsa in (([0, 1, 2], [0, 1]), ([0, 1], [0, 1, 2]), ([0, 1, 2], []), ([], [0, 1, 2, 3])):
        with pytest.raises(Refused, match="fewer than 3 institutions"):
            open_published(c.note(checkpoint, ed25519, ml_dsa).to_bytes(), c.roster, pq=True)
    assert open_published(c.note(checkpoint, [0, 1, 2], [0, 1]).to_bytes(), c.roster) == checkpoint


def test_one_institution_is_not_counted_twice_with_either_kind_of_key(consortium):
    c, note = published(consortium, [0, 1, 2], nodes_each=2, pq=True)
    twice = note.signed_by(c.note(Checkpoint.from_text(note.text), [], [0, 4, 1, 5]).signatures[1:])
    with pytest.raises(Refused, match="with ML-DSA keys by fewer than 3"):
        open_published(twice.to_bytes(), c.roster, pq=True)


def test_an_ml_dsa_cosignature_covers_name_time_origin_size_and_root(consortium):
    c, note = published(consortium, [], pq=True)
    verifier = pq_verifier(c.roster, c.roster.nodes[0].id)
    line = c.note(Checkpoint.from_text(note.text), [], [0]).signatures[1]
    assert len(line.value) == 8 + 2420
    assert verifier.verify(note.text, line) == 1_700_000_000
    other = replace(verifier, name=verifier.name + "x")
    changed = [
        (verifier, Checkpoint(c.roster.origin, 8, b"\x07" * 32).text(), line.value),
        (verifier, Checkpoint(c.roster.origin, 7, b"\x08" * 32).text(), line.value),
        (verifier, Checkpoint(c.roster.origin + "x", 7, b"\x07" * 32).text(), line.value),
        (verifier, note.text, bytes(8) + line.value[8:]),
        (verifier, note.text, b"\xff" + line.value[1:]),
        (verifier, note.text, line.value[:-1]),
        (other, note.text, line.value),
    ]
    for checker, text, value in changed:
        with pytest.raises(Refused):
            checker.verify(text, Signature(line.name, line.key_id, value))


def test_an_ml_dsa_line_of_a_known_key_that_does_not_hold_spoils_a_full_note(consortium):
    c, note = published(consortium, [0, 1, 2], pq=True)
    full = c.note(Checkpoint.from_text(note.text), [0, 1, 2], [0, 1, 2, 3])
    bad = full.signatures[-1]
    spoiled = Note(full.text, (*full.signatures[:-1], replace(bad, value=bad.value[:-1] + bytes([bad.value[-1] ^ 1]))))
    with pytest.raises(Refused, match="does not hold"):
        open_published(spoiled.to_bytes(), c.roster, pq=True)


def test_an_ml_dsa_verifier_key_is_read_as_other_tools_write_it(consortium):
    c = consortium(4, pq=True)
    verifier = pq_verifier(c.roster, c.roster.nodes[2].id)
    assert Verifier.from_vkey(verifier.vkey()) == verifier
    assert verifier.type == 6
    with pytest.raises(Malformed):
        Verifier.from_vkey(verifier.vkey().replace("+B", "+A", 1))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_byte_never_gives_another_checkpoint(consortium, data):
    c, note = published(consortium, [0, 1, 2])
    packed = bytearray(note.to_bytes())
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(MedshardError):
        open_published(bytes(packed), c.roster)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_no_text_does_more_than_be_malformed(text):
    for data in (text, text + "\n\n" + line, f"a\n1\n{root}\n\n{text}"):
        try:
            note = Note.from_bytes(data.encode())
            assert note.to_bytes() == data.encode()
            Checkpoint.from_text(note.text)
        except (Malformed, Refused, UnicodeEncodeError):
            pass
