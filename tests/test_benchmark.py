"""The benchmark compares like with like, and its formula counts what a step does."""

import json
import re
from itertools import product

import pytest
import torch
from conftest import only, tiny_objective
from helpers import write_squares
from torch.utils.flop_counter import FlopCounterMode

import runtime
from mamo import MAMO, PRESETS, Encoders, FusionEncoder, record_attention
from siblings import OBJECTIVES
from tools import benchmark, costs
from tools.benchmark import random_batch, ratios, row_of
from tools.costs import flops_of_step

SIZES = {"image_size": (16, 16), "patch_size": 8, "width": 16, "heads": 2, "embed_dim": 8}
DEPTHS = {"image_depth": 1, "text_depth": 1, "fusion_depth": 1}
SMALL = "--image-size 16 24 --batch-size 4 --length 6 --vocab-size 40 --rounds 1 --threads 1 --device cpu"


def run(monkeypatch, *arguments: str) -> None:
    """tools/benchmark.py as the command line runs it, but with a very small model, short turns and small products."""
    monkeypatch.setitem(benchmark.PRESETS, "nano", SIZES | DEPTHS)
    monkeypatch.setattr("sys.argv", ["tools/benchmark.py", *arguments])
    monkeypatch.setattr(benchmark, "TURN", 0.01)
    monkeypatch.setattr(benchmark, "SIDE", 256)
    runtime.guarded(benchmark.main)


MAMOS = [
    only("itc", "itm", "mrm", "mim", "mlm"),
    only("itc"),
    only("itc", "itm"),
    only("itc", "itm", "mlm"),
    only("itc", "itm", "mrm", "mlm"),
    only("mim", "mlm"),
    only("mrm"),
    only("itc", "mim") | {"queue_size": 7},
    only("itc", "itm", "mlm") | {"queue_size": 7, "image_depth": 1, "fusion_depth": 3, "mask_image": 0.6},
    {"mask_both": True},
    {"drop_masked": True},
    only("mim", "mlm") | {"drop_masked": True, "mask_image": 0.6},
    {"mask_both": True, "w_itc": 0.0, "w_itm": 0.0},
    {"mim_target": "pixels", "w_mrm": 0.0},
]


COUNTED = [
    *product(["mamo"], MAMOS),
    ("control", {}),
    *product(["maskvlm"], [{}, {"w_mim": 0.0}, {"w_mlm": 0.0}, {"w_itm": 0.0, "mask_unit": 1, "decoder_depth": 1}]),
    *product(["glscl"], [{}, {"w_mltc": 0.0}, {"w_mgsc": 0.0}, {"w_mlm": 0.0}, {"w_mltc": 0.0, "w_mgsc": 0.0}]),
    *product(["vlmae"], [{}, {"w_rmim": 0.0}, {"w_ifr": 0.0}, {"w_itm": 0.0}, {"w_mlm": 0.0, "w_itc": 0.0}]),
]


def test_the_operations_of_every_objective_are_counted():
    """So that a new one cannot be forgotten here."""
    assert {objective for objective, _ in COUNTED} == set(OBJECTIVES)


@pytest.mark.parametrize(
    ("objective", "changes"),
    COUNTED,
    ids=lambda part: part if isinstance(part, str) else " ".join(f"{name}={value}" for name, value in part.items()),
)
def test_the_formula_counts_the_operations_that_torch_counts(objective, changes):
    """On the explicit attention path, because torch's counter sees nothing in the fused one of a CPU."""
    model = tiny_objective(objective, **changes)
    batch = random_batch(model.config, 5, 11)
    with record_attention(model), FlopCounterMode(display=False) as counter:
        model.total(model(batch)).backward()
    assert sum(flops_of_step(model.config, 5, 11).values()) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("objective", "changes"),
    [("control", {}), *(("mamo", some) for some in ({}, {"drop_masked": True}, {"mask_both": True}, {"w_mrm": 0.0}))],
)
def test_the_formula_of_memory_counts_what_torch_keeps_for_the_backward_pass(objective, changes):
    """Every storage once, parameters aside, to 3 %."""
    model_class, weights = OBJECTIVES[objective]
    config = model_class.config_class(**PRESETS["tiny"], **(weights | changes))
    model, kept = model_class(config).train(), {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor, so that its place is not given away
        return tensor

    batch = random_batch(config, 4, 20)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch)
    counted = costs.memory_of_step(config, 4, 20)
    assert losses and counted["activations"] == pytest.approx(sum(size for size, _ in kept.values()), rel=0.03)
    assert counted["weights"] == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_a_ratio_is_the_median_of_the_rounds():
    ratio = ratios({"a": [1.0, 2.0, 9.0], "b": [2.0, 2.0, 3.0]}, "a", "b")
    assert ratio == {"median": 1.0, "min": 0.5, "max": 3.0, "rounds": 3}


def test_utilisation_is_against_the_rate_of_the_same_round():
    """A machine at half its speed in the second round makes the step as well as the product slower."""
    row = row_of(8, {"student": 3 * 10**9, "teacher": 10**9}, seconds=[1.0, 2.0, 1.0], rates=[8e9, 4e9, 10e9])
    assert row["utilisation"] == {"median": 0.5, "min": 0.4, "max": 0.5}
    assert row["gflop"] == {"step": 4.0, "student": 3.0, "teacher": 1.0}
    assert (row["ms_per_step"], row["pairs_per_s"], row["product_gflop_per_s"]) == (1000, 8, 8)


def test_step_reports_every_variant_as_table_and_as_json(monkeypatch, capsys, tmp_path):
    out = tmp_path / "step.json"
    run(monkeypatch, "step", *SMALL.split(), "--grad-checkpointing", "--out", str(out))
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert {"command", "hardware", "date", "rounds", "device", "precision", "threads"} <= report.keys()
    mamo, control = report["rows"]
    assert (mamo["objective"], control["objective"], mamo["image_size"]) == ("mamo", "control", [16, 24])
    assert mamo["gflop"]["step"] > control["gflop"]["step"] > control["gflop"]["teacher"] == 0
    for row in report["rows"]:
        assert row["pairs_per_s"] == pytest.approx(4 * 1000 / row["ms_per_step"])
        rate = row["gflop"]["step"] / row["ms_per_step"] * 1000
        assert row["utilisation"]["median"] == pytest.approx(rate / row["product_gflop_per_s"])
        assert 0 < row["utilisation"]["median"] < 1 and row["peak_memory_so_far_mb"] > 0
        assert f"{row['ms_per_step']:.1f}" in printed
    name, ratio = "nano, batch 4: mamo / control", mamo["ms_per_step"] / control["ms_per_step"]
    assert report["ratios"].keys() == {name} and report["ratios"][name]["median"] == pytest.approx(ratio)
    assert all(f"{name}: {ratio['median']:.3f}" in printed for name, ratio in report["ratios"].items())
    formula = mamo["gflop"]["step"] / control["gflop"]["step"]
    assert report["by_formula"] == {name: pytest.approx(formula)}
    assert f"by formula {formula:.3f}" in printed and mamo["gflop_per_pair"] == mamo["gflop"]["step"] / 4


def test_a_variant_without_room_ends_itself_and_not_the_run(monkeypatch, capsys, tmp_path):
    """The larger batch fits at first and then no more, as on a GPU whose memory the other variants fill."""
    forward, calls = MAMO.forward, []

    def full(self, batch):
        calls.append(len(batch["images"]))
        if calls[-1] == 6 and len(calls) > 3:  # the first three are before the turns
            raise torch.OutOfMemoryError("no room")
        return forward(self, batch)

    monkeypatch.setattr(MAMO, "forward", full)
    out = tmp_path / "step.json"
    run(monkeypatch, "step", *SMALL.split(), "--batch-size", "6", "4", "--objectives", "mamo", "--out", str(out))
    report = json.loads(out.read_text())
    assert [row.get("error") for row in report["rows"]] == ["out of memory", None]
    assert "out of memory" in capsys.readouterr().out


class OtherFusion(FusionEncoder):
    """Somebody's own fusion."""


def test_operations_of_a_fusion_that_is_not_counted_are_not_quoted(monkeypatch, capsys, tmp_path):
    """Times are, and one sentence says why there is no more; the table of costs is refused as a whole."""
    monkeypatch.setattr("mamo.FusionEncoder", OtherFusion)
    assert "OtherFusion" in costs.uncounted(Encoders(costs.MAMOConfig()).fusion)
    out = tmp_path / "step.json"
    run(monkeypatch, "step", *SMALL.split(), "--out", str(out))
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    for row in report["rows"]:
        assert row["ms_per_step"] > 0 and "OtherFusion" in row["not_quoted"]
        assert not {"gflop", "gflop_per_pair", "utilisation"} & row.keys()
    assert len(report["ratios"]) == 1 and report["by_formula"] == {}
    assert printed.count("OtherFusion") == 1 and "by formula" not in printed
    monkeypatch.setattr("sys.argv", ["tools/costs.py"])
    with pytest.raises(SystemExit):
        runtime.guarded(costs.main)
    output = capsys.readouterr()
    assert not output.out and re.fullmatch(r"error: .*OtherFusion.*\n", output.err)


def test_agreement_is_exact_where_nothing_differs_and_seen_where_something_does(monkeypatch, tmp_path):
    """On a CPU the variants of half precision are left out: they take hundreds of times as long."""
    kinds = {"again": [], "other rate": ["--lr", "0.01"], "half": ["--precision", "bf16"]}
    monkeypatch.setattr(benchmark, "ANOTHER", kinds)
    data, out = write_squares(tmp_path / "pairs.jsonl"), tmp_path / "agreement.json"
    run(monkeypatch, "agreement", *SMALL.split(), "--data", str(data), "--out", str(out))
    again, other = json.loads(out.read_text())["rows"]
    assert again["relative difference"] == {"first step": 0, "largest of 20": 0}
    assert other["relative difference"]["first step"] == 0 < other["relative difference"]["largest of 20"]


def test_loader_reports_its_ratio(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "DATA", str(write_squares(tmp_path / "pairs.jsonl")))
    out = tmp_path / "ratios.json"
    run(monkeypatch, "loader", *SMALL.split(), "--out", str(out))
    report = json.loads(out.read_text())
    assert list(report) == ["command", "hardware", "date", "ratios"]
    assert all(ratio["rounds"] == 1 and ratio["median"] > 0 for ratio in report["ratios"].values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--presets huge", "huge"),
        ("--objectives mime", "mime"),
        ("--batch-size 8 1", "at least 2 pairs"),
        ("--image-size 20", "not a multiple of patch_size 8"),
        ("--length 0", "length is 0"),
        ("--vocab-size 5", "vocab_size is 5"),
        ("--rounds 0", "rounds is 0"),
        ("--precision int8", "unknown precision"),
        ("--rounds 3 --lenght 9", "did you mean --length"),
        ("loader --data nowhere.jsonl", "nowhere.jsonl"),
        ("loader --batch-size 4 8", "loader takes one of batch_size"),
    ],
)
def test_a_mistake_ends_with_one_sentence(arguments, words, monkeypatch, capsys):
    command = [] if arguments.startswith("loader") else ["step"]
    with pytest.raises(SystemExit):
        run(monkeypatch, *command, *SMALL.split(), *arguments.split())
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
