"""Pre-train: one command, on one process or many.

    python train.py                                             the demo: the built-in world, preset nano
    python train.py --data my/pairs.jsonl --val my/val.jsonl --preset small --epochs 40 --augment photo --out runs/mine
    python train.py --w-mrm 0                                   an ablation: a loss of weight 0 is not computed
    python train.py --objective control                         ITC + ITM + MLM, no teacher
    python train.py --objective glscl --out runs/glscl          a sibling objective; --help then lists its options
    python train.py --out runs/mine --resume                    resume after Ctrl-C or a crash
    python train.py --config runs/mine/config.json --seed 1 --out runs/again        repeat a run with another seed
    torchrun --nproc-per-node 8 train.py --preset base ...      the same run on eight GPUs

A run folder holds config.json, log.csv and checkpoint.pt.

How to read it: `Run.one_step` is one optimiser step, in the order of events: learning rate, forward, finite check,
backward, clip, step, teacher. `Run.train`, right below it, repeats it, logs, evaluates and saves. Before them come the
options and `start`, which makes everything that the loop needs. finetune.py has its own `start` and the same loop.

Several processes (torchrun, on one node or many) share each batch, so their number does not change the run: batches,
masks and steps are the same, contrast is over the whole batch, and means are over all its positions. Only ITM differs:
each process draws negatives from its own pairs. A run can be resumed with another number of processes.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

import runtime
from data import (
    CHECKS,
    Collate,
    Pairs,
    TwinBatches,
    captions_of,
    content_of,
    count_truncated,
    open_rows,
    read_rows,
    resolved,
    sample_of,
    training_batches,
    videos_of,
)
from eval import WEIGHTS, check_kinds, retrieval
from mamo import PRESETS, VisionLanguageModel, ema_for, rank_and_size
from siblings import OBJECTIVES, build_model, model_of
from tokenizer import Tokenizer
from tools import weights

# ------------------------------------------------------------------------------------------------------------ options


@dataclass
class TrainConfig:
    """The options of a run. Together with those of the objective's Config they make up the command line."""

    data: list[str] = field(default_factory=lambda: ["data/scenes/pairs_train.jsonl"])  # JSONL files or tar archives
    val: list[str] = field(default_factory=list)  # JSONL files to evaluate on; default: pairs_val.jsonl beside data
    out: str = "runs/demo"  # run folder
    objective: str = "mamo"  # mamo, control = ITC + ITM + MLM, or a sibling: maskvlm, glscl, vlmae
    preset: str = "nano"  # sizes: nano, tiny, small or base
    vocab: str = ""  # vocab.txt to use; default: a vocabulary built from the captions
    init: list[str] = field(default_factory=list)  # published encoders to start from, made by tools/weights.py
    freeze_text: bool = False  # do not train the text encoder; useful for one that --init loaded
    steps: int = 1600  # optimiser steps
    epochs: float = 0.0  # passes over the data; if given, steps follow from it
    batch_size: int = 64  # pairs per forward pass, over all processes
    parts: int = 0  # equal parts of a batch, which processes share; 0 = 8, or fewer for a small batch
    accumulate: int = 1  # forward passes per optimiser step; like a batch this many times as large, see Run.parts
    lr: float = 0.0  # peak learning rate; 0 = set by the width of the model: 6e-3 for nano, 2e-3 for tiny
    lr_end: float = 0.01  # learning rate at the last step, as a share of the peak
    warmup: float = 0.05  # length of the warm-up, as a share of the steps
    optimizer: str = "muon"  # muon = Muon for the matrices in blocks and AdamW for the rest; or adamw for all
    weight_decay: float = 0.02  # not on norms, biases, positions and single tokens
    beta2: float = 0.98  # second-moment decay of AdamW
    clip: float = 1.0  # clip the gradient to this norm
    augment: str = "none"  # none, photo, aerial, photo-strong, aerial-strong, drawing or boxes: see docs/running.md
    seed: int = 0  # decides initial weights, order, masks and negatives
    workers: int = 0  # worker processes that load data
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: str = "auto"  # auto = bf16 on a GPU that has it, else fp32; or fp32, bf16, fp16
    compile: bool = False  # compile the step with torch.compile; every batch is then padded to max_tokens
    grad_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    log_every: int = 50  # steps between rows of log.csv
    eval_every: int = 500  # steps between evaluations on val
    save_every: int = 500  # steps between checkpoints
    check: str = "header"  # header, full = decode every picture before the first step, or none
    skip_bad: bool = False  # skip bad rows instead of stopping
    resume: bool = False  # continue from the checkpoint in the run folder, if there is one

    def __post_init__(self):
        if isinstance(self.data, str) or isinstance(self.val, str):
            raise ValueError(
                f'data is {self.data!r} and val {self.val!r}: give lists of paths, such as ["pairs.jsonl"]'
            )
        choices = {
            "objective": OBJECTIVES,
            "preset": PRESETS,
            "augment": ("none", "photo", "photo-strong", "aerial", "aerial-strong", "drawing", "boxes"),
            "check": CHECKS,
            "precision": ("auto", *runtime.PRECISIONS),
            "optimizer": ("muon", "adamw"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}: contrast and matching need at least 2 pairs")
        runtime.check_bounds(self, BOUNDS)


POSITIVE = (1e-12, math.inf)
BOUNDS = dict.fromkeys(("steps", "log_every", "eval_every", "save_every"), (1, 10**12))
BOUNDS |= dict.fromkeys(("parts", "seed", "weight_decay"), (0, math.inf))
BOUNDS |= {
    "epochs": (0, 1e9),
    "workers": (0, math.inf),
    "accumulate": (1, 10_000),
    "lr": (0, math.inf),
    "lr_end": (0, 1),
    "warmup": (0, 1),
    "beta2": (0, 1 - 1e-9),
    "clip": POSITIVE,
}

FROM_TOKENIZER = ("mask_id", "special_ids", "continuation_ids")  # fields of a Config that are no options, as vocab_size


def parse(arguments: list[str] | None = None) -> tuple[TrainConfig, dict]:
    """Command line -> options of the run, and fields of the model's Config that override the preset's."""
    config_class = model_of(objective_of(arguments)).config_class
    parser = runtime.Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runtime.add_options(parser, TrainConfig)
    runtime.add_options(parser, config_class, skip=("vocab_size", *FROM_TOKENIZER))
    return runtime.resolve(parser.parse_run(arguments), TrainConfig, config_class)


def objective_of(arguments: list[str] | None) -> str:
    """The objective on the command line, or that of the run to resume or repeat. It decides which options exist."""
    first = runtime.Parser(add_help=False)
    first.add_argument("--objective")
    first.add_argument("--config")
    first.add_argument("--out", default=TrainConfig.out)
    first.add_argument("--resume", action="store_true")
    given, _ = first.parse_known_args(arguments)
    checkpoint = Path(given.out) / "checkpoint.pt"
    if given.resume and checkpoint.is_file():
        return runtime.load_checkpoint(checkpoint)["objective"]
    before = runtime.read_config(given.config) if given.config else {}
    return given.objective or before.get("objective", TrainConfig.objective)


# -------------------------------------------------------------------------------------------- before the first step


def start(config: TrainConfig, overrides: dict, device: torch.device | None = None) -> "Run":
    """Make a run, or resume it if config.resume is set and its folder holds a checkpoint.

    Args:    overrides   fields of the model's Config that override the preset's
             device      of this process
    """
    saved = runtime.saved_run(config)
    rows = open_rows(config.data, "pairs", config.check, config.skip_bad)
    beside = Path(config.data[0]).with_name("pairs_val.jsonl")
    val_paths = config.val or ([beside] if beside.is_file() else [])
    val_rows = read_rows(val_paths, "pairs", config.check, config.skip_bad) if val_paths else []
    val_rows = sample_of(val_rows, 1000, "val")
    check_kinds([row["image"] for row in val_rows])
    order = make_order(config, rows, saved)

    texts = (caption for row in rows for caption in captions_of(row))
    words = saved["vocab"] if saved else weights.vocabulary(config.init, config.vocab)
    tokenizer = Tokenizer(words) if words else make_vocabulary(config, texts)
    runtime.seed_everything(config.seed)
    model = build_model(config.objective, saved["config"] if saved else new_shape(config, overrides, tokenizer, rows))
    config.lr = config.lr or rate_for(model.config.width)
    taken = weights.take(model, config.init) if config.init and not saved else ""
    model.student.text.requires_grad_(not config.freeze_text)
    device = device or runtime.pick_device(config.device)
    model = model.to(device)

    length = model.config.max_tokens if config.compile else 0  # one shape for all batches, so it compiles once
    dataset = Pairs(rows, tokenizer, model.config, config.augment, config.seed)
    collate = Collate(tokenizer.pad_id, length)
    optimizer = make_optimizer(model, config)
    run = Run(config, device, tokenizer, model, optimizer, rows, val_rows, order, dataset, collate, saved)
    teacher = "no teacher" if model.teacher is None else f"teacher {model.config.ema:.4f}"
    run.announce(f"{config.objective} {config.preset}, {teacher}", captions_of)
    if taken and run.rank == 0:
        print(taken)
    return run


def make_order(config: TrainConfig, rows: Sequence[dict], saved: dict | None) -> TwinBatches:
    """Decide which rows share a batch. Sets config.parts and, from --epochs, config.steps."""
    rank, processes = rank_and_size()
    config.parts = config.parts or parts_for(config.batch_size, processes)
    order = TwinBatches(rows, config.batch_size, config.seed, rank=rank, processes=processes, parts=config.parts)
    if config.epochs and (not saved or config.epochs > saved["train"]["epochs"]):
        config.steps = max(round(config.epochs * order.batches_per_epoch / config.accumulate), 1)
    return order


def parts_for(batch_size: int, processes: int) -> int:
    """Number of equal parts in a batch: 8, or 4, 2, 1 if a part would be odd or smaller than 8 pairs. If the number of
    processes does not divide it, one part per process."""
    parts = next(p for p in (8, 4, 2, 1) if p == 1 or (batch_size % (2 * p) == 0 and batch_size // p >= 8))
    return parts if parts % processes == 0 else processes


def make_vocabulary(config: TrainConfig, texts: Iterable[str]) -> Tokenizer:
    """The vocabulary from --vocab, or one built from the training texts."""
    return Tokenizer.from_file(config.vocab) if config.vocab else Tokenizer.build(texts)


def new_shape(config: TrainConfig, overrides: dict, tokenizer: Tokenizer, rows: Sequence[dict]) -> dict:
    """Fields of the model's Config: from the preset, the objective, the user, the tokenizer, the length of the run (the
    teacher's momentum), and whether there are videos."""
    shape = PRESETS[config.preset] | OBJECTIVES[config.objective][1] | {"frames": frames_for(rows)} | overrides
    shape["vocab_size"] = len(tokenizer)
    has = {field.name for field in dataclasses.fields(model_of(config.objective).config_class)}
    shape |= {name: getattr(tokenizer, name) for name in FROM_TOKENIZER if name in has}
    if "ema" in has and "ema" not in overrides:
        shape["ema"] = ema_for(config.steps)
    return shape


def frames_for(rows: Sequence[dict]) -> int:
    """Default number of frames of a video that a model looks at."""
    return 4 if videos_of(rows).any() else 1


def make_optimizer(model: torch.nn.Module, config: TrainConfig, scale: Callable = lambda name: 1.0) -> "Muon":
    """Weight decay applies to matrices, but not to norms, biases, positions, single tokens and the temperature.

    scale: name of a parameter -> its learning rate as a multiple of the run's
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim == 2 and not name.endswith(("positions", "types", "times"))
            by_muon = config.optimizer == "muon" and takes_muon(name, parameter)
            kind = scale(name), config.weight_decay if decays else 0.0, by_muon
            groups.setdefault(kind, []).append(parameter)
    in_order = sorted(groups.items(), key=lambda item: item[0], reverse=True)  # groups with decay come first
    named = [
        {"params": group, "scale": times, "weight_decay": decay, "orthogonal": by_muon}
        for (times, decay, by_muon), group in in_order
    ]
    return Muon(named, lr=config.lr, betas=(0.9, config.beta2), fused=True)


def takes_muon(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon updates a parameter: a matrix inside a block."""
    return parameter.ndim == 2 and ".blocks." in name


class Muon(torch.optim.AdamW):
    """AdamW, but for groups marked "orthogonal" (matrices inside blocks) Muon: orthogonalised momentum.

    A gradient is dominated by a few directions. Making all its singular values equal lets the model learn along the
    others too: on the built-in world it needs about half the steps (docs/results.md).
    Source: K. Jordan's Muon (2024), with the scale of Liu et al., arXiv 2502.16982: its steps are as large as AdamW's,
    so one learning rate and one weight decay serve both. differs: the paper uses AdamW, as ALBEF does.
    """

    def __init__(self, groups: list[dict], **options):
        super().__init__(groups, **options)
        self._step_supports_amp_scaling = False  # otherwise fp16 would skip only AdamW's part of a step

    @torch.no_grad()
    def step(self) -> None:
        """One step of all groups."""
        every, self.param_groups = self.param_groups, [one for one in self.param_groups if not one["orthogonal"]]
        super().step()
        self.param_groups = every
        for group in every:
            alike = {}  # matrices of the same shape are processed as a batch
            for matrix in group["params"] if group["orthogonal"] else ():
                if matrix.grad is not None:
                    alike.setdefault(matrix.shape, []).append(matrix)
            for (rows, columns), matrices in alike.items():
                for matrix in matrices:
                    if not self.state[matrix]:  # loading AdamW's state needs a "step"
                        self.state[matrix] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(matrix)}
                    self.state[matrix]["momentum"].mul_(0.95).add_(matrix.grad)
                ahead = [matrix.grad + 0.95 * self.state[matrix]["momentum"] for matrix in matrices]  # Nesterov's
                rate = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
                for matrix, move in zip(matrices, orthogonal(torch.stack(ahead)), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(rate * move)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of matrices (k, rows, columns) to about 1, by five Newton-Schulz iterations."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    near = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    near = near.bfloat16() if near.is_cuda else near
    for _ in range(5):  # this polynomial raises small values fast, at the price of ending only near 1
        gram = near @ near.mT
        near = 3.4445 * near + (2.0315 * gram @ gram - 4.775 * gram) @ near
    return near.to(matrices.dtype)


def rate_for(width: int) -> float:
    """Peak learning rate by width: 6e-3 up to 64 (chosen on the built-in world), 2.1e-3 for 128, 4.1e-4 for 384, and
    1.4e-4 for 768, close to what is common for ViT-B."""
    return 6e-3 * min(64 / width, 1) ** 1.5


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from lr to lr * lr_end at the last step. Steps count from 0."""
    warm = max(round(config.warmup * config.steps), 1)
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(config.steps - 1 - warm, 1)
    return config.lr * (config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1))))


# ------------------------------------------------------------------------------------------------------------ the loop


@dataclass
class Run:
    """A training run: everything that `start` made, and the loop."""

    config: TrainConfig
    device: torch.device  # this process's
    tokenizer: Tokenizer
    model: VisionLanguageModel
    optimizer: torch.optim.Optimizer
    rows: Sequence[dict]  # to train on
    val_rows: list[dict]  # to evaluate on
    order: TwinBatches
    dataset: Dataset
    collate: Callable
    saved: dataclasses.InitVar[dict | None]  # the checkpoint to go on from
    script: str = "train.py"  # the command that resumes the run

    def __post_init__(self, saved: dict | None):
        config, self.out = self.config, Path(self.config.out)
        self.rank, self.processes = rank_and_size()
        self.precision, self.why = runtime.pick_precision(config.precision, self.device)
        # Small gradients underflow in fp16: the loss is scaled up before the backward pass, gradients down after it.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        if not self.val_rows:
            self.model.matching_weight = 0.0  # no held-out data show that matching ranks well
        self.step, self.meter = 0, {}  # meter: sums since the last row of the log
        self.stopped = False  # by Ctrl-C
        self.settled = False  # by --patience of finetune.py
        if saved:
            self.load(saved)
        if config.grad_checkpointing:
            runtime.recompute_blocks(self.model)
        if config.compile:
            runtime.compile_step(self.model)
        self.parallel = self.model
        if self.processes > 1:
            # Queue and teacher get the same input on every process, so there is nothing to broadcast.
            self.parallel = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)
        if self.rank == 0:
            self.log = runtime.CsvLog(self.out / "log.csv", self.step)
            with runtime.side_file(self.out / "config.json"):
                runtime.write_json(self.out / "config.json", {"train": vars(config), "model": vars(self.model.config)})

    def one_step(self, batches: Iterator[dict]) -> float:
        """One optimiser step -> the weighted total of the losses."""
        config, model, summed = self.config, self.model.train(), 0.0
        parts = self.parts(batches)  # comes first: if it fails, nothing has changed yet
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(self.step, config)

        for part, batch in enumerate(parts):
            batch = self.on_device(batch)
            batch["negative_noise"] = self.negative_noise(part, len(batch["images"]))
            # Processes exchange gradients once per step, in the last backward pass.
            waits = self.processes > 1 and part < config.accumulate - 1
            with self.parallel.no_sync() if waits else contextlib.nullcontext():
                with runtime.autocast(self.device, self.precision):
                    losses = self.parallel(batch)
                total = model.total(losses)
                if not torch.isfinite(total):
                    bad = ", ".join(name for name, loss in losses.items() if not torch.isfinite(loss)) or "in total"
                    raise ValueError(f"the loss {bad} is {self.not_finite()}")
                self.scaler.scale(total / config.accumulate).backward()
            summed += total.item() / config.accumulate
            for name, value in (losses | model.watch).items():
                self.count(name, value.detach() / config.accumulate)

        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        finite = bool(torch.isfinite(norm))
        # In fp16 an infinite gradient is normal now and then: the step is skipped and the scale halved.
        if not finite and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1):
            raise ValueError(f"the gradient is {self.not_finite()}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.count("steps", 1)
        if finite:  # a skipped step changes no weight, so the teacher must not move either
            self.count("grad_norm", norm)
            model.after_step(self.step / config.steps)
        return summed

    def train(self, stop_at: int | None = None) -> None:
        """Train to the last step, to stop_at, or until Ctrl-C. The checkpoint is saved in any case."""
        config, first = self.config, self.step
        last = min(stop_at or config.steps, config.steps)
        bar = tqdm(total=config.steps, initial=self.step, desc="training", dynamic_ncols=True, mininterval=0.5)
        with runtime.Interrupt() as interrupt, bar, contextlib.closing(self.batches()) as batches:
            since, self.stopped = (time.perf_counter(), self.step), False
            while self.step < last and not self.stopped and not self.settled:
                try:
                    total = self.one_step(batches)
                except runtime.DataFailed as error:
                    if self.processes > 1 or self.step == first:
                        raise
                    self.save()
                    if not interrupt.asked:
                        raise ValueError(f"{error}; the run is saved at step {self.step}, --resume goes on") from error
                    self.stopped = True
                    break
                bar.update()
                bar.set_postfix(loss=f"{total:.3f}", refresh=False)
                row = {}
                if self.step % config.log_every == 0 or self.step == config.steps:
                    row |= self.means(since)
                if self.val_rows and (self.step % config.eval_every == 0 or self.step == config.steps):
                    runtime.check_finite(self.model.state_dict(), f"at step {self.step}", "has nothing to evaluate")
                    row |= self.evaluate(bar)
                if row:
                    if self.rank == 0:
                        self.log.write({"step": self.step} | row)
                    since = time.perf_counter(), self.step
                self.stopped = runtime.any_process(interrupt.asked)
                if self.step % config.save_every == 0 or self.step == last or self.stopped or self.settled:
                    self.save()
        if self.stopped:
            print(f"stopped at step {self.step} and saved; go on with: python {self.script} --out {self.out} --resume")

    def batches(self) -> Iterator[dict]:
        """Endless batches, beginning at the current step."""
        self.order.first = self.step * self.config.accumulate
        pin_memory = self.device.type == "cuda"
        return training_batches(self.dataset, self.order, self.collate, self.config.workers, pin_memory)

    def parts(self, batches: Iterator[dict]) -> list[dict]:
        """The batches of one step. If there are several, each has the features of all, see features in mamo.py.

        The step then equals that of one large batch, with two exceptions: ITM draws negatives within a part, and means
        over masked words are means of the parts' means. Features are computed without dropout.
        """
        parts = [next(batches) for _ in range(self.config.accumulate)]
        if len(parts) > 1 and self.model.contrasts_parts:
            self.model.eval()
            with runtime.autocast(self.device, self.precision):
                features = [self.model.features(self.on_device(batch)) for batch in parts]
            self.model.train()
            rows = {name: torch.cat([some[name] for some in features]) for name in features[0]}
            places = torch.arange(len(rows["image"]), device=self.device).chunk(len(parts))
            parts = [batch | {"parts": rows | {"own": own}} for batch, own in zip(parts, places, strict=True)]
        return parts

    def on_device(self, batch: dict) -> dict:
        """Move a batch to this process's device."""
        return {
            name: value if name == "parts" else value.to(self.device, non_blocking=True)
            for name, value in batch.items()
        }

    def negative_noise(self, part: int, rows: int) -> torch.Tensor:
        """Noise (2, rows, rows) for drawing ITM's negatives among this process's rows, from (seed, step, part, rank).

        This also seeds the generators that dropout uses.
        """
        runtime.seed_everything(self.config.seed, self.step, part, self.rank)
        return torch.rand(2, rows, rows).to(self.device)

    def not_finite(self) -> str:
        """End of the error message for a number that is not finite."""
        return (
            f"not finite at step {self.step + 1}; the step was not made and the last checkpoint is whole: "
            "go on from it with --resume and a smaller --lr, or start again with that or a longer --warmup"
        )

    def count(self, name: str, value: torch.Tensor | int) -> None:
        """Add to a sum since the last row of the log. Tensors stay on the device, so that a GPU need not wait."""
        self.meter[name] = self.meter.get(name, 0) + value

    def share_meter(self) -> None:
        """Replace this process's sums by their mean over processes, as plain numbers."""
        self.meter = runtime.mean_over_processes({name: float(value) for name, value in self.meter.items()})

    def means(self, since: tuple[float, int]) -> dict:
        """A row of the log: means since the last row, which had the time and step `since`."""
        self.share_meter()
        steps = self.meter.pop("steps")
        row = {"lr": learning_rate(self.step - 1, self.config)}
        row |= {name: value / steps for name, value in self.meter.items()}
        self.meter = {}
        if self.model.log_temperature is not None:
            row["temperature"] = self.model.temperature.item()
        pairs = (self.step - since[1]) * self.config.batch_size * self.config.accumulate
        rate = pairs / (time.perf_counter() - since[0])
        return row | {"pairs_per_s": rate, "peak_memory_mb": runtime.peak_memory_mb(self.device)}

    def evaluate(self, bar: tqdm) -> dict:
        """Zero-shot retrieval by contrast on val; training never sees the test set. After the last step, val decides
        the weight of matching in re-ranking. It is 0 if val is the training data, which may be memorised."""
        if self.model.config.w_itc <= 0:
            return {}
        k = 16 if self.step == self.config.steps else 0
        weights = (0.0,) if k and self.val_is_seen else WEIGHTS
        found = retrieval(self.model, self.tokenizer, self.val_rows, self.device, k, weights=weights)
        self.model.matching_weight = found.get("weight", self.model.matching_weight)
        i2t, t2i = (found["contrast"][side]["R@1"] for side in ("image_to_text", "text_to_image"))
        bar.write(f"step {self.step}: val R@1 {i2t:.1f} % image to text, {t2i:.1f} % text to image, by contrast")
        return {"val_i2t_r1": i2t, "val_t2i_r1": t2i}

    @property
    def val_is_seen(self) -> bool:
        """Whether pictures of val are among those to train on, in a sample of both."""
        pictures = [{resolved(row["image"]) for row in sample_of(rows, 10_000)} for rows in (self.rows, self.val_rows)]
        return not pictures[0].isdisjoint(pictures[1])

    def save(self) -> None:
        """Save everything that the next step depends on, as plain tensors and values. The first process writes it."""
        self.share_meter()
        if self.rank == 0:
            runtime.save_checkpoint(self.out / "checkpoint.pt", self.state())

    def state(self) -> dict:
        """The content of a checkpoint: weights of student and teacher, queue, optimiser, step, vocabulary, all options.
        The order of rows, masks and noise follow from the seed and the step."""
        return {
            "objective": self.config.objective,
            "config": dataclasses.asdict(self.model.config),
            "train": dataclasses.asdict(self.config),
            "vocab": self.tokenizer.vocab,
            "model": self.model.state_dict(),
            "matching_weight": self.model.matching_weight,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "meter": self.meter,
            "data": self.content,
        }

    @functools.cached_property
    def content(self) -> dict:
        """The number of training rows and a digest of them, so that a resumed run can check its data.

        Computed once, since rows do not change during a run.
        """
        return {"rows to train on": content_of(self.rows)}

    def load(self, saved: dict) -> None:
        """Continue from the content of a checkpoint."""
        for what, now in self.content.items():
            was = saved.get("data", {}).get(what, now)
            if "" in now or "" in was:
                print(f"the {what} are not compared with those that the run began with: --check none")
            elif was[0] != now[0] or (len(was) == len(now) and was != now):  # one digest for each file, once for all
                raise ValueError(
                    f"{self.out} began with {was[0]} {what}, and {now[0]} {'others ' * (was[0] == now[0])}are given "
                    "now: give it the same data (they may have moved), or start another run with another --out"
                )
        runtime.load_weights(self.model, saved["model"], self.out / "checkpoint.pt")
        self.model.matching_weight = saved.get("matching_weight", 1.0)
        runtime.load_optimizer(self.optimizer, saved["optimizer"], self.out / "checkpoint.pt")
        if self.scaler.is_enabled() and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.meter = saved["step"], saved["meter"]
        before = self.config.__class__(**saved["train"])
        rates = learning_rate(max(self.step - 1, 0), before), learning_rate(self.step, self.config)
        if (before.lr, before.steps) != (self.config.lr, self.config.steps):
            print(
                f"now {self.config.steps} steps (were {before.steps}) at a peak of {self.config.lr} (was {before.lr}): "
                f"step {self.step} took the rate {rates[0]:.3g}, and the next takes {rates[1]:.3g}"
            )

    def announce(self, what: str, read_texts: Callable) -> None:
        """Print what is about to run, and chance for each loss. read_texts: row -> its texts"""
        config, model = self.config, self.model
        millions = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        where = f"{self.device}, {self.processes} processes" if self.processes > 1 else f"{self.device}"
        print(f"{what}: {millions:.2f} M parameters on {where}, {len(self.rows)} rows")
        print(
            f"{config.steps} steps of {config.batch_size} x {config.accumulate}, learning rate up to {config.lr:.2g}, "
            f"{self.precision}: {self.why}"
        )
        texts = [text for row in sample_of(self.rows, 10_000) for text in read_texts(row)]
        if cut := count_truncated(texts, self.tokenizer, model.config.max_tokens):
            of = f"{cut} of {len(texts)} texts" + (", drawn at random," if len(self.rows) > 10_000 else "")
            print(f"{of} are longer than max_tokens {model.config.max_tokens} and lose their end")
        levels = model.chance(config.batch_size)
        if config.accumulate > 1 and model.contrasts_parts:
            levels["itc"] = math.log(config.batch_size * config.accumulate)
        chance = ", ".join(f"{name} {level:.2f}" for name, level in levels.items())
        print(f"random baseline of the losses: {chance}")


def main() -> None:
    """Command line: make or resume a run, and train."""
    config, overrides = parse()
    runtime.keep_memory()
    with runtime.process_group(config.device) as device, runtime.sole_run(config.out):
        run = start(config, overrides, device)
        if run.step >= run.config.steps:
            print(f"{run.out} is already trained to its last step, {run.config.steps}; more --steps train it longer")
        else:
            run.train()
    runtime.end(run.stopped)


if __name__ == "__main__":
    runtime.guarded(main)
