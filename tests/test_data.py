"""Reading and checking, pictures of every kind, randomness that belongs to the sample, batches of twins."""

import json
import re
from collections import Counter
from itertools import combinations, islice, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from helpers import caption, square, write_rows, write_squares
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from data import (
    Collate,
    Pairs,
    Pictures,
    TwinBatches,
    aerial,
    captions_of,
    count_truncated,
    drawing,
    load_image,
    make_batch,
    pad,
    photo,
    pictures_of,
    read_rows,
    shuffle_boxes,
    size_of,
    stable_id,
    strong,
    to_pixels,
    to_tensor,
    training_batches,
)
from mamo import Config, MAMOConfig, same_pairs
from reading.rows import is_text
from tasks import HeadConfig, TaskRows
from tokenizer import Tokenizer

PER_SAMPLE = ("images", "image_id", "caption_id", "patch_noise")
PER_TOKEN = ("input_ids", "attention_mask", "token_noise", "replace_noise")


def one_picture(folder: Path, *rows) -> Path:
    """A pairs file with these rows, and the picture a.png beside it."""
    square(0).save(folder / "a.png")
    return write_rows(folder / "rows.jsonl", list(rows))


# ----------------------------------------------------------------------------------------------- reading and checking


def test_rows_keep_their_further_keys_and_get_a_full_path(tmp_path):
    """Paths are relative to the file, and keys that the schema does not know stay."""
    path = write_squares(tmp_path / "deep" / "pairs.jsonl", 3, several=True)
    rows = read_rows([path], "pairs")
    assert [row["number"] for row in rows] == [0, 1, 2]
    assert [row["image"] for row in rows] == [str(tmp_path / "deep" / "pictures" / f"0{i}.png") for i in range(3)]
    assert captions_of(rows[1]) == [caption(1)]
    assert captions_of(rows[0])[0] == caption(0) and len(captions_of(rows[0])) == 3


@pytest.mark.parametrize("missing", ["image", "caption"])
def test_a_missing_key_is_named_with_file_line_and_what_was_found(tmp_path, missing):
    """The line counts empty lines too, as an editor does."""
    wrong = {"image": "a.png", "caption": "a square", "size": 3}
    del wrong[missing]
    path = one_picture(tmp_path, {"image": "a.png", "caption": "a square"}, "", wrong)
    with pytest.raises(ValueError) as error:
        read_rows([path], "pairs")
    message = str(error.value)
    assert message.startswith(f"{path}:3:"), message
    found, expected = message.split("expected")
    assert str(sorted(wrong)) in found
    assert '"image"' in expected and '"caption"' in expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"image": "a.png", "caption": }', "not JSON"),
        ("a.png,a red square", "not JSON"),
        ('["a.png", "a red square"]', "found list"),
        ("3", "found int"),
        ("null", "found NoneType"),
        ('{"image": 3, "caption": "a square"}', "image is 3: expected a path relative to this file"),
        ('{"image": "a.png", "caption": ""}', "expected a text that is not empty"),
        ('{"image": "a.png", "caption": " \\t"}', "expected a text that is not empty"),
        ('{"image": "a.png", "caption": []}', "expected a text that is not empty"),
        ('{"image": "a.png", "caption": ["a square", " "]}', "expected a text that is not empty"),
        ('{"image": "a.png", "caption": ["a square", 3]}', "caption"),
        ('{"image": "a.png", "caption": null}', "caption"),
    ],
)
def test_a_row_that_is_wrong_stops_the_run_with_file_and_line(tmp_path, line, says):
    """One sentence, however the row is wrong; and the same row is left out and counted under skip_bad."""
    path = one_picture(tmp_path, {"image": "a.png", "caption": "a square"}, line)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        read_rows([path], "pairs")
    assert str(error.value).startswith(f"{path}:2:")
    assert len(read_rows([path], "pairs", skip_bad=True)) == 1


@pytest.mark.parametrize(
    "change",
    [{"foils": "a blue square"}, {"foils": {"colour": ""}}, {"foils": {"colour": 3}}, {"caption": ["a", "b"]}],
)
def test_foil_rows_are_checked(tmp_path, change):
    """Foils are texts by kind, and a foil row has one caption."""
    good = {"image": "a.png", "caption": "a red square", "foils": {"colour": "a blue square"}}
    path = one_picture(tmp_path, good)
    assert read_rows([path], "foils")[0]["foils"] == {"colour": "a blue square"}
    path = one_picture(tmp_path, good, good | change)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: "):
        read_rows([path], "foils")
    without = {"image": "a.png", "caption": "a red square"}
    with pytest.raises(ValueError, match=r"expected.*foils"):
        read_rows([one_picture(tmp_path, without)], "foils")


GOOD = {
    "grounding": {"image": "a.png", "text": "a red square", "boxes": [[0, 0, 12, 8]], "proposals": [[12, 8, 12, 8]]},
    "phrases": {"image": "a.png", "text": "a red square"},
    "vqa": {"image": "a.png", "question": "what colour is it?", "answers": {"red": 1, "dark red": 0.3, "blue": 0}},
    "reasoning": {"images": ["a.png", "a.png"], "text": "both show a square", "label": True},
    "entailment": {"image": "a.png", "text": "it is red", "label": "neutral"},
}


@pytest.mark.parametrize("task", GOOD)
def test_rows_of_every_task_can_be_read(tmp_path, task):
    """Paths are made full and everything else is kept, further keys too."""
    (row,) = read_rows([one_picture(tmp_path, GOOD[task] | {"group": "g", "type": "colour"})], task, check="full")
    full = str(tmp_path / "a.png")
    paths = {"images": [full, full]} if task == "reasoning" else {"image": full}
    assert row == GOOD[task] | {"group": "g", "type": "colour"} | paths
    assert pictures_of(row) == ([full, full] if task == "reasoning" else [full])


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("vqa", {"answers": {}}, "answers is {}: expected"),
        ("vqa", {"answers": {"red": 1.5}}, "answers is {'red': 1.5}: expected"),
        ("vqa", {"answers": {"red": 1.0, "blue": -0.1}}, "score from 0 to 1"),
        ("vqa", {"answers": {"red": "1.0"}}, "score from 0 to 1"),
        ("vqa", {"answers": {"red": True}}, "score from 0 to 1"),
        ("vqa", {"answers": {"red": float("nan")}}, "score from 0 to 1"),
        ("vqa", {"answers": "red"}, "answers is 'red': expected"),
        ("vqa", {"answers": ["red"]}, "answers is ['red']: expected"),
        ("vqa", {"question": "  "}, "expected a text that is not empty"),
        ("vqa", {"question": 3}, "expected a text that is not empty"),
        ("vqa", {"image": ["a.png"]}, "image is ['a.png']: expected a path"),
        ("reasoning", {"images": ["a.png"] * 3}, "expected a list of one or two paths"),
        ("reasoning", {"images": []}, "expected a list of one or two paths"),
        ("reasoning", {"images": "a.png"}, "expected a list of one or two paths"),
        ("reasoning", {"images": ["a.png", 3]}, "expected a list of one or two paths"),
        ("reasoning", {"label": "yes"}, "label is 'yes': expected true or false"),
        ("reasoning", {"label": "true"}, "label is 'true': expected true or false"),
        ("reasoning", {"label": 1}, "label is 1: expected true or false"),
        ("reasoning", {"text": ""}, "expected a text that is not empty"),
        ("entailment", {"label": "maybe"}, "label is 'maybe': expected entailment, neutral, contradiction"),
        ("entailment", {"label": None}, "label is None: expected"),
        ("entailment", {"label": ["neutral"]}, "label is ['neutral']: expected"),
        ("entailment", {"text": ["it is red"]}, "expected a text that is not empty"),
        ("phrases", {"text": " "}, "expected a text that is not empty"),
        ("phrases", {"text": None}, "expected a text that is not empty"),
        ("grounding", {"boxes": [[0, 0, 12]]}, "at least one, none of them empty"),
        ("grounding", {"proposals": [[0, 0, 0, 8]]}, "at least one, none of them empty"),
        ("grounding", {"proposals": "all"}, "at least one, none of them empty"),
    ],
)
def test_rows_of_every_task_are_checked(tmp_path, task, change, says):
    """With file and line, in one sentence; and the same row is left out under skip_bad."""
    path = one_picture(tmp_path, GOOD[task], "", GOOD[task] | change)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        read_rows([path], task)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)
    assert len(read_rows([path], task, skip_bad=True)) == 1


@pytest.mark.parametrize(("task", "key"), [(task, key) for task in GOOD for key in GOOD[task] if key != "proposals"])
def test_a_row_of_a_task_that_lacks_a_key_is_told_what_it_needs(tmp_path, task, key):
    """Every key but the proposals is needed."""
    wrong = {name: value for name, value in GOOD[task].items() if name != key}
    path = one_picture(tmp_path, GOOD[task], wrong)
    with pytest.raises(ValueError) as error:
        read_rows([path], task)
    assert str(error.value).startswith(f"{path}:2: found the keys {sorted(wrong)}: expected ")
    assert f'"{key}": ' in str(error.value)


@pytest.mark.parametrize("task", GOOD)
def test_an_empty_file_of_a_task_is_one_sentence(tmp_path, task):
    """A download that broke off before the first line."""
    path = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=re.escape(f"no rows in {path}: expected one JSON object a line")):
        read_rows([path], task)


@pytest.mark.parametrize("name", ["boxes", "proposals"])
def test_boxes_must_lie_inside_their_picture(tmp_path, name):
    """The picture of 24 x 16 and the box are named; one that touches the edges is inside."""
    for box, fits in (([0, 0, 24, 16], True), ([12, 0, 13, 8], False), ([0, 8, 12, 8.5], False)):
        path = one_picture(tmp_path, GOOD["grounding"] | {name: [[0, 0, 1, 1], box]})
        if fits:
            assert read_rows([path], "grounding")[0][name][1] == box
        else:
            with pytest.raises(
                ValueError, match=re.escape(f"a.png: the box {box} reaches outside the picture of 24 x 16")
            ):
                read_rows([path], "grounding")


def test_a_box_whose_place_is_no_number_is_refused(tmp_path):
    """JSON as Python writes it may hold NaN."""
    path = one_picture(tmp_path, GOOD["grounding"] | {"boxes": [[0, float("nan"), 5, 5]]})
    with pytest.raises(ValueError, match="boxes is"):
        read_rows([path], "grounding")


@pytest.mark.parametrize("extra", [3, ["b.png"]])
def test_a_further_key_of_the_name_images_changes_nothing(tmp_path, extra):
    """More keys are allowed and kept."""
    path = one_picture(tmp_path, {"image": "a.png", "caption": "a square", "images": extra})
    (row,) = read_rows([path], "pairs")
    assert row["image"] == str(tmp_path / "a.png") and row["images"] == extra


def test_the_number_of_bad_rows_is_told(tmp_path):
    """Who mends the first of three bad rows wants to know that there are two more."""
    path = one_picture(tmp_path, "{", {"image": "a.png", "caption": "a square"}, {"image": "a.png"}, "[]")
    with pytest.raises(ValueError, match="3 bad rows"):
        read_rows([path], "pairs")


def test_a_missing_file_is_one_sentence(tmp_path):
    """The built-in world may not have been made yet: the message says how to make it."""
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'none.jsonl'} is not a file")):
        read_rows([tmp_path / "none.jsonl"], "pairs")
    with pytest.raises(ValueError, match=re.escape("python -m world.scenes --out data/scenes")):
        read_rows([tmp_path / "data" / "scenes" / "pairs_train.jsonl"], "pairs")
    with pytest.raises(ValueError, match="no rows in"):
        read_rows([write_rows(tmp_path / "empty.jsonl", [""])], "pairs")


def test_missing_pictures_are_counted_and_the_first_ten_named(tmp_path):
    """Each picture once, although several rows show it."""
    rows = [{"image": f"gone/{i // 2:02d}.png", "caption": "a square"} for i in range(24)]
    path = one_picture(tmp_path, {"image": "a.png", "caption": "a square"}, *rows)
    with pytest.raises(ValueError) as error:
        read_rows([path], "pairs")
    message = str(error.value)
    assert message.startswith("12 of 13 pictures")
    assert re.findall(r"gone/(\d\d)\.png: missing", message) == [f"{i:02d}" for i in range(10)]
    assert "--skip-bad" in message


def test_corrupt_pictures_are_found_by_header_and_by_full_check(tmp_path):
    """A file that is no picture is found at once; one that breaks off only when everything is decoded."""
    path = one_picture(tmp_path, *({"image": f"{name}.png", "caption": "a square"} for name in ("a", "text", "broken")))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:3000])
    (tmp_path / "text.png").write_text("this is no picture")
    with pytest.raises(ValueError, match=r"1 of 3 pictures") as error:
        read_rows([path], "pairs")
    assert "text.png" in str(error.value) and "broken.png" not in str(error.value)
    with pytest.raises(ValueError, match=r"2 of 3 pictures") as error:
        read_rows([path], "pairs", check="full")
    assert "text.png" in str(error.value) and "broken.png" in str(error.value)
    with pytest.raises(ValueError, match=r"broken\.png cannot be decoded.*--check full"):
        load_image(tmp_path / "broken.png")


def test_a_full_check_finds_what_the_use_would_stop_at(tmp_path, monkeypatch):
    """An EXIF block that cannot be read comes through decoding, but not through turning the picture."""
    path = one_picture(tmp_path, {"image": "a.png", "caption": "a square"})

    def broken(image):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    monkeypatch.setattr(PngImageFile, "getexif", broken)
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded \(not a TIFF file\)"):
        load_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"1 of 1 pictures.*\n.*not a TIFF file"):
        read_rows([path], "pairs", check="full")


def test_an_orientation_that_there_is_not_turns_neither_size_nor_picture(tmp_path):
    for number in range(12):
        exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([number]) + b"\0\0\0\0\0\0\0"
        square(3).save(tmp_path / "a.jpg", exif=exif)
        assert load_image(tmp_path / "a.jpg").size == size_of(tmp_path / "a.jpg"), number
        assert (size_of(tmp_path / "a.jpg") == (16, 24)) == (number in (5, 6, 7, 8))


def test_a_postscript_file_is_no_picture_whatever_it_is_called(tmp_path):
    """Pillow would hand it to Ghostscript."""
    path = one_picture(tmp_path, {"image": "a.png", "caption": "a square"})
    square(3).save(tmp_path / "a.png", format="EPS")
    with pytest.raises(ValueError, match="1 of 1 pictures"):
        read_rows([path], "pairs")
    with pytest.raises(ValueError, match="cannot be decoded"):
        load_image(tmp_path / "a.png")


def test_skip_bad_leaves_out_and_counts(tmp_path, capsys):
    """Bad rows and rows whose picture is missing are counted apart; what is good stays in its order."""
    good = [{"image": "a.png", "caption": text} for text in ("one", "two", "three")]
    gone = {"image": "gone.png", "caption": "a square"}
    path = one_picture(tmp_path, good[0], "{", gone, good[1], {"image": "a.png"}, gone, gone, good[2])
    rows = read_rows([path], "pairs", skip_bad=True)
    assert [row["caption"] for row in rows] == ["one", "two", "three"]
    assert "2 bad rows and 3 rows whose picture" in capsys.readouterr().out
    assert len(read_rows([one_picture(tmp_path, *good)], "pairs", skip_bad=True)) == 3
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="no rows in"):
        read_rows([one_picture(tmp_path, gone)], "pairs", skip_bad=True)


def test_twins_of_different_files_are_not_mixed(tmp_path):
    """Two files may both count their twins from 0."""
    one = write_squares(tmp_path / "one" / "pairs.jsonl", 4, twins=4)
    two = write_squares(tmp_path / "two" / "pairs.jsonl", 4, twins=4)
    rows = read_rows([one, two], "pairs")
    assert len(rows) == 8
    names = [row["twin"] for row in rows]
    assert sorted(Counter(names).values()) == [2, 2, 2, 2]
    assert all(names[i] == names[i + 1] for i in range(0, 8, 2))
    assert sorted(len(group) for group in TwinBatches(rows, 4).kinds[0]) == [2, 2, 2, 2]


def test_a_row_without_a_twin_may_say_so(tmp_path):
    """`"twin": null` is what a table with an empty cell becomes: such rows are not twins of each other."""
    rows = [{"image": "a.png", "caption": "a square", "twin": twin} for twin in (None, 0, None, 0, None, "")]
    groups = TwinBatches(read_rows([one_picture(tmp_path, *rows)], "pairs"), 2).kinds[0]
    assert sorted(map(sorted, groups)) == [[0], [1, 3], [2], [4], [5]]


def test_a_file_from_a_windows_editor_can_be_read(tmp_path):
    """It begins with a byte order mark, and its lines end in another way."""
    path = one_picture(tmp_path)
    lines = '{"image": "a.png", "caption": "a café"}', '{"image": "a.png", "caption": "two"}', ""
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert [row["caption"] for row in read_rows([path], "pairs")] == ["a café", "two"]


# ----------------------------------------------------------------------------------------------------------- pictures


def pixel(path: Path, x: int = 0, y: int = 0) -> tuple[int, int, int]:
    """Load a picture and look at one pixel of it."""
    image = load_image(path)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def with_palette(**info) -> Image.Image:
    """A palette picture of two columns: entry 0 is red, entry 1 is blue."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.info.update(info)
    return image


def grey16(values: list[int]) -> Image.Image:
    """A grey picture of 16 bits and one row."""
    return Image.fromarray(np.array([values], dtype=np.uint16))


WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)
PICTURES = {
    "RGB": (Image.new("RGB", (2, 1), (1, 2, 3)), [(1, 2, 3)]),
    "RGBA, clear": (Image.new("RGBA", (2, 1), (0, 0, 0, 0)), [WHITE]),
    "RGBA, half": (Image.new("RGBA", (2, 1), (255, 0, 0, 128)), [(255, 127, 127)]),
    "RGBA, solid": (Image.new("RGBA", (2, 1), (0, 0, 255, 255)), [BLUE]),
    "P": (with_palette(), [RED, BLUE]),
    "P, first entry clear": (with_palette(transparency=0), [WHITE, BLUE]),
    "P, half clear": (with_palette(transparency=bytes([255, 0])), [RED, WHITE]),
    "L": (Image.new("L", (2, 1), 77), [(77, 77, 77)]),
    "LA, clear": (Image.new("LA", (2, 1), (0, 0)), [WHITE]),
    "LA, solid": (Image.new("LA", (2, 1), (77, 255)), [(77, 77, 77)]),
    "CMYK": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), [RED]),
    "16 bit": (grey16([65535, 0]), [WHITE, (0, 0, 0)]),
    "16 bit, middle": (grey16([32896, 65535]), [(128, 128, 128), WHITE]),
    "16 bit, nearly black": (grey16([255, 0]), [(1, 1, 1), (0, 0, 0)]),
    "1 bit": (Image.fromarray(np.array([[True, False]])), [WHITE, (0, 0, 0)]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_every_mode_become_rgb(tmp_path, name):
    """Transparency is laid on white, and no mode ends in black, in a crash or in a wrong brightness."""
    image, expected = PICTURES[name]
    path = tmp_path / ("a.tiff" if image.mode == "CMYK" else "a.png")
    image.save(path)
    with Image.open(path) as file:
        assert file.mode[0] == image.mode[0], "the file does not hold the mode that is to be tested"
    for x, colour in enumerate(expected):
        assert np.abs(np.subtract(pixel(path, x), colour)).max() <= 1


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (2, (1, 0)), (3, (1, 1)), (4, (0, 1)), (6, (1, 0)), (8, (0, 1))]
)
def test_pictures_are_turned_as_exif_says(tmp_path, orientation, corner):
    """A camera writes the picture as it lay on the chip: the red corner must come out where the viewer sees it."""
    image = Image.new("RGB", (24, 16), "white")
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    turned = load_image(tmp_path / "a.png")
    assert turned.size == ((16, 24) if orientation in (6, 8) else (24, 16))
    x, y = corner
    places = {
        (i, j): turned.getpixel((i * (turned.width - 1), j * (turned.height - 1))) for i in (0, 1) for j in (0, 1)
    }
    assert [place for place, colour in places.items() if colour == RED] == [(x, y)]


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    """A GIF with three frames is one picture."""
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as file:
        assert file.n_frames == 3
    assert pixel(tmp_path / "a.gif") == RED


def test_image_size_is_height_and_width(tmp_path):
    """A picture that is wider than high stays so: nothing is turned or mirrored on the way to the tensor."""
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    image.paste((255, 0, 0), (0, 0, 20, 10))
    image.paste((0, 0, 0), (20, 10, 40, 20))
    for size in ((10, 20), (30, 20), (20, 40)):
        tensor = to_tensor(image, size)
        assert tensor.shape == (3, *size) and tensor.dtype == torch.float32
        corners = tensor[:, [1, 1, -2, -2], [1, -2, 1, -2]].T  # top left, top right, bottom left, bottom right
        expected = torch.tensor([[1.0, -1, -1], [1, 1, 1], [1, 1, 1], [-1, -1, -1]])
        assert torch.allclose(corners, expected, atol=0.05)
        assert tensor.min() >= -1 and tensor.max() <= 1


def test_photo_augmentation_crops_and_tints_and_never_flips():
    """Red grows from left to right and green from top to bottom, in every crop: "left of" stays true."""
    ramp = np.zeros((48, 64, 3), dtype=np.uint8)
    ramp[:, :, 0] = np.linspace(20, 200, 64)[None, :]
    ramp[:, :, 1] = np.linspace(20, 200, 48)[:, None]
    image, areas, means, spans = Image.fromarray(ramp), [], [], []
    for seed in range(200):
        crop = photo(image, np.random.default_rng(seed))
        assert crop.mode == "RGB" and crop.width <= 64 and crop.height <= 48
        pixels = np.asarray(crop).astype(int)
        assert pixels[:, -1, 0].mean() > pixels[:, 0, 0].mean() + 20
        assert pixels[-1, :, 1].mean() > pixels[0, :, 1].mean() + 20
        areas.append(crop.width * crop.height / (64 * 48))
        means.append(pixels.mean())
        spans.append((crop.width / 64, crop.height / 48))
    assert 0.48 <= min(areas) < 0.6 and 0.95 < max(areas) <= 1
    assert max(means) / min(means) > 1.3
    assert len(set(spans)) > 100 and any(w < h for w, h in spans) and any(w > h for w, h in spans)


def test_photo_augmentation_changes_brightness_and_contrast():
    """Of fine stripes every crop is alike, so what differs is the tint: the mean by 30 %, the step by up to 69 %."""
    stripes = np.full((40, 40, 3), 80, dtype=np.uint8)
    stripes[:, ::2] = 120
    crops = [np.asarray(photo(Image.fromarray(stripes), np.random.default_rng(seed))) for seed in range(200)]
    means = [crop.mean() for crop in crops]
    steps = [float(crop.max()) - float(crop.min()) for crop in crops]
    assert 68 <= min(means) < 74 and 126 < max(means) <= 132
    assert 18 <= min(steps) < 24 and 60 < max(steps) <= 69
    assert len({round(step / mean, 2) for step, mean in zip(steps, means, strict=True)}) > 15


def test_augmentation_keeps_the_shape_and_is_off_by_default(tmp_path):
    """The tensor has the model's size with and without; without, it is the picture itself."""
    rows = read_rows([write_squares(tmp_path / "pairs.jsonl", 4)], "pairs")
    plain = dataset(rows)[0, 1]["images"]
    assert torch.equal(plain, to_tensor(square(1), (16, 24)))
    for kind in ("photo", "aerial", "photo-strong", "drawing"):
        samples = dataset(rows, augment=kind)
        seen = [samples[epoch, 1]["images"] for epoch in (0, 1, 0)]
        assert seen[0].shape == plain.shape == (3, 16, 24) and seen[0].min() >= -1 and seen[0].max() <= 1
        assert not torch.equal(seen[0], plain) and not torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], seen[2]), "the same visit, the same picture"


def test_aerial_augmentation_turns_a_photograph_in_all_eight_ways():
    """A picture whose four corners differ, neither square nor high: which corner is where, and what shape comes out."""
    corners = np.zeros((20, 40, 3), dtype=np.uint8)
    corners[:10, :20], corners[:10, 20:], corners[10:, :20] = 60, 120, 180
    seen = set()
    for seed in range(200):
        turned = np.asarray(aerial(Image.fromarray(corners), np.random.default_rng(seed)))[..., 0]
        ends = [turned[y, x] for y in (0, -1) for x in (0, -1)]
        if len(set(ends)) == 4:  # the crop holds a part of each
            seen.add((*np.argsort(ends), turned.shape[0] < turned.shape[1]))
    assert len(seen) == 8 and sum(wide for *_, wide in seen) == 4


def test_strong_augmentation_mixes_colours_and_blanks_rectangles():
    """A plain red picture of 16 x 32: how often and how large the grey rectangle is, and how the red around it varies;
    the picture handed in stays as it is."""
    red = torch.tensor([0.5, -0.5, -0.5]).view(3, 1, 1).expand(3, 16, 32).clone()
    before, holes, colours = red.clone(), [], []
    for seed in range(400):
        seen = strong(red, np.random.default_rng(seed))
        hole = (seen == 0).all(dim=0)
        heights, widths = hole.any(dim=1).sum().item(), hole.any(dim=0).sum().item()
        assert hole.sum() == heights * widths, "one full rectangle"
        holes.append((heights, widths))
        around = seen[:, ~hole]
        assert (around == around[:, :1]).all(), "the rest has one colour"
        colours.append(tuple(around[:, 0].tolist()))
    assert torch.equal(red, before)
    sizes = [size for size in holes if size != (0, 0)]
    assert 160 < len(sizes) < 240
    assert {height for height, _ in sizes} == set(range(2, 8)) and {width for _, width in sizes} == set(range(4, 16))
    mixed = [colour for colour in colours if colour != (0.5, -0.5, -0.5)]
    assert 290 < len(mixed) < 350 and 0.04 < np.std(mixed, axis=0).min() < np.std(mixed, axis=0).max() < 0.1


def test_drawing_augmentation_moves_recolours_and_outlines_on_white():
    """A red disc on white, left of the middle: it moves, changes size and colour, is outlined; white stays white; and
    on average the disc stays where it was."""
    y, x = np.mgrid[:40, :60]
    disc = np.full((40, 60, 3), 255, dtype=np.uint8)
    disc[(x - 20) ** 2 + (y - 20) ** 2 < 100] = (220, 40, 40)
    places, sizes, colours, edges = [], [], [], []
    for seed in range(200):
        pixels = np.asarray(drawing(Image.fromarray(disc), np.random.default_rng(seed))).astype(int)
        assert pixels.shape == disc.shape and (pixels[0, -3:] == 255).all()
        there = pixels.min(axis=2) < 225
        places.append((x[there].mean(), y[there].mean()))
        sizes.append(there.sum())
        column, row = map(round, places[-1])
        colours.append(tuple(pixels[row, column]))
        edges.append(pixels.sum(axis=2).min() < 0.6 * pixels[row, column].sum())
    means, spread = np.mean(places, axis=0), np.std(places, axis=0)
    assert abs(means[0] - 20) < 2 and abs(means[1] - 20) < 1.5 and min(spread) > 1.5
    assert min(sizes) < 240 and max(sizes) > 420  # 314 as it was drawn
    assert len(set(colours)) > 150 and any(max(c) - min(c) < 4 for c in colours), "some are grey"
    assert 50 < sum(edges) < 150, "about half have an outline darker than their inside"


@pytest.mark.parametrize("width", [24, 104, 400])
def test_boxes_augmentation_puts_three_boxes_in_any_order(width):
    """What is between them stays, each box is whole, all six orders come about equally often, and what was given is
    as it was: it is kept for the next epoch."""
    pixels = torch.randint(256, (3, 10, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, box, step, orders = pixels.clone(), width // 4, 3 * width // 8, Counter()
    for seed in range(300):
        moved = shuffle_boxes(pixels, np.random.default_rng(seed))
        assert moved.shape == pixels.shape and moved.dtype == torch.uint8 and torch.equal(pixels, before)
        for gap in (box, step + box):
            assert torch.equal(moved[:, :, gap : gap + width // 8], pixels[:, :, gap : gap + width // 8])
        shown = [moved[:, :, place * step : place * step + box] for place in range(3)]
        given = [pixels[:, :, place * step : place * step + box] for place in range(3)]
        orders[tuple([torch.equal(part, one) for one in given].index(True) for part in shown)] += 1
        assert torch.equal(moved, shuffle_boxes(pixels, np.random.default_rng(seed)))
    assert orders.keys() == set(permutations(range(3))) and min(orders.values()) > 25, orders


def test_boxes_augmentation_belongs_to_seed_epoch_and_row(tmp_path):
    """And every visit starts from the picture in the file, not from the last visit's."""
    rows = read_rows([write_squares(tmp_path / "pairs.jsonl", 4)], "pairs")
    plain = to_tensor(square(2), (16, 24))
    parts = sorted(plain[:, :, place : place + 6].numpy().tobytes() for place in (0, 9, 18))
    data, orders = dataset(rows, augment="boxes"), {}
    for key in [(epoch, row) for epoch in range(30) for row in (2, 3)]:
        seen = data[key]["images"]
        assert torch.equal(seen, dataset(rows, augment="boxes")[key]["images"])
        orders[key] = [seen[:, :, place : place + 6].numpy().tobytes() for place in (0, 9, 18)]
        if key[1] == 2:
            assert sorted(orders[key]) == parts
    other = dataset(rows, 1, "boxes")
    both = [
        [data[epoch, 2]["images"] for epoch in range(30)],
        [data[epoch + 1, 2]["images"] for epoch in range(30)],
        [other[epoch, 2]["images"] for epoch in range(30)],
    ]
    for one, another in combinations(both, 2):
        assert not all(map(torch.equal, one, another))


@pytest.mark.parametrize("width", [20, 12, 401, 399])
def test_boxes_of_a_width_that_is_no_multiple_of_8_are_one_sentence(width):
    with pytest.raises(ValueError, match=f"--augment boxes .* width is {width}: use a multiple of 8") as error:
        shuffle_boxes(torch.zeros(3, 8, width, dtype=torch.uint8), np.random.default_rng(0))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------ randomness belongs to the sample


def dataset(rows: list[dict], seed: int = 0, augment: str = "none", max_tokens: int = 16) -> Pairs:
    """Training samples for pictures of 2 x 3 patches."""
    tokenizer = Tokenizer.build(text for row in rows for text in captions_of(row))
    config = Config(image_size=(16, 24), patch_size=8, max_tokens=max_tokens)
    return Pairs(rows, tokenizer, config, augment, seed)


def equal(one: dict, other: dict) -> bool:
    """Whether two samples or batches hold the same."""
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one
    )


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    """22 rows, some of them twins, some with a list of captions."""
    return read_rows([write_squares(tmp_path / "pairs.jsonl", 22, twins=10, several=True)], "pairs")


def test_a_sample_is_a_function_of_seed_epoch_and_row(rows):
    """Noise, caption and augmentation are the same at every visit with the same key, and change with every part."""
    one = dataset(rows, seed=1, augment="photo")
    sample = one[2, 3]
    one[0, 0]  # what was read before must not matter
    assert equal(sample, one[2, 3])
    assert equal(sample, dataset(rows, seed=1, augment="photo")[2, 3])
    for other in (one[3, 3], one[2, 4], dataset(rows, seed=2, augment="photo")[2, 3]):
        for name in ("images", "patch_noise", "token_noise", "replace_noise"):
            assert not torch.equal(sample[name], other[name]), name


def test_noise_is_uniform_and_has_a_value_for_every_patch_and_token(rows):
    """The masks are ranks of this noise: it must have no pattern. Patches, tokens and replacements do not share any."""
    samples = [dataset(rows)[epoch, row] for epoch in range(10) for row in range(22)]
    for name, length in (("patch_noise", 6), ("token_noise", 16), ("replace_noise", 16)):
        noise = torch.stack([sample[name] for sample in samples])
        assert noise.shape == (220, length)
        assert noise.min() >= 0 and noise.max() < 1
        assert (noise.mean(dim=0) - 0.5).abs().max() < 0.1
        assert len(noise.unique()) > 0.99 * noise.numel()
    one = samples[0]
    assert len(torch.cat([one["patch_noise"], one["token_noise"], one["replace_noise"]]).unique()) == 38


def test_a_list_of_captions_gives_one_at_random_and_all_over_the_epochs(rows):
    """Row 3 has three captions: each visit shows one, with its own ids, and each comes about equally often."""
    data, seen = dataset(rows), Counter()
    texts = captions_of(rows[3]) + captions_of(rows[6])
    id_of = {text: stable_id(str(data.tokenizer.encode(text, 16))) for text in texts}
    by_id = {one: text for text, one in id_of.items()}
    for epoch in range(90):
        sample = data[epoch, 3]
        text = by_id[sample["caption_id"]]
        assert sample["input_ids"] == data.tokenizer.encode(text, 16)
        seen[text] += 1
    assert len(seen) == 3 and min(seen.values()) > 15
    places = [
        [[id_of[text] for text in captions_of(rows[row])].index(data[epoch, row]["caption_id"]) for row in (3, 6)]
        for epoch in range(60)
    ]
    assert 5 < sum(one == other for one, other in places) < 35, "each row is to draw on its own"


def test_ids_tell_equal_pictures_and_captions_from_different_ones(rows):
    """The losses leave out pairs of the same picture or caption by these numbers."""
    one = dataset([rows[1], rows[1] | {"image": rows[2]["image"]}, rows[1] | {"caption": "another text"}])
    first, other_image, other_caption = one[0, 0], one[0, 1], one[0, 2]
    assert first["caption_id"] == other_image["caption_id"] and first["image_id"] != other_image["image_id"]
    assert first["image_id"] == other_caption["image_id"] and first["caption_id"] != other_caption["caption_id"]
    assert 0 <= stable_id("a red square") < 2**63
    assert stable_id("a red square") == 666931742951634193, "another process, or another run, must find the same number"


SPELLED = {  # what the tokenizer cannot tell apart
    "case": ("a red circle", "A Red circle"),
    "blanks": ("a red circle", " a  red\tcircle"),
    "composed": ("a caf\u00e9", "a cafe\u0301"),
    "cut": ("one two three four five", "one two three four six"),
}


@pytest.mark.parametrize("name", SPELLED)
def test_texts_of_the_same_tokens_are_one_text(rows, name):
    """In a batch of pairs, of a task, and of one's own: neither is the other's negative."""
    one, other = SPELLED[name]
    tokenizer = Tokenizer.build([text for texts in SPELLED.values() for text in texts])
    config = MAMOConfig(vocab_size=len(tokenizer), image_size=(16, 24), patch_size=8, max_tokens=6)
    three = [rows[i] | {"caption": text} for i, text in enumerate((one, other, "another"))]
    pairs = Collate(0)([Pairs(three, tokenizer, config)[0, i] for i in range(3)])
    own = make_batch([row["image"] for row in three], [one, other, "another"], config, tokenizer)
    task = TaskRows(three, HeadConfig("retrieval"), tokenizer, config, "none", 0)
    for ids in (pairs["caption_id"], own["caption_id"], torch.tensor([task[0, i]["caption_id"][0] for i in range(3)])):
        assert ids[0] == ids[1] != ids[2]
    for batch in (pairs, own):
        assert same_pairs(batch)[0, 1] and not same_pairs(batch)[0, 2]


@pytest.fixture
def several_paths(tmp_path) -> list[str]:
    """Ways to one picture: as it is, through "..", a full path, a link to it, a link to its folder; then another."""
    for name in ("p/a.png", "p/b.png"):
        (tmp_path / "p").mkdir(exist_ok=True)
        square("ab".index(name[2])).save(tmp_path / name)
    (tmp_path / "link.png").symlink_to(tmp_path / "p" / "a.png")
    (tmp_path / "q").symlink_to(tmp_path / "p")
    return ["p/a.png", "p/../p/a.png", str(tmp_path / "p/a.png"), "link.png", "q/a.png", "p/b.png"]


def test_a_picture_is_one_whatever_path_leads_to_it(several_paths, tmp_path):
    """In a batch of pairs and of one's own; where it is not read through read_rows, too."""
    path = write_rows(tmp_path / "a.jsonl", [{"image": image, "caption": f"c {image}"} for image in several_paths])
    read = read_rows([path], "pairs")
    assert len({row["image"] for row in read}) == 2 and read[0]["image"] == str(tmp_path / "p/a.png")
    by_hand = [row | {"image": str(tmp_path / image)} for row, image in zip(read, several_paths, strict=True)]
    config = MAMOConfig(image_size=(16, 24), patch_size=8)
    own = make_batch([row["image"] for row in by_hand], [row["caption"] for row in by_hand], config)
    for some in (read, by_hand):
        ids = [dataset(some)[0, i]["image_id"] for i in range(6)]
        assert len(set(ids[:5])) == 1 and len(set(ids)) == 2
    assert len(set(own["image_id"][:5].tolist())) == 1 and len(set(own["image_id"].tolist())) == 2
    pairs = write_rows(
        tmp_path / "r.jsonl", [{"images": [a, "p/b.png"], "text": "x", "label": True} for a in several_paths[:5]]
    )
    assert {tuple(row["images"]) for row in read_rows([pairs], "reasoning")} == {
        (str(tmp_path / "p/a.png"), str(tmp_path / "p/b.png"))
    }


def test_what_has_no_path_in_the_file_system_is_a_missing_picture(tmp_path):
    """A null byte, half a letter, a link to itself."""
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    for image in ("a\0.png", "\ud800.png", "round.png"):
        path = write_rows(tmp_path / "a.jsonl", [{"image": image, "caption": "x"}])
        with pytest.raises(ValueError, match="1 of 1 pictures cannot be used"):
            read_rows([path], "pairs")


def test_ids_do_not_depend_on_where_the_data_lie(tmp_path):
    """So that a run that is taken up again elsewhere knows the pictures of its queue."""
    ids = []
    for folder in ("here", "there"):
        rows = read_rows([write_squares(tmp_path / folder / "pairs.jsonl", 8)], "pairs")
        ids.append([dataset(rows)[0, i]["image_id"] for i in range(8)])
    assert ids[0] == ids[1] and len(set(ids[0])) == 8


def test_batches_are_the_same_for_any_number_of_workers_and_after_resuming(rows):
    """Twelve batches, two and a half epochs, in one piece and from the fourth, seventh and twelfth on."""

    def batches(workers: int, first: int = 0) -> list[dict]:
        order = TwinBatches(rows, 4, seed=3, first=first)
        return list(islice(training_batches(dataset(rows, 3, "photo"), order, Collate(0), workers), 12 - first))

    straight = batches(0)
    assert TwinBatches(rows, 4, seed=3).batches_per_epoch == 5
    for workers in (1, 2):
        assert all(map(equal, straight, batches(workers)))
    for first in (4, 7, 11):
        for workers in (0, 2):
            rest = batches(workers, first)
            assert len(rest) == 12 - first and all(map(equal, straight[first:], rest))
    assert not any(equal(straight[0], batch) for batch in straight[1:])


def test_noise_does_not_depend_on_the_other_captions_of_the_batch(rows):
    """A longer neighbour adds padding to a row and changes nothing else in it."""
    data = dataset(rows)
    short, other = data[0, 1], data[0, 2]
    long = data[0, 3] | {"input_ids": list(range(14))}
    alone, beside = Collate(0)([short, other]), Collate(0)([short, long])
    length = alone["input_ids"].shape[1]
    assert beside["input_ids"].shape[1] == 14 > length
    for name in PER_SAMPLE:
        assert torch.equal(alone[name][0], beside[name][0]), name
    for name in PER_TOKEN:
        assert beside[name].shape == (2, 14)
        assert torch.equal(alone[name][0], beside[name][0, :length]), name
    assert torch.equal(alone["token_noise"][0], short["token_noise"][:length])
    assert torch.equal(alone["replace_noise"][0], short["replace_noise"][:length])


def test_padding_goes_to_the_longest_caption():
    """True marks the real tokens; padding is after them and has its own id."""
    input_ids, attention_mask = pad([[5, 6, 7], [8], [9, 10]], 3)
    assert input_ids.tolist() == [[5, 6, 7], [8, 3, 3], [9, 10, 3]]
    assert attention_mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert input_ids.dtype == torch.long and attention_mask.dtype == torch.bool


def test_truncated_captions_are_counted():
    """[CLS] and [SEP] count as tokens; every caption of a list counts; one that just fits is not cut."""
    texts = ["one two three", "one two three four", "one two three four five", "one"]
    words = ["one", "two", "three", "four", "five"]
    tokenizer = Tokenizer.build(words * 2)
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert lengths == [5, 6, 7, 3]
    assert [count_truncated(texts, tokenizer, limit) for limit in (7, 6, 5, 4, 3, 2)] == [0, 1, 2, 3, 3, 4]


def test_a_large_jpeg_is_scaled_while_it_is_decoded_and_looks_the_same(tmp_path, monkeypatch):
    """Within a few grey levels of decoding all of it, turned or not; small ones and PNGs to the last bit."""
    drafted, draft = [], JpegImageFile.draft
    monkeypatch.setattr(
        JpegImageFile, "draft", lambda file, mode, size: (drafted.append(draft(file, mode, size)), file.size)[1]
    )
    noise = np.random.default_rng(0).integers(0, 255, (20, 10, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((600, 1200), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for name, exif in (("a.jpg", None), ("turned.jpg", turned)):
        large.save(tmp_path / name, quality=95, **({"exif": exif} if exif else {}))
        scaled, whole = (to_pixels(one, (32, 48)).float() for one in (tmp_path / name, load_image(tmp_path / name)))
        assert drafted[-1] is not None and load_image(tmp_path / name, 48).size[0] < 600
        assert (scaled - whole).abs().mean() < 1 and (scaled - whole).abs().max() < 12
    for name, size in (("b.jpg", (90, 90)), ("c.png", (1200, 1200)), ("d.jpg", (1200, 90))):
        large.resize(size).save(tmp_path / name)
        assert torch.equal(to_pixels(tmp_path / name, (32, 48)), to_pixels(load_image(tmp_path / name), (32, 48)))


# ----------------------------------------------------------------------------------------------------- batches of twins


def groups_of(*sizes: int) -> list[dict]:
    """Rows of twin groups of these sizes, spread over the file so that twins are not neighbours."""
    rows = [{"twin": f"group {number}"} for number, size in enumerate(sizes) for _ in range(size)]
    for row in rows:
        if sizes[int(row["twin"].split()[1])] == 1 and len(row["twin"]) % 2:
            del row["twin"]  # a row alone may have no twin key at all
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i] for i in order]


MIXES = {
    "singles": groups_of(*[1] * 30),
    "pairs": groups_of(*[2] * 16),
    "fours": groups_of(*[4] * 9),
    "mixed": groups_of(*[1, 2, 3, 4] * 12),
    "threes and fives": groups_of(*[3, 5] * 8),
}


@pytest.mark.parametrize("name", MIXES)
def test_twins_stay_together_and_batches_are_full(name):
    """In every epoch: full parts of 8 rows, none twice, as many as there are, and with a row all its twins, but for the
    group at the end of the epoch and one for which no room is left."""
    rows = MIXES[name]
    batches, alone = TwinBatches(rows, 16, seed=1, parts=2), Counter(row.get("twin") for row in rows)
    for epoch in range(6):
        found = batches.epoch(epoch)
        assert found.shape == (len(rows) // 16, 16) and len(set(found.flatten().tolist())) == found.size
        cut = set()
        for part in found.reshape(-1, 8).tolist():
            there = Counter(rows[number]["twin"] for number in part if "twin" in rows[number])
            cut |= {twin for twin, count in there.items() if count < alone[twin]}
        assert len(cut) <= 2


def test_over_the_epochs_every_row_is_visited():
    """What does not fill the last batch of an epoch is not always the same: not even a row alone among pairs, or the
    only one of its size; and groups larger than a part are cut."""
    for rows in (*MIXES.values(), groups_of(*[2] * 60, 1), groups_of(4, *[2] * 61), groups_of(9, *[3] * 9, 20)):
        batches = TwinBatches(rows, 8, seed=1)
        seen = {number for epoch in range(150) for number in batches.epoch(epoch).flatten().tolist()}
        assert seen == set(range(len(rows)))


def test_order_differs_by_epoch_and_seed_and_is_the_same_for_the_same():
    """Two epochs do not show the same batches, and nobody sees the rows in the order of the file or of their sizes."""
    for name in ("mixed", "singles"):
        rows = MIXES[name]
        one = TwinBatches(rows, 8, seed=1).epoch(0)
        for seed, epoch in ((1, 1), (2, 0)):
            other = TwinBatches(rows, 8, seed=seed).epoch(epoch)
            assert len(set(map(frozenset, one.tolist())) & set(map(frozenset, other.tolist()))) <= 1
        assert np.array_equal(one, TwinBatches(rows, 8, seed=1).epoch(0))
        assert sorted(one.flatten()) != one.flatten().tolist()
    sizes = Counter(row.get("twin") for row in MIXES["mixed"])
    means = [
        np.mean([sizes[MIXES["mixed"][n]["twin"]] if "twin" in MIXES["mixed"][n] else 1 for n in batch])
        for epoch in range(20)
        for batch in TwinBatches(MIXES["mixed"], 8, seed=1).epoch(epoch)[:3].tolist()
    ]
    assert 2 < np.mean(means) < 3.8, "the first batches of an epoch must not be those of the largest groups"


@pytest.mark.parametrize("first", [1, 5, 6, 17])
def test_batches_from_a_given_one_on_continue_the_sequence(first):
    """In the middle of an epoch, at its end and in a later one."""
    rows = MIXES["mixed"]
    straight = list(islice(TwinBatches(rows, 8, seed=1), first + 9))
    assert straight[0] == [(0, number) for number in TwinBatches(rows, 8, seed=1).epoch(0)[0].tolist()]
    assert straight[first:] == list(islice(TwinBatches(rows, 8, seed=1, first=first), 9))
    epochs = [batch[0][0] for batch in straight]
    assert epochs == sorted(epochs) and straight[0][0][0] == 0


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_of_one(world):
    """Put together in order they see exactly the batches of one process, over epochs, and a group stays on one."""
    rows = groups_of(*[1, 2, 4] * 32)
    alone = list(islice(TwinBatches(rows, 32, seed=1, parts=4), 20))
    assert alone[-1][0][0] >= 2, "the test is to see several epochs"
    shares = [TwinBatches(rows, 32, seed=1, rank=rank, processes=world, parts=4) for rank in range(world)]
    assert {share.batches_per_epoch for share in shares} == {TwinBatches(rows, 32, seed=1, parts=4).batches_per_epoch}
    seen = [list(islice(share, 20)) for share in shares]
    for step, batch in enumerate(alone):
        assert [key for share in seen for key in share[step]] == batch
        for share in seen:
            numbers = {number for _, number in share[step]}
            assert len(numbers) == 32 // world
            twins = {
                i
                for i, row in enumerate(rows)
                if "twin" in row and row["twin"] in {rows[n].get("twin") for n in numbers}
            }
            assert twins <= numbers
    later = [TwinBatches(rows, 32, seed=1, first=5, rank=rank, processes=world, parts=4) for rank in range(world)]
    assert [list(islice(share, 4)) for share in later] == [share[5:9] for share in seen]


@pytest.mark.parametrize(
    ("rows", "batch_size", "parts", "says"),
    [
        (groups_of(*[1] * 10), 11, 1, "batch of 11 pairs is larger than the 10 rows.*--batch-size 10 or less"),
        (groups_of(*[1] * 10), 12, 4, "batch of 12 pairs is larger than the 10 rows.*--batch-size 8 or less"),
        (groups_of(*[1] * 10), 6, 4, "batch of 6 pairs in 4 parts cannot be shared by 1 processes"),
    ],
)
def test_a_batch_that_cannot_be_filled_is_one_sentence(rows, batch_size, parts, says):
    """The user learns before the first step, and learns what to change."""
    with pytest.raises(ValueError, match=says) as error:
        TwinBatches(rows, batch_size, parts=parts)
    assert "\n" not in str(error.value)


def test_the_built_in_world_can_be_read(tmp_path):
    """world/scenes.py writes what data.py reads: pairs with twins, and foils."""
    scenes = pytest.importorskip("world.scenes")
    scenes.main(["--out", str(tmp_path), "--train", "40", "--val", "4", "--test", "4"])
    rows = read_rows([tmp_path / "pairs_train.jsonl"], "pairs", check="full")
    assert len(rows) == 40
    batch = next(training_batches(dataset(rows, max_tokens=32), TwinBatches(rows, 8), Collate(0), 0))
    assert batch["images"].shape == (8, 3, 16, 24)
    foils = read_rows([tmp_path / "foils_test.jsonl"], "foils", check="full")
    assert foils and all(row["foils"] for row in foils)
    assert json.loads((tmp_path / "world.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_the_header_is_that_of_the_picture_as_it_is_loaded(tmp_path, orientation):
    """Pictures that EXIF turns by a quarter change sides."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    square(1).save(tmp_path / "turned.png", exif=exif)
    assert size_of(tmp_path / "turned.png") == load_image(tmp_path / "turned.png").size


def test_boxes_are_only_checked_where_the_task_asks_for_them(tmp_path):
    """Other tasks may have a key of that name: more keys are allowed and kept."""
    square(1).save(tmp_path / "a.png")
    rows = read_rows([write_rows(tmp_path / "a.jsonl", [{"image": "a.png", "caption": "a", "boxes": "none"}])], "pairs")
    assert rows[0]["boxes"] == "none"


@pytest.mark.parametrize("text", ["", " \n", "\u200b\u2060", "\u00ad", "\x00", "half \ud800", "\udc00"])
def test_a_text_of_which_nothing_is_seen_is_none(text):
    """Zero width, control characters, and half of a surrogate pair, which no file can hold."""
    assert not is_text(text) and is_text("a" + text.encode("utf-8", "ignore").decode())


def test_floats_from_0_to_1_are_a_picture():
    """Not black."""
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    seen = np.asarray(load_image(Image.fromarray(values)))[..., 0]
    np.testing.assert_allclose(seen, 255 * values, atol=1)
    np.testing.assert_allclose(np.asarray(load_image(Image.fromarray(200 * values)))[..., 0], 200 * values, atol=1)


def test_a_large_picture_is_made_small_before_it_is_augmented(monkeypatch, tmp_path):
    """To four times the size that is wanted: arithmetic on all of a photograph would take gigabytes."""
    Image.new("RGB", (3000, 2000), "red").save(tmp_path / "a.png")
    seen = []
    monkeypatch.setattr("data.photo", lambda image, rng: seen.append(image.size) or image)
    pictures = Pictures(tiny_config(), "photo", 1)
    assert pictures(str(tmp_path / "a.png"), np.random.default_rng(0)).shape == (3, 16, 24)
    assert seen == [(96, 64)]
