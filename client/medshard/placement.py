"""Which nodes hold a file's shards: the protocol's answer, which nodes that repair need as well."""

from medshard_protocol.placement import order, place

__all__ = ["order", "place"]
