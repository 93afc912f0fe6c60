"""Fine-tune a pre-trained checkpoint on a downstream task: one command and one training loop for all five.

    python finetune.py vqa --init runs/demo/checkpoint.pt --data data/scenes/vqa
    python finetune.py reasoning --init runs/demo/checkpoint.pt --data my/train.jsonl --val my/val.jsonl --out runs/mine
    python finetune.py vqa --init none --data data/scenes/vqa             from scratch, for comparison
    python finetune.py vqa --init runs/demo/checkpoint.pt --freeze        a linear probe: the encoders are frozen
    python finetune.py retrieval --init runs/demo/checkpoint.pt --data data/full/pairs --image-size 64 64
    torchrun --nproc-per-node 8 finetune.py vqa ...                       the same run on eight GPUs

tasks.py defines the tasks and their losses. `--data data/scenes/vqa` is short for data/scenes/vqa_train.jsonl. The best
step is selected on vqa_val.jsonl in the same folder or, if there is none, on held-out groups of training rows.

The training loop is that of train.py: `start` below sets it up, and `FineTune` adds the selection of the best step. The
run folder contains config.json, log.csv, checkpoint.pt to resume from, and best.pt, the checkpoint to evaluate: the
weights of the step with the best score on val.
"""

import argparse
import dataclasses
import functools
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import runtime
from data import SCHEMAS, content_of, read_rows, sample_of
from eval import WEIGHTS, classify, retrieval
from mamo import Config
from metrics import cluster_of, right_label, score_answers
from tasks import (
    CAPTIONS,
    TASKS,
    HeadConfig,
    TaskCollate,
    TaskRows,
    adopt,
    answers_of,
    build_task,
    by_picture,
    coverage,
    encoders_of,
    head_of,
    read_as,
    texts_of,
)
from tokenizer import Tokenizer
from train import (
    FROM_TOKENIZER,
    POSITIVE,
    Run,
    TrainConfig,
    frames_for,
    make_optimizer,
    make_order,
    make_vocabulary,
    new_shape,
)


@dataclass
class FineConfig(TrainConfig):
    """All options of a fine-tuning run; options that train.py also has keep their meaning."""

    task: str = "vqa"  # retrieval, grounding, vqa, reasoning or entailment
    init: str = "runs/demo/checkpoint.pt"  # checkpoint to start from; none = train from scratch
    data: list[str] = dataclasses.field(default_factory=list)  # JSONL files, or X for X_train.jsonl and X_val.jsonl
    out: str = ""  # run folder; default: runs/ and the name of the task
    lr: float = 5e-4  # peak learning rate of the encoders
    lr_head: float = 2e-3  # peak learning rate of the head, and of all parameters when training from scratch
    steps: int = 2000  # optimiser steps
    val_share: float = 0.1  # fraction of training rows held out if there is no val file, split by `group`
    freeze: bool = False  # freeze the encoders and train a single linear layer: a linear probe
    new_head: bool = False  # start with a fresh head even if the checkpoint has one for this task
    answers: int = 3129  # maximum number of answers for vqa, taken from the training rows
    new_words: int = 1000  # maximum number of words from the training rows to add to a vocabulary of less than 8,000
    patience: int = 0  # stop after this many evaluations on val without improvement; 0 = run all steps
    eval_every: int = 250  # steps between evaluations on val

    def __post_init__(self):
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}: use one of {', '.join(TASKS)}")
        if self.freeze and issubclass(TASKS[self.task], TASKS["retrieval"]):
            raise ValueError(f"{self.task} has no head of its own to train while the encoders stay: leave out --freeze")
        if self.compile and (issubclass(TASKS[self.task], TASKS["retrieval"]) or TASKS[self.task].pictures > 1):
            raise ValueError(f"batches of {self.task} have no one shape to compile a step for: leave out --compile")
        bounds = {"lr": POSITIVE, "lr_head": POSITIVE, "val_share": (0, 0.99), "answers": (2, math.inf)}
        runtime.check_bounds(self, bounds | dict.fromkeys(("patience", "new_words"), (0, math.inf)))


HEAD_PARAMETERS = ("head.", "absent")  # name prefixes of a task's own parameters

# --------------------------------------------------------------------------------------------------------------- setup


def start(config: FineConfig, overrides: dict, device: torch.device | None = None) -> "FineTune":
    """Set up a run, or resume it if config.resume is set and its folder contains a checkpoint.

    Args:    overrides   fields of the model's Config that replace the checkpoint's
             device      of this process; None = chosen from config.device
    """
    saved = runtime.saved_run(config)
    rows, val_rows = read(config)
    order = make_order(config, rows, saved)
    schema = read_as(config.task)
    texts = [text for row in rows for text in texts_of(row, schema)]
    runtime.seed_everything(config.seed)
    if saved:
        tokenizer, fresh = Tokenizer(saved["vocab"]), []
        model = build_task(head_of(saved), saved["config"])
    else:
        tokenizer, model, fresh = adapted(config, overrides, rows, texts)
    model.student.text.requires_grad_(not config.freeze_text)
    if config.freeze:
        model.student.requires_grad_(False)
    device = device or runtime.pick_device(config.device)
    model = model.to(device)

    head = model.head_config
    dataset = TaskRows(rows, head, tokenizer, model.config, config.augment, config.seed)
    captions = min(max(len(texts_of(row, schema)) for row in rows), CAPTIONS)
    length = model.config.max_tokens if config.compile else 0
    collate = TaskCollate(tokenizer.pad_id, TASKS[config.task].pictures, captions, length)
    # The encoders use --lr and the head --lr-head; from scratch, everything uses --lr-head.
    times, heads = config.lr_head / config.lr, HEAD_PARAMETERS if config.init != "none" else ("",)
    optimizer = make_optimizer(model, config, lambda name: times if name.startswith(heads) else 1.0)
    script = f"finetune.py {config.task}"
    run = FineTune(config, device, tokenizer, model, optimizer, rows, val_rows, order, dataset, collate, saved, script)

    run.fresh = tuple(fresh)
    run.announce(
        f"{config.task}, {'a linear probe' if config.freeze else 'fine-tuned'} from {config.init}",
        lambda row: texts_of(row, schema),
    )
    if config.task == "vqa":
        shares = [f"{coverage(part, head.answers):.1f} % of {what}" for what, part in
                  (("train", rows), ("val", val_rows)) if part]  # fmt: skip
        print(f"{len(head.answers)} answers to choose from cover {', '.join(shares)}")
    if not saved and config.init != "none":
        parts = dict.fromkeys(".".join(name.split(".")[: 2 if name.startswith("student.") else 1]) for name in fresh)
        print(f"not in {config.init}, so fresh: {', '.join(parts) or 'nothing'}")
    return run


def read(config: FineConfig) -> tuple[list[dict], list[dict]]:
    """Training and validation rows. The latter come from --val, else the val file next to --data, else held-out rows,
    subsampled to 2,000 rows, or to 500 images for retrieval and grounding, which rank every text for each image."""
    schema = TASKS[config.task].schema
    if not config.data:
        raise ValueError(f"--data is missing: give JSONL files, such as data/scenes/{config.task}_train.jsonl")
    paths, beside = expand(config.data)
    rows = read_rows(paths, schema, config.check, config.skip_bad)
    if config.val or beside:
        val = read_rows(config.val or beside, schema, config.check, config.skip_bad)
    else:
        rows, val = split_by_group(rows, config.val_share, config.seed)
        print(f"no val file: {len(val)} of {len(rows) + len(val)} rows are kept apart to choose on")
    if read_as(config.task) == "pairs":
        rows, val = by_picture(rows, schema), by_picture(val, schema)
        return rows, sample_of(val, 500, "val")
    return rows, sample_of(val, 2000, "val")


def adapted(
    config: FineConfig, overrides: dict, rows: list[dict], texts: list[str]
) -> tuple[Tokenizer, torch.nn.Module, list[str]]:
    """The tokenizer, the task's model (from a checkpoint or from scratch), and the names of its fresh parameters."""
    if config.init == "none":
        tokenizer = make_vocabulary(config, texts)
        shape, kept, answers = new_shape(config, overrides, tokenizer, rows), False, None
    else:
        start = runtime.load_checkpoint(config.init)
        config.objective = start["objective"]
        tokenizer = with_new_words(Tokenizer(start["vocab"]), texts, config.new_words)
        frames = {"frames": max(start["config"].get("frames", 1), frames_for(rows))}
        shape = shape_from(start, config, frames | overrides) | {"vocab_size": len(tokenizer)}
        # Keep a head that was already trained for this task, along with its list of answers.
        before = start["head"] if "head" in start and not config.new_head else {}
        kept = before.get("task") == config.task
        answers = head_of(start).answers if kept else None
    answers = answers or answers_of(config.task, rows, config.answers)
    check_labels(config.task, rows, answers)
    model = build_task(HeadConfig(config.task, answers, config.freeze), shape)
    if config.init == "none":
        return tokenizer, model, list(model.state_dict())
    weights = {name: value for name, value in start["model"].items() if kept or not name.startswith(HEAD_PARAMETERS)}
    return tokenizer, model, adopt(model, weights, encoders_of(start["config"]), start["vocab"], tokenizer)


def check_labels(task: str, rows: list[dict], answers: list[str]) -> None:
    """Raise ValueError if a training row has a label that a head loaded from the checkpoint cannot predict."""
    labels = {right_label(row) for row in rows} if "label" in SCHEMAS[TASKS[task].schema] else set()
    if unknown := sorted(labels - set(answers)):
        raise ValueError(
            f"{len(unknown)} labels of the training rows, {unknown[0]!r} first, are none of the {len(answers)} "
            "that the head of --init knows: pass --new-head"
        )


def with_new_words(old: Tokenizer, texts: list[str], most: int) -> Tokenizer:
    """A checkpoint's vocabulary; if it is small, extended by up to `most` new words from the training rows."""
    new = old.extended(texts, most if len(old) < 8000 else 0)
    if len(new) > len(old):
        print(f"{len(new) - len(old)} words of the training rows are added to the vocabulary of {len(old)}")
    return new


MAY_DIFFER = {"image_size", "frames", "max_tokens", "dropout"}  # from the checkpoint to start from


def shape_from(start: dict, config: FineConfig, overrides: dict) -> dict:
    """The checkpoint's fields of mamo.Config, with overrides for image size, frames, text length and dropout."""
    other = [name for name in overrides if name not in MAY_DIFFER]
    default = FineConfig()
    other += [name for name in ("preset", "vocab") if getattr(config, name) != getattr(default, name)]
    if other:
        raise ValueError(
            f"--{other[0].replace('_', '-')} is fixed by the checkpoint {config.init}: leave it out, or "
            "train from scratch with --init none"
        )
    return start["config"] | overrides


def expand(paths: list[str]) -> tuple[list[Path], list[Path]]:
    """--data -> training files, and the val files that exist next to them. X is short for X_train.jsonl. In the name,
    "val" replaces the last "train" that is a separate word, unlike the one in "constrained"."""
    train = [Path(path) if path.endswith((".jsonl", ".tar")) else Path(f"{path}_train.jsonl") for path in paths]
    words = [re.match(r"(.*)(?<![^\W\d_])train(?![^\W\d_])(.*)", path.name) for path in train]
    beside = [path.with_name("val".join(word.groups())) for path, word in zip(train, words, strict=True) if word]
    return train, [path for path in beside if path.is_file()]


def split_by_group(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Rows -> training rows, held-out rows; all rows of a group (or, without groups, of an image) stay together."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(cluster_of(row), []).append(row)
    names = random.Random(seed).sample(sorted(groups), len(groups))
    val: list[dict] = []
    while names and len(val) < share * len(rows):
        val += groups.pop(names.pop())
    if not groups:
        raise ValueError(f"{len(rows)} rows in one group cannot be split into training and val: give --val a file")
    return [row for part in groups.values() for row in part], val


# ------------------------------------------------------------------------------------------------------- training loop


class FineTune(Run):
    """The training loop of train.py for a downstream task; saves the weights of the step with the best score on val."""

    best, best_step, worse = -1.0, 0, 0  # best score on val, its step, number of evaluations since then
    fresh: tuple[str, ...] = ()  # names of the parameters that are not in the --init checkpoint

    def evaluate(self, bar: tqdm) -> dict:
        """Compute the task's score on val; if it is the best so far, save best.pt, without the optimiser's state."""
        score = self.score()
        bar.write(f"step {self.step}: val {score:.1f} %")
        if score > self.best:
            self.best, self.best_step, self.worse = score, self.step, 0
            if self.rank == 0:
                left_out = ("optimizer", "scaler", "meter")
                state = {name: part for name, part in self.state().items() if name not in left_out}
                runtime.save_checkpoint(self.out / "best.pt", state)
        else:
            self.worse += 1
            self.settled = 0 < self.config.patience <= self.worse
        return {"val": score}

    def score(self) -> float:
        """Accuracy in percent; for retrieval and grounding, re-ranked R@1 averaged over both directions."""
        if isinstance(self.model, TASKS["retrieval"]):
            found = retrieval(self.model, self.tokenizer, self.val_rows, self.device, k=16, weights=WEIGHTS)
            self.model.matching_weight = found["weight"]
            return sum(way["R@1"] for way in found["matching"].values()) / 2
        given = classify(self.model, self.tokenizer, self.val_rows, self.device)
        return 100 * sum(score_answers(self.config.task, self.val_rows, given)) / len(self.val_rows)

    def state(self) -> dict:
        """As in train.py, plus the head's config and the best score so far."""
        best = [self.best, self.best_step, self.worse]
        return super().state() | {"head": dataclasses.asdict(self.model.head_config), "best": best}

    @functools.cached_property
    def content(self) -> dict:
        """As in train.py, plus the validation rows."""
        return super().content | {"rows to choose on": content_of(self.val_rows)}

    def load(self, saved: dict) -> None:
        """As in train.py, plus the best score so far. Raises ValueError if --lr and --lr-head swapped their order."""
        rates = ((one["lr"], one["lr_head"]) for one in (saved["train"], vars(self.config)))
        was, now = ((rate < head, rate > head) for rate, head in rates)
        if was != now and self.config.init != "none":  # the optimiser's parameter groups depend on this order
            raise ValueError("of --lr and --lr-head, the larger one must stay the larger on resume: lower both")
        super().load(saved)
        self.best, self.best_step, self.worse = saved["best"]
        self.settled = 0 < self.config.patience <= self.worse


def parse(arguments: list[str] | None = None) -> tuple[FineConfig, dict]:
    """Command line -> the options of the run, and the fields of the model's Config that override the checkpoint's"""
    parser = runtime.Parser(
        prog="finetune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    runtime.add_options(parser, FineConfig, skip=("task", "objective"))
    runtime.add_options(parser, Config, skip=("vocab_size", *FROM_TOKENIZER))
    given = parser.parse_run(arguments)
    if given.get("init", FineConfig.init) != "none":  # a --config names all sizes; the checkpoint fixes most of them
        typed = vars(parser.parse_args(arguments))
        sizes = {field.name for field in dataclasses.fields(Config)} - MAY_DIFFER
        given = {name: value for name, value in given.items() if name not in sizes or name in typed}
    given.setdefault("out", f"runs/{given['task']}")
    return runtime.resolve(given, FineConfig, Config)


def main() -> None:
    """Command-line entry point: set up or resume a run, then train."""
    config, overrides = parse()
    runtime.keep_memory()
    with runtime.process_group(config.device) as device, runtime.sole_run(config.out):
        run = start(config, overrides, device)
        run.train()
        if run.best_step:
            print(f"best on val: {run.best:.1f} % at step {run.best_step}, kept in {run.out / 'best.pt'}")
        else:
            print(f"there was no evaluation on val: use the last step, {run.out / 'checkpoint.pt'}")
    runtime.end(run.stopped)


if __name__ == "__main__":
    runtime.guarded(main)
