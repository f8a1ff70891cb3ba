"""The command ``medshard``. Commands parse, await one call of the vault, and print."""
