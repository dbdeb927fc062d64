"""The one reader of shards: their names, tar members, samples, labels, and the index of their samples."""
