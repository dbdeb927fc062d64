"""Where the figures of a run go besides `metrics.jsonl`: programs that draw them while it trains, one file for each."""
