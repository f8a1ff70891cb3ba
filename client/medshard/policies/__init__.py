"""What medshard knows of insurance policies, which come as PDF."""
