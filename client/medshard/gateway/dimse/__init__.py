"""The gateway as a DICOM node. Why it has an upper layer of its own is in docs/decisions/0040-gateway-dimse.md."""
