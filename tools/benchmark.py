"""Measure speed as ratios within one run; absolute times on a shared machine mean little.

    python -m tools.benchmark step --presets nano --length 14 --vocab-size 125   a whole step, and what bounds it
    python -m tools.benchmark step --presets base --image-size 224 --batch-size 32 64 --precision bf16 --device cuda
    python -m tools.benchmark sharing --preset base --batch-size 2     what encoding each distinct input once is worth
    python -m tools.benchmark loader --data data/scenes/pairs_train.jsonl   real batches against a repeated one

The variants take turns, round by round, so that a machine that slows down slows all of them; quoted is the median of
the ratios of the rounds, with the smallest and the largest.

`step` makes whole training steps, on one random batch, of each preset, objective and batch size. Their floating-point
operations follow from a formula, and utilisation is their rate as a share of that of large matrix products, of the
best of several shapes, in the same round. With --data it also loads batches, first with pictures that were decoded
before, then without; with --sharing it repeats what `sharing` measures, for the whole step. Peak memory is each
variant's own on a GPU; on a CPU it is the peak of the process so far, so there only the first row's is its own.
"""

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import runtime
from data import Collate, Pairs, TwinBatches, captions_of, read_rows, training_batches
from mamo import MAMO, PRESETS, Config, MAMOConfig, at, hide_patches, hide_words, normalised, same_pairs
from siblings import OBJECTIVES
from tokenizer import Tokenizer
from tools.costs import flops_of_step
from train import TrainConfig, compile_step, make_optimizer, recompute_blocks

DATA = "data/scenes/pairs_train.jsonl"  # what `loader` loads unless told otherwise
TURN = 0.2  # seconds that a turn of `step` lasts at least
SIDE = 1024  # of the large matrices on a CPU; eight times that on a GPU


def random_batch(config: Config, size: int, length: int) -> dict[str, Tensor]:
    """A batch of random pictures and words of one length, all pairs different."""
    input_ids = torch.randint(max(config.special_ids) + 1, config.vocab_size, (size, length))
    return {
        "images": torch.randn(size, 3, *config.image_size),
        "input_ids": input_ids,
        "attention_mask": torch.ones(size, length, dtype=torch.bool),
        "image_id": torch.arange(size),
        "caption_id": torch.arange(size),
        "patch_noise": torch.rand(size, config.patches),
        "token_noise": torch.rand(size, length),
        "replace_noise": torch.rand(size, length),
        "negative_noise": torch.rand(2, size, size),
    }


def separate_losses(model: MAMO, batch: dict[str, Tensor], share: str = "nothing") -> dict[str, Tensor]:
    """The five losses with every pass encoded separately; equal in value to model(batch).

    Args:    share   "nothing": each loss makes its own passes, 8 of the student's encoders and 7 of its fusion;
                     "passes": losses share their five fusion passes, but each pass encodes its own picture and text
    """
    config, images, ids, real = model.config, batch["images"], batch["input_ids"], batch["attention_mask"]
    patch_index, patch_mask = hide_patches(batch["patch_noise"], config.mask_image)
    words = hide_words(ids, real, batch["token_noise"], batch["replace_noise"], config.mask_text, config)
    kept = {}

    def fuse(name: str, images: Tensor, mask: Tensor | None, ids: Tensor, real: Tensor):
        """Encode a picture and a text from scratch and fuse them, at every position."""
        if share == "passes" and name in kept:
            return kept[name]
        image, text = model.encode_image(images, mask), model.encode_text(ids, real)
        kept[name] = image, text, model.fuse(image, text, real)
        return kept[name]

    if share == "passes":
        image, text, _ = fuse("IT", images, None, ids, real)
    else:
        image, text = model.encode_image(images), model.encode_text(ids, real)
    image_embed, text_embed = model.embed_image(image), model.embed_text(text)
    losses = {"itc": model.loss_itc(image_embed, text_embed, same_pairs(batch, True), image_embed, text_embed)}

    similarity, same = (image_embed @ text_embed.T).detach(), same_pairs(batch)
    texts, valid_text = model.draw_negatives(similarity, same, batch["negative_noise"][0])
    others, valid_image = model.draw_negatives(similarity.T, same, batch["negative_noise"][1])
    positive = fuse("IT", images, None, ids, real)[2].pair
    negative = [
        fuse("IT-", images, None, ids[texts], real[texts])[2].pair,
        fuse("I-T", images[others], None, ids, real)[2].pair,
    ]
    losses["itm"] = model.loss_itm(positive, torch.cat(negative), torch.cat([valid_text, valid_image]))

    with torch.no_grad():
        teacher_image, teacher_text = model.teacher.image(images), model.teacher.text(ids, real)
        target = model.teacher.fusion(teacher_image, teacher_text, real)
        if share == "nothing":
            teacher_image = model.teacher.image(images)  # once more, for MIM
    patch_target = normalised(at(target.image, 1 + patch_index))
    word_target = normalised(at(target.text, words.index))
    at_patches = at(fuse("I'T", images, patch_mask, ids, real)[2].image, 1 + patch_index)
    at_words = at(fuse("IT'", images, None, words.input_ids, real)[2].text, words.index)
    losses["mrm"] = model.loss_mrm(at_patches, patch_target, at_words, word_target, words.valid)
    at_patches = at(fuse("I'T", images, patch_mask, ids, real)[2].image, 1 + patch_index)
    losses["mim"] = model.loss_mim(at_patches, normalised(at(teacher_image, 1 + patch_index)))
    at_words = at(fuse("IT'", images, None, words.input_ids, real)[2].text, words.index)
    losses["mlm"] = model.loss_mlm(at_words, words.labels, words.valid)
    return losses


def backward(losses: dict[str, Tensor], config: Config) -> None:
    """Gradients of the weighted total, as in a step of train.py."""
    sum(weight * losses[name] for name, weight in config.weights.items() if weight > 0).backward()


def take_turns(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round that does not count."""
    seconds = {name: [] for name in variants}
    for counted in range(-1, rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            if counted >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], of: str, to: str) -> dict[str, float]:
    """Median, smallest and largest ratio of two variants, round by round."""
    values = [a / b for a, b in zip(seconds[of], seconds[to], strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def sharing(options: argparse.Namespace) -> dict:
    """Forward and backward pass of a preset against the same losses with every pass encoded separately."""
    config = MAMOConfig(**shape_of(options.preset, options), ema=0.995)
    model = MAMO(config)
    batch = random_batch(config, options.batch_size[0], options.length)

    def step(losses: Callable) -> Callable[[], None]:
        def variant():
            backward(losses(batch), config)
            model.zero_grad()

        return variant

    variants = {
        "shared": step(model),
        "separate passes": step(lambda batch: separate_losses(model, batch, "passes")),
        "separate losses": step(lambda batch: separate_losses(model, batch)),
    }
    seconds = take_turns(variants, options.rounds)
    return {"ratios": {f"shared / {name}": ratios(seconds, "shared", name) for name in variants if name != "shared"}}


def loader(options: argparse.Namespace) -> dict:
    """Training steps that load their batches against steps on one repeated batch, 20 steps a round.

    On as many rows as a round takes, so that the rounds that count find decoded pictures, as all epochs but the first.
    """
    size = options.batch_size[0]
    rows = read_rows(options.data or [DATA], "pairs")[: 20 * size]
    tokenizer = Tokenizer.build(caption for row in rows for caption in captions_of(row))
    config = MAMOConfig(**PRESETS[options.preset], vocab_size=len(tokenizer), ema=0.98)
    model = MAMO(config)
    optimizer = make_optimizer(model, TrainConfig())
    dataset = Pairs(rows, tokenizer, config.image_size, config.patches, config.max_tokens)
    batches = training_batches(dataset, TwinBatches(rows, size), Collate(dataset.tokenizer.pad_id), options.workers)
    repeated = next(batches)
    noise = torch.rand(2, size, size)

    def steps(take: Callable[[], dict]) -> Callable[[], None]:
        def variant():
            for _ in range(20):
                backward(model(take() | {"negative_noise": noise}), config)
                optimizer.step()
                optimizer.zero_grad()
                model.after_step()

        return variant

    seconds = take_turns({"loaded": steps(lambda: next(batches)), "repeated": steps(lambda: repeated)}, options.rounds)
    return {"ratios": {"loaded / repeated": ratios(seconds, "loaded", "repeated")}}


def shape_of(preset: str, options: argparse.Namespace) -> dict:
    """Fields of mamo.Config: the preset's, and what the options say."""
    given = {"image_size": options.image_size} if options.image_size else {}
    words = {"vocab_size": options.vocab_size, "max_tokens": max(Config.max_tokens, options.length)}
    return PRESETS[preset] | given | words


def config_of(objective: str, preset: str, options: argparse.Namespace) -> Config:
    """The Config of an objective at a preset's sizes, with a teacher as in a long run where it has one."""
    model, changes = OBJECTIVES[objective]
    config = model.config_class(**shape_of(preset, options) | changes)
    if hasattr(config, "ema"):
        config.ema = 0.995
    return config


class Repeated:
    """An action for take_turns, made as often as fills a turn, at most 50 times.

    A GPU that has no room for the action ends it and not the run: `action` is then None and a turn does nothing.
    """

    def __init__(self, device: torch.device, make: Callable[..., Callable[[], object]], *arguments):
        """device: where the action works; make: called with the arguments, returns the action; may find no room"""
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
        self()  # the first time makes what the optimiser keeps
        start = time.perf_counter()
        self()
        self.times = min(max(round(TURN / (time.perf_counter() - start)), 1), 50)
        self.peak_memory_mb = runtime.peak_memory_mb(device) - before

    def __call__(self) -> None:
        """One turn, to its end on the device."""
        try:
            for _ in range(self.times if self.action else 0):
                self.action()
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
        except torch.OutOfMemoryError:
            self.action = None


class TrainingStep:
    """A whole training step as train.py makes it, on one random batch: forward, backward, clip, AdamW, teacher."""

    def __init__(self, objective: str, config: Config, size: int, options: argparse.Namespace, device: torch.device):
        self.model = OBJECTIVES[objective][0](config).to(device).train()
        self.optimizer = make_optimizer(self.model, TrainConfig())
        batch = random_batch(self.model.config, size, options.length)
        self.batch = {name: value.to(device) for name, value in batch.items()}
        self.device, self.dtype = device, runtime.PRECISIONS[options.precision]
        if options.grad_checkpointing:
            recompute_blocks(self.model)
        if options.compile:
            compile_step(self.model)

    def __call__(self, losses: Callable | None = None) -> None:
        """One step; with losses, by that function of the batch in the model's place."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            found = (losses or self.model)(self.batch)
        backward(found, self.model.config)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), TrainConfig.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step()

    def separate(self, share: str) -> None:
        """One step with every pass encoded separately, see separate_losses."""
        self(lambda batch: separate_losses(self.model, batch, share))


def products(device: torch.device, precision: str) -> tuple[dict[str, Repeated], int]:
    """Large matrix products of several shapes, and the floating-point operations of any one of them."""
    side = SIDE if device.type == "cpu" else 8 * SIDE
    dtype = runtime.PRECISIONS[precision] or torch.float32
    actions = {}
    for rows, inner in ((side, side), (2 * side, side // 2), (side // 2, 2 * side)):
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(inner, side, device=device, dtype=dtype)
        actions[f"product {rows} {inner} {side}"] = Repeated(device, functools.partial, torch.mm, left, right)
    return actions, 2 * side**3


def loading(rows: list[dict], config: Config, size: int) -> dict[str, Callable[[], object]]:
    """Loading a batch of real data with pictures that were decoded before, as all epochs but the first, and without."""
    rows = rows[: 4 * size]
    tokenizer = Tokenizer.build(caption for row in rows for caption in captions_of(row))
    dataset = Pairs(rows, tokenizer, config.image_size, config.patches, config.max_tokens)
    batches = training_batches(dataset, TwinBatches(rows, size), Collate(dataset.tokenizer.pad_id), workers=0)
    for _ in range(4):
        next(batches)

    def decode():
        kept, dataset.pictures.kept = dataset.pictures.kept, {}
        next(batches)
        dataset.pictures.kept = kept

    return {"loading": lambda: next(batches), "loading and decoding": decode}


def measure(preset: str, size: int, options: argparse.Namespace, device, data: list[dict]) -> tuple[list[dict], dict]:
    """One preset and batch size: a row for each objective, and the ratios between what took turns, by name."""
    gc.collect()  # the models that were measured before go now, and not at some time later
    if options.compile:
        torch.compiler.reset()  # and so does their code: only a few kinds of one function can be compiled
    configs = {name: config_of(name, preset, options) for name in options.objectives}
    actions = {
        name: Repeated(device, TrainingStep, name, config, size, options, device) for name, config in configs.items()
    }
    if options.sharing and actions["mamo"].action:
        step = actions["mamo"].action
        actions["separate passes"] = Repeated(device, functools.partial, step.separate, "passes")
        actions["separate losses"] = Repeated(device, functools.partial, step.separate, "nothing")
    if data:
        loads = loading(data, configs[options.objectives[0]], size)
        actions |= {name: Repeated(torch.device("cpu"), functools.partial, load) for name, load in loads.items()}
    multiply, operations = products(device, options.precision)
    actions |= multiply
    seconds = take_turns(actions, options.rounds)
    seconds = {name: [s / actions[name].times for s in values] for name, values in seconds.items()}
    best = min(multiply, key=lambda name: statistics.median(seconds[name]))
    rates = [operations / s for s in seconds[best]]

    rows = []
    for name, config in configs.items():
        rows.append({"preset": preset, "objective": name, "batch_size": size, "image_size": list(config.image_size)})
        if not actions[name].action:
            rows[-1]["error"] = "out of memory"
            continue
        rows[-1] |= row_of(size, flops_of_step(config, size, options.length), seconds[name], rates)
        key = "peak_memory_mb" if device.type == "cuda" else "peak_memory_so_far_mb"
        rows[-1][key] = actions[name].peak_memory_mb
    pairs = [(name, "control") for name in options.objectives if name != "control"]
    pairs += [("mamo", other) for other in ("separate passes", "separate losses")]
    pairs += [(load, name) for load in ("loading", "loading and decoding") for name in options.objectives]
    return rows, {
        f"{preset}, batch {size}: {of} / {to}": ratios(seconds, of, to)
        for of, to in pairs
        if all(name in actions and actions[name].action for name in (of, to))
    }


def row_of(size: int, flops: dict[str, int], seconds: list[float], rates: list[float]) -> dict:
    """What the rounds say of a step. seconds: of a step; rates: of matrix products, in operations per second."""
    total, median = sum(flops.values()), statistics.median(seconds)
    shares = [total / (s * rate) for s, rate in zip(seconds, rates, strict=True)]
    return {
        "ms_per_step": 1000 * median,
        "pairs_per_s": size / median,
        "gflop": {"step": total / 1e9} | {part: value / 1e9 for part, value in flops.items()},
        "gflop_per_pair": total / 1e9 / size,
        "product_gflop_per_s": statistics.median(rates) / 1e9,
        "utilisation": {"median": statistics.median(shares), "min": min(shares), "max": max(shares)},
    }


def by_formula(rows: list[dict]) -> dict[str, float]:
    """What the formula says of the ratios of steps to those of the control, by the names of the measured ones."""
    operations = {
        (row["preset"], row["batch_size"], row["objective"]): row["gflop"]["step"] for row in rows if "gflop" in row
    }
    return {
        f"{preset}, batch {size}: {objective} / control": value / operations[preset, size, "control"]
        for (preset, size, objective), value in operations.items()
        if objective != "control" and (preset, size, "control") in operations
    }


def table(rows: list[dict]) -> str:
    """The rows of `step` as text."""
    titles = ("ms/step", "pairs/s", "GFLOP/step", "product GFLOP/s", "utilisation", "peak MB")
    lines = [f"{'preset':8}{'objective':10}{'batch':>6}" + "".join(f"{title:>16}" for title in titles)]
    for row in rows:
        line = f"{row['preset']:8}{row['objective']:10}{row['batch_size']:>6}"
        if "error" in row:
            lines.append(f"{line}  {row['error']}")
            continue
        peak = row.get("peak_memory_mb") or row["peak_memory_so_far_mb"]
        values = (row["ms_per_step"], row["pairs_per_s"], row["gflop"]["step"], row["product_gflop_per_s"])
        cells = [f"{value:.1f}" for value in values] + [f"{row['utilisation']['median']:.3f}", f"{peak:.0f}"]
        lines.append(line + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def step(options: argparse.Namespace) -> dict:
    """Whole training steps of every preset, objective and batch size."""
    device = runtime.pick_device(options.device)
    options.precision, _ = runtime.pick_precision(options.precision, device)
    if options.sharing and (options.compile or "mamo" not in options.objectives):
        raise ValueError("--sharing compares steps of mamo that are not compiled: leave out --compile, ask for mamo")
    data = read_rows(options.data, "pairs") if options.data else []
    rows, found = [], {}
    for preset in options.presets:
        for size in options.batch_size:
            some, between = measure(preset, size, options, device, data)
            rows, found = rows + some, found | between
    print(table(rows))
    about = {"device": str(device), "precision": options.precision, "threads": torch.get_num_threads()}
    return about | {"rounds": options.rounds, "rows": rows, "ratios": found, "by_formula": by_formula(rows)}


def parse() -> argparse.Namespace:
    """The command line. Raises ValueError for sizes that cannot be measured."""
    parser = runtime.Parser(
        prog="python -m tools.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("step", "sharing", "loader"))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["nano"], help="for step")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["mamo", "control"], help="for step")
    parser.add_argument("--preset", choices=PRESETS, default="nano", help="for sharing and loader")
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[64], help="pairs; for step several sizes if asked"
    )
    parser.add_argument("--image-size", type=int, nargs="+", help="height and width in pixels in the preset's place")
    parser.add_argument("--length", type=int, default=30, help="tokens of a text, for step and sharing")
    parser.add_argument("--vocab-size", type=int, default=30522, help="words of the vocabulary, for step and sharing")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu, for step")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16, for step")
    parser.add_argument("--compile", action="store_true", help="compile the step, for step")
    parser.add_argument("--grad-checkpointing", action="store_true", help="compute the blocks twice, for step")
    parser.add_argument("--sharing", action="store_true", help="also mamo with every pass encoded separately, for step")
    parser.add_argument("--data", nargs="+", help=f"JSONL files; for loader {DATA} if none is given")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data, for loader")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the processor")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write the result to")
    options = parser.parse_args()
    for name, least in {"length": 1, "vocab_size": 6, "threads": 1, "rounds": 1}.items():
        if getattr(options, name) < least:
            raise ValueError(f"{name} is {getattr(options, name)}: give {least} or more")
    if min(options.batch_size) < 2:
        raise ValueError(f"batch_size is {min(options.batch_size)}: contrast and matching need at least 2 pairs")
    if options.command != "step" and len(options.batch_size) > 1:
        raise ValueError(f"{options.command} takes one batch_size, and {len(options.batch_size)} were given")
    return options


def main() -> None:
    """Command line: run one measurement, print its ratios and, with --out, write them."""
    options = parse()
    runtime.keep_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report = runtime.how_made("-m tools.benchmark")
    report |= {"step": step, "sharing": sharing, "loader": loader}[options.command](options)
    for name, ratio in report["ratios"].items():
        formula = report.get("by_formula", {}).get(name)
        told = f"{ratio['rounds']} rounds" + (f", by formula {formula:.3f}" if formula else "")
        print(f"{name}: {ratio['median']:.3f} (from {ratio['min']:.3f} to {ratio['max']:.3f}, {told})")
    if options.out:
        runtime.write_json(options.out, report)


if __name__ == "__main__":
    runtime.guarded(main)
