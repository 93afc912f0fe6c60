"""The page of one step: it shows the source that ran, what its lines made, and the numbers that the losses compare."""

import base64
import inspect
import json
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_batch, tiny_objective
from helpers import SIZES, new_run, write_squares

import mamo
from mamo import MAMO, normalised
from siblings import OBJECTIVES
from tokenizer import Tokenizer
from tools import trace

WORDS = Tokenizer.build([])


def made(name: str = "mamo") -> tuple:
    """A small model of an objective and a batch for it, with words."""
    special = {"vocab_size": len(WORDS), "mask_id": WORDS.mask_id, "special_ids": WORDS.special_ids}
    model = tiny_objective(name, **special)
    return model, tiny_batch(model.config)


def bytes_of(text: str) -> np.ndarray:
    """As the page reads them: from -1 to 1."""
    return (np.frombuffer(base64.b64decode(text), dtype=np.uint8).astype(float) - 127) / 127


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_the_same_watched_or_not(name):
    """Losses, and the gradient; the model itself is left as it was, and so is the hook."""
    model, batch = made(name)
    before, hook = {key: value.clone() for key, value in model.state_dict().items()}, sys.gettrace()
    shot, functions = trace.snapshot(model, batch, WORDS)
    assert sys.gettrace() is hook
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    losses = model.train()(batch)
    rows = {
        row[0]: row[1]
        for one in shot["beside"][f"{type(model).__name__}.forward"]
        if one["kind"] == "losses"
        for row in one["rows"]
    }
    assert rows == {key: pytest.approx(loss.item(), abs=1e-4) for key, loss in losses.items()}
    model.total(losses).backward()
    norms = {row[0]: row[1] for row in shot["gradients"]}
    squares = sum(p.grad.square().sum().item() for p in model.student.text.words.parameters())
    assert norms["student.text.words"] == pytest.approx(squares**0.5, abs=1e-3)
    assert f"{type(model).__name__}.forward" in functions and {f"loss_{key}" for key in losses} <= {
        key.rpartition(".")[2] for key in functions
    }


def test_values_stand_at_the_lines_that_made_them():
    """Of MAMO.forward: the last line of the statement that assigns a name."""
    model, batch = made()
    shot, functions = trace.snapshot(model, batch, WORDS)
    source = trace.source_of(functions["MAMO.forward"])
    lines = dict(enumerate(source["lines"], source["first"]))
    where = {name: line for line, values in shot["values"]["MAMO.forward"].items() for name, _ in values}
    for name, code in (
        ("words", "words = mask_words("),
        ('image["masked"]', "image, text = self.encode_whole_and_masked("),
        ('seen["fused"]', "seen = self.teach("),
        ('losses["mrm"]', 'losses["mrm"] = '),
        ("returns", "return losses"),
        ("batch", "def forward"),
    ):
        assert code in lines[where[name]], name
    values = dict(shot["values"]["MAMO.forward"][where['losses["itc"]']])
    assert values['losses["itc"]']["shape"] == [] and values["similarity"]["shape"] == [len(batch["images"])] * 2
    assert source["lines"] == inspect.getsource(MAMO.forward).splitlines() and source["file"] == "mamo.py"
    several = trace.statements_of(functions["VisionLanguageModel.matching_views"])
    assert len(set(several.values())) < len(several), "a statement of several lines has one place"


def test_the_numbers_of_mrm_are_the_students_and_the_teachers():
    """At each hidden patch, worked out anew: the page's strips, its first numbers and its distances."""
    model, batch = made()
    shot, _ = trace.snapshot(model, batch, WORDS)
    one, at_words = (part for part in shot["beside"]["MAMO.loss_mrm"] if part["kind"] == "compared")
    model.train()
    images, texts, real = batch["images"], batch["input_ids"], batch["attention_mask"]
    index, mask = model.mask_image(batch["patch_noise"])
    assert one["patches"] == index[: trace.SAMPLES].tolist()
    ours = model.mrm_image_head(
        model.fuse(model.encode_image(images, mask), model.encode_text(texts, real), real).image[:, 1:]
    )
    teacher = model.teacher
    whole = teacher.fusion(teacher.image(images), teacher.text(texts, real), real).image[:, 1:]
    ours, target = (
        torch.stack([row[places] for row, places in zip(part, index, strict=True)])[: trace.SAMPLES]
        for part in (ours, normalised(whole))
    )
    np.testing.assert_allclose(one["distance"], (ours - target).square().mean(dim=2).detach(), atol=1e-3)
    np.testing.assert_allclose(one["first"][0], ours[..., :6].detach(), atol=1e-3)
    np.testing.assert_allclose(one["first"][1], target[..., :6], atol=1e-3)
    most = max(ours.abs().max().item(), target.abs().max().item())
    np.testing.assert_allclose(bytes_of(one["target"]), target.flatten() / most, atol=1 / 127)
    assert one["sources"] == ("MAMO.teach", "normalised")
    noise = batch["token_noise"], batch["replace_noise"]
    words = mamo.mask_words(texts, real, *noise, model.config.mask_text, model.config)
    said = [
        [WORDS.vocab[i] if v else "" for i, v in zip(*row, strict=True)]
        for row in zip(words.labels, words.valid, strict=True)
    ]
    assert at_words["words"] == said[: trace.SAMPLES]


@pytest.mark.parametrize("name", ["mamo", "maskvlm", "vlmae"])
def test_the_distances_shown_are_those_that_the_loss_takes_the_mean_of(name, monkeypatch):
    """Absolute for MIM, squared for MRM, and so on: over a whole batch their mean is the loss."""
    model, batch = made(name)
    monkeypatch.setattr(trace, "SAMPLES", len(batch["images"]))
    shot, _ = trace.snapshot(model, batch, WORDS)
    losses = {row[0]: row[1] for ones in shot["beside"].values() for one in ones if one["kind"] == "losses"
              for row in one["rows"]}  # fmt: skip
    shown = 0
    for loss, ones in shot["beside"].items():
        means = []
        for one in (one for one in ones if one["kind"] == "compared"):
            distance = np.array(one["distance"])
            real = np.array(one["words"]) != "" if "words" in one else np.ones_like(distance, bool)
            means.append(distance[real].mean())
        if means:
            assert losses[loss.rpartition(".loss_")[2]] == pytest.approx(sum(means), abs=2e-3), loss
            shown += 1
    assert shown == (1 if name == "maskvlm" else 2)


def test_hidden_words_and_guesses_are_those_of_the_batch():
    model, batch = made()
    shot, _ = trace.snapshot(model, batch, WORDS)
    beside = {one["kind"]: one for ones in shot["beside"].values() for one in ones}
    config = model.config
    words = mamo.mask_words(
        batch["input_ids"],
        batch["attention_mask"],
        batch["token_noise"],
        batch["replace_noise"],
        config.mask_text,
        config,
    )
    for row, tokens in enumerate(beside["words"]["rows"]):
        chosen = {place for place, token in enumerate(tokens) if token[2]}
        assert chosen == set(words.index[row][words.valid[row]].tolist())
        assert [WORDS.vocab.index(token[1]) for token in tokens] == batch["input_ids"][row][: len(tokens)].tolist()
    for row, word, chance, best in beside["guesses"]["rows"]:
        assert word in [token[1] for token in beside["words"]["rows"][row] if token[2]]
        assert best[0][1] >= best[1][1] >= best[2][1] and 0 <= chance <= best[0][1] + 1e-4


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0", "2", "--variants", "all"],
        ["--steps", "1", "--train", f"{SIZES} --batch-size 4 --objective vlmae"],
        ["--checkpoint"],
    ],
)
def test_the_command_writes_one_page(tmp_path, monkeypatch, capsys, arguments):
    """Of a checkpoint, or of short runs: each variant has each step, and only without the stop-gradient the target does
    not stay behind."""
    data = write_squares(tmp_path / "pairs.jsonl", 8)
    if arguments == ["--checkpoint"]:
        new_run(data, tmp_path / "run", "--steps", "1").train()
        arguments = ["--checkpoint", str(tmp_path / "run" / "checkpoint.pt")]
    elif "--train" not in arguments:
        arguments = [*arguments, "--train", f"{SIZES} --batch-size 4"]
    out = tmp_path / "new" / "trace.html"
    monkeypatch.setattr(sys, "argv", ["trace", *arguments, "--data", str(data), "--out", str(out)])
    trace.main()
    page = out.read_text(encoding="utf-8")
    assert "REPORT_AS_JSON" not in page and "PAGES_" not in page and str(out) in capsys.readouterr().out
    report = json.loads(page.split('id="report">')[1].split("</script>")[0])
    assert report["order"][0].endswith(".forward") and set(report["order"]) == set(report["sources"])
    if "all" in arguments:
        assert [(one["variant"], one["step"]) for one in report["shots"]] == [
            (name, step) for name in trace.VARIANTS for step in (0, 2)
        ]
        totals = {one["variant"]: one["total"] for one in report["shots"] if one["step"] == 0}
        assert (
            totals["as it is"]
            == totals["momentum 0"]
            == totals["momentum 1"]
            == totals["no stop-gradient"]
            > totals["without MIM and MLM"]
            > totals["MRM alone"]
        )
        norm = {
            one["variant"]: dict(row[:2] for row in one["gradients"]) for one in report["shots"] if one["step"] == 0
        }
        assert norm["as it is"] == norm["momentum 0"] != norm["no stop-gradient"]


def test_what_cannot_be_traced_is_one_sentence(tmp_path, monkeypatch):
    data = str(write_squares(tmp_path / "pairs.jsonl", 3))
    for given, says in (
        (["--data", data], "give at least 4 rows with pictures"),
        (["--variants", "none"], "unknown variant 'none'"),
        (["--steps", "-1"], "give 0 or more"),
    ):
        monkeypatch.setattr(sys, "argv", ["trace", *given, "--out", str(tmp_path / "t.html")])
        with pytest.raises(ValueError, match=says):
            trace.main()
