"""Two processes equal one: losses, gradients, whole runs, evaluation, resuming; and what happens when one dies."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import make_same, only, tiny_batch, tiny_config, tiny_model
from helpers import new_run, options, read_log, resumed_run, same, write_squares
from processes import evaluate, go_on, gradients_of, start, together, train_some, watched

import train
from data import read_rows
from eval import load_model, retrieval
from mamo import MAMO

STEPS = "--steps 20 --batch-size 16 --queue-size 12 --ema 0.9 --lr 5e-3"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 pairs, of which eight are twins two by two, some with several captions."""
    return write_squares(tmp_path_factory.mktemp("squares") / "pairs.jsonl", 24, twins=8, several=True)


def seen_by(folder: Path, world: int) -> list[dict]:
    """What each process noted, see processes.watched."""
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(world)]


def joined(seen: list[dict]) -> list[list[float]]:
    """The rows of each batch of all processes put together in order."""
    return [[row for part in parts for row in part] for parts in zip(*(one["rows"] for one in seen), strict=True)]


# ------------------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("queue_size", [0, 5])
def test_contrast_over_the_global_batch_equals_one_process_in_value_and_gradient(tmp_path, queue_size):
    """ITC, with pairs that share a picture or a caption across the two processes."""
    config = tiny_config(**only("itc"), queue_size=queue_size)
    batch = make_same(tiny_batch(config, b=8), image=((1, 6),), caption=((0, 2), (3, 7)))
    # In double precision, up to the embeddings, which are fp32: of fp32 encoders some processors round sums by more.
    batch["images"] = batch["images"].double()
    model = tiny_model(config).double()
    if model.queue is not None:
        model.queue.float()
    together(2, tmp_path, gradients_of, model, batch, tmp_path)
    found = [torch.load(tmp_path / f"found-{rank}.pt") for rank in range(2)]

    loss = model(batch)["itc"]
    loss.backward()
    assert sum(one["losses"]["itc"] for one in found) / 2 == pytest.approx(loss.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            for one in found:
                torch.testing.assert_close(one["gradients"][name], parameter.grad, rtol=0, atol=1e-6)
    assert same(found[0]["gradients"], found[1]["gradients"])


@pytest.mark.parametrize("losses", [("mrm",), ("mlm", "mim")])
def test_means_are_over_the_positions_of_all_processes(tmp_path, losses):
    """Captions of very different lengths: a mean of the two processes' means would weigh their words differently."""
    config = tiny_config(**only(*losses))
    batch = tiny_batch(config, b=6)
    batch["attention_mask"][3:, 4:] = False  # the second process has few words
    batch["input_ids"][3:, 4:] = 0
    model = tiny_model(config)
    together(2, tmp_path, gradients_of, model, batch, tmp_path)
    found = [torch.load(tmp_path / f"found-{rank}.pt") for rank in range(2)]
    whole = model(batch)
    sum(whole[name] for name in losses).backward()
    for name in losses:
        assert sum(one["losses"][name] for one in found) / 2 == pytest.approx(whole[name].item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[0]["gradients"][name], parameter.grad, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- whole runs


def draw_within_halves(run, monkeypatch) -> None:
    """Make a run of one process draw ITM's negatives as two processes do: each row within its half of the batch."""
    noise, not_drawn, half = run.negative_noise, MAMO.not_drawn, run.config.batch_size // 2
    rows = torch.arange(2 * half) // half
    across = rows[:, None] != rows

    def both(part: int, _) -> torch.Tensor:
        blocks = torch.full((2, 2 * half, 2 * half), 0.5)
        for run.rank in (1, 0):
            mine = slice(run.rank * half, (run.rank + 1) * half)
            blocks[:, mine, mine] = noise(part, half)
        assert not torch.equal(blocks[:, :half, :half], blocks[:, half:, half:]), "each process draws anew"
        return blocks

    monkeypatch.setattr(run, "negative_noise", both)
    monkeypatch.setattr(MAMO, "not_drawn", lambda self, similarity, alike: not_drawn(self, similarity, alike | across))


def one_beside_two(data: Path, folder: Path, monkeypatch, *given: str) -> train.Run:
    """Train one process and two, whose rows, losses and gradient norms must be equal step by step -> the run of one."""
    together(2, folder, train_some, options(data, folder / "two", *given), folder)
    run = new_run(data, folder / "one", *given, "--parts", "2")
    draw_within_halves(run, monkeypatch)
    seen = watched(run)
    run.train()
    assert joined(seen_by(folder, 2)) == seen["rows"]
    one, two = read_log(folder / "one"), read_log(folder / "two")
    assert len(one) == len(two) == run.config.steps
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys() >= {"itc", "itm", "mrm", "mim", "mlm", "grad_norm"}
        for name in ours.keys() - {"target_cosine"}:  # a mean over each process's own targets
            close = {"rel": 1e-3} if name in ("grad_norm", "step") else {"abs": 1e-4}
            assert float(theirs[name]) == pytest.approx(float(ours[name]), **close), (name, ours["step"])
    return run


@pytest.mark.parametrize("more", ["", "--accumulate 2 --grad-checkpointing", "--accumulate 2 --queue-size 0 --lr 1e-3"])
def test_twenty_steps_of_two_processes_equal_those_of_one(data, tmp_path, monkeypatch, more):
    """Every loss of every step, gradient norms, temperature; teacher, queue and student end equal on both processes."""
    run = one_beside_two(data, tmp_path, monkeypatch, *STEPS.split(), *more.split())
    assert run.step == 20
    models = [torch.load(tmp_path / f"model-{rank}.pt") for rank in range(2)]
    assert same(models[0], models[1]) and models[0].get("queue.filled", torch.ones(1)).all()
    for name, value in run.model.state_dict().items():
        if not name.endswith("key_value.bias"):  # a key's bias moves no attention: AdamW follows rounding errors there
            torch.testing.assert_close(models[0][name], value, rtol=0, atol=2e-3, msg=name)


def test_gradients_are_exchanged_once_per_optimiser_step(data, tmp_path):
    """With three forward passes per step as often as with one."""
    for parts in ("1", "3"):
        given = ["--steps", "4", "--batch-size", "8", "--accumulate", parts]
        together(2, tmp_path / parts, train_some, options(data, tmp_path / f"run{parts}", *given), tmp_path / parts)
    once, thrice = (seen_by(tmp_path / parts, 2) for parts in ("1", "3"))
    assert len(thrice[0]["rows"]) == 3 * len(once[0]["rows"]) - 0 == 12
    assert thrice[0]["exchanges"] == once[0]["exchanges"] and min(once[0]["exchanges"]) >= 1


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(data, tmp_path, before, after):
    """It sees the rows that it would have seen, masked as they would have been, and ends at the same losses."""
    given = ["--steps", "10", "--batch-size", "16", "--w-itm", "0", "--log-every", "3"]
    straight = new_run(data, tmp_path / "straight", *given, "--parts", "2")
    whole = watched(straight)
    straight.train()
    first = options(data, tmp_path / "run", *given, "--parts", "2")
    if before == 2:
        together(2, tmp_path, train_some, first, tmp_path, 4)
        run = resumed_run(tmp_path / "run")
        rest = watched(run)
        run.train()
        found = joined(seen_by(tmp_path, 2)) + rest["rows"]
    else:
        run = new_run(data, tmp_path / "run", *given, "--parts", "2")
        seen = watched(run)
        run.train(stop_at=4)
        together(2, tmp_path, go_on, tmp_path / "run", tmp_path)
        found = seen["rows"] + joined(seen_by(tmp_path, 2))
    assert found == whole["rows"]
    for ours, theirs in zip(read_log(tmp_path / "straight"), read_log(tmp_path / "run"), strict=True):
        for name in ("step", "itc", "mrm", "mim", "mlm"):
            assert float(theirs[name]) == pytest.approx(float(ours[name]), abs=1e-4), name


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("count", [1, 23])
def test_shared_evaluation_is_exact(data, tmp_path, count):
    """Every query counts once, with galleries that two processes cannot share evenly, even a gallery of one."""
    run = new_run(data, tmp_path / "run")
    run.train(stop_at=3)
    checkpoint, pairs = tmp_path / "run" / "checkpoint.pt", data.with_name(f"first{count}.jsonl")
    pairs.write_text("".join(data.read_text().splitlines(keepends=True)[:count]))
    together(2, tmp_path, evaluate, checkpoint, pairs, tmp_path)
    found = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(2)]
    model, tokenizer, _ = load_model(checkpoint, torch.device("cpu"))
    alone = retrieval(model, tokenizer, read_rows([pairs], "pairs"), torch.device("cpu"), k=5)
    assert found[0] == found[1] == json.loads(json.dumps(alone))


# -------------------------------------------------------------------------------------------------------- one that dies


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_ends_with_a_message(data, tmp_path, victim):
    """Within 30 seconds, although nobody but the two watches them; and the last checkpoint can be gone on from."""
    given = options(data, tmp_path / "run", "--steps", "100000", "--batch-size", "8", "--save-every", "5")
    workers = start(2, tmp_path, train_some, given, tmp_path)
    until = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoint.pt").is_file() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(workers[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    workers[1 - victim].join(30)
    assert workers[1 - victim].exitcode == 2 and time.monotonic() - killed < 30
    said = (tmp_path / f"said-{1 - victim}.txt").read_text()
    assert f"process {1 - victim} of 2 stops at once, because another process of this run ended" in said
    assert "Traceback" not in said
    assert resumed_run(tmp_path / "run").step >= 5


def test_a_process_that_fails_says_why_and_the_other_ends(tmp_path):
    """A picture whose header is whole and whose body is not: only the process that reads it can say which it is."""
    data = write_squares(tmp_path / "pairs.jsonl", 16)
    path = tmp_path / "pictures" / "11.png"
    path.write_bytes(path.read_bytes()[:60])
    workers = start(2, tmp_path, train_some, options(data, tmp_path / "run", "--batch-size", "8"), tmp_path)
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [2, 2]
    said = [(tmp_path / f"said-{rank}.txt").read_text() for rank in range(2)]
    own = [text for text in said if "11.png" in text]
    other = [text for text in said if "another process of this run ended" in text]
    assert len(own) == len(other) == 1 and own != other
    assert "Traceback" not in "".join(said)
