"""Where rows come from: JSONL files (rows.py) and tar archives (shards.py), checked once and read when they are needed;
and how their pictures are opened (pictures.py).
"""
