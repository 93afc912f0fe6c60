"""Runs in TensorBoard: every number once, and a strip of each new checkpoint; the package itself is not needed here."""

import os
import sys

import pytest
import torch
from helpers import new_run, read_log, write_squares

from tools import board


class Writer:
    """Keeps what TensorBoard would be given."""

    def __init__(self, folder: str = ""):
        self.folder, self.scalars, self.images, self.closed = folder, [], [], False

    def add_scalar(self, name, value, step):
        self.scalars.append((name, step, value))

    def add_image(self, name, image, step):
        self.images.append((step, image))

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def run(tmp_path):
    """Two steps of MAMO, with val."""
    data = write_squares(tmp_path / "pairs_train.jsonl", 8)
    write_squares(tmp_path / "pairs_val.jsonl", 4)
    run = new_run(data, tmp_path / "run", "--steps", "4", "--log-every", "1")
    run.train(stop_at=2)
    return run


def test_every_row_is_written_once_and_every_checkpoint_has_a_strip(run):
    """Also when the run goes on meanwhile."""
    writer = Writer()
    one = board.Board(run.out, writer)
    one.look()
    one.look()
    log = read_log(run.out)
    wanted = {(name, int(row["step"])) for row in log for name in row if name != "step"}
    beside = {(name, int(row["step"])) for row in log for name in ("pairs_per_s", "peak_memory_mb")}
    assert sorted((name, step) for name, step, _ in writer.scalars) == sorted(wanted | beside)
    assert {name: value for name, step, value in writer.scalars if step == 2}["itc"] == float(log[1]["itc"])
    height, width = run.model.config.image_size
    assert [(step, tuple(image.shape)) for step, image in writer.images] == [(2, (3, 3 * height, 4 * width))]
    whole, hidden, _ = writer.images[0][1].split(height, dim=1)
    assert (
        writer.images[0][1].dtype == torch.uint8
        and not torch.equal(whole, hidden)
        and (hidden[:, :, :width] == 0).any()
    )
    run.train()
    os.utime(run.out / "checkpoint.pt", (1, 1))
    one.look()
    assert [step for step, _ in writer.images] == [2, 4] and max(step for _, step, _ in writer.scalars) == 4


def test_half_a_line_waits_and_a_run_that_recovers_nothing_has_no_strip(tmp_path):
    data = write_squares(tmp_path / "pairs.jsonl", 8)
    run = new_run(data, tmp_path / "run", "--steps", "1", "--log-every", "1", "--objective", "control")
    run.train()
    with open(run.out / "log.csv", "a") as file:
        file.write("2,0.1")
    writer = Writer()
    board.Board(run.out, writer).look()
    assert {step for _, step, _ in writer.scalars} == {1} and not writer.images


def test_the_command_writes_into_the_run(run, monkeypatch, capsys):
    """Or says in one sentence what is missing."""
    made = []
    monkeypatch.setattr(board, "writer_class", lambda: lambda folder: made.append(Writer(folder)) or made[-1])
    monkeypatch.setattr(sys, "argv", ["board", str(run.out)])
    board.main()
    assert made[0].folder == str(run.out / "board") and made[0].closed and made[0].scalars
    assert f"tensorboard --logdir {run.out.parent}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["board", str(run.out.parent)])
    with pytest.raises(ValueError, match=r"holds no log\.csv"):
        board.main()


def test_without_tensorboard_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        board.writer_class()
