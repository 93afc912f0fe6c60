"""Rows of a dataset: JSONL files, one object per line, image paths relative to the file; validated before use.

    pairs      {"image": "a.png", "caption": "a red circle"}   a list of captions means that each of them is correct;
                                                               optional "twin": rows that share it go into one batch
               {"video": "a.webp", "caption": "it falls"}      a video instead of a picture, in all tasks but grounding
                                                               and reasoning: an animated picture or a list of frames
    foils      {"image": "a.png", "caption": "a red circle", "foils": {"colour": "a blue circle"}}
    grounding  {"image": "a.png", "text": "a red circle", "boxes": [[x, y, width, height]]}   in pixels, any counts;
                                                               optional "proposals": boxes to choose from
    phrases    {"image": "a.png", "text": "a red circle"}      to train grounding without boxes
    vqa        {"image": "a.png", "question": "what colour is it?", "answers": {"red": 1.0}}      scores from 0 to 1
    reasoning  {"images": ["a.png", "b.png"], "text": "both show a circle", "label": true}        one picture or two;
                                                               optional "group": rows scored together
    entailment {"image": "a.png", "text": "it is red", "label": "neutral"}      or entailment, or contradiction

Additional keys are allowed and kept. For pairs, a tar archive can replace the JSONL file, see shards.py.

Each file is scanned and validated once; only the offset of each row's line is kept, and `Rows` reads and parses the row
on demand. If validation took more than a second, its result is cached beside the file, in FILE.index, for the next
start and for the other processes of the run.
"""

import codecs
import contextlib
import hashlib
import json
import math
import os
import random
import re
import reprlib
import time
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

import runtime
from reading.pictures import check_boxes, check_image
from reading.shards import MEMBER, as_rows, expand
from reading.videos import check_video, files_of, is_video, video_of

# ---------------------------------------------------------------------------------------------------------------- rows

CHECKS = ("none", "header", "full")  # each includes the preceding ones
SAVE_AFTER = 1.0  # minimum duration of a validation, in seconds, for its result to be cached


class Rows(Sequence):
    """Validated rows of one or more files, parsed on demand; a slice is a list."""

    def __init__(self, indexes: list["Index"], task: str):
        self.indexes, self.task = indexes, task
        self.starts = np.cumsum([0, *(len(index.offsets) for index in indexes)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, number: int | slice) -> dict | list[dict]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        number %= len(self)
        file = int(np.searchsorted(self.starts, number, side="right")) - 1
        index, number = self.indexes[file], number - int(self.starts[file])
        try:
            if index.digest:
                row = json.loads(index.line(number))
            else:  # --check none: each row is checked where it is used, but not its pictures
                row = parse_object(index.line(number))
                check_row(row, self.task)
        except ValueError as fault:
            raise ValueError(f"{index.path}, row {number + 1}: {fault}") from fault
        return completed(row, index.path, self.task)

    @property
    def content(self) -> list:
        """As content_of: the number of rows, then a digest of each file, or "" for files that were not validated."""
        return [len(self), *(index.digest for index in self.indexes)]

    @property
    def twins(self) -> np.ndarray | None:
        """For each row, the first row with the same "twin"; None if no row has a twin."""
        if all(index.twins is None for index in self.indexes):
            return None
        parts = zip(self.starts.tolist(), self.indexes, strict=False)
        return np.concatenate(
            [
                start + (np.arange(len(one.offsets)) if one.twins is None else one.twins.astype(int))
                for start, one in parts
            ]
        )

    @property
    def videos(self) -> np.ndarray:
        """For each row, whether it contains a video."""
        parts = [np.zeros(len(one.offsets), bool) if one.videos is None else one.videos for one in self.indexes]
        return np.concatenate(parts).astype(bool)


@dataclass
class Index:
    """The information kept about a validated file."""

    path: Path
    offsets: np.ndarray  # (rows,) offset of the line of each valid row
    twins: np.ndarray | None  # (rows,) the first row with the same "twin"; None if no row has one
    videos: np.ndarray | None  # (rows,) whether the row contains a video; None if no row does
    digest: str  # of the rows' training content; "" if they were not validated
    lines: list[str]  # errors, with their line numbers
    pictures: list[str]  # unusable pictures, each with the reason
    lost: int  # number of rows with an unusable picture
    before: bool = False  # whether the file was validated in an earlier start

    @property
    def good(self) -> bool:
        """Whether the file has no errors."""
        return not self.lines and not self.pictures

    def line(self, number: int) -> bytes:
        """The line of a row, read from the file."""
        with open(self.path, "rb") as file:  # not kept open: a thousand archives would exceed the limit on open files
            file.seek(int(self.offsets[number]))
            return file.readline()


def open_rows(paths: str | Path | list, task: str, check: str = "header", skip_bad: bool = False) -> Rows:
    """Open one or more files of a task, validating each of them unless that was done before.

    Args:    paths      JSONL files; for pairs also tar archives, one by one or as 'shards/{00000..01242}.tar'
             task       a key of SCHEMAS
             check      "header": rows match their schema, and every picture exists and has a readable header;
                        "full": in addition, every picture can be decoded; "none": no validation, for trusted data
             skip_bad   leave out invalid rows and print their number, instead of raising an error
    Raises:  ValueError naming file, line, what was found and what was expected; for pictures, a count and the first ten
    """
    paths = expand([paths] if isinstance(paths, str | Path) else paths)
    with runtime.first_process_first():
        began = time.monotonic()
        indexes = [index_of(as_rows(path), task, check, skip_bad, began) for path in paths]
    lines, pictures = ([fault for one in indexes for fault in getattr(one, of)] for of in ("lines", "pictures"))
    if lines and not skip_bad:
        raise ValueError(f"{lines[0]}{f' ({len(lines)} bad rows in all)' if len(lines) > 1 else ''}")
    if pictures and not skip_bad:
        listed = "\n  ".join(one if len(one) < 300 else f"{one[:300]}..." for one in pictures[:10])
        # The total is counted only now, because storing millions of paths during validation would take gigabytes.
        shown = {image for one in indexes for row in rows_of(one.path, task) for image in pictures_of(row)}
        raise ValueError(
            f"{len(pictures)} of {len(shown)} pictures cannot be used; mend paths (relative to the JSONL file), "
            f"pictures or boxes, or pass --skip-bad. The first are:\n  {listed}"
        )
    if lines or pictures:
        lost = sum(one.lost for one in indexes)
        print(f"left out: {len(lines)} bad rows and {lost} rows whose picture cannot be used")
    if before := sum(one.before for one in indexes):
        print(f"{before} of {len(indexes)} files were checked before; to check them again delete {paths[0]}.index")
    rows = Rows(indexes, task)
    if not len(rows):
        raise ValueError(f"no rows in {', '.join(map(str, paths))}: expected one JSON object a line")
    return rows


def read_rows(paths: str | Path | list, task: str, check: str = "header", skip_bad: bool = False) -> list[dict]:
    """As open_rows, but reads all rows at once; if several paths lead to one picture, the first replaces the others."""
    rows, first = list(open_rows(paths, task, check, skip_bad)), {}
    for row in rows:
        images = [first.setdefault(resolved(image), image) for image in pictures_of(row)]
        row |= {"image": images[0]} if "image" in row else {"images": images}
    return rows


def completed(row: dict, path: Path, task: str) -> dict:
    """A row with full paths to its pictures, and with a "twin" that is unique across files."""
    if "images" in SCHEMAS[task]:
        row.pop("image", None)  # an additional key here, which would mislead pictures_of
        row["images"] = [str(path.parent / image) for image in row["images"]]
    elif task in WITH_VIDEOS and "video" in row:
        row["image"] = video_of(row.pop("video"), path.parent)
    else:
        row["image"] = str(path.parent / row["image"])
    twin = row.pop("twin", None)
    return row if twin is None else row | {"twin": f"{path}:{twin}"}


def pictures_of(row: dict) -> list[str]:
    """The pictures of a row, as a list even if there is only one."""
    return [row["image"]] if "image" in row else row["images"]


def captions_of(row: dict) -> list[str]:
    """The captions of a row, as a list even if there is only one."""
    return row["caption"] if isinstance(row["caption"], list) else [row["caption"]]


def sample_of(rows: Sequence, most: int, what: str = "") -> list[dict]:
    """At most `most` rows, sampled from the whole file, which may be sorted; every run uses the same sample. what: name
    of the rows in the message that is printed if some are left out"""
    if len(rows) <= most:
        return list(rows)
    if what:
        print(f"{what}: {most} of {len(rows)} rows, drawn at random")
    return [rows[number] for number in sorted(random.Random(0).sample(range(len(rows)), most))]


def twins_of(rows: Sequence) -> np.ndarray | None:
    """For each row, the first row with the same "twin"; None if no two rows share one."""
    if isinstance(rows, Rows):
        return rows.twins
    first: dict[str, int] = {}
    twins = [first.setdefault(row["twin"], n) if row.get("twin") is not None else n for n, row in enumerate(rows)]
    return np.array(twins) if len(set(twins)) < len(rows) else None


def videos_of(rows: Sequence) -> np.ndarray:
    """For each row, whether it contains a video instead of a picture."""
    return rows.videos if isinstance(rows, Rows) else np.array([is_video(row.get("image")) for row in rows], bool)


def content_of(rows: Sequence) -> list:
    """The number of rows and a digest of their training content, in order; of a picture's path, only the file name."""
    if isinstance(rows, Rows):
        return rows.content
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(said(row))
    return [len(rows), digest.hexdigest()]


def said(row: dict) -> bytes:
    """The training content of a row, as bytes."""
    names = [os.path.basename(file) for picture in pictures_of(row) for file in files_of(picture)]
    twin = str(row.get("twin", "")).rpartition(":")[2]  # without the prefixed file name that makes it unique
    return json.dumps([names, twin, row.get("group"), *map(row.get, LEARNED)], sort_keys=True).encode()


@lru_cache(maxsize=100_000)
def resolved(path: str | Path) -> str:
    """The canonical path of a picture, with "..", symbolic links and the working directory resolved. For a member of an
    archive: the canonical path of the archive, with the member's name."""
    if is_video(path):
        return video_of([resolved(file) for file in files_of(path)])
    member = MEMBER.fullmatch(str(path))
    return f"{os.path.realpath(member[1])}#{member[2]}" if member else os.path.realpath(path)


# ------------------------------------------------------------------------------------------------------------ checking


def index_of(path: Path, task: str, check: str, skip_bad: bool, began: float) -> Index:
    """The index of a file: FILE.index if it was made from the current file with at least these checks, else a new one.
    began: time at which the first of all files was opened"""
    kept = path.with_name(path.name + ".index")
    index = kept_index(kept, path, task, check)
    if index and (skip_bad or index.good):
        return index
    index = checked(path, task, check, skip_bad)
    if time.monotonic() - began > SAVE_AFTER and (skip_bad or index.good):
        with runtime.side_file(kept):
            runtime.write_beside(kept, lambda temporary: keep(index, temporary, task, check))
    return index


def checked(path: Path, task: str, check: str, skip_bad: bool) -> Index:
    """Scan and validate a whole file. Without skip_bad, pictures are no longer checked after the first invalid row."""
    # A few bytes per row, because there may be millions. first: "twin" -> index of the first row that has it
    offsets, twins, first, videos = array("q"), array("q"), {}, array("b")
    lines, pictures, lost, digest = [], {}, 0, hashlib.blake2b(digest_size=16)
    for number, start, line in progress(path):
        row, twin = {}, None
        if check != "none" or b'"twin"' in line or b'"video"' in line:
            try:
                row = parse_object(decoded(line))
                check_row(row, task)
            except ValueError as fault:
                lines.append(f"{path}:{number}: {fault}")
                continue
            row = completed(row, path, task)
            twin = row.get("twin")
        if check != "none" and (skip_bad or not lines):
            faults = {image: fault for image in pictures_of(row) if (fault := fault_of(image, row, task, check))}
            pictures |= faults
            if faults:
                lost += 1
                continue
            digest.update(said(row))
        if twin is not None and not first:
            twins.extend(range(len(offsets)))  # no row before this one has a twin
        if twin is not None or first:
            twins.append(len(offsets) if twin is None else first.setdefault(twin, len(offsets)))
        offsets.append(start)
        videos.append(is_video(row.get("image")))
    faults = [f"{image}: {fault}" for image, fault in pictures.items()]
    told = "" if check == "none" else digest.hexdigest()
    offsets, twins = (np.frombuffer(one or array("q", [0]), np.int64)[: len(one)] for one in (offsets, twins))
    videos = np.frombuffer(videos, np.int8).astype(bool) if any(videos) else None
    return Index(path, offsets, twins if first else None, videos, told, lines, faults, lost)


def rows_of(path: Path, task: str) -> Iterator[dict]:
    """The rows of a file that match their schema."""
    for _, _, line in lines_at(path):
        with contextlib.suppress(ValueError):
            row = parse_object(decoded(line))
            check_row(row, task)
            yield completed(row, path, task)


def progress(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """As lines_at, with a progress bar if reading the file takes long."""
    size = path.stat().st_size if path.is_file() else 0
    with tqdm(total=size, unit="B", unit_scale=True, leave=False, delay=2, desc=f"checking {path.name}") as bar:
        for number, start, line in lines_at(path):
            yield number, start, line
            bar.update(start + len(line) - bar.n)


ARRAYS = ("offsets", "twins", "videos")  # fields of an index with one entry per row


def keep(index: Index, path: Path, task: str, check: str) -> None:
    """Write an index file: a checksum, one line of JSON, then the arrays."""
    arrays = {name: one for name in ARRAYS if (one := getattr(index, name)) is not None}
    about = {name: value for name, value in vars(index).items() if name not in (*ARRAYS, "path", "before")}
    about |= made_of(index.path) | {"task": task, "check": check, "rows": len(index.offsets)}
    line = json.dumps(about | {"arrays": {name: str(one.dtype) for name, one in arrays.items()}}).encode() + b"\n"
    content = line + b"".join(one.tobytes() for one in arrays.values())
    path.write_bytes(hashlib.blake2b(content).digest() + content)


def kept_index(kept: Path, path: Path, task: str, check: str) -> Index | None:
    """The index written by `keep`, or None if it is damaged, belongs to another file, or is based on weaker checks."""
    try:
        if not kept.is_file():
            return None
        whole = kept.read_bytes()
        checksum, content = whole[:64], whole[64:]
        if hashlib.blake2b(content).digest() != checksum:
            return None
        line, _, numbers = content.partition(b"\n")
        about, arrays, start = json.loads(line), {}, 0
        if about | made_of(path) | {"task": task} != about or CHECKS.index(about["check"]) < CHECKS.index(check):
            return None
        for name, kind in about["arrays"].items():
            arrays[name] = np.frombuffer(numbers, kind, about["rows"], start)
            start += arrays[name].nbytes
        parts = {name: about[name] for name in ("digest", "lines", "pictures", "lost")}
        return Index(path, arrays["offsets"], arrays.get("twins"), arrays.get("videos"), **parts, before=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def made_of(path: Path) -> dict:
    """The properties by which an index identifies the file that it was made from."""
    about = path.stat()
    return {"size": about.st_size, "time": about.st_mtime_ns}


def lines_at(path: str | Path) -> Iterator[tuple[int, int, bytes]]:
    """The non-blank lines of a file: one-based line number, offset in the file, bytes."""
    if not Path(path).is_file():
        world = "; make the built-in world with: python -m world.scenes --out data/scenes"
        make = world if "scenes" in str(path) else ""
        raise ValueError(f"{path} is not a file: give the path of a file with one row a line{make}")
    with open(path, "rb") as file:  # only a line feed ends a line
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0  # some Windows editors write a BOM
        file.seek(start)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, start, line
            start += len(line)


def decoded(line: bytes) -> str:
    """A line decoded to text."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise ValueError(f"not UTF-8 text ({fault.reason}): is it compressed, or not a text file?") from fault


def lines_of(path: str | Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) for each non-blank line of a text file."""
    for number, _, line in lines_at(path):
        try:
            yield f"{path}:{number}", decoded(line)
        except ValueError as fault:
            raise ValueError(f"{path}:{number}: {fault}") from fault


def each_once(pairs: list[tuple]) -> dict:
    """A JSON object with unique keys; by default, the json module silently keeps only the last of duplicate keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} comes twice: expected it once")
    return found


def parse_object(line: str) -> dict:
    """One line -> its JSON object. Raises ValueError if it is not one."""
    try:
        value = json.loads(line, object_pairs_hook=each_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({getattr(error, 'msg', error)}): expected one object a line") from error
    if not isinstance(value, dict):
        raise ValueError(f"found {type(value).__name__}: expected an object")
    return value


def json_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("file:line", object) for each line of a JSONL file. Raises ValueError, with its place, for any other line."""
    for place, line in lines_of(path):
        try:
            value = parse_object(line)
        except ValueError as fault:
            raise ValueError(f"{place}: {fault}") from fault
        yield place, value


def check_row(row: dict, task: str) -> None:
    """Raise ValueError for a row that lacks a key required by its task or has a value of the wrong type."""
    schema = SCHEMAS[task]
    if task in WITH_VIDEOS and "video" in row:
        if "image" in row:
            raise ValueError("found both image and video: give one of them")
        schema = {"video": VIDEO} | {key: kind for key, kind in schema.items() if key != "image"}
    if not schema.keys() <= row.keys():
        wanted = "; ".join(f'"{key}": {what}' for key, (what, _) in schema.items())
        raise ValueError(f"found the keys {sorted(row)}: expected {wanted}")
    for key, (what, fits) in (schema | OPTIONAL.get(task, {})).items():
        if key in row and not fits(row[key]):
            raise ValueError(f"{key} is {reprlib.repr(row[key])}: expected {what}")


def is_text(value) -> bool:
    """Whether a value is a string with at least one visible character and no unpaired surrogates."""
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        return False
    # C: control and zero-width characters; Z: white space; M: accents without a letter; U+FFFD: a letter that was lost
    return any(unicodedata.category(letter)[0] not in "CZM" and letter != "\ufffd" for letter in value)


def is_score(value) -> bool:
    """Whether a value is a number from 0 to 1."""
    return type(value) in (int, float) and 0 <= value <= 1


def is_box(box) -> bool:
    """Whether a value is [x, y, width, height] with a non-negative position and a positive size."""
    if not isinstance(box, list) or len(box) != 4:
        return False
    numbers = all(type(value) in (int, float) and abs(value) < 2**31 for value in box)  # False for NaN
    return numbers and min(box[:2]) >= 0 and min(box[2:]) >= 1e-3  # pixels


def all_of(fits: Callable, kind: type, least: int = 1, most: float = math.inf) -> Callable:
    """A test for a list, or for the values of a dict: there are `least` to `most` of them, and all pass `fits`."""

    def test(value) -> bool:
        values = list(value.values()) if isinstance(value, dict) else value
        return isinstance(value, kind) and least <= len(value) <= most and all(map(fits, values))

    return test


# For each key, a description of its value, used in error messages, and a test of the value.
PATH = ("a path relative to this file", lambda value: isinstance(value, str))
VIDEO = (
    "the path of an animated picture, or a list of paths, one for each frame",
    lambda value: isinstance(value, str) or all_of(PATH[1], list)(value),
)
PATHS = ("a list of one or two paths relative to this file", all_of(PATH[1], list, 1, 2))
TEXT = ("a text that is not empty", is_text)
TEXTS = (
    "a text that is not empty, or a list of such texts",
    lambda value: is_text(value) or all_of(is_text, list)(value),
)
BOXES = ("[[x, y, width, height], ...] in pixels, at least one, none of them empty", all_of(is_box, list))
FOILS = ('{"kind": "wrong caption", ...} with no empty text', all_of(is_text, dict, least=0))
ANSWERS = (
    '{"answer": score from 0 to 1, ...}, at least one, none empty',
    lambda value: all_of(is_score, dict)(value) and all(map(is_text, value)),
)
TRUTH = ("true or false", lambda value: isinstance(value, bool))
ENTAILMENT_LABELS = ("entailment", "neutral", "contradiction")
LABEL = (", ".join(ENTAILMENT_LABELS), lambda value: value in ENTAILMENT_LABELS)
SCHEMAS = {
    "pairs": {"image": PATH, "caption": TEXTS},
    "foils": {"image": PATH, "caption": TEXT, "foils": FOILS},
    "grounding": {"image": PATH, "text": TEXT, "boxes": BOXES},
    "phrases": {"image": PATH, "text": TEXT},
    "vqa": {"image": PATH, "question": TEXT, "answers": ANSWERS},
    "questions": {"image": PATH, "question": TEXT},  # a test split whose answers are not published
    "reasoning": {"images": PATHS, "text": TEXT, "label": TRUTH},
    "entailment": {"image": PATH, "text": TEXT, "label": LABEL},
}
WITH_VIDEOS = (
    "pairs",
    "foils",
    "phrases",
    "vqa",
    "questions",
    "entailment",
)  # tasks in which "video" may replace "image"
OPTIONAL = {"grounding": {"proposals": BOXES}}
LEARNED = sorted({key for schema in (*SCHEMAS.values(), *OPTIONAL.values()) for key in schema} - {"image", "images"})


def fault_of(image: str, row: dict, task: str, check: str) -> str | None:
    """An error message for an unusable picture of a row or for its boxes, or None."""
    fault = check_video(image, check) if is_video(image) else check_image(image, check)
    if fault or task != "grounding":
        return fault
    try:
        return check_boxes(image, row["boxes"] + row.get("proposals", []))
    except ValueError as error:  # reading the size of a picture may decode all of it
        return str(error)
