"""Measure speed as ratios within one run; absolute times on a shared machine mean little.

    python benchmark.py sharing --preset base --batch-size 2     what encoding each distinct input once is worth
    python benchmark.py loader --data data/scenes/pairs_train.jsonl   a step on real batches against one repeated batch

The variants take turns, round by round, so that a machine that slows down slows all of them; quoted is the median of
the ratios of the rounds, with the smallest and the largest.
"""

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import runtime
from data import Pairs, TwinBatches, captions_of, read_rows, training_batches
from mamo import MAMO, PRESETS, Config, at, hide_patches, hide_words, normalised, same_pairs
from tokenizer import Tokenizer
from train import TrainConfig, make_optimizer


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
    words = hide_words(ids, real, batch["token_noise"], batch["replace_noise"], config)
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
    sum(weight * losses[name] for name, weight in config.weights.items()).backward()


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
    """The whole step of a preset against the same losses with every pass encoded separately."""
    config = Config(**PRESETS[options.preset], vocab_size=options.vocab_size, ema=0.995)
    model = MAMO(config)
    batch = random_batch(config, options.batch_size, options.length)

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
    return {f"shared / {name}": ratios(seconds, "shared", name) for name in variants if name != "shared"}


def loader(options: argparse.Namespace) -> dict:
    """Training steps that load their batches against steps on one repeated batch, 20 steps a round.

    On as many rows as a round takes, so that the rounds that count find decoded pictures, as all epochs but the first.
    """
    rows = read_rows(options.data, "pairs")[: 20 * options.batch_size]
    tokenizer = Tokenizer.build(caption for row in rows for caption in captions_of(row))
    config = Config(**PRESETS[options.preset], vocab_size=len(tokenizer), ema=0.98)
    model = MAMO(config)
    optimizer = make_optimizer(model, TrainConfig())
    dataset = Pairs(rows, tokenizer, config.image_size, config.patches, config.max_tokens)
    batches = training_batches(dataset, TwinBatches(rows, options.batch_size), options.workers)
    repeated = next(batches)
    noise = torch.rand(2, options.batch_size, options.batch_size)

    def steps(take: Callable[[], dict]) -> Callable[[], None]:
        def variant():
            for _ in range(20):
                backward(model(take() | {"negative_noise": noise}), config)
                optimizer.step()
                optimizer.zero_grad()
                model.after_step()

        return variant

    seconds = take_turns({"loaded": steps(lambda: next(batches)), "repeated": steps(lambda: repeated)}, options.rounds)
    return {"loaded / repeated": ratios(seconds, "loaded", "repeated")}


def main() -> None:
    """Command line: run one measurement, print its ratios and, with --out, write them."""
    parser = runtime.Parser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("sharing", "loader"))
    parser.add_argument("--preset", choices=PRESETS, default="nano")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--length", type=int, default=30, help="tokens of a text, for sharing")
    parser.add_argument("--vocab-size", type=int, default=30522, help="size of the vocabulary, for sharing")
    parser.add_argument("--data", nargs="+", default=["data/scenes/pairs_train.jsonl"], help="JSONL files, for loader")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data, for loader")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write the result to")
    options = parser.parse_args()
    torch.manual_seed(0)
    result = {"sharing": sharing, "loader": loader}[options.command](options)
    for name, ratio in result.items():
        print(
            f"{name}: {ratio['median']:.3f} (from {ratio['min']:.3f} to {ratio['max']:.3f}, {ratio['rounds']} rounds)"
        )
    if options.out:
        command = " ".join(["python", "benchmark.py", *sys.argv[1:]])
        hardware = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
        report = {"command": command, "hardware": hardware, "date": datetime.date.today().isoformat(), "ratios": result}
        runtime.write_json(options.out, report)


if __name__ == "__main__":
    runtime.guarded(main)
