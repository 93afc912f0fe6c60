"""Sheets to look at: pictures beside what the model ranks first, or answers."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

import runtime
from data import load_image, pictures_of
from metrics import fits, points_into, right_answers, right_label, score_answers, text_of

RIGHT, WRONG = "#0a6b2d", "#8a1c1c"  # beside + and -, so that a sheet does not rest on colour alone


def draw_ranked(rows: list[dict], lists: list[dict], path: Path, pictures: int = 8, best: int = 5) -> None:
    """Some pictures of a gallery beside the captions ranked first, by matching where there is matching."""
    right = right_answers(rows)["image_to_text"]
    way = lists[-1]["way"]  # matching comes behind contrast
    ranked = {one["query"]: one["found"] for one in lists if one["way"] == way and one["direction"] == "image_to_text"}
    side, line = 128, 22
    chosen = list(ranked)[:: max(len(ranked) // pictures, 1)][:pictures]
    sheet = Image.new("RGB", (side + 460, (side + 12) * len(chosen) + 12), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for number, image in enumerate(chosen):
        top = 12 + number * (side + 12)
        sheet.paste(load_image(image).resize((side, side), Image.Resampling.NEAREST), (12, top))
        for place, caption in enumerate(ranked[image][:best]):
            good = caption in right[image]
            text = f"{'+' if good else '-'} {caption}"
            pen.text((side + 28, top + 6 + place * line), text, fill=RIGHT if good else WRONG, font=font)
    runtime.write_beside(path, lambda temporary: sheet.save(temporary, format="PNG"))


def draw_found(text: str, images: list[str], path: Path, side: int = 160, columns: int = 5) -> None:
    """The pictures that were found for a text, best first, row by row."""
    gap, lines = 12, -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, lines * (side + gap + 22) + 44), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    pen.text((gap, gap), text, fill="black", font=font)
    for place, image in enumerate(images):
        left, top = gap + place % columns * (side + gap), 44 + place // columns * (side + gap + 22)
        picture = ImageOps.contain(load_image(image), (side, side))
        sheet.paste(picture, (left, top))
        pen.text((left, top + side + 2), str(place + 1), fill="black", font=font)
    runtime.write_beside(path, lambda temporary: sheet.save(temporary, format="PNG"))


def draw_examples(task: str, rows: list[dict], predictions: list[dict], path: Path, each: int = 6) -> None:
    """Right answers on the left, wrong ones on the right, with picture, text, answer and what would have been right.

    Of grounding the right box is drawn in green, and inside it or elsewhere the proposal, or else the box, in red; the
    point is a dot.
    """
    if task == "grounding":
        good = [hit(row, prediction) for row, prediction in zip(rows, predictions, strict=True)]
    else:
        good = [
            score > 0.5 for score in score_answers(task, rows, [prediction["answer"] for prediction in predictions])
        ]
    side, gap, column = 128, 12, 600
    sheet = Image.new("RGB", (2 * column, each * (side + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for half, wanted in enumerate((True, False)):
        numbers = [number for number, one in enumerate(good) if one is wanted]
        for place, number in enumerate(numbers[:: max(len(numbers) // each, 1)][:each]):
            row, prediction = rows[number], predictions[number]
            left, top = gap + half * column, gap + place * (side + gap)
            for image in pictures_of(row):
                sheet.paste(thumbnail(row, prediction, image, side), (left, top))
                left += side + gap
            lines = [*wrapped(text_of(row)), *answer_lines(task, row, prediction)]
            for line, text in enumerate(lines):
                pen.text((left, top + 22 * line), text, fill=RIGHT if wanted else WRONG, font=font)
    runtime.write_beside(path, lambda temporary: sheet.save(temporary, format="PNG"))


def hit(row: dict, prediction: dict) -> bool:
    """Whether the chosen proposal, or without proposals the point, is right."""
    if "proposals" in row:
        return fits(prediction.get("proposal"), row["boxes"])
    return points_into(prediction.get("point"), row["boxes"])


def wrapped(text: str, width: int = 36) -> list[str]:
    """A text in lines of whole words."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def answer_lines(task: str, row: dict, prediction: dict) -> list[str]:
    """The answer, marked + or -, and where it is wrong the right one."""
    if task == "grounding":
        return ["+ found" if hit(row, prediction) else "- missed"]
    answer = prediction["answer"]
    if score_answers(task, [row], [answer])[0] > 0.5:
        return [f"+ {answer}"]
    right = max(row["answers"], key=row["answers"].get) if task == "vqa" else right_label(row)
    return [f"- {answer}", f"right: {right}"]


def thumbnail(row: dict, prediction: dict, image: str, side: int) -> Image.Image:
    """A picture in a square, of grounding with its boxes."""
    picture = load_image(image)
    width, height = picture.size
    small = picture.resize((side, side), Image.Resampling.NEAREST if side > width else Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(small)
    chosen = prediction.get("proposal") or prediction.get("box")
    for boxes, colour, out in ((row.get("boxes", []), RIGHT, 3), ([chosen] if chosen else [], WRONG, 0)):
        for x, y, w, h in boxes:
            left, top, right, bottom = x / width, y / height, (x + w) / width, (y + h) / height
            x0, y0 = left * side - out, top * side - out
            corners = (x0, y0, max(right * side - 1 + out, x0), max(bottom * side - 1 + out, y0))
            pen.rectangle(corners, outline=colour, width=2)
    if prediction.get("point"):
        x, y = prediction["point"][0] * side / width, prediction["point"][1] * side / height
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=WRONG)
    return small
