"""Damaged and foreign checkpoints: a model that works or one sentence, never a traceback; a changed bit is noticed."""

import copy
import os
import random
from pathlib import Path

import pytest
import torch
from helpers import kept_signals, new_run, resumed_run, write_squares

import runtime
from eval import load_model

ODD = [None, True, -1, 0, 3.5, float("nan"), 10**12, "", "vqa", [], [1], {}, {"a": 1}, torch.zeros(3), torch.tensor(1)]
CPU = torch.device("cpu")
COUNT = int(os.environ.get("FUZZ", "60"))  # inputs of each kind; thousands for a long run


@pytest.fixture(autouse=True)
def signals():
    """Ctrl-C ends the tests as ever, although a training run takes the signals over."""
    with kept_signals():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The content of a checkpoint in mid-run."""
    out = tmp_path_factory.mktemp("whole")
    new_run(write_squares(out / "pairs.jsonl"), out).train(stop_at=3)
    return torch.load(out / "checkpoint.pt", weights_only=True)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths to all parts of nested dicts and lists."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in parts for found in [(*path, key), *places(part, (*path, key))]]


def changed(state: dict, draw: random.Random) -> tuple[dict, str]:
    """A copy in which one part is something else, or missing; and what was done."""
    state = copy.deepcopy(state)
    *parents, last = draw.choice(
        [place for place in places(state) if draw.random() < 2 / len(place) ** 2] or [("step",)]
    )
    part = state
    for key in parents:
        part = part[key]
    if draw.random() < 0.2 and isinstance(part, dict):
        del part[last]
        return state, f"{[*parents, last]} is missing"
    new = draw.choice(ODD)
    if isinstance(part[last], torch.Tensor) and draw.random() < 0.5:
        new = draw.choice(
            [part[last][:1] if part[last].ndim else part[last][None], part[last].double(), part[last] * 2]
        )
    part[last] = new
    return state, f"{[*parents, last]} is {new!r:.60}"


def outcome(use, what: str) -> str:
    """What came of it: fine, or the sentence of a refusal."""
    try:
        use()
    except ValueError as error:
        assert len(str(error)) < 700 and "\n" not in str(error), f"{what}: not one sentence: {error}"
        return str(error)
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}")
    return "fine"


@pytest.mark.parametrize("kind", ["evaluated", "resumed"])
def test_a_checkpoint_with_a_foreign_part_works_or_is_refused_in_one_sentence(whole, tmp_path, kind):
    """Also the state of the optimiser: torch takes one of another length, and the process then dies."""
    draw, refused = random.Random(kind), 0
    for _ in range(COUNT):
        state, what = changed(whole, draw)
        torch.save(state, tmp_path / "checkpoint.pt")

        def use():
            if kind == "evaluated":
                model, tokenizer, _ = load_model(tmp_path / "checkpoint.pt", CPU)
                input_ids, attention_mask = tokenizer(["a red square"], model.config.max_tokens)
                model.score(torch.zeros(1, 3, *model.config.image_size), input_ids, attention_mask)
            else:
                run = resumed_run(tmp_path)
                run.config.save_every = 10**9
                run.train(stop_at=4)

        refused += outcome(use, what) != "fine"
        (tmp_path / "log.csv").unlink(missing_ok=True)
    assert refused > COUNT / 5, "nearly all were harmless: nothing is tested"


def test_a_flipped_bit_is_noticed(whole, tmp_path):
    """By the checksums that torch writes; a bit between the parts of the file may be of no consequence."""
    path, draw = tmp_path / "checkpoint.pt", random.Random(0)
    torch.save(whole, path)
    content, fine = path.read_bytes(), 0
    for _ in range(COUNT):
        place = draw.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        if outcome(lambda: runtime.load_checkpoint(path), f"a bit of byte {place}") == "fine":
            fine, loaded = fine + 1, runtime.load_checkpoint(path)
            same = all(torch.equal(value, whole["model"][name]) for name, value in loaded["model"].items())
            assert same and loaded["vocab"] == whole["vocab"], f"a bit of byte {place} went unnoticed"
    assert fine < COUNT / 2


@pytest.mark.parametrize("size", [0, 1, 100, 5000])
def test_a_file_that_is_cut_is_refused(whole, tmp_path, size):
    path = Path(tmp_path / "checkpoint.pt")
    torch.save(whole, path)
    path.write_bytes(path.read_bytes()[:size])
    assert outcome(lambda: runtime.load_checkpoint(path), "cut") != "fine"
