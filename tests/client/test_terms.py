"""Terms of policies: days, spans, versions, and what makes no sense."""

from __future__ import annotations

from datetime import date

import pytest

from medshard.model import Row
from medshard.policies.model import Terms, day, end_of, retained, versions
from medshard_protocol.errors import Malformed

today = date(2026, 2, 28)


@pytest.mark.parametrize(
    ("text", "valid_to", "until"),
    [
        ("10y", "", "2036-02-28"),
        ("10y", "2030-06-30", "2040-06-30"),
        ("1y", "2028-02-29", "2029-02-28"),
        ("1m", "2030-01-31", "2030-02-28"),
        ("90d", "", "2026-05-29"),
        ("10y", "2020-01-01", "2036-02-28"),  # a policy that has ended is kept from today on
        ("2040-12-31", "2030-01-01", "2040-12-31"),
    ],
)
def test_a_retention_counts_from_the_end_of_the_policy_or_from_today(text: str, valid_to: str, until: str) -> None:
    assert retained(text, valid_to, today) == until


@pytest.mark.parametrize("text", ["", "10", "0y", "y", "10 years", "2024-13-01", "31.12.2036", "9999y"])
def test_what_is_no_retention_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        retained(text, "", today)


def test_terms_go_into_attributes_and_come_back() -> None:
    terms = Terms("VN-7", "Müller^Änne", "life", "2024-1-01".replace("-1-", "-01-"), "2034-12-31", "2044-12-31", "endorsement").checked()
    assert Terms.of(terms.attributes) == terms
    assert terms.in_force(date(2030, 1, 1))
    assert not terms.in_force(date(2035, 1, 1))
    assert Terms("VN-7").in_force(today)


@pytest.mark.parametrize(
    "terms",
    [
        Terms(" "),
        Terms("1", kind="contract"),
        Terms("1", valid_from="2024-02-30"),
        Terms("1", valid_from="2025-01-01", valid_to="2024-01-01"),
        Terms("1", holder="x" * 2000),
        Terms("1", holder="a\ud800"),
    ],
)
def test_terms_that_make_no_sense_are_malformed(terms: Terms) -> None:
    with pytest.raises(Malformed):
        terms.checked()


def test_the_end_of_a_day_is_its_last_second_in_utc() -> None:
    assert end_of("1970-01-01") == 86_400
    assert day(" 2024-02-29 ") == date(2024, 2, 29)


def test_versions_are_counted_in_the_order_of_the_ledger_and_copies_are_none() -> None:
    def row(sha: bytes, ledger: int, kind: str) -> Row:
        return Row(sha * 32, 1, b"x", "application/pdf", Terms("1", kind=kind).attributes, bytes([ledger]) * 32, None, 0, ledger)

    rows = [row(b"c", 9, "endorsement"), row(b"a", 3, "policy"), row(b"a", 7, "policy"), row(b"b", 5, "letter")]
    assert [(each.version, each.row.ledger_index) for each in versions(rows)] == [(1, 3), (0, 5), (2, 9)]
