"""Contact sheets as PNG files: pictures beside retrieved texts or predicted answers, correct in green, wrong in red."""

import textwrap
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import is_video, pictures_of, shown
from explain import Heat, save_png
from metrics import fits, points_into, right_answers, right_label, score_answers, text_of

RIGHT, WRONG = "#0a6b2d", "#8a1c1c"  # combined with + and -, so that a sheet does not rely on colour alone
GAP, LINE = 12, 22  # pixels
LONGEST = 400  # letters of a text; the rest is not drawn


@dataclass
class Cell:
    """A cell of a sheet: pictures side by side and, to their right, lines of text, each with its own colour."""

    pictures: list[Image.Image]
    lines: list[tuple[str, str]]


def draw_sheet(cells: list[Cell], path: Path, columns: int = 1, width: int = 600, title: str = "") -> None:
    """Draw cells row by row below a title, each cell `width` pixels wide."""
    pen_font = ImageFont.load_default(size=15)
    height = max(picture.height for cell in cells for picture in cell.pictures) + GAP
    top = GAP + (LINE + GAP if title else 0)
    sheet = Image.new("RGB", (columns * width + GAP, top + -(-len(cells) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((GAP, GAP), title[:LONGEST], fill="black", font=pen_font)
    for number, cell in enumerate(cells):
        x, y = GAP + number % columns * width, top + number // columns * height
        for picture in cell.pictures:
            sheet.paste(picture, (x, y))
            x += picture.width + GAP
        for place, (text, colour) in enumerate(cell.lines):
            pen.text((x, y + LINE * place), text[:LONGEST], fill=colour, font=pen_font)
    save_png(sheet, path)


def thumbnail(path: str, side: int = 128) -> Image.Image:
    """A picture scaled to `side` pixels along its longer side or, for a video, a strip of frames `side` pixels high."""
    picture = shown(path)
    side = side if not is_video(path) else side * picture.width // picture.height
    return ImageOps.contain(
        picture, (side, side), Image.Resampling.NEAREST if side > 2 * max(picture.size) else Image.Resampling.BICUBIC
    )


def some_of(items: list, count: int) -> list:
    """`count` of the items, spread evenly over the list."""
    return items[:: max(len(items) // count, 1)][:count]


def draw_heats(heats: list[Heat], path: Path, line: str) -> None:
    """Each picture with and without its heat map; for a video, all frames with their maps."""
    panels = [panel for heat in heats for panel in (heat.picture, heat.image())]
    line += "   larger = hotter"
    draw_sheet([Cell(panels, [])], path, width=sum(panel.width + GAP for panel in panels), title=line)


def draw_ranked(rows: list[dict], lists: list[dict], path: Path, pictures: int = 8, best: int = 5) -> None:
    """Some pictures of a gallery beside their top captions, re-ranked if the model has a matching head; if none of
    them is correct, a correct caption is shown below."""
    right, names = right_answers(rows, lists)
    picture, text = names["image_to_text"]
    way = lists[-1]["way"]  # the matching entry follows the contrast entry
    ranked = {one["query"]: one["found"] for one in lists if one["way"] == way and one["direction"] == "image_to_text"}
    cells = []
    for image in some_of(list(ranked), pictures):
        marks = [(text(caption) in right["image_to_text"][picture(image)], caption) for caption in ranked[image][:best]]
        lines = [(f"{'+' if good else '-'} {caption}", RIGHT if good else WRONG) for good, caption in marks]
        if not any(good for good, _ in marks):
            lines.append((f"missed: {min(right['image_to_text'][picture(image)])}", "black"))
        cells.append(Cell([thumbnail(image)], lines))
    draw_sheet(cells, path)


def draw_found(text: str, found: list[dict], path: Path) -> None:
    """The pictures retrieved for a text with their scores, best first, row by row. found: see eval.search"""
    cells = []
    for place, one in enumerate(found, 1):
        scores = [f"{way} {one[way]:.2f}" for way in ("contrast", "matching") if one[way] is not None]
        cells.append(Cell([thumbnail(one["image"])], [(line, "black") for line in (str(place), *scores)]))
    draw_sheet(cells, path, columns=4, width=260, title=text)


def draw_examples(task: str, rows: list[dict], predictions: list[dict], path: Path, each: int = 6) -> None:
    """Correct predictions on the left, wrong ones on the right: picture, text, prediction and correct answer.

    For grounding, ground-truth boxes are drawn in green, and the chosen proposal (or, without proposals, the predicted
    box) in red; a dot marks the point.
    """
    cells = {True: [], False: []}
    for row, prediction in zip(rows, predictions, strict=True):
        if task == "grounding":
            good = hit(row, prediction)
            said = ["+ found" if good else "- missed"]
        else:
            answer = prediction["answer"]
            good = score_answers(task, [row], [answer])[0] > 0.5
            right = max(row["answers"], key=row["answers"].get) if task == "vqa" else right_label(row)
            said = [f"+ {answer}"] if good else [f"- {answer}", f"right: {right}"]
        lines = [
            (line, RIGHT if good else WRONG)
            for line in [
                *textwrap.wrap(text_of(row)[:LONGEST], 36, break_long_words=False, break_on_hyphens=False),
                *said,
            ]
        ]
        cells[good].append((row, prediction, lines))
    pairs = zip_longest(some_of(cells[True], each), some_of(cells[False], each))
    shown = [
        Cell([], []) if one is None else Cell([with_boxes(path, *one[:2]) for path in pictures_of(one[0])], one[2])
        for pair in pairs
        for one in pair
    ]
    draw_sheet(shown, path, columns=2)


def hit(row: dict, prediction: dict) -> bool:
    """Whether the chosen proposal is correct or, without proposals, whether the point is."""
    if "proposals" in row:
        return fits(prediction.get("proposal"), row["boxes"])
    return points_into(prediction.get("point"), row["boxes"])


def with_boxes(path: str, row: dict, prediction: dict) -> Image.Image:
    """A thumbnail; for grounding, with the boxes and the point drawn on it."""
    small = thumbnail(path)
    scale, pen = small.width / shown(path).width, ImageDraw.Draw(small)
    chosen = prediction.get("proposal") or prediction.get("box")
    for boxes, colour, out in ((row.get("boxes", []), RIGHT, 3), ([chosen] if chosen else [], WRONG, 0)):
        for x, y, w, h in boxes:
            x0, y0 = x * scale - out, y * scale - out
            corners = (x0, y0, max((x + w) * scale - 1 + out, x0), max((y + h) * scale - 1 + out, y0))
            pen.rectangle(corners, outline=colour, width=2)
    if prediction.get("point"):
        x, y = prediction["point"][0] * scale, prediction["point"][1] * scale
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=WRONG)
    return small
