"""All that concerns one patient, handed over: documents, what happened to them, who may read them, and proofs."""

from medshard.patients.gathering import Gathered, documents, gather
from medshard.patients.writing import Exported, export

__all__ = ["Exported", "Gathered", "documents", "export", "gather"]
