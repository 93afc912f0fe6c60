"""From JSONL files and pictures to batches.

One reading path for every data set: the built-in world, your own files, converted official releases. A data
set is a JSONL file, one row a line, with image paths relative to that file:

    pairs   {"image": "a.png", "caption": "a red circle"}      a list of captions means that all of them are right;
                                                               optional "twin": rows that share it stay in one batch
    foils   {"image": "a.png", "caption": "a red circle", "foils": {"colour": "a blue circle"}}
    grounding  {"image": "a.png", "text": "a red circle", "boxes": [[x, y, width, height]]}   in pixels, any is right;
                                                               optional "proposals": boxes to choose from
    phrases    {"image": "a.png", "text": "a red circle"}      what grounding learns from: no boxes
    vqa        {"image": "a.png", "question": "what colour is it?", "answers": {"red": 1.0}}      scores from 0 to 1
    reasoning  {"images": ["a.png", "b.png"], "text": "both show a circle", "label": true}        one picture or two;
                                                               optional "group": rows judged together
    entailment {"image": "a.png", "text": "it is red", "label": "neutral"}      or entailment, or contradiction

More keys are allowed and kept. Every row is checked before the first step.

Randomness belongs to the sample: the order of the rows follows from (seed, epoch); augmentation, the choice of a
caption and the noise behind both masks follow from (seed, epoch, row). So a resumed run, another number of workers and
another number of processes see the same samples masked in the same way.
"""

import hashlib
import itertools
import json
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from augment import boxes, drawing, photo
from tokenizer import Tokenizer

# ----------------------------------------------------------------------------------------------- reading and checking


@dataclass(frozen=True)
class Schema:
    """The keys that a row must have, and a check of their values that raises ValueError saying what is wrong."""

    keys: dict[str, str]  # key: what it holds, for error messages
    check: Callable[[dict], None]


def check_pair(row: dict) -> None:
    """Captions are texts that are not empty."""
    captions = captions_of(row)
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise ValueError("caption is empty: give a text, or a list of texts")


def check_foil(row: dict) -> None:
    """One caption, and foils that are texts by kind."""
    foils = row["foils"]
    if not isinstance(foils, dict) or not all(isinstance(text, str) and text.strip() for text in foils.values()):
        raise ValueError('foils must be {"kind": "wrong caption", ...} with no empty text')
    if not isinstance(row["caption"], str):
        raise ValueError("caption of a foil row must be one text")
    check_pair(row)


def check_grounding(row: dict) -> None:
    """A phrase and its boxes; that they lie inside the picture is checked with the picture."""
    check_text(row)
    for name in ("boxes", "proposals"):
        boxes = row.get(name, row["boxes"])
        if not isinstance(boxes, list) or not boxes or not all(is_box(box) for box in boxes):
            raise ValueError(f"{name} must be [[x, y, width, height], ...] in pixels, at least one, none of them empty")


def check_text(row: dict, key: str = "text") -> None:
    """A text that is not empty."""
    if not isinstance(row[key], str) or not row[key].strip():
        raise ValueError(f"{key} is empty: give a text")


def check_vqa(row: dict) -> None:
    """A question, and at least one answer with a score from 0 to 1."""
    check_text(row, "question")
    answers = row["answers"]
    scores = list(answers.values()) if isinstance(answers, dict) else []
    if not scores or not all(type(score) in (int, float) and 0 <= score <= 1 for score in scores):
        raise ValueError(f'answers is {answers!r}: expected {{"answer": score from 0 to 1, ...}}, at least one')


def check_reasoning(row: dict) -> None:
    """One or two pictures, a text, and whether it is true."""
    check_text(row)
    if len(row["images"]) not in (1, 2):
        raise ValueError(f"found {len(row['images'])} images: reasoning is about one or two")
    if not isinstance(row["label"], bool):
        raise ValueError(f"label is {row['label']!r}: expected true or false")


ENTAILMENT_LABELS = ("entailment", "neutral", "contradiction")


def check_entailment(row: dict) -> None:
    """A text and one of three labels."""
    check_text(row)
    if row["label"] not in ENTAILMENT_LABELS:
        raise ValueError(f"label is {row['label']!r}: expected {', '.join(ENTAILMENT_LABELS)}")


def is_box(box) -> bool:
    """Whether a value is [x, y, width, height] with a place that is not negative and a size that is not zero."""
    numbers = (
        isinstance(box, list)
        and len(box) == 4
        and all(type(value) in (int, float) and math.isfinite(value) for value in box)
    )
    return numbers and min(box[:2]) >= 0 and min(box[2:]) > 0


IMAGE = {"image": "a path relative to this file"}
SCHEMAS = {
    "pairs": Schema(IMAGE | {"caption": "a text or a list of texts"}, check_pair),
    "foils": Schema(IMAGE | {"caption": "a text", "foils": "{kind: wrong caption}"}, check_foil),
    "grounding": Schema(
        IMAGE | {"text": "a phrase", "boxes": "[[x, y, width, height], ...] in pixels"}, check_grounding
    ),
    "phrases": Schema(IMAGE | {"text": "a phrase"}, check_text),
    "vqa": Schema(IMAGE | {"question": "a text", "answers": "{answer: score from 0 to 1}"}, check_vqa),
    "reasoning": Schema(
        {"images": "a list of one or two paths relative to this file", "text": "a text", "label": "true or false"},
        check_reasoning,
    ),
    "entailment": Schema(IMAGE | {"text": "a text", "label": ", ".join(ENTAILMENT_LABELS)}, check_entailment),
}


def pictures_of(row: dict) -> list[str]:
    """The pictures of a row, one or several, as a list."""
    return [row["image"]] if "image" in row else row["images"]


def captions_of(row: dict) -> list[str]:
    """The captions of a row, one or several, as a list."""
    return row["caption"] if isinstance(row["caption"], list) else [row["caption"]]


def read_rows(paths: list[str | Path], task: str, check: str = "header", skip_bad: bool = False) -> list[dict]:
    """Read and check one or more JSONL files of a task.

    Args:    paths      the files
             task       a key of SCHEMAS
             check      "header": every picture is there and its header can be read; "full": it can be decoded
             skip_bad   leave bad rows out, with a count, instead of stopping at them
    Returns: the rows, paths of pictures made full, "twin" made unique to its file
    Raises:  ValueError naming file, line, what was found and what was expected; for pictures a count and the first ten
    """
    rows, complaints = [], []
    for path in map(Path, paths):
        rows += read_file(path, SCHEMAS[task], complaints)
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
    return good


def read_file(path: Path, schema: Schema, complaints: list[str]) -> list[dict]:
    """Rows of one file that fit the schema; what does not fit is added to complaints as 'file:line: ...'."""
    if not path.is_file():
        hint = (
            " (make the built-in world with: python -m world.scenes --out data/scenes)"
            if "scenes" in path.parts
            else ""
        )
        raise ValueError(f"{path} is not a file: give the path of a JSONL file{hint}")
    rows = []
    with open(path, encoding="utf-8-sig") as file:  # -sig, because Windows editors write a byte order mark
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_row(line, schema)
            except ValueError as fault:
                complaints.append(f"{path}:{number}: {fault}")
                continue
            if "images" in schema.keys:
                row.pop("image", None)  # a further key; pictures_of goes by it
                row["images"] = [str(path.parent / image) for image in row["images"]]
            else:
                row["image"] = str(path.parent / row["image"])
            if row.get("twin") is None:
                row.pop("twin", None)
            else:
                row["twin"] = f"{path}:{row['twin']}"
            rows.append(row)
    return rows


def parse_row(line: str, schema: Schema) -> dict:
    """One line -> its row. Raises ValueError saying what is wrong with it."""
    row = parse_object(line)
    if not schema.keys.keys() <= row.keys():
        wanted = "; ".join(f'"{key}": {what}' for key, what in schema.keys.items())
        raise ValueError(f"found the keys {sorted(row)}: expected {wanted}")
    if "images" in schema.keys and not isinstance(row["images"], list):
        raise ValueError("images must be a list of paths relative to this file")
    if not all(isinstance(image, str) for image in (row["images"] if "images" in schema.keys else [row["image"]])):
        raise ValueError("image must be a path relative to this file")
    schema.check(row)
    return row


def parse_object(line: str) -> dict:
    """One line -> its JSON object. Raises ValueError if it holds none."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}): expected one object a line") from error
    if not isinstance(value, dict):
        raise ValueError(f"found {type(value).__name__}: expected an object")
    return value


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


# ----------------------------------------------------------------------------------------------------------- pictures


def size_of(path: str | Path) -> tuple[int, int]:
    """Width and height that load_image would give, from the header alone."""
    with Image.open(path) as file:
        lies = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # turned by a quarter
        return file.size[::-1] if lies else file.size


def load_image(path: str | Path) -> Image.Image:
    """Any picture as RGB: turned as EXIF says, transparency on white, palette, grey, CMYK and 16 bit converted."""
    try:
        with Image.open(path) as file:
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) != 1  # asked first: turning always copies
            image = ImageOps.exif_transpose(file) if turned else file
            if image.mode.startswith("I") or image.mode == "F":
                values = np.asarray(image, dtype=np.float32)
                scale = 255 / 65535 if image.mode.startswith("I;16") or values.max() > 255 else 1
                image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a file: give the path of a picture") from error
    except Exception as error:  # Pillow raises many kinds for broken files
        raise ValueError(
            f"{path} cannot be decoded ({error}): replace it, or find all such with train.py --check full"
        ) from error


def to_pixels(image: Image.Image, image_size: tuple[int, int]) -> Tensor:
    """Resize to image_size (height, width) -> (3, height, width) of bytes."""
    height, width = image_size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_tensor(image: Image.Image, image_size: tuple[int, int]) -> Tensor:
    """Resize to image_size (height, width) -> (3, height, width), values in [-1, 1]."""
    return centred(to_pixels(image, image_size))


def centred(pixels: Tensor) -> Tensor:
    """Bytes -> values in [-1, 1], mid grey at 0."""
    return pixels.float().div_(127.5).sub_(1)


# ------------------------------------------------------------------------------------------------------------ batches


@lru_cache(maxsize=1_000_000)
def stable_id(text: str) -> int:
    """The same 63-bit number for the same text in every process and every run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


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
            pixels = boxes(pixels, rng)
        return centred(pixels)


class Pairs(Dataset):
    """Rows of `pairs` as training samples; a sample's key is (epoch, row), and all its randomness follows from it."""

    def __init__(
        self,
        rows: list[dict],
        tokenizer: Tokenizer,
        image_size: tuple[int, int],
        patches: int,
        max_tokens: int,
        augment: str = "none",
        seed: int = 0,
    ):
        self.rows, self.tokenizer, self.patches = rows, tokenizer, patches
        self.max_tokens, self.seed = max_tokens, seed
        self.pictures = Pictures(image_size, augment)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, number = key
        row = self.rows[number]
        rng = np.random.default_rng([self.seed, epoch, number])
        noise = torch.from_numpy(rng.random(self.patches + 2 * self.max_tokens, dtype=np.float32))
        patch_noise, token_noise, replace_noise = noise.split([self.patches, self.max_tokens, self.max_tokens])
        captions = captions_of(row)
        caption = captions[rng.integers(len(captions))]
        return {
            "images": self.pictures(row["image"], rng),
            "input_ids": self.tokenizer.encode(caption, self.max_tokens),
            "image_id": stable_id(row["image"]),
            "caption_id": stable_id(caption),
            "patch_noise": patch_noise,
            "token_noise": token_noise,
            "replace_noise": replace_noise,
        }


def pad(sequences: list[list[int]], pad_id: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """Lists of ids -> input_ids (b, l), attention_mask (b, l), True = real token; l = the longest, or length."""
    length = max(length, *map(len, sequences))
    input_ids = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids in sequences])
    attention_mask = torch.tensor([[True] * len(ids) + [False] * (length - len(ids)) for ids in sequences])
    return input_ids, attention_mask


@dataclass
class Collate:
    """Samples -> a batch, padded to the longest caption in it. A class, so that worker processes can be sent it.

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
        world: int = 1,
        parts: int = 1,
    ):
        """batch_size: pairs of all processes together; first: the batch to begin with; parts: of each batch."""
        if batch_size % parts or parts % world:
            raise ValueError(
                f"a batch of {batch_size} pairs in {parts} parts cannot be shared by {world} processes: "
                f"use a number of processes that divides {parts}, and a --batch-size that is a multiple of it"
            )
        self.seed, self.first, self.rank, self.world, self.parts = seed, first, rank, world, parts
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
        self.batches_per_epoch = sum(1 for _ in self.epoch(0)) // parts
        if not self.batches_per_epoch:
            raise ValueError(
                f"a batch of {batch_size} in {parts} parts cannot be filled with twin groups of {sorted(stock)} rows: "
                "use another --batch-size, or other --parts"
            )
        stuck = [size for size in sorted(stock) if not fillable(self.size - size, stock - Counter([size]))]
        self.never = sum(size * stock[size] for size in stuck)  # rows of groups that no batch has room for

    def epoch(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
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
        step, share = 0, self.parts // self.world
        for epoch in itertools.count():
            for batch in zip(*[self.epoch(epoch)] * self.parts, strict=False):
                if step >= self.first:
                    yield list(itertools.chain(*batch[self.rank * share : (self.rank + 1) * share]))
                step += 1


def training_batches(
    dataset: Dataset, batches: TwinBatches, collate: Callable, workers: int, pin_memory: bool = False
) -> Iterator[dict]:
    """Endless training batches, in the same order and with the same masks for any number of workers."""
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=pin_memory)
    try:
        yield from loader
    except ValueError as error:  # a worker puts its whole traceback around the sentence
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def count_truncated(texts: Iterable[str], tokenizer: Tokenizer, max_tokens: int) -> int:
    """How many texts are longer than max_tokens, [CLS] and [SEP] included, and lose their end."""
    return sum(len(tokenizer.encode(text)) > max_tokens for text in texts)
