"""Where rows come from: JSONL files (rows.py) and tar archives (shards.py), checked once, read when they are needed."""
