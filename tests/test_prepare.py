"""Official annotation files become rows that data.py reads back exactly; each mistake is named with its place."""

import argparse
import csv
import io
import itertools
import json
import pickle
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers import environment
from PIL import Image

import data
from data import count_frames, files_of, load_frames
from reading.rows import is_box
from tools import prepare

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------------------------------------- helpers


def picture(folder: Path, *names: str, size: tuple[int, int] = (40, 30)) -> None:
    """Tiny pictures of the given names below a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "red").save(folder / name, format="PNG")


def write(path: Path, content, lines: bool = False) -> Path:
    """A text as it stands, a JSON document, or JSON lines."""
    if not isinstance(content, str):
        content = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content)
    path.write_text(content, encoding="utf-8", newline="\n")
    return path


def run(tmp: Path, *arguments) -> Path:
    """tools/prepare.py with pictures in tmp/pictures and output in tmp/out -> that folder."""
    (tmp / "pictures").mkdir(exist_ok=True)
    prepare.main([*map(str, arguments), "--images", str(tmp / "pictures"), "--out", str(tmp / "out")])
    return tmp / "out"


def refused(tmp: Path, *arguments) -> str:
    """The sentence with which tools/prepare.py ends, which must leave nothing behind."""
    before = sorted((tmp / "out").glob("*")) + sorted((tmp / "out").glob(".*"))
    with pytest.raises(ValueError) as fault:
        run(tmp, *arguments)
    assert sorted((tmp / "out").glob("*")) + sorted((tmp / "out").glob(".*")) == before
    return str(fault.value)


def rows(path: Path, task: str) -> list[dict]:
    """What data.py reads, with the pictures named as they lie in tmp/pictures."""
    read = data.read_rows([path], task, check="full")
    for row in read:
        names = [Path(image).resolve() for image in data.pictures_of(row)]
        names = [name.relative_to((path.parent.parent / "pictures").resolve()).as_posix() for name in names]
        row.update({"images": names} if "images" in row else {"image": names[0]})
    return read


def karpathy(name: str, split: str, *captions: str, **more) -> dict:
    """An entry of a Karpathy file, with the keys that the official ones have."""
    sentences = [
        {"tokens": text.split(), "raw": text, "imgid": 0, "sentid": number} for number, text in enumerate(captions)
    ]
    return {"sentids": [0], "imgid": 0, "sentences": sentences, "split": split, "filename": name, **more}


def question(number: int, image: int = 9, text: str = "What color is it?") -> dict:
    return {"image_id": image, "question": text, "question_id": number}


def annotation(number: int, answers: list[str], image: int = 9, **more) -> dict:
    """An entry of a file of VQA answers in the official form."""
    answers = [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(answers, 1)]
    about = {"question_type": "what color is the", "multiple_choice_answer": "red", "answer_type": "other"}
    return about | {"answers": answers, "image_id": image, "question_id": number} | more


def vqa_files(tmp: Path, questions: list, annotations: list) -> list:
    """Both official files of VQA -> the arguments that name them."""
    about = {"info": {"year": 2017}, "license": {"name": "CC"}, "data_subtype": "train2014"}
    asked = {**about, "task_type": "Open-Ended", "data_type": "mscoco", "questions": questions}
    answered = {**about, "annotations": annotations, "data_type": "mscoco"}
    asked, answered = write(tmp / "questions.json", asked), write(tmp / "answers.json", answered)
    return ["vqa", "--questions", asked, "--annotations", answered]


VQA_PICTURE = "COCO_train2014_000000000009.jpg"
NLVR = {
    "sentence": "There is a tower with four blocks.",
    "label": "true",
    "identifier": "3125-1",
    "directory": "2",
    "evals": {"r1": "true", "r4": "false"},
    "structured_rep": [[{"y_loc": 80, "type": "square", "color": "Yellow", "x_loc": 40, "size": 20}], [], []],
}
NLVR2 = {
    "validation": {"77": "True"},
    "sentence": "All the bottles are from the same brand.",
    "left_url": "https://example.org/a.jpg",
    "writer": "103",
    "label": "True",
    "right_url": "https://example.org/b.jpg",
    "synset": "beer bottle",
    "query": "some beer bottles2",
    "identifier": "train-189-0-1",
    "directory": 37,
}
SNLI = {
    "Flickr30K_ID": "3416050480",
    "annotator_labels": ["neutral"],
    "captionID": "3416050480.jpg#4",
    "gold_label": "neutral",
    "pairID": "3416050480.jpg#4r1n",
    "sentence1": "A person on a horse.",
    "sentence2": "A person trains his horse.",
}
INSTANCES = {
    "info": {"year": 2014},
    "images": [
        {"license": 1, "file_name": "COCO_train2014_000000000007.jpg", "height": 30, "width": 40, "id": 7},
        {"license": 1, "file_name": "COCO_train2014_000000000008.jpg", "height": 30, "width": 40, "id": 8},
    ],
    "annotations": [
        {"id": 71, "image_id": 7, "bbox": [1.5, 2.25, 10, 20.13], "category_id": 1, "iscrowd": 0},
        {"id": 72, "image_id": 7, "bbox": [30.11, 20.07, 9.9, 9.99], "category_id": 2, "iscrowd": 0},
        {"id": 81, "image_id": 8, "bbox": [-0.02, 0, 40.05, 30.01], "category_id": 1, "iscrowd": 0},
        {"id": 82, "image_id": 8, "bbox": [5, 5, 0, 3], "category_id": 1, "iscrowd": 0},
    ],
    "categories": [{"id": 1, "name": "person"}],
}
REF = {
    "sent_ids": [0, 1],
    "file_name": "COCO_train2014_000000000007_71.jpg",
    "ann_id": 71,
    "ref_id": 0,
    "image_id": 7,
    "split": "train",
    "category_id": 1,
    "sentences": [
        {"tokens": ["left", "man"], "raw": "Left man!", "sent_id": 0, "sent": "left man"},
        {"tokens": ["man"], "raw": "man", "sent_id": 1, "sent": "man"},
    ],
}


def ref_files(tmp: Path, refs, protocol: int = 2, instances=INSTANCES) -> list:
    """The pickle and the instances of RefCOCO -> the arguments that name them."""
    pickled = refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=protocol)
    (tmp / "refs(unc).p").write_bytes(pickled)
    return ["refcoco", "--refs", tmp / "refs(unc).p", "--instances", write(tmp / "instances.json", instances)]


# -------------------------------------------------------------------------------------------------- each official form


def test_coco_has_a_row_a_picture_and_restval_joins_train(tmp_path, capsys):
    picture(tmp_path / "pictures", "val2014/a.jpg", "train2014/b.jpg", "val2014/c.jpg", "val2014/d.jpg")
    images = [
        karpathy("a.jpg", "restval", "A man.", ' A dog,  ["no"] {é} \\ .\n', "", filepath="val2014", cocoid=1),
        karpathy("b.jpg", "train", "One.", filepath="train2014", cocoid=2),
        karpathy("c.jpg", "val", "Two.", filepath="val2014", cocoid=3),
        karpathy("d.jpg", "test", "Three.", filepath="val2014", cocoid=4),
    ]
    out = run(tmp_path, "coco", "--annotations", write(tmp_path / "a.json", {"images": images, "dataset": "coco"}))
    assert rows(out / "pairs_train.jsonl", "pairs") == [
        {"image": "val2014/a.jpg", "caption": ["A man.", 'A dog,  ["no"] {é} \\ .']},
        {"image": "train2014/b.jpg", "caption": ["One."]},
    ]
    assert rows(out / "pairs_val.jsonl", "pairs") == [{"image": "val2014/c.jpg", "caption": ["Two."]}]
    assert rows(out / "pairs_test.jsonl", "pairs") == [{"image": "val2014/d.jpg", "caption": ["Three."]}]
    said = capsys.readouterr().out
    assert "pairs_train.jsonl: 2 rows" in said and "4 pictures" in said and "left out: 1 blank texts" in said
    assert b"\r" not in (out / "pairs_train.jsonl").read_bytes()


def test_captions_in_cocos_own_form(tmp_path, capsys):
    picture(tmp_path / "pictures", "1.jpg", "2.jpg", "3.jpg")
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in (3, 1, 2)]
    said = [(1, "A dog."), (3, "A hen. "), (1, "A pet."), (2, " ")]
    document = {"info": {}, "images": images, "annotations": [{"image_id": n, "caption": text} for n, text in said]}
    write(tmp_path / "a.json", json.dumps(document))
    out = run(tmp_path, "coco-captions", "--annotations", tmp_path / "a.json", "--split", "val")
    expected = [{"image": "3.jpg", "caption": ["A hen."]}, {"image": "1.jpg", "caption": ["A dog.", "A pet."]}]
    assert rows(out / "pairs_val.jsonl", "pairs") == expected
    assert "left out: 1 blank texts\nleft out: 1 pictures without a caption" in capsys.readouterr().out
    document["annotations"].append({"image_id": 9, "caption": "A cow."})
    write(tmp_path / "a.json", json.dumps(document))
    wanted = "a.json: annotations[4]: image_id is 9: expected the id of one of the images"
    assert wanted in refused(tmp_path, "coco-captions", "--annotations", tmp_path / "a.json")


def test_flickr30k_names_pictures_without_a_folder(tmp_path):
    picture(tmp_path / "pictures", "1.jpg", "2.jpg")
    images = [karpathy("1.jpg", "train", "A.", "B."), karpathy("2.jpg", "test", "C."), karpathy("3.jpg", "val", " ")]
    content = "\ufeff" + json.dumps({"dataset": "flickr30k", "images": images}, indent=1)
    out = run(tmp_path, "flickr30k", "--annotations", write(tmp_path / "a.json", content))
    assert rows(out / "pairs_train.jsonl", "pairs") == [{"image": "1.jpg", "caption": ["A.", "B."]}]
    assert rows(out / "pairs_test.jsonl", "pairs") == [{"image": "2.jpg", "caption": ["C."]}]
    assert not (out / "pairs_val.jsonl").exists()


CSV = """image,caption
1.jpg,"A man , smiling , says ""hi"" ."
1.jpg,Two dogs, one ball .
2.jpg,A red car .
3.jpg,A tree .
"""
TOKENS = """1.jpg#0\tA man , smiling , says "hi" .
1.jpg#1\tTwo dogs, one ball .
2.jpg#0\tA red car .
3.jpg#0\tA tree .
"""


@pytest.mark.parametrize("content", [CSV, TOKENS, CSV.replace("\n", "\r\n")])
def test_flickr8k_by_the_official_lists(tmp_path, capsys, content):
    picture(tmp_path / "pictures", "1.jpg", "2.jpg", "3.jpg")
    for name, listed in (("train", "1.jpg\n"), ("dev", "2.jpg\n"), ("test", "9.jpg\n")):
        write(tmp_path / f"Flickr_8k.{name}Images.txt", listed)
    out = run(tmp_path, "flickr8k", "--annotations", write(tmp_path / "a.txt", content), "--splits", tmp_path)
    captions = ['A man , smiling , says "hi" .', "Two dogs, one ball ."]
    assert rows(out / "pairs_train.jsonl", "pairs") == [{"image": "1.jpg", "caption": captions}]
    assert rows(out / "pairs_val.jsonl", "pairs") == [{"image": "2.jpg", "caption": ["A red car ."]}]
    assert "left out: 1 pictures that no list of --splits names" in capsys.readouterr().out


def test_kaggles_list_of_flickr30k_is_read(tmp_path):
    """Its columns are divided by |, and in one line of the published file the second | is missing."""
    picture(tmp_path / "pictures", "1.jpg", "2.jpg")
    text = (
        "image_name| comment_number| comment\n1.jpg| 0| Two men | outside .\n1.jpg| 1| a 2nd one\n2.jpg| 4   A dog .\n"
    )
    assert prepare.read_captions(write(tmp_path / "results.csv", text)) == {
        "1.jpg": ["Two men outside .", "a 2nd one"],
        "2.jpg": ["A dog ."],
    }
    with pytest.raises(ValueError, match="expected the header"):
        prepare.read_captions(write(tmp_path / "bad.csv", "image_name| comment_number| comment\n1.jpg\n"))


def test_a_pattern_does_not_write_thousands_of_blanks():
    """Its own digits may be many."""
    assert prepare.fill("2014000/{id:012d}.jpg", {"id": 7}) == "2014000/000000000007.jpg"
    for pattern in ("{id:999999999}", "a{id:>4000}", "{id:.99999f}"):
        with pytest.raises(ValueError, match="does not fit"):
            prepare.fill(pattern, {"id": 7})


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        (["red"], {"red": 1.0}),
        (["red", "red", "blue"], {"red": 1.0, "blue": 1.0}),
        (["red"] * 19 + ["blue"], {"red": 1.0, "blue": 0.1667}),
        (["b", "c", "d", "e", "f"], dict.fromkeys("bcdef", 0.6667)),
    ],
)
def test_answers_of_more_or_fewer_than_ten_annotators(answers, wanted):
    """Their shares count as if ten had answered."""
    assert {name: score for name, score in prepare.scores(answers).items() if name} == wanted


def test_flickr8k_without_lists_splits_six_to_one_to_one_by_name(tmp_path):
    names = [f"{number}.jpg" for number in range(400)]
    picture(tmp_path / "pictures", *names, size=(2, 2))
    write(tmp_path / "a.txt", "".join(f"{name}#0\tA dog .\n" for name in names))
    out = run(tmp_path, "flickr8k", "--annotations", tmp_path / "a.txt")
    split = {
        name: {row["image"] for row in rows(out / f"pairs_{name}.jsonl", "pairs")} for name in ("train", "val", "test")
    }
    assert sorted(itertools.chain(*split.values())) == sorted(names)
    assert 270 < len(split["train"]) < 330 and 30 < len(split["val"]) < 75
    write(tmp_path / "a.txt", "image,caption\n" + "".join(f"{name},A dog .\n" for name in reversed(names)))
    out = run(tmp_path, "flickr8k", "--annotations", tmp_path / "a.txt", "--force")
    assert {row["image"] for row in rows(out / "pairs_val.jsonl", "pairs")} == split["val"], "the order decides"


# ---------------------------------------------------------------------------------------------- a folder of one's own


def test_captions_of_a_folder_come_from_the_list_in_it(tmp_path, capsys):
    """In both forms, with several captions of a picture that do not stand together, and pictures in sub-folders."""
    names = ("1.jpg", "2.JPG", "more/3.png")
    picture(tmp_path / "pictures", *names, "4.jpg", "notes.pdf")
    for name, content in {
        "captions.txt": "1.jpg#0\tA dog\n2.JPG#0\tA cat, or two\n1.jpg#1\tA pet\nmore/3.png#0\tA hen\n",
        "captions.csv": '\ufeff"Image", Caption\n1.jpg,A dog\n2.JPG,"A cat, or two"\n1.jpg,A pet\nmore/3.png,A hen\n',
    }.items():
        write(tmp_path / "pictures" / name, content)
        out = run(tmp_path, "folder", "--force")
        (tmp_path / "pictures" / name).unlink()
        captions = (["A dog", "A pet"], ["A cat, or two"], ["A hen"])
        expected = [{"image": name, "caption": text} for name, text in zip(names, captions, strict=True)]
        assert rows(out / "pairs_train.jsonl", "pairs") == expected
        assert "left out: 1 pictures without a caption, 4.jpg first" in capsys.readouterr().out


def test_a_list_may_spell_the_name_of_a_picture_in_another_way(tmp_path, capsys):
    """macOS writes é as a letter and an accent; a list made elsewhere as one letter. Both captions are kept."""
    two, one = unicodedata.normalize("NFD", "caf\u00e9.png"), unicodedata.normalize("NFC", "caf\u00e9.png")
    picture(tmp_path / "pictures", two, "dog.png")
    write(tmp_path / "pictures/captions.txt", f"image,caption\n{one},A bar\n./{two},A house\n./dog.png,A dog\n")
    found = rows(run(tmp_path, "folder") / "pairs_train.jsonl", "pairs")
    assert found == [{"image": two, "caption": ["A bar", "A house"]}, {"image": "dog.png", "caption": ["A dog"]}]
    assert "without a caption" not in capsys.readouterr().out


def test_captions_of_a_folder_come_from_texts_beside_the_pictures_or_from_their_names(tmp_path, capsys):
    picture(tmp_path / "pictures", "a_red-circle_03.png", "IMG_2034.jpg", "two  dogs (1).webp", "DSC-7.png", "b.gif")
    write(tmp_path / "pictures" / "b.txt", "Something else\n\n  Another caption \n")
    out = run(tmp_path, "folder")
    assert rows(out / "pairs_train.jsonl", "pairs") == [
        {"image": "a_red-circle_03.png", "caption": ["a red circle"]},
        {"image": "b.gif", "caption": ["Something else", "Another caption"]},
        {"image": "two  dogs (1).webp", "caption": ["two dogs"]},
    ]
    assert "left out: 2 pictures without a caption, DSC-7.png first" in capsys.readouterr().out


def test_a_folder_is_not_guessed_in_silence(tmp_path, capsys):
    """What a system leaves is no picture, a list under another name is not passed over, and the source is said."""
    pictures = tmp_path / "pictures"
    picture(pictures, "red_dog.png", "._red_dog.png", "__MACOSX/a.png", ".ipynb_checkpoints/b.png")
    out = run(tmp_path, "folder")
    rows = data.read_rows([out / "pairs_train.jsonl"], "pairs")
    assert [Path(row["image"]).name for row in rows] == ["red_dog.png"]
    assert "captions are read from the names of the pictures" in capsys.readouterr().out
    for name in ("caption.txt", "Captions.txt", "captions.tsv"):
        write(pictures / name, "image,caption\nred_dog.png,a dog\n")
        with pytest.raises(ValueError, match=f"{name} is not read: call it captions"):
            run(tmp_path, "folder", "--force")
        (pictures / name).unlink()
    write(pictures / "red_dog.txt", "a dog")
    run(tmp_path, "folder", "--force")
    assert "captions are read from the .txt beside each picture" in capsys.readouterr().out


def test_captions_of_a_folder_come_from_metadata_and_the_folders_of_splits(tmp_path, capsys):
    """Hugging Face's image folders: one file for all or one in each, JSONL or CSV, any column for the caption."""
    names = ("train/a/1.jpg", "train/b.jpg", "validation/3.jpg", "test/4.jpg")
    pictures = tmp_path / "pictures"
    picture(pictures, *names, "train/5.jpg")

    def written(*arguments):
        out = run(tmp_path, "folder", "--force", *arguments)
        for path in pictures.rglob("metadata.*"):
            path.unlink()
        return {split: rows(out / f"pairs_{split}.jsonl", "pairs") for split in ("train", "val", "test")}

    texts = ("A dog", 'Cats, "two"\nof them', "A hen", "A cow")
    expected = [{"image": name, "caption": [text]} for name, text in zip(names, texts, strict=True)]
    expected = {"train": expected[:2], "val": expected[2:3], "test": expected[3:]}
    entries = [{"file_name": name, "text": text} for name, text in zip(names, texts, strict=True)]
    write(pictures / "metadata.jsonl", "\n".join(map(json.dumps, entries)))
    assert written() == expected
    assert "left out: 1 pictures without a caption, train/5.jpg first" in capsys.readouterr().out
    for folder in ("train", "validation", "test"):
        lines = [(entry["file_name"], entry["text"]) for entry in entries if entry["file_name"].startswith(folder)]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("file_name", "width", "said")] + [(n[len(folder) + 1 :], 4, t) for n, t in lines])
        write(pictures / folder / "metadata.csv", text.getvalue())
    assert written("--column", "said") == expected


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("metadata.jsonl", '{"file_name": "1.jpg", "said": "A dog"}', "found the columns file_name, said: expected"),
        ("metadata.jsonl", '{"text": "A dog"}', "jsonl:1: found the keys ['text']: expected 'file_name', a text"),
        ("metadata.csv", "file_name,text,caption\n1.jpg,a,b\n", "csv:2: found the columns file_name, text, caption"),
        ("metadata.csv", "file_name,text\n9.jpg,A dog\n", "1 of 1 rows show a picture that is not in"),
        ("metadata.parquet", "PAR1", "metadata.parquet is a Parquet file, which is not read here: save it as"),
    ],
)  # fmt: skip
def test_metadata_that_do_not_fit_are_refused(tmp_path, name, content, wanted):
    picture(tmp_path / "pictures", "1.jpg")
    write(tmp_path / "pictures" / name, content)
    assert wanted in refused(tmp_path, "folder")


def test_a_picture_of_a_folder_keeps_its_split_whatever_lies_beside_it(tmp_path):
    names = [f"dog number {'i' * number} x.png" for number in range(60)]
    picture(tmp_path / "pictures", *names, size=(2, 2))
    out = run(tmp_path, "folder", "--val-share", 0.3)
    kept = {row["image"] for row in rows(out / "pairs_val.jsonl", "pairs")}
    assert 8 < len(kept) < 30 and kept.isdisjoint(row["image"] for row in rows(out / "pairs_train.jsonl", "pairs"))
    for name in names[::2]:
        (tmp_path / "pictures" / name).unlink()
    out = run(tmp_path, "folder", "--val-share", 0.3, "--force")
    assert {row["image"] for row in rows(out / "pairs_val.jsonl", "pairs")} == kept & set(names[1::2])


@pytest.mark.parametrize(
    ("listed", "arguments", "wanted"),
    [
        ("1.jpg#0\tA dog\n9.jpg#0\tA cat\n", (), "1 of 2 rows show a picture that is not in"),
        ("1.jpg\tA dog\n", (), "captions.txt:1: found '1.jpg\\tA dog\\n': expected the header image,caption"),
        ("1.jpg#0\tA dog\n", ("--val-share", 1.0), "--val-share is 1.0: give a share from 0 to below 1"),
        (
            "2.jpg#0\t \n",
            (),
            "no row is left to write\nleft out: 1 blank texts\nleft out: 2 pictures without a caption, 1.jpg",
        ),
        ("image,caption\n", (), "captions.txt holds no captions: write a line for each"),
    ],
)
def test_a_folder_whose_list_does_not_fit_is_refused(tmp_path, listed, arguments, wanted):
    picture(tmp_path / "pictures", "1.jpg", "2.jpg")
    write(tmp_path / "pictures" / "captions.txt", listed)
    write(tmp_path / "pictures" / "captions.csv", "image,caption\n1.jpg,Not read: captions.txt comes first\n")
    assert wanted in refused(tmp_path, "folder", *arguments)


def test_a_folder_without_pictures_that_can_be_read_says_so(tmp_path, capsys):
    """Those in the format of a phone are counted, not passed over in silence."""
    (tmp_path / "pictures").mkdir()
    write(tmp_path / "pictures" / "a dog.HEIC", "no picture")
    assert "no picture lies in" in refused(tmp_path, "folder")
    picture(tmp_path / "pictures", "a cat.png")
    run(tmp_path, "folder")
    assert "left out: 1 pictures in the format of a phone, .heic: save them as .jpg" in capsys.readouterr().out


@pytest.mark.parametrize("header", ["", "caption\turl\n"])
def test_conceptual_captions_by_the_number_of_the_row(tmp_path, capsys, header):
    names = [f"{number // 10_000:05d}/{number:09d}.jpg" for number in (0, 1, 2, 10_000)]
    picture(tmp_path / "pictures", *names)
    lines = [f'caption {number} , "quoted"\thttp://example.org/{number}.jpg?x=1\n' for number in range(10_001)]
    lines[1] = "https://example.org/1.png\tcc12m turns them around\n"
    out = run(tmp_path, "cc", "--annotations", write(tmp_path / "a.tsv", header + "".join(lines)))
    captions = ['caption 0 , "quoted"', "cc12m turns them around", 'caption 2 , "quoted"', 'caption 10000 , "quoted"']
    expected = [{"image": name, "caption": caption} for name, caption in zip(names, captions, strict=True)]
    assert rows(out / "pairs_train.jsonl", "pairs") == expected
    assert "left out: 9997 rows whose picture is missing" in capsys.readouterr().out


def test_conceptual_captions_by_a_pattern(tmp_path):
    picture(tmp_path / "pictures", "b.png")
    content = "a b\thttp://example.org/x/a.jpg\n \thttp://example.org/x/b.png\nc d\thttp://example.org/x/b.png\n"
    arguments = ["cc", "--annotations", write(tmp_path / "a.tsv", content), "--split", "dev"]
    out = run(tmp_path, *arguments, "--pattern", "{name}")
    assert rows(out / "pairs_val.jsonl", "pairs") == [{"image": "b.png", "caption": "c d"}]
    said = refused(tmp_path, *arguments, "--pattern", "{nam}", "--force")
    assert f"{tmp_path / 'a.tsv'}:1: --pattern '{{nam}}'" in said and "row, shard, name" in said


def test_vqa_rows_meet_their_answers_in_any_order(tmp_path, capsys):
    picture(tmp_path / "pictures", VQA_PICTURE, "COCO_train2014_000000000011.jpg")
    questions = [question(1), question(2, 11, "How many?"), question(3)]
    answers = [
        annotation(3, ["a"] * 6 + ["the letter a"] * 4),
        annotation(2, ["2"] * 7 + ["two", "three", ""], 11, answer_type="number"),
        annotation(1, ["Red"] * 9 + ["a red."]),
    ]
    out = run(tmp_path, *vqa_files(tmp_path, questions, answers))
    found = sorted(rows(out / "vqa_train.jsonl", "vqa"), key=lambda row: row["question_id"])
    base = {"image": VQA_PICTURE, "question": "What color is it?", "type": "other"}
    assert found == [
        base | {"answers": {"red": 1.0}, "question_id": 1},
        {
            "image": "COCO_train2014_000000000011.jpg",
            "question": "How many?",
            "answers": {"2": 1.0, "3": 0.3},
            "question_id": 2,
            "type": "number",
        },
        base | {"answers": {"a": 1.0, "letter": 1.0}, "question_id": 3},
    ]
    said = capsys.readouterr().out
    assert "vqa_train.jsonl: 3 rows" in said and "\n2 pictures" in said


def test_vqa_by_the_names_of_coco_2017(tmp_path):
    picture(tmp_path / "pictures", "000000000009.jpg")
    arguments = vqa_files(tmp_path, [question(1)], [annotation(1, ["red"] * 10)])
    out = run(tmp_path, *arguments, "--split", "val", "--pattern", "{id:012d}.jpg")
    assert rows(out / "vqa_val.jsonl", "vqa")[0]["image"] == "000000000009.jpg"


def test_nlvr_first_order_or_all_six_and_nothing_of_what_was_drawn(tmp_path):
    picture(tmp_path / "pictures", *(f"2/train-3125-1-{order}.png" for order in range(6)), "train-72-0-0.png")
    other = {key: value for key, value in NLVR.items() if key != "directory"} | {"identifier": "72-0", "label": "false"}
    path = write(tmp_path / "train.json", [NLVR, other], lines=True)
    expected = [
        {"images": ["2/train-3125-1-0.png"], "text": NLVR["sentence"], "label": True, "group": "3125"},
        {"images": ["train-72-0-0.png"], "text": NLVR["sentence"], "label": False, "group": "72"},
    ]
    out = run(tmp_path, "nlvr", "--annotations", path)
    assert rows(out / "reasoning_train.jsonl", "reasoning") == expected
    run(tmp_path, "nlvr", "--annotations", path, "--orders", "6", "--force", "--skip-missing")
    found = rows(out / "reasoning_train.jsonl", "reasoning")
    assert found == [
        *(expected[0] | {"images": [f"2/train-3125-1-{order}.png"]} for order in range(6)),
        expected[1],
    ]


def test_nlvr2_groups_the_pairs_of_a_sentence(tmp_path):
    names = [f"37/train-189-{pair}-img{side}.png" for pair in (0, 2) for side in (0, 1)]
    picture(tmp_path / "pictures", *names, "dev-5-0-img0.png", "dev-5-0-img1.png")
    examples = [
        NLVR2,
        NLVR2 | {"identifier": "train-189-2-1", "label": "False"},
        NLVR2 | {"identifier": "train-189-2-0"},
    ]
    out = run(tmp_path, "nlvr2", "--annotations", write(tmp_path / "train.json", examples, lines=True))
    found = rows(out / "reasoning_train.jsonl", "reasoning")
    assert [row["images"] for row in found] == [names[:2], names[2:], names[2:]]
    assert [row["group"] for row in found] == ["train-189-1", "train-189-1", "train-189-0"]
    assert [row["label"] for row in found] == [True, False, True]
    assert set(found[0]) == {"images", "text", "label", "group"}
    plain = {key: value for key, value in NLVR2.items() if key != "directory"} | {"identifier": "dev-5-0-0"}
    run(tmp_path, "nlvr2", "--annotations", write(tmp_path / "dev.json", [plain], lines=True), "--split", "dev")
    assert rows(out / "reasoning_val.jsonl", "reasoning")[0]["images"] == ["dev-5-0-img0.png", "dev-5-0-img1.png"]


def test_snli_ve_both_keys_and_undecided_labels(tmp_path, capsys):
    picture(tmp_path / "pictures", "3416050480.jpg", "12.jpg")
    old = {key: value for key, value in SNLI.items() if key != "Flickr30K_ID"} | {"Flikr30kID": "12.jpg"}
    examples = [SNLI, old | {"gold_label": "entailment"}, SNLI | {"gold_label": "-"}, SNLI | {"Flickr30K_ID": 12}]
    path = write(tmp_path / "a.jsonl", examples, lines=True)
    out = run(tmp_path, "snli-ve", "--annotations", path, "--split", "test")
    text = SNLI["sentence2"]
    assert rows(out / "entailment_test.jsonl", "entailment") == [
        {"image": "3416050480.jpg", "text": text, "label": "neutral"},
        {"image": "12.jpg", "text": text, "label": "entailment"},
        {"image": "12.jpg", "text": text, "label": "neutral"},
    ]
    assert "left out: 1 rows with the label -" in capsys.readouterr().out


def python_2(protocol: int) -> bytes:
    """REF as Python 2 pickled it: texts are byte strings (opcodes S or U), among them one that is not ASCII."""

    class Bytes(pickle._Pickler):
        dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

        def save_str(self, text):
            raw = text.encode()
            self.write(b"S" + repr(raw)[1:].encode() + b"\n" if protocol == 0 else b"U" + bytes([len(raw)]) + raw)

        dispatch[str] = save_str

    file = io.BytesIO()
    Bytes(file, protocol=protocol).dump([REF | {"sentences": [{"sent": "café", "raw": "x"}]}])
    return file.getvalue()


def test_refcoco_boxes_proposals_and_clipping(tmp_path, capsys):
    picture(tmp_path / "pictures", "COCO_train2014_000000000007.jpg", "COCO_train2014_000000000008.jpg")
    refs = [
        REF,
        REF | {"ann_id": 72, "split": "val", "sentences": [{"sent": "corner"}, {"sent": " "}]},
        REF | {"image_id": 8, "ann_id": 81, "split": "testA", "sentences": [{"sent": "all"}]},
        REF | {"image_id": 8, "ann_id": 82, "split": "testB", "sentences": [{"sent": "nothing"}]},
        REF | {"image_id": 8, "ann_id": 81, "split": "testB", "sentences": [{"sent": "again"}]},
    ]
    out = run(tmp_path, *ref_files(tmp_path, refs))
    first, corner = [1.5, 2.25, 10, 20.13], [30.11, 20.07, 9.89, 9.93]
    seven = {"image": "COCO_train2014_000000000007.jpg", "proposals": [first, corner]}
    eight = {"image": "COCO_train2014_000000000008.jpg", "boxes": [[0, 0, 40, 30]], "proposals": [[0, 0, 40, 30]]}
    expected = {
        "train": [seven | {"text": "left man", "boxes": [first]}, seven | {"text": "man", "boxes": [first]}],
        "val": [seven | {"text": "corner", "boxes": [corner]}],
        "testA": [eight | {"text": "all"}],
        "testB": [eight | {"text": "again"}],
    }
    assert {split: rows(out / f"grounding_{split}.jsonl", "grounding") for split in expected} == expected
    said = capsys.readouterr().out
    assert "1 blank texts" in said and "1 sentences whose box has no area" in said


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_refcoco_reads_pickles_of_python_2(tmp_path, protocol):
    picture(tmp_path / "pictures", "COCO_train2014_000000000007.jpg")
    out = run(tmp_path, *ref_files(tmp_path, python_2(protocol)))
    (row,) = rows(out / "grounding_train.jsonl", "grounding")
    assert row["text"] == "café" or protocol == 0


def test_clipped_boxes_never_exceed_the_picture():
    draw = random.Random(0)
    for _ in range(20_000):
        width, height = draw.randint(20, 700), draw.randint(20, 700)
        x, y = round(draw.uniform(-2, width - 1), draw.choice((2, 9))), round(draw.uniform(-2, height - 1), 2)
        box = prepare.clip((x, y, draw.uniform(1, 800), draw.uniform(1, 800)), width, height)
        assert box is None or (is_box(box) and box[0] + box[2] <= width and box[1] + box[3] <= height)


def test_albef_lists_of_every_task(tmp_path):
    picture(tmp_path / "pictures", "a.jpg", "b.jpg")
    top = "/export/share/coco/"
    vqa = {"question_id": 1, "question": "what?", "image": "a.jpg", "dataset": "vqa"}
    tasks = {
        "pairs": (
            [{"image": f"{top}a.jpg", "caption": "one"}, {"image": f"{top}b.jpg", "caption": ["two", "three "]}],
            [{"image": "a.jpg", "caption": ["one"]}, {"image": "b.jpg", "caption": ["two", "three"]}],
        ),
        "vqa": (
            [
                vqa | {"answer": ["red"] * 8 + ["blue"] * 2},
                vqa | {"answer": "Red.", "dataset": "vg"},
                vqa | {"answer": ["red", "red", "red", "blue"]},
            ],
            [
                {"image": "a.jpg", "question": "what?", "answers": {"red": 1.0, "blue": 0.6}},
                {"image": "a.jpg", "question": "what?", "answers": {"red": 1.0}},
                {"image": "a.jpg", "question": "what?", "answers": {"red": 0.75, "blue": 0.25}},
            ],
        ),
        "reasoning": (
            [{"images": ["a.jpg", "b.jpg"], "sentence": "so", "label": "False"}],
            [{"images": ["a.jpg", "b.jpg"], "text": "so", "label": False}],
        ),
        "entailment": (
            [{"image": "a.jpg", "sentence": "so", "label": "contradiction"}],
            [{"image": "a.jpg", "text": "so", "label": "contradiction"}],
        ),
        "grounding": ([{"image": "a.jpg", "text": "it", "ref_id": 3}], [{"image": "a.jpg", "text": "it"}]),
    }
    for task, (content, expected) in tasks.items():
        arguments = ["--annotations", write(tmp_path / "a.json", content), "--task", task, "--strip", top]
        out = run(tmp_path, "albef", *arguments)
        schema = "phrases" if task == "grounding" else task
        assert rows(out / f"{task}_train.jsonl", schema) == expected


def test_a_picture_that_lies_in_a_folder_twice_is_in_one_split(tmp_path):
    """By a link: none of val is trained on."""
    names = [f"a shape {chr(97 + i)}.png" for i in range(20)]
    picture(tmp_path / "pictures", *names)
    for i, name in enumerate(names):
        (tmp_path / "pictures" / f"the same {chr(97 + i)}.png").symlink_to(name)
    out = run(tmp_path, "folder", "--val-share", 0.5)
    splits = [{row["image"] for row in rows(out / f"pairs_{split}.jsonl", "pairs")} for split in ("train", "val")]
    assert not splits[0] & splits[1] and len(splits[0] | splits[1]) == 20


def test_only_whole_folders_are_stripped_from_a_path(tmp_path):
    """--strip /data/coco is no beginning of /data/coco2/a.jpg."""
    picture(tmp_path / "pictures", "a.jpg", "2/a.jpg")
    path = write(tmp_path / "a.json", [{"image": "/data/coco2/a.jpg", "caption": "x"}])
    arguments = ["--annotations", path, "--task", "pairs", "--strip"]
    assert "data/coco2/a.jpg" in refused(tmp_path, "albef", *arguments, "/data/coco")
    for top in ("/data/coco2", "/data/coco2/"):
        assert rows(run(tmp_path, "albef", *arguments, top, "--force") / "pairs_train.jsonl", "pairs")


def test_paths_hold_behind_symbolic_links(tmp_path):
    picture(tmp_path / "far" / "away" / "pictures", "1.jpg")
    (tmp_path / "disk" / "deep" / "data").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "deep" / "data")
    path = write(tmp_path / "a.json", {"images": [karpathy("1.jpg", "train", "A.")]})
    images, out = tmp_path / "far" / "away" / "pictures", tmp_path / "data" / "coco"
    prepare.main(["coco", "--annotations", str(path), "--images", str(images), "--out", str(out)])
    assert len(data.read_rows([out / "pairs_train.jsonl"], "pairs")) == 1
    written = json.loads((out / "pairs_train.jsonl").read_text())
    assert not written["image"].startswith("/")


# ------------------------------------------------------------------------------------------------------------ vqa rules


def left_out_one(answers: list[str], answer: str) -> Fraction:
    """The official accuracy of an answer, annotator by annotator."""
    accuracies = []
    for left in range(len(answers)):
        others = [text for number, text in enumerate(answers) if number != left]
        accuracies.append(min(Fraction(1), Fraction(sum(text == answer for text in others), 3)))
    return sum(accuracies) / len(accuracies)


def test_scores_of_one_to_ten_who_agree():
    worth = [prepare.scores(["red"] * k + [f"other {i}" for i in range(10 - k)])["red"] for k in range(1, 11)]
    assert worth == [0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]


def test_scores_are_those_of_leaving_each_annotator_out():
    draw = random.Random(1)
    for _ in range(300):
        answers = [draw.choice(("red", "blue", "green", "white")) for _ in range(10)]
        found = prepare.scores(answers)
        assert found == {answer: round(float(left_out_one(answers, answer)), 4) for answer in set(answers)}
        assert list(found.values()) == sorted(found.values(), reverse=True)


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("A red.", "red"),
        ("the Red  car", "red car"),
        ("an apple\n", "apple"),
        ("two", "2"),
        ("None", "0"),
        ("TEN dogs", "10 dogs"),
        ("dont", "don't"),
        ("it's", "it's"),
        ("its", "its"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("oclock", "o'clock"),
        ("somebodyd", "somebody'd"),
        ("twas", "'twas"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("red / blue", "red blue"),
        ("red/blue", "red blue"),
        ("red-ish", "red ish"),
        ("t-shirt!", "t shirt"),
        ("yes!", "yes"),
        ("3.5", "3.5"),
        ("u.s.a.", "usa"),
        ("10:30", "10:30"),
        ("(left)", "left"),
        ("a", "a"),
        ("?", "?"),
        ("  ", ""),
    ],
)
def test_normalisation(said, normal):
    assert prepare.normalise(said) == prepare.normalise(normal) == normal


def test_question_without_a_single_answer_is_left_out(tmp_path, capsys):
    picture(tmp_path / "pictures", VQA_PICTURE)
    answers = [annotation(1, [""] * 10), annotation(2, [""] * 9 + ["red"])]
    out = run(tmp_path, *vqa_files(tmp_path, [question(1), question(2)], answers))
    assert [row["answers"] for row in rows(out / "vqa_train.jsonl", "vqa")] == [{"red": 0.3}]
    assert "left out: 1 questions whose answers are all blank" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- mistakes


LINES = [  # command, entries of a JSONL file or its text, what is said of it
    ("nlvr", [NLVR, NLVR | {"label": "yes"}], ":2: label is 'yes': expected true, True, false, False"),
    ("nlvr", [NLVR, NLVR | {"label": True}], ":2: label is True: expected true, True, false, False"),
    ("nlvr", [NLVR | {"identifier": "3125"}], ":1: identifier is '3125': expected sentence-position"),
    ("nlvr", [NLVR | {"identifier": "a-b-c"}], ":1: identifier is 'a-b-c': expected sentence-position"),
    ("nlvr", [NLVR | {"sentence": None}], ":1: sentence is None: expected a text"),
    ("nlvr", [NLVR | {"sentence": "  "}], ":1: text is "),
    (
        "nlvr",
        [{"sentence": "a", "identifier": "1-2"}],
        ":1: found the keys ['identifier', 'sentence']: expected 'label'",
    ),
    ("nlvr", '{"a": 1}\n\n{"a": \n', ":1: found the keys ['a']: expected 'identifier', a text"),
    ("nlvr", "[1, 2]\n", ":1: found list: expected an object"),
    ("nlvr", [NLVR2], ":1: identifier is 'train-189-0-1': expected sentence-position"),
    ("nlvr2", [NLVR], ":1: identifier is '3125-1': expected split-set-pair-sentence"),
    ("nlvr2", json.dumps(NLVR2) + "\n\n{broken\n", ":3: not JSON"),
    ("snli-ve", [SNLI | {"gold_label": "maybe"}], ":1: label is 'maybe': expected entailment, neutral, contradiction"),
    ("snli-ve", [{"gold_label": "neutral"}], ":1: found the keys ['gold_label']: expected 'Flickr30K_ID'"),
    ("flickr8k", "1.jpg\tA dog\n", ":1: found '1.jpg\\tA dog\\n': expected the header image,caption"),
    ("flickr8k", "image,caption\n1.jpg\n", ":2: found '1.jpg\\n': expected"),
    ("flickr8k", "1.jpg#0\tA\n1.jpg#1 B\n", ":2: found '1.jpg#1 B\\n'"),
    ("flickr8k", "image,caption\n", " holds no captions"),
    ("cc", "a caption,http://example.org/a.jpg\n", ":1: found 'a caption,ht"),
    ("cc", "a\thttp://a\nb\tc\n", ":2: found 'b\\tc\\n': expected caption<Tab>url"),
    ("cc", "a\thttp://a\nb\thttp://c\td\n", ":2: found"),
]
GOOD = karpathy("1.jpg", "train", "A.")
DOCUMENTS = [  # a JSON document or its text for coco, what is said of it
    (
        {"images": [GOOD, GOOD | {"split": "trian"}]},
        ": images[1]: split is 'trian': expected train, restval, val, test",
    ),
    ({"images": [GOOD | {"filename": 3}]}, ": images[0]: filename is 3: expected a text"),
    ({"images": [GOOD | {"sentences": "A dog"}]}, ": images[0]: sentences is 'A dog': expected a list"),
    ({"images": [GOOD | {"sentences": [{"tokens": []}]}]}, ": images[0]: found the keys ['tokens']: expected 'raw'"),
    ({"images": [GOOD | {"sentences": [{"raw": None}]}]}, ": images[0]: raw is None: expected a text"),
    ({"images": [{"split": "train"}]}, ": images[0]: found the keys ['split']: expected 'sentences'"),
    ({"images": [1]}, ": images[0]: found 1: expected an object"),
    ({"images": {"a": 1}}, ": images is {'a': 1}: expected a list"),
    ({"annotations": [1, 2], "info": {}}, ": found the keys ['annotations', 'info']: expected 'images', a list"),
    ([1, 2], ": found [1, 2]: expected an object with the key 'images'"),
    ("", " cannot be read (Expecting value: line 1"),
    ("image,caption\n", " cannot be read (Expecting value: line 1"),
    ('{"images": []} {', " cannot be read (Extra data: line 1"),
    ('{"images": [\n1,]}', " cannot be read (Expecting value: line 2"),
    ('{"images": [' + "[" * 200_000, " cannot be read (maximum recursion depth"),
]


@pytest.mark.parametrize(("command", "content", "wanted"), LINES + [("coco", *case) for case in DOCUMENTS])
def test_bad_entries_and_files(tmp_path, command, content, wanted):
    path = write(tmp_path / "a.x", content, lines=command != "coco")
    assert refused(tmp_path, command, "--annotations", path, "--skip-missing").startswith(f"{path}{wanted}")


def test_documents_cut_off_anywhere_are_refused(tmp_path):
    picture(tmp_path / "pictures", "1.jpg")
    content = json.dumps({"images": [GOOD], "n": 12})
    for end in range(len(content)):
        said = refused(tmp_path, "coco", "--annotations", write(tmp_path / "a.json", content[:end]))
        assert said.startswith(f"{tmp_path / 'a.json'} cannot be read") and "is it whole" in said, (end, said)


@pytest.mark.parametrize(("command", "entry"), [("nlvr", NLVR), ("nlvr2", NLVR2), ("snli-ve", SNLI)])
def test_json_lines_are_read_one_by_one(tmp_path, command, entry):
    """A row is made before the next line, which is broken, is read."""
    path = write(tmp_path / "a.jsonl", json.dumps(entry) + "\n" + "{broken\n" * 10_000)
    made = prepare.COMMANDS[command][0](argparse.Namespace(annotations=path, split="train", orders=1), Counter())
    assert next(made)[0] == f"{path}:1"
    with pytest.raises(ValueError, match=":2: not JSON"):
        next(made)


@pytest.mark.parametrize(
    ("questions", "answers", "wanted"),
    [
        ([question(1), question(2)], [annotation(1, ["a"] * 10)], "questions[1]: 1 questions, this one first, have no"),
        (
            [question(1)],
            [annotation(2, ["a"] * 10)],
            "annotations[0]: question_id 2 has no question, or two annotations",
        ),
        ([question(1)], [annotation(1, ["a"] * 10)] * 2, "annotations[1]: question_id 1 has no question, or two"),
        ([question(1), question(1)], [annotation(2, ["a"] * 10)], "questions[1]: question_id 1 comes twice"),
        ([question(1)], [annotation(1, [])], "annotations[0]: found no answers"),
        ([question(1)], [annotation(1, ["a"] * 10, image=5)], "annotations[0]: image_id is 5, that of the question 9"),
        ([question(1, text="")], [annotation(1, ["a"] * 10)], "questions[0]: question is "),
        (
            [question(1) | {"image_id": "9"}],
            [annotation(1, ["a"] * 10)],
            "questions[0]: image_id is '9': expected a whole",
        ),
        (
            [{"question": "x"}],
            [annotation(1, ["a"] * 10)],
            "questions[0]: found the keys ['question']: expected 'question_id'",
        ),
        ([question(1)], [annotation(1, [3] * 10)], "annotations[0]: answer is 3: expected a text"),
    ],
)
def test_bad_vqa_files(tmp_path, questions, answers, wanted):
    picture(tmp_path / "pictures", VQA_PICTURE)
    said = refused(tmp_path, *vqa_files(tmp_path, questions, answers))
    assert wanted in said and said.startswith(f"{tmp_path}")


def test_vqa_files_given_the_wrong_way_round(tmp_path):
    asked, answered = vqa_files(tmp_path, [question(1)], [annotation(1, ["a"] * 10)])[2::2]
    assert "expected 'questions', a list" in refused(tmp_path, "vqa", "--questions", answered, "--annotations", asked)


class Code:
    """What a hostile pickle holds: a call, made while it is read."""

    def __reduce__(self):
        return (Path.touch, (Path(MARK),))


MARK = "executed-by-a-pickle"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_with_code_is_refused_and_not_executed(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    said = refused(tmp_path, *ref_files(tmp_path, [REF, Code()], protocol))
    assert "a pickle of plain lists was expected" in said and "refs(unc).p" in said
    assert not (tmp_path / MARK).exists()
    pickle.loads((tmp_path / "refs(unc).p").read_bytes())
    assert (tmp_path / MARK).exists(), "this pickle holds no code: the test cannot fail"


@pytest.mark.parametrize(
    ("refs", "wanted"),
    [
        (b"", "cannot be read"),
        (b"[1, 2]", "cannot be read"),
        (pickle.dumps([REF])[:-20], "cannot be read"),
        ({"refs": []}, "the document is {'refs': []}: expected a list"),
        ([REF | {"split": "minival"}], "[0]: split is 'minival': expected train, val, test, testA, testB"),
        ([REF, REF | {"ann_id": 5}], "[1]: "),
        ([REF | {"image_id": 5}], "no instance 71 in a picture 5: expected it in "),
        ([REF | {"ann_id": None}], "[0]: ann_id is None: expected a whole number"),
        ([REF | {"sentences": [{"raw": "x"}]}], "[0]: found the keys ['raw']: expected 'sent'"),
        ([3], "[0]: found 3: expected an object"),
    ],
)
def test_bad_references(tmp_path, refs, wanted):
    picture(tmp_path / "pictures", "COCO_train2014_000000000007.jpg")
    said = refused(tmp_path, *ref_files(tmp_path, refs))
    assert wanted in said and said.startswith(str(tmp_path / "refs(unc).p"))


@pytest.mark.parametrize("box", [[1, 2, 3], None, [1, 2, "3", 4], [1, 2, float("nan"), 4]])
def test_bad_instances(tmp_path, box):
    instances = INSTANCES | {"annotations": [*INSTANCES["annotations"], {"id": 1, "image_id": 7, "bbox": box}]}
    said = refused(tmp_path, *ref_files(tmp_path, [REF], instances=instances))
    assert said.startswith(f"{tmp_path / 'instances.json'}: annotations[4]: bbox is ")


@pytest.mark.parametrize(
    ("task", "entry", "wanted"),
    [
        ("pairs", {"image": "/data/a.jpg", "caption": "x"}, "correct --images or --strip"),
        ("pairs", {"image": "a.jpg", "caption": [1]}, "found [1]: expected a text or a list of texts"),
        ("pairs", {"image": "a.jpg"}, "found the keys ['image']: expected 'caption'"),
        ("vqa", {"image": "a.jpg", "question": "x"}, "expected 'answer'"),
        ("reasoning", {"images": [], "sentence": "x", "label": "True"}, "found []: expected a text or a list"),
        ("reasoning", {"images": ["a.jpg"] * 3, "sentence": "x", "label": "True"}, "images"),
        ("reasoning", {"images": ["a.jpg"], "sentence": "x", "label": "entailment"}, "label is 'entailment'"),
        ("entailment", {"image": "a.jpg", "sentence": "x", "label": "True"}, "label is 'True': expected entailment"),
        ("grounding", {"image": 3, "text": "x"}, "image is 3"),
    ],
)
def test_bad_albef_entries(tmp_path, task, entry, wanted):
    path = write(tmp_path / "a.json", [entry])
    said = refused(tmp_path, "albef", "--annotations", path, "--task", task)
    assert wanted in said and (said.startswith(f"{path}: [0]: ") or "--strip" in said)


def test_other_files_and_folders_are_refused(tmp_path, capsys):
    (tmp_path / "a.gz").write_bytes(b"\x1f\x8b\x08\x00\xff\xfe" * 9)
    assert "a.gz:1: not UTF-8 text" in refused(tmp_path, "nlvr", "--annotations", tmp_path / "a.gz")
    assert "a.gz cannot be read ('utf-8' codec" in refused(tmp_path, "coco", "--annotations", tmp_path / "a.gz")
    assert "none.json cannot be read ([Errno 2]" in refused(tmp_path, "coco", "--annotations", tmp_path / "none.json")
    assert "none.tsv is not a file" in refused(tmp_path, "cc", "--annotations", tmp_path / "none.tsv")
    arguments = ["--annotations", str(tmp_path / "a.gz"), "--out", str(tmp_path / "out"), "--images"]
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        prepare.main(["coco", *arguments, str(tmp_path / "nowhere")])
    for wrong in (["nlvr", "--split", "trian"], ["nlvr", "--orders", "7"], ["imagenet"]):
        with pytest.raises(SystemExit) as end:
            prepare.main([*wrong, *arguments, str(tmp_path)])
        assert end.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_command_line_ends_with_a_sentence(tmp_path):
    (tmp_path / "pictures").mkdir()
    path = write(tmp_path / "a.json", '{"images": [3]}')
    command = [sys.executable, "-m", "tools.prepare", "coco", "--annotations", str(path)]
    command += ["--images", str(tmp_path / "pictures"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {path}: images[0]: found 3: expected an object" in done.stderr


# --------------------------------------------------------------------------------------------- pictures and half a work


def coco_file(tmp: Path, count: int) -> Path:
    splits = ("train", "val", "test")
    return write(
        tmp / "a.json", {"images": [karpathy(f"{i}.jpg", splits[i % 3], f"Number {i}.") for i in range(count)]}
    )


def test_missing_pictures_are_counted_and_the_first_ten_named(tmp_path, capsys):
    picture(tmp_path / "pictures", *(f"{i}.jpg" for i in range(5)))
    path = coco_file(tmp_path, 20)
    said = refused(tmp_path, "coco", "--annotations", path)
    assert said.startswith("15 of 20 rows show a picture that is not in ") and "--skip-missing" in said
    assert said.split("\n  ")[1:] == [f"{i}.jpg" for i in range(5, 15)]
    out = run(tmp_path, "coco", "--annotations", path, "--skip-missing")
    assert [row["image"] for row in rows(out / "pairs_train.jsonl", "pairs")] == ["0.jpg", "3.jpg"]
    assert "left out: 15 rows whose picture is missing" in capsys.readouterr().out


def test_dev_written_as_val_is_not_overwritten(tmp_path):
    picture(tmp_path / "pictures", "2/dev-3125-1-0.png")
    path = write(tmp_path / "dev.json", [NLVR], lines=True)
    run(tmp_path, "nlvr", "--annotations", path, "--split", "dev")
    assert "reasoning_val.jsonl exists already" in refused(tmp_path, "nlvr", "--annotations", path, "--split", "dev")


def test_when_every_picture_is_missing_the_names_looked_for_are_told(tmp_path):
    path = write(tmp_path / "a.tsv", "a\thttp://example.org/a.jpg\n")
    assert "00000/000000000.jpg" in refused(tmp_path, "cc", "--annotations", path)


def test_a_row_of_two_pictures_needs_both(tmp_path):
    picture(tmp_path / "pictures", "37/train-189-0-img0.png")
    path = write(tmp_path / "train.json", [NLVR2], lines=True)
    assert "1 of 1 rows" in refused(tmp_path, "nlvr2", "--annotations", path)


def test_files_that_are_there_are_kept_without_force(tmp_path):
    picture(tmp_path / "pictures", "0.jpg", "1.jpg", "2.jpg")
    path = coco_file(tmp_path, 3)
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "pairs_test.jsonl", "mine")
    said = refused(tmp_path, "coco", "--annotations", path)
    assert "pairs_test.jsonl exists already: pass --force" in said
    assert (tmp_path / "out" / "pairs_test.jsonl").read_text() == "mine"
    out = run(tmp_path, "coco", "--annotations", path, "--force")
    assert written(out) == [f"pairs_{split}.jsonl" for split in ("test", "train", "val")]
    assert len(rows(out / "pairs_test.jsonl", "pairs")) == 1


def written(out: Path) -> list[str]:
    """The JSONL files of a folder, beside which lies nothing but the list of them."""
    assert {file.name for file in out.iterdir() if file.suffix != ".jsonl"} == {"written.json"}
    return sorted(file.name for file in out.glob("*.jsonl"))


def test_files_of_an_earlier_run_do_not_stay_beside_new_ones(tmp_path, capsys):
    """A split that the new run does not have would be taken for its own, and all of it is in train."""
    picture(tmp_path / "pictures", *(f"a shape {chr(97 + i)}.png" for i in range(20)))
    out = run(tmp_path, "folder", "--val-share", 0.5)
    assert written(out) == ["pairs_train.jsonl", "pairs_val.jsonl"]
    run(tmp_path, "folder", "--force")
    assert written(out) == ["pairs_train.jsonl"] and len(rows(out / "pairs_train.jsonl", "pairs")) == 20
    assert "pairs_val.jsonl" in capsys.readouterr().out, "what goes is said"


def test_an_earlier_run_is_known_where_no_file_is_the_same(tmp_path):
    """First all are val, then all are train."""
    picture(tmp_path / "pictures", "a shape.png", "a circle.png")
    out = run(tmp_path, "folder", "--val-share", 0.9999)
    assert written(out) == ["pairs_val.jsonl"]
    assert "pairs_val.jsonl exists already: pass --force" in refused(tmp_path, "folder")
    run(tmp_path, "folder", "--force")
    assert written(out) == ["pairs_train.jsonl"]


def test_what_another_command_or_another_split_wrote_stays(tmp_path, capsys):
    """Splits of one data set are converted one after another, and tasks may share a folder."""
    picture(tmp_path / "pictures", "a shape.png")
    path = write(tmp_path / "dev.json", [NLVR], lines=True)
    for split in ("train", "dev"):
        picture(tmp_path / "pictures", f"2/{split}-3125-1-0.png")
        run(tmp_path, "nlvr", "--annotations", path, "--split", split)
    out = run(tmp_path, "folder")
    capsys.readouterr()
    run(tmp_path, "nlvr", "--annotations", path, "--split", "train", "--force")
    said = capsys.readouterr().out
    assert "removed" not in said and "not replaced, because another run or you wrote it: reasoning_val.jsonl" in said
    assert written(out) == ["pairs_train.jsonl", "reasoning_train.jsonl", "reasoning_val.jsonl"]


def test_a_file_of_no_run_is_kept_and_named(tmp_path, capsys):
    """Made by hand, or by a version that kept no list: it lies where training looks for val."""
    picture(tmp_path / "pictures", "a shape.png")
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "pairs_val.jsonl", "mine")
    write(tmp_path / "out" / "pairs_notes.jsonl", "mine too")
    for more in ((), ("--force",)):
        out = run(tmp_path, "folder", *more)
        said = capsys.readouterr().out
        assert "not replaced" in said and "pairs_val.jsonl" in said and "pairs_notes.jsonl" in said
    assert (out / "pairs_val.jsonl").read_text() == "mine" and (out / "pairs_notes.jsonl").read_text() == "mine too"


def test_a_damaged_list_ends_with_one_sentence(tmp_path):
    picture(tmp_path / "pictures", "a shape.png")
    (tmp_path / "out").mkdir()
    for content in ("{", "[]", '{"folder pairs": 3}', '{"folder pairs": ["../../mine.jsonl"]}'):
        write(tmp_path / "out" / "written.json", content)
        assert "written.json is not a list of what was written" in refused(tmp_path, "folder", "--force")


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("when", ["writing", "moving"])
def test_nothing_is_half_made(tmp_path, monkeypatch, fault, when):
    picture(tmp_path / "pictures", *(f"{i}.jpg" for i in range(6)))
    path = coco_file(tmp_path, 6)
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "pairs_train.jsonl", "old train")
    write(tmp_path / "out" / "pairs_val.jsonl", "old val")
    write(tmp_path / "out" / "pairs_test1.jsonl", "old test")
    write(tmp_path / "out" / "written.json", {"coco pairs": ["pairs_test1.jsonl"]})
    calls = itertools.count()
    place, replace = (prepare, "not_blank") if when == "writing" else (prepare.os, "replace")
    original = getattr(place, replace)

    def failing(*arguments):
        if next(calls) == 3:
            raise fault("stopped")
        return original(*arguments)

    monkeypatch.setattr(place, replace, failing)
    with pytest.raises(fault):
        run(tmp_path, "coco", "--annotations", path, "--force")
    found = {file.name: file.read_text() for file in (tmp_path / "out").iterdir()}
    old = {"pairs_train.jsonl": "old train", "pairs_val.jsonl": "old val", "pairs_test1.jsonl": "old test"}
    assert found == old | {"written.json": '{"coco pairs": ["pairs_test1.jsonl"]}'}


def test_the_page_on_data_shows_every_command():
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert {command.split()[0] for command in page.split("python -m tools.prepare ")[1:]} == set(prepare.COMMANDS)


# ----------------------------------------------------------------------------------------------------------- videos


class Frame:
    """A frame as PyAV gives it."""

    def __init__(self, level: int):
        self.level = level

    def to_image(self) -> Image.Image:
        """One colour, larger than is kept."""
        return Image.new("RGB", (640, 360), (self.level, self.level, self.level))


def videos(folder: Path, *names: str) -> Path:
    """Files that stand for videos, of 20 frames from dark to light, see decoded."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"video")
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """Videos without PyAV: their frames; and a list of the files that were decoded."""
    opened = []

    def frames(path: Path):
        opened.append(path.name)
        yield from (Frame(10 * number) for number in range(20))

    monkeypatch.setattr("tools.frames.decoded", frames)
    return opened


def levels(row: dict) -> list[int]:
    """The grey of the frames that a row's video is made of."""
    return [
        round(float(np.asarray(one).mean())) for one in load_frames(row["image"], range(count_frames(row["image"])))
    ]


def test_msrvtt_has_all_captions_of_a_video_and_frames_from_all_over_it(tmp_path, decoded):
    """Its three splits, the frames once, and again from what is there."""
    videos(tmp_path / "pictures", "video0.mp4", "video7.mp4", "video9.mp4")
    splits = {"video0": "train", "video7": "validate", "video9": "test"}
    document = {
        "videos": [{"video_id": name, "split": split, "category": 1} for name, split in splits.items()],
        "sentences": [
            {"sen_id": 0, "video_id": "video7", "caption": "a dog runs"},
            {"sen_id": 1, "video_id": "video0", "caption": "a man sings"},
            {"sen_id": 2, "video_id": "video0", "caption": "someone sings"},
            {"sen_id": 3, "video_id": "video0", "caption": "a man sings"},
        ],
    }
    file = write(tmp_path / "a.json", document)
    for _ in range(2):
        out = run(tmp_path, "msrvtt", "--annotations", file, "--frames", 4, "--force")
        (row,) = data.read_rows([out / "pairs_train.jsonl"], "pairs", check="full")
        assert row["caption"] == ["a man sings", "someone sings"] and levels(row) == [20, 70, 120, 170]
        assert len(data.read_rows([out / "pairs_val.jsonl"], "pairs")) == 1
        assert not (out / "pairs_test.jsonl").exists(), "it has no caption"
    assert decoded == ["video0.mp4"] * 2 + ["video7.mp4"] * 2, "counted and read, in the first run alone"
    with Image.open(files_of(row["image"])[0]) as first:
        assert first.size == (320, 180)
    document["sentences"][0]["video_id"] = "video8"
    assert "sentences[0]: video_id is 'video8'" in refused(
        tmp_path, "msrvtt", "--annotations", write(file, document), "--force"
    )


def test_lsmdc_finds_a_clip_in_the_folder_of_its_film(tmp_path, decoded):
    """A line has six fields, of which the last one is the sentence."""
    clip = "1005_Signs_00.00.51.926-00.00.54.129"
    videos(tmp_path / "pictures", f"1005_Signs/{clip}.avi")
    line = "\t".join([clip, "00.00.51.926", "00.00.54.129", "00.00.51.9", "00.00.54.1", "SOMEONE looks up."])
    file = write(tmp_path / "a.csv", line + "\n")
    out = run(tmp_path, "lsmdc", "--annotations", file, "--split", "val", "--frames", 2)
    (row,) = data.read_rows([out / "pairs_val.jsonl"], "pairs")
    assert row["caption"] == "SOMEONE looks up." and levels(row) == [50, 150]
    assert "four times and a sentence" in refused(
        tmp_path, "lsmdc", "--annotations", write(file, "a\tb\n"), "--split", "val", "--force"
    )


def test_a_folder_may_hold_videos_beside_pictures(tmp_path, decoded):
    """Each as its kind, with a caption from its name."""
    picture(tmp_path / "pictures", "a_red_ball.png")
    videos(tmp_path / "pictures", "deep/a_ball_rolls.mov")
    found = data.read_rows([run(tmp_path, "folder", "--frames", 3) / "pairs_train.jsonl"], "pairs")
    assert {row["caption"][0]: data.is_video(row["image"]) for row in found} == {
        "a red ball": False,
        "a ball rolls": True,
    }


def test_a_video_file_needs_pyav_and_says_so(tmp_path, monkeypatch):
    """In one sentence, with the way to get it; a file that is none is named."""
    videos(tmp_path / "pictures", "a_ball_rolls.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    assert "which PyAV reads: pip install av" in refused(tmp_path, "folder")
