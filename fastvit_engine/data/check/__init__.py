"""What shards hold, what is wrong with them and how fast they load: `fastvit data verify`, `stats`, `show`, `bench`."""
