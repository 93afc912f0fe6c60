"""Heat maps against a loop over one pair at a time, grounding and the pointing game by hand, and the commands."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from conftest import moved, tiny_batch, tiny_config, tiny_model
from einops import rearrange
from helpers import SIZES, caption, kept_signals, new_run, square, write_rows
from PIL import Image

import explain
import finetune
from data import load_image, read_rows, size_of, to_tensor
from eval import load_model
from experiments.objects import attention_inside, share_inside
from explain import (
    FILLS,
    How,
    check_layer,
    filling,
    gradcam_maps,
    ground,
    heat_maps,
    heats_of,
    hiding_map,
    hiding_masks,
    hot_box,
    maps_of,
    phrase_rows,
    phrases_of,
    token_maps,
    warmth,
)
from mamo import record_attention
from metrics import judge_grounding
from tasks import HeadConfig, build_task
from tokenizer import Tokenizer
from tools.sheet import draw_heats

CPU = torch.device("cpu")
GRADCAM = How(map="gradcam")
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


def naive_heat(model, images, input_ids, real, rows, logit_of) -> torch.Tensor:
    """The same map for one text and its pictures, without padding, number by number; gradients through retain_grad."""
    length = int(real[0].sum())
    image, text = model.encode_image(images), model.encode_text(input_ids[:, :length], real[:, :length])
    with record_attention(model.student.fusion) as recorded:
        logit = logit_of(image, text, real[:, :length])
        for (attention,) in recorded:
            attention.retain_grad()
    logit.backward()
    layers = []
    for (attention,) in recorded:
        heat = torch.zeros(len(images), model.config.num_patches)
        for picture in range(len(images)):
            for head in range(attention.shape[1]):
                for token in range(min(length, attention.shape[2])):
                    for patch in range(model.config.num_patches):
                        place = picture, head, token, length + 1 + patch  # behind the text and the class token
                        if rows[0, token] and attention.grad[place] > 0:
                            heat[picture, patch] += (attention[place] * attention.grad[place]).detach()
        layers.append(heat / attention.shape[1])
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
    assert heat.shape == (3, 4, config.num_patches) and not heat.requires_grad
    assert (heat >= 0).all() and (heat.amax(dim=2) > 0).any()
    for i in range(4):
        one = batch["images"][i : i + 1], batch["input_ids"][i : i + 1], real[i : i + 1], rows[i : i + 1]
        expected = naive_heat(model, *one, lambda *pair: model.match(*pair)[0])
        torch.testing.assert_close(heat[:, i], expected[:, 0], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("task", "pictures"), [("vqa", 1), ("entailment", 1), ("reasoning", 1), ("reasoning", 2)])
def test_the_map_of_a_task_explains_the_answer_that_is_given(task, pictures):
    """The gradient of that answer's logit, with respect to the attention in the pass of each picture."""
    answers = ["false", "true"] if task == "reasoning" else ["red", "green", "blue"]
    batch = tiny_batch(tiny_config(), b=pictures)
    for seed in range(3):
        torch.manual_seed(seed)
        model = moved(build_task(HeadConfig(task, answers), dataclasses.asdict(tiny_config())).eval(), 0.3)
        texts = [batch[name][:1].expand(pictures, -1) for name in ("input_ids", "attention_mask", "attention_mask")]
        shown = torch.tensor([[place < pictures for place in range(model.pictures)]])

        def logits(image, text, real, model=model, shown=shown):
            return model.decide(image, shown, text[:1], real[:1])[0]

        with torch.no_grad():
            encoded = model.encode_image(batch["images"]), model.encode_text(*texts[:2]), texts[1]
            given = int(logits(*encoded).argmax())
        heat = heat_maps(model, batch["images"], *texts)
        expected = naive_heat(model, batch["images"], *texts, lambda *pair, at=given: logits(*pair)[at])
        assert heat.shape == (2, pictures, 24) and (heat.amax(dim=2) > 0).any()
        torch.testing.assert_close(heat, expected, rtol=1e-3, atol=1e-7)
        other = naive_heat(model, batch["images"], *texts, lambda *pair, at=given: logits(*pair)[at - 1])
        assert (heat - other).abs().max() > 0.1 * heat.max(), "the maps of two answers are to differ"


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


def test_one_pass_gives_the_map_of_every_token():
    """Each equals the map of that token alone; padding has none, and the last block has a row for [CLS] only."""
    config = tiny_config(fusion_depth=3)
    model, batch = tiny_model(config).eval(), tiny_batch(config, b=4)
    pair = batch["images"], batch["input_ids"], batch["attention_mask"]
    layers = token_maps(model, *pair)
    assert [maps.shape[1] for maps in layers] == [11, 11, 1]
    for token in range(11):
        one = torch.zeros_like(batch["attention_mask"])
        one[:, token] = True
        expected = heat_maps(model, *pair, one)
        for layer, maps in enumerate(layers):
            found = maps[:, token] if token < maps.shape[1] else torch.zeros(4, config.num_patches)
            torch.testing.assert_close(found, expected[layer], rtol=0, atol=0)
    read = batch["attention_mask"]
    assert all(maps[read].any() and not maps[~read].any() and not maps.requires_grad for maps in layers[:2])


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


# ---------------------------------------------------------------------------------------------------- maps by hiding


def naive_hiding(model, tokenizer, phrase: explain.Phrase, how: How) -> torch.Tensor:
    """The same map, one hidden picture at a time."""
    config, (rows, columns) = model.config, model.config.grid
    image = to_tensor(load_image(phrase.image), config.image_size)
    ids, counted = phrase_rows(tokenizer, phrase.text, phrase.phrase, config.max_tokens)
    p, n = config.patch_size, rows * columns

    def look(hidden: list[int]) -> float:
        picture, mask = image.clone(), torch.zeros(1, n, dtype=torch.bool)
        for patch in hidden:
            y, x = patch // columns * p, patch % columns * p
            if how.fill == "token":
                mask[0, patch] = True
            else:
                picture[:, y : y + p, x : x + p] = filling(image, how.fill, p)[:, y : y + p, x : x + p]
        real = torch.ones(1, len(ids), dtype=torch.bool)
        with torch.no_grad():
            seen = model.encode_image(picture[None], mask if how.fill == "token" else None)
            if all(counted):
                return model.match(seen, model.encode_text(torch.tensor([ids]), real), real).item()
            masked = [config.mask_id if on else one for one, on in zip(ids, counted, strict=True)]
            text = model.fuse(seen, model.encode_text(torch.tensor([masked]), real), real).text[0]
            logits = model.mlm_head(text) @ model.student.text.words.weight.T + model.mlm_bias
            return sum(logits[place].log_softmax(0)[ids[place]].item() for place in range(len(ids)) if counted[place])

    windows, randoms = (
        [[i for i in range(n) if one[i]] for one in part] for part in hiding_masks((rows, columns), how.passes)
    )
    whole, each = look([]), {tuple(one): look(one) for one in windows + randoms}
    lost = [[whole - each[tuple(one)] for one in windows if patch in one] for patch in range(n)]
    seen = [[each[tuple(one)] for one in randoms if patch not in one] for patch in range(n)]
    gone = [[each[tuple(one)] for one in randoms if patch in one] for patch in range(n)]
    mean = lambda values: sum(values) / max(len(values), 1)  # noqa: E731
    parts = torch.tensor([[mean(one) for one in lost], [mean(a) - mean(b) for a, b in zip(seen, gone, strict=True)]])
    parts = (parts - parts.mean(dim=1, keepdim=True)) / parts.std(dim=1, keepdim=True, correction=0)
    return parts.sum(dim=0).clamp(min=0)


@pytest.mark.parametrize("fill", FILLS)
def test_maps_by_hiding_equal_those_of_one_hidden_picture_at_a_time(grounding, checkpoint, fill):
    """Of whole texts by matching, of phrases by the head for words; pictures that come again, and are hidden once."""
    model, tokenizer, _ = load_model(checkpoint, CPU)
    rows, how = read_rows([grounding], "grounding")[:3], How(fill=fill, passes=15)
    phrases = [explain.Phrase(row["image"], row["text"], text) for row in rows for text in (row["text"], "square")]
    maps = maps_of(model, tokenizer, phrases, CPU, how)
    assert maps.shape == (6, 6) and all(one.any() for one in maps)
    for one, phrase in zip(maps, phrases, strict=True):
        torch.testing.assert_close(one, naive_hiding(model, tokenizer, phrase, how), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (16, 16), (1, 9), (8, 5), (2, 2)])
@pytest.mark.parametrize("passes", [8, 60, 128])
def test_what_is_hidden_fits_the_budget_and_covers_the_picture(grid, passes):
    """Windows of equal size at different places, every patch in one; random masks of 75 %, the same ones every time."""
    windows, randoms = hiding_masks(grid, passes)
    n = grid[0] * grid[1]
    assert len(windows) + len(randoms) == passes and 1 <= len(windows) <= max(passes // 2, 1)
    assert windows.any(dim=0).all() and len(set(windows.sum(dim=1).tolist())) == 1 and windows.shape[1] == n
    assert len({tuple(one) for one in windows.tolist()}) == len(windows)
    assert set(randoms.sum(dim=1).tolist()) == {min(max(round(0.75 * n), 1), n - 1)}
    assert torch.equal(randoms, hiding_masks(grid, passes)[1])
    if grid == (4, 4) and passes > 8:
        assert len(windows) == 9 and windows[0].nonzero().flatten().tolist() == [0, 1, 4, 5]


def test_a_map_is_hottest_where_the_answer_comes_from():
    """A logit that depends on one known patch, or on two; one that depends on nothing has a map of zeros."""
    masks = hiding_masks((4, 5), 100)
    hidden = torch.cat([torch.zeros(1, 20, dtype=torch.bool), *masks])
    for patch in range(20):
        found = hiding_map(3.0 * ~hidden[:, patch], masks)
        assert found.argmax() == patch and (found >= 0).all()
    found = hiding_map((~hidden[:, 3]).float() + (~hidden[:, 16]).float(), masks)
    assert set(found.topk(2).indices.tolist()) == {3, 16}
    assert not hiding_map(torch.ones(101), masks).any()


def test_what_stands_in_a_hidden_place():
    """The most frequent colour, though no two pixels are quite equal; a blur keeps the mean and loses the detail."""
    draw = torch.Generator().manual_seed(0)
    paper, ink = torch.tensor([0.9, 0.5, -0.2]), torch.tensor([-1.0, -0.4, 0.6])
    image = torch.where(torch.arange(24) < 15, paper[:, None, None], ink[:, None, None]).expand(3, 16, 24)
    image = image + 0.01 * torch.rand(3, 16, 24, generator=draw)
    colour = filling(image, "colour", 4)
    assert colour.shape == image.shape
    torch.testing.assert_close(colour[:, 3, 7], paper + 0.005, rtol=0, atol=0.005)
    assert (colour == colour[:, :1, :1]).all()
    blurred = filling(image, "blur", 4)
    assert blurred.shape == image.shape and blurred.std() < image.std() / 1.2
    assert image.min() < blurred.min() and blurred.max() < image.max()


def test_a_model_without_its_own_way_to_hide_or_without_words_says_so(grounding, tmp_path):
    row = read_rows([grounding], "grounding")[0]
    run = new_run(grounding.with_name("pairs.jsonl"), tmp_path, "--objective", "control")
    phrase = explain.Phrase(row["image"], row["text"], row["text"])
    with pytest.raises(
        ValueError, match="this model has no mask token to hide patches with: take the picture's colour"
    ):
        maps_of(run.model, run.tokenizer, [phrase], CPU, How(fill="token"))
    run.model.config.w_mlm = 0.0
    with pytest.raises(ValueError, match=r"trained without words to recover \(w_mlm 0\): look for a whole text"):
        maps_of(run.model, run.tokenizer, [explain.Phrase(row["image"], row["text"], "square")], CPU, How())


@pytest.mark.parametrize("how", [How(), GRADCAM])
def test_a_very_long_picture_costs_no_more_than_its_map(checkpoint, tmp_path, how):
    """1 x 5,000 pixels: the sheet is at most 1,280 pixels long, a box is found among 512 cells and told in pixels."""
    model, tokenizer, _ = load_model(checkpoint, CPU)
    picture = Image.new("RGB", (1, 5000), "white")
    picture.paste("red", (0, 0, 1, 2000))
    picture.save(tmp_path / "long.png")
    row = {"image": str(tmp_path / "long.png"), "text": "a red square", "boxes": [[0, 0, 1, 2500]]}
    row["proposals"] = [[0, 0, 1, 2500], [0, 2500, 1, 2500]]
    [heat] = heats_of(model, tokenizer, [row["image"]], row["text"], row["text"], how, CPU)
    assert heat.picture.size == (1, 1280)
    [said] = ground(model, tokenizer, [row], CPU, how)
    x, y, w, h = said["box"]
    assert (x, w) == (0, 1) and 0 <= y < y + h <= 5000 + 1e-6 and h > 5000 / 512 - 1e-6
    assert said["proposal"] in row["proposals"]


# ----------------------------------------------------------------------------------------------------------- grounding


def test_hits_chance_and_ceiling_by_hand(grounding, checkpoint, monkeypatch):
    """Planted maps: one points at patch 0 always, one at nothing; and a box without any centre."""
    model, tokenizer, _ = load_model(checkpoint, CPU)
    rows = read_rows([grounding], "grounding")
    rows[0]["boxes"], rows[1]["boxes"] = [[0, 0, 3, 3]], [[40, 24, 8, 8], [0, 0, 16, 16]]
    planted = torch.zeros(12, 6)
    planted[:, 0] = 1.0
    monkeypatch.setattr(explain, "maps_of", lambda *_: planted)
    found = judge_grounding(rows, ground(model, tokenizer, rows, CPU, How()))
    # Centres are at x 8, 24, 40 and y 8, 24. Half a picture, 24 x 16, holds one of its six: x 8, or x 24 and 40.
    left, right = [0, 4, 8, 2, 6, 10], [1, 5, 9, 3, 7, 11]
    held = dict.fromkeys(left, 1) | dict.fromkeys(right, 2) | {0: 0, 1: 2}
    assert found["pointing"]["n"] == 12 and found["ceiling"] == pytest.approx(100 * 11 / 12)
    assert found["pointing"]["chance"] == pytest.approx(100 * sum(held.values()) / 72)
    assert found["pointing"]["value"] == pytest.approx(100 * 3 / 12)  # rows 4 and 8 are at the top left, and row 1
    planted[:] = 0.0
    nowhere = ground(model, tokenizer, rows, CPU, How())
    assert all(one["point"] is one["proposal"] is one["box"] is None for one in nowhere)
    assert [judge_grounding(rows, nowhere)[name]["value"] for name in ("pointing", "box")] == [0.0, 0.0]


def test_the_hottest_patch_the_warmest_proposal_and_the_hot_region_are_predicted(grounding, checkpoint, monkeypatch):
    """Planted maps, hot in the corner where the square is: in pixels of the pictures, not of what the model sees."""
    model, tokenizer, _ = load_model(checkpoint, CPU)
    rows = read_rows([grounding], "grounding")[:4]
    planted = torch.full((4, 6), 0.01)
    for number, patch in enumerate((0, 2, 3, 5)):
        planted[number, patch] = 1.0
    monkeypatch.setattr(explain, "maps_of", lambda *_: planted)
    for row in rows:
        row["proposals"] = [[2 * value for value in box] for box in BOXES] + [[0, 0, 48, 32], [16, 12, 16, 8]]
    for number, said in enumerate(ground(model, tokenizer, rows, CPU, How())):
        assert said.keys() == {"row", "point", "proposal", "box", "grid"}
        assert (said["row"], said["grid"]) == (number, [2, 3])
        assert said["point"] == [(8, 40)[number % 2], (8, 24)[number // 2]]
        assert said["proposal"] == rows[number]["boxes"][0]
        x, y, w, h = said["box"]
        left, top = number % 2 == 0, number < 2
        assert (x == 0, y == 0, x + w == 48, y + h == 32) == (left, top, not left, not top)
        assert 8 <= w <= 20 and 8 <= h <= 20
    found = judge_grounding(rows, ground(model, tokenizer, rows, CPU, How()))
    assert found["pointing"]["value"] == found["proposals"]["value"] == 100.0


def test_warmth_is_the_sum_in_a_box_over_the_root_of_its_area():
    """By hand, at the edges, of a box smaller than a pixel, and against loops."""
    heat = torch.arange(24.0).view(4, 6)
    assert warmth(heat, [1, 1, 2, 2]) == pytest.approx((7 + 8 + 13 + 14) / 2)
    assert warmth(heat, [0, 0, 6, 4]) == pytest.approx(276 / 24**0.5)
    assert warmth(heat, [4, 3, 2, 1]) == pytest.approx((22 + 23) / 2**0.5)
    assert warmth(heat, [2.2, 1.1, 0.5, 0.5]) == pytest.approx(8 / 0.5)
    assert warmth(heat, [2.6, 1.1, 0.3, 0.3]) == pytest.approx(9 / 0.3), "within a pixel: that pixel"
    one_hot = torch.zeros(8, 8)
    one_hot[2:4, 2:4] = 1.0
    boxes = [[2, 2, 2, 2], [2, 2, 1, 1], [0, 0, 8, 8], [1, 1, 4, 4], [5, 5, 2, 2]]
    assert max(boxes, key=lambda box: warmth(one_hot, box)) == [2, 2, 2, 2], "neither the smallest nor the largest"
    draw, heat = random.Random(0), torch.rand(9, 13, generator=torch.Generator().manual_seed(0))
    for _ in range(50):
        x, y = draw.randrange(13), draw.randrange(9)
        w, h = draw.randint(1, 13 - x), draw.randint(1, 9 - y)
        total = sum(heat[row, column].item() for row in range(y, y + h) for column in range(x, x + w))
        assert warmth(heat, [x, y, w, h]) == pytest.approx(total / (w * h) ** 0.5, rel=1e-5)


def naive_box(heat: torch.Tensor, share: float) -> list[int]:
    """Walk from the hottest pixel to all neighbours, also across corners, that are hot enough."""
    height, width = heat.shape
    first = max(((y, x) for y in range(height) for x in range(width)), key=lambda place: heat[place])
    limit, seen, waiting = share * heat[first], {first}, [first]
    while waiting:
        y, x = waiting.pop()
        for other in ((y + down, x + right) for down in (-1, 0, 1) for right in (-1, 0, 1)):
            if 0 <= other[0] < height and 0 <= other[1] < width and heat[other] >= limit and other not in seen:
                seen.add(other)
                waiting.append(other)
    (top, bottom), (left, right) = ((min(part), max(part)) for part in zip(*seen, strict=True))
    return [left, top, right - left + 1, bottom - top + 1]


def test_the_hot_box_is_around_what_is_connected_to_the_peak():
    """Of two blobs the hotter one, without the colder; "at least half as hot" includes exactly half."""
    heat = torch.zeros(10, 14)
    heat[1:4, 1:3], heat[2, 2] = 0.5, 1.0
    heat[6:9, 6:12], heat[3, 3] = 0.9, 0.49
    assert hot_box(heat) == [1, 1, 2, 3]
    heat[7, 8] = 2.0
    assert hot_box(heat) == [8, 7, 1, 1], "the rest is less than half as hot now"
    assert hot_box(heat, share=0.4) == [6, 6, 6, 3]
    heat[4, 4] = heat[5, 5] = heat[3, 3] = 1.0
    assert hot_box(heat, share=0.2) == [1, 1, 11, 8], "connected across corners"
    assert hot_box(torch.ones(3, 5)) == [0, 0, 5, 3]


def test_the_hot_box_equals_a_walk():
    """On random maps, whose hot regions wind."""
    found = set()
    for seed in range(60):
        heat = torch.rand(9, 13, generator=torch.Generator().manual_seed(seed))
        share = 0.5 + 0.25 * (seed % 2)
        assert hot_box(heat, share) == naive_box(heat, share)
        found.add(tuple(hot_box(heat, share)))
    assert len(found) > 20


def test_a_batch_of_phrases_equals_each_alone(grounding, checkpoint):
    """More of them than one batch holds."""
    model, tokenizer, _ = load_model(checkpoint, CPU)
    rows = 5 * read_rows([grounding], "grounding")
    phrases = [explain.Phrase(row["image"], f"there is {row['text']}", "square") for row in rows]
    phrases[3].text = "a green square"
    whole = gradcam_maps(model, tokenizer, phrases, CPU)
    alone = torch.cat([gradcam_maps(model, tokenizer, [phrase], CPU) for phrase in phrases[:12]], dim=1)
    assert whole.shape == (2, 60, 6)
    torch.testing.assert_close(whole[:, :12], alone, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(whole[:, 36:39], whole[:, :3], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(whole[:, 48:], torch.cat([alone[:, :3], whole[:, 15:16], alone[:, 4:]], dim=1),
                               rtol=1e-3, atol=1e-7)  # fmt: skip


# ------------------------------------------------------------------------ grounding by a model that judges statements

FRAME = "there is {} here"


@pytest.fixture(scope="module")
def judging(grounding, tmp_path_factory):
    """Small fine-tuned checkpoints of the three tasks that answer, by task."""
    made, rows = {}, [json.loads(line) for line in grounding.read_text().splitlines()]
    for task in ("reasoning", "entailment", "vqa"):
        own = []
        for number, row in enumerate(rows):
            one, text = {"image": row["image"]}, FRAME.format(row["text"])
            if task == "reasoning":
                images = [row["image"], rows[number - 1]["image"]][: 1 + number % 2]
                own.append({"images": images, "text": text, "label": number % 3 == 0})
            elif task == "entailment":
                label = ("entailment", "neutral", "contradiction")[number % 3]
                own.append(one | {"text": text, "label": label})
            else:
                own.append(one | {"question": text, "answers": {("yes", "no", "red")[number % 3]: 1.0}})
        path, out = write_rows(grounding.with_name(f"{task}.jsonl"), own), tmp_path_factory.mktemp(task)
        given = f"{task} --init none --data {path} --val {path} --out {out} --steps 8 --batch-size 4 --lr-head 0.02"
        with kept_signals():
            finetune.start(*finetune.parse([*given.split(), "--device", "cpu", *SIZES.split()])).train()
        made[task] = out / "best.pt"
    return made


@pytest.mark.parametrize("task", ["reasoning", "entailment", "vqa"])
def test_maps_of_a_model_that_answers_equal_those_of_one_phrase_at_a_time(grounding, judging, task):
    """The gradient of the answer that is given, through the phrase's tokens within the statement alone."""
    model, tokenizer, _ = load_model(judging[task], CPU)
    rows = read_rows([grounding], "grounding")
    maps, given = gradcam_maps(model.eval(), tokenizer, phrases_of(rows, FRAME), CPU), set()
    assert maps.shape == (2, 12, 6) and maps[0].any()
    for number, row in enumerate(rows):
        text, phrase = f"there is {row['text']} here", tokenizer.encode(row["text"])[1:-1]
        ids = tokenizer.encode(text, 16)
        start = next(i for i in range(len(ids)) if ids[i : i + len(phrase)] == phrase)
        asked = torch.zeros(1, len(ids), dtype=torch.bool)
        asked[0, start : start + len(phrase)] = True
        assert not asked[0, 0] and 0 < asked.sum() < len(ids) - 2
        images = to_tensor(load_image(row["image"]), (16, 24))[None]
        shown = torch.arange(model.pictures)[None] < 1

        def logit_of(image, text, real, shown=shown):
            logits = model.decide(image, shown, text, real)[0]
            given.add(int(logits.argmax()))
            return logits[logits.argmax()]

        pair = images, torch.tensor([ids]), torch.ones_like(asked)
        expected = naive_heat(model, *pair, asked, logit_of)
        model.zero_grad()
        torch.testing.assert_close(maps[:, number], expected[:, 0], rtol=1e-3, atol=1e-7)
    assert not maps[1].any(), "of the last block [CLS] alone has a map, and it is not the phrase"


@pytest.mark.parametrize(
    ("task", "frame", "more"),
    [
        ("reasoning", FRAME, ""),
        ("reasoning", FRAME, "--map gradcam --layer 1"),
        ("reasoning", "{}", ""),
        ("entailment", FRAME, "--map gradcam"),
        ("vqa", FRAME, "--passes 9"),
    ],
)
def test_grounding_by_a_model_that_answers_reads_phrases_in_a_frame(
    grounding, judging, command, tmp_path, task, frame, more
):
    """Without --frame a phrase is the whole text."""
    model, tokenizer, _ = load_model(judging[task], CPU)
    rows, given = read_rows([grounding], "grounding"), ("--frame", frame) if frame != "{}" else ()
    how = {"": How(), "--map gradcam": GRADCAM, "--passes 9": How(passes=9)}.get(more, How(map="gradcam", layer=1))
    more = [*more.split(), "--predictions", str(tmp_path / "said.jsonl")]
    code, _, errors = command("grounding", "--checkpoint", judging[task], "--data", grounding, *given, *more)
    assert code == 0, errors
    expected = ground(model, tokenizer, rows, CPU, how, frame)
    found = json.loads(judging[task].with_name("results.json").read_text())[f"grounding {grounding}"]
    assert found == judge_grounding(rows, expected) | {"map": str(how)}
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    for one, prediction in zip(said, expected, strict=True):
        assert {name: one[name] for name in prediction} == prediction
    other = ground(model, tokenizer, rows, CPU, how, "{}" if frame == FRAME else FRAME)
    assert expected != other, "the frame is to matter"


def test_a_phrase_in_a_frame_has_another_map_than_alone(grounding, judging):
    """And without a frame the phrase is the whole text, so that [CLS] counts."""
    model, tokenizer, _ = load_model(judging["reasoning"], CPU)
    rows = read_rows([grounding], "grounding")[:3]
    assert phrases_of(rows)[0] == explain.Phrase(rows[0]["image"], rows[0]["text"], rows[0]["text"])
    whole, framed = (gradcam_maps(model.eval(), tokenizer, phrases_of(rows, f), CPU) for f in ("{}", FRAME))
    assert whole[1].any() and not framed[1].any()
    assert not torch.allclose(whole[0], framed[0], rtol=1e-2)


@pytest.mark.parametrize("frame", ["there is a", "", "{", "{0}", "{ }"])
def test_a_frame_without_a_place_for_the_phrase_is_one_sentence(grounding, judging, command, frame):
    code, _, errors = command(
        "grounding", "--checkpoint", judging["reasoning"], "--data", grounding, f"--frame={frame}"
    )
    assert code == 2 and errors.count("\n") == 1
    assert errors.startswith(f"error: --frame is {frame!r}: expected a text with {{}} for the phrase")


def test_what_a_model_that_answers_cannot_do_is_still_one_sentence(grounding, judging, command):
    """It neither contrasts nor matches."""
    pairs = grounding.with_name("pairs.jsonl")
    for name, data in (("retrieval", pairs), ("foils", pairs), ("world", grounding.parent)):
        code, _, errors = command(name, "--checkpoint", judging["reasoning"], "--data", data)
        assert code == 2 and errors.count("\n") == 1 and "neither contrasts nor matches" in errors


def test_layers_are_counted_and_checked():
    model = tiny_model(tiny_config(fusion_depth=6))
    assert [check_layer(model, layer) for layer in (0, 5, -1, -6)] == [0, 5, 5, 0]
    assert check_layer(model, None) == 2 and check_layer(tiny_model(), None) == 0
    for layer in (6, -7):
        with pytest.raises(ValueError, match=f"layer is {layer}: the fusion encoder has 6 blocks, give -6 to 5"):
            check_layer(model, layer)


# ------------------------------------------------------------------------------------------------------------ commands


def test_explain_lays_the_map_over_the_picture(grounding, checkpoint, command, tmp_path):
    """The right half is the picture with a square in each patch, whose area is the patch's heat."""
    model, tokenizer, _ = load_model(checkpoint, CPU)
    image, out = grounding.parent / "0.png", tmp_path / "new" / "heat.png"
    words = ("--text", "there is a red square at the top left", "--phrase", "a red square")
    for how in (How(), How(map="gradcam", layer=-2)):
        given = () if how == How() else ("--map", "gradcam", "--layer", how.layer)
        code, said, errors = command(
            "explain", "--checkpoint", checkpoint, "--image", image, *words, *given, "--out", out
        )
        assert code == 0 and f"the map, by {how}, is in" in said and "matching, probability" in said, errors
        sheet = Image.open(out).convert("RGB")
        phrase = explain.Phrase(str(image), words[1], words[3])
        heat = maps_of(model, tokenizer, [phrase], CPU, how)[0]
        width, height = 480, 320
        plain, laid = (np.asarray(sheet.crop((left, 46, left + width, 46 + height))) for left in (12, 24 + width))
        assert (plain[-1, -1] == 255).all(), "the left half is the picture itself"
        marked = rearrange((plain != laid).any(axis=2), "(y p) (x q) -> (y x) (p q)", y=2, x=3).mean(axis=1)
        share = heat.numpy() / heat.numpy().max()
        np.testing.assert_allclose(marked, 0.85**2 * share, atol=0.03)  # and the outline


def test_two_pictures_are_drawn_side_by_side_each_with_its_map(grounding, tmp_path):
    """Of reasoning."""
    rows = read_rows([grounding], "grounding")[:2]
    words = Tokenizer.build([row["text"] for row in rows] * 9)
    special = {"vocab_size": len(words), "mask_id": words.mask_id, "special_ids": words.special_ids}
    torch.manual_seed(0)
    model = build_task(HeadConfig("reasoning", ["false", "true"]), dataclasses.asdict(tiny_config(**special))).eval()
    paths, text = [row["image"] for row in rows], rows[0]["text"]
    heats = heats_of(model, words, paths, text, text, How(), CPU)
    draw_heats(heats, tmp_path / "heat.png", "a line")
    both = Image.open(tmp_path / "heat.png").convert("RGB")
    assert both.size == (4 * 492 + 12, 46 + 332)
    for number, (heat, path) in enumerate(zip(heats, paths, strict=True)):
        left = 12 + 2 * number * 492
        picture = Image.open(path).resize((480, 320), Image.Resampling.NEAREST)
        assert both.crop((left, 46, left + 480, 366)).tobytes() == picture.tobytes()
        laid = both.crop((left + 492, 46, left + 972, 366))
        assert laid.tobytes() == heat.image().tobytes() and heat.values.shape == model.config.grid
        assert max(red - green for _, (red, green, _) in laid.getcolors(1 << 18)) > 70, "the hottest place is marked"


def test_grounding_says_how_it_looked(grounding, checkpoint, command):
    """By hiding, or by a block of Grad-CAM; kept in results.json beside chance and ceiling."""
    model, tokenizer, _ = load_model(checkpoint, CPU)
    rows = read_rows([grounding], "grounding")
    for given, how in (
        ((), How()),
        (("--fill", "token", "--passes", "20"), How(fill="token", passes=20)),
        (("--map", "gradcam", "--layer", "-1"), How(map="gradcam", layer=-1)),
    ):
        code, said, errors = command("grounding", "--checkpoint", checkpoint, "--data", grounding, *given)
        assert code == 0 and "chance" in said and "ceiling" in said and f"by {how}" in said, errors
        kept = json.loads(checkpoint.with_name("results.json").read_text())[f"grounding {grounding}"]
        assert kept["map"] == str(how)
        expected = judge_grounding(rows, ground(model, tokenizer, rows, CPU, how))
        assert {name: kept[name] for name in ("pointing", "ceiling", "box")} == expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"boxes": []}, "boxes is .*: expected"),
        ({"boxes": [[0, 0, 0, 5]]}, "boxes is .*: expected"),
        ({"boxes": [[0, 0, 5]]}, "boxes is .*: expected"),
        ({"boxes": [[-1, 0, 5, 5]]}, "boxes is .*: expected"),
        ({"boxes": [[True, 0, 5, 5]]}, "boxes is .*: expected"),
        ({"text": " "}, "text is .*: expected a text"),
        ({"proposals": []}, "proposals is .*: expected"),
        ({"proposals": [[0, 0, 5, 5], [0, 0, 5]]}, "proposals is .*: expected"),
        ({"boxes": [[0, 0, 8, 8], [40, 0, 9, 8]]}, r"the box \[40, 0, 9, 8\] reaches outside the picture of 48 x 32"),
        ({"proposals": [[0, 25, 8, 8]]}, r"the box \[0, 25, 8, 8\] reaches outside the picture of 48 x 32"),
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
        (("explain", *picture, "--text", "a red square", "--layer", "1"), "only --map gradcam looks at a fusion block"),
        (("explain", *picture, "--text", "a red square", "--map", "gradcam", "--layer", "2"), "layer is 2"),
        (("explain", *picture, "--text", "a red square", "--map", "rollout"), "unknown map 'rollout': use one of"),
        (("explain", *picture, "--text", "a red square", "--fill", "white"), "unknown fill 'white': use one of"),
        (("explain", *picture, "--text", "a red square", "--passes", "3"), "passes is 3: a map by hiding needs 8"),
        (("explain", *picture, "--text", "a red square", "--phrase", "dog"), "is not in the text"),
        (
            ("explain", *picture, "--text", "a red square", "--phrase", "red", "--map", "gradcam", "--layer", "1"),
            "there is no map for 'red'",
        ),
        (("grounding",), "grounding needs --data"),
        (("grounding", "--data", grounding, "--map", "gradcam", "--layer", "-3"), "layer is -3"),
    ):
        code, _, errors = command(*arguments[:1], "--checkpoint", checkpoint, *arguments[1:])
        assert code == 2 and errors.startswith("error: ") and says in errors and errors.count("\n") == 1, errors


# -------------------------------------------------------------------------------------------- experiments/objects.py


@pytest.mark.parametrize("box", [(3, 2, 12, 5), (0, 0, 24, 16), (7.5, 7.5, 1, 1), (20, 12, 30, 30)])
def test_how_much_of_a_patch_lies_inside_a_box_equals_counting_small_squares(box):
    """A picture of 24 x 16 pixels with 2 rows and 3 columns of patches, in squares of a tenth of a pixel."""
    x, y, w, h = box
    column, row = ((np.arange(count) + 0.5) / 10 for count in (240, 160))
    inside = np.outer((row > y) & (row < y + h), (column > x) & (column < x + w))
    expected = inside.reshape(2, 80, 3, 80).mean(axis=(1, 3)).flatten()
    assert share_inside(list(box), (24, 16), (2, 3)).tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_attention_that_is_equal_everywhere_falls_inside_a_box_by_its_area(grounding, checkpoint):
    """And by all of it where the box is the picture; a model whose attention is uniform has no favourite."""
    model, tokenizer, _ = load_model(checkpoint, CPU)
    rows = read_rows([grounding], "grounding")[:6]
    for block in model.student.fusion.blocks:
        block.attention.query.weight.data.zero_()
        block.attention.query.bias.data.zero_()
    found = attention_inside(model, tokenizer, rows)
    assert found["[CLS]"] == pytest.approx(found["region"], abs=1e-5) and max(found["region"]) < 1
    assert found["words"] == pytest.approx(found["region"], abs=1e-5)
    whole = attention_inside(model, tokenizer, [row | {"boxes": [[0, 0, *size_of(row["image"])]]} for row in rows])
    assert whole["words"] == pytest.approx([1.0] * 6, abs=1e-5)
