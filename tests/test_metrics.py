"""Scores, chance and intervals by hand and against loops; files of predictions; eval.py's commands of the tasks."""

import dataclasses
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import moved, tiny_config
from helpers import COLOURS, PLACES, RESAMPLES, caption, write_rows, write_squares
from PIL import Image, ImageDraw

import metrics
import runtime
from data import captions_of, load_image, pictures_of, read_rows, size_of, to_tensor
from eval import ANSWERING, best_first, classify, load_model, ranks, retrieval
from mamo import MAMO
from metrics import (
    cluster_of,
    constant,
    estimate,
    fits,
    inside,
    iou,
    judge_answers,
    judge_grounding,
    judge_retrieval,
    patch_centres,
    read_predictions,
    recall_intervals,
    recalls,
    right_answers,
    score_answers,
    write_predictions,
)
from tasks import TASKS, HeadConfig, build_task, coverage
from tokenizer import Tokenizer
from tools import prepare

CPU = torch.device("cpu")
SIDES = ("image_to_text", "text_to_image")
LABELS = ("entailment", "neutral", "contradiction")


@pytest.fixture(autouse=True)
def resamples(monkeypatch):
    """Intervals are here those of every evaluation outside of the tests."""
    monkeypatch.setattr(metrics, "RESAMPLES", RESAMPLES)


def percent(values) -> float:
    """A mean in percent, by a sum."""
    return 100 * sum(map(float, values)) / len(values)


def check(found: dict, n: int, value: float, chance: float) -> None:
    """A figure holds these numbers, and its interval holds its value."""
    assert found.keys() == {"n", "value", "low", "high", "chance"}
    assert found["n"] == n
    assert found["value"] == pytest.approx(value)
    assert found["chance"] == pytest.approx(chance)
    assert 0 <= found["low"] <= found["value"] + 1e-9 and found["value"] <= found["high"] + 1e-9 <= 100 + 2e-9


# -------------------------------------------------------------------------------------------------- figure and interval


def naive_interval(values: list, clusters: list, draws: int = 1000) -> tuple[float, float]:
    """Draw as many clusters as there are, with repetition, and take the mean of all their rows; 1,000 times."""
    members, draw, means = {}, random.Random(1), []
    for value, cluster in zip(values, clusters, strict=True):
        members.setdefault(cluster, []).append(float(value))
    for _ in range(draws):
        rows = [value for part in draw.choices(list(members.values()), k=len(members)) for value in part]
        means.append(percent(rows))
    means.sort()
    return means[round(0.025 * draws)], means[round(0.975 * draws)]


def test_an_interval_holds_the_mean_and_equals_a_loop_over_resamples():
    """Values from 0 to 1 in clusters of different sizes."""
    draw = np.random.default_rng(0)
    for count, names in ((150, 150), (150, 40), (60, 7)):
        clusters = draw.integers(0, names, count).tolist()
        level = draw.random(names)
        values = [float(draw.random() < level[cluster]) * draw.choice([0.3, 1.0]) for cluster in clusters]
        found = estimate(values, clusters, 0.25)
        check(found, count, percent(values), 25.0)
        low, high = naive_interval(values, clusters)
        assert found["low"] == pytest.approx(low, abs=1.5) and found["high"] == pytest.approx(high, abs=1.5)
        assert found["low"] < found["value"] < found["high"]


@pytest.mark.parametrize(("n", "p"), [(400, 0.3), (1000, 0.5), (300, 0.9)])
def test_rows_that_stand_alone_have_the_interval_of_a_binomial(n, p):
    """Half of it is 1.96 standard errors."""
    values = [number < round(n * p) for number in range(n)]
    found = estimate(values, range(n), 0.5)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(196 * (p * (1 - p) / n) ** 0.5, rel=0.1)
    assert found["value"] == pytest.approx(100 * p)


def test_rows_that_share_a_cluster_widen_the_interval():
    """Ten equal values are worth one: the interval is wider by the root of ten. Clusters of unequal values are not."""
    values = [number < 120 for number in range(400)]
    alone = estimate(values, range(400), 0.0)
    tens = estimate(values, [number // 10 for number in range(400)], 0.0)
    mixed = estimate(values, [number % 40 for number in range(400)], 0.0)
    assert tens["value"] == mixed["value"] == alone["value"]
    width = alone["high"] - alone["low"]
    assert (tens["high"] - tens["low"]) / width == pytest.approx(10**0.5, rel=0.1)
    assert mixed["high"] - mixed["low"] < 0.2 * width
    assert estimate([1, 1, 0], ["a", "a", "a"], 0.0)["low"] == pytest.approx(200 / 3), "one cluster has no spread"


def test_an_interval_is_the_same_every_time():
    """Whoever drew random numbers before does not matter, and neither do the names of the clusters."""
    values, clusters = [0, 1, 1, 0, 1, 0.5, 0.3], [0, 0, 1, 2, 2, 2, 3]
    np.random.seed(1)
    one = estimate(values, clusters, 0.5)
    np.random.seed(2)
    assert estimate(values, clusters, 0.5) == one
    assert estimate(values, [f"picture {cluster}" for cluster in clusters], 0.5) == one
    assert estimate([1.0] * 5, range(5), 0.5) == {"n": 5, "value": 100, "low": 100, "high": 100, "chance": 50}
    assert RESAMPLES == 1000


def test_recalls_have_the_intervals_of_their_queries():
    """Each is the interval of "found among the first k", a query at a time."""
    rank = np.random.default_rng(0).geometric(0.2, 300) - 1
    intervals = recall_intervals(rank)
    assert intervals.keys() == recalls(rank).keys() == {"R@1", "R@5", "R@10"}
    for k in (1, 5, 10):
        hits = [place < k for place in rank.tolist()]
        low, high = intervals[f"R@{k}"]
        assert (low, high) == pytest.approx(naive_interval(hits, list(range(300))), abs=1.5)
        assert low < recalls(rank)[f"R@{k}"] < high


def test_what_is_drawn_together():
    """Rows of a group, and without a group rows of a picture, of two the first."""
    one, other = {"images": ["a", "b"], "group": 3}, {"images": ["c"], "group": 3}
    assert cluster_of(one) == cluster_of(other) != cluster_of(one | {"group": 4})
    assert cluster_of({"image": "a"}) == cluster_of({"images": ["a", "b"]}) != cluster_of({"image": "b"})
    assert cluster_of({"image": "a", "group": None}) == cluster_of({"image": "a"})


def test_groups_may_be_counted_from_0():
    """0 is a group like any other."""
    assert cluster_of({"images": ["a"], "group": 0}) == cluster_of({"images": ["b"], "group": 0})


# ------------------------------------------------------------------------------------------ vqa, reasoning, entailment


def naive_worth(task: str, row: dict, answer: str) -> float:
    """What an answer is worth, by looking at every possible one."""
    if task == "vqa":
        return sum(score for known, score in row["answers"].items() if known == answer)
    label = {True: "true", False: "false"}.get(row["label"], row["label"])
    return 1.0 if answer == label else 0.0


def naive_constant(task: str, rows: list[dict]) -> float:
    """The best mean in percent that one answer to all rows has, among all answers that there are."""
    possible = {answer for row in rows for answer in row.get("answers", {str(row.get("label")).lower()})}
    return max(percent([naive_worth(task, row, answer) for row in rows]) for answer in possible)


def check_answers(task: str, rows: list[dict], answers: list[str], result: dict) -> None:
    """The figures of a result are those of loops over the rows."""
    worth = [naive_worth(task, row, answer) for row, answer in zip(rows, answers, strict=True)]
    types = sorted({row.get("type", "") for row in rows})
    weighted = 0.0
    for name in types:
        those = [number for number, row in enumerate(rows) if row.get("type", "") == name]
        chance = naive_constant(task, [rows[number] for number in those])
        weighted += chance * len(those) / len(rows)
        if len(types) > 1:
            check(result["types"][name], len(those), percent([worth[number] for number in those]), chance)
    assert list(result["types"]) == (types if len(types) > 1 else [])
    check(result["accuracy"], len(rows), percent(worth), weighted)
    assert ("consistency" in result) == (task == "reasoning" and any("group" in row for row in rows))
    if "consistency" in result:
        groups = {row["group"]: [] for row in rows}
        for row, value in zip(rows, worth, strict=True):
            groups[row["group"]].append(value)
        coin = percent([0.5 ** len(group) for group in groups.values()])
        check(result["consistency"], len(groups), percent([all(group) for group in groups.values()]), coin)
    assert ("confusion" in result) == (task == "entailment")
    for label in result.get("confusion", ()):
        for answer in LABELS:
            count = sum(row["label"] == label and said == answer for row, said in zip(rows, answers, strict=True))
            assert result["confusion"][label][answer] == count


def random_rows(task: str, draw: random.Random, count: int) -> tuple[list[dict], list[str]]:
    """Rows about a few pictures in three types, and answers that are right more often than not."""
    rows, answers, words = [], [], ["red", "blue", "yes", "no", "two", "three"]
    labels = {"entailment": LABELS, "reasoning": (True, False, False)}.get(task, ("red", "green", "blue"))
    for _ in range(count):
        row = {"image": f"{draw.randrange(count // 3)}.png", "type": draw.choice(["colour", "count", "count", "place"])}
        if task == "vqa":
            row["answers"] = {
                word: draw.choice([0.3, 0.6, 0.9, 1.0]) for word in draw.sample(words, draw.randint(1, 3))
            }
            right, others = draw.choice(list(row["answers"])), [*words, "green"]
        else:
            row |= {"label": draw.choice(labels), "group": f"group {draw.randrange(count // 4)}"}
            right, others = str(row["label"]), list(map(str, labels))
        answer = right if draw.random() < 0.5 else draw.choice(others)
        rows.append(row)
        answers.append(answer.lower() if task == "reasoning" else answer)
    return rows, answers


@pytest.mark.parametrize("task", ANSWERING)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_and_chance_equal_loops(task, seed):
    """Of random rows: in all and per type, consistency, confusion, and what each answer is worth by itself."""
    rows, answers = random_rows(task, random.Random(seed), 90)
    result = judge_answers(task, rows, answers)
    check_answers(task, rows, answers, result)
    assert 20 < result["accuracy"]["value"] < 90 and len(result["types"]) == 3
    expected = [naive_worth(task, row, answer) for row, answer in zip(rows, answers, strict=True)]
    assert score_answers(task, rows, answers) == expected
    assert 100 * constant(task, rows) == pytest.approx(naive_constant(task, rows))
    without = [{key: value for key, value in row.items() if key not in ("type", "group")} for row in rows]
    check_answers(task, without, answers, judge_answers(task, without, answers))


def test_vqa_by_hand():
    """Soft scores; the best constant is "red" among colours, 80, and "2" among counts, 65."""
    colour, count = {"image": "a", "type": "colour"}, {"image": "b", "type": "count"}
    rows = [
        colour | {"answers": {"red": 1.0, "pink": 0.3}},
        colour | {"answers": {"blue": 0.6, "red": 0.6}},
        count | {"answers": {"2": 1.0}},
        count | {"answers": {"3": 0.9, "2": 0.3}},
    ]
    result = judge_answers("vqa", rows, ["pink", "red", "2", "4"])
    check(result["accuracy"], 4, 47.5, 72.5)
    check(result["types"]["colour"], 2, 45.0, 80.0)
    check(result["types"]["count"], 2, 50.0, 65.0)
    assert result.keys() == {"accuracy", "types"}


def test_reasoning_by_hand():
    """A group counts where all its rows are right; a coin gets a half, or of two rows a quarter."""
    labels, groups = (True, False, True, True, False), ("a", "a", "b", "b", "c")
    rows = [
        {"images": [f"{number}.png"], "label": label, "group": group}
        for number, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]
    result = judge_answers("reasoning", rows, ["true", "false", "true", "false", "false"])
    check(result["accuracy"], 5, 80.0, 60.0)
    check(result["consistency"], 3, 200 / 3, 100 / 3)
    always = judge_answers("reasoning", rows, ["true"] * 5)
    check(always["accuracy"], 5, 60.0, 60.0)
    check(always["consistency"], 3, 100 / 3, 100 / 3)


def test_entailment_by_hand():
    """Rows of the table are labels, columns are answers."""
    rows = [{"image": f"{number}.png", "label": LABELS[number % 3]} for number in range(6)]
    rows.append({"image": "6.png", "label": "neutral"})
    said = ["entailment", "entailment", "neutral", "neutral", "neutral", "neutral", "contradiction"]
    result = judge_answers("entailment", rows, said)
    check(result["accuracy"], 7, 200 / 7, 300 / 7)
    assert result["confusion"] == {
        "entailment": {"entailment": 1, "neutral": 1, "contradiction": 0},
        "neutral": {"entailment": 1, "neutral": 1, "contradiction": 1},
        "contradiction": {"entailment": 0, "neutral": 2, "contradiction": 0},
    }


@pytest.mark.parametrize(("task", "key"), [("vqa", "image"), ("reasoning", "group"), ("entailment", "group")])
def test_questions_about_a_picture_or_of_a_group_are_drawn_together(task, key):
    """The interval is that of clusters: of pictures, or where there are groups of groups."""
    rows, answers = random_rows(task, random.Random(3), 60)
    scores = score_answers(task, rows, answers)
    found = judge_answers(task, rows, answers)
    drawn = estimate(scores, [row[key] for row in rows], 0.0)
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == (drawn["low"], drawn["high"])
    those = [number for number, row in enumerate(rows) if row["type"] == "count"]
    drawn = estimate([scores[number] for number in those], [rows[number][key] for number in those], 0.0)
    assert (found["types"]["count"]["low"], found["types"]["count"]["high"]) == (drawn["low"], drawn["high"])


# ----------------------------------------------------------------------------------------------------------- grounding


def naive_iou(a: list[int], b: list[int]) -> float:
    """Of whole numbers, by counting squares."""
    cells = [{(x, y) for x in range(box[0], box[0] + box[2]) for y in range(box[1], box[1] + box[3])} for box in (a, b)]
    return len(cells[0] & cells[1]) / len(cells[0] | cells[1])


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([2, 1, 4, 2], 1.0),
        ([6, 1, 4, 2], 0.0),  # touches on the right
        ([2, 3, 4, 2], 0.0),  # touches below
        ([6, 3, 1, 1], 0.0),  # touches in a corner
        ([20, 20, 3, 3], 0.0),
        ([20, 1, 3, 2], 0.0),  # beside it, at the same height
        ([3, 1, 2, 1], 0.25),  # inside
        ([0, 0, 8, 4], 0.25),  # around it
        ([4, 2, 4, 2], 1 / 7),
        ([2.5, 1, 4, 2], 7 / 9),
    ],
)
def test_overlap_of_two_boxes_by_hand(other, expected):
    """Of [2, 1, 4, 2] with another, both ways round."""
    assert iou([2, 1, 4, 2], other) == iou(other, [2, 1, 4, 2]) == pytest.approx(expected)


def test_overlap_equals_counting_squares():
    draw = random.Random(0)
    found = set()
    for _ in range(300):
        a, b = ([draw.randrange(6), draw.randrange(6), draw.randint(1, 6), draw.randint(1, 6)] for _ in range(2))
        assert iou(a, b) == pytest.approx(naive_iou(a, b))
        found.add(iou(a, b))
    assert 0.0 in found and len(found) > 50


def test_a_box_fits_from_half_of_the_union_on():
    """With any of the right boxes."""
    right = [[30, 30, 2, 2], [0, 0, 20, 10]]
    assert fits([0, 0, 10, 10], right) and fits([30, 30, 2, 2], right)
    assert not fits([0, 0, 9.9, 10], right) and not fits([50, 50, 2, 2], right)


def test_patch_centres_and_boxes_are_in_pixels_of_the_picture():
    """A picture of 60 x 20 pixels under 2 rows and 3 columns of patches; a box has its left and upper edge."""
    centres = patch_centres((2, 3), 60, 20)
    assert centres == [(10, 5), (30, 5), (50, 5), (10, 15), (30, 15), (50, 15)]
    assert inside(centres, [[10, 0, 20, 6]]) == [True, False, False, False, False, False]
    assert inside(centres, [[10, 0, 20, 5], [0, 4, 10, 2]]) == [False] * 6, "its right and lower edge are outside"
    assert inside(centres, [[0, 0, 5, 5], [29, 4, 30, 20]]) == [False, True, True, False, True, True]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """A wide, a high and a square picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(((60, 20), (30, 50), (40, 40))):
        Image.new("RGB", size, "white").save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(3)]


def test_grounding_by_hand(pictures):
    """Four phrases about a picture of 60 x 20 under 2 x 3 patches, whose centres are at x 10, 30, 50 and y 5, 15."""
    one, none = {"image": pictures[0], "text": "a"}, {"point": None, "proposal": None, "box": None, "grid": [2, 3]}
    rows = [
        one | {"boxes": [[0, 0, 20, 20]], "proposals": [[0, 0, 20, 20], [40, 0, 20, 20]]},  # two of the six centres
        one
        | {"boxes": [[40, 0, 20, 10], [40, 10, 20, 10]], "proposals": [[40, 0, 20, 20], [40, 0, 20, 9], [0, 0, 9, 9]]},
        one | {"boxes": [[0, 0, 5, 5]], "proposals": [[0, 0, 60, 20], [30, 0, 30, 20]]},  # no centre is in it
        one | {"boxes": [[0, 0, 60, 20]], "proposals": [[0, 0, 60, 20], [0, 0, 30, 20]]},  # all of them are
    ]
    predictions = [
        none | {"point": [10, 15], "proposal": [40, 0, 20, 20], "box": [0, 0, 20, 11]},
        none | {"point": [30, 5], "proposal": [40, 0, 20, 20], "box": [40, 9, 20, 10]},
        none | {"point": [10, 5], "proposal": [0, 0, 60, 20], "box": [0, 0, 5, 5]},
        none,
    ]
    found = judge_grounding(rows, predictions)
    assert found.keys() == {"pointing", "ceiling", "box", "proposals"}
    check(found["pointing"], 4, 25.0, 100 * (2 / 6 + 2 / 6 + 0 + 6 / 6) / 4)
    assert found["ceiling"] == 75.0
    check(found["proposals"], 4, 25.0, 100 * (1 / 2 + 2 / 3 + 0 + 1) / 4)
    assert found["box"]["n"] == 4 and found["box"]["value"] == 75.0
    nothing = judge_grounding(rows, [none] * 4)
    for name in ("pointing", "proposals"):
        check(nothing[name], 4, 0.0, found[name]["chance"])
    check(nothing["box"], 4, 0.0, 0.0)


def test_only_rows_that_all_have_proposals_are_judged_by_them(pictures):
    """A figure over some of the rows would not be comparable."""
    row = {"image": pictures[0], "text": "a", "boxes": [[0, 0, 20, 20]]}
    prediction = {"point": [1, 1], "proposal": [0, 0, 20, 20], "box": [0, 0, 20, 20], "grid": [2, 3]}
    rows = [row | {"proposals": [[0, 0, 20, 20]]}, row]
    assert "proposals" not in judge_grounding(rows, [prediction, prediction | {"proposal": None}])
    assert judge_grounding(rows[:1], [prediction])["proposals"]["value"] == 100.0


def random_box(draw: random.Random, width: int, height: int) -> list[float]:
    """Somewhere inside a picture, at least a fifth of it wide and high."""
    w, h = draw.uniform(width / 5, width), draw.uniform(height / 5, height)
    return [draw.uniform(0, width - w), draw.uniform(0, height - h), w, h]


def chance_on_a_grid(box: list[float], boxes: list, width: int, height: int, steps: int = 40) -> float:
    """The share of placements of a box, on a fine grid in the picture, that fit a right one."""
    places = [(number + 0.5) / steps for number in range(steps)]
    spots = [(x * (width - box[2]), y * (height - box[3])) for x in places for y in places]
    return sum(any(iou([x, y, *box[2:]], right) >= 0.5 for right in boxes) for x, y in spots) / len(spots)


def test_grounding_equals_loops(pictures):
    """Random boxes, proposals and predictions, some of them missing; chance of a box against a grid of placements."""
    draw, rows, predictions = random.Random(0), [], []
    for number in range(45):
        width, height = size_of(pictures[number % 3])
        boxes = [random_box(draw, width, height) for _ in range(draw.randint(1, 2))]
        proposals = [random_box(draw, width, height) for _ in range(draw.randint(1, 3))] + boxes[:1]
        rows.append({"image": pictures[number % 3], "text": "a", "boxes": boxes, "proposals": proposals})
        said = {"row": number, "grid": [3, 4], "point": None, "proposal": None, "box": None}
        if number % 9:
            said |= {"point": [draw.uniform(0, width), draw.uniform(0, height)], "proposal": draw.choice(proposals)}
            said["box"] = boxes[0] if number % 2 else random_box(draw, width, height)
        predictions.append(said)
    hits, patches, chosen, lucky, boxed, anywhere = [], [], [], [], [], []
    for row, said in zip(rows, predictions, strict=True):
        width, height = size_of(row["image"])
        found = []
        for down in range(3):
            for across in range(4):
                x, y = (across + 0.5) * width / 4, (down + 0.5) * height / 3
                found.append(any(b[0] <= x < b[0] + b[2] and b[1] <= y < b[1] + b[3] for b in row["boxes"]))
        patches.append(found)
        overlaps = [max(iou(box, right) for right in row["boxes"]) for box in row["proposals"]]
        lucky.append(percent([overlap >= 0.5 for overlap in overlaps]))
        if said["point"] is None:
            hits, chosen, boxed = [*hits, False], [*chosen, False], [*boxed, False]
            anywhere.append(0.0)
            continue
        x, y = said["point"]
        hits.append(any(b[0] <= x < b[0] + b[2] and b[1] <= y < b[1] + b[3] for b in row["boxes"]))
        chosen.append(overlaps[row["proposals"].index(said["proposal"])] >= 0.5)
        boxed.append(any(iou(said["box"], right) >= 0.5 for right in row["boxes"]))
        anywhere.append(100 * chance_on_a_grid(said["box"], row["boxes"], width, height))
    found = judge_grounding(rows, predictions)
    check(found["pointing"], 45, percent(hits), np.mean([percent(one) for one in patches]))
    check(found["proposals"], 45, percent(chosen), np.mean(lucky))
    assert found["ceiling"] == pytest.approx(percent([any(one) for one in patches]))
    assert found["box"]["chance"] == pytest.approx(np.mean(anywhere), abs=2) and np.mean(anywhere) > 10
    check(found["box"], 45, percent(boxed), found["box"]["chance"])
    drawn = estimate(hits, [row["image"] for row in rows], 0.0)
    assert (found["pointing"]["low"], found["pointing"]["high"]) == (drawn["low"], drawn["high"])


# ----------------------------------------------------------------------------------------------------------- retrieval


def first_right(order: list[int], right: list[bool]) -> int:
    """The place of the first right answer in an order."""
    return next(place for place, answer in enumerate(order) if right[answer])


def test_the_ten_best_agree_with_the_ranks():
    """Whole-number scores with many ties, wrong ones that are not a number, one to three right answers."""
    draw = np.random.default_rng(0)
    scores = draw.integers(0, 6, (200, 15)).astype(np.float32)
    right = draw.random(scores.shape) < 0.1
    right[np.arange(200), draw.integers(0, 15, 200)] = True
    scores[(draw.random(scores.shape) < 0.05) & ~right] = np.nan
    scores, right = torch.tensor(scores), torch.tensor(right)
    whole = best_first(scores, right, 15)
    places = [first_right(order, good) for order, good in zip(whole.tolist(), right.tolist(), strict=True)]
    assert places == ranks(scores, right).tolist() and len(set(places)) > 8
    assert torch.equal(best_first(scores, right), whole[:, :10])
    for order, values in zip(whole.tolist(), scores.nan_to_num(nan=9.0).tolist(), strict=True):
        assert sorted(order) == list(range(15))
        assert [values[place] for place in order] == sorted(values, reverse=True)
    same = torch.zeros(3, 4)
    assert best_first(same, torch.eye(4, dtype=torch.bool)[:3], 4)[:, -1].tolist() == [0, 1, 2], "a tie is lost"


def test_a_right_answer_whose_score_is_not_a_number_is_not_found():
    """Of a picture whose embedding is broken, the file must not say that it was found first."""
    scores, right = torch.tensor([[0.1, float("nan"), 0.5, 0.3]]), torch.tensor([[False, True, False, False]])
    order = best_first(scores, right, 4)[0].tolist()
    assert first_right(order, right[0].tolist()) == ranks(scores, right).item() == 3


def lists_of(rows: list[dict], draw: random.Random, ways: tuple[str, ...]) -> list[dict]:
    """The ten best of each query in a random order."""
    images = list(dict.fromkeys(row["image"] for row in rows))
    texts = list(dict.fromkeys(text for row in rows for text in captions_of(row)))
    lists = []
    for way in ways:
        for side, asked, gallery in ((SIDES[0], images, texts), (SIDES[1], texts, images)):
            for query in asked:
                found = draw.sample(gallery, min(10, len(gallery)))
                lists.append({"way": way, "direction": side, "query": query, "found": found})
    return lists


def test_recalls_of_ranked_lists_equal_loops(tmp_path):
    """Of 12 pictures with 18 captions, some of which are right for several, and of random orders."""
    rows = [{"image": f"{number}.png", "caption": [f"picture {number}", f"of {number % 6}"]} for number in range(12)]
    right, _ = right_answers(rows)
    assert right["text_to_image"]["of 3"] == {"3.png", "9.png"}
    lists = lists_of(rows, random.Random(0), ("contrast", "matching"))
    write_predictions(tmp_path / "lists.jsonl", rows, lists)
    result = judge_retrieval(rows, tmp_path / "lists.jsonl")
    assert (result["images"], result["texts"], result["apart"]) == (12, 18, {})
    for way in ("contrast", "matching"):
        for side in SIDES:
            those = [one for one in lists if (one["way"], one["direction"]) == (way, side)]
            for k in (1, 5, 10):
                hits = []
                for one in those:
                    pairs = [
                        (one["query"], name) if side == SIDES[0] else (name, one["query"]) for name in one["found"]
                    ]
                    hits.append(any(text in rows[int(image[:-4])]["caption"] for image, text in pairs[:k]))
                assert result[way][side][f"R@{k}"] == pytest.approx(percent(hits))
                low, high = result["intervals"][way][side][f"R@{k}"]
                assert low <= percent(hits) <= high
    assert result["contrast"] != result["matching"]
    # By chance: a picture has two right captions of 18; 12 captions have one right picture of 12, six have two.
    assert result["chance"]["image_to_text"]["R@1"] == pytest.approx(100 * 2 / 18)
    assert result["chance"]["text_to_image"]["R@1"] == pytest.approx(100 * (12 * 1 + 6 * 2) / 18 / 12)
    write_predictions(tmp_path / "one.jsonl", rows, [one for one in lists if one["way"] == "contrast"])
    alone = judge_retrieval(rows, tmp_path / "one.jsonl")
    assert alone["matching"] == {} and alone["contrast"] == result["contrast"] and alone["chance"] == result["chance"]


def test_another_program_may_spell_texts_and_paths_otherwise(tmp_path):
    """Lists of which each names pictures and texts in its own way score as those that name them as the data does."""
    write_squares(tmp_path / "pairs.jsonl", 12)
    (tmp_path / "link").symlink_to(tmp_path / "pictures")
    rows = read_rows([tmp_path / "pairs.jsonl"], "pairs")
    lists = lists_of(rows, random.Random(0), ("contrast",))
    names = {row["image"]: row["image"].replace("pictures/", "link/") for row in rows}
    names |= {row["caption"]: f"{row['caption'].title()}  " for row in rows}
    for path, other in (("one.jsonl", {}), ("other.jsonl", names)):
        named = [
            one | {"query": other.get(one["query"], one["query"]), "found": [other.get(n, n) for n in one["found"]]}
            for one in lists
        ]
        write_predictions(tmp_path / path, rows, named)
    expected = judge_retrieval(rows, tmp_path / "one.jsonl")
    assert judge_retrieval(rows, tmp_path / "other.jsonl") == expected
    assert (expected["images"], expected["texts"]) == (12, 12)
    loud = [row | {"caption": [row["caption"], row["caption"].upper()]} for row in rows]
    assert judge_retrieval(loud, tmp_path / "one.jsonl") == expected, "each text twice in the data"


# ----------------------------------------------------------------------------- a data set and a tiny model of each task

ANSWERS = {"vqa": [*COLOURS, "yes", "no"], "reasoning": ["false", "true"], "entailment": list(LABELS)}


def data_sets() -> dict[str, list[dict]]:
    """Rows about the pictures of helpers.square. One question has an answer that no model of ours can give."""
    sets = {task: [] for task in TASKS if task != "retrieval"}
    for number in range(24):
        image, colour = f"pictures/{number:02d}.png", list(COLOURS)[number // 4]
        corners = [[12 * x, 8 * y, 12, 8] for y in (0, 1) for x in (0, 1)]
        sets["vqa"] += [
            {"image": image, "question": f"what colour is the square {PLACES[number % 4]}?", "type": "colour"}
            | {"answers": {colour: 1.0, list(COLOURS)[number // 4 - 1]: 0.3}},
            {"image": image, "question": "is the square at the top?", "type": "place"}
            | {"answers": {"yes" if number % 4 < 2 else "no": 1.0}},
        ]
        sets["reasoning"].append(
            {"images": [image, f"pictures/{(number + 1) % 24:02d}.png"][: 1 + number % 2], "group": f"g{number // 3}"}
            | {"text": f"there is {caption(number)}", "label": number % 3 > 0}
        )
        sets["entailment"].append({"image": image, "text": caption(number + number % 3), "label": LABELS[number % 3]})
        sets["grounding"].append(
            {"image": image, "text": caption(number), "boxes": [corners[number % 4]], "proposals": corners}
        )
    sets["vqa"][4]["answers"] = {"crimson": 1.0, "scarlet": 0.3}
    return sets


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with 24 pictures, a file of each task about them, and checkpoints that answer differently to each."""
    folder, sets = tmp_path_factory.mktemp("world"), data_sets()
    write_squares(folder / "retrieval.jsonl", 24, several=True)
    for task, rows in sets.items():
        write_rows(folder / f"{task}.jsonl", rows)
    texts = [caption(number) for number in range(24)] + ["there is a of white sheet what colour is the ? top"]
    words = Tokenizer.build(texts * 2)
    sizes = {"max_tokens": 20, "image_size": (16, 24), "patch_size": 8}
    special = {"vocab_size": len(words), "mask_id": words.mask_id, "special_ids": words.special_ids}
    config = tiny_config(**sizes, **special)
    for task in (*TASKS, "pre-training"):
        torch.manual_seed(3)
        head = HeadConfig(task, ANSWERS.get(task, []))
        model = MAMO(config) if task == "pre-training" else build_task(head, dataclasses.asdict(config))
        model = moved(model, 0.3)
        state = {"objective": "mamo", "config": dataclasses.asdict(model.config), "vocab": words.vocab}
        state |= {"model": model.state_dict()} | ({} if task == "pre-training" else {"head": dataclasses.asdict(head)})
        runtime.save_checkpoint(folder / task / "best.pt", state)
    return folder


def kept(folder: Path) -> dict:
    """The only result in a folder; afterwards there is none."""
    path = folder / "results.json"
    (result,) = json.loads(path.read_text(encoding="utf-8")).values()
    path.unlink()
    return result


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def one_sentence(ran: tuple[int, str, str]) -> str:
    """What a command said that ended with a mistake of the user."""
    code, _, errors = ran
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


# ------------------------------------------------------------------------------------------------ files of predictions


@pytest.mark.parametrize("task", TASKS)
def test_predictions_of_a_file_score_as_those_of_the_model(world, tmp_path, command, task):
    """With a checkpoint a file of predictions is written; scored without one, it gives the same figures."""
    said, data = tmp_path / "said.jsonl", ("--data", world / f"{task}.jsonl")
    code, table, errors = command(task, "--checkpoint", world / task / "best.pt", *data, "--predictions", said)
    assert code == 0, errors
    first = kept(world / task)
    code, again, errors = command(task, *data, "--predictions", said)
    assert code == 0 and str(tmp_path / "results.json") in again, errors
    second = kept(tmp_path)
    only_of_a_model = {"k", "weight", "map", "separation", "coverage"}
    assert {key: value for key, value in first.items() if key not in only_of_a_model} == {
        key: value for key, value in second.items() if key not in only_of_a_model
    }
    shown = [line for line in again.splitlines() if "interval" in line]
    assert all(line in table for line in shown) and (shown or task == "retrieval")


@pytest.mark.parametrize("task", ANSWERING)
def test_figures_of_a_command_are_those_of_loops_over_its_file(world, tmp_path, command, task):
    """Each row of the data has one line with its text; the model does not say the same to everything."""
    rows, said = read_rows([world / f"{task}.jsonl"], task), tmp_path / "said.jsonl"
    arguments = ("--checkpoint", world / task / "best.pt", "--data", world / f"{task}.jsonl", "--predictions", said)
    assert command(task, *arguments)[0] == 0
    lines, result = lines_of(said), kept(world / task)
    assert [line["row"] for line in lines] == list(range(len(rows)))
    assert [line["text"] for line in lines] == [row.get("question", row.get("text")) for row in rows]
    answers = [line["answer"] for line in lines]
    assert set(answers) <= set(ANSWERS[task]) and len(set(answers)) > 1
    check_answers(task, rows, answers, result)


@pytest.mark.parametrize("task", ANSWERING)
def test_answers_are_those_of_each_row_alone(world, monkeypatch, task):
    """The likeliest answer, in whatever batch a row is: pictures and texts are encoded once and shared by the rows."""
    model, words, _ = load_model(world / task / "best.pt", CPU)
    rows, expected = read_rows([world / f"{task}.jsonl"], task), []
    for row in rows:
        images = torch.stack([to_tensor(load_image(path), (16, 24)) for path in pictures_of(row)])
        input_ids = torch.tensor([words.encode(row.get("question", row.get("text")), 20)])
        real, shown = torch.ones_like(input_ids).bool(), torch.zeros(1, model.pictures).bool()
        shown[0, : len(images)] = True
        with torch.no_grad():
            logits = model.decide(model.encode_image(images), shown, model.encode_text(input_ids, real), real)
        expected.append(model.head_config.answers[logits[0].argmax()])
    assert classify(model, words, rows, CPU) == classify(model, words, rows, CPU, batch=7) == expected


@pytest.mark.parametrize("k", [0, 3])
def test_ranked_lists_hold_what_retrieval_reports(world, tmp_path, k):
    """End to end: recalls, chance and intervals of the lists are those of the model that wrote them."""
    model, words, _ = load_model(world / "pre-training" / "best.pt", CPU)
    rows, lists = read_rows([world / "retrieval.jsonl"], "pairs"), []
    result = retrieval(model, words, rows, CPU, k, lists=lists)
    assert result["k"] == k and bool(result["matching"]) == (k > 0)
    write_predictions(tmp_path / "lists.jsonl", rows, lists)
    found = judge_retrieval(rows, tmp_path / "lists.jsonl")
    assert found | {key: result[key] for key in ("k", "weight", "separation") if key in result} == result
    texts = {text for row in rows for text in captions_of(row)}
    assert len(lists) == (24 + len(texts)) * (2 if k else 1) and all(len(set(one["found"])) == 10 for one in lists)
    assert 0 < result["contrast"]["image_to_text"]["R@10"] < 100, "some are beyond the ten best"
    blocks = []
    assert retrieval(model, words, rows, CPU, k, block=5, lists=blocks) == result and blocks == lists


def spoil_line(number: int, change: dict):
    """Lines of a file with another value in one of them."""
    return lambda lines: [*lines[:number], json.dumps(json.loads(lines[number]) | change), *lines[number + 1 :]]


def without(number: int, key: str):
    """Lines of a file of which one lacks a key."""

    def spoil(lines: list[str]) -> list[str]:
        value = json.loads(lines[number])
        del value[key]
        return [*lines[:number], json.dumps(value), *lines[number + 1 :]]

    return spoil


def predicted(world: Path, folder: Path, command, task: str) -> Path:
    """A copy of the file that a task's checkpoint predicts; it predicts once for all tests."""
    first, copy = world / task / "said.jsonl", folder / "said.jsonl"
    if not first.exists():
        data = ("--data", world / f"{task}.jsonl", "--predictions", first)
        assert command(task, "--checkpoint", world / task / "best.pt", *data)[0] == 0
        kept(world / task)
    copy.write_bytes(first.read_bytes())
    return copy


def mistake(world: Path, folder: Path, command, task: str, spoil) -> str:
    """Spoil the lines of predictions and score them -> the sentence; no result is kept."""
    said = predicted(world, folder, command, task)
    write_rows(said, spoil(said.read_text(encoding="utf-8").splitlines()))
    errors = one_sentence(command(task, "--data", world / f"{task}.jsonl", "--predictions", said))
    assert not (folder / "results.json").exists()
    return errors


@pytest.mark.parametrize("task", ["grounding", *ANSWERING])
def test_every_row_must_be_predicted(world, tmp_path, command, task):
    """A row that is left out must not make n smaller; the sentence counts them and names the first."""
    rows = len((world / f"{task}.jsonl").read_text().splitlines())
    errors = mistake(world, tmp_path, command, task, lambda lines: lines[:2] + lines[5:])
    assert f"said.jsonl has no prediction for 3 of {rows} rows, the first is row 2" in errors
    errors = mistake(world, tmp_path, command, task, lambda lines: [])
    assert f"no prediction for {rows} of {rows} rows, the first is row 0" in errors


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda lines: [*lines, lines[3]], "said.jsonl:49: row 3 is predicted twice"),
        (spoil_line(3, {"row": 48}), "said.jsonl:4: row is 48: expected a number from 0 to 47"),
        (spoil_line(3, {"row": -1}), "said.jsonl:4: row is -1"),
        (spoil_line(1, {"row": True}), "said.jsonl:2: row is True"),
        (spoil_line(0, {"row": "0"}), "said.jsonl:1: row is '0'"),
        (without(2, "row"), "said.jsonl:3: row is None"),
        (spoil_line(2, {"text": "how many?"}), "said.jsonl:3: row 2 is 'how many?' there"),
        (lambda lines: [*lines[:5], "row 5: red", *lines[6:]], "said.jsonl:6: not JSON"),
        (lambda lines: [*lines[:5], '["red"]', *lines[6:]], "said.jsonl:6: found list"),
    ],
)
def test_a_line_that_is_no_prediction_is_one_sentence(world, tmp_path, command, spoil, says):
    """It names the file and the line."""
    assert says in mistake(world, tmp_path, command, "vqa", spoil)


def test_a_line_without_an_answer_is_one_sentence(world, tmp_path, command):
    """It is a slip in the key, not a wrong answer."""
    assert "answer" in mistake(world, tmp_path, command, "vqa", without(2, "answer"))


@pytest.mark.parametrize(
    ("task", "answer", "says"),
    [
        ("reasoning", "maybe", "row 3 is 'maybe': expected false, true"),
        ("reasoning", "entailment", "row 3 is 'entailment'"),
        ("entailment", "yes", "row 3 is 'yes': expected entailment, neutral, contradiction"),
    ],
)
def test_an_answer_that_is_no_label_is_one_sentence(world, tmp_path, command, task, answer, says):
    """Of vqa any text is an answer."""
    assert says in mistake(world, tmp_path, command, task, spoil_line(3, {"answer": answer}))


@pytest.mark.parametrize("spoil", [without(2, "grid"), spoil_line(2, {"point": [1]}), spoil_line(2, {"box": [1, 2]})])
def test_a_prediction_of_a_place_that_is_none_is_one_sentence(world, tmp_path, command, spoil):
    """The file may come from another program."""
    assert "said.jsonl:3" in mistake(world, tmp_path, command, "grounding", spoil)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda lines: lines[1:], "said.jsonl lacks 1 of 24 queries of image_to_text by contrast"),
        (lambda lines: lines[:-1], "of text_to_image by matching"),
        (lambda lines: [line for line in lines if "contrast" not in line], "lacks 24 of 24 queries"),
        (lambda lines: [lines[0], *lines], r"said.jsonl:2: the query .*00.png' is ranked twice"),
        (spoil_line(2, {"query": "pictures/99.png"}), "said.jsonl:3: .*99.png'.*a query of the data"),
        (spoil_line(2, {"way": "guess"}), "said.jsonl:3: 'guess'.*contrast or matching"),
        (spoil_line(2, {"direction": "sideways"}), "said.jsonl:3: .*'sideways'"),
        (without(2, "found"), "said.jsonl:3: .*a list of what was found"),
        (spoil_line(2, {"found": "a red square"}), "said.jsonl:3: .*a list of what was found"),
        (lambda lines: ["{", *lines], "said.jsonl:1: not JSON"),
        (lambda lines: [], "lacks 24 of 24 queries"),
    ],
)
def test_ranked_lists_that_are_not_whole_are_one_sentence(world, tmp_path, command, spoil, says):
    """Every query once, by contrast, and by matching all or none."""
    assert re.search(says, mistake(world, tmp_path, command, "retrieval", spoil))


def test_predictions_are_read_in_the_order_of_the_rows(tmp_path):
    """Lines may stand in any order, between empty lines, without a text, and with more keys."""
    rows = [{"image": "a.png", "question": text, "answers": {"1": 1.0}} for text in "abc"]
    lines = [
        {"row": 2, "answer": "3"},
        "",
        {"row": 0, "answer": "1", "sure": 0.3},
        {"row": 1, "answer": "2", "text": "b"},
    ]
    found = read_predictions(write_rows(tmp_path / "said.jsonl", lines), rows)
    assert [one["answer"] for one in found] == ["1", "2", "3"] and found[0]["sure"] == 0.3
    write_predictions(tmp_path / "new" / "said.jsonl", rows, found)
    assert lines_of(tmp_path / "new" / "said.jsonl")[2] == {"row": 2, "answer": "3", "text": "c"}


def test_a_line_ends_where_json_lines_end(tmp_path):
    """Another program may write U+2028 and the like as they are: they are signs of a text."""
    rows = [{"image": "a.png", "question": "one\u2028two", "answers": {"1": 1.0}}]
    line = json.dumps({"row": 0, "answer": "1\x85", "text": "one\u2028two"}, ensure_ascii=False)
    assert read_predictions(write_rows(tmp_path / "said.jsonl", [line]), rows)[0]["answer"] == "1\x85"


def test_predictions_that_are_not_there_are_one_sentence(world, tmp_path, command):
    """And so is a command that has neither a checkpoint nor predictions to score."""
    for task in TASKS:
        data = ("--data", world / f"{task}.jsonl")
        assert "none.jsonl is not a file" in one_sentence(
            command(task, *data, "--predictions", tmp_path / "none.jsonl")
        )
        assert f"{task} needs --checkpoint" in one_sentence(command(task, *data))
    said = write_rows(tmp_path / "said.jsonl", [{"row": 0}])
    arguments = ("--data", world / "retrieval.jsonl", "--predictions", said)
    assert "foils does not use --predictions" in one_sentence(command("foils", *arguments))


def test_predictions_for_other_data_are_refused(world, tmp_path, command):
    """Of as many rows in another order, and of fewer."""
    said = predicted(world, tmp_path, command, "vqa")
    rows = read_rows([world / "vqa.jsonl"], "vqa")
    turned = write_rows(tmp_path / "turned.jsonl", rows[::-1])
    errors = one_sentence(command("vqa", "--data", turned, "--predictions", said))
    assert "said.jsonl:1: row 0 is" in errors and "belong to other data" in errors
    fewer = write_rows(tmp_path / "fewer.jsonl", rows[:-1])
    errors = one_sentence(command("vqa", "--data", fewer, "--predictions", said))
    assert "said.jsonl:48: row is 47: expected a number from 0 to 46" in errors


# ------------------------------------------------------------------------------------------------------------ commands


def test_a_question_that_no_answer_of_the_list_fits_is_wrong_and_counted(world, tmp_path, command):
    """It stays in n, and "coverage" says what the best of the list would come to."""
    rows = read_rows([world / "vqa.jsonl"], "vqa")
    best = [max((score for word, score in row["answers"].items() if word in ANSWERS["vqa"]), default=0) for row in rows]
    assert best[4] == 0 and set(best[:4] + best[5:]) == {1.0}
    arguments = ("--checkpoint", world / "vqa" / "best.pt", "--data", world / "vqa.jsonl")
    code, said, _ = command("vqa", *arguments, "--predictions", tmp_path / "said.jsonl")
    result = kept(world / "vqa")
    assert code == 0 and result["accuracy"]["n"] == 48 == len(lines_of(tmp_path / "said.jsonl"))
    assert result["coverage"] == pytest.approx(100 * 47 / 48) and re.search(r"coverage +97\.9 %", said)
    alone = write_rows(tmp_path / "alone.jsonl", [rows[4]])
    assert command("vqa", "--checkpoint", world / "vqa" / "best.pt", "--data", alone)[0] == 0
    result = kept(world / "vqa")
    check(result["accuracy"], 1, 0.0, 100.0)
    assert result["coverage"] == 0.0


@pytest.mark.parametrize(
    ("name", "task", "says"),
    [
        ("reasoning", "vqa", "is a checkpoint of vqa and has no head for reasoning.*finetune.py reasoning"),
        ("vqa", "pre-training", "is a checkpoint of pre-training and has no head for vqa"),
        ("entailment", "retrieval", "is a checkpoint of retrieval and has no head for entailment"),
        ("vqa", "entailment", "is a checkpoint of entailment and has no head for vqa"),
        ("retrieval", "vqa", "is a checkpoint of vqa, which neither contrasts nor matches"),
        ("retrieval", "reasoning", "is a checkpoint of reasoning, which neither"),
        ("foils", "entailment", "is a checkpoint of entailment, which neither"),
        ("world", "vqa", "is a checkpoint of vqa, which neither"),
    ],
)
def test_a_checkpoint_of_another_task_is_refused(world, command, name, task, says):
    """One sentence that says what it is, and where to get another."""
    data = world / f"{name}.jsonl" if name in TASKS else world / "retrieval.jsonl"
    errors = one_sentence(command(name, "--checkpoint", world / task / "best.pt", "--data", data))
    assert re.search(rf"best\.pt {says}", errors)
    assert not (world / task / "results.json").exists()


@pytest.mark.parametrize("task", ["retrieval", "grounding", "pre-training"])
def test_what_keeps_contrast_and_matching_ranks_and_grounds(world, command, task):
    """Checkpoints of these two tasks do all that a pre-trained one does."""
    checkpoint = ("--checkpoint", world / task / "best.pt")
    for name in ("retrieval", "grounding"):
        code, said, errors = command(name, *checkpoint, "--data", world / f"{name}.jsonl")
        assert code == 0 and "chance" in said, errors
        kept(world / task)


@pytest.mark.parametrize("task", TASKS)
def test_a_figure_of_examples_is_drawn_on_demand(world, tmp_path, command, task):
    """By a checkpoint, and of a file of answers without one."""
    data = ("--data", world / f"{task}.jsonl", "--predictions", tmp_path / "said.jsonl")
    first, second = tmp_path / "new" / "a.png", tmp_path / "b.png"
    assert command(task, "--checkpoint", world / task / "best.pt", *data, "--figure", first)[0] == 0
    kept(world / task)
    with Image.open(first) as sheet:
        assert sheet.format == "PNG" and sheet.width > 500 and sheet.height > 400
    if task != "retrieval":  # see the next test
        assert command(task, *data, "--figure", second)[0] == 0
        assert second.read_bytes() == first.read_bytes()


def test_a_figure_of_ranked_lists_is_drawn_without_a_checkpoint_too(world, tmp_path, command):
    """Or refused: an option must not be passed over in silence."""
    said = predicted(world, tmp_path, command, "retrieval")
    arguments = ("--data", world / "retrieval.jsonl", "--predictions", said, "--figure", tmp_path / "a.png")
    code, _, _ = command("retrieval", *arguments)
    assert code == 2 or (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("task", "pictures"),
    [*((task, 1) for task in (*TASKS, "pre-training")), ("reasoning", 2)],
)
def test_explain_draws_for_a_checkpoint_of_each_task(world, tmp_path, command, monkeypatch, task, pictures):
    """Each picture beside its map; under them the phrase, and the answer where there is one."""
    lines, text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda pen, place, words, **kw: lines.append(words) or text(pen, place, words, **kw),
    )
    images = [world / "pictures" / f"{number:02d}.png" for number in (5, 18)[:pictures]]
    words = ("--text", "there is a green square at the top right", "--phrase", "a green square")
    out = tmp_path / "new" / "heat.png"
    code, said, errors = command(
        "explain",
        "--checkpoint",
        world / task / "best.pt",
        "--image",
        *images,
        *words,
        "--out",
        out,
        "--map",
        "gradcam",
    )
    assert code == 0 and "the map, by Grad-CAM, the middle fusion block" in said, errors
    (line,) = lines
    assert line.startswith("a green square in: there is a green square at the top right   ")
    if task in ANSWERS:
        answers = re.findall(r"^(.+): (\d\.\d{4})$", said, re.MULTILINE)
        assert [float(chance) for _, chance in answers] == sorted(
            (float(chance) for _, chance in answers), reverse=True
        )
        assert len(answers) == min(5, len(ANSWERS[task])) and {name for name, _ in answers} <= set(ANSWERS[task])
        assert line.endswith(f"   {answers[0][0]}   (Grad-CAM, the middle fusion block)   larger = hotter")
        assert (
            task == "vqa"
            or len(ANSWERS[task]) > 5
            or sum(float(chance) for _, chance in answers) == pytest.approx(1, abs=2e-4)
        )
    else:
        assert "matching, probability" in said and line.endswith(
            "right   (Grad-CAM, the middle fusion block)   larger = hotter"
        )
    with Image.open(out) as sheet:
        assert sheet.format == "PNG" and sheet.size == (12 + 2 * pictures * (480 + 12), 320 + 58)
        for number, image in enumerate(images):
            left = 12 + 2 * number * 492
            shown = sheet.convert("RGB").crop((left, 46, left + 480, 366)).resize((24, 16), Image.Resampling.NEAREST)
            assert shown.tobytes() == load_image(image).tobytes()
            assert sheet.convert("RGB").crop((left + 492, 46, left + 972, 366)).tobytes() != shown.tobytes()


def test_the_likeliest_answers_are_told_with_their_probabilities(world, command):
    """Of vqa each by itself, of the others among each other; about the same picture as `explain`."""
    image = world / "pictures" / "05.png"
    for task in ANSWERS:
        model, words, _ = load_model(world / task / "best.pt", CPU)
        input_ids = torch.tensor([words.encode("is the square red?", 20)])
        real, shown = torch.ones_like(input_ids).bool(), torch.tensor([[True, False][: model.pictures]])
        picture = to_tensor(load_image(image), (16, 24))[None]
        with torch.no_grad():
            logits = model.decide(model.encode_image(picture), shown, model.encode_text(input_ids, real), real)[0]
        chances = 1 / (1 + (-logits).exp()) if task == "vqa" else logits.exp() / logits.exp().sum()
        expected = sorted(zip(chances.tolist(), ANSWERS[task], strict=True), reverse=True)[:5]
        arguments = ("--checkpoint", world / task / "best.pt", "--image", image, "--text", "is the square red?")
        code, said, errors = command("score", *arguments)
        assert code == 0, errors
        assert said == "".join(f"{answer}: {chance:.4f}\n" for chance, answer in expected)


@pytest.mark.parametrize(("task", "pictures"), [("reasoning", 3), ("vqa", 2), ("entailment", 2), ("pre-training", 2)])
def test_more_pictures_than_a_task_reads_are_refused(world, tmp_path, command, task, pictures):
    """Reasoning reads two, everything else one."""
    images = [world / "pictures" / f"{number:02d}.png" for number in range(pictures)]
    arguments = ("--checkpoint", world / task / "best.pt", "--image", *images, "--text", "a red square")
    errors = one_sentence(command("explain", *arguments, "--out", tmp_path / "heat.png"))
    most = 2 if task == "reasoning" else 1
    assert f"{pictures} pictures are given, and this checkpoint reads {most}" in errors
    assert not (tmp_path / "heat.png").exists()


@pytest.mark.parametrize(("task", "pictures"), [("reasoning", 3), ("vqa", 2), ("pre-training", 2)])
def test_score_refuses_more_pictures_than_a_task_reads_too(world, command, task, pictures):
    images = [world / "pictures" / f"{number:02d}.png" for number in range(pictures)]
    arguments = ("--checkpoint", world / task / "best.pt", "--image", *images, "--text", "a red square")
    assert f"{pictures} pictures are given" in one_sentence(command("score", *arguments))


# ------------------------------------------------------------------------------------------ what another program said

SAID = {  # the word that most annotators write: ways in which another program may say it
    "yes": ["Yes", "yes.", "YES!"],
    "2": ["two", "2", "Two."],
    "red": ["a red", "Red", "the red"],
    "t shirt": ["t-shirt", "T-shirt", "a t shirt"],
    "don't": ["dont", "Don't"],
    "somebody'd": ["somebodyd", "somebody'd"],
    "1000": ["1,000", "1000"],
    "no": ["maybe", "none"],
}


def official(answers: list[str], said: str) -> float:
    """The official accuracy by its rules, sign by sign, for annotators who write as the published ones do."""
    text = " ".join(said.split())
    touching = {sign for sign in "/-,!?" if f"{sign} " in text or f" {sign}" in text or re.search(r"\d,\d", text)}
    signs = [("" if sign in touching else " ") if sign in "/-,!?" else sign for sign in text.replace(".", "")]
    numbers = {"none": "0", "one": "1", "two": "2", "three": "3"}
    short = {"dont": "don't", "somebodyd": "somebody'd"}
    words = [numbers.get(word, word) for word in "".join(signs).lower().split()]
    normal = " ".join(short.get(word, word) for word in words if word not in ("a", "an", "the"))
    left_out = [answers[:number] + answers[number + 1 :] for number in range(10)]
    return sum(min(others.count(normal) / 3, 1) for others in left_out) / 10


def test_answers_of_another_program_are_worth_what_the_official_script_gives_them(tmp_path, command):
    """400 questions from official files, and answers in capitals, with articles, marks, numbers as words."""
    draw, questions, annotations, said, worth = random.Random(0), [], [], [], []
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "COCO_train2014_000000000009.jpg")
    for number in range(400):
        word, agree = draw.choice(list(SAID)), draw.choice((10, 10, 4, 3, 2, 1, 0))
        ten = [word] * agree + [f"other {place}" for place in range(10 - agree)]
        about = {"question_id": number, "image_id": 9}
        questions.append(about | {"question": f"what is {number}?"})
        annotations.append(about | {"answers": [{"answer": answer} for answer in ten], "answer_type": "other"})
        said.append({"row": number, "answer": draw.choice(SAID[word])})
        worth.append(official(ten, said[-1]["answer"]))
    for name, content in (("questions", questions), ("annotations", annotations)):
        (tmp_path / f"{name}.json").write_text(json.dumps({name: content}), encoding="utf-8")
    given = ["--questions", tmp_path / "questions.json", "--annotations", tmp_path / "annotations.json"]
    given += ["--images", tmp_path / "pictures", "--split", "train", "--out", tmp_path]
    prepare.main(["vqa", *map(str, given)])
    scored = ("vqa", "--data", tmp_path / "vqa_train.jsonl", "--predictions", write_rows(tmp_path / "said.jsonl", said))
    assert command(*scored)[0] == 0 and 40 < percent(worth) < 70
    assert kept(tmp_path)["accuracy"]["value"] == pytest.approx(percent(worth), abs=1e-6)


def test_rows_that_were_never_normalised_are_worth_the_same():
    """A file of one's own may write the answers as it likes: what is normalised is both sides, and chance with them.

    Two spellings of one answer are one answer, whose annotators add up, to 1 at most.
    """
    raw = [{"image": "a", "answers": {"Yes": 0.6, "yes.": 0.6, "no": 0.3}}, {"image": "b", "answers": {"A Cat!": 0.9}}]
    clean = [{"image": "a", "answers": {"yes": 1.0, "no": 0.3}}, {"image": "b", "answers": {"cat": 0.9}}]
    for answers in (["yes", "cat"], ["YES", "the cat"], ["No.", "dog"]):
        assert judge_answers("vqa", raw, answers) == judge_answers("vqa", clean, answers)
    assert score_answers("vqa", raw, ["YES", "the cat"]) == [1.0, 0.9]
    assert coverage(raw, ["yes"]) == coverage(clean, ["Yes"]) == 50.0


@pytest.mark.parametrize(
    ("task", "label", "answers"),
    [("reasoning", True, ["True", " TRUE\n"]), ("entailment", "neutral", ["Neutral", "neutral "])],
)
def test_a_label_is_one_however_it_is_spelled(task, label, answers):
    """Python writes True, some programs an end of line."""
    for answer in answers:
        row = {"image": "a", "label": label}
        assert judge_answers(task, [row], [answer]) == judge_answers(task, [row], [answer.strip().lower()])
        assert score_answers(task, [row], [answer]) == [1.0]


def test_a_question_is_the_same_with_other_blanks_and_capitals(tmp_path):
    """And with letters of another form of Unicode; another question is refused."""
    rows = [{"image": "a.png", "question": "What is the Caf\u00e9  called?", "answers": {"1": 1.0}}]
    line = {"row": 0, "answer": "1", "text": "what is the cafe\u0301 called? "}
    assert read_predictions(write_rows(tmp_path / "said.jsonl", [line]), rows) == [line]
    with pytest.raises(ValueError, match="belong to other data"):
        read_predictions(write_rows(tmp_path / "said.jsonl", [line | {"text": "what is it called?"}]), rows)
