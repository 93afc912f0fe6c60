"""Convert an official annotation file, or a folder of pictures, to the JSONL rows that data.py reads.

    python -m tools.prepare folder --images my/pictures --out my
    python -m tools.prepare coco --annotations dataset_coco.json --images coco --out data/coco

docs/data.md lists the datasets, the sources of their files, and the command for each. Nothing is downloaded.

A converter is a generator that reads the published files of a dataset and yields (place, split, row). The place is the
file and the position of the entry in it, for error messages; picture names are relative to --images. `convert` does the
rest: it checks every row against the schema of its task, checks that the pictures exist, and writes TASK_SPLIT.jsonl,
such as pairs_train.jsonl. A split called dev is written as val, where finetune.py looks for it. In this file, the
converters come first, then the helpers that they share, then `convert` and the command line.
"""

import argparse
import csv
import json
import math
import os
import pickle
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize

from tqdm import tqdm

import runtime
from data import check_row, json_lines, lines_of, pictures_of, resolved
from metrics import is_name, normalise
from tools.frames import CONTAINERS, frames_of_file
from world.written import listed, replacing

Rows = Iterator[tuple[str, str, dict]]  # (place, split, row)

# ----------------------------------------------------------------------------------------------- images with captions


def karpathy(args: argparse.Namespace, left_out: Counter) -> Rows:
    """COCO and Flickr with Karpathy's splits: one row per picture, with all its captions.

    As is common, restval (the part of COCO's val2014 that belongs to neither val nor test) is added to train.
    """
    splits = {"train": "train", "restval": "train", "val": "val", "test": "test"}
    for place, entry in entries(args.annotations, "images"):
        with at(place):
            split, sentences = take(entry, "split", splits), take(entry, "sentences", list)
            captions = not_blank([take(sentence, "raw") for sentence in sentences], left_out)
            folder = f"{take(entry, 'filepath')}/" if "filepath" in entry else ""  # only COCO has subfolders
            image = folder + take(entry, "filename")
        if captions:
            yield place, split, {"image": image, "caption": captions}


def coco_captions(args: argparse.Namespace, left_out: Counter) -> Rows:
    """COCO's own captions_train2017.json, and files in the same format: one row per picture, with all its captions.

    These are the published splits, not Karpathy's: each file contains one split, which --split names.
    """
    named = re.search("train|val|test", args.annotations.name)
    if named and named[0] != args.split.replace("dev", "val").rstrip("12"):
        raise ValueError(f"{args.annotations} is of {named[0]} by its name, and --split is {args.split}: give its own")
    names, captions = {}, {}
    for place, entry in entries(args.annotations, "images"):
        with at(place):
            once(names, take(entry, "id", int), (place, take(entry, "file_name")))
    for place, entry in entries(args.annotations, "annotations"):
        with at(place):
            number = take(entry, "image_id", int)
            if number not in names:
                raise ValueError(f"image_id is {number}: expected the id of one of the images")
            captions.setdefault(number, []).extend(not_blank([take(entry, "caption")], left_out))
    for number, (place, name) in names.items():
        if captions.get(number):
            yield place, args.split, {"image": name, "caption": captions[number]}
        else:
            left_out["pictures without a caption"] += 1


def flickr8k(args: argparse.Namespace, left_out: Counter) -> Rows:
    """Flickr8k: one row per picture. Pictures in none of the official lists in --splits are left out.

    Without these lists, a hash of the picture's name determines the split, in the official 6:1:1 proportions.
    """
    official = {}
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")) if args.splits else ():
        official |= {line.strip(): split for _, line in lines_of(args.splits / f"Flickr_8k.{name}Images.txt")}
    for image, captions in read_captions(args.annotations).items():
        eighth = zlib.crc32(image.encode()) % 8
        split = official.get(image) if args.splits else {0: "val", 1: "test"}.get(eighth, "train")
        captions = not_blank(captions, left_out)
        if split is None:
            left_out["pictures that no list of --splits names"] += 1
        elif captions:
            yield str(args.annotations), split, {"image": image, "caption": captions}


def read_captions(path: Path) -> dict[str, list[str]]:
    """The captions of each picture, read from lines of the form picture#number<Tab>caption, from a CSV file with the
    header image,caption, or from Kaggle's Flickr30k with the header image_name| comment_number| comment."""
    captions, header = {}, None
    for place, line in lines_of(path):
        with at(place):
            if header is None:
                header = re.sub(r'[\s"]', "", line).lower()
                if header in ("image,caption", KAGGLE):
                    continue
            if header == "image,caption":
                image, *fields = next(csv.reader([line]))
                caption = ",".join(fields)  # some files do not quote captions with commas
            elif header == KAGGLE:
                image, *fields = (part.strip() for part in line.split("|"))
                caption = re.sub(r"^\d+\s*", "", " ".join(fields))  # the number; one line lacks the | after it
            else:
                name, *fields = line.split("\t")
                image, caption = name.rpartition("#")[0], " ".join(fields)
            if not image or not fields:
                forms = f"the header image,caption or {KAGGLE} and such lines, or picture#number<Tab>caption"
                raise ValueError(f"found {reprlib.repr(line)}: expected {forms}")
        captions.setdefault(image, []).append(caption)
    if not captions:
        raise ValueError(f"{path} holds no captions: write a line for each, such as dog.jpg,a dog on grass")
    return captions


KAGGLE = "image_name|comment_number|comment"
PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".tga")
CAMERA = {"img", "image", "dsc", "dscf", "dscn", "pxl", "mvimg", "photo", "picture", "pic", "screenshot", "untitled"}


def folder(args: argparse.Namespace, left_out: Counter) -> Rows:
    """Your own pictures and videos, including subfolders: one row each. Captions come from the first existing source:

    captions.txt or captions.csv in the folder (see read_captions); metadata.jsonl or metadata.csv there or in
    subfolders (see read_metadata); dog.txt beside dog.jpg, with one caption per line; the file name itself, as in
    a_red-circle_03.png. A hash of the name determines which pictures go to val; if the pictures are listed in metadata,
    a top-level folder called train, validation or test takes precedence.
    """
    if not 0 <= args.val_share < 1:
        raise ValueError(f"--val-share is {args.val_share}: give a share from 0 to below 1")
    files = [path for path in files_in(args.images) if not is_junk(path.relative_to(args.images))]
    lists = [path for path in (args.images / "captions.txt", args.images / "captions.csv") if path.is_file()][:1]
    metadata = [] if lists else sorted(path for path in files if path.stem == "metadata" and path.suffix in METADATA)
    listed = read_captions(lists[0]) if lists else {}
    for path in metadata:
        listed |= read_metadata(path, args.images, args.column)
    kinds = *PICTURES, *CONTAINERS
    names = {path.relative_to(args.images).as_posix() for path in files if path.suffix.lower() in kinds}
    spelled, captions_of = {normalize("NFC", name): name for name in names}, {}
    for name, captions in listed.items():
        if not is_name(name):
            raise ValueError(f"{(lists + metadata)[0]}: {name!r} cannot be the name of a picture")
        inside = Path(os.path.relpath(args.images / name, args.images)).as_posix()  # ./dog.jpg, or with the whole path
        # macOS may encode as two characters the "é" that is one in the list.
        inside = inside if inside in names else spelled.get(normalize("NFC", inside), name)
        captions_of.setdefault(inside, []).extend(captions)
    unread = sum(path.suffix.lower() in (".heic", ".heif") for path in files)
    left_out["pictures in the format of a phone, .heic: save them as .jpg"] += unread
    if not names:
        raise ValueError(f"no picture lies in {args.images}: expected files that end in {', '.join(PICTURES)}")
    refuse_unread(args.images, files, names, lists, metadata)
    beside = sum((args.images / name).with_suffix(".txt").is_file() for name in names)
    source = lists[0].name if lists else ", ".join(sorted({path.name for path in metadata}))
    source = source or ("the .txt beside each picture" if beside else "the names of the pictures")
    source += ", or its name where there is none" * (0 < beside < len(names) and not lists + metadata)
    print(f"captions are read from {source}")
    without, first = [], {}  # first: by resolved path, the first name of a picture that occurs more than once
    for name in sorted(names | captions_of.keys()):  # convert reports names that are listed but missing
        path = args.images / name
        if lists or metadata:
            captions = not_blank(captions_of.get(name, []), left_out)
        elif path.with_suffix(".txt").is_file():
            captions = [line.strip() for _, line in lines_of(path.with_suffix(".txt"))]
        else:
            captions = caption_in_name(path.stem)
        if captions:
            share = zlib.crc32(first.setdefault(resolved(path), name).encode(errors="surrogatepass")) / 2**32
            by_share = "val" if share < args.val_share else "train"
            split = SPLIT_FOLDERS.get(name.partition("/")[0], by_share) if metadata else by_share
            shown = {"video" if path.suffix.lower() in CONTAINERS else "image": name}
            yield str(path), split, shown | {"caption": captions}
        else:
            without.append(name)
    if without:
        left_out[f"pictures without a caption, {without[0]} first (give captions in captions.txt)"] = len(without)


def refuse_unread(images: Path, files: list[Path], names: set[str], lists: list[Path], metadata: list[Path]) -> None:
    """Raise ValueError for a file that seems to hold captions, but that `folder` would read under another name only.

    Args:    files             all files in the folder `images`
             names             of its pictures, relative to it
             lists, metadata   the files of captions that are read
    """
    pictures = {images / name for name in names}
    pictured = {path.with_suffix("") for path in pictures}
    seem = set() if lists or metadata else set(images.glob("[Cc]aption*")) - pictures
    if not lists:
        seem |= {path for path in files if path.name.lower() in SOURCES} - set(metadata)
    seem |= {path for path in files if path.suffix == ".TXT" and path.with_suffix("") in pictured}
    for path in sorted(path for path in seem if path.is_file()):
        if path.suffix == ".TXT" and path.with_suffix("") in pictured:
            raise ValueError(f"{path} is not read: call it {path.stem}.txt, or take it away")
        if path.with_suffix("") not in pictured:
            raise ValueError(
                f"{path} is not read: call it captions.txt or captions.csv, or metadata.jsonl, or take it away"
            )


def msrvtt(args: argparse.Namespace, left_out: Counter) -> Rows:
    """MSR-VTT: one row per video, with all its captions."""
    splits, shown = {"train": "train", "validate": "val", "test": "test"}, {}
    for place, entry in entries(args.annotations, "videos"):
        with at(place):
            once(shown, take(entry, "video_id"), (place, take(entry, "split", splits), []))
    for place, entry in entries(args.annotations, "sentences"):
        with at(place):
            name = take(entry, "video_id")
            if name not in shown:
                raise ValueError(f"video_id is {name!r}: expected that of a video in the list")
            shown[name][2].extend(not_blank([take(entry, "caption")], left_out))
    for name, (place, split, captions) in shown.items():
        if captions:
            yield place, split, {"video": f"{name}.mp4", "caption": list(dict.fromkeys(captions))}
        else:
            left_out["videos without a caption"] += 1


def lsmdc(args: argparse.Namespace, left_out: Counter) -> Rows:
    """LSMDC: one row per line of clip, four times and sentence, separated by tabs. Clips are in one folder per film,
    named like the clip without its last part."""
    for place, line in lines_of(args.annotations):
        with at(place):
            clip, *times, sentence = line.rstrip("\r\n").split("\t")
            film = clip.rpartition("_")[0]
            if len(times) != 4 or not film:
                form = "FILM_TIME, four times and a sentence, with tabs between"
                raise ValueError(f"found {reprlib.repr(line)}: expected {form}")
        if captions := not_blank([sentence.strip()], left_out):
            yield place, args.split, {"video": f"{film}/{clip}.avi", "caption": captions[0]}


def is_junk(path: Path) -> bool:
    """Whether a path, relative to the folder of pictures, is a leftover of a system or editor: ._x.png, __MACOSX."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def files_in(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, including linked ones; each folder is visited once."""
    found, seen = [], {os.path.realpath(folder)}
    for here, folders, names in os.walk(folder, followlinks=True):
        places = {os.path.realpath(os.path.join(here, name)): name for name in sorted(folders)}
        folders[:] = [name for place, name in places.items() if place not in seen]
        seen |= places.keys()
        found += [Path(here, name) for name in names]
    return found


METADATA = (".jsonl", ".csv", ".parquet")
SOURCES = ("captions.txt", "captions.csv", "metadata.jsonl", "metadata.json", "metadata.csv")  # in any case
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def read_metadata(path: Path, images: Path, column: str) -> dict[str, list[str]]:
    """The captions of each picture, from metadata.jsonl or metadata.csv in the format of Hugging Face's image folders.

    Each entry has a file_name, relative to the folder of the metadata file, and a caption or a list of captions in the
    given column, by default "text" or "caption".
    """
    if path.suffix == ".parquet":
        raise ValueError(f"{path} is a Parquet file, which is not read here: save it as metadata.jsonl beside it")
    captions = {}
    for place, entry in json_lines(path) if path.suffix == ".jsonl" else csv_entries(path):
        with at(place):
            names = [column] if column else [name for name in ("text", "caption") if name in entry]
            if len(names) != 1:
                wanted = "one of text and caption, or say with --column which holds the caption"
                raise ValueError(f"found the columns {', '.join(map(str, entry))}: expected {wanted}")
            name = os.path.relpath(path.parent / take(entry, "file_name"), images).replace(os.sep, "/")
            captions.setdefault(name, []).extend(texts_in(take(entry, names[0], object)))
    return captions


def csv_entries(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, entry) for each line of a CSV file with a header."""
    with open(path, encoding="utf-8-sig", newline="") as file, at(str(path)):
        reader = csv.DictReader(file, strict=True)
        for entry in reader:
            yield f"{path}:{reader.line_num}", entry


def caption_in_name(name: str) -> list[str]:
    """a_red-circle_03 -> ["a red circle"]; a camera's file name, such as IMG_2034, is not a caption -> []"""
    words = [word for word in re.split(r"[\W_]+", name) if word and not re.search(r"\d", word)]
    return [] if {word.lower() for word in words} <= CAMERA else [" ".join(words)]


def conceptual_captions(args: argparse.Namespace, left_out: Counter) -> Rows:
    """Conceptual Captions 3M (caption<Tab>url) and 12M (url<Tab>caption): one row per line.

    img2dataset names a picture by its zero-based line number, not counting the header caption<Tab>url that it requires,
    and stores 10,000 pictures per folder ("shard").
    """
    number = -1
    for place, line in lines_of(args.annotations):
        fields = [field.strip() for field in line.split("\t")]
        if number == -1 and sorted(fields) == ["caption", "url"]:
            continue
        number += 1
        with at(place):
            is_url = [field.startswith(("http://", "https://")) for field in fields]
            if len(fields) != 2 or not any(is_url):
                raise ValueError(f"found {reprlib.repr(line)}: expected caption<Tab>url")
            caption, url = fields if is_url[1] else fields[::-1]
            values = {"row": number, "shard": number // 10_000, "name": url.rpartition("/")[2]}
            image = fill(args.pattern or "{shard:05d}/{row:09d}.jpg", values)
        for text in not_blank([caption], left_out):
            yield place, args.split, {"image": image, "caption": text}


# -------------------------------------------------------------------------------------------- visual question answering


def questions_of(args: argparse.Namespace, pattern: str) -> dict[int, tuple[str, int, dict]]:
    """The questions of VQA v2: question_id -> place, picture number, row without answers"""
    asked = {}
    for place, entry in entries(args.questions, "questions"):
        with at(place):
            number, values = take(entry, "question_id", int), {"id": take(entry, "image_id", int), "split": args.split}
            image = fill(args.pattern or pattern, values)
            row = {"image": image, "question": take(entry, "question"), "question_id": number}
            once(asked, number, (place, values["id"], row), "question_id")
    return asked


def vqa_test(args: argparse.Namespace, left_out: Counter) -> Rows:
    """The questions of a test split, whose answers are not published: for `eval.py vqa --no-answers`."""
    for place, _, row in questions_of(args, "COCO_{split}2015_{id:012d}.jpg").values():
        yield place, args.split, row


def vqa(args: argparse.Namespace, left_out: Counter) -> Rows:
    """VQA v2: one row per question. eval.py reports results by "type" of answer (yes/no, number, other)."""
    same_split = f"expected {args.questions} and {args.annotations} to be of the same split"
    asked = questions_of(args, "COCO_{split}2014_{id:012d}.jpg")
    for place, entry in entries(args.annotations, "annotations"):
        with at(place):
            number, answers = take(entry, "question_id", int), take(entry, "answers", list)
            if number not in asked:
                raise ValueError(f"question_id {number} has no question, or two annotations: {same_split}")
            question_place, image_id, row = asked.pop(number)
            if entry.get("image_id", image_id) != image_id:
                raise ValueError(f"image_id is {entry['image_id']}, that of the question {image_id}: {same_split}")
            if not answers:
                raise ValueError("found no answers: expected those of one annotator or more, of ten in VQA v2")
            row["answers"] = scores([take(answer, "answer") for answer in answers])
            row |= {"type": take(entry, "answer_type")} if "answer_type" in entry else {}
        if row["answers"]:
            yield question_place, args.split, row
        else:
            left_out["questions whose answers are all blank"] += 1
    if asked:
        place = next(iter(asked.values()))[0]
        raise ValueError(f"{place}: {len(asked)} questions, this one first, have no answers: {same_split}")


def scores(answers: list[str]) -> dict[str, float]:
    """The official score of each answer: min(1, agreeing annotators / 3), averaged over leaving out one annotator.

    differs: the official evaluation fully normalises predictions, but only the punctuation of the annotators' answers,
    and not even that if all ten are identical. We normalise both in the same way, so that an answer is spelled alike in
    every row; for the published annotations, which are already in lower case, the scores are identical. For more or
    fewer than ten annotators, shares are rescaled as if there were ten: min(1, 10 * share / 3).
    """
    counts, n = Counter(filter(None, map(normalise, answers))), len(answers)
    if n != 10:
        return {answer: round(min(1, 10 * k / n / 3), 4) for answer, k in counts.most_common()}
    return {
        answer: round((k * min(1, (k - 1) / 3) + (n - k) * min(1, k / 3)) / n, 4) for answer, k in counts.most_common()
    }


# ------------------------------------------------------------------------------- reasoning, entailment and grounding

TRUTH = {"true": True, "True": True, "false": False, "False": False}


def nlvr(args: argparse.Namespace, left_out: Counter) -> Rows:
    """Cornell NLVR: --orders rows per entry, whose six pictures show the same three boxes in different orders.

    A group consists of the pictures (up to four) for which one sentence was written; consistency is per group.
    """
    for place, entry in json_lines(args.annotations):
        with at(place):
            sentence, position = parts_of(entry, "sentence-position")
            name = f"{entry.get('directory', '')}/{args.split}-{sentence}-{position}".lstrip("/")
            row = {"text": take(entry, "sentence"), "label": take(entry, "label", TRUTH), "group": sentence}
        for order in range(args.orders):
            yield place, args.split, {"images": [f"{name}-{order}.png"], **row}


def nlvr2(args: argparse.Namespace, left_out: Counter) -> Rows:
    """NLVR2: one row per entry, with two photographs. All pairs that share a sentence form a group."""
    for place, entry in json_lines(args.annotations):
        with at(place):
            split, images, pair, sentence = parts_of(entry, "split-set-pair-sentence")
            if split.rstrip("12") != args.split.rstrip("12") and split in SPLITS:
                raise ValueError(f"the identifier is of {split}, and --split is {args.split}: give its own")
            name = f"{entry.get('directory', '')}/{split}-{images}-{pair}".lstrip("/")  # only train has subfolders
            row = {"text": take(entry, "sentence"), "label": take(entry, "label", TRUTH)}
            row |= {"images": [f"{name}-img0.png", f"{name}-img1.png"], "group": f"{split}-{images}-{sentence}"}
        yield place, args.split, row


def parts_of(entry: dict, form: str) -> list[str]:
    """The parts of an entry's identifier, e.g. of 1572-0 in the form sentence-position."""
    parts = take(entry, "identifier").split("-")
    if len(parts) != len(form.split("-")) or not all(parts):
        raise ValueError(f"identifier is {entry['identifier']!r}: expected {form}")
    return parts


def snli_ve(args: argparse.Namespace, left_out: Counter) -> Rows:
    """SNLI-VE: one row per hypothesis about a Flickr30k photograph; releases differ in the spelling of its key."""
    for place, entry in json_lines(args.annotations):
        with at(place):
            if take(entry, "gold_label") == "-":
                left_out["rows with the label -, on which annotators did not agree"] += 1
                continue
            image = str(take(entry, "Flikr30kID" if "Flikr30kID" in entry else "Flickr30K_ID", object))
            row = {"image": image if image.endswith(".jpg") else f"{image}.jpg"}
            row |= {"text": take(entry, "sentence2"), "label": take(entry, "gold_label")}
        yield place, args.split, row


def refcoco(args: argparse.Namespace, left_out: Counter) -> Rows:
    """RefCOCO, RefCOCO+, RefCOCOg: one row per sentence, with the box of the instance that the sentence refers to.

    The proposals are the boxes of all annotated instances in the picture.
    """
    pictures, boxes, splits = {}, {}, {split: split for split in ("train", "val", "test", "testA", "testB")}
    for place, entry in entries(args.instances, "images"):
        with at(place):
            size = take(entry, "width", int), take(entry, "height", int)
            once(pictures, take(entry, "id", int), (take(entry, "file_name"), size))
    for place, entry in entries(args.instances, "annotations"):
        with at(place):
            image, instance = take(entry, "image_id", int), take(entry, "id", int)
            if image not in pictures:
                raise ValueError(f"image_id is {image}: expected the id of one of the images")
            once(boxes.setdefault(image, {}), instance, clip(take(entry, "bbox", list), *pictures[image][1]))
    for place, ref in entries(args.refs):
        with at(place):
            split, image, instance = take(ref, "split", splits), take(ref, "image_id", int), take(ref, "ann_id", int)
            if instance not in boxes.get(image, {}):
                raise ValueError(f"no instance {instance} in a picture {image}: expected it in {args.instances}")
            texts = not_blank([take(sentence, "sent") for sentence in take(ref, "sentences", list)], left_out)
        box, proposals = boxes[image][instance], [box for box in boxes[image].values() if box]
        if not box:
            left_out["sentences whose box has no area inside the picture"] += len(texts)
            continue
        for text in texts:
            row = {"image": pictures[image][0], "text": text, "boxes": [box], "proposals": proposals}
            yield place, split, row


def clip(box: list, width: int, height: int) -> list[float] | None:
    """The part of a box [x, y, width, height] that lies inside the picture, or None if there is none.

    Due to rounding, some COCO boxes extend beyond the border. Rounding to hundredths of a pixel, the precision of COCO,
    prevents x + width from exceeding the picture by a floating-point error.
    """
    if len(box) != 4 or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in box):
        raise ValueError(f"bbox is {box}: expected [x, y, width, height]")
    x, y = round(max(0, box[0]), 2), round(max(0, box[1]), 2)
    w, h = round(min(width, box[0] + box[2]) - x, 2), round(min(height, box[1] + box[3]) - y, 2)
    return [x, y, w, h] if w > 0 and h > 0 else None


# ---------------------------------------------------------------------------------------------- any task, as in ALBEF

ALBEF = {  # for each task, the keys of an entry and their types
    "pairs": {"image": str, "caption": object},
    "vqa": {"image": str, "question": str, "answer": object},
    "reasoning": {"images": list, "sentence": str, "label": str},
    "entailment": {"image": str, "sentence": str, "label": str},
    "grounding": {"image": str, "text": str},
}


def albef(args: argparse.Namespace, left_out: Counter) -> Rows:
    """JSON lists in ALBEF's format, for every task: one row per entry.

    If there are ten answers, they are scored as in VQA; otherwise the score of each answer is the share of annotators
    who gave it. Lists for grounding contain no boxes, so they can be used for training but not for evaluation.
    """
    top = args.strip.rstrip("/") + "/"  # match whole folder names only: "coco" does not match coco2/a.jpg
    for place, entry in entries(args.annotations):
        with at(place):
            row = {key: take(entry, key, kind) for key, kind in ALBEF[args.task].items()}
            images = [image.removeprefix(top).lstrip("/") for image in texts_in(pictures_of(row))]
            row |= {"images": images} if "images" in row else {"image": images[0]}
            if "sentence" in row:
                row["text"] = row.pop("sentence")
            if args.task == "pairs":
                row["caption"] = not_blank(texts_in(row["caption"]), left_out)
                if not row["caption"]:
                    continue
            elif args.task == "reasoning":
                row["label"] = take(entry, "label", TRUTH)
            elif args.task == "vqa":
                answers = texts_in(row.pop("answer"))
                counts = Counter(map(normalise, answers))
                shares = {answer: round(count / len(answers), 4) for answer, count in counts.items()}
                row["answers"] = scores(answers) if len(answers) == 10 else shares
        yield place, args.split, row


def texts_in(value: Any) -> list[str]:
    """One text or a list of texts, returned as a list."""
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"found {reprlib.repr(value)}: expected a text or a list of texts")
    return texts


# ------------------------------------------------------------------------------------------ what the converters share

KINDS = {str: "a text", int: "a whole number", list: "a list", object: "a value"}


@contextmanager
def at(place: str) -> Iterator[None]:
    """Prefix the message of a ValueError with the place of the entry that caused it."""
    try:
        yield
    except (ValueError, csv.Error) as fault:
        raise ValueError(f"{place}: {fault}") from fault


def once(found: dict, number: Any, value: Any, what: str = "the id") -> None:
    """Add a value under an id. Raises ValueError if the id is there already."""
    if number in found:
        raise ValueError(f"{what} {number!r} comes twice: expected it once")
    found[number] = value


def take(entry: Any, key: str, kind: type | dict = str) -> Any:
    """The value of a required key of an entry. Strings are stripped of surrounding white space.

    Args:    kind   the type of the value, or a dict from each allowed string to the value to return
    """
    expected = ", ".join(kind) if isinstance(kind, dict) else KINDS[kind]
    if not isinstance(entry, dict):
        raise ValueError(f"found {reprlib.repr(entry)}: expected an object with the key {key!r}")
    if key not in entry:
        raise ValueError(f"found the keys {sorted(map(str, entry))}: expected {key!r}, {expected}")
    value = entry[key].strip() if isinstance(entry[key], str) else entry[key]
    if not (isinstance(value, str) and value in kind if isinstance(kind, dict) else isinstance(value, kind)):
        raise ValueError(f"{key} is {reprlib.repr(value)}: expected {expected}")
    return kind[value] if isinstance(kind, dict) else value


def not_blank(texts: list[str], left_out: Counter) -> list[str]:
    """The texts that are not blank; official files contain a few blank ones."""
    texts = [text.strip() for text in texts]
    left_out["blank texts"] += texts.count("")
    return [text for text in texts if text]


def fill(pattern: str, values: dict[str, Any]) -> str:
    """The name of a picture: a pattern such as {id:012d}.jpg, filled in with values."""
    try:
        fields = re.findall(r"\{[^}]*\}", pattern)
        if any(re.search(r"\d{4}|\{.*\{|[.\[]", field) for field in fields):
            raise ValueError("a width of thousands, or more than a name and a width")
        return pattern.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"--pattern {pattern!r} does not fit ({error}): it knows {', '.join(values)}") from error


def entries(path: Path, key: str = "") -> Iterator[tuple[str, Any]]:
    """(place, entry) for each entry of a list: the document, or the value of a key. A place: "a.json: images[17]".

    Each document is read into memory as a whole; docs/data.md states how much memory the official ones take.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        if path.suffix in (".p", ".pkl", ".pickle"):  # the official pickles are from Python 2, with byte strings
            with open(path, "rb") as file:
                document = PlainUnpickler(file, encoding="utf-8", errors="replace").load()
        else:
            document = json.loads(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # a damaged pickle can raise almost any exception
        fault = str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read ({fault}): is it whole, and unpacked?") from error
    with at(str(path)):
        values = take(document, key, list) if key else take({"the document": document}, "the document", list)
    yield from ((f"{path}: {key}[{number}]", entry) for number, entry in enumerate(values))


class PlainUnpickler(pickle.Unpickler):
    """Unpickles numbers, strings, lists and dicts, and refuses anything that requires importing or calling code."""

    def find_class(self, module: str, name: str):
        raise ValueError(f"it asks to run {module}.{name}, but a pickle of plain lists was expected")


# -------------------------------------------------------------------------------------------------------------- writing


MISSING = "rows whose picture is missing"


def convert(args: argparse.Namespace) -> None:
    """Write the rows of a dataset, and print the number of rows, what was left out, and which other files remain.

    Raises:  ValueError for an entry in another format, a missing picture (unless args.skip_missing), no rows, or an
             existing file (unless args.force)
    """
    schema = "phrases" if args.converter is albef and args.task == "grounding" else args.task  # without boxes
    schema = "questions" if args.converter is vqa_test else schema  # without answers
    # Resolve the path first: after a symbolic link, ".." does not lead where the path suggests.
    root = Path(os.path.relpath(os.path.realpath(args.images), os.path.realpath(args.out))).as_posix()
    written, left_out, pictures, missing = Counter(), Counter(), set(), {}  # missing: a dict, to preserve order
    run = " ".join([args.command, args.task, *([args.split] if "split" in args else [])])
    earlier = listed(args.out)
    there = {name for names in earlier.values() for name in names if (args.out / name).exists()}

    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is not a folder: give one to write to")

    def check_free(name: str) -> None:
        if (args.out / name).exists() and not args.force:
            raise ValueError(f"{args.out / name} exists already: pass --force to replace it, or another --out")

    for name in earlier.get(run, []):
        check_free(name)
    with replacing(args.out, run, args.force) as folder, ExitStack() as opened:
        files = {}
        for place, split, row in tqdm(args.converter(args, left_out), unit=" rows", leave=False, disable=None):
            with at(place):
                check_row(row, schema)
            images = [row["video"]] if "video" in row else pictures_of(row)
            absent = [image for image in images if not os.path.isfile(f"{args.images}/{image}")]
            if absent:
                left_out[MISSING] += 1
                missing |= dict.fromkeys(absent) if len(missing) < 10 else {}
                continue
            pictures.update(images)
            paths = [f"{root}/{image}" for image in images]
            name = f"{args.task}_{'val' if split == 'dev' else split}.jsonl"
            if name not in files:
                check_free(name)
                files[name] = opened.enter_context(open(folder / name, "w", encoding="utf-8", newline="\n"))
            if "video" in row:
                name_of_frames = PurePosixPath("frames", images[0]).with_suffix("")
                frames = frames_of_file(args.images / images[0], args.out / name_of_frames, args.frames)
                row["video"] = [f"{name_of_frames}/{frame}" for frame in frames]
            else:
                row |= {"images": paths} if "images" in row else {"image": paths[0]}
            files[name].write(json.dumps(row) + "\n")
            written[name] += 1
        reasons = [f"left out: {count} {reason}" for reason, count in left_out.items() if count]
        shown = "".join(f"\n  {image}" for image in list(missing)[:10])
        if missing and not args.skip_missing:
            strip = " or --strip" if "strip" in args else ""
            raise ValueError(
                f"{left_out[MISSING]} of {left_out[MISSING] + written.total()} rows show a picture that is not in "
                f"{args.images}: correct --images{strip}, or leave them out with --skip-missing. The first are:{shown}"
            )
        if not written:
            raise ValueError("\n".join(["no row is left to write", *reasons]) + shown)
    for name, count in written.items():
        print(f"{args.out / name}: {count} rows")
    print(f"{len(pictures)} pictures", *reasons, sep="\n")
    if removed := sorted(name for name in there if not (args.out / name).exists()):
        print(f"removed, of the run that this one replaces: {', '.join(removed)}")
    if stays := sorted(path.name for path in args.out.glob(f"{args.task}_*.jsonl") if path.name not in written):
        print(f"not replaced, because another run or you wrote it: {', '.join(stays)}")


# --------------------------------------------------------------------------------------------------------- command line

SPLITS = ("train", "val", "dev", "test", "test1", "test2")
OPTIONS = {
    "--annotations": {"type": Path, "required": True, "help": "annotation file"},
    "--questions": {"type": Path, "required": True, "help": "questions file of the same split"},
    "--refs": {"type": Path, "required": True, "help": 'the pickle, such as "refs(unc).p"; no code in it runs'},
    "--instances": {"type": Path, "required": True, "help": "instances.json from the same release"},
    "--splits": {"type": Path, "help": "folder with Flickr_8k.trainImages.txt, .devImages.txt and .testImages.txt"},
    "--split": {"choices": SPLITS, "default": "train", "help": "split that the file contains (%(default)s)"},
    "--pattern": {"help": "pattern of picture names; cc: {row}, {shard}, {name} (from the url); vqa: {id}, {split}"},
    "--orders": {"type": int, "choices": range(1, 7), "default": 1, "help": "pictures per entry (%(default)s)"},
    "--task": {"choices": tuple(ALBEF), "required": True, "help": "task that the list is for"},
    "--column": {"default": "", "help": 'metadata column that contains the caption ("text" or "caption")'},
    "--val-share": {"type": float, "default": 0.0, "help": "fraction of the pictures held out as val (%(default)s)"},
    "--frames": {"type": int, "default": 16, "help": "number of frames to extract from each video file (%(default)s)"},
    "--strip": {"default": "", "help": "prefix of the paths in the file, to be replaced by --images"},
}
ONE = ("--annotations",)
# command: (converter, task, help, options); for ALBEF's lists, the task is an option
COMMANDS = {
    "folder": (folder, "pairs", "your own pictures and captions", ("--val-share", "--column", "--frames")),
    "coco": (karpathy, "pairs", "COCO captions: Karpathy's dataset_coco.json", ONE),
    "coco-captions": (coco_captions, "pairs", "COCO's own captions_train2017.json", (*ONE, "--split")),
    "flickr30k": (karpathy, "pairs", "Karpathy's dataset_flickr30k.json, or dataset_flickr8k.json", ONE),
    "flickr8k": (
        flickr8k,
        "pairs",
        "captions.txt or Flickr8k.token.txt; Kaggle's results.csv of Flickr30k",
        (*ONE, "--splits"),
    ),
    "msrvtt": (msrvtt, "pairs", "MSR-VTT: train_val_videodatainfo.json or the test file", (*ONE, "--frames")),
    "lsmdc": (lsmdc, "pairs", "LSMDC: LSMDC16_annos_training.csv and other splits", (*ONE, "--split", "--frames")),
    "cc": (conceptual_captions, "pairs", "Conceptual Captions 3M and 12M", (*ONE, "--split", "--pattern")),
    "vqa": (vqa, "vqa", "VQA v2 with its answers", ("--questions", *ONE, "--split", "--pattern")),
    "vqa-test": (vqa_test, "vqa", "VQA v2's test questions, without answers", ("--questions", "--split", "--pattern")),
    "nlvr": (nlvr, "reasoning", "Cornell NLVR", (*ONE, "--split", "--orders")),
    "nlvr2": (nlvr2, "reasoning", "NLVR2", (*ONE, "--split")),
    "snli-ve": (snli_ve, "entailment", "SNLI-VE", (*ONE, "--split")),
    "refcoco": (refcoco, "grounding", "RefCOCO, RefCOCO+, RefCOCOg", ("--refs", "--instances")),
    "albef": (albef, "", "JSON lists in the format of ALBEF", (*ONE, "--task", "--split", "--strip")),
}


def main(arguments: list[str] | None = None) -> None:
    """Command-line entry point: check the paths, then convert."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="data set")
    for name, (converter, task, text, options) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(converter=converter, **({"task": task} if task else {}))
        for option in options:
            command.add_argument(option, **OPTIONS[option])
        command.add_argument("--images", type=Path, required=True, help="folder with the pictures or videos")
        command.add_argument("--out", type=Path, required=True, help="output folder")
        skip = {"action": "store_true", "default": name == "cc"}  # many URLs of cc are dead
        command.add_argument("--skip-missing", **skip, help="skip rows whose picture is missing")
        command.add_argument("--force", action="store_true", help="overwrite existing files")
    args = parser.parse_args(arguments)
    if getattr(args, "frames", 1) < 1:
        raise ValueError(f"--frames is {args.frames}: give 1 or more")
    if not args.images.is_dir():
        raise ValueError(f"--images {args.images} is not a folder: give the one that holds the pictures")
    convert(args)


if __name__ == "__main__":
    runtime.guarded(main)
