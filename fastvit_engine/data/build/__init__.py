"""Images from anywhere, packed into shards: `fastvit data make`."""
