"""What medshard knows of DICOM."""
