"""TensorBoard logging of runs: every number in log.csv, and a strip of pictures with reconstructions of masked patches.

    python -m tools.board runs/demo runs/other              everything that has been logged so far
    python -m tools.board runs/demo --follow                the same, then all new entries, until Ctrl-C
    tensorboard --logdir runs

This tool reads a run folder and writes to its subfolder `board`; training itself does not depend on it. TensorBoard is
optional (`pip install tensorboard`). The strip shows validation pictures: whole, as the student sees them, and
reconstructed as in the report of tools/report.py. With --follow, a strip is written for every new checkpoint.
"""

import argparse
import base64
import csv
import io
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import runtime
from data import captions_of, is_video, read_rows, to_pixels
from eval import load_model
from mamo import patchify
from tools.report import picture_of, recover, val_paths, why_nothing_recovered

SHOWN, AMONG = 8, 100  # number of pictures in the strip, and of pictures whose patches may replace masked ones
WAIT = 10  # seconds between two polls of a run


def writer_class() -> type:
    """TensorBoard's SummaryWriter. Raises ValueError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"TensorBoard is not installed ({error}): pip install tensorboard") from error
    return SummaryWriter


class Board:
    """The TensorBoard log of a run, and how much of the run has been written so far."""

    def __init__(self, run: Path, writer):
        self.run, self.writer, self.step, self.seen = run, writer, -1, 0.0

    def look(self) -> None:
        """Write everything that is new."""
        self.scalars()
        checkpoint = self.run / "checkpoint.pt"
        if checkpoint.is_file() and checkpoint.stat().st_mtime != self.seen:
            self.seen = checkpoint.stat().st_mtime
            self.strip(checkpoint)
        self.writer.flush()

    def scalars(self) -> None:
        """Write all rows of log.csv that follow the last one written."""
        path = self.run / "log.csv"
        if not path.is_file():
            return
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if not (row.get("step") or "").isdecimal() or None in row.values():
                    continue  # an incomplete line that train.py is still writing
                step = int(row.pop("step"))
                if step > self.step:
                    for name, value in row.items():
                        if value and math.isfinite(float(value)):
                            self.writer.add_scalar(name, float(value), step)
                    self.step = step

    def strip(self, checkpoint: Path) -> None:
        """Write a strip of three rows: validation pictures, their masked versions, the student's reconstructions."""
        model, tokenizer, state = load_model(checkpoint, torch.device("cpu"))
        paths = val_paths(state["train"])
        if why_nothing_recovered(model) or not paths:
            return
        captions = {row["image"]: captions_of(row)[0] for row in read_rows(paths, "pairs")}
        images = list(captions)[:AMONG]
        if len(images) < 2 or is_video(images[0]):
            return
        found = recover(model, tokenizer, images, [captions[image] for image in images], SHOWN, torch.device("cpu"))
        columns, config = [], model.config
        for path, item in zip(images, found["items"], strict=False):
            pixels = to_pixels(path, config.image_size)
            hidden = patchify(pixels[None], config.patch_size)[0].clone()
            hidden[item["hidden"]] = 0
            mosaic = Image.open(io.BytesIO(base64.b64decode(item["mosaic"]["src"].partition(",")[2]))).convert("RGB")
            whole = pixels.permute(1, 2, 0).numpy()
            parts = [whole, np.asarray(picture_of(hidden, config)), np.asarray(mosaic.resize(whole.shape[1::-1]))]
            columns.append(np.concatenate(parts))
        image = torch.from_numpy(np.concatenate(columns, axis=1)).permute(2, 0, 1)
        self.writer.add_image("recovered at hidden patches", image, state["step"])


def main() -> None:
    """Command-line entry point."""
    parser = runtime.Parser(
        prog="python -m tools.board", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--follow", action="store_true", help="keep writing new entries until Ctrl-C")
    options = parser.parse_args()
    for run in options.runs:
        if not (run / "log.csv").is_file():
            raise ValueError(f"{run} holds no log.csv: give the folder of a run")
    make = writer_class()
    boards = [Board(run, make(str(run / "board"))) for run in options.runs]
    for board in boards:
        board.look()
    print(f"written; show it with: tensorboard --logdir {options.runs[0].parent}", flush=True)
    try:
        while options.follow:
            time.sleep(WAIT)
            for board in boards:
                board.look()
    except KeyboardInterrupt:
        print("ended")
    for board in boards:
        board.writer.close()


if __name__ == "__main__":
    runtime.guarded(main)
