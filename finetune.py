"""Fine-tune a pre-trained checkpoint on a downstream task: one command and one loop for all five.

    python finetune.py vqa --init runs/demo/checkpoint.pt --data data/scenes/vqa
    python finetune.py reasoning --init runs/demo/checkpoint.pt --data my/train.jsonl --val my/val.jsonl --out runs/mine
    python finetune.py vqa --init none --data data/scenes/vqa             from scratch, for comparison
    python finetune.py vqa --init runs/demo/checkpoint.pt --freeze        a linear probe: the encoders stay as they are
    python finetune.py retrieval --init runs/demo/checkpoint.pt --data data/full/pairs --image-size 64 64
    torchrun --nproc-per-node 8 finetune.py vqa ...                       the same run on eight GPUs

The tasks and their losses: tasks.py. `--data data/scenes/vqa` stands for data/scenes/vqa_train.jsonl, and vqa_val.jsonl
beside it is what the best step is chosen on; without such a file a part of the training rows is, whole groups of it.

The loop is train.py's. A run folder holds config.json, log.csv, checkpoint.pt to go on from, and best.pt: the weights
of the step that was best on val, which is what to evaluate.
"""

import argparse
import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import runtime
from data import SCHEMAS, read_rows, training_batches
from eval import classify, retrieval
from mamo import Config
from metrics import cluster_of, right_label, score_answers
from tasks import (
    CAPTIONS,
    TASKS,
    Head,
    TaskCollate,
    TaskRows,
    adopt,
    answers_of,
    build_task,
    by_picture,
    coverage,
    encoders_of,
    read_as,
    texts_of,
)
from tokenizer import Tokenizer
from train import FROM_TOKENIZER, Run, TrainConfig, make_optimizer, resolve


@dataclass
class FineConfig(TrainConfig):
    """Everything about a run of fine-tuning; what train.py has too keeps its meaning."""

    task: str = "vqa"  # retrieval, grounding, vqa, reasoning or entailment
    init: str = "runs/demo/checkpoint.pt"  # checkpoint to start from, or none = from scratch
    data: list[str] = dataclasses.field(default_factory=list)  # JSONL files, or X for X_train.jsonl and X_val.jsonl
    out: str = ""  # run folder; without: runs/ and the name of the task
    lr: float = 5e-4  # peak learning rate of the encoders
    lr_head: float = 2e-3  # peak learning rate of the head, and of everything from scratch
    steps: int = 2000  # optimiser steps
    val_share: float = 0.1  # share of the training rows to choose on where there is no val file, split by `group`
    freeze: bool = False  # keep the encoders as they are and train one linear layer: a linear probe
    new_head: bool = False  # begin with a fresh head although the checkpoint has one of this task
    answers: int = 3129  # longest list of answers of vqa, built from the training rows
    new_words: int = 1000  # most words of the training rows that are added to a vocabulary of less than 8,000
    patience: int = 0  # evaluations on val without a better one after which the run ends; 0 = all steps
    eval_every: int = 250  # steps between evaluations on val

    def __post_init__(self):
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}: use one of {', '.join(TASKS)}")
        if self.freeze and issubclass(TASKS[self.task], TASKS["retrieval"]):
            raise ValueError(f"{self.task} has no head of its own to train while the encoders stay: leave out --freeze")
        if self.compile and (issubclass(TASKS[self.task], TASKS["retrieval"]) or TASKS[self.task].pictures > 1):
            raise ValueError(f"batches of {self.task} have no one shape to compile a step for: leave out --compile")
        if self.lr <= 0 or self.lr_head <= 0:
            raise ValueError(
                f"lr is {self.lr}, lr_head {self.lr_head}: give more than 0; --freeze keeps the encoders as they are"
            )
        if self.patience < 0 or not 0 <= self.val_share < 1 or self.answers < 2:
            raise ValueError(
                f"patience {self.patience}, val_share {self.val_share}, answers {self.answers}: give a patience of 0 "
                "or more, a share from 0 to below 1, and two answers or more"
            )


HEAD = ("head.", "absent")  # how the names of a task's own parameters begin


class FineTune(Run):
    """A run of train.py on a task: other rows, another model, and the best step on val is kept."""

    best, best_step, worse = -1.0, 0, 0  # on val: best figure, its step, evaluations since

    def read(self) -> tuple[list[dict], list[dict]]:
        """Training rows and rows to choose on, at most 2,000: --val, or the file beside, or a part of the training."""
        config, schema = self.config, TASKS[self.config.task].schema
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
        return rows, val[:2000]

    def build(self, state: dict | None, sizes: dict) -> tuple[Tokenizer, torch.nn.Module]:
        """The model of the task: from the run's own checkpoint, from a pre-trained one, or from nothing."""
        config = self.config
        runtime.seed_everything(config.seed)
        if state:
            return Tokenizer(state["vocab"]), self.frozen(build_task(Head(**state["head"]), state["config"]))
        start = None if config.init == "none" else runtime.load_checkpoint(config.init)
        config.objective = start["objective"] if start else config.objective
        tokenizer = self.words(start)
        # A head that was trained for this task is kept, with the answers that it knows.
        before = start["head"] if start and "head" in start and not config.new_head else {}
        kept = before.get("task") == config.task
        answers = before["answers"] if kept else answers_of(config.task, self.rows, config.answers)
        self.check_labels(answers)
        model = build_task(Head(config.task, answers, config.freeze), self.shape(start, tokenizer, sizes))
        self.fresh = list(model.state_dict())
        if start:
            weights = {name: value for name, value in start["model"].items() if kept or not name.startswith(HEAD)}
            self.fresh = adopt(model, weights, encoders_of(start["config"]), start["vocab"], tokenizer)
        return tokenizer, self.frozen(model)

    def check_labels(self, answers: list[str]) -> None:
        """Raise ValueError for a row to learn from whose label a head that is kept does not know."""
        labelled = "label" in SCHEMAS[TASKS[self.config.task].schema].keys
        unknown = sorted({right_label(row) for row in self.rows} - set(answers)) if labelled else []
        if unknown:
            raise ValueError(
                f"{len(unknown)} labels of the training rows, {unknown[0]!r} first, are none of the {len(answers)} "
                "that the head of --init knows: pass --new-head"
            )

    def words(self, start: dict | None) -> Tokenizer:
        """The vocabulary: of the checkpoint, with new words where it is a small one; or built from the rows."""
        if start is None:
            return Tokenizer(self.vocabulary())
        old = Tokenizer(start["vocab"])
        new = old.extended(self.texts(), self.config.new_words if len(old) < 8000 else 0)
        if len(new) > len(old):
            print(f"{len(new) - len(old)} words of the training rows are added to the vocabulary of {len(old)}")
        return new

    def shape(self, start: dict | None, tokenizer: Tokenizer, sizes: dict) -> dict:
        """Fields of mamo.Config: the checkpoint's, in which resolution, text length and dropout may be others."""
        if start is None:
            return self.new_shape(tokenizer, sizes)
        other = [name for name in sizes if name not in ("image_size", "max_tokens", "dropout")]
        default = FineConfig()
        other += [name for name in ("preset", "vocab") if getattr(self.config, name) != getattr(default, name)]
        if other:
            raise ValueError(
                f"--{other[0].replace('_', '-')} is fixed by the checkpoint {self.config.init}: leave it out, or "
                "train from scratch with --init none"
            )
        return start["config"] | sizes | {"vocab_size": len(tokenizer)}

    def frozen(self, model: torch.nn.Module) -> torch.nn.Module:
        """Under --freeze the encoders take no gradient."""
        if self.config.freeze:
            model.student.requires_grad_(False)
        return model

    def make_optimizer(self) -> torch.optim.AdamW:
        """The encoders at --lr and the head at --lr-head; from scratch everything at --lr-head."""
        times = self.config.lr_head / self.config.lr
        heads = HEAD if self.config.init != "none" else ("",)
        return make_optimizer(self.model, self.config, lambda name: times if name.startswith(heads) else 1.0)

    def take_up(self, state: dict, path: Path) -> None:
        """Go on, with what was best so far."""
        super().take_up(state, path)
        self.best, self.best_step, self.worse = state["best"]
        self.settled = 0 < self.config.patience <= self.worse

    @property
    def script(self) -> str:
        """The command that takes the run up again."""
        return f"finetune.py {self.config.task}"

    def name(self) -> str:
        """What is trained, for the first line."""
        how = "a linear probe" if self.config.freeze else "fine-tuned"
        return f"{self.config.task}, {how} from {self.config.init}"

    def texts(self) -> Iterator[str]:
        """All texts of the training rows."""
        return (text for row in self.rows for text in texts_of(row, read_as(self.config.task)))

    def announce(self) -> None:
        """As in train.py, and how much of the right answers the list of answers covers."""
        super().announce()
        head = self.model.description
        if self.config.task == "vqa":
            shares = [f"{coverage(rows, head.answers):.1f} % of {what}" for what, rows in
                      (("train", self.rows), ("val", self.val_rows)) if rows]  # fmt: skip
            print(f"{len(head.answers)} answers to choose from cover {', '.join(shares)}")
        if self.step == 0 and self.config.init != "none":
            parts = dict.fromkeys(name.split(".")[0] for name in self.fresh)
            print(f"not in {self.config.init}, so fresh: {', '.join(parts) or 'nothing'}")

    def batches(self):
        """Endless batches from the current step on."""
        config, shape, task = self.config, self.model.config, TASKS[self.config.task]
        dataset = TaskRows(self.rows, self.model.description, self.tokenizer, shape, config.augment, config.seed)
        self.order.first = self.step * config.accumulate
        captions = min(max(len(texts_of(row, dataset.schema)) for row in self.rows), CAPTIONS)
        length = shape.max_tokens if config.compile else 0
        collate = TaskCollate(self.tokenizer.pad_id, task.pictures, captions, length)
        return training_batches(dataset, self.order, collate, config.workers, self.device.type == "cuda")

    def evaluate(self, progress: tqdm) -> dict:
        """The task's figure on val; the best weights so far are kept in best.pt."""
        figure = self.figure()
        progress.write(f"step {self.step}: val {figure:.1f} %")
        if figure > self.best:
            self.best, self.best_step, self.worse = figure, self.step, 0
            self.keep_best()
        else:
            self.worse += 1
            self.settled = 0 < self.config.patience <= self.worse
        return {"val": figure}

    def figure(self) -> float:
        """Accuracy in percent; of retrieval and grounding R@1 by matching, the mean of both ways."""
        if isinstance(self.model, TASKS["retrieval"]):
            rows = self.val_rows[:500]
            ways = retrieval(self.model, self.tokenizer, rows, self.device, k=16)["matching"]
            return sum(way["R@1"] for way in ways.values()) / len(ways)
        given = classify(self.model, self.tokenizer, self.val_rows, self.device)
        return 100 * sum(score_answers(self.config.task, self.val_rows, given)) / len(self.val_rows)

    def keep_best(self) -> None:
        """Weights and what is needed to use them, without the optimiser."""
        if self.rank == 0:
            state = {
                name: value for name, value in self.state().items() if name not in ("optimizer", "scaler", "meter")
            }
            runtime.save_checkpoint(self.out / "best.pt", state)

    def state(self) -> dict:
        """As in train.py, with the head and what was best so far."""
        return super().state() | {
            "head": dataclasses.asdict(self.model.description),
            "best": [self.best, self.best_step, self.worse],
        }


def expand(paths: list[str]) -> tuple[list[Path], list[Path]]:
    """--data -> training files, and the val files beside them that are there: X stands for X_train.jsonl."""
    train = [Path(path) if path.endswith(".jsonl") else Path(f"{path}_train.jsonl") for path in paths]
    beside = [path.with_name(path.name.replace("train", "val")) for path in train if "train" in path.name]
    return train, [path for path in beside if path.is_file()]


def split_by_group(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Rows -> those to train on, those to choose on: whole groups, or where there are none all rows of a picture."""
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


def parse(arguments: list[str] | None = None) -> tuple[FineConfig, dict]:
    """Command line -> the run's options and the model's sizes that may be others than the checkpoint's."""
    parser = runtime.Parser(
        prog="finetune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    runtime.add_options(parser, FineConfig, skip=("task", "objective"))
    runtime.add_options(parser, Config, skip=("vocab_size", *FROM_TOKENIZER))
    given = vars(parser.parse_args(arguments))
    given.setdefault("out", f"runs/{given['task']}")
    return resolve(given, FineConfig, Config)


def main() -> None:
    """Command line: make the run, or take it up again, and train."""
    config, sizes = parse()
    runtime.keep_memory()
    with runtime.processes(config.device) as device:
        run = FineTune(config, sizes, device)
        run.train()
        if run.best_step:
            print(f"best on val: {run.best:.1f} % at step {run.best_step}, kept in {run.out / 'best.pt'}")
        else:
            print(f"nothing was chosen on val: evaluate the last step, {run.out / 'checkpoint.pt'}")
    runtime.end(run.stopped)


if __name__ == "__main__":
    runtime.guarded(main)
