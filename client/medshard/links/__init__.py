"""Links to single documents or studies, for people without a key: SMART Health Links, served by whoever holds the vault."""
