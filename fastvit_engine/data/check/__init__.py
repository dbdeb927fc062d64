"""What is in shards, and what is wrong with them: `fastvit data verify`, `stats` and `show`."""
