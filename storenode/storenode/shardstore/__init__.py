"""The node's shards and manifests on its own disk. It knows digests and sizes, never what is inside."""

from storenode.shardstore.endings import Endings
from storenode.shardstore.incoming import Incoming
from storenode.shardstore.sealed import Sealed
from storenode.shardstore.store import Put, Shard, ShardStore, StoredFile

__all__ = ["Endings", "Incoming", "Put", "Sealed", "Shard", "ShardStore", "StoredFile"]
