"""Lower precision, gradient checkpointing and compilation: the same run, up to the rounding that was asked for."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_batch, tiny_config, tiny_model
from helpers import new_run, read_log, same, write_squares
from torch._dynamo.utils import counters

import runtime
from mamo import MAMO, Attention

LOSSES = ("itc", "itm", "mrm", "mim", "mlm")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """22 pairs with captions of several lengths."""
    return write_squares(tmp_path_factory.mktemp("squares") / "pairs.jsonl", 22, twins=6, several=True)


# ------------------------------------------------------------------------------------------------------ lower precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_reaches_the_products_and_stays_out_of_the_losses(data, tmp_path, precision):
    """Products give half-precision numbers, parameters are fp32, and the first losses are nearly those of fp32.

    Later ones need not be: fp16 begins by skipping the steps for which its scale is too large.
    """
    seen = set()
    logs = {}
    for name in ("fp32", precision):
        run = new_run(data, tmp_path / name, "--precision", name, "--steps", "3")
        for module in run.model.modules():
            if name == precision and isinstance(module, Attention):
                module.query.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
        run.train()
        logs[name] = read_log(tmp_path / name)
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert seen == {runtime.PRECISIONS[precision]}
    ours, theirs = logs["fp32"][0], logs[precision][0]
    assert ours != theirs, "nothing was rounded: lower precision did not reach the step"
    for loss in LOSSES:
        assert float(theirs[loss]) == pytest.approx(float(ours[loss]), rel=0.03), loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fp32_islands_are_fp32(monkeypatch, dtype):
    """What reaches each loss is computed again outside of autocast: equal to the last bit, so nothing was rounded."""
    config = tiny_config()
    model, batch = tiny_model(config), tiny_batch(config, b=6)
    calls, found = {}, {}
    for name in ("loss_itc", "draw_negatives"):
        kept = getattr(model, name)

        def note(*given, kept=kept, name=name):
            calls.setdefault(name, []).append(given)
            result = kept(*given)
            found.setdefault(name, []).append(result)
            return result

        monkeypatch.setattr(model, name, note)
    with torch.autocast("cpu", dtype):
        losses = model(batch)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    image, text, *_ = calls["loss_itc"][0]
    assert image.dtype == text.dtype == torch.float32
    torch.testing.assert_close(image.norm(dim=1), torch.ones(6), rtol=0, atol=1e-6)
    assert torch.equal(MAMO.loss_itc(model, *calls["loss_itc"][0]), found["loss_itc"][0])
    assert torch.equal(calls["draw_negatives"][0][0], image.detach() @ text.detach().T)
    with torch.autocast("cpu", dtype):
        model.after_step()
    assert {p.dtype for p in model.teacher.parameters()} == {torch.float32}


def test_a_skipped_step_moves_neither_student_nor_teacher(data, tmp_path):
    """fp16 with a scale that makes the gradients overflow: the scale is halved until they do not, then training goes
    on; a resumed run knows the scale."""
    run = new_run(data, tmp_path / "run", "--precision", "fp16", "--steps", "40", "--ema", "0.5")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    batches = run.batches()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.one_step(batches)
    assert run.step == 1 and run.scaler.get_scale() == 2.0**99
    assert same(before, dict(run.model.state_dict())) and "grad_norm" not in run.meter
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run.one_step(batches)
    after = run.model.state_dict()
    for side in ("student", "teacher"):
        name = f"{side}.text.words.weight"
        assert not torch.equal(before[name], after[name]), side
    run.save()
    again = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert again["scaler"]["scale"] == 2.0**10


def test_a_gradient_that_is_never_finite_ends_the_run(data, tmp_path):
    """Halving the scale for ever would be a hang."""
    run = new_run(data, tmp_path / "run", "--precision", "fp16", "--steps", "40")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    next(iter(run.model.student.parameters())).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ValueError, match="the gradient is not finite at step 1"):
        run.one_step(run.batches())


def test_precision_is_chosen_and_explained(data, tmp_path, capsys):
    """auto is fp32 on a CPU; an unknown name is one sentence; the reason is printed."""
    assert runtime.pick_precision("auto", torch.device("cpu"))[0] == "fp32"
    assert "hundreds of times slower" in runtime.pick_precision("bf16", torch.device("cpu"))[1]
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        runtime.pick_precision("fp8", torch.device("cpu"))
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        new_run(data, tmp_path / "run", "--precision", "half")
    new_run(data, tmp_path / "run")
    assert "fp32: on cpu" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- memory and compilation


def test_keeping_memory_is_asked_for_in_the_safe_order(monkeypatch):
    """Both thresholds, the second only if the first was granted; elsewhere than on glibc nothing happens."""
    for granted in (2**30, 2**25, 0):
        asked = []

        class Library:
            @staticmethod
            def mallopt(what, value, asked=asked, granted=granted):
                asked.append((what, value))
                return int(value <= granted or what == -1)

        monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _, library=Library: library)
        runtime.keep_memory()
        tried = [(-3, 2**30)] + [(-3, 2**25)] * (granted < 2**30)
        assert asked == tried + [(-1, 2**31 - 1)] * (granted > 0)

    def missing(_):
        raise OSError("no such library")

    monkeypatch.setattr(runtime.ctypes, "CDLL", missing)
    runtime.keep_memory()


def test_gradient_checkpointing_changes_nothing_but_memory(data, tmp_path):
    """The same log and the same weights, with dropout, which must fall alike again; and fewer tensors are kept."""
    kept = {}
    for name, more in (("plain", []), ("again", ["--grad-checkpointing"])):
        run = new_run(data, tmp_path / name, "--dropout", "0.1", "--steps", "4", *more)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            run.train()
        kept[name] = sum(sizes)
    assert read_log(tmp_path / "plain") == read_log(tmp_path / "again")
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in kept]
    assert same(*states)
    assert kept["again"] < 0.6 * kept["plain"]


def test_the_step_compiles_once_and_without_a_break(data, tmp_path, monkeypatch):
    """One graph for all batches, whatever the length of their captions, and the same losses.

    The graph is run as it was traced; turning it into machine code is torch's business and takes long.
    """
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: compiled(self, backend="eager", **given))
    torch._dynamo.reset()
    counters.clear()
    new_run(data, tmp_path / "traced", "--compile", "--queue-size", "6", "--steps", "5").train()
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == 1
    new_run(data, tmp_path / "plain", "--queue-size", "6", "--steps", "5").train()
    for ours, theirs in zip(read_log(tmp_path / "plain"), read_log(tmp_path / "traced"), strict=True):
        for loss in LOSSES:
            assert float(theirs[loss]) == pytest.approx(float(ours[loss]), abs=1e-4), loss
