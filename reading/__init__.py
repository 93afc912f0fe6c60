"""Reading data: rows from JSONL files (rows.py) and tar archives (shards.py), checked once and read on demand; decoding
of pictures (pictures.py) and videos (videos.py); augmentation (augment.py).
"""
