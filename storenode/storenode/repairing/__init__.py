"""Making lost shards again, as a helper and as the replacement, so that nobody sees more than a shard of its own and masked sums."""
