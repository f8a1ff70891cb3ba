"""A medshard storage node: keeps shards, mirrors the ledger, never sees plaintext or keys."""
