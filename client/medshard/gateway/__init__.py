"""A radiology department's door to the store: DICOM and DICOMweb in front of one vault.

peers (DIMSE, STOW, import) → Archive.receive → spool → series → Vault.store → index
peers (FIND, QIDO)          → Archive.find    → index
peers (MOVE, GET, WADO)     → Archive.open    → spool, or objects by range
"""
