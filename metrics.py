"""Scoring of predictions: prediction files, metrics, random baselines, confidence intervals.

A prediction is a dictionary, stored as one line of a JSONL file. eval.py writes such files and computes its scores from
them, so predictions by other programs, or edited by hand, are scored by the same code. Spellings: see `named`.

    vqa, reasoning, entailment   {"row": 0, "answer": "red"}      for reasoning "true" or "false"
    grounding                    {"row": 0, "point": [x, y], "proposal": [x, y, w, h], "box": [...], "grid": [4, 4]}
    retrieval                    {"way": "contrast", "direction": "image_to_text", "query": ..., "found": [top ten]}
                                 and "also": [other names of the query in the data], if the model cannot tell them apart

Every estimate comes with n, the random baseline ("chance") and a 95 % confidence interval: percentiles of a cluster
bootstrap with 1,000 resamples, where a cluster is a group of rows or, without groups, the rows of an image.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

import runtime
from data import ENTAILMENT_LABELS, captions_of, json_lines, pictures_of, resolved, size_of
from tokenizer import bare_words

RESAMPLES = 1000
# Tasks with fixed labels, in class order; every other classification task takes its labels from the training rows.
LABELS = {"reasoning": ("false", "true"), "entailment": ENTAILMENT_LABELS}


# ----------------------------------------------------------------------------------------------- files of predictions


def write_predictions(path: Path, rows: list[dict], predictions: list[dict]) -> None:
    """Write one prediction per line, with the text of its row, if any, for readability and as a check. If path ends in
    .json, write answers in the format of the VQA evaluation server: [{"question_id", "answer"}, ...]"""
    if path.suffix == ".json":
        if any("question_id" not in row for row in rows) or any("answer" not in one for one in predictions):
            raise ValueError(
                f"{path}: the VQA server's format needs answers, and a question_id in each row; use .jsonl"
            )
        said = [{"question_id": rows[one["row"]]["question_id"], "answer": one["answer"]} for one in predictions]
        runtime.write_json(path, said)
        return
    lines = []
    for prediction in predictions:
        about = {"text": text_of(rows[prediction["row"]])} if "row" in prediction else {}
        lines.append(json.dumps(prediction | about))
    text = "\n".join(lines) + "\n"
    runtime.write_beside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def text_of(row: dict) -> str:
    """The question or text of a row, or "" if its task has none."""
    return row.get("question", row.get("text", ""))


def read_predictions(path: Path, rows: list[dict]) -> list[dict]:
    """The predictions for the given rows, in the order of the rows.

    Raises:  ValueError for an invalid line, a row with no or two predictions, or a text that differs from the row's
    """
    found: dict[int, dict] = {}
    for place, prediction in read_lines(path):
        row = prediction.get("row")
        if type(row) is not int or not 0 <= row < len(rows):
            raise ValueError(f"{place}: row is {row!r}: expected a number from 0 to {len(rows) - 1}")
        if row in found:
            raise ValueError(f"{place}: row {row} is predicted twice: keep one line for each row")
        if bare_words(str(prediction.get("text", text_of(rows[row])))) != bare_words(text_of(rows[row])):
            raise ValueError(
                f"{place}: row {row} is {prediction['text']!r} there and {text_of(rows[row])!r} in the data: "
                "the predictions belong to other data"
            )
        try:
            check_prediction(rows[row], prediction)
        except ValueError as fault:
            raise ValueError(f"{place}: {fault}") from fault
        found[row] = prediction
    missing = [row for row in range(len(rows)) if row not in found]
    if missing:
        raise ValueError(
            f"{path} has no prediction for {len(missing)} of {len(rows)} rows, the first is row {missing[0]}: "
            "predict every row"
        )
    return [found[row] for row in range(len(rows))]


def check_prediction(row: dict, prediction: dict) -> None:
    """Raise ValueError unless the answer is a string or, for grounding, points and boxes are numbers or None."""
    if "boxes" not in row:
        if not isinstance(prediction.get("answer"), str):
            raise ValueError(f"answer is {prediction.get('answer')!r}: expected a text")
        return
    for name, length in (("grid", 2), ("point", 2), ("proposal", 4), ("box", 4)):
        value = prediction.get(name)
        numbers = isinstance(value, list) and len(value) == length and all(map(is_finite, value))
        if (not numbers and (value is not None or name == "grid")) or (numbers and min(value[2:], default=0) < 0):
            raise ValueError(f"{name} is {value!r}: expected {length} numbers, and no negative size")
    if any(type(side) is not int or not 1 <= side <= 256 for side in prediction["grid"]):
        raise ValueError(f"grid is {prediction['grid']}: expected rows and columns of patches, from 1 to 256")


def is_finite(value) -> bool:
    """Whether a value is a number that can be a pixel coordinate."""
    return type(value) in (int, float) and abs(value) < 2**31  # False for NaN


def is_name(value) -> bool:
    """Whether a value can be a caption or the path of a picture: a string without NUL and unpaired surrogates."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


def read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", object) from a prediction file. Raises ValueError if the file does not exist."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: write it with --checkpoint first, or give another --predictions")
    return json_lines(path)


# ------------------------------------------------------------------------------------------------ confidence intervals


def estimate(values, clusters: list, chance: float) -> dict:
    """The mean of values in [0, 1], and chance, both converted to percent -> {"n", "value", "low", "high", "chance"}

    low, high: 95 % confidence interval by bootstrap over clusters; clusters contains one cluster name per value
    """
    values = np.asarray(values, dtype=float)
    _, which = np.unique(np.asarray(list(map(str, clusters))), return_inverse=True)
    sums, counts = np.bincount(which, values), np.bincount(which)
    draw, means = np.random.default_rng(0), []
    for _ in range(RESAMPLES):  # not vectorised: 25,000 clusters would take 600 MB
        drawn = draw.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.percentile(means, (2.5, 97.5))
    percent = {"value": values.mean(), "low": low, "high": high, "chance": chance}
    return {"n": len(values)} | {name: 100 * share for name, share in percent.items()}


def cluster_of(row: dict) -> str:
    """The bootstrap cluster of a row: its group, or else its first image."""
    return str(pictures_of(row)[0] if row.get("group") is None else row["group"])


# --------------------------------------------------------------------------------------------- vqa answer normalisation

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(NUMBERS)}
# differs: the official list drops the apostrophe of "somebody'd", although it restores that of all other words.
FULL = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't
not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
SIGNS = [(word, i) for word in FULL.split() for i, letter in enumerate(word) if letter == "'"]
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word, i in SIGNS}  # lacking one of the apostrophes -> in full


@lru_cache(maxsize=1 << 16)  # most of the data consists of a few answers
def normalise(answer: str) -> str:
    """An answer normalised as in the official VQA evaluation: lower case, no punctuation or articles, digits for
    numbers, contractions with their apostrophe.

    A punctuation mark is deleted if, anywhere in the answer, it touches a space or if the answer has a comma between
    digits; otherwise it becomes a space. Full stops are deleted unless a digit follows. Colons and apostrophes stay.
    """
    answer = " ".join(answer.split())
    text, thousands = answer, re.search(r"\d,\d", answer)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        deleted = thousands or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if deleted else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    words = [CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the")]
    # differs: an answer that would become empty, such as "A", is kept, so that a model can predict it.
    return " ".join(words) or answer.lower()


def worths(row: dict) -> dict[str, float]:
    """The normalised answers of a vqa row and their scores; the scores of equivalent spellings add up, to at most 1."""
    found = Counter()
    for answer, score in row["answers"].items():
        found[normalise(answer)] += score
    return {answer: min(score, 1.0) for answer, score in found.items()}


# ----------------------------------------------------------------------------------------- vqa, reasoning, entailment


def score_answers(task: str, rows: list[dict], answers: list[str]) -> list[float]:
    """The score of each answer, from 0 to 1: for vqa, the soft score given by the row; otherwise 1 if it is correct."""
    said = [named(task, answer) for answer in answers]
    if task == "vqa":
        return [float(worths(row).get(answer, 0.0)) for row, answer in zip(rows, said, strict=True)]
    return [float(named(task, right_label(row)) == answer) for row, answer in zip(rows, said, strict=True)]


def named(task: str, answer: str) -> str:
    """An answer in the spelling used for comparison: normalised for vqa, in lower case for tasks with fixed labels,
    otherwise unchanged."""
    if task == "vqa":
        return normalise(answer)
    return answer.strip().lower() if task in LABELS else answer


def right_label(row: dict) -> str:
    """The label of a row as an answer; booleans become "true" and "false"."""
    return str(row["label"]).lower() if isinstance(row["label"], bool) else row["label"]


def constant(task: str, rows: list[dict]) -> float:
    """The mean score, from 0 to 1, of the best constant answer: the majority baseline, used as the chance level."""
    scores = Counter()
    for row in rows:
        scores.update(worths(row) if task == "vqa" else {right_label(row): 1.0})
    return max(scores.values()) / len(rows)


def judge_answers(task: str, rows: list[dict], answers: list[str]) -> dict:
    """The metrics of vqa, reasoning or entailment.

    Returns: {"accuracy": estimate, "types": {type: estimate}}; chance per type is the best constant answer, and overall
             the best constant answer of each type. Reasoning with groups: also {"consistency": estimate}, i.e. all rows
             of a group correct; chance is a coin flip per row. Entailment: also {"confusion": {label: {answer: rows}}}
    Raises:  ValueError for an answer that is not one of the task's fixed labels
    """
    answers = [named(task, answer) for answer in answers]
    if labels := LABELS.get(task):
        for number, answer in enumerate(answers):
            if answer not in labels:
                raise ValueError(f"the answer to row {number} is {answer!r}: expected {', '.join(labels)}")
    scores = score_answers(task, rows, answers)
    of_type: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        of_type.setdefault(str(row.get("type", "")), []).append(number)
    parts = {}
    for name, numbers in sorted(of_type.items()):
        those = [rows[number] for number in numbers]
        parts[name] = estimate([scores[n] for n in numbers], list(map(cluster_of, those)), constant(task, those))
    chance = sum(part["chance"] * part["n"] for part in parts.values()) / len(rows) / 100
    result = {"accuracy": estimate(scores, list(map(cluster_of, rows)), chance)}
    result["types"] = parts if len(parts) > 1 else {}
    if task == "reasoning" and any("group" in row for row in rows):
        groups: dict[str, list[float]] = {}
        for row, score in zip(rows, scores, strict=True):
            groups.setdefault(cluster_of(row), []).append(score)
        coin = sum(0.5 ** len(group) for group in groups.values()) / len(groups)
        result["consistency"] = estimate([min(group) for group in groups.values()], list(groups), coin)
    if task == "entailment":
        pairs = Counter(zip(map(right_label, rows), answers, strict=True))
        result["confusion"] = {a: {b: pairs[a, b] for b in ENTAILMENT_LABELS} for a in ENTAILMENT_LABELS}
    return result


# ---------------------------------------------------------------------------------------------------------- grounding


def iou(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes [x, y, width, height]."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def fits(box: list[float] | None, boxes: list[list[float]]) -> bool:
    """Whether a box has an IoU of at least 0.5 with any ground-truth box; False for None."""
    return box is not None and any(iou(box, right) >= 0.5 for right in boxes)


def points_into(point: list[float] | None, boxes: list[list[float]]) -> bool:
    """Whether a point lies in any ground-truth box; False for None."""
    return point is not None and inside([tuple(point)], boxes)[0]


def patch_centres(grid: tuple[int, int], width: int, height: int) -> list[tuple[float, float]]:
    """The centre (x, y) of each patch, in pixels of an image of the given size, row by row."""
    rows, columns = grid
    return [((x + 0.5) * width / columns, (y + 0.5) * height / rows) for y in range(rows) for x in range(columns)]


def inside(centres: list[tuple[float, float]], boxes: list[list[float]]) -> list[bool]:
    """Whether each centre lies in any of the boxes [x, y, width, height]."""
    return [any(x <= px < x + w and y <= py < y + h for x, y, w, h in boxes) for px, py in centres]


def judge_grounding(rows: list[dict], predictions: list[dict]) -> dict:
    """The metrics of grounding; a missing point, box or proposal counts as wrong.

    Returns: {"pointing": estimate, "ceiling", "box": estimate}, and {"proposals": estimate} if all rows have proposals
             pointing    the point lies in a ground-truth box; chance: a random patch; ceiling: the best patch
             proposals   IoU >= 0.5 of the chosen proposal with a ground-truth box; chance: a random proposal
             box         IoU >= 0.5 of the box with a ground-truth box; chance: the same box at a random position
    """
    sizes = {path: size_of(path) for path in dict.fromkeys(row["image"] for row in rows)}
    clusters, draw = list(map(cluster_of, rows)), np.random.default_rng(0)
    points, patches, boxes, anywhere = [], [], [], []
    for row, prediction in zip(rows, predictions, strict=True):
        width, height = sizes[row["image"]]
        patches.append(inside(patch_centres(prediction["grid"], width, height), row["boxes"]))
        point, box = prediction.get("point"), prediction.get("box")
        points.append(points_into(point, row["boxes"]))
        boxes.append(fits(box, row["boxes"]))
        if box:
            x = draw.uniform(0, max(width - box[2], 0), 100)
            y = draw.uniform(0, max(height - box[3], 0), 100)
            anywhere.append(np.mean([fits([*place, *box[2:]], row["boxes"]) for place in zip(x, y, strict=True)]))
        else:
            anywhere.append(0.0)
    result = {
        "pointing": estimate(points, clusters, float(np.mean([np.mean(one) for one in patches]))),
        "ceiling": 100 * float(np.mean([any(one) for one in patches])),
        "box": estimate(boxes, clusters, float(np.mean(anywhere))),
    }
    if all("proposals" in row for row in rows):
        chosen = [p.get("proposal") for p in predictions]
        hits = [fits(box, row["boxes"]) for box, row in zip(chosen, rows, strict=True)]
        lucky = [np.mean([fits(box, row["boxes"]) for box in row["proposals"]]) for row in rows]
        result["proposals"] = estimate(hits, clusters, float(np.mean(lucky)))
    return result


# ---------------------------------------------------------------------------------------------------------- retrieval

SIDES = ("image_to_text", "text_to_image")


def right_answers(rows: list[dict], lists: Iterable[dict] = ()) -> tuple[dict[str, dict[str, set[str]]], dict]:
    """Rows of pairs -> ({direction: {query: set of right answers}}, {direction: (name a query, name an answer)}).

    The two functions map equivalent names to one: paths of one file, texts of the same words, and those in "also"."""
    also = {other: one.get("query") for one in lists for other in one.get("also", ())}
    first, right = {}, {side: {} for side in SIDES}

    def named(key: Callable) -> Callable[[str], str]:
        return lambda name: first.setdefault(key(also.get(name, name)), also.get(name, name))

    picture, text = named(resolved), named(bare_words)
    for row in rows:
        for caption in map(text, captions_of(row)):
            right["image_to_text"].setdefault(picture(row["image"]), set()).add(caption)
            right["text_to_image"].setdefault(caption, set()).add(picture(row["image"]))
    return right, {"image_to_text": (picture, text), "text_to_image": (text, picture)}


def recalls(rank: np.ndarray) -> dict[str, float]:
    """Zero-based ranks of the first correct answers (queries,) -> R@1, R@5 and R@10 in percent"""
    return {f"R@{k}": 100 * float((rank < k).mean()) for k in (1, 5, 10)}


def chance_recalls(counts: list[int], gallery: int) -> dict[str, float]:
    """R@1/5/10 in percent, of a random ranking: the top k of a gallery of g contain none of a query's r correct answers
    with probability C(g - r, k) / C(g, k). counts: r for each query; gallery: g"""
    levels = {}
    for k in (1, 5, 10):
        drawn = min(k, gallery)
        missed = {r: math.comb(gallery - r, drawn) / math.comb(gallery, drawn) for r in set(counts)}
        levels[f"R@{k}"] = 100 * (1 - sum(missed[r] for r in counts) / len(counts))
    return levels


def recall_intervals(rank: np.ndarray) -> dict[str, list[float]]:
    """Ranks of the first correct answers (queries,) -> 95 % confidence intervals of R@1, R@5 and R@10 in percent"""
    found = {k: estimate(rank < k, range(len(rank)), 0.0) for k in (1, 5, 10)}
    return {f"R@{k}": [one["low"], one["high"]] for k, one in found.items()}


def judge_retrieval(rows: list[dict], path: Path) -> dict:
    """Recalls computed from a file of ranked lists, in the format of eval.retrieval.

    Raises:  ValueError for a query that is missing, ranked twice or not in the data
    """
    lists = list(read_lines(path))
    for where, one in lists:
        found, also = one.get("found"), one.get("also", [])
        texts = [one.get("way"), one.get("direction"), one.get("query")]
        if not isinstance(found, list) or not isinstance(also, list) or not all(map(is_name, texts + found + also)):
            raise ValueError(
                f"{where}: expected texts in way, direction and query, and a list of what was found, of texts"
            )
    right, names = right_answers(rows, [one for _, one in lists])
    place = {(way, side): {} for way in ("contrast", "matching") for side in SIDES}
    for where, one in lists:
        key, query = (one.get("way"), one.get("direction")), one.get("query")
        if key not in place or names[key[1]][0](query) not in right[key[1]]:
            raise ValueError(
                f"{where}: {key[0]!r}, {key[1]!r}, {query!r}: expected contrast or matching, a direction, a "
                "query of the data and a list of what was found"
            )
        asked, answer = names[key[1]]
        if asked(query) in place[key]:
            raise ValueError(f"{where}: the query {query!r} is ranked twice: keep one line for each query")
        answers = right[key[1]][asked(query)]
        hits = [at for at, name in enumerate(one["found"]) if answer(name) in answers]
        place[key][asked(query)] = hits[0] if hits else 10  # the first correct answer is outside the top ten
    result = {"images": len(right[SIDES[0]]), "texts": len(right[SIDES[1]]), "k": "as predicted"}
    result |= {"chance": {}, "contrast": {}, "matching": {}, "apart": {}, "intervals": {}}
    for (way, side), found in place.items():
        if way == "matching" and not any(place[way, one] for one in SIDES):
            continue
        if len(found) < len(right[side]):
            raise ValueError(
                f"{path} lacks {len(right[side]) - len(found)} of {len(right[side])} queries of {side} by {way}: "
                "rank every query"
            )
        rank = np.array([found[query] for query in right[side]])
        result[way][side] = recalls(rank)
        result["intervals"].setdefault(way, {})[side] = recall_intervals(rank)
        other = len(right[SIDES[1 - SIDES.index(side)]])
        result["chance"][side] = chance_recalls([len(answers) for answers in right[side].values()], other)
    return result
