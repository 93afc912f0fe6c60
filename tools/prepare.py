"""From official annotation files, or a folder of pictures, to the JSONL rows of data.py; nothing is downloaded.

    python -m tools.prepare folder --images my/pictures --out my     captions: captions.txt, texts beside, or names
    python -m tools.prepare coco --annotations dataset_coco.json --images coco --out data/coco
    python -m tools.prepare flickr30k --annotations dataset_flickr30k.json --images images --out data/flickr30k
    python -m tools.prepare flickr8k --annotations captions.txt --images Images --out data/flickr8k
    python -m tools.prepare cc --annotations Train_GCC-training.tsv --images cc3m --out data/cc3m
    python -m tools.prepare vqa --questions v2_OpenEnded_mscoco_train2014_questions.json \\
        --annotations v2_mscoco_train2014_annotations.json --images train2014 --split train --out data/vqa2
    python -m tools.prepare nlvr --annotations train.json --images train/images --split train --out data/nlvr
    python -m tools.prepare nlvr2 --annotations train.json --images images/train --split train --out data/nlvr2
    python -m tools.prepare snli-ve --annotations snli_ve_train.jsonl --images images --split train --out data/ve
    python -m tools.prepare refcoco --refs "refs(unc).p" --instances instances.json --images coco --out data/refcoco
    python -m tools.prepare albef --annotations vqa_train.json --task vqa --images coco --split train --out data/albef

Each writes TASK_SPLIT.jsonl, such as pairs_train.jsonl; the split that some call dev is written as val, where
finetune.py looks for it. A picture that is missing is an error unless --skip-missing is given. A row of another form
than the official one is refused with its file and line. All files of a run appear together at its end, or none.

To read: the data sets stand next to each other in the middle, each a generator of (split, row) that names pictures as
they lie in --images. What they share comes before them (readers, which keep no more than a few entries in memory) and
after them (convert, which looks for the pictures and writes). This file imports nothing of ours.
"""

import argparse
import csv
import io
import itertools
import json
import math
import os
import pickle
import re
import reprlib
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------- checked values

KINDS = {str: "a text that is not empty", int: "a whole number", list: "a list", dict: "an object"}
TRUTH = {"true": True, "True": True, "false": False, "False": False}


@contextmanager
def at(place: str) -> Iterator[None]:
    """Put the place before the message of a fault."""
    try:
        yield
    except (ValueError, csv.Error) as fault:
        raise ValueError(f"{place}: {fault}") from fault


def take(entry: Any, key: str, kind: type = str, blank: bool = False) -> Any:
    """A value of an entry, which must be there and of a kind. Texts come without white space around them."""
    if type(entry) is not dict:
        raise ValueError(f"found {reprlib.repr(entry)}: expected an object with the key {key!r}")
    if key not in entry:
        raise ValueError(f"found the keys {sorted(map(str, entry))}: expected {key!r}, {KINDS[kind]}")
    value = entry[key].strip() if type(entry[key]) is str else entry[key]
    if type(value) is not kind or (value == "" and not blank):
        raise ValueError(f"{key} is {reprlib.repr(value)}: expected {KINDS[kind]}")
    return value


def choose(entry: Any, key: str, meanings: dict[str, Any]) -> Any:
    """What the value of an entry means, which must be one of those given."""
    value = take(entry, key)
    if value not in meanings:
        raise ValueError(f"{key} is {value!r}: expected {', '.join(meanings)}")
    return meanings[value]


def told(texts: Iterable[str], left_out: Counter) -> list[str]:
    """The texts that are not blank; official files hold a few that are."""
    texts = [text.strip() for text in texts]
    left_out["blank texts"] += texts.count("")
    return [text for text in texts if text]


# -------------------------------------------------------------------------------------------------------------- readers

CHUNK = 1 << 20  # characters of a document that are read at once
LONGEST = 1 << 24  # characters of a line; a longer one is no line of rows
MARGIN = 16  # a number or a literal that ends nearer to the end of what was read may go on behind it
DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\n\r]*")


class Watched(io.FileIO):
    """A file that moves a progress bar while it is read."""

    def __init__(self, path: Path, bar: tqdm):
        super().__init__(path)
        self.bar = bar

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self.bar.update(count)
        return count


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """A text file with a progress bar. Raises ValueError if it is none."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of an annotation file")
    with tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        raw = io.BufferedReader(Watched(path, bar), CHUNK)
        with io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n") as file:
            try:
                yield file
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8 text ({error.reason}): is it packed, or another file?"
                ) from error


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of the lines that are not blank."""
    with opened(path) as file:
        for number in itertools.count(1):
            line = file.readline(LONGEST)
            if not line:
                return
            if len(line) == LONGEST:
                raise ValueError(f"{path}:{number}: found a line of {LONGEST} characters: expected one row a line")
            if line.strip():
                yield f"{path}:{number}", line


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, entry) of a file that holds one JSON object a line."""
    for place, line in lines(path):
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({error}): expected one object a line") from error
        yield place, entry


class Document:
    """A JSON document of any size, read value by value: only what follows the last value is kept."""

    def __init__(self, file: TextIO, path: Path):
        self.file, self.path, self.text, self.start, self.line, self.counted = file, path, "", 0, 1, 0

    def place(self, ahead: int = 0) -> str:
        """File and line of what comes next, or of what stands some characters ahead."""
        self.line += self.text.count("\n", self.counted, self.start)
        self.counted = self.start
        return f"{self.path}:{self.line + self.text.count(chr(10), self.start, self.start + ahead)}"

    def more(self) -> bool:
        """Forget what was decoded, read on at least as much as is waiting; whether there was anything."""
        self.place()
        piece = self.file.read(max(CHUNK, len(self.text) - self.start))
        self.text, self.start, self.counted = self.text[self.start :] + piece, 0, 0
        return bool(piece)

    def peek(self) -> str:
        """The next character that is not white space, empty at the end of the file."""
        while True:
            self.start = SPACE.match(self.text, self.start).end()
            if self.start < len(self.text) or not self.more():
                return self.text[self.start : self.start + 1]

    def expect(self, *characters: str) -> str:
        """Step over the next character, which must be one of those given."""
        found = self.peek()
        if found not in characters:
            what = f"found {found}" if found else "the file ends in the middle: it is not whole"
            raise ValueError(f"{self.place()}: {what}: expected {' or '.join(characters)}")
        self.start += 1
        return found

    def value(self) -> Any:
        """The next value. Decoding is tried again with more text until more text could not change what comes out."""
        self.peek()
        ended = False
        while True:
            value, fault = None, None
            try:
                value, end = DECODER.raw_decode(self.text, self.start)
            except json.JSONDecodeError as error:
                fault, end = error, error.pos
                end += len(self.text) * error.msg.startswith("Unterminated string")
            except RecursionError:
                raise ValueError(f"{self.place()}: lists in lists, too deep: expected a list of rows") from None
            if ended or end + MARGIN <= len(self.text):
                break
            ended = not self.more()
        if fault:
            hint = ", near the end of the file: is it whole?" if ended else ""
            raise ValueError(f"{self.place(fault.pos - self.start)}: not JSON ({fault.msg}){hint}") from fault
        self.start = end
        return value

    def items(self, name: str) -> Iterator[tuple[str, Any]]:
        """(place, entry) of the list that comes next."""
        self.expect("[")
        if self.peek() == "]":
            self.expect("]")
            return
        for number in itertools.count():
            self.peek()
            place = f"{self.place()}: {name}[{number}]"
            yield place, self.value()
            if self.expect(",", "]") == "]":
                return


def entries(path: Path, *keys: str) -> Iterator[tuple[str, str, Any]]:
    """Entries of the lists that a JSON document, an object, holds under some keys; without keys it must be a list.

    Args:    path   the document; it is read once and never held whole
             keys   of the top level, in any order; lists under other keys are passed over
    Returns: (place, key, entry)
    Raises:  ValueError naming file and line if the document is not JSON, not whole, or holds no such list
    """
    with opened(path) as file:
        document, found = Document(file, path), []
        if not keys:
            yield from ((place, "", entry) for place, entry in document.items(""))
        else:
            document.expect("{")
            separator = "}" if document.peek() == "}" else ","
            while separator == ",":
                key, opening = document.value(), document.expect(":") and document.peek()
                if type(key) is not str:
                    raise ValueError(f"{document.place()}: found the key {reprlib.repr(key)}: expected a text")
                found.append(key)
                if opening == "[" or key in keys:
                    for place, entry in document.items(key):
                        if key in keys:
                            yield place, key, entry
                else:
                    document.value()
                separator = document.expect(",", "}")
            if not set(keys) <= set(found):
                raise ValueError(f"{document.place()}: found the keys {found}: expected {', '.join(keys)}")
        if document.peek():
            raise ValueError(f"{document.place()}: found more behind the end of the document: expected one document")


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts, and nothing that would have to be imported and called."""

    def find_class(self, module: str, name: str):
        raise ValueError(f"asks to run {module}.{name}: a pickle of plain lists was expected, and this one is refused")


def read_pickle(path: Path) -> list:
    """The list in a pickle, read whole, without running code. Python 2 wrote the official ones: bytes become text."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of an annotation file")
    try:
        with open(path, "rb") as file:
            value = PlainUnpickler(file, encoding="utf-8", errors="replace").load()
    except Exception as error:  # a broken pickle raises nearly everything
        raise ValueError(f"{path} cannot be read as a pickle: {error or type(error).__name__}") from error
    if not isinstance(value, list):
        raise ValueError(f"{path} holds {type(value).__name__}: expected a list of references")
    return value


# ---------------------------------------------------------------------------------------------------------------- pairs

Rows = Iterator[tuple[str, dict]]  # (split, row); pictures are named as they lie in --images


def karpathy(args: argparse.Namespace, left_out: Counter) -> Rows:
    """One row a picture, with all of its captions. restval, which everyone trains on, joins train."""
    splits = {"train": "train", "restval": "train", "val": "val", "test": "test"}
    for place, _, entry in entries(args.annotations, "images"):
        with at(place):
            split, sentences = choose(entry, "split", splits), take(entry, "sentences", list)
            captions = told([take(sentence, "raw", blank=True) for sentence in sentences], left_out)
            folder = f"{take(entry, 'filepath')}/" if "filepath" in entry else ""  # COCO names one, Flickr does not
            image = folder + take(entry, "filename")
        if captions:
            yield split, {"image": image, "caption": captions}


def flickr8k(args: argparse.Namespace, left_out: Counter) -> Rows:
    """One row a picture, with the captions that stand together. A picture in none of the three lists is left out.

    Without the official lists a picture's name decides, six to one to one as there: the same split on every machine.
    """
    splits = {}
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")) if args.splits else ():
        splits |= {line.strip(): split for _, line in lines(args.splits / f"Flickr_8k.{name}Images.txt")}
    for image, group in itertools.groupby(flickr8k_captions(args.annotations), key=lambda pair: pair[0]):
        captions = told([caption for _, caption in group], left_out)
        eighth = zlib.crc32(image.encode()) % 8
        split = splits.get(image) if splits else {0: "val", 1: "test"}.get(eighth, "train")
        if split is None:
            left_out["pictures that no list of --splits names"] += 1
        elif captions:
            yield split, {"image": image, "caption": captions}


def flickr8k_captions(path: Path) -> Iterator[tuple[str, str]]:
    """(picture, caption) from "image,caption" lines with that header, or from "picture#number<Tab>caption" lines."""
    header = None
    for place, line in lines(path):
        with at(place):
            if header is None:
                header = re.sub(r'[\s"]', "", line).lower() == "image,caption"
                if header:
                    continue
            if header:
                image, *fields = next(csv.reader([line]))
                caption = ",".join(fields)  # also where commas of a caption stand outside of quotes
            else:
                name, *fields = line.split("\t")
                image, caption = name.rpartition("#")[0], " ".join(fields)
            if not image or not fields:
                forms = "the header image,caption and such lines, or picture#number<Tab>caption"
                raise ValueError(f"found {reprlib.repr(line)}: expected {forms}")
        yield image, caption


PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAMERA = {"img", "image", "dsc", "dscf", "dscn", "pxl", "mvimg", "photo", "picture", "pic", "screenshot", "untitled"}


def folder(args: argparse.Namespace, left_out: Counter) -> Rows:
    """One row a picture that lies below --images. Where its captions stand, the first that is there:

    captions.txt (or .csv) in the folder, in a form of flickr8k; dog.txt beside dog.jpg, one caption a line; the
    picture's name, as in a_red-circle_03.png. The name decides what goes to val: the same split on every machine.
    """
    if not 0 <= args.val_share < 1:
        raise ValueError(f"--val-share is {args.val_share}: give a share from 0 to below 1")
    lists = [path for path in (args.images / "captions.txt", args.images / "captions.csv") if path.is_file()]
    listed: dict[str, list[str]] = {}
    for image, caption in flickr8k_captions(lists[0]) if lists else ():
        listed.setdefault(image, []).append(caption)
    if lists and not listed:
        raise ValueError(f"{lists[0]} holds no captions: write a line for each, such as dog.jpg,a dog on grass")
    files = sorted(args.images.rglob("*"))
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    unread = sum(path.suffix.lower() in (".heic", ".heif") for path in files)
    left_out["pictures as a telephone writes them, .heic: save them as .jpg"] += unread
    if not pictures:
        raise ValueError(f"no picture lies in {args.images}: expected files that end in {', '.join(PICTURES)}")
    names = [path.relative_to(args.images).as_posix() for path in pictures]
    for image in sorted(listed.keys() - set(names)):
        yield "train", {"image": image, "caption": listed[image]}  # convert says that it is missing
    nameless = []
    for path, name in zip(pictures, names, strict=True):
        beside = path.with_suffix(".txt")
        if lists:
            captions = told(listed.get(name, []), left_out)
        elif beside.is_file():
            captions = [line.strip() for _, line in lines(beside)]
        else:
            captions = caption_of_name(path.stem)
        if captions:
            share = zlib.crc32(name.encode()) / 2**32
            yield "val" if share < args.val_share else "train", {"image": name, "caption": captions}
        else:
            nameless.append(name)
    if len(nameless) == len(pictures):
        raise ValueError(f"no picture in {args.images} has a caption: write captions.txt, lines under image,caption")
    if nameless:
        left_out[f"pictures without a caption, {nameless[0]} first"] = len(nameless)


def caption_of_name(name: str) -> list[str]:
    """a_red-circle_03 -> ["a red circle"]; a name that a camera gave is no caption -> []"""
    words = [word for word in re.split(r"[\W_]+", name) if not any(letter.isdigit() for letter in word)]
    return [] if not any(words) or {word.lower() for word in words} <= CAMERA else [" ".join(filter(None, words))]


def captions_from_the_web(args: argparse.Namespace, left_out: Counter) -> Rows:
    """One row a line, where its picture was still to be had. Of CC12M the url comes first.

    img2dataset names a picture by the number of its row, from 0 on, in folders ("shards") of 10,000 rows. It wants a
    header, "caption<Tab>url", which may stay in the file: it is no row.
    """
    number = -1
    for place, line in lines(args.annotations):
        with at(place):
            fields = [field.strip() for field in line.split("\t")]
            if number == -1 and sorted(fields) == ["caption", "url"]:
                continue
            links = [field.startswith(("http://", "https://")) for field in fields]
            if len(fields) != 2 or not any(links):
                raise ValueError(f"found {reprlib.repr(line)}: expected caption<Tab>url")
            number += 1
            caption, url = fields if links[1] else fields[::-1]
            about = {"row": number, "shard": number // 10_000, "name": url.rpartition("/")[2]}
            image = fill(args.pattern or "{shard:05d}/{row:09d}.jpg", about)
        for text in told([caption], left_out):
            yield args.split, {"image": image, "caption": text}


def fill(pattern: str, about: dict[str, Any]) -> str:
    """The name of a picture by --pattern."""
    try:
        return pattern.format(**about)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f"--pattern {pattern!r} does not fit ({error}): it knows {', '.join(about)}") from error


# ------------------------------------------------------------------------------------------------------------------ vqa

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(NUMBERS)}
FULL = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't
not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
SIGNS = [(word, i) for word in FULL.split() for i, letter in enumerate(word) if letter == "'"]
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word, i in SIGNS}  # written without one of its apostrophes


@lru_cache(maxsize=1 << 16)  # the same few answers come again and again
def normalise(answer: str) -> str:
    """An answer as VQA's own evaluation compares it, in the same order: punctuation, numbers, articles, contractions.

    A mark vanishes where it touches a blank, or where the answer has a comma between digits; else it becomes a blank.
    Full stops vanish unless a digit follows. Neither colons nor apostrophes are marks.
    """
    answer = " ".join(answer.split())
    text, thousands = answer, re.search(r"\d,\d", answer)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        vanishes = thousands or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if vanishes else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    words = [CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the")]
    # differs: where nothing is left, such as of the letter "A", the answer stays, so that it can be given at all.
    return " ".join(words) or answer.lower()


def scores(answers: list[str]) -> dict[str, float]:
    """What each answer is worth: the mean over all ways to leave one annotator out of min(1, others who agree / 3).

    differs: the official evaluation leaves both sides as they are where all ten agree to the letter. Here such answers
    are normalised too, so that an answer has the same name in every row; its score is 1 either way.
    """
    counts, n = Counter(filter(None, map(normalise, answers))), len(answers)
    return {
        answer: round((k * min(1, (k - 1) / 3) + (n - k) * min(1, k / 3)) / n, 4) for answer, k in counts.most_common()
    }


def vqa(args: argparse.Namespace, left_out: Counter) -> Rows:
    """One row a question. Both files are read in step: what has no partner yet waits; official files have one order.

    "type" is the official kind of answer (yes/no, number, other): eval.py reports each.
    """
    waiting: dict[int, dict[str, tuple[str, Any]]] = {}
    for both in itertools.zip_longest(entries(args.questions, "questions"), entries(args.annotations, "annotations")):
        for place, key, entry in filter(None, both):
            with at(place):
                number = take(entry, "question_id", int)
                pair = waiting.setdefault(number, {})
                if key in pair:
                    raise ValueError(f"question_id {number} comes twice in {key}: expected it once")
            pair[key] = place, entry
            if len(pair) == 2:
                yield from vqa_row(*pair["questions"], *waiting.pop(number)["annotations"], args, left_out)
    if waiting:
        (key, (place, _)), *_ = next(iter(waiting.values())).items()
        raise ValueError(
            f"{place}: {len(waiting)} question_ids, this one first, are in one of the two files only, here in {key}: "
            "give questions and annotations of the same split"
        )


def vqa_row(place: str, question: dict, answers_place: str, annotation: dict, args, left_out: Counter) -> Rows:
    """The row of a question and its answers."""
    with at(place):
        about = {"id": take(question, "image_id", int), "split": args.split}
        image = fill(args.pattern or "COCO_{split}2014_{id:012d}.jpg", about)
        row = {"image": image, "question": take(question, "question")}
    with at(answers_place):
        if annotation.get("image_id", about["id"]) != about["id"]:
            raise ValueError(f"image_id is {annotation['image_id']}, that of the question {about['id']}: expected one")
        answers = [take(answer, "answer", blank=True) for answer in take(annotation, "answers", list)]
        if len(answers) != 10:
            raise ValueError(f"found {len(answers)} answers: expected those of ten annotators")
        row |= {"answers": scores(answers), "question_id": question["question_id"]}
        row |= {"type": take(annotation, "answer_type")} if "answer_type" in annotation else {}
    if row["answers"]:
        yield args.split, row
    else:
        left_out["questions whose answers are all blank"] += 1


# ------------------------------------------------------------------------------------------------ reasoning, entailment


def parts_of(entry: dict, count: int, form: str) -> list[str]:
    """The parts of an identifier between its dashes."""
    parts = take(entry, "identifier").split("-")
    if len(parts) != count or not all(parts):
        raise ValueError(f"identifier is {entry['identifier']!r}: expected {form}")
    return parts


def folder_of(entry: dict) -> str:
    """The folder of an entry's pictures inside --images; entries of some splits name none."""
    return f"{entry['directory']}/" if entry.get("directory") not in (None, "") else ""


def nlvr(args: argparse.Namespace, left_out: Counter) -> Rows:
    """Six pictures an entry, which show the same three boxes in six orders; the official evaluation asks all six.

    A group is one sentence before its (up to four) sets of boxes. structured_rep, from which the pictures were drawn,
    is not kept.
    """
    for place, entry in json_lines(args.annotations):
        with at(place):
            sentence, position = parts_of(entry, 2, "sentence-position, such as 1572-0")
            row = {"text": take(entry, "sentence"), "label": choose(entry, "label", TRUTH), "group": sentence}
            name = f"{folder_of(entry)}{args.split}-{sentence}-{position}"
        for order in range(args.orders):
            yield args.split, {"images": [f"{name}-{order}.png"], **row}


def nlvr2(args: argparse.Namespace, left_out: Counter) -> Rows:
    """Two photographs an entry. A group is one sentence before its pairs, as the official consistency counts it."""
    for place, entry in json_lines(args.annotations):
        with at(place):
            split, pictures, pair, sentence = parts_of(entry, 4, "split-set-pair-sentence, such as train-10171-0-0")
            images = [f"{folder_of(entry)}{split}-{pictures}-{pair}-img{side}.png" for side in (0, 1)]
            row = {"text": take(entry, "sentence"), "label": choose(entry, "label", TRUTH)}
        yield args.split, {"images": images, **row, "group": f"{split}-{pictures}-{sentence}"}


LABELS = {label: label for label in ("entailment", "neutral", "contradiction")}


def snli_ve(args: argparse.Namespace, left_out: Counter) -> Rows:
    """The hypothesis about a photograph. Its key was spelled Flikr30kID at first, and its value may lack ".jpg"."""
    for place, entry in json_lines(args.annotations):
        with at(place):
            if take(entry, "gold_label") == "-":
                left_out["rows with the label -, on which annotators did not agree"] += 1
                continue
            key = "Flikr30kID" if "Flikr30kID" in entry else "Flickr30K_ID"
            image = take({key: str(entry[key])} if type(entry.get(key)) is int else entry, key)
            row = {"image": image if image.endswith(".jpg") else f"{image}.jpg", "text": take(entry, "sentence2")}
            row["label"] = choose(entry, "gold_label", LABELS)
        yield args.split, row


# ------------------------------------------------------------------------------------------------------------ grounding


def refcoco(args: argparse.Namespace, left_out: Counter) -> Rows:
    """One row a sentence: the box of its instance; as proposals, the boxes of all instances annotated in the picture.

    The references (50,000) are held in memory, and of the instances (200,000) the boxes.
    """
    pictures, instances = {}, {}
    for place, key, entry in entries(args.instances, "images", "annotations"):
        with at(place):
            if key == "images":
                sizes = take(entry, "width", int), take(entry, "height", int)
                pictures[take(entry, "id", int)] = take(entry, "file_name"), *sizes
            else:
                box, image = take(entry, "bbox", list), take(entry, "image_id", int)
                if len(box) != 4 or not all(type(value) in (int, float) and math.isfinite(value) for value in box):
                    raise ValueError(f"bbox is {box}: expected [x, y, width, height]")
                instances.setdefault(image, {})[take(entry, "id", int)] = tuple(box)
    splits = {split: split for split in SPLITS}
    for number, ref in enumerate(read_pickle(args.refs)):
        with at(f"{args.refs}: refs[{number}]"):
            split, image, instance = choose(ref, "split", splits), take(ref, "image_id", int), take(ref, "ann_id", int)
            if image not in pictures or instance not in instances.get(image, ()):
                raise ValueError(f"no instance {instance} in a picture {image}: expected it in {args.instances}")
            name, width, height = pictures[image]
            boxes = {key: clip(box, width, height) for key, box in instances[image].items()}
            texts = told([take(sentence, "sent", blank=True) for sentence in take(ref, "sentences", list)], left_out)
        if not boxes[instance]:
            left_out["sentences whose box has no area inside the picture"] += len(texts)
            continue
        proposals = [box for box in boxes.values() if box]
        for text in texts:
            yield split, {"image": name, "text": text, "boxes": [boxes[instance]], "proposals": proposals}


def clip(box: tuple, width: int, height: int) -> list[float] | None:
    """The part of a box inside the picture, in hundredths of a pixel as COCO gives them; None if there is none.

    COCO's boxes reach outside by rounding. Hundredths keep x + width from exceeding the picture by a rounding error.
    """
    x, y = round(max(0, box[0]), 2), round(max(0, box[1]), 2)
    w, h = round(min(width, box[0] + box[2]) - x, 2), round(min(height, box[1] + box[3]) - y, 2)
    return [x, y, w, h] if w > 0 and h > 0 else None


# ---------------------------------------------------------------------------------------------------------------- albef


def albef(args: argparse.Namespace, left_out: Counter) -> Rows:
    """ALBEF's lists for any task. Their grounding lists hold no boxes: rows to train on, not to evaluate with.

    Ten answers are scored as VQA scores them; of fewer each is worth its share, and a single one (Visual Genome) 1.
    """
    for place, _, entry in entries(args.annotations):
        with at(place):
            if args.task == "reasoning":
                row = {"images": [under(path, args.strip) for path in take(entry, "images", list)]}
                if len(row["images"]) not in (1, 2):
                    raise ValueError(f"found {len(row['images'])} images: expected one or two")
            else:
                row = {"image": under(take(entry, "image"), args.strip)}
            if args.task == "pairs":
                several = type(entry.get("caption")) is list
                captions = told(texts_of(entry, "caption"), left_out)
                if not captions:
                    continue
                row["caption"] = captions if several else captions[0]
            elif args.task == "vqa":
                answers = texts_of(entry, "answer")
                shares = {answer: round(k / len(answers), 4) for answer, k in Counter(map(normalise, answers)).items()}
                row["question"] = take(entry, "question")
                row["answers"] = scores(answers) if len(answers) == 10 else shares
            elif args.task == "grounding":
                row["text"] = take(entry, "text")
            else:
                labels = TRUTH if args.task == "reasoning" else LABELS
                row |= {"text": take(entry, "sentence"), "label": choose(entry, "label", labels)}
        yield args.split, row


def texts_of(entry: dict, key: str) -> list[str]:
    """One text or several as a list."""
    texts = entry.get(key) if type(entry.get(key)) is list else [take(entry, key)]
    if not texts or not all(type(text) is str for text in texts):
        raise ValueError(f"{key} is {reprlib.repr(texts)}: expected a text or a list of texts")
    return texts


def under(path: Any, beginning: str) -> str:
    """A picture's path below --images: without the beginning that --strip names."""
    if type(path) is not str or not path.strip():
        raise ValueError(f"image is {reprlib.repr(path)}: expected a path")
    path = path.removeprefix(beginning)
    if path.startswith("/") and not beginning:
        raise ValueError(f"image is {path}, from the root: give the part that --images stands for as --strip")
    return path.lstrip("/")


# -------------------------------------------------------------------------------------------------------------- writing


class Outputs:
    """Files that are written beside their places, and moved there together if the block ends well."""

    def __init__(self, folder: Path):
        self.folder, self.files = folder, {}

    def beside(self, path: Path, what: str) -> Path:
        """Where a file stands until the end, or the one that it replaces."""
        return path.with_name(f".{path.name}.{os.getpid()}.{what}")

    def write(self, name: str, row: dict) -> None:
        """Add a row to a file."""
        path = self.folder / name
        if path not in self.files:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.files[path] = self.beside(path, "new").open("w", encoding="utf-8", newline="\n")
        self.files[path].write(json.dumps(row) + "\n")

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, kind, *about) -> None:
        try:
            for file in self.files.values():
                file.close()
            if kind is None:
                self.move()
        finally:
            for path, file in self.files.items():
                file.close()
                self.beside(path, "new").unlink(missing_ok=True)
                self.beside(path, "old").unlink(missing_ok=True)

    def move(self) -> None:
        """Move all files to their places; if one cannot be moved, put everything back as it was."""
        try:
            for path in self.files:
                if path.exists():
                    os.replace(path, self.beside(path, "old"))
                os.replace(self.beside(path, "new"), path)
        except BaseException:
            for path in self.files:
                if not self.beside(path, "new").exists():
                    path.unlink(missing_ok=True)
                if self.beside(path, "old").exists():
                    os.replace(self.beside(path, "old"), path)
            raise


def file_name(args: argparse.Namespace, split: str) -> str:
    """Where the rows of a split go; what some call dev is val, where finetune.py looks for it."""
    return f"{COMMANDS[args.command][1] or args.task}_{'val' if split == 'dev' else split}.jsonl"


def convert(args: argparse.Namespace) -> None:
    """Write the rows of a data set, and say how many and what was left out.

    Raises:  ValueError if pictures are missing and may not be (a count and the first ten), or no row is left
    """
    rows_of = COMMANDS[args.command][0]
    # Symbolic links are resolved first: behind one, ".." would lead elsewhere than the path says.
    root = Path(os.path.relpath(args.images.resolve(), args.out.resolve())).as_posix()
    is_there = lru_cache(maxsize=1 << 16)(os.path.isfile)
    written, left_out, pictures, absent = Counter(), Counter(), set(), []
    with Outputs(args.out) as outputs:
        for split, row in rows_of(args, left_out):
            images = row["images"] if "images" in row else [row["image"]]
            gone = [image for image in images if not is_there(f"{args.images}/{image}")]
            if gone:
                left_out["rows whose picture is missing"] += 1
                absent += [image for image in gone if len(absent) < 10 and image not in absent]
                continue
            if "caption" not in row:  # rows of pairs have a picture each, and are the many
                pictures.update(map(hash, images))
            paths = [f"{root}/{image}" for image in images]
            name = file_name(args, split)
            outputs.write(name, row | ({"images": paths} if "images" in row else {"image": paths[0]}))
            written[name] += 1
        missing, listed = left_out["rows whose picture is missing"], "\n  ".join(absent)
        if missing and not args.skip_missing:
            raise ValueError(
                f"{missing} of {missing + written.total()} rows show a picture that is not in {args.images}; mend "
                f"--images, or leave them out with --skip-missing. The first are:\n  {listed}"
            )
        if not written:
            what = f"; pictures that are not in {args.images}:\n  {listed}" if missing else ""
            raise ValueError(f"nothing was left to write{what or ': expected a file with rows'}")
    for name, count in written.items():
        print(f"{args.out / name}: {count} rows")
    print(f"{len(pictures) or written.total()} pictures")
    for reason, count in left_out.items():
        if count:
            print(f"left out: {count} {reason}")


# --------------------------------------------------------------------------------------------------------- command line

SPLITS = ("train", "val", "test", "testA", "testB")
SPLIT_NAMES = ("train", "val", "dev", "test", "test1", "test2")
TASKS = ("pairs", "vqa", "reasoning", "entailment", "grounding")
OPTIONS = {
    "--annotations": {"type": Path, "required": True, "help": "annotation file"},
    "--questions": {"type": Path, "required": True, "help": "file of questions of the same split"},
    "--refs": {"type": Path, "required": True, "help": 'the pickle, such as "refs(unc).p"; no code in it runs'},
    "--instances": {"type": Path, "required": True, "help": "instances.json of the same release"},
    "--splits": {"type": Path, "help": "folder of Flickr_8k.trainImages.txt, .devImages.txt and .testImages.txt"},
    "--split": {"choices": SPLIT_NAMES, "default": "train", "help": "what the file holds (default: %(default)s)"},
    "--pattern": {"help": "other names of pictures: cc knows {row}, {shard}, {name} (of the url), vqa {id}, {split}"},
    "--orders": {
        "type": int,
        "choices": range(1, 7),
        "default": 1,
        "help": "how many of the six pictures (%(default)s)",
    },
    "--task": {"choices": TASKS, "required": True, "help": "what the list is for"},
    "--val-share": {"type": float, "default": 0.0, "help": "share of the pictures to keep apart as val (%(default)s)"},
    "--strip": {"default": "", "help": "beginning of the paths in the file, which --images stands for"},
}
ONE = ("--annotations",)
# command: (generator of rows, task, help, options); the task of ALBEF's lists is an option
COMMANDS = {
    "folder": (folder, "pairs", "pictures of your own, captions beside them or in their names", ("--val-share",)),
    "coco": (karpathy, "pairs", "COCO captions: Karpathy's dataset_coco.json", ONE),
    "flickr30k": (karpathy, "pairs", "Karpathy's dataset_flickr30k.json, or dataset_flickr8k.json", ONE),
    "flickr8k": (flickr8k, "pairs", "captions.txt or Flickr8k.token.txt", (*ONE, "--splits")),
    "cc": (captions_from_the_web, "pairs", "Conceptual Captions 3M and 12M", (*ONE, "--split", "--pattern")),
    "vqa": (vqa, "vqa", "VQA v2; test has no answers to convert", ("--questions", *ONE, "--split", "--pattern")),
    "nlvr": (nlvr, "reasoning", "Cornell NLVR", (*ONE, "--split", "--orders")),
    "nlvr2": (nlvr2, "reasoning", "NLVR2", (*ONE, "--split")),
    "snli-ve": (snli_ve, "entailment", "SNLI-VE", (*ONE, "--split")),
    "refcoco": (refcoco, "grounding", "RefCOCO, RefCOCO+, RefCOCOg", ("--refs", "--instances")),
    "albef": (albef, "", "JSON lists in the form of ALBEF", (*ONE, "--task", "--split", "--strip")),
}


def main(arguments: list[str] | None = None) -> None:
    """Command line: check the folders, then convert."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="data set")
    for name, (_, _, text, options) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        for option in options:
            command.add_argument(option, **OPTIONS[option])
        command.add_argument("--images", type=Path, required=True, help="folder of the pictures")
        command.add_argument("--out", type=Path, required=True, help="folder to write to")
        skips = {"action": "store_true", "default": name == "cc"}  # many links of cc are dead
        command.add_argument("--skip-missing", **skips, help="leave out rows whose picture is missing")
        command.add_argument("--force", action="store_true", help="replace files that are there already")
    args = parser.parse_args(arguments)
    if not args.images.is_dir():
        raise ValueError(f"--images {args.images} is not a folder: give the one that the pictures lie in")
    splits = [args.split] if "split" in args else SPLITS
    there = [str(path) for path in (args.out / file_name(args, split) for split in splits) if path.exists()]
    if there and not args.force:
        raise ValueError(f"{', '.join(there)} is there already: pass --force to replace it, or another --out")
    convert(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # a user's mistake ends with its sentence, not with a traceback
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        sys.exit(2)
