"""What the tests of data, training and evaluation share: tiny data sets of coloured squares, and a very small model."""

import csv
import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import metrics
import runtime
import train

# Resampling a few rows a thousand times is half of the time of an evaluation; tests of intervals do so all the same.
RESAMPLES, metrics.RESAMPLES = metrics.RESAMPLES, 100

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 40),
    "blue": (40, 60, 220),
    "yellow": (240, 200, 30),
    "purple": (140, 40, 170),
    "cyan": (30, 190, 200),
}
PLACES = ("at the top left", "at the top right", "at the bottom left", "at the bottom right")

# A model of 2 rows and 3 columns of patches: pictures are wider than high, and all widths differ.
SIZES = (
    "--image-size 16 24 --patch-size 8 --width 16 --heads 2 --image-depth 1 --text-depth 1 --fusion-depth 2 "
    "--embed-dim 8 --max-tokens 16"
)
SMALL_RUN = "--steps 9 --batch-size 4 --log-every 1 --save-every 100 --eval-every 100 --device cpu"


def square(number: int, height: int = 16, width: int = 24) -> Image.Image:
    """Picture number 0 to 23: a square of one of six colours in one of four corners, on white."""
    picture = np.full((height, width, 3), 255, dtype=np.uint8)
    place, colour = number % 4, list(COLOURS.values())[number // 4 % 6]
    y, x = (place // 2) * (height // 2), (place % 2) * (width // 2)
    picture[y : y + height // 2, x : x + width // 2] = colour
    return Image.fromarray(picture)


def caption(number: int) -> str:
    """What picture number 0 to 23 shows."""
    return f"a {list(COLOURS)[number // 4 % 6]} square {PLACES[number % 4]}"


def write_rows(path: Path, rows: list) -> Path:
    """A JSONL file; a text among the rows is written as it stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_squares(path: Path, count: int = 22, twins: int = 0, several: bool = False) -> Path:
    """A pairs file of up to 24 squares and its pictures.

    Args:    twins     so many of the first rows are twins, two by two
             several   every third row has a list of captions of different lengths
    """
    rows = []
    for number in range(count):
        (path.parent / "pictures").mkdir(parents=True, exist_ok=True)
        square(number).save(path.parent / "pictures" / f"{number:02d}.png")
        row = {"image": f"pictures/{number:02d}.png", "caption": caption(number), "number": number}
        if number < twins:
            row["twin"] = number // 2
        if several and number % 3 == 0:
            row["caption"] = [caption(number), f"{caption(number)} of a white sheet", list(COLOURS)[number // 4]]
        rows.append(row)
    return write_rows(path, rows)


def write_task(path: Path, task: str, count: int = 12) -> Path:
    """A file of a task about the first squares, and their pictures; the rows of two neighbours share a group.

    Of retrieval some have several captions, one more of them than a step looks at, and a colour is a caption of two
    pictures; of reasoning rows have one picture or two.
    """
    rows = []
    for number in range(count):
        (path.parent / "pictures").mkdir(parents=True, exist_ok=True)
        picture, colour, text = f"pictures/{number:02d}.png", list(COLOURS)[number // 4], caption(number)
        square(number).save(path.parent / picture)
        about = {"image": picture, "group": f"g{number // 2}"}
        if task == "retrieval":
            captions = [f"{text} number {i}" for i in range(7)] if number == 1 else [text, colour][: 1 + number % 2]
            rows.append(about | {"caption": captions})
        elif task == "grounding":
            rows += [about | {"text": text}, about | {"text": colour}]
        elif task == "vqa":
            place = ("left", "right")[number % 2]
            rows.append(about | {"question": "what colour is the square", "answers": {colour: 1.0, "dark": 0.3}})
            rows.append(about | {"question": "where is the square", "answers": {place: 1.0, "on paper": 0.6}})
        elif task == "reasoning":
            images, other = [picture, f"pictures/{(number + 5) % count:02d}.png"], {"group": about["group"]}
            rows.append(other | {"images": images, "text": f"one square is {colour}", "label": number % 2 == 0})
            rows.append(other | {"images": images[:1], "text": "it is large", "label": number % 4 < 2})
        elif task != "entailment":
            raise ValueError(f"write_task has no rows of {task}: add some")
        else:
            label = ("entailment", "neutral", "contradiction")[number % 3]
            rows.append(about | {"text": caption(number + number % 3), "label": label})
    return write_rows(path, rows)


def options(data: Path, out: Path, *more: str) -> list[str]:
    """The command line of a very small run; what comes later wins."""
    return ["--data", str(data), "--out", str(out), *SIZES.split(), *SMALL_RUN.split(), *more]


def new_run(data: Path, out: Path, *more: str) -> train.Run:
    """A run as the command line would make it."""
    return train.start(*train.parse(options(data, out, *more)))


def resumed_run(out: Path, *more: str) -> train.Run:
    """The same run, made again from its folder."""
    return train.start(*train.parse(["--out", str(out), "--resume", *more]))


def read_log(out: Path) -> list[dict[str, str]]:
    """The rows of log.csv without what the clock and the machine decide; empty cells are left out."""
    with open(out / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows, "the log is empty"
    hidden = ("pairs_per_s", "peak_memory_mb")
    return [{name: value for name, value in row.items() if value and name not in hidden} for row in rows]


def same(one, other) -> bool:
    """Whether two nested values are equal to the last bit, tensors with type and shape."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@contextmanager
def kept_signals():
    """Afterwards Ctrl-C does what it did before: a training run takes the signals over."""
    kept = {number: signal.getsignal(number) for number in runtime.STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def environment() -> dict[str, str]:
    """For subprocesses: our modules can be imported, and torch computes on one thread as it does in the tests."""
    here = Path(train.__file__).parent
    return os.environ | {"PYTHONPATH": str(here), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
