"""From JSONL files and pictures to batches.

There is one reading path for every data set: the built-in world, your own files, converted official releases.
reading/rows.py defines what a row holds, and reads and checks it. Here a row of `pairs` is {"image": path, "caption":
text or list of texts}, and rows that share the optional key "twin" stay in one batch. A row may have "video" instead of
"image": all that is said of pictures here applies to videos too, with one more dimension, their f frames.

Randomness belongs to the sample. The order of rows follows from (seed, epoch); augmentation, the choice of a caption
and the noise for both masks follow from (seed, epoch, row). So a resumed run, or one with another number of workers or
processes, sees the same samples, masked in the same way.

How to read it: first how a row becomes a sample and samples a batch, then which rows share a batch, and last pictures.
Augmentation is in reading/augment.py.
"""

import hashlib
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import runtime
from mamo import Config
from reading.augment import aerial, drawing, photo, shuffle_boxes, strong
from reading.pictures import load_image, size_of  # noqa: F401
from reading.rows import (  # noqa: F401  all that reading has, for whoever imports data
    CHECKS,
    ENTAILMENT_LABELS,
    SCHEMAS,
    captions_of,
    check_row,
    content_of,
    is_text,
    json_lines,
    lines_of,
    open_rows,
    pictures_of,
    read_rows,
    resolved,
    sample_of,
    twins_of,
    videos_of,
)
from reading.videos import (  # noqa: F401
    choose_frames,
    count_frames,
    files_of,
    is_video,
    load_frames,
    shown,
    some_frames,
    video_of,
)
from tokenizer import Tokenizer, pad

# ------------------------------------------------------------------------------------------------- samples and batches


class Pairs(Dataset):
    """Rows of `pairs` as training samples. A sample's key is (epoch, row), and all its randomness follows from it."""

    def __init__(
        self, rows: Sequence[dict], tokenizer: Tokenizer, config: Config, augment: str = "none", seed: int = 0
    ):
        self.rows, self.tokenizer, self.config, self.seed = rows, tokenizer, config, seed
        self.pictures = Pictures(config, augment, len(rows))
        self.folder = os.path.dirname(resolved(files_of(rows[0]["image"])[0]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, number = key
        row, n, l = self.rows[number], self.config.num_patches, self.config.max_tokens  # noqa: E741
        rng = np.random.default_rng([self.seed, epoch, number])
        noise = torch.from_numpy(rng.random(n + 2 * l, dtype=np.float32))
        patch_noise, token_noise, replace_noise = noise.split([n, l, l])
        captions = captions_of(row)
        input_ids = self.tokenizer.encode(captions[rng.integers(len(captions))], l)
        files = [os.path.relpath(resolved(file), self.folder) for file in files_of(row["image"])]
        return {
            "images": self.pictures(row["image"], rng),
            "input_ids": input_ids,
            # The path relative to the first picture's folder, so that data can be moved.
            "image_id": stable_id("\n".join(files)),
            "caption_id": stable_id(str(input_ids)),
            "patch_noise": patch_noise,
            "token_noise": token_noise,
            "replace_noise": replace_noise,
        }


@dataclass
class Collate:
    """Samples -> a batch, padded to its longest caption. A class, because worker processes need to pickle it.

    length: if given, every batch is padded to this number of tokens, for a compiled step
    """

    pad_id: int
    length: int = 0

    def __call__(self, samples: list[dict]) -> dict[str, Tensor]:
        input_ids, attention_mask = pad([sample["input_ids"] for sample in samples], self.pad_id, self.length)
        length = input_ids.shape[1]
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        for name in ("image_id", "caption_id"):
            batch[name] = torch.tensor([sample[name] for sample in samples])
        for name in ("images", "patch_noise"):
            batch[name] = torch.stack([sample[name] for sample in samples])
        # Noise is cut, not drawn again, so padding does not change the masks.
        for name in ("token_noise", "replace_noise"):
            batch[name] = torch.stack([sample[name][:length] for sample in samples])
        return batch


def make_batch(
    images: Tensor | list, texts: list[str], config: Config, tokenizer: Tokenizer | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """A batch for a model's forward pass, with all noise, from pictures and texts of your own.

    Args:    images      a tensor (b, 3, height, width) with values in [-1, 1], or a list of paths or PIL images; for
                         videos (b, f, 3, height, width), or names from video_of
             texts       b texts
             tokenizer   with the vocabulary of the config; without one, words are spelled letter by letter
             seed        decides all noise
    Raises:  ValueError if the numbers of pictures and texts differ, or the tokenizer does not fit the config
    """
    tokenizer = tokenizer or Tokenizer.build([])
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} words and config.vocab_size is {config.vocab_size}")
    if isinstance(texts, str) or len(images) != len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} texts: give a list of each, one text for each image")
    names = [resolved(image) if isinstance(image, str | Path) else number for number, image in enumerate(images)]
    if not isinstance(images, Tensor):
        images = torch.stack([to_tensor(image, config.image_size, config.frames) for image in images])
    input_ids, attention_mask = tokenizer(texts, config.max_tokens)
    (b, l), draw = input_ids.shape, torch.Generator().manual_seed(seed)  # noqa: E741
    return {
        "images": images,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "image_id": torch.tensor([stable_id(str(name)) for name in names]),
        "caption_id": torch.tensor([stable_id(str(tokenizer.encode(text, config.max_tokens))) for text in texts]),
        "patch_noise": torch.rand(b, config.num_patches, generator=draw),
        "token_noise": torch.rand(b, l, generator=draw),
        "replace_noise": torch.rand(b, l, generator=draw),
        "negative_noise": torch.rand(2, b, b, generator=draw),
    }


def stable_id(text: str) -> int:
    """A 63-bit number that is the same for the same text in every process and every run."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big") >> 1


def count_truncated(texts: Iterable[str], tokenizer: Tokenizer, max_tokens: int) -> int:
    """Number of texts that are truncated: longer than max_tokens, including [CLS] and [SEP]."""
    return sum(len(tokenizer.encode(text)) > max_tokens for text in texts)


# ------------------------------------------------------------------------------------------ which rows share a batch


class TwinBatches:
    """Endless batches of sample keys (epoch, row), beginning at a given batch. Twins stay together.

    An epoch orders the groups (twins, or single rows) by (seed, epoch), drops the last rows, which do not fill a batch,
    and fills parts of equal size: with the largest groups first, as many as fit, then with the smallest; if none fits,
    one is split. Parts are shuffled, and several make a batch. Processes share a batch by its parts, so every number of
    processes that divides the parts sees the same batches, and twins are on one process. A batch holds either pictures
    or videos; if there are both, each kind fills its own batches, and these are shuffled together.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        batch_size: int,
        seed: int = 0,
        first: int = 0,
        rank: int = 0,
        processes: int = 1,
        parts: int = 1,
    ):
        """batch_size: pairs over all processes; first: the batch to begin with; parts: number of parts of a batch."""
        if batch_size % parts or parts % processes:
            raise ValueError(
                f"a batch of {batch_size} pairs in {parts} parts cannot be shared by {processes} processes: "
                f"use a number of processes that divides {parts}, and a --batch-size that is a multiple of it"
            )
        self.batch_size, self.seed, self.first = batch_size, seed, first
        self.rank, self.processes, self.size = rank, processes, batch_size // parts  # size: pairs of a part
        videos, twins = videos_of(rows), twins_of(rows)
        kinds = [places for kind in (False, True) if len(places := np.flatnonzero(videos == kind).astype(np.int32))]
        for places in kinds:
            if batch_size > len(places):
                what = "videos" if videos[places[0]] else "pictures" if len(kinds) > 1 else "rows"
                raise ValueError(
                    f"the batch of {batch_size} pairs is larger than the {len(places)} {what} at hand: "
                    f"use --batch-size {len(places) // parts * parts} or less"
                )
        self.kinds = [places if twins is None else self.grouped(places, twins[places]) for places in kinds]
        self.batches_per_epoch = sum(len(places) // batch_size for places in kinds)

    def grouped(self, places: np.ndarray, twins: np.ndarray) -> list[list[int]]:
        """Numbers of rows, grouped by twins. More twins than fit in a part make several groups."""
        by_group, counts = places[np.argsort(twins, kind="stable")], np.unique(twins, return_counts=True)[1]
        whole = [group.tolist() for group in np.split(by_group, counts.cumsum()[:-1])]
        return [group[i : i + self.size] for group in whole for i in range(0, len(group), self.size)]

    def epoch(self, number: int) -> np.ndarray:
        """The batches of one epoch -> (batches, batch_size), numbers of rows"""
        rng = np.random.default_rng([self.seed, number])
        batches = [self.filled(groups, rng) for groups in self.kinds]
        return batches[0] if len(batches) == 1 else rng.permutation(np.concatenate(batches))

    def filled(self, groups: np.ndarray | list[list[int]], rng: np.random.Generator) -> np.ndarray:
        """Batches of one kind of rows, in groups or single -> (batches, batch_size)"""
        order = rng.permutation(np.arange(len(groups), dtype=np.int32))
        if isinstance(groups, np.ndarray):
            return groups[order[: len(order) // self.batch_size * self.batch_size]].reshape(-1, self.batch_size)
        line, parts, cut = [groups[place] for place in order], [], []
        rest = sum(map(len, groups)) % self.batch_size
        while rest:
            last = line.pop()
            line += [last[rest:]] if len(last) > rest else []
            rest -= min(rest, len(last))
        line = deque(sorted(line, key=len, reverse=True))
        while line or cut:
            part = []
            while room := self.size - len(part):
                if cut:
                    part.append(cut.pop())
                elif len(line[0]) <= room:
                    part += line.popleft()
                elif len(line[-1]) <= room:
                    part += line.pop()
                else:
                    cut = list(line.pop())
            parts.append(part)
        if len(set(map(len, groups))) > 1:  # otherwise parts are in random order already
            rng.shuffle(parts)
        return np.array(parts).reshape(-1, self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start, place = divmod(self.first, self.batches_per_epoch)
        share = self.batch_size // self.processes
        for epoch in itertools.count(start):
            for batch in self.epoch(epoch)[place:]:
                yield [(epoch, row) for row in batch[self.rank * share : (self.rank + 1) * share].tolist()]
            place = 0


def training_batches(
    dataset: Dataset, batches: TwinBatches, collate: Callable, workers: int, pin_memory: bool = False
) -> Iterator[dict]:
    """Endless training batches, in the same order and with the same masks for any number of workers.

    Raises:  runtime.DataFailed for a picture that cannot be read, or a worker that was killed
    """
    collate = runtime.Shared(collate) if workers else collate
    more = {"num_workers": workers, "pin_memory": pin_memory, "worker_init_fn": runtime.in_worker}
    return runtime.batches_of(DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **more))


# ----------------------------------------------------------------------------------------------------------- pictures


class Pictures:
    """Loads pictures and frames. Unless they are cropped, they are cached if those of all rows fit into 256 MB."""

    def __init__(self, config: Config, augment: str, rows: int):
        self.image_size, self.frames, self.augment = config.image_size, config.frames, augment
        most = 2**28 // (3 * math.prod(config.image_size))
        self.most, self.kept = most if rows <= most else 0, {}

    def __call__(self, path: str, rng: np.random.Generator) -> Tensor:
        """Path -> (3, height, width), values in [-1, 1], augmented with draws from rng; for a video (f, 3, height,
        width), one frame from each of f equal segments, all augmented in the same way."""
        if not is_video(path):
            return self.picture(path, path, rng)
        numbers, seed = choose_frames(count_frames(path), self.frames, rng), rng.integers(2**62)
        missing = [number for number in numbers if (path, number) not in self.kept]
        read = dict(zip(missing, load_frames(path, missing), strict=True)) if missing else {}
        return torch.stack([self.picture((path, n), read.get(n), np.random.default_rng(seed)) for n in numbers])

    def picture(self, name: str | tuple, source: str | Image.Image | None, rng: np.random.Generator) -> Tensor:
        """One picture or frame -> (3, height, width). name: its key in the cache; source: what to read if not cached"""
        kind, _, strength = self.augment.partition("-")
        if kind in ("photo", "aerial"):  # cropped before it is scaled down, so that details stay sharp
            image, side = load_image(source, 2 * max(self.image_size)), 4 * max(self.image_size)
            image.thumbnail((side, side), reducing_gap=2.0)  # large enough for any crop, and cheap
            pixels = centred(to_pixels((photo if kind == "photo" else aerial)(image, rng), self.image_size))
            return strong(pixels, rng) if strength else pixels
        pixels = self.kept.get(name)
        if pixels is None:
            pixels = to_pixels(source, self.image_size)
            if len(self.kept) < self.most:
                self.kept[name] = pixels
        if self.augment == "drawing":
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            pixels = to_pixels(drawing(image, rng), self.image_size)
        elif self.augment == "boxes":
            pixels = shuffle_boxes(pixels, rng)
        return centred(pixels)


def to_pixels(source: str | Path | Image.Image, image_size: tuple[int, int]) -> Tensor:
    """A picture, or its path, at image_size (height, width) -> (3, height, width) of bytes."""
    height, width = image_size
    image = load_image(source, max(image_size))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_tensor(source: str | Path | Image.Image, image_size: tuple[int, int], frames: int = 1) -> Tensor:
    """A picture, or its path, at image_size (height, width) -> (3, height, width), values in [-1, 1]; for a video, the
    middle frames of `frames` equal segments -> (f, 3, height, width)."""
    if is_video(source):
        return torch.stack([to_tensor(one, image_size) for one in some_frames(source, frames)])
    return centred(to_pixels(source, image_size))


def centred(pixels: Tensor) -> Tensor:
    """Bytes -> values in [-1, 1], mid grey at 0."""
    return pixels.float().div_(127.5).sub_(1)
