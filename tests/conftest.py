"""What the tests share: a very small model, batches of random but valid pairs, and eval.py as a command."""

import dataclasses
import os
import sys

import pytest
import torch
from helpers import kept_signals
from torch import Tensor

import eval as evaluation
import runtime
from mamo import MAMO, MAMOConfig, VisionLanguageModel
from siblings import OBJECTIVES

# The models of the tests are so small that a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def signals():
    """Ctrl-C ends the tests as ever, although a training run takes the signals over."""
    with kept_signals():
        yield


def pytest_collection_modifyitems(config, items):
    """HALF=0 and HALF=1 select every other file: `make test` runs both halves at once, one on each of two cores."""
    if "HALF" in os.environ:
        files = list(dict.fromkeys(item.path for item in items))
        chosen = files[int(os.environ["HALF"]) :: 2]
        config.hook.pytest_deselected(items=[item for item in items if item.path not in chosen])
        items[:] = [item for item in items if item.path in chosen]


# Special ids that are neither the first ones nor neighbours, so that code which only works for 0 to 4 fails.
PAD, CLS, SEP, UNK, MASK = 0, 2, 3, 7, 11
VOCAB = 40
ORDINARY = [i for i in range(VOCAB) if i not in (PAD, CLS, SEP, UNK, MASK)]
LOSSES = ("itc", "itm", "mrm", "mim", "mlm")


# 4 rows and 6 columns of patches: higher than wide or wider than high is not the same.
TINY = {"image_size": (16, 24), "patch_size": 4, "max_tokens": 16, "width": 16, "heads": 2, "embed_dim": 8}
TINY |= {"image_depth": 2, "text_depth": 2, "fusion_depth": 2}
TINY |= {"vocab_size": VOCAB, "mask_id": MASK, "special_ids": (PAD, CLS, SEP, UNK, MASK)}


def tiny_config(**changes) -> MAMOConfig:
    """A very small MAMO."""
    return MAMOConfig(**(TINY | {"ema": 0.9} | changes))


def tiny_objective(name: str, seed: int = 0, noise: float = 0.15, **changes) -> VisionLanguageModel:
    """A very small model of any objective, in training mode, moved by noise as tiny_model."""
    model, fixed = OBJECTIVES[name]
    teacher = {"ema": 0.9} if any(field.name == "ema" for field in dataclasses.fields(model.config_class)) else {}
    torch.manual_seed(seed)
    return moved(model(model.config_class(**(TINY | fixed | teacher | changes))).train(), noise)


def only(*losses: str) -> dict[str, float]:
    """Weights that switch on the named losses and no other."""
    return {f"w_{name}": float(name in losses) for name in LOSSES}


def tiny_model(config: MAMOConfig | None = None, seed: int = 0, noise: float = 0.15) -> MAMO:
    """A model in training mode, every parameter of student and teacher moved by random noise.

    A fresh model has many zeros and a teacher equal to its student: swapped type embeddings, a forgotten bias or the
    student in the teacher's place would not show.
    """
    torch.manual_seed(seed)
    return moved(MAMO(config or tiny_config()).train(), noise)


def moved(model: torch.nn.Module, noise: float = 0.15):
    """The model, with noise added to every parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def tiny_batch(config: MAMOConfig, b: int = 5, l: int = 11, seed: int = 0) -> dict[str, Tensor]:  # noqa: E741
    """b random pairs of l tokens, with all noise; the first caption fills the row, the second has a single word.

    Every third caption has an [UNK] among its words. Images and captions are all different.
    """
    draw = torch.Generator().manual_seed(1000 * seed + 10 * b + l)
    input_ids, captions = torch.full((b, l), PAD), set()
    while len(captions) < b:
        i = len(captions)
        words = {0: l - 2, 1: 1}.get(i, int(torch.randint(1, l - 1, (), generator=draw)))
        caption = torch.tensor(ORDINARY)[torch.randint(len(ORDINARY), (words,), generator=draw)]
        if i % 3 == 2 and words > 2:
            caption[1] = UNK
        if tuple(caption.tolist()) not in captions:
            captions.add(tuple(caption.tolist()))
            input_ids[i, 0], input_ids[i, 1 : words + 1], input_ids[i, words + 1] = CLS, caption, SEP
    return {
        "images": torch.rand(b, 3, *config.image_size, generator=draw) * 2 - 1,
        "input_ids": input_ids,
        "attention_mask": input_ids != PAD,
        "image_id": torch.randint(2**62, (b,), generator=draw),
        "caption_id": torch.randint(2**62, (b,), generator=draw),
        "patch_noise": torch.rand(b, config.num_patches, generator=draw),
        "token_noise": torch.rand(b, l, generator=draw),
        "replace_noise": torch.rand(b, l, generator=draw),
        "negative_noise": torch.rand(2, b, b, generator=draw),
    }


def make_same(batch: dict[str, Tensor], image: tuple = (), caption: tuple = ()) -> dict[str, Tensor]:
    """Of each two rows (i, j) named under image or caption, the second is given the first one's picture or text."""
    batch = {name: value.clone() for name, value in batch.items()}
    for i, j in image:
        batch["images"][j], batch["image_id"][j] = batch["images"][i], batch["image_id"][i]
    for i, j in caption:
        for name in ("input_ids", "attention_mask", "caption_id"):
            batch[name][j] = batch[name][i]
    return batch


def lengthen(batch: dict[str, Tensor], extra: int) -> dict[str, Tensor]:
    """The same pairs with extra padding tokens; their noise is small, so that they would be hidden if they could."""
    b = len(batch["input_ids"])
    added = {"input_ids": torch.full((b, extra), PAD), "attention_mask": torch.zeros(b, extra, dtype=torch.bool)}
    for name in ("token_noise", "replace_noise"):
        added[name] = torch.full((b, extra), 1e-3)
    return batch | {name: torch.cat([batch[name], value], dim=1) for name, value in added.items()}


def total(model: MAMO, losses: dict[str, Tensor]) -> Tensor:
    """The weighted sum that a trainer minimises."""
    return sum(weight * losses[name] for name, weight in model.config.loss_weights.items() if weight > 0)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run eval.py in this process -> exit status, what it said, its errors."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runtime.guarded(evaluation.main)
            sys.exit(0)
        return end.value.code, *capsys.readouterr()

    return run
