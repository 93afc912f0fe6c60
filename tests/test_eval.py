"""Metrics against loops, retrieval and foils against scoring pair by pair, and checkpoints that nobody should trust."""

import json
import math
import os
import pickle
import re
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import COLOURS, PLACES, caption, new_run, square, write_rows, write_squares
from PIL import Image, ImageDraw
from torch import Tensor

import eval as evaluation
from data import captions_of, load_image, pad, read_rows, to_tensor
from eval import area_under_curve, encode_rows, foils, load_model, match_best, ranks, rerank, retrieval
from metrics import chance_recalls, recalls
from tools import sheet

CPU = torch.device("cpu")
SIDES = ("image_to_text", "text_to_image")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory) -> Path:
    """Pairs of 24 pictures: some with several captions, some in two rows, and four pictures that share a caption."""
    path = write_squares(tmp_path_factory.mktemp("gallery") / "pairs.jsonl", 24)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        row["heldout"] = number % 5 == 0
        if number % 4 == 1:
            row["caption"] = [caption(number), f"a sheet with {caption(number)}"]
        if number % 6 == 2:
            row["caption"] = "a square of some colour"
    rows += [rows[3] | {"caption": "the picture of row three again"}, rows[8] | {"caption": "row eight in other words"}]
    return write_rows(path, rows)


@pytest.fixture(scope="module")
def foil_file(gallery) -> Path:
    """Foils of two kinds for the same pictures; every third row lacks the second kind."""
    rows = []
    for number in range(24):
        colour, place = list(COLOURS)[(number // 4 + 1) % 6], PLACES[(number + 1) % 4]
        wrong = {"colour": caption(number // 4 * 4 + 4 if number < 20 else 0).replace("yellow", colour)}
        if number % 3:
            wrong["place"] = f"a {list(COLOURS)[number // 4]} square {place}"
        row = {"image": f"pictures/{number:02d}.png", "caption": caption(number), "foils": wrong}
        rows.append(row | {"heldout": number % 5 == 0})
    return write_rows(gallery.parent / "foils.jsonl", rows)


def shaken(run, amount: float = 0.3):
    """Move every parameter by random noise, so that scores differ between pairs; and save the run's checkpoint."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=draw))
    run.save()
    return run


@pytest.fixture(scope="module")
def checkpoint(gallery, tmp_path_factory) -> Path:
    """A model that says something different about every pair."""
    out = tmp_path_factory.mktemp("runs") / "shaken"
    run = new_run(gallery, out, "--max-tokens", "20")
    run.model.matching_weight = 1.0  # without val it would be 0
    shaken(run)
    return out / "checkpoint.pt"


@pytest.fixture
def model_and_words(checkpoint):
    """A fresh copy of that model, and its tokenizer."""
    return load_model(checkpoint, CPU)[:2]


# ------------------------------------------------------------------------------------------------------------- search


def scores_one_by_one(model, tokenizer, images: list[str], text: str) -> list[tuple[float, float]]:
    """Cosine and probability of matching of each picture with a text."""
    pairs = []
    for image in images:
        pixels = to_tensor(load_image(image), model.config.image_size)[None]
        one = model.score(pixels, *pad([tokenizer.encode(text, model.config.max_tokens)], tokenizer.pad_id))
        pairs.append((one["itc"].item(), one["itm"].item()))
    return pairs


def test_texts_that_are_not_read_as_they_stand_are_told(command, checkpoint, gallery, tmp_path):
    """Too long, or in letters that training has not seen: a figure over them would look like any other."""
    rows = read_rows([gallery], "pairs")[:12]
    texts = ["a red square " * 40, "собака", "一只狗 runs"]
    changed = [row | {"caption": texts[number] if number < 3 else row["caption"]} for number, row in enumerate(rows)]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"image": row["image"], "caption": row["caption"]}) + "\n" for row in changed))
    status, _, errors = command("retrieval", "--checkpoint", checkpoint, "--data", path)
    count = len({text for row in changed for text in captions_of(row)})
    assert status == 0 and f"1 of {count} texts are longer than max_tokens" in errors
    assert f"2 of {count} texts have words in characters that the vocabulary lacks" in errors
    assert "vocabulary" not in command("retrieval", "--checkpoint", checkpoint, "--data", gallery)[2]


@pytest.mark.parametrize(("k", "weight"), [(0, None), (5, math.inf), (128, None), (128, math.inf), (128, 0.25)])
def test_a_search_orders_the_best_by_contrast_anew(model_and_words, gallery, k, weight):
    model, tokenizer = model_and_words
    images = sorted({row["image"] for row in read_rows([gallery], "pairs")})
    text = "a green square at the top left"
    scores = dict(zip(images, scores_one_by_one(model, tokenizer, images, text), strict=True))
    by_contrast = sorted(images, key=lambda image: -scores[image][0])
    per_cosine = 0 if weight == math.inf else 1 / (weight or 1) / model.temperature.item()
    logit = {image: math.log(p / (1 - p)) + per_cosine * cosine for image, (cosine, p) in scores.items()}
    first = sorted(by_contrast[:k], key=lambda image: -logit[image])
    found = evaluation.search(model, tokenizer, images, text, CPU, k, weight)
    assert [one["image"] for one in found] == first + by_contrast[k:]
    assert first != by_contrast[:k] or k == 0, "matching changes the order, or nothing is tested"
    for place, one in enumerate(found):
        assert one["contrast"] == pytest.approx(scores[one["image"]][0], abs=2e-3)  # features in half precision
        if place < k:
            assert one["matching"] == pytest.approx(scores[one["image"]][1], abs=2e-3)
        else:
            assert one["matching"] is None


def test_a_search_says_what_its_answer_is_worth(command, checkpoint, gallery):
    """Words that the model does not have are named, and a text that so few pictures never had is told from one."""
    asked = ("search", "--checkpoint", checkpoint, "--data", gallery, "--text")
    caption = captions_of(read_rows([gallery], "pairs")[0])[0]
    _, said, _ = command(*asked, caption)
    assert "not among the words" not in said and "memorised" not in said
    _, said, _ = command(*asked, "a kitten on a square, and a zebra")
    assert "kitten, on, and, zebra are not among the words of this model: it knows no meaning of them" in said
    assert re.search(r"no caption in --data is this text, and the model was trained on \d+ rows", said)
    _, said, _ = command("score", *asked[1:3], "--image", gallery.parent / "pictures" / "05.png", "--text", "a kitten")
    assert "kitten is not among the words of this model" in said


def test_the_command_search_prints_and_draws_what_it_finds(command, checkpoint, gallery, tmp_path):
    asked = ("search", "--checkpoint", checkpoint, "--data", gallery, "--figure", tmp_path / "found.png")
    status, said, _ = command(*asked, "--text", "a red square", "--matching-weight", "inf")
    assert status == 0
    found = re.findall(r"^ +([\d.]+) +(-?[\d.]+)   (\S+): (.+)$", said, re.M)
    assert len(found) == 10 and [row[0] for row in found] == sorted((row[0] for row in found), reverse=True)
    captions = {row["image"]: captions_of(row)[0] for row in reversed(read_rows([gallery], "pairs"))}
    assert set(captions.values()) >= {row[3] for row in found}
    with Image.open(tmp_path / "found.png") as found:
        assert np.asarray(found).std() > 10
    status, _, error = command(*asked)
    assert status == 2 and error == 'error: search needs a text: --text "a red circle"\n'
    status, _, error = command(*asked, "--text", "a red square", "--k", "-1")
    assert status == 2 and error.startswith("error: k is -1: give the number of candidates")


# ------------------------------------------------------------------------------------------------------------ metrics


def naive_rank(scores: list[float], right: list[bool]) -> int:
    """How many wrong answers are not clearly behind the best right one, one by one."""
    rights = [score for score, good in zip(scores, right, strict=True) if good]
    best = math.nan if any(map(math.isnan, rights)) else max(rights)
    return sum(not score < best for score, good in zip(scores, right, strict=True) if not good)


def test_ranks_and_recalls_equal_a_double_loop():
    """Random whole-number scores with many ties, some that are no number, one to three right answers a query."""
    draw = np.random.default_rng(0)
    scores = draw.integers(0, 6, (200, 15)).astype(np.float32)
    scores[draw.random(scores.shape) < 0.03] = np.nan
    right = draw.random(scores.shape) < 0.1
    right[np.arange(200), draw.integers(0, 15, 200)] = True
    expected = [naive_rank(row.tolist(), good.tolist()) for row, good in zip(scores, right, strict=True)]
    found = ranks(torch.tensor(scores), torch.tensor(right))
    assert found.tolist() == expected
    assert len(set(expected)) > 10
    for k in (1, 5, 10):
        hits = sum(rank < k for rank in expected)
        assert recalls(found.numpy())[f"R@{k}"] == pytest.approx(100 * hits / 200)


def test_who_says_the_same_to_everything_finds_nothing():
    """Ties count as wrong, so that a broken model cannot look good; so do scores that are no number."""
    right = torch.eye(12, dtype=torch.bool)
    for value in (0.0, 0.7, math.nan, math.inf, -math.inf):
        assert recalls(ranks(torch.full((12, 12), value), right).numpy()) == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0}
    assert recalls(ranks(right.float(), right).numpy()) == {"R@1": 100.0, "R@5": 100.0, "R@10": 100.0}


def test_chance_is_what_random_rankings_come_to():
    """Against 4,000 shuffles of a gallery of 14 with one to three right answers, and by hand for one right answer."""
    right = torch.zeros(6, 14, dtype=torch.bool)
    for query, count in enumerate((1, 1, 2, 3, 1, 2)):
        right[query, :count] = True
    draw = torch.Generator().manual_seed(0)
    found = torch.cat([ranks(torch.rand(6, 14, generator=draw), right) for _ in range(4000)])
    chance = chance_recalls(right.sum(dim=1).tolist(), 14)
    for name, simulated in recalls(found.numpy()).items():
        assert chance[name] == pytest.approx(simulated, abs=1.0)
    assert chance_recalls([1] * 20, 20) == pytest.approx({"R@1": 5.0, "R@5": 25.0, "R@10": 50.0})
    assert chance_recalls([1] * 3, 3) == pytest.approx({"R@1": 100 / 3, "R@5": 100, "R@10": 100})


# ---------------------------------------------------------------------------------------------------------- retrieval


def score(model, tokenizer, path: str, text: str) -> dict[str, float]:
    """Cosine and matching probability of one picture and one text."""
    input_ids, attention_mask = pad([tokenizer.encode(text, model.config.max_tokens)], tokenizer.pad_id)
    image = to_tensor(load_image(path), model.config.image_size)[None]
    return {name: value.item() for name, value in model.score(image, input_ids, attention_mask).items()}


def score_pairs(model, tokenizer, images: list[str], texts: list[str]) -> dict[str, Tensor]:
    """Cosine and matching logit of every picture with every text, one at a time -> {name: (images, texts)}"""
    scores = {"itc": torch.zeros(len(images), len(texts)), "itm": torch.zeros(len(images), len(texts))}
    for (i, path), (t, text) in product(enumerate(images), enumerate(texts)):
        for name, value in score(model, tokenizer, path, text).items():
            scores[name][i, t] = value if name == "itc" else math.log(value / (1 - value))
    return scores


def naive_order(cosines: list[float], logits: list[float], k: int, per_cosine: float) -> list[int]:
    """The k best by cosine, sorted anew by both logits together; the rest behind them, as cosine sorted it."""
    order = sorted(range(len(cosines)), key=lambda place: -cosines[place])
    return sorted(order[:k], key=lambda place: -(logits[place] + per_cosine * cosines[place])) + order[k:]


def naive_retrieval(scores: dict[str, Tensor], right: Tensor, k: int, per_cosine: float) -> dict[str, list[int]]:
    """{way: rank of every query}: how many wrong answers stand before the first right one."""
    found = {"contrast": [], "matching": []}
    for query in range(len(right)):
        for way, candidates in (("contrast", 0), ("matching", k)):
            order = naive_order(scores["itc"][query].tolist(), scores["itm"][query].tolist(), candidates, per_cosine)
            found[way].append(next(place for place, answer in enumerate(order) if right[query, answer]))
    return found


def in_percent(found: list[int]) -> dict[str, float]:
    return pytest.approx({f"R@{k}": 100 * sum(rank < k for rank in found) / len(found) for k in (1, 5, 10)}, abs=1e-3)


@pytest.fixture(scope="module")
def naive(checkpoint, gallery):
    """Rows, distinct pictures and texts, which belong together, and the score of every pair."""
    rows = read_rows([gallery], "pairs")
    images = list(dict.fromkeys(row["image"] for row in rows))
    texts = list(dict.fromkeys(text for row in rows for text in captions_of(row)))
    right = torch.tensor(
        [[any(row["image"] == i and t in captions_of(row) for row in rows) for t in texts] for i in images]
    )
    assert len(images) == 24 and right.sum(dim=0).max() == 4 and right.sum(dim=1).max() == 2
    scores = score_pairs(*load_model(checkpoint, CPU)[:2], images, texts)
    assert all(len(values.unique()) == values.numel() for values in scores.values()), "ties would decide by chance"
    return rows, images, texts, right, scores


def test_retrieval_equals_scoring_every_pair_alone(model_and_words, naive):
    """Contrast, matching of the k best, chance, and the numbers apart, both ways, against loops over model.score."""
    model, tokenizer = model_and_words
    rows, images, texts, right, scores = naive
    result = retrieval(model, tokenizer, rows, CPU, by="heldout")
    assert (result["images"], result["texts"], result["k"]) == (24, len(texts), 3)
    by_image = {row["image"]: str(row["heldout"]) for row in rows}
    by_text = {text: str(row["heldout"]) for row in rows for text in captions_of(row)}
    queries = {"image_to_text": [by_image[i] for i in images], "text_to_image": [by_text[t] for t in texts]}
    distinct = set()
    for side in SIDES:
        turned = {name: s if side == SIDES[0] else s.T for name, s in scores.items()}
        expected = naive_retrieval(turned, right if side == SIDES[0] else right.T, 3, 1 / model.temperature.item())
        assert expected["contrast"] != expected["matching"], "re-ranking is to make a difference"
        for way, found in expected.items():
            assert result[way][side] == in_percent(found)
            distinct.add(tuple(found))
            for value in ("False", "True"):
                part = [rank for rank, v in zip(found, queries[side], strict=True) if v == value]
                assert 0 < len(part) < len(found)
                assert result["apart"][f"heldout {value}"][way][side] == in_percent(part)
    assert len(distinct) == 4
    assert result["apart"].keys() == {"heldout False", "heldout True"}
    assert retrieval(model, tokenizer, rows, CPU)["apart"] == {}


def test_separation_is_the_area_under_the_curve_of_the_same_pairs(model_and_words, naive):
    """Against the naive scores: the drawn texts are wrong ones, the nearest are the ten best wrong ones by contrast."""
    rows, _, texts, right, scores = naive
    areas = retrieval(*model_and_words, rows, CPU)["separation"]
    own, near = [], []
    for image, matching in enumerate(scores["itm"]):
        own.append(matching[right[image].nonzero()[0].item()].item())
        wrong = [text for text in range(len(texts)) if not right[image, text]]
        wrong.sort(key=lambda text, image=image: -scores["itc"][image, text].item())
        near += [matching[text].item() for text in wrong[:10]]
    wins = [(one > other) + (one == other) / 2 for one in own for other in near]
    assert areas["nearest"] == pytest.approx(sum(wins) / len(wins), abs=1e-3)
    assert 0 < areas["uniform"] < 1 and areas["uniform"] != areas["nearest"]
    assert area_under_curve(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0, 3.0])) == pytest.approx(3.5 / 6)


@pytest.fixture(scope="module")
def respelled(gallery) -> Path:
    """The same pairs, and each once more with its text and its picture spelled otherwise."""
    rows = [json.loads(line) for line in gallery.read_text(encoding="utf-8").splitlines()]
    (gallery.parent / "link").symlink_to(gallery.parent / "pictures")
    ways = ("pictures/../pictures/", "link/", f"{gallery.parent}/pictures/")
    more = []
    for number, row in enumerate(rows):
        texts = [text.upper() if number % 2 else f"  {text.replace(' ', '  ')}" for text in captions_of(row)]
        more.append(row | {"image": row["image"].replace("pictures/", ways[number % 3]), "caption": texts})
    assert not {text for row in more for text in captions_of(row)} & {text for row in rows for text in captions_of(row)}
    return write_rows(gallery.parent / "respelled.jsonl", rows + more)


def test_another_spelling_is_not_another_answer(model_and_words, gallery, respelled, command, checkpoint, tmp_path):
    """Figures are those of the same pairs spelled once, from the model, its lists, and in the sheets that are drawn."""
    lists: list[dict] = []
    once, both = (read_rows([path], "pairs") for path in (gallery, respelled))
    result = retrieval(*model_and_words, both, CPU, by="heldout", lists=lists)
    assert result == retrieval(*model_and_words, once, CPU, by="heldout")
    named = {row["image"] for row in once} | {text for row in once for text in captions_of(row)}
    assert {name for one in lists for name in [one["query"], *one["found"]]} == named, "as the data names them first"
    figures = []
    for data in (gallery, respelled):
        said = tmp_path / "said.jsonl"
        for how in (("--checkpoint", checkpoint), ()):
            code, table, errors = command("retrieval", "--data", data, "--predictions", said, *how)
            assert code == 0, errors
            figures.append([line for line in table.splitlines() if "contrast" in line or "matching" in line])
            assert "24 pictures" in table
    assert figures[0] == figures[2] and figures[1] == figures[3] and figures[0][0] == figures[1][0]


def test_the_sheet_marks_right_answers_however_they_are_spelled(model_and_words, gallery, respelled, monkeypatch):
    sheets = []
    monkeypatch.setattr(sheet, "draw_sheet", lambda cells, path: sheets.append([cell.lines for cell in cells]))
    for path in (gallery, respelled):
        rows, lists = read_rows([path], "pairs"), []
        retrieval(*model_and_words, rows, CPU, lists=lists)
        sheet.draw_ranked(rows if path == gallery else rows[::-1], lists, Path("none.png"))
    assert sheets[0] == sheets[1] and any(text.startswith("+") for lines in sheets[0] for text, _ in lines)


def test_texts_that_are_one_once_they_are_cut_are_one_answer(model_and_words, gallery, command, checkpoint, tmp_path):
    """What the model reads of two long texts is the same, so their scores are, and neither may count as wrong."""
    rows = [json.loads(line) for line in gallery.read_text(encoding="utf-8").splitlines()][:12]
    for number, row in enumerate(rows):
        row["caption"] = f"{caption(number // 2)} {'so ' * 20}{number}"
    path, said = write_rows(gallery.parent / "long.jsonl", rows), tmp_path / "said.jsonl"
    result = retrieval(*model_and_words, read_rows([path], "pairs"), CPU)
    assert (result["images"], result["texts"]) == (12, 6)
    tables = []
    for how in (("--checkpoint", checkpoint), ()):
        code, table, errors = command("retrieval", "--data", path, "--predictions", said, *how)
        assert code == 0, errors
        tables.append([line for line in table.splitlines() if "pictures" in line or "contrast" in line])
    assert tables[0] == tables[1] and "12 pictures, 6 captions" in tables[0][0]


def test_foils_and_answers_are_read_however_they_are_spelled(model_and_words, foil_file):
    """A foil that the model cannot tell from the caption is not preferred; the others score as they did."""
    rows = read_rows([foil_file], "foils")
    loud = [row | {"caption": row["caption"].upper()} for row in rows]
    assert foils(*model_and_words, loud, CPU) == foils(*model_and_words, rows, CPU)
    equal = [row | {"foils": {"case": row["caption"].upper()}} for row in rows]
    assert foils(*model_and_words, equal, CPU)["contrast"] == {"case": 0.0}


def test_a_search_shows_a_picture_once(respelled, command, checkpoint, tmp_path):
    asked = ("search", "--checkpoint", checkpoint, "--data", respelled, "--text", "a red square")
    code, said, errors = command(*asked)
    found = re.findall(r"(\d\d)\.png: ", said)
    assert code == 0 and len(found) == len(set(found)) == 10, errors


def test_only_a_pictures_own_captions_are_right_where_that_is_asked(model_and_words, naive):
    """Against a loop over pictures and all their captions, of which some are equal, in the order of one drawing."""
    rows, images, texts, _, scores = naive
    result = retrieval(*model_and_words, rows, CPU, k=0, own=True)
    each = [(images.index(row["image"]), texts.index(text)) for row in rows for text in captions_of(row)]
    assert len({t for _, t in each}) < len(each) == result["texts"], "some captions are equal"
    drawn = torch.rand(len(each), generator=torch.Generator().manual_seed(0)).tolist()
    by_image, by_text = [], []
    for i in range(len(images)):
        order = sorted(range(len(each)), key=lambda n: (-scores["itc"][i, each[n][1]].item(), -drawn[n]))
        by_image.append(next(place for place, n in enumerate(order) if each[n][0] == i))
    for i, t in each:
        by_text.append((scores["itc"][:, t] > scores["itc"][i, t]).sum().item())
    assert result["contrast"] == {"image_to_text": in_percent(by_image), "text_to_image": in_percent(by_text)}
    assert result["chance"]["text_to_image"]["R@1"] == pytest.approx(100 / 24)


@pytest.mark.parametrize("k", [0, 1, 2, 100])
@pytest.mark.parametrize("weight", [1.0, math.inf, 0.5, 0.0])
def test_the_number_of_candidates_is_as_asked_and_at_most_a_tenth(model_and_words, naive, k, weight):
    """k = 0 is contrast alone; the candidates are ordered by both logits together, or by matching alone."""
    rows, _, _, right, scores = naive
    result = retrieval(*model_and_words, rows, CPU, k=k, weights=[weight])
    assert result["k"] == min(k, 3)
    if k == 0:
        assert result["matching"] == {}
    else:
        # Of two logits the order is that of the one plus the other, divided by the weight.
        per_cosine = 1 / max(weight, 1e-9) / model_and_words[0].temperature.item()
        expected = naive_retrieval(scores, right, min(k, 3), per_cosine)["matching"]
        assert result["matching"]["image_to_text"] == in_percent(expected) and result["weight"] == weight
        assert weight or result["matching"] == result["contrast"]


def test_of_several_weights_the_best_is_reported_and_of_equals_the_first(model_and_words, gallery):
    """By the mean of the six recalls; so re-ranking is never behind contrast where 0 is among them."""
    rows = read_rows([gallery], "pairs")

    def mean(result: dict) -> float:
        return sum(sum(part.values()) for part in result["matching"].values())

    each = {weight: retrieval(*model_and_words, rows, CPU, weights=[weight]) for weight in (0.0, 0.25, 1.0, math.inf)}
    means = {weight: mean(result) for weight, result in each.items()}
    assert len(set(means.values())) > 2, "all weights are alike, nothing is tested"
    best = max(means, key=means.get)
    assert retrieval(*model_and_words, rows, CPU, weights=list(each)) == each[best]
    worst = min(means, key=means.get)
    assert retrieval(*model_and_words, rows, CPU, weights=[worst, best, worst])["weight"] == best
    assert retrieval(*model_and_words, rows[:1], CPU, weights=[1.0, 0.0])["weight"] == 1.0, "of equals the first"


def test_numbers_do_not_depend_on_batch_or_block(model_and_words, gallery, foil_file, monkeypatch):
    """Encoding three by three, matching five by five and ranking seven queries at a time change nothing."""
    pairs, foil_rows = read_rows([gallery], "pairs"), read_rows([foil_file], "foils")
    whole = retrieval(*model_and_words, pairs, CPU, by="heldout"), foils(*model_and_words, foil_rows, CPU)
    monkeypatch.setattr(evaluation, "encode", partial(evaluation.encode, batch=3))
    monkeypatch.setattr(evaluation, "match_pairs", partial(evaluation.match_pairs, batch=5))
    small = retrieval(*model_and_words, pairs, CPU, by="heldout", block=7), foils(*model_and_words, foil_rows, CPU)
    assert whole == small


@pytest.mark.parametrize("direction", SIDES)
def test_reranking_moves_the_best_and_leaves_the_others(model_and_words, naive, direction):
    """The whole order, also of cosines that differ by 0.0001: those behind the candidates must not become ties."""
    model, tokenizer = model_and_words
    rows, images, texts, _, scores = naive
    *_, encoded = encode_rows(model, tokenizer, rows, CPU, captions_of)
    logits = scores["itm"] if direction == "image_to_text" else scores["itm"].T
    draw = torch.Generator().manual_seed(1)
    cosines = torch.stack([torch.randperm(logits.shape[1], generator=draw) for _ in logits]) * 1e-4
    matching = match_best(model, encoded, cosines[5:20], 5, direction, 4, CPU)
    found = rerank(cosines[5:20], matching, model.temperature.item(), 1.0)
    assert found.shape == matching.shape == (15, len(texts) if direction == "image_to_text" else len(images))
    for row, query in enumerate(range(5, 20)):
        order = naive_order(cosines[query].tolist(), logits[query].tolist(), 4, 1 / model.temperature.item())
        assert matching[row].isnan().sum() == found.shape[1] - 4
        values = [found[row, place].item() for place in order]
        assert all(one > other for one, other in pairwise(values)), "a tie, or another order"


@pytest.mark.parametrize("weight", [1.0, 0.5, math.inf])
def test_a_matching_head_that_gives_no_number_is_not_taken_for_contrast(model_and_words, gallery, monkeypatch, weight):
    rows = read_rows([gallery], "pairs")
    monkeypatch.setattr(evaluation, "match_pairs", lambda m, e, image, *rest: torch.full((len(image),), math.nan))
    result = retrieval(*model_and_words, rows, CPU, weights=[weight])
    assert (
        [way["R@1"] for way in result["matching"].values()]
        == [0, 0]
        != [way["R@1"] for way in result["contrast"].values()]
    )


def test_a_model_that_says_the_same_to_everything_finds_nothing(model_and_words, gallery, foil_file):
    """Its embeddings and its matching head are made constant: 0 % by contrast, and 0 % of the foils."""
    model, tokenizer = model_and_words
    rows = read_rows([gallery], "pairs")
    with torch.no_grad():
        for layer in (model.student.image_projection, model.student.text_projection, model.itm_head):
            layer.weight.zero_()
            layer.bias.fill_(1.0)
    result = retrieval(model, tokenizer, rows, CPU)
    for side in SIDES:
        assert result["contrast"][side] == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0}
        assert result["matching"][side]["R@1"] == 0.0
    wrong = foils(model, tokenizer, read_rows([foil_file], "foils"), CPU)
    assert set(wrong["contrast"].values()) == set(wrong["matching"].values()) == {0.0}


def test_an_untrained_model_is_near_chance(gallery, foil_file, tmp_path):
    """Means over twelve untrained models: nothing in the evaluation gives the answer away."""
    recall, accuracy, chance = [], [], None
    for seed in range(12):
        run = new_run(gallery, tmp_path / str(seed), "--seed", str(seed), "--max-tokens", "20")
        result = retrieval(run.model, run.tokenizer, read_rows([gallery], "pairs"), CPU)
        chance = result["chance"]
        recall += [
            result[way][side]["R@10"] - chance[side]["R@10"] for way in ("contrast", "matching") for side in SIDES
        ]
        wrong = foils(run.model, run.tokenizer, read_rows([foil_file], "foils"), CPU)
        accuracy += [*wrong["contrast"].values(), *wrong["matching"].values()]
    assert abs(np.mean(recall)) < 8
    assert abs(np.mean(accuracy) - 50) < 8


# -------------------------------------------------------------------------------------------------------------- foils


def test_foils_equal_scoring_every_pair_alone(model_and_words, foil_file):
    """Per kind, the share of rows whose caption scores above its foil; rows without the kind do not count."""
    model, tokenizer = model_and_words
    rows = read_rows([foil_file], "foils")
    result = foils(model, tokenizer, rows, CPU, by="heldout")
    texts = {row["image"]: (row["caption"], *row["foils"].values()) for row in rows}
    scores = {(path, text): score(model, tokenizer, path, text) for path in texts for text in texts[path]}

    def expected(kind: str, name: str, heldout: tuple) -> float:
        wins = []
        for row in rows:
            if kind in row["foils"] and row["heldout"] in heldout:
                ours, foil = (scores[row["image"], text][name] for text in (row["caption"], row["foils"][kind]))
                wins.append(ours > foil)
        return pytest.approx(100 * sum(wins) / len(wins), abs=1e-3)

    assert result["n"] == {"colour": 24, "place": 16}
    for way, name in (("contrast", "itc"), ("matching", "itm")):
        assert result[way].keys() == {"colour", "place"}
        for kind in result[way]:
            assert result[way][kind] == expected(kind, name, (True, False))
            for heldout in (True, False):
                assert result["apart"][f"heldout {heldout}"][way][kind] == expected(kind, name, (heldout,))
    assert any(0 < value < 100 for way in ("contrast", "matching") for value in result[way].values())
    assert {n["n"]["colour"] for n in result["apart"].values()} == {5, 19}


def test_a_foil_equal_to_its_caption_is_wrong(model_and_words, tmp_path):
    """An equal score is no answer."""
    square(0).save(tmp_path / "a.png")
    row = {"image": "a.png", "caption": "a red square", "foils": {"colour": "A red  square"}}
    rows = read_rows([write_rows(tmp_path / "foils.jsonl", [row])], "foils")
    result = foils(*model_and_words, rows, CPU)
    assert result["contrast"] == result["matching"] == {"colour": 0.0}


# ----------------------------------------------------------------------------------------------------------- commands


def test_score_prints_what_the_model_scores(model_and_words, checkpoint, gallery, command):
    """Both numbers, for a picture and a text of the user."""
    model, tokenizer = model_and_words
    picture = gallery.parent / "pictures" / "05.png"
    code, said, _ = command("score", "--checkpoint", checkpoint, "--image", picture, "--text", "a Green square!")
    assert code == 0
    scores = score(model, tokenizer, picture, "a green square !")
    found = dict(re.findall(r"^(contrast|matching), .*: (-?[\d.]+)$", said, re.MULTILINE))
    assert float(found["contrast"]) == pytest.approx(scores["itc"], abs=6e-5)
    assert float(found["matching"]) == pytest.approx(scores["itm"], abs=6e-5)


def test_results_are_printed_and_kept_beside_the_checkpoint(checkpoint, gallery, foil_file, command, tmp_path):
    """Earlier results of other names stay; the printed table holds the numbers of the file."""
    copy = tmp_path / "checkpoint.pt"
    copy.write_bytes(checkpoint.read_bytes())
    code, said, _ = command("retrieval", "--checkpoint", copy, "--data", gallery, "--by", "heldout")
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert code == 0 and len(kept) == 1
    (first,) = kept.values()
    for side in SIDES:
        for way in ("contrast", "matching", "chance"):
            assert "".join(f"{value:6.1f}" for value in first[way][side].values()) in said
    assert "heldout True" in said and str(tmp_path / "results.json") in said
    code, said, _ = command("foils", "--checkpoint", copy, "--data", foil_file)
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert code == 0 and len(kept) == 2 and first in kept.values()
    (second,) = (value for value in kept.values() if value != first)
    assert all(f"{value:10.1f}" in said for value in second["contrast"].values())
    assert command("retrieval", "--checkpoint", copy, "--data", gallery, "--k", "0")[0] == 0
    again = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert again.keys() == kept.keys() and second in again.values() and first not in again.values()


def test_retrieval_and_foils_of_the_same_file_are_both_kept(checkpoint, foil_file, command, tmp_path):
    """A foil file can be read as pairs too: neither result may take the other's place."""
    copy = tmp_path / "checkpoint.pt"
    copy.write_bytes(checkpoint.read_bytes())
    for name in ("retrieval", "foils"):
        assert command(name, "--checkpoint", copy, "--data", foil_file)[0] == 0
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(kept) == 2


@pytest.mark.parametrize("off", ["itc", "itm"])
def test_a_model_without_contrast_or_without_matching_is_evaluated_by_the_other(
    gallery, foil_file, command, tmp_path, off
):
    """Ablations are what the project is for. Retrieval begins with contrast: without it there is one clear sentence."""
    new_run(gallery, tmp_path, f"--w-{off}", "0").save()
    code, said, _ = command("foils", "--checkpoint", tmp_path / "checkpoint.pt", "--data", foil_file)
    assert code == 0 and ("\n  contrast" in said, "\n  matching" in said) == (off == "itm", off == "itc")
    code, said, errors = command("retrieval", "--checkpoint", tmp_path / "checkpoint.pt", "--data", gallery)
    if off == "itm":
        assert code == 0 and "\n  matching" not in said
    else:
        assert code == 2 and errors.startswith("error: ") and "contrast" in errors and errors.count("\n") == 1
    picture = gallery.parent / "pictures" / "05.png"
    code, said, _ = command("score", "--checkpoint", tmp_path / "checkpoint.pt", "--image", picture, "--text", "a")
    assert code == 0 and said.count("\n") == 1


def test_the_sheet_of_ranked_captions_shows_pictures_and_marks_right_answers(
    model_and_words, naive, tmp_path, monkeypatch
):
    """A PNG; each row holds the best five captions by matching in their order, + exactly where the caption is right."""
    rows, images, texts, right, scores = naive
    lines, text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda pen, place, words, **kw: lines.append(words) or text(pen, place, words, **kw),
    )
    lists = []
    retrieval(*model_and_words, rows, CPU, lists=lists)
    sheet.draw_ranked(rows, lists, tmp_path / "new" / "ranked.png", pictures=24)
    with Image.open(tmp_path / "new" / "ranked.png") as drawn:
        assert drawn.format == "PNG"
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 20)}
    assert {
        square(int(Path(path).stem)).getpixel((x, y)) for path in images for x in (0, 23) for y in (0, 15)
    } <= colours
    expected = []
    for i in range(24):
        per_cosine = 1 / model_and_words[0].temperature.item()
        order = naive_order(scores["itc"][i].tolist(), scores["itm"][i].tolist(), 3, per_cosine)
        expected += [f"{'+' if right[i, t] else '-'} {texts[t]}" for t in order[:5]]
        if not right[i, order[:5]].any():
            expected.append(f"missed: {min(text for text, own in zip(texts, right[i], strict=True) if own)}")
    assert lines == expected
    assert {line[0] for line in lines} == {"+", "-", "m"}


def test_everything_of_the_built_in_world_in_one_command(tmp_path, command):
    """world/scenes.py, a run on its files, `eval.py world`: four results and a picture beside the checkpoint."""
    scenes = pytest.importorskip("world.scenes")
    scenes.main(["--out", str(tmp_path / "world"), "--train", "40", "--val", "4", "--test", "12"])
    run = new_run(tmp_path / "world" / "pairs_train.jsonl", tmp_path / "run", "--image-size", "32", "32")
    assert run.val_rows
    run.save()
    code, said, errors = command(
        "world", "--checkpoint", tmp_path / "run" / "checkpoint.pt", "--data", tmp_path / "world"
    )
    assert code == 0, errors
    kept = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert kept.keys() == {f"{task}_{split}" for task in ("pairs", "foils", "grounding") for split in ("test", "novel")}
    assert kept["grounding_test"]["map"] == kept["grounding_novel"]["map"] == "hiding 128 times, by colour"
    assert "retrieval, test" in said and "foils, novel" in said
    assert any("heldout" in name for name in kept["pairs_test"]["apart"])
    assert Image.open(tmp_path / "run" / "ranked.png").format == "PNG"


# -------------------------------------------------------------------------------------------------------- checkpoints


class Trap:
    """Reading it with plain pickle would make a folder: whatever runs there could do anything."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def another_shape(state: dict) -> dict:
    state["config"]["width"] = 32
    return state


def another_vocabulary(state: dict) -> dict:
    state["vocab"].append("zebra")
    return state


def a_weight_less(state: dict) -> dict:
    del state["model"]["student.image.class_token"]
    return state


def a_weight_more(state: dict) -> dict:
    state["model"]["student.image.extra"] = torch.zeros(3)
    return state


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (another_shape, "another shape"),
        (another_vocabulary, "vocabulary of"),
        (a_weight_less, r"student\.image\.class_token is missing"),
        (a_weight_more, r"student\.image\.extra is \(3,\) where nothing is expected"),
        (lambda state: state | {"objective": "clip"}, "unknown objective 'clip'"),
        (lambda state: {"weights": state["model"]}, "not a checkpoint of this project"),
        (lambda state: {"config": {}, "model": {}}, "not a checkpoint of this project"),
        (lambda state: [1, 2], "not a checkpoint of this project"),
        (lambda state: state["model"], "not a checkpoint of this project"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_sentence(checkpoint, gallery, tmp_path, command, spoil, says):
    """It names the file and what is wrong with it; exit status 2."""
    wrong = tmp_path / "wrong.pt"
    torch.save(spoil(torch.load(checkpoint, weights_only=True)), wrong)
    code, _, errors = command("retrieval", "--checkpoint", wrong, "--data", gallery)
    assert code == 2
    assert errors.startswith("error: ") and errors.count("\n") == 1 and re.search(says, errors)
    assert "wrong.pt" in errors or "objective" in errors
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("kind", ["torch", "torch, before 1.6", "pickle"])
def test_a_checkpoint_that_runs_code_is_refused_and_not_run(gallery, tmp_path, command, kind):
    """Checkpoints are passed around; reading one must never do what its author pleases."""
    wrong, sprung = tmp_path / "wrong.pt", tmp_path / "sprung"
    state = {"config": {"trap": Trap(sprung)}, "model": {}, "vocab": [], "objective": "mamo"}
    if kind == "pickle":
        wrong.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, wrong, _use_new_zipfile_serialization=kind == "torch")
    code, _, errors = command("retrieval", "--checkpoint", wrong, "--data", gallery)
    assert not sprung.exists()
    assert code == 2
    assert re.match(r"error: .*wrong\.pt is refused: .* more than plain tensors", errors) and errors.count("\n") == 1
    torch.save({"trap": Trap(sprung)}, wrong)
    torch.load(wrong, weights_only=False)
    assert sprung.exists(), "the trap itself must work"


def no_files() -> dict[str, bytes]:
    """Contents that are no checkpoint, for a file of that name."""
    return {"empty": b"", "text": b"image,caption\n", "page": b"<html>404</html>", "pop": b"0", "memo": b"h\x00."}


@pytest.mark.parametrize("name", no_files())
def test_a_file_that_is_no_checkpoint_is_one_sentence(gallery, tmp_path, command, name):
    """An empty file, a text, a web page that was downloaded in its place, and bytes that upset the reader."""
    wrong = tmp_path / "wrong.pt"
    wrong.write_bytes(no_files()[name])
    code, _, errors = command("retrieval", "--checkpoint", wrong, "--data", gallery)
    assert code == 2
    assert re.match(r"error: .*wrong\.pt is (refused|not )", errors) and errors.count("\n") == 1


def test_a_checkpoint_that_breaks_off_or_is_missing_is_one_sentence(checkpoint, gallery, tmp_path, command):
    """A copy that was cut short, a path with a slip, and a folder in place of the file."""
    wrong = tmp_path / "wrong.pt"
    whole = checkpoint.read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 1):
        wrong.write_bytes(whole[:length])
        code, _, errors = command("score", "--checkpoint", wrong, "--image", "a.png", "--text", "a")
        assert code == 2 and errors.count("\n") == 1
        assert re.match(r"error: .*wrong\.pt is (refused|not a whole checkpoint)", errors)
    for path in (tmp_path / "none.pt", tmp_path):
        code, _, errors = command("foils", "--checkpoint", path, "--data", gallery)
        assert code == 2 and errors == f"error: {path} is not a file: give the checkpoint.pt of a run folder\n"


def test_what_a_command_lacks_is_told(checkpoint, gallery, foil_file, tmp_path, command):
    """One sentence each."""
    for arguments, says in (
        (("retrieval",), "retrieval needs --data"),
        (("world",), "world needs --data"),
        (("score", "--text", "a red square"), "score needs a picture and a text"),
        (("score", "--image", tmp_path / "none.png", "--text", "a"), "none.png"),
        (("foils", "--data", gallery), "found the keys"),
        (("retrieval", "--data", tmp_path / "none.jsonl"), "none.jsonl is not a file"),
        (("world", "--data", tmp_path), "pairs_test.jsonl is not a file"),
        (("retrieval", "--data", gallery, "--device", "abacus"), "device abacus"),
        (("retrieval", "--data", gallery, "--k", "-2"), "k is -2"),
        (("retrieval", "--data", gallery, "--by", "heldaut"), "heldaut"),
        (("foils", "--data", foil_file, "--by", "heldaut"), "heldaut"),
    ):
        code, _, errors = command(*arguments[:1], "--checkpoint", checkpoint, *arguments[1:])
        assert code == 2 and errors.startswith("error: ") and says in errors and errors.count("\n") == 1, errors


# --------------------------------------------------------------------------------------- what is put in, and taken out


@pytest.mark.parametrize("name", evaluation.COMMANDS)
def test_a_command_has_its_own_options_only(command, name):
    """One that it would ignore is refused before anything is loaded."""
    values = {"k": 3, "text": "a", "out": "x", "own_captions": None, "skip_bad": None, "by": "heldout", "passes": 9}
    for option in sorted(set(values) - evaluation.USES[name]):
        given = [f"--{option.replace('_', '-')}", *([] if values[option] is None else [values[option]])]
        code, _, errors = command(name, *given, "--checkpoint", "nowhere.pt")
        assert code == 2 and f"{name} does not use {given[0]}: leave it out; it uses --" in errors


def test_features_are_exported_for_numpy(command, checkpoint, gallery, tmp_path):
    """Those that contrast compares, with the names of their pictures and their texts."""
    out = tmp_path / "new" / "f.npz"
    code, said, errors = command("embed", "--checkpoint", checkpoint, "--data", gallery, "--out", out)
    assert code == 0 and str(out) in said, errors
    found, pipeline = np.load(out), evaluation.load(checkpoint, "cpu")
    rows = read_rows([gallery], "pairs")
    assert list(found["images"]) == list(dict.fromkeys(row["image"] for row in rows))
    assert list(found["texts"]) == list(dict.fromkeys(text for row in rows for text in captions_of(row)))
    for name, embed in (("image", pipeline.embed_images), ("text", pipeline.embed_texts)):
        wanted = embed([str(one) for one in found[f"{name}s"][:5]])
        np.testing.assert_allclose(found[f"{name}_embed"][:5], wanted, atol=1e-5)


def test_evaluation_skips_bad_rows_and_names_a_broken_picture(command, checkpoint, tmp_path):
    """As training does, under the options that the sentence names."""
    square(1).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    rows = [{"image": f"{name}.png", "caption": f"a {name} square"} for name in ("good", "broken", "good")]
    rows.append({"image": "good.png", "caption": "\u200b"})
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("retrieval", "--checkpoint", checkpoint, "--data", data)
    code, _, errors = command(*given)
    assert code == 2 and "caption is" in errors
    code, _, errors = command(*given, "--skip-bad")
    assert code == 2 and "broken.png cannot be decoded" in errors and "--check full" in errors
    code, said, errors = command(*given, "--skip-bad", "--check", "full")
    assert code == 0 and "left out: 1 bad rows and 1 rows whose picture cannot be used" in said, errors
    phrases = tmp_path / "grounding.jsonl"
    phrases.write_text(json.dumps({"image": "broken.png", "text": "a", "boxes": [[1, 1, 2, 2]]}) + "\n")
    code, _, errors = command("grounding", "--checkpoint", checkpoint, "--data", phrases)
    assert code == 2 and "broken.png cannot be decoded" in errors
