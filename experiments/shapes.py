"""SHAPES (Andreas et al., CVPR 2016): ask more questions about its pictures of 3 x 3 cells.

    python experiments/shapes.py --data shapes/fit.jsonl --held-out shapes/choose.jsonl shapes/val.jsonl \
        --out shapes_more

The training set has about two hundred distinct questions, none of which recurs in val or test, and asks only one of
each picture. A model that learns from these rows memorises them and learns no relation such as "left of". This script
makes synthetic rows from the pictures. It takes a random one, leaves some of its cells empty, and asks random questions
of the grammar of SHAPES, but none that is in a file of --held-out. The answers follow from the cells, which are read
from the pixels; half of them are yes where possible. Reading and answering is first checked against each row of --data.

vqa_train.jsonl has all kinds of questions, and vqa_simple.jsonl, to learn from first, those with at most one relation.
"""

import argparse
import random
import sys
from itertools import product
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from data import load_image, pictures_of, read_rows
from world.scenes import write_rows

COLOURS = ("red", "green", "blue")  # in the order of the channels
SHAPES = ("triangle", "circle", "square")  # in the order of how much of its bounding box each fills
STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}  # rows down, columns to the right


def read_cells(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """pixels (30, 30, 3) -> for each colour and each shape, in which cells it is: (3, 3), True or False."""
    cells = rearrange(pixels, "(row y) (column x) c -> row column c y x", row=3, column=3).astype(float)
    colour, shown, light = cells.sum(axis=(3, 4)).argmax(axis=2), cells.any(axis=(2, 3, 4)), cells.max(axis=2)
    # The filled share of the bounding box, which blurred edges do not change much: 0.61 to 0.79 for a triangle, 0.81
    # to 0.85 for a circle, 1 for a square.
    box = light.sum(axis=2).max(axis=2) * light.sum(axis=3).max(axis=2)
    shape = np.digitize(light.sum(axis=(2, 3)) * light.max(axis=(2, 3)) / np.maximum(box, 1), (0.803, 0.92))
    found = {name: shown & (colour == place) for place, name in enumerate(COLOURS)}
    return found | {name: shown & (shape == place) for place, name in enumerate(SHAPES)}


def answer(question: str, cells: dict[str, np.ndarray]) -> bool:
    """Answer "is a green shape left of a red shape": whether a green cell has a red one to its right. Without a
    relation, one cell must be both; with two, "is a circle left of above a red shape", each is one step."""
    first, *steps, last = [word for word in question.split() if word in cells or word in STEPS]
    found = cells[last]
    for step in reversed(steps):
        down, right = STEPS[step]
        found = np.pad(found, 1)[1 - down : 4 - down, 1 - right : 4 - right]
    return bool((found & cells[first]).any())


def all_questions() -> list[str]:
    """The 756 questions of the grammar: a colour or shape and another or the same, with up to two relations between."""
    shapes = [f"a {shape}" for shape in SHAPES]
    things = [f"a {colour} shape" for colour in COLOURS] + shapes
    steps = ["left of", "right of", "above", "below"]
    relations = steps + [f"{first} {second}" for first, second in product(steps, steps)]
    alone = [f"is {thing} {other}" for thing, other in product(things, [*COLOURS, *shapes])]
    return alone + [f"is {thing} {relation} {other}" for thing, relation, other in product(things, relations, things)]


def ask(questions: list[str], cells: dict[str, np.ndarray], wanted: bool, draw: random.Random) -> tuple[str, bool]:
    """A random question and its answer, the wanted one if one of 20 tries has it (an empty picture has no yes)."""
    for _ in range(20):
        question = draw.choice(questions)
        yes = answer(question, cells)
        if yes == wanted:
            break
    return question, yes


def read_pictures(rows: list[dict]) -> list[np.ndarray]:
    """The picture of each row, (30, 30, 3). ValueError if its cells do not give the answer that the row has."""
    pictures = []
    for row in rows:
        pixels = np.asarray(load_image(pictures_of(row)[0]))
        if pixels.shape != (30, 30, 3):
            raise ValueError(f"{row['image']} is {pixels.shape}: the pictures of SHAPES are 30 x 30")
        if answer(row["question"], read_cells(pixels)) != bool(row["answers"].get("yes")):
            raise ValueError(
                f"the cells of {row['image']} do not give the answer to {row['question']!r}: is it of SHAPES?"
            )
        pictures.append(pixels)
    return pictures


def kept_cells(draw: random.Random) -> np.ndarray:
    """-> (30, 30, 1), True in the cells that are not emptied: a share of at least a quarter in the mean, often all."""
    share = draw.uniform(0.25, 1.2)
    kept = np.array([[draw.random() < share for _ in range(3)] for _ in range(3)])
    return kept.repeat(10, axis=0).repeat(10, axis=1)[..., None]


def main() -> None:
    """Command-line entry point."""
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files of vqa rows")
    parser.add_argument("--held-out", nargs="+", required=True, help="JSONL files whose questions are not asked")
    parser.add_argument("--out", type=Path, required=True, help="output folder for the rows and their pictures")
    parser.add_argument("--pictures", type=int, default=40000, help="pictures to write")
    parser.add_argument("--questions", type=int, default=8, help="questions of each file about each picture")
    options = parser.parse_args()
    held_out = {row["question"] for row in read_rows(options.held_out, "vqa")}
    asked = [question for question in all_questions() if question not in held_out]
    simple = [question for question in asked if sum(word in STEPS for word in question.split()) < 2]
    pictures, draw = read_pictures(read_rows(options.data, "vqa")), random.Random(0)
    (options.out / "images").mkdir(parents=True, exist_ok=True)
    train_rows, simple_rows = [], []
    for number in range(options.pictures):
        pixels, name = kept_cells(draw) * draw.choice(pictures), f"images/{number:06}.png"
        Image.fromarray(pixels).save(options.out / name)
        cells = read_cells(pixels)
        for written, questions in ((train_rows, asked), (simple_rows, simple)):
            for place in range(options.questions):
                question, yes = ask(questions, cells, bool(place % 2), draw)
                written.append({"image": name, "question": question, "answers": {"yes" if yes else "no": 1.0}})
    write_rows(options.out / "vqa_train.jsonl", train_rows)
    write_rows(options.out / "vqa_simple.jsonl", simple_rows)
    print(f"{len(train_rows)} rows of {len(asked)} questions, and as many of the {len(simple)} simple ones")


if __name__ == "__main__":
    runtime.guarded(main)
