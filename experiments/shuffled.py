"""Videos with their frames in random order: a control for models that may ignore the order.

    python experiments/shuffled.py --data babyai/val.jsonl --out data/shuffled

The rows are written to OUT/NAME.jsonl, with each video as a list of pictures. The order is sampled per video, with seed
0, and always differs from the original order.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from data import count_frames, load_frames, video_of


def main() -> None:
    """Command-line entry point."""
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL file with videos")
    parser.add_argument("--out", type=Path, required=True, help="output folder for the rows and the frames")
    options = parser.parse_args()
    draw, written = random.Random(0), []
    (options.out / "frames").mkdir(parents=True, exist_ok=True)
    for number, line in enumerate(options.data.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        name = video_of(row["video"], options.data.parent)
        order = list(range(count_frames(name)))
        while len(order) > 1 and order == sorted(order):
            draw.shuffle(order)
        frames = load_frames(name, range(len(order)))
        row["video"] = [f"frames/{number:05}-{place}.png" for place in range(len(order))]
        for file, place in zip(row["video"], order, strict=True):
            frames[place].save(options.out / file)
        written.append(row)
    text = "".join(json.dumps(row) + "\n" for row in written)
    (options.out / options.data.name).write_text(text, encoding="utf-8")
    print(f"{len(written)} videos in {options.out / options.data.name}")


if __name__ == "__main__":
    runtime.guarded(main)
