"""Emoji across drawing styles: split the pairs by style, leave out flags, and evaluate a pixel baseline.

    python experiments/emoji.py emoji/train.jsonl

Writes twemoji.jsonl and openmoji.jsonl beside the given file, whose rows need a `style` and a `category`. The baseline
assigns to each picture in one style the name of its nearest neighbour in the other, by Euclidean distance at 16 x 16.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import to_pixels


def main(path: Path) -> None:
    """Split the pairs, evaluate the baseline and print the results."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    styles, small = {}, {}
    for style in ("twemoji", "openmoji"):
        those = styles[style] = [row for row in rows if row["style"] == style and row["category"] != "Flags"]
        path.with_name(f"{style}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in those), encoding="utf-8")
        pictures = [to_pixels(path.parent / row["image"], (16, 16)) for row in those]
        small[style] = np.stack([picture.numpy().ravel() for picture in pictures]).astype(np.float32)
    one, other = small["openmoji"], small["twemoji"]
    distance = (one**2).sum(axis=1)[:, None] - 2 * one @ other.T + (other**2).sum(axis=1)
    names = [row["caption"] for row in styles["twemoji"]]
    hits = [
        names[near] == row["caption"] for near, row in zip(distance.argmin(axis=1), styles["openmoji"], strict=True)
    ]
    share = 100 * np.mean(hits)
    print(f"nearest neighbour on 16 x 16 pixels: {share:.1f} % of {len(hits)}, chance {100 / len(names):.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
