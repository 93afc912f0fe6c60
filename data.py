"""From JSONL files and pictures to batches.

One reading path for every data set: the built-in world, your own files, converted official releases. A data set is a
JSONL file, one row a line, with image paths relative to that file:

    pairs      {"image": "a.png", "caption": "a red circle"}   a list of captions means that all of them are right;
                                                               optional "twin": rows that share it stay in one batch
    foils      {"image": "a.png", "caption": "a red circle", "foils": {"colour": "a blue circle"}}
    grounding  {"image": "a.png", "text": "a red circle", "boxes": [[x, y, width, height]]}   in pixels, any is right;
                                                               optional "proposals": boxes to choose from
    phrases    {"image": "a.png", "text": "a red circle"}      what grounding learns from: no boxes
    vqa        {"image": "a.png", "question": "what colour is it?", "answers": {"red": 1.0}}      scores from 0 to 1
    reasoning  {"images": ["a.png", "b.png"], "text": "both show a circle", "label": true}        one picture or two;
                                                               optional "group": rows judged together
    entailment {"image": "a.png", "text": "it is red", "label": "neutral"}      or entailment, or contradiction

More keys are allowed and kept.

Randomness belongs to the sample: the order of the rows follows from (seed, epoch); augmentation, the choice of a
caption and the noise behind both masks follow from (seed, epoch, row). So a resumed run, another number of workers and
another number of processes see the same samples masked in the same way.

How to read it: a row becomes a sample, samples become a batch, and then which rows share a batch. Pictures and
augmentation follow, and last how rows are read and checked.
"""

import hashlib
import itertools
import json
import math
import os
import random
import reprlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import runtime
from mamo import Config
from tokenizer import Tokenizer, pad

# ------------------------------------------------------------------------------------------------- samples and batches


class Pairs(Dataset):
    """Rows of `pairs` as training samples; a sample's key is (epoch, row), and all its randomness follows from it."""

    def __init__(self, rows: list[dict], tokenizer: Tokenizer, config: Config, augment: str = "none", seed: int = 0):
        self.rows, self.tokenizer, self.config, self.seed = rows, tokenizer, config, seed
        self.pictures = Pictures(config.image_size, augment)
        first: dict[str, int] = {}  # a picture's id is the first row that shows it: the same wherever the data lie
        self.image_id = [first.setdefault(resolved(row["image"]), number) for number, row in enumerate(rows)]

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
        return {
            "images": self.pictures(row["image"], rng),
            "input_ids": input_ids,
            "image_id": self.image_id[number],
            "caption_id": stable_id(str(input_ids)),
            "patch_noise": patch_noise,
            "token_noise": token_noise,
            "replace_noise": replace_noise,
        }


@dataclass
class Collate:
    """Samples -> a batch, padded to the longest caption in it. A class, because worker processes need to pickle it.

    length, if given, is the number of tokens that every batch is padded to: one shape for a compiled step.
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
        # Each sample's noise is cut, not redrawn: padding changes no mask.
        for name in ("token_noise", "replace_noise"):
            batch[name] = torch.stack([sample[name][:length] for sample in samples])
        return batch


def make_batch(
    images: Tensor | list, texts: list[str], config: Config, tokenizer: Tokenizer | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """A batch for a model's forward, with all its noise, from a few pictures and texts of one's own.

    Args:    images      a tensor (b, 3, height, width) with values in [-1, 1], or a list of paths or PIL images
             texts       b texts
             tokenizer   whose vocabulary the config is for; without one, words are spelled letter by letter
             seed        decides all noise
    Raises:  ValueError if there are not as many pictures as texts, or the tokenizer is not the config's
    """
    tokenizer = tokenizer or Tokenizer.build([])
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} words and config.vocab_size is {config.vocab_size}")
    if isinstance(texts, str) or len(images) != len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} texts: give a list of each, one text for each image")
    names = [resolved(image) if isinstance(image, str | Path) else number for number, image in enumerate(images)]
    if not isinstance(images, Tensor):
        images = torch.stack([to_tensor(load_image(image), config.image_size) for image in images])
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


def pictures_of(row: dict) -> list[str]:
    """The pictures of a row, one or several, as a list."""
    return [row["image"]] if "image" in row else row["images"]


def captions_of(row: dict) -> list[str]:
    """The captions of a row, one or several, as a list."""
    return row["caption"] if isinstance(row["caption"], list) else [row["caption"]]


def content_of(rows: list[dict]) -> list:
    """How many rows, and a digest of what is learned from them, in order; pictures by name, wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    keys = sorted({key for schema in (*SCHEMAS.values(), *OPTIONAL.values()) for key in schema} - {"image", "images"})
    for row in rows:
        names = [Path(picture).name for picture in pictures_of(row)]
        twin = str(row.get("twin", "")).rpartition(":")[2]  # without the file that it was made unique to
        said = [names, twin, row.get("group"), *(row.get(key) for key in keys)]
        digest.update(json.dumps(said, sort_keys=True).encode())
    return [len(rows), digest.hexdigest()]


@lru_cache(maxsize=1_000_000)
def resolved(path: str | Path) -> str:
    """The path of a picture behind "..", symbolic links and the folder that we are in: one for each file."""
    return os.path.realpath(path)


@lru_cache(maxsize=1_000_000)
def stable_id(text: str) -> int:
    """The same 63-bit number for the same text in every process and every run; captions go by their token ids."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def count_truncated(texts: Iterable[str], tokenizer: Tokenizer, max_tokens: int) -> int:
    """How many texts are longer than max_tokens, [CLS] and [SEP] included, and lose their end."""
    return sum(len(tokenizer.encode(text)) > max_tokens for text in texts)


# ------------------------------------------------------------------------------------------ which rows share a batch


class TwinBatches:
    """Endless batches of sample keys (epoch, row) from a given batch on, in which twins stay together.

    Each epoch visits the groups (twins, or a row alone) in an order that follows from (seed, epoch). A batch is filled
    in equal parts, each of whole groups; a group that does not fit into what is left of a part waits, and what does not
    fill a last batch is left out. Processes share a batch by its parts, in order: so any number of processes that
    divides the parts sees the same batches, and twins are on one process.
    """

    def __init__(
        self,
        rows: list[dict],
        batch_size: int,
        seed: int = 0,
        first: int = 0,
        rank: int = 0,
        processes: int = 1,
        parts: int = 1,
    ):
        """batch_size: pairs of all processes together; first: the batch to begin with; parts: of each batch."""
        if batch_size % parts or parts % processes:
            raise ValueError(
                f"a batch of {batch_size} pairs in {parts} parts cannot be shared by {processes} processes: "
                f"use a number of processes that divides {parts}, and a --batch-size that is a multiple of it"
            )
        self.seed, self.first, self.rank, self.processes, self.parts = seed, first, rank, processes, parts
        self.size = batch_size // parts  # pairs of a part
        groups: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(str(row.get("twin", f"row {number}")), []).append(number)
        self.groups = list(groups.values())
        stock = Counter(map(len, self.groups))
        if batch_size > len(rows):
            raise ValueError(
                f"the batch of {batch_size} pairs is larger than the {len(rows)} rows at hand: "
                f"use --batch-size {len(rows) // parts * parts} or less"
            )
        self.batches_per_epoch = sum(1 for _ in self.parts_of(0)) // parts
        if not self.batches_per_epoch:
            raise ValueError(
                f"a batch of {batch_size} in {parts} parts cannot be filled with twin groups of {sorted(stock)} rows: "
                "use another --batch-size, or other --parts"
            )
        stuck = [size for size in sorted(stock) if not fillable(self.size - size, stock - Counter([size]))]
        self.never = sum(size * stock[size] for size in stuck)  # rows of groups that no batch has room for

    def parts_of(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        """All parts of all batches of one epoch, one after another.

        The next group is the first in this epoch's order after which the part can still be filled exactly.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.groups)).tolist()
        queues: dict[int, deque[int]] = {}  # by size: the groups that are in no batch yet, as places in the order
        for place, i in enumerate(order):
            queues.setdefault(len(self.groups[i]), deque()).append(place)
        stock, part = Counter({size: len(queue) for size, queue in queues.items()}), []
        while True:
            room = self.size - len(part)
            fitting = [size for size in queues if queues[size] and fillable(room - size, stock - Counter([size]))]
            if not fitting:
                return
            size = min(fitting, key=lambda size: queues[size][0])
            stock[size] -= 1
            part += [(epoch, number) for number in self.groups[order[queues[size].popleft()]]]
            if len(part) == self.size:
                yield part
                part = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step, share = 0, self.parts // self.processes
        for epoch in itertools.count():
            parts = self.parts_of(epoch)
            while len(batch := list(itertools.islice(parts, self.parts))) == self.parts:
                if step >= self.first:
                    yield list(itertools.chain(*batch[self.rank * share : (self.rank + 1) * share]))
                step += 1


def fillable(room: int, stock: Counter) -> bool:
    """Whether some of the groups at hand, stock[size] of each size, add up to exactly so many rows."""
    return room >= 0 and adds_up(room, tuple((size, min(count, room // size)) for size, count in stock.items()))


@lru_cache(maxsize=100_000)
def adds_up(room: int, stock: tuple[tuple[int, int], ...]) -> bool:
    """Whether room is a sum of sizes, each taken at most count times; stock = ((size, count), ...)"""
    sums = {0}
    for size, count in stock:
        sums = {one + size * times for one in sums for times in range(count + 1) if one + size * times <= room}
    return room in sums


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
    """Pictures as bytes by path, decoded once and kept, up to 256 MB, unless they are cropped."""

    def __init__(self, image_size: tuple[int, int], augment: str = "none"):
        self.image_size, self.augment = image_size, augment
        self.kept: dict[str, Tensor] = {}

    def __call__(self, path: str, rng: np.random.Generator) -> Tensor:
        """Path -> (3, height, width), values in [-1, 1], augmented by draws from rng."""
        if self.augment == "photo":  # cropped before it is made small, so that details stay sharp
            return centred(to_pixels(photo(load_image(path), rng), self.image_size))
        pixels = self.kept.get(path)
        if pixels is None:
            pixels = to_pixels(load_image(path), self.image_size)
            if len(self.kept) * pixels.nbytes < 256 * 2**20:
                self.kept[path] = pixels
        if self.augment == "drawing":
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            pixels = to_pixels(drawing(image, rng), self.image_size)
        elif self.augment == "boxes":
            pixels = shuffle_boxes(pixels, rng)
        return centred(pixels)


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """A picture, or the path of one, of any mode as RGB, turned as EXIF says.

    Raises:  ValueError naming a file that is missing or cannot be decoded
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    try:
        with Image.open(source) as file:
            return to_rgb(file)
    except FileNotFoundError as error:
        raise ValueError(f"{source} is not a file: give the path of a picture") from error
    except Exception as error:  # Pillow raises many kinds for broken files
        raise ValueError(
            f"{source} cannot be decoded ({error}): replace it, or find all such with train.py --check full"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB: turned as EXIF says, transparency on white, palette, grey, CMYK and 16 bit converted."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # asked first: turning always copies
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        scale = 255 / 65535 if image.mode.startswith("I;16") or values.max() > 255 else 1
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def size_of(path: str | Path) -> tuple[int, int]:
    """Width and height that load_image would give, from the header alone."""
    with Image.open(path) as file:
        quarter_turn = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # 5 to 8 exchange width and height
        return file.size[::-1] if quarter_turn else file.size


def to_pixels(image: Image.Image, image_size: tuple[int, int]) -> Tensor:
    """Resize to image_size (height, width) -> (3, height, width) of bytes."""
    height, width = image_size
    if image.mode != "RGB":
        image = to_rgb(image)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_tensor(image: Image.Image, image_size: tuple[int, int]) -> Tensor:
    """Resize to image_size (height, width) -> (3, height, width), values in [-1, 1]."""
    return centred(to_pixels(image, image_size))


def centred(pixels: Tensor) -> Tensor:
    """Bytes -> values in [-1, 1], mid grey at 0."""
    return pixels.float().div_(127.5).sub_(1)


# ------------------------------------------------------------------------------------------------------- augmentation
#
# Random variants of a picture that keep its caption true. None is mirrored: it would make "left of" false.


def photo(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """For photographs: a crop of 50 to 100 % of the area, brightness and contrast within 30 %."""
    area, aspect = rng.uniform(0.5, 1.0), math.exp(rng.uniform(-0.25, 0.25))
    width = min(round(image.width * math.sqrt(area * aspect)), image.width)
    height = min(round(image.height * math.sqrt(area / aspect)), image.height)
    x, y = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    pixels = np.asarray(image.crop((x, y, x + width, y + height)), dtype=np.float32)
    contrast, brightness = rng.uniform(0.7, 1.3, size=2)
    middle = pixels.mean()
    return Image.fromarray((((pixels - middle) * contrast + middle) * brightness).clip(0, 255).astype(np.uint8))


def drawing(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """For drawings on white that are to be known in another style: moved, scaled, squeezed and turned by up to 11
    degrees; in a quarter of the cases blurred, in half outlined; colours mixed, faded or grey."""
    width, height = image.size
    zoom, angle = math.exp(rng.uniform(-0.25, 0.35)), rng.uniform(-0.2, 0.2)  # above 1 the drawing becomes smaller
    squeeze = math.exp(rng.uniform(-0.15, 0.15))
    a, b = zoom * math.cos(angle) * squeeze, zoom * math.sin(angle)
    c, d = -zoom * math.sin(angle), zoom * math.cos(angle) / squeeze
    x, y = (0.5 + rng.uniform(-0.1, 0.1, size=2)) * (width, height)  # where the middle goes
    matrix = (a, b, width / 2 - a * x - b * y, c, d, height / 2 - c * x - d * y)
    image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor="white")
    kind = rng.random()
    if kind < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.0) * width / 64))
    pixels = np.asarray(image, dtype=np.float32) / 255
    if kind > 0.5:  # dark where brightness changes
        brightness = pixels.mean(axis=2)
        edge = np.abs(np.gradient(brightness, axis=0)) + np.abs(np.gradient(brightness, axis=1))
        pixels = pixels * (1 - np.clip(edge * rng.uniform(1, 6), 0, 1))[..., None]
    mix = np.eye(3) + rng.normal(0, 0.12, size=(3, 3))
    grey = rng.uniform(0, 0.5) if rng.random() < 0.8 else 1.0
    mix = mix @ ((1 - grey) * np.eye(3) + grey / 3)
    mix /= mix.sum(axis=0, keepdims=True)  # white stays white
    pixels = 1 - (1 - pixels @ mix) * rng.uniform(0.6, 1.3)
    return Image.fromarray((255 * pixels).round().clip(0, 255).astype(np.uint8))


def shuffle_boxes(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """For NLVR's pictures of three boxes, with gaps of half their width: the boxes in any order.

    Args:    pixels (3, height, width)
    """
    eighth, rest = divmod(pixels.shape[2], 8)
    if rest:
        raise ValueError(
            f"--augment boxes cuts pictures into eighths, their width is {pixels.shape[2]}: use a multiple of 8"
        )
    moved = pixels.clone()
    for place, box in enumerate(rng.permutation(3)):
        moved[:, :, 3 * eighth * place :][:, :, : 2 * eighth] = pixels[:, :, 3 * eighth * box :][:, :, : 2 * eighth]
    return moved


# ----------------------------------------------------------------------------------------------- reading and checking


def read_rows(paths: str | Path | list, task: str, check: str = "header", skip_bad: bool = False) -> list[dict]:
    """Read and check one or more JSONL files of a task.

    Args:    paths      the files
             task       a key of SCHEMAS
             check      "header": every picture is there and its header can be read; "full": it can be decoded
             skip_bad   leave bad rows out, with a count, instead of stopping at them
    Returns: the rows, "twin" made unique to its file, paths of pictures made full: of several to one picture the first
    Raises:  ValueError naming file, line, what was found and what was expected; for pictures a count and the first ten
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    rows, complaints = [], []
    for path in map(Path, paths):
        for place, line in lines_of(path):
            try:
                row = parse_object(line)
                check_row(row, task)
            except ValueError as fault:
                complaints.append(f"{place}: {fault}")
                continue
            if "images" in SCHEMAS[task]:
                row.pop("image", None)  # a further key; pictures_of goes by it
                row["images"] = [str(path.parent / image) for image in row["images"]]
            else:
                row["image"] = str(path.parent / row["image"])
            if row.get("twin") is None:
                row.pop("twin", None)
            else:
                row["twin"] = f"{path}:{row['twin']}"
            rows.append(row)
    if complaints and not skip_bad:
        raise ValueError(f"{complaints[0]}{f' ({len(complaints)} bad rows in all)' if len(complaints) > 1 else ''}")

    status = {}  # each picture once, however many rows show it
    for row in tqdm(rows, desc="checking pictures", disable=len(rows) < 5000, leave=False):
        for image in pictures_of(row):
            if image not in status:
                status[image] = check_image(image, check)
        if task == "grounding" and not status[row["image"]]:
            status[row["image"]] = check_boxes(row["image"], row["boxes"] + row.get("proposals", []))
    broken = [f"{image}: {fault}" for image, fault in status.items() if fault]
    if broken and not skip_bad:
        listed = "\n  ".join(broken[:10])
        raise ValueError(
            f"{len(broken)} of {len(status)} pictures cannot be used; mend paths (relative to the JSONL file), "
            f"pictures or boxes, or pass --skip-bad. The first are:\n  {listed}"
        )
    good = [row for row in rows if not any(status[image] for image in pictures_of(row))]
    if complaints or broken:
        print(f"left out: {len(complaints)} bad rows and {len(rows) - len(good)} rows whose picture cannot be used")
    if not good:
        raise ValueError(f"no rows in {', '.join(map(str, paths))}: expected one JSON object a line")
    first: dict[str, str] = {}  # by its resolved path, how the data name a picture
    for row in good:
        images = [first.setdefault(resolved(image), image) for image in pictures_of(row)]
        row |= {"image": images[0]} if "image" in row else {"images": images}
    return good


def sample_of(rows: list[dict], most: int) -> list[dict]:
    """At most so many rows to evaluate on, from all over the file, which may be sorted; the same ones in every run."""
    if len(rows) <= most:
        return rows
    print(f"val: {most} of {len(rows)} rows, drawn at random")
    return [rows[number] for number in sorted(random.Random(0).sample(range(len(rows)), most))]


def lines_of(path: str | Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of the lines of a text file that are not blank."""
    if not Path(path).is_file():
        world = "; make the built-in world with: python -m world.scenes --out data/scenes"
        make = world if "scenes" in str(path) else ""
        raise ValueError(f"{path} is not a file: give the path of a file with one row a line{make}")
    # -sig, because Windows editors write a byte order mark; only a line feed ends a line.
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
        except UnicodeDecodeError as fault:
            raise ValueError(f"{path} is not UTF-8 text ({fault.reason}): is it packed, or another file?") from fault


def parse_object(line: str) -> dict:
    """One line -> its JSON object. Raises ValueError if it holds none."""
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({getattr(error, 'msg', error)}): expected one object a line") from error
    if not isinstance(value, dict):
        raise ValueError(f"found {type(value).__name__}: expected an object")
    return value


def json_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("file:line", object) of a JSONL file. Raises ValueError, with that place, at the first line that is none."""
    for place, line in lines_of(path):
        try:
            value = parse_object(line)
        except ValueError as fault:
            raise ValueError(f"{place}: {fault}") from fault
        yield place, value


def check_row(row: dict, task: str) -> None:
    """Raise ValueError for a row that lacks a key of its task, or holds another kind of value."""
    schema = SCHEMAS[task]
    if not schema.keys() <= row.keys():
        wanted = "; ".join(f'"{key}": {what}' for key, (what, _) in schema.items())
        raise ValueError(f"found the keys {sorted(row)}: expected {wanted}")
    for key, (what, fits) in (schema | OPTIONAL.get(task, {})).items():
        if key in row and not fits(row[key]):
            raise ValueError(f"{key} is {reprlib.repr(row[key])}: expected {what}")


def is_text(value) -> bool:
    """Whether a value is a text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def is_score(value) -> bool:
    """Whether a value is a number from 0 to 1."""
    return type(value) in (int, float) and 0 <= value <= 1


def is_box(box) -> bool:
    """Whether a value is [x, y, width, height] with a place that is not negative and a size that is not zero."""
    if not isinstance(box, list) or len(box) != 4:
        return False
    numbers = all(type(value) in (int, float) and math.isfinite(value) for value in box)
    return numbers and min(box[:2]) >= 0 and min(box[2:]) > 0


def all_of(fits: Callable, kind: type, least: int = 1, most: float = math.inf) -> Callable:
    """A test for a list, or the values of a dict, of so many values that fit."""

    def test(value) -> bool:
        values = list(value.values()) if isinstance(value, dict) else value
        return isinstance(value, kind) and least <= len(value) <= most and all(map(fits, values))

    return test


# Of each key what it holds, as an error says it, and a test of its value.
PATH = ("a path relative to this file", lambda value: isinstance(value, str))
PATHS = ("a list of one or two paths relative to this file", all_of(PATH[1], list, 1, 2))
TEXT = ("a text that is not empty", is_text)
TEXTS = (
    "a text that is not empty, or a list of such texts",
    lambda value: is_text(value) or all_of(is_text, list)(value),
)
BOXES = ("[[x, y, width, height], ...] in pixels, at least one, none of them empty", all_of(is_box, list))
FOILS = ('{"kind": "wrong caption", ...} with no empty text', all_of(is_text, dict, least=0))
ANSWERS = ('{"answer": score from 0 to 1, ...}, at least one', all_of(is_score, dict))
TRUTH = ("true or false", lambda value: isinstance(value, bool))
ENTAILMENT_LABELS = ("entailment", "neutral", "contradiction")
LABEL = (", ".join(ENTAILMENT_LABELS), lambda value: value in ENTAILMENT_LABELS)
SCHEMAS = {
    "pairs": {"image": PATH, "caption": TEXTS},
    "foils": {"image": PATH, "caption": TEXT, "foils": FOILS},
    "grounding": {"image": PATH, "text": TEXT, "boxes": BOXES},
    "phrases": {"image": PATH, "text": TEXT},
    "vqa": {"image": PATH, "question": TEXT, "answers": ANSWERS},
    "reasoning": {"images": PATHS, "text": TEXT, "label": TRUTH},
    "entailment": {"image": PATH, "text": TEXT, "label": LABEL},
}
OPTIONAL = {"grounding": {"proposals": BOXES}}


def check_image(path: str, check: str) -> str | None:
    """What is wrong with a picture, or None. "header" reads the first bytes, "full" decodes everything."""
    try:
        with Image.open(path) as image:
            if check == "full":
                image.load()
    except FileNotFoundError:
        return "missing"
    except Exception as error:  # Pillow raises many kinds for broken files
        return f"{type(error).__name__}: {error}"
    return None


def check_boxes(path: str, boxes: list) -> str | None:
    """Which box reaches outside a picture, or None."""
    width, height = size_of(path)
    for x, y, w, h in boxes:
        if x + w > width or y + h > height:
            return f"the box {[x, y, w, h]} reaches outside the picture of {width} x {height} pixels"
    return None
