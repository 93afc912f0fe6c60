"""Measure speed as ratios within one run, because absolute times on a shared machine mean little.

    python -m tools.benchmark step --presets nano --length 14 --vocab-size 125   a training step and its utilisation
    python -m tools.benchmark step --presets base --image-size 224 --batch-size 32 64 --precision bf16 --device cuda
    python -m tools.benchmark loader --data data/scenes/pairs_train.jsonl        loaded batches vs. a repeated one
    python -m tools.benchmark decode --data my/pairs.jsonl                       JPEGs, scaled while decoding vs. not
    python -m tools.benchmark frames --presets nano --length 14 --vocab-size 125   videos of 1, 2, 4 and 8 frames
    python -m tools.benchmark agreement --data data/scenes/pairs_train.jsonl     bf16, fp16 and compiled vs. fp32

The variants take turns in each round, so that a slowdown of the machine affects all of them equally. For each pair of
variants, we report the median, minimum and maximum of the ratio over the rounds.

`step` runs full training steps on one random batch, for each preset, objective and batch size. A formula gives their
floating-point operations (FLOPs). Utilisation is the FLOP rate of the step divided by the highest rate that large
matrix products reach in the same round. If the formula does not cover a model's fusion encoder, neither number is
reported. Peak memory is per variant on a GPU; on a CPU it is that of the process so far, so only the first is exact.
"""

import argparse
import functools
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import runtime
from data import Collate, Pairs, TwinBatches, captions_of, load_image, read_rows, to_pixels, training_batches
from mamo import PRESETS, Config
from siblings import OBJECTIVES, build_model
from tokenizer import Tokenizer
from tools.costs import flops_of_step, uncounted
from train import TrainConfig, make_optimizer, rate_for
from train import parse as parse_training
from train import start as start_training

DATA = "data/scenes/pairs_train.jsonl"  # default dataset of `loader`
TURN = 0.2  # minimum duration of a turn of `step`, in seconds
SIDE = 1024  # side length of the large matrices on a CPU; multiplied by eight on a GPU


def random_batch(config: Config, size: int, length: int) -> dict[str, Tensor]:
    """A batch of random pictures and texts, with all texts of the same length and all pairs different."""
    input_ids = torch.randint(max(config.special_ids) + 1, config.vocab_size, (size, length))
    return {
        "images": torch.randn(size, 3, *config.image_size),
        "input_ids": input_ids,
        "attention_mask": torch.ones(size, length, dtype=torch.bool),
        "image_id": torch.arange(size),
        "caption_id": torch.arange(size),
        "patch_noise": torch.rand(size, config.num_patches),
        "token_noise": torch.rand(size, length),
        "replace_noise": torch.rand(size, length),
        "negative_noise": torch.rand(2, size, size),
    }


def take_turns(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """The seconds that each variant takes in each round, after one warm-up round."""
    seconds = {name: [] for name in variants}
    for counted in range(-1, rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            if counted >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], of: str, to: str) -> dict[str, float]:
    """The median, minimum and maximum ratio of two variants over the rounds."""
    values = [a / b for a, b in zip(seconds[of], seconds[to], strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


class TrainingStep:
    """A training step as in train.py: forward, backward, gradient clipping, optimiser, teacher."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], device: torch.device, precision: str = "fp32"):
        self.model = model.to(device).train()
        self.optimizer = make_optimizer(self.model, TrainConfig(lr=rate_for(model.config.width)))
        self.batch = {name: value.to(device) for name, value in batch.items()}
        self.device, self.precision = device, precision

    def __call__(self, batch: dict[str, Tensor] | None = None) -> None:
        """Run one step on the given batch, by default the initial one."""
        with runtime.autocast(self.device, self.precision):
            losses = self.model(batch or self.batch)
        self.model.total(losses).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), TrainConfig.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step()


def loader(options: argparse.Namespace) -> dict:
    """Training steps on loaded batches vs. training steps on one repeated batch, with 20 steps per round.

    Only as many rows are used as one round needs, so that the measured rounds find decoded pictures in the cache, as
    all epochs but the first do.
    """
    (preset,), (size,) = options.presets, options.batch_size
    rows = read_rows(options.data or [DATA], "pairs")[: 20 * size]
    tokenizer = Tokenizer.build(caption for row in rows for caption in captions_of(row))
    model = build_model("mamo", PRESETS[preset] | {"vocab_size": len(tokenizer)})
    dataset = Pairs(rows, tokenizer, model.config)
    batches = training_batches(dataset, TwinBatches(rows, size), Collate(tokenizer.pad_id), options.workers)
    noise = {"negative_noise": torch.rand(2, size, size)}
    step = TrainingStep(model, next(batches) | noise, torch.device("cpu"))
    loaded, repeated = lambda: [step(next(batches) | noise) for _ in range(20)], lambda: [step() for _ in range(20)]
    seconds = take_turns({"loaded": loaded, "repeated": repeated}, options.rounds)
    return {"ratios": {"loaded / repeated": ratios(seconds, "loaded", "repeated")}}


def decode(options: argparse.Namespace) -> dict:
    """Reading JPEGs at 256 x 256 px, scaled while decoding (as in training) vs. decoded at full size.

    JPEGs: synthetic photographs of three sizes (noise at all scales) and the first twenty pictures of --data, if given.
    """
    what = "JPEGs read at 256 x 256 px; differences in grey levels of 255"
    report = {"what": what, "rounds": options.rounds, "rows": [], "ratios": {}}
    with tempfile.TemporaryDirectory() as folder:
        kinds = {f"{side} px": [Path(folder, f"{side}.jpg")] for side in (512, 1024, 4000)}
        for side, (path,) in zip((512, 1024, 4000), kinds.values(), strict=True):
            photograph(side).save(path, quality=90)
        if options.data:
            kinds["--data"] = list(dict.fromkeys(row["image"] for row in read_rows(options.data, "pairs")))[:20]
        for kind, paths in kinds.items():
            variants = {
                "scaled": lambda paths=paths: [to_pixels(path, (256, 256)) for path in paths],
                "full": lambda paths=paths: [to_pixels(load_image(path), (256, 256)) for path in paths],
            }
            pairs = zip(*(torch.stack(variant()).float() for variant in variants.values()), strict=True)
            away = torch.stack([(one - other).abs() for one, other in pairs])
            seconds = take_turns(variants, options.rounds)
            rates = {name: len(paths) / statistics.median(some) for name, some in seconds.items()}
            difference = {"mean": away.mean().item(), "largest": away.max().item()}
            report["rows"].append({"pictures": kind, "pictures_per_s": rates, "difference_of_255": difference})
            report["ratios"][f"{kind}: full / scaled"] = ratios(seconds, "full", "scaled")
    return report


ANOTHER = {  # variants compared with fp32, as options of train.py; on a CPU, only those without half precision
    "fp32 again": [],
    "fp32, compiled": ["--compile"],
    "bf16": ["--precision", "bf16"],
    "fp16": ["--precision", "fp16"],
    "bf16, compiled": ["--precision", "bf16", "--compile"],
}


def agreement(options: argparse.Namespace) -> dict:
    """The total loss of 20 steps of train.py vs. the same steps in fp32, with the same batches and masks."""
    device = runtime.pick_device(options.device)
    kinds = {name: more for name, more in ANOTHER.items() if device.type == "cuda" or "--precision" not in more}
    given = ["--data", *(options.data or [DATA]), "--preset", options.presets[0], "--device", options.device]
    given += ["--batch-size", str(options.batch_size[0])]
    totals = {}
    for name, more in ({"fp32": []} | kinds).items():
        torch.compiler.reset()
        with tempfile.TemporaryDirectory() as out:
            run = start_training(*parse_training([*given, "--out", out, "--precision", "fp32", *more]))
            batches = run.batches()
            totals[name] = [run.one_step(batches) for _ in range(20)]
    rows = []
    for name in kinds:
        away = [abs(other / one - 1) for one, other in zip(totals["fp32"], totals[name], strict=True)]
        rows.append({"variant": name, "relative difference": {"first step": away[0], "largest of 20": max(away)}})
        print(f"{name:20} first step {away[0]:.1e}, largest of 20 steps {max(away):.1e}")
    return {"what": agreement.__doc__, "device": str(device), "rows": rows, "ratios": {}}


def frames(options: argparse.Namespace) -> dict:
    """Videos of 1, 2, 4 and 8 frames vs. one frame: time per video for encoding and for a full training step."""
    (preset,), (size,), many = options.presets, options.batch_size, (1, 2, 4, 8)
    report = {"what": f"videos of {preset}, {size} a batch, time per video against one frame", "ratios": {}}
    for objective in options.objectives:
        config = config_of(objective, preset, options)
        variants = {}
        for number in many:
            model = build_model(objective, vars(config) | {"frames": max(many)})
            batch = random_batch(config, size, options.length)
            batch["images"] = torch.randn(size, number, 3, *config.image_size)
            variants[f"step, {number}"] = TrainingStep(model, batch, torch.device("cpu"))
            variants[f"encoder, {number}"] = functools.partial(encoded, model, batch["images"])
        seconds = take_turns(variants, options.rounds)
        for part in ("encoder", "step"):
            report["ratios"] |= {
                f"{objective}, {part}: {number} frames / 1": ratios(seconds, f"{part}, {number}", f"{part}, 1")
                for number in many[1:]
            }
    return report


@torch.no_grad()
def encoded(model: nn.Module, images: Tensor) -> None:
    """Encode pictures and discard the result."""
    model.encode_image(images)


def photograph(side: int) -> Image.Image:
    """A square picture with detail at all scales, like a photograph."""
    draw, picture = np.random.default_rng(0), np.zeros((side, side, 3))
    for cells in (4, 16, 64, 256):
        noise = Image.fromarray(draw.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        picture += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), float) / cells**0.5
    return Image.fromarray((picture * 255 / picture.max()).astype(np.uint8))


def step_of(objective: str, config: Config, size: int, options: argparse.Namespace, device) -> TrainingStep:
    """A training step of a freshly initialised model on a random batch, as configured by the options."""
    model = OBJECTIVES[objective][0](config)
    step = TrainingStep(model, random_batch(config, size, options.length), device, options.precision)
    if options.grad_checkpointing:
        runtime.recompute_blocks(model)
    if options.compile:
        runtime.compile_step(model)
    return step


def config_of(objective: str, preset: str, options: argparse.Namespace) -> Config:
    """The Config of an objective, with the sizes of a preset and the changes that the options specify."""
    model, changes = OBJECTIVES[objective]
    shape = {"vocab_size": options.vocab_size, "max_tokens": max(Config.max_tokens, options.length)}
    if options.image_size:
        shape["image_size"] = options.image_size
    if options.drop_masked and objective == "mamo":
        shape["drop_masked"] = True
    return model.config_class(**PRESETS[preset] | shape | changes)


class Repeated:
    """An action for take_turns, repeated until a turn has its minimum duration, at most 50 times.

    If the action exhausts GPU memory, only this action is dropped: `action` becomes None, and its turns do nothing.
    """

    def __init__(self, device: torch.device, make: Callable[..., Callable[[], object]], *arguments):
        """make(*arguments) returns the action, which runs on `device`; it may run out of memory"""
        before = 0.0
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)
            before = runtime.peak_memory_mb(device)
        self.device, self.times, self.action = device, 1, None
        try:
            self.action = make(*arguments)
        except torch.OutOfMemoryError:
            return
        self()  # the first call allocates the optimiser state
        start = time.perf_counter()
        self()
        self.times = min(max(round(TURN / (time.perf_counter() - start)), 1), 50)
        self.peak_memory_mb = runtime.peak_memory_mb(device) - before

    def __call__(self) -> None:
        """Run one turn and wait until the device has finished."""
        try:
            for _ in range(self.times if self.action else 0):
                self.action()
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
        except torch.OutOfMemoryError:
            self.action = None


def products(device: torch.device, precision: str) -> tuple[dict[str, Repeated], int]:
    """Large matrix products of several shapes, and the number of floating-point operations in each product."""
    side = SIDE if device.type == "cpu" else 8 * SIDE
    dtype = runtime.PRECISIONS[precision] or torch.float32
    actions = {}
    for rows, inner in ((side, side), (2 * side, side // 2), (side // 2, 2 * side)):
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(inner, side, device=device, dtype=dtype)
        actions[f"product {rows} {inner} {side}"] = Repeated(device, functools.partial, torch.mm, left, right)
    return actions, 2 * side**3


def measure(preset: str, size: int, options: argparse.Namespace, device: torch.device, report: dict) -> None:
    """Measure one preset and batch size: add one row per objective to the report, and its ratio to the control."""
    gc.collect()  # free the models of earlier measurements now rather than at some later time
    if options.compile:
        torch.compiler.reset()  # and their compiled code: recompilations per function are limited
    configs = {name: config_of(name, preset, options) for name in options.objectives}
    steps = {name: Repeated(device, step_of, name, config, size, options, device) for name, config in configs.items()}
    multiply, operations = products(device, options.precision)
    actions = steps | multiply
    seconds = take_turns(actions, options.rounds)
    seconds = {name: [s / actions[name].times for s in values] for name, values in seconds.items()}
    best = min(multiply, key=lambda name: statistics.median(seconds[name]))
    rates = [operations / s for s in seconds[best]]

    totals = {}  # FLOPs of a step, or 0 where the formula does not apply
    for name, config in configs.items():
        row = {"preset": preset, "objective": name, "batch_size": size, "image_size": list(config.image_size)}
        report["rows"].append(row)
        if not steps[name].action:
            row["error"] = "out of memory"
            continue
        why = uncounted(steps[name].action.model.student.fusion)
        flops = {} if why else flops_of_step(config, size, options.length)
        totals[name] = sum(flops.values())
        row |= row_of(size, flops, seconds[name], rates) | ({"not_quoted": why} if why else {})
        row["peak_memory_mb" if device.type == "cuda" else "peak_memory_so_far_mb"] = steps[name].peak_memory_mb
    for name in totals if "control" in totals else ():
        title = f"{preset}, batch {size}: {name} / control"
        if name != "control":
            report["ratios"][title] = ratios(seconds, name, "control")
        if name != "control" and totals[name]:
            report["by_formula"][title] = totals[name] / totals["control"]


def row_of(size: int, flops: dict[str, int], seconds: list[float], rates: list[float]) -> dict:
    """The row of one measured step. flops: by part, empty if the formula does not apply; seconds: of the step in each
    round; rates: of the matrix products in the same rounds, in operations per second."""
    median = statistics.median(seconds)
    row = {"ms_per_step": 1000 * median, "pairs_per_s": size / median}
    row["product_gflop_per_s"] = statistics.median(rates) / 1e9
    if flops:
        total = sum(flops.values())
        shares = [total / (s * rate) for s, rate in zip(seconds, rates, strict=True)]
        row["gflop"] = {"step": total / 1e9} | {part: value / 1e9 for part, value in flops.items()}
        row["gflop_per_pair"] = total / 1e9 / size
        row["utilisation"] = {"median": statistics.median(shares), "min": min(shares), "max": max(shares)}
    return row


def table(rows: list[dict]) -> str:
    """The rows of `step` as a plain-text table."""
    titles = ("ms/step", "pairs/s", "GFLOP/step", "product GFLOP/s", "utilisation", "peak MB")
    lines = [f"{'preset':8}{'objective':10}{'batch':>6}" + "".join(f"{title:>16}" for title in titles)]
    for row in rows:
        line = f"{row['preset']:8}{row['objective']:10}{row['batch_size']:>6}"
        if "error" in row:
            lines.append(f"{line}  {row['error']}")
            continue
        peak = row.get("peak_memory_mb") or row["peak_memory_so_far_mb"]
        values = [row["ms_per_step"], row["pairs_per_s"], row.get("gflop", {}).get("step"), row["product_gflop_per_s"]]
        values += [row.get("utilisation", {}).get("median"), peak]
        digits = zip(values, (1, 1, 1, 1, 3, 0), strict=True)
        lines.append(line + "".join(f"{'-' if value is None else f'{value:.{n}f}':>16}" for value, n in digits))
    return "\n".join(lines + sorted({row["not_quoted"] for row in rows if "not_quoted" in row}))


def step(options: argparse.Namespace) -> dict:
    """Full training steps for every preset, objective and batch size."""
    device = runtime.pick_device(options.device)
    options.precision, _ = runtime.pick_precision(options.precision, device)
    about = {"device": str(device), "precision": options.precision, "threads": torch.get_num_threads()}
    report = about | {"rounds": options.rounds, "rows": [], "ratios": {}, "by_formula": {}}
    for preset in options.presets:
        for size in options.batch_size:
            measure(preset, size, options, device, report)
    print(table(report["rows"]))
    return report


COMMANDS = {"step": step, "loader": loader, "decode": decode, "agreement": agreement, "frames": frames}


def parse() -> argparse.Namespace:
    """Parse the command line. Raises ValueError for sizes that cannot be measured."""
    parser = runtime.Parser(
        prog="python -m tools.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["nano"], help="only step accepts several")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64], help="pairs; only step accepts several")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["mamo", "control"], help="for step")
    parser.add_argument("--image-size", type=int, nargs="+", help="pixels, overriding the preset, for step")
    parser.add_argument("--length", type=int, default=30, help="tokens per text, for step")
    parser.add_argument("--vocab-size", type=int, default=30522, help="vocabulary size, for step")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu, for step")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16, for step")
    parser.add_argument("--compile", action="store_true", help="compile the step, for step")
    parser.add_argument("--drop-masked", action="store_true", help="MAMO's option of the same name, for step")
    parser.add_argument("--grad-checkpointing", action="store_true", help="recompute blocks in backward, for step")
    parser.add_argument("--data", nargs="+", help=f"JSONL files, for loader (default: {DATA}) and decode")
    parser.add_argument("--workers", type=int, default=0, help="number of data-loading processes, for loader")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of CPU threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    for name, least in {"length": 1, "vocab_size": 6, "threads": 1, "rounds": 1}.items():
        if getattr(options, name) < least:
            raise ValueError(f"{name} is {getattr(options, name)}: give {least} or more")
    if min(options.batch_size) < 2:
        raise ValueError(f"batch_size is {min(options.batch_size)}: contrast and matching need at least 2 pairs")
    for name in ("presets", "batch_size"):
        if options.command in ("loader", "agreement", "frames") and len(getattr(options, name)) > 1:
            raise ValueError(f"{options.command} takes one of {name}, and {len(getattr(options, name))} were given")
    return options


def main() -> None:
    """Command-line entry point: run one measurement, print its ratios and, with --out, write them to a file."""
    options = parse()
    runtime.keep_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report = runtime.how_made("-m tools.benchmark") | COMMANDS[options.command](options)
    for name, ratio in report["ratios"].items():
        formula = report.get("by_formula", {}).get(name)
        told = f"{ratio['rounds']} rounds" + (f", by formula {formula:.3f}" if formula else "")
        print(f"{name}: {ratio['median']:.3f} (from {ratio['min']:.3f} to {ratio['max']:.3f}, {told})")
    if options.out:
        runtime.write_json(options.out, report)


if __name__ == "__main__":
    runtime.guarded(main)
