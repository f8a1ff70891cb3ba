"""Watching the ledger from outside: what every mirror shows, whether it all is one history, and evidence where it is not.

Law: this file only says what the parts are. ``sources`` fetches, ``tilereader`` believes no tile before it was folded to a signed root,
``heads`` judges what was shown and does no I/O, ``proving`` shows that all of it is one history, ``watch`` goes around and remembers,
``verdict`` says what a kept file proves.
"""

from storenode.watching.verdict import Verdict, judge
from storenode.watching.watch import Report, Watch

__all__ = ["Report", "Verdict", "Watch", "judge"]
