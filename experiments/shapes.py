"""SHAPES (Andreas et al., CVPR 2016): augment the questions by the symmetries of its world of 3 x 3 cells.

    python experiments/shapes.py --data shapes/vqa_train.jsonl --out data/shapes_more --variants 6

The training set has about two hundred distinct questions, none of which recurs in val or test, so a model memorises the
questions it has seen. However, a picture remains valid if its cells are mirrored or rotated and its colours permuted,
and the question keeps its answer if its words are replaced accordingly. Each row is written in some of these 8 x 6
variants, sampled at random; the contents of a cell are not rotated, so all pictures look like the original ones.
"""

import argparse
import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from data import pictures_of, read_rows

COLOURS = ("red", "green", "blue")  # in the order of the channels
STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}  # rows down, columns to the right


def varied(pixels: np.ndarray, words: list[str], turn: int, mirror: bool, order: tuple) -> tuple[np.ndarray, list[str]]:
    """Transform a picture (30, 30, 3) and the words of its question in the same way.

    Args:    turn, mirror   anticlockwise quarter turns, then whether to mirror left and right
             order          the channel that each channel becomes
    """
    cells = pixels.reshape(3, 10, 3, 10, 3).swapaxes(1, 2)  # (row, column, y, x, channel)
    cells = np.rot90(cells, turn)
    cells = cells[:, ::-1] if mirror else cells
    changed = cells.swapaxes(1, 2).reshape(30, 30, 3)
    recoloured = np.empty_like(changed)
    recoloured[..., list(order)] = changed
    names = {colour: COLOURS[place] for colour, place in zip(COLOURS, order, strict=True)}
    for name, (down, right) in STEPS.items():
        for _ in range(turn):
            down, right = -right, down
        names[name] = next(other for other, step in STEPS.items() if step == (down, -right if mirror else right))
    return recoloured, [names.get(word, word) for word in words]


def main() -> None:
    """Command-line entry point."""
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files of vqa rows")
    parser.add_argument("--out", type=Path, required=True, help="output folder for vqa_train.jsonl and its pictures")
    parser.add_argument("--variants", type=int, default=6, help="variants per row, in addition to the row itself")
    options = parser.parse_args()
    rows, draw, written = read_rows(options.data, "vqa"), random.Random(0), []
    ways = list(itertools.product(range(4), (False, True), itertools.permutations(range(3))))
    (options.out / "images").mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        with Image.open(pictures_of(row)[0]) as image:
            pixels = np.asarray(image.convert("RGB"))
        if pixels.shape != (30, 30, 3):
            raise ValueError(f"{row['image']} is {pixels.shape}: the pictures of SHAPES are 30 x 30")
        for place, way in enumerate([(0, False, (0, 1, 2)), *draw.sample(ways[1:], options.variants)]):
            changed, words = varied(pixels, row["question"].split(), *way)
            name = f"images/{number:05}-{place}.png"
            Image.fromarray(changed).save(options.out / name)
            written.append({"image": name, "question": " ".join(words), "answers": row["answers"]})
    text = "".join(json.dumps(row) + "\n" for row in written)
    (options.out / "vqa_train.jsonl").write_text(text, encoding="utf-8")
    questions = len({row["question"] for row in rows}), len({row["question"] for row in written})
    print(f"{len(written)} rows with {questions[1]} different questions, from {len(rows)} with {questions[0]}")


if __name__ == "__main__":
    runtime.guarded(main)
