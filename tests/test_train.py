"""Training: resuming is bit-equal, nothing is lost, and the step is what it says; options and errors of train.py."""

import csv
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
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
)
from processes import start

import eval as evaluation
import finetune
import runtime
import train
from data import TwinBatches, read_rows
from eval import load_model
from mamo import MAMO, MAMOConfig
from train import TrainConfig, learning_rate, orthogonal, parse, rate_for

LOSSES = ["itc", "itm", "mrm", "mim", "mlm"]
unix = pytest.mark.skipif(os.name == "nt", reason="signals work otherwise on Windows")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """22 pairs, ten of them twins, some with several captions: five batches of four an epoch."""
    return write_squares(tmp_path_factory.mktemp("data") / "pairs.jsonl", 22, twins=10, several=True)


def checkpoint(out: Path) -> dict:
    """The checkpoint of a run folder without what says where it was made and by how many workers."""
    state = torch.load(out / "checkpoint.pt", weights_only=False)  # twice as fast; resuming reads it with True
    for name in ("out", "workers", "resume"):
        del state["train"][name]
    return state


def command(monkeypatch, main, *arguments) -> int:
    """Run a program in this process as the shell would -> its exit status."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runtime.guarded(main)
        sys.exit(0)
    return end.value.code


def gradients(run: train.Run) -> list[dict]:
    """A list that grows with every step of the optimiser: gradients by name, and "lr"."""
    seen, step = [], run.optimizer.step

    def watched():
        grads = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
        seen.append(grads | {"lr": [group["lr"] for group in run.optimizer.param_groups]})
        step()

    run.optimizer.step = watched
    return seen


# ----------------------------------------------------------------------------------------------------------- resuming

EVERYTHING = "--augment photo --dropout 0.1 --accumulate 2 --queue-size 6 --ema 0.9 --log-every 3"


@pytest.mark.parametrize("objective", ["mamo", "control"])
def test_resume_is_bit_exact(data, tmp_path, objective):
    """Nine steps in one go, and four and five, the second part with workers: everything in the checkpoint is equal.

    The break is in the middle of an epoch and between two rows of the log; dropout, augmentation, accumulation and a
    queue are on, so that every kind of randomness and of state takes part.
    """
    more = [*EVERYTHING.split(), "--objective", objective]
    new_run(data, tmp_path / "straight", *more).train()
    first = new_run(data, tmp_path / "resumed", *more)
    first.train(stop_at=4)
    assert 4 * 2 % TwinBatches(first.rows, 4).batches_per_epoch, "the break is to be in the middle of an epoch"
    assert checkpoint(tmp_path / "resumed")["step"] == 4
    second = resumed_run(tmp_path / "resumed", "--workers", "2")
    assert second.step == 4 and second.config.workers == 2
    second.train()

    straight, resumed = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "resumed")
    assert straight["step"] == 9
    assert straight["model"]["queue.filled"].all() and any("teacher" in name for name in straight["model"])
    for part in straight:
        assert same(straight[part], resumed[part]), part
    assert read_log(tmp_path / "straight") == read_log(tmp_path / "resumed")
    assert [row["step"] for row in read_log(tmp_path / "resumed")] == ["3", "6", "9"]


def test_the_run_depends_on_its_seed(data, tmp_path):
    """Otherwise equality of two runs would prove nothing."""
    for out, seed in (("one", "0"), ("two", "0"), ("three", "1")):
        new_run(data, tmp_path / out, "--seed", seed).train(stop_at=2)
    one, two, three = (checkpoint(tmp_path / out)["model"] for out in ("one", "two", "three"))
    assert same(one, two)
    assert not same(one["student.text.words.weight"], three["student.text.words.weight"])


def test_log_rows_behind_the_checkpoint_are_written_anew(data, tmp_path):
    """After a crash the log may be ahead of the checkpoint; a resumed run leaves no step in it twice."""
    new_run(data, tmp_path / "straight").train()
    run = new_run(data, tmp_path / "crashed")
    run.train(stop_at=4)
    kept = (tmp_path / "crashed" / "checkpoint.pt").read_bytes()
    run.train(stop_at=7)
    (tmp_path / "crashed" / "checkpoint.pt").write_bytes(kept)
    assert len(read_log(tmp_path / "crashed")) == 7
    resumed_run(tmp_path / "crashed").train()
    assert read_log(tmp_path / "crashed") == read_log(tmp_path / "straight")


def test_resuming_a_finished_run_changes_nothing(data, tmp_path, monkeypatch, capsys):
    """`make demo` twice trains once."""
    new_run(data, tmp_path, "--steps", "2").train()
    before, log = (tmp_path / "checkpoint.pt").read_bytes(), read_log(tmp_path)
    assert command(monkeypatch, train.main, *options(data, tmp_path, "--steps", "2")[:4], "--resume") == 0
    assert "already trained to its last step, 2" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert read_log(tmp_path) == log


def test_resume_without_a_checkpoint_starts_the_run(data, tmp_path):
    """`make demo` passes --resume always."""
    run = new_run(data, tmp_path, "--resume")
    assert run.step == 0
    run.train(stop_at=1)
    assert checkpoint(tmp_path)["step"] == 1


def test_a_run_folder_with_a_checkpoint_is_not_overwritten(data, tmp_path):
    """Hours of work are behind it."""
    new_run(data, tmp_path).train(stop_at=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"checkpoint\.pt exists: pass --resume"):
        new_run(data, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_changed_options_are_refused_by_name(data, tmp_path):
    """A resumed run computes what it began; options that do not change the result may change."""
    new_run(data, tmp_path, "--lr", "0.001").train(stop_at=2)
    with pytest.raises(ValueError) as error:
        resumed_run(tmp_path, "--lr", "0.5", "--width", "32", "--seed", "0", "--w-mrm", "0")
    message = str(error.value)
    assert "lr (was 0.001, now 0.5)" in message and "width (was 16, now 32)" in message
    assert "w_mrm (was 1.0, now 0.0)" in message and "seed" not in message
    run = resumed_run(tmp_path, "--lr", "0.001", "--log-every", "2", "--save-every", "5", "--data", str(data))
    assert run.config.lr == 0.001 and run.config.log_every == 2 and run.config.save_every == 5
    assert run.step == 2 and run.model.config.width == 16


def test_the_same_command_with_resume_goes_on(data, tmp_path):
    """The simplest way to go on is to press arrow up and add --resume: unchanged options are no change."""
    new_run(data, tmp_path, "--steps", "4").train(stop_at=2)
    assert new_run(data, tmp_path, "--steps", "4", "--resume").step == 2


# ---------------------------------------------------------------------------------------------------- nothing is lost


def killed_while_saving(arguments: list[str]) -> None:
    """Train, and die with half of the second checkpoint on the disk."""
    whole_save, times = torch.save, 0

    def save(state, file):
        nonlocal times
        whole_save(state, file)
        times += 1
        if times == 2:
            written = Path(file).read_bytes()
            Path(file).write_bytes(written[: len(written) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save
    train.start(*parse(arguments)).train()


@unix
def test_a_kill_while_saving_leaves_the_old_checkpoint_whole(data, tmp_path):
    """The process dies with half of its second checkpoint on the disk; the first is there, and training goes on."""
    arguments = options(data, tmp_path / "killed", "--save-every", "2")
    [process] = start(1, tmp_path, killed_while_saving, arguments)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "said-0.txt").read_text()
    assert runtime.load_checkpoint(tmp_path / "killed" / "checkpoint.pt")["step"] == 2
    resumed_run(tmp_path / "killed").train()
    new_run(data, tmp_path / "straight", "--save-every", "2").train()
    assert same(checkpoint(tmp_path / "killed"), checkpoint(tmp_path / "straight"))
    assert read_log(tmp_path / "killed") == read_log(tmp_path / "straight")


@unix
def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path):
    """A real program gets a real signal; what it saves, and what follows, is as if it had never been stopped."""
    out, more = tmp_path / "stopped", ("--steps", "100000", "--save-every", "100000", "--workers", "1")
    program = [sys.executable, train.__file__, *options(data, out, *more)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(program, env=environment(), start_new_session=True, **pipes)
    try:
        deadline = time.monotonic() + 100
        while not ((out / "log.csv").is_file() and len((out / "log.csv").read_text().splitlines()) > 3):
            assert time.monotonic() < deadline and process.poll() is None, "training did not start"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the worker too
        said, complained = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, "a script must not go on after half a training"
    assert "Traceback" not in complained
    step = checkpoint(out)["step"]
    assert step >= 3
    assert f"stopped at step {step} and saved; go on with: python train.py --out {out} --resume" in said

    straight = new_run(data, tmp_path / "straight", *more)
    straight.train(stop_at=step)
    assert same(checkpoint(out), checkpoint(tmp_path / "straight"))
    straight.train(stop_at=step + 3)
    resumed_run(out).train(stop_at=step + 3)
    assert same(checkpoint(out), checkpoint(tmp_path / "straight"))
    assert read_log(out) == read_log(tmp_path / "straight")


def test_a_polite_kill_saves_too_and_gives_ctrl_c_back(data, tmp_path, capsys):
    """SIGTERM is what a cluster sends before it takes the machine; after training, Ctrl-C is Python's own again."""
    before = signal.getsignal(signal.SIGINT)
    run = new_run(data, tmp_path)
    one_step, after = run.one_step, []

    def step(batches):
        after.append(run.step)
        if len(after) == 2:
            signal.raise_signal(signal.SIGTERM)
        return one_step(batches)

    run.one_step = step
    with kept_signals():
        run.train()
        assert signal.getsignal(signal.SIGINT) == before
    assert run.step == 2 and checkpoint(tmp_path)["step"] == 2
    assert "stopped at step 2 and saved" in capsys.readouterr().out
    run.train(stop_at=3)
    assert run.step == 3 and not run.stopped, "what stopped one call does not stop the next"


def test_a_second_ctrl_c_ends_at_once():
    """Who is in a hurry does not want to wait for the end of a step."""
    runtime.Interrupt()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_loss_that_is_not_finite_stops_before_the_step(data, tmp_path, monkeypatch, capsys):
    """The message names the loss and no other; parameters and the last checkpoint are untouched; exit status 2."""
    calls, loss_mim, runs = [], MAMO.loss_mim, []

    def broken(self, *arguments):
        calls.append(0)
        return loss_mim(self, *arguments) * (math.nan if len(calls) == 4 else 1.0)

    one_step = train.Run.one_step

    def remember(self, batches):
        runs.append((self, {name: value.clone() for name, value in self.model.state_dict().items()}))
        return one_step(self, batches)

    monkeypatch.setattr(MAMO, "loss_mim", broken)
    monkeypatch.setattr(train.Run, "one_step", remember)
    code = command(monkeypatch, train.main, *options(data, tmp_path, "--save-every", "2"))
    assert code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    sentence = errors.rstrip().splitlines()[-1]  # below the progress bar, on a line of its own
    assert sentence.startswith("error: the loss mim is not finite at step 4")
    run, before = runs[-1]
    assert run.step == 3 and len(runs) == 4
    assert same(before, dict(run.model.state_dict()))
    state = checkpoint(tmp_path)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())


def test_a_gradient_that_is_not_finite_stops_before_the_step(data, tmp_path, monkeypatch):
    """The loss may be finite where its slope is not: such a step would ruin every parameter, and the next save."""
    loss_mim = MAMO.loss_mim

    def steep(self, at_patches, target):
        return loss_mim(self, at_patches, target) + (at_patches * 0).sum().abs().sqrt()

    monkeypatch.setattr(MAMO, "loss_mim", steep)
    run = new_run(data, tmp_path)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"gradient.* not finite at step 1"):
        run.train(stop_at=1)
    assert same(before, dict(run.model.state_dict()))


# ------------------------------------------------------------------------------------------------- what a step computes


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    """Against the formula in words: a line from 0 to lr, then half a wave from lr to lr * lr_end at the last step."""
    config = TrainConfig(lr=0.4, lr_end=0.1, warmup=0.2, steps=50)
    rates = [learning_rate(step, config) for step in range(50)]
    for step in range(10):
        assert rates[step] == pytest.approx(0.4 * (step + 1) / 10)
    for step in range(10, 50):
        share = (step - 10) / 39
        assert rates[step] == pytest.approx(0.04 + 0.36 * (math.cos(math.pi * share) + 1) / 2)
    assert rates[9] == rates[10] == max(rates) == pytest.approx(0.4)
    assert rates[49] == min(rates[9:]) == pytest.approx(0.04)
    assert all(one > other for one, other in pairwise(rates[10:]))
    for steps in (1, 2, 3):
        short = TrainConfig(lr=0.4, lr_end=0.1, warmup=0.0, steps=steps)
        rates = [learning_rate(step, short) for step in range(steps)]
        assert rates[0] == pytest.approx(0.4) and all(0.04 <= rate <= 0.4 + 1e-12 for rate in rates)


def test_the_optimiser_takes_its_steps_at_that_rate(data, tmp_path):
    """All groups, each step; and the log tells it."""
    run = new_run(data, tmp_path, "--warmup", "0.4", "--lr", "0.01")
    seen = gradients(run)
    run.train()
    expected = [learning_rate(step, run.config) for step in range(9)]
    assert [grads["lr"] for grads in seen] == [[rate] * 3 for rate in expected]
    assert [float(row["lr"]) for row in read_log(tmp_path)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_orthogonal_keeps_the_directions_and_makes_them_count_alike(shape):
    """Against the singular values: all near 1, with the same singular vectors; each matrix of a batch by itself."""
    draw = torch.Generator().manual_seed(0)
    matrices = (
        torch.randn(3, *shape, generator=draw, dtype=torch.double) * torch.tensor([1e-4, 1.0, 50.0])[:, None, None]
    )
    for matrix, found in zip(matrices, orthogonal(matrices), strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ found @ v.T
        assert ((inside.diagonal() > 0.6) & (inside.diagonal() < 1.3)).all()
        torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_is_muon_for_matrices_in_blocks_and_adamw_for_the_rest(data, tmp_path, optimizer):
    """Three steps against a loop over single parameters; without Muon all is AdamW as torch has it."""
    run = new_run(data, tmp_path, "--optimizer", optimizer, "--weight-decay", "0.3")
    named = {name: value for name, value in run.model.named_parameters() if value.requires_grad}
    rest = {name: value.detach().clone().requires_grad_() for name, value in named.items()}
    block = {name for name, value in named.items() if value.ndim == 2 and ".blocks." in name and optimizer == "muon"}
    decay = {name: 0.3 if value.ndim == 2 and not name.endswith(("positions", "types")) else 0.0
             for name, value in named.items()}  # fmt: skip
    adam = torch.optim.AdamW(
        [{"params": [rest[name]], "weight_decay": decay[name]} for name in named if name not in block],
        lr=0.01, betas=(0.9, 0.98),
    )  # fmt: skip
    momentum = {name: torch.zeros_like(named[name]) for name in block}
    for group in run.optimizer.param_groups:
        group["lr"] = 0.01
    for number in range(3):
        draw = torch.Generator().manual_seed(number)
        for name, value in named.items():
            value.grad = torch.randn(value.shape, generator=draw)
            rest[name].grad = value.grad.clone()
        run.optimizer.step()
        adam.step()
        for name in block:
            momentum[name] = 0.95 * momentum[name] + named[name].grad
            move = orthogonal((named[name].grad + 0.95 * momentum[name])[None])[0]
            kept = rest[name].detach() * (1 - 0.01 * 0.3)
            rest[name] = kept - 0.01 * 0.2 * max(move.shape) ** 0.5 * move
            rms = (0.2 * max(move.shape) ** 0.5 * move).square().mean().sqrt()
            assert 0.1 < rms < 0.3, "about as large as a step of AdamW"
    for name, value in named.items():
        torch.testing.assert_close(value, rest[name], rtol=0, atol=2e-6, msg=name, check_stride=False)


def test_the_learning_rate_follows_the_width_unless_it_is_given(data, tmp_path, capsys):
    for width, peak in ((64, 6e-3), (128, 2.1e-3), (384, 4.1e-4), (768, 1.4e-4), (16, 6e-3)):
        assert rate_for(width) == pytest.approx(peak, rel=0.05)
    options = ["--data", str(data), "--batch-size", "4"]
    run = train.start(*parse([*options, "--out", str(tmp_path / "one")]))
    assert run.config.lr == 6e-3 and "learning rate up to 0.006" in capsys.readouterr().out
    assert new_run(data, tmp_path / "other", "--lr", "0.01").config.lr == 0.01


def test_a_frozen_text_encoder_stays_what_it_was(data, tmp_path):
    """Also its words, which the head of MLM shares; all else learns."""
    run = new_run(data, tmp_path, "--freeze-text")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train(stop_at=3)
    after = run.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("student.text."))
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    for part in ("student.image.", "student.fusion.", "student.text_projection.", "itm_head.", "mlm_head."):
        assert any(name.startswith(part) for name in moved), part


def test_a_run_from_before_muon_goes_on_with_adamw(data, tmp_path):
    """Its checkpoint names no optimiser, and has the state of AdamW for every parameter."""
    new_run(data, tmp_path, "--optimizer", "adamw").train(stop_at=4)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["train"]["optimizer"]
    torch.save(state, path)
    run = resumed_run(tmp_path)
    assert run.config.optimizer == "adamw" and run.step == 4
    run.train()
    with pytest.raises(ValueError, match=re.escape("optimizer (was adamw, now muon)")):
        resumed_run(tmp_path, "--optimizer", "muon")


def test_decay_is_for_matrices_only(data, tmp_path):
    """Every trainable parameter is in one group; the teacher is in none."""
    run = new_run(data, tmp_path, "--weight-decay", "0.3")
    groups = run.optimizer.param_groups
    assert [(group["weight_decay"], group["orthogonal"]) for group in groups] == [(0.3, True), (0.3, False), (0, False)]
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    in_blocks, others, without = ({names[p] for p in group["params"]} for group in groups)
    with_decay = in_blocks | others
    assert in_blocks == {name for name in with_decay if ".blocks." in name} and others
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert with_decay | without == {name for name in names.values() if not name.startswith("teacher.")}
    assert any(name.startswith("teacher.") for name in names.values())

    undecayed = ("norm", "bias", "positions", "types", "class_token", "mask_token", "log_temperature")
    for name in without:
        parts = name.split(".")
        assert any(word in part for word in undecayed for part in parts[-2:]) or run.model.get_parameter(name).ndim == 1
    for word in (*undecayed, "mlm_bias"):
        assert any(word in name for name in without), word
        if word != "norm":
            assert not any(name.split(".")[-1] == word for name in with_decay), word
    assert not any("norm" in name for name in with_decay)
    for name in ("student.text.words.weight", "student.image.patch_embedding.weight", "itm_head.weight"):
        assert name in with_decay
    assert all(name.endswith("weight") and run.model.get_parameter(name).ndim == 2 for name in with_decay)


@pytest.mark.parametrize("objective", ["mamo", "control", "vlmae"])
@pytest.mark.parametrize("passes", [2, 4])
def test_accumulated_passes_are_one_large_batch(tmp_path, capsys, objective, passes):
    """Gradients and logged losses are those of a batch of 16, contrast over all 16 pairs included.

    Done again by hand in one forward pass, in which ITM's draws are kept within the parts. The texts are equally long.
    """
    data = write_squares(tmp_path / "pairs.jsonl", 16)
    texts = [f"{one} {other}" for one in ("a", "b", "c", "d") for other in ("red", "blue", "white", "pink")]
    write_rows(data, [json.loads(row) | {"caption": text} for row, text in zip(data.open(), texts, strict=True)])
    b, more = 16 // passes, ["--objective", objective, "--parts", "1", "--clip", "1e9", "--w-itm", "2"]
    run = new_run(data, tmp_path / "run", *more, "--batch-size", str(b), "--accumulate", str(passes))
    assert "itc 2.77" in capsys.readouterr().out, "the chance level is ln 16"
    large = new_run(data, tmp_path / "large", *more, "--batch-size", "16")
    seen = gradients(run)
    run.train(stop_at=1)

    model, noise, part_of = large.model.train(), torch.zeros(2, 16, 16), torch.arange(16) // b
    for part in range(passes):
        runtime.seed_everything(0, 0, part)
        noise[:, part * b : (part + 1) * b, part * b : (part + 1) * b] = torch.rand(2, b, b)
    not_drawn, elsewhere = model.not_drawn, part_of[:, None] != part_of
    model.not_drawn = lambda similarity, same: not_drawn(similarity, same | elsewhere)
    losses = model(next(large.batches()) | {"negative_noise": noise})
    model.total(losses).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {"itc", "itm", "mlm"} <= losses.keys() and grads.keys() == seen[0].keys() - {"lr"}
    for name, gradient in grads.items():
        torch.testing.assert_close(seen[0][name], gradient, atol=2e-6, rtol=1e-4, msg=name)
    row = read_log(tmp_path / "run")[0]
    for name, loss in losses.items():
        assert float(row[name]) == pytest.approx(loss.item(), rel=1e-4), name


def test_the_gradient_is_clipped_by_its_norm_over_all_parameters(data, tmp_path):
    """The direction stays, the length is the limit; a short gradient is left alone; the log tells the length before."""
    free, clipped = new_run(data, tmp_path / "free", "--clip", "1e9"), new_run(data, tmp_path / "c", "--clip", "0.01")
    whole, short = gradients(free), gradients(clipped)
    free.train(stop_at=1)
    clipped.train(stop_at=1)
    names = whole[0].keys() - {"lr"}

    def length(grads: dict) -> float:
        return math.sqrt(sum(grads[name].double().square().sum().item() for name in names))

    before = length(whole[0])
    assert before > 0.1
    assert length(short[0]) == pytest.approx(0.01, rel=1e-3)
    for name in names:
        assert torch.allclose(short[0][name], whole[0][name] * (0.01 / before), atol=1e-7, rtol=1e-3), name
    for out in ("free", "c"):
        assert float(read_log(tmp_path / out)[0]["grad_norm"]) == pytest.approx(before, rel=1e-4)


def test_the_teacher_moves_once_per_step_of_the_optimiser(data, tmp_path):
    """After the step, with the new student, however many passes were accumulated."""
    run = new_run(data, tmp_path, "--accumulate", "3", "--ema", "0.75", "--lr", "0.05")
    before = {name: value.clone() for name, value in run.model.teacher.state_dict().items()}
    run.train(stop_at=1)
    student = run.model.student.state_dict()
    assert not same(before, dict(student))
    for name, value in run.model.teacher.state_dict().items():
        assert torch.allclose(value, 0.75 * before[name] + 0.25 * student[name], atol=1e-6), name


def test_training_learns(data, tmp_path):
    """The loop descends: after 60 steps the batch's contrast and the words are far better than at the start."""
    more = "--steps 60 --batch-size 8 --lr 0.01 --log-every 10 --objective control"
    new_run(data, tmp_path, *more.split()).train()
    rows = read_log(tmp_path)
    assert float(rows[-1]["mlm"]) < 0.6 * float(rows[0]["mlm"])
    assert float(rows[-1]["itc"]) < 0.8 * math.log(8)


# ------------------------------------------------------------------------------------------------ files of a run folder


def test_a_run_folder_holds_config_log_and_checkpoint(data, tmp_path):
    """Every option and size is in config.json; each row of the log has every loss, lr, speed and memory."""
    run = new_run(data, tmp_path, "--lr", "0.003")
    run.train(stop_at=3)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "log.csv", "checkpoint.pt"}
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["train"].keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    assert config["model"].keys() == {field.name for field in dataclasses.fields(MAMOConfig)}
    assert config["train"]["lr"] == 0.003 and config["model"]["image_size"] == [16, 24]
    with open(tmp_path / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {"step", "lr", *LOSSES, "target_cosine", "grad_norm", "temperature", "pairs_per_s", "peak_memory_mb"}
    assert rows[0].keys() == columns
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert all(float(row["pairs_per_s"]) > 0 for row in rows)
    assert 50 < float(rows[-1]["peak_memory_mb"]) < 100_000


def test_a_log_row_is_the_mean_since_the_last(data, tmp_path):
    """Nine steps logged one by one and three by three tell the same."""
    new_run(data, tmp_path / "each").train()
    new_run(data, tmp_path / "third", "--log-every", "4").train()
    each, third = read_log(tmp_path / "each"), read_log(tmp_path / "third")
    assert [row["step"] for row in third] == ["4", "8", "9"]
    for row, part in zip(third, (each[:4], each[4:8], each[8:]), strict=True):
        for name in (*LOSSES, "grad_norm"):
            assert float(row[name]) == pytest.approx(sum(float(r[name]) for r in part) / len(part), rel=1e-4), name


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it():
    """A comparison starts its runs from a process that has held all of them."""
    held = bytearray(os.urandom(1)) * 2**30  # 1 GB
    program = "import torch, runtime; print(runtime.peak_memory_mb(torch.device('cpu')))"
    root = Path(runtime.__file__).parent
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert len(held) == 2**30 and 50 < float(ended.stdout) < 1000


def test_validation_is_logged_and_changes_nothing_in_training(data, tmp_path):
    """--val is evaluated every so many steps and at the end; the weights are those of a run without it."""
    val = write_squares(tmp_path / "other" / "val.jsonl", 12)
    more = ("--dropout", "0.1", "--ema", "0.9")
    new_run(data, tmp_path / "without", *more).train()
    run = new_run(data, tmp_path / "with", *more, "--val", str(val), "--eval-every", "4")
    assert len(run.val_rows) == 12 and len(run.rows) == 22
    run.train()
    assert same(checkpoint(tmp_path / "without")["model"], checkpoint(tmp_path / "with")["model"])
    rows = [row for row in read_log(tmp_path / "with") if "val_i2t_r1" in row]
    assert [row["step"] for row in rows] == ["4", "8", "9"]
    for row in rows:
        for name in ("val_i2t_r1", "val_t2i_r1"):
            assert 12 * float(row[name]) / 100 == pytest.approx(round(12 * float(row[name]) / 100), abs=1e-3)
    assert not any("val_i2t_r1" in row for row in read_log(tmp_path / "without"))


def test_a_validation_file_beside_the_data_is_found(tmp_path):
    """The built-in world needs no --val."""
    data = write_squares(tmp_path / "pairs_train.jsonl", 8)
    assert new_run(data, tmp_path / "one").val_rows == []
    write_squares(tmp_path / "pairs_val.jsonl", 5)
    assert len(new_run(data, tmp_path / "two").val_rows) == 5


def test_a_large_val_file_is_sampled_and_not_cut(data, tmp_path, capsys):
    """1,000 of 1,500 rows from all over the file, said once."""
    rows = [json.loads(line) | {"place": n} for n, line in enumerate(data.read_text().splitlines() * 70)][:1500]
    val = write_rows(data.parent / "many_val.jsonl", rows)
    run = new_run(data, tmp_path, "--val", str(val))
    places = [row["place"] for row in run.val_rows]
    assert len(places) == len(set(places)) == 1000 and places == sorted(places)
    assert 300 < sum(place >= 1000 for place in places) < 370
    assert capsys.readouterr().out.count("1000 of 1500") == 1


def test_epochs_decide_the_steps(data, tmp_path):
    """22 rows make five batches of four; accumulated by two, an epoch is two steps and a half."""
    assert new_run(data, tmp_path / "one", "--epochs", "2").config.steps == 10
    run = new_run(data, tmp_path / "two", "--epochs", "2", "--accumulate", "2", "--log-every", "1")
    assert run.config.steps == 5
    run.train()
    assert len(read_log(tmp_path / "two")) == 5
    assert new_run(data, tmp_path / "three", "--epochs", "0.2").config.steps == 1


def test_several_files_are_trained_on_together(data, tmp_path):
    """--data takes more than one file, and the vocabulary knows the words of all."""
    write_squares(tmp_path / "two.jsonl", 3)
    rows = [{"image": f"pictures/0{i}.png", "caption": f"ein zebra nummer {i} zebra"} for i in range(3)]
    other = write_rows(tmp_path / "two.jsonl", rows)
    run = train.start(*parse(options(data, tmp_path / "out", "--data", str(data), str(other))))
    assert len(run.rows) == 25
    assert "zebra" in run.tokenizer.vocab and "square" in run.tokenizer.vocab


def test_a_vocabulary_file_is_taken_as_it_is(data, tmp_path):
    """--vocab is for BERT's own vocab.txt; the run keeps it in the checkpoint."""
    words = ["[MASK]", "[PAD]", "[UNK]", "a", "square", "[CLS]", "red", "[SEP]"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    run = new_run(data, tmp_path / "out", "--vocab", str(tmp_path / "vocab.txt"))
    assert run.tokenizer.vocab == words
    assert run.model.config.vocab_size == 8 and run.model.config.mask_id == 0
    assert run.model.config.special_ids == (0, 1, 2, 5, 7)
    run.train(stop_at=1)
    assert checkpoint(tmp_path / "out")["vocab"] == words
    with pytest.raises(ValueError, match=r"cannot read the vocabulary .*none\.txt"):
        new_run(data, tmp_path / "other", "--vocab", str(tmp_path / "none.txt"))


def test_captions_that_are_cut_are_told(data, tmp_path, capsys):
    """Silent truncation has cost others their results."""
    new_run(data, tmp_path / "one")
    assert "lose their end" not in capsys.readouterr().out
    new_run(data, tmp_path / "two", "--max-tokens", "9")
    rows = read_rows([data], "pairs")
    long = sum(isinstance(row["caption"], list) for row in rows)  # each such row has one caption of twelve tokens
    assert f"{long} texts are longer than max_tokens 9" in capsys.readouterr().out


def test_the_start_tells_what_a_model_that_knows_nothing_would_score(data, tmp_path, capsys):
    """A loss is read beside its chance level: ln 4 for a batch of four."""
    run = new_run(data, tmp_path)
    said = capsys.readouterr().out
    assert "itc 1.39" in said and "itm 0.64" in said
    assert f"mlm {math.log(run.model.config.vocab_size):.2f}" in said


# ---------------------------------------------------------------------------------------------- ablations, objectives


@pytest.mark.parametrize("off", LOSSES)
def test_a_loss_of_weight_0_is_not_made_and_its_checkpoint_loads(data, tmp_path, off):
    """Each ablation trains; log and checkpoint do not mention the loss; eval.py builds the same model from the file."""
    run = new_run(data, tmp_path, f"--w-{off}", "0")
    run.train(stop_at=2)
    assert off not in read_log(tmp_path)[0] and set(LOSSES) - {off} <= read_log(tmp_path)[0].keys()
    state = checkpoint(tmp_path)
    assert not any(name.startswith((f"{off}_", f"loss_{off}")) for name in state["model"])
    model, tokenizer, _ = load_model(tmp_path / "checkpoint.pt", torch.device("cpu"))
    assert same(dict(model.state_dict()), dict(run.model.state_dict()))
    assert model.config == run.model.config and tokenizer.vocab == run.tokenizer.vocab
    assert not model.training


def test_the_control_has_no_teacher(data, tmp_path):
    """ITC, ITM and MLM alone: neither teacher nor masked patches are paid for."""
    run = new_run(data, tmp_path, "--objective", "control")
    run.train(stop_at=2)
    assert run.model.teacher is None and run.model.student.image.mask_token is None
    assert not any("teacher" in name for name in checkpoint(tmp_path)["model"])
    assert [name for name in LOSSES if name in read_log(tmp_path)[0]] == ["itc", "itm", "mlm"]
    model, _, state = load_model(tmp_path / "checkpoint.pt", torch.device("cpu"))
    assert state["objective"] == "control" and model.teacher is None


# ------------------------------------------------------------------------------------------------------- command line


def test_help_lists_every_option_with_its_words_and_default(capsys):
    """The dataclasses are the command line: a field that is not in --help cannot be used."""
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    listed = re.sub(r"\s", "", capsys.readouterr().out)
    count = 0
    for config in (TrainConfig, MAMOConfig):
        comments = runtime.field_comments(config)
        for field in dataclasses.fields(config):
            name = f"--{field.name.replace('_', '-')}"
            if field.name in ("vocab_size", "mask_id", "special_ids"):
                assert f"{name}" not in listed
                continue
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            words = comments[field.name].replace("%%", "%")
            assert len(words) > 5
            expected = f"{words} [{runtime.shown(default)}]".replace(" ", "")
            assert name in listed and expected in listed, field.name
            count += 1
    assert count > 40


def test_options_arrive_with_their_types():
    """Numbers, texts, lists and switches; what is not given keeps its default, sizes the preset's."""
    config, sizes = parse(
        ["--lr", "3e-4", "--steps", "7", "--data", "a", "b", "--skip-bad", "--image-size", "32", "64", "--w-mim", "0.5"]
    )
    assert config == TrainConfig(lr=3e-4, steps=7, data=["a", "b"], skip_bad=True)
    assert {name: tuple(v) if name == "image_size" else v for name, v in sizes.items()} == {
        "image_size": (32, 64),
        "w_mim": 0.5,
    }
    assert parse(["--no-skip-bad"])[0] == TrainConfig() and parse([])[1] == {}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--batchsize", "--batch-size"),
        ("--epoch-s", "--epochs"),
        ("--w-mrn=3", "--w-mrm"),
        ("--image_size", "--image-size"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(capsys, given, meant):
    """Nothing is ignored in silence."""
    with pytest.raises(SystemExit) as end:
        parse([given, "3"])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert f"unknown option {given}" in errors and f"did you mean {meant}?" in errors


def test_boxes_that_cannot_be_cut_are_one_sentence(data, tmp_path, monkeypatch, capsys):
    """A width of 20 is fine for patches of 4, not for eighths; one of 24 trains."""
    for width, code in (("20", 2), ("24", 0)):
        more = ("--patch-size", "4", "--image-size", "16", width, "--augment", "boxes", "--steps", "2")
        given = options(data, tmp_path / width, *more)
        assert command(monkeypatch, train.main, *given) == code
        errors = capsys.readouterr().err
        said = "error: --augment boxes cuts pictures into eighths, their width is 20: use a multiple of 8"
        assert "Traceback" not in errors and (said in errors) == (code == 2)


def test_an_unknown_option_that_resembles_none_is_told(capsys):
    """No suggestion is better than a wild one."""
    with pytest.raises(SystemExit):
        parse(["--xyzzy"])
    assert "unknown option --xyzzy: see --help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--preset huge", "unknown preset 'huge': use one of nano, tiny, small, base"),
        ("--objective clip", "unknown objective 'clip': use one of mamo, control"),
        (
            "--augment flip",
            "unknown augment 'flip': use one of none, photo, photo-strong, aerial, aerial-strong, drawing, boxes",
        ),
        ("--check some", "unknown check 'some': use one of none, header, full"),
        ("--batch-size 1", "batch_size is 1: contrast and matching need at least 2 pairs"),
        ("--clip -1", "clip is -1.0: give 1e-12 or more"),
        ("--weight-decay -5", "weight_decay is -5.0: give 0 or more"),
        ("--lr-end -9", "lr_end is -9.0: give 0 to 1"),
        ("--epochs -3", "epochs is -3.0: give 0 or more"),
        ("--warmup 2", "warmup is 2.0: give 0 to 1"),
        ("--beta2 1.5", "beta2 is 1.5: give 0 to 0.999999999"),
        ("--workers -1", "workers is -1: give 0 or more"),
        ("--parts -1", "parts is -1: give 0 or more"),
        ("--lr -1", "lr is -1.0: give 0 or more"),
        ("--dropout 1", "dropout is 1.0: give a share from 0 to below 1"),
        ("--width 0", "width is 0: it must be at least 1"),
        ("--max-tokens -1", "max_tokens is -1: it must be at least 2"),
        ("--embed-dim 100000000000", "embed_dim is 100000000000: it must be at least 1, and at most 32768"),
        ("--text-heads 3", "width 16 must be a multiple of text_heads (3)"),
        ("--batch-size 23", "batch of 23 pairs is larger than the 22 rows"),
        ("--image-size 250 256 --patch-size 16", "image_size 250 is not a multiple of patch_size 16: use 240 or 256"),
        ("--width 18 --heads 4", "width 18 must be a multiple of heads"),
        ("--mask-image 1", "mask_image is 1.0: give a share between 0 and 1"),
        ("--w-itc 0 --w-itm 0 --w-mrm 0 --w-mim 0 --w-mlm 0", "weight"),
        ("--image-size 250 200 --patch-size 16", "image_size 250 is not a multiple of patch_size 16: use 240 or 256"),
        ("--image-size 16 24 3", "image_size"),
        ("--image-size 0 24", "picture"),
        ("--patch-size 0", "patch_size"),
        ("--image-size 16 16 --patch-size 16", "patch"),
        ("--heads 0", "heads"),
        ("--steps 0", "steps is 0"),
        ("--accumulate 0", "accumulate is 0"),
        ("--log-every 0", "log_every is 0"),
        ("--eval-every 0", "eval_every is 0"),
        ("--save-every 0", "save_every is 0"),
        ("--seed -1", "seed is -1"),
        ("--dropout 2", "dropout"),
        ("--position-scale 0", "position_scale is 0.0: it must be above 0, and at most 32768"),
        ("--device abacus", "device abacus is not available here: use auto, or one of"),
        ("--data none.jsonl", "none.jsonl is not a file"),
        ("--val none.jsonl", "none.jsonl is not a file"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_writes_nothing(data, tmp_path, monkeypatch, capsys, more, says):
    """Exit status 2, what was got, what was expected; no traceback and no empty run folder."""
    assert command(monkeypatch, train.main, *options(data, tmp_path / "out", *more.split())) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and says in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_number_as_image_size_is_a_square_or_one_sentence(data, tmp_path):
    """Many will type it so."""
    try:
        assert new_run(data, tmp_path, "--image-size", "24").model.config.image_size == (24, 24)
    except ValueError as error:
        assert "image_size" in str(error)


def test_a_run_folder_that_cannot_be_made_is_one_sentence(data, tmp_path, monkeypatch, capsys):
    """A file stands where a folder is asked for."""
    assert command(monkeypatch, train.main, *options(data, data / "run")) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and str(data) in errors


def test_a_damaged_checkpoint_is_not_resumed_and_not_replaced(data, tmp_path):
    """The user decides what becomes of it."""
    new_run(data, tmp_path).train(stop_at=1)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a whole checkpoint"):
        resumed_run(tmp_path)
    assert path.stat().st_size == 1000


def test_the_smallest_batch_trains(data, tmp_path):
    """Two pairs have one negative each way."""
    new_run(data, tmp_path, "--batch-size", "2").train(stop_at=3)
    assert len(read_log(tmp_path)) == 3


@pytest.mark.parametrize("workers", ["0", "1"])
def test_pictures_that_break_off_are_named_in_the_middle_of_training(tmp_path, monkeypatch, capsys, workers):
    """The header of the picture was fine: one sentence says which file it is, with workers too."""
    data = write_squares(tmp_path / "pairs.jsonl", 8)
    broken = tmp_path / "pictures" / "05.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    more = ("--batch-size", "8", "--workers", workers)
    assert command(monkeypatch, train.main, *options(data, tmp_path / "out", *more)) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert re.match(r"error: .*05\.png cannot be decoded", errors.rstrip().splitlines()[-1])


def test_a_run_is_repeated_from_its_config(data, tmp_path):
    """The same losses; what is given beside it is another's; what is not this run's is refused."""
    more = ("--objective", "glscl", "--width", "12", "--heads", "2", "--epochs", "1", "--lr", "1e-3")
    first = new_run(data, tmp_path / "one", *more)
    first.train()
    told = ["--config", str(tmp_path / "one" / "config.json"), "--out"]
    again = train.start(*train.parse([*told, str(tmp_path / "two")]))
    again.train()
    assert same(first.model.state_dict(), again.model.state_dict())
    assert read_log(tmp_path / "one") == read_log(tmp_path / "two")
    config, shape = train.parse([*told, "three", "--seed", "7", "--steps", "5", "--w-itc", "2"])
    assert (config.seed, config.steps, config.epochs, config.objective) == (7, 5, 0, "glscl") and shape["w_itc"] == 2
    with pytest.raises(ValueError, match="leave --preset out"):
        train.parse([*told, "three", "--preset", "tiny"])
    with pytest.raises(ValueError, match=r"run of train\.py: repeat it with that"):
        finetune.parse(["vqa", *told, "three"])
    with pytest.raises(ValueError, match=r"is not the config\.json of a run"):
        train.parse(["--config", str(data), "--out", "three"])


def test_the_teacher_is_evaluated_in_place_of_the_student(data, tmp_path, monkeypatch):
    """Its weights decide, under a name of its own; where there is none, a sentence."""
    for objective in ("mamo", "vlmae", "control"):
        ema = () if objective == "control" else ("--ema", "0.9")
        run = new_run(data, tmp_path / objective, "--objective", objective, "--steps", "2", *ema)
        run.train()
        monkeypatch.setattr(sys, "argv", ["eval.py", "foils", "--teacher", "--checkpoint", f"{run.out}/checkpoint.pt"])
        if objective == "control":
            with pytest.raises(ValueError, match="has no teacher: only pre-training with mamo or vlmae"):
                evaluation.load_for(evaluation.parse(), torch.device("cpu"))
            continue
        model, _ = evaluation.load_for(evaluation.parse(), torch.device("cpu"))
        part, student = (
            (one.student if objective == "mamo" else one.student.image).state_dict() for one in (model, run.model)
        )
        assert same(part, run.model.teacher.state_dict()) and not same(part, student)
    arguments = ["retrieval", "--teacher", "--data", data, "--checkpoint", tmp_path / "mamo" / "checkpoint.pt"]
    assert command(monkeypatch, evaluation.main, *arguments) == 0
    assert f"retrieval {data}, teacher" in json.loads((tmp_path / "mamo" / "results.json").read_text())


def test_matching_has_no_weight_that_nothing_held_out_gave_it(data, tmp_path):
    """Without val, or with the training rows as val, a gallery is ranked by contrast alone."""
    for more in ((), ("--val", str(data))):
        run = new_run(data, tmp_path / f"run{len(more)}", "--steps", "1", *more)
        run.train()
        assert run.model.matching_weight == 0 == checkpoint(run.out)["matching_weight"]
