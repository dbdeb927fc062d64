"""Reading shards: their names, tar members, labels, and the index of where each sample begins."""
