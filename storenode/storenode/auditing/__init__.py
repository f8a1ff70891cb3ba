"""Finding lost shards while they can still be made again: nodes that ask each other, and a node that reads its own."""
