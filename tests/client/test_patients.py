"""Whose documents they are: what an export hands over, and what it keeps back."""

from __future__ import annotations

from medshard.model import Row
from medshard.patients import documents


def row(number: int, owner: bytes = b"", **attributes: str) -> Row:
    about = {name.replace("_", "-"): value for name, value in attributes.items()}
    return Row(bytes([number]) * 32, 1, b"x", "application/pdf", about, bytes([number]) * 32, None, 1, 1, owner)


def test_what_belongs_to_a_patients_policy_and_claims_goes_along_and_nobody_elses() -> None:
    policy = row(1, policy_number="VN-7", policy_holder="Jane Doe")
    endorsement = row(2, policy_number="VN-7", policy_kind="endorsement")
    claim = row(3, policy_number="VN-7", claim_number="C-1")
    spouse = row(4, policy_number="VN-7", claim_number="C-1", patient_name="Doe^John")
    scan = row(5, policy_number="GROUP", claim_number="C-2", patient_name="Doe^Jane")
    invoice = row(6, policy_number="GROUP", claim_number="C-2")
    colleague = row(7, policy_number="GROUP", claim_number="C-3")
    others = row(8, b"o" * 32, policy_number="GROUP", claim_number="C-2")
    company = row(9, policy_number="GROUP", policy_holder="Works Ltd")
    nobody = row(10)
    rows = [nobody, company, others, colleague, invoice, scan, spouse, claim, endorsement, policy]
    found = documents(rows, "doe jane")
    assert set(found) == {each.sha256 for each in (policy, endorsement, claim, scan, invoice)}
    assert documents(rows, " ") == {}
    assert documents(rows, "works") == {company.sha256: company} | {each.sha256: each for each in (invoice, colleague, others)}
