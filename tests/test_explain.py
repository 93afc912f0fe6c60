"""Heat maps against a loop over one pair at a time, the pointing game against counting by hand, and the commands."""

import json

import pytest
import torch
from conftest import tiny_batch, tiny_config, tiny_model
from helpers import caption, new_run, square, write_rows
from PIL import Image

import explain
from data import read_rows
from eval import load_model
from explain import check_layer, choose_layer, heat_maps, inside, middle_layer, patch_centres, phrase_rows, pointing
from mamo import record_attention
from tokenizer import Tokenizer

CPU = torch.device("cpu")
BOXES = ([0, 0, 12, 8], [12, 0, 12, 8], [0, 8, 12, 8], [12, 8, 12, 8])  # of the four corners of helpers.square


@pytest.fixture(scope="module")
def grounding(tmp_path_factory):
    """Twelve pictures of one square each, drawn at twice the size that the model sees, with the square's box."""
    folder, rows = tmp_path_factory.mktemp("grounding"), []
    for number in range(12):
        square(number).resize((48, 32)).save(folder / f"{number}.png")
        box = [2 * value for value in BOXES[number % 4]]
        rows.append({"image": f"{number}.png", "text": caption(number), "caption": caption(number), "boxes": [box]})
    write_rows(folder / "pairs.jsonl", rows)
    return write_rows(folder / "grounding.jsonl", rows)


@pytest.fixture(scope="module")
def checkpoint(grounding, tmp_path_factory):
    """A model of 2 x 3 patches and two fusion blocks, trained for a few steps."""
    run = new_run(grounding.with_name("pairs.jsonl"), tmp_path_factory.mktemp("run"), "--lr", "1e-2", "--steps", "12")
    run.train()
    return run.out / "checkpoint.pt"


# ----------------------------------------------------------------------------------------------------------- heat maps


def naive_heat(model, images, input_ids, real, rows) -> torch.Tensor:
    """The same map for each pair alone, without padding, number by number; gradients through retain_grad."""
    length = int(real.sum())
    image, text = model.encode_image(images), model.encode_text(input_ids[:, :length], real[:, :length])
    with record_attention(model.student.fusion) as recorded:
        logit = model.match(image, text, real[:, :length])
        for (attention,) in recorded:
            attention.retain_grad()
    logit.sum().backward()
    layers = []
    for (attention,) in recorded:
        heat = torch.zeros(model.config.patches)
        for head in range(attention.shape[1]):
            for token in range(min(length, attention.shape[2])):
                for patch in range(model.config.patches):
                    place = length + 1 + patch  # behind the text and the class token
                    look = attention[0, head, token, place], attention.grad[0, head, token, place]
                    if rows[0, token] and look[1] > 0:
                        heat[patch] += (look[0] * look[1]).detach() / attention.shape[1]
        layers.append(heat)
    return torch.stack(layers)


def test_heat_maps_equal_a_loop_over_pairs_heads_tokens_and_patches():
    """In a batch with captions of all lengths; no gradient is left in the model."""
    config = tiny_config(fusion_depth=3)
    model, batch = tiny_model(config).eval(), tiny_batch(config, b=4)
    real = batch["attention_mask"]
    rows = real.clone()
    rows[:, 2] = False  # a phrase need not be the whole text
    heat = heat_maps(model, batch["images"], batch["input_ids"], real, rows)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert heat.shape == (3, 4, config.patches) and not heat.requires_grad
    assert (heat >= 0).all() and (heat.amax(dim=2) > 0).any()
    for i in range(4):
        expected = naive_heat(
            model, batch["images"][i : i + 1], batch["input_ids"][i : i + 1], real[i : i + 1], rows[i : i + 1]
        )
        torch.testing.assert_close(heat[:, i], expected, rtol=1e-3, atol=1e-7)


def test_the_maps_belong_to_the_tokens_that_are_asked_for():
    """Maps of single tokens add up to the map of all; of the last block, [CLS] alone has one."""
    config = tiny_config()
    model, batch = tiny_model(config).eval(), tiny_batch(config, b=3)
    pair = batch["images"], batch["input_ids"], batch["attention_mask"]
    whole = heat_maps(model, *pair, batch["attention_mask"])
    parts = []
    for token in range(batch["input_ids"].shape[1]):
        one = torch.zeros_like(batch["attention_mask"])
        one[:, token] = True
        parts.append(heat_maps(model, *pair, one & batch["attention_mask"]))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-8)
    assert parts[0][1].any() and not any(part[1].any() for part in parts[1:])
    assert parts[1][0].any()


def test_a_model_without_matching_has_nothing_to_explain():
    config = tiny_config(w_itm=0.0)
    batch = tiny_batch(config)
    with pytest.raises(ValueError, match="trained without matching"):
        heat_maps(tiny_model(config), batch["images"], *[batch["input_ids"], *[batch["attention_mask"]] * 2])


def test_a_phrase_is_found_among_the_tokens():
    """Where it stands first, as the model reads it, so that capitals and pieces do not matter; the whole text with
    [CLS] and [SEP], which stand for it."""
    tokenizer = Tokenizer.build(["a red circle left of a red square"] * 9)
    text = "a red circle left of a red square"
    ids, rows = phrase_rows(tokenizer, text, "Red  Square", 32)
    assert ids == tokenizer.encode(text) and [place for place, on in enumerate(rows) if on] == [7, 8]
    assert [place for place, on in enumerate(phrase_rows(tokenizer, text, "red", 32)[1]) if on] == [2]
    assert phrase_rows(tokenizer, text, text, 32)[1] == [True] * 10
    for phrase, length in (("blue", 32), ("circle red", 32), ("red square", 8), ("", 32)):
        with pytest.raises(ValueError, match="is not in the text"):
            phrase_rows(tokenizer, text, phrase, length)


# ---------------------------------------------------------------------------------------------------------- the game


def test_patch_centres_and_boxes_are_in_pixels_of_the_picture():
    """A picture of 60 x 20 pixels under 2 rows and 3 columns of patches; a box has its left and upper edge."""
    centres = patch_centres((2, 3), 60, 20)
    assert centres == [(10, 5), (30, 5), (50, 5), (10, 15), (30, 15), (50, 15)]
    assert inside(centres, [[10, 0, 20, 6]]) == [True, False, False, False, False, False]
    assert inside(centres, [[10, 0, 20, 5], [0, 4, 10, 2]]) == [False] * 6, "its right and lower edge are outside"
    assert inside(centres, [[0, 0, 5, 5], [29, 4, 30, 20]]) == [False, True, True, False, True, True]


def test_hits_chance_and_ceiling_by_hand(grounding, checkpoint, monkeypatch):
    """Planted maps: block 0 points at patch 0 always, block 1 at nothing; and a box without any centre."""
    model, tokenizer, _ = load_model(checkpoint, CPU)
    rows = read_rows([grounding], "grounding")
    rows[0]["boxes"], rows[1]["boxes"] = [[0, 0, 3, 3]], [[40, 24, 8, 8], [0, 0, 16, 16]]
    planted = torch.zeros(2, 12, 6)
    planted[0, :, 0] = 1.0
    monkeypatch.setattr(explain, "maps_of", lambda *_: planted)
    found = pointing(model, tokenizer, rows, CPU, 0)
    # Centres are at x 8, 24, 40 and y 8, 24. Half a picture, 24 x 16, holds one of its six: x 8, or x 24 and 40.
    left, right = [0, 4, 8, 2, 6, 10], [1, 5, 9, 3, 7, 11]
    held = dict.fromkeys(left, 1) | dict.fromkeys(right, 2) | {0: 0, 1: 2}
    assert found["n"] == 12 and found["ceiling"] == pytest.approx(100 * 11 / 12)
    assert found["chance"] == pytest.approx(100 * sum(held.values()) / 72)
    assert found["layers"] == [pytest.approx(100 * 3 / 12), 0.0]  # rows 4 and 8 are at the top left, and row 1
    assert found["hits"] == found["layers"][0] and pointing(model, tokenizer, rows, CPU, 1)["hits"] == 0.0
    assert choose_layer(model, tokenizer, rows, CPU) == 0
    planted[1] = planted[0]
    assert choose_layer(model, tokenizer, rows, CPU) == 0, "of equals the first"
    planted[0] = 0.0
    assert choose_layer(model, tokenizer, rows, CPU) == 1


def test_a_batch_of_phrases_equals_each_alone(grounding, checkpoint):
    model, tokenizer, _ = load_model(checkpoint, CPU)
    rows = read_rows([grounding], "grounding")
    phrases = [explain.Phrase(row["image"], f"there is {row['text']}", "square", []) for row in rows]
    phrases[3].text = "a green square"
    whole = explain.maps_of(model, tokenizer, phrases, CPU, batch=5)
    alone = torch.cat([explain.maps_of(model, tokenizer, [phrase], CPU) for phrase in phrases], dim=1)
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-7)


def test_layers_are_counted_and_checked():
    model = tiny_model(tiny_config(fusion_depth=6))
    assert [check_layer(model, layer) for layer in (0, 5, -1, -6)] == [0, 5, 5, 0]
    assert middle_layer(model) == 2 and middle_layer(tiny_model()) == 0
    for layer in (6, -7):
        with pytest.raises(ValueError, match=f"layer is {layer}: the fusion encoder has 6 blocks, give -6 to 5"):
            check_layer(model, layer)


# ------------------------------------------------------------------------------------------------------------ commands


def test_explain_lays_the_map_over_the_picture(grounding, checkpoint, command, tmp_path):
    """The right half is the picture reddened by the map: reddest where the map is highest."""
    model, tokenizer, _ = load_model(checkpoint, CPU)
    image, out = grounding.parent / "0.png", tmp_path / "new" / "heat.png"
    words = ("--text", "there is a red square at the top left", "--phrase", "a red square")
    for layer in (0, -2):
        code, said, errors = command(
            "explain", "--checkpoint", checkpoint, "--image", image, *words, "--layer", layer, "--out", out
        )
        assert code == 0 and f"fusion block {layer % 2} of 0 to 1" in said and "matching, probability" in said, errors
        sheet = Image.open(out).convert("RGB")
        phrase = explain.Phrase(str(image), words[1], words[3], [])
        heat = explain.maps_of(model, tokenizer, [phrase], CPU)[layer, 0]
        width, height = 480, 320
        centres = patch_centres((2, 3), width, height)
        green = [sheet.getpixel((24 + width + int(x), 12 + int(y)))[1] for x, y in centres]
        plain = [sheet.getpixel((12 + int(x), 12 + int(y))) for x, y in centres]
        assert plain[5] == (255, 255, 255), "the left half is the picture itself"
        white = [i for i in range(6) if plain[i] == (255, 255, 255)]
        hot, cold = max(white, key=lambda i: heat[i]), min(white, key=lambda i: heat[i])
        assert heat[hot] == heat[cold] or green[hot] < green[cold]


def test_pointing_reports_the_layer_that_was_given_or_chosen(grounding, checkpoint, command):
    """The layer of --choose, or --layer, or the middle one; kept in results.json beside chance and ceiling."""
    model, tokenizer, _ = load_model(checkpoint, CPU)
    expected = pointing(model, tokenizer, read_rows([grounding], "grounding"), CPU, 0)
    for given, layer in (((), 0), (("--layer", "-1"), 1), (("--choose", grounding), None)):
        code, said, errors = command("pointing", "--checkpoint", checkpoint, "--data", grounding, *given)
        assert code == 0 and "chance" in said and "ceiling of the grid" in said, errors
        kept = json.loads(checkpoint.with_name("results.json").read_text())[f"pointing {grounding}"]
        assert kept["layers"] == expected["layers"] and kept["hits"] == kept["layers"][kept["layer"]]
        if layer is None:
            layer = choose_layer(model, tokenizer, read_rows([grounding], "grounding"), CPU)
        assert kept["layer"] == layer


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"boxes": []}, "boxes must be"),
        ({"boxes": [[0, 0, 0, 5]]}, "boxes must be"),
        ({"boxes": [[0, 0, 5]]}, "boxes must be"),
        ({"boxes": [[-1, 0, 5, 5]]}, "boxes must be"),
        ({"boxes": [[True, 0, 5, 5]]}, "boxes must be"),
        ({"text": " "}, "text is empty"),
        ({"boxes": [[0, 0, 8, 8], [40, 0, 9, 8]]}, r"the box \[40, 0, 9, 8\] reaches outside the picture of 48 x 32"),
    ],
)
def test_boxes_are_checked(grounding, change, says):
    """With file and line, or with the picture whose box does not fit."""
    row = json.loads(grounding.read_text().splitlines()[0])
    path = write_rows(grounding.with_name("bad.jsonl"), [row, row | change])
    with pytest.raises(ValueError, match=says) as error:
        read_rows([path], "grounding")
    assert "bad.jsonl:2" in str(error.value) or "0.png" in str(error.value)


def test_what_explaining_lacks_is_told(checkpoint, grounding, command, tmp_path):
    """One sentence each."""
    picture = ("--image", grounding.parent / "0.png")
    for arguments, says in (
        (("explain", "--text", "a red square"), "explain needs a picture and a text"),
        (("explain", *picture, "--text", "a red square", "--layer", "2"), "layer is 2"),
        (("explain", *picture, "--text", "a red square", "--phrase", "dog"), "is not in the text"),
        (
            ("explain", *picture, "--text", "a red square", "--phrase", "red", "--layer", "1"),
            "fusion block 1 has no map",
        ),
        (("pointing",), "pointing needs --data"),
        (("pointing", "--data", grounding, "--layer", "-3"), "layer is -3"),
        (("pointing", "--data", grounding.with_name("pairs.jsonl"), "--choose", tmp_path / "none"), "is not a file"),
    ):
        code, _, errors = command(*arguments[:1], "--checkpoint", checkpoint, *arguments[1:])
        assert code == 2 and errors.startswith("error: ") and says in errors and errors.count("\n") == 1, errors
