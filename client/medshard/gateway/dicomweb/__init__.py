"""DICOMweb (PS3.18) in front of the archive: STOW-RS, QIDO-RS, WADO-RS and WADO-URI."""
