"""Sheets of examples: what is drawn and written, by looking at the pen and at the pixels."""

from pathlib import Path

import numpy as np
import pytest
from helpers import square
from PIL import Image, ImageDraw

from tools.sheet import GAP, LINE, RIGHT, WRONG, draw_examples, draw_found, draw_ranked

WIDE, HIGH, COLUMN = 128, 85, 600  # of a picture of 48 x 32 pixels, and of a cell


@pytest.fixture
def pen(monkeypatch) -> list[tuple]:
    """Everything that is written on sheets: (x, y, text, colour)."""
    lines, text = [], ImageDraw.ImageDraw.text

    def write(self, place, words, **options):
        if words:
            lines.append((*place, words, options["fill"]))
        text(self, place, words, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", write)
    return lines


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """Twelve pictures of 48 x 32 pixels."""
    for number in range(12):
        square(number).resize((48, 32), Image.Resampling.NEAREST).save(tmp_path / f"{number}.png")
    return [str(tmp_path / f"{number}.png") for number in range(12)]


def examples(task: str, pictures: list[str]) -> tuple[list[dict], list[dict]]:
    """Twelve rows and predictions, of which every third is wrong."""
    rows, predictions = [], []
    for number, image in enumerate(pictures):
        good = number % 3 > 0
        if task == "vqa":
            row = {"image": image, "question": f"question {number}?", "answers": {"red": 1.0, "pink": 0.3}}
            answer = "red" if good else "pink"
        elif task == "reasoning":
            row = {"images": [image, pictures[0]][: 1 + number % 2], "text": f"text {number}", "label": number % 2 == 0}
            answer = str(row["label"] is good).lower()
        else:
            row = {"image": image, "text": f"text {number}", "label": "neutral"}
            answer = "neutral" if good else "contradiction"
        rows.append(row)
        predictions.append({"row": number, "answer": answer})
    return rows, predictions


def pixels(path: Path) -> np.ndarray:
    """A PNG as (height, width, 3)."""
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        return np.asarray(sheet.convert("RGB")).astype(int)


def count(part: np.ndarray, colour: str) -> int:
    """Pixels of a colour such as #0a6b2d."""
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return int((part == wanted).all(axis=2).sum())


@pytest.mark.parametrize("task", ["vqa", "reasoning", "entailment"])
def test_right_answers_stand_on_the_left_and_wrong_ones_on_the_right(task, pictures, pen, tmp_path):
    """Each beside its pictures; + and - beside the colours, and under a wrong answer what would have been right."""
    rows, predictions = examples(task, pictures)
    draw_examples(task, rows, predictions, tmp_path / "new" / "a.png")
    sheet = pixels(tmp_path / "new" / "a.png")
    assert sheet.shape == (6 * (HIGH + GAP) + GAP, 2 * COLUMN + GAP, 3)
    label = {"reasoning": [str(row.get("label")).lower() for row in rows]}.get(task, ["red"] * 12)
    label = ["neutral"] * 12 if task == "entailment" else label
    expected = []
    good, bad = [number for number in range(12) if number % 3], [0, 3, 6, 9]
    for left, chosen, colour in ((0, good[:6], RIGHT), (COLUMN, bad, WRONG)):
        for place, number in enumerate(chosen):
            count_of_pictures = len(rows[number].get("images", [1]))
            x, y = left + GAP + count_of_pictures * (WIDE + GAP), GAP + place * (HIGH + GAP)
            text = rows[number].get("question", rows[number].get("text"))
            lines = [text, f"+ {label[number]}"]
            if colour == WRONG:
                lines = [text, f"- {predictions[number]['answer']}", f"right: {label[number]}"]
            expected += [(x, y + LINE * line, words, colour) for line, words in enumerate(lines)]
            for at, image in enumerate(rows[number].get("images", [pictures[number]])):
                start = left + GAP + at * (WIDE + GAP)
                shown = sheet[y : y + HIGH, start : start + WIDE]
                small = Image.open(image).convert("RGB").resize((WIDE, HIGH), Image.Resampling.NEAREST)
                assert (shown == np.asarray(small)).all()
    assert sorted(pen) == sorted(expected)


def test_of_many_examples_some_from_all_over_the_rows_are_shown(pictures, pen, tmp_path):
    """Not the first six, whose questions may all be about one picture."""
    rows = [{"image": pictures[0], "question": f"question {number}", "answers": {"a": 1.0}} for number in range(60)]
    draw_examples("vqa", rows, [{"row": number, "answer": "a"} for number in range(60)], tmp_path / "a.png")
    assert [words for *_, words, _ in pen if words[0] == "q"] == [f"question {number}" for number in range(0, 60, 10)]
    assert all(x < COLUMN for x, *_ in pen)


def test_long_texts_are_broken_between_words(pictures, pen, tmp_path):
    """Nothing is lost, and no line runs into the other column."""
    text = "a red circle above a blue square that is left of a very very large and somewhat yellow triangle"
    rows = [{"image": pictures[0], "text": text, "label": "neutral"}]
    draw_examples("entailment", rows, [{"row": 0, "answer": "neutral"}], tmp_path / "a.png")
    lines = [words for *_, words, _ in pen][:-1]
    assert " ".join(lines) == text and len(lines) > 2 and max(map(len, lines)) <= 36


def test_grounding_shows_the_right_box_the_predicted_one_and_the_point(pictures, pen, tmp_path):
    """The right box is green, or just around it, and the predicted one is red; found is what the proposal found."""
    box, other = [24, 0, 24, 16], [0, 16, 24, 16]
    row = {"image": pictures[0], "text": "a red square", "boxes": [box], "proposals": [box, other]}
    said = {"row": 0, "point": [6, 24], "proposal": other, "box": box, "grid": [2, 3]}
    draw_examples("grounding", [row, row], [said, said | {"row": 1, "proposal": box}], tmp_path / "a.png")
    sheet = pixels(tmp_path / "a.png")
    missed = sheet[GAP : GAP + HIGH, COLUMN + GAP : COLUMN + GAP + WIDE]
    found = sheet[GAP : GAP + HIGH, GAP : GAP + WIDE]
    half, middle = HIGH // 2, WIDE // 2
    assert count(missed[: half + 4, middle - 4 :], RIGHT) == count(missed, RIGHT) > 3 * half
    edge = count(missed[half:, :middle], WRONG)
    assert edge == count(missed, WRONG) > 3 * half
    x, y = round(6 * WIDE / 48), round(24 * HIGH / 32)
    assert count(missed[y - 2 : y + 3, x - 2 : x + 3], WRONG) > 15, "the point"
    assert count(found[: half + 1, middle - 1 :], WRONG) > 3 * half, "the proposal lies on the right box"
    assert [(x < COLUMN, words) for x, _, words, _ in pen] == [
        (True, "a red square"),
        (True, "+ found"),
        (False, "a red square"),
        (False, "- missed"),
    ]


def test_grounding_without_proposals_is_marked_by_its_point(pictures, pen, tmp_path):
    """The box is drawn then; who points nowhere has missed."""
    row = {"image": pictures[0], "text": "a red square", "boxes": [[24, 0, 24, 16]]}
    said = {"row": 0, "point": [30, 5], "proposal": None, "box": [0, 16, 24, 16], "grid": [2, 3]}
    nothing = said | {"row": 1, "point": None, "box": None}
    draw_examples("grounding", [row, row], [said, nothing], tmp_path / "a.png")
    assert [(x < COLUMN, words) for x, _, words, _ in pen if words[0] in "+-"] == [
        (True, "+ found"),
        (False, "- missed"),
    ]
    sheet = pixels(tmp_path / "a.png")
    half = HIGH // 2
    assert count(sheet[GAP + half : GAP + HIGH, GAP : GAP + WIDE // 2], WRONG) > 3 * half
    missed = sheet[GAP : GAP + HIGH, COLUMN + GAP : COLUMN + GAP + WIDE]
    assert count(missed, WRONG) == 0 and count(missed, RIGHT) > 3 * half


def test_a_box_that_is_thinner_than_a_pixel_of_the_sheet_can_be_drawn(tmp_path):
    """A box 4 pixels wide in a photo of 640, right or predicted."""
    Image.new("RGB", (640, 480), "white").save(tmp_path / "photo.png")
    row = {"image": str(tmp_path / "photo.png"), "text": "a mast", "boxes": [[100, 100, 4, 200]]}
    said = {"row": 0, "point": [101, 150], "box": [100, 100, 4, 200], "grid": [2, 3]}
    draw_examples("grounding", [row], [said], tmp_path / "a.png")


@pytest.mark.parametrize("way", ["contrast", "matching"])
def test_ranked_captions_are_those_of_matching_where_there_is_matching(pictures, pen, tmp_path, way):
    """Eight pictures from all over the gallery beside their best five; + exactly where a caption is right."""
    rows = [{"image": image, "caption": f"picture {number}"} for number, image in enumerate(pictures)]
    lists = []
    for name in ("contrast", "matching")[: 1 + (way == "matching")]:
        step = 1 if name == "contrast" else 11
        for number, image in enumerate(pictures):
            found = [f"picture {(number + step * place) % 12}" for place in range(10)]
            lists.append({"way": name, "direction": "image_to_text", "query": image, "found": found})
        lists.append({"way": name, "direction": "text_to_image", "query": "picture 0", "found": pictures[:10]})
    draw_ranked(rows, lists, tmp_path / "a.png", pictures=6)
    step = 1 if way == "contrast" else 11
    expected = [
        ("+ " if place == 0 else "- ") + f"picture {(number + step * place) % 12}"
        for number in range(0, 12, 2)
        for place in range(5)
    ]
    assert [words for *_, words, _ in pen] == expected
    assert {(words[0], colour) for *_, words, colour in pen} == {("+", RIGHT), ("-", WRONG)}
    sheet = pixels(tmp_path / "a.png")
    assert sheet.shape == (6 * (HIGH + GAP) + GAP, COLUMN + GAP, 3)
    for place, number in enumerate(range(0, 12, 2)):
        top = GAP + place * (HIGH + GAP)
        small = Image.open(pictures[number]).convert("RGB").resize((WIDE, HIGH), Image.Resampling.NEAREST)
        assert (sheet[top : top + HIGH, GAP : GAP + WIDE] == np.asarray(small)).all()


def test_found_pictures_stand_in_their_order_in_their_own_proportions(pictures, pen, tmp_path):
    """Seven pictures of 48 x 32, so drawn as 128 x 85, four in a row, below the text that found them, with their
    scores; behind the best there is none of matching."""
    found = [
        {"image": one, "contrast": 0.5, "matching": 0.25 if place < 3 else None} for place, one in enumerate(pictures)
    ]
    draw_found("a red square", found[:7], tmp_path / "a.png")
    scores = [(str(n), "contrast 0.50", *["matching 0.25"] * (n < 4)) for n in range(1, 8)]
    assert [words for *_, words, _ in pen] == ["a red square", *(line for lines in scores for line in lines)]
    sheet = pixels(tmp_path / "a.png")
    for place, image in enumerate(pictures[:7]):
        left, top = GAP + place % 4 * 260, 2 * GAP + LINE + place // 4 * (HIGH + GAP)
        drawn = sheet[top : top + HIGH, left : left + WIDE]
        wanted = Image.open(image).convert("RGB").resize((WIDE, HIGH), Image.Resampling.NEAREST)
        assert (drawn == np.asarray(wanted)).all()
