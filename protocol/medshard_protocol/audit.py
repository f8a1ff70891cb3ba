"""What an audit of a shard can come to."""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """What one audit of one shard came to. The values are labels of a metric and stand in reports."""

    GOOD = "good"  # has the cell: its answer fits those of the others
    SAID = "said"  # says that it has the cell; too few others answered to tell
    SLOW = "slow"  # has the cell, or says so, and took far longer than it does
    LATE = "late"  # no answer, after several tries
    REFUSED = "refused"  # will not say
    ABSENT = "absent"  # says that it has not got the shard
    DAMAGED = "damaged"  # says that its disk has changed the cell
    WRONG = "wrong"  # says that it has the cell, and shows that it has not

    @property
    def is_bad(self) -> bool:
        """Whether the shard is not known to be there."""
        return self not in (Verdict.GOOD, Verdict.SAID, Verdict.SLOW)
