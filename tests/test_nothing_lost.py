"""Nothing is lost: signals, closed pipes, full disks, dead workers, locked files, weights that are no numbers; and a
run goes on with what it began with, or says why not."""

import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    environment,
    kept_signals,
    new_run,
    options,
    read_log,
    resumed_run,
    same,
    write_rows,
    write_squares,
    write_task,
)
from PIL import Image
from test_finetune import SHORT
from test_train import checkpoint, command, unix

import eval as evaluation
import finetune
import runtime
import train
from eval import load_model
from explain import save_png
from tools import compare

ENDLESS = ("--steps", "100000", "--save-every", "100000", "--eval-every", "100000")
root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts a small disk")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """22 pairs of squares."""
    return write_squares(tmp_path_factory.mktemp("data") / "pairs.jsonl", 22, several=True)


def program(name: str, data: Path, out: Path, *more: str) -> list[str]:
    """The command line of an endless small run of train.py, or of fine-tuning on vqa."""
    if name == "train":
        return [sys.executable, train.__file__, *options(data, out, *ENDLESS, *more)]
    vqa = write_task(out.parent / "vqa.jsonl", "vqa")
    begun = out.parent / "begun"
    new_run(data, begun).train(stop_at=1)
    given = ["vqa", "--init", str(begun / "checkpoint.pt"), "--data", str(vqa), "--out", str(out), *SHORT.split()]
    return [sys.executable, finetune.__file__, *given, *ENDLESS, *more]


class Started:
    """A program in a process group of its own that is ended, whatever happens."""

    def __init__(self, arguments: list[str], out: Path, **pipes):
        self.out = out
        pipes = pipes or {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # even where these tests run under nohup
        self.process = subprocess.Popen(
            arguments, env=environment(), start_new_session=True, text=True, preexec_fn=heard, **pipes
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()

    def until_rows(self, rows: int = 3):
        """Wait until so many rows are in the log."""
        log, deadline = self.out / "log.csv", time.monotonic() + 100
        while not (log.is_file() and len(log.read_text().splitlines()) > rows):
            assert time.monotonic() < deadline and self.process.poll() is None, "training did not start"
            time.sleep(0.02)

    def children(self) -> list[int]:
        """Its worker processes."""
        return [
            int(one) for one in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]


def straight(name: str, arguments: list[str], out: Path, step: int):
    """The same run in this process, without any accident, up to a step."""
    given = [*arguments[2:], "--out", str(out), "--workers", "0"]
    module = {"train": train, "finetune": finetune}[name]
    run = module.start(*module.parse(given))
    run.train(stop_at=step)


def assert_as_if_nothing_had_been(name: str, arguments: list[str], out: Path, tmp_path: Path) -> None:
    """What was saved, and what follows from it, is what a run without accident has, to the last bit."""
    step = checkpoint(out)["step"]
    straight(name, arguments, tmp_path / "straight", step)
    assert same(checkpoint(out), checkpoint(tmp_path / "straight"))
    assert read_log(out) == read_log(tmp_path / "straight")


@pytest.fixture
def command_eval(monkeypatch, capsys):
    """Run eval.py in this process -> exit status, what it said, its errors."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        return command(monkeypatch, evaluation.main, *arguments), *capsys.readouterr()

    return run


# --------------------------------------------------------------------------------------------------- how runs are ended


@unix
@pytest.mark.parametrize(
    ("name", "number", "workers"),
    [("train", "SIGTERM", "2"), ("train", "SIGHUP", "0"), ("finetune", "SIGTERM", "0"), ("finetune", "SIGHUP", "2")],
)
def test_a_signal_to_the_whole_group_ends_a_run_as_ctrl_c_does(data, tmp_path, name, number, workers):
    """As `timeout`, a scheduler or a closing terminal send it: to every process, and twice."""
    out = tmp_path / "run"
    arguments = program(name, data, out, "--workers", workers)
    with Started(arguments, out) as started:
        started.until_rows()
        for _ in range(2):
            os.killpg(started.process.pid, getattr(signal, number))
            time.sleep(0.01)
        said, complained = started.process.communicate(timeout=60)
    assert started.process.returncode == 130, complained
    assert "Traceback" not in complained and "and saved; go on with" in said
    assert_as_if_nothing_had_been(name, arguments, out, tmp_path)


@unix
def test_a_kill_that_ended_a_run_may_come_again():
    """The second of two would otherwise end the program before it has said how to go on."""
    before = signal.getsignal(signal.SIGHUP)
    with kept_signals():
        with runtime.Interrupt() as interrupt:
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.asked
        assert signal.getsignal(signal.SIGTERM) == interrupt.ask and signal.getsignal(signal.SIGHUP) == before


@unix
def test_what_nohup_ignores_stays_ignored():
    """A run that was started to outlive its terminal outlives it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runtime.Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.asked
    finally:
        signal.signal(signal.SIGHUP, before)


@unix
@pytest.mark.parametrize("both", [True, False])
def test_a_closed_pipe_ends_a_run_as_ctrl_c_does(data, tmp_path, both):
    """`python train.py | head -1`, and `2>&1 | head -1`, where the bar meets the closed pipe first."""
    out = tmp_path / "run"
    arguments = program("train", data, out)
    errors = subprocess.STDOUT if both else subprocess.PIPE
    more = () if both else ("--val", str(data), "--eval-every", "4")
    with Started([*arguments, *more], out, stdout=subprocess.PIPE, stderr=errors) as started:
        assert started.process.stdout.readline()
        started.process.stdout.close()
        started.process.wait(100)
        complained = "" if both else started.process.stderr.read()
    assert started.process.returncode == 130 and "Traceback" not in complained and "Exception" not in complained
    assert_as_if_nothing_had_been("train", [*arguments, *more], out, tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker in /proc")
@pytest.mark.parametrize("accumulate", ["1", "3"])
def test_a_data_worker_that_is_killed_costs_nothing(data, tmp_path, accumulate):
    """As the kernel does when memory is short: saved, one sentence, status 2; also between passes of one step."""
    out = tmp_path / "run"
    arguments = program("train", data, out, "--workers", "2", "--accumulate", accumulate, "--queue-size", "6")
    with Started(arguments, out) as started:
        started.until_rows()
        os.kill(started.children()[0], signal.SIGKILL)
        _, complained = started.process.communicate(timeout=60)
    assert started.process.returncode == 2 and "Traceback" not in complained
    step = checkpoint(out)["step"]
    last = complained.rstrip().splitlines()[-1]
    assert last.startswith("error: a process that loads data was killed") and f"saved at step {step}" in last
    assert_as_if_nothing_had_been("train", arguments, out, tmp_path)


@root
def test_little_shared_memory_is_one_sentence(data, tmp_path):
    """A container's /dev/shm is small: training waited for ever, and the first Ctrl-C did nothing."""
    arguments = program("train", data, tmp_path / "run", "--workers", "2", "--image-size", "256", "256")
    mounted = "mount -t tmpfs -o size=1m tmpfs /dev/shm && exec " + " ".join(arguments)
    if subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("this system has no unshare")
    ended = subprocess.run(["unshare", "-m", "sh", "-c", mounted], env=environment(), capture_output=True, timeout=100)
    errors = ended.stderr.decode()
    assert ended.returncode == 2 and "Traceback" not in errors
    assert errors.rstrip().splitlines()[-1].startswith("error: /dev/shm has no room")


def test_a_picture_that_breaks_in_the_middle_costs_no_step_before_it(data, tmp_path):
    """What fails between two steps leaves a whole state: it is saved before the run ends."""
    run = new_run(data, tmp_path)
    batches, given = run.batches, []

    def breaking():
        for batch in batches():
            given.append(0)
            if len(given) == 4:
                raise runtime.DataFailed("a.png cannot be decoded")
            yield batch

    run.batches = breaking
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded; the run is saved at step 3"):
        run.train()
    assert checkpoint(tmp_path)["step"] == 3


# ----------------------------------------------------------------------------------------- files that cannot be written


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@root
@pytest.mark.parametrize("missing", [0.5, 0.005])
def test_a_full_disk_is_said_and_nothing_half_written_stays(data, tmp_path, small_disk, missing):
    """What is full and how much is needed; the old checkpoint is whole, and with room the run goes on bit-equal.

    Also where there is room for all tensors and not for what torch writes about them.
    """
    out = small_disk / "run"
    new_run(data, out, "--save-every", "2").train(stop_at=2)
    size = (out / "checkpoint.pt").stat().st_size
    (small_disk / "junk").write_bytes(bytes(shutil.disk_usage(out).free - int(size * (1 - missing))))
    run = resumed_run(out)
    with pytest.raises(
        OSError, match=r"the disk is full: .*checkpoint\.pt needs \d+\.\d MB or more, and .* has 0\.\d MB"
    ):
        run.train(stop_at=4)
    assert {path.name for path in out.iterdir()} == {"config.json", "log.csv", "checkpoint.pt"}
    assert checkpoint(out)["step"] == 2
    (small_disk / "junk").unlink()
    resumed_run(out).train()
    new_run(data, tmp_path / "straight", "--save-every", "2").train()
    assert same(checkpoint(out), checkpoint(tmp_path / "straight"))
    assert read_log(out) == read_log(tmp_path / "straight")


@root
@pytest.mark.parametrize("what", ["text", "picture", "checkpoint"])
def test_every_file_that_does_not_fit_is_removed(small_disk, what):
    """JSON, PNG and checkpoints go through one function."""
    noise = torch.randint(0, 255, (1200, 1200, 3), dtype=torch.uint8).numpy()
    write = {
        "text": lambda path: runtime.write_json(path, "x" * 5_000_000),
        "picture": lambda path: save_png(Image.fromarray(noise), path),
        "checkpoint": lambda path: runtime.save_checkpoint(path, {"model": {"a": torch.zeros(1_000_000)}, "step": 1}),
    }[what]
    with pytest.raises(OSError, match="the disk is full"):
        write(small_disk / "file")
    assert not list(small_disk.iterdir())


def test_a_log_that_cannot_be_written_does_not_end_a_run(data, tmp_path, capsys):
    """A spreadsheet has it open: a warning, once for each reason; when it is free again, no row is missing."""
    new_run(data, tmp_path / "straight").train()
    run = new_run(data, tmp_path / "run")
    run.train(stop_at=2)
    log = tmp_path / "run" / "log.csv"
    log.unlink()
    log.mkdir()
    run.train(stop_at=5)
    errors = capsys.readouterr().err
    assert 0 < errors.count("log.csv cannot be written") <= 2 and checkpoint(tmp_path / "run")["step"] == 5
    log.rmdir()
    run.train()
    assert read_log(tmp_path / "run") == read_log(tmp_path / "straight")


def test_a_log_is_rewritten_beside(data, tmp_path, monkeypatch):
    """Killed while a resumed run writes its log anew, the former one is there."""
    new_run(data, tmp_path).train(stop_at=4)
    before = (tmp_path / "log.csv").read_bytes()

    def killed(self, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerows", killed)
    with pytest.raises(KeyboardInterrupt):
        resumed_run(tmp_path)
    assert (tmp_path / "log.csv").read_bytes() == before


def test_half_a_line_of_the_log_is_no_row(data, tmp_path):
    """A kill in the middle of a line leaves "1" of step 10: it is not step 1."""
    new_run(data, tmp_path / "straight").train()
    new_run(data, tmp_path / "run").train(stop_at=4)
    with open(tmp_path / "run" / "log.csv", "a") as log:
        log.write("1")
    resumed_run(tmp_path / "run").train()
    assert read_log(tmp_path / "run") == read_log(tmp_path / "straight")


@pytest.mark.parametrize("damage", ["", "{", "3", "[1]"])
def test_damaged_results_cost_no_evaluation(data, tmp_path, command_eval, damage):
    """They are kept apart, with a warning, and the new result is written."""
    new_run(data, tmp_path).train(stop_at=1)
    (tmp_path / "results.json").write_text(damage)
    code, _, errors = command_eval("retrieval", "--checkpoint", tmp_path / "checkpoint.pt", "--data", data)
    assert code == 0 and "was damaged" in errors
    assert (tmp_path / "results.json.damaged").read_text() == damage
    assert json.loads((tmp_path / "results.json").read_text()).keys() == {f"retrieval {data}"}


def test_results_that_cannot_be_written_cost_no_evaluation(data, tmp_path, command_eval):
    """A run folder that is read only: the table is printed, and --results puts them elsewhere."""
    new_run(data, tmp_path / "run").train(stop_at=1)
    (tmp_path / "run" / "results.json").mkdir()
    given = ("retrieval", "--checkpoint", tmp_path / "run" / "checkpoint.pt", "--data", data)
    code, said, errors = command_eval(*given)
    assert code == 0 and "image to text" in said and "cannot be written" in errors and "--results" in said
    code, said, _ = command_eval(*given, "--results", tmp_path / "other" / "mine.json")
    assert code == 0 and json.loads((tmp_path / "other" / "mine.json").read_text())
    (tmp_path / "lists.jsonl").mkdir()
    code, said, errors = command_eval(*given, "--predictions", tmp_path / "lists.jsonl")
    assert code == 2 and "image to text" in said and f"not written: {tmp_path / 'lists.jsonl'}" in errors


# ------------------------------------------------------------------------------------------------- no number, no result


@pytest.mark.parametrize("option", ["--lr", "--lr-end", "--warmup", "--weight-decay", "--w-mim", "--epochs", "--clip"])
def test_an_option_that_is_no_number_is_refused(data, tmp_path, monkeypatch, capsys, option):
    """argparse takes nan for a number."""
    assert command(monkeypatch, train.main, *options(data, tmp_path / "run", option, "nan")) == 2
    assert f"{option[2:].replace('-', '_')} is nan" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["model", "optimizer"])
def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, where):
    """The last checkpoint stays, and its run goes on from it with a smaller learning rate."""
    run = new_run(data, tmp_path)
    run.train(stop_at=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with torch.no_grad():
        weight = run.model.student.text.words.weight
        (weight if where == "model" else run.optimizer.state[weight]["exp_avg"])[0] = math.nan
    with pytest.raises(ValueError, match=r"1 tensors are not finite at step 2 .*--resume and a smaller --lr"):
        run.save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    run = resumed_run(tmp_path, "--lr", "0.0001")
    assert run.config.lr == 0.0001 and run.step == 2
    run.train()
    assert float(read_log(tmp_path)[2]["lr"]) < 0.0001


def test_a_diverged_checkpoint_is_refused_by_whoever_reads_it(data, tmp_path):
    """It was saved by an older version."""
    run = new_run(data, tmp_path)
    run.train(stop_at=1)
    state = torch.load(tmp_path / "checkpoint.pt")
    state["model"]["student.text.words.weight"][:] = math.inf
    torch.save(state, tmp_path / "checkpoint.pt")
    vqa = write_task(tmp_path / "vqa.jsonl", "vqa")
    for reads in (
        lambda: load_model(tmp_path / "checkpoint.pt", torch.device("cpu")),
        lambda: resumed_run(tmp_path),
        lambda: finetune.start(
            *finetune.parse(
                [
                    "vqa",
                    "--init",
                    str(tmp_path / "checkpoint.pt"),
                    "--data",
                    str(vqa),
                    "--out",
                    str(tmp_path / "t"),
                    "--batch-size",
                    "4",
                ]
            )
        ),
    ):
        with pytest.raises(ValueError, match="not finite"):
            reads()


@pytest.mark.parametrize("option", [("--lr-head", "1e38"), ("--lr", "1e38"), ("--lr-head", "1e20")])
def test_a_diverged_fine_tuning_has_no_result(data, tmp_path, monkeypatch, capsys, option):
    """It said "best on val: 30.0 %"."""
    arguments = program("finetune", data, tmp_path / "run", "--steps", "2", "--eval-every", "1", *option)[2:]
    assert command(monkeypatch, finetune.main, *arguments) == 2
    said = capsys.readouterr()
    assert "best on val" not in said.out and "finite" in said.err.splitlines()[-1]
    assert not (tmp_path / "run" / "best.pt").exists()


# ------------------------------------------------------------------------------------------------------------- resuming


def test_data_that_was_moved_is_the_same_data(tmp_path, monkeypatch):
    """Identity is the content: another folder, another way to name it, another working folder."""
    data = write_squares(tmp_path / "t" / "pairs.jsonl", 22, twins=10, several=True)
    new_run(data, tmp_path / "straight").train()
    for out in ("moved", "named"):
        new_run(data, tmp_path / out).train(stop_at=4)
    monkeypatch.chdir(tmp_path)
    named = resumed_run(tmp_path / "named", "--data", "./t/../t/pairs.jsonl")
    named.train()
    (tmp_path / "t").rename(tmp_path / "u")
    resumed_run(tmp_path / "moved", "--data", str(tmp_path / "u" / "pairs.jsonl")).train()
    for out in ("moved", "named"):
        assert same(checkpoint(tmp_path / out)["model"], checkpoint(tmp_path / "straight")["model"])


@pytest.mark.parametrize("change", ["fewer", "words", "names", "order", "twins"])
def test_changed_data_is_refused(tmp_path, change):
    """A run that went on with it would be neither the one nor the other."""
    data = write_squares(tmp_path / "pairs.jsonl", 22, twins=10)
    new_run(data, tmp_path / "run").train(stop_at=2)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    if change == "fewer":
        rows = rows[:20]
    elif change == "words":
        rows[21]["caption"] = "something else"
    elif change == "names":
        rows[21]["image"] = rows[20]["image"]
    elif change == "order":
        rows = rows[::-1]
    else:
        del rows[0]["twin"], rows[1]["twin"]
    write_rows(data, rows)
    now = "20 are given now" if change == "fewer" else "22 others are given now"
    with pytest.raises(ValueError, match=f"began with 22 rows to train on, and {now}"):
        resumed_run(tmp_path / "run")
    data.write_text("")


def test_a_further_key_changes_no_run(tmp_path):
    """Nor does another way to write the same JSON."""
    data = write_squares(tmp_path / "pairs.jsonl", 22)
    new_run(data, tmp_path / "run").train(stop_at=2)
    rows = [json.loads(line) | {"seen": True} for line in data.read_text().splitlines()]
    data.write_text("\r\n".join(json.dumps(dict(reversed(row.items())), separators=(",", ":")) for row in rows))
    assert resumed_run(tmp_path / "run").step == 2


def test_what_fine_tuning_chooses_on_stays_the_same(tmp_path, data):
    """The best so far would be the best on something else."""
    out = tmp_path / "run"
    val = write_task(tmp_path / "val.jsonl", "vqa", 6)
    arguments = program("finetune", data, out, "--val", str(val), "--steps", "6", "--eval-every", "2")[2:]
    finetune.start(*finetune.parse(arguments)).train(stop_at=2)
    rows = val.read_text().splitlines()
    val.write_text("\n".join(rows[1:]))
    with pytest.raises(ValueError, match=r"began with 12 rows to choose on, and 11 are given now"):
        finetune.start(*finetune.parse([*arguments, "--resume"]))
    val.write_text("\n".join(rows))
    assert finetune.start(*finetune.parse([*arguments, "--resume"])).step == 2


def test_a_finished_run_can_be_trained_longer(data, tmp_path, monkeypatch, capsys):
    """The rate follows the longer schedule from the next step on, and it is said; fewer steps are refused."""
    new_run(data, tmp_path / "run").train()
    assert command(monkeypatch, train.main, "--out", tmp_path / "run", "--resume", "--steps", "18") == 0
    said = capsys.readouterr().out
    assert "now 18 steps (were 9)" in said and "step 9 took the rate 6e-05, and the next takes" in said
    rows, long = read_log(tmp_path / "run"), train.TrainConfig(steps=18, lr=6e-3)
    assert checkpoint(tmp_path / "run")["step"] == 18 and len(rows) == 18
    assert [float(row["lr"]) for row in rows[9:]] == pytest.approx(
        [train.learning_rate(step, long) for step in range(9, 18)], rel=1e-4
    )
    with pytest.raises(ValueError, match=r"steps \(was 18, now 9\)"):
        resumed_run(tmp_path / "run", "--steps", "9")


def test_more_epochs_are_more_steps(data, tmp_path):
    """22 rows are five batches of four an epoch."""
    new_run(data, tmp_path, "--epochs", "1").train()
    assert resumed_run(tmp_path, "--epochs", "1").config.steps == 5
    run = resumed_run(tmp_path, "--epochs", "3")
    assert run.step == 5 and run.config.steps == 15


def test_rates_of_fine_tuning_can_be_lowered_one_by_one(data, tmp_path):
    """Each group of the optimiser follows its own."""
    arguments = program("finetune", data, tmp_path / "run", "--steps", "6")[2:]
    finetune.start(*finetune.parse(arguments)).train(stop_at=2)
    rest = ["vqa", "--out", str(tmp_path / "run"), "--resume"]
    run = finetune.start(*finetune.parse([*rest, "--lr-head", "0.008"]))
    run.train(stop_at=4)
    now = train.learning_rate(3, run.config)
    assert {round(group["lr"] / now, 6) for group in run.optimizer.param_groups} == {1.0, 2.0}
    with pytest.raises(ValueError, match="lower both"):
        finetune.start(*finetune.parse([*rest, "--lr-head", "0.001"]))


def test_a_mistyped_out_starts_no_run(data, tmp_path, monkeypatch, capsys):
    """`--out X --resume` and nothing more wants what is there; with --data it says that a new run begins."""
    new_run(data, tmp_path / "runs" / "mine").train(stop_at=1)
    wrong = tmp_path / "runs" / "mien"
    assert command(monkeypatch, train.main, "--out", wrong, "--resume") == 2
    assert f"did you mean {tmp_path / 'runs' / 'mine'}?" in capsys.readouterr().err
    assert command(monkeypatch, finetune.main, "vqa", "--out", wrong, "--resume") == 2
    assert not wrong.exists()
    assert command(monkeypatch, train.main, *options(data, wrong, "--steps", "1", "--resume")) == 0
    assert capsys.readouterr().out.startswith(f"there is no {wrong / 'checkpoint.pt'} to go on from: a new run begins")


@unix
def test_a_second_run_in_one_folder_is_refused(data, tmp_path, monkeypatch, capsys):
    """Each would write over the other. A run that was killed keeps no lock, although its workers live a while."""
    out = tmp_path / "run"
    with Started(program("train", data, out, "--workers", "1"), out) as started:
        started.until_rows()
        assert command(monkeypatch, train.main, *options(data, out)) == 2
        assert f"another process is training in {out}" in capsys.readouterr().err
        os.kill(started.process.pid, signal.SIGKILL)
        started.process.wait()
    assert command(monkeypatch, train.main, *options(data, out, "--steps", "2")) == 0
    assert checkpoint(out)["step"] == 2


def test_what_is_said_neither_steers_nor_floods_a_terminal(monkeypatch):
    """Captions and names come from outside: no escape sequence, no letter that the console lacks, no endless word."""
    written = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", written)
    runtime.guarded(lambda: print("a \x1b[31mred\x1b[0m caption \u2603 \udcff"))
    assert written.buffer.getvalue() == b"a \\x1b[31mred\\x1b[0m caption \\u2603 \\udcff\n"
    long = runtime.readable(f"{'x' * 5000} is no file\x1b]0;: give \x07 one\nand more")
    assert len(long) < 200 and long.startswith("xxx") and "..." in long and "\x1b" not in long and "\x07" not in long
    assert long.endswith("\nand more")
    assert runtime.readable(f"the phrase {'a b ' * 999!r} is none") == f"the phrase '{'a b ' * 30}...' is none"


def test_a_link_stays_a_link_and_nothing_but_a_file_is_replaced(tmp_path):
    """Also the name that is written first: it could be a link to somebody's file."""
    mine, theirs, link = tmp_path / "mine", tmp_path / "theirs", tmp_path / "link"
    theirs.write_text("theirs")
    link.symlink_to(mine)
    (tmp_path / "mine.tmp").symlink_to(theirs)
    runtime.write_beside(link, lambda temporary: temporary.write_text("new"))
    assert link.is_symlink() and mine.read_text() == "new" and theirs.read_text() == "theirs"
    assert not (tmp_path / "mine.tmp").exists()
    for path in (Path("/dev/null"), tmp_path):
        with pytest.raises(OSError, match="is not a file that could be replaced"):
            runtime.write_beside(path, lambda temporary: temporary.write_text("new"))


@unix
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(data, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for given in (["--vocab", tmp_path / "pipe"], ["--config", tmp_path / "pipe"]):
        with pytest.raises(ValueError, match=r"no file|not a file"):
            train.start(*train.parse([*options(data, tmp_path / "out"), *map(str, given)]))


def test_deeply_nested_files_are_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for use in (runtime.read_config, compare.read_plan):
        with pytest.raises(ValueError, match=r"deep\.json is not (a plan|the config)"):
            use(tmp_path / "deep.json")
