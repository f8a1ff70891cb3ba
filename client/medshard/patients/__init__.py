"""All that concerns one patient, handed over: documents, what happened to them, who may read them, and proofs."""

from medshard.patients.gathering import Gathered, gather
from medshard.patients.writing import Exported, export

__all__ = ["Exported", "Gathered", "export", "gather"]
