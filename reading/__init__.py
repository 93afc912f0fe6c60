"""Data loading: rows from JSONL files (rows.py) and tar archives (shards.py), validated once, read on demand;
decoding of pictures (pictures.py) and videos (videos.py); augmentation (augment.py); checkpoints (checkpoints.py).
"""
